"""Runs commands one after the other, or beside each other, within seconds that are given for all.

Whatever ends the run, what was done until then is there: the record is written after every step,
and the log while it grows. Other files that steps leave in the work folder are packed at the end,
or when the process is told to end (SIGTERM, SIGINT).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5.0  # seconds kept for packing


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    outcome: str  # "passed", or what happened instead
    seconds: float
    said: str


@dataclass
class Run:
    """One call: `out` gets NAME.json, NAME.log and NAME.tar.gz.

    Attributes:
        seconds: for all steps together, from the start of the run.
        environment: of the commands, beside the one that is there.
    """

    name: str
    out: Path
    work: Path
    seconds: float
    about: dict[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started, self.allowed = time.monotonic(), self.seconds
        self.steps: list[dict[str, Any]] = []
        self._lock = threading.RLock()
        self._running: set[int] = set()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self._log = (self.out / f"{self.name}.log").open("w")

    def left(self) -> float:
        return self.seconds - GRACE - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)
            print(text, file=self._log, flush=True)

    def note(self, stage: str, name: str, outcome: str, seconds: float, **more: Any) -> None:
        """Adds a step to the record, which is there from now on."""
        with self._lock:
            step = {"stage": stage, "name": name, "outcome": outcome, "seconds": round(seconds, 2)}
            self.steps.append(step | more)
            self.save()
            self.say(f"{stage:10} {name:32} {seconds:6.1f} s  {outcome}")

    def save(self) -> None:
        with self._lock:
            record = {
                **self.about,
                "call": self.name,
                "seconds": round(time.monotonic() - self.started, 1),
                "allowed": self.allowed,
                "steps": self.steps,
            }
            part = self.out / f".{self.name}.json"
            part.write_text(json.dumps(record, indent=1) + "\n")
            part.replace(self.out / f"{self.name}.json")

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """A process in a session of its own, which ends with the run."""
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **self.environment, **options.pop("env", {})},
            start_new_session=True, **options,
        )  # fmt: skip
        self._running.add(process.pid)
        return process

    def finish(self, process: subprocess.Popen[str], limit: float) -> str:
        """Waits for it and says how it ended; after the limit, or with less than nothing left, it
        is killed with all that it started."""
        try:
            code = process.wait(max(0.0, min(limit, self.left())))
        except subprocess.TimeoutExpired:
            kill(process.pid)
            process.wait()
            return "out of time"
        finally:
            kill(process.pid)  # what it may have left behind
            self._running.discard(process.pid)
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return "passed" if code == 0 else f"exit status {code}"

    def command(self, stage: str, name: str, command: list[str], limit: float, **more: Any) -> Done:
        """Runs one step; what it prints is appended to the log, and its end to the record."""
        if self.left() < 1:
            self.note(stage, name, "left out", 0, detail="no time was left", **more)
            return Done("left out", 0, "")
        begin = time.monotonic()
        file = self.work / f"{stage}-{name}.txt".replace("/", "-").replace(" ", "-")
        try:
            with file.open("w") as into:
                outcome = self.finish(self.start(command, stdout=into), limit)
        except FileNotFoundError:
            outcome = f"{command[0]} is not there"
        said = file.read_text(errors="replace")
        seconds = time.monotonic() - begin
        self.append(f"{stage} {name}: {shlex.join(command)}", said)
        last = said.strip().splitlines()[-1][:200] if said.strip() else ""
        self.note(stage, name, outcome, seconds, last=last, **more)
        return Done(outcome, seconds, said)

    def append(self, title: str, text: str) -> None:
        """To the log alone."""
        with self._lock:
            print(f"=== {title}\n{text.rstrip()}", file=self._log, flush=True)

    def pack(self) -> None:
        """All files of the work folder, as one."""
        part = self.out / f".{self.name}.tar.gz"
        with tarfile.open(part, "w:gz") as archive:
            for path in sorted(p for p in self.work.rglob("*") if p.is_file()):
                archive.add(path, path.relative_to(self.work))
        part.replace(self.out / f"{self.name}.tar.gz")

    def stop(self) -> None:
        """Ends all steps that run, in whichever thread, and lets none begin."""
        self.seconds = 0
        for pid in tuple(self._running):
            kill(pid)

    def close(self) -> None:
        self.stop()
        self.save()
        self.pack()
        self._log.close()


def kill(session: int) -> None:
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(session, signal.SIGKILL)


@contextmanager
def closing(run: Run) -> Iterator[Run]:
    """Closes the run however it ends, also where somebody asks the process to end.

    A thread hears of that: the main thread may be waiting for others just then, and Python runs
    handlers of signals only once it goes on.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] in before:
                run.note("run", "ended", f"told to by {signal.Signals(number[0]).name}", 0)
                run.stop()  # the main thread waits for no step any more

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    listener = threading.Thread(target=listen)
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    woken = signal.set_wakeup_fd(writer)
    listener.start()
    try:
        yield run
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)  # not while it packs
        signal.set_wakeup_fd(woken)
        os.close(writer)
        listener.join()
        os.close(reader)
        run.close()
        for number, handler in before.items():
            signal.signal(number, handler)
