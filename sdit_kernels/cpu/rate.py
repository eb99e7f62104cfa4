"""The firing rate of a neuron under a constant current, on the CPU. cpu/neuron.py explains blocks, tiles and generated code.

The backward pass differentiates in forward mode, because a neuron has one input and one output. The derivatives of the states
with respect to the current and the parameters, the tangents, are updated together with the states, so the forward pass keeps
nothing.
"""

import functools

import torch

from ..dtypes import state_dtype
from ..layout import layout_of_step
from ..neuron import trace
from ..neuron.trace import HUGE, is_condition
from ..surrogate import SURROGATES
from . import staircase
from .intrinsics import (
    CODES,
    F64,
    SIZES,
    U8,
    add_rows,
    fill,
    load,
    load_rows,
    num,
    nums,
    sigmoid,
    state_code,
    store,
    store_level,
    store_rows,
    sum_tile,
    tile,
)
from .kernel import Kernel, share
from .launch import BACKWARD_COLUMNS, FORWARD_COLUMNS, Parameters, placed_gradient, placed_state
from .neuron import generate
from .vector import where_equal


@functools.cache
def _forward_kernel(X, O, GATE, code, PER_CHANNEL):
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    BLOCK, STATES = FORWARD_COLUMNS, len(code[0].states)
    PARAMETERS = len(code[0].parameters) + len(code[0].numbers)
    ROW, AREA, P_AREA = BLOCK * sb, STATES * BLOCK, PARAMETERS * BLOCK if PER_CHANNEL else 1
    COUNTS, FIRES = O == U8, is_condition(trace(*code).spike)
    (step,) = generate(code, S, 0, False, ("step",))

    def rate_forward(part, T, R, C, inputs, output, numbers, per_channel):
        (x, x_r), (gate, gate_r), (y, y_r) = inputs
        out, out_r = output
        constants, zero, one, steps = nums(numbers, S), num(0.0, S), num(1.0, S), num(float(T), S)
        p, start = constants[:PARAMETERS], constants[PARAMETERS:-1]
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            n = min(BLOCK, C - c)
            current, v, count, ps = tile(BLOCK, S), tile(AREA, S), tile(BLOCK, S), tile(P_AREA, S)
            if PER_CHANNEL:
                for j in range(PARAMETERS):
                    fill(ps + j * ROW, n, per_channel[j], c, p[j], S, S)
            for i in range(n):
                xi = load(x + (row * x_r + c) * xb, i, X)
                if GATE:
                    xi = sigmoid(load(gate + (row * gate_r + c) * xb, i, X), S) * xi
                store(current, i, xi, S)
                store_rows(v, i, start, ROW, S)
                store(count, i, zero, S)
            for _ in range(T):
                for i in range(n):
                    q = load_rows(ps, i, PARAMETERS, ROW, S) if PER_CHANNEL else p
                    spike, states = step(load(current, i, S), load_rows(v, i, STATES, ROW, S), q)
                    if FIRES:
                        store(count, i, load(count, i, S) + (one if spike else zero), S)
                    else:
                        store(count, i, load(count, i, S) + spike, S)
                    store_rows(v, i, states, ROW, S)
            target = out + (row * out_r + c) * ob
            if COUNTS and FIRES:
                for i in range(n):
                    store(target, i, load(count, i, S), O)
            elif COUNTS:
                for i in range(n):
                    store_level(target, i, load(count, i, S), O)
            elif y != 0:
                for i in range(n):
                    store(target, i, load(y + (row * y_r + c) * ob, i, O) + load(count, i, S) / steps, O)
            else:
                for i in range(n):
                    store(target, i, load(count, i, S) / steps, O)

    return Kernel(rate_forward, f"rate_{step.__name__}_{X}{O}{GATE:d}{PER_CHANNEL:d}")


