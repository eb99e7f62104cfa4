"""Basic operations of all CPU kernels: typed loads and stores at an address, stack arrays ("tiles"), exponentials.

A kernel takes addresses and sizes (integers) and constants (floats), never arrays. So a call costs half a microsecond, LLVM
knows that the stack arrays do not alias the pointers, and bf16 does not need an array type, which numpy lacks. A storage code
is a small integer that stands for a dtype in memory. The state type of a code is float64 for F64, otherwise float32.
"""

import math

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiler import inline

F32, F64, BF16, F16, U8 = range(5)
CODES = {
    torch.float32: F32,
    torch.float64: F64,
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.uint8: U8,
    torch.bool: U8,
    torch.int8: U8,  # only written, by store_level
}
SIZES = (4, 8, 2, 2, 1)
LLVM_TYPES = (ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.HalfType(), ir.IntType(8))
I32, I64 = ir.IntType(32), ir.IntType(64)


def state_code(code: int) -> int:
    return F64 if code == F64 else F32


def _state_type(code):
    return types.float64 if code == F64 else types.float32


def _element(builder, address, index, code):
    return builder.gep(builder.inttoptr(address, LLVM_TYPES[code].as_pointer()), [index])


def _mark(builder, instruction, kind):
    """Add alias metadata with the scope "inputs", so that LLVM knows that two accesses do not overlap."""
    scope = builder.module.add_metadata(["inputs", builder.module.add_metadata(["sdit_kernels"])])
    instruction.set_metadata(kind, builder.module.add_metadata([scope]))


def _load(context, builder, args, code, kind=None):
    x = builder.load(_element(builder, args[0], args[1], code))
    if kind:
        _mark(builder, x, kind)
    if code == BF16:
        return builder.bitcast(builder.shl(builder.zext(x, I32), ir.Constant(I32, 16)), ir.FloatType())
    if code == F16:
        return builder.fpext(x, ir.FloatType())
    return builder.uitofp(x, ir.FloatType()) if code == U8 else x


@intrinsic(prefer_literal=True)
def load(typingctx, address, index, code):
    """Load element ``index`` of the array at ``address``, in the state type."""
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        return _load(context, builder, args, code_)

    return _state_type(code_)(types.int64, types.int64, code), codegen


@intrinsic(prefer_literal=True)
def load_input(typingctx, address, index, code):
    """Load from an array that no ``store_output`` of the kernel writes, as ``load`` does.

    Without this promise, LLVM's vectoriser compares all pairs of arrays. It gives up on loops with many arrays.
    """
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        return _load(context, builder, args, code_, "alias.scope")

    return _state_type(code_)(types.int64, types.int64, code), codegen


def _store(context, builder, args, code, kind=None):
    x = args[2]
    if code == BF16:
        bits = builder.bitcast(x, I32)
        high = builder.lshr(bits, ir.Constant(I32, 16))
        bias = builder.add(ir.Constant(I32, 0x7FFF), builder.and_(high, ir.Constant(I32, 1)))
        even = builder.lshr(builder.add(bits, bias), ir.Constant(I32, 16))
        # A NaN becomes another value only if its upper 17 mantissa bits are ones. Arithmetic never creates this NaN, and a
        # test for it would cost a tenth of the time.
        x = builder.trunc(even, ir.IntType(16))
    elif code == F16:
        x = builder.fptrunc(x, ir.HalfType())
    elif code == U8:
        x = builder.fptoui(x, ir.IntType(8))
    written = builder.store(x, _element(builder, args[0], args[1], code))
    if kind:
        _mark(builder, written, kind)
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def store_output(typingctx, address, index, value, code):
    """Store to an array that no ``load_input`` of the kernel reads, as ``store`` does."""
    code_ = code.literal_value
    value_type = value if code_ == U8 else _state_type(code_)

    def codegen(context, builder, signature, args):
        return _store(context, builder, args, code_, "noalias")

    return types.void(types.int64, types.int64, value_type, code), codegen


