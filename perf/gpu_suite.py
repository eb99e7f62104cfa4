"""Run all tests, checks and timings that need a GPU in one command, in under nine minutes.

    python perf/gpu_suite.py --json gpu.json
    python perf/gpu_suite.py --only checks,rules
    python perf/gpu_suite.py --only first       what changed last, in four minutes; --minutes sets another limit
    python perf/gpu_suite.py --dry-run          a small run on the CPU, to test this script; its times mean nothing

tests     the project's tests of the Triton kernels; every launch copies CPU tensors to the device and back
checks    gpu_checks.py: tensors on the device, at the sizes of real models: values and gradients against float64,
          repeatability, more than 2^31 elements, host syncs, side streams, CUDA graphs, torch.compile, autocast, SDiT
timings   steps: training steps of SDiT; host: CPU time of a call; algorithms, sizes, rules: figures for choosing launch
          parameters; and the sections of bench_lif.py, bench_wkv.py and bench_mix.py

Results are written after every part, so a part that fails or runs out of time does not lose earlier results. The exit status
is 1 if a test, a check or a section failed.
"""

import argparse
import concurrent.futures
import copy
import functools
import json
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import bench_compat, bench_lif, bench_memory, bench_mix, bench_sdit, bench_wkv, harness, ops, peers, profile_sdit
from perf.gpu_checks import CHECKS, calls, graphs
from perf.harness import Contestant, compare, make_forward_backward
from perf.ops import OPS
from perf.peers import snntorch_loop, wkv_then_lif
from sdit import train as sdit_train
from sdit.execution import Replayed
from sdit_kernels.compat import snntorch as compat_snntorch
from sdit_kernels.tuning import tuned

MODES = "forward", "forward+backward"


# ---- launch parameters -----------------------------------------------------------------------------------------------------


def with_parameters(contestant, values):
    """Return the contestant with these launch parameters, in forward and backward pass."""

    def call():
        with tuned(**values):
            contestant.fn()

    return contestant._replace(fn=call)


class Case(NamedTuple):
    """An op, the shape of its data, and the launch parameters to try."""

    name: str
    op: str
    shape: tuple
    values: list
    arguments: dict = {}


