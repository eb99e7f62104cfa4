"""Compare compat.spikingjelly with SpikingJelly. Also test how all compat modules change classes and report it."""

import copy
import doctest
import io
import math
import pickle
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sdit_kernels import backend
from sdit_kernels.compat import spikingjelly as compat
from sdit_kernels.compat import swap
from sdit_kernels.compat.spikingjelly import accelerate, restore


@pytest.fixture(scope="module")
def jelly():
    """Return the library's modules. The version is 2.0.0 or 0.0.0.0.14."""
    pytest.importorskip("spikingjelly", reason="spikingjelly is not installed (make peers)")
    from spikingjelly.activation_based import base, functional, layer, neuron, surrogate

    class Jelly:
        pass

    found = Jelly()
    found.base, found.functional, found.layer, found.neuron, found.surrogate = base, functional, layer, neuron, surrogate
    found.version = 2 if hasattr(neuron.BaseNode, "materialize_states") else 0
    return found


# ---- the change of class, which needs no library ---------------------------------------------------------------------


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.factor() * self.w * x

    def factor(self):
        return 2


class Triples(swap.Swapped):
    def factor(self):
        return 1.5 * super().factor()


class Named(Doubles):
    def __init__(self):
        super().__init__()

    def extra(self):
        return "not a method of Doubles"


class Changed(Doubles):
    def factor(self):
        return 5


def choose(module):
    if isinstance(module, Doubles):
        return swap.changed_behaviour(module, Doubles) or Triples
    return None


def test_swap_keeps_the_object():
    inner = Doubles()
    model = nn.ModuleDict({"a": inner, "again": inner, "b": nn.Sequential(Named()), "c": Changed()})
    calls = []
    inner.register_forward_hook(lambda *args: calls.append(1))
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = swap.swap("Toys", model, choose)
    assert report.replaced == (("a", "Doubles"), ("b.0", "Named"))
    assert report.left == (("c", "Changed", "Changed overrides factor of Doubles"),)
    assert str(report).splitlines() == [
        "Toys: 2 replaced, 1 left as they were",
        "  a    Doubles: fused",
        "  b.0  Named: fused",
        "  c    Changed: left, Changed overrides factor of Doubles",
    ]
    assert model["a"] is inner is model["again"] and type(inner).__name__ == "Doubles" and isinstance(inner, Doubles)
    assert list(model.state_dict()) == keys and all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model["a"](torch.ones(2)).tolist() == [3.0, 3.0] and calls == [1]
    assert swap.swap("Toys", model, choose).replaced == ()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(nn.ModuleList([model["b"]])))):
        assert next(m for m in twin.modules() if isinstance(m, Named)).factor() == 3
    assert swap.swap_back("Toys", model, Triples).replaced == (("a", "Doubles"), ("b.0", "Named"))
    assert type(inner) is Doubles and model["b"][0].factor() == 2


def test_patched_and_parametrized_modules_are_detected():
    assert swap.changed_behaviour(Doubles(), Doubles) is None and swap.changed_behaviour(Named(), Doubles) is None
    patched = Doubles()
    patched.factor = lambda: 7
    assert swap.changed_behaviour(patched, Doubles) == "factor of Doubles is replaced on the instance"
    parametrized = nn.utils.parametrize.register_parametrization(Doubles(), "w", nn.Identity())
    assert "parametrized" in swap.changed_behaviour(parametrized, Doubles)


def test_restore_leaves_a_class_that_was_changed_again():
    model = Doubles()
    swap.swap("Toys", model, choose)
    nn.utils.parametrize.register_parametrization(model, "w", nn.Identity())
    report = swap.swap_back("Toys", model, Triples)
    assert report.replaced == () and report.left[0].reason == "its class was changed again after accelerate"


def test_a_model_without_neurons_reports_nothing_replaced():
    report = accelerate(nn.Linear(2, 2))
    assert report.replaced == report.left == () and str(report) == (
        "SpikingJelly: 0 replaced, 0 left as they were: nothing of SpikingJelly was found in the model"
    )
    assert str(restore(nn.Linear(2, 2))).endswith(": nothing in the model was accelerated")
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
            function(3)
    report = str(accelerate(torch.nn.Sequential(torch.nn.Linear(1, 1)), packed=True))
    assert report.endswith(
        "(the model)  Sequential: packed in its forward pass; nothing of SpikingJelly was found in the model"
    )


