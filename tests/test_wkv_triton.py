"""Compare the Triton launchers of WKV with the reference in float64: values, all gradients, memory and accuracy."""

import math
from pathlib import Path

import hypothesis.strategies as st
import native_triton
import pytest
import torch
from helpers import USERS
from hypothesis import given, settings

pytest.importorskip("triton", reason="triton is not installed")

from sdit_kernels import layout
from sdit_kernels.reference.wkv import wkv as definition
from sdit_kernels.triton import wkv as kernels
from sdit_kernels.tuning import current, tuned

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"wkv_forward_kernel", "wkv_backward_kernel", "wkv_combine_kernel"}
DATA = ("k", "v", "r", "g", "g_ybar", "g_lse", "ybar", "lse")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SERIAL, CHUNKED = "serial", "chunked"


@pytest.fixture(autouse=True)
def short_chunks():
    """Use few tiles per chunk, so that small tensors have several chunks."""
    with tuned(wkv_busy_threads=96):
        yield


def state_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(B, L, C, dtype=torch.float32, gate=False, state=False, final=True, cut=None, seed=0, scale=2.0, masked=0.0):
    """Return the named tensors of one call. ``cut``: ends of packed sequences. ``final``: the final state has a gradient."""
    random = torch.Generator().manual_seed(seed)
    wide = state_type(dtype)

    def normal(*shape, to):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(to)

    N = B if cut is None else len(cut) - 1
    x = {name: normal(B, L, C, to=dtype) for name in ("k", "v", "r", "g")}
    x["k"] = x["k"] * scale
    x["k"][torch.rand(B, L, C, generator=random) < masked] = -math.inf
    x |= {name: normal(N, C, to=wide) for name in ("ybar", "lse", "g_ybar", "g_lse", "w", "u")}
    x["w"], x["u"] = normal(C, to=wide), normal(C, to=wide)
    x["lse"][0] = -math.inf
    for name, wanted in (("r", gate), ("ybar", state), ("lse", state), ("g_ybar", final), ("g_lse", final)):
        x[name] = x[name] if wanted else None
    x["cu"] = None if cut is None else torch.tensor(cut)
    return x


def forward(x, algorithm, bidirectional=False, max_seqlen=0, keep=True, out=None):
    """Launch the forward pass and return (out, ybar, lse, checkpoint). Outputs start as NaN. ``out`` may be given."""
    B, L, C = x["k"].shape
    packed = None if x["cu"] is None else x["cu"].numel() - 1
    wide, device = x["w"].dtype, x["k"].device
    state = torch.full((2, packed or B, C), math.nan, dtype=wide, device=device)
    shape = (2 if bidirectional else 1, 3, layout.wkv_rows(B, L, packed, current().wkv_checkpoint_tokens), C)
    checkpoint = torch.full(shape, math.nan, dtype=wide, device=device) if keep else None
    out = torch.empty((B, L, C), dtype=x["k"].dtype, device=device) if out is None else out
    out.fill_(math.nan)
    with native_triton.launches() as counts:
        kernels.wkv_forward(
            x["k"], x["v"], x["r"], x["w"], x["u"], False, x["ybar"], x["lse"], x["cu"], max_seqlen, bidirectional, algorithm,
            out, *state, checkpoint, current(),
        )  # fmt: skip
    assert KERNELS & set(counts), f"no Triton kernel ran, only {dict(counts)}"
    return out, *state, checkpoint


def backward(x, checkpoint, algorithm, bidirectional=False, max_seqlen=0, into=()):
    """Launch the backward pass and return {name: gradient}. ``into`` holds given outputs by name."""
    names = "k", "v", "r", "w", "u", "ybar", "lse"
    nan = {n: None if x[n] is None else torch.full_like(x[n], math.nan) for n in names}
    nan |= {n: t.fill_(math.nan) for n, t in dict(into).items()}
    kernels.wkv_backward(
        x["g"], x["g_ybar"], x["g_lse"], x["k"], x["v"], x["r"], x["w"], x["u"], False, x["ybar"], x["lse"], checkpoint,
        x["cu"], max_seqlen, bidirectional, algorithm, *nan.values(), current(),
    )  # fmt: skip
    return {n: t for n, t in nan.items() if t is not None}


