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

import os

import torch

from .counting import launches
from .gpu import use_gpu
from .guards import guarded, poison_
from .interpreter import use_interpreter
from .native import install_native
from .support import unsupported_reason

__all__ = ["guarded", "launches", "poison_", "reason", "setup", "unsupported_reason"]

_mode = None
_reason = ""


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
        use_interpreter()
    elif mode == "native":
        install_native()
    else:
        use_gpu()
    _mode, _reason = mode, why
    return mode


def reason():
    """Why :func:`setup` did not choose native compilation; an empty string if it did."""
    return _reason
