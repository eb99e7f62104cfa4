"""Everything that needs a GPU in one command of under nine minutes: are the values right there, and how fast is it?

    python perf/gpu_suite.py --json gpu.json
    python perf/gpu_suite.py --only checks,rules
    python perf/gpu_suite.py --dry-run          the same on the CPU, small, so that it cannot rot; its times mean nothing

tests     the project's tests of the Triton kernels, whose CPU tensors are carried to the device and back at every launch
checks    gpu_checks.py: tensors that live on the device, at sizes of real models: values and gradients against float64,
          repeatability, more than 2^31 elements, host syncs, side streams, CUDA graphs, torch.compile, autocast, SDiT
timings   steps: training steps of SDiT; host: time of a call; algorithms, sizes, rules: for the launchers' rules; and the
          sections of bench_lif.py, bench_wkv.py and bench_mix.py

Results are written after every part, so that a part that fails or runs out of time leaves those before it. The exit status says
whether a test, a check or a section failed.
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import bench_compat, bench_lif, bench_mix, bench_sdit, bench_wkv, harness, profile_sdit
from perf.bench_wkv import forward_backward, inference, ours, parameters
from perf.gpu_checks import CHECKS, calls, launched_with, normal
from perf.harness import Contestant, compare
from sdit import PRESETS, SDiT
from sdit_kernels import leaky, lif, lif_rate, relu_squared, spiking_wkv, token_shift, wkv
from sdit_kernels.compat import snntorch as compat_snntorch

MODES = "forward", "forward+backward"


def contestant(name, mode, f, leaves, g, passes=None, **extra):
    """``passes``: over the first of the leaves that an ideal kernel makes."""
    run = inference(f, leaves) if mode == "forward" else forward_backward(f, leaves, g)
    return Contestant(name, run, extra={"mode": mode, **extra}, bytes=passes and passes * leaves[0].nbytes)


# ---- launch parameters -----------------------------------------------------------------------------------------------------


def with_parameters(contestant, module, values):
    """The contestant, its backward pass too, launched with these."""

    def call():
        with launched_with(module, **values):
            contestant.fn()

    return contestant._replace(fn=call)


def launch_cases(device, small):
    """(name, module, parameters to try, function, shapes of its data, ideal passes over one of them forward and in all)"""
    L, C = (33, 48) if small else (394, 384)
    n = 1 << (12 if small else 24)
    many, few, one = (2, 1, 1) if small else (128, 32, 1)
    d, u = parameters(C, device)
    mixes = [torch.rand(C, device=device) for _ in range(3)]

    def tries(name, *values):
        return [{name: value} for value in values]

    def shift(x):
        return token_shift(x, *mixes, norm_eps=1e-6)

    def scan(k, v, algorithm="serial"):
        return wkv(d, u, k, v, algorithm=algorithm)

    def spikes(k, v, r):
        return spiking_wkv(d, u, k, v, r)

    threads = tries("_THREADS", 64, 128, 256)
    yield "lif", "triton.lif", threads, lif, [(4, n // 4)], (2, 5)
    yield "lif_rate", "triton.lif", threads, lif_rate, [(n,)], (2, 5)
    yield "token_shift", "triton.mix", threads, shift, [(few, L, C)], (4, 9)
    yield "relu_squared", "triton.mix", threads, relu_squared, [(n,)], (2, 5)
    tiles = tries("TILE", 8, 16, 32) if device == "cuda" else []  # it is compiled into the CPU's kernels
    for B in (few, many):
        for name, module, values in (
            ("threads", "triton.wkv", tries("_THREADS", 32, 64, 128)),
            ("tokens held", "triton.wkv", tries("_HELD", 4, 8, 16)),
            ("tile", "layout", tiles),
        ):
            yield f"wkv serial, B={B}: {name}", module, values, scan, [(B, L, C)] * 2, (3, 8)
    chunked, fill = functools.partial(scan, algorithm="chunked"), tries("_FILL", *(1 << e for e in (14, 15, 16, 17)))
    for B, length in ((one, 16 * L), (few // 4 or 1, L), (few, L)):
        yield f"wkv chunked, B={B}, L={length}", "triton.wkv", fill, chunked, [(B, length, C)] * 2, (3, 8)
    yield "spiking_wkv", "triton.spiking_wkv", tries("_FUSED", 0, 1 << 30), spikes, [(4, 2 * few, L, C)] * 3, (4, 11)


def data(case, device):
    """The leaves of a case, and a gradient of its output."""
    f, shapes = case[3:5]
    leaves = [normal(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    with torch.no_grad():
        out = f(*leaves)
    return leaves, tuple(map(torch.randn_like, out)) if isinstance(out, tuple) else torch.randn_like(out)


def compile_case(i, device, small):
    """Compile what case i of `rules` times: beside the checks, in a process of its own."""
    case = list(launch_cases(device, small))[i]
    leaves, g = data(case, device)
    for value in case[2]:
        with launched_with(case[1], **value):
            forward_backward(case[3], leaves, g)()
    return {}


COMPILE = {f"compile_{i}": functools.partial(compile_case, i) for i in range(14)}


def rules(args, settings):
    """Launch parameters side by side; "percent of copy" is of the bytes that an ideal kernel moves"""
    rows = []
    for case in launch_cases(args.device, args.quick):
        name, module, values, f, _, passes = case
        leaves, g = data(case, args.device)
        for mode, arrays in zip(MODES, passes):
            contestants = [harness.copy_contestant(arrays * leaves[0].nbytes, args.device)]
            for value in values:
                label = ", ".join(f"{k}={v}" for k, v in value.items())
                c = contestant(label, mode, f, leaves, g, arrays, op=name)
                contestants.append(with_parameters(c, module, value))
            rows += compare(contestants, **settings)
    return "launch parameters, fp32", rows


def algorithms(args, settings):
    """wkv "serial" against "chunked", C = 384: what "auto" should choose"""
    rows, C = [], 384
    batches, lengths = ((1, 2), (64,)) if args.quick else ((1, 4, 16, 32, 48, 64, 128, 256), (64, 394, 1024, 4096, 16384))
    d, u = parameters(C, args.device)
    for B in batches:
        for L in lengths:
            if B * L <= 1 << 18:
                leaves = [normal(B, L, C, device=args.device, seed=i) for i in range(2)]
                g = torch.randn_like(leaves[0])
                for mode, passes in zip(MODES, (3, 8)):
                    found = []
                    for name in ("serial", "chunked", "auto"):
                        f = functools.partial(ours(name), d, u)
                        found.append(contestant(name, mode, f, leaves, g, passes, B=B, L=L))
                    rows += compare(found, **settings)
    return "wkv, C = 384, fp32", rows


def sizes(args, settings):
    """spiking_wkv in one walk, by the kernels of wkv and lif, and as users would chain these, by batch; T = 4"""
    rows = []
    L, C = (33, 48) if args.quick else (394, 384)
    d, u = parameters(C, args.device)

    def whole(k, v):
        return spiking_wkv(d, u, k, v)

    def chain(k, v):
        return lif(wkv(d, u, k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, k.shape[:2]))

    forms = {"spiking_wkv": {}, "one walk": {"_FUSED": 0}, "in parts": {"_FUSED": 1 << 40}, "wkv, then lif": {}}
    for B in (1, 2) if args.quick else (2, 8, 32, 64, 96, 128, 256):
        leaves = [normal(4, B, L, C, device=args.device, seed=i, scale=1.0 + 2 * i) for i in range(2)]
        g = torch.randn_like(leaves[0])
        for mode, passes in zip(MODES, (3, 8)):
            found = []
            for name, value in forms.items():
                c = contestant(name, mode, chain if name == "wkv, then lif" else whole, leaves, g, passes, B=B)
                found.append(with_parameters(c, "triton.spiking_wkv", value))
            rows += compare(found, **settings)
    return f"spiking_wkv, (4, B, {L}, {C}), fp32; bytes of the fused form", rows


# ---- models and calls ------------------------------------------------------------------------------------------------------


def steps(args, settings):
    """Training steps of SDiT. The plain form, which walks the tokens one by one, is timed once, after one step before it"""
    rows = []
    cases = ("digits", 2, True), ("digits", 4, False)
    if not args.quick:
        cases = ("fashion_mnist", 256, False), ("cifar10", 64, False), ("cifar10", 256, False), ("fashion_mnist", 32, True)
    for preset, batch, plain in cases:
        torch.manual_seed(0)
        model = SDiT(PRESETS[preset], variant="improved").to(args.device)
        c = model.config
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=args.device)
        inputs = (
            x,
            torch.randint(0, 1000, (batch,), device=args.device),
            torch.zeros(batch, dtype=torch.long, device=args.device),
        )
        for form, dtype in (("ours", torch.bfloat16), ("ours", None), *[("plain", None)] * plain):
            network = bench_sdit.Plain(model) if form == "plain" else model
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
            step = functools.partial(bench_sdit.step, network, inputs, torch.zeros((), device=args.device), optimizer, dtype)
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
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


def profile(args, settings):
    """Kernels of a training step of SDiT in bf16, by time on the device"""
    batch = 2 if args.quick else 128
    step = profile_sdit.step_of(args.device, batch, bf16=True)
    profile_sdit.run(step, 1 if args.quick else profile_sdit.WARM_UP, args.device)
    seconds, products, rows = profile_sdit.table(step, 1, args.device)
    case = profile_sdit.describe(None, batch, bf16=True)
    return f"{case}: {1e3 * seconds:.1f} ms, {products:.0f} % in matrix products", rows


def host(args, settings):
    """Time in which Python and the launch are done with a call on small tensors, the device not waited for"""
    rows = []
    relu = torch.relu, [normal(8, 8, device=args.device)]  # what PyTorch itself takes
    for name, (f, leaves) in ({"torch.relu": relu} | calls(args.device, True)).items():
        g = torch.ones_like(f(*leaves))
        found = [contestant(mode, mode, f, leaves, g, op=name) for mode in MODES]
        rows += compare(found, **settings | {"device": "cpu", "min_time": 0.002})
        if args.device == "cuda":
            torch.cuda.synchronize()
    return "host time of a call", rows


def mix(args, settings):
    """token_shift and relu_squared against plain PyTorch and torch.compile"""
    titles, rows = zip(*(f(args, settings) for f in bench_mix.SECTIONS.values()))
    return ", ".join(titles), sum(rows, [])


def snn(args, settings):
    """leaky, by itself and as compat.snntorch unrolls a neuron, against snnTorch's Leaky in the loop that its users write"""
    steps, *shape = (3, 2, 33) if args.quick else (bench_compat.STEPS, bench_compat.BATCH, bench_compat.HIDDEN)
    title = f"leaky, T={steps}, {tuple(shape)}, fp32"
    if harness.missing("snntorch"):
        return bench_compat.skipped(title, "snntorch")
    import snntorch

    neuron = snntorch.Leaky(beta=0.9).to(args.device)
    fused = copy.deepcopy(neuron)
    compat_snntorch.accelerate(fused)
    x = bench_compat.exact(steps, *shape, device=args.device)
    g = torch.randn_like(x)

    def alone(x):
        return leaky(x, beta=0.9)

    def unrolled(x):
        return compat_snntorch.unroll(fused, x, torch.zeros_like(x[0]))[0]

    def loop(x):
        return bench_compat.loop(neuron)(x)[0]

    rows = []
    for mode, passes in zip(MODES, (2, 5)):
        found = [contestant(n, mode, f, [x], g, passes) for n, f in (("leaky", alone), ("unroll", unrolled), ("loop", loop))]
        rows += compare([*found, harness.copy_contestant(passes * x.nbytes, args.device)], **settings)
    return title, rows


