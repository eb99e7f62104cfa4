"""Run ``@triton.jit`` kernels on CPU tensors, natively compiled: the harness under the test-suite.

Call :func:`setup` before ``triton`` is imported.  It answers with the way in which kernels run in this process:

``"native"``
    Kernels are compiled to x86-64 machine code.  Triton's own front end, specialisation, autotuner, compile cache
    and optimisation passes are all real; only the last steps are ours.
``"interpreter"``
    Where native compilation is not supported (:func:`reason` says why): Triton's interpreter, ``TRITON_INTERPRET=1``.
``"gpu"``
    A CUDA device is present: kernels run there.  Each launch carries the memory of its CPU tensors over and back.

How native compilation works.  A Triton backend is registered under the name ``x86``.  It inherits the AMD lowering,
the one that ends in plain LLVM IR without inline assembly, and asks it for *one lane per program*: a tile then
becomes ordinary scalar code, with neither lane exchange nor shared memory.  The IR is re-targeted (address spaces and
AMD intrinsics replaced), given a loop over the grid, and handed to the x86 target which libtriton carries along.  The
C compiler driver links the object into a shared library, and ctypes calls it.

Elementwise kernels are first lowered with many lanes per program, which run one after the other: the code is that of
a few elements instead of a whole tile and compiles many times faster.  If the lanes turn out to talk to each other,
the one-lane form is built instead.

What this cannot show: races between programs or lanes (everything is sequential), the rounding of NVIDIA's
approximate division and exponential, and timings.  In one-lane form all elements of a tile are unrolled into one
function.  Kernels with reductions, scans or dots then take about 0.5 s to compile for a tile of 1024 elements and 6 s
for one of 4096; a dot counts its products (16 x 16 x 16: 0.6 s, 32 x 32 x 32: 5 s).
"""

import collections
import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

SUPPORTED_TRITON = ((3, 6), (3, 7), (3, 8))
CPU_FEATURES = ("avx2", "fma", "f16c")

_mode = None
_reason = ""


# ---------------------------------------------------------------------------------------------------------------------
# Choosing how kernels run
# ---------------------------------------------------------------------------------------------------------------------


def _triton_version():
    """(major, minor) of the installed Triton without importing it, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _missing_cpu_features():
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    except (OSError, TypeError):
        return list(CPU_FEATURES)
    return [feature for feature in CPU_FEATURES if feature not in flags]


def unsupported_reason():
    """Why native compilation is impossible here, as a sentence; None where it is possible."""
    version = _triton_version()
    if version is None:
        return "Triton is not installed."
    if version not in SUPPORTED_TRITON:
        known = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_TRITON)
        return f"Native compilation knows Triton {known}, not {version[0]}.{version[1]}."
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"Native compilation needs Linux on x86-64, not {sys.platform} on {platform.machine()}."
    if missing := _missing_cpu_features():
        return f"Native compilation needs a processor with {', '.join(missing)}."
    if shutil.which("gcc") is None:
        return "Native compilation needs gcc to link kernels, and none was found."
    return None


def _interpreter_requested():
    # The spellings which Triton itself takes for true.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def setup():
    """Make ``@triton.jit`` kernels runnable in this process; returns "native", "interpreter" or "gpu".

    Must come before the first import of triton, as Triton reads TRITON_INTERPRET while it is imported.  An environment
    that already asks for the interpreter gets it.  Calling again changes nothing and returns the same answer.
    """
    global _mode, _reason
    if _mode is not None:
        return _mode
    if _interpreter_requested():
        mode, why = "interpreter", "TRITON_INTERPRET is set in the environment."
    elif torch.cuda.is_available():
        mode, why = "gpu", "A CUDA device is present: each launch carries its CPU tensors there and back."
    elif (why := unsupported_reason()) is not None:
        mode = "interpreter"
    else:
        mode, why = "native", ""
    if mode == "interpreter":
        _use_interpreter()
    elif mode == "native":
        _install_native()
    else:
        _use_gpu()
    _mode, _reason = mode, why
    return mode


def reason():
    """Why :func:`setup` did not choose native compilation; an empty string if it did."""
    return _reason


# ---------------------------------------------------------------------------------------------------------------------
# Counting launches
# ---------------------------------------------------------------------------------------------------------------------

_counters = []
_counters_lock = threading.Lock()


@contextlib.contextmanager
def launches():
    """Count kernel launches of all threads inside the block: yields a Counter from kernel name to launches.

    Works in every mode, and may be nested.  Compilation without a launch (``warmup``) does not count.
    """
    counter = collections.Counter()
    with _counters_lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _counters_lock:
            # By identity: list.remove() would take the first *equal* counter, perhaps that of an outer block.
            _counters[:] = [other for other in _counters if other is not counter]


def _record_launch(name):
    with _counters_lock:
        for counter in _counters:
            counter[name] += 1


def _count_runs_of(module, class_name):
    """Count the launches that go through ``run`` of a Triton class (natively our own launcher counts)."""
    cls = getattr(importlib.import_module(module), class_name)
    original = cls.run

    @functools.wraps(original)
    def run(self, *args, grid, warmup, **kwargs):
        result = original(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup:
            _record_launch(self.fn.__name__)
        return result

    cls.run = run


# ---------------------------------------------------------------------------------------------------------------------
# A GPU
# ---------------------------------------------------------------------------------------------------------------------


def _use_gpu():
    """Tests written for CPU tensors run on the device: same code as a user's, same pointers' alignment and strides."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    type(driver.active).get_active_torch_device = lambda self: torch.device("cpu")  # what the package asks before a launch
    original = JITFunction.run

    @functools.wraps(original)
    def run(self, *args, **kwargs):
        storages = {}  # address -> (memory on the CPU, its copy on the GPU)

        def over(x):
            if isinstance(x, tuple):
                return tuple(map(over, x))
            if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
                return x
            here = x.untyped_storage()
            _, there = storages.setdefault(here.data_ptr(), (here, None))
            if there is None:
                _, there = storages[here.data_ptr()] = here, here.cuda()
            return torch.empty(0, dtype=x.dtype, device="cuda").set_(there, x.storage_offset(), x.shape, x.stride())

        result = original(self, *map(over, args), **{name: over(x) for name, x in kwargs.items()})
        for here, there in storages.values():
            here.copy_(there)
        return result

    JITFunction.run = run
    _count_runs_of("triton.runtime.jit", "JITFunction")


