"""The statistics of a normalisation per channel in Triton.

A program reads a tile of rows and columns after the other, for one channel or for a block of contiguous channels. Every element
of the tile has its own running mean and sum of squares (Welford's update), of the differences from the first value of the
channel. So a large mean loses no digits of the variance, and the threads exchange values only at the end. A second kernel
combines the programs, in a fixed order.

In the backward pass, neuron.py runs twice, see ops/norm_lif.py. A kernel between adds the sums per channel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..layout import layout_of, row_view
from .launch import launch
from .tiles import STATES, cdiv, power_of_2, warps_of

_MERGED = 32  # groups that the second kernel reads at once


class Flags(NamedTuple):
    """Compile-time constants of the kernels."""

    ROWS: bool  # a row holds values of one channel; otherwise its columns are channels


@triton.jit
def _group_of(g, groups, size, K):
    """Return (outer index, first row, number of rows) of a group."""
    o = g // groups
    first = (g - o * groups) * size
    return o, first, tl.minimum(K - first, size)


@triton.jit(do_not_specialize=["K", "B", "size", "groups", "tiles"])
def norm_forward_kernel(
    inputs, outputs, K, B, C, L, size, groups, tiles,
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_t, x_r = inputs
    mean_ptr, squares_ptr = outputs  # (groups, column blocks of a row, C) with ROWS, else (groups, C)
    blocks = tl.cdiv(L, BC) if F.ROWS else tl.cdiv(C, BC)
    pid = tl.program_id(0)
    if F.ROWS:
        c = (pid % C).to(tl.int64)
        block = pid // C % blocks
        g = pid // C // blocks
        first = block.to(tl.int64) * BC
        cols = first + tl.arange(0, BC)[None, :]
        mask_c = cols < L
    else:
        c = 0
        block = pid % blocks
        g = pid // blocks
        first = block.to(tl.int64) * BC
        cols = first + tl.arange(0, BC)[None, :]
        mask_c = cols < C
    o, row, count = _group_of(g, groups, size, K)
    i_rows = tl.arange(0, BR)[:, None]
    if F.ROWS:
        shift = tl.load(x_ptr + o.to(tl.int64) * x_t + c * x_r).to(STATE)
    else:
        shift = tl.load(x_ptr + o.to(tl.int64) * x_t + cols, mask=mask_c, other=0.0).to(STATE)
    mean = tl.zeros([BR, BC], STATE)
    squares = tl.zeros([BR, BC], STATE)
    n = tl.zeros([BR, 1], STATE)
    for i in range(tiles):
        k = i * BR + i_rows
        mask = mask_c & (k < count)
        t = (row + k) // B
        b = row + k - t * B
        if F.ROWS:
            at = (o + t).to(tl.int64) * x_t + (b.to(tl.int64) * C + c) * x_r
        else:
            at = (o + t).to(tl.int64) * x_t + b.to(tl.int64) * x_r
        x = tl.load(x_ptr + at + cols, mask=mask, other=0.0).to(STATE) - shift
        d = tl.where(mask, x - mean, 0.0)
        mean += d * (1.0 / tl.full([], i + 1, STATE))
        squares += d * (x - mean)
        n += tl.where(k < count, 1.0, 0.0)
    n = tl.where(mask_c, n, 0.0)
    if F.ROWS:
        total = tl.sum(tl.sum(n, 1), 0)
        joint = tl.sum(tl.sum(n * mean, 1), 0) / total
        d = mean - joint
        sum_ = tl.sum(tl.sum(squares + n * d * d, 1), 0)
        at = (g.to(tl.int64) * blocks + block) * C + c
        tl.store(mean_ptr + at, joint)
        tl.store(squares_ptr + at, sum_)
    else:
        total = tl.sum(n, 0)[None, :]
        joint = tl.sum(n * mean, 0)[None, :] / total
        d = mean - joint
        sum_ = tl.sum(squares + n * d * d, 0)[None, :]
        tl.store(mean_ptr + g.to(tl.int64) * C + cols, joint, mask=mask_c)
        tl.store(squares_ptr + g.to(tl.int64) * C + cols, sum_, mask=mask_c)


@triton.jit
def _move(running_ptr, at, new, momentum, mask):
    """Move running statistics towards their new values."""
    old = tl.load(running_ptr + at, mask=mask, other=0.0).to(new.dtype)
    moved = old + tl.full([], momentum, new.dtype) * (new - old)
    tl.store(running_ptr + at, moved.to(running_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["K", "size", "groups", "parts", "eps", "momentum"])
def norm_combine_kernel(
    inputs, partial, outputs, running, K, C, L, size, groups, parts, eps: "fp64", momentum: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Combine ``parts`` partial results of every channel. WIDTH: the columns of a tile of the first kernel."""
    x_ptr, x_t, x_r = inputs
    means, sums = partial
    mean_ptr, squares_ptr, rstd_ptr = outputs
    running_mean, running_var = running
    chunks = tl.cdiv(C, BC)
    o = (tl.program_id(0) // chunks).to(tl.int64)
    cols = tl.program_id(0) % chunks * BC + tl.arange(0, BC)[None, :]
    mask_c = cols < C
    shift = tl.load(x_ptr + o * x_t + cols * (x_r if F.ROWS else 1), mask=mask_c, other=0.0).to(STATE)
    blocks = tl.cdiv(L, WIDTH) if F.ROWS else 1
    n_before = tl.zeros([1, 1], STATE)
    mean = tl.zeros([1, BC], STATE)
    squares = tl.zeros([1, BC], STATE)
    for i in range(0, parts, BR):
        part = i + tl.arange(0, BR)[:, None]
        group = part // blocks
        block = part - group * blocks
        rows = tl.minimum(K - group * size, size)
        wide = tl.minimum(L - block * WIDTH, WIDTH) if F.ROWS else 1
        n = tl.where(part < parts, (rows * wide).to(STATE), 0.0)
        mask = mask_c & (part < parts)
        at = (o * parts + part) * C + cols
        m = tl.load(means + at, mask=mask, other=0.0)
        s = tl.load(sums + at, mask=mask, other=0.0)
        total = tl.sum(n, 0)[None, :]
        here = tl.sum(n * m, 0)[None, :] / total
        d = m - here
        s_here = tl.sum(s + n * d * d, 0)[None, :]
        d_mean = here - mean
        share = total / (n_before + total)
        mean += d_mean * share
        squares += s_here + d_mean * d_mean * n_before * share
        n_before += total
    tl.store(mean_ptr + o * C + cols, mean + shift, mask=mask_c)
    tl.store(squares_ptr + o * C + cols, squares, mask=mask_c)
    var = squares / n_before + tl.full([], eps, STATE)
    root = tl.sqrt_rn(var) if var.dtype == tl.float32 else tl.sqrt(var)
    tl.store(rstd_ptr + o * C + cols, 1.0 / root, mask=mask_c)
    if running_mean is not None:
        _move(running_mean, o * C + cols, mean + shift, momentum, mask_c)
    if running_var is not None:
        _move(running_var, o * C + cols, squares / (n_before - 1.0), momentum, mask_c)


@triton.jit(do_not_specialize=["T", "rows", "n", "scale"])
def norm_gradients_kernel(
    sums, vectors, outputs, T, B, C, rows, n: "fp64", scale: "fp64", STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """See norm_gradients. rows: the partial sums of a channel."""
    by_factor, by_shift = sums
    weight_ptr, rstd_ptr = vectors
    d_weight, d_bias, offset, slope = outputs
    chunks = tl.cdiv(C, BC)
    t = tl.program_id(0) // chunks
    cols = tl.program_id(0) % chunks * BC + tl.arange(0, BC)[None, :]
    mask_c = cols < C
    factor = tl.zeros([BR, BC], STATE)
    shift = tl.zeros([BR, BC], STATE)
    for i in range(0, rows, BR):
        row = i + tl.arange(0, BR)[:, None]
        group = row // B
        at = ((group * T + t) * B + row - group * B).to(tl.int64) * C + cols
        mask = mask_c & (row < rows)
        factor += tl.load(by_factor + at, mask=mask, other=0.0)
        shift += tl.load(by_shift + at, mask=mask, other=0.0)
    factor = tl.sum(factor, 0)[None, :]
    shift = tl.sum(shift, 0)[None, :]
    at = t * C + cols
    r = tl.load(rstd_ptr + at, mask=mask_c, other=0.0)
    scaled = r * tl.full([], scale, STATE)
    if d_weight is not None:
        tl.store(d_weight + at, (factor * scaled).to(d_weight.dtype.element_ty), mask=mask_c)
    if d_bias is not None:
        tl.store(d_bias + at, shift.to(d_bias.dtype.element_ty), mask=mask_c)
    joint = scaled / tl.full([], n, STATE)
    if weight_ptr is not None:
        joint *= tl.load(weight_ptr + at, mask=mask_c, other=0.0).to(STATE)
    tl.store(offset + at, joint * shift, mask=mask_c)
    tl.store(slope + at, joint * factor * r * r, mask=mask_c)


# --- launchers: the same signatures as in cpu/norm.py ------------------------------------------------------------------------


def norm_forward(x, rows, eps, mean, squares, rstd, running, momentum, tuning):
    """Fill mean, squares, the sum of (x - mean)^2, and rstd, 1 / sqrt(variance + eps). x is not empty.

    The three are (C,), or (T, C) to have them per step. running: (mean, variance), to be moved by ``momentum``; contiguous, or
    None.

    x is (T, B, C, S) if ``rows``, else (T, B, C).
    """
    T, B, C = x.shape[:3]
    L = x.shape[3] if rows else 1
    outer, K = (T, B) if mean.dim() == 2 else (1, T * B)
    elements = tuning.elementwise_threads * 16 // x.element_size()
    BC = min(power_of_2(L if rows else C), elements)
    BR = elements // BC
    blocks = cdiv(L if rows else C, BC)
    most = max(1, tuning.sum_programs // (outer * blocks * (C if rows else 1)))  # groups
    size = cdiv(cdiv(K, min(most, cdiv(K, BR))), BR) * BR
    groups = cdiv(K, size)
    inputs = row_view(layout_of(x, x, True), x)
    parts = groups * blocks if rows else groups
    partial = torch.empty((2, outer * parts, C), dtype=mean.dtype, device=x.device).unbind()
    flags = dict(F=Flags(rows), STATE=STATES[mean.dtype])
    launch(
        norm_forward_kernel, outer * groups * blocks * (C if rows else 1), x.device, inputs, partial, K, B, C, L, size, groups,
        size // BR, BR=BR, BC=BC, num_warps=warps_of(tuning.elementwise_threads), **flags,
    )  # fmt: skip
    columns = min(32, power_of_2(C))
    launch(
        norm_combine_kernel, outer * cdiv(C, columns), x.device, inputs, partial, (mean, squares, rstd), running, K, C, L, size,
        groups, parts, eps, momentum, BR=_MERGED, BC=columns, WIDTH=BC, num_warps=warps_of(128), **flags,
    )  # fmt: skip


def norm_gradients(sums, T, B, weight, rstd, scale, n, d_weight, d_bias, offset, slope, tuning):
    """Fill the gradients of weight and bias that are given, and what the backward pass subtracts: offset and slope.

    The vectors are (C,), or (T, C). sums: partial sums of the gradients of rstd weight scale and of bias, (.., C, 1), T x B x C
    values each, any number of times. n: values per channel.
    """
    C = rstd.shape[-1]
    columns = min(32, power_of_2(C))
    sums = tuple(t.contiguous() for t in sums)
    vectors = tuple(None if t is None else t.contiguous() for t in (weight, rstd))
    launch(
        norm_gradients_kernel, T * cdiv(C, columns), rstd.device, sums, vectors, (d_weight, d_bias, offset, slope), T, B, C,
        sums[0].numel() // (T * C), float(n), scale, STATE=STATES[rstd.dtype], BR=_MERGED, BC=columns, num_warps=warps_of(128),
    )  # fmt: skip
