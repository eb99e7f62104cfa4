"""sdit_kernels/nn: modules equal their ops, and each neuron keeps its membrane correctly whatever happens to the module."""

import copy
import doctest
import inspect
import io
import math
import pickle
import re
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdit_kernels.nn
from sdit_kernels import backend, dispatch, lif, lif_rate
from sdit_kernels.nn import (
    IF,
    LIF,
    AdLIF,
    ChannelMix,
    CuBa,
    Lapicque,
    Leaky,
    LIFRate,
    OverTime,
    ParametricLIF,
    TimeMix,
    detach,
    reset,
)

STATEFUL = [LIF, IF, ParametricLIF]
on_both_backends = pytest.mark.parametrize("name", ["cpu", "reference"])


def data(*shape, seed=0, dtype=torch.float32):
    """Multiples of 1/16 around the threshold. With tau = 2 the arithmetic is exact."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 49, shape, generator=generator) / 16).to(dtype)


def neuron_op(module, x, v=None, **extra):
    """Return the op that a module computes, called directly."""
    tau = 1 / torch.sigmoid(module.w) if isinstance(module, ParametricLIF) else module.tau
    names = ("decay_input", "v_threshold", "v_reset", "surrogate", "alpha", "detach_reset")
    return lif(x, v, tau=tau, return_v=True, **{n: getattr(module, n) for n in names}, **extra)


def call_once(module, shape=(4, 2, 3), dtype=torch.float32):
    """Call the module with gradients once, so that its membrane is part of a graph."""
    module(data(*shape, dtype=dtype).requires_grad_())
    assert module.v.requires_grad and not module.v.is_leaf
    return module


@pytest.mark.parametrize("module", [sdit_kernels.nn.neurons, sdit_kernels.nn.rwkv])
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 5 and found.failed == 0


# --- values and gradients ---------------------------------------------------------------------------------------------------


@st.composite
def neurons(draw, name):
    """Random modules. On the CPU kernels few settings vary, because each variant takes seconds to compile."""
    kind = draw(st.sampled_from(STATEFUL))
    kwargs = {"v_reset": draw(st.sampled_from([0.0, None]))}
    if name == "reference":
        kwargs["detach_reset"] = draw(st.booleans())
        if kind is not IF:
            kwargs["decay_input"] = draw(st.booleans())
    if kind is ParametricLIF:
        kwargs["channels"] = draw(st.sampled_from([None, 3]))
    return kind(**kwargs)


@on_both_backends
@settings(deadline=None, max_examples=25)
@given(
    draw=st.data(),
    chunks=st.lists(st.sampled_from([0, 1, 2, 3, "s"]), min_size=1, max_size=5),
    batch=st.sampled_from([(), (1,), (2, 5), (0,)]),
    seed=st.integers(0, 2**16),
)
def test_several_calls_in_either_step_mode_equal_one_call_of_lif(name, draw, chunks, batch, seed):
    """Compare spikes, membrane and gradients of several calls, connected by the graph, with one call of the op."""
    module = draw.draw(neurons(name))
    dtype = draw.draw(st.sampled_from([torch.float32, torch.bfloat16] if name == "reference" else [torch.float32]))
    T = sum(1 if n == "s" else n for n in chunks)
    x = data(T, *batch, 3, seed=seed, dtype=dtype).requires_grad_()
    g, g_v = data(T, *batch, 3, seed=seed + 1, dtype=dtype), data(*batch, 3, seed=seed + 2)
    module.store_v_seq = True
    with backend(name):
        s, v_seq, t = [], [], 0
        for n in chunks:
            module.step_mode = "s" if n == "s" else "m"
            if n == "s":
                s.append(module(x[t]).unsqueeze(0))
            else:
                s.append(module(x[t : t + n]))
            v_seq.append(module.v_seq)
            t += s[-1].shape[0]
        s, v = torch.cat(s), module.v
        expected_s, expected_v, expected_v_seq = neuron_op(module, x, return_v_seq=True)
        inputs = [x, *module.parameters()]
        if T > 0:
            got, expected = (torch.autograd.grad(o, inputs, [g, g_v]) for o in ((s, v), (expected_s, expected_v)))
    assert s.dtype == dtype and v.dtype == torch.float32
    torch.testing.assert_close(s, expected_s, rtol=0, atol=0)
    torch.testing.assert_close(v, expected_v, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(v_seq), expected_v_seq, rtol=0, atol=0)
    if T > 0:
        torch.testing.assert_close(got, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_integrate_and_fire_adds_up_without_a_leak():
    x = torch.tensor([0.25, 0.5, 0.125, 0.25, 0.0, 0.75])[:, None]
    neuron = IF(store_v_seq=True)
    assert neuron.tau == math.inf and not neuron.decay_input
    assert neuron(x).flatten().tolist() == [0, 0, 0, 1, 0, 0]
    assert neuron.v_seq.flatten().tolist() == [0.25, 0.75, 0.875, 0, 0, 0.75]


@pytest.mark.parametrize("channels", [None, 3])
def test_parametric_lif_learns_the_logit_of_one_over_tau(channels):
    neuron = ParametricLIF(init_tau=4.0, channels=channels)
    assert neuron.w.shape == (() if channels is None else (3,))
    torch.testing.assert_close(neuron.tau, torch.full_like(neuron.w, 4.0))
    x, g = data(5, 2, 3), torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(1))
    neuron(x).backward(g)
    tau = torch.full_like(neuron.w, 4.0, requires_grad=True)
    lif(x, tau=tau).backward(g)
    torch.testing.assert_close(neuron.w.grad, tau.grad * -3.0)  # d tau / d w = -exp(-w) = 1 - tau
    assert neuron.w.grad.abs().min() > 0


@pytest.mark.parametrize(("parameter", "x"), [("float32", "float64"), ("bfloat16", "float32"), ("float64", "float32")])
def test_parametric_lif_computes_tau_in_the_wider_type(parameter, x):
    parameter, x = getattr(torch, parameter), getattr(torch, x)
    neuron = ParametricLIF(init_tau=3.0).to(parameter)
    with backend("reference"):
        s = neuron(data(4, 3, dtype=x))
        s.sum().backward()
    assert s.dtype == x and neuron.w.grad.dtype == parameter
    torch.testing.assert_close(neuron.tau.item(), 3.0, rtol=4e-3, atol=0)
    assert neuron.tau.dtype == torch.promote_types(parameter, torch.float32)


@on_both_backends
@pytest.mark.parametrize("extras", [(), ("residual",), ("gate",), ("residual", "gate")])
def test_lif_rate_equals_its_op_and_keeps_no_state(name, extras):
    x = data(2, 5, 3).requires_grad_()
    extra = {n: data(2, 5, 3, seed=i + 1).requires_grad_() for i, n in enumerate(extras)}
    neuron = LIFRate(3, tau=4.0, v_reset=None, alpha=3.0, detach_reset=True)
    with backend(name):
        expected = lif_rate(x, 3, tau=4.0, v_reset=None, alpha=3.0, detach_reset=True, **extra)
        before = dict(vars(neuron))
        for _ in range(2):
            out = neuron(x, **extra)
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert vars(neuron) == before
        inputs = [x, *extra.values()]
        got, wanted = (torch.autograd.grad(o.square().sum(), inputs, retain_graph=True) for o in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@on_both_backends
@pytest.mark.parametrize("kind", [LIF, IF, ParametricLIF, LIFRate])
def test_a_parameter_as_threshold_is_learned_and_a_tensor_becomes_a_buffer(name, kind):
    neuron = kind(v_threshold=torch.nn.Parameter(torch.ones(3)))
    assert "v_threshold" in dict(neuron.named_parameters())
    with backend(name):
        neuron(data(4, 2, 3)).sum().backward()
    assert neuron.v_threshold.grad.abs().sum() > 0
    neuron = kind(v_threshold=torch.ones(3)).double()
    assert "v_threshold" in neuron.state_dict() and neuron.v_threshold.dtype == torch.float64
    assert "v_threshold=Tensor(3,)" in repr(neuron)
    with pytest.raises(ValueError, match=re.escape("v_threshold must be a scalar or have shape (4,)")):
        neuron(data(2, 4))


def test_every_setting_reaches_the_op():
    x = data(6, 7, seed=3).requires_grad_()
    base = {"tau": 4.0, "decay_input": False, "v_threshold": 0.75, "v_reset": 0.25, "surrogate": "erf", "alpha": 1.5}
    for changed in ({}, *({k: v} for k, v in {**base, "detach_reset": True}.items())):
        kwargs = {"tau": 2.0, "v_threshold": 1.0} | changed
        if changed.keys() == {"alpha"} or not changed:
            kwargs["surrogate"] = "sigmoid"
        for module, op in ((LIF(**kwargs), lif), (LIFRate(4, **kwargs), lif_rate)):
            with backend("reference"):
                got, expected = module(x), op(x, **kwargs)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            a, b = (torch.autograd.grad(o.sum(), x)[0] for o in (got, expected))
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:a surrogate function of your own")
def test_a_users_surrogate_function_gives_the_gradient():
    calls = []

    def boxcar(z):
        calls.append(z)
        return (z.abs() < 0.5).to(z.dtype)

    x = data(4, 3).requires_grad_()
    LIF(surrogate=boxcar)(x).sum().backward()
    (expected,) = torch.autograd.grad(lif(x, surrogate="rect", alpha=1.0).sum(), x)
    assert calls
    torch.testing.assert_close(x.grad, expected)


# --- state ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STATEFUL)
def test_the_membrane_is_carried_until_reset(kind):
    neuron, x = kind(), data(4, 2, 3)
    assert neuron.v is None and neuron.v_seq is None
    first = neuron(x)
    assert neuron.v.shape == (2, 3) and neuron.v_seq is None
    carried = neuron.v
    torch.testing.assert_close(neuron(x), neuron_op(neuron, x, carried)[0], rtol=0, atol=0)
    neuron.reset()
    assert neuron.v is None
    torch.testing.assert_close(neuron(x), first, rtol=0, atol=0)


def test_the_next_call_starts_from_an_assigned_membrane():
    neuron = LIF()
    neuron.v = data(2, 3, seed=4).requires_grad_()
    v = neuron.v
    x = data(4, 2, 3)
    torch.testing.assert_close(neuron(x), lif(x, v))
    assert torch.autograd.grad(neuron.v.sum(), v)[0].shape == (2, 3)


def test_detach_keeps_the_membrane_and_cuts_its_graph():
    x, y = data(4, 3).requires_grad_(), data(4, 3, seed=1).requires_grad_()
    neuron = LIF(v_threshold=100.0, store_v_seq=True)
    neuron(x)
    v = neuron.v.clone()
    neuron.detach_()
    assert not neuron.v.requires_grad and not neuron.v_seq.requires_grad
    torch.testing.assert_close(neuron.v, v, rtol=0, atol=0)
    neuron(y)
    neuron.v.sum().backward()
    assert x.grad is None and y.grad.abs().sum() > 0


def test_without_detach_gradients_reach_earlier_calls():
    x = data(4, 3).requires_grad_()
    neuron = LIF(v_threshold=100.0)
    neuron(x)
    neuron(data(2, 3))
    neuron.v.sum().backward()
    torch.testing.assert_close(x.grad, 0.5 ** torch.arange(6.0, 2.0, -1).unsqueeze(1).expand(4, 3))


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize(
    ("shape", "mode", "error"),
    [((4, 5, 3), "m", "(5, 3)"), ((4, 3), "m", "(3,)"), ((4, 2, 3), "s", "(4, 2, 3)"), ((2,), "s", "(2,)"), ((), "m", "()")],
)
def test_data_of_another_shape_is_refused_and_the_membrane_is_kept(kind, shape, mode, error):
    neuron = call_once(kind())
    v = neuron.v
    neuron.step_mode = mode
    with pytest.raises(ValueError, match=rf"has shape \(2, 3\), and x asks for {re.escape(error)}; call reset\(\)"):
        neuron(data(*shape))
    assert neuron.v is v
    neuron.reset()
    if shape:
        assert neuron(data(*shape)).shape == shape


@pytest.mark.parametrize(
    ("x", "kind", "error"),
    [
        (data(4, 2, 3, dtype=torch.float64), TypeError, "v must be torch.float64 where x is torch.float64, got torch.float32"),
        (torch.empty(4, 2, 3, device="meta"), ValueError, "v must be on the device of x, meta, got cpu"),
        (torch.ones(4, 2, 3, dtype=torch.int64), TypeError, "x must be float32, float64, bfloat16 or float16, got torch.int64"),
        ([1.0], TypeError, "x must be a tensor, got list"),
    ],
)
@pytest.mark.parametrize("neuron", [LIF(), ParametricLIF(), LIF(step_mode="s")], ids=["m", "parametric", "s"])
def test_data_that_does_not_match_the_membrane_is_refused(neuron, x, kind, error):
    neuron = copy.deepcopy(neuron)
    neuron(data(2, 3) if neuron.step_mode == "s" else data(4, 2, 3))
    v = neuron.v
    with pytest.raises(kind, match=re.escape(error)):
        neuron(x[0] if neuron.step_mode == "s" and isinstance(x, torch.Tensor) else x)
    assert neuron.v is v


def _by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def _by_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _by_pickle, _by_save])
@pytest.mark.parametrize("kind", STATEFUL)
def test_copies_take_the_membrane_without_its_graph(kind, duplicate):
    x = data(4, 2, 3).requires_grad_()
    net = torch.nn.Sequential(kind(store_v_seq=True))
    net(x)
    twin = duplicate(net)
    assert not twin[0].v.requires_grad and not twin[0].v_seq.requires_grad
    torch.testing.assert_close(twin[0].v, net[0].v.detach(), rtol=0, atol=0)
    more = data(3, 2, 3, seed=1)
    torch.testing.assert_close(twin(more), net(more), rtol=0, atol=0)
    twin[0].v.detach().fill_(7.0)
    assert not (net[0].v == 7).any()
    net[0].v.sum().backward()
    assert x.grad.abs().sum() > 0


def test_an_exponential_moving_average_works_on_a_network_in_use():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), LIF(), ParametricLIF(channels=3))
    net(data(4, 2, 3)).sum().backward()
    ema = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    reset(net)
    net(data(4, 5, 3)).sum().backward()
    ema.update_parameters(net)
    assert ema.module[1].v.shape == (2, 3)


@pytest.mark.parametrize("kind", STATEFUL)
def test_the_state_dict_has_no_membrane(kind):
    fresh, old = kind(), call_once(kind())
    assert fresh.state_dict().keys() == old.state_dict().keys() == ({"w"} if kind is ParametricLIF else set())
    assert not list(old.buffers())  # as a buffer, DistributedDataParallel would broadcast it
    v = old.v
    old.load_state_dict(fresh.state_dict(), strict=True)
    assert old.v is v
    fresh.load_state_dict(old.state_dict(), strict=True)
    assert fresh.v is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", STATEFUL)
def test_the_membrane_follows_the_dtype_of_the_module(kind, dtype):
    neuron = call_once(kind(store_v_seq=True))
    before = neuron.v.detach()
    assert neuron.to(dtype) is neuron
    assert neuron.v.dtype == neuron.v_seq.dtype == dtype and neuron.v.requires_grad
    torch.testing.assert_close(neuron.v, before.to(dtype), rtol=0, atol=0)
    with backend("reference"):
        s = neuron(data(4, 2, 3, dtype=dtype))
        assert s.dtype == dtype and neuron.v.dtype == (dtype if dtype == torch.float64 else torch.float32)
        neuron(data(4, 2, 3, dtype=dtype))  # a wide membrane and narrow data


def test_the_membrane_follows_the_device_of_the_module():
    net = torch.nn.Sequential(call_once(LIF(store_v_seq=True))).to("meta")
    assert net[0].v.is_meta and net[0].v_seq.is_meta
    assert net(torch.empty(4, 2, 3, device="meta")).shape == (4, 2, 3)


def test_a_network_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        net = torch.nn.Sequential(LIF(), IF(), ParametricLIF(init_tau=5.0, channels=3), LIFRate())
        assert net(torch.empty(4, 2, 3)).is_meta
    assert net[2].w.is_meta
    reset(net)
    net.to_empty(device="cpu")
    net[2].reset_parameters()
    torch.testing.assert_close(net[2].tau, torch.full((3,), 5.0))
    assert net(data(4, 2, 3)).shape == (4, 2, 3)


def test_replicas_of_data_parallel_leave_the_membrane_of_the_module_unset():
    neuron = ParametricLIF()
    replica = neuron._replicate_for_data_parallel()
    replica.w = neuron.w
    replica(data(4, 2, 3))
    assert replica.v is not None and neuron.v is None


def test_a_membrane_kept_for_inference_has_no_graph():
    neuron = ParametricLIF(store_v_seq=True)
    with torch.no_grad():
        neuron(data(4, 2, 3).requires_grad_())
    assert neuron.v.grad_fn is None and neuron.v_seq.grad_fn is None


def test_reset_and_detach_reach_only_the_neurons_of_a_network():
    class Elsewhere(torch.nn.Module):
        def reset(self):
            raise AssertionError("not ours")

        def forward(self, x):
            return x

    net = torch.nn.Sequential(
        torch.nn.Linear(3, 3),
        LIF(),
        torch.nn.ModuleDict({"inner": IF(store_v_seq=True)})["inner"],
        ParametricLIF(),
        Elsewhere(),
    )
    neurons = [m for m in net.modules() if isinstance(m, (LIF, IF, ParametricLIF))]
    assert len(neurons) == 3
    net(data(4, 2, 3))
    assert all(n.v.requires_grad for n in neurons)
    detach(net)
    assert not any(n.v.requires_grad for n in neurons) and not neurons[1].v_seq.requires_grad
    net(data(4, 2, 3)).sum().backward()  # detach cut the graph of the first call, so its freed tensors are not needed
    reset(net)
    assert all(n.v is None and n.v_seq is None for n in neurons)
    assert net(data(4, 7, 3)).shape == (4, 7, 3)
    reset(torch.compile(net))
    assert all(n.v is None for n in neurons)


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_an_error_names_a_forgotten_reset(kind, mode):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), kind(step_mode=mode), torch.nn.Linear(3, 3))
    x = data(*((4, 2, 3) if mode == "m" else (2, 3)))
    net(x).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"backward through the graph a second time.*call sdit_kernels.nn.reset\(net\)"
    ) as caught:
        net(x).sum().backward()
    assert "saved tensors after they have already been freed" in str(caught.value.__cause__)
    for mend in (reset, detach):
        mend(net)
        net(x).sum().backward()


def test_a_second_backward_pass_of_one_call_names_retain_graph():
    loss = LIF()(data(4, 3).requires_grad_()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


# --- OverTime ---------------------------------------------------------------------------------------------------------------


def over_time():
    torch.manual_seed(0)
    return OverTime(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8))


@pytest.mark.parametrize("T, B", [(4, 32), (1, 5), (3, 1), (0, 2)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_over_time_equals_its_modules_at_every_step(T, B, contiguous):
    x = data(T, B, 3) if contiguous else data(B, 3, T).permute(2, 0, 1)
    module = OverTime(torch.nn.Linear(3, 8), torch.nn.GELU())
    x.requires_grad_()
    found = module(x)
    wanted = torch.stack([module[1](module[0](x_t)) for x_t in x]) if T else torch.empty(0, B, 8)
    torch.testing.assert_close(found, wanted)
    if T:
        g = data(T, B, 8, seed=1)
        for a, b in zip(*(torch.autograd.grad(y, [x, *module.parameters()], g) for y in (found, wanted))):
            torch.testing.assert_close(a, b)


def test_a_norm_inside_over_time_uses_statistics_of_all_steps():
    net, x = torch.nn.Sequential(over_time(), LIF()), data(4, 32, 3)
    assert net(x).shape == (4, 32, 8)
    linear, norm = net[0]
    flat = torch.nn.functional.linear(x.reshape(128, 3), linear.weight, linear.bias)
    torch.testing.assert_close(norm.running_mean, 0.1 * flat.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * flat.var(0))
    assert list(net.state_dict()) == [
        "0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked",
    ]  # fmt: skip


def test_over_time_takes_images_and_modules_with_several_outputs():
    assert OverTime(torch.nn.Conv2d(3, 8, 3))(data(4, 2, 3, 6, 6)).shape == (4, 2, 8, 4, 4)
    attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

    class Attends(torch.nn.Module):
        def forward(self, x):
            return attention(x, x, x)

    y, weights = OverTime(Attends())(data(3, 2, 5, 4))
    assert y.shape == (3, 2, 5, 4) and weights.shape == (3, 2, 5, 5)
    found = OverTime(torch.nn.AdaptiveMaxPool1d(2, return_indices=True))(data(3, 2, 5, 4))
    assert isinstance(found, tuple) and all(t.shape == (3, 2, 5, 2) for t in found)

    class Largest(torch.nn.Module):
        def forward(self, x):
            return [x, x.max(-1)]

    x = data(3, 2, 5)
    same, largest = OverTime(Largest())(x)
    assert torch.equal(same, x) and torch.equal(largest.values, x.max(-1).values) and largest.indices.shape == (3, 2)


class Returns(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize(
    ("modules", "x", "error", "message"),
    [
        ([], [1.0], TypeError, "x must be a tensor, got list"),
        ([], data(4), ValueError, "x must have axes for time and batch, (T, B, ...), got (4,)"),
        ([Returns(None)], data(4, 2, 3), TypeError, "must return tensors, or tuples of tensors, got NoneType"),
        ([Returns(data(4, 2))], data(4, 2, 3), ValueError, "must keep the first axis, 8 = T*B, got an output of (4, 2)"),
        ([torch.nn.Flatten(0)], data(4, 2, 3), ValueError, "must keep the first axis, 8 = T*B, got an output of (24,)"),
        ([Returns(data())], data(4, 2, 3), ValueError, "must keep the first axis, 8 = T*B, got an output of ()"),
    ],
)
def test_over_time_refuses_wrong_arguments(modules, x, error, message):
    with pytest.raises(error, match=re.escape(message)):
        OverTime(*modules)(x)


class WithStepMode(torch.nn.Module):
    """Has the attributes of SpikingJelly's layers and neurons."""

    step_mode = "m"


