"""Vectors as values of numba code: what a scan needs, whose state stays in registers from token to token.

The vectoriser works on innermost loops and would carry such a state through memory. A vector has ``lanes`` elements of the
state type of a storage code; every function here acts on each lane alone and rounds alike in every lane, so that results
depend neither on the number of lanes nor on how channels are dealt out. ``V`` stands for a kind of vector: kind(code, lanes).
"""

import operator

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, overload, register_model, type_callable

from .intrinsics import BF16, F16, F64, I32, LLVM_TYPES, exp_negative, state_code

LANES = 16  # a cache line of float32; two AVX2 registers hide each other's latency


def kind(code: int, lanes: int) -> int:
    return lanes * 8 + code


class Vector(types.Type):
    """``lanes`` floats of the state type."""

    def __init__(self, V):
        self.V, self.element = V, LLVM_TYPES[state_code(V % 8)]
        super().__init__(f"Vector({'f64' if self.element == LLVM_TYPES[F64] else 'f32'}, {V // 8})")

    @property
    def key(self):
        return self.name


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, _llvm(type_))


def _llvm(vector):
    return ir.VectorType(vector.element, vector.V // 8)


def _constant(vector, value, element=None):
    return ir.Constant(ir.VectorType(element or vector.element, vector.V // 8), [value] * (vector.V // 8))


def _pointer(builder, address, index, element, lanes):
    pointer = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    return builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())


@intrinsic(prefer_literal=True)
def vload(typingctx, address, index, V):
    """Elements ``index`` and up of the array at ``address``, in the state type."""
    code, lanes = V.literal_value % 8, V.literal_value // 8
    vector = Vector(V.literal_value)

    def codegen(context, builder, signature, args):
        x = builder.load(_pointer(builder, args[0], args[1], LLVM_TYPES[code], lanes), align=_BYTES[code])
        if code == BF16:
            bits = builder.shl(builder.zext(x, ir.VectorType(I32, lanes)), _constant(vector, 16, I32))
            return builder.bitcast(bits, _llvm(vector))
        return builder.fpext(x, _llvm(vector)) if code == F16 else x

    return vector(types.int64, types.int64, V), codegen


_BYTES = (4, 8, 2, 2)


@intrinsic(prefer_literal=True)
def vstore(typingctx, address, index, value, V):
    """Round to the nearest even of the storage type and write."""
    code, lanes = V.literal_value % 8, V.literal_value // 8

    def codegen(context, builder, signature, args):
        x = args[2]
        if code == BF16:
            wide, narrow = ir.VectorType(I32, lanes), ir.VectorType(ir.IntType(16), lanes)

            def splat(number):
                return ir.Constant(wide, [number] * lanes)

            bits = builder.bitcast(x, wide)
            high = builder.lshr(bits, splat(16))
            bias = builder.add(splat(0x7FFF), builder.and_(high, splat(1)))
            even = builder.lshr(builder.add(bits, bias), splat(16))
            nan = builder.or_(high, splat(0x40))
            x = builder.trunc(builder.select(builder.fcmp_unordered("uno", x, x), nan, even), narrow)
        elif code == F16:
            x = builder.fptrunc(x, ir.VectorType(ir.HalfType(), lanes))
        builder.store(x, _pointer(builder, args[0], args[1], LLVM_TYPES[code], lanes), align=_BYTES[code])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, V), codegen


@intrinsic(prefer_literal=True)
def vset(typingctx, value, V):
    """The float64 ``value``, rounded once, in every lane; a number where V is a mere storage code."""
    vector = _of(V.literal_value)

    def codegen(context, builder, signature, args):
        element = vector.element if isinstance(vector, Vector) else context.get_value_type(vector)
        x = args[0] if element == LLVM_TYPES[F64] else builder.fptrunc(args[0], element)
        if not isinstance(vector, Vector):
            return x
        nothing, zero = ir.Constant(_llvm(vector), ir.Undefined), ir.Constant(I32, 0)
        one = builder.insert_element(nothing, x, zero)
        return builder.shuffle_vector(one, nothing, _constant(vector, 0, I32))

    return vector(types.float64, V), codegen


def _of(V):
    return Vector(V) if V >= 8 else types.float64 if V == F64 else types.float32


def _define(function, instruction):
    @type_callable(function)
    def typed(context):
        def typer(x, y):
            if isinstance(x, Vector) and x == y:
                return x

        return typer

    @lower_builtin(function, Vector, Vector)
    def lowered(context, builder, signature, args):
        return getattr(builder, instruction)(*args)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_function, _instruction)


def _call(builder, name, x, args):
    """LLVM's own function ``name`` on vectors, or on numbers."""
    llvm = args[0].type
    lanes, element = (f"v{llvm.count}", llvm.element) if isinstance(llvm, ir.VectorType) else ("", llvm)
    suffix = f"{lanes}f{64 if element == LLVM_TYPES[F64] else 32}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(llvm, [llvm] * len(args)), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, args)