# ---------------------------------------------------------------------------------------------------------------------
# The interpreter
# ---------------------------------------------------------------------------------------------------------------------


def _use_interpreter():
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("native_triton.setup() chose the interpreter, but triton was imported before it.")
    os.environ["TRITON_INTERPRET"] = "1"
    if _triton_version() is None:
        return
    if _triton_version() < (3, 6):
        raise RuntimeError("The tests need Triton 3.6 or newer: pip install --no-deps triton==3.6.0")
    _mend_interpreter_bf16()
    _mend_interpreter_index()
    _mend_interpreter_floats()
    _count_runs_of("triton.runtime.interpreter", "InterpretedFunction")


def _mend_interpreter_bf16():
    """Casts between fp32 and bf16 as the hardware does them.

    The interpreter truncates where hardware rounds to nearest even.  It holds bf16 as uint16 bit patterns, so bf16
    *arithmetic* stays wrong: kernels have to compute in fp32, as ours do.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def to_bf16(values):
        bits = np.ascontiguousarray(values).view(np.uint32)
        # Adding just under half a unit, plus the bit that would become the last, rounds half-way cases to even; the
        # carry runs into the exponent as it should.  A NaN could carry over into infinity, hence the separate case.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)

    def to_fp32(bits):
        return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)

    def convert_float(values, source, target, rounding_mode):
        toward_zero = rounding_mode is not None and "RTZ" in str(rounding_mode)
        if source == tl.float32 and target == tl.bfloat16 and not toward_zero:
            return to_bf16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return to_fp32(values)
        return original(values, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def _mend_interpreter_index():
    """Let Triton 3.6 work with a recent numpy, which no longer makes an int from an array of shape (1,)."""
    if _triton_version() != (3, 6):
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _mend_interpreter_floats():
    """Pass Python floats as compiled kernels get them: fp32 values or, if annotated "fp64", doubles.

    The interpreter hands over the Python object, which has another precision and no methods such as ``to``.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpretedFunction.run

    def convert(value, annotation):
        kind = annotation if isinstance(annotation, str) else ""
        if kind not in ("fp32", "fp64") and (not isinstance(value, float) or "constexpr" in str(annotation)):
            return value
        dtype, numpy_type = (tl.float64, np.float64) if kind == "fp64" else (tl.float32, np.float32)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=numpy_type), dtype), dtype)

    @functools.wraps(original)
    def run(self, *args, grid, warmup, **kwargs):
        known = self.fn.__annotations__
        # Not strict: arguments may be missing at the end, given by name or by default.
        args = [convert(value, known.get(name)) for name, value in zip(self.arg_names, args, strict=False)]
        kwargs = {name: convert(value, known.get(name)) for name, value in kwargs.items()}
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = run


# ---------------------------------------------------------------------------------------------------------------------
# Re-targeting LLVM IR from AMD GPUs to x86-64 (text in, text out; nothing here needs Triton)
# ---------------------------------------------------------------------------------------------------------------------

_X86_HEADER = """\
target datalayout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
target triple = "x86_64-unknown-linux-gnu"
"""

# The program and lane indices are thread-local variables which the grid loop sets.  Functions that Triton did not
# inline can read them as well, which they could not if the indices were arguments of the kernel.
_INDEX_OF = {
    "llvm.amdgcn.workgroup.id.x": "native.pid_x",
    "llvm.amdgcn.workgroup.id.y": "native.pid_y",
    "llvm.amdgcn.workgroup.id.z": "native.pid_z",
    "llvm.amdgcn.workitem.id.x": "native.lane",
}

