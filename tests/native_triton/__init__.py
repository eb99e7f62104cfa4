"""Run ``@triton.jit`` kernels on CPU tensors, natively compiled. Most tests of Triton kernels use this harness.

Call :func:`setup` before ``triton`` is imported. It returns how kernels run in this process:

``"native"``
    Kernels are compiled to x86-64 machine code. Triton's own front end, specialisation, autotuner, compile cache and
    optimisation passes run unchanged. Only the last steps are ours.
``"interpreter"``
    Triton's interpreter (``TRITON_INTERPRET=1``), where native compilation is not supported. :func:`reason` says why.
``"gpu"``
    A CUDA device is present, and kernels run there. Each launch copies its CPU tensors to the device and back.

How native compilation works. A Triton backend is registered under the name ``x86``. It inherits AMD's lowering, because
that one ends in plain LLVM IR without inline assembly. It asks for *one lane per program*, so a tile becomes ordinary scalar
code without lane exchange and without shared memory. We then retarget the IR: we replace address spaces and AMD intrinsics
and add a loop over the grid. libtriton includes the x86 target, which compiles this IR. The C compiler driver links the
object into a shared library, and ctypes calls it.

Elementwise kernels are first lowered with many lanes per program, which run one after the other. This code covers a few
elements instead of a whole tile and compiles many times faster. If the lanes turn out to exchange data, the kernel is
compiled again with one lane.

This harness cannot show races between programs or lanes (everything runs in sequence), the rounding of NVIDIA's approximate
division and exponential, and timings. With one lane, all elements of a tile are unrolled into one function. Kernels with
reductions, scans or dots then take about 0.5 s to compile for a tile of 1024 elements and 6 s for one of 4096. The compile
time of a dot depends on its number of multiplications (16 x 16 x 16: 0.6 s, 32 x 32 x 32: 5 s).
"""

import os

import torch

from .counting import launches
from .gpu import use_gpu
from .guards import guarded, poison_
from .interpreter import use_interpreter
from .native import alignment_ignored, install_native
from .support import unsupported_reason

__all__ = ["alignment_ignored", "guarded", "launches", "poison_", "reason", "setup", "unsupported_reason"]

_mode = None
_reason = ""


def _interpreter_requested():
    # the spellings that Triton itself reads as true
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def setup():
    """Make ``@triton.jit`` kernels runnable in this process and return "native", "interpreter" or "gpu".

    Call it before the first import of triton, because Triton reads TRITON_INTERPRET at import. If the environment already
    requests the interpreter, setup chooses it. Further calls change nothing and return the same answer.
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
        use_interpreter()
    elif mode == "native":
        install_native()
    else:
        use_gpu()
    _mode, _reason = mode, why
    return mode


def reason():
    """Return why :func:`setup` did not choose native compilation, or an empty string if it did."""
    return _reason
