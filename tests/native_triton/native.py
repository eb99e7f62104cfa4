"""The Triton backend that compiles kernels to x86-64 machine code, and their launch."""

import contextlib
import copy
import ctypes
import functools
import hashlib
import math
import os
import re
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from .counting import record_launch
from .llvm_ir import lanes_are_independent, retarget, without_masks
from .support import CPU_FEATURES, triton_version

# --- Launching ---

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

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # the limits of CUDA, so that a launch that works here also works there


def _flatten(types, values):
    """Return (type, value) pairs of all runtime parameters. Tuples are flattened, and constants are left out."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def c_value(kind, value):
    """Return a launch argument as the ctypes object whose memory the kernel reads."""
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
    if number.value != int(value):  # ctypes wraps around silently
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
    """Load a shared library from a fresh file, because the dynamic loader returns the old library for a known name."""
    descriptor, name = tempfile.mkstemp(suffix=".so")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(binary)
        return ctypes.CDLL(name)  # CDLL, not PyDLL: it lets other Python threads run during the kernel
    finally:
        os.unlink(name)


class NativeLauncher:
    """The object that Triton calls to launch a compiled kernel.

    It loads the kernel's library from Triton's cache itself. ``CompiledKernel`` publishes its launcher before its function, so
    a second thread with the same first launch could otherwise get the launcher without the function.
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
        values = [c_value(kind, value) for kind, value in _flatten(self.types, args)]
        # The lowering appends pointers to scratch memory, which our kernels do not use.
        values += [ctypes.c_void_p(0) for _ in range(self.parameter_count - len(values))]
        array = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        if enter is not None:
            enter(launch_metadata)
        self.function(array, self.lanes, *grid)
        if leave is not None:
            leave(launch_metadata)
        record_launch(self.name)


class _NativeUtils:
    """The part of a driver that Triton asks for device properties and for loading binaries."""

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 24, "multiprocessor_count": 1, "warpSize": 1, "max_num_regs": 65536}

    def load_binary(self, name, binary, shared, device):
        # module, function, registers, spills, most threads: the launcher has already loaded the library
        return self, None, 0, 0, 1 << 20

    def unload_module(self, module):
        pass  # unloading would save a few kilobytes, and another thread may be inside the kernel


# --- Compiling ---

_alignment_ignored = False


@contextlib.contextmanager
def alignment_ignored():
    """Compile one variant of a kernel inside the block, whether or not addresses and integers are multiples of 16.

    Triton compiles one for every pattern of multiples it meets. On a CPU these variants compute the same in the same way.
    """
    global _alignment_ignored
    before, _alignment_ignored = _alignment_ignored, True
    try:
        yield
    finally:
        _alignment_ignored = before


def _without_alignment(kind, key):
    """Return the key of an argument without its note "D": divisible by 16."""
    if isinstance(kind, tuple):
        return tuple(map(_without_alignment, kind, key))
    return "" if key == "D" and kind != "constexpr" else key


def _let_alignment_be_ignored():
    from triton.runtime import jit

    specialize = getattr(jit, "native_specialize_impl", None)
    if specialize is None:  # another version of Triton: every variant is compiled
        return

    def native_specialize_impl(backend, *args):
        kind, key = specialize(backend, *args)
        ignored = _alignment_ignored and backend.binary_ext == "so"  # not where a test compiles for a GPU
        return (kind, _without_alignment(kind, key)) if ignored else (kind, key)

    jit.native_specialize_impl = native_specialize_impl


# A GPU without matrix cores, so dots become multiply-adds, and without packed or buffer instructions that matter here.
_ARCH = "gfx1030"
_ELEMENTS_PER_LANE = 1  # 8 elements would take twice the time to compile
_MOST_LANES = 256
_CROSS_LANE_OPERATIONS = re.compile(r"\"?tt\.(reduce|scan|dot|gather|histogram|sort|trans|join|split|cat|reshape)\b")


