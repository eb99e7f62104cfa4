"""Integer and ternary spikes of lif, lif_rate and spiking_wkv on every backend, compared with tests/oracle."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from helpers import SMALL, USERS
from hypothesis import given, settings
from oracle import loops
from test_lif import LAYOUTS, with_layout
from test_oracle import array, assert_close, assert_gradients, assert_same, backend_and_tiles, exact, gradients, leaves, normal

import sdit_kernels
from sdit_kernels import Levels, backend, lif, lif_rate, nn, spiking_wkv
from sdit_kernels.levels import decode, encode

INF, NAN = math.inf, math.nan
WHERE = [("reference", USERS), ("cpu", USERS), ("triton", SMALL)]
BACKENDS = pytest.mark.parametrize("where", WHERE, ids=lambda w: w[0])
WINDOWED = Levels(-2, 3, (-1.0, 4.5), 0.5)
# Each variant compiles its own kernels, so there are few: the neuron, the kind of tau and v_threshold, the dtypes of x and v.
VARIANTS = [
    (dict(levels=(0, 4), v_reset=None), "number", torch.float32, torch.float32),
    (dict(levels=(0, 4), v_reset=None, decay_input=False, v_threshold=0.75), "channel", torch.float64, torch.float64),
    (dict(levels=WINDOWED, v_reset=None, detach_reset=True), "scalar", torch.bfloat16, torch.float32),
    (dict(levels="ternary", v_reset=None), "channel", torch.float32, torch.float32),
    (dict(levels="ternary", v_reset=0.25, surrogate="sigmoid", v_threshold=0.75), "number", torch.float16, None),
]
# Ties, thresholds, both ends of the windows and what is next to them, for thresholds of 1 and 0.75 and tau = 2
SPECIAL = [0.0, -0.0, 0.375, 0.75, 1.0, 2.0, 3.0, -1.0, -2.0, 4.0, 5.0, 6.0, 8.0, 9.0, -0.75, -1.5, 1e30, -1e30, INF, -INF, NAN]


def check(where, flags, kind, x, v=None, seed=0):
    """Compare spikes, membranes and gradients with the oracle. Spikes are equal bit for bit, also the sign of zero."""
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, flags = dict(tau=2.0, v_threshold=flags.get("v_threshold", 1.0)), dict(flags)
    data = {n: t for n, t in (("x", x), ("v", v)) if t is not None}
    if kind == "number":
        flags |= values
    else:
        flags.pop("v_threshold", None)
        data |= {n: torch.full((x.shape[-1],) if kind == "channel" else (), p, dtype=state) for n, p in values.items()}
    with np.errstate(all="ignore"):
        want, backward = loops.lif(**{n: array(t) for n, t in data.items()}, **flags)
    tensors = {n: t.detach().requires_grad_() for n, t in data.items()}
    with backend_and_tiles(where):
        outputs = lif(**tensors, **flags, return_v=True, return_v_seq=True)
        upstream = [normal(seed + i, *o.shape, dtype=o.dtype) for i, o in enumerate(outputs)]
        found = gradients(outputs, upstream, tensors)
    assert_same(outputs[0], want[0], "s")
    for o, w, what in zip(outputs[1:], want[1:], ("v", "v_seq")):
        assert_close(o, w, state, what)
        np.testing.assert_array_equal(np.isnan(array(o)), np.isnan(w))
    with np.errstate(all="ignore"):
        wanted = backward(*map(array, upstream))
    if not x.isfinite().all():  # then the sums over x are not finite
        found = {n: d for n, d in found.items() if n in ("x", "v")}
    assert_gradients(found, wanted, tensors)


@BACKENDS
@pytest.mark.parametrize("flags, kind, dtype, v_dtype", VARIANTS, ids=str)
@settings(max_examples=6)
@given(data=st.data())
def test_spikes_and_gradients_equal_the_oracle(where, flags, kind, dtype, v_dtype, data):
    """Multiples of 1/16 in a few steps: nothing rounds. Then every kind of value, with T up to 20."""
    T = data.draw(st.sampled_from([3, 20]))
    size = data.draw(st.lists(st.sampled_from([1, 2, 7, 33]), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 99))
    if T > 4:  # each step uses one more bit of the mantissa, so let the membranes start anew: large inputs of both signs
        x = torch.round(exact(seed, T, *size, dtype=torch.float64) * 4).to(dtype)
    else:
        x = exact(seed, T, *size, dtype=dtype, low=-64, high=128)
    if data.draw(st.booleans()):
        values = data.draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=6))
        x.view(-1)[: len(values)] = torch.tensor(values, dtype=dtype)[: x.numel()]
    x = with_layout(x, data.draw(st.sampled_from(LAYOUTS)))
    v = None if v_dtype is None else exact(seed + 1, *size, dtype=v_dtype, low=-16, high=16)
    if T > 4 and v is not None:
        v = v.round()
    check(where, flags, kind, x, v, seed)


def test_levels_are_one_argument():
    """The text that the operators take names the flags of the neuron's step."""
    assert encode(None) == "binary" and encode("ternary") == "ternary"
    assert encode((0, 4)) == encode([0, 4]) == encode(Levels(0, 4)) == encode(Levels(0, 4, (0.0, 4), 1))
    assert decode(encode(Levels(np.int64(-1), 2, (0, 1), 0.5))) == ("integer", (-1, 2), (0.0, 1.0), 0.5)
    assert decode(encode((0, 4))) == ("integer", (0, 4), (), 1.0) and decode("ternary") == ("ternary",)


