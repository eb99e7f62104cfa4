"""The statistics of a normalisation per channel, and the arithmetic of its backward pass, on the CPU.

The data are T x B x C x S values with contiguous S, or T x B x C. A task finds the mean and the sum of squared differences of
every channel of a block for a group of its values, in chunks: two passes over a chunk that is in a cache. Chunks and groups are
combined with their counts, in float64 and in a fixed order, so a large mean loses no digits of the variance.
"""

import functools
import math

import numba
import torch

from ..dtypes import state_dtype
from ..layout import layout_of
from .compiler import INLINE
from .intrinsics import CODES, F64, SIZES, load, load_input, num, state_code, store, tile
from .kernel import Kernel, share
from .launch import GROUPS, address, placed
from .vector import LANES, use_wide_vectors, vec, vload, vset, vstore

_CHUNK = 4096  # values of a row that two passes read, 16 KiB
_COLUMNS, _ROWS = 256, 32  # channels and rows of a chunk where the channels are contiguous: 32 KiB


# LLVM may reorder these sums, so that they vectorise. Their order does not depend on the number of threads.
row_sum = numba.njit(**INLINE, fastmath={"contract", "reassoc"})


@row_sum
def _sum(row, n, X, S):
    total = num(0.0, S)
    for i in range(n):
        total += load(row, i, X)
    return total


@row_sum
def _sums_around(row, n, mean, X, S):
    """Return the sums of row - mean and of its square."""
    total, squares = num(0.0, S), num(0.0, S)
    for i in range(n):
        centred = load(row, i, X) - mean
        total += centred
        squares += centred * centred
    return total, squares


@row_sum
def _include(means, sums, i, before, mean, squares, n):
    """Include n values with this mean and sum of squares in the statistics of ``before`` values."""
    old = load(means, i, F64)
    d = mean - old
    share_ = n / (before + n)
    store(means, i, old + d * share_, F64)
    store(sums, i, load(sums, i, F64) + squares + d * d * before * share_, F64)


@row_sum
def _include_tile(means, sums, width, before, around, total, squares, n, S):
    """Include n values of each of so many channels, whose sums around ``around`` are known."""
    for i in range(width):
        rest = float(load(total, i, S)) / n
        mean, square = float(load(around, i, S)) + rest, float(load(squares, i, S)) - rest * rest * n
        _include(means, sums, i, before, mean, square, n)


@row_sum
def _pair_of_sums(a, b, first, n, S):
    """Return the sums of n elements of two arrays, in float64."""
    total_a, total_b = 0.0, 0.0
    for i in range(first, first + n):
        total_a += float(load(a, i, S))
        total_b += float(load(b, i, S))
    return total_a, total_b


