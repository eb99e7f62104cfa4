"""Every op in unusual cases: default devices and dtypes of torch, extreme numbers, infinities, positional and named
arguments."""

import ast
import contextlib
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import sdit_kernels
from sdit_kernels import (
    SURROGATES,
    adlif,
    backend,
    cuba,
    lapicque,
    leaky,
    lif,
    lif_rate,
    neuron,
    nn,
    spiking_wkv,
    token_shift,
    wkv,
)

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ["cpu", "triton", "reference"]


# --- numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_the_gate_may_be_positional_or_named(name):
    k, v, r = torch.randn(3, 2, 1, 5, 4).unbind(0)
    w, u = torch.randn(2, 4)
    with backend(name):
        assert torch.equal(wkv(w, u, k[:, 0], v[:, 0], r[:, 0]), wkv(w, u, k[:, 0], v[:, 0], r=r[:, 0]))
        assert torch.equal(spiking_wkv(w, u, k, v, r), spiking_wkv(w, u, k, v, r=r))


X = torch.tensor([0.0, 1.0, -3.0, 2.5, 1e3, 1e20, -1e20]).repeat(3, 1)
EXTREMES = [dict(tau=t, v_reset=v) for t in (1.0, 1 + 1e-16, 1e8, 2e16, 1e38, 1e45, 1.7e308) for v in (0.0, None)]
EXTREMES += [dict(tau=t, decay_input=False) for t in (2e16, 1e300, math.inf)] + [dict(v_reset=v) for v in (1e38, 0.999999999)]
EXTREMES += [dict(v_threshold=t, v_reset=v) for t in (0.0, -1.0, 1e-45, 5e-324, 3.4e38) for v in (0.0, None, -1e38, 5e-324)]
EXTREMES += [dict(T=t) for t in (1, 255, 1000)]


def outputs_and_gradients(name, function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with backend(name):
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        return *out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])


def assert_all_close(found, wanted, what):
    for i, (got, want) in enumerate(zip(found, wanted)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, equal_nan=True, msg=lambda m, i=i: f"{what}, {i}: {m}")


