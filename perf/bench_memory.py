"""Whole models, four ways: the bytes that a forward pass keeps for the backward pass, and the time of a training step.

    python perf/bench_memory.py --json perf/results/memory.json
    python perf/bench_memory.py --only cnn_28,spikformer

The ways: SpikingJelly's own code; the same with its memory option, memopt.optimize_memory, which repeats the forward pass and
compresses spikes; after accelerate; after accelerate with fuse and packed. "ideal" is what no rewrite of norms and neurons can
avoid: the inputs of norms, spikes and sums of spikes in the fewest bits, places of a pooling of 2 x 2 in two bits, and all else
that autograd saves. The times of the last two ways come from rounds of these two alone.
"""

import copy
import functools
import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from perf import harness
from perf.bench_compat import gradients_of_copy, make_training_step, skip_section, spikformer_block, spiking_cnn
from perf.harness import Contestant, check_gradients, compare, reason_if_missing, record_goal
from sdit_kernels import dispatch, memory, packed, tuning
from sdit_kernels.levels import BINARY, encode

WAYS = ("SpikingJelly", "SpikingJelly, memopt", "accelerated", "fused and packed")


class Unit(nn.Sequential):
    """A convolution, its norm and its neurons, as one module, so that memopt can choose it."""


def make_unit(conv, IF=False):
    """Return a Unit for (T, B, C, H, W)."""
    from spikingjelly.activation_based import layer, neuron, surrogate

    node = neuron.IFNode if IF else neuron.LIFNode
    return Unit(conv, layer.BatchNorm2d(conv.out_channels), node(surrogate_function=surrogate.ATan()))


def conv3x3(inputs, outputs, stride=1):
    from spikingjelly.activation_based import layer

    return layer.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def make_vgg(T, size, widths, batch):
    """Return a VGG-like network for images of size x size, and its input. widths: per stage, before a pooling of 2 x 2."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    parts, inputs = [], 1
    for width in widths:
        parts += [make_unit(conv3x3(inputs, width)), make_unit(conv3x3(width, width)), layer.MaxPool2d(2)]
        inputs = width
    features = inputs * (size // 2 ** len(widths)) ** 2
    parts += [layer.Flatten(), layer.Linear(features, 256, bias=False), neuron.LIFNode(surrogate_function=surrogate.ATan())]
    net = nn.Sequential(*parts, layer.Linear(256, 10, bias=False))
    functional.set_step_mode(net, "m")
    return net, torch.rand(T, batch, 1, size, size)


class SEWBlock(nn.Module):
    """Two convolutions whose spikes are added to the spikes of the shortcut (Fang et al., NeurIPS 2021)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        from spikingjelly.activation_based import layer

        self.first, self.second = make_unit(conv3x3(inputs, outputs, stride), True), make_unit(conv3x3(outputs, outputs), True)
        turn = stride > 1 or inputs != outputs
        self.shortcut = make_unit(layer.Conv2d(inputs, outputs, 1, stride, bias=False), True) if turn else nn.Identity()

    def forward(self, x):
        return self.second(self.first(x)) + self.shortcut(x)


def make_sew_resnet18(T, batch, width=64):
    """Return SEW-ResNet18 for images of 32 x 32: a stem of 3 x 3 without pooling, then four stages of two blocks."""
    from spikingjelly.activation_based import functional, layer

    blocks, inputs = [make_unit(conv3x3(3, width), True)], width
    for i in range(4):
        outputs = width * 2**i
        blocks += [SEWBlock(inputs, outputs, 2 if i else 1), SEWBlock(outputs, outputs, 1)]
        inputs = outputs
    net = nn.Sequential(*blocks, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(inputs, 10))
    functional.set_step_mode(net, "m")
    return net, torch.rand(T, batch, 3, 32, 32)


