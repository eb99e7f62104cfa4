"""Compile the Triton kernels of a call for a named GPU, without the GPU and without running them.

with launches("hip:gfx942") as found:  # compiles the kernels that this call launches on the GPU
    sdit_kernels.lif(x)
compiled, arguments = found[0]

with no_launches("cuda:90"):  # the whole host code of a call, to a launch that does nothing
    sdit_kernels.lif(x)
"""

import contextlib
import inspect

import torch
import triton
from triton.backends.compiler import GPUTarget

from sdit_kernels import dispatch, repeat
from sdit_kernels.triton import tiles

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100")


def _gpu(target: str) -> GPUTarget:
    backend, arch = target.split(":")
    return GPUTarget(backend, int(arch) if backend == "cuda" else arch, 64 if arch.startswith("gfx9") else 32)


class _NoDriver:
    """Replacement for Triton's driver: it names the target, accepts CPU tensors and runs nothing."""

    def __init__(self, target):
        self.target, self.utils = target, self

    def launcher_cls(self, src, metadata):
        return _do_nothing

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 24}

    def load_binary(self, *_):
        return self, None, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_current_target(self):
        return _gpu(self.target)

    def get_current_device(self):
        return f"compiled for {self.target}"  # Triton keeps compiled kernels per device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def _do_nothing(*_):
    pass


@contextlib.contextmanager
def launches(target):
    """Compile @triton.jit kernels that are launched on CPU tensors during the with block for the target, without running them.

    Yield the list of (CompiledKernel, {argument: value}) of the launches; the fields of a record ``F`` are listed one by one.
    Triton's own launch path specialises the arguments and parses the options, so the code equals the code of the same call on
    the GPU. Outputs are not written.
    """
    found = []
    run = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        names = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        arguments = inspect.signature(kernel.fn).bind(*args, **names).arguments
        flags = arguments.get("F")
        found.append((compiled, arguments | (flags._asdict() if flags else {})))
        return compiled

    triton.runtime.JITFunction.run = compile_only
    try:
        with no_launches(target):
            yield found
    finally:
        triton.runtime.JITFunction.run = run


@contextlib.contextmanager
def no_launches(target):
    """Let Triton kernels accept CPU tensors during the with block. They are compiled for the target, and a launch does nothing.

    All code of the host runs as before a launch on a GPU, except the driver's own. Outputs are not written.
    """
    before = _active_driver()
    _forget_the_device()
    triton.runtime.driver.set_active(_NoDriver(target))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)
        _forget_the_device()


def _active_driver():
    """Return Triton's driver, or None if Triton finds no driver; with None as active driver, Triton searches again."""
    try:
        return triton.runtime.driver.active
    except Exception:  # without a driver, Triton raises RuntimeErrors and ImportErrors of many kinds
        return None


def _forget_the_device():
    """Clear what the package has cached about its device."""
    repeat.forget()
    tiles.warps_of.cache_clear()
    tiles.all_registers.cache_clear()
    dispatch.forget_devices()