@pytest.mark.parametrize("name", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("error")
def test_extreme_settings_equal_the_reference(name, dtype):
    """Settings are as large or small as the checks allow. Outputs and gradients are close, without errors or warnings."""
    x = X.to(dtype)
    for numbers in EXTREMES:
        neuron = {k: v for k, v in numbers.items() if k != "T"}
        for function, data in (
            (lambda x, n=neuron: lif(x, return_v=True, **n), x),
            (lambda x, n=neuron, s=numbers: lif_rate(x, s.get("T", 4), **n), x[0]),
        ):
            assert_all_close(*(outputs_and_gradients(b, function, data) for b in (name, "reference")), neuron)
    for numbers in (dict(beta=b, v_threshold=t) for b in (0.0, 1.0, 5e-324, 1 - 1e-16) for t in (0.0, 1e-45, 3e38, -3e38)):
        found, wanted = (
            outputs_and_gradients(b, lambda x, s=numbers: leaky(x, return_v=True, **s), x) for b in (name, "reference")
        )
        assert_all_close(found, wanted, numbers)


@pytest.mark.parametrize("name", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [-math.inf, -1e38, -1e20, 0.0, 60.0, 1e20])
def test_extreme_decays_equal_the_reference(name, dtype, first):
    k, v = torch.randn(2, 1, 22, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    for decay in (-math.inf, -1e20, -88.0, -36.0, -1e-45, 0.0, 1.0):
        w, u = torch.full((6,), decay, dtype=dtype), torch.full((6,), first, dtype=dtype)

        def scan(k, v, w=w, u=u):
            y, state = wkv(None, u, k, v, log_decay=w, return_state=True)
            return y, *state

        found, wanted = (outputs_and_gradients(b, scan, k, v) for b in (name, "reference"))
        assert_all_close(found, wanted, decay)


@pytest.mark.parametrize("name", BACKENDS[:2])
def test_extreme_norms_and_mixes_equal_the_reference(name):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for eps in (1e-300, 1e-5, 1e30, 1e300):
        for mix in (0.0, 1.0, 1e30, -1e30):

            def shift(x, m, eps=eps, mix=mix):
                return token_shift(x, m, norm_eps=eps)[0] / max(abs(mix), 1.0)

            m = torch.full((6,), mix, dtype=torch.float64)
            assert_all_close(*(outputs_and_gradients(b, shift, x, m) for b in (name, "reference")), (eps, mix))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("setting", ["v_threshold", "v_reset", "alpha"])
def test_settings_too_large_for_float32_are_refused(name, setting):
    for number in (3.5e38, 1e300):
        calls = [lambda n=number: lif(X, **{setting: n}), lambda n=number: lif_rate(X, **{setting: n})]
        if setting != "v_reset":
            calls.append(lambda n=number: leaky(X, beta=0.5, **{setting: n}))
        if setting == "v_threshold":
            calls.append(lambda n=number: lif(X, v_threshold=torch.tensor(n, dtype=torch.float64)))
        for call in calls:
            with backend(name), pytest.raises(ValueError, match=f"{setting} must be .*finite.*, got .*more than torch.float32"):
                call()
    with backend(name):
        assert lif(X.double(), **{setting: 1e300}).shape == X.shape


# --- infinities -------------------------------------------------------------------------------------------------------------

PLANTS = [math.inf, -math.inf, math.nan, -0.0]


@st.composite
def with_odd_values(draw, shape, chosen=PLANTS, most=4):
    """Multiples of 1/8, in which a few elements are replaced by values of ``chosen``."""
    seed = draw(st.integers(0, 99))
    t = torch.randint(-8, 24, shape, generator=torch.Generator().manual_seed(seed)) / 8
    for _ in range(draw(st.integers(0, most))):
        t.view(-1)[draw(st.integers(0, t.numel() - 1))] = draw(st.sampled_from(chosen))
    return t


def compare(name, function, leaves, upstream=(), may_be_zero=False):
    """Compare outputs and gradients, including the positions of NaN and infinities.

    With an infinite upstream gradient, kernels add gradients in another order than autograd. Then only the positions of values
    that are not finite must agree. ``may_be_zero``: the result may be 0 where autograd multiplies an infinity by 0. lif_rate
    bounds its current, and multiplies an upstream gradient once, by the sum of a neuron's derivatives, which may be 0. Where
    its current is NaN, a derivative of 0 times a membrane that is NaN may be NaN, where autograd's order of products leaves 0.
    """
    found = []
    for which in (name, "reference"):
        given = [t.detach().clone().requires_grad_() for t in leaves]
        with backend(which):
            out = function(*given)
            out = out if isinstance(out, tuple) else (out,)
            g = [*upstream, *(torch.ones_like(o) for o in out[len(upstream) :])]
            found.append((out, torch.autograd.grad(out, given, g, allow_unused=True, materialize_grads=True)))
    (out, grads), (want, wanted) = found
    for i, (a, b) in enumerate(zip(out, want)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, i=i: f"output {i}: {m}")
    for i, (a, b) in enumerate(zip(grads, wanted)):
        if upstream:
            same = (a.isfinite() == b.isfinite()) | (((a == 0) | leaves[0].isnan()) if may_be_zero else torch.tensor(False))
            assert same.all(), f"gradient {i}: {a}, not {b}"
            finite = a.isfinite() & b.isfinite()
            a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        elif may_be_zero:
            b = torch.where((a == 0) & b.isnan(), 0.0, b)
            b = torch.where(leaves[0].isnan() & a.isnan() & (b == 0), a, b)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda m, i=i: f"gradient {i}: {m}")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_membranes_that_are_reset_have_no_gradient(name, surrogate):
    """No gradient passes through a membrane that a reset replaces, even if it is infinite, in this step or later ones."""
    x = torch.tensor([math.inf, -math.inf, 3e38, -3e38, 1e20, 1e10])
    x = torch.cat([x[None], torch.full((2, 6), 0.75)]).requires_grad_()
    with backend(name):
        for flags in (dict(), dict(v_reset=-0.5), dict(decay_input=False))[: 3 if surrogate == "atan" else 1]:
            (dx,) = torch.autograd.grad(lif(x, surrogate=surrogate, **flags).sum(), x)
            assert not dx[:, [0, 2, 4, 5]].isnan().any() and dx[0, 0] == 0
            (dx,) = torch.autograd.grad(lif_rate(x[0], surrogate=surrogate, **flags).sum(), x)
            assert dx[0, 0] == 0
        s = leaky(x, beta=0.5, reset="zero", reset_delay=False, surrogate=surrogate)
        assert torch.autograd.grad(s.sum(), x)[0][0, 0] == 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_derivatives_far_from_the_threshold(name, surrogate):
    """The derivative is 0 at infinity, the formula's smallest value where a z overflows, and as in the reference at NaN."""
    z = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e38, 0.0])
    found = outputs_and_gradients(name, lambda z: lif(z[None], tau=1.0, v_threshold=0.0, surrogate=surrogate), z)[1]
    want = SURROGATES[surrogate].derivative(z, SURROGATES[surrogate].alpha)
    assert (found[:2] == 0).all() and (want[:2] == 0).all()
    torch.testing.assert_close(found, want, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS[:2])