# Bodies of AMD intrinsics, by name without the type suffix.  {t} is the result type, {s} the suffix of generic
# intrinsics of that type; arguments are %0, %1, ...
_INTRINSIC_BODIES = {
    "exp2": "%r = call {t} @llvm.exp2.{s}({t} %0)\n ret {t} %r",
    "log": "%r = call {t} @llvm.log2.{s}({t} %0)\n ret {t} %r",  # the AMD instruction is a base 2 logarithm
    "sqrt": "%r = call {t} @llvm.sqrt.{s}({t} %0)\n ret {t} %r",
    "rcp": "%r = fdiv {t} 1.0, %0\n ret {t} %r",
    "rsq": "%s = call {t} @llvm.sqrt.{s}({t} %0)\n %r = fdiv {t} 1.0, %s\n ret {t} %r",
    "ldexp": "%r = call {t} @llvm.ldexp.{s}.i32({t} %0, i32 %1)\n ret {t} %r",
    "fdot2": """%x = fpext <2 x half> %0 to <2 x float>
 %y = fpext <2 x half> %1 to <2 x float>
 %products = fmul <2 x float> %x, %y
 %first = extractelement <2 x float> %products, i32 0
 %second = extractelement <2 x float> %products, i32 1
 %s = fadd float %2, %first
 %r = fadd float %s, %second
 ret float %r""",
    "readfirstlane": "ret {t} %0",
    "mbcnt.lo": "ret i32 %1",
    "mbcnt.hi": "ret i32 %1",
    "s.barrier": "ret void",
    "wave.barrier": "ret void",
    "s.waitcnt": "ret void",
    "sched.barrier": "ret void",
    "workitem.id.y": "ret i32 0",
    "workitem.id.z": "ret i32 0",
}

# Intrinsics which a lane computes from its own values alone.  A list of the harmless: what is unknown, counts as an
# exchange between lanes.
_LANE_LOCAL = set(_INDEX_OF) | {
    "llvm.amdgcn." + name for name in ("exp2", "log", "sqrt", "rcp", "rsq", "ldexp", "workitem.id.y", "workitem.id.z")
}

_NUM_PROGRAMS = """\
define internal i64 @__ockl_get_num_groups(i32 %axis) alwaysinline {
  %address = getelementptr i32, ptr @native.grid, i32 %axis
  %size = load i32, ptr %address
  %r = zext i32 %size to i64
  ret i64 %r
}
"""

# LLVM lowers  fptrunc float to bfloat  to a call of this function, which libgcc has only since version 13.
_BF16_HELPER = """
define weak_odr hidden bfloat @__truncsfbf2(float %x) {
  %bits = bitcast float %x to i32
  %high = lshr i32 %bits, 16
  %odd = and i32 %high, 1
  %bias = add i32 %odd, 32767
  %sum = add i32 %bits, %bias
  %rounded = lshr i32 %sum, 16
  %quiet = or i32 %high, 64
  %nan = fcmp uno float %x, 0.0
  %word = select i1 %nan, i32 %quiet, i32 %rounded
  %short = trunc i32 %word to i16
  %r = bitcast i16 %short to bfloat
  ret bfloat %r
}
"""


def _lanes_are_independent(ir):
    """Whether no lane of this AMD IR can see what another one does."""
    if "addrspace(3)" in re.sub(r"^@global_smem = .*$", "", ir, flags=re.M):  # shared memory in use
        return False
    used = {re.sub(r"(\.[if]\d+)+$", "", name) for name in re.findall(r"@(llvm\.amdgcn\.[\w.]+)\(", ir)}
    return used <= _LANE_LOCAL


def _retarget(ir, shared_bytes, fast):
    """AMD IR to x86 IR with an exported function ``native_launch``, the kernel's name and its parameter types."""
    ir = _drop_gpu_markers(ir)
    kernel, types = _kernel_signature(ir)
    for address, place in _PLACES.items():
        ir = ir.replace(f"inttoptr (i64 {address} to ptr)", place)
    ir = re.sub(r"^define .*?^}$", lambda match: _shorten_blocks(match[0], fast), ir, flags=re.M | re.S)
    ir, definitions = _replace_intrinsics(ir)
    ir, library_calls = _replace_device_library(ir)
    ir = ir.replace("define void @", "define internal void @")
    ir = re.sub(
        r"@global_smem = .*",
        f"@global_smem = internal thread_local global [{max(shared_bytes or 0, 16)} x i8] zeroinitializer, align 16",
        ir,
    )
    parts = [_X86_HEADER, ir, *definitions, *library_calls, _BF16_HELPER, _grid_loop(kernel, types)]
    return _without_repeated_declarations("\n".join(parts)), kernel, types


def _drop_gpu_markers(ir):
    ir = re.sub(r"^(target |source_filename|attributes |!|; ).*$", "", ir, flags=re.M)
    ir = re.sub(r",? ![\w.]+ !\d+", "", ir)  # metadata: debug locations, AMD hints, accuracy permissions
    ir = re.sub(r" #\d+\b", "", ir)  # attribute groups: name of the GPU, work-group sizes
    ir = re.sub(r' syncscope\("[^"]*"\)', "", ir)
    ir = ir.replace(" inreg", "")
    # One flat address space; a cast between two of them becomes a cast of a pointer to itself.
    ir = re.sub(r", addrspace\(\d+\)", "", ir)
    ir = re.sub(r" addrspace\(\d+\)", "", ir)
    return ir.replace("addrspacecast", "bitcast")


def _kernel_signature(ir):
    """Name and LLVM parameter types of the kernel."""
    match = re.search(r"^define void @([\w.]+)\((.*)\)[^()]*\{$", ir, re.M)
    parameters = re.sub(r"\([^()]*\)", "", match[2])  # attributes such as dereferenceable(8)
    return match[1], [parameter.split()[0] for parameter in parameters.split(",") if parameter.strip()]


# --- Making long functions cheap to compile ---
#
# A tile in one-lane form is a function of thousands of lines, and several of the compiler's algorithms take time
# quadratic in the number of branches or in the length of a basic block: a masked sum of 1024 elements took 15 s.
# Without branches around accesses, in blocks of moderate length and with the fast instruction selector, it takes a
# fraction of a second.

