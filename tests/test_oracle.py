"""Compare every op on every backend with tests/oracle: values, spikes and gradients, with users' tile sizes and small ones."""

import contextlib
import math

import native_triton
import numpy as np
import pytest
import torch
from helpers import SMALL, USERS
from oracle import frozen_leaky, frozen_lif, loops

import sdit_kernels
from sdit_kernels import SURROGATES
from sdit_kernels.tuning import tuned

INF, NAN = math.inf, math.nan
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FROZEN = {"lif": frozen_lif.lif, "lif_rate": frozen_lif.lif_rate, "leaky": frozen_leaky.leaky}
# Triton tiles of the size users run take long to compile here, so few cases use them. test_wkv.py tests small tiles on the CPU.
BACKENDS = [("reference", USERS), ("cpu", USERS), ("triton", SMALL)]


def on_backends(backends):
    names = {id(USERS): "users", id(SMALL): "small"}
    return pytest.mark.parametrize("where", backends, ids=lambda w: f"{w[0]}-{names[id(w[1])]}")


@contextlib.contextmanager
def backend_and_tiles(where):
    """Run ops on the backend and tile sizes of ``where``.

    "one walk" means the fused Triton kernels of spiking_wkv for any B * C.
    """
    name, size = where
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        if name == "frozen":
            yield
            return
        stack.enter_context(tuned(size, **({"spiking_min_channels_fused": 0} if name == "one walk" else {})))
        triton = name in ("triton", "one walk")
        stack.enter_context(sdit_kernels.backend("triton" if triton else name))
        counts = stack.enter_context(native_triton.launches())
        yield
        assert bool(counts) == triton, f"{name} launched {dict(counts)}"


def op(where, name):
    return FROZEN[name] if where[0] == "frozen" else getattr(sdit_kernels, name)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype)


def exact(seed, *shape, dtype, low=-32, high=64):
    """Multiples of 1/16. Where tau is a power of two no step rounds, and many membranes equal the threshold exactly."""
    return (torch.randint(low, high, shape, generator=generator(seed)) / 16).to(dtype)


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def array(t):
    return t.detach().double().numpy() if isinstance(t, torch.Tensor) else t


def assert_same(got, want, what):
    """Assert that values are equal. NaN must meet NaN, and zeros must have the same sign."""
    got, want = array(got), np.asarray(want)
    assert got.shape == want.shape, what
    np.testing.assert_array_equal(got, want, err_msg=what)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(want)[number], err_msg=f"sign of {what}")


def assert_close(got, want, dtype, what, scale=0.0):
    """Assert that finite elements are close relative to the largest one or ``scale``, and that infinite elements are equal."""
    got, want = array(got), np.asarray(want)
    assert got.shape == want.shape, what
    finite = np.isfinite(want)
    scale = max(scale, np.abs(want[finite]).max(initial=0.0))
    np.testing.assert_allclose(
        got[finite], want[finite], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale, err_msg=what
    )  # fmt: skip
    np.testing.assert_array_equal(got[np.isinf(want)], want[np.isinf(want)], err_msg=what)


def gradients(outputs, upstream, tensors):
    """Return the gradients by tensor name. An upstream gradient of None means that the output is not used."""
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream) if g is not None and o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in used], list(tensors.values()), [g for _, g in used], allow_unused=True, materialize_grads=True
    )
    return dict(zip(tensors, found))


def leaves(tensors):
    return {n: t.detach().clone().requires_grad_() for n, t in tensors.items() if t is not None}


def assert_gradients(found, want, tensors, sums=("tau", "v_threshold", "beta", "time_first", "decay")):
    """Compare gradients with the oracle.

    Gradients named in ``sums`` add up terms over tokens or steps. These terms may cancel, so the error is judged relative to
    the sum of their absolute values.
    """
    data = next(n for n in ("v", "x") if n in want and n in found and found[n].dim() > 1)
    terms = np.abs(want["x" if "x" in found else data])
    terms = terms[np.isfinite(terms)].sum()
    largest = max(np.abs(want[n][np.isfinite(want[n])]).max(initial=0.0) for n in found if n not in sums)
    for n, g in found.items():
        assert g.dtype == tensors[n].dtype and g.shape == tensors[n].shape, n
        assert_close(g, want[n], g.dtype, f"gradient of {n}", terms if n in sums else largest)


# --- neurons ----------------------------------------------------------------------------------------------------------------

