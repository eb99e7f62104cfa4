"""wkv and spiking_wkv against the eager loop over tokens and Heinsen's form with cumulative log-sum-exps.

    python perf/bench_wkv.py                                    forward, accuracy, threads, spiking: under a minute
    python perf/bench_wkv.py --backward --sweep --json perf/results/wkv.json --plot
    python perf/bench_wkv.py --only peers --dtype bfloat16

Ideal bytes: every input read and every output written once. The error is the relative rms error against the definition in
float64. Ratios are formed within the run; the goals at the end of the output say PASS or FAIL, and a FAIL is also the exit
status (except with --quick, whose times mean nothing).
"""

import functools
import os
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness
from perf.harness import Contestant, check, compare, goal, missing, ratio
from sdit_kernels import backend, lif, spiking_wkv, wkv, wkv_step, wkv_step_

SHAPE = (8, 394, 384)  # batch, tokens and channels of a small diffusion transformer
FIGURE = harness.ROOT / "perf" / "results" / "wkv_scaling.png"


# ---- inputs and peers ------------------------------------------------------------------------------------------------


def parameters(C, device, dtype=torch.float32):
    """RWKV-4's initial values for a layer in the middle of a network."""
    c = torch.arange(C, device=device, dtype=dtype)
    return -5 + 8 * (c / max(C - 1, 1)) ** 0.9, -1.2 + 0.5 * ((c + 1) % 3 - 1)