# Stand in Triton IR for the addresses of two places which have no name there: one that takes masked-off stores, and
# one that masked-off loads read.  The latter holds NaN, as a load without ``other`` may give anything.
_SPARE_ADDRESS, _UNDEFINED_ADDRESS = 0x5EA7ED000000, 0x5EA7ED000040
_PLACES = {_SPARE_ADDRESS: "@native.spare", _UNDEFINED_ADDRESS: "@native.undefined"}
_LINES_PER_BLOCK = 256

_TTIR_ACCESS = re.compile(r"( *(?:%[\w#]+ = )?)tt\.(load|store) (%[\w#]+(?:, %[\w#]+)*)(.*?) : (\S+)( loc\(.*\))?")
_SELECT = re.compile(r"  (%[\w.]+) = select i1 (%[\w.]+), (half|bfloat|float|double) (\S+), \3 (\S+)$")
_BITS = {"half": "i16", "bfloat": "i16", "float": "i32", "double": "i64"}


def _without_masks(ttir):
    """Triton IR in which masked loads and stores have become unmasked ones.

    The lowering branches around each masked element.  Here, a masked-off access goes to a spare place instead: no
    branch, and still no touch of the address which the mask protects.
    """
    lines, count = [], 0
    for line in ttir.splitlines():
        access = _TTIR_ACCESS.fullmatch(line)
        operands = access[3].split(", ") if access else []
        if access and len(operands) > (1 if access[2] == "load" else 2):
            line = _unmasked(access, operands, f"%native{count}")
            count += 1
        lines.append(line)
    return "\n".join(lines)


def _unmasked(access, operands, name):
    """The lines for one masked access; all values they define have names that begin with ``name``."""
    start, kind, _, attributes, pointers, location = access.groups()
    pointer = re.search(r"!tt\.ptr<.*?>", pointers)[0]
    values = pointers.replace(pointer, pointer[len("!tt.ptr<") : -1])
    is_tensor = pointers.startswith("tensor<")
    masks = pointers.replace(pointer, "i1") + ", " if is_tensor else ""
    mask = operands[1 if kind == "load" else 2]
    lines = [
        f"{name}_a = arith.constant {_SPARE_ADDRESS if kind == 'store' else _UNDEFINED_ADDRESS} : i64",
        f"{name}_b = tt.int_to_ptr {name}_a : i64 -> {pointer}",
        f"{name}_c = tt.splat {name}_b : {pointer} -> {pointers}" if is_tensor else "",
        f"{name}_d = arith.select {mask}, {operands[0]}, {name}_{'c' if is_tensor else 'b'} : {masks}{pointers}",
    ]
    if kind == "store":
        lines.append(f"tt.store {name}_d, {operands[1]}{attributes} : {pointers}{location or ''}")
    elif len(operands) == 2:
        lines.append(f"{start}tt.load {name}_d{attributes} : {pointers}{location or ''}")
    else:
        lines.append(f"{name}_e = tt.load {name}_d{attributes} : {pointers}{location or ''}")
        lines.append(f"{start}arith.select {mask}, {name}_e, {operands[2]} : {masks}{values}")
    return "\n".join(lines)


def _shorten_blocks(function, fast):
    """Cut the basic blocks of a function, in LLVM IR, to moderate length; ``fast`` also switches the optimiser off."""
    header, *body = _name_values(function).splitlines()
    blocks = {label: _cut(label, lines) for label, lines in _blocks_of(header, body[:-1])}
    if fast:
        header = header.replace(" {", " noinline optnone {")
    lines = [header]
    for label, piece in itertools.chain.from_iterable(blocks.values()):
        lines.append(label[1:] + ":")
        for line in piece:
            if " = phi " in line:  # control now comes from the last piece of a predecessor
                line = re.sub(r", (%[\w.]+) \]", lambda match: f", {blocks[match[1]][-1][0]} ]", line)
            select = _SELECT.match(line)
            lines += _integer_select(*select.groups()) if select else [line]
    return "\n".join([*lines, "}"])


def _name_values(function):
    """Name what has only a number: numbers have to be in order, and would not stay so."""
    function = re.sub(r"%(\d+)\b", r"%v\1", function)
    return re.sub(r"^(\d+):", r"v\1:", function, flags=re.M)


def _blocks_of(header, body):
    """The basic blocks of a function, as pairs of label and lines."""
    # The entry block is not labelled in the text; its number comes after those of the parameters.
    blocks = [("%v" + str(len(re.findall(r"%v\d+", header))), [])]
    for line in body:
        if match := re.match(r"([\w.]+):", line):
            blocks.append(("%" + match[1], []))
        elif line:
            blocks[-1][1].append(line)
    return blocks


def _cut(label, lines):
    """A long block as several which follow each other; phis stay together at the beginning."""
    phis = sum(" = phi " in line for line in lines)
    starts = range(phis + _LINES_PER_BLOCK, len(lines), _LINES_PER_BLOCK)
    labels = [label] + [f"{label}.{start}" for start in starts]
    bounds = itertools.pairwise([0, *starts, len(lines)])
    pieces = [(name, lines[low:high]) for name, (low, high) in zip(labels, bounds, strict=True)]
    for (_, piece), (following, _) in itertools.pairwise(pieces):
        piece.append(f"  br label {following}")
    return pieces


