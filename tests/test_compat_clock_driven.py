"""Compare compat.clock_driven with SpikingJelly 0.0.0.0.12, and test install()."""

import copy
import doctest
import importlib
import inspect
import io
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import weakref
from itertools import product

import numpy
import pytest
import torch
from helpers import ROOT, python
from torch import nn

from perf.peers import CLOCK_DRIVEN, clock_driven
from sdit_kernels import backend
from sdit_kernels.compat import clock_driven as ours
from sdit_kernels.compat import uninstall
from sdit_kernels.compat.__main__ import main as command
from sdit_kernels.compat.clock_driven import cext_neuron
from sdit_kernels.compat.spikingjelly import accelerate, restore

PEER = CLOCK_DRIVEN.parent
NODES = ["IFNode", "LIFNode", "ParametricLIFNode", "MultiStepIFNode", "MultiStepLIFNode", "MultiStepParametricLIFNode"]
HIDE_SPIKINGJELLY = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name == "spikingjelly" else find(name, *rest)
)
"""
SURROGATES = [
    "PiecewiseQuadratic", "PiecewiseExp", "Sigmoid", "SoftSign", "ATan", "NonzeroSignLogAbs", "Erf", "PiecewiseLeakyReLU",
    "SquarewaveFourierSeries", "S2NN", "QPseudoSpike",
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    """Return SpikingJelly 0.0.0.0.12's clock_driven."""
    found = clock_driven()
    if found is None:
        pytest.skip("SpikingJelly 0.0.0.0.12 is not in build/peers (make peers)")
    return found


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# ---- names and signatures --------------------------------------------------------------------------------------------------


def public(module):
    """Return the functions and classes that a module defines."""
    return {
        name: value for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    }  # fmt: skip


@pytest.mark.parametrize("file", ["base", "encoding", "functional", "layer", "neuron", "surrogate"])
def test_names_and_arguments(theirs, file):
    ours_module, module = getattr(ours, file), getattr(theirs, file)
    served = 0
    for name, value in public(module).items():
        try:
            mine = getattr(ours_module, name)
        except ImportError as error:
            assert name in str(error)
            continue
        served += 1
        if isinstance(value, type) and issubclass(value, torch.autograd.Function):
            continue
        signatures = [inspect.signature(f).parameters.values() for f in (mine, value)]
        a, b = ([(p.name, repr(p.default)) for p in signature] for signature in signatures)
        assert a == b or name in ("StatelessEncoder", "PoissonEncoder"), name  # they take nothing
    assert served >= {"base": 1, "encoding": 6, "functional": 15, "layer": 16, "neuron": 8, "surrogate": 20}[file]


@pytest.mark.parametrize("name", NODES)
def test_repr_and_state_dict(theirs, name):
    for settings in ({}, {"v_reset": None, "detach_reset": True}, {"v_threshold": 0.5, "v_reset": -0.25}):
        a, b = getattr(ours, name)(**settings), getattr(theirs.neuron, name)(**settings)
        assert repr(a) == repr(b)
        a(normal(3, 2, 2, dtype=torch.float32))
        assert repr(a) == repr(b)
        assert a.state_dict().keys() == b.state_dict().keys()
        assert dict(a.named_memories()).keys() == dict(b.named_memories()).keys()


def test_every_name_that_is_not_served_is_named():
    with pytest.raises(ImportError, match="QIFNode in neuron"):
        ours.neuron.QIFNode  # noqa: B018
    with pytest.raises(ImportError, match="rnn in clock_driven"):
        from sdit_kernels.compat.clock_driven import rnn  # noqa: F401
    assert not hasattr(ours, "nothing")


# ---- neurons -----------------------------------------------------------------------------------------------------------------


def run(node, x, calls=2):
    """Run a neuron on x, (T, B, C), in some calls. Return spikes, v, v_seq and the gradients of x and of w."""
    x = x.clone().requires_grad_()
    node = node.to(x.dtype)
    spikes, v_seq = [], []
    if type(node).__name__.startswith("MultiStep"):
        for part in x.chunk(calls):
            spikes.append(node(part))
            v_seq.append(node.v_seq)
    else:
        for step in x:
            spikes.append(node(step)[None])
            v_seq.append(node.v[None])
    spikes, v_seq = torch.cat(spikes), torch.cat(v_seq)
    loss = (spikes * normal(*spikes.shape, seed=1)).sum() + (v_seq * normal(*spikes.shape, seed=2)).sum() + node.v.sum()
    return spikes, node.v, v_seq, *torch.autograd.grad(loss, [x, *node.parameters()], allow_unused=True)