@intrinsic
def fma(typingctx, x, y, z):
    """x * y + z, rounded once where the processor can."""

    def codegen(context, builder, signature, args):
        return _call(builder, "fmuladd", x, args)

    return x(x, y, z), codegen


@intrinsic
def negative_abs(typingctx, x):
    """-|x|"""

    def codegen(context, builder, signature, args):
        return builder.fneg(_call(builder, "fabs", x, args))

    return x(x), codegen


@intrinsic
def absolute(typingctx, x):
    def codegen(context, builder, signature, args):
        return _call(builder, "fabs", x, args)

    return x(x), codegen


@intrinsic
def vlog(typingctx, x):
    """Natural logarithm, a call into libm per lane."""

    def codegen(context, builder, signature, args):
        return _call(builder, "log", x, args)

    return x(x), codegen


@intrinsic
def where_less(typingctx, x, y, then, otherwise):
    """``then`` where x < y; ``otherwise`` elsewhere, so where one is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return then(x, y, then, otherwise), codegen


@intrinsic
def where_at_least(typingctx, x, y, then, otherwise):
    """``then`` where x >= y; ``otherwise`` elsewhere, so where one is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">=", args[0], args[1]), args[2], args[3])

    return then(x, y, then, otherwise), codegen


@intrinsic
def where_equal(typingctx, x, y, then, otherwise):
    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("==", args[0], args[1]), args[2], args[3])

    return then(x, y, then, otherwise), codegen


@intrinsic
def all_at_most(typingctx, x, y):
    """Whether x <= y in every lane; a NaN is not."""

    def codegen(context, builder, signature, args):
        lanes = ir.IntType(x.V // 8)
        return builder.icmp_unsigned(
            "==", builder.bitcast(builder.fcmp_ordered("<=", args[0], args[1]), lanes), ir.Constant(lanes, -1)
        )

    return types.boolean(x, y), codegen


@intrinsic
def _exponent(typingctx, x):
    """The float whose exponent bits are the lowest bits of x."""

    def codegen(context, builder, signature, args):
        bits, mantissa = (64, 52) if x.element == LLVM_TYPES[F64] else (32, 23)
        integer = ir.IntType(bits)
        wide = builder.bitcast(args[0], ir.VectorType(integer, x.V // 8))
        return builder.bitcast(builder.shl(wide, _constant(x, mantissa, integer)), _llvm(x))

    return x(x), codegen


@numba.njit(forceinline=True, error_model="numpy")
def vexp(x, V):
    """exp(x) for x <= 80: float32 within 1 ulp above -20 and 3 ulp above -87, exactly 0 below -88; a NaN stays.

    x = n ln 2 + f. Adding 1.5 * 2^23 + 127 rounds x / ln 2 to the integer n and leaves n + 127, the exponent of 2^n, in the
    lowest bits; n = -127 gives 0. ln 2 in one part errs by 2e-9 n, and n is large only where the result is tiny.
    """
    double = V % 8 == F64
    if double:
        least, magic = vset(-708.8, V), vset(6755399441055744.0 + 1023.0, V)
    else:
        least, magic = vset(-88.1, V), vset(12582912.0 + 127.0, V)
    x = where_less(x, least, least, x)
    z = fma(x, vset(1.4426950408889634, V), magic)
    n = z - magic
    f = fma(n, vset(-0.6931471805599453, V), x)
    if double:
        f = fma(n, vset(-2.3190468138462996e-17, V), f)
        p = vset(1.0 / 6227020800.0, V)  # Taylor
        p = fma(p, f, vset(1.0 / 479001600.0, V))
        p = fma(p, f, vset(1.0 / 39916800.0, V))
        p = fma(p, f, vset(1.0 / 3628800.0, V))
        p = fma(p, f, vset(1.0 / 362880.0, V))
        p = fma(p, f, vset(1.0 / 40320.0, V))
        p = fma(p, f, vset(1.0 / 5040.0, V))
        p = fma(p, f, vset(1.0 / 720.0, V))
        p = fma(p, f, vset(1.0 / 120.0, V))
        p = fma(p, f, vset(1.0 / 24.0, V))
        p = fma(p, f, vset(1.0 / 6.0, V))
        p = fma(p, f, vset(0.5, V))
        p = fma(fma(p, f, vset(1.0, V)), f, vset(1.0, V))
    else:
        # minimax of the relative error, 3e-9; in pairs, because the next token waits for it
        f2 = f * f
        low = fma(vset(0.16666520398167214, V), f, vset(0.49999993432066775, V))
        p = fma(vset(0.00836874521281697, V), f, vset(0.041668390792950996, V))
        p = fma(vset(0.0013814540079503286, V), f2, p)
        p = fma(fma(p, f2, low), f2, f + vset(1.0, V))
    return p * _exponent(z)


def exp_below(x, V):
    """exp(x) for x <= 0 of vectors and of numbers."""


@overload(exp_below, prefer_literal=True, jit_options=dict(forceinline=True, error_model="numpy"))
def _exp_below(x, V):
    if isinstance(x, Vector):
        return lambda x, V: vexp(x, V)
    return lambda x, V: exp_negative(x, V)
