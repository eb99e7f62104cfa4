"""Run perf/gpu_suite.py and perf/gpu_train.py on the CPU, so that errors show before they run on a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from perf import gpu_suite, gpu_train
from sdit import PRESETS, SDiT

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_dry_run_passes_every_part(tmp_path):
    # 1000 minutes, so that no part is skipped for lack of time on a busy machine
    command = [sys.executable, "perf/gpu_suite.py", "--dry-run", "--minutes", "1000", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert all(check["passed"] for check in parts["checks"].values())
    assert all(parts[name]["rows"] for name in gpu_suite.TIMINGS)


@pytest.mark.parametrize("words", [("perf/gpu_suite.py", "--only", "host"), ("perf/gpu_train.py", "--out", "none")])
def test_a_missing_gpu_is_named_in_the_error(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "torch sees no GPU; --dry-run runs on the CPU" in done.stderr


def test_first_runs_what_changed_last(tmp_path, monkeypatch, capsys):
    """The parts themselves run in the dry run above, except steps and rules, which choose other cases here."""
    for parts in (gpu_suite.CHECKS, gpu_suite.COMPILE):
        for name in parts:
            monkeypatch.setitem(parts, name, lambda device, small: {})
    for name in set(gpu_suite.TIMINGS) - {"steps", "rules"}:
        monkeypatch.setitem(gpu_suite.TIMINGS, name, lambda args, settings: ("title", [{"name": "row"}]))

    def compare(contestants, **_):
        for c in contestants:
            c.fn()
        return [{"name": c.name, "median_s": 1.0} for c in contestants]

    monkeypatch.setattr(gpu_suite, "compare", compare)
    assert gpu_suite.main(["--dry-run", "--only", "first", "--json", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    known = {"checks", "tests", *gpu_suite.CHECKS, *gpu_suite.TIMINGS}
    assert set(gpu_suite.FIRST) <= known and set(found) == ({"checks"} | set(gpu_suite.FIRST) & set(gpu_suite.TIMINGS))
    assert {row["name"] for row in found["steps"]["rows"]} >= {"digits, batch 4, graph, bf16", "digits, batch 2, ours, fp32"}
    assert "all passed" in capsys.readouterr().out
    assert all((ROOT / "tests" / file).exists() for file in gpu_suite.FIRST_TESTS)


def test_a_training_continues_from_the_weights_of_an_earlier_one(tmp_path):
    """Each dry run trains, draws images and measures them; the second has a new optimiser on the averaged weights."""
    assert gpu_train.main(["--dry-run", "--out", str(tmp_path / "a")]) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["mode"] == "graph" and report["steps_done"] == 6 and report["drawn"] == 40 and report["distances"]["n"] == 40
    names = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert names == {"report.json", "metrics.jsonl", "samples.png", "weights/weights_0.safetensors"}
    started = []
    train = gpu_train.train

    def record(config, settings, folder, *, initial, **others):
        started.append(initial)
        return train(config, settings, folder, initial=initial, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_train, "train", record)
        words = ["--dry-run", "--mode", "eager", "--start", str(tmp_path / "a/weights"), "--out", str(tmp_path / "b")]
        assert gpu_train.main(words) == 0
    wanted = gpu_train.load_shards(tmp_path / "a/weights").state_dict()
    for model in started:
        assert all(torch.equal(model.state_dict()[name], t) for name, t in wanted.items())
    assert len(started) == 2 and json.loads((tmp_path / "b" / "report.json").read_text())["mode"] == "eager"


def test_weights_are_split_into_files(tmp_path):
    model = SDiT(PRESETS["digits"], dim=32, depth=2)
    gpu_train.save_shards(tmp_path, model, limit=30_000)
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3 and all(path.stat().st_size < 45_000 for path in files)
    found = gpu_train.load_shards(tmp_path)
    assert found.config == model.config
    for a, b in zip(found.state_dict().values(), model.state_dict().values()):
        assert torch.equal(a, b.bfloat16().float())
    files[0].unlink()
    with pytest.raises(ValueError, match=f"must hold {len(files)} files, got {len(files) - 1}"):
        gpu_train.load_shards(tmp_path)
    with pytest.raises(ValueError, match="limit must be at least as large, got 10"):
        gpu_train.save_shards(tmp_path, model, limit=10)


def test_a_training_that_takes_too_long_is_stopped():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores Ctrl-C
    try:
        with gpu_train.stop_after(0.05):
            for _ in range(1000):
                time.sleep(0.02)
            pytest.fail("nobody stopped it")
    finally:
        signal.signal(signal.SIGINT, before)
