"""Networks with the structure of published ones: every neuron runs on the kernels, and the results are the library's.

Compared are the libraries' own neurons and the accelerated ones, in the networks of perf/networks.py.
"""

import contextlib
import copy
import types
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from perf import networks
from perf.peers import clock_driven
from sdit_kernels.compat import clock_driven as ours
from sdit_kernels.compat import rwkv, snntorch, spikingjelly

CLOCK_DRIVEN = ["Spikformer", "QKFormer", "SpikeDrivenTransformer", "SEWResNet", "SpikeGPT"]
NAMES = [*CLOCK_DRIVEN, "SpikingResformer", "SnnTorchNet"]


def make(name, jelly=None):
    """Return a network, a function that resets it, and a function that accelerates it and returns the report."""
    torch.manual_seed(0)
    if name in CLOCK_DRIVEN:
        jelly = jelly or clock_driven()
        if jelly is None:
            pytest.skip("SpikingJelly 0.0.0.0.12 is not in build/peers (make peers)")
        accelerate = [spikingjelly.accelerate, rwkv.accelerate] if name == "SpikeGPT" else [spikingjelly.accelerate]
        return getattr(networks, name)(jelly), jelly.functional.reset_net, accelerate
    if name == "SpikingResformer":
        pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed (make peers)")
        from spikingjelly.activation_based import functional, neuron, surrogate

        def node():
            return neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")

        return networks.SpikingResformer(node), functional.reset_net, [spikingjelly.accelerate]
    pytest.importorskip("snntorch", reason="snntorch is not installed (make peers)")
    from snntorch import Leaky, surrogate

    net = networks.SnnTorchNet(lambda: Leaky(beta=0.9, threshold=0.3, spike_grad=surrogate.atan()))
    return net, lambda net: None, [snntorch.accelerate]


