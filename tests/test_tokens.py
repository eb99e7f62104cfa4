"""Thresholds and time constants per token: lif on every backend against the oracle's loops, and the errors."""

import math

import native_triton  # noqa: F401  (before triton)
import numpy as np
import pytest
import torch
from oracle import loops

from sdit_kernels import Levels, backend, lif
from sdit_kernels.layout import norm_columns
from sdit_kernels.nn import LIF

BACKENDS = ["reference", "cpu", "triton"]

NEURONS = [dict(), dict(v_reset=None, detach_reset=True), dict(decay_input=False, v_reset=-0.25)]


def parameter(shape, seed, low):
    generator = torch.Generator().manual_seed(seed)
    return (low + torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def run(name, x, v, g, leaves, **neuron):
    leaves = [t.detach().clone().requires_grad_() for t in (x, v, *leaves.values())], list(leaves)
    (x, v, *values), names = leaves
    with backend(name):
        s, v_last, v_every = lif(x, v, return_v=True, return_v_seq=True, **dict(zip(names, values)), **neuron)
        return (s, v_last, v_every), torch.autograd.grad((s, v_last, v_every), (x, v, *values), g)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("neuron", NEURONS, ids=str)
@pytest.mark.parametrize("T", [3, 20])
@pytest.mark.parametrize("tau, theta", [("number", "(L, 1)"), ("(C,)", "(T, B, L, 1)"), ("(B, L, 1)", "(1, B, 1, 1)")])
def test_values_per_token_equal_the_oracle(name, neuron, T, tau, theta):
    B, L, C = 2, 5, 37
    shapes = {"number": (), "(C,)": (C,), "(L, 1)": (L, 1), "(B, L, 1)": (B, L, 1), "(T, B, L, 1)": (T, B, L, 1)}
    shapes["(1, B, 1, 1)"] = 1, B, 1, 1
    generator = torch.Generator().manual_seed(T)
    x, v, *g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in [(T, B, L, C), (B, L, C), (T, B, L, C)])
    g += [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(B, L, C), (T, B, L, C)]]
    leaves = dict(tau=parameter(shapes[tau], 1, 1.5), v_threshold=parameter(shapes[theta], 2, 0.4))
    outputs, gradients = run(name, x, v, g, leaves, **neuron)
    known = {k: p.detach().numpy() for k, p in leaves.items()}
    wanted, backward = loops.lif(x.numpy(), v.numpy(), **known, **neuron)
    for found, want in zip(outputs, wanted):
        np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-12, atol=1e-12)
    for found, want in zip(gradients, map(backward(*(d.numpy() for d in g)).get, ("x", "v", *leaves))):
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-9, atol=1e-9)


def normed(x, kind):
    return x.square().mean(-1, keepdim=True).add(1e-6).sqrt() if kind == "rms" else x.abs().mean(-1, keepdim=True) + 1e-6


def kernel_holds(name, x):
    """True if the norm of x is computed in a kernel: then only x and the factor are kept."""
    return name != "reference" and x.shape[-1] <= norm_columns(name, x.shape[0], max(4, x.element_size()))


def saved_by(function):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) if t.numel() else t, lambda t: t):
        return function(), kept.values()


