"""Compile the Triton kernels for several GPUs, without a GPU, and report the compiler's output. No time is measured.

    python perf/compile_report.py                      every kernel, five targets: 15 minutes of CPU time, no GPU
    python perf/compile_report.py --stem wkv           the kernels of one stem
    python perf/compile_report.py --quick --check      a few variants, compared with the committed figures

The package `compile` does the work. It calls the ops or their launchers, and compiles their launches for a GPU without running
them. So tile sizes, warps, flags and specialisations are the same as in a user's call on contiguous tensors.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from perf import harness


def main(arguments=None) -> int:
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true"):
        raise SystemExit("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    if reason := harness.reason_if_missing("triton"):
        raise SystemExit(reason.split(" (")[0])
    from perf.compile import report

    return report.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
