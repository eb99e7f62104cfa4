"""What every CPU kernel stands on: typed loads and stores at an address, stack tiles, compilation and launch.

A kernel takes addresses and sizes (integers) and constants (floats), never arrays: a call costs half a microsecond, LLVM sees
plain pointers whose stack tiles cannot alias them, and bf16 needs no array type that numpy lacks. Storage types are small
integer codes; the state type of a code is float64 for F64, else float32.
"""

import ctypes
import functools
import logging
import math
import os
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils, event
from numba.extending import intrinsic

from .. import dispatch

F32, F64, BF16, F16, U8 = range(5)
CODES = {
    torch.float32: F32,
    torch.float64: F64,
    torch.bfloat16: BF16,
    torch.float16: F16,
    torch.uint8: U8,
    torch.bool: U8,
}
SIZES = (4, 8, 2, 2, 1)
_LLVM = (ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.HalfType(), ir.IntType(8))
_I32, _I64 = ir.IntType(32), ir.IntType(64)


def state_code(code: int) -> int:
    return F64 if code == F64 else F32


def _state_type(code):
    return types.float64 if code == F64 else types.float32


def _element(builder, address, index, code):
    return builder.gep(builder.inttoptr(address, _LLVM[code].as_pointer()), [index])


def _mark(builder, instruction, kind):
    """Name the set "inputs" in the metadata by which LLVM knows two accesses apart."""
    scope = builder.module.add_metadata(["inputs", builder.module.add_metadata(["sdit_kernels"])])
    instruction.set_metadata(kind, builder.module.add_metadata([scope]))


def _load(context, builder, args, code, kind=None):
    x = builder.load(_element(builder, args[0], args[1], code))
    if kind:
        _mark(builder, x, kind)
    if code == BF16:
        return builder.bitcast(builder.shl(builder.zext(x, _I32), ir.Constant(_I32, 16)), ir.FloatType())
    if code == F16:
        return builder.fpext(x, ir.FloatType())
    return builder.uitofp(x, ir.FloatType()) if code == U8 else x


@intrinsic(prefer_literal=True)
def load(typingctx, address, index, code):
    """Element ``index`` of the array at ``address``, in the state type."""
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        return _load(context, builder, args, code_)

    return _state_type(code_)(types.int64, types.int64, code), codegen


@intrinsic(prefer_literal=True)
def load_input(typingctx, address, index, code):
    """The same from an array that no ``store_output`` of the kernel writes.

    With many arrays in one loop the vectoriser would otherwise have too many pairs to compare, and give up.
    """
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        return _load(context, builder, args, code_, "alias.scope")

    return _state_type(code_)(types.int64, types.int64, code), codegen


def _store(context, builder, args, code, kind=None):
    x = args[2]
    if code == BF16:
        bits = builder.bitcast(x, _I32)
        high = builder.lshr(bits, ir.Constant(_I32, 16))
        bias = builder.add(ir.Constant(_I32, 0x7FFF), builder.and_(high, ir.Constant(_I32, 1)))
        even = builder.lshr(builder.add(bits, bias), ir.Constant(_I32, 16))
        # A NaN stays one unless its upper 17 mantissa bits are ones, as arithmetic makes none; to test for it costs a tenth.
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
    """``store`` to an array that no ``load_input`` of the kernel reads."""
    code_ = code.literal_value
    value_type = value if code_ == U8 else _state_type(code_)

    def codegen(context, builder, signature, args):
        return _store(context, builder, args, code_, "noalias")

    return types.void(types.int64, types.int64, value_type, code), codegen


