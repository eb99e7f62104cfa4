"""Training steps of whole models: as they are, accelerated, fused and packed, and compiled.

    python perf/bench_models.py --json perf/results/models.json
    python perf/bench_models.py --only spiking_cnn,snntorch --quick

Per model and way: the time of a step, the kernels that it launches, its calls of aten operators, and the bytes that a forward
pass keeps for the backward pass. "compiled" is torch.compile of the accelerated model. perf/plot_models.py draws the figures.
"""

import copy
import gc
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from perf import bench_compat, bench_sdit, harness
from perf.harness import Contestant, check, compare, reason_if_missing, record_goal
from sdit_kernels import memory, packed_spikes

WAYS = ("as it is", "accelerated", "fused and packed", "compiled")


class Way(NamedTuple):
    """A model in one of the ways."""

    forward: Callable  # () -> loss
    parameters: list
    optimiser: Callable | None = None  # parameters -> optimiser; without it a step is forward and backward pass
    reset: Callable = lambda: None


def make_step(way):
    optimiser = way.optimiser and way.optimiser(way.parameters)

    def run():
        loss = way.forward()
        for p in way.parameters:
            p.grad = None
        loss.backward()
        if optimiser:
            optimiser.step()
        way.reset()

    return run


def count_calls(step, device) -> dict:
    """Count the kernels and the aten operators of one step, by torch.profiler.

    On the CPU, a kernel is an innermost operator that computes something, or a kernel of compiled code.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    events = list(profile.events())
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not re.match("Mem(cpy|set)", e.name)]
    operators = [e for e in events if "::" in e.name or e.name.startswith(("cpp_", "graph_"))]
    aten = sum(e.name.startswith("aten::") for e in operators)
    inner = [e for e in operators if not any("::" in child.name for child in e.cpu_children)]
    computes = [e for e in inner if not re.fullmatch(bench_sdit.VIEWS, e.name)]
    return {"kernels": len(on_gpu) if device == "cuda" else len(computes), "aten_calls": aten}


def kept_bytes(way, device) -> int:
    """Return the bytes that one forward pass keeps for the backward pass: what stays allocated after it."""
    limit, memory.pool.limit = memory.pool.limit, 0  # the profiler does not see the memory of the pool
    try:
        kept = harness.allocated_bytes(lambda: way.reset() or way.forward(), device)["kept_bytes"]
    finally:
        memory.pool.limit = limit
        way.reset()
    return kept


def compare_ways(title, ways, args, settings):
    """Check that all ways of a model agree, then measure them. ways: {name: function that makes a Way} or {name: reason}."""
    contestants, wanted = [], None
    for name in WAYS:
        make = ways.get(name)
        if make is None or isinstance(make, str):
            if make:
                contestants.append(Contestant(name, skip=make))
            continue
        way = make()
        loss = way.forward()
        gradients = torch.autograd.grad(loss, [p for p in way.parameters if p.requires_grad], allow_unused=True)
        way.reset()
        norm = torch.stack([g.detach().double().norm() for g in gradients if g is not None]).norm()
        wanted = wanted or (loss.detach(), norm)
        # float32: a spike on the threshold may fall on either side, which float64 in the tests of each way excludes
        error = check(f"{title}, {name}: loss", loss.detach(), wanted[0], 5e-3, 1e-6)
        check(f"{title}, {name}: norm of the gradient", norm, wanted[1], 5e-2, 1e-6)
        del loss, gradients
        extra = {"kept_bytes": kept_bytes(way, args.device)}
        step = make_step(way)
        step()
        extra |= count_calls(step, args.device) | {"loss_error": error["max_abs_error"]}
        contestants.append(Contestant(name, step, extra=extra))
        gc.collect()
    found = compare(contestants, **settings)
    best = {}
    for row in found[1:]:
        if "ratio" in row:
            best[row["name"]] = 1 / row["ratio"]
            row["times_as_fast"], row["times_fewer_kept"] = 1 / row["ratio"], found[0]["kept_bytes"] / row["kept_bytes"]
    record_goal(f"{title}: times as fast, best way", max(best.values(), default=None), 1)
    return title, found


def compiled(model):
    return torch.compile(model, options={"cpp.enable_kernel_profile": True})


def few_rounds(args, settings, rounds=7):
    return settings | {"rounds": 2 if args.quick else rounds, "min_time": settings["min_time"] / 5}


# ---- the models ------------------------------------------------------------------------------------------------------


def jelly_ways(make, args):
    """Return the ways of a model of SpikingJelly."""
    if reason_if_missing("spikingjelly"):
        return dict.fromkeys(WAYS, reason_if_missing("spikingjelly"))
    from spikingjelly.activation_based import functional

    from sdit_kernels.compat.spikingjelly import accelerate

    torch.manual_seed(0)
    net, x = make()
    net, x = net.to(args.device).train(), x.to(args.device)

    def way(*changes):
        def made():
            n = copy.deepcopy(net)
            run = n
            for change in changes:
                changed = change(n)
                run = run if changed is None else changed

            return Way(
                lambda: run(x).square().mean(), [*n.parameters()], lambda p: torch.optim.SGD(p, lr=1e-3),
                lambda: functional.reset_net(n),
            )  # fmt: skip

        return made

    def plain(n, **options):
        assert not accelerate(n, **options).left

    return {
        "as it is": way(),
        "accelerated": way(plain),
        "fused and packed": way(lambda n: plain(n, fuse=True, packed=True)),
        "compiled": way(plain, compiled),
    }


def spiking_cnn(args, settings):
    """SpikingJelly's CNN for 28 x 28 images, T = 4, batch 16: forward, backward, SGD, reset_net"""
    return compare_ways("SpikingJelly's CNN", jelly_ways(bench_compat.spiking_cnn, args), args, settings)


