"""Spikes as bits on the CPU. A task packs or restores one block; reference/pack.py defines the packed form.

A chunk is one or a few cache lines of words and the elements of their bits. Its accumulators stay in registers: the code is
explicit vector code, because numba computes with 64-bit integers only. Tables of up to 16 values are compared value by value.
"""

import ctypes
import functools

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..reference.pack import BLOCK, WORDS, bits_of, words_shape
from .compiler import inline
from .intrinsics import BF16, CODES, F16, F64, I32, I64, SIZES, U8, load_int, state_code, tile
from .kernel import STREAM, Kernel, share

_LINE = 64  # bytes of a vector
_ROW = 512  # bytes between the elements of two neighbouring bits of a word
_LINES = 4  # lines of words that are unpacked together, so that the elements are written in longer runs
_COMPARED = 16  # values of a table that are compared one by one


def _words(code):
    """Return (the type of a word, lanes of a vector of words, bits of a word)."""
    return ir.IntType(8 * SIZES[code]), _LINE // SIZES[code], 8 * SIZES[code]


def _splat(vector, value):
    bits = vector.element.width
    value &= (1 << bits) - 1
    return ir.Constant(vector, [value - (1 << bits) if value >> (bits - 1) else value] * vector.count)


def _broadcast(builder, value, lanes):
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(nothing, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _pointer(builder, address, vector):
    return builder.inttoptr(address, vector.as_pointer())


def _values(builder, table, word, lanes, n):
    pointer = builder.inttoptr(table, word.as_pointer())
    return [_broadcast(builder, builder.load(builder.gep(pointer, [ir.Constant(I64, c)])), lanes) for c in range(n)]


def _look_up(builder, table, codes, word, lanes):
    """Return the vector of the values of a vector of codes."""
    pointer, found = builder.inttoptr(table, word.as_pointer()), ir.Constant(ir.VectorType(word, lanes), ir.Undefined)
    for i in range(lanes):
        code = builder.zext(builder.extract_element(codes, ir.Constant(I32, i)), I64)
        found = builder.insert_element(found, builder.load(builder.gep(pointer, [code])), ir.Constant(I32, i))
    return found


def _as_float(builder, x, code, lanes):
    real = ir.VectorType(ir.DoubleType() if code == F64 else ir.FloatType(), lanes)
    if code == BF16:
        wide = ir.VectorType(I32, lanes)
        return builder.bitcast(builder.shl(builder.zext(x, wide), _splat(wide, 16)), real)
    if code == F16:
        return builder.fpext(builder.bitcast(x, ir.VectorType(ir.HalfType(), lanes)), real)
    return builder.uitofp(x, real) if code == U8 else builder.bitcast(x, real)


def _nearest_codes(builder, x, first, inverse, code, lanes, n):
    """Return the codes, as 32-bit integers, of the multiples of a unit that lie nearest to x. A NaN has the last code."""
    x = _as_float(builder, x, code, lanes)
    real, wide = x.type, ir.VectorType(I32, lanes)
    if real.element != ir.DoubleType():
        first, inverse = (builder.fptrunc(value, real.element) for value in (first, inverse))
    low = _broadcast(builder, first, lanes)
    z = builder.fmul(x, _broadcast(builder, inverse, lanes))
    z = builder.fsub(z, low)
    last = ir.Constant(real, [float(n - 1)] * lanes)
    z = builder.select(builder.fcmp_ordered(">", z, ir.Constant(real, [0.0] * lanes)), z, ir.Constant(real, [0.0] * lanes))
    z = builder.select(builder.fcmp_ordered("<", z, last), z, last)
    suffix = "f64" if real.element == ir.DoubleType() else "f32"
    rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(real, [real]), f"llvm.rint.v{lanes}{suffix}")
    codes = builder.fptosi(builder.call(rint, [z]), wide)
    return builder.select(builder.fcmp_unordered("uno", x, x), _splat(wide, n - 1), codes)


def _has_bit(builder, words, bit):
    return builder.icmp_unsigned("!=", builder.and_(words, bit), _splat(words.type, 0))


def _any(builder, masks):
    return functools.reduce(builder.or_, masks)


