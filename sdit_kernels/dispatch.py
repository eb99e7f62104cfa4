"""Choose the backend that serves a call, and let the user override the choice.

By default, CPU tensors run the numba kernels ("cpu"), and CUDA and ROCm tensors run the Triton kernels ("triton"). A device
without kernels (MPS, XPU, ...) runs the reference, with one warning. ``SDIT_KERNELS_BACKEND`` overrides the choice for the
process, and ``with sdit_kernels.backend(name):`` for the calls of a thread inside the block. If the requested backend cannot
serve a call, the call raises.
"""

import functools
import importlib
import importlib.util
import os
import threading
import warnings
from contextlib import contextmanager

import torch

from ._torch import assume_constant_result

BACKENDS = ("reference", "cpu", "triton")


def _checked(name, where):
    if name not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    return name


def _from_environment():
    name = os.environ.get("SDIT_KERNELS_BACKEND")
    return _checked(name, "SDIT_KERNELS_BACKEND") if name else None


forked = False  # True if this process was forked, without exec, from a process that had imported the library


def _after_fork():
    global forked
    forked = True


os.register_at_fork(after_in_child=_after_fork)


class _Choice(threading.local):
    name = _from_environment()


_choice = _Choice()


@contextmanager
def backend(name: str):
    """Run the ops called in this block, and their backward passes, on one implementation.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (numba; CPU tensors) or "triton" (GPU tensors; CPU tensors under
            ``TRITON_INTERPRET=1`` or a Triton driver for the CPU).

    Raises:
        ValueError: the name is unknown.
        RuntimeError: an op in the block raises it if the backend cannot serve its tensors.

    Example:
        >>> import torch, sdit_kernels
        >>> with sdit_kernels.backend("reference"):
        ...     s = sdit_kernels.lif(torch.ones(4, 3) * 2)
    """
    before, _choice.name = _choice.name, _checked(name, "backend")
    try:
        yield
    finally:
        _choice.name = before


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # hidden on purpose, for example by sys.modules[module] = None
        return False


@functools.cache
def triton_on_cpu() -> bool:
    """True if Triton kernels accept CPU tensors: the interpreter is on, or the active Triton driver is a CPU driver."""
    if not _installed("triton"):
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    try:
        from triton.runtime import driver

        return driver.active.get_active_torch_device().type == "cpu"
    except Exception:  # without any driver, Triton raises many kinds of errors here
        return False


def _triton_obstacle(device: str) -> str | None:
    if not _installed("triton"):
        return "triton is not installed; GPU builds of torch bring it, elsewhere: pip install 'triton>=3.6,<3.9'"
    if device == "cpu" and not triton_on_cpu():
        return (
            "Triton has no driver for CPU tensors here; move them to a GPU, or set TRITON_INTERPRET=1 before the program "
            "starts to run the kernels in Triton's interpreter"
        )
    if device not in ("cpu", "cuda", "meta"):
        return f"the Triton kernels serve CUDA and ROCm tensors, not {device!r}; use sdit_kernels.backend('reference')"
    return None


def _cpu_obstacle(device: str) -> str | None:
    if device not in ("cpu", "meta"):
        return f"it serves CPU tensors, not {device!r}; leave the choice out, or take 'reference'"
    if not _installed("numba"):
        return "numba is not installed; pip install numba, or take the slow path with SDIT_KERNELS_BACKEND=reference"
    if importlib.import_module("numba").config.DISABLE_JIT:
        return (
            "NUMBA_DISABLE_JIT is set, so that numba compiles nothing; unset it, or run the plain PyTorch reference with "
            "SDIT_KERNELS_BACKEND=reference"
        )
    return None


def explain(device: str, name: str | None = None) -> tuple[str | None, str]:
    """Return (the backend that would serve ``device``, the reason), or (None, the obstacle)."""
    if name is None:
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _installed("triton"):
            name, why = "triton", "TRITON_INTERPRET=1 sends CPU tensors through the Triton kernels"
        elif device in ("cpu", "meta"):
            name, why = "cpu", "numba kernels serve CPU tensors"
        elif device == "cuda":
            name, why = "triton", "Triton kernels serve CUDA and ROCm tensors"
        else:
            return "reference", f"no kernels for {device!r}"
    else:
        why = "requested"
    obstacle = {"reference": lambda d: None, "cpu": _cpu_obstacle, "triton": _triton_obstacle}[name](device)
    return (None, f"backend {name!r}: {obstacle}") if obstacle else (name, why)


_resolved: dict[tuple[torch.device, str | None], str] = {}


@assume_constant_result  # so that torch.compile does not trace the search for installed packages
def _resolve(device: torch.device, name: str | None) -> str:
    known = _resolved.get((device, name))
    if known is not None:
        return known
    chosen, why = explain(device.type, name)
    if chosen is None:
        raise RuntimeError(f"sdit_kernels cannot serve a {device.type!r} tensor with {why}")
    if chosen == "reference" and name is None:
        warnings.warn(f"sdit_kernels has {why}; the plain PyTorch reference serves it", stacklevel=4)
    _resolved[device, name] = chosen
    return chosen


def forget_devices() -> None:
    """Clear the cached choice of backends, for tools that change Triton's driver."""
    triton_on_cpu.cache_clear()
    _resolved.clear()


def requested() -> str | None:
    """Return the backend that this thread requested; None if the device decides."""
    return _choice.name


def choose(device: torch.device, fused: bool = True) -> str:
    """Return the backend for tensors on a device: the reference unless ``fused``."""
    return _resolve(device, _choice.name) if fused else "reference"