def test_docstring_examples_run():
    assert doctest.testmod(compat).attempted >= 7 and doctest.testmod(compat).failed == 0


# ---- tests against the library ---------------------------------------------------------------------------------------

SURROGATES = ["ATan", "Sigmoid", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf", "Rect", "QPseudoSpike"]


def make(jelly, kind, options, surrogate, alpha):
    if not hasattr(jelly.surrogate, surrogate):  # version 2 added SuperSpike and Rect
        surrogate = "ATan"
    alpha = {} if alpha is None or surrogate == "QPseudoSpike" else {"alpha": alpha}
    return getattr(jelly.neuron, kind)(surrogate_function=getattr(jelly.surrogate, surrogate)(**alpha), **options)


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(["LIFNode", "IFNode", "ParametricLIFNode"]))
    exact = draw(st.booleans())
    options = dict(
        v_threshold=draw(st.sampled_from([1.0, 0.5])),
        v_reset=draw(st.sampled_from([0.0, None, -0.5])),
        detach_reset=draw(st.booleans()),
        step_mode=draw(st.sampled_from(["m", "s"])),
        store_v_seq=draw(st.booleans()),
    )
    if kind != "IFNode":
        tau = 2.0 if exact else draw(st.floats(1.05, 20.0))
        options |= {"tau" if kind == "LIFNode" else "init_tau": tau, "decay_input": draw(st.booleans())}
    surrogate, alpha = draw(st.sampled_from(SURROGATES)), draw(st.sampled_from([None, 0.75, 3.0]))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 17, 33]), min_size=0, max_size=3)))
    calls = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3))
    start = draw(st.sampled_from([None, None, 0.25]))
    return kind, exact, options, surrogate, alpha, shape, calls, start, draw(st.booleans()), draw(st.integers(0, 99))


def inputs(exact, shape, generator):
    """If ``exact``, return multiples of 1/16, on which float32 arithmetic is exact.

    Otherwise return random float64 numbers. No membrane is then so close to the threshold that rounding changes a spike.
    """
    if exact:
        return torch.randint(-32, 64, shape, generator=generator) / 16
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5