@intrinsic
def load_int(typingctx, address, index):
    """Element ``index`` of an array of int64."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(builder.inttoptr(args[0], _I64.as_pointer()), [args[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def store(typingctx, address, index, value, code):
    """Round ``value`` (state type) to the nearest even of the storage type and write it."""
    code_ = code.literal_value
    value_type = value if code_ == U8 else _state_type(code_)

    def codegen(context, builder, signature, args):
        return _store(context, builder, args, code_)

    return types.void(types.int64, types.int64, value_type, code), codegen


_ONE_BITS = (0x3F800000, 0x3FF0000000000000, 0x3F80, 0x3C00, 1)


@intrinsic(prefer_literal=True)
def store_spike(typingctx, address, index, fired, code):
    """Write one or zero: an integer select, with no rounding to vectorise around."""
    code_ = code.literal_value

    def codegen(context, builder, signature, args):
        bits = ir.IntType(8 * SIZES[code_])
        pointer = builder.gep(builder.inttoptr(args[0], bits.as_pointer()), [args[1]])
        fired_ = builder.trunc(args[2], ir.IntType(1)) if args[2].type.width > 1 else args[2]
        builder.store(builder.select(fired_, ir.Constant(bits, _ONE_BITS[code_]), ir.Constant(bits, 0)), pointer)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.boolean, code), codegen


@intrinsic(prefer_literal=True)
def tile(typingctx, elements, code):
    """Address of an uninitialised stack array of the state type."""
    count, state = elements.literal_value, _state_type(code.literal_value)

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            array = builder.alloca(ir.ArrayType(context.get_data_type(state), count))
            array.align = 64
        return builder.ptrtoint(array, _I64)

    return types.int64(elements, code), codegen


@intrinsic(prefer_literal=True)
def num(typingctx, value, code):
    """A float64 constant, rounded once to the state type."""
    state = _state_type(code.literal_value)

    def codegen(context, builder, signature, args):
        return args[0] if state == types.float64 else builder.fptrunc(args[0], ir.FloatType())

    return state(types.float64, code), codegen


@intrinsic(prefer_literal=True)
def _prefetch(typingctx, address, write):
    write_ = write.literal_value

    def codegen(context, builder, signature, args):
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), (pointer, _I32, _I32, _I32))
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(_I32, flag) for flag in (write_, 2, 1)]
        builder.call(function, [builder.inttoptr(args[0], pointer), *flags])
        return context.get_dummy_value()

    return types.void(types.int64, write), codegen


@numba.njit(forceinline=True, error_model="numpy")
def prefetch(address, size, write):
    """Ask for ``size`` bytes from ``address``, which need not exist: short runs escape the hardware's guess."""
    for offset in range(0, size, 64):
        _prefetch(address + offset, write)


@intrinsic(prefer_literal=True)
def _copy(typingctx, target, source, offset, size, nontemporal):
    """``size`` bytes, which both sides align to where nontemporal."""
    size_, nontemporal_ = size.literal_value, nontemporal.literal_value

    def codegen(context, builder, signature, args):
        unit = ir.VectorType(_I32, size_ // 4) if size_ > 1 else ir.IntType(8)
        to, source = (builder.inttoptr(builder.add(a, args[2]), unit.as_pointer()) for a in args[:2])
        written = builder.store(builder.load(source, align=size_), to, align=size_ if nontemporal_ else 1)
        if nontemporal_:
            written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, size, nontemporal), codegen