@intrinsic
def load_int(typingctx, address, index):
    """Load element ``index`` of an array of int64."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], I64.as_pointer()), [args[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def store(typingctx, address, index, value, code):
    """Round ``value`` (state type) to the storage type, to nearest with ties to even, and write it."""
    code_ = code.literal_value
    value_type = value if code_ == U8 else _state_type(code_)

    def codegen(context, builder, signature, args):
        return _store(context, builder, args, code_)

    return types.void(types.int64, types.int64, value_type, code), codegen


_ONE_BITS = (0x3F800000, 0x3FF0000000000000, 0x3F80, 0x3C00, 1)


@intrinsic(prefer_literal=True)
def store_spike(typingctx, address, index, fired, code):
    """Write one or zero. It selects an integer, so the vectoriser does not see a rounding."""
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        bits = ir.IntType(8 * SIZES[code_])
        pointer = builder.gep(builder.inttoptr(args[0], bits.as_pointer()), [args[1]])
        fired_ = builder.trunc(args[2], ir.IntType(1)) if args[2].type.width > 1 else args[2]
        builder.store(builder.select(fired_, ir.Constant(bits, _ONE_BITS[code_]), ir.Constant(bits, 0)), pointer)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.boolean, code), codegen


@intrinsic(prefer_literal=True)
def store_level(typingctx, address, index, value, code):
    """As ``store``, and an integer of either sign fits U8, as a byte of uint8 or int8. A NaN becomes the byte 0."""
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        address, index, x, _ = args
        if code_ != U8:
            return _store(context, builder, args, code_)
        x = builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(x.type, 0.0), x)
        byte = builder.trunc(builder.fptosi(x, I32), ir.IntType(8))
        builder.store(byte, _element(builder, address, index, code_))
        return context.get_dummy_value()

    value_type = value if code_ == U8 else _state_type(code_)
    return types.void(types.int64, types.int64, value_type, code), codegen


@intrinsic(prefer_literal=True)
def tile(typingctx, elements, code):
    """Return the address of an uninitialised stack array of the state type, a tile."""
    count, state = elements.literal_value, _state_type(code.literal_value)

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            array = builder.alloca(ir.ArrayType(context.get_data_type(state), count))
            array.align = 64
        return builder.ptrtoint(array, I64)

    return types.int64(elements, code), codegen


@intrinsic(prefer_literal=True)
def num(typingctx, value, code):
    """Round a float64 constant once to the state type."""
    state = _state_type(code.literal_value)

    def codegen(context, builder, signature, args):
        return args[0] if state == types.float64 else builder.fptrunc(args[0], ir.FloatType())

    return state(types.float64, code), codegen


@intrinsic(prefer_literal=True)
def nums(typingctx, values, code):
    """Round each float64 of a tuple once to the state type."""
    state, n = _state_type(code.literal_value), len(values)

    def codegen(context, builder, signature, args):
        found = cgutils.unpack_tuple(builder, args[0], n)
        if state != types.float64:
            found = [builder.fptrunc(x, ir.FloatType()) for x in found]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(state, n)(values, code), codegen


def _row(builder, address, stride, i):
    return builder.add(address, builder.mul(stride, ir.Constant(I64, i)))


@intrinsic(prefer_literal=True)
def load_rows(typingctx, address, index, rows, stride, code):
    """Return element ``index`` of each of ``rows`` tiles as a tuple. The tiles lie ``stride`` bytes apart."""
    state, n, code_ = _state_type(code.literal_value), rows.literal_value, code.literal_value

    def codegen(context, builder, signature, args):
        address, index, _, stride, _ = args
        found = [_load(context, builder, (_row(builder, address, stride, i), index), code_) for i in range(n)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(state, n)(types.int64, types.int64, rows, types.int64, code), codegen


@intrinsic(prefer_literal=True)
def store_rows(typingctx, address, index, values, stride, code):
    """Store each value of a tuple to element ``index`` of a tile. The tiles lie ``stride`` bytes apart."""
    code_, n = code.literal_value, len(values)

    def codegen(context, builder, signature, args):
        address, index, values, stride, _ = args
        for i, x in enumerate(cgutils.unpack_tuple(builder, values, n)):
            row = _row(builder, address, stride, i)
            _store(context, builder, (row, index, x), code_)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, values, types.int64, code), codegen


@intrinsic(prefer_literal=True)
def add_rows(typingctx, address, index, values, stride, code):
    """Add each value of a tuple to element ``index`` of a tile. The tiles lie ``stride`` bytes apart."""
    code_, n = code.literal_value, len(values)

    def codegen(context, builder, signature, args):
        address, index, values, stride, _ = args
        for i, x in enumerate(cgutils.unpack_tuple(builder, values, n)):
            row = _row(builder, address, stride, i)
            x = builder.fadd(_load(context, builder, (row, index), code_), x)
            _store(context, builder, (row, index, x), code_)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, values, types.int64, code), codegen


@intrinsic(prefer_literal=True)
def replaced(typingctx, values, index, value):
    """Return a tuple with another element at ``index``."""
    i = index.literal_value

    def codegen(context, builder, signature, args):
        return builder.insert_value(args[0], args[2], i)

    return values(values, index, value), codegen


def fetch_line(builder, address, write=0):
    """Bring a cache line to the L2 cache."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), (pointer, I32, I32, I32))
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), *(ir.Constant(I32, flag) for flag in (write, 2, 1))])