def run_and_differentiate(jelly, node, exact, calls, shape, start, seed):
    """Run several calls and return spikes, membranes and gradients through all calls."""
    generator = torch.Generator().manual_seed(seed)
    if start is not None:
        node.v = start
    xs, states, loss = [], [], 0.0
    differentiable = jelly.version > 0 or node.training  # the evaluation mode of 0.0.0.0.14 has no surrogate gradient

    def weigh(t):
        return (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()

    for T in calls:
        x = inputs(exact, (T, *shape), generator).requires_grad_(differentiable)
        spikes = node(x) if node.step_mode == "m" else torch.stack([node(x_t) for x_t in x])
        loss = loss + weigh(spikes) + weigh(node.v)
        states += [spikes, node.v]
        if node.store_v_seq and (jelly.version == 2 or node.step_mode == "m"):
            loss = loss + weigh(node.v_seq)
            states.append(node.v_seq)
        xs.append(x)
    return states, torch.autograd.grad(loss, [*xs, *node.parameters()]) if differentiable else ()


@settings(max_examples=60)
@given(case=cases())
def test_neurons_equal_the_library(jelly, case):
    """Test every step mode and option.

    Spikes are equal, membranes too where the arithmetic is exact, gradients up to rounding.
    """
    kind, exact, options, surrogate, alpha, shape, calls, start, training, seed = case
    node = make(jelly, kind, options, surrogate, alpha).to(torch.float32 if exact else torch.float64).train(training)
    fused = copy.deepcopy(node)
    assert accelerate(fused).replaced
    kernels = surrogate == "ATan" and options["v_reset"] == 0.0  # test_lif.py compares every kernel with the reference
    with backend("cpu" if kernels else "reference"):
        states, grads = run_and_differentiate(jelly, fused, exact, calls, shape, start, seed)
    want, want_grads = run_and_differentiate(jelly, node, exact, calls, shape, start, seed)
    for got, wanted in zip(states, want, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        if exact:
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    tolerance = 2e-5 if exact else 1e-9
    for got, wanted in zip(grads, want_grads, strict=True):
        scale = max(1.0, *(g.abs().max().item() for g in want_grads if g.numel()))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * scale)


@st.composite
def cases_with_levels(draw):
    kind = draw(st.sampled_from(["ILIFNode", "TernaryLIFNode", "TernaryIFNode"]))
    exact = draw(st.booleans())
    options = dict(v_threshold=draw(st.sampled_from([1.0, 0.5])), detach_reset=draw(st.booleans()))
    options |= dict(step_mode=draw(st.sampled_from(["m", "s"])), store_v_seq=draw(st.booleans()))
    if kind != "TernaryIFNode":
        options["tau"] = 2.0 if exact else draw(st.sampled_from([4 / 3, 3.7]))
    if kind == "ILIFNode":
        firing = draw(st.sampled_from([4, 1, 8])), draw(st.sampled_from([None, (-1.0, 5.0), (0.5, 2.0)]))
    else:
        firing = draw(st.sampled_from(["Sigmoid", "ATan", "PiecewiseQuadratic"])), draw(st.sampled_from([1.0, 3.0]))
        options["v_reset"] = draw(st.sampled_from([0.0, None, -0.25]))
        if kind == "TernaryLIFNode":
            options["decay_input"] = draw(st.booleans())
    shape = tuple(draw(st.lists(st.sampled_from([1, 3, 33]), min_size=0, max_size=2)))
    calls = draw(st.lists(st.sampled_from([1, 4]), min_size=1, max_size=3))
    return kind, exact, options, firing, shape, calls, draw(st.booleans()), draw(st.integers(0, 99))


@settings(max_examples=60)
@given(case=cases_with_levels())
def test_integer_and_ternary_neurons_equal_the_library(jelly, case):
    """In float64. Exact inputs are multiples of 1/16: many lie on a threshold, a tie or an end of the window."""
    if not hasattr(jelly.neuron, "ILIFNode"):
        pytest.skip("SpikingJelly has had these neurons since 2.0.0")
    kind, exact, options, (firing, number), shape, calls, training, seed = case
    if kind == "ILIFNode":
        function = jelly.surrogate.MultiLevelSpikeCount(firing, grad_window=number)
    else:
        function = getattr(jelly.surrogate, firing)(alpha=number)
    node = getattr(jelly.neuron, kind)(surrogate_function=function, **options).to(torch.float64).train(training)
    fused = copy.deepcopy(node)
    assert accelerate(fused).replaced and "fused by sdit_kernels" in repr(fused)
    found = []
    for run, on in ((fused, "reference"), (node, "cpu")):
        generator, xs, states, loss = torch.Generator().manual_seed(seed), [], [], 0.0
        for T in calls:
            x = inputs(exact, (T, *shape), generator).double() * (2 if kind == "ILIFNode" else 1)
            xs.append(x.requires_grad_())
            with backend(on):
                s = run(x) if run.step_mode == "m" else torch.stack([run(x_t) for x_t in x])
            states += [s, run.v, *([run.v_seq] if run.store_v_seq else [])]
        for t in states:
            loss = loss + (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
        with backend(on):
            found.append((states, torch.autograd.grad(loss, xs)))
    (got, got_gradients), (want, want_gradients) = found
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


def test_integer_and_ternary_neurons_run_the_kernels(jelly):
    """Default settings in float32, in a model, on the CPU kernels. What the kernels do not take is left with the reason."""
    if not hasattr(jelly.neuron, "ILIFNode"):
        pytest.skip("SpikingJelly has had these neurons since 2.0.0")
    neuron, surrogate = jelly.neuron, jelly.surrogate
    odd, hooked = neuron.ILIFNode(), neuron.ILIFNode()
    odd.surrogate_function = surrogate.MultiLevelSpikeCount(4, spiking=False)
    hooked.surrogate_function = surrogate.MultiLevelSpikeCount(4)
    hooked.surrogate_function.register_forward_hook(lambda *args: None)
    other = neuron.ILIFNode()
    other.surrogate_function = surrogate.Sigmoid()
    net = nn.ModuleDict({
        "i": neuron.ILIFNode(step_mode="m"), "lif": neuron.TernaryLIFNode(step_mode="m"),
        "if": neuron.TernaryIFNode(step_mode="m", v_reset=None), "odd": odd, "hooked": hooked, "other": other,
        "primitive": neuron.TernaryIFNode(surrogate_function=surrogate.Sigmoid(spiking=False)),
    })  # fmt: skip
    own = copy.deepcopy(net)
    report = accelerate(net)
    assert [name for name, _ in report.replaced] == ["i", "lif", "if"]
    assert {name: reason for name, _, reason in report.left} == {
        "odd": "surrogate MultiLevelSpikeCount has spiking=False: its output is not a spike",
        "hooked": "surrogate MultiLevelSpikeCount has hooks, which the kernels would not call",
        "other": "its surrogate Sigmoid is not SpikingJelly's MultiLevelSpikeCount",
        "primitive": "surrogate Sigmoid has spiking=False: its output is not a spike",
    }
    x = 2 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for name in ("i", "lif"):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        with backend("cpu"):
            found, want = net[name](a), own[name](b)
            found.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(a.grad, b.grad)
    with pytest.warns(UserWarning, match="ILIFNode runs SpikingJelly's own code: the kernels refuse its settings: .* 256"):
        net["i"].surrogate_function.max_spike_count = 300
        net["i"].reset()
        net["i"](x.bfloat16())


def network(jelly, hidden=12, **options):
    layer, neuron = jelly.layer, jelly.neuron
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4),
        neuron.IFNode(surrogate_function=jelly.surrogate.ATan()), layer.MaxPool2d(2), layer.Flatten(),
        layer.Linear(4 * 16, hidden), neuron.ParametricLIFNode(v_threshold=0.1, detach_reset=True),
        layer.Linear(hidden, 10), neuron.LIFNode(tau=3.0, v_threshold=0.05, v_reset=None),
    )  # fmt: skip
    jelly.functional.set_step_mode(net, "m")
    return net


