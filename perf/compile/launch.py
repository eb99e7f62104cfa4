"""Compiles the Triton kernels of a call for a named GPU, without the GPU and without running them.

with launches("hip:gfx942") as found:  # what a user's call would launch there
    sdit_kernels.lif(x)
compiled, arguments = found[0]
"""

import contextlib
import inspect

import torch
import triton
from triton.backends.compiler import GPUTarget

from sdit_kernels import dispatch
from sdit_kernels.triton import tiles

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100")


def _gpu(target: str) -> GPUTarget:
    backend, arch = target.split(":")
    return GPUTarget(backend, int(arch) if backend == "cuda" else arch, 64 if arch.startswith("gfx9") else 32)


class _NoDriver:
    """Stands where Triton's driver stands: names the target, takes CPU tensors, runs nothing."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return _gpu(self.target)

    def get_current_device(self):
        return f"compiled for {self.target}"  # Triton keeps compiled kernels per device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@contextlib.contextmanager
def launches(target):
    """While it is open, @triton.jit kernels launched on CPU tensors are compiled for the target and not run.

    Yields the list of (CompiledKernel, {argument: value}) of those launches, a record ``F`` field by field. Triton's own
    launch path specialises the arguments and parses the options, so the code equals the code of the same call on the GPU;
    outputs are not written.
    """
    found = []
    _forget_the_device()
    run, before = triton.runtime.JITFunction.run, _active_driver()

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        names = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        arguments = inspect.signature(kernel.fn).bind(*args, **names).arguments
        flags = arguments.get("F")
        found.append((compiled, arguments | (flags._asdict() if flags else {})))
        return compiled

    triton.runtime.JITFunction.run = compile_only
    triton.runtime.driver.set_active(_NoDriver(target))
    try:
        yield found
    finally:
        triton.runtime.JITFunction.run = run
        triton.runtime.driver.set_active(before)
        _forget_the_device()


def _active_driver():
    """Triton's driver, or None where Triton finds none; it then looks for one again."""
    try:
        return triton.runtime.driver.active
    except Exception:  # no driver at all: Triton raises RuntimeErrors and ImportErrors of many kinds here
        return None


def _forget_the_device():
    """The package remembers what it has found out about its device: let it ask again."""
    tiles.warps_of.cache_clear()
    dispatch.forget_devices()