class WithMemory(WithStepMode):
    def reset(self):
        pass


class WithMembrane(torch.nn.Module):
    """Has the attributes of snnTorch's neurons."""

    def reset_mem(self):
        pass


@pytest.mark.parametrize("neuron", [LIF, IF, ParametricLIF, WithMemory, WithMembrane])
def test_over_time_refuses_neurons_that_keep_a_membrane(neuron):
    with pytest.raises(ValueError, match=rf"stateless modules, got {neuron.__name__}, which needs the time axis"):
        OverTime(torch.nn.Linear(3, 3), torch.nn.Sequential(neuron()))
    module = OverTime(torch.nn.Linear(3, 3), LIFRate(), WithStepMode())
    with pytest.raises(ValueError, match=neuron.__name__):
        module.append(neuron())


def test_over_time_compiles_exports_and_copies():
    net, x = torch.nn.Sequential(over_time(), LIF()).eval(), data(4, 6, 3)
    wanted = net(x)
    for made in (
        torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager"),
        torch.export.export(
            over_time().eval(), (x,), dynamic_shapes=[{0: torch.export.Dim("T"), 1: torch.export.Dim("B")}]
        ).module(),
        pickle.loads(pickle.dumps(net)),
    ):
        if isinstance(made, torch.fx.GraphModule):
            torch.testing.assert_close(made(data(3, 5, 3)), over_time().eval()(data(3, 5, 3)))
        else:
            reset(made)
            torch.testing.assert_close(made(x), wanted)