@numba.njit(forceinline=True, error_model="numpy")
def stream(target, source, size):
    """Copy ``size`` bytes from a tile around the caches: an ordinary store first reads the line that it overwrites.

    Such stores are weakly ordered; the atomic operations that end a parallel loop or pass on the GIL complete them.
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
    """a * b + c, in one rounding where the machine has an instruction for it; for what no spike depends on."""

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
        return builder.fptosi(args[0], _I32)

    return types.int32(types.float32), codegen


@numba.njit(forceinline=True, error_model="numpy")
def exp_negative(x, code):
    """exp(x) for x <= 0, within 1.5 ulp; float32 by a polynomial, because a call into libm would stop the vectoriser."""
    if code == F64:
        return num(math.exp(x), code)
    least = num(-87.0, code)  # below it the result is 0; a NaN stays
    tiny = x < least
    x = least if tiny else x
    n = np.floor(x * num(1.4426950408889634, code) + num(0.5, code))
    f = (x - n * num(0.693359375, code)) - n * num(-2.12194440054690583e-4, code)  # ln 2 in two parts
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


@numba.njit(forceinline=True, error_model="numpy")
def sigmoid(x, S):
    e = exp_negative(-abs(x), S)
    p = num(1.0, S) / (num(1.0, S) + e)
    return p if x >= num(0.0, S) else e * p


def _source_stamp() -> str:
    """Changes when any file that a kernel reads does: numba itself watches only the file that holds the kernel."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), here.parent / "layout.py", here.parent / "surrogate.py"]
    return f"{zlib.crc32(b''.join(f.read_bytes() for f in files)):08x}"


_STAMP = _source_stamp()
STREAM = 8 << 20  # bytes of an output from which on it is written around the caches, which it would not fit
_SERIAL_BELOW = 1 << 15  # neuron-steps: less work than this does not repay waking a second thread (about 3 us)
_lock = threading.Lock()  # held to compile


def _after_fork():
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held the old one


os.register_at_fork(after_in_child=_after_fork)

_SLOW = 2.0  # seconds of compiling after which a line says what the user waits for
_LOG = logging.getLogger("sdit_kernels")


class _Notice(event.Listener):
    """Logs one line per process when a kernel compiles for longer than _SLOW. Loading code from disk starts no clock."""

    said = False

    def __init__(self, compiled):
        self._compiled, self._timer = compiled, None

    def on_start(self, event):
        if event.data["dispatcher"] is self._compiled and not _Notice.said:
            self._timer = threading.Timer(_SLOW, self._say)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event):
        if event.data["dispatcher"] is self._compiled and self._timer is not None:
            self._timer.cancel()

    def _say(self):
        if not _Notice.said:
            _Notice.said = True
            _LOG.warning("sdit_kernels: compiling CPU kernels, seconds each; later processes load the compiled code from disk")


# --- threads ----------------------------------------------------------------------------------------------------------------