@intrinsic(prefer_literal=True)
def _prefetch(typingctx, address, write):
    write_ = write.literal_value

    def codegen(context, builder, signature, args):
        fetch_line(builder, args[0], write_)
        return context.get_dummy_value()

    return types.void(types.int64, write), codegen


@inline
def prefetch(address, size, write):
    """Prefetch ``size`` bytes from ``address``, which may be invalid. The hardware does not predict short runs by itself."""
    for offset in range(0, size, 64):
        _prefetch(address + offset, write)


@intrinsic(prefer_literal=True)
def _copy(typingctx, target, source, offset, size, nontemporal):
    """Copy ``size`` bytes. If ``nontemporal``, both addresses must be multiples of ``size``."""
    size_, nontemporal_ = size.literal_value, nontemporal.literal_value

    def codegen(context, builder, signature, args):
        unit = ir.VectorType(I32, size_ // 4) if size_ > 1 else ir.IntType(8)
        to, source = (builder.inttoptr(builder.add(a, args[2]), unit.as_pointer()) for a in args[:2])
        written = builder.store(builder.load(source, align=size_), to, align=size_ if nontemporal_ else 1)
        if nontemporal_:
            written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, size, nontemporal), codegen


@inline
def stream(target, source, size):
    """Copy ``size`` bytes from a tile to memory and bypass the caches.

    An ordinary store first reads the cache line that it overwrites. These stores do not. They are weakly
    ordered. The atomic operations at the end of a parallel loop, or at a change of the GIL, complete them.
    """
    whole = size // 32 * 32
    if target % 32 == 0:
        for offset in range(0, whole, 32):
            _copy(target, source, offset, 32, 1)
    else:
        for offset in range(0, whole, 32):
            _copy(target, source, offset, 32, 0)
    for offset in range(whole, size):
        _copy(target, source, offset, 1, 0)


@intrinsic
def mul_add(typingctx, a, b, c):
    """Return a * b + c, rounded once if the machine has an instruction for it. Spikes must not depend on the result."""

    def codegen(context, builder, signature, args):
        kind = args[0].type
        suffix = "f64" if isinstance(kind, ir.DoubleType) else "f32"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, (kind,) * 3), f"llvm.fmuladd.{suffix}")
        return builder.call(function, args)

    return a(a, b, c), codegen


