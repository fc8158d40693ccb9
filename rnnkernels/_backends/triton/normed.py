"""The steps of cells whose products are normalised, in Triton: what stands between products.

``csrc/common/normed.h`` says what such a cell is. A norm needs all numbers of a row, so a program
has all units of its rows, one block of them after the other. It goes through these blocks once for
the sums that it needs first, and again for what follows from them, and computes anew what it did
not keep: nothing passes from thread to thread through memory within a launch. A launch is one step;
before it, torch multiplies what the one before has left by W_hh.

Sums over a row are of float64, in one order. Mean and variance are those of the blocks put
together, with squares of differences from the mean of their own block, so that nothing is lost
where the mean is large.

Names in capitals are constants of a compiled kernel. EMIT makes h of the normalised c, and is None
where the cell returns h itself. The last ALONE gates have a norm by themselves, all others have one
together.
"""

import triton
import triton.language as tl

from rnnkernels._backends.triton.blocks import (
    bounded_by,
    cut_before,
    factor_of,
    is_kept,
    load,
    parameters_of,
    place,
    place_before,
    position,
    rows_of,
    squares_of,
    store,
    taken_over,
)
from rnnkernels.cells.normed import EPSILON as _EPSILON

EPSILON = tl.constexpr(_EPSILON)


@triton.jit
def _of_no_numbers(BLOCK_B):
    """Number, mean, and the sum of the squares of differences from it: [BLOCK_B] each."""
    nothing = tl.zeros([BLOCK_B], tl.float64)
    return nothing, nothing, nothing


@triton.jit
def _with(moments, values, unit, H):
    """The same with some more numbers [BLOCK_B, BLOCK_H], as far as there are units."""
    count, mean, squares = moments
    exists = (unit < H)[None, :]
    more = tl.sum((unit < H).to(tl.float64), axis=0)
    of_block = tl.sum(tl.where(exists, values, 0.0).to(tl.float64), axis=1) / more
    apart = tl.where(exists, values - of_block.to(tl.float32)[:, None], 0.0)
    total = count + more
    step = of_block - mean
    squares += squares_of(apart) + step * step * count * more / total
    return total, mean + step * more / total, squares


@triton.jit
def _standard(moments):
    """By what a row is made to have mean 0 and variance 1: what to take off, then a factor."""
    count, mean, squares = moments
    return mean.to(tl.float32), (1 / tl.sqrt(squares / count + EPSILON)).to(tl.float32)


@triton.jit
def _standardized(x, by):
    return (x - by[0][:, None]) * by[1][:, None]


@triton.jit
def _destandardized(gradient, x, by, means):
    """The gradient of what was standardised to x, from that of x. means: over the row, of these
    gradients, and of them times x."""
    return by[1][:, None] * (gradient - means[0][:, None] - x * means[1][:, None])


@triton.jit
def _of_row(values, at, there, FIRST, LAST, H, BLOCK_B, BLOCK_H):
    """By what the numbers [FIRST * H, LAST * H) of each row are standardised together."""
    moments = _of_no_numbers(BLOCK_B)
    for first in range(0, H, BLOCK_H):
        unit = first + tl.arange(0, BLOCK_H)
        mask = there[:, None] & (unit < H)[None, :]
        for g in tl.static_range(FIRST, LAST):
            moments = _with(moments, load(values, at + g * H, unit, mask), unit, H)
    return _standard(moments)


@triton.jit
def _of_gates(products, at, there, G, ALONE, H, BLOCK_B, BLOCK_H):
    """By what W_hh h of each gate is standardised. Of rows that are not there it is zero."""
    shared = _of_row(products, at, there, 0, G - ALONE, H, BLOCK_B, BLOCK_H)
    alone = shared
    if ALONE > 0:
        alone = _of_row(products, at, there, G - ALONE, G, H, BLOCK_B, BLOCK_H)
    by = ()
    for g in tl.static_range(G):
        by = by + (shared if g < G - ALONE else alone,)
    return by


@triton.jit
def _hidden_parts(products, at, unit, mask, own, by, G, ALONE, H):
    """Of some units: W_hh h, the same standardised, and the hidden part of the gates."""
    found = ()
    standardized = ()
    hidden = ()
    for g in tl.static_range(G):
        product = load(products, at + g * H, unit, mask)
        x = _standardized(product, by[g])
        found = found + (product,)
        standardized = standardized + (x,)
        if g < G - ALONE:
            hidden = hidden + (x * own[g],)
        else:
            hidden = hidden + (x * own[g] + own[g + ALONE],)
    return found, standardized, hidden


