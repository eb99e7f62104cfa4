"""lif and lif_rate against SpikingJelly, snnTorch, the plain PyTorch loop and torch.compile of it.

    python perf/bench_lif.py --json perf/results/lif.json --plot
    python perf/bench_lif.py --only peers,memory --quick

A section below is one function, one table and one correctness gate. Ratios are formed within the run; the goals at the end
of the output say PASS or FAIL, and a FAIL is also the exit status (except with --quick, whose times mean nothing).
"""

import functools
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness
from perf.harness import Contestant, check, compare, goal, missing, ratio
from sdit_kernels import lif, lif_rate, reference
from sdit_kernels.memory import pool

T, SHAPE = 4, (8, 394, 384)  # time steps; batch, tokens and channels of a small diffusion transformer
FIGURE = harness.ROOT / "perf" / "results" / "lif_scaling.png"


# ---- inputs, modes and peers -----------------------------------------------------------------------------------------


def current(*shape, device="cpu", dtype=torch.float32, requires_grad=True):
    """Input of which a sixth of the neurons fire. Odd multiples of 1/32 make every membrane exact and none equal to the
    threshold, so that spikes must agree bit for bit whatever the order of operations, in bfloat16 too."""
    generator = torch.Generator().manual_seed(0)
    x = (0.5 + 1.5 * torch.randn(shape, generator=generator)).clamp(-7, 7)
    x = ((x * 16).floor() + 0.5) / 16
    return x.to(device, dtype).requires_grad_(requires_grad)


def inference(f, x):
    def run():
        with torch.no_grad():
            return f(x)

    return run


def forward_backward(f, x, g, parameters=()):
    """The output's gradient is dense, as it comes from a layer above. Returns the gradients."""
    return lambda: torch.autograd.grad(f(x), (x, *parameters), g)


def spikingjelly():
    """x -> spikes by SpikingJelly's LIFNode; the state is reset before every call, as its users must."""
    if missing("spikingjelly"):
        return None
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(tau=2.0, v_reset=0.0, surrogate_function=surrogate.ATan(), step_mode="m")

    def run(x):
        node.reset()
        return node(x)

    return run


def snntorch(device):
    """x -> spikes by snnTorch's Leaky. With beta = 1 - 1/tau and reset to zero its spikes are those of
    lif(decay_input=False), and it lets no gradient through the reset, which is detach_reset=True."""
    if missing("snntorch"):
        return None
    import snntorch
    from snntorch import surrogate

    neuron = snntorch.Leaky(beta=0.5, spike_grad=surrogate.atan(), reset_mechanism="zero").to(device)

    def run(x):
        membrane, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            s, membrane = neuron(x_t, membrane)
            spikes.append(s)
        return torch.stack(spikes)

    return run


def agree(name, f, want, x, g, rtol=1e-5, atol=1e-6):
    """The gate: equal outputs, close gradients. Returns the errors as further columns."""
    check(f"{name}: output", f(x), want(x), 0, 0)
    return check(f"{name}: gradient", forward_backward(f, x, g)(), forward_backward(want, x, g)(), rtol, atol)


# ---- sections --------------------------------------------------------------------------------------------------------