def _integer_select(result, condition, kind, first, second):
    """A choice between floating point numbers by way of integers: x86 has no such instruction, and would branch."""
    bits = _BITS[kind]
    yield f"  {result}.a = bitcast {kind} {first} to {bits}"
    yield f"  {result}.b = bitcast {kind} {second} to {bits}"
    yield f"  {result}.c = select i1 {condition}, {bits} {result}.a, {bits} {result}.b"
    yield f"  {result} = bitcast {bits} {result}.c to {kind}"


# --- Replacing what only a GPU has ---


def _replace_intrinsics(ir):
    definitions = []
    for line in re.findall(r"^declare .*@llvm\.amdgcn\..*$", ir, re.M):
        result, name, arguments = re.search(r"(\{.*?\}|<.*?>|\w+) @([\w.]+)\((.*)\)", line).groups()
        local = "native." + name
        ir = ir.replace(line, "").replace(f"@{name}(", f"@{local}(")
        kinds = re.findall(r"(?:^|, )(<.*?>|\w+)", arguments)
        parameters = ", ".join(f"{kind} %{i}" for i, kind in enumerate(kinds))
        body = _intrinsic_body(name, result)
        definitions.append(f"define internal {result} @{local}({parameters}) alwaysinline {{\n {body}\n}}")
        definitions += _declarations_in(body)
    return ir, definitions


def _intrinsic_body(name, result):
    if name in _INDEX_OF:
        return f"%r = load i32, ptr @{_INDEX_OF[name]}\n ret i32 %r"
    base = re.sub(r"(\.[if]\d+)+$", "", name)
    body = _INTRINSIC_BODIES.get(base.removeprefix("llvm.amdgcn."))
    if body is None:
        raise NotImplementedError(f"native_triton has no x86 counterpart of the intrinsic {name}")
    suffix = name.rsplit(".", 1)[-1]
    return body.format(t=result, s=suffix)


def _declarations_in(body):
    for result, name, arguments in re.findall(r"call (\w+) @(llvm\.[\w.]+)\(([^)]*)\)", body):
        yield f"declare {result} @{name}({', '.join(argument.split()[0] for argument in arguments.split(','))})"


def _replace_device_library(ir):
    """Send calls of AMD's device library (``__ocml_erf_f32``) to the C library (``erff``)."""
    definitions = []
    if "@__ockl_get_num_groups(" in ir:  # tl.num_programs
        ir = re.sub(r"^declare .*@__ockl_get_num_groups\(.*$", _NUM_PROGRAMS, ir, flags=re.M)
    for line in re.findall(r"^declare .*@__ocml_\w+\(.*$", ir, re.M):
        name, function, width = re.search(r"@(__ocml_(\w+)_f(32|64))\(", line).groups()
        result = "float" if width == "32" else "double"
        count = line.count(result) - 1
        arguments = ", ".join(f"{result} %{i}" for i in range(count))
        if function == "rsqrt":  # not in the C library
            body = _INTRINSIC_BODIES["rsq"].format(t=result, s="f" + width)
            definitions += _declarations_in(body)
        else:
            target = function + ("f" if width == "32" else "")
            body = f"%r = call {result} @{target}({arguments})\n ret {result} %r"
            definitions.append(f"declare {result} @{target}({', '.join([result] * count)})")
        definitions.append(f"define internal {result} @{name}({arguments}) alwaysinline {{\n {body}\n}}")
        ir = ir.replace(line, "")
    return ir, definitions


def _without_repeated_declarations(ir):
    """LLVM takes each declaration once, and ours may meet those of the kernel."""
    seen, lines = set(), []
    for line in ir.splitlines():
        if line.startswith("declare "):
            name = re.search(r"@([\w.]+)\(", line)[1]
            if name in seen:
                continue
            seen.add(name)
        lines.append(line)
    return "\n".join(lines)


def _grid_loop(kernel, types):
    """IR of ``native_launch(arguments, lanes, grid_x, grid_y, grid_z)``, which runs program after program.

    ``arguments`` is an array of pointers to the values.  Written in IR, since compiling a loop in C would cost more
    time than all other steps of a small kernel.
    """
    loads = []
    for i, kind in enumerate(types):
        loads += [
            f"  %slot{i} = getelementptr ptr, ptr %arguments, i64 {i}",
            f"  %address{i} = load ptr, ptr %slot{i}",
            f"  %value{i} = load {kind}, ptr %address{i}",
        ]
    values = ", ".join(f"{kind} %value{i}" for i, kind in enumerate(types))
    undefined = "".join(["\\FF"] * 64)
    grid = "@native.grid = internal thread_local global [3 x i32] zeroinitializer"
    variables = "\n".join(f"@{name} = internal thread_local global i32 0" for name in sorted(_INDEX_OF.values()))
    return f"""
@native.spare = internal global [64 x i8] zeroinitializer, align 64
@native.undefined = internal constant [64 x i8] c"{undefined}", align 64
{grid}
{variables}
define void @native_launch(ptr %arguments, i32 %lanes, i32 %grid_x, i32 %grid_y, i32 %grid_z) {{
entry:
{chr(10).join(loads)}
  store i32 %grid_x, ptr @native.grid
  %grid_1 = getelementptr i32, ptr @native.grid, i32 1
  store i32 %grid_y, ptr %grid_1
  %grid_2 = getelementptr i32, ptr @native.grid, i32 2
  store i32 %grid_z, ptr %grid_2
  br label %loop_z
loop_z:
  %z = phi i32 [ 0, %entry ], [ %next_z, %end_y ]
  %more_z = icmp ult i32 %z, %grid_z
  br i1 %more_z, label %loop_y, label %done
loop_y:
  %y = phi i32 [ 0, %loop_z ], [ %next_y, %end_x ]
  %more_y = icmp ult i32 %y, %grid_y
  br i1 %more_y, label %loop_x, label %end_y
loop_x:
  %x = phi i32 [ 0, %loop_y ], [ %next_x, %end_lane ]
  %more_x = icmp ult i32 %x, %grid_x
  br i1 %more_x, label %program, label %end_x
program:
  store i32 %x, ptr @native.pid_x
  store i32 %y, ptr @native.pid_y
  store i32 %z, ptr @native.pid_z
  br label %loop_lane
loop_lane:
  %lane = phi i32 [ 0, %program ], [ %next_lane, %loop_lane ]
  store i32 %lane, ptr @native.lane
  call void @{kernel}({values})
  %next_lane = add i32 %lane, 1
  %more_lane = icmp ult i32 %next_lane, %lanes
  br i1 %more_lane, label %loop_lane, label %end_lane
end_lane:
  %next_x = add i32 %x, 1
  br label %loop_x
end_x:
  %next_y = add i32 %y, 1
  br label %loop_y
end_y:
  %next_z = add i32 %z, 1
  br label %loop_z
done:
  ret void
}}
"""