# --- Forward ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B", "s"])
def forward(gx, gh, b_ih, own_params, h_mask, h, masked, c_now, y, c, saved, lengths, starts, reset,
            T, B, s, CELL: tl.constexpr, EMIT: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
            P: tl.constexpr, ALONE: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
            BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Step s: y and, where they are asked for, c and saved, of gh = W_hh h [D, B, G*H]. h and c_now
    [D, B, H] go on in their places, and in masked h as the next product takes it, where that
    differs.

    Grid: blocks of rows, 1, D directions.
    """
    d = tl.program_id(2)
    turned = (d > 0).to(tl.int32)
    row = rows_of(tl.program_id(0), T, B, T, B, lengths, BLOCK_B)
    _number, b, start, length, whole, real = row
    active, t = position(s + tl.zeros([BLOCK_B], tl.int32), turned, start, length)
    at = place(starts, t, b, d, active, B, D)
    linked = active & (cut_before(reset, starts, active, t, turned, b, whole, B) == 0)
    kept = is_kept(starts, active, t, T, real)
    at_state = (d * B + b).to(tl.int64) * H
    by = _of_gates(gh, at_state * G, linked, G, ALONE, H, BLOCK_B, BLOCK_H)
    of_c = by[0]
    moments = _of_no_numbers(BLOCK_B)
    for turn in tl.static_range(0 if EMIT is not None else 1, 2):  # the sums of c; then all else
        for first in range(0, H, BLOCK_H):
            unit = first + tl.arange(0, BLOCK_H)
            exists = (unit < H)[None, :]
            runs = active[:, None] & exists
            links = linked[:, None] & exists
            own = parameters_of(own_params, d, unit, P, H, BLOCK_H)
            product, _x, hidden = _hidden_parts(gh, at_state * G, unit, links, own, by, G, ALONE, H)
            inputs = ()
            for g in tl.static_range(G):
                gate = load(gx, at * (G * H) + g * H, unit, runs)
                if b_ih is not None:
                    bias = tl.load(b_ih + (d * G + g) * H + unit, mask=unit < H, other=0)
                    gate += bias.to(tl.float32)[None, :]
                inputs = inputs + (gate,)
            prev = (load(h, at_state, unit, links),)
            if EMIT is not None:
                prev = prev + (load(c_now, at_state, unit, links),)
            next, saves = CELL(inputs, hidden, prev)
            if turn == 0:
                moments = _with(moments, next[1], unit, H)
            else:
                written = kept[:, None] & exists
                h_next = next[0]
                if EMIT is not None:
                    n = _standardized(next[1], of_c) * own[P - 2] + own[P - 1]
                    h_next = EMIT(next[0], n)
                    store(c_now, at_state, unit, next[1], runs)
                    if c is not None:
                        store(c, at * H, unit, tl.where(runs, next[1], 0.0), written)
                store(y, at * H, unit, tl.where(runs, h_next, 0.0), written)
                store(h, at_state, unit, h_next, runs)
                if masked is not None:
                    of_product = h_next.to(h.dtype.element_ty).to(tl.float32)
                    of_product = of_product * load(h_mask, at_state, unit, runs)
                    store(masked, at_state, unit, of_product, runs)
                if saved is not None:
                    for k in tl.static_range(K - G):
                        value = tl.where(runs, saves[k], 0.0)
                        store(saved, at * (K * H) + k * H, unit, value, written)
                    for g in tl.static_range(G):
                        store(saved, at * (K * H) + (K - G + g) * H, unit, product[g], written)
        if turn == 0:
            of_c = _standard(moments)


# --- Backward ---------------------------------------------------------------------------------


@triton.jit
def _through(product, h_mask, at_product, at_state, unit, mask):
    """What reaches h from the step after it through W_hh."""
    value = load(product, at_product, unit, mask)
    if h_mask is not None:
        value = value * load(h_mask, at_state, unit, mask)
    return value


@triton.jit
def _around(outside, carry, at_state, at_carry, unit, exists, is_last, n):
    """What reaches a state from the step after it around W_hh: before the first round, what reaches
    the last state of a row from outside."""
    value = taken_over(outside, at_state, carry, at_carry, unit, exists, n)
    return tl.where(is_last[:, None] | (n > 0), value, 0.0)


@triton.jit
def _before(initial, values, at_state, at_before, unit, links, enters):
    """A state that entered the step: the initial one of a row, or one of all."""
    earlier = load(values, at_before, unit, links & (enters == 0)[:, None])
    return earlier + load(initial, at_state, unit, links & enters[:, None])


@triton.jit
def _more(sums, gradient, x):
    """Sums over a row, of gradients and of them times what they are of, with some more units."""
    a = tl.sum(gradient.to(tl.float64), axis=1)
    return sums[0] + a, sums[1] + tl.sum((gradient * x).to(tl.float64), axis=1)


@triton.jit
def _means(sums, count):
    return (sums[0] / count).to(tl.float32), (sums[1] / count).to(tl.float32)


@triton.jit
def _add(to, at, unit, values, mask):
    store(to, at, unit, load(to, at, unit, mask) + values, mask)


@triton.jit(do_not_specialize=["T", "B", "steps", "rows", "n"])
def backward(dy, dh_n, dc_n, dc, own_params, h_mask, h0, c0, y, c, saved, dgates, through, dproduct,
             carry, dunit, flow, lengths, starts, reset, T, B, steps, rows, n, bound,
             CELL: tl.constexpr, EMIT: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
             P: tl.constexpr, ALONE: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
             CLIP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Round n, which is step steps-1-n of each of `rows` windows: dgates, the norms of dL/dh_t
    where they are asked for, and what the step adds to dunit [rows, D, P*H].

    through [D, rows, H] is the product of W_hh and the dproduct [D, rows, G*H] of the round before,
    in whose place comes that of this round. carry [1 or 2, D, rows, H] has what reaches h, and c,
    around W_hh.

    Grid: blocks of rows, 1, D directions.
    """
    d = tl.program_id(2)
    turned = (d > 0).to(tl.int32)
    row = rows_of(tl.program_id(0), T, B, steps, rows, lengths, BLOCK_B)
    number, b, start, length, whole, real = row
    holds_end = (start + length >= whole) & ((length > 0) | (start == 0))
    # Of the windows, in this direction's order.
    is_first = tl.where(turned == 0, start == 0, holds_end)
    is_last = tl.where(turned == 0, holds_end, start == 0)
    step = steps - 1 - n + tl.zeros([BLOCK_B], tl.int32)
    active, t = position(step, turned, start, length)
    at = place(starts, t, b, d, active, B, D)
    linked = active & (cut_before(reset, starts, active, t, turned, b, whole, B) == 0)
    later, t_later = position(step + 1, turned, start, length)
    later = later & (cut_before(reset, starts, later, t_later, turned, b, whole, B) == 0)
    enters = is_first & (step == 0)
    at_before = place_before(starts, at, t, b, d, turned, active & (enters == 0), B, D) * H
    kept = is_kept(starts, active, t, T, real)
    at_state = (d * B + b).to(tl.int64) * H
    at_carry = (d * rows + number).to(tl.int64) * H
    at_carried_c = at_carry + D * rows.to(tl.int64) * H
    at_saved = at * (K * H)
    at_product = at_saved + (K - G) * H
    at_dgates = at * (2 * G * H)
    at_sums = (number.to(tl.int64) * D + d) * (P * H)

    by = _of_gates(saved, at_product, active, G, ALONE, H, BLOCK_B, BLOCK_H)
    of_c = by[0]
    if EMIT is not None:
        of_c = _of_row(c, at * H, active, 0, 1, H, BLOCK_B, BLOCK_H)
    nothing = tl.zeros([BLOCK_B], tl.float64)
    sums = (nothing, nothing)
    sums_alone = (nothing, nothing)
    sums_c = (nothing, nothing)
    means = by[0]
    means_alone = by[0]
    means_c = by[0]
    squares = nothing
    squares_dh = nothing
    factor = tl.zeros([BLOCK_B], tl.float32) + 1
    # The sums of the norm of c; those of the norms of W_hh h, and the squares; then all else.
    for turn in tl.static_range(0 if EMIT is not None else 1, 3):
        for first in range(0, H, BLOCK_H):
            unit = first + tl.arange(0, BLOCK_H)
            exists = (unit < H)[None, :]
            present = real[:, None] & exists
            runs = active[:, None] & exists
            links = linked[:, None] & exists
            own = parameters_of(own_params, d, unit, P, H, BLOCK_H)
            saves = ()
            for k in tl.static_range(K - G):
                saves = saves + (load(saved, at_saved + k * H, unit, runs),)
            around = _around(dh_n, carry, at_state, at_carry, unit, present, is_last, n)
            found = _through(through, h_mask, at_carry, at_state, unit, later[:, None] & exists)
            dh = tl.where(runs, around + load(dy, at * H, unit, runs) + found, 0.0)
            dnext = (dh,)
            if EMIT is not None:
                c_here = load(c, at * H, unit, runs)
                x_c = _standardized(c_here, of_c)
                d_slot, dn = EMIT(saves, x_c * own[P - 2] + own[P - 1], dh)
                dx_c = tl.where(runs, dn * own[P - 2], 0.0)
                dnext = (d_slot,)
            if turn == 0:
                sums_c = _more(sums_c, dx_c, x_c)
            else:
                _product, x, hidden = _hidden_parts(
                    saved, at_product, unit, runs, own, by, G, ALONE, H
                )
                for g in tl.static_range(G - ALONE, G):
                    saves = saves + (hidden[g],)
                prev = (_before(h0, y, at_state, at_before, unit, links, enters),)
                next = (load(y, at * H, unit, runs),)
                if EMIT is not None:
                    around_c = _around(
                        dc_n, carry, at_state, at_carried_c, unit, present, is_last, n
                    )
                    prev = prev + (_before(c0, c, at_state, at_before, unit, links, enters),)
                    next = next + (c_here,)
                    through_c = _destandardized(dx_c, x_c, of_c, means_c)
                    dnext = dnext + (around_c + load(dc, at * H, unit, runs) + through_c,)
                dgx, dgh, dprev = CELL(saves, prev, next, dnext)
                if turn == 2:
                    tl.debug_barrier()  # dgates may be the memory of saved
                elif flow is not None:
                    squares_dh += squares_of(dh)
                for g in tl.static_range(G):
                    of_input = tl.where(runs, bounded_by(dgx[g], CLIP, bound), 0.0)
                    of_hidden = tl.where(runs, bounded_by(dgh[g], CLIP, bound), 0.0)
                    dx = of_hidden * own[g]
                    if turn == 1:
                        if CLIP == "norm":
                            squares += squares_of(of_input)
                        if g < G - ALONE:
                            sums = _more(sums, dx, x[g])
                        else:
                            sums_alone = _more(sums_alone, dx, x[g])
                    else:
                        of_gate = means if g < G - ALONE else means_alone
                        through_g = _destandardized(dx, x[g], by[g], of_gate) * factor[:, None]
                        through_g = tl.where(runs, through_g, 0.0)
                        written = kept[:, None] & exists
                        of_input = of_input * factor[:, None]
                        of_hidden = of_hidden * factor[:, None]
                        store(dgates, at_dgates + g * H, unit, of_input, written)
                        store(dgates, at_dgates + (G + g) * H, unit, through_g, written)
                        store(dproduct, at_carry * G + g * H, unit, through_g, runs)
                        _add(dunit, at_sums + g * H, unit, of_hidden * x[g], runs)
                        if g >= G - ALONE:
                            _add(dunit, at_sums + (g + ALONE) * H, unit, of_hidden, runs)
                if turn == 2:
                    left = tl.where(runs, tl.where(links, dprev[0], 0.0), around)
                    store(carry, at_carry, unit, left, present)
                    if EMIT is not None:
                        left_c = tl.where(runs, tl.where(links, dprev[1], 0.0), around_c)
                        store(carry, at_carried_c, unit, left_c, present)
                        _add(dunit, at_sums + (P - 2) * H, unit, dn * x_c, runs)
                        _add(dunit, at_sums + (P - 1) * H, unit, dn, runs)
        if turn == 0:
            means_c = _means(sums_c, H)
        elif turn == 1:
            means = _means(sums, (G - ALONE) * H)
            means_alone = _means(sums_alone, H)
            if CLIP == "norm":
                factor = factor_of(squares, bound)
    if flow is not None:
        tl.store(flow + at, tl.sqrt(squares_dh).to(flow.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["T", "B", "steps", "rows"])
def finish(h_mask, through, carry, dh0, dc0, lengths, starts, reset, T, B, steps, rows,
           EMITS: tl.constexpr, D: tl.constexpr, H: tl.constexpr, BLOCK_B: tl.constexpr,
           BLOCK_H: tl.constexpr):  # fmt: skip
    """dh0 and dc0, behind the last round: through and carry as that has left them.

    Grid: blocks of rows, 1, D directions.
    """
    d = tl.program_id(2)
    turned = (d > 0).to(tl.int32)
    row = rows_of(tl.program_id(0), T, B, steps, rows, lengths, BLOCK_B)
    number, b, start, length, whole, real = row
    holds_end = (start + length >= whole) & ((length > 0) | (start == 0))
    is_first = real & tl.where(turned == 0, start == 0, holds_end)
    active, t = position(tl.zeros([BLOCK_B], tl.int32), turned, start, length)
    linked = active & (cut_before(reset, starts, active, t, turned, b, whole, B) == 0)
    at_state = (d * B + b).to(tl.int64) * H
    at_carry = (d * rows + number).to(tl.int64) * H
    for first in range(0, H, BLOCK_H):
        unit = first + tl.arange(0, BLOCK_H)
        exists = (unit < H)[None, :]
        starts_here = is_first[:, None] & exists
        found = _through(through, h_mask, at_carry, at_state, unit, linked[:, None] & exists)
        around = load(carry, at_carry, unit, starts_here)
        store(dh0, at_state, unit, around + found, starts_here)
        if EMITS:
            at_c = at_carry + D * rows.to(tl.int64) * H
            store(dc0, at_state, unit, load(carry, at_c, unit, starts_here), starts_here)