def peers(args, settings):
    """One multi-step call against other libraries"""
    x = current(T, *SHAPE, device=args.device)
    g = torch.randn_like(x)
    x16, g16 = x.detach().bfloat16().requires_grad_(), g.bfloat16()
    compiled, why_not = torch.compile(reference.lif), None
    try:
        compiled(x)
    except Exception as e:  # torch.compile needs a C++ compiler on the CPU, Triton on a GPU; each fails with types of its own
        why_not = f"torch.compile: {str(e).splitlines()[0][:60]}"
    others = {  # name: function, what it must equal, why it does not run
        "SpikingJelly LIFNode": (spikingjelly(), lif, missing("spikingjelly")),
        "plain loop": (reference.lif, lif, None),
        "torch.compile(plain loop)": (compiled, lif, why_not),
        "snnTorch Leaky (detached reset)": (
            snntorch(args.device),
            functools.partial(lif, decay_input=False, detach_reset=True),
            missing("snntorch"),
        ),
    }
    errors = {name: agree(name, f, want, x, g) for name, (f, want, skip) in others.items() if not skip}
    errors["lif bf16"] = agree("lif bf16", lif, reference.lif, x16, g16, rtol=2**-7)
    rows = []
    for mode, arrays in (("inference", 2), ("forward+backward", 5)):  # x -> s; then x, g -> dx

        def contestant(name, f, x, g, skip=None, mode=mode, arrays=arrays):
            fn = inference(f, x) if mode == "inference" else forward_backward(f, x, g)
            extra = {"mode": mode, "grad_rel_rms_error": errors.get(name, {}).get("rel_rms_error")}
            return Contestant(name, fn, skip=skip, extra=extra, bytes=arrays * x.nbytes)

        found = compare(
            [
                contestant("lif", lif, x, g),
                contestant("lif bf16", lif, x16, g16),
                *(contestant(name, f, x, g, skip) for name, (f, _, skip) in others.items()),
                harness.copy_contestant(2 * x.nbytes, args.device),
            ],
            **settings,
        )
        goal(f"lif {mode}, times SpikingJelly", ratio(found, "SpikingJelly LIFNode"), 10 if mode == "inference" else 8)
        goal(f"lif {mode}, bf16 over fp32", ratio(found, "lif bf16"), 1, at_least=False)
        rows += found
    return f"lif, T={T}, {SHAPE}, fp32", rows


def rate(args, settings):
    """lif_rate against repeat -> LIFNode -> mean, and both with a matrix product after them"""
    x = current(*SHAPE, device=args.device)
    g = torch.randn_like(x)
    linear = torch.nn.Linear(SHAPE[-1], SHAPE[-1], device=args.device)
    node, skip = spikingjelly(), missing("spikingjelly")

    def peer(x):
        return node(x.repeat(T, 1, 1, 1)).mean(0)

    error = {} if skip else agree("lif_rate", lif_rate, peer, x, g)
    agree("lif_rate", lif_rate, reference.lif_rate, x, g)
    weights = tuple(linear.parameters())
    rows = []
    for mode in ("inference", "forward+backward"):

        def contestant(name, f, parameters=(), skip=None, extra=None, mode=mode):
            fn = inference(f, x) if mode == "inference" else forward_backward(f, x, g, parameters)
            return Contestant(name, fn, skip=skip, extra={"mode": mode, **(extra or {})})

        found = compare(
            [
                contestant("lif_rate", lif_rate, extra=error),
                contestant("repeat, LIFNode, mean", peer, skip=skip),
                contestant("plain loop", reference.lif_rate),
                contestant("Linear", linear, weights),
                contestant("lif_rate, then Linear", lambda x: linear(lif_rate(x)), weights),
                contestant("repeat, LIFNode, mean, then Linear", lambda x: linear(peer(x)), weights, skip),
            ],
            **settings,
        )
        alone = [sum(pair) for pair in zip(found[0]["samples_s"], found[3]["samples_s"])]
        found[4]["over_sum_of_parts"] = statistics.median(a / b for a, b in zip(found[4]["samples_s"], alone))
        if mode == "forward+backward":
            goal(f"lif_rate {mode}, times repeat -> LIFNode -> mean", ratio(found, "repeat, LIFNode, mean"), 15)
        rows += found
    return f"lif_rate, T={T}, {SHAPE}, fp32, beside a product with a {SHAPE[-1]} x {SHAPE[-1]} matrix", rows