def inputs(B, L, C, args, requires_grad=False):
    """(time_decay, time_first, k, v) of the dtype asked for; parameters are fp32."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(B, L, C, generator=generator).to(args.device, args.dtype) for _ in range(2))
    return [t.requires_grad_(requires_grad) for t in (*parameters(C, args.device), k, v)]


def eager_loop(time_decay, time_first, k, v, unbind=False):
    """RWKV's recurrence with a running maximum, as its users write it in PyTorch: with k[:, t], whose gradient is a tensor of
    zeros per token. ``unbind`` takes the tokens apart once instead."""
    w, dtype = -torch.exp(time_decay), k.dtype
    k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (k, v))
    a = b = torch.zeros_like(k[:, 0])
    o, out = torch.full_like(a, -1e38), []
    for kt, vt in zip(k.unbind(1), v.unbind(1)) if unbind else ((k[:, t], v[:, t]) for t in range(k.shape[1])):
        top = torch.maximum(o, time_first + kt)
        old, new = torch.exp(o - top), torch.exp(time_first + kt - top)
        out.append((old * a + new * vt) / (old * b + new))
        top = torch.maximum(w + o, kt)
        old, new = torch.exp(w + o - top), torch.exp(kt - top)
        a, b, o = old * a + new * vt, old * b + new, top
    return torch.stack(out, 1).to(dtype)


def heinsen(time_decay, time_first, k, v):
    """The recurrence by two cumulative log-sum-exps (Heinsen, arXiv 2311.06281). Values are shifted to be positive: an average
    of shifted values is the shifted average."""
    w, dtype = -torch.exp(time_decay), k.dtype
    k, v = k.float(), v.float()
    low = v.detach().amin() - 1
    steps = torch.arange(k.shape[1], device=k.device, dtype=k.dtype)[:, None]
    weight = k - steps * w
    value = torch.log(v - low)
    n, d = torch.logcumsumexp(weight + value, 1), torch.logcumsumexp(weight, 1)
    past = (steps[1:] - 1) * w  # of the state before token t
    n = torch.logaddexp(n[:, :-1] + past, time_first + k[:, 1:] + value[:, 1:])
    d = torch.logaddexp(d[:, :-1] + past, time_first + k[:, 1:])
    return torch.cat([v[:, :1], torch.exp(n - d) + low], 1).to(dtype)


def fla(time_decay, time_first, k, v):
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    state = k.new_zeros(len(k), 3, 1, k.shape[2], dtype=torch.float32)  # numerator, denominator, exponent
    state[:, 2] = -1e38
    return fused_recurrent_rwkv4(time_decay, time_first, k, v, state)[0]


def ours(algorithm):
    return lambda *args: wkv(*args, algorithm=algorithm)


def inference(f, args):
    def run():
        with torch.no_grad():
            return f(*args)

    return run


def forward_backward(f, args, g):
    return lambda: torch.autograd.grad(f(*args), args, g)


def rms_error(got, want):
    """Relative rms error against float64; the largest of several tensors'."""
    if isinstance(got, torch.Tensor):
        got, want = (got,), (want,)
    return max(((a.double() - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(got, want))


def exact(f, *args, g=None):
    """The definition in float64: the output, or the gradients."""
    args = [a.detach().double().requires_grad_(g is not None) for a in args]
    with backend("reference"):
        out = f(*args)
        return out.detach() if g is None else torch.autograd.grad(out, args, g.double())


# ---- sections --------------------------------------------------------------------------------------------------------


def _peers(args, settings, backward):
    data = inputs(*SHAPE, args, requires_grad=backward)
    k, g = data[2], torch.randn_like(data[2])
    want = exact(wkv, *data, g=g if backward else None)
    moved = (5 if backward else 3) * k.nbytes  # k, v -> out; then k, v, g -> dk, dv
    if backward:
        moved += 3 * k.nbytes

    def contestant(name, f, skip=None):
        run = forward_backward(f, data, g) if backward else inference(f, data)
        error = {} if skip else {"rel_rms_error": rms_error(run(), want)}
        if error and name.startswith("wkv"):
            limit = 5e-3 if args.dtype == torch.bfloat16 else 1e-3 if args.dtype == torch.float16 else 2e-6
            assert error["rel_rms_error"] <= limit, f"{name}: relative rms error {error['rel_rms_error']:.3g}"
        return Contestant(name, run, bytes=moved, skip=skip, extra=error)

    no_gpu = None if args.device == "cuda" else "needs a GPU"
    rows = compare(
        [
            contestant("wkv, serial", ours("serial")),
            contestant("wkv, chunked", ours("chunked")),
            contestant("eager loop", eager_loop),
            contestant("eager loop, unbound", functools.partial(eager_loop, unbind=True)),
            contestant("Heinsen's form", heinsen),
            contestant("flash-linear-attention", fla, no_gpu or missing("fla")),
            harness.copy_contestant(3 * k.nbytes, args.device),
        ],
        **settings | {"rounds": 5 if backward or args.quick else 11},
    )
    mode = "forward + backward" if backward else "forward"
    if args.device == "cpu" and args.dtype == torch.float32:
        goal(f"{mode}, times the eager loop", ratio(rows, "eager loop"), 100 if backward else 25)
        if not backward:
            goal("forward, share of copy bandwidth", rows[0]["percent_of_copy"], 30, " %")
    return f"wkv {mode}, {SHAPE}, {args.dtype}", rows


def peers(args, settings):
    """One pass over the tokens against other ways to compute it"""
    return _peers(args, settings, False)


def backward(args, settings):
    """The same with the gradients of every input"""
    return _peers(args, settings, True)


def accuracy(args, settings):
    """Slow decay over 4,096 tokens, and keys that are large: relative rms error of the fp32 output against float64"""
    rows = []
    time_decay, time_first = torch.full((64,), -5.0, device=args.device), torch.zeros(64, device=args.device)
    for mean, deviation in ((0, 8), (50, 4)):
        generator = torch.Generator().manual_seed(1)
        k = (mean + deviation * torch.randn(1, 4096, 64, generator=generator)).to(args.device)
        v = torch.randn(1, 4096, 64, generator=generator).to(args.device)
        data = (time_decay, time_first, k, v)
        want = exact(wkv, *data)
        row = {"name": f"k ~ N({mean}, {deviation})"}
        functions = {"serial": ours("serial"), "chunked": ours("chunked"), "running_max_loop": eager_loop, "heinsen": heinsen}
        row |= {f"{name}_error": rms_error(f(*data), want) for name, f in functions.items()}
        goal(f"rms error, {row['name']}", max(row["serial_error"], row["chunked_error"]), 1e-6, at_least=False)
        rows.append(row)
    return "Accuracy, L = 4,096, C = 64, time_decay -5", rows


def decoding(args, settings):
    """One token a call, as in generation, against RWKV's eager step"""
    rows = []
    for B, C in ((1, 768), (8, 4096)):
        time_decay, time_first, k, v = inputs(B, 1, C, args)
        k, v = k[:, 0], v[:, 0]
        w, state = -torch.exp(time_decay), [torch.zeros(B, C, device=args.device), torch.zeros(B, C, device=args.device)]
        rwkv = [state[0].clone(), torch.ones_like(state[0]), state[1].clone()]

        def eager(w=w, u=time_first, k=k, v=v, state=rwkv):
            k, v = k.float(), v.float()
            a, b, o = state
            top = torch.maximum(o, u + k)
            old, new = torch.exp(o - top), torch.exp(u + k - top)
            out = (old * a + new * v) / (old * b + new)
            top = torch.maximum(w + o, k)
            old, new = torch.exp(w + o - top), torch.exp(k - top)
            return out, (old * a + new * v, old * b + new, top)

        data = (time_decay, time_first, k, v)
        with torch.no_grad():
            check(
                "wkv_step", wkv_step(*data, state)[0].float(), eager()[0], 1e-2 if args.dtype != torch.float32 else 1e-5, 1e-5
            )
        rows += compare(
            [
                Contestant("wkv_step", lambda data=data, state=state: wkv_step(*data, state), extra={"B": B, "C": C}),
                Contestant("wkv_step_", lambda data=data, state=state: wkv_step_(*data, state), extra={"B": B, "C": C}),
                Contestant("eager step", eager, extra={"B": B, "C": C}),
            ],
            **settings | {"rounds": 3 if args.quick else 9, "min_time": settings["min_time"] / 5},
        )
    return "Decoding", rows


THREAD = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from sdit_kernels import wkv
torch.set_num_threads(int(sys.argv[2]))
k, v, p = torch.randn(1, int(sys.argv[3]), 384), torch.randn(1, int(sys.argv[3]), 384), torch.zeros(384)
for _ in range(3): wkv(p, p, k, v)
for _ in range(int(sys.argv[4])):
    start = time.perf_counter()
    wkv(p, p, k, v)
    print(time.perf_counter() - start)
"""


def threads(args, settings):
    """One long sequence, B = 1: what the second core gives. Processes take turns, so that both see the same machine"""
    if args.device != "cpu":
        return "Threads", [{"name": "wkv", "note": "skipped: of the CPU"}]
    L, rounds, calls = (4096, 2, 5) if args.quick else (65536, 5, 9)
    found = {1: [], 2: []}
    for _ in range(rounds):
        for n, samples in found.items():
            command = [sys.executable, "-c", THREAD, str(harness.ROOT), str(n), str(L), str(calls)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            samples.append(statistics.median(map(float, done.stdout.split())))
    rows = [{"name": f"{n} thread{'s' if n > 1 else ''}", "median_s": statistics.median(s)} for n, s in found.items()]
    gain = statistics.median(a / b for a, b in zip(found[1], found[2]))
    rows[1]["times_one"] = gain
    goal(f"B=1, C=384, L={L:,}: times one thread", gain if os.cpu_count() > 1 else None, 1.7)
    return f"wkv forward, (1, {L}, 384), fp32", rows


def spiking(args, settings):
    """spiking_wkv against the chain of wkv and lif, T = 4. Ideal bytes of each: what it must read and write"""
    T, (B, L, C) = 4, (2, *SHAPE[1:])
    generator = torch.Generator().manual_seed(0)
    k, v, r = (torch.randn(T, B, L, C, generator=generator).to(args.device, args.dtype) for _ in range(3))
    v = 3 * v
    time_decay, time_first = parameters(C, args.device)
    rows = []

    def chain(time_decay, time_first, k, v, r):
        y = wkv(time_decay, time_first, k.flatten(0, 1), v.flatten(0, 1), r=r.flatten(0, 1))
        return lif(y.unflatten(0, (T, B)))

    for mode in ("forward", "forward+backward") if args.backward else ("forward",):
        data = [t.detach().clone().requires_grad_(mode != "forward") for t in (time_decay, time_first, k, v, r)]
        g = torch.randn_like(k)

        def contestant(name, f, passes, mode=mode, data=data, g=g):
            run = inference(f, data) if mode == "forward" else forward_backward(f, data, g)
            return Contestant(name, run, bytes=passes * k.nbytes, extra={"mode": mode, "passes": passes})

        same = (spiking_wkv(*data) == chain(*data)).float().mean().item()
        assert same > 0.999, f"spikes agree in {same:.4%} only"
        back = mode != "forward"  # k, v, r -> s; k, v, r, g -> dk, dv, dr. The chain writes and reads y, and dy too
        rows += compare(
            [
                contestant("spiking_wkv", spiking_wkv, 4 + 7 * back),
                contestant("wkv, then lif", chain, 6 + 10 * back),
                harness.copy_contestant(2 * k.nbytes, args.device),
            ],
            **settings | {"rounds": 3 if args.quick else 9},
        )
        if args.device == "cpu" and args.dtype == torch.float32:
            goal(f"spiking_wkv {mode}, times the chain", rows[-2]["ratio"], 1.2)
    return f"spiking_wkv with gate, (T, B, L, C) = {(T, B, L, C)}, {args.dtype}", rows


def sweep(args, settings):
    """Cost against work: tokens at a fixed batch, and batch at a fixed number of tokens"""
    last = 12 if args.quick else 16
    cases = [("B = 1, L = 64 to 65,536", 1, 1 << n) for n in range(6, last + 1, 2)]
    cases += [("L = 394, B = 1 to 64", B, 394) for B in ((1, 4) if args.quick else (1, 4, 16, 64))]
    contestants = []
    for name, B, L in cases:
        data = inputs(B, L, 384, args, requires_grad=True)
        g = torch.randn_like(data[2])
        for mode, run in (("forward", inference(wkv, data)), ("forward+backward", forward_backward(wkv, data, g))):
            extra = {"mode": mode, "sweep": name, "B": B, "L": L, "tokens": B * L}
            contestants.append(Contestant(f"{mode}, B={B}, L={L}, {name[0]}", run, extra=extra))
    # All sizes in one comparison: what disturbs the machine then disturbs every point of the curve alike.
    rows = compare(contestants, **settings | {"rounds": 3 if args.quick else 7, "min_time": settings["min_time"] / 5})
    rows = [
        {"name": r["mode"]} | {k: v for k, v in r.items() if k not in ("name", "mode", "ratio", "ratio_iqr", "baseline")}
        for r in rows
    ]
    for row in rows:
        row["ns_per_token"] = 1e9 * row["median_s"] / row["tokens"]
    if args.plot:
        plot_sweep(args.plot, rows)
    return f"wkv, C = 384, {args.dtype}", rows


def plot_sweep(path, rows):
    """Time against work, with guides of linear cost that end in the longest sequence."""
    series, guides = {}, []
    for row in rows:
        point = row["tokens"], 1e3 * row["median_s"], 1e3 * row["iqr_s"]
        series.setdefault(f"{row['name']}, {row['sweep']}", []).append(point)
    for points in list(series.values())[:2]:
        (x, y, _), least = points[-1], points[0][1] / 2
        guides.append(((x * least / y, x), (least, y)))
    lines = {label: tuple(zip(*points)) for label, points in series.items()}
    harness.plot_lines(path, lines, "tokens × batch", "time per call (ms)", guides={"linear cost": guides})


SECTIONS = {f.__name__: f for f in (peers, backward, accuracy, decoding, threads, spiking, sweep)}


def add_arguments(parser):
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    parser.add_argument("--dtype", type=dtypes.__getitem__, default=torch.float32, metavar="NAME", help=", ".join(dtypes))
    parser.add_argument("--backward", action="store_true", help="time forward + backward too (the eager loop's takes a while)")
    parser.add_argument("--sweep", action="store_true", help="cost against L and against B; drawn with --plot")


def choose(args):
    optional = {"backward": args.backward, "sweep": args.sweep or args.plot}
    return [name for name in SECTIONS if optional.get(name, True)]


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, SECTIONS, FIGURE, add_arguments, choose))
