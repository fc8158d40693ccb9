"""A package of AOTInductor runs in a C++ program, with the library of ops and without Python."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

import building
import rnnkernels
from rnnkernels import _ops

SOURCE = building.ROOT / "examples/run_package.cpp"
CXX = shlex.split(os.environ.get("CXX") or "c++")

if _ops.missing is not None:
    pytest.skip(f"no compiled kernels: {_ops.missing}", allow_module_level=True)
if shutil.which(CXX[0]) is None:
    pytest.skip(f"no C++ compiler: {CXX[0]}", allow_module_level=True)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = (
            rnnkernels.LSTM(4, 8, num_layers=2, bidirectional=True),
            nn.Linear(16, 2),
        )

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, (h_n, _) = self.rnn(x, lengths=lengths)
        return self.head(y), h_n


def program() -> Path:
    """Compiled as the head of the source says, but without optimization."""
    with building.folder("run_package", SOURCE.read_text()) as folder:
        path = folder / "run_package"
        if not path.exists():
            includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
            (libraries,) = cpp_extension.library_paths()
            links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
            made = folder / "new"
            command = [*CXX, "-std=c++20", "-O0", str(SOURCE), "-o", str(made), *includes, *links]
            subprocess.run([*command, "-ldl"], check=True)
            made.rename(path)
        return path


def run(*arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program(), *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own, on the way to a package
def test_a_package_runs_without_python(tmp_path: Path) -> None:
    """At another batch than it was exported for, with the numbers of this process."""
    package, inputs, outputs = (tmp_path / name for name in ("model.pt2", "in.pt", "out.pt"))
    batch, model = torch.export.Dim("B", min=2, max=64), Model().eval()
    x, lengths = torch.randn(6, 5, 4), torch.tensor([0, 6, 3, 2, 1])
    with torch.no_grad():
        program = torch.export.export(
            model,
            (x[:, :3].contiguous(), lengths[:3].contiguous()),
            dynamic_shapes=({1: batch}, {0: batch}),
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        want = model(x, lengths)
    torch.save([x, lengths], inputs)
    done = run(rnnkernels.library_path(), package, inputs, outputs)
    assert done.returncode == 0, done.stderr
    found = torch.load(outputs)
    assert [t.shape for t in found] == [t.shape for t in want]
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)

    nothing = run(tmp_path / "none.so", package, inputs, outputs)
    assert nothing.returncode == 1 and "none.so" in nothing.stderr
