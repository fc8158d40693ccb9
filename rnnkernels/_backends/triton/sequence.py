"""The sequence kernels in Triton: one for forward, one for backward, for every cell.

A program runs a block of rows of one direction over the steps [first, last), and computes a block
of hidden units. What the others need of it goes in one of three ways:

* RESIDENT: there are no others. The program has all units of its rows, and their weights, in
  registers.
* a count per block of rows: all programs of the rows are there at once (a cooperative launch), and
  a step waits for as many signals as all of them give at the end of a step. A wait has a bound.
* one launch per step: then nothing has to wait.

In the last two, values go through the results themselves: y in forward, dgates in backward. Where
gradients are bounded by the norm of their row, no program knows the norm before all have added to
it: gradients then pass through ``pending``, in float32, and the next step bounds them.

Shapes, packed steps and the order of steps are those of ``csrc/common/layout.h``; w_hh [D, G*H, H],
biases [D, G*H] and parameters of cells [D, P, H] have all directions, each head being one: HEADS of
these run forwards, and the others backwards. Names in capitals are constants of a compiled kernel.
"""

import triton
import triton.language as tl

from rnnkernels._backends.triton.blocks import (
    bounded_by,
    cut_before,
    factor_of,
    held_weights,
    is_kept,
    load,
    multiply,
    noise_of,
    of_state,
    parameters_of,
    place,
    place_before,
    position,
    rows_of,
    squares_of,
    store,
    taken_over,
)


@triton.jit
def _signal(count):
    """Tells the programs of these rows, if they wait, that this one has ended a step."""
    if count is not None:
        tl.debug_barrier()  # the stores of all threads come before the signal
        tl.atomic_add(count, 1, sem="release")


@triton.jit
def _wait(count, steps, fault, word, patience):
    """Until all programs of these rows have ended so many steps, or this one has looked as often as
    it has patience. Then it writes `word` to `fault`, and never waits again: the launch ends, with
    results that are wrong. Returns the patience that is left."""
    left = patience
    if count is not None:
        looks = tl.zeros([], tl.int32)
        wanted = steps * tl.num_programs(1)
        while (tl.atomic_add(count, 0, sem="acquire") < wanted) & (looks < patience):
            looks += 1
        if (looks == patience) & (patience > 0):
            tl.store(fault, word)
            left = patience * 0
        tl.debug_barrier()
    return left


@triton.jit
def _of_product(h, h_mask, at_mask, unit, exists):
    """h as a program that has all units multiplies it."""
    value = h
    if h_mask is not None:
        value = (h.to(tl.float32) * load(h_mask, at_mask, unit, exists)).to(h.dtype)
    return value


