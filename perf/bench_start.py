"""Time a fresh process from `import sdit_kernels` to the first result, without and with cached kernels.

python perf/bench_start.py --json perf/results/start.json
python perf/bench_start.py --only wkv --device cuda
"""

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from perf import harness
from perf.ops import T

# The call of each op, with x (T, B, L, C), and w and u vectors of the channels
CALLS = {
    "lif": "lif(x)",
    "lif_rate": "lif_rate(x[0])",
    "wkv": "wkv(w, u, x[0], x[1])",
    "wkv_step": "wkv_step(w, u, x[0, :, 0], x[1, :, 0], (x[2, :, 0].float(), x[3, :, 0].float()))[0]",
    "spiking_wkv": "spiking_wkv(w, u, x, x)",
    "token_shift": "token_shift(x[0], u, norm_eps=1e-6)[0]",
    "lapicque": "lapicque(x, C=2.0)",
    "cuba": "cuba(x, beta_i=0.9, beta=0.9)",
    "adlif": "adlif(x, beta=0.9, beta_w=0.9, a=0.5, b=1.0)",
    "relu_squared": "relu_squared(x[0])",
    "torch.compile(plain loop of lif)": "torch.compile(reference.lif)(x)",
}
PROCESS = """
import sys, time
import torch
device, call, *shape = sys.argv[1:]
x = torch.randn(*map(int, shape)).to(device).requires_grad_()
w, u = torch.zeros(2, x.shape[-1], device=device)
torch.randn(8, 8, device=device) @ torch.randn(8, 8, device=device)
start = time.perf_counter()
import sdit_kernels
from sdit_kernels import *
from sdit_kernels import reference
imported = time.perf_counter()
y = eval(call)
y.flatten()[0].item()
forward = time.perf_counter()
y.backward(torch.ones_like(y))
x.grad.flatten()[0].item()
print("[%.6f, %.6f, %.6f]" % (imported - start, forward - start, time.perf_counter() - start))
"""


def first_result(name, args, settings):
    """Seconds of a fresh process, from the end of `import torch` to the results, including the import of sdit_kernels"""
    samples = {}
    for _ in range(1 if args.quick or name.startswith("torch.compile") else 3):
        with tempfile.TemporaryDirectory() as folder:
            caches = dict.fromkeys(("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), folder)
            environment = os.environ | caches | {"PYTHONPATH": str(harness.ROOT)}
            command = [sys.executable, "-c", PROCESS, args.device, CALLS[name], *map(str, (T, *args.shape))]
            for state in ("nothing cached", "compiled before"):
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    return name, [{"name": name, "note": f"skipped: {done.stderr.strip().splitlines()[-1][:80]}"}]
                samples.setdefault(state, []).append(json.loads(done.stdout))
    rows = []
    for state, runs in samples.items():
        columns = zip(("import_s", "forward_s", "forward_and_backward_s"), zip(*runs))
        row = {"name": name, "state": state, **{key: statistics.median(values) for key, values in columns}}
        rows.append(row | {"processes": len(runs), "runs_s": runs})
    if args.device == "cpu" and not name.startswith("torch.compile"):
        harness.record_goal(f"{name}, compiled before", rows[1]["forward_and_backward_s"], 2, " s", at_least=False)
    return f"{CALLS[name]}, x {(T, *args.shape)} fp32", rows


def section(name):
    part = functools.partial(first_result, name)
    part.__doc__ = first_result.__doc__
    return part


SECTIONS = {name: section(name) for name in CALLS}


if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, SECTIONS))
