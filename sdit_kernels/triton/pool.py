"""Max-pooling over windows that lie side by side, in Triton; reference/pool.py defines the packed places.

A program computes some bytes of packed places, and their windows. No program waits for another, and nothing is summed.
"""

import triton
import triton.language as tl

from ..reference.pool import group_rows, per_byte
from .launch import launch
from .tiles import cdiv, power_of_2, warps_of

_SIZES = ["rows", "groups", "OH", "OW", "H", "W", "size"]


@triton.jit
def _windows(rows, groups, OH, OW, H, W, size, KH: tl.constexpr, KW: tl.constexpr, PER: tl.constexpr, BQ: tl.constexpr):
    """Return (bytes, their mask, windows, their first elements, their mask) of a program. A window has a row per code."""
    chunks = tl.cdiv(size, BQ)
    pid = tl.program_id(0)
    group = (pid // chunks).to(tl.int64)
    q = (pid % chunks) * BQ + tl.arange(0, BQ)[None, :]
    window = q + tl.arange(0, PER)[:, None] * size
    plane, top = group // groups, (group % groups) * rows
    i = window // OW
    first = (plane * H + (top + i) * KH) * W + (window - i * OW) * KW
    mask = (q < size) & (window < tl.minimum(rows, OH - top) * OW)
    return group * size + q, q < size, (plane * OH + top) * OW + window, first, mask


@triton.jit(do_not_specialize=_SIZES)
def max_pool_forward_kernel(
    x_ptr, y_ptr, codes_ptr, rows, groups, OH, OW, H, W, size,
    KH: tl.constexpr, KW: tl.constexpr, PER: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    STATE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    at, mask_at, window, first, mask = _windows(rows, groups, OH, OW, H, W, size, KH, KW, PER, BQ)
    best = tl.load(x_ptr + first, mask=mask, other=0.0).to(STATE)
    place = tl.zeros([PER, BQ], tl.int32)
    for a in tl.static_range(KH):
        for b in tl.static_range(KW):
            if a + b > 0:
                x = tl.load(x_ptr + first + (a * W + b), mask=mask, other=0.0).to(STATE)
                better = (x > best) | (x != x)
                best = tl.where(better, x, best)
                place = tl.where(better, a * KW + b, place)
    tl.store(y_ptr + window, best.to(y_ptr.dtype.element_ty), mask=mask)
    BITS: tl.constexpr = 8 // PER
    code = tl.sum(tl.where(mask, place << (tl.arange(0, PER)[:, None] * BITS), 0), 0)[None, :]
    tl.store(codes_ptr + at, code.to(tl.uint8), mask=mask_at)


@triton.jit(do_not_specialize=_SIZES)
def max_pool_backward_kernel(
    g_ptr, codes_ptr, dx_ptr, rows, groups, OH, OW, H, W, size,
    KH: tl.constexpr, KW: tl.constexpr, PER: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    at, mask_at, window, first, mask = _windows(rows, groups, OH, OW, H, W, size, KH, KW, PER, BQ)
    BITS: tl.constexpr = 8 // PER
    code = tl.load(codes_ptr + at, mask=mask_at, other=0).to(tl.int32)
    place = (code >> (tl.arange(0, PER)[:, None] * BITS)) & ((1 << BITS) - 1)
    g = tl.load(g_ptr + window, mask=mask, other=0.0)
    for a in tl.static_range(KH):
        for b in tl.static_range(KW):
            tl.store(dx_ptr + first + (a * W + b), tl.where(place == a * KW + b, g, 0.0), mask=mask)


# --- launchers: the same signatures as in cpu/pool.py -----------------------------------------------------------------------


def _launch(kernel, window, large, small, codes, tuning, *tensors):
    (planes, OH, OW), (H, W), per = small.shape, large.shape[1:], per_byte(window)
    groups, size = codes.shape[1:]
    columns = min(power_of_2(size), max(1, tuning.elementwise_threads * 4 // per))
    launch(
        kernel, planes * groups * cdiv(size, columns), large.device, *tensors, group_rows(OH, OW), groups, OH, OW, H, W, size,
        KH=window[0], KW=window[1], PER=per, BQ=columns, num_warps=warps_of(max(1, columns * per // 4)),
    )  # fmt: skip


def max_pool_forward(x, window, y, codes, tuning):
    """Fill y and codes. x: (planes, H, W), contiguous and not empty."""
    _launch(max_pool_forward_kernel, window, x, y, codes, tuning, x, y, codes)


def max_pool_backward(g, codes, window, dx, tuning):
    """Fill dx."""
    (H, W), (OH, OW) = dx.shape[1:], g.shape[1:]
    if OH * window[0] < H or OW * window[1] < W:  # some elements are in no window
        dx.zero_()
    _launch(max_pool_backward_kernel, window, dx, g, codes, tuning, g, codes, dx)