# --- Forward ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B", "layer", "pieces", "first", "last", "first_block"])
def forward(gx, w_hh, b_ih, b_hh, own_params, h_mask, h0, c0, y, h_n, c_n, c, saved, lengths,
            starts, reset, noise, draws, carry, counts, fault,
            T, B, layer, pieces, first, last, first_block,
            CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
            P: tl.constexpr, E: tl.constexpr, RECURRENT: tl.constexpr, D: tl.constexpr,
            HEADS: tl.constexpr, H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
            BLOCK_K: tl.constexpr, RESIDENT: tl.constexpr, HELD: tl.constexpr,
            PRECISION: tl.constexpr, PATIENCE: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """y, h_n, c_n and, where they are asked for, c and saved.

    Grid: blocks of rows, programs (parts) for each, D directions.
    """
    d = tl.program_id(2)
    turned = (d >= HEADS).to(tl.int32)
    IO: tl.constexpr = y.dtype.element_ty
    w = w_hh + d.to(tl.int64) * (G * H * H)
    block = first_block + tl.program_id(0)
    _, b, start, length, whole, real = rows_of(block, T, B, T, B, lengths, BLOCK_B)
    row = (d * B + b).to(tl.int64)
    at_state = row * H
    first_unit = tl.program_id(1) * BLOCK_H
    unit = first_unit + tl.arange(0, BLOCK_H)
    exists = real[:, None] & (unit < H)[None, :]
    if counts is not None:
        counts += d * tl.num_programs(0) + tl.program_id(0)

    held = ()
    if HELD and RECURRENT:
        held = held_weights(w, first_unit, G, 1, H, BLOCK_K, BLOCK_H, False)
    b_x = ()
    b_h = ()
    for g in tl.static_range(G):
        x = tl.zeros([BLOCK_H], tl.float32)
        h = tl.zeros([BLOCK_H], tl.float32)
        if b_ih is not None:
            of_gate = (d * G + g) * H + unit
            x = tl.load(b_ih + of_gate, mask=unit < H, other=0).to(tl.float32)
            h = tl.load(b_hh + of_gate, mask=unit < H, other=0).to(tl.float32)
        b_x = b_x + (x[None, :],)
        b_h = b_h + (h[None, :],)
    states = ()
    for k in tl.static_range(S):
        initial = h0 if k == 0 else c0
        at_initial = of_state(row, k, S, H)
        at_k = at_state + k * D * B.to(tl.int64) * H  # of [S, D, B, H]
        states = states + (taken_over(initial, at_initial, carry, at_k, unit, exists, first),)
    own = parameters_of(own_params, d, unit, P, H, BLOCK_H)
    sent = (_of_product(states[0].to(IO), h_mask, at_state, unit, exists),)
    patience = tl.zeros([], tl.int32) + PATIENCE

    for n in range(first, last):
        s = n + tl.zeros([BLOCK_B], tl.int32)
        active, t = position(s, turned, start, length)
        at = place(starts, t, b, d, active, B, D)
        linked = active & (cut_before(reset, starts, active, t, turned, b, whole, B) == 0)
        runs = active[:, None] & exists
        kept = is_kept(starts, active, t, T, real)[:, None] & exists
        links = linked[:, None] & exists
        inputs = ()
        for g in tl.static_range(G):
            inputs = inputs + (load(gx, at * (G * H) + g * H, unit, runs) + b_x[g],)
        patience = _wait(counts, n - first, fault, 2 * n + 2, patience)
        if n == 0:
            source = h0
            at_source = at_state
        else:
            source = y
            at_source = place_before(starts, at, t, b, d, turned, linked, B, D) * H
        hidden = ()
        if RECURRENT:
            product = multiply(w, held, sent, source, at_source, linked, None, h_mask, at_state,
                               first_unit, pieces, G, 1, 0, H, BLOCK_B, BLOCK_H, BLOCK_K, RESIDENT,
                               HELD, False, PRECISION, WIDE)  # fmt: skip
            for g in tl.static_range(G):
                hidden = hidden + (tl.where(links, product[g], 0.0) + b_h[g],)
        else:
            for g in tl.static_range(G):
                hidden = hidden + (b_h[g],)
        prev = ()
        for k in tl.static_range(S):
            prev = prev + (tl.where(links, states[k], 0.0),)
        prev = prev + own
        if E > 0:
            prev = prev + noise_of(noise, draws, layer, b, t, d, unit, exists, E)
        next, saves = CELL(inputs, hidden, prev)
        left = ()
        for k in tl.static_range(S):
            # h goes on as it is stored; the others in full.
            value = next[k].to(IO).to(tl.float32) if k == 0 else next[k]
            left = left + (tl.where(runs, value, states[k]),)
            result = y if k == 0 else c
            if result is not None:
                value = tl.where(runs, next[k], 0.0)
                store(result, of_state(at, k, S, H), unit, value, kept)
        if saved is not None:
            for k in tl.static_range(K):
                value = tl.where(runs, saves[k], 0.0)
                store(saved, at * (K * H) + k * H, unit, value, kept)
        states = left
        sent = (_of_product(next[0].to(IO), h_mask, at_state, unit, exists),)
        _signal(counts)

    for k in tl.static_range(S):
        if last == T:
            store(h_n if k == 0 else c_n, of_state(row, k, S, H), unit, states[k], exists)
        if carry is not None:
            store(carry, at_state + k * D * B.to(tl.int64) * H, unit, states[k], exists)


# --- Backward ---------------------------------------------------------------------------------


@triton.jit
def _factor(squares, at, mask, bound):
    """What a row is multiplied by: [BLOCK_B], from what all programs found of its norm."""
    total = tl.zeros(at.shape, tl.float64)
    squares += at * tl.num_programs(1)
    for part in range(tl.num_programs(1)):
        total += tl.load(squares + part, mask=mask, other=0, cache_modifier=".cg")
    return factor_of(total, bound)


@triton.jit
def _through(w, held, sent, dgates, pending, squares, h_mask, row, starts, reset, n, d, turned,
             first_unit, T, B, pieces, steps, rows, bound, G, A, D, H, BLOCK_B, BLOCK_H, BLOCK_K,
             RECURRENT, RESIDENT, HELD, PRECISION):  # fmt: skip
    """What comes back through W_hh from the step of round n - 1.

    Bounds and stores the gradients of that step, if they are pending.
    """
    number, b, start, length, whole, real = row
    s = steps - n + tl.zeros([BLOCK_B], tl.int32)
    active, t = position(s, turned, start, length)
    linked = active & (cut_before(reset, starts, active, t, turned, b, whole, B) == 0)
    at = place(starts, t, b, d, active, B, D) * ((G + A) * H)
    source = dgates
    at_source = at
    factor = None
    if pending is not None:
        slot = (((n + 1) % 2 * D + d) * rows + number).to(tl.int64)  # of round n - 1
        source = pending
        at_source = slot * ((G + A) * H)
        factor = _factor(squares, slot, real & (s < steps), bound)
        unit = first_unit + tl.arange(0, BLOCK_H)
        written = is_kept(starts, active, t, T, real) & (s < steps)
        written = written[:, None] & (unit < H)[None, :]
        for g in tl.static_range(G + A):
            value = load(pending, at_source + g * H, unit, written)
            store(dgates, at + g * H, unit, value * factor[:, None], written)
    found = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if RECURRENT:
        product = multiply(w, held, sent, source, at_source, linked, factor, None, 0, first_unit,
                           pieces, 1, G, A, H, BLOCK_B, BLOCK_H, BLOCK_K, RESIDENT, HELD, True,
                           PRECISION, False)  # fmt: skip
        found = tl.where(linked[:, None], product[0], 0.0)
        if h_mask is not None:
            units = first_unit + tl.arange(0, BLOCK_H)
            exists = real[:, None] & (units < H)[None, :]
            found = found * load(h_mask, (d * B + b).to(tl.int64) * H, units, exists)
    return found


@triton.jit(
    do_not_specialize=["T", "B", "layer", "pieces", "steps", "rows", "first", "last", "first_block"]
)
def backward(dy, dh_n, dc_n, dc, w_hh, own_params, h_mask, h0, c0, y, c, saved, dgates, dh0, dc0,
             dunit, lengths, starts, reset, noise, draws, carry, counts, fault, pending, squares,
             flow, T, B, layer, pieces, steps, rows, first, last, first_block, bound,
             CELL: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
             P: tl.constexpr, E: tl.constexpr, RECURRENT: tl.constexpr, A: tl.constexpr,
             D: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, CLIP: tl.constexpr,
             BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
             RESIDENT: tl.constexpr, HELD: tl.constexpr,
             FINISH: tl.constexpr, PRECISION: tl.constexpr, PATIENCE: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """dgates [T, B, D, (G+A)*H] and, where they are asked for, dh0, dc0, dunit [rows, D, P*H] and
    the squares of the norms of dL/dh_t [T, B, D, parts], of windows of `steps` steps of each of B
    rows.

    Round n takes step steps-1-n; FINISH is one more, for what reaches the states before step 0.
    """
    part = tl.program_id(1)
    d = tl.program_id(2)
    turned = (d >= HEADS).to(tl.int32)
    IO: tl.constexpr = dgates.dtype.element_ty
    w = w_hh + d.to(tl.int64) * (G * H * H)
    block = first_block + tl.program_id(0)
    row = rows_of(block, T, B, steps, rows, lengths, BLOCK_B)
    number, b, start, length, whole, real = row
    holds_end = (start + length >= whole) & ((length > 0) | (start == 0))
    # Of the windows, in this direction's order.
    is_first = tl.where(turned == 0, start == 0, holds_end)
    is_last = tl.where(turned == 0, holds_end, start == 0)
    at_state = (d * B + b).to(tl.int64)
    at_carry = (d * rows + number).to(tl.int64) * H  # of [S, D, rows, H]
    first_unit = part * BLOCK_H
    unit = first_unit + tl.arange(0, BLOCK_H)
    exists = real[:, None] & (unit < H)[None, :]
    if counts is not None:
        counts += d * tl.num_programs(0) + tl.program_id(0)

    held = ()
    if HELD and RECURRENT:
        held = held_weights(w, first_unit, 1, G, H, BLOCK_K, BLOCK_H, True)
    states = ()
    for k in tl.static_range(S):
        final = dh_n if k == 0 else dc_n
        at_k = at_carry + k * D * rows.to(tl.int64) * H
        value = taken_over(final, of_state(at_state, k, S, H), carry, at_k, unit, exists, first)
        states = states + (tl.where(is_last[:, None] | (first > 0), value, 0.0),)
    own = parameters_of(own_params, d, unit, P, H, BLOCK_H)
    at_sums = (number.to(tl.int64) * D + d) * (P * H)
    sums = ()  # of the gradients of the parameters, from one launch to the next in memory
    for k in tl.static_range(P):
        sums = sums + (load(dunit, at_sums + k * H, unit, exists),)
    sent = ()
    for g in tl.static_range(G):
        sent = sent + (tl.zeros([BLOCK_B, BLOCK_H], IO),)
    patience = tl.zeros([], tl.int32) + PATIENCE

    for n in range(first, last):
        s = steps - 1 - n + tl.zeros([BLOCK_B], tl.int32)
        active, t = position(s, turned, start, length)
        at = place(starts, t, b, d, active, B, D)
        runs = active[:, None] & exists
        links = runs & (cut_before(reset, starts, active, t, turned, b, whole, B) == 0)[:, None]
        first_step = is_first & (s == 0)
        at_before = place_before(starts, at, t, b, d, turned, active & (first_step == 0), B, D)
        enters = first_step[:, None]
        kept = is_kept(starts, active, t, T, real)
        written = kept[:, None] & exists
        saves = ()
        for k in tl.static_range(K):
            saves = saves + (load(saved, at * (K * H) + k * H, unit, runs),)
        prev = ()
        next = ()
        dnext = ()
        for k in tl.static_range(S):
            values = y if k == 0 else c
            at_initial = of_state(at_state, k, S, H)
            at_k = of_state(at, k, S, H)
            initial = load(h0 if k == 0 else c0, at_initial, unit, links & enters)
            earlier = load(values, of_state(at_before, k, S, H), unit, links & (enters == 0))
            gradient = load(dy if k == 0 else dc, at_k, unit, runs)
            prev = prev + (initial + earlier,)
            next = next + (load(values, at_k, unit, runs),)
            dnext = dnext + (tl.where(runs, states[k] + gradient, 0.0),)
        tl.debug_barrier()  # dgates may be the memory of saved
        patience = _wait(counts, n - first, fault, 2 * n + 3, patience)
        through = _through(w, held, sent, dgates, pending, squares, h_mask, row, starts, reset, n,
                           d, turned, first_unit, T, B, pieces, steps, rows, bound, G, A, D, H,
                           BLOCK_B, BLOCK_H, BLOCK_K, RECURRENT, RESIDENT, HELD,
                           PRECISION)  # fmt: skip
        dh = tl.where(runs, dnext[0] + through, 0.0)
        whole_dnext = (dh,)
        for k in tl.static_range(1, S):
            whole_dnext = whole_dnext + (dnext[k],)
        prev = prev + own
        if E > 0:
            prev = prev + noise_of(noise, draws, layer, b, t, d, unit, exists, E)
        dgx, dgh, dprev = CELL(saves, prev, next, whole_dnext)
        left = ()
        for k in tl.static_range(S):
            around = tl.where(links, dprev[k], 0.0)
            left = left + (tl.where(runs, around, states[k]),)
        more = ()
        for k in tl.static_range(P):
            more = more + (sums[k] + tl.where(runs, dprev[S + k], 0.0),)
        sums = more
        norm = tl.zeros([BLOCK_B], tl.float64)
        slot = ((n % 2 * D + d) * rows + number).to(tl.int64)
        bounded = ()
        for g in tl.static_range(G + A):
            value = bounded_by(dgx[g] if g < G else dgh[g - A], CLIP, bound)
            value = tl.where(runs, value, 0.0)
            bounded = bounded + (value.to(IO),)
            if pending is None:
                store(dgates, at * ((G + A) * H) + g * H, unit, value, written)
            else:
                store(pending, slot * ((G + A) * H) + g * H, unit, value, exists)
                if g < G:
                    norm += squares_of(value)
        if pending is not None:
            tl.store(squares + slot * tl.num_programs(1) + part, norm, mask=real)
        if flow is not None:
            tl.store(flow + at * tl.num_programs(1) + part, squares_of(dh), mask=kept)
        states = left
        sent = ()
        for g in tl.static_range(G):
            sent = sent + (bounded[g if g < G - A else g + A],)
        _signal(counts)

    for k in tl.static_range(P):
        store(dunit, at_sums + k * H, unit, sums[k], exists)
    if carry is not None:
        for k in tl.static_range(S):
            at_k = at_carry + k * D * rows.to(tl.int64) * H
            store(carry, at_k, unit, states[k], exists)
    if FINISH:
        _wait(counts, last - first, fault, 2 * last + 3, patience)
        through = _through(w, held, sent, dgates, pending, squares, h_mask, row, starts, reset,
                           last, d, turned, first_unit, T, B, pieces, steps, rows, bound, G, A, D,
                           H, BLOCK_B, BLOCK_H, BLOCK_K, RECURRENT, RESIDENT, HELD,
                           PRECISION)  # fmt: skip
        starts = exists & is_first[:, None]
        if dh0 is not None:
            store(dh0, at_state * H, unit, states[0] + through, starts)
            for k in tl.static_range(1, S):
                store(dc0, of_state(at_state, k, S, H), unit, states[k], starts)
