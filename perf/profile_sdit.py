"""Profile a step of SDiT: time per op or per kernel.

    python perf/profile_sdit.py                             table by op, on the CPU
    python perf/profile_sdit.py --bf16 --trace trace.json   and a trace for ui.perfetto.dev
    python perf/profile_sdit.py --device cuda --table       table by kernel
    SDIT_NVTX=1 nsys profile -c cudaProfilerApi -o sdit python perf/profile_sdit.py --device cuda
    SDIT_NVTX=1 ncu --profile-from-start off -o sdit python perf/profile_sdit.py --device cuda --steps 1

The first steps are not measured, because they compile kernels and allocate memory. On a GPU, the script marks the steps for
nsys and ncu. With --table or --trace it uses torch.profiler, which cannot run together with nsys or ncu.
"""

import functools
import os
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import bench_sdit, harness
from sdit import PRESETS
from sdit_kernels import nvtx

WARM_UP = 3  # steps; the second one still allocates memory and selects cuBLAS kernels
MATRIX_PRODUCT = re.compile(bench_sdit.GROUPS["matrix products"])
ROWS = 40


def make_step(device, batch, preset=bench_sdit.PRESET, bf16=False, sampling=False):
    """Return a training step, or a sampling step: no gradients, inside model.frozen()."""
    model, inputs = bench_sdit.make_case(device, batch, preset)
    dtype = torch.bfloat16 if bf16 else None
    if not sampling:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        return functools.partial(bench_sdit.run_training_step, model, inputs, torch.zeros((), device=device), optimizer, dtype)
    model.eval()

    def step():
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=bf16):
            return model(*inputs)

    frozen = model.frozen()
    frozen.__enter__()  # never left, because no other code uses this model
    step.frozen = frozen  # a context manager that is freed ends its with block, so the step keeps it
    return step


def run_steps(step, steps, device):
    for i in range(steps):
        with nvtx.range(f"step {i}"):
            step()
    if device == "cuda":
        torch.cuda.synchronize()


def capture_steps(step, steps, device="cuda"):
    """Run steps that nsys -c cudaProfilerApi and ncu --profile-from-start off record; return the seconds of a step."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    began = time.perf_counter()
    run_steps(step, steps, device)
    seconds = time.perf_counter() - began
    torch.cuda.profiler.stop()
    return seconds / steps


def profile_steps(step, steps, device, trace=None):
    """Return (seconds of a step, percentage of it in matrix products, rows): one row per op on the CPU, per kernel on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints a line at every start and stop
    on_cpu = device == "cpu"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not on_cpu)) as found:
        run_steps(step, steps, device)
    if trace:
        found.export_chrome_trace(str(harness.make_parent_folder(trace)))
    ops, kernels = [], []
    for event in found.key_averages():
        (ops if event.device_type == torch.autograd.DeviceType.CPU else kernels).append(event)

    def seconds(event):
        return (event.self_cpu_time_total if on_cpu else event.self_device_time_total) / 1e6 / steps

    shown = ops if on_cpu else kernels
    total = sum(map(seconds, shown)) or 1e-9
    # on a GPU, the self time of an op is the time of its kernels
    products = sum(seconds(event) for event in ops if MATRIX_PRODUCT.fullmatch(event.key))
    rows = [
        {"name": e.key[:90], "calls": e.count / steps, "self_s": seconds(e), "percent_of_step": 100 * seconds(e) / total}
        for e in sorted(shown, key=seconds, reverse=True)[:ROWS]
    ]
    return total, 100 * products / total, rows


def describe_case(batch, preset=bench_sdit.PRESET, bf16=False, sampling=False):
    return f"{preset}, batch {batch}, {'bf16' if bf16 else 'fp32'}, {'sampling' if sampling else 'training'}"


def main(argv=None):
    p = harness.make_parser(__doc__.splitlines()[0])
    p.add_argument("--preset", choices=sorted(PRESETS), help=f"default: {bench_sdit.PRESET}, digits with --quick")
    p.add_argument("--batch", type=int, metavar="B", help="batch size (default: 8, 128 on a GPU, 2 with --quick)")
    p.add_argument("--bf16", action="store_true", help="run under bf16 autocast")
    p.add_argument("--steps", type=int, metavar="N", help="steps to measure (default: 3, 1 with --quick)")
    p.add_argument("--sampling", action="store_true", help="measure sampling steps instead of training steps")
    p.add_argument("--table", action="store_true", help="on a GPU: print a table by kernel; not under nsys or ncu")
    p.add_argument("--trace", metavar="PATH", help="write a Chrome trace as well; implies --table")
    args = p.parse_args(argv)
    for name in ("batch", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    harness.setup(args)
    batch = args.batch or (2 if args.quick else 128 if args.device == "cuda" else 8)
    steps = args.steps or (1 if args.quick else 3)
    preset = args.preset or ("digits" if args.quick else bench_sdit.PRESET)
    case = {"preset": preset, "bf16": args.bf16, "sampling": args.sampling}
    step, title = make_step(args.device, batch, **case), describe_case(batch, **case)
    run_steps(step, 1 if args.quick else WARM_UP, args.device)
    if args.device == "cuda" and not (args.table or args.trace):
        harness.report(title, [{"name": "step", "calls": steps, "wall_s": capture_steps(step, steps)}], args)
        return
    seconds, products, rows = profile_steps(step, steps, args.device, args.trace)
    title = f"{title}: {1e3 * seconds:.1f} ms a step, {products:.0f} % in matrix products"
    harness.show(title, rows, args)
    harness.save(title, rows, args, step_s=seconds, percent_in_matrix_products=products)


if __name__ == "__main__":
    main()