def _link(obj):
    """An object file to a shared library, both as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "kernel.o"), os.path.join(folder, "kernel.so")
        Path(source).write_bytes(obj)
        # -z defs: a function that exists nowhere is an error now, with its name, rather than when it is called.
        command = ["gcc", "-shared", "-nostartfiles", "-Wl,-z,defs", "-o", target, source, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"Linking a kernel failed:\n{done.stderr}")
        return Path(target).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Launching
# ---------------------------------------------------------------------------------------------------------------------

_INTEGERS = {
    "u1": ctypes.c_uint8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
}

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # of CUDA: a launch that works here should work there


def _flatten(types, values):
    """Pairs of type and value of all runtime parameters; those of tuples one by one, constants left out."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def _c_value(kind, value):
    """A launch argument as the ctypes object which holds what the kernel reads."""
    if kind.startswith("*"):
        return ctypes.c_void_p(_address(value))
    if kind == "fp64":
        return ctypes.c_double(value)
    if kind in ("fp32", "f32"):
        return ctypes.c_float(value)
    if kind == "fp16":
        return ctypes.c_uint16(struct.unpack("H", struct.pack("e", value))[0])
    if kind == "bf16":
        return ctypes.c_int16(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).item())
    if kind not in _INTEGERS:
        raise NotImplementedError(f"native_triton cannot pass arguments of type {kind}")
    number = _INTEGERS[kind](int(value))
    if number.value != int(value):  # ctypes wraps around in silence
        raise OverflowError(f"{value} does not fit the kernel's parameter of type {kind}")
    return number


def _address(value):
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    device = getattr(value, "device", None)
    if isinstance(device, torch.device) and device.type != "cpu":
        raise ValueError(f"a native kernel takes CPU tensors, not one on {device}")
    return value.data_ptr()


def _load_library(binary):
    """Load a shared library from a fresh file: the dynamic loader would answer a known name with the old library."""
    descriptor, name = tempfile.mkstemp(suffix=".so")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(binary)
        return ctypes.CDLL(name)  # CDLL rather than PyDLL: other Python threads run on while the kernel does
    finally:
        os.unlink(name)


class NativeLauncher:
    """What Triton calls to launch a compiled kernel.

    It loads the kernel's library by itself, from Triton's cache.  ``CompiledKernel`` publishes its launcher before
    its function, so that a second thread with the same first launch could be given the launcher and no function.
    """

    def __init__(self, src, metadata):
        from triton.runtime.cache import get_cache_manager

        path = get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.so")
        self.library = _load_library(Path(path).read_bytes())
        self.function = self.library.native_launch
        self.function.restype = None
        self.name = src.name
        self.types = list(src.signature.values())
        self.lanes = metadata.native_lanes
        self.parameter_count = metadata.native_parameter_count

    def __call__(self, grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter, leave, *args):
        grid = [int(size) for size in (grid_x, grid_y, grid_z)]
        for size, limit in zip(grid, GRID_LIMITS, strict=True):
            if not 0 <= size <= limit:
                raise ValueError(f"grid {tuple(grid)} of kernel {self.name} exceeds {GRID_LIMITS}")
        values = [_c_value(kind, value) for kind, value in _flatten(self.types, args)]
        # The lowering appends pointers to scratch memory which our kernels do not use.
        values += [ctypes.c_void_p(0) for _ in range(self.parameter_count - len(values))]
        array = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        if enter is not None:
            enter(launch_metadata)
        self.function(array, self.lanes, *grid)
        if leave is not None:
            leave(launch_metadata)
        _record_launch(self.name)


class _NativeUtils:
    """The part of a driver which Triton asks for device properties and for loading binaries."""

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 24, "multiprocessor_count": 1, "warpSize": 1, "max_num_regs": 65536}

    def load_binary(self, name, binary, shared, device):
        # module, function, registers, spills, most threads; the launcher has loaded the library already.
        return self, None, 0, 0, 1 << 20

    def unload_module(self, module):
        pass  # a few kilobytes each, and another thread may be inside


