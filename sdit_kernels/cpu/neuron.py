"""Any neuron on the CPU: one forward and one backward kernel around the code that ../neuron/ generates from its step.

A task processes a block of columns, whose states stay in the L1 cache for all steps. A column is one neuron of a row of the
input. LLVM vectorises over columns. A tile is an array on the stack that holds one value per column of a block.

The backward pass goes through the steps from last to first, in segments of 16 steps. It recomputes the tape of a segment, the
values per step from which the pullback starts, into tiles. The segment starts from the given states or from the checkpoint, to
which the forward pass writes the states every 16 steps. The arithmetic follows the step operation by operation. Parameter
gradients are summed per task and then over tasks. The order of this sum does not depend on the number of threads.

With a norm (``Variant.norm``), a task processes whole rows. It first reads x for the norm; then x is in a cache.
The backward pass adds the gradient through the norm to dx of a step when all columns of this step are done.
"""

import functools

from ..dtypes import state_dtype
from ..layout import LIF_CHECKPOINT_STEPS, layout_of, sum_over_steps
from ..neuron import printer, trace
from ..neuron.trace import HUGE, is_condition
from ..surrogate import SURROGATES
from . import one_step
from .compiler import inline
from .intrinsics import (
    CODES,
    F64,
    SIZES,
    add_rows,
    fill,
    fill_parameter,
    load,
    load_input,
    load_parameters,
    load_rows,
    num,
    nums,
    prefetch,
    replaced,
    state_code,
    store,
    store_level,
    store_output,
    store_rows,
    store_spike,
    stream,
    sum_tile,
    tile,
)
from .kernel import STREAM, Kernel, share
from .launch import (
    BACKWARD_COLUMNS,
    CHANNELS,
    FORWARD_COLUMNS,
    ROWS,
    TOKENS,
    Parameters,
    placed,
    placed_all,
    placed_gradient,
    placed_state,
)
from .surrogate import surrogate_derivative
from .vector import (
    absolute,
    exp,
    fma,
    inside,
    level,
    maximum,
    minimum,
    norm_of_row,
    sign,
    use_wide_vectors,
    vset,
    where_at_least,
    where_equal,
    where_less,
)
from .vector import share as share_

_OPERATIONS = dict(
    inline=inline, vset=vset, surrogate_derivative=surrogate_derivative, where_at_least=where_at_least, where_less=where_less,
    where_equal=where_equal, fma=fma, exp=exp, absolute=absolute, maximum=maximum, minimum=minimum, level=level, inside=inside,
    sign=sign, share=share_,
)  # fmt: skip


def generate(code, V, kind, with_parameters, entries):
    """Return functions of the generated code. V: a storage code, or the type of vectors. kind: the id of the surrogate."""
    language = printer.NUMBA_VECTORS if V >= 8 else printer.NUMBA
    text = printer.text(trace(*code), language, with_parameters, entries)
    found = printer.load(text, code[0].name, _OPERATIONS | dict(V=V, KIND=kind))
    return [found[entry] for entry in entries]


