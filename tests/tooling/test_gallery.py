"""The programs of examples/gallery, each on a small part of its data: they learn, draw, stop and
resume. One whose package is not installed is skipped."""

from __future__ import annotations

import copy
import importlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import run_python
from rnnkernels import convert

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

#: Of each program the packages it needs, and by what factor its loss falls at least.
PROGRAMS: dict[str, tuple[tuple[str, ...], float]] = {
    "captions": (("sklearn",), 0.8),
    "cartpole": (("gymnasium",), 0.8),
    "digits": (("sklearn",), 0.5),
    "dna": (("pyrodigal",), 0.997),
    "exploding": (("sklearn",), 0.9),
    "forecasting": (("statsmodels",), 0.9),
    "keras_example": (("gramps",), 0.8),
    "music": (("music21",), 0.9),
    "one_to_one": (("sklearn",), 0.75),
    "own_cell": (("sklearn",), 0.95),
    "sentiment": (("snownlp",), 0.95),
    "speech": (("espeakng_loader", "kaldi_native_fbank"), 0.8),
    "tagging": ((), 0.6),
    "translation": (("gramps", "sacrebleu"), 0.85),
    "video": (("ale_py",), 0.9),
}
RUNS = [
    *((name, []) for name in PROGRAMS),
    ("digits", ["--pixels", "--cell=rnn", "--epochs=2"]),
    ("forecasting", ["--series=sunspots", "--cell=lstm"]),
]


