"""Time lif and lif_rate against SpikingJelly, snnTorch, a plain PyTorch loop and torch.compile of that loop.

    python perf/bench_lif.py --json perf/results/lif.json --plot
    python perf/bench_lif.py --only peers,memory --quick

Each section below is one function with one table and one correctness gate. Ratios are computed within the run. The goals at
the end of the output say PASS or FAIL, and a FAIL sets the exit status (except with --quick, whose times mean nothing).
"""

import functools
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness, peers
from perf.harness import (
    Contestant,
    check,
    compare,
    make_forward_backward,
    make_inference,
    ratio,
    reason_if_missing,
    record_goal,
)
from perf.ops import OPS, T, current, make_contestant, normal
from sdit_kernels import lif, lif_rate, norm_lif, reference
from sdit_kernels.memory import pool

FIGURE = harness.ROOT / "perf" / "results" / "lif_scaling.png"
MODES = "inference", "forward+backward"


def check_agreement(name, f, want, x, g, rtol=1e-5, atol=1e-6):
    """Check that outputs are equal and gradients close; return the errors as further columns."""
    check(f"{name}: output", f(x), want(x), 0, 0)
    return check(f"{name}: gradient", make_forward_backward(f, [x], g)(), make_forward_backward(want, [x], g)(), rtol, atol)


# ---- sections --------------------------------------------------------------------------------------------------------


def compare_peers(args, settings):
    """One multi-step call against other libraries"""
    op = OPS["lif"]
    (x,) = op.data(*args.shape, device=args.device)
    g = torch.randn_like(x)
    x16, g16 = x.detach().bfloat16().requires_grad_(), g.bfloat16()
    found = peers.list_lif_peers(x)
    errors = {p.name: check_agreement(p.name, p.call, p.same_as or lif, x, g) for p in found if not p.skip}
    errors["lif bf16"] = check_agreement("lif bf16", lif, reference.lif, x16, g16, rtol=2**-7)
    rows = []
    for mode in MODES:

        def row(name, f, x=x, g=g, skip=None, mode=mode):
            error = errors.get(name, {}).get("rel_rms_error")
            return make_contestant(name, mode, f, [x], g, bytes=op.bytes(mode, [x]), skip=skip, grad_rel_rms_error=error)

        new = compare(
            [
                row("lif", lif),
                row("lif bf16", lif, x16, g16),
                *(row(p.name, p.call, skip=p.skip) for p in found),
                harness.make_copy_contestant(2 * x.nbytes, args.device),
            ],
            **settings,
        )
        record_goal(f"lif {mode}, times SpikingJelly", ratio(new, "SpikingJelly LIFNode"), 10 if mode == "inference" else 8)
        record_goal(f"lif {mode}, bf16 over fp32", ratio(new, "lif bf16"), 1, at_least=False)
        rows += new
    return f"lif, T={T}, {args.shape}, fp32", rows


def rate(args, settings):
    """lif_rate against repeat -> LIFNode -> mean, alone and followed by a matrix multiplication"""
    (x,) = OPS["lif_rate"].data(*args.shape, device=args.device)
    g = torch.randn_like(x)
    linear = torch.nn.Linear(x.shape[-1], x.shape[-1], device=args.device)
    repeated, loop = peers.list_lif_rate_peers()
    error = {} if repeated.skip else check_agreement("lif_rate", lif_rate, repeated.call, x, g)
    check_agreement("lif_rate", lif_rate, loop.call, x, g)
    weights = tuple(linear.parameters())
    rows = []
    for mode in MODES:

        def row(name, f, parameters=(), skip=None, mode=mode, **extra):
            return make_contestant(name, mode, f, [x], g, parameters, skip=skip, **extra)

        found = compare(
            [
                row("lif_rate", lif_rate, **error),
                row(repeated.name, repeated.call, skip=repeated.skip),
                row(loop.name, loop.call),
                row("Linear", linear, weights),
                row("lif_rate, then Linear", lambda x: linear(lif_rate(x)), weights),
                row(f"{repeated.name}, then Linear", lambda x: linear(repeated.call(x)), weights, repeated.skip),
            ],
            **settings,
        )
        alone = [sum(pair) for pair in zip(found[0]["samples_s"], found[3]["samples_s"])]
        found[4]["over_sum_of_parts"] = statistics.median(a / b for a, b in zip(found[4]["samples_s"], alone))
        if mode == "forward+backward":
            record_goal(f"lif_rate {mode}, times repeat -> LIFNode -> mean", ratio(found, repeated.name), 15)
        rows += found
    return f"lif_rate, T={T}, {args.shape}, fp32, beside a {x.shape[-1]} x {x.shape[-1]} matrix multiplication", rows


