"""Token shift and squared ReLU on the CPU. A task is a run of tokens, one row of channels after the other.

The row before is still in L1 when a token is mixed with it, so of its norm only the mean and the scale are carried along. Each
loop over channels has few streams, because LLVM checks at run time that those it writes overlap no other, and gives up on many.
Gradients of the mixes are summed per task and then over tasks, in an order that no number of threads changes.
"""

import functools

import numba
import numpy as np
import torch

from ..layout import layout_of_step, place_state, sequences
from ..reference.lif import state_dtype
from .runtime import CODES, SIZES, Kernel, huge_pages, load, load_int, num, state_code, store

_RUN = 32  # tokens of a forward task
_BLOCK = 8192  # elements of a task of relu_squared
_GROUPS = 64  # at most so many partial sums per mix and channel


# Sums of a row alone may be reordered, so that LLVM vectorises them: the order then depends on C, not on threads.
@numba.njit(forceinline=True, error_model="numpy", fastmath={"reassoc"})
def _sum(row, C, X, S):
    total = num(0.0, S)
    for i in range(C):
        total += load(row, i, X)
    return total


@numba.njit(forceinline=True, error_model="numpy", fastmath={"reassoc"})
def _sum_squares(row, C, mean, X, S):
    total = num(0.0, S)
    for i in range(C):
        centred = load(row, i, X) - mean
        total += centred * centred
    return total


@numba.njit(forceinline=True, error_model="numpy", fastmath={"reassoc"})
def _sum_products(d, row, C, mean, X, S):
    total = num(0.0, S)
    for i in range(C):
        total += load(d, i, S) * (load(row, i, X) - mean)
    return total


@numba.njit(forceinline=True, error_model="numpy")
def _norm(row, C, eps, NORM, X, S):
    """(mean, scale) that make the row normal."""
    if NORM:
        n = num(float(C), S)
        mean = _sum(row, C, X, S) / n
        return mean, num(1.0, S) / np.sqrt(_sum_squares(row, C, mean, X, S) / n + eps)
    return num(0.0, S), num(1.0, S)


@numba.njit(forceinline=True, error_model="numpy")
def _normal(row, i, mean, scale, NORM, X):
    return (load(row, i, X) - mean) * scale if NORM else load(row, i, X)


@numba.njit(forceinline=True, error_model="numpy")
def _norm_backward(d, row, out, C, mean, scale, NORM, X, S):
    """From the gradient ``d`` of a normal row to that of the row."""
    if NORM:
        n = num(float(C), S)
        offset = _sum(d, C, S, S) / n
        slope = _sum_products(d, row, C, mean, X, S) * scale / n
        for i in range(C):
            store(out, i, (load(d, i, S) - offset - (load(row, i, X) - mean) * scale * slope) * scale, X)
    else:
        for i in range(C):
            store(out, i, load(d, i, S), X)


