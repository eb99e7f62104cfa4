"""Vectors as values in numba code. A scan needs them, because its state stays in registers from token to token.

LLVM's vectoriser works on innermost loops, so it would move the state of a scan through memory. A vector has ``lanes`` elements
of the state type of a storage code (see cpu/intrinsics.py). Every function here acts on each lane alone and rounds the same way
in every lane. So results depend neither on the number of lanes nor on the distribution of the channels over tasks.

``V`` and ``W`` stand for a vector type as one integer literal, ``vec(code, lanes)``. In numba code, ``V % 8`` is the code and
``V // 8`` is the number of lanes.
"""

import functools
import math
import operator

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, overload, register_model, type_callable

from ..neuron.trace import HUGE, THRESHOLD_EPS
from .compiler import INLINE, inline
from .intrinsics import BF16, F16, F64, I32, LLVM_TYPES, exp_negative, load, num, state_code, store, tile

# Server CPUs for which LLVM vectorises with 256 bits, because their predecessors lowered the clock rate for 512 bits. Measured
# on an Emerald Rapids only.
_PREFERS_512_BITS = llvmlite.binding.get_host_cpu_name() in (
    "icelake-server",
    "sapphirerapids",
    "emeraldrapids",
    "graniterapids",
)
LANES = 16  # a cache line of float32; the work on one AVX2 register hides the latency of the other


@intrinsic
def use_wide_vectors(typingctx):
    """Let LLVM vectorise the kernel that calls this with 512 bits, if the CPU is one of those above."""

    def codegen(context, builder, signature, args):
        if _PREFERS_512_BITS:
            builder.function.attributes.add("noinline")  # or the caller's vectors count
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own ``add`` refuses the name
        return context.get_dummy_value()

    return types.void(), codegen


def vec(code: int, lanes: int) -> int:
    return lanes * 8 + code


def code_of(V: int) -> int:
    return V % 8


def lanes_of(V: int) -> int:
    return V // 8


class Vector(types.Type):
    """The numba type of a vector."""

    def __init__(self, V):
        self.V, self.element = V, LLVM_TYPES[state_code(code_of(V))]
        super().__init__(f"Vector({'f64' if self.element == LLVM_TYPES[F64] else 'f32'}, {lanes_of(V)})")

    @property
    def key(self):
        return self.name


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, _llvm(type_))


def _llvm(vector):
    return ir.VectorType(vector.element, lanes_of(vector.V))


def _constant(vector, value, element=None):
    return ir.Constant(ir.VectorType(element or vector.element, lanes_of(vector.V)), [value] * (lanes_of(vector.V)))


def _pointer(builder, address, index, element, lanes):
    pointer = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    return builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())


@intrinsic(prefer_literal=True)
def vload(typingctx, address, index, V):
    """Load the elements from ``index`` on of the array at ``address``, in the state type."""
    code, lanes = code_of(V.literal_value), lanes_of(V.literal_value)
    vector = Vector(V.literal_value)

    def codegen(context, builder, signature, args):
        x = builder.load(_pointer(builder, args[0], args[1], LLVM_TYPES[code], lanes), align=_BYTES[code])
        if code == BF16:
            bits = builder.shl(builder.zext(x, ir.VectorType(I32, lanes)), _constant(vector, 16, I32))
            return builder.bitcast(bits, _llvm(vector))
        return builder.fpext(x, _llvm(vector)) if code == F16 else x

    return vector(types.int64, types.int64, V), codegen


_BYTES = (4, 8, 2, 2)


def _write(context, builder, args, x, code, lanes):
    """Write x, of the storage type except for float16, to the address and index in args."""
    if code == F16:
        x = builder.fptrunc(x, ir.VectorType(ir.HalfType(), lanes))
    builder.store(x, _pointer(builder, args[0], args[1], LLVM_TYPES[code], lanes), align=_BYTES[code])
    return context.get_dummy_value()


@intrinsic(prefer_literal=True)
def vstore(typingctx, address, index, value, V):
    """Round to the storage type, to nearest with ties to even, and write."""
    code, lanes = code_of(V.literal_value), lanes_of(V.literal_value)

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
        return _write(context, builder, args, x, code, lanes)

    return types.void(types.int64, types.int64, value, V), codegen


