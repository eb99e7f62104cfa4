"""Time models of other libraries before and after the one line of sdit_kernels.compat: layers, training steps, bytes kept.

    python perf/bench_compat.py --only jelly_neurons,jelly_models,snn_neurons,snn_model --json perf/results/compat_snn.json
    python perf/bench_compat.py --only jelly_levels
    python perf/bench_compat.py --only snn_synaptic
    python perf/bench_compat.py --only published_models --json perf/results/published_models.json
    python perf/bench_compat.py --only handwritten_neurons --json perf/results/compat_handwritten.json
    python perf/bench_compat.py --only rwkv_step,rwkv_layer,rwkv_decode --json perf/results/compat_rwkv.json
    python perf/bench_compat.py --only vision_rwkv_step,vision_rwkv_layer --json perf/results/compat_vision_rwkv.json
    python perf/bench_compat.py --quick

Each section is one function with one table and one correctness gate. It needs only its own library, and is skipped with a
reason if that is not installed. The goals at the end say PASS or FAIL, and a FAIL sets the exit status (except with --quick,
whose times mean nothing).
"""

import copy
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from perf import harness, networks, peers
from perf.harness import (
    Contestant,
    check,
    check_gradients,
    compare,
    make_forward_backward,
    reason_if_missing,
    record_goal,
    remove_ratios,
)
from perf.ops import OPS, T, current
from perf.peers import snntorch_loop
from perf.vision_rwkv import FORMS, VisionRWKV, VRWKV_SpatialMix, chosen
from sdit_kernels import cuba


def skip_section(title, library):
    """Return the result of a section whose library is not installed; its goals are then SKIP."""
    return title, [{"name": library, "note": f"skipped: {reason_if_missing(library)}"}]


def count_saved_bytes(f, x, parameters=()):
    """Return the bytes that autograd saves in f(x): x is included, parameters are not."""
    return harness.saved_bytes(lambda: f(x), exclude=tuple(parameters))[0]


def record_speedups(found, least, what):
    """Record a goal for each fused contestant and the original after it ("NAME, SpikingJelly's own"): times as fast."""
    for fused, own in zip(found[::2], found[1::2]):
        ratios = [b / a for a, b in zip(fused["samples_s"], own["samples_s"])]
        own["times_fused"] = sorted(ratios)[len(ratios) // 2]
        record_goal(f"{what}, {fused['name'].removesuffix(', fused')}: times as fast", own["times_fused"], least)
    return remove_ratios(found)


# ---- SpikingJelly ----------------------------------------------------------------------------------------------------


def jelly_neurons(args, settings):
    """SpikingJelly's neurons, forward and backward in training; saved: by autograd, inputs included"""
    title = f"SpikingJelly's neurons, T={T}, {args.shape}, fp32"
    if reason_if_missing("spikingjelly"):
        return skip_section(title, "spikingjelly")
    from spikingjelly.activation_based import neuron, surrogate

    nodes = {
        "LIFNode": neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="m"),
        "LIFNode, soft reset, detached": neuron.LIFNode(v_reset=None, detach_reset=True, step_mode="m"),
        "LIFNode, single steps": neuron.LIFNode(surrogate_function=surrogate.ATan(), step_mode="s"),
        "IFNode": neuron.IFNode(step_mode="m"),
        "ParametricLIFNode": neuron.ParametricLIFNode(step_mode="m"),
    }
    return title, compare_nodes(nodes, args, settings, 3)


def jelly_levels(args, settings):
    """SpikingJelly's integer and ternary neurons, forward and backward in training; saved: by autograd, inputs included"""
    title = f"SpikingJelly's integer and ternary neurons, T={T}, {args.shape}, fp32"
    if reason_if_missing("spikingjelly"):
        return skip_section(title, "spikingjelly")
    from spikingjelly.activation_based import neuron, surrogate

    if not hasattr(neuron, "ILIFNode"):
        return title, [{"name": "ILIFNode", "note": "skipped: SpikingJelly has had it since 2.0.0"}]
    atan = surrogate.ATan()
    nodes = {
        "ILIFNode": neuron.ILIFNode(tau=2.0, step_mode="m"),  # where tau is a power of two, the counts are equal
        "ILIFNode, detached": neuron.ILIFNode(tau=2.0, detach_reset=True, step_mode="m"),
        "TernaryLIFNode": neuron.TernaryLIFNode(surrogate_function=atan, step_mode="m"),
        "TernaryIFNode, soft reset": neuron.TernaryIFNode(v_reset=None, surrogate_function=atan, step_mode="m"),
    }
    return title, compare_nodes(nodes, args, settings, 5)