def expected(x, bidirectional=False):
    """Return ((out, ybar, lse), {name: gradient}) of the reference in float64."""
    t = {n: None if t is None or n == "cu" else t.double().requires_grad_() for n, t in x.items()}
    out, state = definition(
        None, t["u"], t["k"], t["v"], r=t["r"], state=None if t["ybar"] is None else (t["ybar"], t["lse"]),
        return_state=True, bidirectional=bidirectional, log_decay=t["w"], cu_seqlens=x["cu"],
    )  # fmt: skip
    loss = 0.0
    for o, g in zip((out, *state), (t["g"], t["g_ybar"], t["g_lse"])):
        if g is not None:
            seen = o > -math.inf  # an empty state has lse = log 0, which has no gradient
            loss = loss + (torch.where(seen, o, 0.0) * g.detach()).sum()
    names = [n for n in ("k", "v", "r", "ybar", "lse", "w", "u") if t[n] is not None]
    found = torch.autograd.grad(loss, [t[n] for n in names], allow_unused=True, materialize_grads=True)
    return (out.detach(), *(s.detach() for s in state)), dict(zip(names, found))


def assert_close(got, want, tolerance, what, scale=0.0):
    """Assert that values are close relative to the largest element. NaN is accepted only where the reference has NaN."""
    finite = want[want.abs() < math.inf]
    scale = max(scale, finite.abs().max().item() if finite.numel() else 0.0, 1e-3)
    torch.testing.assert_close(
        got.double(), want, rtol=tolerance, atol=tolerance * scale, check_dtype=False, msg=lambda m: f"{what}: {m}"
    )


def compare(x, algorithm, bidirectional=False, max_seqlen=0):
    tolerance = TOLERANCE[x["k"].dtype]
    *outputs, checkpoint = forward(x, algorithm, bidirectional, max_seqlen)
    found = backward(x, checkpoint, algorithm, bidirectional, max_seqlen)
    wanted_outputs, wanted = expected(x, bidirectional)
    states = TOLERANCE[x["w"].dtype]
    for got, want, name, bound in zip(outputs, wanted_outputs, ("out", "ybar", "lse"), (tolerance, states, states)):
        assert_close(got, want, bound, name)
    product = wanted["v"].abs().max().item() * max(1.0, x["v"].abs().max().item())
    for name, want in wanted.items():
        sums = name in ("w", "u")  # sums over tokens, whose terms may cancel
        scale = product * math.sqrt(x["k"].shape[0] * x["k"].shape[1]) if sums else product
        assert_close(found[name], want, tolerance if found[name].dtype == x["k"].dtype else states, f"d {name}", scale)


# Each variant compiles its own kernels, and so does a size of 1. So there are few variants, and sizes of 1 have a test.
LENGTHS, CHANNELS = [2, 3, 4, 5, 8, 9, 31, 40], [7, 8, 9, 17]
VARIANTS = [  # dtype, gate, state, gradient of the final state, bidirectional, algorithm
    (torch.float32, False, False, False, False, SERIAL),
    (torch.float32, True, True, True, False, CHUNKED),
    (torch.float32, True, False, False, True, CHUNKED),
    (torch.bfloat16, False, True, False, False, "auto"),
    (torch.float16, True, False, True, False, SERIAL),
    (torch.float64, False, False, False, True, SERIAL),
]


@pytest.mark.parametrize("dtype, gate, state, final, bidirectional, algorithm", VARIANTS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_values_and_gradients_equal_the_reference(dtype, gate, state, final, bidirectional, algorithm, data):
    x = inputs(
        data.draw(st.integers(2, 3)), data.draw(st.sampled_from(LENGTHS)), data.draw(st.sampled_from(CHANNELS)), dtype,
        gate=gate, state=state, final=final, seed=data.draw(st.integers(0, 99)),
        masked=data.draw(st.sampled_from([0.0, 0.0, 0.5, 0.95])),
    )  # fmt: skip
    compare(x, algorithm, bidirectional)


@pytest.mark.parametrize("B, L, C", [(1, 1, 1), (2, 1, 9), (1, 9, 7), (2, 5, 1)])
@pytest.mark.parametrize("algorithm, bidirectional", [(SERIAL, False), (CHUNKED, True)])
def test_sizes_of_one_equal_the_reference(B, L, C, algorithm, bidirectional):
    compare(inputs(B, L, C, gate=True, final=not bidirectional), algorithm, bidirectional)


@pytest.mark.parametrize(
    "gate, state, bidirectional, index, known, algorithm",
    [
        (True, True, False, torch.int64, False, SERIAL),
        (False, True, False, torch.int32, True, CHUNKED),
        (True, False, True, torch.int64, True, CHUNKED),
        (False, False, True, torch.int32, False, SERIAL),
    ],
    ids=str,
)
@settings(max_examples=8)
@given(data=st.data())
def test_packed_sequences_equal_the_reference(gate, state, bidirectional, index, known, algorithm, data):
    """``known``: the launcher is given the length of the longest sequence."""
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 3, 4, 5, 8, 21]), min_size=1, max_size=6))
    lengths[0] = lengths[0] or 2
    cut = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    x = inputs(1, cut[-1], 9, gate=gate, state=state, final=state, cut=cut)
    x["cu"] = x["cu"].to(index)
    compare(x, algorithm, bidirectional, max(lengths) if known else 0)


