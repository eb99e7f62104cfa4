"""Leaky on the CPU. A task processes a block of columns, and LLVM vectorises over columns, as in cpu/lif.py.

A column is one neuron of a row of the input. A segment is a run of 16 steps. The backward pass goes through the segments from
last to first. It recomputes the membrane before each step of a segment into a tile, an array on the stack. From this
tile it computes the charge, the membrane before the spike. The arithmetic follows reference/leaky.py operation by operation.
"""

import functools

import numba

from ..dtypes import state_dtype
from ..layout import LIF_CHECKPOINT_STEPS
from ..surrogate import SURROGATES
from .intrinsics import (
    SIZES,
    fill,
    load,
    load_input,
    num,
    prefetch,
    state_code,
    store,
    store_output,
    store_spike,
    stream,
    sum_tile,
    tile,
)
from .kernel import STREAM, Kernel, share
from .launch import BACKWARD_COLUMNS, FORWARD_COLUMNS, Parameters, codes, launch_backward, launch_forward
from .surrogate import surrogate_derivative

_SUBTRACT, _ZERO = 0, 1
_RESETS = {"subtract": _SUBTRACT, "zero": _ZERO, "none": 2}


@numba.njit(forceinline=True, error_model="numpy")
def _charge(x, v, k, th, RESET, S):
    """Return the charge h, and the part of the membrane that decays: 0 if it resets to zero, otherwise v."""
    left = num(0.0, S) if RESET == _ZERO and v > th else v
    h = k * left + x
    return (h - th if RESET == _SUBTRACT and v > th else h), left


@numba.njit(forceinline=True, error_model="numpy")
def _after(h, v, th, RESET, DELAY, S):
    """Return the membrane after the step. ``v`` is the membrane before it."""
    if DELAY:
        return h
    if RESET == _SUBTRACT:
        return h - ((num(1.0, S) if h > th else num(0.0, S)) - (num(1.0, S) if v > th else num(0.0, S))) * th
    fired = num(0.0, S) if not v > th else h
    resting = h if not v > th else h + h
    return fired if h > th else resting