def compare_nodes(nodes, args, settings, least):
    """Time neurons of SpikingJelly, forward and backward, before and after ``accelerate``. Return the rows."""
    from sdit_kernels.compat.spikingjelly import accelerate

    x = current(T, *args.shape, device=args.device)
    g = torch.randn_like(x)
    contestants = []
    for name, node in nodes.items():
        node.to(args.device)
        fused = copy.deepcopy(node)
        assert accelerate(fused).replaced

        def run(x, node):
            node.reset()
            return node(x) if node.step_mode == "m" else torch.stack([node(x_t) for x_t in x])

        calls = [lambda x, node=node: run(x, node) for node in (fused, node)]
        check(f"{name}: spikes", calls[0](x), calls[1](x), 0, 0)
        gradients = (make_forward_backward(f, [x], g, n.parameters())() for f, n in zip(calls, (fused, node)))
        error = check_gradients(f"{name}: gradient", *gradients, 1e-4, 1e-3)
        for label, f, n in ((f"{name}, fused", calls[0], fused), (f"{name}, SpikingJelly's own", calls[1], node)):
            row = {"saved_bytes": count_saved_bytes(f, x, n.parameters()), **(error if f is calls[0] else {})}
            contestants.append(Contestant(label, make_forward_backward(f, [x], g, tuple(n.parameters())), extra=row))
    return record_speedups(compare(contestants, **settings), least, "SpikingJelly layer")