def train(jelly, net, steps=6):
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.rand((16, 1, 8, 8), generator=generator, dtype=torch.float64)
        y = torch.randint(10, (16,), generator=generator)
        loss = nn.functional.cross_entropy(net(3 * x.expand(4, *x.shape)).mean(0), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        jelly.functional.reset_net(net)
        losses.append(loss.item())
    return losses


def test_training_gives_the_librarys_losses(jelly):
    """The losses of six steps agree in float64 up to rounding.

    In float32, training amplifies rounding until a membrane crosses the threshold in one of the two runs only.
    """
    torch.manual_seed(0)
    net = network(jelly).double()
    fused = copy.deepcopy(net)
    assert len(accelerate(fused).replaced) == 3
    want, got = train(jelly, net), train(jelly, fused)
    assert want[0] != want[-1]
    assert max(abs(g - w) / w for g, w in zip(got, want)) <= 1e-12
    for p, q in zip(fused.state_dict().values(), net.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_an_accelerated_net_keeps_the_librarys_interface(jelly):
    """Identity, isinstance, keys, step mode, reset, detach, memories, conversion and checkpoints work as before."""
    net = network(jelly)
    nodes = [m for m in net if isinstance(m, jelly.neuron.BaseNode)]
    keys, memories = list(net.state_dict()), list(jelly.base.named_memories(net)) if jelly.version else None
    jelly.functional.reset_net(net)  # version 2 remembers the modules to reset
    accelerate(net)
    assert [m for m in net if isinstance(m, jelly.neuron.BaseNode)] == nodes and isinstance(
        net[6], jelly.neuron.ParametricLIFNode
    )
    assert all(isinstance(m, (jelly.base.MemoryModule, jelly.base.StepModule)) for m in nodes)
    assert list(net.state_dict()) == keys and "6.w" in keys
    assert "fused by sdit_kernels" in repr(net)
    if jelly.version:
        assert list(jelly.base.named_memories(net)) == memories
    x = torch.rand(4, 2, 1, 8, 8)
    net(x).sum().backward()
    assert net[2].v.shape == (2, 4, 8, 8) and net[2].v.grad_fn is not None
    jelly.functional.detach_net(net)
    assert net[2].v.grad_fn is None
    net(x)
    jelly.functional.reset_net(net)
    assert [n.v for n in nodes] == [0.0] * 3
    jelly.functional.set_step_mode(net, "s")
    assert [n.step_mode for n in nodes] == ["s"] * 3 and net(x[0]).shape == (2, 10)
    jelly.functional.reset_net(net)
    net.double()
    assert net[2].v == 0.0 and net(x[0].double()).dtype == torch.float64
    jelly.functional.reset_net(net)
    other = network(jelly).double()
    other.load_state_dict(net.state_dict())
    with pytest.raises(ValueError):
        net[2].step_mode = "x"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_restored_models_keep_the_membrane(jelly, how):
    torch.manual_seed(0)
    net = network(jelly).eval()
    fused = copy.deepcopy(net)
    accelerate(fused)
    first, second = torch.rand(2, 4, 2, 1, 8, 8) * 3
    with torch.no_grad():
        net(first), fused(first)
        if how == "deepcopy":
            fused = copy.deepcopy(fused)
        elif how == "pickle":
            fused = pickle.loads(pickle.dumps(fused))
        else:
            file = io.BytesIO()
            torch.save(fused, file)
            file.seek(0)
            fused = torch.load(file, weights_only=False)
        assert "fused" in repr(fused)
        report = restore(fused)
        assert len(report.replaced) == 3 and "SpikingJelly's own code" in str(report) and "fused" not in repr(fused)
        assert type(fused[2]) is jelly.neuron.IFNode and torch.is_tensor(fused[2].v)
        assert torch.equal(fused(second), net(second))
        jelly.functional.reset_net(net), jelly.functional.reset_net(fused)


def test_hooks_run_and_shared_neurons_are_replaced_once(jelly):
    node = jelly.neuron.LIFNode(step_mode="m")
    net = nn.ModuleList([node, nn.Sequential(node)])
    seen = []
    node.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert accelerate(net).replaced == (("0", "LIFNode"),) and net[1][0] is node
    node(torch.ones(4, 3))
    assert seen == [(4, 3)]
    assert accelerate(net).replaced == () and len(restore(net).replaced) == 1


def test_half_precision_keeps_the_dtypes(jelly):
    for dtype in (torch.bfloat16, torch.float16):
        node = jelly.neuron.LIFNode(step_mode="m", store_v_seq=True)
        fused = copy.deepcopy(node)
        accelerate(fused)
        x = (torch.randint(-32, 64, (4, 50)) / 16).to(dtype)
        assert torch.equal(fused(x), node(x)) and fused.v.dtype == node.v.dtype == fused.v_seq.dtype == dtype


def test_a_new_shape_resets_and_inference_mode_allows_training(jelly):
    node = jelly.neuron.LIFNode(step_mode="m")
    accelerate(node)
    with torch.inference_mode():
        node(torch.ones(2, 3))
    node(torch.ones(2, 3, requires_grad=True)).sum().backward()
    if jelly.version:  # the membrane starts again, as in the library
        assert node(torch.ones(2, 5)).shape == (2, 5)
    else:
        with pytest.raises(RuntimeError):
            node(torch.ones(2, 5))


def test_functional_forward_equals_the_library(jelly):
    if not jelly.version:
        pytest.skip("to_functional_forward of explicit states came with version 2")
    node = jelly.neuron.LIFNode(step_mode="m")
    fused = copy.deepcopy(node)
    accelerate(fused)
    x, v = torch.rand(4, 3) * 3, torch.rand(3)
    for mode, data in (("m", x), ("s", x[0])):
        node.step_mode = fused.step_mode = mode
        (got,), (state,) = jelly.base.to_functional_forward(fused)((data,), (v,))
        (want,), (wanted,) = jelly.base.to_functional_forward(node)((data,), (v,))
        assert torch.equal(got, want) and torch.equal(state, wanted) and fused.v == 0.0


def test_unsupported_neurons_are_left_with_a_reason(jelly):
    neuron, surrogate = jelly.neuron, jelly.surrogate

    class Defaults(neuron.LIFNode):
        def __init__(self):
            super().__init__(tau=4.0, step_mode="m")

    class Quicker(neuron.LIFNode):
        def single_step_forward(self, x):
            return x

    patched, hooked, odd = neuron.LIFNode(), neuron.LIFNode(), neuron.LIFNode()
    patched.forward = lambda x: x
    hooked.surrogate_function = surrogate.ATan()
    hooked.surrogate_function.register_forward_hook(lambda *args: None)
    odd.tau = 0.5
    primitive = neuron.IFNode(surrogate_function=surrogate.Sigmoid(spiking=False))
    learned = neuron.IFNode(surrogate_function=surrogate.Sigmoid(alpha=torch.ones(())))
    net = nn.ModuleDict({
        "defaults": Defaults(), "quicker": Quicker(), "patched": patched, "hooked": hooked, "odd": odd, "primitive": primitive,
        "learned": learned, "s2nn": neuron.LIFNode(surrogate_function=surrogate.S2NN()), "qif": neuron.QIFNode(),
        "pseudo": neuron.LIFNode(surrogate_function=surrogate.QPseudoSpike(alpha=3.0)),
        "sign": neuron.LIFNode(surrogate_function=torch.sign),
        "negative": neuron.LIFNode(surrogate_function=surrogate.ATan(alpha=-1.0)),
        "parametrized": nn.utils.parametrize.register_parametrization(neuron.ParametricLIFNode(), "w", nn.Identity()),
    })  # fmt: skip
    before = {name: type(module) for name, module in net.items()}
    report = accelerate(net)
    assert report.replaced == (("defaults", "Defaults"),)
    reasons = {name: reason for name, _, reason in report.left}
    assert reasons == {
        "quicker": "Quicker overrides single_step_forward of LIFNode",
        "patched": "forward of LIFNode is replaced on the instance",
        "hooked": "surrogate ATan has hooks, which the kernels would not call",
        "odd": "the kernels refuse its settings: tau must be at least 1 (and infinite only with decay_input=False), got 0.5",
        "primitive": "surrogate Sigmoid has spiking=False: its output is not a spike",
        "learned": "surrogate Sigmoid has an alpha that is not a number but a Tensor",
        "s2nn": "surrogate S2NN has no formula here",
        "qif": "this kind of neuron has no fused kernel here",
        "pseudo": "surrogate QPseudoSpike has a formula here for alpha = 2 only, not 3.0",
        "sign": "surrogate sign has no formula here",
        "negative": "the kernels refuse its settings: alpha must be positive and finite, got -1.0",
        "parametrized": "it is parametrized (torch.nn.utils.parametrize)",
    }
    assert all(type(net[name]) is before[name] for name in reasons)
    assert all(f"{name} " in str(report) for name in (*reasons, "defaults"))


def test_changes_after_accelerate_are_used_or_warned_about(jelly):
    own = jelly.surrogate.Sigmoid  # a new object, because neurons otherwise share the library's default
    node = jelly.neuron.LIFNode(surrogate_function=own(), step_mode="m", store_v_seq=True)
    accelerate(node)
    x = torch.rand(4, 3) * 3
    node.tau, node.v_threshold = 4.0, 0.5
    twin = jelly.neuron.LIFNode(tau=4.0, v_threshold=0.5, surrogate_function=own(), step_mode="m", store_v_seq=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(node(x), twin(x))  # settings are read at every call
    node.surrogate_function.set_spiking_mode(False)
    twin.surrogate_function.set_spiking_mode(False)
    for mode, data in (("m", x), ("s", x[0])):
        node.step_mode = twin.step_mode = mode
        with pytest.warns(UserWarning, match="LIFNode runs SpikingJelly's own code: surrogate Sigmoid has spiking=False"):
            got = node(data)
        torch.testing.assert_close(got, twin(data))
        assert math.isclose(node.v.sum().item(), twin.v.sum().item(), rel_tol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"tau": 0.75}, "tau is 0.75, and the kernels need at least 1"),
    ({"tau": torch.tensor(3.0)}, "tau is a Tensor, and the kernels need a number"),
    ({"tau": math.inf}, "tau must be at least 1"),
    ({"v_threshold": math.inf}, "v_threshold must be finite"),
    ({"v_threshold": math.nan}, "v_threshold must be finite"),
    ({"v_threshold": True}, "v_threshold must be a number or a tensor, got bool"),
    ({"v_threshold": torch.tensor(math.inf)}, "v_threshold must be finite"),
    ({"v_reset": -math.inf}, "v_reset must be finite"),
    ({"v_reset": torch.tensor(0.25)}, "v_reset must be a number or None"),
    ({"v_reset": True}, "v_reset must be a number or None"),
    ({"decay_input": 1}, "decay_input must be a bool"),
    (None, "data, torch.int64 of shape"),
])  # fmt: skip
def test_settings_without_a_kernel_run_the_librarys_code(jelly, change, message):
    node, twin = (jelly.neuron.LIFNode(step_mode="m") for _ in range(2))
    accelerate(node)
    if not jelly.version and change is not None and change.get("v_threshold") is True:
        pytest.skip("before version 2 its own code cannot subtract True")
    x = torch.rand(4, 3, 3) * 3
    if change is None:
        x = x.long()
    else:
        for name, value in change.items():
            setattr(node, name, value), setattr(twin, name, value)
    for mode, data in (("m", x), ("s", x[0])):
        node.step_mode = twin.step_mode = mode
        with pytest.warns(UserWarning, match=message):
            got = node(data)
        torch.testing.assert_close(got, twin(data), rtol=0, atol=0, equal_nan=True)
        jelly.functional.reset_net(node), jelly.functional.reset_net(twin)
    node.step_mode = "m"
    with pytest.warns(UserWarning, match="data, torch.float32 of shape"), pytest.raises(IndexError):
        node(torch.tensor(3.0))  # this error comes from SpikingJelly


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("w", [-80.0, -95.0, -200.0, -math.inf, 95.0, math.nan])
def test_extreme_values_of_w_equal_the_library(jelly, w, decay_input):
    """exp(-w) overflows where sigmoid(w) does not. A NaN stays a NaN."""
    node = jelly.neuron.ParametricLIFNode(decay_input=decay_input, step_mode="m")
    fused, found = copy.deepcopy(node), []
    accelerate(fused)
    x = torch.rand(4, 3) * 3
    for n in (fused, node):
        n.w.data.fill_(w)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            y = n(x)
        assert {str(entry.message).endswith("settings: w is NaN") for entry in seen} == (
            {True} if n is fused and w != w else set()
        )
        y.sum().backward()
        found.append((y, n.v, n.w.grad))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-30, equal_nan=True)
    assert w != w or found[0][2].abs() <= 1e-30


