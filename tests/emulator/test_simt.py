"""The emulator that runs CUDA kernels on the CPU (tests/emulator/simt), on kernels of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import building
import emulated

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "tests/emulator/simt").glob("*.cpp"))
MODES = ("forward", "reverse", "random")


class Program(NamedTuple):
    path: Path

    def __call__(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.path, *args], capture_output=True, text=True, check=False)

    def lines(self, *args: str) -> Iterator[list[str]]:
        done = self(*args)
        assert done.returncode == 0, done.stderr
        return (line.split("\t") for line in done.stdout.splitlines())

    def run(self, mode: str, seeds: int, *cases: str, skip: str = "") -> list[str]:
        return [result for _, result in self.lines("run", mode, str(seeds), skip, *cases)]

    def cases(self, group: str) -> dict[str, str]:
        """Each with what is expected of it."""
        return dict(self.lines("list", group))

    def convert(self, how: str, kind: str, x: np.ndarray, to: str) -> np.ndarray:
        done = subprocess.run(
            [self.path, how, *kind.split()], input=x.tobytes(), capture_output=True, check=True
        )
        return np.frombuffer(done.stdout, to)


#: Flags of the compiler, and those of the linker.
VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([], []),
    "sanitized": (["-fsanitize=address"], ["-fsanitize=address"]),
    "watched": ([*emulated.WATCH, "-g1"], []),
}


@pytest.fixture(scope="session")
def programs() -> dict[str, Program]:
    """The same program as it is, with sanitizers, and to be watched for races."""
    compiler = os.environ.get("CXX", "c++").split()
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    if shutil.which("ccache") and "ccache" not in compiler[0]:
        compiler.insert(0, "ccache")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/emulator'}"]
    with building.folder("simt", *flags, *map(str, VARIANTS.values())) as folder:
        made_of = folder / "made_of"
        wanted = building.contents("tests/emulator/simt", "csrc/cuda", "csrc/common")
        if not made_of.exists() or made_of.read_text() != wanted:
            made_of.unlink(missing_ok=True)
            # As one source: the standard library's headers take longer than the rest.
            source = folder / "all.cpp"
            source.write_text("".join(f'#include "{path}"\n' for path in SOURCES))

            def build(name: str) -> None:
                made = str(folder / name)
                compile_flags, link_flags = VARIANTS[name]
                steps = [
                    [*compile_flags, "-c", str(source), "-o", f"{made}.o"],
                    [*link_flags, f"{made}.o", "-o", made],
                ]
                for step in steps:
                    subprocess.run([*compiler, *flags, *step], check=True)

            with ThreadPoolExecutor() as pool:
                list(pool.map(build, VARIANTS))
            made_of.write_text(wanted)
    return {name: Program(folder / name) for name in VARIANTS}


@pytest.fixture
def program(programs: dict[str, Program]) -> Program:
    return programs["plain"]


@pytest.fixture
def sanitized(programs: dict[str, Program]) -> Program:
    return programs["sanitized"]


@pytest.fixture
def watched(programs: dict[str, Program]) -> Program:
    return programs["watched"]


def all_ok(results: list[str]) -> bool:
    return all(r.startswith("ok") for r in results)


@pytest.mark.parametrize("mode", MODES)
def test_loops_and_primitives(program: Program, mode: str) -> None:
    """Every thread gets the values of a plain loop, bit by bit, under any schedule."""
    results = program.run(mode, 12, *program.cases("loops"), *program.cases("primitives"))
    assert all_ok(results), [r for r in results if not r.startswith("ok")]


@pytest.mark.parametrize("mode", MODES)
def test_sanitizers_find_nothing(sanitized: Program, mode: str) -> None:
    """Launches that end as they should, and those that are given up with all their stacks."""
    ends_well = [*sanitized.cases("loops"), *sanitized.cases("primitives")]
    assert all_ok(sanitized.run(mode, 1, *ends_well))
    given_up = sanitized.run(mode, 1, *sanitized.cases("mistakes"))
    assert not any(r.startswith(("ok", "wrong")) for r in given_up), given_up


# Those that a kernel runs through without, unless somebody notices.
REMOVABLE = {"sync_block", "sync_cluster", "open", "expect", "await", "publish", "copies_arrive"}
REMOVABLE |= {"put", "empty"}
FEW = ["few_transactions", "few_flags", "few_vectors", "barriers", "cluster_barriers"]


@pytest.mark.parametrize("case", FEW)
def test_each_removed_primitive_is_noticed(program: Program, case: str) -> None:
    sites = [place for place, primitive in program.lines("sites", case) if primitive in REMOVABLE]
    assert len(sites) >= 2
    for place in sites:
        results = [r for mode in MODES for r in program.run(mode, 4, case, skip=place)]
        assert not all_ok(results), place
        assert not any(r.startswith("exception") for r in results)


def test_removed_send_and_copy_are_noticed(program: Program) -> None:
    for case in ("few_transactions", "few_flags"):
        (place,) = (p for p, what in program.lines("sites", case) if what in ("send", "copy_async"))
        assert not any(r.startswith("ok") for r in program.run("random", 4, case, skip=place))


def test_site_to_remove_has_to_exist(program: Program) -> None:
    (result,) = program.run("forward", 1, "barriers", skip="barriers.cpp:1")
    assert re.match("exception .*nothing ran at the site to skip, barriers.cpp:1", result)


def test_no_races_in_what_is_right(watched: Program) -> None:
    primitives = [case for case in watched.cases("primitives") if case != "flag_steps"]
    results = watched.run("watched", 1, *watched.cases("loops"), *primitives)
    assert all_ok(results), [r for r in results if not r.startswith("ok")]


#: What is in no order, and between whom.
RACES = {
    "transactions_with_a_race": r"byte \d+ in shared memory of block \d is written after it was "
    r"read, .*thread \d+ of block \d, selftest_loops.cpp:\d+; +thread \d+ of block \d, self",
    "flag_steps": "global memory is used as a flag, and otherwise, .*, await at ",
    "race": "global memory is read after it was written, ",
    "slowness": "global memory is written twice, ",
    "late_copy": "byte 0 .* is read after it was written, .* a copy of thread 0 of block 0, copy_",
    "late_message": "byte 16 .* is read after it was written, .* a message in phase 0, send at ",
}


@pytest.mark.parametrize("case", RACES)
def test_finds_races(watched: Program, case: str) -> None:
    (result,) = watched.run("watched", 1, case)
    assert re.match(f"Error race in a kernel; .*{RACES[case]}", result)


@pytest.mark.parametrize("case", FEW)
def test_what_orders_no_memory_is_a_race(watched: Program, case: str) -> None:
    """A wait that is left out, or a fence or barrier that promises nothing; in one run."""
    waits = {"sync_block", "sync_cluster", "await", "copies_arrive"}
    sites = list(watched.lines("sites", case))
    ways = [place for place, primitive in sites if primitive in waits]
    orders = {*waits, "publish", "put", "empty", "look", "settle"}
    ways += [f"~{place}" for place, primitive in sites if primitive in orders]
    assert len(ways) >= 4
    for way in ways:
        (result,) = watched.run("watched", 1, case, skip=way)
        assert result.startswith("Error race in a kernel"), (way, result)


def test_races_take_a_kernel_compiled_for_it(program: Program) -> None:
    (result,) = program.run("watched", 1, "barriers")
    assert "can be watched only if kernels are compiled for it" in result


def test_random_schedules_find_a_race(program: Program) -> None:
    """One that takes a thread left behind in the middle of its messages."""
    assert not all_ok(program.run("random", 20, "transactions_with_a_race"))


def test_a_seed_decides(program: Program) -> None:
    """The same switches and order again from one seed, others from others."""
    for case in ("order", "few_transactions", "few_flags"):
        once, again = (program.run("random", 8, case) for _ in range(2))
        assert once == again
        assert len(set(once)) > 1
    forward, reverse = (program.run(mode, 3, "order") for mode in ("forward", "reverse"))
    assert len(set(forward)) == len(set(reverse)) == 1
    assert forward != reverse


def outcomes(results: list[str]) -> set[str]:
    assert all_ok(results), results
    return {r.removeprefix("ok").partition(" after")[0].strip() for r in results}


def test_messages_and_copies_are_late(program: Program) -> None:
    """A destination holds garbage (-1) until all has arrived; the source of a copy is read late."""
    assert outcomes(program.run("forward", 1, "late_message")) == {"-1 2"}
    assert outcomes(program.run("forward", 1, "late_copy")) == {"-1 2"}
    assert outcomes(program.run("random", 40, "late_message")) == {"-1 2", "2 2"}
    assert outcomes(program.run("random", 40, "late_copy")) == {"-1 2", "1 1"}


def test_halves_of_a_vector_come_one_by_one(program: Program) -> None:
    assert outcomes(program.run("random", 200, "halves")) == {"none", "low", "high", "both"}


def test_messages_arrive_in_any_order(program: Program) -> None:
    assert outcomes(program.run("random", 100, "arrivals")) == {"", "0", "1", "01"}
    for mode in MODES:
        assert outcomes(program.run(mode, 20, "race")) == {"0", "1"}


def test_any_primitive_may_let_others_run(program: Program) -> None:
    assert outcomes(program.run("forward", 1, "interruption")) == {""}
    assert outcomes(program.run("random", 20, "interruption")) == {"", "interrupted"}


def test_blocks_may_be_slow(program: Program) -> None:
    assert outcomes(program.run("random", 50, "slowness")) == {"", "slow"}


def test_bank_conflicts_of_matrices(program: Program) -> None:
    """Rows an odd number of 16 bytes apart lie in different banks; all in one take eight passes."""
    cases = {80: "", 128: " and 28 bank conflicts", 32: " and 4 bank conflicts"}
    for pitch, said in cases.items():
        (result,) = program.run("forward", 1, f"pitch_of_{pitch}_bytes")
        assert re.fullmatch(rf"ok after \d+ switches{said}", result)


def test_blocks_take_turns(program: Program) -> None:
    """Where one is there at a time: in the order of their numbers, or in any."""
    assert outcomes(program.run("forward/1", 2, "turns")) == {"0123"}
    assert outcomes(program.run("reverse/1", 2, "turns")) == {"0123"}
    orders = outcomes(program.run("shuffled/1", 20, "turns"))
    assert len(orders) > 5
    assert {"".join(sorted(order)) for order in orders} == {"0123"}


def test_blocks_that_wait_for_each_other_need_a_place_each(program: Program) -> None:
    for mode in ("forward", "reverse", "random", "shuffled"):
        assert all_ok(program.run(f"{mode}/4", 2, "few_flags"))
        for result in program.run(f"{mode}/3", 2, "few_flags"):
            assert re.match("Error deadlock: .*1 blocks have not begun: .* holds 3 at", result)


def test_mistakes(program: Program) -> None:
    """Each is an error that says which block, thread and site, under any schedule."""
    for case, want in program.cases("mistakes").items():
        (result,) = program.run("forward", 1, case)
        assert re.match(want, result), (case, result)
        for mode in MODES:
            kinds = {result.split()[0] for result in program.run(mode, 10, case)}
            assert kinds == {want.split()[0]}, case


def test_mistakes_of_order(program: Program) -> None:
    """Those that some schedules turn into other errors, or forgive as the hardware may."""
    for case, want in program.cases("mistakes_of_order").items():
        assert any(re.match(want, result) for result in program.run("random", 40, case)), case


def test_launch_after_a_failed_one(program: Program) -> None:
    """In one process: nothing is left behind."""
    mistakes = program.cases("mistakes")
    cases = [*mistakes, "few_transactions", *mistakes, "few_flags"]
    results = [r for n, r in program.lines("run", "random", "2", "", *cases) if n not in mistakes]
    assert len(results) == 4
    assert all_ok(results)


def test_sanitizer_knows_shared_memory(sanitized: Program) -> None:
    done = sanitized("run", "forward", "1", "", "write_past_shared_memory")
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr


def test_stacks_are_guarded(program: Program, sanitized: Program) -> None:
    assert program("run", "forward", "1", "", "endless_recursion").returncode < 0
    assert "stack-overflow" in sanitized("run", "forward", "1", "", "endless_recursion").stderr


ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


def of_16_bits(kind: str) -> np.ndarray:
    """All values of a type, as float32."""
    return torch.from_numpy(ALL_BITS.view(np.int16)).view(getattr(torch, kind)).float().numpy()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_reads_all_values(program: Program, kind: str) -> None:
    got, want = program.convert("read", kind, ALL_BITS, "float32"), of_16_bits(kind)
    numbers = ~np.isnan(want)
    assert np.array_equal(got[numbers].view(np.uint32), want[numbers].view(np.uint32))
    assert np.isnan(got[~numbers]).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_writes_nearest_values(program: Program, kind: str) -> None:
    """All values, the middles between them, the next floats on both sides, and NaN."""
    values = of_16_bits(kind)
    values = np.unique(values[np.isfinite(values)])
    with np.errstate(over="ignore"):
        middles = (values[1:].astype(np.float64) + values[:-1]).astype(np.float32) / 2
    edges = np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 65519.99, 65520, 0.0, -0.0], np.float32)
    x = np.concatenate([values, middles, edges])
    with np.errstate(over="ignore", under="ignore"):
        x = np.concatenate(
            [x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -np.float32(np.inf))]
        )
    got = program.convert("write", kind, x, "uint16")
    want = torch.from_numpy(x).to(getattr(torch, kind)).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(got, want)
    assert program.convert("write", kind, np.array([np.nan], np.float32), "uint16") == [0x7FFF]


def test_rounds_to_tf32(program: Program) -> None:
    """To 11 significant bits, ties away from zero."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits[: 1 << 15] &= 0xFFFFF000  # on a value or on a middle
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) > 1e-37) & (np.abs(x) < 3.3e38)]
    mantissa, exponent = np.frexp(x.astype(np.float64))
    want = np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2048 + 0.5), mantissa) / 2048, exponent)
    assert np.array_equal(program.convert("write", "tf32", x, "float32"), want.astype(np.float32))
    special = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0], np.uint32).view(
        np.float32
    )
    got = program.convert("write", "tf32", special, "float32")
    assert np.array_equal(got, special, equal_nan=True)