@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
@pytest.mark.parametrize("gate, state, bidirectional", [(True, True, False), (False, False, True)])
def test_small_sequences_equal_the_reference(algorithm, gate, state, bidirectional):
    """Every kernel runs. The sizes are small enough for Triton's interpreter."""
    compare(inputs(1, 40, 3, gate=gate, state=state, final=state), algorithm, bidirectional)


@pytest.mark.parametrize("algorithm, bidirectional", [(SERIAL, False), (CHUNKED, False), (CHUNKED, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_equal_the_reference(algorithm, dtype, bidirectional):
    one = not bidirectional
    compare(inputs(2, 21, 5, dtype, gate=True, state=one, final=one), algorithm, bidirectional)


@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
def test_a_single_upstream_gradient_is_enough(algorithm):
    for given_ in ("g", "g_ybar", "g_lse"):
        x = inputs(2, 21, 5, state=True)
        for name in {"g", "g_ybar", "g_lse"} - {given_}:
            x[name] = None
        compare(x, algorithm)


@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
def test_any_strides_equal_the_reference(algorithm):
    """Slices of one fused Linear, tokens first, every other channel, and expanded gradients."""
    x = inputs(2, 21, 5, gate=True)
    want, wanted = expected(x)
    fused = torch.cat([x["k"], x["v"], x["r"]], -1)
    slices = dict(zip("kvr", fused.split(5, -1)))
    swapped = {n: x[n].transpose(0, 1).contiguous().transpose(0, 1) for n in "kvr"}
    sparse = {n: torch.stack([x[n], x[n]], -1)[..., 0] for n in "kvr"}
    for other in (slices, swapped, sparse):
        *outputs, checkpoint = forward(x | other, algorithm)
        assert_close(outputs[0], want[0], 1e-5, "out")
        for name, t in backward(x | other, checkpoint, algorithm).items():
            assert_close(t, wanted[name], 1e-5, name, 10.0)
    for g in (torch.ones(()).expand(2, 21, 5), torch.randn(2, 1, 5).expand(2, 21, 5)):
        compare(x | {"g": g}, algorithm)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_extreme_and_masked_keys_have_finite_results(bidirectional):
    """Keys of +-1e4 give finite results.

    Masked tokens have gradient 0. Where no token is visible, outputs and gradients are 0.
    """
    for algorithm in (SERIAL, CHUNKED):
        x = inputs(2, 21, 6, final=False, scale=1.0)
        sign = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(1)).sign()
        *outputs, checkpoint = forward(x | {"k": 1e4 * sign}, algorithm, bidirectional)
        found = backward(x | {"k": 1e4 * sign}, checkpoint, algorithm, bidirectional)
        assert all(t.isfinite().all() for t in (*outputs, *found.values()))
        nothing = torch.full_like(x["k"], -math.inf)
        nothing[:, :, 3:] = x["k"][:, :, 3:]
        nothing[0, 7:, 3:] = -math.inf
        compare(x | {"k": nothing}, algorithm, bidirectional)
        out, ybar, lse, checkpoint = forward(x | {"k": nothing}, algorithm, bidirectional)
        assert not out[:, :, :3].any() and not ybar[:, :3].any() and (lse[:, :3] == -math.inf).all()
        found = backward(x | {"k": nothing}, checkpoint, algorithm, bidirectional)
        assert not found["k"][nothing == -math.inf].any() and not found["v"][nothing == -math.inf].any()


@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cut", [None, [0, 21, 21, 42]])
def test_not_a_number_changes_only_its_own_channel(algorithm, bidirectional, cut):
    """A NaN reaches the later tokens of its channel and sequence (bidirectional: all tokens), as in the reference.

    All other outputs and gradients stay equal bit for bit.
    """

    def others(t):
        t = t.clone()
        (t if t.dim() == 1 else t[-1] if t.dim() == 2 else t.view(2, 21, 6)[1])[..., 2] = 0.0
        return t

    x = inputs(1 if cut else 2, 42 if cut else 21, 6, gate=True, state=not bidirectional, final=not bidirectional, cut=cut)
    clean = forward(x, algorithm, bidirectional)
    gradients = backward(x, clean[3], algorithm, bidirectional)
    for name in ("k", "v"):
        y = x | {name: x[name].clone()}
        y[name].view(2, 21, 6)[1, 9, 2] = math.nan
        found, (wanted, _) = forward(y, algorithm, bidirectional), expected(y, bidirectional)
        for got, want, before in zip(found, wanted, clean):
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(others(got), others(before))
        spoilt = found[0].view(2, 21, 6)[1, :, 2].isnan()
        assert spoilt[0 if bidirectional else 9 :].all() and (bidirectional or not spoilt[:9].any())
        for n, t in backward(y, found[3], algorithm, bidirectional).items():
            assert torch.equal(others(t), others(gradients[n])), n


@pytest.mark.parametrize("decay", [-math.inf, -1e4, -20.0, 0.0, 3.0])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_extreme_decays_equal_the_reference(decay, bidirectional):
    for algorithm in (SERIAL, CHUNKED):
        x = inputs(1, 21, 6, final=False)
        compare(x | {"w": torch.full_like(x["w"], decay)}, algorithm, bidirectional)


@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
def test_two_slices_equal_one_call(algorithm):
    x = inputs(2, 40, 5, torch.float64, state=True)
    whole = forward(x, algorithm)
    for at in (1, 16, 21):
        first = forward(x | {n: x[n][:, :at] for n in "kv"}, algorithm)
        second = forward(x | {n: x[n][:, at:] for n in "kv"} | {"ybar": first[1], "lse": first[2]}, algorithm)
        torch.testing.assert_close(torch.cat([first[0], second[0]], 1), whole[0])
        torch.testing.assert_close(second[1:3], whole[1:3])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_results_repeat_bit_for_bit(bidirectional):
    for algorithm in (SERIAL, CHUNKED):
        x = inputs(2, 40, 9, gate=True, final=not bidirectional)
        runs = []
        for _ in range(2):
            *outputs, checkpoint = forward(x, algorithm, bidirectional)
            runs.append([*outputs, *backward(x, checkpoint, algorithm, bidirectional).values()])
        assert all(torch.equal(a, b) for a, b in zip(*runs))
        without = forward(x, algorithm, bidirectional, keep=False)
        # saving a checkpoint does not change the outputs
        assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], without[:3]))