@intrinsic(prefer_literal=True)
def vstore_exact(typingctx, address, index, value, V):
    """Write values that the storage type holds exactly, such as small integers; bfloat16 is then the upper half of float32."""
    code, lanes = code_of(V.literal_value), lanes_of(V.literal_value)

    def codegen(context, builder, signature, args):
        x = args[2]
        if code == BF16:
            bits = builder.bitcast(x, ir.VectorType(I32, lanes))
            high = builder.lshr(bits, ir.Constant(bits.type, [16] * lanes))
            x = builder.trunc(high, ir.VectorType(ir.IntType(16), lanes))
        return _write(context, builder, args, x, code, lanes)

    return types.void(types.int64, types.int64, value, V), codegen


@intrinsic(prefer_literal=True)
def vset(typingctx, value, V):
    """Return the float64 ``value``, rounded once, in every lane. If V is only a storage code, return a number."""
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


@type_callable(operator.neg)
def _negative(context):
    return lambda x: x if isinstance(x, Vector) else None


@lower_builtin(operator.neg, Vector)
def _lower_negative(context, builder, signature, args):
    return builder.fneg(args[0])


def _call(builder, name, x, args):
    """Call LLVM's own function ``name`` on vectors or numbers."""
    llvm = args[0].type
    lanes, element = (f"v{llvm.count}", llvm.element) if isinstance(llvm, ir.VectorType) else ("", llvm)
    suffix = f"{lanes}f{64 if element == LLVM_TYPES[F64] else 32}"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(llvm, [llvm] * len(args)), f"llvm.{name}.{suffix}"
    )
    return builder.call(function, args)


@intrinsic
def fma(typingctx, x, y, z):
    """Return x * y + z, rounded once if the processor has an instruction for it."""

    def codegen(context, builder, signature, args):
        return _call(builder, "fmuladd", x, args)

    return x(x, y, z), codegen


@intrinsic
def vsum(typingctx, x):
    """Return the sum of all lanes, a power of two. As in ``sum_tile``, halves are added until one lane is left."""

    def codegen(context, builder, signature, args):
        v, lanes = args[0], lanes_of(x.V)
        while lanes > 1:
            lanes //= 2
            halves = (ir.Constant(ir.VectorType(I32, lanes), [start + i for i in range(lanes)]) for start in (0, lanes))
            low, high = (builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), half) for half in halves)
            v = builder.fadd(low, high)
        return builder.extract_element(v, ir.Constant(I32, 0))

    return (types.float64 if x.element == LLVM_TYPES[F64] else types.float32)(x), codegen


@intrinsic
def negative_abs(typingctx, x):
    """Return -|x|."""

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
    """Return the natural logarithm. It calls libm once per lane."""

    def codegen(context, builder, signature, args):
        return _call(builder, "log", x, args)

    return x(x), codegen


@intrinsic
def where_less(typingctx, x, y, then, otherwise):
    """Return ``then`` where x < y, and ``otherwise`` elsewhere, also where x or y is NaN."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return then(x, y, then, otherwise), codegen


@intrinsic
def where_at_least(typingctx, x, y, then, otherwise):
    """Return ``then`` where x >= y, and ``otherwise`` elsewhere, also where x or y is NaN."""

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
    """Return True if x <= y in every lane. The result is False if any lane of x or y is NaN."""

    def codegen(context, builder, signature, args):
        lanes = ir.IntType(lanes_of(x.V))
        return builder.icmp_unsigned(
            "==", builder.bitcast(builder.fcmp_ordered("<=", args[0], args[1]), lanes), ir.Constant(lanes, -1)
        )

    return types.boolean(x, y), codegen


@intrinsic
def _exponent(typingctx, x):
    """Return the float whose exponent bits are the lowest bits of x."""

    def codegen(context, builder, signature, args):
        element = x.element if isinstance(x, Vector) else context.get_value_type(x)
        bits, mantissa = (64, 52) if element == LLVM_TYPES[F64] else (32, 23)
        integer = ir.IntType(bits)
        if isinstance(x, Vector):
            shift, kind = _constant(x, mantissa, integer), ir.VectorType(integer, lanes_of(x.V))
        else:
            shift, kind = ir.Constant(integer, mantissa), integer
        return builder.bitcast(builder.shl(builder.bitcast(args[0], kind), shift), args[0].type)

    return x(x), codegen


@inline
def vexp(x, V):
    """Return exp(x) of a vector or number x <= 80, or x <= 700 in float64. A NaN stays NaN.

    The float32 error is within 1 ulp above x = -20 and within 3 ulp above -87. Below -88 the result is exactly 0.

    The function writes x = n ln 2 + f. Adding 1.5 * 2^23 + 127 rounds x / ln 2 to the integer n and puts n + 127, the exponent
    bits of 2^n, into the lowest bits. n = -127 gives 0. float32 uses ln 2 as one constant, with an error of 2e-9 n. n is large
    only if the result is tiny, so this error does not matter.
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
        p = vset(1.0 / 6227020800.0, V)  # Taylor series
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
        # Minimax polynomial with a relative error of 3e-9, evaluated in pairs, because the next token waits for the result.
        f2 = f * f
        low = fma(vset(0.16666520398167214, V), f, vset(0.49999993432066775, V))
        p = fma(vset(0.00836874521281697, V), f, vset(0.041668390792950996, V))
        p = fma(vset(0.0013814540079503286, V), f2, p)
        p = fma(fma(p, f2, low), f2, f + vset(1.0, V))
    return p * _exponent(z)


