"""What perf/gpu_suite.py runs on a GPU, on the CPU: it must not rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_dry_run(tmp_path):
    # on a busy machine too, no part may be left out because the time was up
    command = [sys.executable, "perf/gpu_suite.py", "--dry-run", "--minutes", "1000", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert all(check["passed"] for check in parts["checks"].values())
    from perf.gpu_suite import TIMINGS

    assert all(parts[name]["rows"] for name in TIMINGS)


def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "perf/gpu_suite.py", "--only", "host"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "torch sees no GPU; --dry-run runs on the CPU" in done.stderr
