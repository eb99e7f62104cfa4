"""Token shift and squared ReLU on the CPU. A task processes a run of tokens, one row of channels after the other.

The normalised row of a token stays in the L1 cache until the next token is mixed with it. The code uses explicit vectors to
compute all mixes of a token at once, because LLVM cannot prove that the outputs do not overlap. The gradients of the mixes are
summed per task and then over tasks. The order of this sum does not depend on the number of threads.
"""

import functools

import numba
import numpy as np
import torch

from ..dtypes import state_dtype
from ..layout import layout_of_step, same_strides, sequences
from .intrinsics import CODES, SIZES, load, load_int, num, state_code, store
from .kernel import Kernel, share
from .launch import address, placed_state
from .vector import LANES, fma, vec, vload, vset, vstore

_LANES = 2 * LANES  # channels that are mixed at once
_RUN = 32  # tokens of a forward task
_BLOCK = 8192  # elements of a task of relu_squared
_GROUPS = 64  # the most partial sums per mix and channel


# These loops may use fused multiply-adds, because no other backend must repeat them bit for bit. LLVM may also reorder the sums
# over a row, so that they vectorise. Their order depends on C, but not on the number of threads.
_row_loop = numba.njit(forceinline=True, error_model="numpy", fastmath={"contract"})
row_sum = numba.njit(forceinline=True, error_model="numpy", fastmath={"contract", "reassoc"})


@row_sum
def _sum(row, C, X, S):
    total = num(0.0, S)
    for i in range(C):
        total += load(row, i, X)
    return total


@row_sum
def _centre(row, out, C, mean, X, S):
    """Write row - mean, and return the sum of its squares."""
    total = num(0.0, S)
    for i in range(C):
        centred = load(row, i, X) - mean
        store(out, i, centred, S)
        total += centred * centred
    return total


@row_sum
def _sum_products(a, b, C, S):
    total = num(0.0, S)
    for i in range(C):
        total += load(a, i, S) * load(b, i, S)
    return total


@_row_loop
def _normalise(row, out, C, eps, NORM, X, S):
    """Write the row in the state type, normalised if NORM. Return the factor that scaled it."""
    if not NORM:
        for i in range(C):
            store(out, i, load(row, i, X), S)
        return num(1.0, S)
    n = num(float(C), S)
    squares = _centre(row, out, C, _sum(row, C, X, S) / n, X, S)
    scale = num(1.0, S) / np.sqrt(squares / n + eps)
    for i in range(C):
        store(out, i, load(out, i, S) * scale, S)
    return scale


@_row_loop
def _normalise_backward(d, normal, scale, out, C, NORM, X, S):
    """Write the gradient with respect to a row. ``d`` is the gradient with respect to the normalised row."""
    if not NORM:
        for i in range(C):
            store(out, i, load(d, i, S), X)
        return
    n = num(float(C), S)
    offset, slope = _sum(d, C, S, S) / n, _sum_products(d, normal, C, S) / n
    for i in range(C):
        store(out, i, (load(d, i, S) - offset - load(normal, i, S) * slope) * scale, X)


@_row_loop
def _mix_at(i, now, before, mixes, outs, offset, M, C, V, W):
    a, b, one = vload(now, i, W), vload(before, i, W), vset(1.0, W)
    for m in range(M):
        mix = vload(mixes, m * C + i, W)
        vstore(load_int(outs, m) + offset, i, fma(a, mix, b * (one - mix)), V)


@_row_loop
def _mix(now, before, mixes, outs, offset, M, C, V, W, V1, W1):
    """Write all outputs of a token, ``offset`` bytes after the start of each output.

    V and W are the vector types of data and state. V1 and W1 have one lane, for the last channels.
    """
    whole = C // _LANES * _LANES
    for i in range(0, whole, _LANES):
        _mix_at(i, now, before, mixes, outs, offset, M, C, V, W)
    for i in range(whole, C):
        _mix_at(i, now, before, mixes, outs, offset, M, C, V1, W1)


@_row_loop
def _mix_backward_at(i, now, before, mixes, gs, offset, after, d, total, M, C, OWN, PARAMETERS, V, W):
    step, sum_, one = vload(now, i, W) - vload(before, i, W), vset(0.0, W), vset(1.0, W)
    for m in range(M):
        mix, g = vload(mixes, m * C + i, W), load_int(gs, m)
        if OWN:
            own = vload(g + offset, i, V)
            sum_ = fma(own, mix, sum_)
            if PARAMETERS:
                vstore(total, m * C + i, fma(own, step, vload(total, m * C + i, W)), W)
        if after >= 0:
            sum_ = fma(vload(g + after, i, V), one - mix, sum_)
    vstore(d, i, sum_, W)


