"""Compare spiking_wkv on every backend with the reference, and test its properties."""

import contextlib
import inspect
import math

import hypothesis.strategies as st
import native_triton
import pytest
import torch
from helpers import USERS
from hypothesis import given, settings
from torch import Tensor

import sdit_kernels
from sdit_kernels import SURROGATES, layout, lif, spiking_wkv, wkv
from sdit_kernels.tuning import current, tuned

BACKENDS = ["cpu", "triton", "chain"]
KERNELS = {
    "triton": {"spiking_wkv_forward_kernel", "spiking_wkv_backward_kernel"},
    "chain": {"wkv_forward_kernel", "wkv_backward_kernel"},
}
HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def backend(name):
    """Choose a backend. "chain" is Triton with the kernels of wkv and lif, which run where B * C is small."""
    if name in ("cpu", "reference"):
        with sdit_kernels.backend(name):
            yield
        return
    with sdit_kernels.backend("triton"), tuned(spiking_min_channels_fused=0 if name == "triton" else 1 << 60):
        yield


def run(name, function, *args, **kwargs):
    """Call a function under a backend. Under Triton, assert that its kernels were launched."""
    with backend(name), native_triton.launches() as counts:
        out = function(*args, **kwargs)
    if name in KERNELS:
        assert KERNELS[name] & set(counts), f"not the kernels of {name}, only {dict(counts)}"
    return out


