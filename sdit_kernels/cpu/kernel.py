"""Compile a CPU kernel, cache its code on disk, and run it on the threads of torch."""

import ctypes
import functools
import importlib.resources
import logging
import os
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding
import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils, event
from numba.extending import intrinsic

from .. import dispatch, repeat
from .compiler import NO_ENTRY, inline
from .intrinsics import I32, I64


def _source_stamp() -> str:
    """Return a checksum of all files that a kernel depends on. numba itself checks only the file that defines the kernel."""
    package = importlib.resources.files(__package__.partition(".")[0])  # also inside a zip file
    inside = sorted((f for f in (package / "cpu").iterdir() if f.name.endswith(".py")), key=lambda f: f.name)
    files = [*inside, package / "layout.py", package / "surrogate.py"]
    return f"{zlib.crc32(b''.join(f.read_bytes() for f in files)):08x}"


_STAMP = _source_stamp()
repeat.environments["cpu"] = lambda: (torch.get_num_threads(), dispatch.forked)  # launchers split the work by them
STREAM = 8 << 20  # an output of at least so many bytes bypasses the caches, because it does not fit into them
# Python's error model tests every divisor for zero, and LLVM does not vectorise this test.
_OPTIONS = dict(nogil=True, error_model="numpy")
_SERIAL_BELOW = 1 << 15  # neuron-steps; with less work, waking a second thread (about 3 us) does not pay
_lock = threading.Lock()  # held while a kernel compiles


def _after_fork():
    global _lock
    _lock = threading.Lock()  # another thread of the parent process may have held the old lock


os.register_at_fork(after_in_child=_after_fork)

_SLOW = 2.0  # seconds of compiling after which a log line tells the user the reason for the delay
_LOG = logging.getLogger("sdit_kernels")


class _SlowCompileNotice(event.Listener):
    """Log one line per process if a kernel compiles for longer than _SLOW. Loading code from disk does not count."""

    has_logged = False

    def __init__(self, compiled):
        self._compiled, self._timer = compiled, None

    def on_start(self, event):
        if event.data["dispatcher"] is self._compiled and not _SlowCompileNotice.has_logged:
            self._timer = threading.Timer(_SLOW, self._log_once)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event):
        if event.data["dispatcher"] is self._compiled and self._timer is not None:
            self._timer.cancel()

    def _log_once(self):
        if not _SlowCompileNotice.has_logged:
            _SlowCompileNotice.has_logged = True
            _LOG.warning(
                "sdit_kernels: compiling CPU kernels, which takes seconds per kernel; later processes load the code from disk"
            )


# --- threads ----------------------------------------------------------------------------------------------------------------


