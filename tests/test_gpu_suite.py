"""Run perf/gpu_suite.py on the CPU, so that errors show before it runs on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_dry_run_passes_every_part(tmp_path):
    # 1000 minutes, so that no part is skipped for lack of time on a busy machine
    command = [sys.executable, "perf/gpu_suite.py", "--dry-run", "--minutes", "1000", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert all(check["passed"] for check in parts["checks"].values())
    from perf.gpu_suite import TIMINGS

    assert all(parts[name]["rows"] for name in TIMINGS)


def test_a_missing_gpu_is_named_in_the_error():
    done = subprocess.run([sys.executable, "perf/gpu_suite.py", "--only", "host"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "torch sees no GPU; --dry-run runs on the CPU" in done.stderr