def load(name: str) -> Any:
    """Import a program, where its packages are."""
    for needed in PROGRAMS[name][0]:
        pytest.importorskip(needed)
    return importlib.import_module(name)


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize(("name", "more"), RUNS, ids=lambda value: "".join(value))
def test_learns_and_resumes_to_the_bit(
    gallery: Any, name: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load(name)

    def run(file: str, *arguments: str) -> int:
        paths = [f"--checkpoint={tmp_path / file}.pt", f"--plot={tmp_path / file}.png"]
        return int(program.main(["--quick", *paths, *more, *arguments]))

    assert run("whole") == 0
    assert (tmp_path / "whole.png").read_bytes().startswith(b"\x89PNG")

    evaluate = gallery.evaluate

    def evaluate_until_ctrl_c(task: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return float(evaluate(task))

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "evaluate", evaluate_until_ctrl_c)
        assert run("parts") == 130
    assert not (tmp_path / "parts.png").exists()
    torch.rand(7)
    assert run("parts", "--resume") == 0

    whole, parts = (torch.load(tmp_path / f"{file}.pt") for file in ("whole", "parts"))
    assert parts.keys() == whole.keys()
    for key in ("history", "options", "data"):
        assert parts[key] == whole[key]
    for key in ("model", "rng"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
    states = parts["optimizer"]["state"], whole["optimizer"]["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)

    first, last = whole["history"][0], whole["history"][-1]
    if not more:
        assert last["loss"] < PROGRAMS[name][1] * first["loss"]


def test_two_processes_have_the_losses_of_one(gallery: Any, tmp_path: Path) -> None:
    """One process, one that is stopped and resumed, and two that go on from where it stopped."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    alone = importlib.import_module("data_parallel")

    def arguments(name: str, *more: str) -> list[str]:
        files = ("losses", "json"), ("checkpoint", "pt"), ("plot", "png")
        return ["--quick", *(f"--{what}={tmp_path / name}.{end}" for what, end in files), *more]

    assert alone.main(arguments("1")) == 0
    assert alone.main(arguments("parts", "--steps=7")) == 0
    (tmp_path / "2.pt").write_bytes((tmp_path / "parts.pt").read_bytes())
    assert alone.main(arguments("parts", "--resume")) == 0
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", alone.__file__]
    done = run_python(*start, *arguments("2", "--resume"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    one, parts, two = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1", "parts", "2")
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    assert parts["losses"] == one["losses"]
    assert (tmp_path / "2.png").read_bytes().startswith(b"\x89PNG")
    states = (torch.load(tmp_path / f"{name}.pt")["hx"] for name in ("2", "1"))
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)
    assert alone.main(arguments("1", "--resume", "--seed=1")) == 2
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["losses"][-1] < 0.95 * one["losses"][0]


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_sequence_of_one_step_is_a_feed_forward_layer(gallery: Any, cell: str) -> None:
    one_to_one = importlib.import_module("one_to_one")
    rnn = gallery.CELLS[cell](64, 5, dtype=torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64)
    plain = one_to_one.feed_forward(rnn, x, cell)
    torch.testing.assert_close(plain, rnn(x[None])[0][0], rtol=1e-12, atol=1e-13)


def test_episodes_by_reset_are_those_of_a_loop(gallery: Any) -> None:
    cartpole = importlib.import_module("cartpole")
    policy = cartpole.Policy(gallery.Options(cell="gru", backend=None), 5)
    seen, reset = torch.randn(9, cartpole.CARTS, 2), torch.rand(9, cartpole.CARTS) < 0.3
    reset[0] = True
    looped = cartpole.by_episodes(policy, seen, reset)
    torch.testing.assert_close(looped, policy.rnn(seen, reset=reset)[0])


def test_a_wide_beam_finds_what_greedy_search_misses(gallery: Any) -> None:
    """Word 4 is likelier at first, but what follows it is unsure; after 5 comes the end."""
    translation = importlib.import_module("_translation")
    end = translation.END
    follows = torch.full([7, 7], 1e-9)
    follows[translation.BEGIN, 4], follows[translation.BEGIN, 5] = 0.6, 0.4
    follows[4, 4:7] = torch.tensor([0.3, 0.3, 0.4])
    follows[5, end] = follows[6, end] = 1.0

    def step(words: Any, state: Any, rows: Any) -> Any:
        assert len(rows) == words.shape[1] == state.shape[1]
        return follows[words[0]].log(), state

    def best(width: int) -> list[int]:
        found = translation.search(step, torch.zeros(1, 2, 3), 2, width, 3)
        assert found[0].tolist() == found[1].tolist()
        return list(found[0].tolist())

    assert best(1) == [4, 6, end]
    assert best(3)[:2] == [5, end]


def test_the_right_paddle_moves_as_the_clip_says(gallery: Any) -> None:
    pytest.importorskip("ale_py")
    video = importlib.import_module("video")
    console, chance = video.start_console(), torch.Generator().manual_seed(0)

    def heights(name: str) -> list[float]:
        clip = video.film(console, video.MOVEMENTS[name], chance)
        column = clip.view(-1, video.SIZE, video.SIZE)[:, :, -4:].sum(2).clamp(min=0)
        places = torch.arange(video.SIZE, dtype=column.dtype)
        return list(((column * places).sum(1) / column.sum(1)).tolist())

    up, down, back, still = (heights(name) for name in ("up", "down", "up, down", "still"))
    assert up[-1] < up[0] - 1 and down[-1] > down[0] + 1
    assert min(back) < min(back[0], back[-1]) - 1
    assert max(still[1:]) - min(still[1:]) < 0.1


def test_a_voice_is_heard(gallery: Any) -> None:
    pytest.importorskip("espeakng_loader")
    speaker = importlib.import_module("_speech").Speaker()
    slow, fast = (speaker.say("seven", "en-us+f3", rate) for rate in (100, 300))
    assert 0.05 < slow.abs().max() <= 1 and len(slow) > 1.5 * len(fast)
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        speaker.say("seven", "nobody")


@pytest.mark.filterwarnings("ignore")  # of TorchScript
def test_the_network_built_again_answers_as_the_shipped_one(
    gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("silero_vad", "espeakng_loader"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    served = importlib.import_module("voice_activity")
    plain = served.rebuild(shipped := served.load_shipped())
    samples, _ = served.record(2, 1)
    ways = served.ways(shipped, plain, convert(copy.deepcopy(plain)), served.in_steps(samples))
    with torch.no_grad():
        answers = [way(part) for part, way in ways.values()]
    assert answers[-1].max() > 0.5 > answers[-1].min()
    for answer in answers[:-1]:
        want = answers[-1][: answer.shape[0], : answer.shape[1]]
        torch.testing.assert_close(answer, want, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(served, "in_turns", lambda steps, device: [1.0] * len(steps))
    row = served.row(True, tmp_path / "picture.png")
    assert row.beats and float(row.value[:-1]) > float(row.baseline_value[:-1])
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (100, "one hundred"),
        (437, "four hundred thirty seven"),
    ],
)
def test_numbers_in_words(gallery: Any, number: int, words: str) -> None:
    assert importlib.import_module("captions").spell(number) == words.split()


def test_labels_of_characters(gallery: Any) -> None:
    tagging = importlib.import_module("tagging")
    whole = "if x1 >= 'a':  # ä\n    pass\n\ny = '''cut"
    text, labels = tagging.label(whole)
    assert whole.startswith(text) and len(text) == len(labels)
    letters = "".join(tagging.CLASSES[label][0] for label in labels.tolist())
    assert letters.startswith("kkbnnboobsssobbcccbbbbbkkkkb")


def test_notes_of_a_chorale(gallery: Any, tmp_path: Path) -> None:
    """The soprano holds a pitch for two eighths, the bass one in the third."""
    chorales = importlib.import_module("_chorales")
    c4, rest, hold = 60 - chorales.LOWEST + 2, chorales.REST, chorales.HOLD
    tokens = torch.tensor([c4, rest, rest, rest, hold, hold, hold, hold, rest, hold, hold, c4])
    assert chorales.notes(tokens) == [(0, 60, 0, 2), (3, 60, 2, 1)]
    assert chorales.notes(chorales.transpose(tokens, 3)) == [(0, 63, 0, 2), (3, 63, 2, 1)]
    chorales.write_midi(tmp_path / "a.mid", tokens)
    data = (tmp_path / "a.mid").read_bytes()
    assert data.startswith(b"MThd") and data.count(b"MTrk") == 4
    assert b"\x00\x90\x3c\x50\x02\x80\x3c\x00\x00\xff\x2f\x00" in data


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--cell", "tree"], ["--cell", "'tree'"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--backend", "abacus"], ["--backend", "abacus"]),
        (["--resume"], ["--resume", "does not exist"]),
        (["--checkpoint", "."], ["--checkpoint", "is a folder"]),
        (["--plot", "file/plot.png"], ["--plot", "cannot be made"]),
    ],
)
def test_wrong_arguments(
    gallery: Any,
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert load("tagging").main(["--quick", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("tagging.py: error: ")
    assert all(part in message for part in parts)


def test_a_checkpoint_of_another_run_is_refused(
    gallery: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"--checkpoint={tmp_path / 'a.pt'}", f"--plot={tmp_path / 'a.png'}"]
    task = gallery.Task(
        data="ones",
        model=torch.nn.Linear(1, 1),
        batches=lambda: [(torch.ones(1, 1),)],
        loss=lambda model, batch: model(batch[0]).square().sum(),
        evaluate=lambda model: 0.5,
        metric="accuracy",
        show=".1%",
        rises=True,
        baseline="none",
        baseline_value=0.6,
    )
    program = gallery.Program("ones.py", "Ones.", lambda options: task, (2, 1))
    assert program.main(paths) == 0
    assert "60.0%, none, which is not beaten" in capsys.readouterr().out
    rates = [group["lr"] for group in torch.load(tmp_path / "a.pt")["optimizer"]["param_groups"]]
    assert rates == [task.lr]
    task.settles = True
    assert program.main(["--epochs=3", *paths, "--resume"]) == 0
    rates = [group["lr"] for group in torch.load(tmp_path / "a.pt")["optimizer"]["param_groups"]]
    assert rates == pytest.approx([task.lr / 3])  # of the third epoch of three
    assert program.main([*paths, "--resume", "--seed=1"]) == 2
    assert "made with --seed 0, but this run has --seed 1" in capsys.readouterr().err
    assert program.main([*paths, "--resume", "--quick"]) == 2
    assert "made with no --quick, but this run has --quick" in capsys.readouterr().err
    task.data = "twos"
    assert program.main([*paths, "--resume"]) == 2
    assert "trained on other data (ones)" in capsys.readouterr().err
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    assert program.main([*paths, "--resume"]) == 2
    assert "cannot be read as one" in capsys.readouterr().err


def test_a_missing_package_is_named_as_pip_knows_it(
    gallery: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "sklearn.datasets", None)
    with pytest.raises(gallery.UsageError, match="pip install scikit-learn"):
        gallery.package("sklearn.datasets")