def _each_bit(builder, W, unrolled):
    """Yield the number k of each bit of a word, as an int or, in a loop that is not unrolled, as a 64-bit integer."""
    if unrolled:
        yield from range(W)
    else:
        with cgutils.for_range(builder, ir.Constant(I64, W)) as loop:
            yield loop.index


def _bit(builder, vector, k):
    """Return a vector with only bit k set in each word."""
    if isinstance(k, int):
        return _splat(vector, 1 << k)
    width = vector.element.width
    k = k if width == 64 else builder.trunc(k, vector.element)
    return _broadcast(builder, builder.shl(ir.Constant(vector.element, 1), k), vector.count)


def _row(builder, address, k):
    offset = ir.Constant(I64, k * _ROW) if isinstance(k, int) else builder.mul(k, ir.Constant(I64, _ROW))
    return builder.add(address, offset)


@intrinsic(prefer_literal=True)
def _pack_chunk(typingctx, x, words, table, first, inverse, code, n):
    """Write a line of words of each bit. Return 1 if an element is not a value of the table, else 0."""
    code_, n_ = code.literal_value, n.literal_value

    def codegen(context, builder, signature, args):
        x, words, table, first, inverse = args[:5]
        word, lanes, W = _words(code_)
        vector, bits = ir.VectorType(word, lanes), bits_of(n_)
        values = _values(builder, table, word, lanes, n_) if n_ <= _COMPARED else None
        zero = _splat(vector, 0)
        planes = [cgutils.alloca_once_value(builder, zero) for _ in range(bits)]
        unknown = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(ir.IntType(1), lanes), [0] * lanes))
        for memory in planes:  # the entry block has stored the value once, but a chunk is one of many
            builder.store(zero, memory)
        builder.store(ir.Constant(ir.VectorType(ir.IntType(1), lanes), [0] * lanes), unknown)
        for k in _each_bit(builder, W, values):
            elements = builder.load(_pointer(builder, _row(builder, x, k), vector), align=SIZES[code_])
            if values:
                equal = [builder.icmp_unsigned("==", elements, value) for value in values]
                masks = [_any(builder, [e for c, e in enumerate(equal) if c >> j & 1]) for j in range(bits)]
                other = builder.not_(_any(builder, equal))
            else:
                codes = _nearest_codes(builder, elements, first, inverse, code_, lanes, n_)
                masks = [_has_bit(builder, codes, _splat(codes.type, 1 << j)) for j in range(bits)]
                other = builder.icmp_unsigned("!=", elements, _look_up(builder, table, codes, word, lanes))
            builder.store(builder.or_(builder.load(unknown), other), unknown)
            one = _bit(builder, vector, k)
            for memory, mask in zip(planes, masks):
                builder.store(builder.or_(builder.load(memory), builder.select(mask, one, zero)), memory)
        for j, memory in enumerate(planes):
            builder.store(builder.load(memory), _pointer(builder, _row(builder, words, j), vector), align=SIZES[code_])
        any_ = builder.bitcast(builder.load(unknown), ir.IntType(lanes))
        return builder.zext(builder.icmp_unsigned("!=", any_, ir.Constant(any_.type, 0)), I64)

    return types.int64(types.int64, types.int64, types.int64, types.float64, types.float64, code, n), codegen


@intrinsic(prefer_literal=True)
def _unpack_chunk(typingctx, words, table, out, nontemporal, code, n):
    """Write the elements of _LINES lines of words. nontemporal: past the caches; ``out`` is then a multiple of 64."""
    code_, n_, nontemporal_ = code.literal_value, n.literal_value, nontemporal.literal_value

    def codegen(context, builder, signature, args):
        words, table, out = args[:3]
        word, lanes, W = _words(code_)
        vector, bits = ir.VectorType(word, lanes), bits_of(n_)

        def place(row, i):
            return _pointer(builder, builder.add(row, ir.Constant(I64, i * _LINE)), vector)

        rows = [_row(builder, words, j) for j in range(bits)]
        planes = [[builder.load(place(row, i), align=SIZES[code_]) for row in rows] for i in range(_LINES)]
        values = _values(builder, table, word, lanes, n_) if n_ <= _COMPARED else None
        for k in _each_bit(builder, W, False):
            row, one = _row(builder, out, k), _bit(builder, vector, k)
            for i, line in enumerate(planes):
                masks = [_has_bit(builder, plane, one) for plane in line]
                if values:
                    found = values + values[:1] * ((1 << bits) - n_)
                    for mask in masks:
                        found = [builder.select(mask, b, a) for a, b in zip(found[::2], found[1::2])]
                    elements = found[0]
                else:
                    wide = ir.VectorType(I32, lanes)
                    codes = [builder.select(mask, _splat(wide, 1 << j), _splat(wide, 0)) for j, mask in enumerate(masks)]
                    elements = _look_up(builder, table, _any(builder, codes), word, lanes)
                stored = builder.store(elements, place(row, i), align=_LINE if nontemporal_ else SIZES[code_])
                if nontemporal_:
                    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, nontemporal, code, n), codegen


