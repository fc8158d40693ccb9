"""What the sequence kernels in Triton are made of: which rows and steps a program takes, where they
lie in memory, and products with weights that are held or read.

Shapes, packed steps and the order of steps are those of ``csrc/common/layout.h``. Names in capitals
are constants of a compiled kernel.
"""

import triton
import triton.language as tl

from rnnkernels._backends.triton.cells import tanh


@triton.jit
def rows_of(block, T, B, steps, rows, lengths, BLOCK_B):
    """Number, b, start, length, length of the whole row of the batch, and whether there is such a
    row: [BLOCK_B] each."""
    n = block * BLOCK_B + tl.arange(0, BLOCK_B)
    real = n < rows
    b = n % B
    start = n // B * steps  # of a window; 0 where there are none
    whole = tl.zeros([BLOCK_B], tl.int32) + T
    if lengths is not None:
        whole = tl.load(lengths + b, mask=real, other=0)
        # Memory stays safe whatever a tensor holds.
        whole = tl.minimum(tl.maximum(whole, 0), T).to(tl.int32)
    length = tl.minimum(tl.maximum(whole - start, 0), steps)
    return n, b, start, tl.where(real, length, 0), whole, real


@triton.jit
def position(s, turned, start, length):
    """Whether step s [BLOCK_B] takes place, and where in time: past the end of a row, where its
    padding is. turned: 1 in a direction that runs backwards, else 0."""
    active = s < length
    return active, start + tl.where(turned == 1, tl.where(active, length - 1 - s, s), s)


@triton.jit
def step_of(starts, t, b, mask, B):
    """The place of row b's position t in a tensor [T, B, ...]; of packed steps, within mask."""
    step = t.to(tl.int64) * B + b
    if starts is not None:
        step = tl.load(starts + t, mask=mask, other=0) + b
    return step


@triton.jit
def cut_before(reset, starts, active, t, turned, b, whole, B):
    """Whether the state that enters position t is zeroed."""
    cut = tl.zeros(active.shape, tl.int1)
    if reset is not None:
        after = t + turned
        inside = active & (after < whole)
        cut = tl.load(reset + step_of(starts, after, b, inside, B), mask=inside, other=0) != 0
    return cut


@triton.jit
def place(starts, t, b, d, mask, B, D):
    """The place of position t in a tensor [T, B, D, ...]; of packed steps, where mask is set."""
    return step_of(starts, t, b, mask, B) * D + d


@triton.jit
def place_before(starts, at, t, b, d, turned, mask, B, D):
    """The place of the step before, in the order of direction d, of one that is at place `at`."""
    before = at + tl.where(turned == 0, -D, D) * B.to(tl.int64)
    if starts is not None:
        before = place(starts, t + tl.where(turned == 0, -1, 1), b, d, mask, B, D)
    return before


@triton.jit
def is_kept(starts, active, t, T, real):
    """Which rows have a place at this position: in their padding too, where there is one."""
    kept = real & (t < T)
    if starts is not None:
        kept = active
    return kept


@triton.jit
def load(base, rows, columns, mask):
    """Values at [rows, columns] in float32; zeros where there is no tensor."""
    values = tl.zeros(mask.shape, tl.float32)
    if base is not None:
        values = tl.load(base + rows[:, None] + columns[None, :], mask=mask, other=0)
    return values.to(tl.float32)