@intrinsic
def _float_from_bits(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _truncate(typingctx, x):
    def codegen(context, builder, signature, args):
        return builder.fptosi(args[0], I32)

    return types.int32(types.float32), codegen


@inline
def exp_negative(x, code):
    """Return exp(x) for x <= 0, within 1.5 ulp. float32 uses a polynomial, because LLVM cannot vectorise a call into libm."""
    if code == F64:
        return num(math.exp(x), code)
    least = num(-87.0, code)  # below this, the result is 0; a NaN stays NaN
    tiny = x < least
    x = least if tiny else x
    n = np.floor(x * num(1.4426950408889634, code) + num(0.5, code))
    f = (x - n * num(0.693359375, code)) - n * num(-2.12194440054690583e-4, code)  # ln 2 as the sum of two constants
    p = num(1.0 / 5040.0, code)
    p = p * f + num(1.0 / 720.0, code)
    p = p * f + num(1.0 / 120.0, code)
    p = p * f + num(1.0 / 24.0, code)
    p = p * f + num(1.0 / 6.0, code)
    p = p * f + num(0.5, code)
    p = p * f + num(1.0, code)
    p = p * f + num(1.0, code)
    p = p * _float_from_bits((_truncate(n) + numba.int32(127)) << numba.int32(23))
    return num(0.0, code) if tiny else p


@inline
def sigmoid(x, S):
    e = exp_negative(-abs(x), S)
    p = num(1.0, S) / (num(1.0, S) + e)
    return p if x >= num(0.0, S) else e * p


@inline
def fill(target, n, source, offset, value, code, S):
    """Fill a tile with n elements of the array at ``source``, or with ``value`` if source is 0.

    Each NaN is replaced by the standard NaN, because a bf16 store can change other NaNs.
    """
    if source != 0:
        for i in range(n):
            x = load(source, offset + i, code)
            store(target, i, x if x == x else num(math.nan, S), S)
    else:
        for i in range(n):
            store(target, i, value, S)


@intrinsic(prefer_literal=True)
def load_parameters(typingctx, places, values, step, row, code):
    """Return the parameters at a step and a row as a tuple: from their ``places``, see launch.Parameters, or ``values``."""
    code_, n = code.literal_value, len(values)

    def codegen(context, builder, signature, args):
        places_, values_ = (cgutils.unpack_tuple(builder, args[i]) for i in (0, 1))
        zero, found = ir.Constant(I64, 0), []
        for i in range(n):
            address, per_step, period = places_[4 * i : 4 * i + 3]
            number = cgutils.alloca_once_value(builder, values_[i])
            has_tokens = builder.icmp_signed("!=", period, zero)
            divisor = builder.select(has_tokens, period, ir.Constant(I64, 1))
            token = builder.add(builder.srem(args[3], divisor), builder.mul(builder.mul(per_step, args[2]), period))
            address = builder.select(has_tokens, address, builder.ptrtoint(number, I64))
            found.append(_load(context, builder, (address, builder.select(has_tokens, token, zero)), code_))
        return context.make_tuple(builder, signature.return_type, found)

    return values(places, values, types.int64, types.int64, code), codegen


@inline
def fill_parameter(target, n, source, per_step, period, c, step, row, value, S):
    """Fill a tile with a parameter for n columns from c on: a value per channel, the value of a token, or ``value``."""
    if source == 0 or period == 0:
        fill(target, n, source, c, value, S, S)
    else:
        x = load(source, per_step * step * period + row % period, S)
        fill(target, n, 0, 0, x if x == x else num(math.nan, S), S, S)


@inline
def sum_tile(target, n, size, S):
    """Return the sum of n elements. ``size`` is a power of two and at least n.

    The function adds the upper half to the lower half until one element is left. This vectorises, and its rounding error is
    smaller than the error of a running sum.
    """
    for i in range(n, size):
        store(target, i, num(0.0, S), S)
    width = size >> 1
    while width > 0:
        for i in range(width):
            store(target, i, load(target, i, S) + load(target, i + width, S), S)
        width >>= 1
    return load(target, 0, S)