@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cut", [None, [0, 5, 5, 21]])
def test_a_launcher_writes_its_outputs_and_nothing_else(algorithm, bidirectional, cut):
    x = inputs(1 if cut else 2, 21, 9, gate=True, state=not bidirectional, final=not bidirectional, cut=cut)
    N = 2 if cut is None else 3
    rows = layout.wkv_rows(*x["k"].shape[:2], N if cut else None, current().wkv_checkpoint_tokens)
    shape = (2 if bidirectional else 1, 3, rows, 9)
    read = {n: x[n] for n in (*DATA, "w", "u") if x[n] is not None}
    outputs = [torch.full(s, math.nan) for s in ((N, 9), (N, 9), shape, *[x["k"].shape] * 4, (9,), (9,), *[(N, 9)] * 2)]
    with native_triton.guarded(*read.values(), *outputs) as guarded:
        y = x | dict(zip(read, guarded))
        ybar, lse, checkpoint, out, dk, dv, dr, dw, du, d_ybar, d_lse = guarded[len(read) :]
        if bidirectional:
            d_ybar = d_lse = None
        middle = (y["r"], y["w"], y["u"], False, y["ybar"], y["lse"])
        kernels.wkv_forward(
            y["k"], y["v"], *middle, x["cu"], 0, bidirectional, algorithm, out, ybar, lse, checkpoint, current()
        )
        kernels.wkv_backward(
            y["g"], y["g_ybar"], y["g_lse"], y["k"], y["v"], *middle, checkpoint, x["cu"], 0, bidirectional, algorithm,
            dk, dv, dr, dw, du, d_ybar, d_lse, current(),
        )  # fmt: skip
        for t in (ybar, lse, out, dk, dv, dr, dw, du, d_ybar, d_lse, *(() if cut else (checkpoint,))):
            assert t is None or not t.isnan().any()