@functools.cache
def _backward_kernel(X, O, GATE, code, kind, PER_CHANNEL, WANTED):
    """WANTED: the gradients of the parameters are wanted."""
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    BLOCK, STATES, GRADIENTS = BACKWARD_COLUMNS, len(code[0].states), len(code[0].parameters)
    PARAMETERS = GRADIENTS + len(code[0].numbers)
    DIRECTIONS = 1 + GRADIENTS if WANTED else 1
    TANGENTS = DIRECTIONS * STATES
    ROW, AREA, P_AREA = BLOCK * sb, STATES * BLOCK, PARAMETERS * BLOCK if PER_CHANNEL else 1
    D_AREA, T_AREA = DIRECTIONS * BLOCK, TANGENTS * BLOCK
    BOUND = HUGE[S == F64]
    (tangent,) = generate(code, S, kind, WANTED, ("tangent",))

    def rate_backward(part, T, R, C, group, groups, inputs, upstream, gradients, sums, numbers, per_channel):
        (x, x_r), (gate, gate_r) = inputs
        g, g_t, g_r, g_c = upstream
        (dx, dx_r), (dgate, dgate_r) = gradients
        constants, zero, one, steps = nums(numbers, S), num(0.0, S), num(1.0, S), num(float(T), S)
        huge = num(BOUND, S)
        p, start, alpha = constants[:PARAMETERS], constants[PARAMETERS:-1], constants[-1]
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(groups * chunks, part):
            block = task // chunks
            c = (task - block * chunks) * BLOCK
            n = min(BLOCK, C - c)
            current, v, d_v, d_s, total = tile(BLOCK, S), tile(AREA, S), tile(T_AREA, S), tile(D_AREA, S), tile(D_AREA, S)
            ps = tile(P_AREA, S)
            if PER_CHANNEL:
                for j in range(PARAMETERS):
                    fill(ps + j * ROW, n, per_channel[j], c, p[j], S, S)
            if WANTED:
                for j in range(GRADIENTS):
                    fill(total + j * ROW, n, 0, 0, zero, S, S)
            for row in range(block * group, min(R, block * group + group)):
                for i in range(n):
                    xi = load(x + (row * x_r + c) * xb, i, X)
                    if GATE:
                        xi = sigmoid(load(gate + (row * gate_r + c) * xb, i, X), S) * xi
                    xi = huge if xi > huge else -huge if xi < -huge else xi  # NaN stays
                    store(current, i, xi, S)
                    store_rows(v, i, start, ROW, S)
                for j in range(TANGENTS):
                    fill(d_v + j * ROW, n, 0, 0, zero, S, S)
                for j in range(DIRECTIONS):
                    fill(d_s + j * ROW, n, 0, 0, zero, S, S)
                for _ in range(T):
                    for i in range(n):
                        q = load_rows(ps, i, PARAMETERS, ROW, S) if PER_CHANNEL else p
                        states, ds, d_states = tangent(
                            load(current, i, S), load_rows(v, i, STATES, ROW, S), q, load_rows(d_v, i, TANGENTS, ROW, S), alpha
                        )
                        store_rows(v, i, states, ROW, S)
                        add_rows(d_s, i, ds, ROW, S)
                        store_rows(d_v, i, d_states, ROW, S)
                gt = g + (row * g_r + c * g_c) * ob
                dxt = dx + (row * dx_r + c) * xb
                for i in range(n):
                    si = load(d_s, i, S)
                    di = where_equal(si, zero, zero, load(gt, i, O) / steps * si)  # for an infinite g too
                    if GATE:
                        open_ = sigmoid(load(gate + (row * gate_r + c) * xb, i, X), S)
                        slope = load(x + (row * x_r + c) * xb, i, X) * open_ * (one - open_)
                        store(dgate + (row * dgate_r + c) * xb, i, di * slope, X)
                        di = di * open_
                    store(dxt, i, di, X)
                if WANTED:
                    for j in range(GRADIENTS):
                        for i in range(n):
                            si = load(d_s + (j + 1) * ROW, i, S)
                            di = where_equal(si, zero, zero, load(gt, i, O) / steps * si)
                            store(total + j * ROW, i, load(total + j * ROW, i, S) + di, S)
            if WANTED:
                for j in range(GRADIENTS):
                    if PER_CHANNEL:
                        fill(sums[j] + (block * C + c) * sb, n, total + j * ROW, 0, zero, S, S)
                    else:
                        store(sums[j], task, sum_tile(total + j * ROW, n, BLOCK, S), S)

    return Kernel(rate_backward, f"rate_{tangent.__name__}_{X}{O}{GATE:d}{kind}{PER_CHANNEL:d}{WANTED:d}")


def rate_forward(variant, x, residual, gate, parameters, T, out, tuning):
    """Fill out with residual + rate, or, if out is uint8, with the spike counts. x is not empty."""
    dtype = state_dtype(x.dtype)
    p = Parameters(variant, parameters, dtype)
    layout = layout_of_step(x, out, p.per_channel)
    x, x_ = placed_state(layout, x)
    gate, gate_ = placed_state(layout, gate)
    residual, residual_ = placed_state(layout, residual)
    out, out_ = placed_state(layout, out)
    inputs = x_, gate_, residual_
    stairs = None
    if p.are_numbers:
        stairs = staircase.table(T, variant, dtype, out.dtype == torch.uint8)
    if stairs is not None:
        levels, edges, values = stairs
        staircase.kernel(CODES[x.dtype], CODES[out.dtype], gate is not None)(
            x.numel(), layout.R, layout.C, inputs, out_, levels, edges.ctypes.data, values.ctypes.data
        )
        return
    _forward_kernel(CODES[x.dtype], CODES[out.dtype], gate is not None, p.code, p.per_channel)(
        x.numel() * T, T, layout.R, layout.C, inputs, out_, p.numbers, p.addresses
    )


def rate_backward(variant, g, x, gate, parameters, T, dx, dgate, with_parameters, tuning):
    """Fill dx, and dgate if given. x is not empty.

    With ``with_parameters``, return partial sums of the gradients of the parameters, as neuron_backward in cpu/neuron.py.
    """
    p = Parameters(variant, parameters, state_dtype(x.dtype))
    layout = layout_of_step(x, dx, p.per_channel)
    g, g_ = placed_gradient(layout, g.unsqueeze(0), g)
    x, x_ = placed_state(layout, x)
    dx, dx_ = placed_state(layout, dx)
    dgate, dgate_ = placed_state(layout, None if gate is None else dgate)
    gate, gate_ = placed_state(layout, gate)
    group, groups, sums, sums_ = p.partial_sums(layout, with_parameters)
    _backward_kernel(
        CODES[x.dtype], CODES[g.dtype], gate is not None, p.code, SURROGATES[variant.surrogate].id, p.per_channel,
        with_parameters,
    )(
        2 * x.numel() * T, T, layout.R, layout.C, group, groups, (x_, gate_), g_, (dx_, dgate_), sums_, p.numbers, p.addresses,
    )  # fmt: skip
    return sums
