"""Compare compat.snntorch with snnTorch: the loop over steps that its users write, and the same model unrolled."""

import copy
import doctest
import sys
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sdit_kernels import backend
from sdit_kernels.compat import snntorch as compat
from sdit_kernels.compat.snntorch import accelerate, restore, unroll


@pytest.fixture(scope="module")
def snn():
    pytest.importorskip("snntorch", reason="snntorch is not installed (make peers)")
    import snntorch
    import snntorch.surrogate

    return snntorch


# ---- tests that do not need the library ------------------------------------------------------------------------------


def test_a_model_without_neurons_reports_nothing_replaced():
    report = accelerate(nn.Linear(2, 2))
    assert report.replaced == report.left == () and str(report) == (
        "snnTorch: 0 replaced, 0 left as they were: nothing of snnTorch was found in the model"
    )
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
            function(3)


def test_a_missing_snntorch_is_named_in_the_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(ImportError, match="Leaky needs snnTorch: pip install snntorch"):
        compat.Leaky(0.5)


class Counts(nn.Module):
    """A module of a type that unroll does not know."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def test_unroll_equals_the_loop_for_layers():
    torch.manual_seed(0)
    convolution, flat = nn.Conv2d(2, 3, 3), nn.Flatten()
    counts = Counts()
    net = nn.Sequential(convolution, nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), flat, nn.Linear(12, 5), counts)
    shapes = []
    convolution.forward = lambda x, forward=convolution.forward: shapes.append(x.shape) or forward(x)
    x = torch.randn(6, 4, 2, 6, 6)
    got = unroll(net, x)
    # the convolution sees all steps as one batch; Counts sees one step after the other
    assert shapes == [(24, 2, 6, 6)] and counts.calls == 6
    running = net[1].running_mean.clone()
    net[1].reset_running_stats()
    counts.calls = 0
    want = torch.stack([net(x_t) for x_t in x])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(running, net[1].running_mean)
    seen = []
    flat.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    unroll(net, x)
    assert seen == [(4, 12)] * 6
    unbatched = torch.randn(6, 2, 6, 6)
    torch.testing.assert_close(unroll(nn.Conv2d(2, 3, 3), unbatched).shape, (6, 3, 4, 4))
    pool = nn.MaxPool2d(2, return_indices=True)
    assert [t.shape for t in unroll(pool, x)] == [(6, 4, 2, 3, 3)] * 2


class Wrapped(nn.Module):
    """A user's module that wraps another one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def test_a_module_with_state_used_twice_runs_step_by_step():
    norm, counts, linear, relu = nn.BatchNorm1d(5), Counts(), nn.Linear(5, 5), nn.ReLU()
    x = torch.randn(6, 3, 5)
    for net, kind in (
        (nn.Sequential(norm, linear, norm), "BatchNorm1d"),
        (nn.Sequential(nn.Sequential(linear, norm), nn.Sequential(norm)), "BatchNorm1d"),
        (nn.Sequential(counts, linear, counts), "Counts"),
        (nn.Sequential(linear, Wrapped(counts), Wrapped(counts)), "Counts"),
    ):
        twin = copy.deepcopy(net)
        want = torch.stack([twin(x_t) for x_t in x])
        with pytest.warns(UserWarning, match=f"Sequential runs step by step: its {kind} is reached more than once") as seen:
            assert torch.equal(unroll(net, x), want)
        assert seen[0].filename == __file__
        for got, wanted in zip(net.buffers(), twin.buffers(), strict=True):
            assert torch.equal(got, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # in evaluation mode the norm has no state that changes, so using it twice is safe
        unroll(nn.Sequential(linear, relu, norm.eval(), nn.Sequential(linear, relu, norm)), x)
    norm.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="its BatchNorm1d is reached more than once"):
        unroll(nn.Sequential(norm, norm), x)


