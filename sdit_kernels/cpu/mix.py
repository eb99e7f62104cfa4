"""Token shift and squared ReLU on the CPU. A task is a run of tokens, one row of channels after the other.

The normalised row of the token before stays in L1 until its successor has been mixed with it. Where all mixes are served at
once, vectors are written out, for LLVM would have to prove that no output overlaps another. Gradients of the mixes are summed
per task and then over tasks, in an order that no number of threads changes.
"""

import functools

import numba
import numpy as np
import torch

from ..dtypes import state_dtype
from ..layout import layout_of_step, same_strides, sequences, step_view
from .intrinsics import CODES, SIZES, load, load_int, num, state_code, store
from .kernel import Kernel, share
from .vector import LANES, fma, kind, vload, vset, vstore

_LANES = 2 * LANES  # channels mixed at once
_RUN = 32  # tokens of a forward task
_BLOCK = 8192  # elements of a task of relu_squared
_GROUPS = 64  # at most so many partial sums per mix and channel


# Fused multiply-adds everywhere, for nothing here has to be repeated bit for bit by another backend; sums of a row may also be
# reordered, so that they vectorise: in an order that depends on C, not on threads.
_row_loop = numba.njit(forceinline=True, error_model="numpy", fastmath={"contract"})
_row_sum = numba.njit(forceinline=True, error_model="numpy", fastmath={"contract", "reassoc"})


@_row_sum
def _sum(row, C, X, S):
    total = num(0.0, S)
    for i in range(C):
        total += load(row, i, X)
    return total


@_row_sum
def _centre(row, out, C, mean, X, S):
    """Write row - mean; return the sum of its squares."""
    total = num(0.0, S)
    for i in range(C):
        centred = load(row, i, X) - mean
        store(out, i, centred, S)
        total += centred * centred
    return total


@_row_sum
def _sum_products(a, b, C, S):
    total = num(0.0, S)
    for i in range(C):
        total += load(a, i, S) * load(b, i, S)
    return total


@_row_loop
def _normalise(row, out, C, eps, NORM, X, S):
    """Write the row, normal if so wanted, in the state type; return what it was scaled by."""
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
    """From the gradient of a normal row to that of the row."""
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
    """All outputs of a token; ``offset`` bytes into each of them. V, W: vectors of data and state; V1, W1: of one element."""
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
    """The gradient d of a normalised token from its own upstream gradients, ``offset`` bytes into gs, if OWN, and from those of
    the token that follows, unless ``after`` is negative."""
    whole = C // _LANES * _LANES
    for i in range(0, whole, _LANES):
        _mix_backward_at(i, now, before, mixes, gs, offset, after, d, total, M, C, OWN, PARAMETERS, V, W)
    for i in range(whole, C):
        _mix_backward_at(i, now, before, mixes, gs, offset, after, d, total, M, C, OWN, PARAMETERS, V1, W1)


@functools.cache
def _forward_kernel(X, O, NORM):
    """X, O: dtypes of x and of the outputs; so below, where O is that of the upstream gradients."""
    S = state_code(X)
    xb, ob, sb = SIZES[X], SIZES[O], SIZES[S]
    V, W, V1, W1 = kind(O, _LANES), kind(S, _LANES), kind(O, 1), kind(S, 1)

    def token_shift(part, rows, L, C, M, x, x_b, x_l, last, last_b, mixes, outs, work, eps_):
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
    V, W, V1, W1 = kind(O, _LANES), kind(S, _LANES), kind(O, 1), kind(S, 1)

    def token_shift_backward(
        part, rows, L, C, M, run, x, x_b, x_l, last, last_b, mixes, gs, g_b, g_l, dx, dlast, sums, work, eps_
    ):  # fmt: skip
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

    def relu_squared(part, R, C, x, x_r, out, out_r):
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

    def relu_squared_backward(part, R, C, g, g_r, x, x_r, dx, dx_r):
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


def _placed(x, last):
    """x and last with their strides; the token before a sequence that begins is 0, and so is its norm."""
    last = x.new_zeros(x.shape[2]).expand(x.shape[0], -1) if last is None else sequences(last.unsqueeze(-2)).squeeze(1)
    return last, (x.data_ptr(), x.stride(0), x.stride(1), last.data_ptr(), last.stride(0))


def token_shift_forward(x, last, mixes, norm_eps, outs, tuning):
    """Fill outs, which are contiguous; mixes is (M, C), contiguous, in the state type. x is not empty."""
    x = sequences(x)
    B, L, C = x.shape
    last, placed = _placed(x, last)
    addresses = np.array([out.data_ptr() for out in outs])
    work = torch.empty((-(-B * L // _RUN), 2, C), dtype=state_dtype(x.dtype), device=x.device)
    kernel = _forward_kernel(CODES[x.dtype], CODES[outs[0].dtype], norm_eps is not None)
    kernel(
        x.numel() * len(outs), B * L, L, C, len(outs), *placed, mixes.data_ptr(), addresses.ctypes.data, work.data_ptr(),
        norm_eps or 0.0,
    )  # fmt: skip


def token_shift_backward(gs, x, last, mixes, norm_eps, dx, dlast, parameters, tuning):
    """Fill dx and, where given, dlast, both contiguous; return, if ``parameters``, sums of d mixes, (groups, M, C)."""
    x, gs = sequences(x), same_strides([sequences(g) for g in gs])
    B, L, C = x.shape
    M = len(gs)
    last, placed = _placed(x, last)
    addresses = np.array([g.data_ptr() for g in gs])
    run = max(_RUN, -(-B * L // _GROUPS))
    tasks = -(-B * L // run)
    state = state_dtype(x.dtype)
    sums = torch.empty((tasks, M, C), dtype=state, device=x.device) if parameters else None
    work = torch.empty((tasks, 3, C), dtype=state, device=x.device)
    kernel = _backward_kernel(CODES[x.dtype], CODES[gs[0].dtype], norm_eps is not None, parameters)
    kernel(
        2 * x.numel() * M, B * L, L, C, M, run, *placed, mixes.data_ptr(), addresses.ctypes.data, *gs[0].stride()[:2],
        dx.data_ptr(), 0 if dlast is None else dlast.data_ptr(), 0 if sums is None else sums.data_ptr(), work.data_ptr(),
        norm_eps or 0.0,
    )  # fmt: skip
    return sums


def relu_squared_forward(x, out, tuning):
    """Fill out. x is not empty."""
    layout = layout_of_step(x, out, False)
    x, x_r = step_view(layout, x)
    out, out_r = step_view(layout, out)
    _relu_squared_kernel(CODES[x.dtype])(x.numel(), layout.R, layout.C, x.data_ptr(), x_r, out.data_ptr(), out_r)


def relu_squared_backward(g, x, dx, tuning):
    """Fill dx. x is not empty."""
    layout = layout_of_step(x, dx, False)
    g, g_r = step_view(layout, g)
    x, x_r = step_view(layout, x)
    dx, dx_r = step_view(layout, dx)
    _relu_squared_backward_kernel(CODES[x.dtype])(
        x.numel(), layout.R, layout.C, g.data_ptr(), g_r, x.data_ptr(), x_r, dx.data_ptr(), dx_r
    )