def spiking_cnn(T=T):
    """Make the spiking CNN of SpikingJelly's tutorials for images of 28 x 28, and its input."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    def node():
        return neuron.LIFNode(surrogate_function=surrogate.ATan())

    net = nn.Sequential(
        layer.Conv2d(1, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), node(), layer.MaxPool2d(2),
        layer.Conv2d(32, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32), node(), layer.MaxPool2d(2),
        layer.Flatten(), layer.Linear(32 * 49, 256, bias=False), node(), layer.Linear(256, 10, bias=False), node(),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net, torch.rand(T, 16, 1, 28, 28)


class SpikformerBlock(nn.Module):
    """Spikformer's block for tokens (T, N, C, L): SpikingJelly's SpikingSelfAttention, then an MLP of four times the width."""

    def __init__(self, channels, heads):
        super().__init__()
        from spikingjelly.activation_based import layer, neuron
        from spikingjelly.activation_based.layer.attention import SpikingSelfAttention

        def linear(inputs, outputs):
            product = layer.SeqToANNContainer(nn.Conv1d(inputs, outputs, 1, bias=False), nn.BatchNorm1d(outputs))
            return nn.Sequential(product, neuron.LIFNode(detach_reset=True, step_mode="m"))

        self.attention = SpikingSelfAttention(dim=channels, num_heads=heads)
        self.mlp = nn.Sequential(linear(channels, 4 * channels), linear(4 * channels, channels))

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


def spikformer_block(T=T):
    return SpikformerBlock(128, 8), 2 * torch.rand(T, 16, 128, 64)


class Network(NamedTuple):
    """A network whose neurons are compared before and after the line of sdit_kernels.compat."""

    name: str
    net: nn.Module
    x: torch.Tensor
    reset: Callable  # sets the states of a network back
    accelerate: tuple[Callable, ...]  # changes it, the neurons first
    neuron: type  # base class of its neurons


def reset_and_call(net, reset):
    def f(x):
        reset(net)
        return net(x)

    return f


def gradients_of_copy(net, x, reset):
    """Return the gradients in float64, where all spikes are equal; of a copy, because batch norm updates its statistics."""
    net = copy.deepcopy(net).double()
    loss = reset_and_call(net, reset)(x.double() if x.is_floating_point() else x).square().mean()
    return torch.autograd.grad(loss, tuple(net.parameters()))


def make_training_step(net, x, reset):
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)

    def run():
        loss = net(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        reset(net)

    return run


def compare_networks(found, args, settings):
    """Time a training step of each network, and each of its neurons with its own input, before and after. Return the rows.

    Neurons with equal settings and equal shapes are timed once; ``neurons_s`` of a network is the sum over all its neurons.
    """
    rows = []
    for name, net, x, reset, accelerate, neuron in found:
        net, x = net.to(args.device).train(), x.to(args.device)
        fused = copy.deepcopy(net)
        reports = [change(fused) for change in accelerate]
        assert not any(report.left for report in reports), reports
        wanted, error = gradients_of_copy(net, x, reset), gradients_of_copy(fused, x, reset)
        error = check_gradients(f"{name}: gradient", error, wanted, 1e-8, 1e-8)
        nets = {"fused": fused, "SpikingJelly's own": net}
        layers, counts, currents = [], {}, record_inputs(copy.deepcopy(net), x, neuron)
        assert set(currents) == {key for key, _ in reports[0].replaced}
        for key, given in currents.items():
            kind = (repr(net.get_submodule(key)), given.shape, given.stride())
            counts[kind] = counts.get(kind, 0) + 1
            if counts[kind] > 1:
                continue
            g = torch.randn_like(given)
            for label, n in nets.items():
                reset(n)
                f = reset_and_call(copy.deepcopy(n.get_submodule(key)), reset)
                extra = {"saved_bytes": count_saved_bytes(f, given)}
                layers.append(Contestant(f"{name}, {key}, {label}", make_forward_backward(f, [given], g), extra=extra))
        both = []
        for label, n in nets.items():
            extra = {"saved_bytes": count_saved_bytes(reset_and_call(n, reset), x, n.parameters())} | (
                error if n is fused else {}
            )
            reset(n)
            both.append(Contestant(f"{name}, training step, {label}", make_training_step(n, x, reset), extra=extra))
        whole = compare(both, **settings)
        record_goal(f"{name}, training step: times as fast", whole[1]["ratio"], 1)
        ratio = whole[1]["saved_bytes"] / whole[0]["saved_bytes"]
        record_goal(f"{name}, bytes saved in a training step: times as few", ratio, 1)
        whole[1]["times_fused"] = whole[1]["ratio"]
        neurons = record_speedups(
            compare(layers, **(settings | {"min_time": settings["min_time"] / 3})), 3, "SpikingJelly layer"
        )
        for i, row in enumerate(whole):
            row["neurons_s"] = sum(n * layer["median_s"] for n, layer in zip(counts.values(), neurons[i::2], strict=True))
        rows += remove_ratios(whole) + neurons
    return rows


def record_inputs(net, x, neuron):
    """Return {name of a neuron: its input} for one forward pass."""
    found = {}
    for key, module in net.named_modules():
        if isinstance(module, neuron):
            module.register_forward_pre_hook(lambda _, args, key=key: found.setdefault(key, args[0].detach().clone()))
    net(x)
    return {key: t.requires_grad_() for key, t in found.items()}


def jelly_models(args, settings):
    """Training step: forward, backward, SGD, reset_net. Neurons: each neuron of the model with its own input"""
    title = f"Models of SpikingJelly, T={T}, fp32"
    if reason_if_missing("spikingjelly"):
        return skip_section(title, "spikingjelly")
    from spikingjelly.activation_based import functional, neuron

    from sdit_kernels.compat.spikingjelly import accelerate

    found = []
    for name, make in (("spiking CNN", spiking_cnn), ("Spikformer block", spikformer_block)):
        torch.manual_seed(0)
        found.append(Network(name, *make(), functional.reset_net, (accelerate,), neuron.BaseNode))
    return title, compare_networks(found, args, settings)


def published_models(args, settings):
    """The networks of perf/networks.py. Training step: forward, backward, SGD, reset_net. Neurons: each with its own input"""
    title = f"Networks with the structure of published ones, T={T}, fp32"
    if reason_if_missing("spikingjelly"):
        return skip_section(title, "spikingjelly")
    jelly = peers.clock_driven()
    if jelly is None:
        return title, [{"name": "spikingjelly 0.0.0.0.12", "note": "skipped: it is not in build/peers (make peers)"}]
    from spikingjelly.activation_based import functional, neuron, surrogate

    from sdit_kernels.compat import rwkv
    from sdit_kernels.compat.spikingjelly import accelerate

    def lif():
        return neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")

    def images():
        return torch.randn(16, 1, 32, 32)

    torch.manual_seed(0)
    old = (jelly.functional.reset_net, (accelerate,), jelly.neuron.BaseNode)
    new = (functional.reset_net, (accelerate,), neuron.BaseNode)
    found = [
        Network("Spikformer", networks.Spikformer(jelly, T, 128), images(), *old),
        Network("QKFormer", networks.QKFormer(jelly, T, 128), images(), *old),
        Network("Spike-Driven Transformer", networks.SpikeDrivenTransformer(jelly, T, 128), images(), *old),
        Network("SEW-ResNet", networks.SEWResNet(jelly, T, 32), images(), *old),
        Network("SpikeGPT, 256 tokens", networks.SpikeGPT(jelly, 50, 256), torch.randint(50, (8, 256)), *old)._replace(
            accelerate=(accelerate, rwkv.accelerate)
        ),
        Network("SpikingResformer", networks.SpikingResformer(lif, T, 64), images(), *new),
    ]  # fmt: skip
    return title, compare_networks(found, args, settings)


# ---- snnTorch --------------------------------------------------------------------------------------------------------

STEPS, BATCH, HIDDEN = 25, 128, 1000  # as in snnTorch's tutorials


def snn_neurons(args, settings):
    """snnTorch's Leaky, forward and backward; leaky alone returns only spikes. saved: by autograd, inputs included"""
    title = f"snnTorch's Leaky, T={STEPS}, ({BATCH}, {HIDDEN}), fp32"
    if reason_if_missing("snntorch"):
        return skip_section(title, "snntorch")
    import snntorch

    from sdit_kernels.compat.snntorch import accelerate, unroll

    call_leaky = OPS["leaky"].call
    x = current(STEPS, BATCH, HIDDEN, device=args.device)
    g = torch.randn_like(x)
    rows = []
    for name, options in {
        "subtract": {},
        "zero": {"reset_mechanism": "zero"},
        "subtract, learnt beta and threshold": {"learn_beta": True, "learn_threshold": True},
        "subtract at once": {"reset_delay": False},
    }.items():
        neuron = snntorch.Leaky(beta=0.9, **options).to(args.device)
        fused = copy.deepcopy(neuron)
        assert accelerate(fused).replaced

        def whole(x, neuron=fused):
            return unroll(neuron, x, torch.zeros_like(x[0]))

        fused_loop, loop = snntorch_loop(fused), snntorch_loop(neuron)
        calls = {"unroll": (whole, fused), "accelerated, in the loop": (fused_loop, fused), "the loop": (loop, neuron)}
        want, contestants = loop(x), []
        wanted = make_forward_backward(loop, [x], g, tuple(neuron.parameters()))()
        for label, (f, n) in calls.items():
            check(f"{name}, {label}: spikes and membranes", f(x), want, 0, 0)
            parameters = tuple(n.parameters())
            run = make_forward_backward(f, [x], g, parameters)
            error = check_gradients(f"{name}, {label}: gradient", run(), wanted, 1e-4, 1e-3)
            extra = {"saved_bytes": count_saved_bytes(f, x, parameters)} | (error if n is fused else {})
            contestants.append(Contestant(f"{name}, {label}", run, extra=extra))
        if not options:
            check("leaky: spikes", call_leaky(x), want[0], 0, 0)
            extra = {"saved_bytes": count_saved_bytes(call_leaky, x)}
            contestants.append(Contestant("leaky alone", make_forward_backward(call_leaky, [x], g), extra=extra))
        found = compare(contestants, **settings)
        record_goal(f"snnTorch layer, {name}: the loop over unroll", found[2]["ratio"], 5)
        record_goal(f"snnTorch layer, {name}: the loop over the accelerated loop", found[2]["ratio"] / found[1]["ratio"], 1)
        rows += found
    return title, rows


