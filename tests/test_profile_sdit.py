"""perf/profile_sdit.py: its table, its trace, and the steps it captures for nsys and ncu."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perf import profile_sdit

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("form", [["perf/profile_sdit.py"], ["-m", "perf.profile_sdit"]])
def test_the_table_and_the_trace_show_the_ops(form, tmp_path):
    command = [sys.executable, *form, "--quick", "--bf16", "--json", str(tmp_path / "profile.json")]
    command += ["--sampling"] if "-m" in form else ["--trace", str(tmp_path / "made" / "trace.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "profile.json").read_text())
    ops = {row["name"]: row for row in found["rows"]}
    assert "aten::addmm" in ops and "sdit_kernels::wkv" in ops and "% in matrix products" in done.stdout
    assert 0 < found["percent_in_matrix_products"] < 100 and sum(row["percent_of_step"] for row in ops.values()) < 100.01
    assert found["title"].startswith(f"digits, batch 2, bf16, {'sampling' if '-m' in form else 'training'}: ")
    if "--trace" in command:
        assert "sdit_kernels::wkv_backward" in {e.get("name") for e in json.loads(Path(command[-1]).read_text())["traceEvents"]}
    else:
        assert "sdit_kernels::wkv_backward" not in ops


def test_the_model_stays_frozen_between_sampling_steps():
    step = profile_sdit.make_step("cpu", 1, "digits", sampling=True)
    model = inspect.getclosurevars(step).nonlocals["model"]
    assert all(block.frozen is not None for block in model.blocks)


def test_only_the_steps_are_captured(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: seen.append(name))
    assert profile_sdit.capture_steps(lambda: seen.append("step"), 2) >= 0
    assert seen == ["synchronize", "start", "step", "step", "synchronize", "stop"]


@pytest.mark.parametrize("name", ["mm", "addmm", "bmm", "baddbmm", "convolution_backward", "mkldnn_convolution", "convolution"])
def test_matrix_multiplications_are_recognised(name):
    assert profile_sdit.MATRIX_PRODUCT.fullmatch(f"aten::{name}")


@pytest.mark.parametrize("name", ["mul", "addcmul", "add", "sum", "add_", "copy_", "native_layer_norm"])
def test_other_operators_are_not_matrix_multiplications(name):
    assert not profile_sdit.MATRIX_PRODUCT.fullmatch(f"aten::{name}")


def test_wrong_arguments_are_refused(capsys):
    for wrong, message in (
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--steps", "-1"], "--steps must be at least 1, got -1"),
    ):
        with pytest.raises(SystemExit):
            profile_sdit.main(wrong)
        assert message in capsys.readouterr().err
