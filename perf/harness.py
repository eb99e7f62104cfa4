"""Shared code of the scripts in perf/: side-by-side timing, the correctness gate, memory, provenance, tables and figures.

A script begins with these two lines, so that `python perf/bench_x.py` imports from the checkout like `python -m perf.bench_x`:

    import pathlib, sys
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

and continues, for example:

    from perf import harness
    args = harness.make_parser("LIF against its peers").parse_args()
    settings = harness.setup(args)                      # sets the threads; how long to measure
    error = harness.check("lif", fused(), reference(), rtol=1e-5, atol=1e-6)
    rows = harness.compare([harness.Contestant("fused", fused, bytes=moved, extra=error),
                            harness.Contestant("eager", reference, bytes=moved),
                            harness.Contestant("peer", peer, skip=harness.reason_if_missing("spikingjelly")),
                            harness.make_copy_contestant(moved, args.device)], baseline="eager", **settings)
    harness.report("LIF, T=4", rows, args)
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPE = (8, 394, 384)  # default of `args.shape`: batch, tokens and channels of a small diffusion transformer
COPY = "copy"  # name of the contestant whose bandwidth is 100 % in `percent_of_copy`
PACKAGES = ("torch", "triton", "numba", "numpy", "spikingjelly", "snntorch", "fla-core", "transformers")


# ---- command line ----------------------------------------------------------------------------------------------------


def make_parser(description: str, figure=None) -> argparse.ArgumentParser:
    """Make a parser with the arguments of all scripts. ``figure``: default path of --plot."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--quick", action="store_true", help="few short rounds, to test that it runs; the times mean nothing")
    p.add_argument("--json", metavar="PATH", help="write rows, samples and provenance to this file")
    p.add_argument("--csv", metavar="PATH", help="write the rows to this file")
    optional = {"nargs": "?", "const": figure} if figure else {}
    p.add_argument("--plot", metavar="PATH", help="draw the figure (needs matplotlib)", **optional)
    # If other processes use the cores, use one thread: threads that wait for each other measure the scheduler. A copy, a
    # matrix multiplication and an exponential of 4 MiB took 0.1 to 1 ms on one thread, but 8 ms each on two threads.
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the default of torch, every core)")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    p.set_defaults(shape=SHAPE)
    return p