@pytest.mark.parametrize("algorithm, bidirectional", [(SERIAL, False), (CHUNKED, False), (SERIAL, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_offsets_beyond_31_bits_give_the_same_results(algorithm, bidirectional, packed):
    """Tokens lie so far apart that the second sequence starts behind 2^31 elements and covers more than 2^31 elements.

    The memory between the tokens is not touched.
    """
    torch.use_deterministic_algorithms(False)  # deterministic mode would fill the memory between the tokens
    n, names = current().wkv_checkpoint_tokens + 1, ("k", "v", "r", "g", "out", "dk", "dv", "dr")
    L = 2 * n + 1
    device = "cuda" if native_triton.setup() == "gpu" else "cpu"  # the memory is too large to copy to the device at each launch
    stride = -(-(1 << 31) // (n * 128)) * 128
    try:
        memory = torch.empty((L - 1) * stride + 128, dtype=torch.bfloat16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no {L * stride >> 29} GiB of addresses: {error}")
    one = not bidirectional
    x = inputs(1, L, 9, torch.bfloat16, gate=True, state=one, final=one, cut=[0, n, L] if packed else None)
    found = []
    for far in (False, True):
        at = [memory.as_strided((1, L, 9), (0, stride, 1), 16 * i) if far else torch.empty_like(x["k"]) for i in range(8)]
        t = dict(zip(names, at))
        for name in names[:4]:
            t[name].copy_(x[name])
        y = x | {name: t[name] for name in names[:4]}
        *outputs, checkpoint = forward(y, algorithm, bidirectional, out=t["out"])
        into = {name: t["d" + name] for name in "kvr"}
        found.append([*outputs, *backward(y, checkpoint, algorithm, bidirectional, into=into).values()])
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*found))


@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
@pytest.mark.parametrize("mean, deviation", [(0.0, 8.0), (50.0, 4.0)])
def test_a_long_scan_with_slow_decay_is_accurate(algorithm, mean, deviation):
    """The relative rms error is at most 1e-6 in float32 for L = 4096 and time_decay = -5."""
    if native_triton.setup() == "interpreter":
        pytest.skip("too slow in the interpreter")
    x = inputs(1, 4096, 24, final=False, scale=deviation)
    x["k"] += mean
    x["w"] = torch.full_like(x["w"], -math.exp(-5.0))
    with tuned(wkv_busy_threads=96 * 16):
        out = forward(x, algorithm)[0].double()
    wanted = definition(None, x["u"].double(), x["k"].double(), x["v"].double(), log_decay=x["w"].double())
    error = ((out - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    print(f"{algorithm}, k ~ N({mean:g}, {deviation:g}): relative rms {error:.1e}")
    assert error <= 1e-6


@pytest.mark.skipif(native_triton.setup() != "native", reason="the interpreter has no compiled tiles")
@pytest.mark.parametrize("algorithm", [SERIAL, CHUNKED])
def test_tiles_of_a_gpu_equal_the_reference(algorithm):
    with tuned(USERS, wkv_busy_threads=1 << 9):
        compare(inputs(2, 67, 70, gate=True, state=True), algorithm)


def test_auto_depends_only_on_threads_and_length():
    def grid(B, L, C, algorithm="auto"):
        x = torch.empty(B, L, C, device="meta")
        return kernels._Grid(USERS, x, None, None, None, 0, algorithm)

    tile = USERS.wkv_checkpoint_tokens
    assert not grid(43, 4096, 384).chunked and grid(42, 4096, 384).chunked  # chunked below 16384 threads
    assert not grid(1, 4 * tile, 384).chunked and grid(1, 4 * tile + 1, 384).chunked
    assert not grid(42, 4096, 384, SERIAL).chunked and grid(43, 4096, 384, CHUNKED).chunked
    long = grid(1, 65536, 384)
    assert long.fine == 65536 // tile * 384 // 65536
