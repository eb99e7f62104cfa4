"""Spikes as bits on the CPU. A task packs or restores one block; reference/pack.py defines the packed form.

A chunk is one or a few cache lines of words and the elements of their bits. Its accumulators stay in registers: the code is
explicit vector code, because numba computes with 64-bit integers only. Tables of up to 16 values are compared value by value.
Larger ones are computed if they are exact multiples of a power of two, and otherwise looked up; to pack, from 4 values on.
"""

import ctypes
import functools
import math

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..reference.pack import BLOCK, WORDS, bits_of, words_shape
from .compiler import inline
from .intrinsics import BF16, CODES, F16, F32, F64, I32, I64, SIZES, U8, fetch_line, load_int, state_code, tile
from .kernel import STREAM, Kernel, share

_LINE = 64  # bytes of a vector
_ROW = 512  # bytes between the elements of two neighbouring bits of a word
_LINES = 4  # lines of words that are unpacked together, so that the elements are written in longer runs
_COMPARED = 16  # values of a table that are compared one by one
_AHEAD = 1 << 14  # bytes from the elements that are packed to those that come to the L2 cache meanwhile
_COMPUTED = 4  # values of the smallest table that the packing kernel computes
_COUNTED = 16  # elements of a vector of counts


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


def _multiples_of(builder, codes, first, unit, code):
    """Return the bits of the vector of (codes + first) * unit."""
    real = ir.VectorType(ir.DoubleType() if code == F64 else ir.FloatType(), codes.type.count)
    if code == F32:
        first, unit = (builder.fptrunc(value, real.element) for value in (first, unit))
    first, unit = (_broadcast(builder, value, real.count) for value in (first, unit))
    found = builder.fmul(builder.fadd(builder.sitofp(codes, real), first), unit)
    return builder.bitcast(found, ir.VectorType(ir.IntType(8 * SIZES[code]), real.count))


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


def _codes_in_mantissa(builder, elements, first, inverse, table, n, nan, code):
    """Return (integers whose lowest bits are the codes, a mask of the elements that are not values of a computed table).

    A float32 from 2^23 to 2^24, a float64 from 2^52 to 2^53, has the lowest bits of its integer. nan: the last value is NaN.
    """
    count = elements.type.count
    real = ir.VectorType(ir.DoubleType() if code == F64 else ir.FloatType(), count)

    def each(value):
        return _broadcast(builder, value if code == F64 else builder.fptrunc(value, real.element), count)

    double = ir.DoubleType()
    magic = ir.Constant(double, 2.0 ** (52 if code == F64 else 23))
    unit = builder.fdiv(ir.Constant(double, 1.0), inverse)
    last = builder.fadd(first, ir.Constant(double, float(n - 1 - nan)))
    low, high = each(builder.fmul(first, unit)), each(builder.fmul(last, unit))
    shift = each(builder.fsub(magic, first))
    x = builder.bitcast(elements, real)
    x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
    x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    moved = builder.fadd(builder.fmul(x, each(inverse)), shift)
    found = builder.bitcast(builder.fmul(builder.fsub(moved, shift), each(unit)), elements.type)
    codes, other = builder.bitcast(moved, elements.type), builder.icmp_unsigned("!=", elements, found)
    if nan:
        pointer = builder.inttoptr(table, elements.type.element.as_pointer())
        value = _broadcast(builder, builder.load(builder.gep(pointer, [ir.Constant(I64, n - 1)])), count)
        is_nan = builder.icmp_unsigned("==", elements, value)
        codes = builder.select(is_nan, _splat(elements.type, n - 1), codes)
        other = builder.and_(other, builder.not_(is_nan))
    return codes, other