def _find_openmp() -> bool:
    """Tell compiled code where the OpenMP library of torch is, so that one pool of threads serves torch and these kernels.

    numba's own threads would be a second pool: each spins for a while when it has nothing to do, in the other's way.
    """
    library = Path(torch.__file__).parent / "lib" / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
    try:
        openmp = ctypes.CDLL(str(library))
        found = {name: getattr(openmp, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")}
    except (OSError, AttributeError):  # Windows, or a torch that runs on other threads
        return False
    for name, function in found.items():
        llvmlite.binding.add_symbol(f"sdit_kernels_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return True


_OPENMP = _find_openmp()


@numba.njit(forceinline=True, error_model="numpy")
def share(tasks, part):
    """The tasks of one thread: ``part`` is (its number, the number of threads)."""
    i, n = part
    return range(tasks * i // n, tasks * (i + 1) // n)


@intrinsic
def _run_team(typingctx, body, threads, args):
    """Call body((i, n), *args) on every thread i of a team of OpenMP's, n threads in all."""
    pair = types.UniTuple(types.int64, 2)
    kinds = (pair, *args.types)
    signature = body.get_call_type(typingctx, kinds, {})
    i32, i64, pointer, void = _I32, _I64, ir.IntType(8).as_pointer(), ir.VoidType()

    def codegen(context, builder, _, values):
        def openmp(name, result, *arguments):
            return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), f"sdit_kernels_{name}")

        compiled = body.dispatcher.get_compile_result(signature)
        context.active_code_library.add_linking_library(compiled.library)
        packed = cgutils.alloca_once_value(builder, values[2])
        member = ir.Function(builder.module, ir.FunctionType(void, (pointer,)), builder.module.get_unique_name("member"))
        member.linkage = "internal"
        inside = ir.IRBuilder(member.append_basic_block())
        numbers = [inside.call(openmp(f"omp_get_{name}", i32), ()) for name in ("thread_num", "num_threads")]
        part = context.make_tuple(inside, pair, [inside.sext(number, i64) for number in numbers])
        unpacked = inside.load(inside.bitcast(member.args[0], packed.type))
        arguments = [part, *(inside.extract_value(unpacked, i) for i in range(len(args.types)))]
        function = context.declare_function(builder.module, compiled.fndesc)
        context.call_conv.call_function(inside, function, types.none, kinds, arguments)
        inside.ret_void()
        parallel = openmp("GOMP_parallel", void, pointer, pointer, i32, i32)
        data = (builder.bitcast(x, pointer) for x in (member, packed))
        builder.call(parallel, (*data, builder.trunc(values[1], i32), ir.Constant(i32, 0)))
        return context.get_dummy_value()

    return types.void(body, types.int64, args), codegen


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="sdit_kernels")


class Kernel:
    """A numba function whose first argument is ``part`` and whose outermost loop is over ``share(tasks, part)``.

    One thread runs it alone, or as many as torch has run their parts of it. It is compiled at first use and cached on disk in a
    file of its own (``name`` holds the variant's flags), so that processes that compile different variants at the same time
    cannot take each other's code.
    """

    def __init__(self, function, name: str):
        self._function, self._name = function, f"{name}_{_STAMP}" + ("" if _OPENMP else "_threads")
        self._compiled = None

    def _compile(self, args):
        # Python's error model tests every divisor for zero, which stops the vectoriser.
        options = dict(nogil=True, error_model="numpy")
        self._function.__name__ = self._function.__qualname__ = self._name
        body = numba.njit(self._function, **options)

        if _OPENMP:

            def entry(part, *args):
                if part[0] < 0:
                    _run_team(body, part[1], args)
                else:
                    body(part, *args)
        else:

            def entry(part, *args):
                body(part, *args)

        entry.__name__ = entry.__qualname__ = self._name
        signature = numba.typeof((0, 1)), numba.typeof(args)
        try:
            compiled = numba.njit(entry, cache=True, **options)
        except RuntimeError:  # numba found no folder it may write to
            _warn_uncached()
            compiled = numba.njit(entry, **options)
        else:
            self._key(compiled)
        with event.install_listener("numba:compile", _Notice(compiled)):
            try:
                compiled.compile(signature)
            except Exception:  # a cached file that a full disk left incomplete raises errors of any kind
                compiled._cache.flush()
                compiled.compile(signature)
        return compiled

    def _key(self, compiled):
        """Find the code again in another process. Numba's key holds a pickle of all closed-over variables; of a jitted function
        among them that is new in every process. Name and stamp say what those are, but for numbers that someone has changed."""
        cells = (cell.cell_contents for cell in self._function.__closure__ or ())
        numbers = tuple(value for value in cells if isinstance(value, (int, float)))
        compiled._cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), self._name, numbers)

    def __call__(self, work: int, *args):
        """``work`` in elementary steps decides whether one thread does it alone."""
        if self._compiled is None:
            with _lock:
                self._compiled = self._compiled or self._compile(args)
        threads = 1 if work < _SERIAL_BELOW or dispatch.forked else torch.get_num_threads()
        if threads == 1:
            self._compiled((0, 1), *args)
        elif _OPENMP:
            self._compiled((-1, threads), *args)
        else:
            others = [_threads().submit(self._compiled, (i, threads), *args) for i in range(1, threads)]
            self._compiled((0, threads), *args)
            for other in others:
                other.result()


_warned = False


def _warn_uncached():
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "sdit_kernels: found no writable folder for compiled CPU kernels, so every process compiles them anew "
            "(seconds per kernel). Set NUMBA_CACHE_DIR to a writable folder.",
            stacklevel=2,
        )