def bandwidth(args, settings):
    """Inference out of cache against copies. copy_ has its output; ours come from a pool, clone's from the system"""
    elements = 1 << (22 if args.quick else 26)
    x = current(T, elements // T, device=args.device, requires_grad=False)
    flat = x.view(-1)
    moved = 2 * x.nbytes
    check("lif", lif(x[:, : 1 << 16]), reference.lif(x[:, : 1 << 16]), 0, 0)
    check("lif_rate", lif_rate(flat[: 1 << 16]), reference.lif_rate(flat[: 1 << 16]), 0, 0)
    rows = compare(
        [
            harness.copy_contestant(moved, args.device),
            Contestant("clone", lambda: flat.clone(), bytes=moved),
            Contestant("lif_rate, T=4", inference(lif_rate, flat), bytes=moved),
            Contestant("lif, T=4", inference(lif, x), bytes=moved),
        ],
        **settings,
    )
    for row in rows[2:]:
        goal(f"{row['name']} out of cache, share of copy_ bandwidth", row["percent_of_copy"], 50, " %")
    return f"{elements >> 20} M elements, fp32, inference; bytes: one read and one write of each", rows


class Bare(torch.autograd.Function):
    """The least that an op written in Python can do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, g):
        return g


def overhead(args, settings):
    """Time of a call whose arithmetic costs nothing (host time, on a GPU too)"""
    x = current(T, 8, device=args.device)
    g = torch.randn_like(x)
    agree("lif", lif, reference.lif, x, g)
    agree("lif_rate", lif_rate, reference.lif_rate, x, g)
    functions = {"autograd.Function": Bare.apply, "lif": lif, "lif_rate": lif_rate}
    node = spikingjelly()
    if node:
        functions["SpikingJelly LIFNode"] = node
    contestants = []
    for name, f in functions.items():
        contestants += [
            Contestant(f"{name}, forward with grad", functools.partial(f, x)),
            Contestant(f"{name}, no_grad", inference(f, x)),
            Contestant(f"{name}, forward+backward", forward_backward(f, x, g)),
        ]
    if not node:
        contestants.append(Contestant("SpikingJelly LIFNode", skip=missing("spikingjelly")))
    rows = compare(contestants, **(settings | {"device": "cpu", "min_time": settings["min_time"] / 5}))
    for row in rows:
        if row["name"] in ("lif, forward with grad", "lif_rate, forward with grad"):
            goal(f"overhead of {row['name']}", 1e6 * row["median_s"], 40, " us", at_least=False)
    return "Overhead of a call, (4, 8) fp32", rows


def scaling(args, settings):
    """Cost against work: T at fixed N, and N at fixed T"""
    last = 18 if args.quick else 24
    cases = [(f"T = {T}, N = 512 to {'256k' if args.quick else '16M'}", T, 1 << k) for k in range(9, last + 1, 3)]
    cases += [("N = 64k, T = 1 to 64", t, 1 << 16) for t in (1, 2, 4, 8, 16, 32, 64)]
    contestants = []
    for sweep, t, n in cases:
        x = current(t, n, device=args.device)
        g = torch.randn_like(x)
        part = x.detach()[:, : 1 << 12].clone().requires_grad_()
        agree("lif", lif, reference.lif, part, g[:, : 1 << 12], atol=1e-5)
        for mode, fn in (("forward", inference(lif, x)), ("forward+backward", forward_backward(lif, x, g))):
            extra = {"mode": mode, "sweep": sweep, "T": t, "N": n, "T_times_N": t * n}
            contestants.append(Contestant(f"{mode}, T={t}, N={n}, {sweep[0]}", fn, extra=extra))
    # All sizes in one comparison: what disturbs the machine then disturbs every point of the curve alike.
    settings = settings | {"rounds": 3 if args.quick else 11, "min_time": settings["min_time"] / 5}
    rows = compare(contestants, **settings)
    rows = [
        {"name": r["mode"]} | {k: v for k, v in r.items() if k not in ("name", "mode", "ratio", "ratio_iqr", "baseline")}
        for r in rows
    ]
    for row in rows:
        row["ns_per_neuron_step"] = 1e9 * row["median_s"] / row["T_times_N"]
    if args.plot:
        plot_scaling(args.plot, rows)
    return "Cost of lif against work, fp32", rows


def plot_scaling(path, rows):
    """Time against work, with guides of linear cost that end in the largest N and begin where the fixed cost rules."""
    series, guides = {}, []
    for row in rows:
        series.setdefault(f"{row['name']}, {row['sweep']}", []).append(
            (row["T_times_N"], 1e3 * row["median_s"], 1e3 * row["iqr_s"])
        )
    for points in list(series.values())[:2]:  # the sweep over N
        (x, y, _), least = points[-1], points[0][1] / 2
        guides.append(((x * least / y, x), (least, y)))
    lines = {label: tuple(zip(*points)) for label, points in series.items()}
    harness.plot_lines(path, lines, "neurons × time steps", "time per call (ms)", guides={"linear cost": guides})


def memory(args, settings):
    """saved: by autograd, inputs included; new: allocated by the call and alive after it, the result apart"""
    rows = []
    limit, pool.limit = pool.limit, 0  # what the pool has from the system, torch's profiler does not see

    def measure(name, f, inputs, checkpoints=0):
        given = sum(t.nbytes for t in inputs)
        row = {"name": name, "inputs_bytes": given, "ideal_bytes": given + checkpoints}
        row["saved_bytes"], _ = harness.saved_bytes(lambda: f(*inputs))
        row["saved_over_ideal"] = row["saved_bytes"] / row["ideal_bytes"]
        allocated = harness.allocated_bytes(lambda: f(*inputs), args.device)
        row["new_bytes"] = allocated["kept_bytes"] - f(*inputs).nbytes
        rows.append(row | {"peak_bytes": allocated["peak_bytes"]})

    x = current(T, *SHAPE, device=args.device)
    long = current(64, 1 << (10 if args.quick else 16), device=args.device)
    flat = current(*SHAPE, device=args.device)
    v = torch.zeros(SHAPE, device=args.device, requires_grad=True)
    for a in (x, long):
        agree("lif", lif, reference.lif, a, torch.randn_like(a), atol=1e-5)
    agree("lif_rate", lif_rate, reference.lif_rate, flat, torch.randn_like(flat))
    measure("lif, T=4", lif, [x])
    measure("lif, T=4, with v", lif, [x, v])
    measure("lif, T=64", lif, [long], checkpoints=3 * long[0].nbytes)  # the membrane before steps 16, 32 and 48
    measure("lif_rate, T=4", lif_rate, [flat])
    exact = max(row["saved_over_ideal"] for row in rows)
    hidden = max(row["new_bytes"] - (row["ideal_bytes"] - row["inputs_bytes"]) for row in rows)
    goal("bytes saved, over those of x (+ v; + every 16th membrane for T=64)", exact, 1, at_least=False)
    goal("bytes allocated beyond those and the result", hidden, 0, " B", at_least=False)
    measure("plain loop, T=4", reference.lif, [x])
    measure("plain loop, T=64", reference.lif, [long])
    measure("plain loop of lif_rate, T=4", reference.lif_rate, [flat])
    if not missing("spikingjelly"):

        def node(x):  # a new one per call: it would keep the graph of the call before
            return spikingjelly()(x)

        measure("SpikingJelly LIFNode, T=4", node, [x])
        measure("SpikingJelly LIFNode, T=64", node, [long])
        measure("repeat, LIFNode, mean, T=4", lambda x: node(x.repeat(T, 1, 1, 1)).mean(0), [flat])
    else:
        rows.append({"name": "SpikingJelly LIFNode", "note": f"skipped: {missing('spikingjelly')}"})
    pool.limit = limit
    return "Bytes kept for the backward pass, fp32", rows


SECTIONS = {f.__name__: f for f in (peers, rate, bandwidth, overhead, scaling, memory)}


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, SECTIONS, FIGURE))
