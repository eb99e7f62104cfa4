"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import native_triton

from sdit_kernels.tuning import Tuning

USERS = Tuning()  # the numbers that users run
# They compile in less time and cut small tensors into many programs with ragged edges.
SMALL = USERS._replace(wkv_checkpoint_tokens=4, spiking_pairs_triton=8)
if native_triton.setup() != "interpreter":  # it takes longer the more programs there are
    SMALL = SMALL._replace(
        elementwise_threads=8, wkv_threads=8, wkv_held_tokens=2, wkv_sums_block=8, spiking_threads=8
    )  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]


def python(code, *arguments, **environment):
    """Run code in a process of its own, as users do: the tests' choice of a backend stays behind."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited | environment, timeout=1800)