# ---------------------------------------------------------------------------------------------------------------------
# The Triton backend
# ---------------------------------------------------------------------------------------------------------------------

# A GPU without matrix cores (dots become multiply-adds) and with neither packed nor buffer instructions of note.
_ARCH = "gfx1030"
_ELEMENTS_PER_LANE = 8
_MOST_LANES = 256
_CROSS_LANE_OPERATIONS = re.compile(r"\"?tt\.(reduce|scan|dot|gather|histogram|sort|trans|join|split|cat|reshape)\b")


def _lanes_for(ttir):
    """How many lanes to try for this module; 1 where its operations are known to need several elements at once."""
    if _CROSS_LANE_OPERATIONS.search(ttir):
        return 1
    shapes = re.findall(r"tensor<((?:\d+x)+)", ttir)
    largest = max((math.prod(map(int, shape.split("x")[:-1])) for shape in shapes), default=1)
    return max(1, min(_MOST_LANES, largest // _ELEMENTS_PER_LANE))


def _install_native():
    import triton
    from triton.backends import Backend, backends

    if triton.knobs.runtime.interpret:
        raise RuntimeError("triton was imported with TRITON_INTERPRET set, and can no longer compile.")
    compiler, driver = _native_backend(), _native_driver()
    backends["x86"] = Backend(compiler, driver)
    triton.runtime.driver.set_active(driver())


def _native_backend():
    """The compiler class; a function, because its base can be imported only after :func:`setup` has chosen."""
    from triton._C.libtriton import amd, ir, llvm, passes
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.compiler import BaseBackend

    def clone(text, context):
        # Passes change a module in place, and Python has no other way to copy one.
        with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
            file.write(text)
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module

    class NativeBackend(HIPBackend):
        binary_ext = "so"

        def __init__(self, target):
            super().__init__(target)
            self.binary_ext = "so"

        @staticmethod
        def supports_target(target):
            return target.backend == "x86"

        @staticmethod
        def get_tensor_specialization(arg, **kwargs):
            # The AMD version also notes that a tensor is below 2 GiB, for 32-bit buffer offsets.
            return BaseBackend.get_tensor_specialization(arg, **kwargs)

        def get_target_name(self, options):
            return f"hip:{options.arch}"

        def parse_options(self, opts):
            opts = {key: value for key, value in opts.items() if key not in ("num_warps", "num_stages", "arch")}
            # Without contraction a kernel can be bit-equal to the same formula in PyTorch.
            opts.setdefault("enable_fp_fusion", False)
            opts.setdefault("allowed_dot_input_precisions", ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"))
            options = super().parse_options(opts)
            # The device libraries of AMD stay out: their functions are those of the C library.
            self._set(options, num_warps=1, warp_size=1, num_stages=1, extern_libs=())
            return options

        @staticmethod
        def _set(options, **values):
            for name, value in values.items():
                object.__setattr__(options, name, value)  # the dataclass is frozen

        def add_stages(self, stages, options, language):
            stages["ttir"] = lambda module, metadata: self.make_ttir(module, metadata, options)
            stages["llir"] = lambda module, metadata: self.make_native_llir(module, metadata, options)
            stages["so"] = lambda text, metadata: self.make_library(text, metadata, options)

        def make_native_llir(self, module, metadata, options):
            text = _without_masks(str(module))
            lanes = _lanes_for(text)
            if lanes > 1:
                trial = self._lower(clone(text, module.context), metadata, options, lanes)
                if _lanes_are_independent(trial):
                    return trial
            return self._lower(clone(text, module.context), metadata, options, 1)

        def _lower(self, module, metadata, options, lanes):
            options = copy.copy(options)
            self._set(options, warp_size=lanes)
            metadata["native_lanes"] = lanes
            self._distribute(module, options)
            return self._to_llvm(module, metadata, options)

        @staticmethod
        def _distribute(module, options):
            """Give tensors a distribution over lanes.

            Of the AMD pipeline, only what is needed: the rest schedules for a GPU, and partly reads settings of
            the process (buffer operations, asynchronous copies).  Leaving out the pass which widens accesses keeps
            all tensors of a shape in one distribution, without exchange between lanes.
            """
            manager = ir.pass_manager(module.context)
            target = f"hip:{options.arch}"
            passes.ttir.add_convert_to_ttgpuir(manager, target, 1, options.warp_size, 1)
            passes.ttgpuir.add_remove_layout_conversions(manager)
            amd.passes.ttgpuir.add_accelerate_matmul(manager, options.arch, 0, 1)  # makes operand types of dots agree
            passes.ttgpuir.add_remove_layout_conversions(manager)
            passes.common.add_canonicalizer(manager)
            passes.common.add_cse(manager)
            passes.common.add_symbol_dce(manager)
            manager.run(module, "distribute")

        @staticmethod
        def _to_llvm(module, metadata, options):
            """Lower to LLVM IR.  LLVM does not optimise it: compiling is what takes the time of a test, not running."""
            manager = ir.pass_manager(module.context)
            passes.convert.add_scf_to_cf(manager)
            passes.gluon.add_inliner(manager)
            passes.convert.add_index_to_llvmir(manager)
            arch = [options.arch] if _triton_version() >= (3, 8) else []
            amd.passes.ttgpuir.add_allocate_shared_memory(manager, *arch)
            amd.passes.ttgpuir.add_to_llvmir(manager, options.arch, False)  # False: keep subnormals in exponentials
            passes.common.add_canonicalizer(manager)
            passes.common.add_cse(manager)
            passes.convert.add_cf_to_llvmir(manager)
            passes.convert.add_arith_to_llvmir(manager)
            passes.common.add_canonicalizer(manager)
            passes.common.add_cse(manager)
            passes.common.add_symbol_dce(manager)
            if hasattr(passes.convert, "add_reconcile_unrealized_casts"):
                passes.convert.add_reconcile_unrealized_casts(manager)
            manager.run(module, "to_llvm")
            metadata["shared"] = module.get_int_attr("ttg.shared") or 0
            return str(llvm.to_module(module, llvm.context()))

        @staticmethod
        def make_library(text, metadata, options):
            # Contraction is found by the instruction selector proper, which the fast way does without.
            text, metadata["name"], types = _retarget(text, metadata["shared"], not options.enable_fp_fusion)
            metadata["native_parameter_count"] = len(types)
            features = ",".join("+" + feature for feature in CPU_FEATURES)
            arguments = [text, "x86_64-unknown-linux-gnu", "haswell", features, [], options.enable_fp_fusion, True]
            if _triton_version() >= (3, 8):
                arguments.append(False)  # no dump of the machine scheduler
            llvm.init_targets()
            return _link(llvm.translate_to_asm(*arguments))

        @functools.lru_cache  # noqa: B019  (as in the base class; there is one backend per process)
        def hash(self):
            # Part of the cache key: libraries built by another version of this file are never used.
            return f"native-{self.target}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"

    return NativeBackend


def _native_driver():
    """The driver class; see :func:`_native_backend`."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class NativeDriver(DriverBase):
        def __init__(self):
            super().__init__()
            self.utils = _NativeUtils()
            self.launcher_cls = NativeLauncher

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            raise NotImplementedError("native kernels are launched without generated C code")

        def get_current_target(self):
            return GPUTarget("x86", _ARCH, 1)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_device(self):
            return 0

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device=0):
            return 0

        def get_device_interface(self):
            return torch.cpu

        def get_benchmarker(self):
            return _benchmark_once

        def get_empty_cache_for_benchmark(self):
            return torch.empty(1)

        def clear_cache(self, cache):
            pass

    return NativeDriver


def _benchmark_once(kernel_call, quantiles=None, **_):
    """For the autotuner, which needs times but not good ones."""
    start = time.perf_counter()
    kernel_call()
    elapsed = (time.perf_counter() - start) * 1e3
    return elapsed if quantiles is None else [elapsed] * len(quantiles)


# ---------------------------------------------------------------------------------------------------------------------
# Finding stray accesses
# ---------------------------------------------------------------------------------------------------------------------

_MARGIN = 4096  # bytes on both sides of a guarded tensor
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison_(tensor):
    """Fill an output with values that a test notices if the kernel leaves them: NaN, or the least integer."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


@contextlib.contextmanager
def guarded(*tensors):
    """Copies of the tensors among canaries: yields a tuple of them, and asserts afterwards that no canary changed.

    Shape, strides, type and alignment are those of the originals, so the same kernel variant runs.  All memory
    around a copy and in the gaps between its rows is canary.  Read as floating point, canaries are NaN: a load out of
    bounds shows in the result, a store out of bounds fails the block.
    """
    guards = [_Guard(tensor, number) for number, tensor in enumerate(tensors)]
    yield tuple(guard.copy for guard in guards)
    for guard in guards:
        guard.check()


class _Guard:
    def __init__(self, tensor, number):
        self.number = number
        self.kind = tensor.dtype
        size = tensor.element_size()
        extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = 0 if tensor.numel() == 0 else extent
        buffer = self._canaries(extent * size + 2 * _MARGIN + 64, number)
        # The copy starts as far behind a multiple of 64 as the original, which alignment specialisation looks at.
        start = _MARGIN + (tensor.data_ptr() - buffer.data_ptr() - _MARGIN) % 64
        if (buffer.data_ptr() + start) % size:
            raise ValueError("the tensor is not aligned to its own element size")
        skip = start % size
        elements = (buffer.numel() - skip) // size
        self.words = buffer[skip : skip + elements * size].view(_INTEGER_OF_SIZE[size])
        self.first = (start - skip) // size
        place = (tensor.shape, tensor.stride(), self.first)
        self.copy = self.words.view(tensor.dtype).as_strided(*place)
        self.copy.copy_(tensor)
        owned = torch.zeros(elements, dtype=torch.bool)
        owned.as_strided(*place).fill_(True)
        self.free = ~owned
        self.expected = self.words[self.free]

    @staticmethod
    def _canaries(count, number):
        # 16-bit words 0xFFC0 to 0xFFFF make NaNs of fp16, bf16, fp32 and fp64.  Each tensor has its own, so that a
        # kernel which carries values from behind its input to behind its output does not go unseen.
        word = 0xFFC0 | (5 + 17 * number) % 64
        words = torch.full((count // 2 + 8,), word - 0x10000, dtype=torch.int16)
        return words.view(torch.uint8)

    def check(self):
        changed = torch.nonzero(self.free)[:, 0][self.words[self.free] != self.expected] - self.first
        assert changed.numel() == 0, (
            f"{changed.numel()} elements were written outside of guarded tensor {self.number} ({self.kind}, "
            f"{tuple(self.copy.shape)}), at element offsets {changed[:8].tolist()}"
        )
