"""Compare wkv and wkv_step on every backend with the reference in float64, and test their properties."""

import math
import sys
import warnings
from pathlib import Path

import hypothesis.strategies as st
import native_triton
import pytest
import torch
from hypothesis import given, settings

import sdit_kernels
from sdit_kernels import backend, reference, wkv, wkv_state_from_rwkv, wkv_state_to_rwkv, wkv_step, wkv_step_
from sdit_kernels.tuning import current, tuned

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ["cpu"] + ["triton"] * (ROOT / "sdit_kernels" / "triton" / "wkv.py").exists()
ALGORITHMS = ["serial", "chunked"]
HALF = (torch.bfloat16, torch.float16)
DIMENSION = [1, 2, 3, 7, 15, 16, 17, 33, 65]
LENGTH = [1, 2, 7, 31, 32, 33, 64, 65, 100, 150]


def run(name, function, *args, **kwargs):
    """Call a function under a backend. Under Triton, assert that its kernels were launched."""
    with backend(name), native_triton.launches() as counts:
        out = function(*args, **kwargs)
    if name == "triton":
        assert any("wkv" in kernel for kernel in counts), f"no Triton kernel ran, only {dict(counts)}"
    return out


@pytest.fixture(autouse=True)
def short_chunks():
    """Use chunks of two tiles, so that a short sequence has several chunks."""
    with tuned(wkv_segment_tiles=2):
        yield


def normal(generator, *shape, dtype=torch.float64, scale=1.0):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def with_layout(x, layout):
    """Return the same values with other strides."""
    if layout == "slice of channels":
        return torch.cat([x + 1, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "tokens first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one row":
        return x[:1, :1].expand(x.shape)
    return x


LAYOUTS = ["contiguous", "slice of channels", "tokens first", "channels first", "one row"]


def make_arguments(
    B, L, C, dtype=torch.float32, *, gate=False, state=False, masked=0.0, scale=1.0, layout="contiguous", ends=None, seed=0
):
    """Return arguments of wkv by name. Parameters and state have the dtype in which the kernels compute."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = dict(decay=normal(g, C, dtype=wide, scale=1.5) - 1, first=normal(g, C, dtype=wide))
    a["k"] = normal(g, B, L, C, dtype=dtype, scale=scale)
    a["v"] = normal(g, B, L, C, dtype=dtype)
    if masked:
        a["k"][torch.rand(a["k"].shape, generator=g) < masked] = -math.inf
    if gate:
        a["r"] = normal(g, B, L, C, dtype=dtype)
    for name in {"k", "v", "r"} & set(a):
        a[name] = with_layout(a[name], layout)
    if state:
        N = B if ends is None else len(ends) - 1
        a["ybar"], a["lse"] = normal(g, N, C, dtype=wide), normal(g, N, C, dtype=wide, scale=scale)
        a["lse"][torch.rand(N, C, generator=g) < 0.2] = -math.inf
    return a


def call_wkv(a, *, ends=None, log_decay=False, **flags):
    """Return the outputs of wkv as a list. The lse of an empty state is replaced by 0, which has no gradient."""
    state = (a["ybar"], a["lse"]) if "ybar" in a else None
    decay = dict(log_decay=a["decay"]) if log_decay else {}
    cu_seqlens = None if ends is None else torch.tensor(ends)
    out = wkv(
        None if log_decay else a["decay"], a["first"], a["k"], a["v"], r=a.get("r"), state=state, cu_seqlens=cu_seqlens,
        **decay, **flags,
    )  # fmt: skip
    if not flags.get("return_state"):
        return [out]
    y, (ybar, lse) = out
    return [y, ybar, torch.where(lse > -math.inf, lse, 0.0)]


def with_gradients(name, a, dtype=None, seed=1, used=None, **flags):
    """Return (outputs, gradients by argument name). The upstream gradients depend only on the shapes."""
    leaves = {n: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for n, t in a.items()}
    g = torch.Generator().manual_seed(seed)

    def both():
        outputs = call_wkv(leaves, **flags)
        loss = 0.0
        for i, (o, stored) in enumerate(zip(outputs, (a["k"].dtype, a["decay"].dtype, a["decay"].dtype))):
            if used is None or i in used:
                loss = loss + (o * normal(g, *o.shape, dtype=stored).to(o.dtype)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return [o.detach() for o in outputs], dict(zip(leaves, grads))

    return run(name, both)


def rms(x):
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_output(got, want, what=""):
    """Bound the rms error relative to float64. In 16 bits it may be 1.1 times the error of rounding the exact output."""
    assert got.shape == want.shape
    bound = {torch.float64: 1e-12, torch.float32: 2e-6}.get(got.dtype, 2e-6) * rms(want)
    if got.dtype in HALF:
        bound += 1.1 * rms(want.to(got.dtype).double() - want)
    assert rms(got.double() - want) <= bound + 1e-30, f"{what}: {rms(got.double() - want):.2e} > {bound:.2e}"


def assert_gradient(got, want, terms, what, own_error=None, dtype=None):
    """Assert that a gradient is close, relative to its largest element plus ``terms``.

    ``terms`` is the size of the terms |g||v| that are added over the tokens. Where these terms cancel, four times
    ``own_error()`` is allowed as well: the error of autograd through the reference in the dtype in which the kernels compute.
    """
    assert got.shape == want.shape
    tolerance = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype or got.dtype]
    error = (got.double() - want).abs().max().item() if got.numel() else 0.0
    scale = (want.abs().max().item() if want.numel() else 0.0) + terms
    limit = tolerance * scale
    if error > limit and own_error is not None:
        limit += 4 * own_error()
    assert error <= limit, f"gradient of {what}: {error:.2e} relative to {scale:.2e}"


def compare(name, a, dtype, used=None, **flags):
    outputs, grads = with_gradients(name, a, used=used, **flags)
    want, want_grads = with_gradients("reference", a, torch.float64, used=used, **flags)
    assert outputs[0].dtype == dtype
    for got, exact, what in zip(outputs, want, ("out", "ybar", "lse")):
        assert_output(got, exact, what)
    for n in a:
        tokens = a["k"].numel() / a["first"].numel() if n in ("decay", "first") else 1.0
        if n == "decay":  # sums differences P a + Q b over the tokens, where P and Q are themselves sums over tokens
            tokens *= a["k"].shape[1]
        if n in ("ybar", "lse"):  # every token of the sequence sees the state
            tokens = a["k"].shape[1]

        # The gradient of time_decay is the gradient of the rate, e^time_decay, times the rate, and so are its rounding errors.
        rate = a[n].double().exp() if n == "decay" and not flags.get("log_decay") else 1.0

        def own_error(n=n, rate=rate):
            _, own = with_gradients("reference", a, used=used, **flags)
            return ((own[n].double() - want_grads[n]) / rate).abs().max().item()

        differences = n in ("k", "decay", "lse")  # dk = E (P v + Q) + ... adds two sums that may cancel
        got, exact, terms = grads[n] / rate, want_grads[n] / rate, 0.2 * math.sqrt(tokens) + 0.2
        assert_gradient(got, exact, terms, n, own_error if differences else None, grads[n].dtype)
        assert grads[n].dtype == a[n].dtype
    assert not grads["k"][torch.isneginf(a["k"])].any()


# Each variant compiles its own kernels, so there are few variants. Together they combine most pairs of options.
VARIANTS = [  # dtype, algorithm, options
    (torch.float32, "serial", ""),
    (torch.float32, "chunked", "gate state return_state"),
    (torch.float32, "auto", "gate packed log_decay return_state"),
    (torch.float32, "chunked", "gate both"),
    (torch.float32, "serial", "packed both log_decay"),
    (torch.float64, "chunked", "gate state packed return_state"),
    (torch.float64, "auto", "both log_decay"),
    (torch.bfloat16, "serial", "gate log_decay return_state"),
    (torch.bfloat16, "auto", "state packed"),
    (torch.float16, "chunked", "gate packed both"),
    (torch.float16, "serial", "state log_decay return_state"),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype, algorithm, options", VARIANTS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_wkv_equals_the_reference(name, dtype, algorithm, options, data):
    gate, state, packed, both, log_decay, return_state = (
        word in options.split() for word in ("gate", "state", "packed", "both", "log_decay", "return_state")
    )
    ends, max_seqlen = None, {}
    B, L = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(LENGTH))
    if packed:
        lengths = data.draw(st.lists(st.sampled_from([0, 1, 5, 31, 32, 33, 70]), min_size=1, max_size=5).filter(any))
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        B, L = 1, ends[-1]
        if data.draw(st.booleans()):
            max_seqlen = dict(max_seqlen=max(lengths) + data.draw(st.integers(0, 3)))
    a = make_arguments(
        B, L, data.draw(st.sampled_from(DIMENSION)), dtype, gate=gate, state=state, ends=ends,
        masked=data.draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])), scale=data.draw(st.sampled_from([1.0, 4.0, 20.0])),
        layout=data.draw(st.sampled_from(LAYOUTS)), seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    if log_decay:
        a["decay"] = a["decay"] / 10  # of either sign
    used = data.draw(st.sampled_from([None, (0,), (1, 2)])) if return_state else None
    flags = dict(ends=ends, log_decay=log_decay, bidirectional=both, algorithm=algorithm, return_state=return_state)
    compare(name, a, dtype, used, **flags, **max_seqlen)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("both", [False, True])
def test_small_sequences_with_all_options_equal_the_reference(name, algorithm, both):
    """Small enough to run in Triton's interpreter."""
    a = make_arguments(2, 40, 5, gate=True, state=not both, masked=0.2)
    compare(name, a, torch.float32, bidirectional=both, return_state=not both, algorithm=algorithm)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "kind, gate", [("plain", False), ("state", True), ("both", True), ("packed", False), ("packed both", True)]
)
def test_gradients_equal_finite_differences(name, algorithm, kind, gate):
    torch.use_deterministic_algorithms(False)
    both, ends = "both" in kind, [0, 3, 3, 40, 73] if "packed" in kind else None
    a = make_arguments(1, 73, 2, torch.float64, gate=gate, state=kind == "state", ends=ends, seed=3)
    if kind == "state":
        a["lse"][:] = torch.tensor([0.3, -1.0], dtype=torch.float64)
    flags = dict(bidirectional=both, return_state=not both, ends=ends, algorithm=algorithm)
    names = list(a)

    def function(*tensors):
        return tuple(call_wkv(dict(zip(names, tensors)), **flags))

    with backend(name):
        tensors = [a[n].detach().requires_grad_() for n in names]
        assert torch.autograd.gradcheck(function, tensors, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=kind != "state")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("mean, deviation", [(0.0, 8.0), (50.0, 4.0)])
def test_slow_decay_is_accurate(name, algorithm, mean, deviation):
    """L = 4096 and time_decay = -5. A running maximum that adds w at every token would have an error of 4e-4."""
    g = torch.Generator().manual_seed(0)
    a = dict(decay=torch.full((4,), -5.0), first=torch.randn(4, generator=g))
    a["k"] = (torch.randn(1, 4096, 4, generator=g) * deviation + mean).float()
    a["v"] = torch.randn(1, 4096, 4, generator=g)
    (got,) = run(name, call_wkv, a, algorithm=algorithm)
    (want,) = run("reference", call_wkv, {n: t.double() for n, t in a.items()})
    assert rms(got.double() - want) <= 1e-6 * rms(want)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=40)
