"""The character language model of examples/char_lm.py."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rnnkernels import streaming

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"

TINY = [
    "--hidden=16",
    "--embedding=8",
    "--batch-size=4",
    "--seq-len=16",
    "--lr=0.02",
    "--eval-every=5",
    "--sample-length=30",
]


@pytest.fixture
def char_lm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import the example, as running it as a script would; one thread suits the tiny model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("char_lm")
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Make a folder of three text files; one of them will be held out."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index, lines in enumerate((40, 30, 20)):
        body = "".join(f"def add_{n}(x):\n    return x + {n}  # näh\n" for n in range(lines))
        (folder / f"{index}.py").write_text(body, encoding="utf-8")
    return folder


def load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def test_help() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "char_lm.py"), "--help"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert "--resume" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--data", "no/such/folder"], ["--data", "no/such/folder", "does not exist"]),
        (["--batch-size", "1000"], ["--data", "--batch-size 1000", "give more text"]),
        (["--steps", "0"], ["--steps", "at least 1", "'0'"]),
        (["--truncate", "0"], ["--truncate", "at least 1", "'0'"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--device", "abacus"], ["--device", "'abacus'"]),
        (["--dropout", "0.5", "--layers", "1"], ["--dropout", "--layers 2"]),
        (["--data", os.devnull], ["--data", os.devnull, "is neither"]),
        (
            ["--backend", "cuda", "--device", "cpu"],
            ["--backend", "'cuda' was asked for"],
        ),
        (["--resume", "no/such/file"], ["--resume", "no/such/file", "does not exist"]),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(
    char_lm: Any,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    parts: list[str],
) -> None:
    out = f"--out={tmp_path / 'out'}"
    assert char_lm.main(["--data", str(text), out, *TINY, *arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    for part in parts:
        assert part in stderr


def test_empty_text_is_refused(
    char_lm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    assert char_lm.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--data: found no text" in capsys.readouterr().err


def test_training_lowers_the_loss_and_leaves_its_files(
    char_lm: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert char_lm.main(["--data", str(text), "--out", str(out), "--steps=30", *TINY]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["last_bpc"] < metrics["first_bpc"] - 1
    assert [entry["step"] for entry in metrics["history"]] == [0, 5, 10, 15, 20, 25, 30]
    assert metrics["sample"].startswith("def ")
    assert len(metrics["sample"]) == len("def ") + 30
    assert metrics["step_time"]["ratio"] > 0
    assert load(out / "checkpoint.pt")["step"] == 30
    assert (out / "bpc.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.iterdir()) == [
        "bpc.png",
        "checkpoint.pt",
        "metrics.json",
    ]
    assert metrics["sample"] in capsys.readouterr().out


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_resuming_after_ctrl_c_is_bitwise_the_uninterrupted_run(
    char_lm: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cell: str
) -> None:
    def run(out: str, *more: str) -> int:
        arguments = ["--data", str(text), "--out", str(tmp_path / out), "--steps=40", *TINY]
        return int(
            char_lm.main([*arguments, f"--cell={cell}", "--dropout=0.3", "--no-compare", *more])
        )

    assert run("whole") == 0

    advance = char_lm.Trainer.advance

    def advance_until_ctrl_c(trainer: Any) -> None:
        advance(trainer)
        if trainer.step == 13:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(char_lm.Trainer, "advance", advance_until_ctrl_c)
    assert run("parts") == 130
    assert load(tmp_path / "parts" / "checkpoint.pt")["step"] == 13
    torch.rand(7)
    assert run("parts", "--resume") == 0

    whole = load(tmp_path / "whole" / "checkpoint.pt")
    parts = load(tmp_path / "parts" / "checkpoint.pt")
    for name in ("model", "hx", "running_loss", "rng"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=0)
    states = parts["optimizer"]["state"], whole["optimizer"]["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert parts["step"] == whole["step"] == 40
    assert parts["history"] == whole["history"]


def test_a_checkpoint_of_another_model_or_text_is_refused(
    char_lm: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(text), "--out", str(tmp_path / "out"), *TINY, "--no-compare"]
    assert char_lm.main([*arguments, "--steps=1"]) == 0
    assert char_lm.main([*arguments, "--resume", "--layers=3"]) == 2
    assert "made with --layers 2, but this run has --layers 3" in capsys.readouterr().err
    (text / "0.py").write_text("another text\n" * 100)
    assert char_lm.main([*arguments, "--resume"]) == 2
    assert "another text than this run's --data" in capsys.readouterr().err
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert char_lm.main([*arguments, "--resume"]) == 2
    assert "cannot be read as one" in capsys.readouterr().err


def test_a_checkpoint_from_before_truncate_is_one_without(
    char_lm: Any, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(text), "--out", str(out), *TINY, "--no-compare"]
    assert char_lm.main([*arguments, "--steps=2"]) == 0
    old = load(out / "checkpoint.pt")
    del old["options"]["truncate"]
    torch.save(old, out / "checkpoint.pt")
    assert char_lm.main([*arguments, "--resume", "--steps=3"]) == 0

    options = char_lm.parse_options([*arguments, "--truncate=8"], "", dict)
    with pytest.raises(char_lm.UsageError, match=r"with no --truncate, but .* has --truncate 8;"):
        char_lm.read_checkpoint(out / "checkpoint.pt", options, old["text"])


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_training_with_truncated_gradients(
    char_lm: Any, text: Path, tmp_path: Path, cell: str
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(text), "--out", str(out), *TINY, f"--cell={cell}", "--truncate=5"]
    assert char_lm.main([*arguments, "--steps=30"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["last_bpc"] < metrics["first_bpc"] - 1
    assert metrics["options"]["truncate"] == 5
    times = metrics["step_time"]
    assert times["rnnkernels_loss"] == pytest.approx(times["torch_nn_loss"], rel=1e-4)
    assert char_lm.main([*arguments, "--truncate=4", "--resume", "--steps=31"]) == 2
    # What is not said is as it was.
    assert char_lm.main([*arguments[:4], "--resume", "--steps=31", "--no-compare"]) == 0
    options = json.loads((out / "metrics.json").read_text())["options"]
    assert (options["truncate"], options["cell"], options["hidden"]) == (
        5,
        cell,
        metrics["options"]["hidden"],
    )


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_torch_in_windows_has_the_gradients_of_truncation(char_lm: Any, cell: str) -> None:
    """Windows of 5 in 16 steps, from a state, where the layer is told so by its call."""
    theirs = char_lm.TORCH_LAYERS[cell](3, 4, num_layers=2, dtype=torch.float64)
    ours = char_lm.LAYERS[cell](3, 4, num_layers=2, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(16, 2, 3, dtype=torch.float64)
    _, hx = theirs(x)
    hx = streaming.detach(hx)
    dy = torch.randn(16, 2, 4, dtype=torch.float64)

    y, h_n = char_lm.InWindows(theirs, 5)(x, hx)
    y.backward(dy)
    our_y, our_h_n = ours(x, hx, truncate=5)
    our_y.backward(dy)
    torch.testing.assert_close((our_y, our_h_n), (y, h_n), rtol=1e-12, atol=1e-13)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-13)


def test_a_write_that_fails_keeps_the_old_file(char_lm: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def fail(file: Path) -> None:
        file.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        char_lm.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_whole_files_are_held_out(char_lm: Any, text: Path) -> None:
    corpus = char_lm.read_corpus(text)
    texts = [(text / f"{index}.py").read_text(encoding="utf-8") for index in range(3)]
    held_out = texts.index(corpus.held_out)
    learnt = [text for index, text in enumerate(texts) if index != held_out]
    assert sorted(corpus.train) == sorted("\n".join(learnt))


def test_rare_and_unprintable_characters_become_unknown(char_lm: Any) -> None:
    vocabulary = char_lm.Vocabulary.of("ab\n\x1b" * 50_000 + "é")
    tokens = vocabulary.encode("ab\n\x1béz")
    assert vocabulary.decode(tokens.tolist()) == "ab\n" + "\N{REPLACEMENT CHARACTER}" * 3


def test_chunks_continue_each_stream(char_lm: Any) -> None:
    streams = char_lm.Streams(torch.arange(100), batch_size=3, seq_len=5)
    chunks = [streams.chunk(index) for index in range(streams.chunks)]
    inputs = torch.cat([inputs for inputs, _ in chunks])
    targets = torch.cat([targets for _, targets in chunks])
    assert inputs[:, 1].tolist() == list(range(33, 33 + 30))
    assert torch.equal(targets, inputs + 1)
