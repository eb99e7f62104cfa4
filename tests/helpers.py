"""Helpers that several test files use: tuning numbers for small tensors, and a function that runs code in another process."""

import os
import subprocess
import sys
from pathlib import Path

import native_triton

from sdit_kernels.tuning import Tuning

USERS = Tuning()  # the tuning numbers that users run
# These compile in less time. They cut small tensors into many programs and leave incomplete tiles at the edges.
SMALL = USERS._replace(wkv_checkpoint_tokens=4, spiking_pairs_triton=8)
if native_triton.setup() != "interpreter":  # the interpreter is slow when there are many programs
    SMALL = SMALL._replace(
        elementwise_threads=8, wkv_threads=8, wkv_held_tokens=2, wkv_sums_block=8, spiking_threads=8
    )  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]


def python(code, *arguments, **environment):
    """Run code in another process, without the tests' choice of Triton's interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited | environment, timeout=1800)