def norm(args, settings):
    """norm_lif against BatchNorm, then lif, in training"""
    rows, B = [], 2 if args.quick else 16
    for layout, shape, axis in (("images", (T, B, 64, 28, 28), 2), ("tokens", (T, *args.shape), -1)):
        x = normal(*shape, device=args.device, mean=0.5, scale=1.5)
        g, C = torch.randn_like(x), shape[axis]
        weight, bias = (torch.full((C,), value, device=args.device, requires_grad=True) for value in (1.0, 0.2))

        def fused(x, weight, bias, axis=axis):
            return norm_lif(x, weight, bias, training=True, channel_axis=axis)

        def apart(x, weight, bias, axis=axis):
            y = x.flatten(0, 1) if axis == 2 else x.reshape(-1, x.shape[-1])
            return lif(torch.nn.functional.batch_norm(y, None, None, weight, bias, training=True).view(x.shape))

        leaves = [x, weight, bias]
        agreeing = (fused(*leaves) == apart(*leaves)).double().mean().item()
        if agreeing < 0.9999:  # the two round the current differently, which matters next to the threshold
            raise AssertionError(f"norm_lif, {layout}: only {agreeing:.2%} of the spikes agree")
        for mode in MODES:
            found = compare(
                [
                    make_contestant(f"norm_lif, {layout}", mode, fused, leaves, g, bytes=3 * x.nbytes),
                    make_contestant(f"batch_norm, then lif, {layout}", mode, apart, leaves, g),
                    harness.make_copy_contestant(2 * x.nbytes, args.device),
                ],
                **settings,
            )
            rows += found
        saved = [harness.saved_bytes(lambda f=f, leaves=leaves: f(*leaves))[0] / x.nbytes for f in (fused, apart)]
        rows.append({"name": f"bytes kept over the bytes of x, {layout}: norm_lif, apart", "saved_over_x": saved})
    return f"BatchNorm and LIF, T={T}, fp32, training", rows