FACTORS = {"number": 1.2, "scalar": (), "(L, 1)": (4, 1), "(T, B, L, 1)": (3, 2, 4, 1)}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "C, kind, factor",
    [
        (6, "rms", "scalar"),
        (300, "mean", "(T, B, L, 1)"),  # more than 256 columns of a CPU task
        (1024, "rms", "(L, 1)"),
        (1500, "mean", "number"),  # more than a program of Triton holds, and 1024 columns of a CPU task
        (4100, "rms", "scalar"),  # more than a CPU task holds
    ],
)
def test_a_norm_makes_the_thresholds(name, C, kind, factor):
    if name == "triton" and C in (300, 1024):
        C //= 10  # the CPU takes a minute to compile a program of Triton that holds more
    generator, factor = torch.Generator().manual_seed(C), FACTORS[factor]
    x = torch.randn(3, 2, 4, C, generator=generator, dtype=torch.float64).requires_grad_()
    learnt = [] if factor == 1.2 else [parameter(factor, 3, 0.8)]
    factor = learnt[0] if learnt else factor
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with backend(name):
        s, kept = saved_by(lambda: lif(x, v_threshold=factor, threshold=kind, surrogate="fast_sigmoid"))
        found = torch.autograd.grad(s, (x, *learnt), g)
        (alone,) = torch.autograd.grad(
            lif(x, v_threshold=factor, threshold=kind, detach_threshold=True, surrogate="fast_sigmoid"), x, g
        )
    with backend("reference"):
        want = lif(x, v_threshold=factor * normed(x, kind), surrogate="fast_sigmoid")
        wanted = torch.autograd.grad(want, (x, *learnt), g)
        thresholds = factor * normed(x, kind)
        (detached,) = torch.autograd.grad(lif(x, v_threshold=thresholds.detach(), surrogate="fast_sigmoid"), x, g)
    assert torch.equal(s, want) and 0 < s.mean() < 1
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone, detached, rtol=1e-9, atol=1e-9)
    if kernel_holds(name, x):
        assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *learnt)}


@pytest.mark.parametrize("name, T, C", [("cpu", 20, 300), ("triton", 4, 20), ("triton", 20, 6)])
@pytest.mark.parametrize(
    "neuron",
    [
        dict(threshold="rms", v_reset=None, tau=2.5),
        dict(threshold="mean", tau=(1,), decay_input=False, v_reset=-0.25),
        dict(threshold="rms", tau=(3, 1), levels="ternary"),
        dict(threshold="rms", v_reset=None, levels=(0, 4)),
    ],
    ids=str,
)
def test_other_neurons_with_a_norm_equal_the_reference(name, T, C, neuron):
    """With a membrane, all outputs, and gradients of all of them; tau is a number, per channel or per token."""
    generator, neuron = torch.Generator().manual_seed(T + C), dict(neuron)
    x, v, *g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in [(T, 2, 3, C), (2, 3, C), (T, 2, 3, C)])
    g += [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(2, 3, C), (T, 2, 3, C)]]
    leaves = dict(v_threshold=parameter((), 1, 0.9))
    if isinstance(tau := neuron.pop("tau", 2.0), tuple):
        leaves["tau"] = parameter((C,) if tau == (1,) else tau, 2, 1.5)
    else:
        neuron["tau"] = tau
    found, gradients = run(name, x, v, g, leaves, **neuron)
    want, wanted = run("reference", x, v, g, leaves, **neuron)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("C", [37, 200])