@pytest.mark.parametrize(
    "kind, message, call",
    [
        (TypeError, "module must be a torch.nn.Module, got builtin_function", lambda: unroll(len, torch.ones(2))),
        (TypeError, r"x must be a tensor, \(T, batch, ...\), got list", lambda: unroll(nn.ReLU(), [1.0])),
        (ValueError, "x must have a time axis of at least one step", lambda: unroll(nn.ReLU(), torch.tensor(1.0))),
        (ValueError, r"time axis of at least one step in front, got \(0, 3\)", lambda: unroll(nn.ReLU(), torch.ones(0, 3))),
        (
            TypeError,
            "LSTM cannot be unrolled: one step of it returns neither a tensor nor",
            lambda: unroll(nn.LSTM(5, 5), torch.ones(6, 3, 5)),
        ),
        (TypeError, "mem must be a tensor or None, got float", lambda: unroll(nn.ReLU(), torch.ones(2), 0.5)),
        (ValueError, "mem belongs to a single neuron, got a ReLU", lambda: unroll(nn.ReLU(), torch.ones(2), torch.ones(()))),
    ],
)
def test_wrong_arguments_are_refused(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_docstring_examples_run():
    assert doctest.testmod(compat).attempted >= 4 and doctest.testmod(compat).failed == 0


# ---- tests against the library ---------------------------------------------------------------------------------------


def run_loop(neuron, x, mem):
    spikes, history = [], []
    for x_t in x:
        s, mem = neuron(x_t, mem)
        spikes.append(s)
        history.append(mem)
    return torch.stack(spikes), torch.stack(history)


def run_and_differentiate(neuron, f, x, mem, seed):
    """Return spikes, membranes and gradients. The last membrane must be the one the neuron stores."""
    generator = torch.Generator().manual_seed(seed)
    x, mem = x.clone().requires_grad_(), mem.clone().requires_grad_()
    spikes, history = f(neuron, x, mem)
    assert torch.equal(neuron.mem, history[-1])
    weights = [torch.randn(t.shape, generator=generator, dtype=x.dtype) for t in (spikes, history)]
    tensors = [x, mem, *neuron.parameters()]
    loss = (spikes * weights[0]).sum() + (history * weights[1]).sum()
    return spikes, history, torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=4)))
    kinds = {"number": (), "channel": shape[-1:], "neuron": shape[1:], "first": (shape[1], *[1] * (len(shape) - 2))}
    values = {}
    for name in ("beta", "threshold"):
        size = kinds[draw(st.sampled_from([*kinds, "number"]))]
        values[name] = (size, draw(st.sampled_from([0.9, 0.5, 0.0, 1.2] if name == "beta" else [1.0, 0.5])))
    options = dict(
        reset_mechanism=draw(st.sampled_from(["subtract", "zero", "none"])),
        reset_delay=draw(st.booleans()),
        learn_beta=draw(st.booleans()),
        learn_threshold=draw(st.booleans()),
        graded_spikes_factor=draw(st.sampled_from([1.0, 1.0, 2.5])),
        learn_graded_spikes_factor=draw(st.booleans()),
    )
    surrogate = draw(st.sampled_from([None, ("atan", 3.0), ("fast_sigmoid", 25), ("fast_sigmoid", 5.0), ("sigmoid", 4)]))
    return shape, values, options, surrogate, draw(st.sampled_from([1, 3, 20])), draw(st.integers(0, 99))