@triton.jit
def store(base, rows, columns, values, mask):
    tl.store(base + rows[:, None] + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def taken_over(initial, at, carry, at_carry, columns, mask, first):
    """What a program starts from: the initial values, or what the launch before has left."""
    value = load(initial, at, columns, mask)
    if carry is not None:
        if first > 0:
            value = load(carry, at_carry, columns, mask)
    return value


@triton.jit
def squares_of(values):
    """Their sum in each row: [BLOCK_B]."""
    return tl.sum(values.to(tl.float64) * values.to(tl.float64), axis=1)


@triton.jit
def factor_of(squares, bound):
    """What a row is multiplied by, so that its norm is no more than a bound: [BLOCK_B]."""
    limit = tl.cast(bound, tl.float64)
    small = squares <= limit * limit  # not so where it is NaN, which nothing bounds
    return tl.where(small, 1.0, limit / tl.sqrt(tl.where(small, 1.0, squares))).to(tl.float32)


@triton.jit
def bounded_by(g, CLIP, bound):
    """Gradients by themselves; those that are bounded by the norm of their row are not."""
    if CLIP == "value":  # a NaN stays one
        return tl.where(g > bound, bound, tl.where(g < -bound, -bound, g))
    elif CLIP == "tanh":
        return bound * tanh(g / bound)
    else:
        return g


@triton.jit
def of_state(at, k: tl.constexpr, S: tl.constexpr, H: tl.constexpr):
    """Where state k begins at a place of [.., H] if it is h, else of [.., (S-1)*H]."""
    if k == 0:
        return at * H
    else:
        return at * ((S - 1) * H) + (k - 1) * H


@triton.jit
def parameters_of(params, d, unit, P, H, BLOCK_H):
    """The parameters of each unit in direction d, from [D, P, H]: [1, BLOCK_H] each."""
    found = ()
    for k in tl.static_range(P):
        place = params + (d * P + k) * H + unit
        value = tl.load(place, mask=unit < H, other=0).to(tl.float32)
        found = found + (value[None, :],)
    return found


@triton.jit
def noise_of(noise, draws, layer, b, t, d, unit, exists, E):
    """The E numbers that each unit of each row draws at its position: [BLOCK_B, BLOCK_H] each; see
    csrc/common/noise.h."""
    found = ()
    if draws is None:
        for k in tl.static_range(E):
            value = tl.load(noise + k).to(tl.float32)
            found = found + (tl.zeros(exists.shape, tl.float32) + value,)
    else:
        word = tl.zeros(exists.shape, tl.uint32)
        at = draws + b[:, None].to(tl.int64) * 5 + word.to(tl.int64)
        seed = tl.load(at, mask=exists, other=0)
        row = tl.load(at + 1, mask=exists, other=0).to(tl.uint32)
        step = tl.load(at + 3, mask=exists, other=0) * t[:, None]
        position = (tl.load(at + 2, mask=exists, other=0) + step).to(tl.uint32)
        stream = (tl.load(at + 4, mask=exists, other=0) + layer + d).to(tl.uint32) << 8
        for first in tl.static_range(0, E, 4):
            words = tl.philox(
                seed, word + unit[None, :].to(tl.uint32), position, row, stream | (first // 4)
            )
            for k in tl.static_range(first, min(first + 4, E)):
                threshold = (tl.load(noise + k) * 4294967296.0).to(tl.int64)
                below = words[k - first].to(tl.int64) < threshold
                found = found + (tl.where(below, 1.0, 0.0),)
    return found


@triton.jit
def weight(w, gate, k0, j0, H, BLOCK_K, BLOCK_H, BACKWARD):
    """[BLOCK_K, BLOCK_H]: what units k of a gate, or of h, add to units j."""
    k = k0 + tl.arange(0, BLOCK_K)[:, None]
    j = j0 + tl.arange(0, BLOCK_H)[None, :]
    row, column = (k, j) if BACKWARD else (j, k)
    return tl.load(w + (gate * H + row) * H + column, mask=(k < H) & (j < H), other=0)


@triton.jit
def held_weights(w, unit, OUT, IN, H, BLOCK_K, BLOCK_H, BACKWARD):
    """All weights of a program, in the order in which :func:`multiply` takes them."""
    weights = ()
    for i in tl.static_range(IN):
        for k in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
            for o in tl.static_range(OUT):
                b = weight(w, o + i, k * BLOCK_K, unit, H, BLOCK_K, BLOCK_H, BACKWARD)
                weights = weights + (b,)
    return weights


@triton.jit
def sent_numbers(source, rows, mask, factor, h_mask, at_mask, i, k, IN, APART, H, BLOCK_K, DTYPE,
                 WIDE):  # fmt: skip
    """[BLOCK_B, BLOCK_K]: number i of each unit of block k, as the step before left it in memory.

    h_mask: factors of h, those of a row from at_mask on, or None. The hidden gradients of the last
    APART gates stand behind those of the input. WIDE: rows begin at multiples of 16 bytes, which
    the compiler does not find out where `source` is one of two.
    """
    column = k * BLOCK_K + tl.arange(0, BLOCK_K)
    apart = tl.where(i >= IN - APART, APART, 0)
    at = rows[:, None] + (i + apart) * H + column[None, :]
    place = source + at
    if WIDE:
        place = tl.multiple_of(place, [1, 16])
    # Others may have written since this program last read a line of its cache.
    values = tl.load(place, mask=mask[:, None] & (column < H)[None, :], other=0,
                     cache_modifier=".cg")  # fmt: skip
    if factor is not None:
        values = values * factor[:, None]
    if h_mask is not None:
        values = values.to(tl.float32) * load(
            h_mask, at_mask, column, mask[:, None] & (column < H)[None, :]
        )
    return values.to(DTYPE)


@triton.jit
def multiply(w, held, sent, source, rows, mask, factor, h_mask, at_mask, unit, pieces, OUT, IN,
             APART, H, BLOCK_B, BLOCK_H, BLOCK_K, RESIDENT, HELD, BACKWARD, PRECISION,
             WIDE):  # fmt: skip
    """OUT numbers of each of the units [unit, unit + BLOCK_H) from IN numbers of all units."""
    BLOCKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    DTYPE: tl.constexpr = w.dtype.element_ty
    sums = ()
    for _ in tl.static_range(OUT):
        sums = sums + (tl.zeros([BLOCK_B, BLOCK_H], tl.float32),)
    if HELD:
        for i in tl.static_range(IN):
            for k in tl.static_range(BLOCKS):
                if RESIDENT:
                    a = sent[i]
                else:
                    a = sent_numbers(source, rows, mask, factor, h_mask, at_mask, i, k, IN, APART,
                                     H, BLOCK_K, DTYPE, WIDE)  # fmt: skip
                more = ()
                for o in tl.static_range(OUT):
                    b = held[(i * BLOCKS + k) * OUT + o]
                    more = more + (tl.dot(a, b, sums[o], input_precision=PRECISION),)
                sums = more
    else:
        for n in range(pieces):  # not a constant: unrolled, their loads would take all registers
            i = n // BLOCKS
            k = n % BLOCKS
            a = sent_numbers(source, rows, mask, factor, h_mask, at_mask, i, k, IN, APART, H,
                             BLOCK_K, DTYPE, WIDE)  # fmt: skip
            more = ()
            for o in tl.static_range(OUT):
                b = weight(w, o + i, k * BLOCK_K, unit, H, BLOCK_K, BLOCK_H, BACKWARD)
                more = more + (tl.dot(a, b, sums[o], input_precision=PRECISION),)
            sums = more
    return sums