def make_launch_cases(device, small):
    L, C = (33, 48) if small else (394, 384)
    n = 1 << (12 if small else 24)
    many, few, one = (2, 1, 1) if small else (128, 32, 1)

    def tries(name, *values):
        return [{name: value} for value in values]

    threads = tries("elementwise_threads", 64, 128, 256)
    yield Case("lif", "lif", (n // 4,), threads)
    yield Case("lif_rate", "lif_rate", (n,), threads)
    yield Case("token_shift", "token_shift", (few, L, C), threads)
    yield Case("relu_squared", "relu_squared", (n,), threads)
    # Only on a GPU: on the CPU every value would compile new kernels.
    tiles = tries("wkv_checkpoint_tokens", 8, 16, 32) if device == "cuda" else []
    for B in (few, many):
        for name, values in (
            ("threads", tries("wkv_threads", 32, 64, 128)),
            ("tokens held", tries("wkv_held_tokens", 4, 8, 16)),
            ("tile", tiles),
        ):
            yield Case(f"wkv serial, B={B}: {name}", "wkv", (B, L, C), values, {"algorithm": "serial"})
    fill = tries("wkv_busy_threads", *(1 << e for e in (14, 15, 16, 17)))
    for B, length in ((one, 16 * L), (few // 4 or 1, L), (few, L)):
        name = f"wkv chunked, B={B}, L={length}"
        yield Case(name, "wkv", (B, length, C), fill, {"algorithm": "chunked"})
    yield Case("spiking_wkv", "spiking_wkv", (2 * few, L, C), tries("spiking_min_channels_fused", 0, 1 << 30))


def prepare_case(case, device):
    """Return the call of a case, its leaves, and gradients of its outputs."""
    op = OPS[case.op]
    f, leaves = functools.partial(op.call, **case.arguments), op.data(*case.shape, device=device)
    with torch.no_grad():
        return f, leaves, [torch.randn_like(y) for y in ops.as_tuple(f(*leaves))]


def compile_case(i, device, small):
    """Compile the kernels of case i of `rules` in its own process, while the checks run."""
    case = list(make_launch_cases(device, small))[i]
    f, leaves, gs = prepare_case(case, device)
    for value in case.values:
        with tuned(**value):
            make_forward_backward(f, leaves, gs)()
    return {}


COMPILE = {f"compile_{i}": functools.partial(compile_case, i) for i in range(len(list(make_launch_cases("cpu", True))))}


def rules(args, settings):
    """Launch parameters side by side; "percent of copy" counts the bytes that an ideal kernel moves"""
    rows = []
    for case in make_launch_cases(args.device, args.quick):
        if args.first and case.name not in FIRST_CASES:
            continue
        f, leaves, gs = prepare_case(case, args.device)
        for mode in MODES:
            moved = OPS[case.op].bytes(mode, leaves)
            contestants = [harness.make_copy_contestant(moved, args.device)]
            for value in case.values:
                label = ", ".join(f"{k}={v}" for k, v in value.items())
                c = ops.make_contestant(label, mode, f, leaves, gs, bytes=moved, op=case.name)
                contestants.append(with_parameters(c, value))
            rows += compare(contestants, **settings)
    return "launch parameters, fp32", rows


def algorithms(args, settings):
    """wkv, C = 384, to choose the rule of "auto": "serial" against "chunked" by batch and length"""
    rows, C = [], 384
    batches, lengths = ((1, 2), (64,)) if args.quick else ((1, 4, 16, 32, 48, 64, 128, 256), (64, 394, 1024, 4096, 16384))
    op = OPS["wkv"]
    for B in batches:
        for L in lengths:
            if B * L <= 1 << 18:
                leaves = op.data(B, L, C, device=args.device)
                g = torch.randn_like(leaves[-1])
                for mode in MODES:
                    how = {"bytes": op.bytes(mode, leaves), "B": B, "L": L}
                    names = ("serial", "chunked", "auto")
                    found = [
                        ops.make_contestant(name, mode, bench_wkv.bind_algorithm(name), leaves, g, **how) for name in names
                    ]
                    rows += compare(found, **settings)
    return "wkv, C = 384, fp32", rows


def sizes(args, settings):
    """spiking_wkv by batch, T = 4: the fused kernel, the kernels of wkv and lif, and the chain of the two ops"""
    rows, op = [], OPS["spiking_wkv"]
    L, C = (33, 48) if args.quick else (394, 384)
    fused, parts = ({"spiking_min_channels_fused": n} for n in (0, 1 << 40))
    forms = {"spiking_wkv": {}, "one walk": fused, "in parts": parts, "wkv, then lif": {}}
    for B in (1, 2) if args.quick else (2, 8, 32, 64, 96, 128, 256):
        leaves = op.data(B, L, C, device=args.device)[:4]  # without gate
        g = torch.randn_like(leaves[-1])
        for mode in MODES:
            found, moved = [], ops.passes(mode, 2) * g.nbytes
            for name, value in forms.items():
                f = wkv_then_lif if name == "wkv, then lif" else op.call
                c = ops.make_contestant(name, mode, f, leaves, g, bytes=moved, B=B)
                found.append(with_parameters(c, value))
            rows += compare(found, **settings)
    return f"spiking_wkv, (4, B, {L}, {C}), fp32; bytes of the fused form", rows


# ---- models and calls ------------------------------------------------------------------------------------------------------


def steps(args, settings):
    """Training steps of SDiT. The plain form, which scans the tokens one by one, is timed for one step after a warm-up"""
    rows = []
    cases = ("digits", 2, True), ("digits", 4, False)
    if not args.quick:
        cases = ("fashion_mnist", 256, False), ("cifar10", 64, False), ("cifar10", 256, False), ("fashion_mnist", 32, True)
    if args.first:
        cases = [(preset, batch, False) for preset, batch, _ in cases if preset in ("fashion_mnist", "digits")]
    for preset, batch, plain in cases:
        model, inputs = bench_sdit.make_case(args.device, batch, preset)
        forms = ("ours", torch.bfloat16), ("graph", torch.bfloat16), ("ours", None), *[("plain", None)] * plain
        for form, dtype in forms:
            network = bench_sdit.PlainSDiT(model) if form == "plain" else model
            recorded = {"capturable": True} if form == "graph" and args.device == "cuda" else {}
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True, **recorded)
            step = functools.partial(
                bench_sdit.run_training_step, network, inputs, torch.zeros((), device=args.device), optimizer, dtype
            )
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if form == "graph":
                with graphs(args.device):
                    step = Replayed(step, sdit_train.make_recorder(True, torch.device(args.device)), "run")
                for _ in range(3):  # the third call records
                    step()
            row = {"name": f"{preset}, batch {batch}, {form}, {'bf16' if dtype else 'fp32'}"}
            if form == "plain":
                step()
                began = time.perf_counter()
                step().item()
                row["median_s"] = time.perf_counter() - began
            else:
                row |= compare([Contestant(row["name"], step)], **settings | {"rounds": 2 if args.quick else 5})[0]
            row["images_per_second"] = batch / row["median_s"]
            if args.device == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            rows.append(row)
            print(row["name"], f"{row['median_s']:.4g} s", flush=True)
    return "training steps", rows


def models(args, settings):
    """Training steps of spiking models of SpikingJelly before and after ``accelerate``: time and peak memory"""
    title = "training steps of spiking models, fp32"
    if harness.reason_if_missing("spikingjelly"):
        return bench_compat.skip_section(title, "spikingjelly")
    from spikingjelly.activation_based import functional

    from sdit_kernels.compat.spikingjelly import accelerate

    rows = []
    for name, make in (("CNN, 28 x 28", bench_compat.spiking_cnn), ("Spikformer block", bench_compat.spikformer_block)):
        net, x = (each.to(args.device) for each in make())
        ways = {"before": {}, "accelerated": {}, "fused and packed": {"fuse": True, "packed": True}}
        found = []
        for way, options in ways.items():
            changed = copy.deepcopy(net)
            if way != "before":
                accelerate(changed, **options)
            step = bench_compat.make_training_step(changed, x, functional.reset_net)
            peak = harness.allocated_bytes(step, args.device)["peak_bytes"]
            found.append(Contestant(way, step, extra={"model": name, "peak_bytes": peak}))
        rows += compare(found, **settings | {"rounds": 2 if args.quick else 5})
    return title, rows


def profile(args, settings):
    """Kernels of a training step of SDiT in bf16, sorted by time on the device"""
    batch = 2 if args.quick else 128
    case = {"preset": "digits" if args.quick else bench_sdit.PRESET, "bf16": True}
    step = profile_sdit.make_step(args.device, batch, **case)
    profile_sdit.run_steps(step, 1 if args.quick else profile_sdit.WARM_UP, args.device)
    seconds, products, rows = profile_sdit.profile_steps(step, 1, args.device)
    return f"{profile_sdit.describe_case(batch, **case)}: {1e3 * seconds:.1f} ms, {products:.0f} % in matrix products", rows


def host(args, settings):
    """CPU time of a call on small tensors: Python and launch, without waiting for the device"""
    rows = []
    relu = torch.relu, [ops.normal(8, 8, device=args.device)]  # for comparison: an op of PyTorch
    for name, (f, leaves) in ({"torch.relu": relu} | calls(args.device, True)).items():
        g = torch.ones_like(f(*leaves))
        found = [ops.make_contestant(mode, mode, f, leaves, g, op=name) for mode in MODES]
        rows += compare(found, **settings | {"device": "cpu", "min_time": 0.002})
        if args.device == "cuda":
            torch.cuda.synchronize()
    return "host time of a call", rows


def mix(args, settings):
    """token_shift and relu_squared against plain PyTorch and torch.compile"""
    titles, rows = zip(*(f(args, settings) for f in bench_mix.SECTIONS.values()))
    return ", ".join(titles), sum(rows, [])


def snn(args, settings):
    """leaky, and unroll of compat.snntorch, against snnTorch's Leaky in the loop that its users write"""
    steps, *shape = (3, 2, 33) if args.quick else (bench_compat.STEPS, bench_compat.BATCH, bench_compat.HIDDEN)
    title = f"leaky, T={steps}, {tuple(shape)}, fp32"
    if harness.reason_if_missing("snntorch"):
        return bench_compat.skip_section(title, "snntorch")
    import snntorch

    neuron = snntorch.Leaky(beta=0.9).to(args.device)
    fused = copy.deepcopy(neuron)
    compat_snntorch.accelerate(fused)
    x = ops.current(steps, *shape, device=args.device)
    g = torch.randn_like(x)

    def unrolled(x):
        return compat_snntorch.unroll(fused, x, torch.zeros_like(x[0]))[0]

    forms, rows = {"leaky": OPS["leaky"].call, "unroll": unrolled, "loop": snntorch_loop(neuron)}, []
    for mode in MODES:
        moved = OPS["leaky"].bytes(mode, [x])
        found = [ops.make_contestant(name, mode, f, [x], g, bytes=moved) for name, f in forms.items()]
        rows += compare([*found, harness.make_copy_contestant(moved, args.device)], **settings)
    return title, rows


def section(module, name, **changes):
    """Return a section of another script, with changed arguments."""
    measure = module.SECTIONS[name]

    def run(args, settings):
        return measure(argparse.Namespace(**vars(args) | changes), settings)

    run.__doc__ = measure.__doc__
    return run


TIMINGS = {
    "steps": steps,
    "models": models,
    "profile": profile,
    "spiking": section(bench_wkv, "spiking", backward=True),
    "sizes": sizes,
    "host": host,
    "wkv": section(bench_wkv, "peers"),
    "wkv_backward": section(bench_wkv, "backward"),
    "lif": section(bench_lif, "peers"),
    "rate": section(bench_lif, "rate"),
    "bandwidth": section(bench_lif, "bandwidth"),
    "mix": mix,
    "jelly": section(bench_compat, "jelly_neurons"),
    "fused_cnn": section(bench_memory, "cnn_28"),
    "fused_spikformer": section(bench_memory, "spikformer"),
    "snn": snn,
    "algorithms": algorithms,
    "decoding": section(bench_wkv, "decoding"),
    "memory": section(bench_lif, "memory"),
    "wkv_bf16": section(bench_wkv, "peers", dtype=torch.bfloat16),
    "wkv_backward_bf16": section(bench_wkv, "backward", dtype=torch.bfloat16),
    "sweep": section(bench_wkv, "sweep"),
    "rules": rules,
}


# What changed since the last run on a GPU, checks that failed or never ran there, and what they are for
FIRST = (
    "tests", "big_offsets", "compat", "fused_layers", "sdit_graph", "compiled", "values_lif", "steps", "models", "profile",
    "host", "rules",
)  # fmt: skip
FIRST_TESTS = [f"test_{stem}.py" for stem in ("norm_lif", "packed", "pool", "lif", "levels", "cuba", "own")]
FIRST_CASES = "lif", "lif_rate", "token_shift", "spiking_wkv"


# ---- the parts -------------------------------------------------------------------------------------------------------------


def _traceback_tail():
    """Return the end of the current traceback, without paths of this machine."""
    return traceback.format_exc().replace(f"{harness.ROOT}/", "")[-3000:]


def run_check(name, device, small):
    """Run one check in its own process; return (name, result)."""
    began = time.perf_counter()
    try:
        result = {"passed": True, "figures": (CHECKS | COMPILE)[name](device, small)}
    except Exception as e:  # an error counts as a failure, and the other checks run
        result = {"passed": False, "error": f"{type(e).__name__}: {e}"[:2000], "where": _traceback_tail()}
    return name, result | {"seconds": round(time.perf_counter() - began, 1)}


def run_checks(names, device, small, workers):
    if small:
        yield from (run_check(name, device, small) for name in names)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run_check, name, device, small) for name in names]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()


def start_tests(log, seconds, workers, files=("",)):
    """Start pytest for the tests of Triton kernels in the background; ``files`` of tests/, all by default."""
    chosen = "(triton or chain) and not interpreter"
    command = ["timeout", "--signal=INT", str(int(seconds)), sys.executable, "-m", "pytest", "-q", "-k", chosen]
    command += ["-n", str(workers), "--dist", "worksteal", "-p", "no:cacheprovider", "-rfE", "--tb=short", "--color=no"]
    command += [str(harness.ROOT / "tests" / file) for file in files]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=harness.ROOT)