@settings(max_examples=60)
@given(data=st.data())
def test_neurons_equal_the_reference_on_nan_and_infinities(name, data):
    T, upstream = data.draw(st.sampled_from([1, 3, 18])), data.draw(st.booleans())
    x, v = data.draw(with_odd_values((T, 7))), data.draw(with_odd_values((7,)))
    g = [data.draw(with_odd_values((T, 7), PLANTS[:3], 2))] if upstream else []
    surrogate = data.draw(st.sampled_from(["atan", "rect", "sigmoid"]))
    kind = data.draw(st.sampled_from(["lif", "leaky", "rate"]))
    tau, theta = torch.full((7,), 2.0), torch.full((7,), 1.0)
    if kind == "leaky":
        flags = data.draw(st.sampled_from([("subtract", False), ("zero", True), ("zero", False)]))
        flags = dict(reset=flags[0], reset_delay=flags[1], surrogate=surrogate, return_v=True)
        compare(name, lambda x, v, b, t: leaky(x, v, beta=b, v_threshold=t, **flags), (x, v, 0.25 * tau, theta), g)
        return
    flags = dict(surrogate=surrogate, v_reset=data.draw(st.sampled_from([0.0, None])), detach_reset=data.draw(st.booleans()))
    if kind == "lif":
        compare(name, lambda x, v, a, t: lif(x, v, tau=a, v_threshold=t, return_v=True, **flags), (x, v, tau, theta), g)
    else:
        upstream = [t[0] for t in g]
        compare(name, lambda x, a, t: lif_rate(x, 3, tau=a, v_threshold=t, **flags), (x[0], tau, theta), upstream, True)


@pytest.mark.parametrize("name", BACKENDS[:2])
@settings(max_examples=60)
@given(data=st.data())
def test_scans_equal_the_reference_on_nan_and_infinities(name, data):
    L, both = data.draw(st.sampled_from([1, 5, 22])), data.draw(st.booleans())
    # Only one tensor gets such values, because an infinite value with weight 0 has no right answer. For a single token the
    # reference does not read the decay, so no key can make the decay's gradient NaN.
    below = [-math.inf, -0.0]
    plants = dict(v=PLANTS, r=PLANTS, k=PLANTS[1:] if L > 1 else below, w=below, u=below)
    where = data.draw(st.sampled_from(sorted(plants)))
    v, r, k, w, u = (
        data.draw(with_odd_values((17,) if name in "wu" else (1, L, 17), plants[name], 4 if name == where else 0))
        for name in plants
    )
    if data.draw(st.booleans()):
        compare(name, lambda w, u, k, v, r: wkv(w, u, k, v, r, bidirectional=both), (w, u, k, v, r))
    else:
        compare(name, lambda w, u, k, v, r: spiking_wkv(w, u, k[None], v[None], r[None], v_threshold=0.3), (w, u, k, v, r))