def section(module, name, **changes):
    """A section of a bench, with other arguments."""

    def run(args, settings):
        return getattr(module, name)(argparse.Namespace(**vars(args) | changes), settings)

    run.__doc__ = getattr(module, name).__doc__
    return run


TIMINGS = {
    "steps": steps,
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
    "snn": snn,
    "algorithms": algorithms,
    "decoding": section(bench_wkv, "decoding"),
    "memory": section(bench_lif, "memory"),
    "wkv_bf16": section(bench_wkv, "peers", dtype=torch.bfloat16),
    "wkv_backward_bf16": section(bench_wkv, "backward", dtype=torch.bfloat16),
    "sweep": section(bench_wkv, "sweep"),
    "rules": rules,
}


# ---- the parts -------------------------------------------------------------------------------------------------------------


def where():
    """The end of the traceback of what is being handled, without this machine's paths."""
    return traceback.format_exc().replace(f"{harness.ROOT}/", "")[-3000:]


def run_check(name, device, small):
    """(name, result) of one check, in a process of its own."""
    began = time.perf_counter()
    try:
        result = {"passed": True, "figures": (CHECKS | COMPILE)[name](device, small)}
    except Exception as e:  # a check that breaks is one that fails, and the others go on
        result = {"passed": False, "error": f"{type(e).__name__}: {e}"[:2000], "where": where()}
    return name, result | {"seconds": round(time.perf_counter() - began, 1)}