# --- torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_compiled_neurons_carry_their_membrane(kind, mode):
    torch.compiler.reset()
    eager = kind(step_mode=mode, store_v_seq=True)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    xs = [data(*((4, 2, 3) if mode == "m" else (2, 3)), seed=i).requires_grad_() for i in range(4)]
    for i, x in enumerate(xs):
        # one graph for a neuron without a membrane and one for a neuron with a membrane
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=0)
        torch.testing.assert_close(module.v, eager.v, rtol=0, atol=0)
        torch.testing.assert_close(module.v_seq, eager.v_seq, rtol=0, atol=0)
    got, expected = (torch.autograd.grad(m.v.sum(), [*xs, *m.parameters()]) for m in (module, eager))
    torch.testing.assert_close(got, expected)
    reset(compiled)
    eager.reset()
    torch.testing.assert_close(compiled(xs[0]), eager(xs[0]), rtol=0, atol=0)


def test_a_compiled_network_is_one_graph_and_trains_like_the_eager_one():
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = torch.nn.Sequential(LIF(), torch.nn.Linear(3, 3), ParametricLIF(channels=3), torch.nn.Linear(3, 3), LIFRate())
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        x = data(4, 2, 3, seed=step)
        losses = [net(x).square().mean() for net in (compiled, eager)]
        torch.testing.assert_close(*losses)
        for loss, net in zip(losses, (compiled, eager)):
            loss.backward()
            detach(net)
    for a, b in zip(module.parameters(), eager.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


# --- construction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LIF, IF, ParametricLIF, LIFRate])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"tau": 0.5}, ValueError, "tau must be at least 1 (and infinite only with decay_input=False), got 0.5"),
        ({"tau": math.inf}, ValueError, "tau must be at least 1"),
        ({"tau": "2"}, TypeError, "tau must be a number or a tensor, got str"),
        ({"init_tau": 1.0}, ValueError, "init_tau must be above 1 and finite"),
        ({"init_tau": math.inf, "decay_input": False}, ValueError, "init_tau must be above 1 and finite"),
        ({"init_tau": math.nan}, ValueError, "init_tau must be above 1 and finite"),
        ({"init_tau": torch.tensor(2.0)}, TypeError, "init_tau must be a number, got Tensor"),
        ({"init_tau": True}, TypeError, "init_tau must be a number, got bool"),
        ({"channels": 0}, ValueError, "channels must be at least 1 or None (one w for all), got 0"),
        ({"channels": 2.0}, TypeError, "channels must be an int or None (one w for all), got float"),
        ({"channels": True}, TypeError, "channels must be an int or None (one w for all), got bool"),
        ({"T": 0}, ValueError, "T must be at least 1, got 0"),
        ({"T": 4.0}, TypeError, "T must be an int, got float"),
        ({"decay_input": 1}, TypeError, "decay_input must be a bool, got int"),
        ({"v_threshold": math.nan}, ValueError, "v_threshold must be finite, got nan"),
        ({"v_threshold": None}, TypeError, "v_threshold must be a number or a tensor, got NoneType"),
        ({"v_reset": math.inf}, ValueError, "v_reset must be finite or None (soft reset), got inf"),
        ({"v_reset": "hard"}, TypeError, "v_reset must be a number or None (soft reset), got str"),
        ({"detach_reset": 0}, TypeError, "detach_reset must be a bool, got int"),
        ({"surrogate": "relu"}, ValueError, "surrogate must be one of atan, "),
        ({"alpha": -1.0}, ValueError, "alpha must be positive and finite, got -1.0"),
        ({"alpha": "2"}, TypeError, "alpha must be a number or None, got str"),
        ({"surrogate": torch.sign, "alpha": 2.0}, ValueError, "alpha belongs to the named surrogates"),
        (
            {"step_mode": "multi"},
            ValueError,
            "step_mode must be 'm' (multi-step, (T, ...)) or 's' (single-step, (...)), got 'mu",
        ),
    ],
)
def test_wrong_settings_are_refused(kind, kwargs, error, message):
    if not kwargs.keys() <= inspect.signature(kind).parameters.keys():
        error, message = TypeError, "unexpected keyword argument"
    with pytest.raises(error, match=re.escape(message)):
        kind(**kwargs)


