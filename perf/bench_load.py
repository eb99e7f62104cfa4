"""Compare ways in which OpenMP's threads wait: torch, our kernels and a small training run, on a quiet and on a busy machine.

python perf/bench_load.py --json perf/results/load.json

Threads that wait for work spin for a while. If other processes use the cores, a spinning thread takes CPU time from the thread
that it waits for. The busy machine also runs one endless loop per core. Each row is one process with its own environment.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from perf import harness

# libgomp counts turns of its waiting loop: 300,000 are several milliseconds, longer than a time slice of the scheduler
POLICIES = {
    "as libgomp is (spins 300,000 turns)": {"GOMP_SPINCOUNT": "300000"},
    "spins 100,000 turns": {"GOMP_SPINCOUNT": "100000"},
    "spins 10,000 turns (the sdit command)": {"GOMP_SPINCOUNT": "10000"},
    "spins 1,000 turns": {"GOMP_SPINCOUNT": "1000"},
    "does not spin": {"OMP_WAIT_POLICY": "passive"},
}
OPS = """
import json, statistics, sys, time
import torch
from sdit_kernels import lif, wkv
calls = int(sys.argv[1])
x = torch.randn(4, 8, 394, 384, requires_grad=True)
k, v, r = (torch.randn(8, 394, 384, requires_grad=True) for _ in range(3))
w, u = torch.zeros(2, 384)
small, a = torch.randn(4, 40, 512), torch.randn(8, 394, 384)
def elementwise(): torch.sigmoid(a) * a
def both_lif(): lif(x).backward(x.detach())
def both_wkv(): wkv(w, u, k, v, r=r).backward(a)
def small_lif(): lif(small)
found = {}
for f in (elementwise, both_lif, both_wkv, small_lif): f()
for f in (elementwise, both_lif, both_wkv, small_lif): found[f.__name__] = []
for _ in range(calls):
    for f in (elementwise, both_lif, both_wkv, small_lif):
        start = time.perf_counter()
        f()
        found[f.__name__].append(time.perf_counter() - start)
print(json.dumps({name: statistics.mean(times) for name, times in found.items()}))
"""


def measure(environment, args):
    """Measure the mean seconds of each op in one process, and images/s of `sdit train --preset digits` in another."""
    environment = os.environ | environment | {"PYTHONPATH": str(harness.ROOT)}
    calls, steps = (3, 2) if args.quick else (10, 12)
    done = subprocess.run([sys.executable, "-c", OPS, str(calls)], env=environment, capture_output=True, text=True, check=True)
    times = json.loads(done.stdout)
    with tempfile.TemporaryDirectory() as folder:
        run = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "sdit", "train", "--preset", "digits", "--steps", str(steps), "--log-every", "1"]
        command += ["--sample-every", "0", "--out", str(run)]
        subprocess.run(command, env=environment, capture_output=True, check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_s"] for line in lines if "images_per_s" in line]
    return times | {"images_per_s": statistics.median(speeds)}


def load(args, settings):
    """Time of each op, and images/s of a training run, for each way in which threads wait"""
    rows = []
    for busy in (0, os.cpu_count()):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            samples = {name: measure(environment, args) for name, environment in POLICIES.items()}
        finally:
            for other in others:
                other.kill()
                other.wait()
        for name, found in samples.items():
            row = {"name": name, "other_processes": busy}
            row |= {f"{key}_s": found[key] for key in ("elementwise", "both_lif", "both_wkv", "small_lif")}
            rows.append(row | {"training_images": found["images_per_s"]})
    return "sigmoid(a) * a; lif and wkv forward + backward at (8, 394, 384); lif of (4, 40, 512); training of digits", rows


if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, {"load": load}))