LIF = [
    dict(),
    dict(v_reset=None, tau=4.0),
    dict(v_reset=-0.5, decay_input=False),
    dict(v_reset=None, decay_input=False, detach_reset=True),
    dict(v_reset=0.25, detach_reset=True, v_threshold=0.5),
    dict(decay_input=False, tau=INF),
]
LEAKY = [dict(reset=r, reset_delay=d) for r, d in [("subtract", True), ("zero", True), ("none", True)]]
LEAKY += [dict(reset=r, reset_delay=False) for r in ("subtract", "zero")]
NEURONS = [("lif", f) for f in LIF] + [("leaky", f) for f in LEAKY]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def parameters(name, kind, flags, C, dtype):
    """Return (numbers, tensors): the neuron's decay and threshold as numbers, as scalar tensors or as one value per channel."""
    decay = ("beta", 0.5) if name == "leaky" else ("tau", flags.get("tau", 2.0))
    values = dict([decay, ("v_threshold", flags.get("v_threshold", 1.0))])
    if kind == "number":
        return values, {}
    return {}, {n: torch.full((C,) if kind == "channel" else (), x, dtype=state_dtype(dtype)) for n, x in values.items()}


def check_neuron(where, name, flags, data, upstream=None, equal=True):
    """Compare one neuron over all steps with the oracle's loop. With ``equal`` the membranes must also be equal bit for bit."""
    flags = {n: f for n, f in flags.items() if n not in data}
    dtype, arrays = data["x"].dtype, {n: array(t) for n, t in data.items()}
    with np.errstate(all="ignore"):
        want, backward = getattr(loops, name)(**arrays, **flags)
    tensors = leaves(data)
    with backend_and_tiles(where):
        outputs = op(where, name)(**tensors, **flags, return_v=True, return_v_seq=True)
        if upstream is None:
            upstream = [normal(7 + i, *o.shape, dtype=o.dtype) for i, o in enumerate(outputs)]
        found = gradients(outputs, upstream, tensors)
    for o, w, what in zip(outputs, want, ("s", "v", "v_seq")):
        assert o.dtype == (dtype if what == "s" else state_dtype(dtype))
        assert_same(o, w, what) if equal or what == "s" else assert_close(o, w, state_dtype(dtype), what)
    with np.errstate(all="ignore"):
        wanted = backward(*map(array, upstream))
    assert_gradients(found, wanted, tensors)


@on_backends([("frozen", USERS), *BACKENDS])
@pytest.mark.parametrize("name, flags", NEURONS, ids=str)
@pytest.mark.parametrize(
    "dtype, kind, T", [(torch.float64, "channel", 7), (torch.float32, "number", 4), (torch.float32, "number", 18)], ids=str
)
def test_neurons_equal_the_oracle_where_no_step_rounds(where, name, flags, dtype, kind, T):
    """Compare spikes and membranes bit for bit, at the threshold too, and the gradients of x, v, the decay and the
    threshold."""
    numbers, tensors = parameters(name, kind, flags, 37, dtype)
    data = dict(x=exact(T, T, 5, 37, dtype=dtype), v=exact(1, 5, 37, dtype=dtype, high=33), **tensors)
    # each step uses one or two more bits of the mantissa, so 18 steps must round
    check_neuron(where, name, flags | numbers, data, equal=T < 18)


@pytest.mark.alignment
@on_backends([("triton", USERS)])
@pytest.mark.parametrize("name", ["lif", "leaky"])
@pytest.mark.parametrize(
    "dtype, kind, T", [(torch.float32, "number", 18), (torch.bfloat16, "number", 4), (torch.float32, "channel", 2)], ids=str
)
def test_neurons_equal_the_oracle_with_the_tiles_of_a_gpu(where, name, dtype, kind, T):
    """The tile size depends on the dtype, on T and on whether parameters are per channel, but not on the neuron's settings."""
    numbers, tensors = parameters(name, kind, {}, 301, dtype)
    data = dict(x=exact(T, T, 7, 301, dtype=dtype), v=exact(1, 7, 301, dtype=state_dtype(dtype), high=33), **tensors)
    check_neuron(where, name, numbers, data, equal=T < 18)