@_row_loop
def _mix_backward(now, before, mixes, gs, offset, after, d, total, M, C, OWN, PARAMETERS, V, W, V1, W1):
    """Write d, the gradient with respect to a normalised token.

    If OWN, add the upstream gradients of this token, ``offset`` bytes after the start of each of gs. Unless ``after`` is
    negative, add the upstream gradients of the next token, ``after`` bytes after it.
    """
    whole = C // _LANES * _LANES
    for i in range(0, whole, _LANES):
        _mix_backward_at(i, now, before, mixes, gs, offset, after, d, total, M, C, OWN, PARAMETERS, V, W)
    for i in range(whole, C):
        _mix_backward_at(i, now, before, mixes, gs, offset, after, d, total, M, C, OWN, PARAMETERS, V1, W1)


@functools.cache
def _forward_kernel(X, O, NORM):
    """X, O: the storage codes of x and of the outputs. In the backward kernel, O is the code of the upstream gradients."""
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    V, W, V1, W1 = vec(O, _LANES), vec(S, _LANES), vec(O, 1), vec(S, 1)

    def token_shift(part, rows, L, C, M, inputs, mixes, outs, work, eps_):
        (x, x_b, x_l), (last, last_b) = inputs
        eps = num(eps_, S)
        for task in share((rows + _RUN - 1) // _RUN, part):
            before = work + task * 2 * C * sb
            now = before + C * sb
            for n in range(task * _RUN, min(rows, task * _RUN + _RUN)):
                b = n // L
                t = n - b * L
                row = x + (b * x_b + t * x_l) * xb
                if t == 0:
                    _normalise(last + b * last_b * xb, before, C, eps, NORM, X, S)
                elif n == task * _RUN:
                    _normalise(row - x_l * xb, before, C, eps, NORM, X, S)
                _normalise(row, now, C, eps, NORM, X, S)
                _mix(now, before, mixes, outs, n * C * ob, M, C, V, W, V1, W1)
                now, before = before, now

    return Kernel(token_shift, f"token_shift_{X}{O}{NORM:d}")


@functools.cache
def _backward_kernel(X, O, NORM, PARAMETERS):
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    V, W, V1, W1 = vec(O, _LANES), vec(S, _LANES), vec(O, 1), vec(S, 1)

    def token_shift_backward(part, rows, L, C, M, run, inputs, mixes, upstream, gradients, sums, work, eps_):
        (x, x_b, x_l), (last, last_b) = inputs
        gs, g_b, g_l = upstream
        dx, dlast = gradients
        eps = num(eps_, S)
        for task in share((rows + run - 1) // run, part):
            before = work + task * 3 * C * sb
            now, d = before + C * sb, before + 2 * C * sb
            total = sums + task * M * C * sb
            if PARAMETERS:
                for i in range(M * C):
                    store(total, i, num(0.0, S), S)
            for n in range(task * run, min(rows, task * run + run)):
                b = n // L
                t = n - b * L
                row = x + (b * x_b + t * x_l) * xb
                g = (b * g_b + t * g_l) * ob
                if t == 0:
                    scale = _normalise(last + b * last_b * xb, before, C, eps, NORM, X, S)
                    if dlast != 0:
                        _mix_backward(before, before, mixes, gs, 0, g, d, total, M, C, False, False, V, W, V1, W1)
                        _normalise_backward(d, before, scale, dlast + b * C * xb, C, NORM, X, S)
                elif n == task * run:
                    _normalise(row - x_l * xb, before, C, eps, NORM, X, S)
                scale = _normalise(row, now, C, eps, NORM, X, S)
                after = g + g_l * ob if t + 1 < L else -1
                _mix_backward(now, before, mixes, gs, g, after, d, total, M, C, True, PARAMETERS, V, W, V1, W1)
                _normalise_backward(d, now, scale, dx + n * C * xb, C, NORM, X, S)
                now, before = before, now

    return Kernel(token_shift_backward, f"token_shift_backward_{X}{O}{NORM:d}{PARAMETERS:d}")


@functools.cache
def _relu_squared_kernel(X):
    S, xb = state_code(X), SIZES[X]
    BLOCK = _BLOCK

    def relu_squared(part, R, C, x_, out_):
        (x, x_r), (out, out_r) = x_, out_
        zero = num(0.0, S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            source, target = x + (row * x_r + c) * xb, out + (row * out_r + c) * xb
            for i in range(min(BLOCK, C - c)):
                xi = load(source, i, X)
                xi = zero if xi < zero else xi
                store(target, i, xi * xi, X)

    return Kernel(relu_squared, f"relu_squared_{X}")


@functools.cache
def _relu_squared_backward_kernel(X):
    S, xb = state_code(X), SIZES[X]
    BLOCK = _BLOCK

    def relu_squared_backward(part, R, C, g_, x_, dx_):
        (g, g_r), (x, x_r), (dx, dx_r) = g_, x_, dx_
        zero, two = num(0.0, S), num(2.0, S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            upstream, source = g + (row * g_r + c) * xb, x + (row * x_r + c) * xb
            target = dx + (row * dx_r + c) * xb
            for i in range(min(BLOCK, C - c)):
                xi = load(source, i, X)
                d = two * xi * load(upstream, i, X)
                store(target, i, zero if xi <= zero else d, X)

    return Kernel(relu_squared_backward, f"relu_squared_backward_{X}")


# --- launchers --------------------------------------------------------------------------------------------------------------


def _inputs(x, last):
    """Return (last, the kernel arguments for x and last). If last is None, it is 0; its normalised row is 0 too."""
    last = x.new_zeros(x.shape[2]).expand(x.shape[0], -1) if last is None else sequences(last.unsqueeze(-2)).squeeze(1)
    return last, ((x.data_ptr(), x.stride(0), x.stride(1)), (last.data_ptr(), last.stride(0)))


def token_shift_forward(x, last, mixes, norm_eps, outs, tuning):
    """Fill outs. All outs are contiguous; mixes is (M, C), contiguous, in the state type. x is not empty."""
    x = sequences(x)
    B, L, C = x.shape
    last, inputs = _inputs(x, last)
    table = np.array([out.data_ptr() for out in outs])
    work = torch.empty((-(-B * L // _RUN), 2, C), dtype=state_dtype(x.dtype), device=x.device)
    kernel = _forward_kernel(CODES[x.dtype], CODES[outs[0].dtype], norm_eps is not None)
    kernel(
        x.numel() * len(outs), B * L, L, C, len(outs), inputs, mixes.data_ptr(), table.ctypes.data, work.data_ptr(),
        norm_eps or 0.0,
    )  # fmt: skip


def token_shift_backward(gs, x, last, mixes, norm_eps, dx, dlast, parameters, tuning):
    """Fill dx, and dlast if it is given; both are contiguous.

    If ``parameters``, return partial sums of d mixes with the shape (groups, M, C).
    """
    x, gs = sequences(x), same_strides([sequences(g) for g in gs])
    B, L, C = x.shape
    M = len(gs)
    last, inputs = _inputs(x, last)
    table = np.array([g.data_ptr() for g in gs])
    run = max(_RUN, -(-B * L // _GROUPS))
    tasks = -(-B * L // run)
    state = state_dtype(x.dtype)
    sums = torch.empty((tasks, M, C), dtype=state, device=x.device) if parameters else None
    work = torch.empty((tasks, 3, C), dtype=state, device=x.device)
    kernel = _backward_kernel(CODES[x.dtype], CODES[gs[0].dtype], norm_eps is not None, parameters)
    kernel(
        2 * x.numel() * M, B * L, L, C, M, run, inputs, mixes.data_ptr(), (table.ctypes.data, *gs[0].stride()[:2]),
        (dx.data_ptr(), address(dlast)), address(sums), work.data_ptr(), norm_eps or 0.0,
    )  # fmt: skip
    return sums


def relu_squared_forward(x, out, tuning):
    """Fill out. x is not empty."""
    layout = layout_of_step(x, out, False)
    x, x_ = placed_state(layout, x)
    out, out_ = placed_state(layout, out)
    _relu_squared_kernel(CODES[x.dtype])(x.numel(), layout.R, layout.C, x_, out_)


def relu_squared_backward(g, x, dx, tuning):
    """Fill dx. x is not empty."""
    layout = layout_of_step(x, dx, False)
    g, g_ = placed_state(layout, g)
    x, x_ = placed_state(layout, x)
    dx, dx_ = placed_state(layout, dx)
    _relu_squared_backward_kernel(CODES[x.dtype])(x.numel(), layout.R, layout.C, g_, x_, dx_)
