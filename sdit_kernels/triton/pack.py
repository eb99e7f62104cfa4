"""Spikes as bits in Triton; reference/pack.py defines the packed form.

A program packs or restores a few blocks, one row of its tile each. The elements of a word's bits lie 512 bytes apart. So the
bits of a word come from one load each, and a warp reads 512 bytes of neighbouring elements at a time. Nothing is checked, and
nothing waits for the GPU: the table of integer levels has a NaN, and other values cannot occur.
"""

import torch
import triton
import triton.language as tl

from ..reference.pack import BLOCK, WORDS, bits_of, words_shape
from .launch import launch
from .tiles import cdiv, warps_of

_ROW = 512  # bytes of a row of words
_BLOCK = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["first"])
def pack_kernel(
    x_ptr, words_ptr, N, first, inverse: "fp64",
    COUNT: tl.constexpr, BINARY: tl.constexpr, BITS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    WORD: tl.constexpr = words_ptr.dtype.element_ty
    STATE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    cols = tl.arange(0, BC)[None, :]
    mask = (row * _BLOCK < N) & (cols < BC)
    unit = tl.full([], inverse, STATE)
    planes = ()
    for _ in tl.static_range(BITS):
        planes = planes + (tl.zeros([BR, BC], WORD),)
    for k in tl.static_range(_BLOCK // BC):
        at = row * _BLOCK + k * BC + cols
        x = tl.load(x_ptr + at, mask=at < N, other=0.0)
        if BINARY:
            code = (x != 0).to(WORD)
        else:
            z = x.to(STATE) * unit - first
            z = tl.where(z > 0.0, tl.where(z < COUNT - 1.0, z, COUNT - 1.0), 0.0)
            code = tl.where(x == x, (z + 0.5).to(tl.int32), COUNT - 1).to(WORD)
        total = ()
        for j in tl.static_range(BITS):
            total = total + (planes[j] | (((code >> j) & 1) << k),)
        planes = total
    for j in tl.static_range(BITS):
        tl.store(words_ptr + (row * BITS + j) * BC + cols, planes[j], mask=mask)


@triton.jit
def unpack_kernel(
    words_ptr, table_ptr, out_ptr, N, BINARY: tl.constexpr, BITS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    cols = tl.arange(0, BC)[None, :]
    mask = (row * _BLOCK < N) & (cols < BC)
    planes = ()
    for j in tl.static_range(BITS):
        planes = planes + (tl.load(words_ptr + (row * BITS + j) * BC + cols, mask=mask, other=0),)
    for k in tl.static_range(_BLOCK // BC):
        code = (planes[0] >> k) & 1
        for j in tl.static_range(1, BITS):
            code = code | (((planes[j] >> k) & 1) << j)
        at = row * _BLOCK + k * BC + cols
        if BINARY:
            x = code.to(tl.int32).to(out_ptr.dtype.element_ty)
        else:
            x = tl.load(table_ptr + code.to(tl.int32))
        tl.store(out_ptr + at, x, mask=at < N)


@triton.jit
def _windows(N, H, row_size, inner, stride, padding, BLOCK: tl.constexpr):
    """Return (elements of this program, mask, first rows and first columns of their windows)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = start // row_size
    at = (start - first_row * row_size).to(tl.int32) + tl.arange(0, BLOCK)  # 32 bits: a 64-bit division is a function call
    row = at // row_size
    top = (((first_row % H).to(tl.int32) + row) % H) * stride[0] - padding[0]
    left = ((at - row * row_size) // inner) * stride[1] - padding[1]
    elements = start + tl.arange(0, BLOCK)
    return elements, elements < N, top.to(tl.int64), left


@triton.jit(do_not_specialize=["H"])
def window_codes_kernel(
    indices_ptr, codes_ptr, N, H, row_size, inner, stride, padding, dilation, width,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    elements, mask, top, left = _windows(N, H, row_size, inner, stride, padding, BLOCK)
    index = tl.load(indices_ptr + elements, mask=mask, other=0)
    i = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(1, KH):
        i += (index >= (top + k * dilation[0]) * width).to(tl.int32)
    column = (index - (top + i * dilation[0]) * width).to(tl.int32) - left
    j = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(1, KW):
        j += (column >= k * dilation[1]).to(tl.int32)
    tl.store(codes_ptr + elements, (i * KW + j).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["H"])
def window_indices_kernel(
    codes_ptr, indices_ptr, N, H, row_size, inner, stride, padding, dilation, width,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    elements, mask, top, left = _windows(N, H, row_size, inner, stride, padding, BLOCK)
    code = tl.load(codes_ptr + elements, mask=mask, other=0).to(tl.int32)
    i = code // KW
    index = (top + i * dilation[0]) * width + left + (code - i * KW) * dilation[1]
    tl.store(indices_ptr + elements, index, mask=mask)


# --- launchers: the same signatures as in cpu/pack.py -----------------------------------------------------------------------


def _as_word(t):
    return t.view(torch.uint8) if t.dtype == torch.bool else t


def _launch(kernel, blocks, lanes, device, tuning, *args, **flags):
    rows = max(1, tuning.elementwise_threads * 16 // _ROW)
    launch(
        kernel, cdiv(blocks, rows), device, *args, **flags, BR=rows, BC=lanes, num_warps=warps_of(tuning.elementwise_threads)
    )


def pack(flat, values, tuning, parts=1):
    """Return (words, True). The elements of flat are values of the table."""
    words = torch.empty(words_shape(flat.numel(), flat.itemsize, values.n), dtype=WORDS[flat.itemsize], device=flat.device)
    _launch(
        pack_kernel, words.shape[0], words.shape[2], flat.device, tuning, _as_word(flat), words, flat.numel(), values.first,
        values.inverse, COUNT=values.n, BINARY=values.is_binary, BITS=bits_of(values.n),
    )  # fmt: skip
    return words, True


def unpack(words, values, flat, tuning):
    """Fill flat."""
    table = None if values.is_binary else _as_word(values.on(flat.device))
    _launch(
        unpack_kernel, words.shape[0], words.shape[2], flat.device, tuning, words, table, _as_word(flat), flat.numel(),
        BINARY=values.is_binary, BITS=bits_of(values.n),
    )  # fmt: skip


def pack_counts(flat, unit, tuning):
    """Return (numbers of 16 bits, True)."""
    return flat.mul(1 / unit).to(torch.int16), True


def unpack_counts(numbers, unit, flat, tuning):
    """Fill flat."""
    flat.copy_(numbers.view(flat.shape)).mul_(unit)


def _launch_windows(kernel, source, target, shape, window, tuning):
    _, H, W, inner = shape
    threads = tuning.elementwise_threads
    block = threads * 16  # 16 codes per thread
    launch(
        kernel, cdiv(source.numel(), block), source.device, source, target, source.numel(), H, W * inner, inner, window.stride,
        window.padding, window.dilation, window.width, KH=window.size[0], KW=window.size[1], BLOCK=block,
        num_warps=warps_of(threads),
    )  # fmt: skip


def window_codes(flat, shape, window, tuning):
    """Return (codes, True); see reference/pack.py."""
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    _launch_windows(window_codes_kernel, flat, codes, shape, window, tuning)
    return codes, True


def window_indices(codes, shape, window, flat, tuning):
    """Fill flat."""
    _launch_windows(window_indices_kernel, codes, flat, shape, window, tuning)