def bytes_of_values(t):
    """Return the bytes of the codes of a tensor whose values are few multiples of one unit, or None for other tensors."""
    largest = t.abs().max()
    unit = t.abs()[t != 0].min() if largest else largest
    if not largest or not (t / unit).frac().eq(0).all() or largest / unit > 1 << 15:
        return None if largest else t.numel() // 8
    count = int((t.max().clamp(min=0) - t.min().clamp(max=0)) / unit) + 1
    bits = next(b for b in (1, 2, 4, 8, 16) if count <= 1 << b)
    return t.numel() * bits // 8


def ideal_bytes(net, x, reset):
    """Return the bytes that an accelerated network would keep at least; see the top of this file."""
    from spikingjelly.activation_based import neuron

    norms = nn.modules.batchnorm._BatchNorm
    before, outputs, currents, handles = set(), set(), set(), []
    for module in net.modules():
        if isinstance(module, norms):
            handles.append(module.register_forward_pre_hook(lambda _, args: before.add(args[0].untyped_storage()._cdata)))
            handles.append(module.register_forward_hook(lambda _, args, y: outputs.add(y.untyped_storage()._cdata)))
        if isinstance(module, neuron.BaseNode):
            handles.append(module.register_forward_pre_hook(lambda _, args: currents.add(args[0].untyped_storage()._cdata)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t.detach(), lambda t: t):
        net(x)
    for handle in handles:
        handle.remove()
    reset(net)
    seen, total = {p.untyped_storage()._cdata for p in net.parameters()}, 0
    for t in kept:
        storage = t.untyped_storage()
        if storage._cdata in seen:
            continue
        seen.add(storage._cdata)
        if t.dtype == torch.int64 and t.dim() > 3:
            total += t.numel() // 4
        elif storage._cdata not in outputs & currents:
            few = None if storage._cdata in before or not t.is_floating_point() else bytes_of_values(t)
            total += storage.nbytes() if few is None else few
    return total


def kept_bytes(net, x, reset):
    """Return the bytes that one forward pass keeps for the backward pass: the input, and what stays allocated.

    The output and the last membrane potentials stay in any case and are not counted.
    """
    limit, memory.pool.limit = memory.pool.limit, 0  # the profiler does not see the memory of the pool
    others = []

    def run():  # called twice; the second call is measured
        y = net(x)
        others.append(y.nbytes + sum(m.v.nbytes for m in net.modules() if isinstance(getattr(m, "v", None), torch.Tensor)))
        if len(others) == 1:
            reset(net)
        return y

    try:
        kept = harness.allocated_bytes(run, x.device)["kept_bytes"]
    finally:
        memory.pool.limit = limit
        reset(net)
    return kept - others[0] + x.nbytes


def compare_ways(name, make, goals, args, settings):
    """Measure a model in four ways, with T = 4 and 16. goals: least ratios of kept bytes, of two ways to ours."""
    if reason_if_missing("spikingjelly"):
        return skip_section(name, "spikingjelly")
    from spikingjelly.activation_based import functional, memopt, neuron

    from sdit_kernels.compat.spikingjelly import accelerate

    reset, rows = functional.reset_net, []
    for T in (4,) if args.quick else (4, 16):
        torch.manual_seed(0)
        net, x = make(T)
        net, x = net.to(args.device).train(), x.to(args.device)
        nets = [net, *(copy.deepcopy(net) for _ in WAYS[1:])]
        memopt.optimize_memory(nets[1], (Unit, neuron.BaseNode), lambda model, x=x: model(x), level=1)
        reset(nets[1])
        reports = [accelerate(nets[2]), accelerate(nets[3], fuse=True, packed=True)]
        assert not any(report.left for report in reports), reports
        wanted = gradients_of_copy(net, x, reset)
        contestants, kept = [], {}
        for way, n in zip(WAYS, nets, strict=True):
            error = check_gradients(f"{way}: gradient", gradients_of_copy(n, x, reset), wanted, 1e-8, 1e-8)
            kept[way] = kept_bytes(n, x, reset)
            extra = {"kept_bytes": kept[way], **error}
            contestants.append(Contestant(f"T = {T}, {way}", make_training_step(n, x, reset), extra=extra))
        baseline = contestants[2].name
        rounds, pairs = (3, 3) if args.quick else (15, 301) if T == 4 else (7, 61)
        found = compare(contestants, **(settings | {"rounds": rounds}), baseline=baseline)
        found[2:] = compare(contestants[2:], **(settings | {"rounds": pairs}))  # a goal depends on their ratio
        ideal, ours = ideal_bytes(nets[2], x, reset), kept[WAYS[3]]
        what = f"{name}, T = {T}"
        for way, least in goals.items():
            record_goal(f"{what}: kept bytes, times fewer than {way}", kept[way] / ours, least)
        record_goal(f"{what}: kept bytes, per cent of the ideal", 100 * ideal / ours, 95)
        record_goal(f"{what}: time of a step over accelerated", found[3]["ratio"], 1, at_least=False)
        rows += [*found, {"name": f"T = {T}, ideal", "kept_bytes": ideal}]
    return f"{name}, fp32: {type(x).__name__}s {tuple(x.shape[1:])}", rows


def cnn_28(args, settings):
    """The spiking CNN of SpikingJelly's tutorials, 28 x 28"""
    return compare_ways("CNN, 28 x 28", spiking_cnn, {"accelerated": 3, "SpikingJelly": 4.5}, args, settings)


def cnn_64(args, settings):
    """A VGG-like network of six convolutions, 64 x 64"""
    make = functools.partial(make_vgg, size=64, widths=(32, 64, 128), batch=4)
    return compare_ways("CNN, 64 x 64", make, {"accelerated": 3, "SpikingJelly": 4.5}, args, settings)


def sew_resnet18(args, settings):
    """SEW-ResNet18 with IF neurons, 32 x 32"""
    return compare_ways("SEW-ResNet18", functools.partial(make_sew_resnet18, batch=2), {}, args, settings)


def spikformer(args, settings):
    """Spikformer's block for 64 tokens"""
    goals = {"accelerated": 2.4, "SpikingJelly": 3.2}
    return compare_ways("Spikformer block", spikformer_block, goals, args, settings)


def packing(args, settings):
    """The kernels that pack and restore spikes, on data larger than the caches, against copies"""
    kernels = importlib.import_module(f"sdit_kernels.{dispatch.choose(torch.device(args.device))}.pack")
    rows, record = [], tuning.current()
    for name, levels, dtype in (
        ("binary, fp32", BINARY, torch.float32), ("ternary, fp32", "ternary", torch.float32),
        ("5 levels, fp32", encode((0, 4)), torch.float32), ("binary, bf16", BINARY, torch.bfloat16),
    ):  # fmt: skip
        values = packed.spike_values(levels, dtype, None)
        codes = torch.randint(values.n - values.nan, (1 << (22 if args.quick else 26),), device=args.device)
        x, restored = values.on(codes.device)[codes], torch.empty(codes.shape, dtype=dtype, device=args.device)
        words, exact = kernels.pack(x, values, record)
        kernels.unpack(words, values, restored, record)
        assert exact and torch.equal(restored, x)
        moved = x.nbytes + words.nbytes
        found = compare(
            [
                harness.make_copy_contestant(moved, args.device),
                Contestant(f"{name}: pack", functools.partial(kernels.pack, x, values, record), bytes=moved),
                Contestant(f"{name}: restore", functools.partial(kernels.unpack, words, values, restored, record), bytes=moved),
            ],
            **settings,
        )
        for row in found[1:]:
            record_goal(f"{row['name']}, share of copy_ bandwidth", row["percent_of_copy"], 80, " %")
        rows += found
    return "Spikes as bits; bytes: the spikes and their bits, once each", rows


SECTIONS = {f.__name__: f for f in (cnn_28, cnn_64, sew_resnet18, spikformer, packing)}

if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, SECTIONS))