def snn_synaptic(args, settings):
    """snnTorch's Synaptic, forward and backward; cuba alone returns only spikes. saved: by autograd, inputs included"""
    title = f"snnTorch's Synaptic, T={STEPS}, ({BATCH}, {HIDDEN}), fp32"
    if reason_if_missing("snntorch"):
        return skip_section(title, "snntorch")
    import snntorch

    from sdit_kernels.compat.snntorch import accelerate, unroll

    x = current(STEPS, BATCH, HIDDEN, device=args.device)
    g, zero, rows = torch.randn_like(x), torch.zeros_like(x[0]), []
    learnt = {"learn_alpha": True, "learn_beta": True, "learn_threshold": True}
    for name, options, fewer_bytes in (("fixed decays", {}, 1.7), ("learnt decays and threshold", learnt, 3.4)):
        neuron = snntorch.Synaptic(alpha=0.8, beta=0.9, **options).to(args.device)
        fused = copy.deepcopy(neuron)
        assert accelerate(fused).replaced

        def whole(x, neuron=fused):
            return unroll(neuron, x, zero, syn=zero)

        def in_loop(x, neuron):
            syn, mem, steps = zero, zero, []
            for x_t in x:
                s, syn, mem = neuron(x_t, syn, mem)
                steps.append((s, syn, mem))
            return tuple(map(torch.stack, zip(*steps)))

        fused_loop, loop = (functools.partial(in_loop, neuron=n) for n in (fused, neuron))
        calls = {"unroll": (whole, fused), "accelerated, in the loop": (fused_loop, fused), "the loop": (loop, neuron)}
        want, contestants, saved = loop(x), [], {}
        wanted = make_forward_backward(loop, [x], g, tuple(neuron.parameters()))()
        for label, (f, n) in calls.items():
            check(f"{name}, {label}: spikes and states", f(x), want, 0, 0)
            parameters = tuple(n.parameters())
            run = make_forward_backward(f, [x], g, parameters)
            error = check_gradients(f"{name}, {label}: gradient", run(), wanted, 1e-4, 1e-3)
            saved[label] = count_saved_bytes(f, x, parameters)
            extra = {"saved_bytes": saved[label]} | (error if n is fused else {})
            contestants.append(Contestant(f"{name}, {label}", run, extra=extra))
        if not options:
            call = functools.partial(cuba, beta_i=0.8, beta=0.9)
            check("cuba: spikes", call(x), want[0], 0, 0)
            extra = {"saved_bytes": count_saved_bytes(call, x)}
            contestants.append(Contestant("cuba alone", make_forward_backward(call, [x], g), extra=extra))
        found = compare(contestants, **settings)
        record_goal(f"snnTorch Synaptic, {name}: the loop over unroll", found[2]["ratio"], 5)
        record_goal(f"snnTorch Synaptic, {name}: kept bytes", saved["the loop"] / saved["unroll"], fewer_bytes)
        rows += found
    return title, rows