@functools.cache
def rows_kernel(X):
    S, xb = state_code(X), SIZES[X]
    CHUNK, BLOCK = _CHUNK, 64

    def norm_rows(part, outer, K, B, C, L, size, groups, steps, x_, means, sums):
        use_wide_vectors()
        x, x_t, x_b, x_r = x_
        blocks, samples = (C + BLOCK - 1) // BLOCK, outer * groups // steps
        around, total, squares = tile(BLOCK, S), tile(BLOCK, S), tile(BLOCK, S)
        together = max(1, min(BLOCK, 2 * CHUNK // L))  # channels whose chunks stay in a cache for the second pass
        for task in share(samples * blocks * steps, part):
            rest, t = task // steps, task % steps
            group = t * samples + rest // blocks
            o = group // groups
            first = (group - o * groups) * size
            c0 = rest % blocks * BLOCK
            mean_at, sum_at = means + group * C * 8, sums + group * C * 8
            for c in range(c0, min(C, c0 + BLOCK)):
                store(mean_at, c, 0.0, F64)
                store(sum_at, c, 0.0, F64)
            for k in range(first, min(K, first + size)):
                t = k // B
                row = (o + t) * x_t + (k - t * B) * x_b
                for c in range(c0, min(C, c0 + BLOCK), together):
                    width = min(together, min(C, c0 + BLOCK) - c)
                    for done in range(0, L, CHUNK):
                        n = min(CHUNK, L - done)
                        at, share_ = x + (row + c * x_r + done) * xb, num(1.0, S) / num(float(n), S)
                        for i in range(width):
                            store(around, i, _sum(at + i * x_r * xb, n, X, S) * share_, S)
                        for i in range(width):
                            sums_ = _sums_around(at + i * x_r * xb, n, load(around, i, S), X, S)
                            store(total, i, sums_[0], S)
                            store(squares, i, sums_[1], S)
                        _include_tile(
                            mean_at + c * 8, sum_at + c * 8, width, float((k - first) * L + done), around, total, squares,
                            float(n), S,
                        )  # fmt: skip

    return Kernel(norm_rows, f"norm_rows_{X}")


@functools.cache
def columns_kernel(X):
    S, xb = state_code(X), SIZES[X]
    BLOCK, ROWS = _COLUMNS, _ROWS

    def norm_columns(part, outer, K, B, C, size, groups, x_, means, sums):
        use_wide_vectors()
        x, x_t, x_r = x_
        blocks = (C + BLOCK - 1) // BLOCK
        for task in share(outer * groups * blocks, part):
            group = task // blocks
            o = group // groups
            first = (group - o * groups) * size
            last = min(K, first + size)
            c0 = (task - group * blocks) * BLOCK
            n = min(BLOCK, C - c0)
            mean_at, sum_at = means + (group * C + c0) * 8, sums + (group * C + c0) * 8
            around, total, squares = tile(BLOCK, S), tile(BLOCK, S), tile(BLOCK, S)
            for i in range(n):
                store(mean_at, i, 0.0, F64)
                store(sum_at, i, 0.0, F64)
            for k0 in range(first, last, ROWS):
                rows = min(ROWS, last - k0)
                for i in range(n):
                    store(around, i, num(0.0, S), S)
                    store(total, i, num(0.0, S), S)
                    store(squares, i, num(0.0, S), S)
                # sums of differences from the first row, which is a value of every channel
                t0 = k0 // B
                head = x + ((o + t0) * x_t + (k0 - t0 * B) * x_r + c0) * xb
                for k in range(k0, k0 + rows):
                    t = k // B
                    at = x + ((o + t) * x_t + (k - t * B) * x_r + c0) * xb
                    for i in range(n):
                        store(around, i, load(around, i, S) + (load_input(at, i, X) - load_input(head, i, X)), S)
                share_ = num(1.0, S) / num(float(rows), S)
                for i in range(n):
                    store(around, i, load(head, i, X) + load(around, i, S) * share_, S)
                for k in range(k0, k0 + rows):
                    t = k // B
                    at = x + ((o + t) * x_t + (k - t * B) * x_r + c0) * xb
                    for i in range(n):
                        d = load_input(at, i, X) - load(around, i, S)
                        store(total, i, load(total, i, S) + d, S)
                        store(squares, i, load(squares, i, S) + d * d, S)
                _include_tile(mean_at, sum_at, n, float(k0 - first), around, total, squares, float(rows), S)

    return Kernel(norm_columns, f"norm_columns_{X}")


@row_sum
def _move(running, i, new, momentum, R, S):
    """Move a running statistic towards its new value. R: its storage code; S: the code of its arithmetic."""
    old = float(load_input(running, i, R))
    store(running, i, num(old + momentum * (new - old), S), R)


@functools.cache
def combine_kernel(S, M, V):
    """M, V: storage codes of the running statistics."""
    MS, VS = state_code(M), state_code(V)

    def norm_combine(part, outer, K, C, L, size, groups, eps, means, sums, mean, squares, rstd, running, momentum):
        running_mean, running_var = running
        for o in share(outer, part):
            at = o * groups * C * 8
            for group in range(1, groups):
                first = group * size
                before, n = float(first * L), float((min(K, first + size) - first) * L)
                here = at + group * C * 8
                for c in range(C):
                    _include(means + at, sums + at, c, before, load(means + here, c, F64), load(sums + here, c, F64), n)
            for c in range(C):
                m, square = load(means + at, c, F64), load(sums + at, c, F64)
                store(mean, o * C + c, num(m, S), S)
                store(squares, o * C + c, num(square, S), S)
                store(rstd, o * C + c, num(1.0 / math.sqrt(square / float(K * L) + eps), S), S)
                if running_mean != 0:
                    _move(running_mean, o * C + c, m, momentum, M, MS)
                if running_var != 0:
                    _move(running_var, o * C + c, square / float(K * L - 1), momentum, V, VS)

    return Kernel(norm_combine, f"norm_combine_{S}{M}{V}")


@functools.cache
def vectors_kernel(S, W, O, GIVEN):
    """W, O: storage codes of weight and bias. GIVEN: write the factor only."""

    def norm_vectors(part, n, inner, scale, rstd, weight, bias, mean, out):
        wide = n * inner
        for c in share(n, part):
            factor, shift, m = load(rstd, c, S), num(0.0, S), load(mean, c, S)
            if weight != 0:
                factor *= num(float(load(weight, c, W)), S)
            if bias != 0:
                shift = num(float(load(bias, c, O)), S)
            factor *= num(scale, S)
            for i in range(c * inner, (c + 1) * inner):
                store(out, i, factor, S)
                if not GIVEN:
                    store(out, wide + i, shift, S)
                    store(out, 2 * wide + i, m, S)

    return Kernel(norm_vectors, f"norm_vectors_{S}{W}{O}{GIVEN:d}")


@functools.cache
def gradients_kernel(S, W, O, INNER):
    """W, O: storage codes of weight and bias. INNER: there are sums per value of a channel."""
    BLOCK, WS, OS = _COLUMNS, state_code(W), state_code(O)

    def norm_gradients(part, T, B, C, inner, groups, n, scale, sums, weight, rstd, d_weight, d_bias, offset, slope):
        by_factor, by_shift = sums
        blocks = (C + BLOCK - 1) // BLOCK
        for task in share(T * blocks, part):
            t = task // blocks
            c0 = (task - t * blocks) * BLOCK
            width = min(BLOCK, C - c0)
            factors, shifts = tile(BLOCK, F64), tile(BLOCK, F64)
            for i in range(width):
                store(factors, i, 0.0, F64)
                store(shifts, i, 0.0, F64)
            for row in range(groups * B):
                group = row // B
                at = ((group * T + t) * B + row - group * B) * C + c0
                for i in range(width):
                    if INNER:
                        factor, shift = _pair_of_sums(by_factor, by_shift, (at + i) * inner, inner, S)
                    else:
                        factor, shift = float(load_input(by_factor, at + i, S)), float(load_input(by_shift, at + i, S))
                    store(factors, i, load(factors, i, F64) + factor, F64)
                    store(shifts, i, load(shifts, i, F64) + shift, F64)
            for i in range(width):
                k = t * C + c0 + i
                factor, shift, r = load(factors, i, F64), load(shifts, i, F64), float(load(rstd, k, S))
                joint = r * scale / n
                if weight != 0:
                    joint *= float(load(weight, k, W))
                if d_weight != 0:
                    store(d_weight, k, num(factor * r * scale, WS), W)
                if d_bias != 0:
                    store(d_bias, k, num(shift, OS), O)
                store(offset, k, num(joint * shift, S), S)
                store(slope, k, num(joint * factor * r * r, S), S)

    return Kernel(norm_gradients, f"norm_gradients_{S}{W}{O}{INNER:d}")


@functools.cache
def backward_kernel(X, ROWS, STEPS):
    """d - offset - (x - mean) * slope. STEPS: these have a value per step."""
    S = state_code(X)
    xb, sb = SIZES[X], SIZES[S]
    V, W, LINE, BLOCK = vec(X, LANES), vec(S, LANES), LANES, 64

    def norm_backward(part, T, B, C, L, x_, d_, out_, mean, offset, slope):
        (x, x_t, x_r), (d, d_t, d_r), (out, out_t, out_r) = x_, d_, out_
        n = L if ROWS else C
        whole = n // LINE * LINE
        blocks = (C + BLOCK - 1) // BLOCK if ROWS else 1
        for task in share(B * blocks * T, part):  # a thread gets all steps of a block, as in the kernel of the neuron
            rest, t = task // T, task % T
            b, c0 = rest // blocks, rest % blocks * BLOCK
            for c in range(c0, min(C, c0 + BLOCK) if ROWS else 1):
                row = b * C + c if ROWS else b
                source, target = x + (t * x_t + row * x_r) * xb, out + (t * out_t + row * out_r) * xb
                gradient = d + (t * d_t + row * d_r) * sb
                k = t * C + c if STEPS else c
                if ROWS:
                    m, o, s = load(mean, k, S), load(offset, k, S), load(slope, k, S)
                    # explicit vectors, because d may be dx, and then LLVM runs a loop over single elements
                    for i in range(0, whole, LINE):
                        y = (vload(source, i, V) - vset(m, W)) * vset(s, W)
                        vstore(target, i, vload(gradient, i, W) - vset(o, W) - y, V)
                else:
                    for i in range(0, whole, LINE):
                        y = (vload(source, i, V) - vload(mean, i, W)) * vload(slope, i, W)
                        vstore(target, i, vload(gradient, i, W) - vload(offset, i, W) - y, V)
                for i in range(whole, n):
                    k = k if ROWS else i
                    y = (load(source, i, X) - load(mean, k, S)) * load(slope, k, S)
                    store(target, i, load(gradient, i, S) - load(offset, k, S) - y, X)

    return Kernel(norm_backward, f"norm_backward_{X}{ROWS:d}{STEPS:d}")


# --- launchers --------------------------------------------------------------------------------------------------------------


def norm_forward(x, rows, eps, mean, squares, rstd, running, momentum, tuning):
    """Fill mean, squares, the sum of (x - mean)^2, and rstd, 1 / sqrt(variance + eps). x is not empty.

    The three are (C,), or (T, C) to have them per step. running: (mean, variance), to be moved by ``momentum``; contiguous, or
    None.

    x is (T, B, C, S) if ``rows``, else (T, B, C).
    """
    T, B, C = x.shape[:3]
    L = x.shape[3] if rows else 1
    outer, K = (T, B) if mean.dim() == 2 else (1, T * B)
    size = -(-K // GROUPS)
    groups = -(-K // size)
    x, (at, x_t, x_r) = placed(layout_of(x, x, True), x)
    table = torch.empty((2, outer * groups, C), dtype=torch.float64, device="cpu")
    means, sums = table[0].data_ptr(), table[1].data_ptr()
    if rows:
        # Each thread gets all steps of some samples, because the kernel of the neuron reads them next on the same thread.
        steps = T if groups * outer % T == 0 else 1
        rows_kernel(CODES[x.dtype])(x.numel(), outer, K, B, C, L, size, groups, steps, (at, x_t, C * x_r, x_r), means, sums)
    else:
        columns_kernel(CODES[x.dtype])(x.numel(), outer, K, B, C, size, groups, (at, x_t, x_r), means, sums)
    codes = (CODES[mean.dtype if t is None else t.dtype] for t in running)
    combine_kernel(CODES[mean.dtype], *codes)(
        table.numel(), outer, K, C, L, size, groups, eps, means, sums, mean.data_ptr(), squares.data_ptr(), rstd.data_ptr(),
        tuple(map(address, running)), momentum,
    )  # fmt: skip


def norm_vectors(mean, rstd, weight, bias, scale, inner):
    """Return (rstd weight scale, bias, mean) as vectors for a kernel that computes (x - mean) factor + shift.

    The arguments are (C,), or (T, C). inner: each value stands so often in the result.
    """
    mean, rstd, weight, bias = (None if t is None else t.contiguous() for t in (mean, rstd, weight, bias))
    given = inner == 1 and bias is not None and bias.dtype == rstd.dtype  # then only the factor is new
    made = torch.empty((1 if given else 3, rstd.numel() * inner), dtype=rstd.dtype, device="cpu")
    codes = (CODES[rstd.dtype if t is None else t.dtype] for t in (weight, bias))
    vectors_kernel(CODES[rstd.dtype], *codes, given)(
        made.numel(), rstd.numel(), inner, scale, rstd.data_ptr(), address(weight), address(bias), mean.data_ptr(),
        made.data_ptr(),
    )  # fmt: skip
    if given:
        return made.view(rstd.shape), bias, mean
    return made.view(3, *rstd.shape[:-1], -1).unbind()


def norm_gradients(sums, T, B, weight, rstd, scale, n, d_weight, d_bias, offset, slope, tuning):
    """Fill the gradients of weight and bias that are given, and what norm_backward subtracts: offset and slope.

    The vectors are (C,), or (T, C). sums: partial sums of the gradients of rstd weight scale and of bias, (.., C, inner),
    T x B x C x inner values each, any number of times. n: values per channel.
    """
    sums = [t.contiguous() for t in sums]
    C, inner = sums[0].shape[-2:]
    weight, rstd = (None if t is None else t.contiguous() for t in (weight, rstd))
    codes = (CODES[rstd.dtype if t is None else t.dtype] for t in (weight, d_bias))
    gradients_kernel(CODES[rstd.dtype], *codes, inner > 1)(
        sums[0].numel(), T, B, C, inner, sums[0].numel() // (T * B * C * inner), float(n), scale, tuple(map(address, sums)),
        address(weight), rstd.data_ptr(), address(d_weight), address(d_bias), offset.data_ptr(), slope.data_ptr(),
    )  # fmt: skip


def norm_backward(d, dx, x, rows, mean, offset, slope, tuning):
    """Fill dx with d - offset - (x - mean) * slope. The last three are (C,), or (T, C) with values per step.

    d is in the state type. It may be dx.
    """
    T, B, C = x.shape[:3]
    mean, offset, slope = (p.to(state_dtype(x.dtype)).contiguous() for p in (mean, offset, slope))
    layout = layout_of(x, dx, True)
    x, x_ = placed(layout, x)
    d, d_ = placed(layout, d)
    dx, dx_ = placed(layout, dx)
    backward_kernel(CODES[x.dtype], rows, mean.dim() == 2)(
        x.numel(), T, B, C, x.shape[-1], x_, d_, dx_, mean.data_ptr(), offset.data_ptr(), slope.data_ptr()
    )