@given(data=st.data())
def test_both_kinds_of_tile_on_the_cpu_equal_the_reference(algorithm, data):
    """The CPU chooses one of two paths for a tile by the decay, the bonus and the rise of the keys.

    Test both sides of each limit.
    """
    C, L = data.draw(st.sampled_from([1, 16, 23])), data.draw(st.sampled_from([7, 16, 40, 100]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    a = make_arguments(
        2, L, C, dtype, gate=data.draw(st.booleans()), state=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99))
    )
    a["decay"] += data.draw(st.sampled_from([-4.0, 0.0, 2.0, 3.0]))
    a["first"] += data.draw(st.sampled_from([-8.0, 0.0, 7.5, 9.0]))
    a["k"] += data.draw(st.sampled_from([-60.0, 0.0, 40.0]))
    for _ in range(data.draw(st.integers(0, 3))):  # raise the keys from one token on, or at one token only
        t, rise = data.draw(st.integers(0, L - 1)), data.draw(st.sampled_from([-80.0, -24.0, 24.0, 28.0, 60.0]))
        a["k"][:, t : data.draw(st.sampled_from([t + 1, L]))] += rise
    a["k"][:, : data.draw(st.sampled_from([0, 0, 1, 5]))] = -math.inf
    compare("cpu", a, dtype, algorithm=algorithm, return_state=data.draw(st.booleans()))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_extreme_keys_stay_finite(name, algorithm):
    for both in (False, True):
        a = make_arguments(1, 130, 17, scale=1e4, gate=True)
        a["decay"][:4] = torch.tensor([-30.0, 5.0, 88.0, 100.0])  # time_decay = 100 gives w = -exp(100) = -inf
        outputs, grads = with_gradients(name, a, bidirectional=both, algorithm=algorithm)
        assert all(t.isfinite().all() for t in (*outputs, *grads.values()))
        (want,) = run("reference", call_wkv, {n: t.double() for n, t in a.items()}, bidirectional=both)
        assert_output(outputs[0], want)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_masked_sequences_return_zero(name, algorithm):
    """All keys are masked. Outputs and gradients are 0. An empty state stays empty, and a given state decays."""
    a = make_arguments(2, 70, 5, gate=True, masked=1.0)
    for both in (False, True):
        outputs, grads = with_gradients(name, a, bidirectional=both, return_state=not both, algorithm=algorithm)
        assert not any(t.any() for t in (*outputs, *grads.values()))
    state = torch.full((2, 5), 3.0), torch.zeros(2, 5)
    _, (ybar, lse) = run(
        name, wkv, a["decay"], a["first"], a["k"], a["v"], state=state, return_state=True, algorithm=algorithm
    )  # fmt: skip
    torch.testing.assert_close(ybar, state[0])
    torch.testing.assert_close(lse, (-70 * a["decay"].exp()).expand(2, 5))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_not_a_number_reaches_the_same_outputs_as_in_the_reference(name, algorithm):
    for both in (False, True):
        for where in ("k", "v", "r"):
            a = make_arguments(1, 100, 3, gate=True)
            a[where][0, 40, 1] = math.nan
            (got,), (want,) = (run(n, call_wkv, a, bidirectional=both, algorithm=algorithm) for n in (name, "reference"))
            assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()


