"""How float32 is multiplied follows torch's switches, in any mixture of old and new ones."""

from __future__ import annotations

import pytest

from helpers import run_python

pytest.importorskip("rnnkernels._C", reason="needs the compiled extension")

#: In a process of its own: what torch holds before anything is set cannot be set again.
EVERY_COMBINATION = """
from itertools import product

import torch
from rnnkernels import _C
from rnnkernels._backends import cuda_plan, float32
from rnnkernels._backends.cuda_plan import DEVICES, Device
from rnnkernels._core.call import Call

B, F32 = torch.backends, torch.float32
Device.of = lambda device: DEVICES["H100"]
x, state = torch.zeros(2, 1, 8), torch.zeros(1, 1, 8)
weights = [torch.zeros(8, 8), torch.zeros(8, 8)]
call = Call("rnn_tanh", 1, 1, 1, False, "concat", 0, "none", 1.0, x, weights, state, None)
asked = raised = tf32 = 0


def reading():
    found = _C.tf32_allowed(F32)
    assert float32.tf32_allowed(F32) == found
    assert "a block by itself" in cuda_plan.of_call(call)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not _C.tf32_allowed(dtype) and not float32.tf32_allowed(dtype), dtype
    return found


def old_ones_raise():
    try:
        B.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return True
    return False


NEW = ("none", "ieee", "tf32")
matmul = ("highest", "high", "none", "ieee", "tf32")
assert reading()  # as torch's own layers, before anything is set
for old, generic, cudnn, conv, rnn, product_ in product(
    (None, False, True), (*NEW, "bf16"), NEW, NEW, (None, *NEW), matmul
):
    if old is not None:
        B.cudnn.allow_tf32 = old
    B.fp32_precision, B.cudnn.fp32_precision, B.cudnn.conv.fp32_precision = generic, cudnn, conv
    if product_ in ("highest", "high"):
        torch.set_float32_matmul_precision(product_)
    else:
        B.cuda.matmul.fp32_precision = product_
    before = B.cudnn.rnn.fp32_precision
    if rnn is not None:
        B.cudnn.rnn.fp32_precision = rnn
    above = cudnn if cudnn != "none" else generic
    found = reading()
    if rnn in ("ieee", "tf32"):
        assert found == (rnn == "tf32"), rnn
    elif rnn == "none":
        assert found == (above == "tf32"), above
    else:
        assert found == (before == "tf32"), before
    wanted = {"highest": "ieee", "high": "tf32", "none": above}.get(product_, product_)
    assert float32.tf32_in_matmul() == (wanted == "tf32"), (product_, above)
    asked, raised, tf32 = asked + 1, raised + old_ones_raise(), tf32 + found
print(asked, raised, tf32)
"""


def test_every_combination_of_old_and_new_switches() -> None:
    child = run_python("-c", EVERY_COMBINATION)
    assert child.returncode == 0, child.stderr[-4000:]
    asked, raised, tf32 = map(int, child.stdout.split())
    assert asked == 3 * 4 * 3 * 3 * 4 * 5
    assert 0 < raised < asked  # the switches that used to be asked
    assert 0 < tf32 < asked