#: Errors of the instructions, exp2 and reciprocal, in units in the last place: none, and NVIDIA's
#: bounds in each direction; and what sigmoid and tanh may be off by then.
INSTRUCTIONS = [("0 0", 3, 2)] + [(f"{e} {r}", 8, 4) for e in (-2, 2) for r in (-1, 1)]


def all_floats(step: int) -> np.ndarray:
    """Of both signs, from zero to infinity: one in so many."""
    bits = np.arange(0, 0x7F800001, step, dtype=np.uint32)
    ends = np.array([0, 1, 0x7F800000, 0x7F7FFFFF], np.uint32)
    return np.concatenate([bits, ends, bits | 0x80000000, ends | 0x80000000]).view(np.float32)


@pytest.mark.parametrize(("errors", "of_sigmoid", "of_tanh"), INSTRUCTIONS)
def test_sigmoid_and_tanh(program: Program, errors: str, of_sigmoid: float, of_tanh: float) -> None:
    """Against float64, over all of float32; subnormal results count as zero."""
    x = all_floats(4099)
    exact = x.astype(np.float64)
    smallest = np.float64(2.0**-126)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-exact))
    for name, want, most in (("sigmoid", sigmoid, of_sigmoid), ("tanh", np.tanh(exact), of_tanh)):
        got = program.convert(name, errors, x, "float32")
        assert got.dtype == np.float32
        ulp = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
        off = np.abs(got - want) / ulp
        normal = np.abs(want) >= smallest
        assert off[normal].max() <= most, (name, x[normal][off[normal].argmax()])
        assert (np.abs(got[~normal]) <= smallest).all()
    # Gates that are shut or open, and what saturates.
    ends = np.array([-np.inf, -3e38, -89, 89, 3e38, np.inf, np.nan], np.float32)
    assert np.array_equal(
        program.convert("sigmoid", "0 0", ends, "float32"),
        np.array([0, 0, 0, 1, 1, 1, np.nan], np.float32),
        equal_nan=True,
    )
    assert np.array_equal(
        program.convert("tanh", "0 0", ends, "float32"),
        np.array([-1, -1, -1, 1, 1, 1, np.nan], np.float32),
        equal_nan=True,
    )