def _moved_bit(builder, codes, j, k):
    """Return words with bit j of the codes as bit k, and no other bit."""
    amount = _splat(codes.type, abs(k - j))
    moved = builder.shl(codes, amount) if k > j else builder.lshr(codes, amount)
    return builder.and_(moved, _splat(codes.type, 1 << k))


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
def _pack_chunk(typingctx, x, words, table, first, inverse, code, n, linear):
    """Write a line of words of each bit. Return 1 if an element is not a value of the table, else 0.

    linear: 0: the values are compared or looked up; 1: they are computed; 2: all are computed except the last, NaN.
    """
    code_, n_, linear_ = code.literal_value, n.literal_value, linear.literal_value

    def codegen(context, builder, signature, args):
        x, words, table, first, inverse = args[:5]
        word, lanes, W = _words(code_)
        vector, bits = ir.VectorType(word, lanes), bits_of(n_)
        values = _values(builder, table, word, lanes, n_) if n_ <= _COMPARED and not linear_ else None
        zero = _splat(vector, 0)
        planes = [cgutils.alloca_once_value(builder, zero) for _ in range(bits)]
        unknown = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(ir.IntType(1), lanes), [0] * lanes))
        for memory in planes:  # the entry block has stored the value once, but a chunk is one of many
            builder.store(zero, memory)
        builder.store(ir.Constant(ir.VectorType(ir.IntType(1), lanes), [0] * lanes), unknown)
        for k in _each_bit(builder, W, values or linear_):
            row = _row(builder, x, k)
            elements = builder.load(_pointer(builder, row, vector), align=SIZES[code_])
            fetch_line(builder, builder.add(row, ir.Constant(I64, _AHEAD)))
            if linear_:
                codes, other = _codes_in_mantissa(builder, elements, first, inverse, table, n_, linear_ == 2, code_)
                for j, memory in enumerate(planes):
                    builder.store(builder.or_(builder.load(memory), _moved_bit(builder, codes, j, k)), memory)
                builder.store(builder.or_(builder.load(unknown), other), unknown)
                continue
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

    return types.int64(types.int64, types.int64, types.int64, types.float64, types.float64, code, n, linear), codegen


@intrinsic(prefer_literal=True)
def _unpack_chunk(typingctx, words, table, out, first, unit, nontemporal, code, n, linear):
    """Write the elements of _LINES lines of words. nontemporal: past the caches; ``out`` is then a multiple of 64."""
    code_, n_, nontemporal_, linear_ = (t.literal_value for t in (code, n, nontemporal, linear))

    def codegen(context, builder, signature, args):
        words, table, out, first, unit = args[:5]
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
                    codes = _any(builder, codes)
                    if linear_:
                        elements = _multiples_of(builder, codes, first, unit, code_)
                    else:
                        elements = _look_up(builder, table, codes, word, lanes)
                stored = builder.store(elements, place(row, i), align=_LINE if nontemporal_ else SIZES[code_])
                if nontemporal_:
                    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    kinds = types.int64, types.int64, types.int64, types.float64, types.float64, nontemporal, code, n, linear
    return types.void(*kinds), codegen


@intrinsic(prefer_literal=True)
def _count_chunk(typingctx, x, numbers, unit, inverse, code):
    """Write _COUNTED elements divided by unit, in 16 bits each. Return 1 if an element is not such a multiple, else 0."""
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        x, numbers, unit, inverse = args[:4]
        real = ir.VectorType(ir.DoubleType() if code_ == F64 else ir.FloatType(), _COUNTED)
        word, wide = ir.VectorType(ir.IntType(8 * SIZES[code_]), _COUNTED), ir.VectorType(I32, _COUNTED)
        elements = builder.load(_pointer(builder, x, real), align=SIZES[code_])
        factor = inverse if code_ == F64 else builder.fptrunc(inverse, real.element)
        z = builder.fmul(elements, _broadcast(builder, factor, _COUNTED))
        for sign, bound in ((">", 0.0), ("<", 32767.0)):
            bound = ir.Constant(real, [bound] * _COUNTED)
            z = builder.select(builder.fcmp_ordered(sign, z, bound), z, bound)
        codes = builder.fptosi(z, wide)
        found = _multiples_of(builder, codes, ir.Constant(unit.type, 0.0), unit, code_)
        pointer = _pointer(builder, numbers, ir.VectorType(ir.IntType(16), _COUNTED))
        builder.store(builder.trunc(codes, pointer.type.pointee), pointer, align=2)
        wrong = builder.bitcast(builder.icmp_unsigned("!=", builder.bitcast(elements, word), found), ir.IntType(_COUNTED))
        return builder.zext(builder.icmp_unsigned("!=", wrong, ir.Constant(wrong.type, 0)), I64)

    return types.int64(types.int64, types.int64, types.float64, types.float64, code), codegen