def exp_below(x, V):
    """Return exp(x) of a vector or number x <= 0."""


@overload(exp_below, prefer_literal=True, jit_options=INLINE)
def _exp_below(x, V):
    if isinstance(x, Vector):
        return lambda x, V: vexp(x, V)
    return lambda x, V: exp_negative(x, V)


# --- the operations of neurons, on vectors and numbers ----------------------------------------------------------------------


@inline
def exp(x, V):
    """Return exp(x) of any x: 0 or infinity if the result is out of range. The error is within 5 ulp."""
    half, most = vset(0.5, V) * x, vset(400.0 if V % 8 == F64 else 80.0, V)
    e = vexp(where_less(most, half, most, half), V)  # vexp takes neither the largest x nor results below the normal numbers
    return e * e


@inline
def maximum(x, y):
    """Return the greater of x and y, or NaN if one of them is NaN."""
    return where_equal(x, x, where_less(y, x, x, y), x)


@inline
def minimum(x, y):
    """Return the lesser of x and y, or NaN if one of them is NaN."""
    return where_equal(x, x, where_less(x, y, x, y), x)


@intrinsic
def _round(typingctx, x):
    """Round to an integer, ties to even."""

    def codegen(context, builder, signature, args):
        return _call(builder, "rint", x, args)

    return x(x), codegen


@inline
def level(z, lo, hi, V):
    """Return round(clip(z, lo, hi)), never a negative zero. A NaN stays NaN."""
    z = where_less(z, lo, lo, z)
    return _round(where_less(hi, z, hi, z)) + vset(0.0, V)


@inline
def inside(z, lo, hi, g, V):
    """Return g where lo <= z <= hi, else 0."""
    return where_at_least(z, lo, where_at_least(hi, z, g, vset(0.0, V)), vset(0.0, V))


@inline
def sign(z, V):
    """Return 1, -1 or, where z is zero or NaN, z."""
    return where_less(vset(0.0, V), z, vset(1.0, V), where_less(z, vset(0.0, V), vset(-1.0, V), z))


@inline
def share(a, b, g, V):
    """Return the part of the gradient g of maximum(a, b) that belongs to a: g, g / 2 where a equals b, 0 where a is less."""
    return where_less(a, b, vset(0.0, V), where_equal(a, b, vset(0.5, V) * g, g))


# --- the norm of a row, for neurons whose thresholds are a multiple of it -----------------------------------------------------


@functools.cache
def norm_of_row(norm, X):
    """Return a function (address, n) -> the norm of n elements: sqrt(mean of x^2 + 1e-6), or for "mean" mean of |x| + 1e-6.

    A norm that is not finite counts as huge. The order of the sum depends on n only.
    """
    S, V, RMS, STEP = state_code(X), vec(X, LANES), norm == "rms", 4 * LANES
    W, EPS, MOST = vec(S, LANES), THRESHOLD_EPS, HUGE[S == F64]

    @inline
    def size(x):
        return x * x if RMS else absolute(x)

    @inline
    def norm_of_row(x, n):
        whole, a = n // STEP * STEP, vset(0.0, V)
        b, c, d = a, a, a
        for i in range(0, whole, STEP):
            a = a + size(vload(x, i, V))
            b = b + size(vload(x, i + LANES, V))
            c = c + size(vload(x, i + 2 * LANES, V))
            d = d + size(vload(x, i + 3 * LANES, V))
        for i in range(whole, n - LANES + 1, LANES):
            a = a + size(vload(x, i, V))
        if n % LANES:
            sums = tile(LANES, S)
            vstore(sums, 0, a, W)
            for i in range(n // LANES * LANES, n):
                store(sums, i % LANES, load(sums, i % LANES, S) + size(load(x, i, X)), S)
            a = vload(sums, 0, W)
        mean = vsum((a + c) + (b + d)) / num(n * 1.0, S)
        found, most = mean + num(EPS, S), num(MOST, S)
        if RMS:
            found = math.sqrt(found)
        return found if found < most else most

    return norm_of_row