@settings(max_examples=60)
@given(case=cases())
def test_neurons_equal_the_librarys_loop(snn, case):
    """Spikes and membranes are equal bit for bit for any beta, threshold and data. Gradients are equal up to rounding."""
    shape, values, options, surrogate, T, seed = case
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: value + 0.1 * torch.rand(size, generator=generator) if size else value for name, (size, value) in values.items()
    }
    spike_grad = None if surrogate is None else getattr(snn.surrogate, surrogate[0])(surrogate[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neuron = snn.Leaky(**values, **options, spike_grad=spike_grad)
        fused = copy.deepcopy(neuron)
        assert accelerate(fused).replaced
        x = 1.5 * torch.randn((T, *shape), generator=generator)
        mem = 1.5 * torch.randn(shape, generator=generator)
        want = run_and_differentiate(neuron, run_loop, x, mem, seed)
        kernels = seed % 3 == 0 and surrogate is None  # test_leaky.py compares the kernels with the reference
        with backend("cpu" if kernels else "reference"):
            found = (
                run_and_differentiate(fused, unroll, x, mem, seed),
                run_and_differentiate(fused, run_loop, x, mem, seed),
                run_and_differentiate(neuron, unroll, x, mem, seed),
            )
    for spikes, history, grads in found:
        assert torch.equal(spikes, want[0]) and torch.equal(history, want[1])
        if any(g.isnan().any() for g in want[2]):
            # snnTorch's sigmoid overflows far below the threshold; the docstring of compat says so
            assert surrogate[0] == "sigmoid"
            continue
        for got, wanted in zip(grads, want[2], strict=True):
            scale = max(1.0, *(g.abs().max().item() for g in want[2]))
            torch.testing.assert_close(got, wanted, rtol=3e-5, atol=3e-5 * scale)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_neurons_fire_above_the_threshold_only(snn, reset):
    """Test the threshold and the floats next to it bit for bit."""
    one = torch.tensor(1.0)
    x = torch.stack([one, torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)]).repeat(3, 1)
    neuron = snn.Leaky(beta=1.0, reset_mechanism=reset)
    want, got = run_loop(neuron, x, torch.zeros(3)), unroll(neuron, x, torch.zeros(3))
    assert want[0][0].tolist() == [0.0, 1.0, 0.0]
    assert all(torch.equal(g, w) for g, w in zip(got, want))


class Net(nn.Module):
    """A network as snnTorch's tutorials write it."""

    def __init__(self, snn):
        super().__init__()
        grad = snn.surrogate.fast_sigmoid(slope=25)
        self.fc1, self.lif1 = nn.Linear(64, 30), snn.Leaky(beta=0.9, spike_grad=grad, learn_beta=True)
        self.fc2, self.lif2 = (
            nn.Linear(30, 10),
            snn.Leaky(beta=0.8, spike_grad=grad, learn_threshold=True, reset_mechanism="zero"),
        )

    def forward(self, x):
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spikes, history = [], []
        for x_t in x:
            spk1, mem1 = self.lif1(self.fc1(x_t), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            history.append(mem2)
        return torch.stack(spikes), torch.stack(history)


class Unrolled(Net):
    def forward(self, x):
        self.lif1.reset_mem(), self.lif2.reset_mem()
        spk1, _ = unroll(self.lif1, self.fc1(x))
        return unroll(self.lif2, self.fc2(spk1))


def train(net, steps=6):
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.rand((8, 16, 64), generator=generator, dtype=torch.float64)
        y = torch.randint(10, (16,), generator=generator)
        spikes, history = net(2 * x)
        loss = sum(nn.functional.cross_entropy(mem, y) for mem in history) / len(history) + spikes.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("cls, accelerated", [(Net, True), (Unrolled, True), (Unrolled, False)])
def test_training_gives_the_librarys_losses(snn, cls, accelerated, monkeypatch):
    """The losses of six steps agree in float64 up to rounding.

    In float32, training amplifies the rounding of sums until a membrane crosses the threshold in one of the two runs only. The
    order of the sums depends on the processor.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # snnTorch rounds its spikes to float32
    torch.manual_seed(0)
    net = Net(snn).double()
    fused = cls(snn).double()
    fused.load_state_dict(net.state_dict())
    if accelerated:
        assert [name for name, _ in accelerate(fused).replaced] == ["lif1", "lif2"]
    want, got = train(net), train(fused)
    assert want[-1] < want[0]
    assert max(abs(g - w) / w for g, w in zip(got, want)) <= 1e-12
    assert list(fused.state_dict()) == list(net.state_dict())
    for p, q in zip(fused.state_dict().values(), net.state_dict().values()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def hidden_net(snn):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), snn.Leaky(beta=0.7, init_hidden=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )  # fmt: skip


def test_sequential_with_hidden_states_equals_the_library(snn):
    """The second style of snnTorch: utils.reset, pairs as outputs, and membranes that neurons keep between calls."""
    from snntorch import utils

    torch.manual_seed(0)
    net = hidden_net(snn)
    fused = hidden_net(snn)
    fused.load_state_dict(net.state_dict())
    x = 3 * torch.rand(10, 2, 1, 8, 8)
    want = [torch.stack(t) for t in zip(*[net(x_t) for x_t in x])]
    for prepare in (lambda: None, lambda: accelerate(fused)):
        prepare()
        utils.reset(fused)
        got = [torch.cat(t) for t in zip(*[unroll(fused, part) for part in x.split([4, 6])])]
        for g, w in zip(got, want):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
        assert torch.equal(fused[5].mem, got[1][-1]) and fused[1].mem.shape == (2, 4, 6, 6)
    utils.reset(fused)
    assert not fused[1].mem.any() and fused[1].mem.grad_fn is None
    step = fused(x[0])
    assert (
        isinstance(step, tuple) and torch.equal(step[0], want[0][0]) and isinstance(fused[1](x[0][:, :, :6, :6]), torch.Tensor)
    )
    snn.Leaky.detach_hidden()
    assert fused[5].mem.grad_fn is None
    with pytest.raises(TypeError, match="mem must not be given to a neuron with init_hidden=True"):
        unroll(fused[1], x, x[0])
    net = nn.Sequential(snn.Leaky(beta=0.7), nn.Flatten())
    with pytest.raises(ValueError, match="layer 1 of the nn.Sequential would be given the pair"):
        unroll(net, x)


def test_accelerate_keeps_identity_and_restore_undoes_it(snn):
    neuron = snn.Leaky(beta=0.9, learn_beta=True)
    keys, seen = list(neuron.state_dict()), []
    neuron.register_forward_hook(lambda *args: seen.append(1))
    net = nn.ModuleList([neuron, neuron])
    assert accelerate(net).replaced == (("0", "Leaky"),) and net[0] is neuron and type(neuron) is snn.Leaky
    assert list(neuron.state_dict()) == keys and neuron in snn.Leaky.instances
    x = torch.rand(5, 2, 3)
    with torch.no_grad():
        first, _ = run_loop(neuron, x, neuron.reset_mem())
        assert seen == [1] * 5
        twin = copy.deepcopy(neuron)
        assert type(twin) is snn.Leaky
        report = restore(net)
        assert report.replaced == (("0", "Leaky"),) and "snnTorch's own code" in str(report) and type(neuron) is snn.Leaky
        assert all(torch.equal(a, b) for a, b in zip(run_loop(neuron, x, neuron.mem), run_loop(twin, x, twin.mem)))
    assert "fused by sdit_kernels" in repr(twin) and "fused" not in repr(neuron)


def test_construction_takes_the_librarys_arguments(snn):
    Leaky = compat.Leaky
    neuron = Leaky(0.9, threshold=0.5, reset_mechanism="zero")
    assert type(neuron) is snn.Leaky and "fused" in repr(neuron) and "fused" not in repr(snn.Leaky(0.9))
    x = torch.rand(5, 2, 3)
    got = run_loop(neuron, x, neuron.init_leaky())
    want = run_loop(snn.Leaky(0.9, threshold=0.5, reset_mechanism="zero"), x, torch.zeros(2, 3))
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    with pytest.raises(ValueError, match="Leaky cannot be fused: state_quant has no fused kernel here; use snntorch.Leaky"):
        Leaky(0.9, state_quant=lambda t: t)
    with pytest.raises(TypeError, match="mem must not be given to a neuron with init_hidden=True"):
        Leaky(0.9, init_hidden=True)(x[0], x[0])


def test_a_loaded_spike_factor_is_used(snn):
    neuron = snn.Leaky(beta=0.5)
    accelerate(neuron)
    x = torch.full((3, 2), 2.0)
    assert unroll(neuron, x)[0].max() == 1
    neuron.load_state_dict(snn.Leaky(beta=0.5, graded_spikes_factor=3.0).state_dict())
    assert unroll(neuron, x)[0].max() == 3


def test_half_precision_keeps_a_float32_membrane(snn):
    """The membrane is float32. The spikes have the dtype of the data."""
    neuron = snn.Leaky(beta=0.5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        spikes, history = unroll(neuron, torch.rand(4, 3).to(dtype) * 2)
        assert spikes.dtype == dtype and history.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    double = copy.deepcopy(neuron).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    for got, want in zip(unroll(double, x, x[0]), run_loop(double, x, x[0])):
        torch.testing.assert_close(got, want, check_dtype=False)


def test_unsupported_neurons_are_left_with_a_reason(snn):
    surrogate = snn.surrogate

    class Defaults(snn.Leaky):
        def __init__(self):
            super().__init__(beta=0.5)

    class Quicker(snn.Leaky):
        def fire(self, mem):
            return mem

    changed = snn.Leaky(beta=0.5)
    changed.reset_mechanism = "zero"
    replaced, loaded = snn.Leaky(beta=0.5), snn.Leaky(beta=0.5)
    replaced.state_function = lambda x: x
    loaded.load_state_dict(snn.Leaky(beta=0.5, reset_mechanism="zero").state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inhibition = snn.Leaky(beta=0.5, inhibition=True)
    net = nn.ModuleDict({
        "defaults": Defaults(), "quicker": Quicker(beta=0.5), "inhibition": inhibition, "changed": changed,
        "replaced": replaced, "loaded": loaded, "never": snn.Leaky(beta=0.5, threshold=float("inf")),
        "quant": snn.Leaky(beta=0.5, state_quant=torch.round), "disabled": snn.Leaky(beta=0.5, surrogate_disable=True),
        "straight": snn.Leaky(beta=0.5, spike_grad=surrogate.straight_through_estimator()),
        "own": snn.Leaky(beta=0.5, spike_grad=surrogate.custom_surrogate(lambda x, g, s: g)),
        "function": snn.Leaky(beta=0.5, spike_grad=torch.relu), "slope": snn.Leaky(beta=0.5, spike_grad=surrogate.atan(-1.0)),
        "recurrent": snn.RSynaptic(alpha=0.9, beta=0.8, all_to_all=False),
    })  # fmt: skip
    report = accelerate(net)
    assert report.replaced == (("defaults", "Defaults"),)
    assert {name: reason for name, _, reason in report.left} == {
        "quicker": "Quicker overrides fire of Leaky",
        "inhibition": "inhibition has no fused kernel here",
        "changed": "its state_function, which snnTorch chooses at construction, does not match its reset_mechanism",
        "replaced": "its state_function, which snnTorch chooses at construction, does not match its reset_mechanism",
        "loaded": "the reset_mechanism_val that was loaded into it does not match its reset_mechanism",
        "never": "its threshold is not finite",
        "quant": "state_quant has no fused kernel here",
        "disabled": "surrogate_disable=True has no formula here",
        "straight": "surrogate straight_through_estimator has no formula here",
        "own": "surrogate custom_surrogate has no formula here",
        "function": "surrogate relu has no formula here",
        "slope": "surrogate atan has alpha=-1.0, which is not a positive number",
        "recurrent": "this kind of neuron has no fused kernel here",
    }
    x = torch.rand(5, 2, 3)
    with pytest.warns(UserWarning, match="Quicker runs step by step: Quicker overrides fire of Leaky"):
        spikes, history = unroll(net["quicker"], x, torch.zeros(2, 3))
    assert torch.equal(spikes, history)
    with pytest.warns(UserWarning, match="Alpha runs step by step: this kind of neuron has no fused kernel here"):
        assert [t.shape for t in unroll(snn.Alpha(0.9, 0.8), x)] == [x.shape] * 4


def test_changes_after_accelerate_are_warned_about(snn):
    neuron = snn.Leaky(beta=0.5, init_hidden=True)
    accelerate(neuron)
    neuron.state_quant = torch.round
    with pytest.warns(UserWarning, match="Leaky runs snnTorch's own code: state_quant has no fused kernel here"):
        assert neuron(torch.full((3,), 2.0)).tolist() == [1.0] * 3
    neuron.state_quant = False
    hooked = copy.deepcopy(neuron)
    hooked.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="Leaky runs step by step: it has hooks"):
        unroll(hooked, torch.rand(4, 3))
    wide = snn.Leaky(beta=torch.rand(2, 3, 4), init_hidden=True)
    accelerate(wide)
    with pytest.warns(UserWarning, match=r"has beta \(2, 3, 4\) and threshold \(\) for data \(3, 4\), which the kernels"):
        assert wide(torch.rand(3, 4)).shape == (2, 3, 4)  # the library broadcasts here


def test_integer_data_runs_the_librarys_code(snn):
    neuron, twin = (snn.Leaky(beta=0.5) for _ in range(2))
    accelerate(neuron)
    x = torch.randint(3, (2, 3))
    with pytest.warns(UserWarning, match="Leaky runs snnTorch's own code: the kernels do not take its data, torch.int64"):
        got = neuron(x, neuron.init_leaky())
    assert all(torch.equal(a, b) for a, b in zip(got, twin(x, twin.init_leaky())))


@pytest.mark.parametrize("fused", [False, True])
def test_a_neuron_used_twice_makes_the_net_run_step_by_step(snn, fused):
    """Within one step the second use sees the state that the first use left.

    So the whole net runs step by step, with a warning.
    """
    from snntorch import utils

    torch.manual_seed(0)
    neuron, fc, fc2 = snn.Leaky(beta=0.8, threshold=0.3, init_hidden=True), nn.Linear(5, 5), nn.Linear(5, 5)
    block, own = nn.Sequential(fc, neuron), Wrapped(neuron)
    nets = [
        nn.Sequential(block, block), nn.Sequential(block, fc2, neuron), nn.Sequential(neuron, neuron),
        nn.Sequential(Wrapped(neuron), Wrapped(neuron)), nn.Sequential(own, fc, own),
        nn.Sequential(fc2, nn.Sequential(nn.Sequential(neuron), fc), Wrapped(block)),
    ]  # fmt: skip
    x = torch.randn(6, 3, 5)
    for net in nets:
        neuron.mem = torch.zeros(0)
        twin = copy.deepcopy(net)
        restore(twin)
        if fused:
            assert len(accelerate(net).replaced) == (net is nets[0])
        want = torch.stack([twin(x_t) for x_t in x])
        utils.reset(net)
        with pytest.warns(UserWarning, match="Sequential runs step by step: its (Leaky|Wrapped) is reached more than once"):
            assert torch.equal(unroll(net, x), want)
        assert torch.equal(neuron.mem, next(m for m in twin.modules() if isinstance(m, snn.Leaky)).mem)
    pairs = snn.Leaky(beta=0.8)
    with (
        pytest.warns(UserWarning, match="its Leaky is reached more than once"),
        pytest.raises(ValueError, match="layer 1 of the nn.Sequential would be given the pair"),
    ):
        unroll(nn.Sequential(pairs, pairs), x)


def test_a_factor_changed_through_data_is_used(snn):
    neuron, twin = (snn.Leaky(beta=0.9, threshold=0.2) for _ in range(2))
    accelerate(neuron)
    x = torch.ones(3, 5)
    for change in (
        lambda n: None,
        lambda n: n.graded_spikes_factor.data.fill_(3.0),
        lambda n: n.graded_spikes_factor.data.fill_(1.0),
        lambda n: setattr(n, "graded_spikes_factor", torch.tensor(2.0)),
        lambda n: setattr(n, "graded_spikes_factor", torch.arange(5.0)),
        lambda n: setattr(n, "graded_spikes_factor", torch.tensor(1.0)),
    ):
        change(neuron), change(twin)
        for x_t in (x, x):
            assert all(torch.equal(a, b) for a, b in zip(neuron(x_t), twin(x_t)))
    neuron.graded_spikes_factor = twin.graded_spikes_factor = torch.ones(2, 1, 1)
    with pytest.warns(UserWarning, match=r"Leaky runs step by step: has graded_spikes_factor \(2, 1, 1\) for data \(3, 5\)"):
        assert torch.equal(unroll(neuron, torch.ones(2, 3, 5), x)[0], run_loop(twin, torch.ones(2, 3, 5), x)[0])


def test_a_neuron_made_under_inference_mode_can_be_unrolled(snn):
    with torch.inference_mode():
        neuron = snn.Leaky(beta=0.5, threshold=0.5)
    accelerate(neuron)
    spikes, _ = unroll(neuron, torch.ones(2, 3, requires_grad=True))
    assert spikes.sum() == 6 and neuron(torch.ones(3))[0].sum() == 3


def test_values_without_a_kernel_run_the_librarys_code(snn):
    x, inf, nan = torch.randn(6, 3, 5), torch.tensor(float("inf")), torch.tensor(float("nan"))

    def same(got, want):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)

    for options, change, reason in (
        ({"reset_mechanism": "none"}, lambda n: n.threshold.fill_(inf), "its threshold is not finite"),
        ({}, lambda n: n.threshold.fill_(inf), "its threshold is not finite"),
        ({}, lambda n: n.threshold.fill_(nan), "its threshold is not finite"),
        ({}, lambda n: n.beta.fill_(nan), "its beta is not a number"),
        ({"learn_beta": True}, lambda n: n.beta.data.fill_(nan), "its beta is not a number"),
        ({"beta": torch.full((5,), 0.9)}, lambda n: n.beta[1:2].fill_(nan), "its beta is not a number"),
        ({"threshold": torch.ones(5), "learn_threshold": True}, lambda n: n.threshold.data[:1].fill_(inf), "its threshold"),
    ):
        neuron, twin, late = (snn.Leaky(**{"beta": 0.9} | options) for _ in range(3))
        accelerate(neuron)
        change(neuron), change(twin), change(late)
        with pytest.warns(UserWarning, match=f"Leaky runs snnTorch's own code: {reason}") as seen:
            same(neuron(x[0], x[1]), twin(x[0], x[1]))
        assert seen[0].filename == __file__
        for n in (neuron, late):
            with pytest.warns(UserWarning, match=f"Leaky runs step by step: {reason}"):
                same(unroll(n, x, x[1]), run_loop(twin, x, x[1]))
        assert [(kind, why.startswith(reason)) for _, kind, why in accelerate(late).left] == [("Leaky", True)]


def test_every_unsupported_neuron_is_in_the_report(snn):
    from snntorch._neurons.leakykernel import LeakyKernel

    net = nn.ModuleDict({
        "parallel": snn.LeakyParallel(5, 5), "kernel": LeakyKernel(5, 5), "alpha": snn.Alpha(0.9, 0.8),
        "recurrent": snn.RLeaky(beta=0.5, all_to_all=False), "delta": snn.DeltaLeaky(beta=0.5),
    })  # fmt: skip
    report = accelerate(net)
    assert {name: kind for name, kind, _ in report.left} == {
        "parallel": "LeakyParallel", "kernel": "LeakyKernel", "alpha": "Alpha", "recurrent": "RLeaky",
        "delta": "DeltaLeaky",
    }  # fmt: skip
    assert all(left.reason == "this kind of neuron has no fused kernel here" for left in report.left[:-1])
    assert not report.replaced and report.left[-1].reason.startswith("DeltaLeaky overrides")


def test_wrong_membranes_raise_clear_errors(snn):
    x = torch.ones(6, 3, 5)
    for neuron in (snn.Leaky(beta=0.5), compat.Leaky(beta=0.5)):
        with pytest.raises(TypeError, match="mem must be a tensor or None, got float"):
            unroll(neuron, x, 0.5)
    with pytest.raises(TypeError, match="mem must be a tensor or None, got float"):
        neuron(x[0], 0.5)
    for shape in ((2, 1), (3, 2)):
        neuron = snn.Leaky(beta=torch.rand(shape))
        with (
            pytest.warns(UserWarning, match=rf"step by step: has beta \({shape[0]}, {shape[1]}\) and threshold \(\) for data"),
            pytest.raises(RuntimeError, match="must match"),  # this error comes from the library
        ):
            unroll(neuron, x, x[0])


def test_data_changed_in_place_before_the_backward_pass_is_refused(snn):
    neuron = compat.Leaky(beta=0.5)
    x = torch.ones(3, requires_grad=True)
    y = 1 * x
    spikes, _ = neuron(y)
    y += spikes
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


# ---- Synaptic and Lapicque -------------------------------------------------------------------------------------------


def loop_over(neuron, x, states):
    """Return (spikes, states after every step), stacked, from snnTorch's loop."""
    steps = []
    for x_t in x:
        s, *states = neuron(x_t, *states)
        steps.append((s, *states))
    return tuple(map(torch.stack, zip(*steps)))


def unrolled(neuron, x, states):
    return unroll(neuron, x, states[-1], **({"syn": states[0]} if len(states) == 2 else {}))


def differentiated(run, neuron, x, states, seed):
    """Return the outputs, and the gradients of the data, the states and the parameters."""
    x, states = x.clone().requires_grad_(), [v.clone().requires_grad_() for v in states]
    outputs = run(neuron, x, states)
    for name, seq in zip(("syn", "mem") if len(states) == 2 else ("mem",), outputs[1:], strict=True):
        assert torch.equal(getattr(neuron, name), seq[-1])
    made = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=made, dtype=torch.float64) for t in outputs]
    tensors = [x, *states, *neuron.parameters()]
    loss = sum((t * w).sum() for t, w in zip(outputs, weights))
    return outputs, torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def value(kind, number, generator):
    size = {"number": (), "channel": (5,), "neuron": (2, 5)}[kind]
    t = torch.rand(size, generator=generator, dtype=torch.float64)
    return torch.tensor(number, dtype=torch.float64) + 0.1 * t if size else number