# --- properties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(0, 150), max_size=4), algorithm=st.sampled_from(ALGORITHMS), seed=st.integers(0, 9))
def test_slices_equal_one_pass(name, cuts, algorithm, seed):
    a = make_arguments(2, 150, 9, torch.float64, state=True, seed=seed)
    bounds = [0, *sorted(cuts), 150]

    def slices(a):
        state, parts = (a["ybar"], a["lse"]), []
        for lo, hi in zip(bounds, bounds[1:]):
            y, state = wkv(
                a["decay"], a["first"], a["k"][:, lo:hi], a["v"][:, lo:hi], state=state, return_state=True, algorithm=algorithm
            )  # fmt: skip
            parts.append(y)
        return torch.cat(parts, 1), *state

    found = []
    for function in (slices, lambda a: call_wkv(a, return_state=True)):
        leaves = {n: t.detach().requires_grad_() for n, t in a.items()}
        outputs = run(name, function, leaves)
        g = torch.Generator().manual_seed(5)
        with backend(name):
            grads = torch.autograd.grad(
                sum((torch.where(o > -math.inf, o, 0) * normal(g, *o.shape)).sum() for o in outputs), list(leaves.values())
            )
        found.append((*outputs, *grads))
    for one, two in zip(*found):
        torch.testing.assert_close(torch.where(one > -math.inf, one, 0), two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_permuting_the_batch_permutes_the_outputs(name, algorithm):
    a = make_arguments(5, 70, 19, gate=True, state=True)
    order = torch.tensor([3, 1, 4, 0, 2])
    b = {n: t if t.dim() == 1 else t[order] for n, t in a.items()}
    one, two = (run(name, call_wkv, x, return_state=True, algorithm=algorithm) for x in (a, b))
    assert all(torch.equal(o[order], t) for o, t in zip(one, two))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("both", [False, True])
def test_adding_a_constant_to_the_keys_only_shifts_lse(name, both):
    """Adding c to all keys leaves y unchanged and adds c to lse. c is a power of two, so k + c is exact in float64."""
    a = make_arguments(2, 90, 7, torch.float64)
    one, two = (
        run(name, call_wkv, {**a, "k": a["k"] + c}, bidirectional=both, return_state=not both) for c in (0.0, 8.0)
    )  # fmt: skip
    torch.testing.assert_close(one[0], two[0], rtol=1e-11, atol=1e-12)
    if not both:
        torch.testing.assert_close(one[2] + 8.0, two[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_later_tokens_do_not_change_earlier_outputs(name, algorithm):
    a = make_arguments(1, 100, 6)
    b = {n: t.clone() for n, t in a.items()}
    # the edge of a tile for every tile size: tokens of one tile share an exponent, so a later key in the tile changes rounding
    cut = 64
    b["k"][:, cut:] += 30
    b["v"][:, cut:] = -7
    (one,), (two,) = (run(name, call_wkv, x, algorithm=algorithm) for x in (a, b))
    assert torch.equal(one[:, :cut], two[:, :cut]) and not torch.equal(one[:, cut:], two[:, cut:])


@pytest.mark.parametrize("name", BACKENDS)
def test_bidirectional_adds_both_directions_and_counts_the_token_once(name):
    """The numerator is N = N_left + N_right + e^(u+k) v. The flipped sequence gives the flipped output."""
    a = make_arguments(1, 50, 3, torch.float64)
    flipped = {n: t.flip(1) if t.dim() == 3 else t for n, t in a.items()}
    (both,), (back,) = run(name, call_wkv, a, bidirectional=True), run(name, call_wkv, flipped, bidirectional=True)
    torch.testing.assert_close(both, back.flip(1), rtol=1e-11, atol=1e-12)

    def sums(a):  # the denominators D and numerators N at each token, from the state before it
        D, N = [], []
        for t in range(50):
            one = {n: x[:, :t] if x.dim() == 3 else x for n, x in a.items()}
            _, ybar, lse = (
                run(name, call_wkv, one, return_state=True) if t else (0, torch.zeros(1, 3), torch.full((1, 3), -1e9))
            )
            D.append(lse.double().exp())
            N.append(ybar * lse.double().exp())
        return torch.stack(D, 1), torch.stack(N, 1)

    (d, n), (d_, n_) = sums(a), (x.flip(1) for x in sums(flipped))
    own = (a["first"] + a["k"]).exp()
    torch.testing.assert_close(both, (n + n_ + own * a["v"]) / (d + d_ + own), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_sequences_equal_separate_calls(name, algorithm, index):
    ends = [0, 33, 33, 34, 130]
    a = make_arguments(1, 130, 18, torch.float64, gate=True, state=True, ends=ends)
    cu_seqlens = torch.tensor(ends, dtype=index)
    y, (ybar, lse) = run(
        name, wkv, a["decay"], a["first"], a["k"], a["v"], r=a["r"], state=(a["ybar"], a["lse"]), return_state=True,
        cu_seqlens=cu_seqlens, max_seqlen=96, algorithm=algorithm,
    )  # fmt: skip
    for i, (lo, hi) in enumerate(zip(ends, ends[1:])):
        one = {n: t[:, lo:hi] for n, t in a.items() if t.dim() == 3}
        state = a["ybar"][i : i + 1], a["lse"][i : i + 1]
        with backend(name):
            y1, state = wkv(a["decay"], a["first"], one["k"], one["v"], r=one["r"], state=state, return_state=True)
        torch.testing.assert_close(y[:, lo:hi], y1, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ybar[i : i + 1], state[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse[i : i + 1], state[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_masked_tokens_only_let_time_pass(name, algorithm):
    """Without decay, removing a masked token changes nothing. With decay, a masked token still ages the tokens before it."""
    a = make_arguments(1, 120, 4, torch.float64)
    a["decay"] = torch.zeros(4, dtype=torch.float64)
    hidden = torch.arange(120) % 3 == 1
    a["k"][:, hidden] = -math.inf
    kept = {n: t[:, ~hidden] if t.dim() == 3 else t for n, t in a.items()}
    for both in (False, True):
        flags = dict(log_decay=True, bidirectional=both, algorithm=algorithm)
        (one,), (two,) = run(name, call_wkv, a, **flags), run(name, call_wkv, kept, **flags)
        torch.testing.assert_close(one[:, ~hidden], two, rtol=1e-11, atol=1e-12)
    a["decay"] -= 0.5
    # each key minus its decay until the end
    spread = kept["k"] - 0.5 * torch.arange(120, dtype=torch.float64)[~hidden].flip(0).reshape(1, -1, 1)
    _, _, lse = run(name, call_wkv, a, log_decay=True, return_state=True, algorithm=algorithm)
    torch.testing.assert_close(
        lse, (spread - 0.5 * (119 - torch.arange(120)[~hidden].max())).logsumexp(1), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_parameter_gradients_repeat_bit_for_bit(name, algorithm):
    a = make_arguments(3, 300, 40, gate=True)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(with_gradients(name, a, algorithm=algorithm))
    torch.set_num_threads(before)
    for outputs, grads in found[1:]:
        assert torch.equal(outputs[0], found[0][0][0])
        assert all(torch.equal(grads[n], found[0][1][n]) for n in a)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
def test_long_sequences_equal_a_softmax(name, algorithm):
    """L = 65,536. Compare the last output and the final state with a softmax over all tokens."""
    g = torch.Generator().manual_seed(0)
    L, C = 65536, 3
    w, u = torch.tensor([-1e-4, -0.01, 0.0]), torch.randn(C, generator=g)
    k, v = torch.randn(1, L, C, generator=g), torch.randn(1, L, C, generator=g)
    with tuned(wkv_segment_tiles=16):
        y, (ybar, lse) = run(name, wkv, None, u, k, v, log_decay=w, return_state=True, algorithm=algorithm)
    age = (L - 1 - torch.arange(L)).double().reshape(1, L, 1)
    exponent = k.double() + age * w.double()
    want = exponent.logsumexp(1)
    torch.testing.assert_close(lse.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ybar.double(), (exponent.softmax(1) * v.double()).sum(1), rtol=1e-4, atol=2e-6)
    before = exponent[:, :-1] - w
    last = torch.cat([before, (u + k[:, -1:]).double()], 1).softmax(1)
    torch.testing.assert_close(y[:, -1].double(), (last * v.double()).sum(1), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_offsets_beyond_31_bits_are_read(name):
    torch.use_deterministic_algorithms(False)  # deterministic mode would fill the memory between the tokens
    stride = (1 << 30) + 64
    memory = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    k = memory.as_strided((1, 3, 20), (0, stride, 1))
    a = make_arguments(1, 3, 20, torch.bfloat16)
    k.copy_(a["k"])
    (got,) = run(name, call_wkv, {**a, "k": k})
    assert torch.equal(got, run(name, call_wkv, a)[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_tensors_give_empty_results(name):
    with backend(name):
        for B, L, C in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
            a = make_arguments(B, L, C, state=True, gate=True)
            outputs, grads = with_gradients_of_empty(a)
            seen = torch.isfinite(a["lse"])
            assert outputs[0].shape == (B, L, C) and torch.equal(outputs[2], a["lse"])
            assert torch.equal(outputs[1], a["ybar"] * seen)
            assert all(grads[n].shape == a[n].shape for n in a)
            assert not grads["decay"].any() and not grads["first"].any()
            if L == 0:
                assert torch.equal(grads["ybar"], seen.float()) and torch.equal(grads["lse"], seen.float())
            _, (ybar, lse) = wkv(a["decay"], a["first"], a["k"], a["v"], return_state=True)
            assert not ybar.any() and torch.isneginf(lse).all()
            assert wkv(a["decay"], a["first"], a["k"], a["v"], bidirectional=True).shape == (B, L, C)
        none = wkv(*(torch.zeros(4), torch.zeros(4)), *[torch.zeros(1, 0, 4)] * 2, cu_seqlens=torch.tensor([0]))
        assert none.shape == (1, 0, 4)


def with_gradients_of_empty(a):
    leaves = {n: t.detach().requires_grad_() for n, t in a.items()}
    y, (ybar, lse) = wkv(
        leaves["decay"], leaves["first"], leaves["k"], leaves["v"], r=leaves["r"], state=(leaves["ybar"], leaves["lse"]),
        return_state=True,
    )  # fmt: skip
    grads = torch.autograd.grad(
        y.sum() + ybar.sum() + lse.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return (y, ybar, lse), dict(zip(leaves, grads))


@pytest.mark.parametrize("name", BACKENDS)
def test_upstream_gradients_may_have_any_strides(name):
    a = make_arguments(2, 40, 20, gate=True)
    for upstream in (
        torch.ones(()).expand(2, 40, 20),
        torch.randn(20).expand(2, 40, 20),
        torch.randn(40, 20).expand(2, 40, 20),
        torch.randn(2, 40, 1).expand(2, 40, 20),
        torch.randn(2, 20, 40).transpose(1, 2),
        torch.randn(2, 40, 40)[..., ::2],
        torch.randn(2, 40, 40)[..., 20:],
    ):
        found = []
        for which in (name, "reference"):
            leaves = {n: t.detach().clone().requires_grad_() for n, t in a.items()}
            with backend(which):
                call_wkv(leaves)[0].backward(upstream)
            found.append({n: t.grad for n, t in leaves.items()})
        for n in a:
            torch.testing.assert_close(found[0][n], found[1][n], rtol=1e-4, atol=1e-4)


# --- one token at a time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gate", [False, True])
def test_steps_equal_one_pass(name, dtype, gate):
    a = make_arguments(3, 60, 20, dtype, gate=gate)
    want, _, lse = run("reference", call_wkv, {n: t.double() for n, t in a.items()}, return_state=True)
    wide = a["decay"].dtype
    state, in_place = None, (torch.zeros(3, 20, dtype=wide), torch.full((3, 20), -math.inf, dtype=wide))
    for t in range(60):
        now = [a["decay"], a["first"], a["k"][:, t], a["v"][:, t]]
        r = a["r"][:, t] if gate else None
        y, state = run(name, wkv_step, *now, state, r=r)
        y_ = run(name, wkv_step_, *now, in_place, r=r)
        assert torch.equal(y, y_) and all(torch.equal(s, s_) for s, s_ in zip(state, in_place))
        assert y.dtype == dtype and state[0].dtype == wide
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(y.double(), want[:, t], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state[1].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_a_step_equal_finite_differences(name):
    a = make_arguments(2, 1, 6, torch.float64, gate=True, state=True)
    a["lse"] = a["lse"].clamp_min(-2)
    names = list(a)

    def function(*tensors):
        a = dict(zip(names, tensors))
        y, state = wkv_step(
            a["decay"], a["first"], a["k"][:, 0], a["v"][:, 0], (a["ybar"], a["lse"]), r=a["r"][:, 0]
        )  # fmt: skip
        return y, *state

    torch.use_deterministic_algorithms(False)
    with backend(name):
        assert torch.autograd.gradcheck(function, [a[n].detach().requires_grad_() for n in names])


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_step_in_place_refuses_gradients_and_writes_to_strided_states(name):
    a = make_arguments(2, 1, 6)
    now = a["decay"], a["first"], a["k"][:, 0], a["v"][:, 0]
    with backend(name):
        state = torch.zeros(2, 6), torch.full((2, 6), -math.inf)
        with pytest.raises(RuntimeError, match="wkv_step_ overwrites its state and has no gradient"):
            wkv_step_(now[0].clone().requires_grad_(), *now[1:], state)
        with torch.no_grad():
            wkv_step_(now[0].clone().requires_grad_(), *now[1:], state)
        memory = torch.zeros(6, 4), torch.full((6, 4), -math.inf)
        strided = [m.t()[::2] for m in memory]
        versions = [m._version for m in memory]
        y = wkv_step_(*now, strided)
        assert torch.equal(strided[0], state[0]) and torch.equal(strided[1], state[1]) and not memory[0].t()[1].any()
        assert all(m._version > v for m, v in zip(memory, versions))
        assert torch.equal(y, wkv_step(*now)[0])
        assert wkv_step_(now[0], now[1], now[2][:0], now[3][:0], [s[:0] for s in state]).shape == (0, 6)


def test_the_in_place_operator_refuses_gradients():
    a = make_arguments(2, 1, 6)
    args = (
        a["k"][:, 0].clone().requires_grad_(),
        a["v"][:, 0],
        None,
        a["decay"],
        a["first"],
        torch.zeros(2, 6),
        torch.zeros(2, 6),
    )
    with pytest.raises(RuntimeError, match="writes to its arguments and has no gradient"):
        torch.ops.sdit_kernels.wkv_step_(*args, True, "cpu")


def test_states_convert_from_and_to_those_of_rwkv():
    """Compare with RWKV's own recurrence, which keeps three numbers per channel."""
    a = make_arguments(2, 9, 5, torch.float64)
    w, u = -a["decay"].exp(), a["first"]
    aa, bb, pp = *torch.zeros(2, 2, 5).double(), torch.full((2, 5), -1e38, dtype=torch.float64)
    assert all(torch.equal(x, y) for x, y in zip(wkv_state_to_rwkv(*wkv_state_from_rwkv(aa, bb, pp)), (aa, bb, pp)))
    for t in range(9):
        k, v = a["k"][:, t], a["v"][:, t]
        if t == 4:
            y, (ybar, lse) = wkv_step(a["decay"], u, k, v, wkv_state_from_rwkv(aa, bb, pp))
        q = torch.maximum(pp, u + k)
        own = ((pp - q).exp() * aa + (u + k - q).exp() * v) / ((pp - q).exp() * bb + (u + k - q).exp())
        q = torch.maximum(pp + w, k)
        aa, bb, pp = (pp + w - q).exp() * aa + (k - q).exp() * v, (pp + w - q).exp() * bb + (k - q).exp(), q
        if t == 4:
            torch.testing.assert_close(y, own)
            torch.testing.assert_close((ybar, lse), wkv_state_from_rwkv(aa, bb, pp))
            aa, bb, pp = wkv_state_to_rwkv(ybar, lse)
    torch.testing.assert_close(wkv_state_from_rwkv(aa, bb, pp), wkv(a["decay"], u, a["k"], a["v"], return_state=True)[1])
    state = [x.clone().requires_grad_() for x in (aa, bb, pp)]
    assert torch.autograd.gradcheck(lambda *s: wkv_state_to_rwkv(*wkv_state_from_rwkv(*s)), state)


# --- memory saved for the backward pass ---------------------------------------------------------------------------------------


def saved(function):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.nbytes) and t if t.nbytes else t, lambda t: t
    ):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("name", BACKENDS)
def test_saved_bytes_are_inputs_and_one_state_per_tile(name):
    """Saved are k, v, r, the small tensors and one scan state for every tile of tokens."""
    with backend(name):
        for dtype in (torch.float32, torch.bfloat16):
            B, L, C = 2, 100, 20
            a = make_arguments(B, L, C, dtype, gate=True, state=True)
            leaves = {n: t.detach().requires_grad_() for n, t in a.items()}
            inputs, tiles = sum(t.nbytes for t in a.values()), 3 * B * -(-L // current().wkv_checkpoint_tokens) * C * 4

            def everything(decay, first, k, v, r, ybar, lse):
                return wkv(decay, first, k, v, r=r, state=(ybar, lse), return_state=True)

            assert saved(lambda leaves=leaves: everything(**leaves)) == inputs + tiles
            alone = {n: leaves[n] for n in ("decay", "first", "k", "v")}
            inputs = sum(t.nbytes for t in alone.values())
            assert saved(lambda alone=alone: call_wkv(alone)) == inputs + tiles
            assert saved(lambda alone=alone: call_wkv(alone, bidirectional=True)) == inputs + 2 * tiles


# --- errors -------------------------------------------------------------------------------------------------------------------

P, X, S = torch.zeros(3), torch.zeros(2, 4, 3), (torch.zeros(2, 3), torch.zeros(2, 3))
PACKED = torch.zeros(1, 8, 3)


def packed(cu_seqlens, k=PACKED, **kwargs):
    return wkv(P, P, k, k, cu_seqlens=torch.tensor(cu_seqlens) if isinstance(cu_seqlens, list) else cu_seqlens, **kwargs)


BAD = [
    (TypeError, "k must be a tensor, got list", lambda: wkv(P, P, [1.0], X)),
    (TypeError, "k must be float32.*int64", lambda: wkv(P, P, X.long(), X)),
    (ValueError, r"k must have the axes \(B, L, C\), got shape \(4, 3\)", lambda: wkv(P, P, X[0], X[0])),
    (TypeError, "v must be a tensor", lambda: wkv(P, P, X, None)),
    (TypeError, "v must have the dtype of k, torch.float32, got torch.float64; cast it", lambda: wkv(P, P, X, X.double())),
    (ValueError, r"v must have the shape of k, \(2, 4, 3\), got \(2, 3, 3\)", lambda: wkv(P, P, X, X[:, :3])),
    (ValueError, "v must be on the device of k, cpu, got meta", lambda: wkv(P, P, X, X.to("meta"))),
    (TypeError, "r must have the dtype of k", lambda: wkv(P, P, X, X, r=X.bfloat16())),
    (ValueError, "r must have the shape of k", lambda: wkv(P, P, X, X, r=X[:1])),
    (ValueError, "either time_decay, or None and log_decay; got both", lambda: wkv(P, P, X, X, log_decay=P)),
    (ValueError, "either time_decay, or None and log_decay; got neither", lambda: wkv(None, P, X, X)),
    (TypeError, "time_decay must be a tensor, got float", lambda: wkv(1.0, P, X, X)),
    (TypeError, "log_decay must be a floating tensor at least as wide", lambda: wkv(None, P, X, X, log_decay=P.long())),
    (TypeError, "time_first must be .* wide as k .*bfloat16; cast", lambda: wkv(P, P.bfloat16(), X, X)),
    (ValueError, r"time_first must have shape \(3,\), one per channel, got \(4,\)", lambda: wkv(P, torch.zeros(4), X, X)),
    (ValueError, "time_decay must be on the device of k", lambda: wkv(P.to("meta"), P, X, X)),
    (TypeError, r"state must be None or a pair \(ybar, lse\) of tensors, got Tensor", lambda: wkv(P, P, X, X, state=P)),
    (TypeError, "state must be None or a pair .*, got 3 items", lambda: wkv(P, P, X, X, state=(P, P, P))),
    (ValueError, r"state's ybar must have shape \(2, 3\), got \(3,\)", lambda: wkv(P, P, X, X, state=(P, P))),
    (TypeError, "state's lse must be torch.float32 where k is", lambda: wkv(P, P, X, X, state=(S[0], S[1].double()))),
    (TypeError, "state's ybar must be torch.float32", lambda: wkv(P, P, X, X, state=(S[0].bfloat16(), S[1]))),
    (TypeError, "state's lse must be a tensor", lambda: wkv(P, P, X, X, state=(S[0], 0.0))),
    (ValueError, "state's lse must be on the device", lambda: wkv(P, P, X, X, state=(S[0], S[1].to("meta")))),
    (TypeError, "return_state must be a bool", lambda: wkv(P, P, X, X, return_state=1)),
    (TypeError, "bidirectional must be a bool", lambda: wkv(P, P, X, X, bidirectional=None)),
    (ValueError, "leave state out", lambda: wkv(P, P, X, X, bidirectional=True, state=S)),
    (ValueError, "leave return_state out", lambda: wkv(P, P, X, X, bidirectional=True, return_state=True)),
    (ValueError, "algorithm must be one of 'auto', 'serial', 'chunked', got 'fast'", lambda: wkv(P, P, X, X, algorithm="fast")),
    (ValueError, "max_seqlen belongs to cu_seqlens", lambda: wkv(P, P, X, X, max_seqlen=4)),
    (TypeError, "cu_seqlens must be a tensor", lambda: packed((0, 8))),
    (TypeError, "cu_seqlens must be int32 or int64, got torch.float32", lambda: packed([0.0, 8.0])),
    (ValueError, r"cu_seqlens must have shape \(N \+ 1,\)", lambda: packed(torch.zeros(0, dtype=torch.int64))),
    (ValueError, r"cu_seqlens must have shape \(N \+ 1,\)", lambda: packed([[0, 8]])),
    (ValueError, "cu_seqlens must be on the device of k", lambda: packed(torch.zeros(2, dtype=torch.int64, device="meta"))),
    (ValueError, r"k must have the shape \(1, tokens, C\) where cu_seqlens", lambda: packed([0, 4], X)),
    (ValueError, r"cu_seqlens must start at 0, not decrease, and end at the 8 tokens.*\[1, 8\]", lambda: packed([1, 8])),
    (ValueError, "cu_seqlens must start at 0", lambda: packed([0, 7])),
    (ValueError, "cu_seqlens must start at 0", lambda: packed([0, 9])),
    (ValueError, "cu_seqlens must start at 0", lambda: packed([0, 5, 3, 8])),
    (ValueError, r"got \[0, 1, 2, 3, ..., 7, 8, 7\]", lambda: packed([*range(9), 7])),
    (ValueError, "max_seqlen must be at least the longest sequence, 5 tokens, got 4", lambda: packed([0, 5, 8], max_seqlen=4)),
    (TypeError, "max_seqlen must be an int", lambda: packed([0, 8], max_seqlen=8.0)),
    (ValueError, "max_seqlen must be at least 1", lambda: packed([0, 8], max_seqlen=0)),
    (ValueError, r"state's ybar must have shape \(2, 3\), got \(1, 3\)", lambda: packed([0, 5, 8], state=(P[None], P[None]))),
    (ValueError, r"k must have the axes \(B, C\)", lambda: wkv_step(P, P, X, X)),
    (ValueError, r"state's ybar must have shape \(4, 3\)", lambda: wkv_step(P, P, X[0], X[0], S)),
    (TypeError, r"state must be a pair .* got None; begin with \(0, -inf\)", lambda: wkv_step_(P, P, X[0], X[0], None)),
    (ValueError, "state must be two tensors to update", lambda: wkv_step_(P, P, X[0], X[0], (X[0],) * 2)),
    (TypeError, "bb must be a tensor", lambda: wkv_state_from_rwkv(P, 1.0, P)),
    (TypeError, "aa must be a floating tensor", lambda: wkv_state_from_rwkv(P.long(), P, P)),
    (ValueError, "pp must have the shape, dtype and device of aa", lambda: wkv_state_from_rwkv(P, P, P[:2])),
    (ValueError, "lse must have the shape, dtype and device of ybar", lambda: wkv_state_to_rwkv(P, P.double())),
]


@pytest.mark.parametrize("kind, message, wrong", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_wrong_arguments_are_refused(kind, message, wrong, name):
    with backend(name), pytest.raises(kind, match=message):
        wrong()


# --- PyTorch's machinery ------------------------------------------------------------------------------------------------------


def random(*shape, grad=True):
    return torch.randn(shape, requires_grad=grad)


def network(w, u, x):
    k, v, r = x.chunk(3, -1)
    y, (ybar, lse) = wkv(w, u, k, v, r=r, return_state=True)
    out, _ = wkv_step(w, u, k[:, 0], v[:, 0], (ybar, lse))
    return y.sum() + out.sum() + wkv(w, u, v, k, bidirectional=True).square().sum()


def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True)
    w, u = torch.randn(5), torch.randn(5)
    for shape in ((2, 40, 15), (3, 50, 15)):
        a = [t.clone().requires_grad_() for t in (w, u, torch.randn(shape))]
        b = [t.detach().clone().requires_grad_() for t in a]
        compiled(*a).backward()
        network(*b).backward()
        for one, two in zip(a, b):
            torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("options", [dict(), dict(backend="aot_eager")], ids=str)
def test_a_compiled_decoding_loop_and_packed_sequences_equal_eager(options):
    """A decoding loop uses the in-place step with fixed memory."""
    torch.compiler.reset()

    def decode(w, u, k, v, ybar, lse):
        return wkv_step_(w, u, k, v, (ybar, lse))

    a = make_arguments(2, 4, 5)
    compiled, states = torch.compile(decode, fullgraph=True, **options), []
    for function in (decode, compiled):
        state = torch.zeros(2, 5), torch.full((2, 5), -math.inf)
        out = [function(a["decay"], a["first"], a["k"][:, t].clone(), a["v"][:, t].clone(), *state) for t in range(4)]
        states.append((*out, *state))
    assert all(torch.equal(x, y) for x, y in zip(*states))
    cu = torch.tensor([0, 3, 8])
    pack = torch.compile(lambda k, cu: wkv(P, P, k, k, cu_seqlens=cu, max_seqlen=5), fullgraph=True, **options)
    assert torch.equal(pack(PACKED + 1, cu), wkv(P, P, PACKED + 1, PACKED + 1, cu_seqlens=cu))


def test_export_takes_any_batch_and_length():
    class Net(torch.nn.Module):
        def forward(self, w, u, k):
            return wkv(w, u, k, k, return_state=True)

    a = make_arguments(3, 40, 5)
    w, u, k = a["decay"], a["first"], a["k"]
    shapes = {"w": None, "u": None, "k": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    program = torch.export.export(Net(), (w, u, k), dynamic_shapes=shapes)
    y, state = program.module()(w, u, k[:2, :17])
    want, want_state = wkv(w, u, k[:2, :17], k[:2, :17], return_state=True)
    assert torch.equal(y, want) and all(torch.equal(s, t) for s, t in zip(state, want_state))
    assert any("sdit_kernels.wkv" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", BACKENDS)
def test_vmap_and_grad_equal_a_loop(name):
    from torch.func import grad, vmap

    a = make_arguments(4, 33, 6, torch.float64)
    w, u, k = a["decay"], a["first"], a["k"]
    k = torch.stack([k, k.flip(0), k + 1])
    ws = torch.stack([w, w + 1, w - 1])
    state = k[:, :, 0].contiguous(), k[:, :, 1].contiguous()

    def each(f, *args):
        return [torch.stack(x) for x in zip(*(f(*a) for a in zip(*args)))]

    def full(k, ybar, lse):
        y, state = wkv(w, u, k, k + 1, r=k, state=(ybar, lse), return_state=True)
        return y, *state

    def alone(k):
        return (wkv(w, u, k, k),)

    def loss(w, k):
        return (wkv(w, u, k, k) * k).sum()

    def step(k, ybar, lse):
        return wkv_step_(w, u, k, k, (ybar, lse))

    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Triton warns of deprecations on Python 3.13
        for x, y in zip(vmap(full)(k, *state), each(full, k, *state)):
            assert torch.equal(x, y)
        for x, y in zip(vmap(full, (None, 0, 0))(k[0], *state), each(lambda *s: full(k[0], *s), *state)):
            assert torch.equal(x, y)
        assert torch.equal(vmap(alone, 2, 1)(k)[0], each(alone, k.unbind(2))[0].transpose(0, 1))
        assert torch.equal(vmap(lambda w: wkv(w, u, k[0], k[0]))(ws), each(lambda w: (wkv(w, u, k[0], k[0]),), ws)[0])
        packed_k, cu = k.flatten(1, 2)[:, None], torch.tensor([0, 50, 132])
        one = vmap(lambda k: wkv(w, u, k, k, cu_seqlens=cu))(packed_k)
        assert torch.equal(one, each(lambda k: (wkv(w, u, k, k, cu_seqlens=cu),), packed_k)[0])
        both = grad(loss, (0, 1))
        for x, y in zip(vmap(both, (None, 0))(w, k), each(lambda k: both(w, k), k)):
            torch.testing.assert_close(x, y)
        torch.testing.assert_close(vmap(grad(loss, 1), (None, 0))(w, k), each(lambda k: (grad(loss, 1)(w, k),), k)[0])
        twins = [[s.clone() for s in state] for _ in range(2)]
        got = vmap(step)(k[:, :, 2], *twins[0])
        want = each(lambda *a: (step(*a),), k[:, :, 2], *twins[1])[0]
        assert torch.equal(got, want) and all(torch.equal(x, y) for x, y in zip(*twins))
        with pytest.raises(RuntimeError, match="needs that tensor batched"):
            vmap(step, (0, None, None))(k[:, :, 2], state[0][0], state[1][0])


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_runs_fused(dtype):
    x, linear = random(2, 40, 8), torch.nn.Linear(8, 24)
    w, u = random(8), random(8)
    with torch.autocast("cpu", dtype=dtype), torch.profiler.profile() as profile:
        k, v, r = linear(x).chunk(3, -1)
        y, (ybar, lse) = wkv(w, u, k, v, r=r, return_state=True)
    assert (y.dtype, ybar.dtype, lse.dtype) == (dtype, torch.float32, torch.float32)
    (y.sum() + lse.sum()).backward()
    assert w.grad.dtype == x.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0
    assert "sdit_kernels::wkv" in {event.name for event in profile.events()}


def test_fake_and_meta_tensors_get_shapes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        k, p = mode.from_tensor(torch.randn(4, 40, 5, requires_grad=True)), mode.from_tensor(torch.randn(5))
        y, (ybar, lse) = wkv(p, p, k, k, return_state=True)
        assert y.shape == (4, 40, 5) and ybar.shape == lse.shape == (4, 5)
        cu = mode.from_tensor(torch.tensor([0, 7, 40]))
        assert wkv(p, p, k[:1], k[:1], cu_seqlens=cu, return_state=True)[1][0].shape == (2, 5)
    k, p = torch.empty(4, 3, 5, device="meta"), torch.empty(5, device="meta")
    assert wkv(p, p, k, k).shape == (4, 3, 5)


@pytest.mark.parametrize("keep", [True, False])
def test_the_backward_pass_works_without_a_checkpoint(keep):
    """Call the operator directly, as an exported program does. Without a checkpoint the backward pass recomputes the states."""
    a = make_arguments(2, 70, 5)
    leaves = {n: t.detach().requires_grad_() for n, t in a.items()}
    out = torch.ops.sdit_kernels.wkv(
        leaves["k"], leaves["v"], None, leaves["decay"], leaves["first"], None, None, None, 0, True, False, False, keep,
        "serial", "cpu",
    )[0]  # fmt: skip
    got = torch.autograd.grad(out.sum(), list(leaves.values()))
    want = torch.autograd.grad(call_wkv(leaves)[0].sum(), list(leaves.values()))
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_docstring_examples_run():
    import doctest

    result = doctest.testmod(sys.modules["sdit_kernels.ops.wkv"])
    assert result.attempted and not result.failed


assert reference.wkv is not sdit_kernels.wkv


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("raw", [False, True])
def test_infinite_parameters_give_the_limit(name, algorithm, raw):
    """A log_decay of -inf (time_decay of +inf) lets a token see itself and the nearest key before it.

    A time_decay of -inf means no decay. With a time_first of -inf a token does not see itself.
    """
    v = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(1, 5, 1).expand(1, 5, 3).contiguous()
    k = torch.zeros(1, 5, 3)
    k[:, 1], k[:, 3:] = -math.inf, -math.inf
    decay = torch.tensor([89.0, math.inf, 1e30] if raw else [-math.inf, -1e31, -1e20]).requires_grad_()
    u = torch.zeros(3, requires_grad=True)
    for both, want in ((False, [1.0, 1.0, 3.0, 3.0, 3.0]), (True, [1.0, 2.0, 3.0, 3.0, 3.0])):
        given = dict(bidirectional=both, algorithm=algorithm) | ({} if raw else dict(log_decay=decay))
        y = run(name, wkv, decay if raw else None, u, k, v, **given)
        torch.testing.assert_close(y[0], torch.tensor(want)[:, None].expand(5, 3))
        with backend(name):
            (d,) = torch.autograd.grad(y.square().sum(), decay)
        assert (d == 0).all()
    still = torch.full((3,), -math.inf) if raw else torch.zeros(3)
    y = run(name, wkv, still if raw else None, u, k, v, algorithm=algorithm, **({} if raw else dict(log_decay=still)))
    torch.testing.assert_close(y[0], torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0])[:, None].expand(5, 3))
    y = run(name, wkv, still if raw else None, u.detach() - math.inf, torch.zeros(1, 5, 3), v, algorithm=algorithm,
            **({} if raw else dict(log_decay=still)))  # fmt: skip
    torch.testing.assert_close(y[0], torch.tensor([0.0, 1.0, 1.5, 2.0, 2.5])[:, None].expand(5, 3))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("both", [False, True])
def test_steepest_decay_over_masked_keys(name, algorithm, both):
    """Gradients are correct where only one token of the masked tile is visible.

    Exponents of 1e20 must not leave rounding errors.
    """
    k, v, g = (torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k[:, 3:5], k[1, 15:] = -math.inf, -math.inf
    u, w = torch.randn(6, generator=torch.Generator().manual_seed(3)), torch.full((6,), -1e20)
    found = []
    for backend_name, dtype in ((name, torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (k, v)]
        with backend(backend_name):
            y = wkv(None, u.to(dtype), *leaves, log_decay=w.to(dtype), bidirectional=both, algorithm=algorithm)
            found.append([y, *torch.autograd.grad(y, leaves, g.to(dtype))])
    for got, want in zip(*found):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "slice of channels", "every other row", "one row"])
def test_a_state_may_have_any_strides(name, layout):
    B, C = 2, 5
    generator = torch.Generator().manual_seed(0)
    data = [normal(generator, *shape, dtype=torch.float32) for shape in ((C,), (C,), (B, 3, C), (B, 3, C))]

    def place(t):
        if layout == "transposed":
            return t.T.contiguous().T
        if layout == "every other row":
            return t.repeat_interleave(2, 0)[::2]
        return t[:1].expand(t.shape) if layout == "one row" else with_layout(t, layout)

    state = [place(normal(generator, B, C, dtype=torch.float32)).requires_grad_() for _ in range(2)]
    plain = [t.detach().contiguous().requires_grad_() for t in state]
    found, wanted = (run(name, wkv, *data, state=tuple(s), return_state=True) for s in (state, plain))
    for f, w in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        assert torch.equal(f, w)
    gradients = (
        torch.autograd.grad(y.square().sum() + sum(t.sum() for t in new), s)
        for (y, new), s in ((found, state), (wanted, plain))
    )
    for f, w in zip(*gradients, strict=True):
        assert torch.equal(f, w)
    tokens = [t[:, 0] for t in data[2:]]
    with torch.no_grad():
        for f, w in zip(*(run(name, wkv_step, *data[:2], *tokens, tuple(s)) for s in (state, plain)), strict=True):
            torch.testing.assert_close(f, w, rtol=0, atol=0)
        if layout != "one row":  # a step in place refuses it
            for s in (state, plain):
                s[:] = [t.detach() for t in s]
            outputs = [run(name, wkv_step_, *data[:2], *tokens, tuple(s)) for s in (state, plain)]
            assert torch.equal(*outputs) and all(map(torch.equal, state, plain))
