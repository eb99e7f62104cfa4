"""Compare token_shift and relu_squared on every backend with the reference and with plain PyTorch, and test their
properties."""

import math
import sys
import warnings

import hypothesis.strategies as st
import native_triton
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from sdit_kernels import backend, relu_squared, token_shift
from sdit_kernels.tuning import Tuning, tuned

BACKENDS = ["cpu", "triton"]
KERNELS = {
    "token_shift_forward_kernel",
    "token_shift_backward_kernel",
    "relu_squared_forward_kernel",
    "relu_squared_backward_kernel",
}
HALF = (torch.bfloat16, torch.float16)
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def run(name, function, *args, **kwargs):
    """Call a function under a backend. Under Triton, assert that its kernels were launched."""
    with backend(name), native_triton.launches() as counts:
        out = function(*args, **kwargs)
    if name == "triton":
        assert KERNELS & set(counts), f"no Triton kernel ran, only {dict(counts)}"
    return out


def random(*shape, dtype=torch.float32, seed=0, grad=False):
    """Random rows with a large variance, so that a norm does not amplify rounding errors: channel 0 is near 2, channel 1
    near -2."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if len(shape) and shape[-1] > 1:
        t[..., 0] += 2
        t[..., 1] -= 2
    return t.to(dtype).requires_grad_(grad)


def mixes_for(M, C, dtype, seed=1):
    return [random(C, dtype=dtype, seed=seed + m).sigmoid() for m in range(M)]


def with_layout(x, layout):
    """Return the same values with other strides."""
    if layout == "tokens first" and x.dim() == 3:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels first":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "slice of channels":
        return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]
    if layout == "every other token":
        return torch.stack([x, x + 1], -2).flatten(-3, -2)[..., ::2, :]
    return x


LAYOUTS = ["contiguous", "tokens first", "channels first", "slice of channels", "every other token"]


def assert_close(got, want, dtype, what, scale=0.0):
    """Assert that the rms error is small relative to the rms of ``want`` or to ``scale``.

    Pass as ``scale`` the sum of the absolute values of a sum's terms.
    """
    assert got.dtype == want.dtype and got.shape == want.shape, what
    if want.numel() == 0:
        return
    error, size = ((t.double().square().mean().sqrt().item()) for t in (got.double() - want.double(), want))
    assert error <= TOLERANCE[dtype] * max(size, scale, 1e-3), f"{what}: rms error {error:.2e} at scale {max(size, scale):.2e}"


def grad_of(outputs, grads, inputs):
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)


def compare(name, x, M, norm_eps=None, last=None, mix_dtype=None, unused=(), stretched_g="contiguous"):
    """Compare outputs and gradients with the reference, which runs in float64 on the same values."""
    C = x.shape[-1]
    mix_dtype = mix_dtype or (torch.float32 if x.dtype in HALF else x.dtype)
    found = []
    for which, dtype in ((name, None), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *mixes_for(M, C, mix_dtype))]
        if last is not None:
            leaves.append(last.detach().to(dtype or last.dtype).requires_grad_())
        gs = [with_layout(random(*x.shape, dtype=x.dtype, seed=50 + m), stretched_g).to(dtype or x.dtype) for m in range(M)]
        last_ = leaves[-1] if last is not None else None

        def both(leaves=leaves, last_=last_, gs=gs):
            out = token_shift(*leaves[: M + 1], norm_eps=norm_eps, last=last_)
            kept = [i for i in range(M) if i not in unused]
            return out, grad_of([out[i] for i in kept], [gs[i] for i in kept], leaves)

        found.append(run(which, both) if x.numel() else both())
    (out, grads), (want, want_grads) = found
    assert isinstance(out, tuple) and len(out) == M
    for o, w in zip(out, want):
        assert o.is_contiguous() and o.shape == x.shape
        assert_close(o, w.to(o.dtype), x.dtype, "output")
    terms = math.sqrt(max(x.numel() // max(C, 1), 1))
    wide = 10 if norm_eps is not None else 1  # the gradient of a norm subtracts close numbers
    for i, (g, w) in enumerate(zip(grads, want_grads)):
        if 1 <= i <= M:  # a mix's gradient is a sum over tokens, whose terms may cancel
            narrow = torch.promote_types(x.dtype, torch.float32) if mix_dtype not in HALF else mix_dtype
            assert_close(g, w.to(g.dtype), narrow, f"gradient of mix {i - 1}", 3 * terms)
        else:
            assert_close(g, w.to(g.dtype), x.dtype, "gradient of x" if i == 0 else "gradient of last", wide)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=30)
@given(data=st.data())
def test_token_shift_equals_reference(name, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    small = name == "triton"  # wide tiles and many mixes take seconds to compile
    C = data.draw(st.sampled_from([1, 3, 7, 8, 13] if small else [1, 2, 3, 7, 16, 31, 33, 40]))
    L = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 33, 70]))
    leading = data.draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    M = data.draw(st.sampled_from([1, 3] if small else [1, 2, 3, 3, 6]))
    norm_eps = data.draw(st.sampled_from([None, 1e-6, 1e-2])) if C > 2 else None  # a norm over two channels returns only signs
    seed = data.draw(st.integers(0, 99))
    x = with_layout(random(*leading, L, C, dtype=dtype, seed=seed), data.draw(st.sampled_from(LAYOUTS)))
    last = None
    if data.draw(st.booleans()):
        last = random(*leading, C, dtype=dtype, seed=seed + 1)
        if data.draw(st.booleans()):
            last = with_layout(last[None], "channels first")[0]
    unused = data.draw(st.sampled_from([(), (), (0,), (1, 2)])) if M > 2 else ()
    mix_dtype = dtype if dtype not in HALF or data.draw(st.booleans()) else None
    compare(name, x, M, norm_eps, last, mix_dtype, unused, data.draw(st.sampled_from(LAYOUTS)))


@pytest.mark.parametrize("name, shape", [
    ("cpu", (8, 394, 384)), ("cpu", (1, 2000, 129)), ("triton", (2, 394, 70)), ("triton", (300, 2, 5)), ("triton", (1, 2000, 8))
])  # fmt: skip
def test_token_shift_equals_the_reference_on_large_tensors(name, shape):
    for dtype in (torch.float32, torch.bfloat16):
        compare(name, random(*shape, dtype=dtype), 3, 1e-6, random(shape[0], shape[2], dtype=dtype, seed=9))


@pytest.mark.parametrize("name", BACKENDS)
def test_token_shift_takes_six_mixes(name):
    compare(name, random(2, 9, 5), 6, 1e-6, unused=(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_token_shift_takes_more_channels_than_a_tile(dtype, norm_eps):
    """On Triton, a separate kernel then computes the sums of the norm."""
    pytest.importorskip("triton")
    for C, last in ((33, True), (70, False)):
        x = random(3, 13, C, dtype=dtype)
        with native_triton.launches() as counts, tuned(shift_channels=16):
            compare("triton", x, 2, norm_eps, random(3, C, dtype=dtype, seed=4) if last else None)
        assert counts["token_shift_stats_kernel"] == (0 if norm_eps is None else 2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_dtype_gives_the_same_as_a_cast_of_the_result(name, dtype, norm_eps):
    """The gradients are the same too, as under autocast, but without its extra passes over memory.

    On the CPU the results are equal bit for bit. On Triton a narrower dtype has wider tiles, which add in another order.
    """
    M, C = (2, 13) if name == "triton" else (3, 41)
    leaves = [random(3, 18, C, grad=True), *(m.requires_grad_() for m in mixes_for(M, C, torch.float32))]
    leaves.append(random(3, C, seed=4, grad=True))
    found = []
    for narrow in (dtype, None):
        out = run(name, token_shift, *leaves[:-1], norm_eps=norm_eps, last=leaves[-1], dtype=narrow)
        out = [o.to(dtype) for o in out] if narrow is None else out
        gs = [random(3, 18, C, dtype=dtype, seed=5 + m) for m in range(M)]
        with backend(name):
            found.append([*out, *torch.autograd.grad(out, leaves, gs)])
    for i, (got, want) in enumerate(zip(*found)):
        if name == "cpu":
            assert got.dtype == want.dtype and torch.equal(got, want)
        else:
            assert_close(got, want, got.dtype, i)


@pytest.mark.parametrize("name", BACKENDS)
def test_token_shift_is_layer_norm_pad_and_lerp(name):
    """token_shift is LayerNorm, ZeroPad2d((0, 0, 1, -1)) and lerp, as RWKV-LM writes it."""
    x = random(2, 9, 33, dtype=torch.float64)
    mixes = mixes_for(3, 33, torch.float64)
    normal = F.layer_norm(x, (33,), eps=1e-6)
    shifted = F.pad(normal, (0, 0, 1, -1))
    for out, m in zip(run(name, token_shift, x, *mixes, norm_eps=1e-6), mixes):
        torch.testing.assert_close(out, normal * m + shifted * (1 - m), rtol=0, atol=1e-13)
        assert torch.equal(out, run(name, token_shift, x, m.reshape(1, 1, -1), norm_eps=1e-6)[0])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_slices_equal_one_call(name, norm_eps):
    """Outputs are equal bit for bit. The gradient of x also flows through ``last``."""
    x, mixes = random(2, 41, 24, grad=True), mixes_for(2, 24, torch.float32)
    gs = [random(2, 41, 24, seed=5 + m) for m in range(2)]

    def sliced():
        last, parts = None, []
        for part in x.split([1, 7, 0, 8, 25], 1):
            parts.append(token_shift(part, *mixes, norm_eps=norm_eps, last=last))
            last = part[:, -1] if part.shape[1] else last
        return [torch.cat(p, 1) for p in zip(*parts)]

    whole, parts = run(name, token_shift, x, *mixes, norm_eps=norm_eps), run(name, sliced)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    with backend(name):
        torch.testing.assert_close(*(torch.autograd.grad(o, x, gs)[0] for o in (whole, parts)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_token_shift_obeys_its_laws(name):
    """A mix of 1 returns the token and a mix of 0 the token before. Sequences do not affect each other, and the op is causal. A
    zero ``last`` is the same as no ``last``.
    """
    x = random(3, 10, 12)
    one, zero = torch.ones(12), torch.zeros(12)
    with backend(name):
        now, before = token_shift(x, one, zero)
        assert torch.equal(now, x) and torch.equal(before, F.pad(x, (0, 0, 1, -1)))
        mixes = mixes_for(2, 12, torch.float32)
        out = token_shift(x, *mixes, norm_eps=1e-6)
        for o, p, q in zip(
            out, token_shift(x.flip(0), *mixes, norm_eps=1e-6), token_shift(x, *mixes, norm_eps=1e-6, last=x[:, 0] * 0)
        ):
            assert torch.equal(o, p.flip(0)) and torch.equal(o, q)
        changed = x.clone()
        changed[:, 6] += 1
        different = (torch.stack(token_shift(changed, *mixes)) != torch.stack(token_shift(x, *mixes))).any(-1)
        assert different[:, :, 6:8].all() and not different[:, :, :6].any() and not different[:, :, 8:].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_mix_gradients_repeat_bit_for_bit(name):
    x, mixes = random(4, 100, 20), [m.requires_grad_() for m in mixes_for(3, 20, torch.float32)]
    g = random(4, 100, 20, seed=3)
    found, threads = [], torch.get_num_threads()
    for n in (threads, 1, threads):
        torch.set_num_threads(n)
        with backend(name):
            out = token_shift(x, *mixes, norm_eps=1e-6)
            found.append(torch.stack(torch.autograd.grad(out, mixes, [g] * 3)))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_equal_finite_differences(name):
    x, last = random(2, 5, 7, dtype=torch.float64, grad=True), random(2, 7, dtype=torch.float64, seed=1, grad=True)
    mixes = [m.requires_grad_() for m in mixes_for(2, 7, torch.float64)]
    with backend(name):
        for norm_eps in (None, 1e-3):
            assert torch.autograd.gradcheck(
                lambda x, last, *mixes, norm_eps=norm_eps: token_shift(x, *mixes, norm_eps=norm_eps, last=last),
                (x, last, *mixes),
            )
        assert torch.autograd.gradcheck(relu_squared, x)


@pytest.mark.parametrize("name", BACKENDS)
def test_rounding_errors_are_small(name):
    """float32 is within 2e-6 of float64, or 2e-4 with x offset by 100, because the norm subtracts the offset. bfloat16 is
    within 1.1 times the rounding of the exact output."""
    for offset in (0.0, 100.0):
        x = random(2, 60, 48, dtype=torch.float64) + offset
        mixes = mixes_for(3, 48, torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            rounded = x.to(dtype)
            exact = run("reference", token_shift, rounded.double(), *mixes, norm_eps=1e-6)
            got = run(name, token_shift, rounded, *(m.float() for m in mixes), norm_eps=1e-6)
            for e, o in zip(exact, got):
                error = (o.double() - e).square().mean().sqrt()
                if dtype == torch.float32:
                    assert error <= 2e-6 * e.square().mean().sqrt() * max(offset, 1)
                else:
                    assert error <= 1.1 * (e.to(dtype).double() - e).square().mean().sqrt()


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_tensors_give_empty_results(name):
    mix = torch.ones(5, requires_grad=True)
    with backend(name):
        for shape in ((2, 0, 5), (0, 4, 5), (0, 5)):
            x = torch.empty(shape, requires_grad=True)
            last = torch.ones((*shape[:-2], 5), requires_grad=True)
            (out,) = token_shift(x, mix, norm_eps=1e-6, last=last)
            assert out.shape == shape
            grads = torch.autograd.grad(out, (x, last, mix), torch.empty(shape))
            assert [g.shape for g in grads] == [x.shape, last.shape, mix.shape]
            assert not any(g.any() for g in grads)
        assert token_shift(torch.empty(2, 3, 0), torch.empty(0), norm_eps=1e-6)[0].shape == (2, 3, 0)
        x = torch.empty(0, 3, requires_grad=True)
        relu_squared(x).sum().backward()
        assert x.grad.shape == (0, 3)


@pytest.mark.parametrize("name", BACKENDS)
def test_not_a_number_and_infinity_equal_the_reference(name):
    x = random(1, 6, 5)
    x[0, 1, 2], x[0, 3, 0], x[0, 3, 4] = math.nan, math.inf, -math.inf
    for norm_eps in (None, 1e-6):
        (got,), (want,) = (run(n, token_shift, x, torch.full((5,), 0.5), norm_eps=norm_eps) for n in (name, "reference"))
        torch.testing.assert_close(got, want, equal_nan=True)
    y = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1.0], requires_grad=True)
    g = torch.tensor([1.0, 1.0, math.inf, math.inf, math.nan, 1.0, math.nan])
    out, want = run(name, relu_squared, y), run("reference", relu_squared, y)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    with backend(name):
        got, want = (torch.autograd.grad(o, y, g)[0] for o in (out, want))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40)
@given(data=st.data())
def test_relu_squared_equals_reference(name, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 7, 31, 32, 33, 65]), max_size=3)))
    x = random(*shape, dtype=dtype, seed=data.draw(st.integers(0, 99)))
    if len(shape) > 1:
        x = with_layout(x, data.draw(st.sampled_from(LAYOUTS)))
    a, b = (x.detach().requires_grad_() for _ in range(2))
    g = random(*shape, dtype=dtype, seed=7)
    g = g.sum().expand(shape) if data.draw(st.booleans()) else g
    with backend("reference"):
        want = relu_squared(b)
        want.backward(g)
    out = run(name, relu_squared, a)
    with backend(name):
        out.backward(g)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    torch.testing.assert_close(a.grad, b.grad)  # in 16 bits the reference rounds more often


@pytest.mark.parametrize("name", BACKENDS)
def test_only_inputs_are_saved_for_the_backward_pass(name):
    x, mixes = random(2, 9, 16, grad=True), [m.requires_grad_() for m in mixes_for(3, 16, torch.float32)]
    saved = []

    def keep(t):
        saved.append(t)
        return t

    with backend(name), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        token_shift(x, *mixes, norm_eps=1e-6)
        relu_squared(x)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) == 3 * 16  # only the mixes, in one stacked tensor


@pytest.mark.parametrize("norm_eps, whole", [(None, 4096), (1e-6, 4096), (1e-6, 8)], ids=["plain", "norm", "sums first"])
def test_triton_kernels_write_all_their_outputs_and_nothing_else(norm_eps, whole):
    """Call launchers directly, so that a tool that watches memory accesses sees only kernels. test_ttsem.py runs this test."""
    kernels = pytest.importorskip("sdit_kernels.triton.mix")
    # several programs, also in this case, and several tiles per program
    tuning = Tuning(elementwise_threads=8, shift_channels=whole, sum_programs=4)
    B, L, C, M = 2, 21, 13, 2
    inputs = [random(B, L, C), random(B, C, seed=1), torch.stack(mixes_for(M, C, torch.float32))]
    inputs += [random(B, L, C, seed=2 + m) for m in range(M)]
    outputs = [torch.full(size, math.nan) for size in [(B, L, C)] * (M + 3) + [(B, C)]]
    with native_triton.guarded(*inputs, *outputs) as (x, last, mixes, *t):
        gs, outs, (dx, squares, dsquares, dlast) = t[:M], t[M : 2 * M], t[2 * M :]
        kernels.token_shift_forward(x, last, mixes, norm_eps, outs, tuning)
        sums = kernels.token_shift_backward(gs, x, last, mixes, norm_eps, dx, dlast, True, tuning)
        kernels.relu_squared_forward(x, squares, tuning)
        kernels.relu_squared_backward(gs[0], x, dsquares, tuning)
        assert not any(o.isnan().any() for o in (*outs, dx, dlast, sums, squares, dsquares))


# --- errors -----------------------------------------------------------------------------------------------------------------

X, MIX = torch.ones(2, 4, 3), torch.ones(3)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    "kind, message, call",
    [
        (TypeError, "x must be a tensor, got list", lambda: token_shift([1.0], MIX)),
        (TypeError, "x must be float32.*int64", lambda: token_shift(X.long(), MIX)),
        (ValueError, r"x must have axes for tokens and channels, \(..., L, C\), got \(3,\)", lambda: token_shift(MIX, MIX)),
        (ValueError, "token_shift takes 1 to 6 mixes, got 0", lambda: token_shift(X)),
        (ValueError, "token_shift takes 1 to 6 mixes, got 7", lambda: token_shift(X, *[MIX] * 7)),
        (TypeError, r"mixes\[1\] must be a tensor, got float", lambda: token_shift(X, MIX, 0.5)),
        (ValueError, r"mixes\[0\] must have shape \(3,\) or \(1, 1, 3\).*got \(2,\)", lambda: token_shift(X, torch.ones(2))),
        (ValueError, r"mixes\[0\] must have shape \(3,\)", lambda: token_shift(X, torch.ones(3, 1))),
        (ValueError, r"mixes\[0\] must have shape \(3,\)", lambda: token_shift(X, torch.tensor(1.0))),
        (TypeError, r"mixes\[0\] must be .*at least as wide as x.*float32", lambda: token_shift(X.double(), MIX)),
        (TypeError, r"mixes\[0\] must be .*int64", lambda: token_shift(X, MIX.long())),
        (TypeError, r"mixes\[0\] must be .*at least as wide.*float16", lambda: token_shift(X.bfloat16(), MIX.half())),
        (ValueError, r"mixes\[0\] must be on the device of x", lambda: token_shift(X, MIX.to("meta"))),
        (TypeError, "norm_eps must be a number or None.*got str", lambda: token_shift(X, MIX, norm_eps="1e-6")),
        (ValueError, "norm_eps must be positive and finite.*got 0", lambda: token_shift(X, MIX, norm_eps=0)),
        (ValueError, "norm_eps must be positive and finite.*got nan", lambda: token_shift(X, MIX, norm_eps=math.nan)),
        (ValueError, r"norm_eps must be .*1.2e-38 at least.*got 1e-50", lambda: token_shift(X, MIX, norm_eps=1e-50)),
        (TypeError, "last must be a tensor or None, got int", lambda: token_shift(X, MIX, last=0)),
        (
            ValueError,
            r"last must have the shape of one token of x, \(2, 3\), got \(3,\)",
            lambda: token_shift(X, MIX, last=MIX),
        ),
        (TypeError, "last must have the dtype of x, torch.float32, got", lambda: token_shift(X, MIX, last=X[:, 0].double())),
        (ValueError, "last must be on the device of x", lambda: token_shift(X, MIX, last=X[:, 0].to("meta"))),
        (
            TypeError,
            "dtype must be None or the dtype of x, .*float32, bfloat16 or float16, got torch.float64",
            lambda: token_shift(X, MIX, dtype=torch.float64),
        ),
        (
            TypeError,
            "dtype must be None or the dtype of x, torch.float16, got torch.bfloat16",
            lambda: token_shift(X.half(), MIX, dtype=torch.bfloat16),
        ),
        (TypeError, "dtype must be .*got 'bfloat16'", lambda: token_shift(X, MIX, dtype="bfloat16")),
        (TypeError, "x must be a tensor, got float", lambda: relu_squared(1.0)),
        (TypeError, "x must be float32.*bool", lambda: relu_squared(X > 0)),
    ],
)
def test_wrong_arguments_are_refused(kind, message, call, name):
    with backend(name), pytest.raises(kind, match=message):
        call()


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------------


def network(x, *mixes):
    k, r = token_shift(x * 2, *mixes, norm_eps=1e-6)
    return (torch.sigmoid(r) * relu_squared(k)).sum()


def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True)
    for shape in ((4, 6, 5), (4, 7, 5)):
        inputs = [[t.clone().requires_grad_() for t in (random(*shape), *mixes_for(2, 5, torch.float32))] for _ in range(2)]
        for f, leaves in zip((compiled, network), inputs):
            f(*leaves).backward()
        for a, b in zip(*inputs):
            torch.testing.assert_close(a.grad, b.grad)


def test_export_takes_any_batch():
    class Net(torch.nn.Module):
        def forward(self, x, m):
            return token_shift(x, m, norm_eps=1e-6)[0], relu_squared(x)

    x, m = random(4, 6, 5), torch.ones(5)
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}, "m": None}
    program = torch.export.export(Net(), (x, m), dynamic_shapes=shapes)
    y = random(3, 9, 5, seed=1)
    for got, want in zip(program.module()(y, m), Net()(y, m)):
        assert torch.equal(got, want)
    assert any("sdit_kernels.token_shift" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", BACKENDS)
def test_vmap_and_grad_equal_a_loop(name):
    from torch.func import grad, vmap

    x, last, m = random(5, 2, 6, 7), random(5, 2, 7, seed=1), torch.stack(mixes_for(5, 7, torch.float32))

    def shift(x, m, last=None):
        return token_shift(x, m, 1 - m, norm_eps=1e-6, last=last)

    def each(f, *args):
        found = [f(*a) for a in zip(*args)]
        return torch.stack(found) if isinstance(found[0], torch.Tensor) else tuple(map(torch.stack, zip(*found)))

    def loss(x, m):
        return sum((o * x).sum() for o in shift(x, m))

    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Triton warns of deprecations on Python 3.13
        assert torch.equal(torch.stack(vmap(shift)(x, m)), torch.stack(each(shift, x, m)))
        batched, single = vmap(lambda x, t: shift(x, m[0], t)), each(lambda x, t: shift(x, m[0], t), x, last)
        assert torch.equal(torch.stack(batched(x, last)), torch.stack(single))
        assert torch.equal(
            torch.stack(vmap(lambda x: shift(x, m[0]), in_dims=2)(x.movedim(0, 2))),
            torch.stack(each(lambda x: shift(x, m[0]), x)),
        )
        torch.testing.assert_close(vmap(grad(loss), in_dims=(0, None))(x, m[0]), each(lambda x: grad(loss)(x, m[0]), x))
        per_sample = vmap(grad(loss, 1), in_dims=(0, None))(x, m[0])
        torch.testing.assert_close(per_sample, each(lambda x: grad(loss, 1)(x, m[0]), x))
        assert torch.equal(vmap(relu_squared, in_dims=1, out_dims=1)(x), relu_squared(x))
        torch.testing.assert_close(vmap(grad(lambda x: relu_squared(x).sum()))(x), 2 * x.clamp(min=0))


def test_docstring_examples_run():
    import doctest

    result = doctest.testmod(sys.modules["sdit_kernels.ops.mix"])
    assert result.attempted and not result.failed


def test_vmap_gives_each_sample_its_gradient_of_the_mixes():
    """The samples of a batch share the mixes, and each sample still gets its own gradient of them."""
    m, x = torch.rand(3, 5), torch.randn(4, 2, 6, 5)

    def loss(m, x):
        return sum(y.sin().sum() for y in token_shift(x, *m, norm_eps=1e-5))

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(m, x)
    wanted = torch.stack([torch.func.grad(loss)(m, one) for one in x])
    torch.testing.assert_close(found, wanted)
    jacobian = torch.func.jacrev(lambda m: token_shift(x[0], *m)[0])(m)
    expected = torch.autograd.functional.jacobian(lambda m: token_shift(x[0], *m)[0], m)
    torch.testing.assert_close(jacobian, expected)
