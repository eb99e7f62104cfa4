"""LIF on the CPU. A task processes a block of columns, whose membranes stay in the L1 cache for all steps.

A column is one neuron of a row of the input. LLVM vectorises over columns. The backward pass needs the charge h of every step,
the membrane before the spike. It recomputes h for 16 steps at a time into a tile, an array on the stack. It starts from v or
from ``checkpoint``, to which the forward pass writes the membrane every 16 steps. The arithmetic follows reference/lif.py
operation by operation. Parameter gradients are summed per task and then over tasks. The order of this sum does not depend on
the number of threads. The backward kernels call a run of these 16 steps a segment.
"""

import functools
import math

import numba
import torch

from ..dtypes import state_dtype
from ..layout import LIF_CHECKPOINT_STEPS, layout_of_step
from ..surrogate import SURROGATES
from . import staircase
from .intrinsics import (
    CODES,
    F64,
    SIZES,
    U8,
    fill,
    load,
    load_input,
    mul_add,
    num,
    prefetch,
    sigmoid,
    state_code,
    store,
    store_output,
    store_spike,
    stream,
    sum_tile,
    tile,
)
from .kernel import STREAM, Kernel, share
from .launch import (
    BACKWARD_COLUMNS,
    FORWARD_COLUMNS,
    Parameters,
    addresses,
    codes,
    launch_backward,
    launch_forward,
    placed_gradient,
    placed_state,
)
from .surrogate import surrogate_derivative


@numba.njit(forceinline=True, error_model="numpy")
def charge(x, v, r, v_reset, soft, decay):
    """Return the charge h, and the distance of the membrane from rest."""
    rest = v if soft else v - v_reset
    return (v + (x - rest) * r if decay else v - rest * r + x), rest


@numba.njit(forceinline=True, error_model="numpy")
def _reset(h, theta, v_reset, soft):
    return (h - theta if soft else v_reset) if h >= theta else h