@st.composite
def two_state_cases(draw):
    kinds = [draw(st.sampled_from(["number", "channel", "neuron"])) for _ in range(3)]
    flag = st.booleans()
    options = dict(
        reset_mechanism=draw(st.sampled_from(["subtract", "zero", "none"])), reset_delay=draw(flag), learn_alpha=draw(flag),
        learn_beta=draw(flag), learn_threshold=draw(flag),
    )  # fmt: skip
    return kinds, options, draw(st.sampled_from([1, 4, 20])), draw(st.integers(0, 99))


def check_against_loop(monkeypatch, make, states, x, seed):
    """Compare the accelerated neuron in the loop and unrolled, and the neuron unrolled, with snnTorch's loop in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # snnTorch rounds its spikes to float32
    want = differentiated(loop_over, make(), x, states, seed)
    fused, again, plain = make(), make(), make()  # a learnt beta of Lapicque has one backward pass, in snnTorch too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate(fused).replaced and "fused by sdit_kernels" in repr(fused)
        accelerate(again)
        with backend("reference"):  # test_cuba.py compares the kernels with the reference
            found = [differentiated(unrolled, neuron, x, states, seed) for neuron in (fused, plain)]
            found.append(differentiated(loop_over, again, x, states, seed))
    scale = max(1.0, *(g.abs().max().item() for g in want[1]))
    for outputs, gradients in found:
        assert torch.equal(outputs[0], want[0][0])
        for got, wanted in zip(outputs[1:], want[0][1:], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        for got, wanted in zip(gradients, want[1], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10 * scale)


@settings(max_examples=25)
@given(case=two_state_cases())
def test_synaptic_equals_the_librarys_loop(snn, case):
    kinds, options, T, seed = case

    def make():
        made = torch.Generator().manual_seed(seed)
        alpha, beta, threshold = (value(kind, number, made) for kind, number in zip(kinds, (0.8, 0.6, 0.7)))
        return snn.Synaptic(alpha, beta, threshold=threshold, **options).double()

    made = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(T, 2, 5, generator=made, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        check_against_loop(patch, make, [torch.randn(2, 5, generator=made, dtype=torch.float64) for _ in range(2)], x, seed)


LAPICQUE = [  # the parameters that snnTorch takes; beta learnt needs a scalar, which C then depends on
    dict(R=5, C=1e-1, time_step=0.3), dict(beta=0.7), dict(beta=0.6, R=2.0), dict(beta=0.5, C=1.5), dict(R=1.5, C=2.0),
    dict(beta=torch.tensor(0.7, dtype=torch.float64), learn_beta=True),
]  # fmt: skip


@settings(max_examples=20)
@given(data=st.data())
def test_lapicque_equals_the_librarys_loop(snn, data):
    options = dict(
        data.draw(st.sampled_from(LAPICQUE)), reset_mechanism=data.draw(st.sampled_from(["subtract", "zero", "none"])),
        learn_threshold=data.draw(st.booleans()),
    )  # fmt: skip
    seed, T, kind = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 4, 20])), data.draw(st.sampled_from(
        ["number", "channel", "neuron"]
    ))  # fmt: skip
    per_channel = data.draw(st.booleans()) and "R" not in options and "learn_beta" not in options

    def make():
        made = torch.Generator().manual_seed(seed)
        given_ = dict(options, threshold=value(kind, 0.6, made))
        if per_channel:
            given_["beta"] = 0.5 + 0.4 * torch.rand(1, generator=made, dtype=torch.float64)
        if "learn_beta" in given_:
            given_["beta"] = given_["beta"].clone()
            neuron = snn.Lapicque(**given_)  # .double() would cut C off from beta
            if isinstance(neuron.threshold, torch.nn.Parameter):  # the loop sums its gradients in its dtype
                neuron.threshold = torch.nn.Parameter(neuron.threshold.detach().double())
            return neuron
        return snn.Lapicque(**given_).double()

    made = torch.Generator().manual_seed(seed + 1)
    x = 2 * torch.randn(T, 2, 5, generator=made, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        check_against_loop(patch, make, [torch.randn(2, 5, generator=made, dtype=torch.float64)], x, seed)


def test_synaptic_bits_equal_the_librarys_in_float32(snn):
    x = 1.5 * torch.randn(20, 3, 40, generator=torch.Generator().manual_seed(0))
    for make in (lambda: snn.Synaptic(0.83, 0.71, threshold=0.9), lambda: snn.Lapicque(R=2.7, C=1.3, time_step=0.6)):
        neuron, fused = make(), make()
        accelerate(fused)
        states = [torch.zeros(3, 40) for _ in (("syn", "mem") if hasattr(neuron, "syn") else ("mem",))]
        want = loop_over(neuron, x, states)
        for run in (loop_over, unrolled):
            assert all(torch.equal(a, b) for a, b in zip(run(fused, x, states), want, strict=True))


def test_hidden_states_of_synaptic_work_as_in_the_library(snn):
    from snntorch import utils

    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), snn.Synaptic(0.8, 0.7, init_hidden=True), nn.Linear(8, 4),
            snn.Synaptic(torch.full((4,), 0.8), 0.7, threshold=0.3, init_hidden=True, output=True, reset_mechanism="zero"),
        )  # fmt: skip

    plain, fused = net(), net()
    x = 3 * torch.rand(10, 2, 6)
    want = [torch.stack(t) for t in zip(*[plain(x_t) for x_t in x])]
    assert len(accelerate(fused).replaced) == 2
    got = [torch.cat(t) for t in zip(*[unroll(fused, part) for part in x.split([4, 6])])]
    assert len(got) == 3 and got[0].any()
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused[3].syn, got[1][-1]) and torch.equal(fused[3].mem, got[2][-1])
    utils.reset(fused)
    assert not fused[1].syn.any() and not fused[1].mem.any() and fused[1].syn.grad_fn is None
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert restore(fused).replaced == (("1", "Synaptic"), ("3", "Synaptic"))
    with pytest.raises(TypeError, match="syn must not be given to a neuron with init_hidden=True"):
        unroll(compat.Synaptic(0.9, 0.8, init_hidden=True), x, syn=x[0])


def test_the_states_of_another_neuron_are_refused(snn):
    x = torch.ones(4, 3, 5)
    with pytest.raises(ValueError, match="syn belongs to a neuron that has it, got a Leaky"):
        unroll(snn.Leaky(0.5), x, syn=x[0])
    with pytest.raises(TypeError, match="syn must be a tensor or None, got float"):
        unroll(snn.Synaptic(0.5, 0.5), x, syn=0.5)
    with pytest.raises(ValueError, match="syn belongs to a single neuron, got a ReLU"):
        unroll(nn.ReLU(), x, syn=x[0])
    with pytest.raises(ValueError, match="Synaptic cannot be fused: inhibition"), pytest.warns(UserWarning):
        compat.Synaptic(0.5, 0.5, inhibition=True)
    late = compat.Lapicque(R=1.0, C=2.0)
    late.C.fill_(-1.0)
    with pytest.warns(UserWarning, match="Lapicque runs snnTorch's own code: its C is not positive and finite"):
        late(x[0], x[0])


def test_a_neuron_with_two_states_compiles_in_one_graph(snn):
    torch.compiler.reset()
    fused, twin = (compat.Synaptic(0.8, torch.full((5,), 0.7), init_hidden=True, output=True) for _ in range(2))
    x = torch.rand(4, 3, 5)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    compiled_unroll = torch.compile(lambda x: unroll(fused, x), fullgraph=True, backend="aot_eager")
    for x_t in x:
        assert all(map(torch.equal, compiled(x_t), twin(x_t)))
    assert all(map(torch.equal, compiled_unroll(x), unroll(twin, x)))