@functools.cache
def _forward_kernel(X, V, RESET, DELAY, PER_CHANNEL):
    S = state_code(X)
    xb, sb = SIZES[X], SIZES[S]
    BLOCK = FORWARD_COLUMNS

    def leaky_forward(part, T, R, C, inputs, outputs, beta_, theta_, per_channel):
        (x, x_t, x_r), (v0, v0_r) = inputs
        (s, s_t, s_r), (v1, v1_r), (seq, seq_t, seq_r), (keep, keep_t, keep_r) = outputs
        beta, theta = per_channel
        zero = num(0.0, S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            n = min(BLOCK, C - c)
            v, ks, ths = tile(BLOCK, S), tile(BLOCK if PER_CHANNEL else 1, S), tile(BLOCK if PER_CHANNEL else 1, S)
            k, th = num(beta_, S), num(theta_, S)
            if PER_CHANNEL:
                fill(ks, n, beta, c, k, S, S)
                fill(ths, n, theta, c, th, S, S)
            fill(v, n, v0, row * v0_r + c, zero, V, S)
            for t in range(T):
                if keep != 0 and t > 0 and t % LIF_CHECKPOINT_STEPS == 0:
                    fill(keep + ((t // LIF_CHECKPOINT_STEPS - 1) * keep_t + row * keep_r + c) * sb, n, v, 0, zero, S, S)
                xt = x + (t * x_t + row * x_r + c) * xb
                st = s + (t * s_t + row * s_r + c) * xb
                for i in range(n):
                    if PER_CHANNEL:
                        k, th = load(ks, i, S), load(ths, i, S)
                    before = load(v, i, S)
                    h, _ = _charge(load(xt, i, X), before, k, th, RESET, S)
                    store_spike(st, i, h > th, X)
                    store(v, i, _after(h, before, th, RESET, DELAY, S), S)
                if seq != 0:
                    fill(seq + (t * seq_t + row * seq_r + c) * sb, n, v, 0, zero, S, S)
            if v1 != 0:
                fill(v1 + (row * v1_r + c) * sb, n, v, 0, zero, S, S)

    return Kernel(leaky_forward, f"leaky_forward_{X}{V}{RESET}{DELAY:d}{PER_CHANNEL:d}")


@functools.cache
def _backward_kernel(X, V, RESET, DELAY, KIND, PER_CHANNEL, PARAMETERS, SEQUENCE, STREAMED):
    """SEQUENCE: the gradient with respect to the membrane after every step is given. STREAMED: dx bypasses the caches."""
    S = state_code(X)
    xb, vb, sb = SIZES[X], SIZES[V], SIZES[S]
    BLOCK = BACKWARD_COLUMNS
    HISTORY = LIF_CHECKPOINT_STEPS * BLOCK
    ROW = BLOCK * sb

    @numba.njit(forceinline=True, error_model="numpy")
    def backward_step(i, dv, vs, k, th, alpha, x, g, gseq, dx, sum_k, sum_th):
        """Return the gradient with respect to the membrane before a step. dv is the gradient after the step."""
        zero, one = num(0.0, S), num(1.0, S)
        if SEQUENCE:
            dv = dv + load_input(gseq, i, S)
        v = load(vs, i, S)
        h, left = _charge(load_input(x, i, X), v, k, th, RESET, S)
        reset, fired = (one if v > th else zero), (one if h > th else zero)
        through, dh = load_input(g, i, X), dv
        if not DELAY:
            through = through - (th if RESET == _SUBTRACT else h) * dv
            if RESET == _ZERO:
                dh = (dv if v > th else zero) if h > th else (dv + dv if v > th else dv)
        slope = surrogate_derivative(KIND, h - th, alpha, S)
        through = zero if slope == zero else through * slope  # the reset removes an infinite h
        dh = dh + through
        if PARAMETERS:
            store(sum_k, i, load(sum_k, i, S) + dh * left, S)
            if RESET == _SUBTRACT:
                through = through + reset * dh
                if not DELAY:
                    through = through + (fired - reset) * dv
            store(sum_th, i, load(sum_th, i, S) - through, S)
        store_output(dx, i, dh, X)
        return zero if RESET == _ZERO and v > th else dh * k

    def leaky_backward(part, T, R, C, group, groups, inputs, upstream, gradients, sums, beta_, theta_, per_channel, alpha_):
        (x, x_t, x_r), (v0, v0_r), (keep, keep_t, keep_r) = inputs
        (g, g_t, g_r, g_c), (gv, gv_r), (gseq, gseq_t, gseq_r) = upstream
        (dx, dx_t, dx_r), (dv, dv_r) = gradients
        dbeta, dth = sums
        beta, theta = per_channel
        alpha, zero = num(alpha_, S), num(0.0, S)
        x_t, g_t, gseq_t, dx_t = x_t * xb, g_t * xb, gseq_t * sb, dx_t * xb
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(groups * chunks, part):
            block = task // chunks
            c = (task - block * chunks) * BLOCK
            n = min(BLOCK, C - c)
            vs, carry, row_out = tile(HISTORY, S), tile(BLOCK, S), tile(BLOCK, S)
            ks, ths = tile(BLOCK if PER_CHANNEL else 1, S), tile(BLOCK if PER_CHANNEL else 1, S)
            sum_k, sum_th = tile(BLOCK if PARAMETERS else 1, S), tile(BLOCK if PARAMETERS else 1, S)
            k, th = num(beta_, S), num(theta_, S)
            if PER_CHANNEL:
                fill(ks, n, beta, c, k, S, S)
                fill(ths, n, theta, c, th, S, S)
            if PARAMETERS:
                fill(sum_k, n, 0, 0, zero, S, S)
                fill(sum_th, n, 0, 0, zero, S, S)
            for row in range(block * group, min(R, block * group + group)):
                fill(carry, n, gv, row * gv_r + c, zero, S, S)
                for segment in range((T - 1) // LIF_CHECKPOINT_STEPS, -1, -1):
                    t0 = segment * LIF_CHECKPOINT_STEPS
                    steps = min(LIF_CHECKPOINT_STEPS, T - t0)
                    if segment > 0:
                        fill(vs, n, keep, (segment - 1) * keep_t + row * keep_r + c, zero, S, S)
                    else:
                        fill(vs, n, v0, row * v0_r + c, zero, V, S)
                    xs = x + t0 * x_t + (row * x_r + c) * xb
                    gs = g + t0 * g_t + (row * g_r + c * g_c) * xb
                    gss = gseq + t0 * gseq_t + (row * gseq_r + c) * sb
                    dxs = dx + t0 * dx_t + (row * dx_r + c) * xb
                    for t in range(steps):
                        prefetch(gs + t * g_t, n * xb, 0)
                        if not STREAMED:
                            prefetch(dxs + t * dx_t, n * xb, 1)
                        if t < steps - 1:
                            for i in range(n):
                                if PER_CHANNEL:
                                    k, th = load(ks, i, S), load(ths, i, S)
                                v = load(vs + t * ROW, i, S)
                                h, _ = _charge(load_input(xs + t * x_t, i, X), v, k, th, RESET, S)
                                store(vs + (t + 1) * ROW, i, _after(h, v, th, RESET, DELAY, S), S)
                    for t in range(steps - 1, -1, -1):
                        prefetch(xs + t * x_t + BLOCK * xb, BLOCK * xb, 0)
                        target = row_out if STREAMED else dxs + t * dx_t
                        for i in range(n):
                            if PER_CHANNEL:
                                k, th = load(ks, i, S), load(ths, i, S)
                            d = backward_step(
                                i, load(carry, i, S), vs + t * ROW, k, th, alpha, xs + t * x_t, gs + t * g_t,
                                gss + t * gseq_t, target, sum_k, sum_th,
                            )  # fmt: skip
                            store(carry, i, d, S)
                        if STREAMED:
                            stream(dxs + t * dx_t, row_out, n * xb)
                if dv != 0:
                    for i in range(n):
                        store(dv + (row * dv_r + c) * vb, i, load(carry, i, S), V)
            if PARAMETERS:
                if PER_CHANNEL:
                    fill(dbeta + (block * C + c) * sb, n, sum_k, 0, zero, S, S)
                    fill(dth + (block * C + c) * sb, n, sum_th, 0, zero, S, S)
                else:
                    store(dbeta, task, sum_tile(sum_k, n, BLOCK, S), S)
                    store(dth, task, sum_tile(sum_th, n, BLOCK, S), S)

    flags = f"{X}{V}{RESET}{DELAY:d}{KIND}{PER_CHANNEL:d}{PARAMETERS:d}{SEQUENCE:d}{STREAMED:d}"
    return Kernel(leaky_backward, f"leaky_backward_{flags}")


class _BetaAndThreshold(Parameters):
    """The parameters beta and v_threshold; beta replaces 1/tau."""

    def __init__(self, beta, v_threshold, neuron, dtype):
        self._dtype, self._alive = dtype, []
        beta, beta_address = self.number_or_address(None if beta is None else beta.detach().to(dtype), neuron.beta)
        theta = None if v_threshold is None else v_threshold.detach().to(dtype)
        theta, theta_address = self.number_or_address(theta, neuron.v_threshold)
        self.values, self.addresses = (beta, theta), (beta_address, theta_address)
        self.per_channel = bool(self._alive)


def _flags(neuron):
    return _RESETS[neuron.reset], neuron.reset_delay or neuron.reset == "none"


def leaky_forward(x, v, beta, v_threshold, neuron, s, v_final, v_seq, checkpoint, tuning):
    """Fill s, and v_final, v_seq and checkpoint if they are given. x is not empty."""
    p = _BetaAndThreshold(beta, v_threshold, neuron, state_dtype(x.dtype))
    kernel = _forward_kernel(*codes(x, v), *_flags(neuron), p.per_channel)
    launch_forward(kernel, p, x, v, s, v_final, v_seq, checkpoint)


def leaky_backward(g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, neuron, dx, dv, parameters, tuning):
    """Fill dx, and dv if given. If ``parameters``, return sums of d beta and d theta per task. x is not empty."""
    p = _BetaAndThreshold(beta, v_threshold, neuron, state_dtype(x.dtype))
    kernel = _backward_kernel(
        *codes(x, v), *_flags(neuron), SURROGATES[neuron.surrogate].id, p.per_channel, parameters, g_seq is not None,
        dx.nbytes >= STREAM,
    )  # fmt: skip
    return launch_backward(kernel, p, g, g_v, g_seq, x, v, checkpoint, dx, dv, parameters, neuron.alpha)