def bandwidth(args, settings):
    """Inference on data larger than the caches, against copies. Only copy_ reuses its output"""
    elements = 1 << (22 if args.quick else 26)
    x = current(T, elements // T, device=args.device, requires_grad=False)
    flat = x.view(-1)
    moved = 2 * x.nbytes
    check("lif", lif(x[:, : 1 << 16]), reference.lif(x[:, : 1 << 16]), 0, 0)
    check("lif_rate", lif_rate(flat[: 1 << 16]), reference.lif_rate(flat[: 1 << 16]), 0, 0)
    rows = compare(
        [
            harness.make_copy_contestant(moved, args.device),
            Contestant("clone", lambda: flat.clone(), bytes=moved),
            Contestant("lif_rate, T=4", make_inference(lif_rate, [flat]), bytes=moved),
            Contestant("lif, T=4", make_inference(lif, [x]), bytes=moved),
        ],
        **settings,
    )
    for row in rows[2:]:
        record_goal(f"{row['name']} out of cache, share of copy_ bandwidth", row["percent_of_copy"], 50, " %")
    return f"{elements >> 20} M elements, fp32, inference; bytes: one read and one write of each", rows


class Bare(torch.autograd.Function):
    """The smallest op that Python code can define: its time is the lower limit of the overhead."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        return g


def overhead(args, settings):
    """Time of a call on tiny tensors, where arithmetic costs nothing (CPU time, also with a GPU)"""
    x = current(T, 8, device=args.device)
    g = torch.randn_like(x)
    check_agreement("lif", lif, reference.lif, x, g)
    check_agreement("lif_rate", lif_rate, reference.lif_rate, x, g)
    functions = {"autograd.Function": Bare.apply, "lif": lif, "lif_rate": lif_rate}
    node = peers.spikingjelly_lif()
    if node:
        functions["SpikingJelly LIFNode"] = node
    contestants = []
    for name, f in functions.items():
        contestants += [
            Contestant(f"{name}, forward with grad", functools.partial(f, x)),
            Contestant(f"{name}, no_grad", make_inference(f, [x])),
            Contestant(f"{name}, forward+backward", make_forward_backward(f, [x], g)),
        ]
    if not node:
        contestants.append(Contestant("SpikingJelly LIFNode", skip=reason_if_missing("spikingjelly")))
    rows = compare(contestants, **(settings | {"device": "cpu", "min_time": settings["min_time"] / 5}))
    for row in rows:
        if row["name"] in ("lif, forward with grad", "lif_rate, forward with grad"):
            record_goal(f"overhead of {row['name']}", 1e6 * row["median_s"], 40, " us", at_least=False)
    return "Overhead of a call, (4, 8) fp32", rows


def scaling(args, settings):
    """Time against work: growing T at fixed N, and growing N at fixed T"""
    last = 18 if args.quick else 24
    cases = [(f"T = {T}, N = 512 to {'256k' if args.quick else '16M'}", T, 1 << k) for k in range(9, last + 1, 3)]
    cases += [("N = 64k, T = 1 to 64", t, 1 << 16) for t in (1, 2, 4, 8, 16, 32, 64)]
    contestants = []
    for sweep, t, n in cases:
        x = current(t, n, device=args.device)
        g = torch.randn_like(x)
        part = x.detach()[:, : 1 << 12].clone().requires_grad_()
        check_agreement("lif", lif, reference.lif, part, g[:, : 1 << 12], atol=1e-5)
        for mode in ("forward", "forward+backward"):
            work = {"sweep": sweep, "T": t, "N": n, "T_times_N": t * n}
            contestants.append(make_contestant(f"{mode}, T={t}, N={n}, {sweep[0]}", mode, lif, [x], g, **work))
    work = "T_times_N", "ns_per_neuron_step", "neurons × time steps"
    return "Cost of lif against work, fp32", harness.measure_scaling(contestants, args, settings, 11, *work)


def memory(args, settings):
    """saved: bytes that autograd saves, inputs included; new: bytes that the call allocates and keeps, without the result"""
    rows = []
    limit, pool.limit = pool.limit, 0  # switch the pool off: torch's profiler does not see its memory

    def measure(name, f, inputs, checkpoints=0):
        given = sum(t.nbytes for t in inputs)
        row = {"name": name, "inputs_bytes": given, "ideal_bytes": given + checkpoints}
        row["saved_bytes"], _ = harness.saved_bytes(lambda: f(*inputs))
        row["saved_over_ideal"] = row["saved_bytes"] / row["ideal_bytes"]
        allocated = harness.allocated_bytes(lambda: f(*inputs), args.device)
        row["new_bytes"] = allocated["kept_bytes"] - f(*inputs).nbytes
        rows.append(row | {"peak_bytes": allocated["peak_bytes"]})

    x = current(T, *args.shape, device=args.device)
    long = current(64, 1 << (10 if args.quick else 16), device=args.device)
    flat = current(*args.shape, device=args.device)
    v = torch.zeros(args.shape, device=args.device, requires_grad=True)
    for a in (x, long):
        check_agreement("lif", lif, reference.lif, a, torch.randn_like(a), atol=1e-5)
    check_agreement("lif_rate", lif_rate, reference.lif_rate, flat, torch.randn_like(flat))
    measure("lif, T=4", lif, [x])
    measure("lif, T=4, with v", lif, [x, v])
    measure("lif, T=64", lif, [long], checkpoints=3 * long[0].nbytes)  # the membrane potential before steps 16, 32 and 48
    measure("lif_rate, T=4", lif_rate, [flat])
    exact = max(row["saved_over_ideal"] for row in rows)
    hidden = max(row["new_bytes"] - (row["ideal_bytes"] - row["inputs_bytes"]) for row in rows)
    record_goal("bytes saved, over the bytes of x (+ v; + every 16th membrane for T=64)", exact, 1, at_least=False)
    record_goal("bytes allocated beyond these and the result", hidden, 0, " B", at_least=False)
    measure("plain loop, T=4", reference.lif, [x])
    measure("plain loop, T=64", reference.lif, [long])
    measure("plain loop of lif_rate, T=4", reference.lif_rate, [flat])
    if not reason_if_missing("spikingjelly"):

        def node(x):  # a new node per call: a node keeps the graph of its last call
            return peers.spikingjelly_lif()(x)

        def repeated(x):
            return peers.list_lif_rate_peers()[0].call(x)

        measure("SpikingJelly LIFNode, T=4", node, [x])
        measure("SpikingJelly LIFNode, T=64", node, [long])
        measure("repeat, LIFNode, mean, T=4", repeated, [flat])
    else:
        rows.append({"name": "SpikingJelly LIFNode", "note": f"skipped: {reason_if_missing('spikingjelly')}"})
    pool.limit = limit
    return "Bytes kept for the backward pass, fp32", rows


SECTIONS = {"peers": compare_peers} | {f.__name__: f for f in (rate, norm, bandwidth, overhead, scaling, memory)}


if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, SECTIONS, FIGURE))
