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
def _mix(now, before, mix, out, C, X, S):
    one = num(1.0, S)
    for i in range(C):
        m = load(mix, i, S)
        store(out, i, load(now, i, S) * m + load(before, i, S) * (one - m), X)


@_row_loop
def _mix_backward(g, after, mix, d, first, C, X, S):
    """d (+)= the share of a token's own gradient ``g`` and of the next token's, where there is one."""
    zero, one = num(0.0, S), num(1.0, S)
    if after != 0:
        for i in range(C):
            m, part = load(mix, i, S), zero if first else load(d, i, S)
            store(d, i, part + load(g, i, X) * m + load(after, i, X) * (one - m), S)
    else:
        for i in range(C):
            store(d, i, (zero if first else load(d, i, S)) + load(g, i, X) * load(mix, i, S), S)


@_row_loop
def _mix_backward_last(g, mix, d, first, C, X, S):
    zero, one = num(0.0, S), num(1.0, S)
    for i in range(C):
        store(d, i, (zero if first else load(d, i, S)) + load(g, i, X) * (one - load(mix, i, S)), S)


@_row_loop
def _add_product(total, g, step, C, X, S):
    for i in range(C):
        store(total, i, load(total, i, S) + load(g, i, X) * load(step, i, S), S)


@functools.cache
def _forward_kernel(X, NORM):
    S = state_code(X)
    xb, sb = SIZES[X], SIZES[S]

    def token_shift(rows, L, C, M, x, x_b, x_l, last, last_b, mixes, outs, work, eps_):
        eps = num(eps_, S)
        for task in numba.prange((rows + _RUN - 1) // _RUN):
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
                for m in range(M):
                    _mix(now, before, mixes + m * C * sb, load_int(outs, m) + n * C * xb, C, X, S)
                now, before = before, now

    return Kernel(token_shift, f"token_shift_{X}{NORM:d}")


@functools.cache
def _backward_kernel(X, NORM, PARAMETERS):
    S = state_code(X)
    xb, sb = SIZES[X], SIZES[S]

    def token_shift_backward(rows, L, C, M, run, x, x_b, x_l, last, last_b, mixes, gs, dx, dlast, sums, work, eps_):
        eps = num(eps_, S)
        for task in numba.prange((rows + run - 1) // run):
            before = work + task * 4 * C * sb
            now, d, step = before + C * sb, before + 2 * C * sb, before + 3 * C * sb
            total = sums + task * M * C * sb
            if PARAMETERS:
                for i in range(M * C):
                    store(total, i, num(0.0, S), S)
            for n in range(task * run, min(rows, task * run + run)):
                b = n // L
                t = n - b * L
                row = x + (b * x_b + t * x_l) * xb
                if t == 0:
                    scale = _normalise(last + b * last_b * xb, before, C, eps, NORM, X, S)
                    if dlast != 0:
                        for m in range(M):
                            g = load_int(gs, 3 * m) + b * load_int(gs, 3 * m + 1) * xb
                            _mix_backward_last(g, mixes + m * C * sb, d, m == 0, C, X, S)
                        _normalise_backward(d, before, scale, dlast + b * C * xb, C, NORM, X, S)
                elif n == task * run:
                    _normalise(row - x_l * xb, before, C, eps, NORM, X, S)
                scale = _normalise(row, now, C, eps, NORM, X, S)
                if PARAMETERS:
                    for i in range(C):
                        store(step, i, load(now, i, S) - load(before, i, S), S)
                for m in range(M):
                    g_l = load_int(gs, 3 * m + 2) * xb
                    g = load_int(gs, 3 * m) + b * load_int(gs, 3 * m + 1) * xb + t * g_l
                    _mix_backward(g, g + g_l if t + 1 < L else 0, mixes + m * C * sb, d, m == 0, C, X, S)
                    if PARAMETERS:
                        _add_product(total + m * C * sb, g, step, C, X, S)
                _normalise_backward(d, now, scale, dx + n * C * xb, C, NORM, X, S)
                now, before = before, now

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
    work = torch.empty((-(-B * L // _RUN), 2, C), dtype=state_dtype(x.dtype))
    kernel = _forward_kernel(CODES[x.dtype], norm_eps is not None)
    kernel(
        x.numel() * len(outs), B * L, L, C, len(outs), *placed, mixes.data_ptr(), addresses.ctypes.data, work.data_ptr(),
        norm_eps or 0.0,
    )  # fmt: skip


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
    work = torch.empty((tasks, 4, C), dtype=state)
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
