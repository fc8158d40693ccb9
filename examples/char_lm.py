"""Train a character-level language model with rnnkernels, then time it against torch.nn.

    python examples/char_lm.py                      # learn Python from its standard library
    python examples/char_lm.py --data my_novel.txt  # ... or from any text file or folder
    python examples/char_lm.py --resume             # continue where the last run stopped

The model is Embedding -> LSTM (or GRU, or RNN) -> Linear. Its recurrent layer is built from
``LAYERS`` below; the model it is compared with differs in nothing but ``TORCH_LAYERS`` (and, with
``--truncate``, in the loop over windows that torch.nn needs for it).
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

try:
    import matplotlib  # noqa: F401 -- of _results
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"char_lm.py needs {error.name}: pip install tqdm matplotlib")

import rnnkernels as rk
from _cli import (
    FIXED,
    CtrlC,
    Options,
    UsageError,
    blaming_backend,
    exit_code,
    parse_options,
)
from _compare import TIMED_STEPS, InWindows, in_turns
from _results import load_checkpoint, read_checkpoint, save_curve, save_metrics, write_atomically
from _text import Corpus, Streams, TextError, Vocabulary, read_corpus
from rnnkernels import streaming

LAYERS: dict[str, Callable[..., nn.Module]] = {"lstm": rk.LSTM, "gru": rk.GRU, "rnn": rk.RNN}
TORCH_LAYERS: dict[str, Callable[..., nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}

State = Tensor | tuple[Tensor, Tensor]
"""What a recurrent layer carries: h ``[layers, B, H]``, or (h, c) of that shape for an LSTM."""

MAX_GRADIENT_NORM = 1.0


class CharLM(nn.Module):
    """Embedding -> recurrent layers -> Linear: predicts each next character."""

    def __init__(self, vocabulary_size: int, embedding: int, hidden: int, rnn: nn.Module) -> None:
        """Wrap ``rnn``, any layer with the interface of ``torch.nn.LSTM``, GRU or RNN."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.rnn = rnn
        self.output = nn.Linear(hidden, vocabulary_size)

    def forward(self, tokens: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """Map tokens ``[T, B]`` and state ``hx`` to logits ``[T, B, vocabulary]`` and ``h_n``."""
        output, h_n = self.rnn(self.embedding(tokens), hx)
        return self.output(output), h_n


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats, of logits ``[T, B, V]`` for targets ``[T, B]``."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_step(
    model: CharLM,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    hx: State | None,
) -> tuple[Tensor, State]:
    """Learn from one chunk ``[T, B]``; return its loss and the detached final state."""
    optimizer.zero_grad()
    logits, h_n = model(inputs, hx)
    loss = loss_of(logits, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach(), streaming.detach(h_n)


@torch.no_grad()
def bits_per_character(model: CharLM, streams: Streams) -> float:
    """Measure ``model`` on all of ``streams``, carrying the state from chunk to chunk."""
    model.eval()
    total = 0.0
    hx: State | None = None
    for index in range(streams.chunks):
        inputs, targets = streams.chunk(index)
        logits, hx = model(inputs, hx)
        total += loss_of(logits, targets).item()
    model.train()
    return total / streams.chunks / math.log(2)


@torch.no_grad()
def generate(model: CharLM, vocabulary: Vocabulary, options: Options) -> str:
    """Continue ``--prompt``, drawing each character given all before it."""
    model.eval()
    generator = torch.Generator().manual_seed(options.seed)
    tokens = vocabulary.encode("\n" + options.prompt)
    hx: State | None = None
    written: list[int] = []
    for _ in range(options.sample_length):
        logits, hx = model(tokens.view(-1, 1).to(options.device), hx)
        scores = logits[-1, 0].cpu()
        scores[0] = -math.inf  # never write the unknown character
        if options.temperature == 0:
            tokens = scores.argmax()
        else:
            probabilities = torch.softmax(scores / options.temperature, dim=0)
            tokens = torch.multinomial(probabilities, 1, generator=generator)
        written.append(int(tokens))
    model.train()
    return options.prompt + vocabulary.decode(written)


def build_model(options: Options, vocabulary_size: int, library: str = "rnnkernels") -> CharLM:
    """Build the model with the layer of ``"rnnkernels"`` or, to compare, of ``"torch.nn"``."""
    sizes = {"num_layers": options.layers, "dropout": options.dropout}
    if library == "torch.nn":
        rnn = TORCH_LAYERS[options.cell](options.embedding, options.hidden, **sizes)
    else:
        window = {"truncate": options.truncate} if options.truncate else {}
        with blaming_backend(options.backend):
            rnn = LAYERS[options.cell](
                options.embedding, options.hidden, **sizes, **window, backend=options.backend
            ).to(options.device)
            if options.backend is not None:  # whether it can run is known once it does
                with torch.no_grad(), torch.random.fork_rng():
                    rnn(torch.zeros(1, 1, options.embedding, device=options.device))
    model = CharLM(vocabulary_size, options.embedding, options.hidden, rnn)
    return model.to(options.device)


def build_optimizer(model: CharLM, options: Options) -> torch.optim.Optimizer:
    """Build the optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=options.lr)


class Trainer:
    """A model in training, with all that a checkpoint needs to continue it exactly."""

    def __init__(
        self, options: Options, vocabulary: Vocabulary, train: Streams, held_out: Streams, text: str
    ) -> None:
        """Start at step 0; ``text`` is a fingerprint of the corpus, kept in checkpoints."""
        torch.manual_seed(options.seed)
        self.options = options
        self.vocabulary = vocabulary
        self.train_streams = train
        self.held_out_streams = held_out
        self.text = text
        self.model = build_model(options, len(vocabulary))
        self.optimizer = build_optimizer(self.model, options)
        self.step = 0
        self.hx: State | None = None
        self.running_loss: Tensor | None = None
        self.history: list[dict[str, float]] = []

    def advance(self) -> None:
        """Take one training step on the next chunk; start from a zero state at each new pass."""
        index = self.step % self.train_streams.chunks
        hx = None if index == 0 else self.hx
        inputs, targets = self.train_streams.chunk(index)
        loss, self.hx = training_step(self.model, self.optimizer, inputs, targets, hx)
        previous = self.running_loss
        self.running_loss = loss if previous is None else torch.lerp(previous, loss, 0.05)
        self.step += 1

    def running_bits(self) -> float:
        """Return the training bits per character, averaged over about the last 20 steps."""
        return math.nan if self.running_loss is None else self.running_loss.item() / math.log(2)

    def evaluate(self) -> float:
        """Measure the held-out bits per character and note them in the history."""
        bits = bits_per_character(self.model, self.held_out_streams)
        entry = {"step": self.step, "held_out_bpc": bits}
        if self.running_loss is not None:
            entry["train_bpc"] = self.running_bits()
        self.history.append(entry)
        return bits

    def save(self, path: Path) -> None:
        """Write a checkpoint. The position in the streams follows from the step."""
        device = self.options.device
        checkpoint = {
            "options": {name: getattr(self.options, name) for name in FIXED},
            "text": self.text,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "hx": self.hx,
            "running_loss": self.running_loss,
            "history": self.history,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        write_atomically(path, lambda file: torch.save(checkpoint, file))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same model on the same text."""
        checkpoint = read_checkpoint(path, self.options, self.text)
        device = self.options.device
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step = checkpoint["step"]
        self.history = checkpoint["history"]
        if self.step > 0:
            hx = checkpoint["hx"]
            self.hx = hx.to(device) if isinstance(hx, Tensor) else tuple(t.to(device) for t in hx)
            self.running_loss = checkpoint["running_loss"].to(device)
        torch.set_rng_state(checkpoint["rng"])
        if device.type == "cuda" and checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_rng"], device)


def train(trainer: Trainer, checkpoint: Path) -> bool:
    """Train up to ``--steps``, evaluating and saving on the way; return False after Ctrl-C."""
    options = trainer.options
    progress = tqdm(total=options.steps, initial=trainer.step, unit="step", dynamic_ncols=True)
    with progress, CtrlC() as ctrl_c:

        def evaluate() -> None:
            bits = trainer.evaluate()
            trainer.save(checkpoint)
            progress.write(f"step {trainer.step:5}: held-out {bits:.3f} bits per character")

        if not trainer.history:
            evaluate()
        while trainer.step < options.steps and not ctrl_c.pressed:
            trainer.advance()
            progress.update()
            if trainer.step % 10 == 0:
                progress.set_postfix_str(f"{trainer.running_bits():.3f} bits/char")
            if trainer.step % options.eval_every == 0 or trainer.step == options.steps:
                evaluate()
        if ctrl_c.pressed:
            trainer.save(checkpoint)
    return not ctrl_c.pressed


def compare(trainer: Trainer) -> dict[str, float]:
    """Time a training step with rnnkernels against torch.nn, in turns, from the same weights.

    Dropout is off, so that both models first can be seen to compute the same loss.
    """
    options = Options(**{**vars(trainer.options), "dropout": 0.0})
    size = len(trainer.vocabulary)
    inputs, targets = trainer.train_streams.chunk(0)
    losses: dict[str, Tensor] = {}
    steps: list[Callable[[], object]] = []
    for library in ("rnnkernels", "torch.nn"):
        model = build_model(options, size, library)
        model.load_state_dict(trainer.model.state_dict())
        if library == "torch.nn" and options.truncate:
            model.rnn = InWindows(model.rnn, options.truncate)
        losses[library] = loss_of(model(inputs)[0], targets).detach()
        optimizer = build_optimizer(model, options)
        steps.append(partial(training_step, model, optimizer, inputs, targets, None))
    torch.testing.assert_close(losses["rnnkernels"], losses["torch.nn"], rtol=1e-4, atol=1e-5)

    ours, theirs = in_turns(steps, options.device)
    return {
        "rnnkernels_ms": ours,
        "torch_nn_ms": theirs,
        "ratio": theirs / ours,
        "rnnkernels_loss": losses["rnnkernels"].item(),
        "torch_nn_loss": losses["torch.nn"].item(),
    }


def read_streams(options: Options) -> tuple[Corpus, Vocabulary, Streams, Streams]:
    """Read the text; return it with its vocabulary, its training and its held-out streams."""
    batch_size, seq_len = options.batch_size, options.seq_len
    try:
        corpus = read_corpus(options.data)
        vocabulary = Vocabulary.of(corpus.train)
        tokens = vocabulary.encode(corpus.train).to(options.device)
        train = Streams(tokens, batch_size, seq_len, "training text")
        tokens = vocabulary.encode(corpus.held_out).to(options.device)
        batch_size = max(1, min(batch_size, len(tokens) // (seq_len + 1)))
        held_out = Streams(tokens, batch_size, seq_len, "held-out text")
    except TextError as error:
        raise UsageError(f"argument --data: {error}") from error
    return corpus, vocabulary, train, held_out


def run(options: Options) -> int:
    """Train, report and compare as ``options`` say; return the exit code."""
    corpus, vocabulary, train_streams, held_out_streams = read_streams(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"argument --out: expected a folder to write to, but {str(options.out)!r} cannot be "
            f"made ({error.strerror}); name another"
        ) from error
    checkpoint = options.out / "checkpoint.pt"

    fingerprint = hashlib.sha256(f"{corpus.train}\0{corpus.held_out}".encode()).hexdigest()
    trainer = Trainer(options, vocabulary, train_streams, held_out_streams, fingerprint)
    if options.resume is not None:
        trainer.load(options.resume)

    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"text:  {corpus.origin}")
    print(
        f"       {len(corpus.train):,} characters to learn from, {len(corpus.held_out):,} held "
        f"out, {len(vocabulary)} different ones"
    )
    print(
        f"model: {options.layers}-layer rnnkernels.{options.cell.upper()}, hidden size "
        f"{options.hidden}, {parameters:,} parameters, on {options.device}, "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )

    start = time.perf_counter()
    if not train(trainer, checkpoint):
        print(f"Stopped at step {trainer.step}; --resume {checkpoint} continues from here.")
        return 130
    seconds = time.perf_counter() - start

    first, last = trainer.history[0], trainer.history[-1]
    print(
        f"\nheld-out bits per character: {first['held_out_bpc']:.3f} before training, "
        f"{last['held_out_bpc']:.3f} after {last['step']} steps (this run took {seconds:.0f} s)"
    )
    sample = generate(trainer.model, vocabulary, options)
    print(f"\n--- generated, temperature {options.temperature:g} ---\n{sample}\n---")

    metrics: dict[str, Any] = {
        "first_bpc": first["held_out_bpc"],
        "last_bpc": last["held_out_bpc"],
        "steps": last["step"],
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "device": str(options.device),
        "options": {name: getattr(options, name) for name in FIXED},
        "history": trainer.history,
        "sample": sample,
    }
    if not options.no_compare:
        times = metrics["step_time"] = compare(trainer)
        print(
            f"\none training step (forward + backward + optimizer), median of {TIMED_STEPS} taken "
            f"in turns, {torch.get_num_threads()} threads:\n"
            f"  rnnkernels {times['rnnkernels_ms']:8.2f} ms   loss {times['rnnkernels_loss']:.5f}\n"
            f"  torch.nn   {times['torch_nn_ms']:8.2f} ms   loss {times['torch_nn_loss']:.5f}\n"
            f"  torch.nn / rnnkernels = {times['ratio']:.2f}"
        )
    save_metrics(options.out / "metrics.json", metrics)
    title = f"Character language model, {options.layers}-layer rnnkernels.{options.cell.upper()}"
    save_curve(options.out / "bpc.png", trainer.history, title)
    print(f"\nwrote checkpoint.pt, metrics.json and bpc.png to {options.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    description = "Train a character-level language model with rnnkernels."

    def saved(path: Path) -> dict[str, object]:
        return dict(load_checkpoint(path, "char_lm.py")["options"])

    return exit_code("char_lm.py", lambda: run(parse_options(argv, description, saved)))


if __name__ == "__main__":
    sys.exit(main())