@functools.cache
def forward_kernel(X, O, V, code, spread, norm="", BLOCK=FORWARD_COLUMNS):
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    STATES, NORM, NORMED = len(code[0].states), norm != "", _normed(code, norm)
    PARAMETERS = len(code[0].parameters) + len(code[0].numbers)
    VARIES, ON_CHANNELS, ON_ROWS, ON_TOKENS = spread in (CHANNELS, TOKENS), spread == CHANNELS, spread == ROWS, spread == TOKENS
    ROW, AREA, P_AREA = BLOCK * sb, STATES * BLOCK, PARAMETERS * BLOCK if VARIES else 1
    FINALS, SEQS, KEEPS = 3, 3 + 2 * STATES, 3 + 5 * STATES  # where the outputs have these tensors
    FIRES = is_condition(trace(*code).spike)
    (step,), norm_of_row = generate(code, S, 0, False, ("step",)), _norm_of_row(norm, X)

    def neuron_forward(part, T, R, C, inputs, outputs, numbers, places):
        use_wide_vectors()
        x, x_t, x_r = inputs[:3]
        s, s_t, s_r = outputs[:3]
        before, after, seq, keep = inputs[3:], outputs[FINALS:SEQS], outputs[SEQS:KEEPS], outputs[KEEPS:]
        constants = nums(numbers, S)
        p, start = constants[:PARAMETERS], constants[PARAMETERS:]
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            n = min(BLOCK, C - c)
            v, ps = tile(AREA, S), tile(P_AREA, S)
            if ON_CHANNELS:
                for j in range(PARAMETERS):
                    fill(ps + j * ROW, n, places[j], c, p[j], S, S)
            for j in range(STATES):
                fill(v + j * ROW, n, before[2 * j], row * before[2 * j + 1] + c, start[j], V, S)
            for t in range(T):
                if ON_ROWS:
                    p = load_parameters(places, constants[:PARAMETERS], t, row, S)
                if ON_TOKENS:
                    for j in range(PARAMETERS):
                        at, per_step, period = places[4 * j], places[4 * j + 1], places[4 * j + 2]
                        if t == 0 or per_step:
                            fill_parameter(ps + j * ROW, n, at, per_step, period, c, t, row, p[j], S)
                if t > 0 and t % LIF_CHECKPOINT_STEPS == 0:
                    for j in range(STATES):
                        to, to_t, to_r = keep[3 * j], keep[3 * j + 1], keep[3 * j + 2]
                        if to != 0:
                            to += ((t // LIF_CHECKPOINT_STEPS - 1) * to_t + row * to_r + c) * sb
                            fill(to, n, v + j * ROW, 0, start[j], S, S)
                xt = x + (t * x_t + row * x_r + c) * xb
                st = s + (t * s_t + row * s_r + c) * ob
                if NORM:
                    threshold = norm_of_row(xt, C) * (load(ps + NORMED * ROW, 0, S) if VARIES else p[NORMED])
                for i in range(n):
                    q = load_rows(ps, i, PARAMETERS, ROW, S) if VARIES else p
                    if NORM:
                        q = replaced(q, NORMED, threshold)
                    spike, states = step(load(xt, i, X), load_rows(v, i, STATES, ROW, S), q)
                    if FIRES:
                        store_spike(st, i, spike, O)
                    else:
                        store_level(st, i, spike, O)
                    store_rows(v, i, states, ROW, S)
                for j in range(STATES):
                    to, to_t, to_r = seq[3 * j], seq[3 * j + 1], seq[3 * j + 2]
                    if to != 0:
                        fill(to + (t * to_t + row * to_r + c) * sb, n, v + j * ROW, 0, start[j], S, S)
            for j in range(STATES):
                to, to_r = after[2 * j], after[2 * j + 1]
                if to != 0:
                    fill(to + (row * to_r + c) * sb, n, v + j * ROW, 0, start[j], S, S)

    return Kernel(neuron_forward, f"{step.__name__}_{X}{O}{V}{spread}" + (f"{norm}{BLOCK}" if NORM else ""))


@functools.cache
def backward_kernel(X, D, V, code, kind, spread, WANTED, WRITES, STREAMED, norm="", THROUGH=False, BLOCK=BACKWARD_COLUMNS):
    """WANTED: the gradients of the parameters are wanted. WRITES: dx is. STREAMED: dx bypasses the caches.

    THROUGH: dx includes the norm.
    """
    S = state_code(X)
    xb, db, vb, sb = SIZES[X], SIZES[D], SIZES[V], SIZES[S]
    STATES, NORM, NORMED, RMS = len(code[0].states), norm != "", _normed(code, norm), norm == "rms"
    GRADIENTS = len(code[0].learnt)
    PARAMETERS = len(code[0].parameters) + len(code[0].numbers)
    VARIES, ON_CHANNELS, ON_ROWS, ON_TOKENS = spread in (CHANNELS, TOKENS), spread == CHANNELS, spread == ROWS, spread == TOKENS
    ROW, AREA = BLOCK * sb, STATES * BLOCK
    STEP, P_AREA, G_AREA = AREA * sb, PARAMETERS * BLOCK if VARIES else 1, GRADIENTS * BLOCK if WANTED else 1
    plan = trace(*code).plan(WANTED)
    # Row t of the history has the tape of step t, or the states before step t. In both cases row t + 1 has what follows.
    HISTORY, KEEPS_STATES, USES_TAPE = (LIF_CHECKPOINT_STEPS + 1) * AREA, plan.keeps_states, plan.uses_tape
    AHEAD = STEP if KEEPS_STATES else 0
    KEEPS, SEQS, SUMS = 3 + 2 * STATES, 4 + 2 * STATES, 3 + 2 * STATES  # where a group of arguments has these tensors
    record, pullback = generate(code, S, kind, WANTED, ("record", "pullback"))
    norm_of_row, INTO, MOST = _norm_of_row(norm, X), S if THROUGH else D, HUGE[S == F64]

    def neuron_backward(part, T, R, C, group, groups, inputs, upstream, gradients, numbers, places):
        use_wide_vectors()
        x, x_t, x_r = inputs[:3]
        g, g_t, g_r, g_c = upstream[:4]
        dx, dx_t, dx_r = gradients[:3]
        before, keep, g_after, g_seq = inputs[3:KEEPS], inputs[KEEPS:], upstream[4:SEQS], upstream[SEQS:]
        d_before, sums = gradients[3:SUMS], gradients[SUMS:]
        constants, zero = nums(numbers, S), num(0.0, S)
        p, start, alpha = constants[:PARAMETERS], constants[PARAMETERS:], constants[-1]
        x_t, g_t, dx_t = x_t * xb, g_t * xb, dx_t * db
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(groups * chunks, part):
            block = task // chunks
            c = (task - block * chunks) * BLOCK
            n = min(BLOCK, C - c)
            width = 16  # the power of two for sum_tile
            while width < n:
                width <<= 1
            history, carry, row_out = tile(HISTORY, S), tile(AREA, S), tile(BLOCK, S)
            ps, total = tile(P_AREA, S), tile(G_AREA, S)
            ahead = BLOCK
            if NORM:
                norms, row_d, ahead = tile(LIF_CHECKPOINT_STEPS, S), tile(BLOCK, S), n
            v = history if KEEPS_STATES else history + LIF_CHECKPOINT_STEPS * STEP  # the states where a segment starts
            if ON_CHANNELS:
                for j in range(PARAMETERS):
                    fill(ps + j * ROW, n, places[j], c, p[j], S, S)
            if WANTED:
                for j in range(GRADIENTS):
                    fill(total + j * ROW, n, 0, 0, zero, S, S)
            for row in range(block * group, min(R, block * group + group)):
                if ON_TOKENS:
                    for j in range(PARAMETERS):
                        fill_parameter(ps + j * ROW, n, places[4 * j], 0, places[4 * j + 2], c, 0, row, p[j], S)
                for j in range(STATES):
                    fill(carry + j * ROW, n, g_after[2 * j], row * g_after[2 * j + 1] + c, zero, S, S)
                for segment in range((T - 1) // LIF_CHECKPOINT_STEPS, -1, -1):
                    t0 = segment * LIF_CHECKPOINT_STEPS
                    steps = min(LIF_CHECKPOINT_STEPS, T - t0)
                    for j in range(STATES):
                        if segment > 0:
                            offset = (segment - 1) * keep[3 * j + 1] + row * keep[3 * j + 2] + c
                            fill(v + j * ROW, n, keep[3 * j], offset, zero, S, S)
                        else:
                            fill(v + j * ROW, n, before[2 * j], row * before[2 * j + 1] + c, start[j], V, S)
                    xs = x + t0 * x_t + (row * x_r + c) * xb
                    gs = g + t0 * g_t + (row * g_r + c * g_c) * xb
                    dxs = dx + t0 * dx_t + (row * dx_r + c) * db
                    if NORM:
                        for t in range(steps):
                            store(norms, t, norm_of_row(xs + t * x_t, C), S)
                    for t in range(steps):
                        prefetch(gs + t * g_t, n * xb, 0)
                        if WRITES and not STREAMED:
                            prefetch(dxs + t * dx_t, n * db, 1)
                        if USES_TAPE or t < steps - 1:
                            if ON_ROWS:
                                p = load_parameters(places, constants[:PARAMETERS], t0 + t, row, S)
                            if ON_TOKENS:
                                for j in range(PARAMETERS):
                                    if places[4 * j + 1]:  # a value per step
                                        fill_parameter(
                                            ps + j * ROW, n, places[4 * j], 1, places[4 * j + 2], c, t0 + t, row, p[j], S
                                        )
                            now = v + t * AHEAD
                            if NORM:
                                factor = load(ps + NORMED * ROW, 0, S) if VARIES else p[NORMED]
                                threshold = load(norms, t, S) * factor
                            for i in range(n):
                                q = load_rows(ps, i, PARAMETERS, ROW, S) if VARIES else p
                                if NORM:
                                    q = replaced(q, NORMED, threshold)
                                states = load_rows(now, i, STATES, ROW, S)
                                tape, states = record(load_input(xs + t * x_t, i, X), states, q)
                                store_rows(now + AHEAD, i, states, ROW, S)
                                if not KEEPS_STATES:
                                    store_rows(history + t * STEP, i, tape, ROW, S)
                    for t in range(steps - 1, -1, -1):
                        prefetch(xs + t * x_t + ahead * xb, ahead * xb, 0)
                        if ON_ROWS:
                            p = load_parameters(places, constants[:PARAMETERS], t0 + t, row, S)
                        if ON_TOKENS:
                            for j in range(PARAMETERS):
                                if places[4 * j + 1]:
                                    fill_parameter(
                                        ps + j * ROW, n, places[4 * j], 1, places[4 * j + 2], c, t0 + t, row, p[j], S
                                    )
                        for j in range(STATES):
                            gj, gj_t, gj_r = g_seq[3 * j], g_seq[3 * j + 1], g_seq[3 * j + 2]
                            if gj != 0:
                                gj += ((t0 + t) * gj_t + row * gj_r + c) * sb
                                for i in range(n):
                                    store(carry + j * ROW, i, load(carry + j * ROW, i, S) + load_input(gj, i, S), S)
                        target = dxs + t * dx_t if WRITES and not STREAMED else row_out
                        into, now = target, history + t * STEP
                        if NORM:
                            norm_ = load(norms, t, S)
                            factor = load(ps + NORMED * ROW, 0, S) if VARIES else p[NORMED]
                            threshold = norm_ * factor
                        if THROUGH:
                            into = row_d
                        for i in range(n):
                            q = load_rows(ps, i, PARAMETERS, ROW, S) if VARIES else p
                            if NORM:
                                q = replaced(q, NORMED, threshold)
                            d, states, d_q = pullback(
                                load_rows(now + AHEAD, i, STATES, ROW, S), load_input(xs + t * x_t, i, X),
                                load_rows(now, i, STATES, ROW, S), q, load_input(gs + t * g_t, i, X),
                                load_rows(carry, i, STATES, ROW, S), alpha,
                            )  # fmt: skip
                            store_output(into, i, d, INTO)
                            store_rows(carry, i, states, ROW, S)
                            if WANTED:
                                add_rows(total, i, d_q, ROW, S)
                        if WANTED and NORM:
                            d_threshold = sum_tile(total + NORMED * ROW, n, width, S)
                            fill(total + NORMED * ROW, n, 0, 0, zero, S, S)
                            store(sums[NORMED], (t0 + t) * R + row, d_threshold * norm_, S)
                        if THROUGH:
                            slope = d_threshold * factor / ((norm_ if RMS else num(1.0, S)) * num(C * 1.0, S))
                            finite = norm_ < num(MOST, S)
                            for i in range(n):
                                xi = load_input(xs + t * x_t, i, X)
                                d = slope * (xi if RMS else sign(xi, S))
                                store_output(target, i, load(row_d, i, S) + (d if finite else zero), D)
                        if WANTED and (ON_ROWS or ON_TOKENS):
                            for j in range(GRADIENTS):
                                if places[4 * j + 1] and j != NORMED:
                                    sum_ = sum_tile(total + j * ROW, n, width, S)
                                    store(sums[j], ((task - block * chunks) * T + t0 + t) * R + row, sum_, S)
                                    fill(total + j * ROW, n, 0, 0, zero, S, S)
                        if STREAMED:
                            stream(dxs + t * dx_t, row_out, n * db)
                for j in range(STATES):
                    to, to_r = d_before[2 * j], d_before[2 * j + 1]
                    if to != 0:
                        for i in range(n):
                            store(to + (row * to_r + c) * vb, i, load(carry + j * ROW, i, S), V)
                if WANTED and (ON_ROWS or ON_TOKENS):
                    for j in range(GRADIENTS):
                        # a value per token, the same at every step
                        if places[4 * j + 2] and not places[4 * j + 1] and j != NORMED:
                            sum_ = sum_tile(total + j * ROW, n, width, S)
                            store(sums[j], (task - block * chunks) * R + row, sum_, S)
                            fill(total + j * ROW, n, 0, 0, zero, S, S)
            if WANTED:
                for j in range(GRADIENTS):
                    if j == NORMED or ((ON_ROWS or ON_TOKENS) and places[4 * j + 2]):
                        continue
                    if VARIES or ON_ROWS:
                        fill(sums[j] + (block * C + c) * sb, n, total + j * ROW, 0, zero, S, S)
                    else:
                        store(sums[j], task, sum_tile(total + j * ROW, n, BLOCK, S), S)

    name = f"{pullback.__name__}_{X}{D}{V}{kind}{spread}{WANTED:d}{WRITES:d}{STREAMED:d}"
    name += f"{norm}{THROUGH:d}{BLOCK}" if NORM else ""
    return Kernel(neuron_backward, name)


def _normed(code, norm):
    """Return the index of the parameter that is a factor of the norm, or -1."""
    return code[0].parameters.index("v_threshold") if norm else -1


def _norm_of_row(norm, X):
    return norm_of_row(norm, X) if norm else None


def _columns(variant, C, columns):
    """Return the most columns of a task; the norm of a row needs all of them."""
    while variant.norm and columns < C:
        columns *= 4
    return columns


def _same_dtype(states, dtype):
    """Return the states in one dtype, and its storage code. States of several dtypes become ``dtype``, the state type."""
    found = None
    for v in states:
        if v is not None and v.dtype != found:
            if found is not None:
                return [None if v is None else v.to(dtype) for v in states], CODES[dtype]
            found = v.dtype
    return states, CODES[found or dtype]


def neuron_forward(variant, x, states, parameters, s, finals, seqs, checkpoints, tuning):
    """Fill s, and per state the final one, the sequence and the checkpoint if they are given. x is not empty."""
    dtype = state_dtype(x.dtype)
    p = Parameters(variant, parameters, dtype, x.dim())
    layout = layout_of(x, s, p.per_channel or variant.norm != "")
    states, V = _same_dtype(states, dtype)
    alive, inputs = placed_all(layout, (placed, (x,)), (placed_state, states))
    more, outputs = placed_all(layout, (placed, (s,)), (placed_state, finals), (placed, seqs), (placed, checkpoints))
    if s.dtype.is_floating_point and one_step.fits(variant, p, x.shape[0], *states, *finals, *seqs):
        one_step.forward(variant, p, layout, x, s, inputs[:3:2], outputs[:3:2])
        return
    columns = _columns(variant, layout.C, FORWARD_COLUMNS)
    forward_kernel(CODES[x.dtype], CODES[s.dtype], V, p.code, p.spread, variant.norm, columns)(
        x.numel(), x.shape[0], layout.R, layout.C, inputs, outputs, p.numbers, p.addresses
    )


def neuron_backward(
    variant, g, g_finals, g_seqs, x, states, parameters, checkpoints, dx, d_states, with_parameters, tuning
):  # fmt: skip
    """Fill dx, in any dtype, if given, and the gradients of the states that are given. x is not empty.

    With ``with_parameters``, return partial sums of the gradients of the parameters: (groups, C) each if one of them has one
    value per channel, otherwise (tasks,).
    """
    dtype = state_dtype(x.dtype)
    p = Parameters(variant, parameters, dtype, x.dim())
    layout = layout_of(x, x if dx is None else dx, p.per_channel or variant.norm != "")
    columns, normed = _columns(variant, layout.C, BACKWARD_COLUMNS), _normed(p.code, variant.norm)
    wanted, through = with_parameters or variant.differentiates_norm, variant.differentiates_norm
    states, V = _same_dtype(states, dtype)
    into = [d if d is None or CODES[d.dtype] == V else d.to(dtype) for d in d_states]
    g_finals, g_seqs = ([None if t is None else t.to(dtype) for t in group] for group in (g_finals, g_seqs))
    one = dx is not None and dx.dtype == x.dtype and one_step.fits(variant, p, x.shape[0], *states, *g_finals, *g_seqs)
    g, g_ = placed_gradient(layout, g, g if one and g is not None else x, columns)
    alive, inputs = placed_all(layout, (placed, (x,)), (placed_state, states), (placed, checkpoints))
    more, upstream = placed_all(layout, (placed_state, g_finals), (placed, g_seqs))
    most, gradients = placed_all(layout, (placed, (dx,)), (placed_state, into))
    group, groups, sums, sums_ = p.partial_sums(layout, wanted, x.shape[0], columns, normed)
    written = x if dx is None else dx
    if one:
        # places of x, g and dx are (address, stride of T, stride of R, ..)
        places = (place[:3:2] for place in (inputs, g_, gradients))
        one_step.backward(variant, p, layout, x, g, *places, sums_[normed] if sums_ else 0, columns)
    else:
        backward_kernel(
            CODES[x.dtype], CODES[written.dtype], V, p.code, SURROGATES[variant.surrogate].id, p.spread, wanted, dx is not None,
            dx is not None and dx.nbytes >= STREAM, variant.norm, through, columns,
        )(
            2 * x.numel(), x.shape[0], layout.R, layout.C, group, groups, inputs, g_ + upstream, gradients + sums_, p.numbers,
            p.addresses,
        )  # fmt: skip
    for d, filled in zip(d_states, into):
        if filled is not d:
            d.copy_(filled)
    if normed >= 0 and with_parameters:
        sums[normed] = sum_over_steps(sums[normed], parameters[normed], x.shape[0])
    return sums if with_parameters else None