@intrinsic(prefer_literal=True)
def _multiple_chunk(typingctx, numbers, x, unit, code):
    """Write _COUNTED numbers of 16 bits times unit."""
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        numbers, x, unit = args[:3]
        wide = ir.VectorType(I32, _COUNTED)
        codes = builder.load(_pointer(builder, numbers, ir.VectorType(ir.IntType(16), _COUNTED)), align=2)
        found = _multiples_of(builder, builder.zext(codes, wide), ir.Constant(unit.type, 0.0), unit, code_)
        builder.store(found, _pointer(builder, x, found.type), align=SIZES[code_])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64, code), codegen


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
def _pack_kernel(X, n, linear):
    size, S, bits = SIZES[X], state_code(X), bits_of(n)

    def pack(part, N, parts, x, table, words, flag, first, inverse):
        blocks = (N + BLOCK - 1) // BLOCK
        for place in share(blocks, part):  # the first block of every part, then the second of every part, ..
            task = place % parts * (blocks // parts) + place // parts
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
                wrong |= _pack_chunk(source + line, target + line, table, first, inverse, X, n, linear)
            if wrong != 0:
                _set_flag(flag)

    return Kernel(pack, f"pack_{X}_{n}_{linear}")


@functools.cache
def _unpack_kernel(X, n, nontemporal, linear):
    size, S, bits = SIZES[X], state_code(X), bits_of(n)

    def unpack(part, N, words, table, out, first, unit):
        for task in share((N + BLOCK - 1) // BLOCK, part):
            source, target = words + task * bits * _ROW, out + task * BLOCK * size
            rest = N - task * BLOCK
            if rest < BLOCK:
                padded = tile(BLOCK, S)
                for line in range(0, _ROW, _LINES * _LINE):
                    _unpack_chunk(source + line, table, padded + line, first, unit, 0, X, n, linear)
                for i in range(rest):
                    _copy_element(target, i, padded, i, X)
            else:
                for line in range(0, _ROW, _LINES * _LINE):
                    _unpack_chunk(source + line, table, target + line, first, unit, nontemporal, X, n, linear)

    return Kernel(unpack, f"unpack_{X}_{n}_{nontemporal}_{linear}")


@functools.cache
def _counts_kernel(X):
    size = SIZES[X]

    def pack_counts(part, N, x, numbers, flag, unit, inverse):
        wrong = 0
        for task in share((N + BLOCK - 1) // BLOCK, part):
            first, last = task * BLOCK, min(N, (task + 1) * BLOCK)
            whole = last - last % _COUNTED
            for i in range(first, whole, _COUNTED):
                wrong |= _count_chunk(x + i * size, numbers + i * 2, unit, inverse, X)
            if whole < last:
                some, found = tile(_COUNTED, F64), tile(_COUNTED, F32)
                for i in range(_COUNTED):
                    _copy_element(some, i, x, min(whole + i, N - 1), X)
                wrong |= _count_chunk(some, found, unit, inverse, X)
                for i in range(last - whole):
                    _copy_element(numbers, whole + i, found, i, F16)
        if wrong != 0:
            _set_flag(flag)

    return Kernel(pack_counts, f"pack_counts_{X}")


@functools.cache
def _multiples_kernel(X):
    size = SIZES[X]

    def unpack_counts(part, N, numbers, x, unit):
        for task in share((N + BLOCK - 1) // BLOCK, part):
            first, last = task * BLOCK, min(N, (task + 1) * BLOCK)
            whole = last - last % _COUNTED
            for i in range(first, whole, _COUNTED):
                _multiple_chunk(numbers + i * 2, x + i * size, unit, X)
            if whole < last:
                some, found = tile(_COUNTED, F32), tile(_COUNTED, F64)
                for i in range(_COUNTED):
                    _copy_element(some, i, numbers, min(whole + i, N - 1), F16)
                _multiple_chunk(some, found, unit, X)
                for i in range(last - whole):
                    _copy_element(x, whole + i, found, i, X)

    return Kernel(unpack_counts, f"unpack_counts_{X}")


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


def _are_multiples(values):
    """True if the values, except NaN, are exact multiples of a power of two, and float32 or float64."""
    unit, dtype = 1 / values.inverse, values.table.dtype
    if CODES[dtype] not in (F32, F64) or math.frexp(unit)[0] != 0.5:
        return False
    found = torch.arange(values.first, values.last + 1, dtype=dtype, device="cpu") * unit
    return torch.equal(values.table[: len(found)], found)


@functools.lru_cache(maxsize=256)
def _packing(values):
    """Return (the dtype of words, their shape in a block, the kernel that packs, arguments of it)."""
    dtype = values.table.dtype
    _, *shape = words_shape(1, dtype.itemsize, values.n)
    linear = 1 + values.nan if values.n >= _COMPUTED and _are_multiples(values) else 0
    kernel = _pack_kernel(CODES[dtype], values.n, linear).prepared(0, 0, 0, 0, 0, 0, 0.0, 0.0)
    return WORDS[dtype.itemsize], shape, kernel, values.table.data_ptr(), float(values.first), values.inverse


@functools.lru_cache(maxsize=256)
def _unpacking(values, past_caches):
    """Return (the kernel that unpacks, the address of its table, arguments of it)."""
    linear = int(values.n > _COMPARED and not values.nan and _are_multiples(values))
    kernel = _unpack_kernel(CODES[values.table.dtype], values.n, past_caches, linear)
    return kernel.prepared(0, 0, 0, 0, 0.0, 0.0), values.table.data_ptr(), float(values.first), 1 / values.inverse


def pack(flat, values, tuning, parts=1):
    """Return (words, True if each element of flat is one of the values bit for bit).

    parts: equal parts of flat, of which each thread has written its share; then it finds this share in its caches.
    """
    word, shape, run, table, first, inverse = _packing(values)
    n = flat.numel()
    words = torch.empty((-(-n // BLOCK), *shape), dtype=word, device="cpu")
    wrong = ctypes.c_int64()
    parts = parts if n % (parts * BLOCK) == 0 else 1
    run(n, (n, parts, flat.data_ptr(), table, words.data_ptr(), ctypes.addressof(wrong), first, inverse))
    return words, not wrong.value


def unpack(words, values, flat, tuning):
    """Fill flat."""
    n, out = flat.numel(), flat.data_ptr()
    run, table, first, unit = _unpacking(values, int(n * flat.itemsize >= STREAM and out % _LINE == 0))
    run(n, (n, words.data_ptr(), table, out, first, unit))


def pack_counts(flat, unit, tuning):
    """Return (the elements divided by unit, in 16 bits, True if each is such a multiple from 0 to 32,767 bit for bit).

    unit: a power of two. flat is float32 or float64.
    """
    numbers, wrong = torch.empty(flat.shape, dtype=torch.int16, device="cpu"), ctypes.c_int64()
    _counts_kernel(CODES[flat.dtype])(
        flat.numel(), flat.numel(), flat.data_ptr(), numbers.data_ptr(), ctypes.addressof(wrong), float(unit), 1 / unit
    )
    return numbers, not wrong.value


def unpack_counts(numbers, unit, flat, tuning):
    """Fill flat."""
    n = flat.numel()
    _multiples_kernel(CODES[flat.dtype])(n, n, numbers.data_ptr(), flat.data_ptr(), float(unit))


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