@BACKENDS
def test_integer_outputs_hold_the_same_spikes(where):
    """A NaN becomes 0."""
    x = torch.cat([300 * torch.randn(5, 30, generator=torch.Generator().manual_seed(0)), torch.full((5, 1), NAN)], 1)
    for levels, dtype in (((0, 255), torch.uint8), ((-128, 127), torch.int8)):
        want = loops.lif(array(x), levels=levels, v_reset=None)[0][0]
        with backend_and_tiles(where):
            found = lif(x, levels=levels, v_reset=None, spike_dtype=dtype)
        assert found.dtype == dtype and np.array_equal(array(found), np.nan_to_num(want)) and np.nanmax(want) == levels[1]
    with backend_and_tiles(where):
        counts = lif_rate(x, 3, levels=(0, 85), v_reset=None, return_counts=True)
    want = loops.lif(np.stack([array(x)] * 3), levels=(0, 85), v_reset=None)[0][0].sum(0)
    assert counts.dtype == torch.uint8 and np.array_equal(array(counts), np.nan_to_num(want)) and np.nanmax(want) == 255


@BACKENDS
@pytest.mark.parametrize(
    "flags, T, with_gate", [(dict(levels=(0, 4), v_reset=None), 4, True), (dict(levels="ternary"), 20, False)], ids=str
)
def test_rates_equal_the_oracle(where, flags, T, with_gate):
    """The mean over T of the levels, with the gradients of x, gate, residual, tau and v_threshold."""
    x = exact(0, 6, 37, dtype=torch.float64)
    data = dict(x=x, tau=torch.tensor(2.0, dtype=torch.float64), v_threshold=torch.full((37,), 0.75, dtype=torch.float64))
    data |= dict(gate=normal(1, 6, 37)) if with_gate else dict(residual=normal(2, 6, 37))
    want, backward = loops.lif_rate(T=T, **{n: array(t) for n, t in data.items()}, **flags)
    tensors = leaves(data)
    with backend_and_tiles(where):
        found = lif_rate(T=T, **tensors, **flags)
        d = normal(3, 6, 37)
        assert_close(found, want, torch.float64, "rate")
        assert_gradients(gradients([found], [d], tensors), backward(array(d)), tensors)