@functools.cache
def _forward_kernel(X, NORM):
    S = state_code(X)
    xb, sb = SIZES[X], SIZES[S]

    def token_shift(rows, L, C, M, run, x, x_b, x_l, last, last_b, mixes, outs, eps_):
        one, eps = num(1.0, S), num(eps_, S)
        for task in numba.prange((rows + run - 1) // run):
            b = task * run // L
            t = task * run - b * L
            row = x + (b * x_b + t * x_l) * xb
            before = row - x_l * xb if t > 0 else last + b * last_b * xb
            mean0, scale0 = _norm(before, C, eps, NORM, X, S)
            for n in range(task * run, min(rows, task * run + run)):
                mean, scale = _norm(row, C, eps, NORM, X, S)
                for m in range(M):
                    mix, out = mixes + m * C * sb, load_int(outs, m) + n * C * xb
                    for i in range(C):
                        k = load(mix, i, S)
                        mixed = _normal(row, i, mean, scale, NORM, X) * k
                        store(out, i, mixed + _normal(before, i, mean0, scale0, NORM, X) * (one - k), X)
                t += 1
                before, mean0, scale0 = row, mean, scale
                row += x_l * xb
                if t == L:
                    b, t = b + 1, 0
                    row, before = x + b * x_b * xb, last + b * last_b * xb
                    if n + 1 < rows:
                        mean0, scale0 = _norm(before, C, eps, NORM, X, S)

    return Kernel(token_shift, f"token_shift_{X}{NORM:d}")


@functools.cache
def _backward_kernel(X, NORM, PARAMETERS):
    S = state_code(X)
    xb, sb = SIZES[X], SIZES[S]

    def token_shift_backward(rows, L, C, M, run, x, x_b, x_l, last, last_b, mixes, gs, dx, dlast, sums, work, eps_):
        zero, one, eps = num(0.0, S), num(1.0, S), num(eps_, S)
        for task in numba.prange((rows + run - 1) // run):
            b = task * run // L
            t = task * run - b * L
            row = x + (b * x_b + t * x_l) * xb
            before = row - x_l * xb if t > 0 else last + b * last_b * xb
            mean0, scale0 = _norm(before, C, eps, NORM, X, S)
            d = work + task * C * sb
            if PARAMETERS:
                for i in range(M * C):
                    store(sums + task * M * C * sb, i, zero, S)
            for n in range(task * run, min(rows, task * run + run)):
                mean, scale = _norm(row, C, eps, NORM, X, S)
                for m in range(M):
                    mix, g_l = mixes + m * C * sb, load_int(gs, 3 * m + 2) * xb
                    g = load_int(gs, 3 * m) + b * load_int(gs, 3 * m + 1) * xb + t * g_l
                    if t == 0 and dlast != 0:
                        for i in range(C):
                            part = zero if m == 0 else load(d, i, S)
                            store(d, i, part + load(g, i, X) * (one - load(mix, i, S)), S)
                if t == 0 and dlast != 0:
                    _norm_backward(d, before, dlast + b * C * xb, C, mean0, scale0, NORM, X, S)
                for m in range(M):
                    mix, g_l = mixes + m * C * sb, load_int(gs, 3 * m + 2) * xb
                    g = load_int(gs, 3 * m) + b * load_int(gs, 3 * m + 1) * xb + t * g_l
                    if m == 0:
                        for i in range(C):
                            store(d, i, load(g, i, X) * load(mix, i, S), S)
                    else:
                        for i in range(C):
                            store(d, i, load(d, i, S) + load(g, i, X) * load(mix, i, S), S)
                    if t + 1 < L:
                        for i in range(C):
                            after = load(g + g_l, i, X) * (one - load(mix, i, S))
                            store(d, i, load(d, i, S) + after, S)
                    if PARAMETERS:
                        total = sums + (task * M + m) * C * sb
                        for i in range(C):
                            step = _normal(row, i, mean, scale, NORM, X) - _normal(before, i, mean0, scale0, NORM, X)
                            store(total, i, load(total, i, S) + load(g, i, X) * step, S)
                _norm_backward(d, row, dx + n * C * xb, C, mean, scale, NORM, X, S)
                t += 1
                before, mean0, scale0 = row, mean, scale
                row += x_l * xb
                if t == L:
                    b, t = b + 1, 0
                    row, before = x + b * x_b * xb, last + b * last_b * xb
                    if n + 1 < rows:
                        mean0, scale0 = _norm(before, C, eps, NORM, X, S)

    return Kernel(token_shift_backward, f"token_shift_backward_{X}{NORM:d}{PARAMETERS:d}")


@functools.cache
def _relu_squared_kernel(X):
    S, xb = state_code(X), SIZES[X]
    BLOCK = _BLOCK

    def relu_squared(R, C, x, x_r, out, out_r):
        zero = num(0.0, S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in numba.prange(R * chunks):
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

    def relu_squared_backward(R, C, g, g_r, x, x_r, dx, dx_r):
        zero, two = num(0.0, S), num(2.0, S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in numba.prange(R * chunks):
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


def token_shift_forward(x, last, mixes, norm_eps, outs):
    """Fill outs, which are contiguous; mixes is (M, C), contiguous, in the state type. x is not empty."""
    huge_pages(*outs)
    x = sequences(x)
    B, L, C = x.shape
    last, placed = _placed(x, last)
    addresses = np.array([out.data_ptr() for out in outs])
    kernel = _forward_kernel(CODES[x.dtype], norm_eps is not None)
    kernel(
        x.numel() * len(outs), B * L, L, C, len(outs), _RUN, *placed, mixes.data_ptr(), addresses.ctypes.data, norm_eps or 0.0
    )


def token_shift_backward(gs, x, last, mixes, norm_eps, dx, dlast, parameters):
    """Fill dx and, where given, dlast, both contiguous; return, if ``parameters``, sums of d mixes, (groups, M, C)."""
    huge_pages(dx)
    x, gs = sequences(x), [sequences(g) for g in gs]
    B, L, C = x.shape
    M = len(gs)
    last, placed = _placed(x, last)
    upstream = np.array([(g.data_ptr(), g.stride(0), g.stride(1)) for g in gs])
    run = max(_RUN, -(-B * L // _GROUPS))
    tasks = -(-B * L // run)
    state = state_dtype(x.dtype)
    sums = torch.empty((tasks, M, C), dtype=state) if parameters else None
    work = torch.empty((tasks, C), dtype=state)
    kernel = _backward_kernel(CODES[x.dtype], norm_eps is not None, parameters)
    kernel(
        2 * x.numel() * M, B * L, L, C, M, run, *placed, mixes.data_ptr(), upstream.ctypes.data, dx.data_ptr(),
        0 if dlast is None else dlast.data_ptr(), 0 if sums is None else sums.data_ptr(), work.data_ptr(), norm_eps or 0.0,
    )  # fmt: skip
    return sums


def relu_squared_forward(x, out):
    """Fill out. x is not empty."""
    huge_pages(out)
    layout = layout_of_step(x, out, False)
    x, x_r = place_state(layout, x)
    out, out_r = place_state(layout, out)
    _relu_squared_kernel(CODES[x.dtype])(x.numel(), layout.R, layout.C, x.data_ptr(), x_r, out.data_ptr(), out_r)


def relu_squared_backward(g, x, dx):
    """Fill dx. x is not empty."""
    huge_pages(dx)
    layout = layout_of_step(x, dx, False)
    g, g_r = place_state(layout, g)
    x, x_r = place_state(layout, x)
    dx, dx_r = place_state(layout, dx)
    _relu_squared_backward_kernel(CODES[x.dtype])(
        x.numel(), layout.R, layout.C, g.data_ptr(), g_r, x.data_ptr(), x_r, dx.data_ptr(), dx_r
    )
