"""What nvcc, cuobjdump and nvdisasm say of kernels, for tests of whoever reads it."""

from __future__ import annotations

from pathlib import Path

from check_cuda import TENSOR_CORE
from cubin import Persistent

MANGLED = {
    "rnn": "5OneOfINS_7RNNTanhEJNS_7RNNReluENS_10RNNSigmoidEEE",
    "lstm": "4LSTM",
    "gru": "3GRU",
}


def symbol(kernel: Persistent) -> str:
    """As GCC and Clang mangle its name."""
    cell, backward, numbers, family, batch = kernel
    io = {"bfloat16": "NS_8BFloat16E", "float16": "NS_7Float16E"}.get(numbers, "f")
    product = {"tf32": "NS0_4TF32E", "float32": "f"}.get(numbers, "S5_")
    way = "12BackwardPass" if backward else "11ForwardPass"
    exchange = {"cluster": "15ClusterExchange", "grid": "12GridExchange"}[family]
    return (
        "_ZN3rnn4cuda58_GLOBAL__N__6d_21_persistent_float16_cu_9e_7610persistentINS0_"
        f"{way}INS_{MANGLED[cell]}E{io}EENS0_15PersistentBlockIS6_{product}NS0_{exchange}"
        f"ELi{batch}EEEEEvNS0_10PersistentIT_EE"
    )


#: Of one family.
KERNELS = [
    Persistent(cell, backward, numbers, "cluster", batch)
    for cell in MANGLED
    for backward in (False, True)
    for numbers in TENSOR_CORE
    for batch in ((1,) if numbers == "float32" else (1, 2))
]

USAGE = """\

Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:216 STACK:0 SHARED:48 LOCAL:0 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:40 STACK:24 SHARED:0 LOCAL:8 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ASSEMBLY = """\
\t.target\tsm_90a
\t.section\t.nv.info.first,"",@"SHT_CUDA_INFO"
\t.sectionflags\t@""
\t//----- nvinfo : EIATTR_PARAM_CBANK
        /*0008*/ \t.word\t0x00000210
\t//----- nvinfo : EIATTR_MAX_THREADS
.L_343:
        /*0044*/ \t.byte\t0x04, 0x05
        /*0046*/ \t.short\t(.L_345 - .L_344)
        /*0048*/ \t.word\t0x00000100
        /*004c*/ \t.word\t0x00000002
        /*0050*/ \t.word\t0x00000001
\t//----- nvinfo : EIATTR_CRS_STACK_SIZE
        /*0054*/ \t.word\t0x00000007
\t.section\t.text.first,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=216"
first:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P2 HMMA.16816.F32.BF16 R4, R8, R14, R4 ;
        /*0050*/                   { HFMA2.MMA R2, -RZ, RZ, 0, 0 ;
        /*0060*/                   FFMA R2, R2, R3, R4 }
\t.section\t.text.second,"ax",@progbits
        /*0000*/                   EXIT ;
\t.section\t.nv.constant0.second,"a",@progbits
        /*0000*/ \t.byte\t0x00
        /*0010*/                   FFMA R2, R2, R3, R4 ;
"""


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return str(path)