@BACKENDS
def test_one_step_with_tau_1_has_no_state(where):
    """The neuron of Spike-driven Transformer V3, for x of any shape: round(clip(x, 0, 4)) / 4."""
    x = torch.tensor([[-1.0, -0.0, 0.49, 0.5, 1.5, 2.5], [3.5, 4.0, 4.5, INF, -INF, NAN]], dtype=torch.float32)
    with backend_and_tiles(where):
        x.requires_grad_()
        y = lif_rate(x, 1, tau=1.0, v_reset=None, levels=Levels(0, 4, scale=0.25))
        (dx,) = torch.autograd.grad(y.nan_to_num(0.0).sum(), x)
    torch.testing.assert_close(y.detach(), x.detach().clamp(0, 4).round() / 4, rtol=0, atol=0, equal_nan=True)
    assert dx.tolist() == [[0.0, 0.25, 0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "where, rate",
    [(("cpu", USERS), False), (("triton", SMALL), True), (("one walk", SMALL), False), (("one walk", SMALL), True)],
    ids=lambda w: w[0] if isinstance(w, tuple) else str(w),
)
def test_scans_that_drive_integer_neurons_equal_the_oracle(where, rate):
    T, B, L, C = 3, 2, 9, 19
    flags = dict(levels=Levels(-1, 3, scale=0.5), v_reset=None)
    data = dict(k=normal(0, T, B, L, C), v=normal(1, T, B, L, C, scale=2.0), membrane=normal(2, B, L, C))
    data |= dict(time_first=normal(3, C), log_decay=-normal(4, C).abs(), v_threshold=normal(5, C).abs() + 0.5)
    arrays = {n: array(t) for n, t in data.items()}
    (want, *_), backward = loops.spiking_wkv(
        None, arrays.pop("time_first"), arrays.pop("k"), arrays.pop("v"), rate=rate, **arrays, **flags
    )
    tensors = leaves(data)
    with backend_and_tiles(where):
        out = spiking_wkv(None, rate=rate, **tensors, **flags)
        d = normal(6, *out.shape)
        found = gradients([out], [d], tensors)
    assert_close(out, want, torch.float64, "out")
    wanted = backward(array(d))
    wanted["log_decay"] = wanted.pop("decay")
    for n, g in found.items():
        assert_close(g, wanted[n], torch.float64, n, np.abs(wanted["v"]).sum() if g.dim() == 1 else 0.0)


@pytest.mark.parametrize("where", WHERE[1:], ids=lambda w: w[0])
def test_arbitrary_numbers_give_the_bits_of_the_reference(where):
    """h / v_threshold is rounded as IEEE says, for every v_threshold."""
    x = 3 * torch.randn(20, 500, generator=torch.Generator().manual_seed(0))
    for flags in (dict(levels=(0, 4)), dict(levels="ternary")):
        flags = dict(tau=1.7, v_threshold=0.9, return_v_seq=True, v_reset=None) | flags
        with backend_and_tiles(where):
            found = lif(x, **flags)
        with backend("reference"):
            assert all(torch.equal(a, b) for a, b in zip(found, lif(x, **flags)))


X = torch.zeros(4, 3)
BAD = [
    (TypeError, "lo of levels must be an int, got 0.0", dict(levels=(0.0, 4))),
    (TypeError, "hi of levels must be an int, got True", dict(levels=(0, True))),
    (ValueError, r"lo of levels must be less than hi, got \(4, 4\)", dict(levels=(4, 4))),
    (ValueError, "levels must be between -2\\^22 and 2\\^22", dict(levels=(0, 1 << 23))),
    (ValueError, r"levels must be a pair \(lo, hi\) or Levels", dict(levels=(4,))),
    (ValueError, "levels must be None.*got 'signed'", dict(levels="signed")),
    (TypeError, "levels must be None.*got int", dict(levels=4)),
    (TypeError, "window of levels must be None or a pair of finite numbers", dict(levels=Levels(0, 4, (0, INF)))),
    (ValueError, r"window of levels must be \(a, b\) with a <= b", dict(levels=Levels(0, 4, (2, 1)))),
    (ValueError, "scale of levels must be a positive finite number, got 0", dict(levels=Levels(0, 4, None, 0))),
    (ValueError, "integer levels subtract c \\* v_threshold: v_reset must be None, got 0.0", dict(levels=(0, 4), v_reset=0.0)),
    (ValueError, "v_threshold must be positive where levels are given, got 0", dict(levels="ternary", v_threshold=0)),
    (ValueError, "v_threshold must be positive", dict(levels=(0, 4), v_threshold=torch.tensor([1.0, -1.0, 1.0]))),
    (ValueError, "integer levels have the gradient of their window", dict(levels=(0, 4), surrogate="sigmoid")),
    (ValueError, "leave surrogate and alpha out", dict(levels=(0, 4), alpha=2.0)),
]  # fmt: skip
BAD_OF_LIF = [
    (ValueError, "bfloat16, which holds .* from -256 to 256, got levels from 0 to 257", torch.bfloat16, dict(levels=(0, 257))),
    (ValueError, "float16, which holds integers from -2048 to 2048", torch.float16, dict(levels=(-2049, 0))),
    (ValueError, "uint8, .* from 0 to 255, got levels from 0 to 256", None, dict(levels=(0, 256), spike_dtype=torch.uint8)),
    (ValueError, "uint8, .* from 0 to 255, got levels from -1", None, dict(levels="ternary", spike_dtype=torch.uint8)),
    (ValueError, "int8, which holds integers from -128 to 127", None, dict(levels=(0, 128), spike_dtype=torch.int8)),
    (ValueError, "torch.uint8 or torch.int8, got torch.bool", None, dict(levels=(0, 1), spike_dtype=torch.bool)),
    (ValueError, "holds integers: leave out the scale", None, dict(levels=Levels(0, 4, None, 0.25), spike_dtype=torch.uint8)),
]  # fmt: skip
BAD_OF_RATE = [
    (ValueError, "needs levels of at least 0, got levels from -1 to 1", 4, dict(levels="ternary", return_counts=True)),
    (ValueError, r"needs T \* hi <= 255, got T=64 and hi=4", 64, dict(levels=(0, 4), return_counts=True)),
    (ValueError, "bare counts: leave out the scale", 4, dict(levels=Levels(0, 4, None, 0.25), return_counts=True)),
    (ValueError, r"T times the greatest level must be at most 2\^24", 1 << 20, dict(levels=(0, 17))),
]  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_wrong_levels_are_refused(name):
    with backend(name):
        for kind, message, flags in BAD:
            for function in (lif, lif_rate):
                with pytest.raises(kind, match=message):
                    function(X, **dict(v_reset=None) | flags)
        for kind, message, dtype, flags in BAD_OF_LIF:
            with pytest.raises(kind, match=message):
                lif(X.to(dtype or torch.float32), **dict(v_reset=None) | flags)
        for kind, message, T, flags in BAD_OF_RATE:
            with pytest.raises(kind, match=message):
                lif_rate(X, T, **dict(v_reset=None) | flags)
        with pytest.raises(ValueError, match="carries no gradient"):
            lif(X.clone().requires_grad_(), v_reset=None, levels=(0, 4), spike_dtype=torch.uint8)


def test_modules_pass_levels_on():
    x = 2 * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for module, flags in (
        (nn.LIF(tau=4.0, v_reset=None, levels=(0, 4)), dict(tau=4.0, v_reset=None, levels=(0, 4))),
        (nn.IF(levels="ternary"), dict(tau=INF, decay_input=False, levels="ternary")),
        (nn.ParametricLIF(v_reset=None, levels=WINDOWED), dict(v_reset=None, levels=WINDOWED)),
    ):
        assert torch.equal(torch.cat([module(x[:1]), module(x[1:])]), lif(x, **flags))
        assert "levels=" in repr(module)
    rate = nn.LIFRate(T=3, v_reset=None, levels=(0, 4))
    assert torch.equal(rate(x), lif_rate(x, 3, v_reset=None, levels=(0, 4)))
    with pytest.raises(ValueError, match="v_reset must be None"):
        nn.LIF(levels=(0, 4))


@pytest.mark.filterwarnings("ignore:a surrogate function of your own")
def test_a_users_surrogate_works_for_ternary_spikes():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    entry = sdit_kernels.SURROGATES["sigmoid"]
    own, named = (
        torch.autograd.grad(lif(x, levels="ternary", surrogate=surrogate).sum(), x)[0]
        for surrogate in (lambda z: entry.derivative(z, entry.alpha), "sigmoid")
    )
    torch.testing.assert_close(own, named)


def test_compiled_and_batched_calls_equal_eager_ones():
    x = 2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def f(x):
        return lif(x, v_reset=None, levels=Levels(0, 4, scale=0.25)) + lif(x, levels="ternary") + lif_rate(x, levels="ternary")

    want = f(x)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), want)
    batched = torch.func.vmap(f, in_dims=1, out_dims=1)(x)
    assert torch.equal(batched, want)
    jacobian = torch.func.jacrev(lambda x: lif(x, v_reset=None, levels=(0, 4)).sum(0))(x)
    assert jacobian.shape == (6, 4, 6)