def tests_result(process, log):
    process.wait()
    log.seek(0)
    lines = log.read().splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no summary")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": process.returncode == 0, "summary": summary, "failed": failed, "tail": lines[-200:]}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dry-run", action="store_true", help="a small run on the CPU, to test this script")
    p.add_argument("--json", metavar="PATH", help="write the results to this file after every part")
    p.add_argument(
        "--only", metavar="NAME[,NAME]",
        help=f"parts to run: first (what changed last), tests, checks, {', '.join([*CHECKS, *TIMINGS])}",
    )  # fmt: skip
    p.add_argument("--minutes", type=float, help="skip parts that would start later (default: 9, 4 with --only first)")
    p.add_argument("--workers", type=int, default=8, help="processes for tests and for checks (default: %(default)s each)")
    options = p.parse_args(argv)
    names = options.only.split(",") if options.only is not None else ["tests", "checks", *TIMINGS]
    first = names == ["first"]
    names, minutes = FIRST if first else names, options.minutes or (4 if first else 9)
    if unknown := set(names) - {"tests", "checks", *CHECKS, *COMPILE, *TIMINGS}:
        known = ", ".join([*CHECKS, *TIMINGS])
        p.error(f"--only knows first (alone), tests, checks, {known}; got {', '.join(sorted(unknown))}")
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu_suite.py: torch sees no GPU; --dry-run runs on the CPU")
    device = "cpu" if options.dry_run else "cuda"
    args = argparse.Namespace(
        device=device, quick=options.dry_run, threads=None, plot=None, json=options.json, csv=None, dtype=torch.float32,
        backward=True, first=first, shape=(1, 33, 32) if options.dry_run else harness.SHAPE,
    )  # fmt: skip
    settings = harness.setup(args) | {"rounds": 2 if options.dry_run else 9}
    if options.dry_run:
        peers.compiler = "aot_eager"  # a C++ compiler would take half of the time
    began, parts, failed = time.monotonic(), {}, []

    def seconds_left():
        return 60 * minutes - (time.monotonic() - began)

    def save():
        if options.json:
            facts = {"title": __doc__.splitlines()[0], "provenance": harness.provenance(device), "goals": harness.goals}
            harness.make_parent_folder(options.json).write_text(
                json.dumps(facts | {"parts": parts}, indent=1, default=str) + "\n"
            )

    with tempfile.TemporaryFile("w+") as log:
        tests = None
        if "tests" in names and not options.dry_run:
            tests = start_tests(log, seconds_left() / 2, options.workers, FIRST_TESTS if first else ("",))
        cases = {
            f"compile_{i}" for i, case in enumerate(make_launch_cases(device, True)) if not first or case.name in FIRST_CASES
        }
        wanted = [
            n for n in CHECKS | COMPILE if n in names or n in CHECKS and "checks" in names or n in cases and "rules" in names
        ]
        for name, result in run_checks(wanted, device, options.dry_run, options.workers):
            parts.setdefault("checks", {})[name] = result
            print(
                f"{'ok  ' if result['passed'] else 'FAIL'} {name} ({result['seconds']} s) {result.get('error', '')}", flush=True
            )
            failed += [name] * (not result["passed"])
            save()
        if tests:
            parts["tests"] = tests_result(tests, log)
            failed += ["tests"] * (not parts["tests"]["passed"])
            print(parts["tests"]["summary"], *parts["tests"]["failed"], sep="\n", flush=True)
            save()
    for name in (n for n in TIMINGS if n in names):
        if seconds_left() < 15:
            parts[name] = {"note": "skipped: the time was up"}
            print(f"skipped, the time was up: {name}")
            continue
        start = time.perf_counter()
        try:
            title, rows = TIMINGS[name](args, settings)
        except Exception as e:  # the later parts still run
            parts[name] = {"error": f"{type(e).__name__}: {e}"[:2000], "where": _traceback_tail()}
            failed.append(name)
            print(f"\n[{name}] {parts[name]['where']}", flush=True)
        else:
            for row in rows:
                row.pop("samples_s", None)
            parts[name] = {"title": title, "rows": rows, "seconds": round(time.perf_counter() - start, 1)}
            harness.show(f"[{name}] {title}, {parts[name]['seconds']:.0f} s", rows, args)
        if device == "cuda":
            torch.cuda.empty_cache()
        save()
    print(f"\n{'failed: ' + ', '.join(failed) if failed else 'all passed'}; {minutes - seconds_left() / 60:.1f} minutes")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