def test_construction_needs_no_backend(monkeypatch):
    """A network is built on the CPU and moved to a GPU afterwards."""
    monkeypatch.setattr(dispatch, "_resolved", {})
    monkeypatch.setattr(dispatch, "_triton_obstacle", lambda device: "no GPU")
    with backend("triton"):
        for kind in (LIF, IF, ParametricLIF, LIFRate):
            neuron = kind()
            with pytest.raises(RuntimeError, match="no GPU"):
                neuron(data(4, 3))


def test_an_assigned_step_mode_is_checked():
    neuron = LIF()
    with pytest.raises(ValueError, match="step_mode must be"):
        neuron.step_mode = "x"
    assert neuron.step_mode == "m"


@pytest.mark.parametrize(
    ("kind", "positional"),
    [
        (LIF, ["tau", "decay_input", "v_threshold", "v_reset"]),
        (IF, ["v_threshold", "v_reset"]),
        (ParametricLIF, ["init_tau", "decay_input", "v_threshold", "v_reset"]),
        (LIFRate, ["T"]),
    ],
)
def test_positional_arguments_are_those_of_spikingjelly(kind, positional):
    """SpikingJelly's fifth argument is a surrogate function that spikes.

    Ours is the derivative, so it must be passed by name.
    """
    parameters = inspect.signature(kind).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    defaults = {"tau": 2.0, "init_tau": 2.0, "decay_input": True, "v_threshold": 1.0, "v_reset": 0.0, "detach_reset": False}
    defaults |= {"surrogate": "atan", "alpha": None, "step_mode": "m", "store_v_seq": False, "channels": None, "T": 4}
    defaults |= {"levels": None, "threshold": None, "detach_threshold": False}
    assert all(p.default == defaults[p.name] for p in parameters)