@intrinsic(prefer_literal=True)
def _copy_element(typingctx, target, i, source, j, code):
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        target, i, source, j, _ = args
        pointer = ir.IntType(8 * SIZES[code_]).as_pointer()
        x = builder.load(builder.gep(builder.inttoptr(source, pointer), [j]))
        builder.store(x, builder.gep(builder.inttoptr(target, pointer), [i]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, code), codegen


@intrinsic
def _set_flag(typingctx, address):
    def codegen(context, builder, signature, args):
        builder.store(ir.Constant(I64, 1), builder.inttoptr(args[0], I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _load_byte(typingctx, address, i):
    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return builder.zext(builder.load(builder.gep(pointer, [args[1]])), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _store_integer(typingctx, address, i, value, itemsize):
    """Write the lowest bytes of a 64-bit integer."""
    word = ir.IntType(8 * itemsize.literal_value)

    def codegen(context, builder, signature, args):
        value = args[2] if word == I64 else builder.trunc(args[2], word)
        builder.store(value, builder.gep(builder.inttoptr(args[0], word.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, itemsize), codegen


@functools.cache
def _pack_kernel(X, n):
    size, S, bits = SIZES[X], state_code(X), bits_of(n)

    def pack(part, N, steps, x, table, words, flag, first, inverse):
        blocks = (N + BLOCK - 1) // BLOCK
        for place in share(blocks, part):  # the first block of every step, then the second of every step, ..
            task = place % steps * (blocks // steps) + place // steps
            source, target = x + task * BLOCK * size, words + task * bits * _ROW
            rest = N - task * BLOCK
            if rest < BLOCK:
                padded = tile(BLOCK, S)
                for i in range(rest):
                    _copy_element(padded, i, source, i, X)
                for i in range(rest, BLOCK):
                    _copy_element(padded, i, table, 0, X)
                source = padded
            wrong = 0
            for line in range(0, _ROW, _LINE):
                wrong |= _pack_chunk(source + line, target + line, table, first, inverse, X, n)
            if wrong != 0:
                _set_flag(flag)

    return Kernel(pack, f"pack_{X}_{n}")


@functools.cache
def _unpack_kernel(X, n, nontemporal):
    size, S, bits = SIZES[X], state_code(X), bits_of(n)

    def unpack(part, N, words, table, out):
        for task in share((N + BLOCK - 1) // BLOCK, part):
            source, target = words + task * bits * _ROW, out + task * BLOCK * size
            rest = N - task * BLOCK
            if rest < BLOCK:
                padded = tile(BLOCK, S)
                for line in range(0, _ROW, _LINES * _LINE):
                    _unpack_chunk(source + line, table, padded + line, 0, X, n)
                for i in range(rest):
                    _copy_element(target, i, padded, i, X)
            else:
                for line in range(0, _ROW, _LINES * _LINE):
                    _unpack_chunk(source + line, table, target + line, nontemporal, X, n)

    return Kernel(unpack, f"unpack_{X}_{n}_{nontemporal}")


@inline
def _code_run(indices, codes, at, n, top, left, step, dilation, width, KH, KW):
    """Write the codes of n indices, whose windows start at the columns left, left + step, .. Return 0 if all are right."""
    wrong = 0
    for c in range(n):
        index, i, j = load_int(indices, at + c), 0, 0
        for k in range(1, KH):
            i += index >= (top + k * dilation[0]) * width
        start = (top + i * dilation[0]) * width + left + c * step
        for k in range(1, KW):
            j += index >= start + k * dilation[1]
        wrong |= index - start - j * dilation[1]
        _store_integer(codes, at + c, i * KW + j, 1)
    return wrong


@inline
def _index_run(codes, indices, at, n, top, left, step, dilation, width, KH, KW):
    for c in range(n):
        code, i = _load_byte(codes, at + c), 0
        for k in range(1, KH):
            i += code >= k * KW
        index = (top + i * dilation[0]) * width + left + c * step + (code - i * KW) * dilation[1]
        _store_integer(indices, at + c, index, 8)


@functools.cache
def _window_codes_kernel(KH, KW):
    def window_codes(part, rows, shape, indices, codes, flag, stride, padding, dilation, width):
        H, W, inner = shape
        wrong = 0
        for row in share(rows, part):
            top, left, at = (row % H) * stride[0] - padding[0], -padding[1], row * W * inner
            if inner == 1:
                wrong |= _code_run(indices, codes, at, W, top, left, stride[1], dilation, width, KH, KW)
            else:
                for w in range(W):
                    first = left + w * stride[1]
                    wrong |= _code_run(indices, codes, at + w * inner, inner, top, first, 0, dilation, width, KH, KW)
        if wrong != 0:
            _set_flag(flag)

    return Kernel(window_codes, f"window_codes_{KH}_{KW}")


@functools.cache
def _window_indices_kernel(KH, KW):
    def window_indices(part, rows, shape, codes, indices, stride, padding, dilation, width):
        H, W, inner = shape
        for row in share(rows, part):
            top, left, at = (row % H) * stride[0] - padding[0], -padding[1], row * W * inner
            if inner == 1:
                _index_run(codes, indices, at, W, top, left, stride[1], dilation, width, KH, KW)
            else:
                for w in range(W):
                    first = left + w * stride[1]
                    _index_run(codes, indices, at + w * inner, inner, top, first, 0, dilation, width, KH, KW)

    return Kernel(window_indices, f"window_indices_{KH}_{KW}")


# --- launchers --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _packing(values):
    """Return (the dtype of words, their shape in a block, the kernel that packs, arguments of it)."""
    dtype = values.table.dtype
    _, *shape = words_shape(1, dtype.itemsize, values.n)
    kernel = _pack_kernel(CODES[dtype], values.n).prepared(0, 0, 0, 0, 0, 0, 0.0, 0.0)
    return WORDS[dtype.itemsize], shape, kernel, values.table.data_ptr(), float(values.first), values.inverse


@functools.lru_cache(maxsize=256)
def _unpacking(values, past_caches):
    """Return (the kernel that unpacks, the address of its table)."""
    kernel = _unpack_kernel(CODES[values.table.dtype], values.n, past_caches).prepared(0, 0, 0, 0)
    return kernel, values.table.data_ptr()


def pack(flat, values, tuning, steps=1):
    """Return (words, True if each element of flat is one of the values bit for bit).

    steps: of flat, if each thread has written all steps of a part of it; then it finds this part in its caches.
    """
    word, shape, run, table, first, inverse = _packing(values)
    n = flat.numel()
    words = torch.empty((-(-n // BLOCK), *shape), dtype=word, device="cpu")
    wrong = ctypes.c_int64()
    steps = steps if n % (steps * BLOCK) == 0 else 1
    run(n, (n, steps, flat.data_ptr(), table, words.data_ptr(), ctypes.addressof(wrong), first, inverse))
    return words, not wrong.value


def unpack(words, values, flat, tuning):
    """Fill flat."""
    n, out = flat.numel(), flat.data_ptr()
    run, table = _unpacking(values, int(n * flat.itemsize >= STREAM and out % _LINE == 0))
    run(n, (n, words.data_ptr(), table, out))


def window_codes(flat, shape, window, tuning):
    """Return (codes, True if all indices are in their windows); see reference/pack.py."""
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    wrong = ctypes.c_int64()
    _window_codes_kernel(*window.size)(
        flat.numel(), shape[0] * shape[1], shape[1:], flat.data_ptr(), codes.data_ptr(), ctypes.addressof(wrong), *window[1:]
    )
    return codes, not wrong.value


def window_indices(codes, shape, window, flat, tuning):
    """Fill flat."""
    _window_indices_kernel(*window.size)(
        flat.numel(), shape[0] * shape[1], shape[1:], codes.data_ptr(), flat.data_ptr(), *window[1:]
    )
