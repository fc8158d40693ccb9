"""What tools/kernel_path.py counts in a kernel's instructions."""

from __future__ import annotations

import kernel_path
from cubin import read_steps

#: A round: a loop of a read that is converted, a wait, a product, a cell with a branch, and a send
#: behind a division that one way around avoids and one does not.
LISTING = """
\t.section\t.text.kernel,"ax",@progbits
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_0:
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.U16 R12, desc[UR12][R12.64] ;
        /*0030*/                   IMAD.U32 R13, R12, 0x10000, RZ ;
.L_x_1:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
        /*00a0*/                   CALL.REL.NOINC `(.L_x_9) ;
.L_x_2:
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/               @P0 BRA `(.L_x_3) ;
        /*00d0*/                   I2F.RP R1, R2 ;
        /*00e0*/                   I2F.RP R1, R3 ;
.L_x_3:
        /*00f0*/                   I2F.RP R1, R2 ;
        /*0100*/                   STAS.128 [R2], R4 ;
        /*0110*/               @P2 BRA `(.L_x_0) ;
        /*0120*/                   EXIT ;
.L_x_9:
        /*0130*/                   RET.REL.NODEC R20 ;
"""


def test_control_flow() -> None:
    steps = read_steps(LISTING)["kernel"]
    assert [s.opcode for s in steps[:3]] == ["BAR.SYNC.DEFER_BLOCKING", "BRA", "LDG.E.U16"]
    assert steps[1].next == [4, 2]
    assert steps[5].next == [4, 6]
    assert steps[17].next == [1, 18]
    assert steps[18].next == steps[19].next == []
    assert read_steps(LISTING.replace("@P2 BRA", "BRA"))["kernel"][17].next == [1]


def test_counts() -> None:
    assert kernel_path.path_of(read_steps(LISTING)["kernel"]) == kernel_path.Counts(
        send=2,
        send_divisions=1,
        signal_barriers=0,
        signal_fences=0,
        wait_loads=1,
        wait_conversions=1,
        taken_barriers=0,
        taken_copies=0,
        cell=3,
        cell_calls=1,
        cell_branches=1,
        exponentials=1,
    )


def through_memory(wait: str, message: str, sent: list[str], taken: list[str]) -> str:
    """The same round, handed on through global memory: what follows the message, and the wait."""
    text = LISTING.replace("SYNCS.PHASECHK.TRANS64.TRYWAIT P1", f"{wait} R20")
    text = text.replace("STAS.128", message)
    for mark, inserted in (("HMMA", taken), ("@P2 BRA", sent)):
        at = text.rindex("\n", 0, text.index(mark)) + 1
        lines = "".join(f"        /*ffff*/  {line} ;\n" for line in inserted)
        text = text[:at] + lines + text[at:]
    return text


def test_counts_of_hand_offs() -> None:
    """By a flag behind a fence, with a copy that is waited for; and by vectors themselves."""
    barrier, fence = "BAR.SYNC.DEFER_BLOCKING 0x0", "MEMBAR.ALL.GPU"
    flags = through_memory(
        "LDG.E.STRONG.GPU",
        "STG.E.128",
        [barrier, fence, "STG.E.STRONG.GPU [R2], R4"],
        [barrier, "LDGSTS.E.BYPASS.128 [R2], R4", "LDGDEPBAR", barrier],
    )
    vectors = through_memory("LDG.E.128.STRONG.GPU", "STG.E.128.STRONG.GPU", [], [barrier])
    for listing, wanted in ((flags, (1, 1, 2, 1)), (vectors, (0, 0, 1, 0))):
        found = kernel_path.path_of(read_steps(listing)["kernel"])
        hand_off = (found.signal_barriers, found.signal_fences)
        assert (*hand_off, found.taken_barriers, found.taken_copies) == wanted
        assert found.wait_loads == 1