def data(name, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    if name == "SpikeGPT":
        return torch.randint(50, (2, 12), generator=draw)
    side = 28 if name == "SnnTorchNet" else 16
    return 2 * torch.randn(2, 1, side, side, generator=draw, dtype=dtype)


def run_accelerated(accelerate, net):
    reports = [function(net) for function in accelerate]
    neurons = [m for m in net.modules() if type(m).__name__ in ("Leaky", "LIFNode") or "MultiStep" in type(m).__name__]
    assert len(reports[0].replaced) == len(neurons) >= 3 and not any(report.left for report in reports), reports
    return net


def train(net, reset, name, dtype, steps=3, autocast=None, scaler=None):
    """Train for some steps. Return the outputs and the gradients of the first step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    outputs, gradients = [], []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
            y = net(data(name, dtype, step))
            loss = (y.float() if autocast else y).square().mean() - y.mean()
        (scaler.scale(loss) if scaler else loss).backward()
        gradients = gradients or [p.grad.clone() for p in net.parameters()]
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        reset(net)
        outputs.append(y.detach())
    return outputs, gradients


@contextlib.contextmanager
def on_the_kernels():
    """Make the warnings of neurons that run a library's own code errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* runs .*own code")
        yield


@pytest.mark.parametrize("name", NAMES)
def test_equal_in_float64(name):
    """Outputs, gradients, three training steps: the library's own neurons, these accelerated, and ours without the library."""
    net, reset, accelerate = make(name)
    net.double()
    runs = [(run_accelerated(accelerate, copy.deepcopy(net)), reset)]
    if name in CLOCK_DRIVEN:
        served = make(name, ours)[0].double()
        served.load_state_dict(net.state_dict())
        runs.append((served, ours.functional.reset_net))
    wanted = train(net, reset, name, torch.float64)
    for fused, reset_fused in runs:
        with on_the_kernels():
            found = train(fused, reset_fused, name, torch.float64)
        loose = name == "SnnTorchNet"  # snnTorch's own spikes are float32, and so are the gradients that pass through them
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if loose else {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close(found, wanted, **tolerance, check_dtype=not loose)
        torch.testing.assert_close(fused.state_dict(), net.state_dict(), **tolerance)


class Recorder:
    """Records the input and the output of every neuron of a network."""

    def __init__(self, net):
        self.calls = {}
        for name, module in net.named_modules():
            if hasattr(module, "surrogate_function"):
                module.register_forward_hook(lambda m, x, y, name=name: self.calls.update({name: (x[0].detach(), y.detach())}))


@pytest.mark.parametrize("name", [*CLOCK_DRIVEN, "SpikingResformer"])
def test_spikes_in_float32(name):
    """Given the same inputs, a neuron's spikes are equal wherever |h - v_threshold| > 1e-5, now and in all earlier steps."""
    net, reset, accelerate = make(name)
    recorder = Recorder(net)
    net(data(name, torch.float32))
    reset(net)
    fused = run_accelerated(accelerate, copy.deepcopy(net))
    nodes = dict(fused.named_modules())
    assert len(recorder.calls) >= 4
    for key, (x, spikes) in recorder.calls.items():
        node = nodes[key]
        node._forward_hooks.clear()
        node.reset()
        with on_the_kernels():
            found = node(x)
        h = torch.zeros_like(x[0], dtype=torch.float64)
        near = torch.zeros_like(h, dtype=torch.bool)
        leak = 0.5 if hasattr(node, "tau") else 1.0
        for t in range(x.shape[0]):
            h = h + leak * (x[t] - h) if hasattr(node, "tau") else h + x[t]
            near |= (h - node.v_threshold).abs() <= 1e-5
            assert torch.equal(found[t][~near], spikes[t][~near]), (key, t)
            h = torch.where(spikes[t] > 0, 0.0, h)
        assert (found != spikes).float().mean() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name):
    """Three steps under autocast, in bfloat16, and in float16 with a GradScaler, with reset between the steps."""
    net, reset, accelerate = make(name)
    run_accelerated(accelerate, net)
    for dtype, scaler in ((torch.bfloat16, None), (torch.float16, torch.amp.GradScaler("cpu", init_scale=256.0))):
        with on_the_kernels():
            outputs, gradients = train(net, reset, name, torch.float32, autocast=dtype, scaler=scaler)
        assert all(t.isfinite().all() for t in (*outputs, *gradients)) and not any((g == 0).all() for g in gradients[:2])


@pytest.mark.parametrize("name", CLOCK_DRIVEN)
def test_activation_checkpointing(name):
    """With the reset inside the checkpointed function, its second run starts from the same state.

    Checkpointed is each block, or the whole network if it has no such blocks. The other two networks have more state than
    their neurons: SpikingResformer follows firing rates, and snnTorch's membranes keep the shape of the last call.
    """
    net, reset, accelerate = make(name)
    run_accelerated(accelerate, net.double())
    wanted = train(copy.deepcopy(net), reset, name, torch.float64, steps=1)

    def forward(self, x):
        def run(x):
            reset(self)
            return type(self).forward(self, x)

        return checkpoint(run, x, use_reentrant=False)

    blocks = [module for module in net.modules() if isinstance(module, networks.Residual | networks.SEWBlock)]
    for module in blocks or [net]:
        module.forward = types.MethodType(forward, module)
    torch.testing.assert_close(train(net, reset, name, torch.float64, steps=1), wanted)


def test_a_replica_of_data_parallel_has_its_own_state():
    """DataParallel copies a module shallowly for every call; the state of the copies is lost, as SpikingJelly's is."""
    node = ours.MultiStepLIFNode()
    x = torch.randn(3, 2, 5)
    node(x)
    v = node.v
    replica = node._replicate_for_data_parallel()
    with on_the_kernels():
        replica(x)
    assert node.v is v and replica.v is not v


def test_spikegpt_without_the_cuda_extension():
    """RUN_CUDA of compat.rwkv under the name that the layer calls, without accelerate."""
    net = make("SpikeGPT", ours)[0]
    tokens = data("SpikeGPT", None)
    wanted = net(tokens)
    ours.functional.reset_net(net)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "RUN_CUDA", rwkv.RUN_CUDA)
        torch.testing.assert_close(net(tokens), wanted, rtol=1e-4, atol=1e-4)


def test_a_network_keeps_less():
    """Autograd keeps fewer bytes for every network of clock_driven."""
    from perf.harness import saved_bytes

    for name in CLOCK_DRIVEN:
        net, reset, accelerate = make(name)
        fused = run_accelerated(accelerate, copy.deepcopy(net))
        x = data(name, torch.float32)
        kept = [saved_bytes(lambda n=n, x=x: n(x), exclude=tuple(n.parameters()))[0] for n in (fused, net)]
        assert kept[0] < 0.85 * kept[1], (name, kept)