@pytest.mark.parametrize("kind", [LIF, IF, ParametricLIF, LIFRate])
def test_repr_shows_every_setting(kind):
    shown = re.findall(r"(\w+)=", repr(kind()))
    assert sorted(shown) == sorted(inspect.signature(kind).parameters)
    assert "v_reset=None" in repr(kind(v_reset=None)) and "surrogate='erf'" in repr(kind(surrogate="erf"))


def test_the_membrane_may_be_set_to_a_number():
    x, neuron = data(4, 2, 3), LIF()
    neuron.v = 0.5
    assert torch.equal(neuron(x), lif(x, torch.full((2, 3), 0.5)))
    neuron.v = 0.5
    assert neuron.double().v == 0.5 and copy.deepcopy(neuron).v == 0.5  # a number needs no conversion and has no graph
    neuron.v = "0.5"
    with pytest.raises(TypeError, match="v must be a tensor, a number or None, got str"):
        neuron(x)


def test_a_membrane_from_inference_mode_allows_training():
    x, neuron = data(4, 2, 3), LIF()
    with torch.inference_mode():
        neuron(x)
    before = neuron.v.clone()
    y = x.clone().requires_grad_()
    s = neuron(y)
    s.sum().backward()
    assert torch.equal(s, lif(x, before)) and y.grad is not None