class Case:
    """The arguments of a call. All tensors are leaves that require gradients."""

    def __init__(self, T=4, B=2, L=11, C=9, dtype=torch.float64, seed=0, gate=False, states=False, tau=None, raw=True, **flags):
        generator = torch.Generator().manual_seed(seed)
        state = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*shape, dtype=dtype, scale=1.0):
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        self.tensors = dict(decay=draw(C, dtype=state) if raw else -draw(C, dtype=state).abs(), first=draw(C, dtype=state))
        self.tensors |= dict(k=draw(T, B, L, C), v=draw(T, B, L, C, scale=3.0))
        if gate:
            self.tensors["r"] = draw(T, B, L, C)
        if states:
            self.tensors |= dict(ybar=draw(T, B, C, dtype=state), lse=draw(T, B, C, dtype=state))
            self.tensors["membrane"] = draw(B, L, C, dtype=state)
        if tau is not None:
            self.tensors["tau"] = torch.full((C,) if tau == "channel" else (), 1.7, dtype=state)
            self.tensors["v_threshold"] = torch.full((C,) if tau == "channel" else (), 0.8, dtype=state)
        self.raw, self.flags, self.dtype, self.seed = raw, flags, dtype, seed
        for t in self.tensors.values():
            t.requires_grad_()

    def call(self, tensors=None, **flags):
        t = dict(self.tensors if tensors is None else tensors)
        decay, first, k, v, r = t.pop("decay"), t.pop("first"), t.pop("k"), t.pop("v"), t.pop("r", None)
        state = (t.pop("ybar"), t.pop("lse")) if "ybar" in t else None
        decay = dict(time_decay=decay) if self.raw else dict(time_decay=None, log_decay=decay)
        return spiking_wkv(**decay, time_first=first, k=k, v=v, r=r, scan_state=state, **t, **{**self.flags, **flags})

    def forward(self, **flags):
        """Return (out, ybar, lse, membrane)."""
        out, ((ybar, lse), membrane) = self.call(return_state=True, **flags)
        return out, ybar, lse, membrane

    def both(self, used=(0, 1, 2, 3)):
        """Return the outputs, and the gradients through the outputs listed in ``used``."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        outputs = self.forward()
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
        loss = sum((o * w).sum() for i, (o, w) in enumerate(zip(outputs, weights)) if i in used)
        return outputs, torch.autograd.grad(loss, list(self.tensors.values()), allow_unused=True, materialize_grads=True)


def near_threshold(case):
    """True if a membrane of the reference comes within 1e-5 of the threshold."""
    t = {n: x.detach().double() for n, x in case.tensors.items()}
    state = (t["ybar"].flatten(0, 1), t["lse"].flatten(0, 1)) if "ybar" in t else None
    decay = dict(time_decay=t["decay"]) if case.raw else dict(time_decay=None, log_decay=t["decay"])
    r = t["r"].flatten(0, 1) if "r" in t else None
    flags = {n: x for n, x in case.flags.items() if n not in ("surrogate", "alpha", "rate", "detach_reset")}
    theta = t.get("v_threshold", flags.pop("v_threshold", 1.0))
    flags |= {"tau": t["tau"]} if "tau" in t else {}
    with backend("reference"), torch.no_grad():
        current = wkv(**decay, time_first=t["first"], k=t["k"].flatten(0, 1), v=t["v"].flatten(0, 1), r=r, state=state)
        current = current.unflatten(0, t["k"].shape[:2])
        v = t.get("membrane")
        # compute each step for a neuron that cannot fire: its membrane is the membrane before the reset
        for x in current:
            _, h = lif(x[None], v, v_threshold=1e30, return_v=True, **flags)
            if ((h - theta).abs() < 1e-5).any():
                return True
            _, v = lif(x[None], v, v_threshold=theta, return_v=True, **flags)
    return False


TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}


def compare(name, case, used=(0, 1, 2, 3)):
    """Assert equal spikes and close other values.

    Return False if a membrane is near the threshold, since spikes may differ then.
    """
    (outputs, gradients), (want, want_gradients) = (run(n, case.both, used) for n in (name, "reference"))
    if near_threshold(case):
        return False
    for o, w in zip(outputs, want):
        assert o.dtype == w.dtype and o.shape == w.shape
        torch.testing.assert_close(o, w, rtol=1e-5, atol=1e-5 if o.dtype != torch.float64 else 1e-11)
    assert torch.equal(outputs[0], want[0])
    scale = max(w.abs().max().item() for w in want_gradients if w.numel())
    sums = want_gradients[2].abs().sum().item()
    for key, g, w in zip(case.tensors, gradients, want_gradients):
        assert g.dtype == w.dtype and g.shape == w.shape, key
        size = max(w.abs().max().item() if w.numel() else 0.0, 1e-3 * scale)
        if key in ("decay", "first", "tau", "v_threshold"):  # sums, whose terms may cancel
            size = max(size, 0.1 * sums / max(1, w.numel()))
        tolerance = TOLERANCE[case.dtype]
        # these sums contain v - y, a difference of two rounded numbers: it is 0 where only one token is visible, except for
        # rounding
        rounding = 8 * torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps * scale
        atol = tolerance * size + rounding
        torch.testing.assert_close(g, w, rtol=tolerance, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    return True


# --- against the reference --------------------------------------------------------------------------------------------------

NEURONS = [
    dict(),
    dict(v_reset=None, gate=True, states=True, tau="channel"),
    dict(v_reset=-0.5, decay_input=False, detach_reset=True, gate=True, states=True),
    dict(v_reset=None, decay_input=False, detach_reset=True, tau="scalar", rate=True, raw=False),
    dict(rate=True, gate=True, states=True, tau="channel", v_reset=0.1),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("flags", NEURONS, ids=str)
def test_equals_the_reference_in_float64(name, flags):
    assert compare(name, Case(T=3, **flags))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("surrogate", sorted(SURROGATES))
def test_surrogates_equal_the_reference(name, surrogate):
    for alpha in (None, 0.7):
        assert compare(name, Case(T=2, L=5, C=9, surrogate=surrogate, alpha=alpha))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 5, 8, 16, 19])
def test_any_number_of_steps_equals_the_reference(name, T):
    """Triton runs up to 16 steps in one launch and more steps in several. The CPU runs any number in one kernel."""
    for rate in (False, True):
        assert compare(name, Case(T=T, B=1, L=5, C=8, gate=True, states=True, rate=rate))


# Each variant compiles its own kernels, so there are few.
VARIANTS = [
    (torch.float32, dict(gate=True, rate=True)),
    (torch.bfloat16, dict(gate=True, states=True, tau="channel")),
    (torch.float16, dict()),
    (torch.float64, dict(gate=True, states=True, tau="channel")),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype, flags", VARIANTS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_any_shape_and_dtype_equals_the_reference(name, dtype, flags, data):
    L, C = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 17, 33, 70])), data.draw(st.sampled_from([1, 3, 7, 8, 9, 16, 31, 100]))
    shape = dict(T=2, B=data.draw(st.integers(1, 3)), L=L, C=C, dtype=dtype, seed=data.draw(st.integers(0, 999)))
    used = data.draw(st.sampled_from([(0,), (0, 3), (1, 2), (0, 1, 2, 3)]))
    compare(name, Case(**shape, **flags), used)


@pytest.mark.parametrize("name", BACKENDS)
def test_spikes_equal_the_reference_on_many_random_numbers(name):
    """In float32, spikes are equal unless the membrane is close to the threshold, and the backward pass uses the same
    spikes."""
    case = Case(T=4, B=2, L=300, C=130, dtype=torch.float32, seed=3)
    (s, *_), (want, *_) = (run(n, case.forward) for n in (name, "reference"))
    assert 0 < s.mean() < 1 and (s != want).float().mean() < 1e-4


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("T", [2, 4])
def test_the_backward_pass_uses_the_same_spikes(name, T):
    """With a detached hard reset, the gradient of the membrane shows which neurons fired."""
    flags = dict(states=True, detach_reset=True, surrogate="rect", alpha=1e-20)
    case = Case(T=T, B=1, L=90, C=64, dtype=torch.float32, seed=5, **flags)
    with torch.no_grad():
        case.tensors["membrane"].zero_()
        for t in case.tensors.values():
            t.copy_((t * 64).round() / 64)
    out, _, _, membrane = run(name, case.forward)
    with backend(name):
        # the final membrane depends on the first only through resets: d is (1 - 1/tau)^T where no step fired, else 0
        (d,) = torch.autograd.grad(membrane.sum(), case.tensors["membrane"])
    silent = out.sum(0) == 0
    assert 0 < silent.float().mean() < 1
    assert torch.equal(d, torch.where(silent, 0.5**T, 0.0))


@pytest.mark.parametrize("name", BACKENDS)
def test_any_strides_give_the_same_gradients(name):
    """Slices of one fused Linear are read in place. Other strides give the same result."""
    x = torch.randn(2, 2, 7, 3 * 20, dtype=torch.float64)
    td, u = torch.randn(2, 20, dtype=torch.float64)
    for k, v, r in (
        x.chunk(3, -1),
        (x.transpose(0, 1).contiguous().transpose(0, 1) + i for i in range(3)),
        (x[..., i::3] for i in range(3)),
        (x.movedim(0, 2).contiguous().movedim(2, 0) * (1 + i) for i in range(3)),
        (x[0, 0].expand(2, 2, 7, 60) - i for i in range(3)),
    ):
        k, v, r = (t[..., :20] for t in (k, v, r))
        kk, vv, rr = (t.detach().contiguous().requires_grad_() for t in (k, v, r))
        k, v, r = (t.detach().requires_grad_() for t in (k, v, r))
        for g in (torch.ones(()).double().expand(2, 2, 7, 20), torch.randn(2, 2, 20, 7).double().transpose(2, 3)):
            with backend(name):
                got = torch.autograd.grad(spiking_wkv(td, u, k, v, r), (k, v, r), g)
                want = torch.autograd.grad(spiking_wkv(td, u, kk, vv, rr), (kk, vv, rr), g.contiguous())
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_tensors_give_empty_results(name):
    u = torch.zeros(3)
    for shape in ((0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 3), (2, 2, 5, 0)):
        T, B, L, C = shape
        k = torch.randn(shape, requires_grad=True)
        state = torch.randn(T, B, C, requires_grad=True), torch.randn(T, B, C, requires_grad=True)
        membrane = torch.randn(B, L, C, requires_grad=True)
        with backend(name):
            s, (after, m) = spiking_wkv(u[:C], u[:C], k, k, scan_state=state, membrane=membrane, return_state=True)
            assert s.shape == shape
            if T == 0:
                assert torch.equal(m, membrane)
            if L == 0:
                assert torch.equal(after[0], state[0]) and torch.equal(after[1], state[1])
            (s.sum() + after[0].sum() + 2 * after[1].sum() + 3 * m.sum()).backward()
            assert k.grad.shape == shape
            assert torch.equal(state[1].grad, torch.full((T, B, C), 2.0)) or L > 0
            assert torch.equal(membrane.grad, torch.full((B, L, C), 3.0)) or T > 0
            empty = spiking_wkv(u[:C], u[:C], k, k, return_state=True, v_reset=-0.5)[1]
            if L == 0:
                assert (empty[0][1] == -math.inf).all() and (empty[0][0] == 0).all()
            if T == 0:
                assert (empty[1] == -0.5).all()


# --- masks and extremes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_masked_keys_equal_the_reference(name):
    """A token with k = -inf is ignored and has gradient 0. Where no token is visible, the current is 0."""
    case = Case(T=2, L=13, gate=True)
    mask = torch.rand(2, 2, 13, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, :, :3] = True
    with torch.no_grad():
        case.tensors["k"].masked_fill_(mask, -math.inf)
    (out, *_), gradients = run(name, case.both)
    (want, *_), want_gradients = run("reference", case.both)
    assert torch.equal(out, want) and (out[:, :, :3] == 0).all()
    for g, w in zip(gradients, want_gradients):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    assert (gradients[2][mask] == 0).all() and (gradients[3][mask] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_an_empty_scan_state_has_no_gradient(name):
    """(0, -inf) is an empty state."""
    case = Case(T=2, states=True)
    with torch.no_grad():
        case.tensors["lse"][:, :, ::2] = -math.inf
    (out, *_), gradients = run(name, case.both)
    (want, *_), want_gradients = run("reference", case.both)
    assert torch.equal(out, want)
    for key, g, w in zip(case.tensors, gradients, want_gradients):
        if key not in ("ybar", "lse"):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
        else:
            assert (g[:, :, ::2] == 0).all()
            torch.testing.assert_close(g[:, :, 1::2], w[:, :, 1::2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BACKENDS)
def test_extreme_keys_stay_finite(name):
    for scale in (1e4, 100.0):
        case = Case(T=2, L=40, dtype=torch.float32, gate=True)
        with torch.no_grad():
            case.tensors["k"].mul_(scale)
        outputs, gradients = run(name, case.both)
        assert all(t.isfinite().all() for t in (*outputs, *gradients))
        (want, *_) = run("reference", case.forward)
        assert (outputs[0] != want).float().mean() < 0.01


@pytest.mark.parametrize("name", BACKENDS)
def test_not_a_number_reaches_the_same_outputs_as_in_the_reference(name):
    for key in ("k", "v"):
        case = Case(T=2, L=6, C=2)
        with torch.no_grad():
            case.tensors[key][0, 0, 2, 0] = math.nan
        outputs, want = run(name, case.forward), run("reference", case.forward)
        for o, w in zip(outputs, want):
            torch.testing.assert_close(o, w, rtol=1e-9, atol=1e-9, equal_nan=True)


# --- properties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_slices_of_tokens_and_of_steps_equal_one_call(name):
    """Slices of tokens pass on the scan state, slices of steps the membrane. Compare outputs and gradients."""
    for gate in (False, True):
        case = Case(T=4, L=13, gate=gate, states=True)
        t = case.tensors

        def tokens(case=case, t=t):
            out, state, membranes = [], (t["ybar"], t["lse"]), []
            for a, b in ((0, 5), (5, 6), (6, 13)):
                part = {n: x[:, :, a:b] if n in "kvr" else x for n, x in t.items()}
                part |= dict(ybar=state[0], lse=state[1], membrane=t["membrane"][:, a:b])
                s, (state, m) = case.call(part, return_state=True)
                out.append(s)
                membranes.append(m)
            return torch.cat(out, 2), *state, torch.cat(membranes, 1)

        def steps(case=case, t=t):
            out, states, membrane = [], [], t["membrane"]
            for part in (slice(0, 1), slice(1, 4)):
                chosen = {n: x[part] if n in ("k", "v", "r", "ybar", "lse") else x for n, x in t.items()}
                s, (state, membrane) = case.call(chosen | dict(membrane=membrane), return_state=True)
                out.append(s)
                states.append(state)
            return torch.cat(out), *(torch.cat(p) for p in zip(*states)), membrane

        want, want_gradients = run(name, case.both)
        for sliced in (tokens, steps):
            case.forward = sliced
            got, gradients = run(name, case.both)
            del case.forward
            assert torch.equal(got[0], want[0])
            for a, b in zip((*got, *gradients), (*want, *want_gradients)):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_is_the_mean_of_the_spikes(name, dtype):
    for T in (1, 3, 4):
        case = Case(T=T, L=20, dtype=dtype)
        s = run(name, case.call)
        assert torch.equal(run(name, case.call, rate=True), (s.sum(0, dtype=torch.float32) / T).to(dtype))


@pytest.mark.parametrize("name", BACKENDS)
def test_one_step_equals_lif_of_wkv(name):
    case = Case(T=1, L=40)
    t = case.tensors
    with backend(name):
        current = wkv(t["decay"], t["first"], t["k"][0], t["v"][0])
        assert torch.equal(case.call(), lif(current[None]))


@pytest.mark.parametrize("name", BACKENDS)
def test_batch_entries_are_independent_and_tokens_causal(name):
    case = Case(T=2, B=3, L=20)
    t = case.tensors
    s = run(name, case.call)
    order = [2, 0, 1]
    assert torch.equal(run(name, case.call, {**t, "k": t["k"][:, order], "v": t["v"][:, order]}), s[:, order])
    later = t["k"].detach().clone()
    later[:, :, 12:] += 1
    assert torch.equal(run(name, case.call, {**t, "k": later})[:, :, :12], s[:, :, :12])


@pytest.mark.parametrize("name", BACKENDS)
def test_results_repeat_bit_for_bit(name):
    case = Case(T=2, B=3, L=50, C=70, dtype=torch.float32, gate=True, states=True, tau="channel")
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found.append(run(name, case.both))
    torch.set_num_threads(before)
    for outputs, gradients in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip((*outputs, *gradients), (*found[0][0], *found[0][1])))


# --- memory -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_saved_bytes_are_inputs_and_one_state_per_tile(name):
    for dtype in (torch.float32, torch.bfloat16):
        for gate, states in ((False, False), (True, True)):
            case = Case(T=2, B=2, L=64, C=32, dtype=dtype, gate=gate, states=states)
            kept = {}

            def pack(t, kept=kept):
                kept[t.untyped_storage().data_ptr()] = t.nbytes
                return t

            with backend(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = case.call()
            tiles = 3 * 2 * 2 * 64 // layout.spiking_tile(2, name.replace("chain", "triton"), current()) * 32 * 4
            assert sum(kept.values()) == sum(t.nbytes for t in case.tensors.values()) + tiles
            del out


@pytest.mark.parametrize("shape", [(2, 2, 11, 13), (3, 1, 4, 8), (1, 2, 17, 5)])
@pytest.mark.parametrize("name", ["triton", "chain"])
def test_triton_kernels_write_all_their_outputs_and_nothing_else(name, shape):
    """Call launchers directly, so that a tool that watches memory accesses sees only kernels. test_ttsem.py runs this test."""
    from sdit_kernels.neuron import LIF, Variant
    from sdit_kernels.triton import spiking_wkv as kernels

    T, B, L, C = shape
    variant = Variant(LIF, (False, True, False), (0.5, 1.0, 0.0), "atan", 2.0)
    rows = layout.wkv_rows(T * B, L, None, layout.spiking_tile(T, "triton", current()))
    inputs = [torch.randn(shape) for _ in range(4)] + [-torch.rand(C), torch.randn(C)]
    inputs += [torch.randn(T, B, C), torch.randn(T, B, C), torch.randn(B, L, C), torch.full((C,), 2.0), torch.ones(C)]
    sizes = [shape] * 4 + [(C,)] * 2 + [(T, B, C)] * 4 + [(B, L, C)] * 2 + [(3, rows, C)]
    outputs = [torch.full(size, math.nan) for size in sizes]
    with backend(name), native_triton.guarded(*inputs, *outputs) as (g, k, v, r, w, u, ybar, lse, m, tau, theta, *outputs):
        s, dk, dv, dr, dw, du, ybar1, lse1, d_ybar, d_lse, m1, dm, keep = outputs
        kernels.spiking_wkv_forward(
            k, v, r, w, u, False, ybar, lse, m, (tau, theta), variant, False, s, ybar1, lse1, m1, keep, current()
        )  # fmt: skip
        sums = kernels.spiking_wkv_backward(
            g, ybar1, lse1, m1, k, v, r, w, u, False, ybar, lse, m, (tau, theta), keep, variant, False, True, dk, dv, dr, dw,
            du, d_ybar, d_lse, dm, current(),
        )  # fmt: skip
        if name == "chain":  # this path saves fewer states
            outputs = outputs[:-1]
        assert not any(t.isnan().any() for t in (*outputs, *sums))


def test_launchers_have_equal_signatures():
    from sdit_kernels.cpu import spiking_wkv as cpu
    from sdit_kernels.triton import spiking_wkv as triton

    for name in ("spiking_wkv_forward", "spiking_wkv_backward"):
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(triton, name))


@pytest.mark.skipif(native_triton.setup() != "native", reason="the interpreter has no compiled tiles")
def test_tiles_of_a_gpu_equal_the_reference():
    """Run one case with the tile sizes that are launched on GPUs."""
    with tuned(USERS):
        assert compare("triton", Case(T=4, L=37, C=40, gate=True))


# --- errors -----------------------------------------------------------------------------------------------------------------

K, P = torch.zeros(2, 2, 5, 3), torch.zeros(3)
STATE = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)


@pytest.mark.parametrize(
    "kind, message, call",
    [
        (TypeError, "k must be a tensor", lambda: spiking_wkv(P, P, [1.0], K)),
        (TypeError, "k must be float32.*int64", lambda: spiking_wkv(P, P, K.long(), K.long())),
        (ValueError, r"k must have the axes \(T, B, L, C\)", lambda: spiking_wkv(P, P, K[0], K[0])),
        (ValueError, "v must have the shape of k", lambda: spiking_wkv(P, P, K, K[:1])),
        (TypeError, "r must have the dtype of k", lambda: spiking_wkv(P, P, K, K, K.double())),
        (ValueError, r"time_first must have shape \(3,\)", lambda: spiking_wkv(P, P[:2], K, K)),
        (ValueError, "either time_decay, or None and log_decay", lambda: spiking_wkv(P, P, K, K, log_decay=P)),
        (ValueError, "either time_decay, or None and log_decay", lambda: spiking_wkv(None, P, K, K)),
        (TypeError, "scan_state must be None or a pair", lambda: spiking_wkv(P, P, K, K, scan_state=P)),
        (ValueError, "scan_state's lse must have shape", lambda: spiking_wkv(P, P, K, K, scan_state=(STATE[0], P))),
        (TypeError, "scan_state's ybar must be", lambda: spiking_wkv(P, P, K, K, scan_state=(STATE[0].double(), STATE[1]))),
        (ValueError, r"membrane must have shape \(2, 5, 3\)", lambda: spiking_wkv(P, P, K, K, membrane=K)),
        (TypeError, "membrane must be.*where k is", lambda: spiking_wkv(P, P, K, K, membrane=K[0].double())),
        (TypeError, "rate must be a bool", lambda: spiking_wkv(P, P, K, K, rate=1)),
        (TypeError, "return_state must be a bool", lambda: spiking_wkv(P, P, K, K, return_state=None)),
        (ValueError, "rate.*T = 0", lambda: spiking_wkv(P, P, K[:0], K[:0], rate=True)),
        (ValueError, "tau must be at least 1", lambda: spiking_wkv(P, P, K, K, tau=0.5)),
        (ValueError, "tau must be at least 1", lambda: spiking_wkv(P, P, K, K, tau=torch.tensor(0.5))),
        (ValueError, "tau must be a scalar.*of k's last axis", lambda: spiking_wkv(P, P, K, K, tau=torch.ones(2))),
        (TypeError, "v_threshold must be a floating.*as wide as k", lambda: spiking_wkv(P, P, K, K, v_threshold=P.half())),
        (ValueError, "v_reset must be finite", lambda: spiking_wkv(P, P, K, K, v_reset=math.nan)),
        (ValueError, "surrogate must be one of", lambda: spiking_wkv(P, P, K, K, surrogate="arctan")),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_wrong_arguments_are_refused(kind, message, call, name):
    with backend(name), pytest.raises(kind, match=message):
        call()


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------------


def test_compiled_equals_eager():
    torch.compiler.reset()

    def network(td, u, k, v):
        s, (_, m) = spiking_wkv(td, u, k, v * 2, return_state=True)
        return s.sum() + m.sum() + spiking_wkv(td, u, k, v, rate=True).sum()

    compiled = torch.compile(network, fullgraph=True)
    for L in (6, 7):
        t = [x.detach() for x in Case(T=2, L=L).tensors.values()]
        a, b = [[x.clone().requires_grad_() for x in t] for _ in range(2)]
        compiled(*a).backward()
        network(*b).backward()
        for x, y in zip(a, b):
            torch.testing.assert_close(x.grad, y.grad)


def test_vmap_equals_a_loop():
    from torch.func import grad, vmap

    cases = [Case(T=2, L=5, seed=i).tensors for i in range(3)]
    td, u, k, v = (torch.stack([c[n].detach() for c in cases]) for n in ("decay", "first", "k", "v"))

    def loss(td, u, k, v):
        return (spiking_wkv(td, u, k, v) * v).sum()

    got = vmap(spiking_wkv)(td, u, k, v)
    assert torch.equal(got, torch.stack([spiking_wkv(*x) for x in zip(td, u, k, v)]))
    got = vmap(grad(loss, (0, 1, 2, 3)), in_dims=(None, None, 0, 0))(td[0], u[0], k, v)
    for i in range(3):
        for a, b in zip(got, grad(loss, (0, 1, 2, 3))(td[0], u[0], k[i], v[i])):
            torch.testing.assert_close(a[i], b)


def test_a_users_surrogate_runs_on_the_reference():
    case = Case(T=2, L=5)
    with pytest.warns(UserWarning, match="plain PyTorch path"):
        import sdit_kernels.checks as module

        module._warned_of_custom_surrogate = False
        own = case.call(surrogate=lambda z: 1 / (1 + (math.pi * z) ** 2))
    (a,) = torch.autograd.grad(own.sum(), case.tensors["v"])
    (b,) = torch.autograd.grad(case.call().sum(), case.tensors["v"])
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_currents_are_not_rounded(dtype):
    """The current stays float32, so the op equals the float32 op on the same numbers."""
    case = Case(T=3, L=20, dtype=dtype)
    wide = {n: t.detach().float() for n, t in case.tensors.items()}
    for name in BACKENDS:
        assert torch.equal(run(name, case.call).float(), run(name, case.call, wide))


def test_all_gradients_are_tensors():
    case = Case(T=2, L=3, gate=True, states=True, tau="scalar")
    assert all(isinstance(g, Tensor) and g.isfinite().all() for g in case.both()[1])
