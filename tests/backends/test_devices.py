"""GPUs that kernels cannot run on are refused with the reason: devices by a stand-in, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rnnkernels import _backends, _ops, use_backend
from rnnkernels._backends import devices, user_cells, vetting
from rnnkernels._backends.devices import Facts
from rnnkernels._core.call import Call
from rnnkernels.nn import gated
from stand_in import on_gpu

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")

GOOD = Facts("H100", (9, 0), "")
TURING = Facts("T4", (7, 5), "no kernel image is available for execution on the device")
OLD_DRIVER = Facts("A100", (8, 0), "CUDA driver version is insufficient for CUDA runtime version")
NO_IMAGE = Facts("B300", (10, 3), "no kernel image is available for execution on the device")
AMD = Facts("MI300", (0, 0), "the kernels are for NVIDIA's GPUs")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """A build with CUDA kernels and Triton; the devices that were asked about."""
    found: list[torch.device] = []
    monkeypatch.setattr(_ops, "kernel_devices", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_backends.triton, "INSTALLED", True)
    monkeypatch.setattr(_backends, "_environment", None)
    devices.forget()
    yield found
    devices.forget()


def stand_in(monkeypatch: pytest.MonkeyPatch, asked: list[torch.device], facts: Facts) -> None:
    def ask(device: torch.device) -> Facts:
        asked.append(device)
        return facts

    monkeypatch.setattr(devices, "ask", ask)


def call_on_gpu(**changes: Any) -> Call:
    """Of tensors that have a GPU for their device and no memory."""
    with FakeTensorMode():
        x, h0 = torch.zeros(2, 3, 4, device="cuda:0"), torch.zeros(1, 3, 4, device="cuda:0")
        weights = [torch.zeros(4, 4, device="cuda:0"), torch.zeros(4, 4, device="cuda:0")]
    call = Call("rnn_tanh", 1, 1, 1, False, "concat", 0, "none", 1.0, x, weights, h0, None)
    return call._replace(**changes)


@pytest.mark.parametrize(
    ("facts", "chosen", "cuda", "triton"),
    [
        (GOOD, "cuda", None, None),
        (TURING, "reference", "it needs a GPU of compute capability 8.0 or later, and T4 has 7.5",
         "it needs a GPU of compute capability 8.0 or later, and T4 has 7.5"),
        (OLD_DRIVER, "triton", f"it cannot run on A100: {OLD_DRIVER.probed}", None),
        (NO_IMAGE, "triton", f"it cannot run on B300: {NO_IMAGE.probed}", None),
        (AMD, "triton", f"it cannot run on MI300: {AMD.probed}", None),
    ],
    ids=["good", "capability", "driver", "image", "AMD"],
)  # fmt: skip
def test_choice(
    facts: Facts, chosen: str, cuda: str | None, triton: str | None,
    asked: list[torch.device], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first backend that can run is taken; asked for by name, one that cannot is an error."""
    stand_in(monkeypatch, asked, facts)
    call = call_on_gpu()
    assert _backends.select(call).name == chosen
    for name, reason in (("cuda", cuda), ("triton", triton)):
        assert _backends.BACKENDS[name].refusal(call) == reason
        with use_backend(name):
            if reason is None:
                assert _backends.select(call).name == name
                continue
            with pytest.raises(RuntimeError) as error:
                _backends.select(call)
        assert f"{name!r} was asked for and cannot run this layer: {reason}" in str(error.value)
    assert asked == [torch.device("cuda", 0)]  # once


def test_what_has_no_kernels_for_whole_sequences(
    asked: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads and recurrent dropout go to the CUDA kernels; a written cell where they can be
    compiled, else to Triton's; norms to the CUDA kernels, and to Triton's but for a projection."""
    stand_in(monkeypatch, asked, GOOD)
    call = call_on_gpu()
    assert _backends.select(call._replace(heads=2)).name == "cuda"
    assert _backends.select(call._replace(h_mask=call.h0)).name == "cuda"
    written = call._replace(cell_name=gated.mgu.name)
    reasons: list[str | None] = [None, "no nvcc was found"]
    for reason, chosen in zip(reasons, ("cuda", "triton"), strict=True):
        monkeypatch.setattr(user_cells, "prepare", lambda *_, reason=reason: reason)
        assert _backends.select(written).name == chosen
        assert _backends.final_refusal(_backends.BACKENDS["cuda"], written) == reason
    normed = call._replace(cell_name="layer_norm_gru")
    assert _backends.select(normed).name == "cuda"
    of_triton = _backends.BACKENDS["triton"].refusal
    assert of_triton(normed) is None
    assert of_triton(normed._replace(projected=True)) == "it has no kernels for proj_size"


def test_norms_whose_check_failed(
    asked: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels for them are refused, and no others."""
    stand_in(monkeypatch, asked, OLD_DRIVER)
    call = call_on_gpu()
    normed = call._replace(cell_name="layer_norm_gru")
    with on_gpu(tmp_path, "triton"):
        vetting.learn(call.x.device, "triton", "rows", "float32", "dh0 is off", warn=False)
        reason = "a check on this device refused its rows kernels: dh0 is off"
        assert _backends.BACKENDS["triton"].refusal(normed) == reason
        assert _backends.select(normed).name == "reference"
        assert _backends.select(call).name == "triton"


def test_each_device_is_asked(asked: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(device: torch.device) -> Facts:
        asked.append(device)
        return TURING if device.index == 0 else GOOD

    monkeypatch.setattr(devices, "ask", ask)
    for _ in range(2):
        assert devices.cannot_run(torch.device("cuda", 0))
        assert devices.cannot_run(torch.device("cuda", 1)) is None
    assert [device.index for device in asked] == [0, 1]


def test_nothing_is_asked_while_compiling(
    asked: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile could trace no question to a driver; what is known counts all the same."""
    stand_in(monkeypatch, asked, TURING)
    first = torch.device("cuda", 0)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert devices.cannot_run(first) is None
    assert not asked
    assert devices.cannot_run(first)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert devices.cannot_run(first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_refused(asked: list[torch.device]) -> None:
    """Tensors without memory may have a GPU for their device anywhere."""
    assert devices.ask(torch.device("cuda", 0)) == Facts("a GPU that is not here", (0, 0), "")
    assert _backends.select(call_on_gpu()).name == "cuda"
