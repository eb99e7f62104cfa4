"""Time wkv and spiking_wkv against the eager loop over tokens and Heinsen's form with cumulative log-sum-exps.

    python perf/bench_wkv.py                                    forward, accuracy, threads, spiking: under a minute
    python perf/bench_wkv.py --backward --sweep --json perf/results/wkv.json --plot
    python perf/bench_wkv.py --only peers --dtype bfloat16

Ideal bytes count every input once (read) and every output once (written). The error is the relative rms error against the
definition in float64. Ratios are computed within the run. The goals at the end of the output say PASS or FAIL, and a FAIL sets
the exit status (except with --quick, whose times mean nothing).
"""

import os
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness, peers
from perf.harness import Contestant, check, compare, ratio, record_goal
from perf.ops import OPS, T, compute_exact, make_contestant, normal, rms_error
from sdit_kernels import spiking_wkv, wkv, wkv_step, wkv_step_

FIGURE = harness.ROOT / "perf" / "results" / "wkv_scaling.png"


def bind_algorithm(algorithm):
    return lambda *args: wkv(*args, algorithm=algorithm)


# ---- sections --------------------------------------------------------------------------------------------------------


def _compare_with_peers(args, settings, mode):
    op = OPS["wkv"]
    data = op.data(*args.shape, device=args.device, dtype=args.dtype)
    k, g, back = data[2], torch.randn_like(data[2]), mode != "forward"
    outputs, gradients = compute_exact(wkv, data, [g] if back else None)
    want = gradients if back else outputs

    def row(name, f, skip=None):
        found = make_contestant(name, mode, f, data, g, bytes=op.bytes(mode, data), skip=skip)
        if skip:
            return found._replace(extra={})
        error = rms_error(found.fn(), want)
        if name.startswith("wkv"):
            limit = 5e-3 if args.dtype == torch.bfloat16 else 1e-3 if args.dtype == torch.float16 else 2e-6
            assert error <= limit, f"{name}: relative rms error {error:.3g}"
        return found._replace(extra={"rel_rms_error": error})

    rows = compare(
        [
            row("wkv, serial", bind_algorithm("serial")),
            row("wkv, chunked", bind_algorithm("chunked")),
            *(row(p.name, p.call, p.skip) for p in peers.list_wkv_peers(args.device)),
            harness.make_copy_contestant(3 * k.nbytes, args.device),
        ],
        **settings | {"rounds": 5 if back or args.quick else 11},
    )
    title = mode.replace("+", " + ")
    if args.device == "cpu" and args.dtype == torch.float32:
        record_goal(f"{title}, times the eager loop", ratio(rows, "eager loop"), 100 if back else 25)
        if not back:
            record_goal("forward, share of copy bandwidth", rows[0]["percent_of_copy"], 30, " %")
    return f"wkv {title}, {args.shape}, {args.dtype}", rows


def forward(args, settings):
    """The forward pass over the tokens, against other implementations"""
    return _compare_with_peers(args, settings, "forward")


def backward(args, settings):
    """Forward and backward pass, with the gradients of every input"""
    return _compare_with_peers(args, settings, "forward+backward")


def accuracy(args, settings):
    """Relative rms error of the fp32 output against float64, for slow decay over 4,096 tokens and for large keys"""
    rows = []
    time_decay, time_first = torch.full((64,), -5.0, device=args.device), torch.zeros(64, device=args.device)
    for mean, deviation in ((0, 8), (50, 4)):
        how = {"device": args.device, "requires_grad": False}
        k = normal(1, 4096, 64, mean=mean, scale=deviation, seed=1, **how)
        data = (time_decay, time_first, k, normal(1, 4096, 64, seed=2, **how))
        want, _ = compute_exact(wkv, data)
        row = {"name": f"k ~ N({mean}, {deviation})"}
        functions = {"serial": bind_algorithm("serial"), "chunked": bind_algorithm("chunked")}
        functions |= {"running_max_loop": peers.eager_loop, "heinsen": peers.heinsen}
        row |= {f"{name}_error": rms_error(f(*data), want) for name, f in functions.items()}
        record_goal(f"rms error, {row['name']}", max(row["serial_error"], row["chunked_error"]), 1e-6, at_least=False)
        rows.append(row)
    return "Accuracy, L = 4,096, C = 64, time_decay -5", rows