def same(a, b, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # our neurons run on the kernels
        found = run(a, x)
    for mine, wanted in zip(found, run(b, x), strict=True):
        if wanted is not None:
            close(mine, wanted)


def settings_of(name):
    decays = [{}] if "IF" in name and "LIF" not in name else [{"decay_input": decay} for decay in (True, False)]
    for v_reset, detach, decay in product((0.0, None, -0.5), (False, True), decays):
        yield {"v_reset": v_reset, "detach_reset": detach} | decay


@pytest.mark.parametrize("name", NODES)
def test_every_option(theirs, name):
    """Every combination of options, with the plain form of lif; time constants that are no power of two."""
    for settings in settings_of(name):
        taus = {"LIF": [{"tau": 2.0}, {"tau": 3.7}], "Par": [{"init_tau": 2.0}, {"init_tau": 5.3}], "IFN": [{}]}
        for tau in taus[name.removeprefix("MultiStep")[:3]]:
            every = settings | tau | {"v_threshold": 0.8}
            with backend("reference"):
                same(getattr(ours, name)(**every), getattr(theirs.neuron, name)(**every), normal(4, 2, 5) * 2)


@pytest.mark.parametrize("name", NODES)
def test_on_the_kernels(theirs, name):
    same(getattr(ours, name)(), getattr(theirs.neuron, name)(), normal(4, 2, 37) * 2)
    both = {"v_reset": None, "detach_reset": True}
    same(getattr(ours, name)(**both), getattr(theirs.neuron, name)(**both), normal(4, 2, 37) * 2)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogates_in_a_neuron(theirs, surrogate):
    a, b = (
        module.neuron.MultiStepLIFNode(surrogate_function=getattr(module.surrogate, surrogate)()) for module in (ours, theirs)
    )
    with warnings.catch_warnings(), backend("reference"):
        warnings.simplefilter("ignore")  # those without a formula in lif run the plain code
        for mine, wanted in zip(run(a, normal(4, 2, 9) * 2), run(b, normal(4, 2, 9) * 2), strict=True):
            close(mine, wanted)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("spiking", [True, False])
def test_surrogates(theirs, surrogate, spiking):
    x = torch.cat([normal(50), torch.tensor([0.0, -0.0, 0.25, 3.0, -3.0], dtype=torch.float64)])
    for changed in ({}, {"alpha": 2.5}, {"w": 0.5, "c": 0.1}, {"n": 5, "T_period": 3.0}, {"alpha": 2.0, "beta": 0.5}):
        accepted = inspect.signature(getattr(theirs.surrogate, surrogate)).parameters.keys()
        if not changed.keys() <= accepted:
            continue
        results = []
        for module in (ours, theirs):
            function, z = getattr(module.surrogate, surrogate)(**changed, spiking=spiking), x.clone().requires_grad_()
            y = function(z)
            (grad,) = torch.autograd.grad(y.sum(), z)
            results.append((y.detach(), grad[:-5] if not spiking else grad))
            assert repr(function) == repr(getattr(theirs.surrogate, surrogate)(**changed, spiking=spiking))
        close(results[0], results[1])


def test_surrogates_without_a_formula_say_so():
    node = ours.MultiStepLIFNode(surrogate_function=ours.surrogate.S2NN())
    with pytest.warns(UserWarning, match="MultiStepLIFNode runs SpikingJelly's own code: surrogate S2NN has no formula here"):
        node(torch.rand(3, 2, 2))


def test_state_over_calls(theirs):
    """v starts as a number, stays from call to call, and reset, detach and .to() treat it as a state."""
    a, b = ours.MultiStepLIFNode(v_reset=-0.5), theirs.neuron.MultiStepLIFNode(v_reset=-0.5)
    assert a.v == b.v == -0.5 and a.v_seq is None
    x = normal(4, 3, 5)
    for node in (a, b):
        node.v = 0.25
    close(a(x), b(x))
    close(a.v, b.v)
    assert a.v.shape == (3, 5) and a.v_seq.shape == (4, 3, 5)
    a.detach()
    a.to(torch.float32)
    assert a.v.dtype == torch.float32 and not a.v.requires_grad
    ours.functional.reset_net(a)
    assert a.v == -0.5 and a.v_seq is None
    assert a(x[:, :2]).shape == (4, 2, 5)  # another batch
    with pytest.raises(ValueError, match=r"membrane potential.*\(2, 5\), got \(3, 5\): call functional.reset_net"):
        a(x)
    for node in (a, b):  # a membrane that broadcasts to the data
        node.reset()
        node.v = torch.full((5,), 0.3, dtype=torch.float64)
    close(a(x), b(x))
    close(a.v, b.v)


def test_thresholds_that_are_tensors(theirs):
    """set_threshold_margin gives every sample and class a threshold. The kernels take none, so the plain code runs."""
    labels = nn.functional.one_hot(torch.tensor([1, 0]), 5)
    nodes = ours.MultiStepIFNode(), theirs.neuron.MultiStepIFNode()
    for node, module in zip(nodes, (ours, theirs)):
        module.functional.set_threshold_margin(node, labels)
    with pytest.warns(UserWarning, match="kernels refuse its settings: v_threshold"):
        found = run(nodes[0], normal(4, 2, 5))
    for mine, wanted in zip(found, run(nodes[1], normal(4, 2, 5)), strict=True):
        close(mine, wanted.to(mine.dtype))


def test_v_seq_is_computed_when_read():
    x = normal(4, 2, 5).requires_grad_()
    node = ours.MultiStepLIFNode().double()
    node(x)
    (grad,) = torch.autograd.grad(node.v_seq.sum(), x)
    assert grad.abs().sum() > 0 and node.v_seq is node.v_seq
    y = normal(4, 2, 5)
    node.reset()
    with torch.no_grad():
        node(y)
        y.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after the call: read v_seq before"):
        node.v_seq  # noqa: B018
    with torch.inference_mode():
        node.reset()
        node(y)
        assert node.v_seq.shape == (4, 2, 5)


class Net(nn.Module):
    def __init__(self, module, node):
        super().__init__()
        self.conv = module.layer.SeqToANNContainer(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.node = node()
        self.drop = module.layer.MultiStepDropout(0.0)
        self.head = nn.Linear(3 * 16, 4)
        self.out = module.neuron.MultiStepParametricLIFNode(init_tau=2.0, surrogate_function=module.surrogate.ATan())

    def forward(self, x):
        return self.out(self.head(self.drop(self.node(self.conv(x))).flatten(2))).mean(0)


def make(module, seed=0):
    torch.manual_seed(seed)
    return Net(module, lambda: module.neuron.MultiStepLIFNode(tau=2.0, detach_reset=True)).double()


def train(net, module, steps=3):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        x, y = normal(3, 2, 1, 4, 4, seed=step) * 2, torch.tensor([0, 3])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        module.functional.reset_net(net)
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_and_checkpoints_both_ways(theirs):
    a, b = make(ours), make(theirs)
    close(train(a, ours), train(b, theirs))
    close(list(a.state_dict().values()), list(b.state_dict().values()))
    fresh_a, fresh_b = make(ours, seed=1), make(theirs, seed=1)
    for source, target in ((a, fresh_b), (b, fresh_a)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
    x = normal(3, 2, 1, 4, 4) * 2
    close(fresh_a.eval()(x), fresh_b.eval()(x))


def test_copies_pickles_and_subclasses():
    node = ours.MultiStepParametricLIFNode(init_tau=3.0)
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        node(x)
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert torch.equal(twin.v, node.v) and torch.equal(twin.v_seq, node.v_seq)
        twin.reset()
        assert "Squeeze" not in str(twin(x).grad_fn) and twin.v.shape == (2, 5)

    class Slow(ours.MultiStepLIFNode):
        def neuronal_charge(self, x):
            self.v = self.v + 0.1 * x

    class Named(ours.MultiStepLIFNode):
        def forward(self, x_seq):
            return 2 * super().forward(x_seq)

    slow = Slow()
    with pytest.warns(UserWarning, match="Slow runs its own code: Slow overrides neuronal_charge"):
        slow(x)
    torch.testing.assert_close(slow.v_seq[0], 0.1 * x[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Named()(x)
        slow.reset()
        slow(x)  # warned once per class


def test_accelerate_and_restore_name_our_neurons():
    model = nn.Sequential(ours.MultiStepLIFNode(), ours.LIFNode(surrogate_function=ours.surrogate.S2NN()))
    report = accelerate(model)
    assert report.replaced == (("0", "MultiStepLIFNode"),) and "S2NN has no formula" in report.left[0].reason
    restore(model)
    x = torch.randn(3, 2, 5, requires_grad=True)
    assert "Stack" in str(model[0](x).grad_fn)
    accelerate(model)
    model[0].reset()
    assert "Stack" not in str(model[0](x).grad_fn)


def test_errors():
    with pytest.raises(ValueError, match='backend must be "torch" or "cupy", got "lava"'):
        ours.MultiStepLIFNode(backend="lava")
    with pytest.raises(ValueError, match="backend must be .* got 'numpy'"):
        ours.MultiStepIFNode(backend="numpy")
    for name, value, error in (("tau", 1.0, ValueError), ("tau", "2", TypeError), ("v_threshold", True, TypeError)):
        with pytest.raises(error, match=name):
            ours.MultiStepLIFNode(**{name: value})
    with pytest.raises(TypeError, match="v_reset must be a number, got str"):
        ours.IFNode(v_reset="0")
    with pytest.raises(ValueError, match="init_tau must be above 1, got 0.5"):
        ours.ParametricLIFNode(init_tau=0.5)
    with pytest.raises(ValueError, match=r"x_seq must have at least two axes, .* got \(3,\)"):
        ours.MultiStepLIFNode()(torch.zeros(3))
    assert ours.MultiStepLIFNode(lava_s_cale=32).lava_s_cale == 32
    assert ours.LIFNode(cupy_fp32_inference=True).cupy_fp32_inference


def test_bfloat16_autocast_and_compile():
    linear, node = nn.Linear(5, 5), ours.MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy")
    x = torch.randn(4, 2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            spikes = node(linear(x))
        assert spikes.dtype == node.v.dtype == torch.bfloat16
        spikes.sum().backward()
        node.reset()
    wanted = node(x)
    states = node.v, node.v_seq
    node.reset()
    torch.compiler.reset()
    assert torch.equal(torch.compile(node, fullgraph=True, backend="aot_eager")(x), wanted)
    assert torch.equal(node.v, states[0]) and torch.equal(node.v_seq, states[1])


def test_v_seq_belongs_to_the_call():
    """It has the grad mode of the call, and detach and .to() treat it as a state."""
    x = normal(4, 2, 5).requires_grad_()
    node = ours.MultiStepLIFNode().double()
    node(2 * x)
    with torch.no_grad():
        assert node.v_seq.requires_grad  # a hook may read it
    node(2 * x)
    node.detach()
    assert not node.v_seq.requires_grad and copy.deepcopy(node).v_seq.shape == (4, 2, 5)
    with torch.no_grad():
        node(x)
    assert not node.v_seq.requires_grad
    node.detach()
    node(x.detach())
    node.float()
    assert node.v_seq.dtype == torch.float32
    data = torch.rand(4, 2, 5)
    node.reset()
    node(data)
    data.add_(1)
    for twin in (node, copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        with pytest.raises(RuntimeError, match="changed in place after the call"):
            twin.v_seq  # noqa: B018
    first = node.v
    node(torch.rand(4, 2, 5))
    first.zero_()  # the membrane before the call
    with pytest.raises(RuntimeError, match="changed in place after the call"):
        node.v_seq  # noqa: B018


def test_detach_and_reset_free_the_graph():
    for release in (ours.MultiStepLIFNode.detach, ours.MultiStepLIFNode.reset):
        node, x = ours.MultiStepLIFNode(), torch.rand(4, 2, 5, requires_grad=True)
        middle = 2 * x
        node(middle)
        gone = weakref.ref(middle)
        del middle
        release(node)
        assert gone() is None


@pytest.mark.parametrize("start", [numpy.float32(0.5), numpy.int64(1), 1, 0.25, torch.tensor(0.5), torch.full((3, 5), 0.25)])
def test_membranes_that_a_user_sets(theirs, start):
    """Also a membrane with more axes than a step of x."""
    x = normal(4, 5)
    a, b = ours.MultiStepLIFNode(), theirs.neuron.MultiStepLIFNode()
    a.v, b.v = start, torch.as_tensor(start).double()
    close(a(x), b(x))
    close(a.v, b.v)
    a.v = None
    with pytest.raises(TypeError, match="v of MultiStepLIFNode must be a number or a tensor, got NoneType"):
        a(x)


@pytest.mark.parametrize("shape", [(4, 0, 5), (4, 2, 0), (1, 2, 5), (100, 2, 5), (3, 2, 4, 3, 3)])
def test_layouts_and_sizes(theirs, shape):
    flipped = normal(*shape[::-1])
    for x in (
        normal(*shape),
        normal(shape[1], shape[0], *shape[2:]).transpose(0, 1),
        flipped.permute(*flipped.dim_order()[::-1]),
    ):
        a, b = ours.MultiStepLIFNode(), theirs.neuron.MultiStepLIFNode()
        with backend("reference"):
            close([a(2 * x), a.v, a.v_seq], [b(2 * x), b.v, b.v_seq])


def test_a_call_that_raises_keeps_the_membrane():
    node = ours.MultiStepIFNode()
    x = torch.rand(4, 2, 5)
    node(x)
    v = node.v
    node.v_threshold = torch.ones(3, 5)  # of another batch size
    with pytest.warns(UserWarning, match="own code"), pytest.raises(RuntimeError, match="size of tensor"):
        node(x)
    assert node.v is v


def test_replaced_methods_and_several_bases_run_their_own_code():
    class Keeps(ours.neuron.BaseNode):
        def neuronal_reset(self, spike):
            pass

    class Mixed(ours.MultiStepIFNode, Keeps):  # Keeps overrides BaseNode
        pass

    node, x = ours.MultiStepIFNode(), torch.ones(4, 1, 1)
    node.neuronal_charge = lambda x: setattr(node, "v", node.v + 0.25 * x)
    for neuron, reason, spikes in (
        (Mixed(), "Keeps overrides neuronal_reset", 4),
        (node, "neuronal_charge of Multi.* replaced", 1),
    ):
        with pytest.warns(UserWarning, match=reason):
            assert neuron(x).sum() == spikes
    accelerated = ours.MultiStepIFNode()
    accelerate(accelerated)
    accelerated.neuronal_fire = lambda: torch.zeros_like(accelerated.v)
    with pytest.warns(UserWarning, match="neuronal_fire of MultiStepIFNode is replaced on the instance"):
        assert accelerated(x).sum() == 0


def test_threads_leave_the_backend_alone():
    """Calls that run the class's own code use the backend "torch", because "cupy" needs CuPy. Other threads do not see it."""
    node, seen = ours.MultiStepLIFNode(backend="cupy", surrogate_function=ours.surrogate.S2NN()), []
    node.surrogate_function.register_forward_hook(lambda *args: seen.append(node.backend))
    with pytest.warns(UserWarning, match="own code"):
        node(torch.rand(4, 2, 5))
    assert set(seen) == {"cupy"} and node.v.shape == node.v_seq.shape[1:] == (2, 5)


# ---- tools -------------------------------------------------------------------------------------------------------------------


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 5), ours.MultiStepLIFNode(backend="cupy"), nn.Linear(5, 3), ours.MultiStepParametricLIFNode()
    )


def gradients(net, function, x):
    y = function(x)
    return [y, *torch.autograd.grad(y.sum(), list(net.parameters()))]


def test_a_net_in_the_tools_of_pytorch():
    x, net, watched = 2 * torch.randn(4, 2, 5), small_net(), []
    wanted = gradients(net, net, x)
    torch.compiler.reset()
    twin = small_net()
    assert all(map(torch.equal, gradients(twin, torch.compile(twin, fullgraph=True, backend="aot_eager"), x), wanted))
    torch.compiler.reset()
    twin = small_net()
    both = torch.compile(lambda x: (twin(x), twin[1].v_seq), fullgraph=True, backend="aot_eager")
    assert torch.equal(both(x)[1], net[1].v_seq) and torch.equal(twin[1].v, net[1].v)
    twin = small_net()
    twin[1].register_forward_hook(lambda module, args, output: watched.append((args[0], output, module.v_seq)))
    twin(x)
    net[1].reset()
    assert torch.equal(watched[0][1], net[1](watched[0][0]))
    assert torch.equal(watched[0][2], net[1].v_seq)
    with torch.no_grad():
        assert torch.equal(torch.export.export(small_net(), (x,)).module()(x), wanted[0])
        assert torch.equal(torch.jit.trace(small_net(), (x,), check_trace=False)(x), wanted[0])
        with pytest.raises(RuntimeError, match="has no ONNX operator: run torch.onnx.export under sdit_kernels.backend"):
            torch.onnx.export(small_net(), (x,), io.BytesIO(), dynamo=False)


def test_a_net_in_the_transforms_of_pytorch():
    x, net = 2 * torch.randn(4, 2, 5), small_net()
    wanted = gradients(net, net, x)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x):
        ours.functional.reset_net(net)
        return torch.func.functional_call(net, parameters, (x,)).sum()

    found = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(list(found.values()), wanted[1:])
    values = torch.func.vmap(loss, (None, 0))(parameters, torch.stack([x, -x]))
    assert values[0] == wanted[0].sum()
    ours.functional.reset_net(net)
    assert torch.equal(net(x), wanted[0])


def test_states_over_modes_and_devices():
    x, net = 2 * torch.randn(6, 2, 5), small_net()
    whole = small_net()(x)
    with torch.no_grad():
        parts = [net(x[:2])]
    with torch.inference_mode():
        parts.append(net(x[2:4]))
    parts.append(net(x[4:]))
    parts[2].sum().backward()
    assert torch.equal(torch.cat(parts), whole) and net[0].weight.grad.any()
    with torch.device("meta"):
        meta = small_net()
        assert meta(torch.empty(4, 2, 5)).shape == (4, 2, 3) and meta[1].v_seq.is_meta and repr(meta)
    node = ours.MultiStepLIFNode()
    node(x)
    assert node(x.to("meta")).is_meta and node.v.is_meta  # the membrane follows the data


@pytest.mark.parametrize("surrogate", ["S2NN", "PiecewiseLeakyReLU", "SquarewaveFourierSeries", "NonzeroSignLogAbs"])
@pytest.mark.parametrize("grad", [False, True])
def test_surrogates_without_a_formula_compile(surrogate, grad):
    torch.compiler.reset()
    function, x = getattr(ours.surrogate, surrogate)(), torch.randn(9, requires_grad=grad)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


@pytest.mark.process
def test_a_pickled_model_of_the_real_one_loads(theirs, tmp_path):
    """A whole model, saved in a process with SpikingJelly 0.0.0.0.12 between two calls, runs where only this package is."""
    program = """
import sys, torch
from torch import nn
x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
if sys.argv[1] == "save":
    from spikingjelly.clock_driven import layer, neuron, surrogate
    torch.manual_seed(0)
    nodes = neuron.IFNode(), neuron.LIFNode(v_threshold=0.2), neuron.ParametricLIFNode(v_threshold=0.1)
    net = nn.Sequential(
        layer.SeqToANNContainer(nn.Linear(5, 5)), neuron.MultiStepIFNode(v_threshold=0.1, surrogate_function=surrogate.ATan()),
        layer.MultiStepDropout(0.0), layer.MultiStepThresholdDependentBatchNorm1d(3.0, 1.0, 5),
        neuron.MultiStepParametricLIFNode(v_reset=None, v_threshold=0.2), neuron.MultiStepLIFNode(v_threshold=0.2),
        layer.MultiStepThresholdDependentBatchNorm1d(4.0, 1.0, 5), layer.MultiStepContainer(*nodes),
        neuron.MultiStepLIFNode(v_threshold=0.1, surrogate_function=surrogate.S2NN()),
    ).double().eval()
    with torch.no_grad():
        net(x)
        torch.save(net, sys.argv[2])
        torch.save([net(x), *(m.v for m in net.modules() if hasattr(m, "v"))], sys.argv[2] + ".wanted")
else:
    from sdit_kernels.compat import install
    install()
    net = torch.load(sys.argv[2], weights_only=False)
    with torch.no_grad():
        found = [net(x), *(m.v for m in net.modules() if hasattr(m, "v"))]
    torch.testing.assert_close(found, torch.load(sys.argv[2] + ".wanted"), rtol=1e-9, atol=1e-9)
    print(type(net[1]).__module__, bool(found[0].any()))
"""
    hidden = HIDE_SPIKINGJELLY + program
    saved = python(program, "save", str(tmp_path / "net"), PYTHONPATH=str(PEER))
    assert saved.returncode == 0, saved.stderr
    loaded = python(hidden, "load", str(tmp_path / "net"))
    assert loaded.stdout == "sdit_kernels.compat.clock_driven.neuron True\n", loaded.stderr


# ---- layers, encodings, functions ------------------------------------------------------------------------------------------


LAYERS = [
    ("MultiStepThresholdDependentBatchNorm1d", (1.0, 0.5, 3), (4, 2, 3)),
    ("MultiStepThresholdDependentBatchNorm2d", (1.0, 0.5, 3), (4, 2, 3, 5, 5)),
    ("MultiStepThresholdDependentBatchNorm3d", (1.0, 0.5, 3), (4, 2, 3, 2, 5, 5)),
    ("MultiStepTemporalWiseAttention", (4, 2, 4), (4, 2, 3, 5, 5)),
    ("MultiStepTemporalWiseAttention", (4, 2, 2), (4, 2, 3)),
    ("MultiStepDropout", (0.3,), (4, 2, 3)),
    ("MultiStepDropout2d", (0.3,), (4, 2, 3, 5, 5)),
    ("Dropout", (0.3,), (2, 3)),
    ("Dropout2d", (0.3,), (2, 3, 5, 5)),
    ("SynapseFilter", (3.0, True), (2, 3)),
    ("SynapseFilter", (3.0, False), (2, 3)),
    ("NeuNorm", (3, 5, 5), (2, 3, 5, 5)),
    ("NeuNorm", (3, 5, 5, 0.8, True), (2, 3, 5, 5)),
    ("ConvBatchNorm2d", (3, 4, 3), (2, 3, 5, 5)),
]


@pytest.mark.parametrize("name, arguments, shape", LAYERS)
def test_layers(theirs, name, arguments, shape):
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        layer = getattr(module.layer, name)(*arguments).double()
        x = normal(*shape).requires_grad_()
        y = layer(x), layer(x + 1)  # the second call sees the state of the first
        (grad,) = torch.autograd.grad(sum((t * normal(*t.shape, seed=1)).sum() for t in y), x)
        results.append([*y, grad, *layer.state_dict().values(), layer.eval()(x)])
        keys = list(layer.state_dict())
        assert keys == list(getattr(ours.layer, name)(*arguments).state_dict())
    close(*results)


def test_containers(theirs):
    x = normal(4, 2, 3)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        linear = nn.Linear(3, 3).double()
        steps = module.layer.MultiStepContainer(linear, module.neuron.LIFNode())
        add = module.layer.ElementWiseRecurrentContainer(module.neuron.IFNode(), torch.add)
        recurrent = module.layer.LinearRecurrentContainer(nn.Tanh(), 3, 3).double()
        results.append(
            [steps(x), module.layer.SeqToANNContainer(linear, nn.ReLU())(x), torch.stack([add(t) for t in x]),
             torch.stack([recurrent(t) for t in x]), module.functional.multi_step_forward(x, [linear, nn.ReLU()]),
             module.functional.seq_to_ann_forward(x, [linear, nn.ReLU()])]
        )  # fmt: skip
    close(*results)


def test_encodings(theirs):
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for module in (ours, theirs):
        encoders = [
            module.encoding.LatencyEncoder(5), module.encoding.LatencyEncoder(5, "log"),
            module.encoding.PeriodicEncoder((normal(3, 2) > 0).float()),
        ]  # fmt: skip
        found = [torch.stack([encoder(x) for _ in range(7)]) for encoder in encoders]
        weighted = module.encoding.WeightedPhaseEncoder(4)
        found.append(torch.stack([weighted(x * (1 - 2**-4)) for _ in range(4)]))
        torch.manual_seed(0)
        found.append(module.encoding.PoissonEncoder()(x))
        results.append(found)
    close(*results)
    with pytest.raises(ValueError, match="x must be between 0 and 1 - 2"):
        ours.encoding.WeightedPhaseEncoder(2)(torch.ones(2))


def test_functions(theirs):
    spikes, labels = (normal(4, 3, 5) > 0).double(), nn.functional.one_hot(torch.tensor([0, 2, 0, 1]), 3)
    results = []
    for module in (ours, theirs):
        f = module.functional
        conv, bn = nn.Conv2d(2, 3, 3, bias=False).double(), nn.BatchNorm2d(3).double()
        with torch.no_grad():
            for n, p in enumerate([conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var]):
                p.copy_(normal(*p.shape, seed=n).abs())
        fused = f.fuse_convbn2d(conv, bn)
        found = [fused.weight, fused.bias, f.first_spike_index(spikes), f.redundant_one_hot(torch.tensor([1, 0]), 3, 2)]
        for kernel, *args in (("linear",), ("polynomial", 2), ("sigmoid", 0.5), ("gaussian", 0.7)):
            found.append(f.kernel_dot_product(normal(4, 3), normal(4, 3, seed=1), kernel, *args))
        found.append(f.spike_similar_loss(spikes, labels, "linear", "mse"))
        found.append(f.spike_similar_loss(spikes, labels, "sigmoid", "l1", 0.5))
        found.append(f.temporal_efficient_training_cross_entropy(normal(4, 3, 5), torch.tensor([0, 4, 2])))
        found.append(f.temporal_efficient_training_cross_entropy(normal(4, 3, 5, 2), torch.tensor([[0, 1], [4, 4], [2, 3]])))
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(1, 2, 3))
        f.kaiming_normal_conv_linear_weight(net)
        found += [net[0].weight, net[1].weight]
        results.append([t.detach() for t in found])
    close(*results)


# ---- install -----------------------------------------------------------------------------------------------------------------

MODEL = """
import torch
from spikingjelly.clock_driven import functional, layer, surrogate, neuron, encoding, base
from spikingjelly.clock_driven.neuron import MultiStepLIFNode, MultiStepParametricLIFNode
import spikingjelly.clock_driven.layer as layers
assert layers is layer
node = MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy", surrogate_function=surrogate.ATan())
x = torch.randn(4, 2, 3, requires_grad=True)
with torch.no_grad():
    pass
spikes = node(x)
print(type(node).__module__, type(spikes.grad_fn).__name__)
print(node.v_seq.shape)
functional.reset_net(node)
"""


@pytest.mark.process
def test_install_serves_and_names_the_rest(tmp_path):
    """Without SpikingJelly. The child hides one that is installed."""
    code = f"""
{HIDE_SPIKINGJELLY}
from sdit_kernels.compat import install
install()
install()
{MODEL}
for statement in (
    "import spikingjelly.clock_driven.rnn", "from spikingjelly.clock_driven.neuron import EIFNode",
    "from spikingjelly.clock_driven import monitor", "from spikingjelly.datasets import n_mnist",
):
    try:
        exec(statement)
    except ImportError as error:
        print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    served, v_seq, *errors = done.stdout.splitlines()
    assert served == "sdit_kernels.compat.clock_driven.neuron AutogradBackward" and v_seq == "torch.Size([4, 2, 3])"
    assert "spikingjelly.clock_driven.rnn is not served: sdit_kernels serves spikingjelly.clock_driven" in errors[0]
    assert "serves no EIFNode in neuron" in errors[1] and "serves no monitor in clock_driven" in errors[2]
    assert "spikingjelly.datasets is not served" in errors[3]
    assert done.stderr.replace(STARTS, "") == ""


STARTS = "sdit_kernels: compiling CPU kernels, which takes seconds per kernel; later processes load the code from disk\n"


@pytest.mark.process
def test_install_beside_a_newer_version(tmp_path):
    """SpikingJelly 2 has no clock_driven: it is served. Its own neurons run on the kernels, also those made later."""
    pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed (make peers)")
    code = f"""
from spikingjelly.activation_based import neuron as new, layer as new_layer
early = new.LIFNode(step_mode="m")
from sdit_kernels.compat import install
install()
{MODEL}
for module in (early, new.ParametricLIFNode(step_mode="m"), new.IFNode()):
    print(type(module(x).grad_fn).__name__)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "sdit_kernels.compat.clock_driven.neuron AutogradBackward"
    assert lines[2:] == ["AutogradBackward", "AutogradBackward", "SqueezeBackward1"]


CEXT = """
import torch
from sdit_kernels.compat import install
install()
from spikingjelly.cext import neuron as cext_neuron
from spikingjelly.cext.neuron import MultiStepParametricLIFNode
from spikingjelly.clock_driven import neuron, surrogate
x = torch.randn(4, 2, 3, requires_grad=True)
atan = surrogate.ATan(alpha=2.0)
for mine, same in (
    (cext_neuron.MultiStepIFNode(detach_reset=True), neuron.MultiStepIFNode(surrogate_function=atan, detach_reset=True)),
    (MultiStepParametricLIFNode(init_tau=2.0, detach_reset=True),
     neuron.MultiStepParametricLIFNode(2.0, surrogate_function=atan, detach_reset=True)),
):
    print(type(mine).__module__, type(mine(x).grad_fn).__name__, repr(mine) == repr(same))
"""


@pytest.mark.process
@pytest.mark.parametrize("version", ["newest", "0.0.0.0.12"])
def test_install_serves_the_neurons_of_the_cuda_extension(theirs, version):
    """SpikingJelly 2 has no cext; 0.0.0.0.12 has its files, but here not the compiled extension."""
    done = python(CEXT, PYTHONPATH=os.pathsep.join([str(ROOT), *([str(PEER)] if version != "newest" else [])]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["sdit_kernels.compat.clock_driven.cext_neuron AutogradBackward True"] * 2


@pytest.mark.parametrize("name", NODES)
def test_neurons_of_the_cuda_extension(theirs, name):
    """They equal SpikingJelly's clock_driven neurons with a surrogate object, and accelerate takes them."""
    tau = {"LIF": {"tau": 4.0}, "Par": {"init_tau": 4.0}, "IFN": {}}[name.removeprefix("MultiStep")[:3]]
    shared = tau | {"v_threshold": 0.75, "detach_reset": True}
    for kind in ("ATan", "Sigmoid"):
        mine = getattr(cext_neuron, name)(surrogate_function=kind, alpha=2.0, **shared)
        surrogate = getattr(theirs.surrogate, kind)(alpha=2.0)
        same(mine, getattr(theirs.neuron, name)(surrogate_function=surrogate, **shared), normal(6, 3, 4))
        assert not accelerate(mine).left
    old = {"w": torch.tensor([0.5])}  # the extension's w has the shape (1,)
    if "Parametric" in name:
        mine.load_state_dict(old)
        assert mine.w.item() == 0.5
    with pytest.raises(ValueError, match='surrogate_function must be "ATan" or "Sigmoid"'):
        getattr(cext_neuron, name)(surrogate_function="Erf")


@pytest.mark.process
def test_install_accelerates_the_real_one(theirs, tmp_path):
    """Where SpikingJelly 0.0.0.0.12 is installed, its own classes run on the kernels, without CuPy. Also by python -m."""
    (tmp_path / "script.py").write_text("import sys\n" + MODEL + "print(sys.argv[1:], __name__)\n")
    done = subprocess.run(
        [sys.executable, "-m", "sdit_kernels.compat", str(tmp_path / "script.py"), "--lr", "1"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(PEER)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "spikingjelly.clock_driven.neuron AutogradBackward", "torch.Size([4, 2, 3])", "['--lr', '1'] __main__"
    ]  # fmt: skip


@pytest.mark.process
def test_install_for_copies(theirs, tmp_path):
    """A copy under another root runs on the kernels; a class or a surrogate of it that was edited runs its own code."""
    for folder in ("whole", "edited"):
        shutil.copytree(PEER / "spikingjelly", tmp_path / folder / "spikingjelly", ignore=shutil.ignore_patterns("datasets"))
    edited = tmp_path / "edited" / "spikingjelly" / "clock_driven"
    text = (edited / "neuron.py").read_text()
    assert text.count("self.v = self.v + x\n") == 1
    (edited / "neuron.py").write_text(text.replace("self.v = self.v + x\n", "self.v = 0.9 * self.v + x\n"))
    text = (edited / "surrogate.py").read_text()
    (edited / "surrogate.py").write_text(text.replace("ctx.alpha / 2 / (1 +", "ctx.alpha / 4 / (1 +"))
    (tmp_path / "program.py").write_text(
        """
import torch
from whole.spikingjelly.clock_driven import neuron as whole
from edited.spikingjelly.clock_driven import neuron as edited
from edited.spikingjelly.clock_driven.surrogate import ATan
x = torch.randn(4, 2, 3, requires_grad=True)
for node in (whole.MultiStepIFNode(backend="cupy"), edited.MultiStepIFNode(), edited.MultiStepLIFNode(),
             edited.MultiStepLIFNode(surrogate_function=ATan())):
    print(type(node(x).grad_fn).__name__)
from sdit_kernels.compat.spikingjelly import accelerate
print(accelerate(torch.nn.Sequential(edited.MultiStepIFNode())))
"""
    )
    command = [sys.executable, "-W", "ignore", "-m", "sdit_kernels.compat"]
    command += ["--root", "whole.spikingjelly", "--root", "edited.spikingjelly", "-m", "program"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == ["AutogradBackward", "CatBackward0", "AutogradBackward", "CatBackward0"]
    assert "a copy of SpikingJelly's MultiStepIFNode and computes something else" in done.stdout


def test_install_is_undone():
    before = dict(sys.modules), list(sys.meta_path)
    ours.install()
    ours.install(root="helpers_of_nobody")
    import spikingjelly.clock_driven.neuron as served

    assert served is ours.neuron
    uninstall()
    assert list(sys.meta_path) == before[1] and not any(
        "clock_driven" in name or "cext" in name for name in sys.modules.keys() - before[0].keys()
    )


@pytest.mark.parametrize("name", ["imports", "clock_driven", "clock_driven.base", "clock_driven.neuron"])
def test_examples_of_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"sdit_kernels.compat.{name}"))
    assert found.attempted >= 2 and found.failed == 0


def test_install_accepts_the_backend_cupy_without_cupy(tmp_path, monkeypatch):
    """The constructors of activation_based in 0.0.0.0.14 check a backend with a function of base."""
    package = tmp_path / "old_jelly" / "activation_based"
    package.mkdir(parents=True)
    (tmp_path / "old_jelly" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "base.py").write_text("cupy = None\n\ndef check_backend_library(backend):\n    raise ImportError(backend)\n")
    (package / "neuron.py").write_text("from . import base\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    ours.install("old_jelly")
    check = importlib.import_module("old_jelly.activation_based.neuron").base.check_backend_library
    check("cupy")
    with pytest.raises(ImportError, match="lava"):
        check("lava")


def test_install_refuses_what_is_no_module():
    for root, error in ((3, TypeError), ("src/spikingjelly", ValueError), ("", ValueError)):
        with pytest.raises(error, match="root must be"):
            ours.install(root)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "the name of a script is missing"), (["--fast"], "unknown option --fast"), (["--root"], "--root needs a name"),
        (["nothing.py"], "the file nothing.py does not exist"), (["--root", "a/b", __file__], "--root: root must be"),
    ],
)  # fmt: skip
def test_the_command_names_what_is_wrong(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit:
        command(arguments)
    assert exit.value.code == 2 and reason in capsys.readouterr().err


def test_the_command_explains_itself(capsys):
    command(["-h"])
    assert "usage: python -m sdit_kernels.compat" in capsys.readouterr().out