def snn_model(args, settings):
    """Training step of the network of the tutorials (784, 1000, 10), cross entropy at every step: forward, backward, Adam"""
    title = f"A network of snnTorch, T={STEPS}, batch {BATCH}, fp32"
    if reason_if_missing("snntorch"):
        return skip_section(title, "snntorch")
    import snntorch

    from sdit_kernels.compat.snntorch import accelerate, unroll

    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(784, HIDDEN), snntorch.Leaky(beta=0.95), nn.Linear(HIDDEN, 10), snntorch.Leaky(beta=0.95)])
    net = net.to(args.device)
    x = (torch.rand(STEPS, BATCH, 784, device=args.device) < 0.3).float()  # rate-coded images
    y = torch.randint(10, (BATCH,), device=args.device)

    def looped(net):
        mem1 = mem2 = torch.zeros(0, device=args.device)
        history = []
        for x_t in x:
            s, mem1 = net[1](net[0](x_t), mem1)
            s, mem2 = net[3](net[2](s), mem2)
            history.append(mem2)
        return torch.stack(history)

    def unrolled(net):
        net[1].reset_mem(), net[3].reset_mem()
        s, _ = unroll(net[1], net[0](x))
        return unroll(net[3], net[2](s))[1]

    def loss(f, net):
        return nn.functional.cross_entropy(f(net).flatten(0, 1), y.repeat(STEPS))

    def train(f, net):
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-4)

        def run():
            optimiser.zero_grad()
            loss(f, net).backward()
            optimiser.step()

        return run

    def gradients(f, net):
        return torch.autograd.grad(loss(f, net), tuple(net.parameters()))

    fused = copy.deepcopy(net)
    assert len(accelerate(fused).replaced) == 2
    twins = {id(n): copy.deepcopy(n) for n in (fused, net)}
    contestants, wanted = [], gradients(looped, net)
    cases = (("unrolled", unrolled, fused), ("accelerated, in the loop", looped, fused), ("snnTorch's own", looped, net))
    for label, f, n in cases:
        error = check_gradients(f"{label}: gradient", gradients(f, n), wanted, 1e-4, 1e-3)
        extra = {"saved_bytes": harness.saved_bytes(lambda f=f, n=n: f(n), exclude=tuple(n.parameters()))[0], **error}
        contestants.append(Contestant(label, train(f, copy.deepcopy(twins[id(n)])), extra=extra))
    found = compare(contestants, **settings)
    record_goal("snnTorch, training step: times as fast, unrolled", found[2]["ratio"], 1)
    record_goal("snnTorch, bytes saved in a training step: times as few", found[2]["saved_bytes"] / found[0]["saved_bytes"], 1)
    return title, found