def run_checks(names, device, small, workers):
    if small:
        yield from (run_check(name, device, small) for name in names)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run_check, name, device, small) for name in names]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()


def start_tests(log, seconds, workers):
    """pytest of what runs Triton kernels, in the background."""
    chosen = "(triton or chain) and not interpreter"
    command = ["timeout", "--signal=INT", str(int(seconds)), sys.executable, "-m", "pytest", "-q", "-k", chosen]
    command += ["-n", str(workers), "--dist", "worksteal", "-p", "no:cacheprovider", "-rfE", "--tb=short", "--color=no"]
    return subprocess.Popen([*command, str(harness.ROOT / "tests")], stdout=log, stderr=subprocess.STDOUT, cwd=harness.ROOT)


def tests_result(process, log):
    process.wait()
    log.seek(0)
    lines = log.read().splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no summary")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": process.returncode == 0, "summary": summary, "failed": failed, "tail": lines[-200:]}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dry-run", action="store_true", help="on the CPU, small: does everything run?")
    p.add_argument("--json", metavar="PATH", help="where the results go, after every part")
    p.add_argument("--only", metavar="NAME[,NAME]", help=f"of tests, checks, {', '.join([*CHECKS, *TIMINGS])}")
    p.add_argument("--minutes", type=float, default=9, help="parts that would begin later are left out (default: %(default)s)")
    p.add_argument("--workers", type=int, default=8, help="processes for tests and for checks, each (default: %(default)s)")
    options = p.parse_args(argv)
    names = options.only.split(",") if options.only is not None else ["tests", "checks", *TIMINGS]
    if unknown := set(names) - {"tests", "checks", *CHECKS, *COMPILE, *TIMINGS}:
        p.error(f"--only knows tests, checks, {', '.join([*CHECKS, *TIMINGS])}; got {', '.join(sorted(unknown))}")
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu_suite.py: torch sees no GPU; --dry-run goes through it on the CPU")
    device = "cpu" if options.dry_run else "cuda"
    if options.dry_run:
        bench_compat.SHAPE = bench_lif.SHAPE = bench_wkv.SHAPE = bench_mix.B, bench_mix.L, bench_mix.C = 1, 33, 32
        bench_sdit.PRESET = "digits"
    args = argparse.Namespace(
        device=device, quick=options.dry_run, threads=None, plot=None, json=options.json, csv=None, dtype=torch.float32,
        backward=True,
    )  # fmt: skip
    settings = harness.setup(args) | {"rounds": 2 if options.dry_run else 9}
    began, parts, failed = time.monotonic(), {}, []

    def left():
        return 60 * options.minutes - (time.monotonic() - began)

    def save():
        if options.json:
            facts = {"title": __doc__.splitlines()[0], "provenance": harness.provenance(device), "goals": harness.goals}
            path = pathlib.Path(options.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(facts | {"parts": parts}, indent=1, default=str) + "\n")

    with tempfile.TemporaryFile("w+") as log:
        tests = None
        if "tests" in names and not options.dry_run:
            tests = start_tests(log, left() / 2, options.workers)
        wanted = [
            n for n in CHECKS | COMPILE if n in names or n in CHECKS and "checks" in names or n in COMPILE and "rules" in names
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
        if left() < 15:
            parts[name] = {"note": "left out: the time was up"}
            print(f"left out, the time was up: {name}")
            continue
        start = time.perf_counter()
        try:
            title, rows = TIMINGS[name](args, settings)
        except Exception as e:  # the parts after it are worth having
            parts[name] = {"error": f"{type(e).__name__}: {e}"[:2000], "where": where()}
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
    print(f"\n{'failed: ' + ', '.join(failed) if failed else 'all passed'}; {options.minutes - left() / 60:.1f} minutes")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