def decoding(args, settings):
    """One token per call, as in text generation, against RWKV's eager step"""
    rows = []
    for B, C in ((1, 768), (8, 4096)):
        time_decay, time_first, k, v = OPS["wkv"].data(B, C, device=args.device, dtype=args.dtype, requires_grad=False)
        data, zeros = (time_decay, time_first, k, v), torch.zeros(B, C, device=args.device)
        state = zeros, zeros.clone()
        w, rwkv = -torch.exp(time_decay), (zeros.clone(), torch.ones_like(zeros), zeros.clone())

        def eager(w=w, u=time_first, k=k, v=v, state=rwkv):
            return peers.eager_step(w, u, k.float(), v.float(), state)

        got, want = wkv_step(*data, state)[0].float(), eager()[0]
        check("wkv_step", got, want, 1e-5 if args.dtype == torch.float32 else 1e-2, 1e-5)
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
    """One long sequence, B = 1, on one core and on two. The processes take turns, so the machine is the same for both"""
    if args.device != "cpu":
        return "Threads", [{"name": "wkv", "note": "skipped: it is about CPU threads"}]
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
    record_goal(f"B=1, C=384, L={L:,}: times one thread", gain if os.cpu_count() > 1 else None, 1.7)
    return f"wkv forward, (1, {L}, 384), fp32", rows


def spiking(args, settings):
    """spiking_wkv against wkv followed by lif, T = 4. Ideal bytes: every tensor that each must read or write"""
    op, (_, L, C) = OPS["spiking_wkv"], args.shape
    data = op.data(2, L, C, device=args.device, dtype=args.dtype)
    g, rows = torch.randn_like(data[2]), []
    same = (spiking_wkv(*data) == peers.wkv_then_lif(*data)).float().mean().item()
    assert same > 0.999, f"spikes agree in {same:.4%} only"
    for mode in ("forward", "forward+backward") if args.backward else ("forward",):

        def row(name, f, more, mode=mode):
            moved = op.bytes(mode, data) + more * g.nbytes
            return make_contestant(name, mode, f, data, g, bytes=moved, passes=moved // g.nbytes)

        more = 2 if mode == "forward" else 5  # y written and read; backward: y read, dy written and read
        rows += compare(
            [
                row("spiking_wkv", spiking_wkv, 0),
                row("wkv, then lif", peers.wkv_then_lif, more),
                harness.make_copy_contestant(2 * g.nbytes, args.device),
            ],
            **settings | {"rounds": 3 if args.quick else 9},
        )
        if args.device == "cpu" and args.dtype == torch.float32:
            record_goal(f"spiking_wkv {mode}, times the chain", rows[-2]["ratio"], 1.2)
    return f"spiking_wkv with gate, (T, B, L, C) = {(T, 2, L, C)}, {args.dtype}", rows


def sweep(args, settings):
    """Time against work: growing number of tokens at a fixed batch, and growing batch at a fixed number of tokens"""
    last = 12 if args.quick else 16
    cases = [("B = 1, L = 64 to 65,536", 1, 1 << n) for n in range(6, last + 1, 2)]
    cases += [("L = 394, B = 1 to 64", B, 394) for B in ((1, 4) if args.quick else (1, 4, 16, 64))]
    contestants = []
    for name, B, L in cases:
        data = OPS["wkv"].data(B, L, 384, device=args.device, dtype=args.dtype)
        g = torch.randn_like(data[2])
        for mode in ("forward", "forward+backward"):
            work = {"sweep": name, "B": B, "L": L, "tokens": B * L}
            contestants.append(make_contestant(f"{mode}, B={B}, L={L}, {name[0]}", mode, wkv, data, g, **work))
    rows = harness.measure_scaling(contestants, args, settings, 7, "tokens", "ns_per_token", "tokens × batch")
    return f"wkv, C = 384, {args.dtype}", rows


SECTIONS = {"peers": forward} | {f.__name__: f for f in (backward, accuracy, decoding, threads, spiking, sweep)}


def add_arguments(parser):
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    parser.add_argument("--dtype", type=dtypes.__getitem__, default=torch.float32, metavar="NAME", help=", ".join(dtypes))
    parser.add_argument("--backward", action="store_true", help="also time forward + backward (slow for the eager loop)")
    parser.add_argument("--sweep", action="store_true", help="time against L and against B; --plot draws it")


def choose(args):
    optional = {"backward": args.backward, "sweep": args.sweep or args.plot}
    return [name for name in SECTIONS if optional.get(name, True)]


if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, SECTIONS, FIGURE, add_arguments, choose))