def setup(args) -> dict:
    """Set the number of threads, check the device, and return the keyword arguments of `compare`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU")
    min_time = 0.02 if args.quick else 0.1
    if args.device == "cuda":
        min_time /= 100  # GPU time only: it excludes overwriting the L2 cache between the calls, and the wait in the queue
    return {"device": args.device, "rounds": 3 if args.quick else 21, "min_time": min_time}


# ---- correctness gate ------------------------------------------------------------------------------------------------


def check(name: str, got, want, rtol: float, atol: float) -> dict:
    """Raise AssertionError unless |got - want| <= atol + rtol |want| for every element (NaN equals NaN); return the errors.

    ``got`` and ``want`` are tensors, or sequences of tensors and None; for sequences the largest errors are returned. The
    returned dict fits `Contestant(extra=)`.
    """
    if isinstance(want, tuple | list):
        if len(got) != len(want):
            raise AssertionError(f"{name}: {len(got)} results, {len(want)} wanted")
        errors = [check(f"{name}[{i}]", g, w, rtol, atol) for i, (g, w) in enumerate(zip(got, want, strict=True))]
        return {key: max(e[key] for e in errors) for key in ("max_abs_error", "rel_rms_error")}
    if got is None or want is None:
        if got is not want:
            raise AssertionError(f"{name}: got {type(got).__name__}, wanted {type(want).__name__}")
        return {"max_abs_error": 0.0, "rel_rms_error": 0.0}
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}")
    g, w = got.detach().double().cpu().flatten(), want.detach().double().cpu().flatten()
    same = (g == w) | (g.isnan() & w.isnan())
    error = torch.where(same, 0.0, (g - w).abs()).nan_to_num(nan=math.inf)
    wrong = ~torch.isclose(g, w, rtol=rtol, atol=atol, equal_nan=True)
    if wrong.any():
        i = int(error.argmax())
        at = tuple(int(j) for j in numpy.unravel_index(i, tuple(got.shape)))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ by more than rtol {rtol:g}, atol {atol:g}; "
            f"worst at {at}: got {g[i].item():.9g}, wanted {w[i].item():.9g} ({got.dtype} against {want.dtype})"
        )
    rms = error.norm() / w.nan_to_num(0.0, 0.0, 0.0).norm().clamp_min(1e-300)
    return {"max_abs_error": error.max().item() if error.numel() else 0.0, "rel_rms_error": rms.item()}


def check_gradients(name: str, got, want, tolerance: float, least: float = 0.0) -> dict:
    """`check` each pair with a tolerance relative to the largest element (at least ``least``), as the rounding of sums is."""
    pairs = enumerate(zip(got, want, strict=True))
    errors = [check(f"{name} {i}", g, w, tolerance, tolerance * max(w.abs().max().item(), least)) for i, (g, w) in pairs]
    return {"grad_rel_rms_error": max((e["rel_rms_error"] for e in errors), default=0.0)}


# ---- calls -----------------------------------------------------------------------------------------------------------


def make_inference(f, leaves):
    """Return a function without arguments that calls f(*leaves) without gradients."""

    def run():
        with torch.no_grad():
            return f(*leaves)

    return run


def make_forward_backward(f, leaves, g, parameters=()):
    """Return a function without arguments that runs forward and backward pass; it returns the gradients.

    The gradients belong to leaves and parameters. ``g`` is the gradient of the output, dense as from a next layer. If f has
    several outputs, ``g`` is the gradient of the first, or a sequence with one gradient per output.
    """

    def run():
        out = f(*leaves)
        if isinstance(g, torch.Tensor) and not isinstance(out, torch.Tensor):
            out = out[0]
        return torch.autograd.grad(out, (*leaves, *parameters), g)

    return run


# ---- timing ----------------------------------------------------------------------------------------------------------


class Contestant(NamedTuple):
    """One row of a comparison."""

    name: str
    fn: Callable[[], object] | None = None
    prepare: Callable[[], object] | None = None  # called before every sample, not timed
    skip: str | None = None  # the reason why it does not run; shown in the table
    bytes: int | None = None  # bytes that one call reads and writes, for GB/s and the share of the copy bandwidth
    extra: dict | None = None  # further columns, for example the measured error


def reason_if_missing(module: str) -> str | None:
    """Return the reason for `Contestant(skip=)` if ``module`` is not installed, else None."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed (make peers)"


def compare(contestants, *, rounds=21, min_time=0.1, device="cpu", baseline=None, flush_l2=True) -> list[dict]:
    """Time the contestants in turn (A B C, A B C, ...) and return one row per contestant.

    A sample repeats the call for `min_time` seconds. A machine drifts and stalls, but the samples of one round share these
    effects. So the ratio to the `baseline` (default: the first contestant that runs) is computed within each round, and the
    median of these ratios is reported; below 1 is faster than the baseline. `iqr` is the distance between the quartiles.

    On the CPU the calls of a sample follow each other, so data that fits in a cache stays there. On a GPU the time of a call is
    the time between two events. The device is kept busy until all calls of a sample are queued, so it does not wait for Python
    (unless one call takes Python more than 50 ms). The L2 cache is overwritten before every call, unless flush_l2=False.
    """
    running = [c for c in contestants if not c.skip]
    if baseline is None and running:
        baseline = running[0].name
    sample = _cuda_sampler(flush_l2) if torch.device(device).type == "cuda" else _sample_cpu
    repeats = {c.name: _calibrate(c, sample, min_time) for c in running}
    if len(repeats) < len(running):
        raise ValueError(f"names must differ: {[c.name for c in running]}")
    times = {c.name: [] for c in running}
    for _ in range(rounds):
        for c in running:
            if c.prepare:
                c.prepare()
            times[c.name].append(sample(c.fn, repeats[c.name]))
    times = {name: numpy.array(t) for name, t in times.items()}
    speeds = {c.name: c.bytes / times[c.name] / 1e9 for c in running if c.bytes}

    rows = []
    for c in contestants:
        row = {"name": c.name, **(c.extra or {})}
        if c.skip:
            rows.append(row | {"note": f"skipped: {c.skip}"})
            continue
        t = times[c.name]
        row |= {"median_s": _median(t), "iqr_s": _iqr(t), "min_s": float(t.min())}
        if row["median_s"] > 1.5 * row["min_s"]:
            row["note"] = f"unsteady: the median is {row['median_s'] / row['min_s']:.1f} times the minimum"
        if baseline in times:
            ratio = t / times[baseline]
            row |= {"ratio": _median(ratio), "ratio_iqr": _iqr(ratio), "baseline": baseline}
        if c.name in speeds:
            row |= {"bytes": c.bytes, "gb_per_s": _median(speeds[c.name])}
            if COPY in speeds:
                row["percent_of_copy"] = 100 * _median(speeds[c.name] / speeds[COPY])
        rows.append(row | {"repeats": repeats[c.name], "samples_s": [float(f"{x:.5g}") for x in t]})
    return rows