@functools.cache
def _forward_kernel(X, O, V, SOFT, ZERO, DECAY, PER_CHANNEL):
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    BLOCK = FORWARD_COLUMNS

    def lif_forward(part, T, R, C, inputs, outputs, r_, theta_, per_channel, reset_):
        (x, x_t, x_r), (v0, v0_r) = inputs
        (s, s_t, s_r), (v1, v1_r), (seq, seq_t, seq_r), (keep, keep_t, keep_r) = outputs
        r, theta = per_channel
        vr = num(0.0 if ZERO else reset_, S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            n = min(BLOCK, C - c)
            v, rs, ths = tile(BLOCK, S), tile(BLOCK if PER_CHANNEL else 1, S), tile(BLOCK if PER_CHANNEL else 1, S)
            k, th = num(r_, S), num(theta_, S)
            if PER_CHANNEL:
                fill(rs, n, r, c, k, S, S)
                fill(ths, n, theta, c, th, S, S)
            fill(v, n, v0, row * v0_r + c, vr, V, S)
            for t in range(T):
                if keep != 0 and t > 0 and t % LIF_CHECKPOINT_STEPS == 0:
                    kept = keep + ((t // LIF_CHECKPOINT_STEPS - 1) * keep_t + row * keep_r + c) * sb
                    fill(kept, n, v, 0, vr, S, S)
                xt = x + (t * x_t + row * x_r + c) * xb
                st = s + (t * s_t + row * s_r + c) * ob
                for i in range(n):
                    if PER_CHANNEL:
                        k, th = load(rs, i, S), load(ths, i, S)
                    h, _ = charge(load(xt, i, X), load(v, i, S), k, vr, SOFT, DECAY)
                    store_spike(st, i, h >= th, O)
                    store(v, i, _reset(h, th, vr, SOFT), S)
                if seq != 0:
                    fill(seq + (t * seq_t + row * seq_r + c) * sb, n, v, 0, vr, S, S)
            if v1 != 0:
                fill(v1 + (row * v1_r + c) * sb, n, v, 0, vr, S, S)

    return Kernel(lif_forward, f"lif_forward_{X}{O}{V}{SOFT:d}{ZERO:d}{DECAY:d}{PER_CHANNEL:d}")


@functools.cache
def _backward_kernel(X, V, SOFT, ZERO, DECAY, DETACH, KIND, PER_CHANNEL, PARAMETERS, SEQUENCE, STREAMED):
    """SEQUENCE: the gradient with respect to the membrane after every step is given. STREAMED: dx bypasses the caches."""
    S = state_code(X)
    xb, vb, sb = SIZES[X], SIZES[V], SIZES[S]
    BLOCK = BACKWARD_COLUMNS
    HISTORY = LIF_CHECKPOINT_STEPS * BLOCK
    ROW = BLOCK * sb

    @numba.njit(forceinline=True, error_model="numpy")
    def backward_step(i, t, first, dv, hs, start, k, th, vr, alpha, x, g, gseq, dx, sum_r, sum_th):
        """Return the gradient with respect to the membrane before step t of a segment. dv is the gradient after the step."""
        h = load(hs + t * ROW, i, S)
        if SEQUENCE:
            dv = dv + load_input(gseq, i, S)
        fired = h >= th
        slope = surrogate_derivative(KIND, h - th, alpha, S)
        # The gradient with respect to h - th through the spike. This order leaves few operations that wait for dv.
        through = load_input(g, i, X) * slope
        if not DETACH:
            through = mul_add(dv, (-th if SOFT else vr - h) * slope, through)
        through = num(0.0, S) if slope == num(0.0, S) else through  # the reset removes an infinite h
        dh = through + (dv if SOFT or not fired else num(0.0, S))
        if PARAMETERS:
            v = load(start, i, S) if first else _reset(load(hs + (t - 1) * ROW, i, S), th, vr, SOFT)
            rest = v if SOFT else v - vr
            store(sum_r, i, load(sum_r, i, S) + (dh * (load_input(x, i, X) - rest) if DECAY else -dh * rest), S)
            if SOFT and fired:
                through = through + dv
            store(sum_th, i, load(sum_th, i, S) - through, S)
        store_output(dx, i, dh * k if DECAY else dh, X)
        return dh * (num(1.0, S) - k)

    def lif_backward(
        part, T, R, C, group, groups, inputs, upstream, gradients, sums, r_, theta_, per_channel, reset_, alpha_
    ):  # fmt: skip
        (x, x_t, x_r), (v0, v0_r), (keep, keep_t, keep_r) = inputs
        (g, g_t, g_r, g_c), (gv, gv_r), (gseq, gseq_t, gseq_r) = upstream
        (dx, dx_t, dx_r), (dv, dv_r) = gradients
        dr, dth = sums
        r, theta = per_channel
        vr, alpha, zero = num(0.0 if ZERO else reset_, S), num(alpha_, S), num(0.0, S)
        x_t, g_t, gseq_t, dx_t = x_t * xb, g_t * xb, gseq_t * sb, dx_t * xb
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(groups * chunks, part):
            block = task // chunks
            c = (task - block * chunks) * BLOCK
            n = min(BLOCK, C - c)
            hs, start, carry, row_out = tile(HISTORY, S), tile(BLOCK, S), tile(BLOCK, S), tile(BLOCK, S)
            rs, ths = tile(BLOCK if PER_CHANNEL else 1, S), tile(BLOCK if PER_CHANNEL else 1, S)
            sum_r, sum_th = tile(BLOCK if PARAMETERS else 1, S), tile(BLOCK if PARAMETERS else 1, S)
            k, th = num(r_, S), num(theta_, S)
            if PER_CHANNEL:
                fill(rs, n, r, c, k, S, S)
                fill(ths, n, theta, c, th, S, S)
            if PARAMETERS:
                fill(sum_r, n, 0, 0, zero, S, S)
                fill(sum_th, n, 0, 0, zero, S, S)
            for row in range(block * group, min(R, block * group + group)):
                fill(carry, n, gv, row * gv_r + c, zero, S, S)
                for segment in range((T - 1) // LIF_CHECKPOINT_STEPS, -1, -1):
                    t0 = segment * LIF_CHECKPOINT_STEPS
                    steps = min(LIF_CHECKPOINT_STEPS, T - t0)
                    if segment > 0:
                        fill(start, n, keep, (segment - 1) * keep_t + row * keep_r + c, vr, S, S)
                    else:
                        fill(start, n, v0, row * v0_r + c, vr, V, S)
                    xs = x + t0 * x_t + (row * x_r + c) * xb
                    gs = g + t0 * g_t + (row * g_r + c * g_c) * xb
                    gss = gseq + t0 * gseq_t + (row * gseq_r + c) * sb
                    dxs = dx + t0 * dx_t + (row * dx_r + c) * xb
                    for t in range(steps):
                        prefetch(gs + t * g_t, n * xb, 0)
                        if not STREAMED:
                            prefetch(dxs + t * dx_t, n * xb, 1)
                        for i in range(n):
                            if PER_CHANNEL:
                                k, th = load(rs, i, S), load(ths, i, S)
                            v = load(start, i, S) if t == 0 else _reset(load(hs + (t - 1) * ROW, i, S), th, vr, SOFT)
                            h, _ = charge(load_input(xs + t * x_t, i, X), v, k, vr, SOFT, DECAY)
                            store(hs + t * ROW, i, h, S)
                    for t in range(steps - 1, -1, -1):
                        prefetch(xs + t * x_t + BLOCK * xb, BLOCK * xb, 0)
                        target = row_out if STREAMED else dxs + t * dx_t
                        if t > 0:
                            for i in range(n):
                                if PER_CHANNEL:
                                    k, th = load(rs, i, S), load(ths, i, S)
                                d = backward_step(
                                    i, t, False, load(carry, i, S), hs, start, k, th, vr, alpha, xs + t * x_t, gs + t * g_t,
                                    gss + t * gseq_t, target, sum_r, sum_th,
                                )  # fmt: skip
                                store(carry, i, d, S)
                        else:  # a separate loop, because LLVM does not vectorise a loop with exponentials and a branch
                            for i in range(n):
                                if PER_CHANNEL:
                                    k, th = load(rs, i, S), load(ths, i, S)
                                d = backward_step(
                                    i, t, True, load(carry, i, S), hs, start, k, th, vr, alpha, xs + t * x_t, gs + t * g_t,
                                    gss + t * gseq_t, target, sum_r, sum_th,
                                )  # fmt: skip
                                store(carry, i, d, S)
                        if STREAMED:
                            stream(dxs + t * dx_t, row_out, n * xb)
                if dv != 0:
                    for i in range(n):
                        store(dv + (row * dv_r + c) * vb, i, load(carry, i, S), V)
            if PARAMETERS:
                if PER_CHANNEL:
                    fill(dr + (block * C + c) * sb, n, sum_r, 0, zero, S, S)
                    fill(dth + (block * C + c) * sb, n, sum_th, 0, zero, S, S)
                else:
                    store(dr, task, sum_tile(sum_r, n, BLOCK, S), S)
                    store(dth, task, sum_tile(sum_th, n, BLOCK, S), S)

    flags = f"{X}{V}{SOFT:d}{ZERO:d}{DECAY:d}{DETACH:d}{KIND}{PER_CHANNEL:d}{PARAMETERS:d}{SEQUENCE:d}{STREAMED:d}"
    return Kernel(lif_backward, f"lif_backward_{flags}")


@functools.cache
def _rate_forward_kernel(X, O, GATE, SOFT, ZERO, DECAY, PER_CHANNEL):
    S = state_code(X)
    xb, ob = SIZES[X], SIZES[O]
    BLOCK = FORWARD_COLUMNS
    COUNTS = O == U8

    def lif_rate_forward(part, T, R, C, inputs, output, r_, theta_, per_channel, reset_):
        (x, x_r), (gate, gate_r), (y, y_r) = inputs
        out, out_r = output
        r, theta = per_channel
        vr, zero, one, steps = num(0.0 if ZERO else reset_, S), num(0.0, S), num(1.0, S), num(float(T), S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            n = min(BLOCK, C - c)
            current, v, count = tile(BLOCK, S), tile(BLOCK, S), tile(BLOCK, S)
            rs, ths = tile(BLOCK if PER_CHANNEL else 1, S), tile(BLOCK if PER_CHANNEL else 1, S)
            k, th = num(r_, S), num(theta_, S)
            if PER_CHANNEL:
                fill(rs, n, r, c, k, S, S)
                fill(ths, n, theta, c, th, S, S)
            for i in range(n):
                xi = load(x + (row * x_r + c) * xb, i, X)
                if GATE:
                    xi = sigmoid(load(gate + (row * gate_r + c) * xb, i, X), S) * xi
                store(current, i, xi, S)
                store(v, i, vr, S)
                store(count, i, zero, S)
            for _ in range(T):
                for i in range(n):
                    if PER_CHANNEL:
                        k, th = load(rs, i, S), load(ths, i, S)
                    h, _ = charge(load(current, i, S), load(v, i, S), k, vr, SOFT, DECAY)
                    store(count, i, load(count, i, S) + (one if h >= th else zero), S)
                    store(v, i, _reset(h, th, vr, SOFT), S)
            target = out + (row * out_r + c) * ob
            if COUNTS:
                for i in range(n):
                    store(target, i, load(count, i, S), O)
            elif y != 0:
                for i in range(n):
                    store(target, i, load(y + (row * y_r + c) * ob, i, O) + load(count, i, S) / steps, O)
            else:
                for i in range(n):
                    store(target, i, load(count, i, S) / steps, O)

    return Kernel(lif_rate_forward, f"lif_rate_forward_{X}{O}{GATE:d}{SOFT:d}{ZERO:d}{DECAY:d}{PER_CHANNEL:d}")


@functools.cache
def _rate_backward_kernel(X, O, GATE, SOFT, ZERO, DECAY, DETACH, KIND, PER_CHANNEL, PARAMETERS):
    """Differentiate in forward mode, because a neuron has one input and one output.

    The tangents d/dx, d/dr and d/dtheta are updated together with the state, so the forward pass saves nothing.
    """
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    BLOCK = BACKWARD_COLUMNS
    EXTRA = BLOCK if PARAMETERS else 1
    GREATEST = torch.finfo(torch.float64 if S == F64 else torch.float32).max

    def lif_rate_backward(
        part, T, R, C, group, groups, inputs, upstream, gradients, sums, r_, theta_, per_channel, reset_, alpha_
    ):  # fmt: skip
        (x, x_r), (gate, gate_r) = inputs
        g, g_t, g_r, g_c = upstream
        (dx, dx_r), (dgate, dgate_r) = gradients
        dr, dth = sums
        r, theta = per_channel
        vr, alpha, zero, one, infinity, greatest, steps = (
            num(0.0 if ZERO else reset_, S),
            num(alpha_, S),
            num(0.0, S),
            num(1.0, S),
            num(math.inf, S),
            num(GREATEST, S),
            num(float(T), S),
        )
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(groups * chunks, part):
            block = task // chunks
            c = (task - block * chunks) * BLOCK
            n = min(BLOCK, C - c)
            current, v, v_x, s_x = tile(BLOCK, S), tile(BLOCK, S), tile(BLOCK, S), tile(BLOCK, S)
            v_r, s_r, v_th, s_th = tile(EXTRA, S), tile(EXTRA, S), tile(EXTRA, S), tile(EXTRA, S)
            sum_r, sum_th = tile(EXTRA, S), tile(EXTRA, S)
            rs, ths = tile(BLOCK if PER_CHANNEL else 1, S), tile(BLOCK if PER_CHANNEL else 1, S)
            k, th = num(r_, S), num(theta_, S)
            if PER_CHANNEL:
                fill(rs, n, r, c, k, S, S)
                fill(ths, n, theta, c, th, S, S)
            if PARAMETERS:
                fill(sum_r, n, 0, 0, zero, S, S)
                fill(sum_th, n, 0, 0, zero, S, S)
            for row in range(block * group, min(R, block * group + group)):
                for i in range(n):
                    xi = load(x + (row * x_r + c) * xb, i, X)
                    if GATE:
                        xi = sigmoid(load(gate + (row * gate_r + c) * xb, i, X), S) * xi
                    store(current, i, xi, S)
                    store(v, i, vr, S)
                    store(v_x, i, zero, S)
                    store(s_x, i, zero, S)
                if PARAMETERS:
                    for i in range(n):
                        store(v_r, i, zero, S)
                        store(s_r, i, zero, S)
                        store(v_th, i, zero, S)
                        store(s_th, i, zero, S)
                for _ in range(T):
                    for i in range(n):
                        if PER_CHANNEL:
                            k, th = load(rs, i, S), load(ths, i, S)
                        vi, xi = load(v, i, S), load(current, i, S)
                        rest = vi if SOFT else vi - vr
                        if DECAY:
                            h = vi + (xi - rest) * k
                        else:
                            h = vi - rest * k + xi
                        fired = h >= th
                        slope = surrogate_derivative(KIND, h - th, alpha, S)
                        if DETACH:
                            q = zero
                        elif SOFT:
                            q = -th
                        else:
                            q = vr - h
                            q = q if q < greatest else greatest  # keeps q finite if h is -inf, because slope = 0 multiplies q
                        leak = one - k
                        h_x = load(v_x, i, S) * leak + (k if DECAY else one)
                        ds = slope * h_x
                        store(s_x, i, load(s_x, i, S) + ds, S)
                        store(v_x, i, (h_x if SOFT or not fired else zero) + q * ds, S)
                        if PARAMETERS:
                            h_r = load(v_r, i, S) * leak + (xi - rest if DECAY else -rest)
                            ds = slope * h_r
                            store(s_r, i, load(s_r, i, S) + ds, S)
                            store(v_r, i, (h_r if SOFT or not fired else zero) + q * ds, S)
                            h_th = load(v_th, i, S) * leak
                            ds = slope * (h_th - one)
                            store(s_th, i, load(s_th, i, S) + ds, S)
                            if SOFT and fired:
                                h_th = h_th - one
                            store(v_th, i, (h_th if SOFT or not fired else zero) + q * ds, S)
                        if SOFT:
                            store(v, i, h - th if fired else h, S)
                        else:
                            store(v, i, vr if fired else h, S)
                gt = g + (row * g_r + c * g_c) * ob
                dxt = dx + (row * dx_r + c) * xb
                for i in range(n):
                    gi = load(gt, i, O) / steps
                    # The reset removes an infinite current: the neuron fires at every step, and its surrogate gradients
                    # are 0 there.
                    si = zero if not SOFT and load(current, i, S) == infinity else load(s_x, i, S)
                    di = zero if si == zero else gi * si
                    if GATE:
                        p = sigmoid(load(gate + (row * gate_r + c) * xb, i, X), S)
                        slope = load(x + (row * x_r + c) * xb, i, X) * p * (one - p)
                        store(dgate + (row * dgate_r + c) * xb, i, di * slope, X)
                        di = di * p
                    store(dxt, i, di, X)
                if PARAMETERS:
                    for i in range(n):
                        gi = load(gt, i, O) / steps
                        si = load(s_r, i, S)
                        store(sum_r, i, load(sum_r, i, S) + (zero if si == zero else gi * si), S)
                        si = zero if not SOFT and load(current, i, S) == infinity else load(s_th, i, S)
                        store(sum_th, i, load(sum_th, i, S) + (zero if si == zero else gi * si), S)
            if PARAMETERS:
                if PER_CHANNEL:
                    fill(dr + (block * C + c) * sb, n, sum_r, 0, zero, S, S)
                    fill(dth + (block * C + c) * sb, n, sum_th, 0, zero, S, S)
                else:
                    store(dr, task, sum_tile(sum_r, n, BLOCK, S), S)
                    store(dth, task, sum_tile(sum_th, n, BLOCK, S), S)

    return Kernel(
        lif_rate_backward,
        f"lif_rate_backward_{X}{O}{GATE:d}{SOFT:d}{ZERO:d}{DECAY:d}{DETACH:d}{KIND}{PER_CHANNEL:d}{PARAMETERS:d}",
    )


def lif_forward(x, v, tau, v_threshold, neuron, s, v_final, v_seq, checkpoint, tuning):
    """Fill s, and v_final, v_seq and checkpoint if they are given. x is not empty."""
    p = Parameters(tau, v_threshold, neuron, state_dtype(x.dtype))
    X, V = codes(x, v)
    soft, zero = neuron.v_reset is None, not neuron.v_reset
    kernel = _forward_kernel(X, CODES[s.dtype], V, soft, zero, neuron.decay_input, p.per_channel)
    launch_forward(kernel, p, x, v, s, v_final, v_seq, checkpoint, neuron.v_reset or 0.0)


def lif_backward(g, g_v, g_seq, x, v, tau, v_threshold, checkpoint, neuron, dx, dv, parameters, tuning):
    """Fill dx, and dv if given. If ``parameters``, return sums of d r and d theta per task. x is not empty."""
    p = Parameters(tau, v_threshold, neuron, state_dtype(x.dtype))
    kernel = _backward_kernel(
        *codes(x, v), neuron.v_reset is None, not neuron.v_reset, neuron.decay_input, neuron.detach_reset,
        SURROGATES[neuron.surrogate].id, p.per_channel, parameters, g_seq is not None, dx.nbytes >= STREAM,
    )  # fmt: skip
    numbers = neuron.v_reset or 0.0, neuron.alpha
    return launch_backward(kernel, p, g, g_v, g_seq, x, v, checkpoint, dx, dv, parameters, *numbers)


def lif_rate_forward(x, residual, gate, tau, v_threshold, T, neuron, out, tuning):
    """Fill out with residual + rate, or, if out is uint8, with the spike counts. x is not empty."""
    p = Parameters(tau, v_threshold, neuron, state_dtype(x.dtype))
    layout = layout_of_step(x, out, p.per_channel)
    x, x_ = placed_state(layout, x)
    gate, gate_ = placed_state(layout, gate)
    residual, residual_ = placed_state(layout, residual)
    out, out_ = placed_state(layout, out)
    inputs = x_, gate_, residual_
    stairs = None
    if tau is None and v_threshold is None:
        stairs = staircase.table(T, neuron, state_dtype(x.dtype), out.dtype == torch.uint8)
    if stairs is not None:
        levels, edges, values = stairs
        staircase.kernel(CODES[x.dtype], CODES[out.dtype], gate is not None)(
            x.numel(), layout.R, layout.C, inputs, out_, levels, edges.ctypes.data, values.ctypes.data
        )
        return
    kernel = _rate_forward_kernel(
        CODES[x.dtype],
        CODES[out.dtype],
        gate is not None,
        neuron.v_reset is None,
        not neuron.v_reset,
        neuron.decay_input,
        p.per_channel,
    )
    kernel(x.numel() * T, T, layout.R, layout.C, inputs, out_, *p.values, p.addresses, neuron.v_reset or 0.0)


def lif_rate_backward(g, x, gate, tau, v_threshold, T, neuron, dx, dgate, parameters, tuning):
    """Fill dx, and dgate if given. If ``parameters``, return sums of d r and d theta per task. x is not empty."""
    p = Parameters(tau, v_threshold, neuron, state_dtype(x.dtype))
    layout = layout_of_step(x, dx, p.per_channel)
    g, g_ = placed_gradient(layout, g.unsqueeze(0), g)
    x, x_ = placed_state(layout, x)
    dx, dx_ = placed_state(layout, dx)
    dgate, dgate_ = placed_state(layout, None if gate is None else dgate)
    gate, gate_ = placed_state(layout, gate)
    group, groups, sums = p.partial_sums(layout, parameters)
    kernel = _rate_backward_kernel(
        CODES[x.dtype],
        CODES[g.dtype],
        gate is not None,
        neuron.v_reset is None,
        not neuron.v_reset,
        neuron.decay_input,
        neuron.detach_reset,
        SURROGATES[neuron.surrogate].id,
        p.per_channel,
        parameters,
    )
    kernel(
        2 * x.numel() * T, T, layout.R, layout.C, group, groups, (x_, gate_), g_, (dx_, dgate_), addresses(sums), *p.values,
        p.addresses, neuron.v_reset or 0.0, neuron.alpha,
    )  # fmt: skip
    return sums
