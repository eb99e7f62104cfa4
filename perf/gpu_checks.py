"""Check each op on tensors of a device, at the sizes of real models.

Each check takes (device, small) and returns figures, or raises AssertionError. perf/gpu_suite.py runs each in its own process.
The tests run them on the CPU with small sizes, so that they keep working.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from perf import bench_sdit, bench_wkv, harness, ops
from perf.ops import HALF, OPS, check_against_definition, current, decay_and_bonus, normal, rms_error
from perf.peers import wkv_then_lif
from sdit import PRESETS
from sdit.checkpoint import load_model
from sdit.data import Images
from sdit.plot import read_metrics
from sdit.sample import sample
from sdit.train import TrainSettings, train
from sdit_kernels import (
    adlif,
    cuba,
    lapicque,
    leaky,
    lif,
    lif_rate,
    neuron,
    nn,
    relu_squared,
    spiking_wkv,
    token_shift,
    wkv,
    wkv_step,
    wkv_step_,
)
from sdit_kernels.compat.spikingjelly import accelerate
from sdit_kernels.tuning import tuned


def values_lif(device, small):
    shape = (2, 37, 48) if small else (8, 394, 384)
    found = {}
    for dtype in (torch.float32, *HALF):
        x = current(4, *shape, device=device, dtype=dtype)
        found |= check_against_definition(f"lif {dtype}", lif, [x], exact_output=True)
        gate, residual = normal(*shape, device=device, dtype=dtype), normal(*shape, device=device, dtype=dtype, seed=1)
        found |= check_against_definition(
            f"lif_rate {dtype}", lambda x, r, g: lif_rate(x, 4, r, g, tau=4.0), [x[0].detach().requires_grad_(), residual, gate]
        )
    x = current(4, *shape, device=device)
    long = current(37, *shape[:2], 64, device=device)
    found |= check_against_definition("lif, 37 steps, soft reset", lambda x: lif(x, v_reset=None, surrogate="sigmoid"), [long])
    for levels in ((0, 4), "ternary"):  # h / v_threshold is rounded as IEEE 754 says
        found |= check_against_definition(
            f"lif, levels {levels}",
            lambda x, levels=levels: lif(x, v_threshold=0.9, v_reset=None, levels=levels),
            [x],
            exact_output=True,
        )
    v = normal(*shape, device=device, scale=0.1)
    tau = (torch.rand(shape[-1], device=device) + 1.5).requires_grad_()
    found |= check_against_definition(
        "lif, learnt tau, states", lambda x, v, tau: lif(x, v, tau=tau, return_v=True, detach_reset=True), [x, v, tau]
    )
    beta = torch.rand(shape[-1], device=device).requires_grad_()
    found |= check_against_definition(
        "leaky, learnt beta, states", lambda x, v, b: leaky(x, v, beta=b, return_v_seq=True), [x, v, beta]
    )
    found |= check_against_definition(
        "leaky, 37 steps, zeroed at once", lambda x: leaky(x, beta=0.5, reset="zero", reset_delay=False), [long]
    )
    half = torch.full((shape[-1],), 0.5, device=device, requires_grad=True)  # no step rounds
    own = neuron.define(_own, ("v", "b"), ("beta", "k"))
    for name, call in {
        "cuba": lambda x, p: cuba(x, beta_i=p, beta=0.5, return_state_seq=True),
        "adlif": lambda x, p: adlif(x, beta=0.5, beta_w=p, a=0.5, b=1.0, return_state_seq=True),
        "lapicque": lambda x, p: (*lapicque(x, R=2 * p, C=2.0, return_v_seq=True), ()),
        "a neuron of the user": lambda x, p: own(x, beta=p, k=0.5, return_state_seq=True),
    }.items():
        found |= check_against_definition(name, lambda x, p, call=call: _flat(*call(x, p)), [x, half])
    return found


def _own(x, s, p, o):
    h = p.beta * s.v + x
    fired = o.fire(h - 1.0 - s.b)
    return fired, (o.where(fired, 0.0, h), 0.5 * s.b + p.k * fired)


def _flat(s, *states):
    return s, *(t for group in states for t in (group if isinstance(group, tuple) else (group,)))


def values_wkv(device, small, dtypes=(torch.float32,)):
    B, L, C = (2, 37, 48) if small else (8, 394, 384)
    found = {}
    for dtype in dtypes:
        k, v, r = (normal(B, L, C, device=device, dtype=dtype, seed=i) for i in range(3))
        p = decay_and_bonus(C, device)
        for algorithm in ("serial", "chunked"):
            for gate in (False, True):
                leaves = [*p, k, v, r][: 5 if gate else 4]

                def f(d, u, k, v, r=None, algorithm=algorithm):
                    return wkv(d, u, k, v, r=r, algorithm=algorithm)

                found |= check_against_definition(f"wkv {algorithm}{', gate' * gate} {dtype}", f, leaves)
    return found


def values_wkv_half(device, small):
    return values_wkv(device, small, HALF)


def values_wkv_states(device, small):
    B, L, C = (2, 37, 48) if small else (4, 300, 384)
    k, v = (normal(B, L, C, device=device, seed=i) for i in range(2))
    p = decay_and_bonus(C, device)
    state = [normal(B, C, device=device, seed=i) for i in (3, 4)]
    packed = [t.detach().reshape(1, B * L, C).requires_grad_() for t in (k, v)]
    ends = torch.tensor([0, 5, 5, L // 2, B * L], device=device)

    def with_states(algorithm, d, u, k, v, ybar, lse):
        y, state = wkv(d, u, k, v, state=(ybar, lse), return_state=True, algorithm=algorithm)
        return y, *state

    def both_ways(algorithm, *leaves):
        return wkv(*leaves, bidirectional=True, algorithm=algorithm)

    def in_pieces(algorithm, *leaves):
        return wkv(*leaves, cu_seqlens=ends, max_seqlen=B * L, algorithm=algorithm)

    found = {}
    for f, leaves in ((with_states, [*p, k, v, *state]), (both_ways, [*p, k, v]), (in_pieces, [*p, *packed])):
        for algorithm in ("serial", "chunked"):
            found |= check_against_definition(f"wkv {algorithm} {f.__name__}", functools.partial(f, algorithm), leaves)
    return found


def steep_decays(device, small):
    """Check a decay of 1e20: a token only sees itself and the nearest unmasked key, and 1e20 causes no rounding error."""
    C = 48
    k, v = (normal(2, 21, C, device=device, seed=i) for i in range(2))
    k.data[:, 3:5], k.data[1, 15:] = -torch.inf, -torch.inf
    u, w = decay_and_bonus(C, device, False)[1], torch.full((C,), -1e20, device=device)
    found = {}
    for algorithm in ("serial", "chunked"):
        for both in (False, True):

            def f(k, v, a=algorithm, b=both):
                return wkv(None, u.to(k.dtype), k, v, log_decay=w.to(k.dtype), bidirectional=b, algorithm=a)

            found |= check_against_definition(f"wkv {algorithm}{', bidirectional' * both}", f, [k, v])
    return found


def accuracy(device, small):
    args = argparse.Namespace(device=device, dtype=torch.float32, quick=small)
    before = len(harness.goals)
    _, rows = bench_wkv.accuracy(args, {})
    missed = [g for g in harness.goals[before:] if g.startswith("FAIL")]
    del harness.goals[before:]
    assert not missed, missed
    return {row.pop("name"): row for row in rows}


def values_spiking_wkv(device, small):
    """Check spiking_wkv against wkv followed by lif. Spikes within rounding of the threshold may differ, so also gradients."""
    L, C = (21, 48) if small else (131, 384)

    def chain(d, u, *data):
        return wkv_then_lif(d, u, *(t.float() for t in data)).to(data[0].dtype)

    found = {}
    for B in (2, 3) if small else (4, 96):  # the first size uses the kernels of wkv and lif, the second the fused kernel
        for dtype in (torch.float32, torch.bfloat16):
            leaves = OPS["spiking_wkv"].data(B, L, C, device=device, dtype=dtype)
            s, t = spiking_wkv(*leaves), chain(*leaves)
            same = (s == t).float().mean().item()
            g = torch.randn_like(s)
            errors = [rms_error(a, b) for a, b in zip(torch.autograd.grad(s, leaves, g), torch.autograd.grad(t, leaves, g))]
            assert same > 0.9999, f"spikes agree in {same:.4%}"
            assert max(errors) < (0.02 if dtype == torch.float32 else 0.03), errors
            found[f"B={B}, {dtype}"] = {"spikes_equal": same, "gradient_errors": errors}
    return found


def values_mix(device, small):
    found = {}
    for C in (48, 40) if small else (384, 1536, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(2, 37 if small else 394, C, device=device, dtype=dtype)
            mixes = [torch.rand(C, device=device).requires_grad_() for _ in range(3)]
            for eps in (None, 1e-6):
                f = functools.partial(token_shift, norm_eps=eps)
                found |= check_against_definition(f"token_shift{', norm' * bool(eps)}, C={C}, {dtype}", f, [x, *mixes])
            if dtype == torch.float32:

                def f(x, *mixes):
                    return token_shift(x, *mixes, norm_eps=1e-6, dtype=torch.bfloat16 if x.dtype == torch.float32 else None)

                found |= check_against_definition(f"token_shift, norm, C={C}, bfloat16 of {dtype}", f, [x, *mixes])
            found |= check_against_definition(f"relu_squared, C={C}, {dtype}", relu_squared, [x])
    return found


def calls(device, small):
    return ops.calls((2, 21, 48) if small else harness.SHAPE, device)


def run(f, leaves):
    out = f(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


def repeatable(device, small):
    """Check that repeated calls agree bit for bit, also while other work loads the device."""
    for name, (f, leaves) in calls(device, small).items():
        first = run(f, leaves)
        for _ in range(3):
            assert all(map(torch.equal, first, run(f, leaves))), f"{name} differs from run to run"
    return {"ops": len(calls(device, True))}


def no_host_sync(device, small):
    if device == "cpu":
        small = True
    ops = calls(device, small)
    for f, leaves in ops.values():
        run(f, leaves)  # compile
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for name, (f, leaves) in ops.items():
            try:
                run(f, leaves)
            except RuntimeError as e:
                raise AssertionError(f"{name}: {e}") from None
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {"ops": len(ops)}


def side_stream(device, small):
    """Check that an op on a side stream reads the inputs that the same stream writes just before."""
    if device == "cpu":
        return {"note": "needs a GPU"}
    for name, (f, leaves) in calls(device, small).items():
        want = run(f, leaves)
        stream = torch.cuda.Stream()
        late = [torch.full_like(t, float("nan")).requires_grad_() for t in leaves]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                for a, b in zip(late, leaves):
                    a.copy_(b)
            got = run(f, late)
        stream.synchronize()
        assert all(map(torch.equal, want, got)), f"{name} does not keep to its stream"
    return {}


def on_its_stream(device, small):
    """Run the checks that make the same calls in one process, so that the kernels compile once."""
    for check in (repeatable, no_host_sync, side_stream, cuda_graph):
        check(device, small)
    return {"ops": len(calls(device, True))}


def cuda_graph(device, small):
    """Capture forward and backward pass in a CUDA graph and replay it on other inputs; also decoding with wkv_step_."""
    if device == "cpu":
        return {"note": "needs a GPU"}
    found = {}
    for name, (f, leaves) in calls(device, small).items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(f, leaves)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = run(f, leaves)
        with torch.no_grad():
            leaves[-1].add_(0.25)
        graph.replay()
        torch.cuda.synchronize()
        got = [t.clone() for t in static]
        assert all(map(torch.equal, got, run(f, leaves))), f"{name}: the replay differs"
    B, C = 4, 768
    d, u = decay_and_bonus(C, device, False)
    k, v = (normal(B, C, device=device, seed=i).detach() for i in range(2))
    state = torch.zeros(B, C, device=device), torch.full((B, C), -torch.inf, device=device)
    other = None
    wkv_step_(d, u, k, v, tuple(t.clone() for t in state))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wkv_step_(d, u, k, v, state)
    for i in range(5):
        k.copy_(normal(B, C, device=device, seed=10 + i))
        graph.replay()
        want, other = wkv_step(d, u, k, v, other)
        assert torch.equal(out, want), f"token {i} of a replayed wkv_step_ differs"
    return found


def compiled(device, small):
    """Check torch.compile(fullgraph=True) of a block that uses the ops, forward and backward, for two batch sizes."""
    torch.manual_seed(0)
    C = 32 if small else 384

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.channel = nn.TimeMix(C, neuron=nn.LIFRate()), nn.ChannelMix(C, neuron=nn.LIFRate())

        def forward(self, x):
            x = self.time(x, residual=x)
            x = x[0] if isinstance(x, tuple) else x
            x = self.channel(x, residual=x)
            return x[0] if isinstance(x, tuple) else x

    block = Block().to(device)
    fast = torch.compile(block, fullgraph=True, backend="aot_eager" if small else "inductor", dynamic=True)
    worst = 0.0
    for batch in (2, 3):
        x = normal(batch, 33, C, device=device, seed=batch)
        a = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
        b = torch.autograd.grad(fast(x).square().sum(), [x, *block.parameters()])
        worst = max(worst, *(rms_error(p, q.double()) for p, q in zip(b, a)))
    assert worst < 0.05, f"relative rms {worst:.2e} between a compiled block and the block"  # rounding flips some spikes
    return {"gradients_rms": worst}


def autocast(device, small):
    """Check that the loss of a training step of SDiT in bf16 is close to the loss in fp32."""
    model, inputs = bench_sdit.make_case(device, *((1, "digits") if small else (16,)))
    target = torch.zeros((), device=device)
    losses = [
        bench_sdit.run_training_step(copy.deepcopy(model), inputs, target, dtype=dtype).item()
        for dtype in (None, torch.bfloat16)
    ]
    assert abs(losses[1] / losses[0] - 1) < 0.1, f"loss {losses[0]:.4g} in fp32, {losses[1]:.4g} in bf16"
    return {"loss_fp32": losses[0], "loss_bf16": losses[1]}


def fused_layers(device, small):
    """Check convolutions, norms, neurons and a pooling with fuse and packed: float64 results, kept bytes in float32."""
    C, size, batch = (4, 8, 2) if small else (64, 32, 64)

    def stack(inputs):
        block = torch.nn.Sequential(torch.nn.Conv2d(inputs, C, 3, padding=1, bias=False), torch.nn.BatchNorm2d(C))
        return nn.OverTime(block), nn.LIF(detach_reset=True), nn.OverTime(torch.nn.MaxPool2d(2))

    net = torch.nn.Sequential(*stack(3), *stack(C)).to(device)
    fused = copy.deepcopy(net)
    report = accelerate(fused, fuse=True, packed=True)
    assert not report.left, report
    x, found = torch.rand(4, batch, 3, size, size, device=device), []
    for n in (net, fused):
        n.double()
        y = n(x.double())
        found.append([y, *torch.autograd.grad(y.square().mean(), list(n.parameters())), *n.buffers()])
        nn.reset(n)
        n.float()
    worst = max(rms_error(b, a) for a, b in zip(*found) if a.is_floating_point() and a.abs().max())
    assert worst < 1e-8, f"relative rms {worst:.2e} between a fused model and the model, in float64"
    kept = [harness.allocated_bytes(lambda n=n: (n(x), nn.reset(n))[0], device)["kept_bytes"] for n in (net, fused)]
    assert kept[1] < kept[0], f"{kept[1]} bytes kept fused and packed, {kept[0]} before"
    return {"rms_error": worst, "kept_bytes": kept[0], "kept_bytes_fused_and_packed": kept[1]}


@contextlib.contextmanager
def graphs(device):
    """Make --graph run on the CPU as well, where a replay runs the function again. It changes nothing on a GPU."""
    if device != "cpu":
        yield
        return
    again = SimpleNamespace(warm_up=lambda work: work(), record=lambda work: work)
    with contextlib.ExitStack() as stack:
        for module in ("train", "sample"):
            stack.enter_context(mock.patch(f"sdit.{module}.make_recorder", lambda graph, *_: again if graph else None))
        yield


def sdit_graph(device, small):
    """Check `sdit train --graph` and `sdit sample --graph` against the same without it: losses, weights, images."""
    config = PRESETS["digits"] if small else dataclasses.replace(PRESETS["fashion_mnist"], variant="improved")
    if small:
        config = dataclasses.replace(config, dim=32, depth=2)
    settings = TrainSettings.of(config, steps=8, batch_size=16, log_every=1, sample_every=0, accumulate=2, warmup=4)
    modes = {"eager": {}, "graph": {"graph": True}, "graph, bf16": {"graph": True, "bf16": True}, "bf16": {"bf16": True}}
    modes |= {} if small else {"graph, compiled": {"graph": True, "compile": True}, "compiled": {"compile": True}}
    generator, size = torch.Generator().manual_seed(0), config.image_size
    pixels = torch.randint(256, (64, size, size, 1), dtype=torch.uint8, generator=generator)
    data = Images("random", pixels, torch.arange(64) % 10, tuple("0123456789"))
    losses, weights, found = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, graphs(device):
        for name, changes in modes.items():
            run = Path(folder) / name
            train(config, dataclasses.replace(settings, **changes), run, data=data, device=device, progress=False)
            losses[name] = torch.tensor([row["loss"] for row in read_metrics(run)])
            weights[name] = torch.cat([p.flatten() for p in load_model(run, ema=False).parameters()])
        for name in (name for name in modes if name.startswith("graph")):
            other = name.removeprefix("graph").removeprefix(", ") or "eager"
            loss = (losses[name] / losses[other] - 1).abs().max().item()
            # AdamW moves a weight with a tiny gradient by the learning rate, so rounding may move it either way
            moved = ((weights[name] - weights[other]).norm() / weights[other].norm()).item()
            assert loss < 0.02 and moved < 0.02, f"{name}: losses differ by {loss:.2e}, weights by {moved:.2e}"
            found[name] = {"loss_difference": loss, "weights_difference": moved}
        model = load_model(Path(folder) / "eager").to(device)
        for guidance in (1.0, 2.0):
            how = dict(sampler="dpm++", steps=6, guidance=guidance, batch_size=4)
            images = [sample(model, [0, 1, 2, 3, 4, 5], graph=graph, **how) for graph in (False, True)]
            error = (images[0] - images[1]).abs().max().item()
            assert error < 0.05, f"guidance {guidance}: images differ by {error:.2e}"
            found[f"images, guidance {guidance}"] = error
    return found


def compat(device, small):
    """Check models of other libraries on the device, before and after ``accelerate``, in float64: outputs and gradients."""
    found, shape = {}, (4, 3, 33) if small else (16, 64, 1024)

    def agree(name, before, after, x):
        x = x.double().requires_grad_()
        results = []
        for f in (before, after):
            y = f(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        found[name] = max(rms_error(b, a) for a, b in zip(*results))
        assert found[name] < 1e-8, f"{name}: relative rms {found[name]:.2e} between a fused neuron and the neuron"

    x = current(*shape, device=device, requires_grad=False)
    if not harness.reason_if_missing("spikingjelly"):
        from spikingjelly.activation_based import functional
        from spikingjelly.activation_based import neuron as jelly

        for kind in (jelly.LIFNode, jelly.IFNode, jelly.ParametricLIFNode):
            node = kind(step_mode="m", detach_reset=True).to(device).double()
            fused = torch.nn.Sequential(copy.deepcopy(node))
            assert not accelerate(fused).left

            def run(x, net=None):
                functional.reset_net(net)
                return net(x)

            agree(kind.__name__, functools.partial(run, net=node), functools.partial(run, net=fused), x)
    if not harness.reason_if_missing("snntorch"):
        import snntorch

        from sdit_kernels.compat import snntorch as compat_snntorch

        for kind, how in ((snntorch.Leaky, {"beta": 0.9}), (snntorch.Synaptic, {"alpha": 0.8, "beta": 0.9})):
            node = kind(**how).to(device).double()
            fused = copy.deepcopy(node)
            assert compat_snntorch.accelerate(fused).replaced
            zero = torch.zeros_like(x[0], dtype=torch.float64)
            zeros = [zero] * len(how)

            def loop(x, node=node, states=zeros):
                spikes = []
                for step in x:
                    s, *states = node(step, *states)
                    spikes.append(s)
                return torch.stack(spikes)

            start = {"mem": zero} | ({"syn": zero} if len(how) > 1 else {})
            agree(kind.__name__, loop, lambda x, f=fused, s=start: compat_snntorch.unroll(f, x, **s)[0], x)
    return found or {"note": "neither spikingjelly nor snntorch is installed"}


def network(device, small):
    """Check the whole network in float64, outputs and every gradient, against its plain form."""
    return bench_sdit.check_forms_agree(device, "digits" if small else bench_sdit.PRESET)


def big_offsets(device, small):
    """Check tensors of more than 2^31 elements: the last rows equal a call on these rows alone, forward and backward."""
    rows, L, C = (3, 40, 8) if small else (350, 16384, 384)  # 2.2e9 elements
    dtype = torch.bfloat16
    x = torch.empty(rows, L, C, device=device, dtype=dtype)
    for i in range(0, rows, 10):
        x[i : i + 10].normal_()
    found = {"elements": x.numel()}

    def far(name, f, x, last, g_last):
        """Compare a call on x with a call on ``last(x)``, the last part of x; also compare the backward pass."""
        x.requires_grad_()
        y = f(x)
        dx = torch.autograd.grad(y, x, torch.ones((), device=device, dtype=y.dtype).expand(y.shape))[0]
        part = last(x).detach().clone().requires_grad_()
        z = f(part)
        dz = torch.autograd.grad(z, part, torch.ones_like(z))[0]
        assert torch.equal(g_last(y), z) and torch.equal(last(dx), dz), f"{name}: wrong beyond 2^31 elements"
        found[name] = "equal"

    d, u = decay_and_bonus(C, device, False)
    batch, time_ = (lambda t: t[-1:]), (lambda t: t[:, -1:])
    far("relu_squared", relu_squared, x, batch, batch)
    far("lif_rate", lif_rate, x, batch, batch)
    far("token_shift", lambda x: token_shift(x, torch.full((C,), 0.3, device=device), norm_eps=1e-6)[0], x, batch, batch)
    far("wkv serial", lambda k: wkv(d, u, k, k, algorithm="serial"), x, batch, batch)
    four = x.detach().view(-1)[: x.numel() // 4 * 4].view(4, -1, 4 if small else 64)
    far("lif", lif, four, time_, time_)
    five = x.detach()[: rows // 2 * 2].view(2, rows // 2, L, C)
    with tuned(spiking_min_channels_fused=0):  # select the fused kernel, which so few sequences would not use
        far("spiking_wkv", lambda k: spiking_wkv(d, u, k, k), five, time_, time_)
    return found


CHECKS = {
    f.__name__: f
    for f in (
        on_its_stream, values_wkv_half, values_wkv_states, values_wkv, network, autocast, fused_layers, values_spiking_wkv,
        compiled, big_offsets, steep_decays, values_mix, values_lif, accuracy, sdit_graph, compat,
    )
}  # fmt: skip