@pytest.mark.parametrize("name", BACKENDS[:2])
@settings(max_examples=60)
@given(data=st.data())
def test_mixes_equal_the_reference_on_nan_and_infinities(name, data):
    x, m, last = (
        data.draw(with_odd_values((5, 9))),
        data.draw(with_odd_values((9,), most=1)),
        data.draw(with_odd_values((9,), most=1)),
    )
    compare(name, lambda x: sdit_kernels.relu_squared(x), (x,))
    compare(name, lambda x, m, last: token_shift(x, m, last=last)[0], (x, m, last))
    compare(name, lambda x: token_shift(x, torch.full((9,), 0.25), norm_eps=1e-5)[0], (x,))


# --- defaults of torch ------------------------------------------------------------------------------------------------------


def own(x, s, p, o):
    h = s.v * o.exp(-p.k) + x
    return o.fire(h - 1.0), o.maximum(h, -1.0)


OWN = neuron.define(own, parameters=("k",), start=0.25)
K, P = torch.randn(3, 4, 33, generator=torch.Generator().manual_seed(0)), torch.full((33,), 0.5)
STATE = P.expand(3, 33), P.expand(3, 33)
CALLS = {
    "lif": lambda x, p: lif(3 * x, x[0], tau=1 + p, v_threshold=p, return_v=True, return_v_seq=True),
    "lif, long": lambda x, p: lif(x.repeat(6, 1, 1), return_v=True),
    "lif_rate": lambda x, p: lif_rate(x, 3, x, x, tau=1 + p),
    "lif_rate, stairs": lambda x, p: lif_rate(x),
    "leaky": lambda x, p: leaky(3 * x, x[0], beta=p, return_v=True, return_v_seq=True),
    "lapicque": lambda x, p: lapicque(3 * x, C=1 + p, return_v=True),
    "cuba": lambda x, p: flat(cuba(3 * x, (x[0], x[1]), beta_i=p, beta=0.5, return_state=True, return_state_seq=True)),
    "adlif": lambda x, p: flat(adlif(3 * x, beta=p, beta_w=0.5, a=p, b=1.0, return_state=True)),
    "own": lambda x, p: flat(OWN(x, k=1 + p, return_state=True)),
    "relu_squared": lambda x, p: sdit_kernels.relu_squared(x),
    "token_shift": lambda x, p: token_shift(x, p, 1 - p, norm_eps=1e-5, last=x[:, 0]),
    "wkv": lambda x, p: flat(wkv(p, p, x, x, x, state=STATE, return_state=True)),
    "wkv, chunked": lambda x, p: flat(
        wkv(p, p, x.repeat(1, 99, 1), x.repeat(1, 99, 1), return_state=True, algorithm="chunked")
    ),
    "wkv, both ways": lambda x, p: wkv(p, p, x.repeat(1, 99, 1), x.repeat(1, 99, 1), bidirectional=True, algorithm="chunked"),
    "wkv, packed": lambda x, p: wkv(p, p, x.reshape(1, 12, 33), x.reshape(1, 12, 33), cu_seqlens=ENDS),
    "wkv_step": lambda x, p: flat(sdit_kernels.wkv_step(p, p, x[:, 0], x[:, 0])),
    "wkv_state": lambda x, p: sdit_kernels.wkv_state_from_rwkv(*sdit_kernels.wkv_state_to_rwkv(x, x)),
    "spiking_wkv": lambda x, p: flat(spiking_wkv(p, p, x[None], x[None], x[None], tau=1 + p, return_state=True)),
    "spiking_wkv, rate": lambda x, p: spiking_wkv(p, p, x[None], x[None], rate=True),
    "LIF": lambda x, p: MODULES["LIF"](x),
    "ParametricLIF": lambda x, p: MODULES["ParametricLIF"](x),
    "IF": lambda x, p: MODULES["IF"](x),
    "Leaky": lambda x, p: MODULES["Leaky"](x),
    "CuBa": lambda x, p: MODULES["CuBa"](x),
    "LIFRate": lambda x, p: MODULES["LIFRate"](x),
    "TimeMix": lambda x, p: MODULES["TimeMix"](x),
    "ChannelMix": lambda x, p: MODULES["ChannelMix"](x),
}
ENDS = torch.tensor([0, 5, 12])
MODULES = dict(
    LIF=nn.LIF(),
    ParametricLIF=nn.ParametricLIF(),
    IF=nn.IF(),
    Leaky=nn.Leaky(beta=0.5),
    CuBa=nn.CuBa(beta_i=0.5, beta=0.5),
    LIFRate=nn.LIFRate(),
    TimeMix=nn.TimeMix(33),
    ChannelMix=nn.ChannelMix(33),
)