def _find_openmp() -> bool:
    """Give compiled code the functions of torch's OpenMP library, so that torch and these kernels share one pool of threads.

    Return False if this fails. numba's own threads would be a second pool. Idle threads of a pool spin for a while, so each
    pool would slow the other down.
    """
    library = Path(torch.__file__).parent / "lib" / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
    try:
        openmp = ctypes.CDLL(str(library))
        found = {name: getattr(openmp, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")}
    except (OSError, AttributeError):  # Windows, or a torch without OpenMP
        return False
    for name, function in found.items():
        llvmlite.binding.add_symbol(f"sdit_kernels_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return True


_OPENMP = _find_openmp()


@inline
def share(tasks, part):
    """Return the range of tasks of one thread. ``part`` is (number of this thread, number of threads)."""
    i, n = part
    return range(tasks * i // n, tasks * (i + 1) // n)


def thread_count(work: int) -> int:
    """Return the number of threads that run a kernel with so much work; see Kernel.__call__."""
    return 1 if work < _SERIAL_BELOW or dispatch.forked else torch.get_num_threads()


@intrinsic
def _run_team(typingctx, body, threads, args):
    """Call body((i, n), *args) on every thread i of an OpenMP team of n threads."""
    pair = types.UniTuple(types.int64, 2)
    kinds = (pair, *args.types)
    signature = body.get_call_type(typingctx, kinds, {})
    i32, i64, pointer, void = I32, I64, ir.IntType(8).as_pointer(), ir.VoidType()

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

    One thread runs all tasks, or each of torch's threads runs its part. The kernel is compiled at first use and cached on disk.
    Each variant has its own file, because ``name`` contains the flags of the variant. So processes that compile different
    variants at the same time cannot overwrite each other's code.
    """

    def __init__(self, function, name: str):
        self.name, self._name = name, f"{name}_{_STAMP}" + ("" if _OPENMP else "_threads")
        self._function, self._compiled = function, None

    @functools.cached_property
    def body(self):
        """The function, to be called by the code of another kernel."""
        self._function.__name__ = self._function.__qualname__ = self._name
        return numba.njit(self._function, **_OPTIONS, **NO_ENTRY)

    def _compile(self, args):
        body = self.body

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
            compiled = numba.njit(entry, cache=True, no_cfunc_wrapper=True, **_OPTIONS)
        except RuntimeError:  # numba did not find a writable folder
            _warn_uncached(_NO_FOLDER)
            compiled = numba.njit(entry, no_cfunc_wrapper=True, **_OPTIONS)
        else:
            if not _set_cache_key(compiled, self._key()):
                _warn_uncached(_NO_CACHE)
                compiled = numba.njit(entry, no_cfunc_wrapper=True, **_OPTIONS)
        with event.install_listener("numba:compile", _SlowCompileNotice(compiled)):
            try:
                compiled.compile(signature)
            except Exception:  # an incomplete cache file, after a full disk, raises errors of any kind
                try:
                    emptied = _empty_cache(compiled)
                except OSError:  # nothing can be written to the folder
                    _warn_uncached(_NO_FOLDER)
                    emptied = False
                if not emptied:
                    compiled = numba.njit(entry, no_cfunc_wrapper=True, **_OPTIONS)
                compiled.compile(signature)
        return compiled

    def _key(self):
        """Return a function that computes the cache key of the code. The key must be the same in every process.

        numba's own key contains a pickle of all closed-over variables, and the pickle of a jitted function differs between
        processes. The name and the stamp determine these variables, except numbers that someone has patched. So the key also
        contains the closed-over numbers.
        """
        cells = (cell.cell_contents for cell in self._function.__closure__ or ())
        numbers = tuple(value for value in cells if isinstance(value, (int, float)))
        return lambda signature, codegen: (signature, codegen.magic_tuple(), self._name, numbers)

    def _compile_once(self, args):
        if self._compiled is None:
            with _lock:
                self._compiled = self._compiled or self._compile(args)

    def prepared(self, *args) -> Callable[..., None]:
        """Return a function of ``work`` and a tuple of arguments with the types of ``args``, which is not for repeated calls.

        It does not look at the types again.
        """
        self._compile_once(args)
        entry, _ = untyped_call(self._compiled, (0, 1), args)
        if not _OPENMP or isinstance(entry, functools.partial):
            return lambda work, args: self(work, *args)

        def run(work, args):
            threads = thread_count(work)
            entry((0, 1) if threads == 1 else (-1, threads), args)

        return run

    def __call__(self, work: int, *args):
        """Run the kernel. ``work`` is a number of elementary steps; if it is small, one thread runs all tasks."""
        self._compile_once(args)
        threads = thread_count(work)
        if threads == 1 or _OPENMP:
            part = (0, 1) if threads == 1 else (-1, threads)
            self._compiled(part, *args)
            if repeat.is_recording():
                repeat.note_launch(*untyped_call(self._compiled, part, args), integers=True)
        else:
            repeat.refuse()
            others = [_threads().submit(self._compiled, (i, threads), *args) for i in range(1, threads)]
            self._compiled((0, threads), *args)
            for other in others:
                other.result()


_NO_FOLDER = (
    "sdit_kernels: found no writable folder for compiled CPU kernels, so every process compiles them anew "
    "(seconds per kernel). Set NUMBA_CACHE_DIR to a writable folder."
)
_NO_CACHE = (
    "sdit_kernels: cannot cache compiled CPU kernels with this version of numba, so every process compiles them anew "
    "(seconds per kernel)."
)
_warned = False


def _warn_uncached(message):
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, stacklevel=2)


# --- private names of numba -------------------------------------------------------------------------------------------------


def _set_cache_key(compiled, key) -> bool:
    """Make numba use key(signature, codegen) as the key of cached code.

    Return False if this version of numba lacks the private names. Its own key differs in every process, so the cache would
    grow without limit.
    """
    cache = getattr(compiled, "_cache", None)
    if not hasattr(cache, "_index_key"):
        return False
    cache._index_key = key
    return True


def untyped_call(compiled, part, args):
    """Return (function, arguments) for a repeated call of compiled(part, *args) that does not look at the types again.

    If this version of numba lacks the private names, numba looks at them.
    """
    overloads = getattr(compiled, "overloads", {})
    entry = getattr(overloads.get((numba.typeof(part), numba.typeof(args))), "entry_point", None)
    return (functools.partial(compiled, part), args) if entry is None else (entry, (part, args))


def _empty_cache(compiled) -> bool:
    """Delete the cached code of this function from disk. Return False if this version of numba lacks the private names."""
    flush = getattr(getattr(compiled, "_cache", None), "flush", None)
    if flush is None:
        return False
    flush()
    return True