def _lanes_for(ttir):
    """Return the number of lanes to try for this module. It is 1 where an operation needs several elements at once."""
    if _CROSS_LANE_OPERATIONS.search(ttir):
        return 1
    shapes = re.findall(r"tensor<((?:\d+x)+)", ttir)
    largest = max((math.prod(map(int, shape.split("x")[:-1])) for shape in shapes), default=1)
    return max(1, min(_MOST_LANES, largest // _ELEMENTS_PER_LANE))


def _link(obj):
    """Link an object file into a shared library, both as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "kernel.o"), os.path.join(folder, "kernel.so")
        Path(source).write_bytes(obj)
        # -z defs reports a missing function now, with its name, instead of when it is called.
        command = ["gcc", "-shared", "-nostartfiles", "-Wl,-z,defs", "-o", target, source, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"Linking a kernel failed:\n{done.stderr}")
        return Path(target).read_bytes()


def install_native():
    import triton
    from triton.backends import Backend, backends

    if triton.knobs.runtime.interpret:
        raise RuntimeError("triton was imported with TRITON_INTERPRET set, and can no longer compile.")
    compiler, driver = _native_backend(), _native_driver()
    backends["x86"] = Backend(compiler, driver)
    _let_alignment_be_ignored()
    triton.runtime.driver.set_active(driver())


def _native_backend():
    """Return the compiler class. Its base can be imported only after :func:`setup`, so it is defined in a function."""
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
            # The AMD version also notes tensors below 2 GiB, for 32-bit buffer offsets.
            return BaseBackend.get_tensor_specialization(arg, **kwargs)

        def get_target_name(self, options):
            return f"hip:{options.arch}"

        def parse_options(self, opts):
            opts = {key: value for key, value in opts.items() if key not in ("num_warps", "num_stages", "arch")}
            # Without contraction (fused multiply-adds) a kernel can be bit-equal to the same formula in PyTorch.
            opts.setdefault("enable_fp_fusion", False)
            opts.setdefault("allowed_dot_input_precisions", ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"))
            options = super().parse_options(opts)
            # Leave out AMD's device libraries, because the C library provides their functions.
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
            text = without_masks(str(module))
            lanes = _lanes_for(text)
            if lanes > 1:
                trial = self._lower(clone(text, module.context), metadata, options, lanes)
                if lanes_are_independent(trial):
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

            This runs only the AMD passes we need. The others schedule for a GPU, and some read settings of the process (buffer
            operations, asynchronous copies). Without the pass that widens accesses, all tensors of a shape keep one
            distribution, so lanes exchange no data.
            """
            manager = ir.pass_manager(module.context)
            target = f"hip:{options.arch}"
            passes.ttir.add_convert_to_ttgpuir(manager, target, 1, options.warp_size, 1)
            passes.ttgpuir.add_remove_layout_conversions(manager)
            amd.passes.ttgpuir.add_accelerate_matmul(manager, options.arch, 0, 1)  # makes the operand types of dots agree
            passes.ttgpuir.add_remove_layout_conversions(manager)
            passes.common.add_canonicalizer(manager)
            passes.common.add_cse(manager)
            passes.common.add_symbol_dce(manager)
            manager.run(module, "distribute")

        @staticmethod
        def _to_llvm(module, metadata, options):
            """Lower to LLVM IR. LLVM does not optimise it, because tests spend their time compiling, not running."""
            manager = ir.pass_manager(module.context)
            passes.convert.add_scf_to_cf(manager)
            passes.gluon.add_inliner(manager)
            passes.convert.add_index_to_llvmir(manager)
            arch = [options.arch] if triton_version() >= (3, 8) else []
            amd.passes.ttgpuir.add_allocate_shared_memory(manager, *arch)
            amd.passes.ttgpuir.add_to_llvmir(manager, options.arch, False)  # False keeps subnormals in exponentials
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
            # Only the full instruction selector finds contractions. The fast one does not.
            text, metadata["name"], types = retarget(text, metadata["shared"], not options.enable_fp_fusion)
            metadata["native_parameter_count"] = len(types)
            features = ",".join("+" + feature for feature in CPU_FEATURES)
            arguments = [text, "x86_64-unknown-linux-gnu", "haswell", features, [], options.enable_fp_fusion, True]
            if triton_version() >= (3, 8):
                arguments.append(False)  # False: do not dump the machine scheduler
            llvm.init_targets()
            return _link(llvm.translate_to_asm(*arguments))

        @functools.lru_cache  # noqa: B019  (as in the base class; there is one backend per process)
        def hash(self):
            # Part of the cache key, so libraries built by another version of this package are never used.
            sources = b"".join((Path(__file__).parent / name).read_bytes() for name in ("llvm_ir.py", "native.py"))
            return f"native-{self.target}-{hashlib.sha256(sources).hexdigest()}"

    return NativeBackend


def _native_driver():
    """Return the driver class; see :func:`_native_backend`."""
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
    """Measure once. The autotuner needs times, but not accurate ones."""
    start = time.perf_counter()
    kernel_call()
    elapsed = (time.perf_counter() - start) * 1e3
    return elapsed if quantiles is None else [elapsed] * len(quantiles)