@on_backends([("frozen", USERS), *BACKENDS])
@pytest.mark.parametrize("name", ["lif", "leaky"])
@pytest.mark.parametrize(
    "dtype, kind", [(torch.float32, "scalar"), (torch.bfloat16, "number"), (torch.float16, "number")], ids=str
)
def test_neurons_with_other_dtypes_and_parameters_equal_the_oracle(where, name, dtype, kind):
    numbers, tensors = parameters(name, kind, {}, 37, dtype)
    check_neuron(
        where, name, numbers, dict(x=exact(3, 4, 5, 37, dtype=dtype), v=exact(1, 5, 37, dtype=state_dtype(dtype)), **tensors)
    )


@on_backends([("frozen", USERS), *BACKENDS])
@pytest.mark.parametrize("name", ["lif", "leaky"])
@pytest.mark.parametrize("surrogate", sorted(SURROGATES))
def test_surrogates_equal_the_oracle(where, name, surrogate):
    beta = dict(beta=0.5) if name == "leaky" else {}
    for alpha in (None, 0.75):
        check_neuron(where, name, dict(surrogate=surrogate, alpha=alpha, **beta), dict(x=exact(3, 4, 130, dtype=torch.float64)))


@on_backends([("frozen", USERS), *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_neurons_equal_the_oracle_on_random_numbers(where, dtype):
    """Leave out neurons whose membrane comes within 1e-5 of the threshold: there, rounding decides whether they fire."""
    for name, flags in (("lif", dict(tau=1.7, v_threshold=0.9, v_reset=0.1)), ("leaky", dict(beta=0.87, v_threshold=0.9))):
        x = normal(1, 9, 700, dtype=dtype, scale=1.5)
        near = np.zeros(700, bool)
        for bound in (-1e-5, 1e-5):  # a neuron near the threshold fires differently when the threshold moves a little
            (s, _, _), _ = getattr(loops, name)(array(x), **flags | dict(v_threshold=0.9 + bound))
            (s0, _, _), _ = getattr(loops, name)(array(x), **flags)
            near |= (s != s0).any(0)
        assert near.mean() < 0.01
        check_neuron(where, name, flags, dict(x=x[:, torch.from_numpy(~near)]), equal=False)


@on_backends([("frozen", USERS), *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_lif_fires_at_the_threshold_and_leaky_only_above_it(where, dtype):
    """Test the threshold itself and the floats next to it."""
    two = torch.tensor(2.0, dtype=dtype)
    beside = torch.nextafter(two, 0 * two), torch.nextafter(two, 2 * two)
    x = torch.stack([two, *beside])[None]
    with backend_and_tiles(where):
        assert op(where, "lif")(x).tolist() == [[1.0, 0.0, 1.0]]
        assert op(where, "leaky")(x, beta=0.5, v_threshold=2.0).tolist() == [[0.0, 0.0, 1.0]]


RATES = [(f, torch.float32, "number", 4, False) for f in LIF] + [(f, torch.float64, "channel", 5, True) for f in LIF]
RATES += [(LIF[0], dtype, "scalar", 3, False) for dtype in DTYPES[1:]]


@on_backends([("frozen", USERS), *BACKENDS])
@pytest.mark.parametrize("flags, dtype, kind, T, gate", RATES, ids=str)
def test_lif_rate_equals_the_oracle(where, flags, dtype, kind, T, gate):
    """Only float64 has a gate: in other dtypes the rounding of its sigmoid could change spikes."""
    numbers, tensors = parameters("lif", kind, flags, 37, dtype)
    data = dict(x=exact(T, 3, 37, dtype=dtype), **tensors)
    if gate:
        data |= dict(residual=exact(9, 3, 37, dtype=dtype), gate=normal(4, 3, 37, dtype=dtype))
    rest = {n: f for n, f in flags.items() if n not in tensors} | numbers
    want, backward = loops.lif_rate(T=T, **{n: array(t) for n, t in data.items()}, **rest)
    tensors = leaves(data)
    with backend_and_tiles(where):
        out = op(where, "lif_rate")(T=T, **tensors, **rest)
        upstream = normal(5, *out.shape, dtype=out.dtype)
        found = gradients([out], [upstream], tensors)
    assert out.dtype == dtype
    assert_same(out, want, "rate") if T == 4 else assert_close(out, want, dtype, "rate")  # for other T the division by T rounds
    assert_gradients(found, backward(array(upstream)), tensors)


# three steps that combine NaN, infinities, zeros of both signs and an ordinary number in every order
ODD = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 2.5])
ODD_STEPS = torch.stack([ODD.repeat(1, 36)[0], ODD.repeat_interleave(6).repeat(6), ODD.repeat_interleave(36)])


@on_backends([("frozen", USERS), *BACKENDS])
@pytest.mark.parametrize("name, flags", NEURONS, ids=str)
def test_neurons_equal_the_oracle_on_nan_and_infinite_inputs(where, name, flags):
    """Outputs equal the loop bit for bit, including the sign of zeros."""
    flags = flags | (dict(beta=0.5) if name == "leaky" else {})
    with np.errstate(all="ignore"):
        want, _ = getattr(loops, name)(array(ODD_STEPS), **flags)
    with backend_and_tiles(where):
        outputs = op(where, name)(ODD_STEPS, **flags, return_v=True, return_v_seq=True)
    for o, w, what in zip(outputs, want, ("s", "v", "v_seq")):
        assert_same(o, w, what)
    if name == "lif":
        with np.errstate(all="ignore"):
            want, _ = loops.lif_rate(array(ODD), **flags)
        with backend_and_tiles(where):
            assert_same(op(where, "lif_rate")(ODD, **flags), want, "rate")


@on_backends(BACKENDS)
@pytest.mark.parametrize("name, flags", NEURONS, ids=str)
def test_gradients_of_neurons_equal_the_oracle_on_infinite_inputs(where, name, flags):
    """A branch that a select does not take has gradient 0: an infinite membrane that is reset passes on 0, not NaN."""
    flags = flags | (dict(beta=0.5) if name == "leaky" else {})
    with np.errstate(all="ignore"):
        (_, _, v_seq), _ = getattr(loops, name)(array(ODD_STEPS), **flags)
    x = ODD_STEPS[:, torch.from_numpy(~np.isnan(v_seq).any(0))]  # gradients are not defined for neurons that a NaN reaches
    assert x.isinf().any() and x.shape[1] > 20
    one, none = torch.ones_like(x), torch.zeros_like(x)
    for upstream in ((one, None, None), (one, one[0], None), (none, none[0], one), (one, one[0], one)):
        check_neuron(where, name, flags, dict(x=x, v=torch.full_like(x[0], 0.5)), upstream)


@on_backends(BACKENDS)
@pytest.mark.parametrize("flags", LIF, ids=str)
def test_gradients_of_lif_rate_equal_the_oracle_on_infinite_inputs(where, flags):
    with np.errstate(all="ignore"):
        _, backward = loops.lif_rate(array(ODD), **flags)
        want = backward(np.ones(len(ODD)))["x"]
    x = ODD.clone().requires_grad_()
    with backend_and_tiles(where):
        op(where, "lif_rate")(x, **flags).sum().backward()
    want[np.isnan(array(x))] = 0.0  # the gradient of a NaN input is not defined
    assert_close(torch.where(x.isnan(), 0.0, x.grad), want, x.dtype, "dx")


# --- scans ------------------------------------------------------------------------------------------------------------------


def scan_inputs(dtype, *lead, L, C, gate=False, states=0, seed=0, raw=True):
    """Random inputs of a scan. ``states`` sequences start with a state; if there are several, the last state is empty."""
    state = state_dtype(dtype)
    data = dict(decay=normal(seed, C, dtype=state, scale=1.5) - 1.0, first=normal(seed + 1, C, dtype=state))
    if not raw:
        data["decay"] = -data["decay"].abs()
    data |= dict(k=normal(seed + 2, *lead, L, C, dtype=dtype, scale=2.0), v=normal(seed + 3, *lead, L, C, dtype=dtype))
    if gate:
        data["r"] = normal(seed + 4, *lead, L, C, dtype=dtype)
    if states:
        shape = (states, C) if len(lead) == 1 else (*lead, C)
        data |= dict(ybar=normal(seed + 5, *shape, dtype=state), lse=normal(seed + 6, *shape, dtype=state))
        if states > 1:
            data["ybar"][-1], data["lse"][-1] = 0.0, -INF
    return data


def decay_of(data, raw):
    return dict(time_decay=data["decay"]) if raw else dict(time_decay=None, log_decay=data["decay"])


def check_scan(where, data, raw=True, upstream=None, ends=None, states=True, **flags):
    """Compare wkv with the oracle's loop. ``upstream`` holds the gradients of (out, ybar, lse)."""
    arrays = {n: array(t) for n, t in data.items()}
    rest = {n: t for n, t in arrays.items() if n not in ("decay", "first")}
    oracle_flags = {n: f for n, f in flags.items() if n != "algorithm"} | dict(cu_seqlens=ends)
    with np.errstate(all="ignore"):
        want, backward = loops.wkv(**decay_of(arrays, raw), time_first=arrays["first"], **rest, **oracle_flags)
    tensors = leaves(data)
    states = states and not flags.get("bidirectional", False)
    with backend_and_tiles(where):
        state = (tensors["ybar"], tensors["lse"]) if "ybar" in tensors else None
        outputs = sdit_kernels.wkv(
            **decay_of(tensors, raw), time_first=tensors["first"], k=tensors["k"], v=tensors["v"], r=tensors.get("r"),
            state=state, return_state=states, cu_seqlens=None if ends is None else torch.tensor(ends), **flags,
        )  # fmt: skip
        outputs = (outputs[0], *outputs[1]) if states else (outputs,)
        if upstream is None:
            upstream = [normal(9 + i, *o.shape, dtype=o.dtype) for i, o in enumerate(outputs)]
            if states:
                # an empty state has lse = log 0, which has no gradient
                upstream[2] = torch.where(outputs[2] == -INF, 0.0, upstream[2])
        found = gradients(outputs, upstream, tensors)
    for o, w, what in zip(outputs, want, ("out", "ybar", "lse")):
        assert_close(o, w, o.dtype, what)
        np.testing.assert_array_equal(np.isnan(array(o)), np.isnan(w), err_msg=what)
    with np.errstate(all="ignore"):
        wanted = backward(*(None if g is None else array(g) for g in upstream))
    wanted["first"] = wanted["time_first"]
    assert_gradients(found, wanted, tensors, sums=("decay", "first", "lse"))


SCANS = [
    (torch.float32, dict()),
    (torch.float32, dict(gate=True, states=2, raw=False)),
    (torch.float32, dict(gate=True, bidirectional=True)),
    (torch.float32, dict(gate=True, ends=[0, 3, 3, 20, 37], states=4)),
    (torch.float32, dict(ends=[0, 16, 37], bidirectional=True, raw=False)),
    (torch.float64, dict(gate=True, states=2)),
    (torch.float64, dict(gate=True, ends=[0, 3, 3, 20, 37], bidirectional=True)),
    (torch.bfloat16, dict(gate=True)),
    (torch.float16, dict(gate=True)),
]


@on_backends(BACKENDS)
@pytest.mark.parametrize("algorithm", ["serial", "chunked"])
@pytest.mark.parametrize("dtype, case", SCANS, ids=str)
def test_wkv_equals_the_oracle(where, dtype, case, algorithm):
    """L is more than two tiles, and C is not a multiple of the vector width or of a program's channels."""
    case = dict(case)
    gate, states = case.pop("gate", False), case.pop("states", 0)
    batch = 1 if "ends" in case else 2
    data = scan_inputs(dtype, batch, L=37, C=21, gate=gate, states=states, raw=case.get("raw", True))
    check_scan(where, data, algorithm=algorithm, **case)


@pytest.mark.alignment
@on_backends([("triton", USERS)])
@pytest.mark.parametrize("algorithm", ["serial", "chunked"])
@pytest.mark.parametrize("both", [False, True])
def test_wkv_equals_the_oracle_with_the_tiles_of_a_gpu(where, algorithm, both):
    """L needs several tiles. The last tile has lanes without a channel."""
    data = scan_inputs(torch.float32, 2, L=37, C=70, gate=True, states=0 if both else 2)
    check_scan(where, data, algorithm=algorithm, bidirectional=both)


@on_backends(BACKENDS[1:])
@pytest.mark.parametrize("algorithm", ["auto", "chunked"])
def test_wkv_equals_the_oracle_on_many_tokens(where, algorithm):
    """The CPU also needs several chunks, which are 256 tokens long there. C is more than one task or program handles."""
    check_scan(where, scan_inputs(torch.float32, 1, L=530, C=75, gate=True, states=1), algorithm=algorithm)


@on_backends(BACKENDS)
@pytest.mark.parametrize("both", [False, True])
def test_wkv_equals_the_oracle_on_extreme_and_masked_keys(where, both):
    data = scan_inputs(torch.float64, 2, L=37, C=21, gate=True)
    data["k"] *= 100
    data["k"][torch.rand(data["k"].shape, generator=generator(3)) < 0.4] = -INF
    data["k"][:, :, 5], data["k"][0, 3:, 6], data["k"][0, :9, 7] = -INF, -INF, -INF
    check_scan(where, data, bidirectional=both, states=False)


@on_backends(BACKENDS)
@pytest.mark.parametrize("algorithm", ["serial", "chunked"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name, odd", [("k", NAN), ("k", -INF), *((n, odd) for n in "vr" for odd in (NAN, INF, -INF))])
def test_wkv_equals_the_oracle_on_nan_and_infinite_inputs(where, name, odd, both, algorithm):
    """Put one NaN or infinity into k, v or r. All outputs and gradients must equal the loop, also those it does not reach.
    k = inf is left out: the kernels return the limit, which is the v of that token, but the loop and the reference return NaN.
    """
    for at in (2, 20):  # in the first tile and in a later one
        data = scan_inputs(torch.float32, 2, L=37, C=21, gate=True)
        data[name][1, at, 4] = odd
        upstream = [torch.ones_like(data["k"])]
        check_scan(where, data, upstream=upstream, bidirectional=both, states=False, algorithm=algorithm)


@on_backends(BACKENDS)
def test_an_infinite_value_never_becomes_finite_again(where):
    """One token has an infinite value, and its weight soon underflows. Later outputs are infinite or NaN, never finite."""
    for sign in (1.0, -1.0):
        data = scan_inputs(torch.float32, 1, L=40, C=3)
        data["decay"].fill_(4.63)
        data["v"][0, 1, 1] = sign * INF
        want = loops.wkv(array(data["decay"]), array(data["first"]), array(data["k"]), array(data["v"]))[0][0]
        with backend_and_tiles(where):
            out = sdit_kernels.wkv(data["decay"], data["first"], data["k"], data["v"])
        assert_close(out[:, :3], want[:, :3], out.dtype, "out")
        assert_close(out[..., ::2], want[..., ::2], out.dtype, "other channels")
        assert not out[:, 3:, 1].isfinite().any()


@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_wkv_steps_equal_the_oracle(where, dtype):
    """Process token by token and pass the state on, out of place and in place."""
    data = scan_inputs(dtype, 2, L=6, C=21, gate=True, states=2)
    (out, ybar, lse), _ = loops.wkv(*(array(data[n]) for n in ("decay", "first", "k", "v", "r", "ybar", "lse")))
    with backend_and_tiles(where):
        state, own = (data["ybar"], data["lse"]), (data["ybar"].clone(), data["lse"].clone())
        for t in range(6):
            token = data["decay"], data["first"], data["k"][:, t], data["v"][:, t]
            y, state = sdit_kernels.wkv_step(*token, state, r=data["r"][:, t])
            in_place = sdit_kernels.wkv_step_(*token, own, r=data["r"][:, t])
            for o in (y, in_place):
                assert_close(o, out[:, t], dtype, f"token {t}")
    for s in (state, own):
        assert_close(s[0], ybar, dtype, "ybar")
        assert_close(s[1], lse, dtype, "lse")


# --- scans that drive neurons -----------------------------------------------------------------------------------------------

SPIKING = [
    (torch.float32, 1, dict()),
    (torch.float32, 4, dict(gate=True, states=True, v_reset=-0.5, decay_input=False, detach_reset=True)),
    (torch.float32, 4, dict(rate=True, gate=True, states=True, kind="channel", v_reset=0.1)),
    (torch.float64, 4, dict(gate=True, states=True, kind="channel", v_reset=None)),
    (torch.float64, 4, dict(kind="scalar", rate=True, raw=False, v_reset=None, decay_input=False, detach_reset=True)),
]


def check_spiking_scan(where, data, raw=True, rate=False, **neuron):
    """Compare spiking_wkv with the oracle's loop."""
    arrays = {n: array(t) for n, t in data.items()}
    rest = {n: t for n, t in arrays.items() if n not in ("decay", "first")}
    want, backward = loops.spiking_wkv(
        **decay_of(arrays, raw), time_first=arrays["first"], **rest, rate=rate, **neuron
    )  # fmt: skip
    tensors = leaves(data)
    with backend_and_tiles(where):
        t = tensors
        state = (t["ybar"], t["lse"]) if "ybar" in t else None
        parameters = {n: t[n] for n in ("tau", "v_threshold") if n in t}
        out, (scan, membrane) = sdit_kernels.spiking_wkv(
            **decay_of(t, raw), time_first=t["first"], k=t["k"], v=t["v"], r=t.get("r"), scan_state=state,
            membrane=t.get("membrane"), return_state=True, rate=rate, **neuron, **parameters,
        )  # fmt: skip
        outputs = out, *scan, membrane
        upstream = [normal(9 + i, *o.shape, dtype=o.dtype) for i, o in enumerate(outputs)]
        found = gradients(outputs, upstream, tensors)
    wanted = backward(*map(array, upstream))
    wanted["first"] = wanted["time_first"]
    assert_same(out, want[0], "spikes") if not rate else assert_close(out, want[0], out.dtype, "rate")
    for o, w, what in zip(outputs[1:], want[1:], ("ybar", "lse", "membrane")):
        assert_close(o, w, o.dtype, what)
    assert_gradients(found, wanted, tensors, sums=("decay", "first", "lse", "tau", "v_threshold"))


@on_backends([*BACKENDS, ("one walk", SMALL)])
@pytest.mark.parametrize("dtype, T, case", SPIKING, ids=str)
def test_spiking_wkv_equals_the_oracle(where, dtype, T, case):
    """These seeds keep every membrane more than 1e-5 from the threshold. Otherwise float32 spikes could differ."""
    case = dict(case)
    gate, states, kind = case.pop("gate", False), case.pop("states", False), case.pop("kind", "number")
    data = scan_inputs(dtype, T, 2, L=37, C=21, gate=gate, states=int(states), raw=case.get("raw", True), seed=20)
    data["v"] *= 3
    if states:
        data["membrane"] = normal(30, 2, 37, 21, dtype=state_dtype(dtype))
    if kind != "number":
        shape = (21,) if kind == "channel" else ()
        data |= {n: torch.full(shape, x, dtype=state_dtype(dtype)) for n, x in (("tau", 1.75), ("v_threshold", 0.75))}
    check_spiking_scan(where, data, **case)


@pytest.mark.alignment
@on_backends([("triton", USERS), ("one walk", USERS)])
def test_spiking_wkv_equals_the_oracle_with_the_tiles_of_a_gpu(where):
    data = scan_inputs(torch.float32, 4, 2, L=37, C=40, gate=True, seed=20)
    data["v"] *= 3
    check_spiking_scan(where, data)


# --- around the scan --------------------------------------------------------------------------------------------------------


@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_token_shift_equals_the_oracle(where, dtype, norm_eps):
    C = 19 if where[0] == "triton" else 70  # a row with a norm is one tile, and wide tiles take long to compile here
    for mixes, given in ((1, False), (3, True)):
        data = dict(x=normal(1, 2, 19, C, dtype=dtype))
        data |= dict(last=normal(2, 2, C, dtype=dtype)) if given else {}
        tensors = leaves(data | {f"mix {i}": normal(3 + i, C, dtype=state_dtype(dtype)) for i in range(mixes)})
        ms = [t for n, t in tensors.items() if n.startswith("mix")]
        want, backward = loops.token_shift(
            array(data["x"]), list(map(array, ms)), norm_eps, array(data["last"]) if given else None
        )  # fmt: skip
        with backend_and_tiles(where):
            outputs = sdit_kernels.token_shift(tensors["x"], *ms, norm_eps=norm_eps, last=tensors.get("last"))
            upstream = [normal(9 + i, *o.shape, dtype=o.dtype) for i, o in enumerate(outputs)]
            found = gradients(outputs, upstream, tensors)
        wanted = backward(*map(array, upstream))
        wanted |= {f"mix {i}": d for i, d in enumerate(wanted["mixes"])}
        for o, w in zip(outputs, want):
            assert_close(o, w, dtype, "out")
        for n, g in found.items():
            assert_close(g, wanted[n], g.dtype, f"gradient of {n}", 10.0 if n.startswith("mix") else 0.0)


@on_backends(BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_squared_equals_the_oracle(where, dtype):
    x = torch.cat([normal(1, 9000, dtype=dtype, scale=3.0), ODD.to(dtype)]).requires_grad_()
    want, backward = loops.relu_squared(array(x))
    g = normal(2, *x.shape, dtype=dtype)
    with backend_and_tiles(where):
        out = sdit_kernels.relu_squared(x)
        (dx,) = torch.autograd.grad(out, x, g)
    wanted = backward(array(g))["x"]
    for got, exact_ in ((out, want), (dx, wanted)):
        np.testing.assert_allclose(array(got), exact_, rtol=TOLERANCE[dtype], atol=torch.finfo(dtype).smallest_normal)