# ---- neurons that projects write themselves ----------------------------------------------------------------------------


class Spike(torch.autograd.Function):
    """A step function with a triangle as surrogate gradient."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z > 0).float()

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


class LIFSpike(nn.Module):
    """A neuron as published networks have it. The data are (batch, T, ...)."""

    def __init__(self, thresh=1.0, tau=0.5, soft=False, detach=False):
        super().__init__()
        self.thresh, self.tau, self.soft, self.detach = thresh, tau, soft, detach

    def forward(self, x):
        mem = 0
        spikes = []
        for t in range(x.shape[1]):
            mem = mem * self.tau + x[:, t]
            spike = Spike.apply(mem - self.thresh)
            gate = spike.detach() if self.detach else spike
            mem = mem - gate * self.thresh if self.soft else (1 - gate) * mem
            spikes.append(spike)
        return torch.stack(spikes, dim=1)


def handwritten_neurons(args, settings):
    """Neurons of published networks, a loop over T in plain PyTorch, forward and backward; saved: inputs included"""
    from sdit_kernels.compat.handwritten import accelerate

    title = f"Hand-written LIF neurons, T={T}, {args.shape}, fp32"
    x = current(args.shape[0], T, *args.shape[1:], device=args.device)
    g = torch.randn_like(x)
    contestants = []
    for name, options in {"hard reset": {}, "hard reset, detached": {"detach": True}, "soft reset": {"soft": True}}.items():
        node = LIFSpike(**options).to(args.device)
        fused = copy.deepcopy(node)
        assert accelerate(fused).replaced
        check(f"{name}: spikes", fused(x), node(x), 0, 0)
        error = check_gradients(f"{name}: gradient", *(make_forward_backward(f, [x], g)() for f in (fused, node)), 1e-4, 1e-3)
        for label, f in ((f"{name}, fused", fused), (f"{name}, its own code", node)):
            row = {"saved_bytes": count_saved_bytes(f, x), **(error if f is fused else {})}
            contestants.append(Contestant(label, make_forward_backward(f, [x], g), extra=row))
    return title, record_speedups(compare(contestants, **settings), 3, "hand-written neuron")


# ---- transformers' RWKV ------------------------------------------------------------------------------------------------


def rwkv_pair(device, **config):
    """Make a transformers model with random weights, and an accelerated copy."""
    from transformers import RwkvConfig, RwkvForCausalLM

    from sdit_kernels.compat import rwkv

    torch.manual_seed(0)
    theirs = RwkvForCausalLM(RwkvConfig(context_length=1024, bos_token_id=0, eos_token_id=None, **config))
    for p in theirs.parameters():  # some initial values are zero, and zeros would hide errors
        p.data += 0.02 * torch.randn_like(p)
    theirs = theirs.to(device)
    ours = copy.deepcopy(theirs)
    rwkv.accelerate(ours)
    return theirs, ours


def rwkv_contest(contestants, args, settings):
    """Compare with few rounds, because a call of transformers takes most of a second."""
    settings = settings | {"rounds": 3 if args.quick else 7, "min_time": settings["min_time"] / 5}
    return compare(contestants, **settings, baseline="accelerated")


def rwkv_gradients(model, *inputs, **arguments):
    """Run forward and backward pass; return the loss and the gradients of the parameters."""
    out = model(*inputs, **arguments)
    loss = out.loss if hasattr(out, "loss") else out[0].square().mean()
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def compare_with_transformers(name, theirs, ours, run, args, settings, products=None):
    """Check and time both models, and count the bytes they keep; ``products`` runs only their matrix multiplications."""
    error = check(name, run(ours), run(theirs), rtol=1e-3, atol=1e-5)
    forward = [lambda model=model: run(model, backward=False) for model in (theirs, ours)]
    saved = [harness.saved_bytes(f, [*m.parameters()])[0] for f, m in zip(forward, (theirs, ours), strict=True)]
    contestants = [
        Contestant("accelerated", lambda: run(ours), extra={"saved_bytes": saved[1]} | error),
        Contestant("transformers", lambda: run(theirs), extra={"saved_bytes": saved[0]}),
    ]
    if products:
        contestants.append(Contestant("the matrix products of both", products))
    return rwkv_contest(contestants, args, settings)


def rwkv_step(args, settings):
    """A whole model, L = 512: loss, forward and backward pass; bytes that the forward pass keeps"""
    what = "rwkv model (2, 512), 4 layers of 256 channels, forward+backward"
    if reason_if_missing("transformers"):
        record_goal(f"{what}, times transformers", None, 5)
        return skip_section(what, "transformers")
    theirs, ours = rwkv_pair(args.device, vocab_size=256, hidden_size=256, num_hidden_layers=4)
    ids = torch.randint(256, (2, 512), device=args.device)

    def run(model, backward=True):
        return rwkv_gradients(model, ids, labels=ids) if backward else model(ids, labels=ids).loss

    rows = compare_with_transformers("model", theirs.train(), ours.train(), run, args, settings)
    record_goal(f"{what}, times transformers", harness.ratio(rows, "transformers"), 5)
    return what, rows


def rwkv_layer(args, settings):
    """One time mix of the size of the 169M model, L = 512, forward and backward"""
    what = "rwkv time mix (2, 512, 768), forward+backward"
    if reason_if_missing("transformers"):
        return skip_section(what, "transformers")
    theirs, ours = (
        m.rwkv.blocks[0].attention for m in rwkv_pair(args.device, vocab_size=8, hidden_size=768, num_hidden_layers=2)
    )
    x = torch.randn(2, 512, 768, device=args.device)

    def run(layer, backward=True):
        return rwkv_gradients(layer, x) if backward else layer(x)[0]

    def products():
        y = ours.output(ours.key(x) + ours.value(x) + ours.receptance(x))
        return torch.autograd.grad(y, [p for p in ours.parameters() if p.dim() == 2], y)

    return what, compare_with_transformers("time mix", theirs, ours, run, args, settings, products)


def rwkv_decode(args, settings):
    """Inference with batch size 1: a prompt of 512 tokens, then 16 tokens one by one from its state"""
    title = "rwkv, 4 layers of 256 channels, batch 1"
    if reason_if_missing("transformers"):
        record_goal("rwkv token by token, times transformers", None, 0.9)
        return skip_section(title, "transformers")
    theirs, ours = (m.eval() for m in rwkv_pair(args.device, vocab_size=256, hidden_size=256, num_hidden_layers=4))
    ids = torch.randint(256, (1, 528), device=args.device)

    @torch.inference_mode()
    def prompt(model):
        return model(ids[:, :512], use_cache=True)

    @torch.inference_mode()
    def decode(model, state):
        state, logits = [s.clone() for s in state], []
        for t in range(512, 528):
            out = model(ids[:, t : t + 1], state=state, use_cache=True)
            state, logits = out.state, [*logits, out.logits]
        return torch.cat(logits, 1)

    first, second = prompt(ours), prompt(theirs)
    error = check("prompt", first.logits, second.logits, rtol=1e-3, atol=1e-4)
    rows = rwkv_contest(
        [Contestant("accelerated", lambda: prompt(ours), extra={"what": "prompt"} | error),
         Contestant("transformers", lambda: prompt(theirs), extra={"what": "prompt"})],
        args, settings,
    )  # fmt: skip
    error = check("decode", decode(ours, first.state), decode(theirs, second.state), rtol=1e-3, atol=1e-4)
    rows += rwkv_contest(
        [Contestant("accelerated", lambda: decode(ours, first.state), extra={"what": "16 tokens"} | error),
         Contestant("transformers", lambda: decode(theirs, second.state), extra={"what": "16 tokens"})],
        args, settings,
    )  # fmt: skip
    record_goal("rwkv token by token, times transformers", harness.ratio(rows[2:], "transformers"), 0.9)
    return title, rows


# ---- Vision-RWKV -------------------------------------------------------------------------------------------------------


def compare_with_plain(name, plain, ours, x, forms, args, settings):
    """Check and time an accelerated module, and the plain one with each of these forms of its scan (perf/vision_rwkv.py)."""

    def run(module, form=None, backward=True):
        chosen["form"] = form
        loss = module(*x).square().mean()
        return [loss, *torch.autograd.grad(loss, list(module.parameters()))] if backward else loss

    contestants = []
    for label, module, form in (("accelerated", ours, None), *((f"plain, {form}", plain, form) for form in forms)):
        error = check(label, run(module, form), run(plain, "loop"), rtol=1e-3, atol=1e-5)
        forward = functools.partial(run, module, form, backward=False)
        extra = {"saved_bytes": harness.saved_bytes(forward, [*module.parameters()])[0]} | error
        contestants.append(Contestant(label, functools.partial(run, module, form), extra=extra))
    settings = settings | {"rounds": 3 if args.quick else 7, "min_time": settings["min_time"] / 5}
    rows = compare(contestants, **settings, baseline="accelerated")
    fastest = min(rows[1:], key=lambda row: row["ratio"])
    record_goal(f"{name}: times as fast as the fastest plain form", fastest["ratio"], 1)
    record_goal(f"{name}: bytes kept, times as few as in that form", fastest["saved_bytes"] / rows[0]["saved_bytes"], 1)
    return name, rows


def accelerated_copy(module):
    from sdit_kernels.compat import vision_rwkv

    ours = copy.deepcopy(module)
    report = vision_rwkv.accelerate(ours)
    assert report.replaced and not report.left
    return ours


def vision_rwkv_step(args, settings):
    """A small Vision-RWKV, images of 224 x 224 (T = 196 tokens): forward and backward pass, and bytes that the forward keeps"""
    torch.manual_seed(0)
    plain = VisionRWKV(C=192, layers=4, key_norm=True).to(args.device)
    images = torch.randn(8, 3, 224, 224, device=args.device)
    name = "Vision-RWKV (8, 196), 4 layers of 192 channels, forward+backward"
    return compare_with_plain(name, plain, accelerated_copy(plain), (images,), FORMS, args, settings)


def vision_rwkv_layer(args, settings):
    """One spatial mix with 1024 tokens (512 x 512 pixels), forward and backward; the matrix form would take seconds a call"""
    torch.manual_seed(0)
    plain = VRWKV_SpatialMix(192).to(args.device)
    x = torch.randn(2, 1024, 192, device=args.device)
    name = "Vision-RWKV's spatial mix (2, 1024, 192), forward+backward"
    return compare_with_plain(name, plain, accelerated_copy(plain), (x, (32, 32)), ("cumulative sums", "loop"), args, settings)


SECTIONS = {
    f.__name__: f
    for f in (
        jelly_neurons, jelly_levels, jelly_models, published_models, snn_neurons, snn_synaptic, snn_model, handwritten_neurons,
        rwkv_step, rwkv_layer, rwkv_decode, vision_rwkv_step, vision_rwkv_layer,
    )
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, SECTIONS))