# --- RWKV's layers ----------------------------------------------------------------------------------------------------------


def plain_wkv(w, u, k, v):
    """The equations in float64, without a running maximum, so keys must be small."""
    n, d = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
    out = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1)):
        e = torch.exp(u + k_t)
        out.append((n + e * v_t) / (d + e))
        n, d = torch.exp(w) * n + torch.exp(k_t) * v_t, torch.exp(w) * d + torch.exp(k_t)
    return torch.stack(out, 1)


def plain_mixes(x, norm_eps, *mixes):
    if norm_eps is not None:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=norm_eps)
    shifted = torch.nn.functional.pad(x, (0, 0, 1, -1))
    return [x * m + shifted * (1 - m) for m in mixes]


def plain_output(module, y, residual):
    if module.neuron is not None:
        y = lif(y.expand(module.neuron.T, *y.shape), tau=module.neuron.tau).mean(0)
    return y if residual is None else residual + y


def plain_time_mix(m, x, residual=None):
    xk, xv, xr = plain_mixes(x, m.norm_eps, m.time_mix_k, m.time_mix_v, m.time_mix_r)
    w, u = -torch.exp(m.time_decay), m.time_first
    k, v = xk @ m.key.weight.T, xv @ m.value.weight.T
    if m.bidirectional:  # add the numerators and denominators of both directions, and count the token itself once
        e = torch.exp(u + k)
        forth, back = ([sums_before_each_token(w, *(t.flip(1) if flip else t for t in (k, v)))] for flip in (False, True))
        n, d = (a + b.flip(1) for a, b in zip(forth[0], back[0]))
        y = (n + e * v) / (d + e)
    else:
        y = plain_wkv(w, u, k, v)
    return plain_output(m, (torch.sigmoid(xr @ m.receptance.weight.T) * y) @ m.output.weight.T, residual)


def sums_before_each_token(w, k, v):
    """Return the sums over the tokens before each token."""
    n, d = [torch.zeros_like(k[:, 0])], [torch.zeros_like(k[:, 0])]
    for k_t, v_t in zip(k.unbind(1), v.unbind(1)):
        n.append(torch.exp(w) * n[-1] + torch.exp(k_t) * v_t)
        d.append(torch.exp(w) * d[-1] + torch.exp(k_t))
    return torch.stack(n[:-1], 1), torch.stack(d[:-1], 1)


def plain_channel_mix(m, x, residual=None):
    xk, xr = plain_mixes(x, m.norm_eps, m.time_mix_k, m.time_mix_r)
    y = torch.sigmoid(xr @ m.receptance.weight.T) * (torch.relu(xk @ m.key.weight.T) ** 2 @ m.value.weight.T)
    return plain_output(m, y, residual)