def spikformer(args, settings):
    """Spikformer's block, (4, 16, 128, 64): forward, backward, SGD, reset_net"""
    return compare_ways("Spikformer block", jelly_ways(bench_compat.spikformer_block, args), args, settings)


def snntorch(args, settings):
    """snnTorch's network 784, 1000, 10 with Leaky neurons, 25 steps, batch 128: forward, backward, Adam"""
    title = "snnTorch's network"
    if reason_if_missing("snntorch"):
        return compare_ways(title, dict.fromkeys(WAYS, reason_if_missing("snntorch")), args, settings)
    import snntorch as snn

    from sdit_kernels.compat.snntorch import unroll

    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(784, 1000), snn.Leaky(beta=0.95), nn.Linear(1000, 10), snn.Leaky(beta=0.95)])
    net = net.to(args.device)
    x = (torch.rand(25, 128, 784, device=args.device) < 0.3).float()  # rate-coded images
    y = torch.randint(10, (128,), device=args.device)

    def looped(n):
        mem1, mem2, history = n[1].init_leaky(), n[3].init_leaky(), []
        for x_t in x:
            s, mem1 = n[1](n[0](x_t), mem1)
            s, mem2 = n[3](n[2](s), mem2)
            history.append(mem2)
        return torch.stack(history)

    def unrolled(n):
        s, _ = unroll(n[1], n[0](x), n[1].init_leaky())
        return unroll(n[3], n[2](s), n[3].init_leaky())[1]

    def packed(n):
        with packed_spikes():
            return unrolled(n)

    def way(f, wrap=lambda f: f):
        def made():
            n = copy.deepcopy(net)
            run = wrap(lambda: nn.functional.cross_entropy(f(n).flatten(0, 1), y.repeat(25)))
            return Way(run, [*n.parameters()], lambda p: torch.optim.Adam(p, lr=5e-4))

        return made

    ways = {"as it is": way(looped), "accelerated": way(unrolled), "fused and packed": way(packed)}
    return compare_ways(title, ways | {"compiled": way(unrolled, compiled)}, args, settings)


def rwkv(args, settings):
    """transformers' RWKV-4, 4 layers of 256 channels, (2, 512) tokens: loss, forward and backward"""
    title = "RWKV-4 of transformers"
    if reason_if_missing("transformers"):
        return compare_ways(title, dict.fromkeys(WAYS, reason_if_missing("transformers")), args, settings)
    theirs, ours = bench_compat.rwkv_pair(args.device, vocab_size=256, hidden_size=256, num_hidden_layers=4)
    ids = torch.randint(256, (2, 512), device=args.device)

    def way(model, wrap=lambda f: f):
        def made():
            n = copy.deepcopy(model).train()
            return Way(wrap(lambda: n(ids, labels=ids).loss), [*n.parameters()])

        return made

    ways = {"as it is": way(theirs), "accelerated": way(ours), "compiled": way(ours, compiled)}
    return compare_ways(title, ways, args, few_rounds(args, settings))


def sdit(args, settings):
    """SDiT, preset fashion_mnist, batch 8: forward, loss, backward, AdamW. As it is: PyTorch and SpikingJelly's neurons"""
    model, inputs = bench_sdit.make_case(args.device, 8)
    target = torch.randn(model.config.out_channels, *inputs[0].shape[2:], device=args.device)

    def way(make, wrap=lambda f: f):
        def made():
            n = make()
            parameters = [*n.parameters()]
            return Way(
                wrap(lambda: (n(*inputs) - target).square().mean()), parameters,
                lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
            )  # fmt: skip

        return made

    def ours():
        return copy.deepcopy(model)

    ways = {"as it is": way(lambda: bench_sdit.PlainSDiT(model)), "accelerated": way(ours), "compiled": way(ours, compiled)}
    return compare_ways("SDiT", ways, args, few_rounds(args, settings, 3))


SECTIONS = {f.__name__: f for f in (spiking_cnn, spikformer, snntorch, rwkv, sdit)}

if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, SECTIONS))