def test_every_other_neuron_is_in_the_report(jelly):
    """Neurons that do not derive from BaseNode are listed, too. Layers are not."""
    kinds = "DSRIFNode DSRLIFNode HalfThresholdIFNode ActivationAwareIFNode NonSpikingIFNode NonSpikingLIFNode"
    here = [kind for kind in kinds.split() if hasattr(jelly.neuron, kind)]

    class Own(jelly.neuron.NonSpikingIFNode if jelly.version else jelly.neuron.QIFNode):
        pass

    net = nn.ModuleDict({kind: getattr(jelly.neuron, kind)() for kind in here} | {"own": Own()})
    if hasattr(jelly.neuron, "PSN"):
        net["psn"] = jelly.neuron.PSN(T=4)
    net["layer"] = jelly.layer.Linear(2, 2)
    report = accelerate(nn.Sequential(net))
    assert report.replaced == () and {name.split(".")[1] for name, _, _ in report.left} == net.keys() - {"layer"}
    assert {reason for _, _, reason in report.left} == {"this kind of neuron has no fused kernel here"}


def test_an_input_changed_in_place_is_refused(jelly):
    """The docstring of compat.spikingjelly says this."""
    node = jelly.neuron.LIFNode(step_mode="m")
    accelerate(node)
    y = torch.rand(4, 3, requires_grad=True) * 3
    y += node(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