def make_copy_contestant(nbytes: int, device="cpu") -> Contestant:
    """Return a contestant that copies nbytes/2 with torch's copy_: the limit for an op that moves `nbytes`.

    On the CPU a large copy_ may bypass the caches, while an ordinary store first reads the cache line that it overwrites.
    """
    source = torch.ones(max(nbytes // 8, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Contestant(COPY, lambda: target.copy_(source), bytes=2 * source.nbytes)


def _sample_cpu(fn, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        fn()
    return (time.perf_counter() - start) / n


def _cuda_sampler(flush_l2: bool):
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    host = {}  # seconds of Python time to queue a call

    def sample(fn, n: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        torch.cuda._sleep(int(2e9 * min(0.05, 1.5 * n * host.get(fn, 0.0))))  # cycles at about 2 GHz
        began = time.perf_counter()
        for start, end in events:
            if flush_l2:
                flush.zero_()
            start.record()
            fn()
            end.record()
        host[fn] = (time.perf_counter() - began) / n
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / n / 1e3  # ms -> s

    return sample


def _calibrate(c: Contestant, sample, min_time: float) -> int:
    """Warm up (compilation, caches, clocks) and return the number of calls that take `min_time`."""
    if c.prepare:
        c.prepare()
    sample(c.fn, 2)
    n = 1
    while True:
        seconds = sample(c.fn, n)
        if n * seconds >= min_time:
            return n
        n = max(2 * n, min(10 * n, math.ceil(min_time / max(seconds, 1e-9))))


def _median(x) -> float:
    return float(numpy.median(x))


def _iqr(x) -> float:
    return float(numpy.subtract(*numpy.percentile(x, (75, 25))))


def remove_ratios(rows: list[dict]) -> list[dict]:
    """Remove the ratios from rows that are not alternatives to the first row."""
    for row in rows:
        for key in ("ratio", "ratio_iqr", "baseline"):
            row.pop(key, None)
    return rows


def measure_scaling(contestants, args, settings: dict, rounds: int, work: str, per: str, xlabel: str) -> list[dict]:
    """Measure time against work: return rows with the nanoseconds per unit of work in column ``per``; draw them with --plot.

    `extra` of a contestant holds its `mode`, its `sweep` and, under the key ``work``, its amount of work. One comparison times
    all sizes, so a disturbance of the machine affects all points of the curve equally.
    """
    settings = settings | {"rounds": 3 if args.quick else rounds, "min_time": settings["min_time"] / 5}
    rows = [row | {"name": row["mode"]} for row in remove_ratios(compare(contestants, **settings))]
    series = {}
    for row in rows:
        del row["mode"]
        row[per] = 1e9 * row["median_s"] / row[work]
        point = row[work], 1e3 * row["median_s"], 1e3 * row["iqr_s"]
        series.setdefault(f"{row['name']}, {row['sweep']}", []).append(point)
    if args.plot:
        guides = []  # lines of linear cost, from the largest point of a sweep down to where the fixed cost dominates
        for points in list(series.values())[:2]:
            (x, y, _), least = points[-1], points[0][1] / 2
            guides.append(((x * least / y, x), (least, y)))
        lines = {label: tuple(zip(*points)) for label, points in series.items()}
        plot_lines(args.plot, lines, xlabel, "time per call (ms)", guides={"linear cost": guides})
    return rows


# ---- goals -----------------------------------------------------------------------------------------------------------

goals = []


def record_goal(name, value, limit, unit="", at_least=True):
    """Record a goal and whether ``value`` reaches it; ``value`` is None if it could not be measured."""
    reached = value is not None and (value >= limit if at_least else value <= limit)
    verdict = "SKIP" if value is None else "PASS" if reached else "FAIL"
    measured = "not measured, a contestant is missing" if value is None else f"{value:.4g}{unit}"
    goals.append(f"{verdict}  {name}: {measured} (goal: {'at least' if at_least else 'at most'} {limit:g}{unit})")


def ratio(rows, name):
    """Return the time of a contestant divided by the time of the baseline, None if the contestant did not run."""
    return next(r for r in rows if r["name"] == name).get("ratio")


def run_sections(doc: str, sections: dict, figure=None, add_arguments=None, choose=None) -> bool:
    """Run a script of several sections, ``{name: function(args, settings) -> (title, rows)}``. Return True if a goal failed.

    ``add_arguments(parser)`` adds arguments of the script. ``choose(args)`` returns the names of the sections to run without
    --only (default: all).
    """
    p = make_parser(doc.splitlines()[0], figure=figure)
    p.add_argument("--only", metavar="NAME[,NAME]", help=f"sections to run: {', '.join(sections)}")
    if add_arguments:
        add_arguments(p)
    args = p.parse_args()
    names = args.only.split(",") if args.only else choose(args) if choose else list(sections)
    unknown = set(names) - set(sections)
    if unknown:
        p.error(f"--only knows {', '.join(sections)}; got {', '.join(sorted(unknown))}")
    settings = setup(args)
    results = []
    for name in names:
        title, rows = sections[name](args, settings)
        show(f"[{name}] {title}\n{sections[name].__doc__}.", rows, args)
        results += [{"section": name, **row} for row in rows]
    save(doc.splitlines()[0], results, args, goals=goals)
    if goals:
        shown = [goal.replace(goal[:4], "    ", 1) for goal in goals] if args.quick else goals
        print("\nGoals" + (" (--quick: not judged, the times mean nothing)" if args.quick else ""), *shown, sep="\n")
    return not args.quick and any(g.startswith("FAIL") for g in goals)


# ---- memory ----------------------------------------------------------------------------------------------------------


class _Saved:
    """A tensor that a node of a graph holds."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(fn, exclude=()) -> tuple[int, list[tuple]]:
    """Measure what autograd saves for the backward pass in `fn`: (bytes, [(shape, dtype, bytes), ...]).

    Every storage counts once; a saved view counts its whole storage. `exclude`: tensors that exist anyway (inputs, parameters).
    What only nodes hold that the result does not need does not count. Tensors that are attributes of `ctx` are not counted
    either, because autograd's hooks do not see them; `allocated_bytes` counts them.
    """
    seen = {t.untyped_storage()._cdata for t in exclude}
    saved = []

    def pack(t):
        held = _Saved(t.detach())  # shares the memory; saving an output itself would make a reference cycle
        # the storage is kept alive until we return, so that its identity is not reused
        saved.append((weakref.ref(held), t.untyped_storage(), tuple(t.shape), str(t.dtype).removeprefix("torch.")))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = fn()
    tensors = []
    for held, storage, shape, dtype in saved:
        if held() is not None and storage._cdata not in seen:
            seen.add(storage._cdata)
            tensors.append((shape, dtype, storage.nbytes()))
    del result
    return sum(n for _, _, n in tensors), tensors


def allocated_bytes(fn, device="cpu") -> dict:
    """Measure torch's allocations in `fn`: {"kept_bytes": growth after the call, "peak_bytes": largest growth during it}.

    kept_bytes counts the result and everything that its graph holds. A first call of `fn`, before the measurement, makes the
    allocations that happen only once. On the CPU the profiler reports the allocations; it does not see memory that numpy or
    numba allocates.
    """
    fn()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = fn()
        torch.cuda.synchronize()
        kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del result
        return {"kept_bytes": kept, "peak_bytes": peak}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints a line at every start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = fn()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(trace)
        events = json.loads(pathlib.Path(trace).read_text())["traceEvents"]
    # The profiler also reports that memory is freed which was allocated before: it belongs to earlier calls and is not counted.
    live, level, peak = {}, 0, 0
    for event in sorted((e["args"] | {"ts": e["ts"]} for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        if event["Bytes"] > 0:
            live[event["Addr"]] = event["Bytes"]
            level += event["Bytes"]
            peak = max(peak, level)
        else:
            level -= live.pop(event["Addr"], 0)
    return {"kept_bytes": level, "peak_bytes": peak}


# ---- provenance ------------------------------------------------------------------------------------------------------


def provenance(device="cpu") -> dict:
    """Return the facts that a reader needs to repeat a measurement, without paths and host names."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join([_without_folder(sys.argv[0]), *(re.sub(r"(^|=)/\S*/", r"\1", a) for a in sys.argv[1:])]),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!perf/results")),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties()
        facts |= {"gpu": gpu.name, "gpu_bytes": gpu.total_memory, "gpu_multiprocessors": gpu.multi_processor_count}
        facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return facts


def _without_folder(script: str) -> str:
    path = pathlib.Path(script).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _git(*command: str) -> str | None:
    try:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git, a repository or a commit is missing
        return None


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


# ---- output ----------------------------------------------------------------------------------------------------------


def format_table(rows: list[dict], columns=None) -> str:
    """Format rows as text. The key gives the unit: ..._s, ...bytes, gb_per_s, percent_...; lists and dicts are skipped."""
    if columns is None:
        hidden = {"baseline", "repeats", "note"}
        columns = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in hidden] + ["note"]
        columns = [k for k in columns if any(isinstance(row.get(k), str | int | float) for row in rows)]
    bases = {row["baseline"] for row in rows if "baseline" in row}
    heads = {"gb_per_s": "bandwidth", "ratio": f"time / {bases.pop()}" if len(bases) == 1 else "ratio"}
    heads = [heads.get(k) or k.removesuffix("_s").replace("_", " ") for k in columns]
    cells = [[_format_cell(k, row.get(k)) for k in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    text = [any(isinstance(row.get(k), str) for row in rows) for k in columns]
    lines = [[c.ljust(w) if t else c.rjust(w) for c, w, t in zip(line, widths, text, strict=True)] for line in [heads, *cells]]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _format_cell(key: str, value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if key.endswith("gb_per_s"):
        return f"{value:.3g} GB/s"
    if key.endswith("_s"):
        unit, scale = ("s", 1) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
        return f"{value * scale:.3g} {unit}"
    if key.endswith("bytes"):
        unit, scale = next((u for u in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if value >= u[1]), ("B", 1))
        return f"{value / scale:.4g} {unit}"
    if key.startswith("percent"):
        return f"{value:.0f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(title: str, rows: list[dict], args, columns=None) -> None:
    """Print the table; write --json (provenance, and one row per line with all samples) and --csv (the rows)."""
    show(title, rows, args, columns)
    save(title, rows, args)


def show(title: str, rows: list[dict], args, columns=None) -> None:
    """Print the table without saving it: a script of several sections saves all rows at its end."""
    facts = provenance(args.device)
    print(f"\n{title}\n{facts.get('gpu') or facts['cpu']}, threads: {facts['threads']}, torch {torch.__version__}\n")
    print(format_table(rows, columns), flush=True)


def save(title: str, rows: list[dict], args, **facts) -> None:
    """Write --json and --csv without printing; ``facts`` are further keys of the JSON."""
    if args.json:
        head = {"title": title, "provenance": provenance(args.device), **facts}
        head = json.dumps(head, indent=1, default=str).removesuffix("\n}")
        body = ",\n  ".join(json.dumps(row, default=str) for row in rows)
        make_parent_folder(args.json).write_text(f'{head},\n "rows": [\n  {body}\n ]\n}}\n')
    if args.csv:
        keys = dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list | dict))
        with open(make_parent_folder(args.csv), "w", newline="") as file:
            writer = csv.DictWriter(file, keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def make_parent_folder(path) -> pathlib.Path:
    """Make the folder of a path and return the path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def plot_lines(path, series: dict, xlabel: str, ylabel: str, title: str = "", guides=None) -> None:
    """Draw {label: (x, y) or (x, y, spread)} on logarithmic axes; a band around y shows the spread.

    ``guides``: {label: [(x, y), ...]}, dashed grey lines, for example a slope to compare with.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    # Okabe and Ito's colours, which colour-blind readers can distinguish; each line also has its own marker
    styles = zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^vPX", strict=True)
    for (label, (x, y, *spread)), (color, marker) in zip(series.items(), styles, strict=False):
        axes.plot(x, y, color=color, marker=marker, markersize=5, linewidth=1.6, label=label)
        if spread:
            factor = 1 + numpy.asarray(spread[0]) / 2 / numpy.asarray(y)  # the band is symmetric on a logarithmic axis
            axes.fill_between(x, y / factor, y * factor, color=color, alpha=0.2, linewidth=0)
    for label, lines in (guides or {}).items():
        for i, (x, y) in enumerate(lines):
            axes.plot(x, y, "--", color="0.45", linewidth=1, zorder=1, label=None if i else label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if max(max(x) for x, *_ in series.values()) < 1e5:  # for larger values the ticks read 2^k
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(True, which="major", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(make_parent_folder(path), dpi=150)
    pyplot.close(figure)
