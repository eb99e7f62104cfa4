"""ttsem runs Triton launches and finds out-of-bounds accesses, races between programs and outputs that no program writes.

It must find nothing in our kernels, and it must find a fault that a test plants, at the kernel's line.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("ttsem", reason="no ttsem: pip install --no-deps --ignore-requires-python ttsem==0.1.0")
if (VERSION := importlib.metadata.version("triton").split("+")[0]) not in ("3.7.1", "3.8.0"):
    pytest.skip(f"ttsem 0.1.0 knows Triton 3.7.1 and 3.8.0, not {VERSION}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    stem: str
    tests: str
    chosen: str  # a -k expression for tests that call launchers directly
    line: str
    planted: str


FAULTS = (
    Fault("wkv", "test_wkv_triton.py", "writes_its and None-False-serial", "tl.store(dv_at, dv, mask=m)",
          "tl.store(dv_at, dv, mask=mask)"),  # writes past the end of a sequence
    Fault("spiking_wkv", "test_spiking_wkv.py", "nothing_else", "tl.store(dw_ptr + at, sum_w, mask=mask)",
          "tl.store(dw_ptr + cols, sum_w, mask=mask)"),  # writes the sums of all sequences to one row
    Fault("mix", "test_mix.py", "nothing_else", "tl.store(sums_ptr + (block.to(tl.int64) * M + m) * C + cols,",
          "tl.store(sums_ptr + m * C + cols,"),  # writes the sums of all programs to one row
)  # fmt: skip


def sanitized(root: Path, fault: Fault, cache: Path) -> subprocess.CompletedProcess:
    """``cache`` is a separate Triton cache, because compiled code records the file it was first compiled from."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", fault.chosen]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "ttsem.sanitize", "pytest", f"tests/{fault.tests}", *options],
        capture_output=True, text=True, cwd=root, env=environment, timeout=1800,
    )  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.stem)
def test_ttsem_finds_no_fault_in_our_kernels(fault, tmp_path):
    done = sanitized(ROOT, fault, tmp_path)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.stem)
def test_ttsem_finds_a_planted_fault(fault, tmp_path):
    for folder in ("sdit_kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    kernels = tmp_path / "sdit_kernels" / "triton" / f"{fault.stem}.py"
    source = kernels.read_text()
    assert source.count(fault.line) == 1, "the line to replace was not found in the kernel"
    kernels.write_text(source.replace(fault.line, fault.planted))
    done = sanitized(tmp_path, fault, tmp_path / "cache")
    assert done.returncode == 1 and "KernelFault" in done.stdout and fault.planted in done.stdout, done.stdout[-3000:]