def test_the_backward_pass_finds_the_same_thresholds(name, dtype, C):
    """The membranes are a few units in the last place around the threshold. dx is 0 exactly where the neuron fired."""
    generator, state = torch.Generator().manual_seed(C), torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(1, 40, C, generator=generator).to(dtype).requires_grad_()
    theta = normed(x.detach().to(state), "rms")[0]
    v = 2 * (theta - x[0].detach().to(state) / 2)
    v = v * (1 + torch.randint(-4, 5, v.shape, generator=generator) * torch.finfo(state).eps)
    settings = dict(threshold="rms", detach_reset=True, detach_threshold=True, return_v=True)
    with backend(name):
        s, v_last = lif(x, v.requires_grad_(), **settings)
        dx, dv = torch.autograd.grad(v_last, (x, v), torch.ones_like(v_last))
        (through,) = torch.autograd.grad(lif(x, v, **settings | dict(detach_threshold=False))[1], x, torch.ones_like(v_last))
    assert torch.equal(dv == 0, s[0] == 1) and torch.equal(dx == 0, s == 1) and 0 < s.float().mean() < 1
    torch.testing.assert_close(through, dx)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_norms_of_other_dtypes_and_strides_equal_the_reference(name):
    """The reference sees the same values in float32, because autograd adds two gradients of a bfloat16 x in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    factor = torch.tensor(1.1, requires_grad=True)
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        x = torch.randn(4, 3, 20, 5, generator=generator).to(dtype).transpose(2, 3).requires_grad_()
        same = x.detach().float().requires_grad_()
        for g in (torch.randn(4, 3, 5, 20, generator=generator).to(dtype), torch.ones((), dtype=dtype).expand(4, 3, 5, 20)):
            with backend(name):
                s = lif(x, v_threshold=factor, threshold="rms")
                found = torch.autograd.grad(s, (x, factor), g)
            with backend("reference"):
                want = lif(same, v_threshold=factor, threshold="rms")
                wanted = torch.autograd.grad(want, (same, factor), g.float())
            assert s.dtype == dtype and torch.equal(s.float(), want)
            torch.testing.assert_close(found[0].float(), wanted[0], rtol=rtol, atol=rtol / 10)
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_other_dtypes_strides_and_levels_equal_the_reference(name):
    generator = torch.Generator().manual_seed(0)
    theta = (1 + torch.randint(0, 8, (5, 1), generator=generator) / 8).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randint(-32, 64, (4, 3, 37, 5), generator=generator) / 16).to(dtype).transpose(2, 3).requires_grad_()
        outputs = []
        for where in (name, "reference"):
            with backend(where):
                s, v = lif(x, v_threshold=theta, v_reset=None, levels=(0, 4), return_v=True)
                outputs.append((s, v, *torch.autograd.grad((s, v), (x, theta), (torch.ones_like(s), torch.ones_like(v)))))
        for found, want in zip(*outputs):
            torch.testing.assert_close(found, want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        assert torch.equal(outputs[0][0], outputs[1][0])


def test_transforms_and_the_compiler_take_values_per_token():
    x, theta = torch.randn(6, 3, 2, 4, 5), torch.rand(4, 1) + 0.5
    one = [lif(member, v_threshold=theta) for member in x]
    assert torch.equal(torch.func.vmap(lambda x: lif(x, v_threshold=theta))(x), torch.stack(one))
    thetas = torch.rand(6, 4, 1) + 0.5
    one = [lif(member, v_threshold=t) for member, t in zip(x, thetas)]
    assert torch.equal(torch.func.vmap(lambda x, t: lif(x, v_threshold=t))(x, thetas), torch.stack(one))

    def normed_lif(x, t):
        return lif(x, v_threshold=t, threshold="rms")

    for f in (0.9, theta, theta[0]):
        one = [normed_lif(member, f) for member in x]
        assert torch.equal(torch.func.vmap(lambda x, f=f: normed_lif(x, f))(x), torch.stack(one))
    one = [normed_lif(member, t) for member, t in zip(x, thetas)]
    assert torch.equal(torch.func.vmap(normed_lif)(x, thetas), torch.stack(one))
    gradient = torch.func.vmap(torch.func.grad(lambda x, t: normed_lif(x, t).sum(), (0, 1)))(x, thetas)
    for i, (member, t) in enumerate(zip(x, thetas)):
        leaves = member.clone().requires_grad_(), t.clone().requires_grad_()
        torch.testing.assert_close([d[i] for d in gradient], list(torch.autograd.grad(normed_lif(*leaves).sum(), leaves)))
    compiled = torch.compile(normed_lif, fullgraph=True, backend="aot_eager")
    any_size = torch.compile(normed_lif, fullgraph=True, backend="aot_eager", dynamic=True)
    x, theta = x[0].requires_grad_(), theta.requires_grad_()
    for f in (compiled, any_size):
        found = torch.autograd.grad(f(x, theta).sum(), (x, theta))
        torch.testing.assert_close(found, torch.autograd.grad(normed_lif(x, theta).sum(), (x, theta)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(normed_lif(x, theta), normed_lif(x.detach(), theta)) and normed_lif(x, theta).dtype == torch.float32


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(v_threshold=torch.ones(3, 1)), r"broadcast to \(2, 4, 1\) or \(3, 2, 4, 1\).*got \(3, 1\)"),
        (dict(tau=torch.full((4, 5), 2.0)), r"tau must be a scalar or have shape \(5,\)"),
        (dict(v_threshold=torch.full((4, 1), math.nan)), "v_threshold must be finite"),
        (dict(detach_threshold=True), "detach_threshold=True needs threshold"),
        (dict(threshold="max"), "threshold must be None, 'rms' or 'mean', got 'max'"),
        (dict(threshold="rms", v_threshold=torch.ones(5)), r"a factor where threshold='rms'.*got \(5,\)"),
        (dict(v_threshold=torch.zeros(4, 1), v_reset=None, levels=(0, 4)), "v_threshold must be positive"),
    ],
    ids=str,
)
def test_errors_name_the_shapes(settings, message):
    with pytest.raises(ValueError, match=message):
        lif(torch.zeros(3, 2, 4, 5), **settings)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_norm_that_is_not_finite_makes_a_finite_threshold(name):
    x = torch.tensor([math.nan, math.inf, 1e30, 0.0])[None, :, None].expand(1, 4, 3)
    with backend(name):
        assert lif(x, tau=1.0, v_threshold=0.5, threshold="rms")[0, :, 0].tolist() == [0, 1, 1, 0]
        assert lif(x[..., :0], threshold="mean").shape == (1, 4, 0)
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(lif(x, tau=1.0, v_threshold=0.5, threshold="rms").sum(), x)
        assert name == "reference" or not dx[:, 2:].isnan().any()  # the norm is a constant where it is not finite
        tiny = torch.full((1, 3, 40), 1e-30, dtype=x.dtype) * torch.tensor([0.0, 1.0, 1e-9])[:, None]
        assert lif(tiny, tau=1.0, v_threshold=1e-30, threshold="rms").sum(-1).tolist() == [[0, 40, 0]]


def test_a_module_learns_thresholds_of_tokens():
    neuron = LIF(v_threshold=torch.nn.Parameter(torch.ones(4, 1)), threshold="mean")
    neuron(torch.rand(3, 2, 4, 5)).sum().backward()
    assert "threshold='mean', detach_threshold=False" in repr(neuron)
    assert neuron.v_threshold.grad.shape == (4, 1) and neuron.v_threshold.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "dtype, C, kind, settings",
    [
        (torch.float64, 37, "mean", {}),
        (torch.float32, 101, "rms", dict(decay_input=False, tau=3.0)),
        (torch.bfloat16, 128, "rms", dict(detach_threshold=True)),
    ],
)
def test_kernels_of_one_step_equal_the_kernels_of_all_neurons(dtype, C, kind, settings):
    """Integer levels without an initial state have kernels of their own on the CPU; an initial state of zeros avoids them."""
    generator = torch.Generator().manual_seed(C)
    x, g = (torch.randn(2, 1, 3, 5, C, generator=generator, dtype=torch.float64)).to(dtype)
    x[0, 1, 2, 7] = math.inf
    levels = Levels(-3, 4, window=(-3.5, 4.5), scale=0.5) if C == 101 else (-4, 4)
    settings = dict(tau=1.0, v_reset=None, levels=levels, threshold=kind) | settings
    found = []
    for v in (None, torch.zeros_like(x[0])):
        factor = torch.tensor(0.5, requires_grad=True, dtype=torch.promote_types(dtype, torch.float32))
        leaves = x.clone().requires_grad_(), factor
        with backend("cpu"):
            s = lif(leaves[0], v, v_threshold=leaves[1], **settings)
            found.append((s.detach(), *torch.autograd.grad(s, leaves, g)))
    (s, *gradients), (s_all, *gradients_all) = found
    assert torch.equal(s, s_all) and s.unique().numel() > 5
    for one, all_ in zip(gradients, gradients_all):
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
        assert (one - all_).abs().max() <= tolerance * all_.abs().max()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "half, settings", [(torch.bfloat16, dict(levels=(-4, 4), v_reset=None, threshold="rms")), (torch.float16, {})], ids=str
)
def test_spikes_of_float32_inputs_may_have_16_bits(name, half, settings):
    T = 1 if settings else 3
    x, g = torch.randn(2, T, 2, 5, 37, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (half, None):
        leaf, factor = x.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
        with backend(name):
            s = lif(leaf, v_threshold=factor, spike_dtype=dtype, tau=1.0 if settings else 2.0, **settings)
        assert s.dtype == (dtype or torch.float32)
        found.append((s.detach().float(), *torch.autograd.grad(s, (leaf, factor), g.to(half).to(s.dtype))))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