def flat(outputs):
    """Flatten (a, (b, c)) to (a, b, c)."""
    return tuple(t for o in outputs for t in (flat(o) if isinstance(o, tuple) else (o,)))


@contextlib.contextmanager
def torch_defaults(device, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_default_devices_and_dtypes_change_nothing(name, call):
    """In both passes, no tensor is created on torch's default device or with its default dtype."""

    def run():
        for module in MODULES.values():
            nn.reset(module)
        x, p = K.clone().requires_grad_(), P.clone().requires_grad_()
        parameters = list(MODULES[call].parameters()) if call in MODULES else [p]
        with backend(name):
            out = CALLS[call](x, p)
            out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
            return *out, *torch.autograd.grad(out, [x, *parameters], [torch.ones_like(o) for o in out], allow_unused=True)

    wanted = run()
    for device, dtype in (("cpu", torch.float64), ("cpu", torch.bfloat16), ("meta", torch.float32), ("meta", torch.bfloat16)):
        with torch_defaults(device, dtype):
            found = run()
        for got, want in zip(found, wanted):
            assert (got is None) == (want is None), (device, dtype)
            if want is not None:
                assert got.dtype == want.dtype and got.device == want.device, (device, dtype)
                assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (device, dtype)


def test_a_default_device_does_not_change_large_outputs():
    """Large outputs come from the memory pool, which deterministic mode bypasses."""
    torch.use_deterministic_algorithms(False)
    x = torch.full((4, 1 << 19), 3.0, requires_grad=True)
    with torch_defaults("meta", torch.float64):
        s = lif(x)
        (dx,) = torch.autograd.grad(s.sum(), x)
    assert s.device.type == dx.device.type == "cpu" and (s == 1).all()


def test_every_allocation_names_its_device_and_dtype():
    """Memory on the default device may belong to another device, so that a kernel would write to an invalid address."""
    factories = "empty empty_strided zeros ones full tensor scalar_tensor arange linspace eye as_tensor rand randn randint"
    found = 0
    for path in (ROOT / "sdit_kernels").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        # parameters of modules use the default device and dtype, as in torch's modules
        parameters = {
            id(node.args[0]) for node in calls if ast.unparse(node.func) in ("torch.nn.Parameter", "nn.Parameter") and node.args
        }
        for node in calls:
            if ast.unparse(node.func) in {f"torch.{name}" for name in factories.split()} and id(node) not in parameters:
                found += 1
                named = {keyword.arg for keyword in node.keywords}
                assert {"device", "dtype"} <= named, f"{path.name}:{node.lineno}: {ast.unparse(node.func)} needs both"
    assert found > 20