MIXES = [(TimeMix, plain_time_mix), (ChannelMix, plain_channel_mix)]


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixing_layer(kind, channels=12, layer=1, layers=3, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return kind(channels, layer, layers, **kwargs).to(dtype)


@on_both_backends
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    "kind, plain, kwargs", [(*MIXES[0], {}), (*MIXES[0], {"bidirectional": True}), (*MIXES[1], {}), (*MIXES[1], {"hidden": 7})]
)
def test_mixing_layers_equal_their_equations(name, kind, plain, kwargs, norm_eps, with_residual):
    """Compare outputs and gradients with plain PyTorch in float64."""
    m = mixing_layer(kind, norm_eps=norm_eps, **kwargs)
    x = tokens(2, 9, 12).requires_grad_()
    residual = tokens(2, 9, 12, seed=1).requires_grad_() if with_residual else None
    inputs = [x, *m.parameters(), *([residual] if with_residual else [])]
    with backend(name):
        found = [f(x, residual=residual) for f in (m, lambda x, residual: plain(m, x, residual))]
        torch.testing.assert_close(*found, rtol=0, atol=1e-10)
        grads = [torch.autograd.grad(o, inputs, tokens(2, 9, 12, seed=2)) for o in found]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@on_both_backends
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind, plain", MIXES)
def test_spiking_mixing_layers_equal_their_equations(name, kind, plain, residual):
    """Larger keys and values make neurons fire.

    In float64 no membrane is close enough to the threshold for rounding to matter.
    """
    m = mixing_layer(kind, norm_eps=1e-6, neuron=LIFRate(T=4))
    with torch.no_grad():
        for linear in (m.value, m.output) if kind is TimeMix else (m.key, m.value):
            linear.weight *= 4
    x = tokens(2, 9, 12).requires_grad_()
    y = x if residual else None
    with backend(name):
        out, want = m(x, residual=y), plain(m, x, y)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
        assert 0.02 < (out - (x if residual else 0)).detach().mean() < 0.9
        inputs = [x, *m.parameters()]
        grads = [torch.autograd.grad(o, inputs, tokens(2, 9, 12, seed=2)) for o in (out, want)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@on_both_backends
@pytest.mark.parametrize("kwargs", [{}, {"norm_eps": 1e-6, "neuron": LIFRate(3)}], ids=str)
@pytest.mark.parametrize("kind", [TimeMix, ChannelMix])
def test_slices_of_a_mixing_layer_equal_one_call(name, kind, kwargs):
    m, x = mixing_layer(kind, **kwargs), tokens(2, 11, 12).requires_grad_()
    with backend(name):
        whole = m(x, residual=x)
        parts, state = [], None
        for part in x.split([1, 0, 6, 4], 1):
            out, state = m(part, state, return_state=True, residual=part)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
        last = state[0] if kind is TimeMix else state
        assert torch.equal(last, x[:, -1]) and last.untyped_storage().nbytes() == last.nbytes
        grads = [torch.autograd.grad(o, x, tokens(2, 11, 12, seed=2)) for o in (torch.cat(parts, 1), whole)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    with backend("reference"):
        empty, state = m(x[:, :0], return_state=True)
        assert empty.shape == (2, 0, 12) and (state[0] if kind is TimeMix else state) is None


def test_a_bidirectional_time_mix_refuses_a_state():
    m, x = mixing_layer(TimeMix, bidirectional=True), tokens(1, 3, 12)
    for kwargs in ({"return_state": True}, {"state": (x[:, 0], (x[:, 0], x[:, 0]))}):
        with pytest.raises(ValueError, match="sees the whole sequence: it takes and returns no state"):
            m(x, **kwargs)
    with pytest.raises(TypeError, match=r"state must be None or the state of an earlier call, \(last token, \(ybar, lse\)\)"):
        mixing_layer(TimeMix)(x, x[:, 0])


def test_names_and_shapes_equal_those_of_rwkv():
    shapes = {k: tuple(v.shape) for k, v in TimeMix(8).state_dict().items()}
    square, vector = (8, 8), (1, 1, 8)
    assert shapes == {
        "time_decay": (8,), "time_first": (8,), "time_mix_k": vector, "time_mix_v": vector, "time_mix_r": vector,
        "key.weight": square, "value.weight": square, "receptance.weight": square, "output.weight": square,
    }  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in ChannelMix(8, neuron=LIFRate()).state_dict().items()}
    assert shapes == {
        "time_mix_k": vector, "time_mix_r": vector, "key.weight": (32, 8), "receptance.weight": square, "value.weight": (8, 32),
    }  # fmt: skip
    assert ChannelMix(8, hidden=24).key.out_features == 24


@pytest.mark.parametrize("channels, layer, layers", [(384, 0, 4), (384, 2, 4), (5, 3, 4), (8, 0, 1), (1, 1, 2)])
def test_initial_values_depend_on_the_layer(channels, layer, layers):
    time, channel = TimeMix(channels, layer, layers), ChannelMix(channels, layer, layers)
    a = 0.0 if layers == 1 else layer / (layers - 1)
    b = 1 - layer / layers
    for c in {0, channels // 2, channels - 1}:
        want = {
            "time_decay": -5 + 8 * (c / max(channels - 1, 1)) ** (0.7 + 1.3 * a),
            "time_first": math.log(0.3) + 0.5 * ((c + 1) % 3 - 1),
            "time_mix_k": (c / channels) ** b,
            "time_mix_v": (c / channels) ** b + 0.3 * a,
            "time_mix_r": (c / channels) ** (0.5 * b),
        }
        for name, value in want.items():
            assert getattr(time, name).flatten()[c].item() == pytest.approx(value, rel=1e-6, abs=1e-7), name
        for name in ("time_mix_k", "time_mix_r"):
            assert getattr(channel, name).flatten()[c].item() == pytest.approx((c / channels) ** b, rel=1e-6)
    if channels == 384:  # the initial values of torch.nn.Linear
        for linear in (time.key, time.value, time.receptance, time.output, channel.key, channel.receptance):
            assert linear.weight.std().item() == pytest.approx((3 * channels) ** -0.5, rel=0.01)


def test_a_mixing_layer_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        net = torch.nn.Sequential(TimeMix(6, 1, 3, neuron=LIFRate()), ChannelMix(6, 1, 3))
    assert net(torch.empty(2, 4, 6, device="meta")).is_meta
    net.to_empty(device="cpu")
    for m in net:
        m.reset_parameters()
    torch.testing.assert_close(net[0].time_decay, TimeMix(6, 1, 3).time_decay)
    assert net[0].key.weight.abs().max() <= 6**-0.5 and net(torch.randn(2, 4, 6)).isfinite().all()


def test_mixing_layers_compile_and_run_under_autocast():
    net = torch.nn.Sequential(TimeMix(6, 1, 3, norm_eps=1e-6), ChannelMix(6, 1, 3, norm_eps=1e-6, neuron=LIFRate()))
    twin = copy.deepcopy(net)
    x = tokens(2, 5, 6, dtype=torch.float32)
    torch.compile(net, fullgraph=True, backend="aot_eager")(x).sum().backward()
    twin(x).sum().backward()
    for a, b in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net[0](x, residual=x)
        assert out.dtype == torch.float32 and net[0](x).dtype == torch.bfloat16
        with mock.patch("torch.nn.functional.linear", side_effect=torch.nn.functional.linear) as products:
            net(x)
    assert len(products.mock_calls) == 7 and all(call.args[0].dtype == torch.bfloat16 for call in products.mock_calls)
    out.sum().backward()


@pytest.mark.parametrize(
    ("kind", "kwargs", "error", "message"),
    [
        (TimeMix, {"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        (TimeMix, {"channels": 8.0}, TypeError, "channels must be an int, got float"),
        (ChannelMix, {"layer": 2, "layers": 2}, ValueError, "layer must be below layers, 2, got 2"),
        (ChannelMix, {"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        (ChannelMix, {"layers": True}, TypeError, "layers must be an int, got bool"),
        (ChannelMix, {"hidden": 0}, ValueError, "hidden must be at least 1, got 0"),
        (ChannelMix, {"norm_eps": 0}, ValueError, "norm_eps must be positive and finite"),
        (TimeMix, {"neuron": LIF()}, TypeError, "neuron must be a LIFRate or None (no spikes), got LIF"),
        (TimeMix, {"bidirectional": 1}, TypeError, "bidirectional must be a bool, got int"),
    ],
)
def test_mixing_layers_refuse_wrong_arguments(kind, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kind(**{"channels": 8} | kwargs)


@pytest.mark.parametrize("kind", [TimeMix, ChannelMix])
def test_repr_of_a_mixing_layer_shows_its_settings(kind):
    shown = repr(kind(8, 1, 3, norm_eps=1e-6, neuron=LIFRate(T=7)))
    assert f"{kind.__name__}(\n  8, layer=1, layers=3, norm_eps=1e-06" in shown and "T=7" in shown


@pytest.mark.parametrize("function", [sdit_kernels.nn.reset, sdit_kernels.nn.detach])
def test_an_argument_that_is_not_a_module_is_refused(function):
    with pytest.raises(TypeError, match="net must be a torch.nn.Module, got int"):
        function(3)
    for wrong, name in ((torch.relu, "builtin_function_or_method"), ([torch.nn.Linear(2, 2)], "list")):
        with pytest.raises(TypeError, match=f"OverTime takes torch.nn.Modules, .* got {name}"):
            sdit_kernels.nn.OverTime(wrong)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_leaky_equals_its_op_and_keeps_its_membrane(step_mode):
    beta = torch.nn.Parameter(torch.full((5,), 0.5))
    neuron = Leaky(beta, reset_mechanism="zero", reset_delay=False, step_mode=step_mode)
    x = torch.randn(6, 3, 5)
    parts = [x[:2], x[2:]] if step_mode == "m" else x
    s = torch.cat([neuron(part) for part in parts]).reshape(x.shape)
    want, v = sdit_kernels.leaky(x, beta=beta, reset="zero", reset_delay=False, return_v=True)
    assert torch.equal(s, want) and torch.equal(neuron.v, v)
    s.sum().backward()
    (d_beta,) = torch.autograd.grad(want.sum(), beta)
    torch.testing.assert_close(beta.grad, d_beta)
    reset(neuron)
    assert neuron.v is None and dict(neuron.named_parameters()).keys() == {"beta"}
    assert "reset_mechanism='zero'" in repr(neuron)
    with pytest.raises(ValueError, match="'subtract', 'zero', 'none', got 'hard'"):
        Leaky(0.5, reset_mechanism="hard")


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize(
    "kind, op, values",
    [
        (CuBa, sdit_kernels.cuba, dict(beta_i=0.5, beta=0.75, reset_mechanism="zero")),
        (AdLIF, sdit_kernels.adlif, dict(beta=0.5, beta_w=0.75, a=0.5, b=1.5)),
    ],
)
def test_two_states_equal_their_op_and_are_kept(kind, op, values, step_mode):
    beta = torch.nn.Parameter(torch.full((5,), values["beta"]))
    net = kind(**values | dict(beta=beta), step_mode=step_mode, store_state_seq=True)
    x = data(6, 3, 5)
    parts = [x[:2], x[2:]] if step_mode == "m" else x
    s = torch.cat([net(part) for part in parts]).reshape(x.shape)
    settings_ = {{"reset_mechanism": "reset"}.get(n, n): v for n, v in values.items()} | dict(beta=beta)
    want, state, seq = op(x, **settings_, return_state=True, return_state_seq=True)
    kept = [getattr(net, name) for name in net._states]
    assert torch.equal(s, want) and all(map(torch.equal, kept, state))
    assert torch.equal(getattr(net, f"{net._states[0]}_seq"), seq[0][2 if step_mode == "m" else 5 :])
    (d_beta,), (wanted,) = (torch.autograd.grad(t.sum(), beta) for t in (s, want))
    torch.testing.assert_close(d_beta, wanted)
    detach(net)
    assert all(getattr(net, name).grad_fn is None for name in net._states)
    assert torch.equal(copy.deepcopy(net).v, net.v) and net.to(torch.float64).v.dtype == torch.float64
    reset(net)
    assert all(getattr(net, name) is None for name in net._kept())
    assert net.state_dict().keys() == {"beta"} and "store_state_seq=True" in repr(net)


def test_two_states_have_the_errors_and_traces_of_one():
    neuron, x = CuBa(0.5, 0.5), data(3, 2, 5)
    with torch.no_grad():
        neuron(x)
        i, v = neuron.i, neuron.v
        traced = torch.jit.trace(neuron, x)  # torch calls the module again to check the graph
        want, state = sdit_kernels.cuba(x, (i, v), beta_i=0.5, beta=0.5, return_state=True)
        assert torch.equal(traced(x), want)
        assert torch.equal(neuron.i, state[0]) and torch.equal(neuron.v, state[1])
    with pytest.raises(ValueError, match=r"i, the state carried over from earlier calls, has shape \(2, 5\)"):
        neuron(x[:, :1])
    neuron.reset()
    neuron.i = 0.25
    want = sdit_kernels.cuba(x, (torch.full((2, 5), 0.25), None), beta_i=0.5, beta=0.5)
    assert torch.equal(neuron(x), want)
    neuron.v = "0"
    with pytest.raises(TypeError, match="v must be a tensor, a number or None, got str"):
        neuron(x)
    with pytest.raises(ValueError, match="beta_i must be between 0 and 1"):
        CuBa(1.5, 0.5)
    with pytest.raises(ValueError, match="a must be finite"):
        AdLIF(0.5, 0.5, math.inf, 1.0)


def test_lapicque_equals_its_op_and_keeps_its_membrane():
    neuron, x = Lapicque(R=2.0, C=2.0, time_step=0.5, reset_mechanism="zero"), data(6, 3, 5)
    s = torch.cat([neuron(x[:2]), neuron(x[2:])])
    want, v = sdit_kernels.lapicque(x, R=2.0, C=2.0, time_step=0.5, reset="zero", return_v=True)
    assert torch.equal(s, want) and torch.equal(neuron.v, v)
    with pytest.raises(ValueError, match="C must be positive and finite"):
        Lapicque(C=0.0)
