"""Test the harness that runs Triton kernels on CPU tensors: it must compute exactly the kernel's operations."""

import math
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import native_triton

TESTS = str(Path(__file__).resolve().parents[1])
MODE = native_triton.setup()  # must run before triton is imported

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

if MODE == "gpu":
    pytest.skip("kernels on CPU tensors: " + native_triton.reason(), allow_module_level=True)

native_only = pytest.mark.skipif(MODE != "native", reason="not compiled natively: " + native_triton.reason())


# --- Setting up ---


def test_setup_is_idempotent_and_explained():
    assert native_triton.setup() == MODE
    assert (native_triton.reason() == "") == (MODE == "native")


@native_only
def test_active_driver_is_for_cpu_tensors():
    assert triton.runtime.driver.active.get_active_torch_device().type == "cpu"


def _run_python(code, **environment):
    code = f"import sys; sys.path.insert(0, {TESTS!r})\n" + textwrap.dedent(code)
    environment = os.environ | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_environment_can_ask_for_the_interpreter():
    done = _run_python(
        "import native_triton as n; print(n.setup(), n.reason()); import triton; print(triton.knobs.runtime.interpret)",
        TRITON_INTERPRET="1",
    )
    assert done.stdout == "interpreter TRITON_INTERPRET is set in the environment.\nTrue\n", done.stderr


@pytest.mark.process
@pytest.mark.parametrize("fault", ["triton_version = lambda: (9, 9)", "shutil.which = lambda name: None"])
def test_falls_back_to_the_interpreter_with_a_reason(fault):
    done = _run_python(
        f"""
        import native_triton as n, torch
        torch.cuda.is_available = lambda: False
        n.support.{fault}
        print(n.setup())
        assert n.reason() == n.unsupported_reason() and n.reason().endswith("."), n.reason()
        """,
        TRITON_INTERPRET="0",
    )
    assert done.stdout == "interpreter\n", done.stderr


# --- Arguments ---


@triton.jit
def _store_scalar(out, value):
    tl.store(out, value)


@triton.jit
def _store_double(out, value: "fp64"):  # noqa: F821
    tl.store(out, value)


@triton.jit
def _store_typed(out, value: tl.constexpr, a: "i64", b: "u8", c: "fp32"):  # noqa: F821
    tl.store(out, value + a + b + c)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0, torch.int32),
        (1, torch.int32),
        (-7, torch.int32),
        (48, torch.int32),
        (2**31 - 1, torch.int32),
        (-(2**31), torch.int32),
        # the interpreter reads such an int as unsigned, and reads a bool as an array
        pytest.param(2**31, torch.int64, marks=native_only),
        (-(2**63), torch.int64),
        (2**62 + 1, torch.int64),
        pytest.param(True, torch.bool, marks=native_only),
        pytest.param(False, torch.bool, marks=native_only),
        (0.1, torch.float32),
        (math.inf, torch.float32),
    ],
)
def test_scalars_arrive(value, dtype):
    out = torch.empty(1, dtype=dtype)
    _store_scalar[(1,)](native_triton.poison_(out), value)
    assert torch.equal(out, torch.tensor([value], dtype=dtype))


def test_python_float_is_fp32_unless_annotated():
    out = torch.zeros(1, dtype=torch.float64)
    _store_double[(1,)](out, 0.1)
    assert out.item() == 0.1
    _store_scalar[(1,)](out, 0.1)
    assert out.item() == np.float32(0.1)
    _store_double[(1,)](out, value=7)
    assert out.item() == 7.0


def test_annotated_and_constant_scalars_arrive():
    out = torch.zeros(1)
    _store_typed[(1,)](out, 1000, 200, 30, 4.5)
    assert out.item() == 1234.5


@native_only
@pytest.mark.parametrize(("kind", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_scalars_round(kind, dtype):
    assert np.float32(0.1) != torch.tensor(0.1, dtype=dtype).float().item()
    value = native_triton.native.c_value(kind, 0.1)
    assert torch.tensor([value.value], dtype=torch.int32).to(torch.int16).view(dtype) == torch.tensor(0.1, dtype=dtype)


@native_only
def test_integer_too_large_for_its_annotation_is_refused():
    with pytest.raises(OverflowError):
        _store_typed[(1,)](torch.zeros(1), 0, 0, 256, 0.0)


@triton.jit
def _add_optional(x, bias, out, n, block: tl.constexpr):
    i = tl.arange(0, block)
    value = tl.load(x + i, mask=i < n)
    if bias is not None:
        value += tl.load(bias + i, mask=i < n)
    tl.store(out + i, value, mask=i < n)


def test_none_pointer_is_a_constant():
    x, bias, out = torch.randn(20), torch.randn(20), torch.empty(20)
    _add_optional[(1,)](x, None, out, 20, 32)
    assert torch.equal(out, x)
    _add_optional[(1,)](x, bias, out, 20, 32)
    assert torch.equal(out, x + bias)


@triton.jit
def _add_tuple(pointers, out, scales, n, block: tl.constexpr):
    i = tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for k in tl.static_range(len(pointers)):
        total += tl.load(pointers[k] + i, mask=i < n) * scales[k]
    tl.store(out + i, total, mask=i < n)


@native_only
def test_tuple_arguments():
    x, y, out = torch.randn(20), torch.randn(20), torch.empty(20)
    _add_tuple[(1,)]((x, y), out, (1, 3.0), 20, 32)
    torch.testing.assert_close(out, x + 3 * y)


@triton.jit
def _program_ids(out, nx, ny):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(out + (z * ny + y) * nx + x, x + 100 * y + 10000 * z + 1000000 * tl.num_programs(1))


def test_grid_of_three_dimensions():
    out = torch.zeros(4, 3, 5, dtype=torch.int32)
    _program_ids[(5, 3, 4)](out, 5, 3)
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(5), indexing="ij")
    assert torch.equal(out, (x + 100 * y + 10000 * z + 3000000).int())


@native_only
def test_grid_is_limited_as_on_a_gpu():
    with pytest.raises(ValueError, match="grid"):
        _program_ids[(1, 65536)](torch.zeros(1, dtype=torch.int32), 1, 1)
    _program_ids[(0,)](torch.zeros(1, dtype=torch.int32), 1, 1)  # a grid without programs must not be an error


@native_only
def test_only_cpu_tensors_are_taken():
    with pytest.raises(ValueError, match="meta"):
        _store_scalar[(1,)](torch.empty(1, device="meta"), 1)


@native_only
def test_specialisation_is_that_of_triton():
    out = torch.zeros(64)
    kinds = {}
    for name, tensor, value in [("aligned", out, 32), ("odd", out[1:], 33), ("one", out, 1)]:
        kinds[name] = _store_scalar[(1,)](tensor, value)
        assert tensor[0] == value
    assert len({kernel.hash for kernel in kinds.values()}) == 3
    assert kinds["one"].src.signature["value"] == "constexpr"
    assert kinds["aligned"].src.attrs[(0,)] == [["tt.divisibility", 16]]
    assert (0,) not in kinds["odd"].src.attrs or not kinds["odd"].src.attrs[(0,)]


# --- Arithmetic ---


@triton.jit
def _multiply_add(a, b, c, out, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    m = i < n
    tl.store(out + i, tl.load(a + i, mask=m) * tl.load(b + i, mask=m) + tl.load(c + i, mask=m), mask=m)


def test_products_and_sums_are_rounded_separately():
    a, b, c = torch.randn(3, 5000)
    out = torch.empty(5000)
    _multiply_add[(5,)](a, b, c, out, 5000, 1024)
    assert np.array_equal(out.numpy(), a.numpy() * b.numpy() + c.numpy())


@native_only
def test_contraction_can_be_asked_for():
    a, b, c = torch.randn(3, 5000)
    out = torch.empty(5000)
    _multiply_add[(5,)](a, b, c, out, 5000, 1024, enable_fp_fusion=True)
    fused = (a.double() * b.double() + c.double()).float()
    assert (out == fused).float().mean() > 0.999  # the sum in double also rounds, so the result is rounded twice in rare cases
    assert not torch.equal(out, a * b + c)


@triton.jit
def _functions(x, y, out, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    m = i < n
    u, v = tl.load(x + i, mask=m, other=1.0), tl.load(y + i, mask=m, other=1.0)
    tl.store(out + 0 * n + i, u / v, mask=m)
    tl.store(out + 1 * n + i, tl.div_rn(u, v), mask=m)
    tl.store(out + 2 * n + i, tl.sqrt_rn(v), mask=m)
    tl.store(out + 3 * n + i, tl.exp(u), mask=m)
    tl.store(out + 4 * n + i, tl.erf(u), mask=m)
    tl.store(out + 5 * n + i, tl.log(v), mask=m)
    tl.store(out + 6 * n + i, tl.sigmoid(u), mask=m)
    tl.store(out + 7 * n + i, tl.where(u < v, u, v), mask=m)
    tl.store(out + 8 * n + i, tl.maximum(u, v), mask=m)
    tl.store(out + 9 * n + i, tl.floor(u) + tl.abs(u), mask=m)
    tl.store(out + 10 * n + i, tl.rsqrt(v), mask=m)
    tl.store(out + 11 * n + i, tl.cos(u) + tl.sin(u), mask=m)


def test_functions():
    n = 1000
    x, y, out = 4 * torch.randn(n), torch.rand(n) + 0.01, torch.full((12, 1000), math.nan)
    _functions[(4,)](x, y, out, n, 256)
    exact = [x / y, x / y, torch.from_numpy(np.sqrt(y.numpy()))]  # torch.sqrt may be wrong by one unit in the last place
    close = [x.exp(), x.erf(), y.log(), x.sigmoid(), torch.minimum(x, y), torch.maximum(x, y)]
    close += [x.floor() + x.abs(), y.rsqrt(), x.cos() + x.sin()]
    for row, expected in enumerate(exact):
        assert torch.equal(out[row], expected), row
    torch.testing.assert_close(out[3:], torch.stack(close), rtol=5e-6, atol=1e-6)


@triton.jit
def _double_functions(x, out, n, block: tl.constexpr):
    i = tl.arange(0, block)
    u = tl.load(x + i, mask=i < n, other=1.0)
    tl.store(out + i, 1.0 / u + tl.sqrt(u) * tl.exp(u) - tl.erf(u), mask=i < n)


def test_double_precision():
    x = torch.rand(50, dtype=torch.float64) + 0.5
    out = torch.empty_like(x)
    _double_functions[(1,)](x, out, 50, 64)
    torch.testing.assert_close(out, 1 / x + x.sqrt() * x.exp() - x.erf(), rtol=1e-14, atol=1e-14)


# --- Types ---


@triton.jit
def _copy_through_fp32(x, out, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(x + i, mask=i < n).to(tl.float32)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)


def _same(actual, expected):
    """Bit equality. Any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        actual.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16)
    )


def _every_kind_of_fp32():
    """fp32 values around each rounding boundary of the 16-bit types, subnormals, infinities and NaN."""
    high = torch.arange(0, 2**16, 7, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    bits = (high[:, None] | low[None, :]).flatten()
    special = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF, 1], dtype=torch.int32)
    return torch.cat([bits, special]).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrowing_rounds_to_nearest_even(dtype):
    if MODE == "interpreter" and dtype == torch.float16:
        pytest.skip("numpy's fp16 casts are not the harness's concern; " + native_triton.reason())
    x = _every_kind_of_fp32()
    out = torch.zeros_like(x, dtype=dtype)
    _copy_through_fp32[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), 1024)
    assert _same(out, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widening_is_exact(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide, back = torch.zeros(x.shape), torch.zeros_like(x)
    _copy_through_fp32[(64,)](x, wide, x.numel(), 1024)
    assert torch.equal(wide.isnan(), x.isnan())
    assert torch.equal(wide.nan_to_num(0.0), x.float().nan_to_num(0.0))
    _copy_through_fp32[(64,)](x, back, x.numel(), 1024)
    assert _same(back, x)


@triton.jit
def _threshold(x, spikes, packed, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    fired = tl.load(x + i, mask=i < n, other=0.0) >= 0
    tl.store(spikes + i, fired, mask=i < n)
    tl.store(packed + i, fired.to(tl.uint8) * 200, mask=i < n)


def test_booleans_and_bytes():
    x, spikes, packed = torch.randn(999), torch.zeros(999, dtype=torch.bool), torch.zeros(999, dtype=torch.uint8)
    _threshold[(4,)](x, spikes, packed, 999, 256)
    assert torch.equal(spikes, x >= 0)
    assert torch.equal(packed, (x >= 0).to(torch.uint8) * 200)


@triton.jit
def _far_end(x, last: "i64", block: tl.constexpr):  # noqa: F821
    i = last - tl.arange(0, block)
    tl.store(x + i, tl.load(x + i) + 1)


@native_only
def test_offsets_beyond_31_bits():
    try:
        x = torch.empty(2**31 + 100, dtype=torch.uint8)  # not filled, because the kernel touches only the last page
    except RuntimeError as error:
        pytest.skip(f"no memory for a large tensor: {error}")
    x[-16:] = 41
    _far_end[(1,)](x, x.numel() - 1, 8)
    assert x[-16:].tolist() == [41] * 8 + [42] * 8


# --- Loops, tuples, reductions, scans, tiles ---


@triton.jit
def _leaky(x, out, tau: "fp64", n, steps, n_steps: tl.constexpr, block: tl.constexpr):  # noqa: F821
    i = tl.program_id(0) * block + tl.arange(0, block)
    m = i < n
    v = tl.zeros([block], tl.float32)
    if n_steps > 0:
        for t in tl.static_range(n_steps):
            v += (tl.load(x + t * n + i, mask=m, other=0.0) - v) / tau.to(tl.float32)
            spike = v >= 0.5
            tl.store(out + t * n + i, spike.to(tl.float32), mask=m)
            v = tl.where(spike, 0.0, v)
    else:
        for t in range(steps):
            v += (tl.load(x + t * n + i, mask=m, other=0.0) - v) / tau.to(tl.float32)
            spike = v >= 0.5
            tl.store(out + t * n + i, spike.to(tl.float32), mask=m)
            v = tl.where(spike, 0.0, v)


@pytest.mark.parametrize("static", [True, False])
def test_loops_over_time(static):
    x = torch.rand(6, 1001) * 2
    expected, v = torch.empty_like(x), torch.zeros(1001)
    for t in range(6):
        v = v + (x[t] - v) / 1.7
        expected[t] = (v >= 0.5).float()
        v = torch.where(v >= 0.5, 0.0, v)
    with native_triton.guarded(x, torch.zeros_like(x)) as (inputs, out):
        _leaky[(4,)](inputs, out, 1.7, 1001, 6, 6 if static else 0, 256)
        assert torch.equal(out, expected)


@triton.jit
def _reverse_with_tuple(x, out, n, steps: tl.constexpr, block: tl.constexpr):
    i = tl.arange(0, block)
    xs = ()
    for t in tl.static_range(steps):
        xs = xs + (tl.load(x + t * n + i, mask=i < n, other=0.0),)
    total = tl.zeros([block], tl.float32)
    for t in tl.static_range(steps):
        total += xs[steps - 1 - t]
        tl.store(out + t * n + i, total, mask=i < n)


def test_tuples_grow_in_static_loops():
    x = torch.randint(-9, 9, (4, 50)).float()
    out = torch.empty_like(x)
    _reverse_with_tuple[(1,)](x, out, 50, 4, 64)
    assert torch.equal(out, x.flip(0).cumsum(0))


@triton.jit
def _combine(a0, b0, a1, b1):
    return a0 * a1, b0 * a1 + b1


@triton.jit
def _reductions(x, sums, maxima, sums0, running, last, rows, columns, m: tl.constexpr, n: tl.constexpr):
    i, j = tl.arange(0, m), tl.arange(0, n)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    offsets = i[:, None] * columns + j[None, :]
    tile = tl.load(x + offsets, mask=inside, other=0.0)
    tl.store(sums + i, tl.sum(tile, axis=1), mask=i < rows)
    tl.store(maxima + i, tl.max(tl.where(inside, tile, float("-inf")), axis=1), mask=i < rows)
    tl.store(sums0 + j, tl.sum(tile, axis=0), mask=j < columns)
    tl.store(running + offsets, tl.cumsum(tile, axis=1), mask=inside)
    decay = tl.full([m, n], 0.5, tl.float32)
    _, state = tl.associative_scan((decay, tile), 1, _combine)
    tl.store(last + offsets, state, mask=inside)


def test_reductions_and_scans_of_tiles():
    x = torch.randint(-50, 50, (13, 29)).float()
    outs = [torch.empty(13), torch.empty(13), torch.empty(29), torch.empty_like(x), torch.empty_like(x)]
    state, states = torch.zeros(13), torch.empty_like(x)
    for t in range(29):
        states[:, t] = state = 0.5 * state + x[:, t]
    with native_triton.guarded(x, *outs) as (inputs, *outputs):
        _reductions[(1,)](inputs, *outputs, 13, 29, 16, 32)
        for actual, expected in zip(outputs, [x.sum(1), x.amax(1), x.sum(0), x.cumsum(1), states], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)


@triton.jit
def _whole_sum(x, out, n, block: tl.constexpr):
    i = tl.arange(0, block)
    row = tl.load(x + i[None, :], mask=(i < n)[None, :], other=0.0)  # a [1, block] tile
    tl.store(out, tl.sum(row))
    tl.atomic_add(out + 1, tl.sum(row))


def test_long_reduction_and_atomic():
    x, out = torch.randint(-9, 9, (1000,)).float(), torch.zeros(2)
    for _ in range(2):
        _whole_sum[(1,)](x, out, 1000, 1024)
    assert out.tolist() == [x.sum().item(), 2 * x.sum().item()]


@triton.jit
def _product(a, b, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tile = i[:, None] * n + i[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.trans(tl.load(b + tile))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dot_and_transpose(dtype):
    a, b = torch.randint(-5, 5, (2, 16, 16)).to(dtype)
    out = torch.empty(16, 16)
    _product[(1,)](a, b, out, 16)
    assert torch.equal(out, a.float() @ b.float().T)


@triton.jit(noinline=True)
def _half(x):
    return x * 0.5


@triton.jit
def _mixture(x, out, counts, n, block: tl.constexpr):
    start = tl.multiple_of(tl.program_id(0) * block, block)
    i = start + tl.max_contiguous(tl.arange(0, block), block)
    m = i < n
    value = tl.load(x + i, mask=m, other=2.0, cache_modifier=".cg", eviction_policy="evict_first")
    tl.atomic_add(counts + i % 3, (value > 0).to(tl.int32), mask=m)
    first = tl.load(x + start, mask=start < n, other=0.0)  # a masked scalar
    total = value
    for k in tl.range(0, 4, num_stages=2):
        if k != 2:
            total += (k + i // 7).to(tl.float32)
    tl.store(out + i, total * 0.5 + 2 * _half(first), mask=m, cache_modifier=".cs", eviction_policy="evict_last")
    tl.store(out + n, first, mask=start == 0)


def test_further_language():
    n = 300
    x, out, counts = torch.randn(n), torch.zeros(n + 1), torch.zeros(3, dtype=torch.int32)
    with native_triton.guarded(x, out, counts) as (inputs, outputs, totals):
        _mixture[(4,)](inputs, outputs, totals, n, 128)  # all lanes of the last program are masked off
        i = torch.arange(n)
        expected = (x + 4 + 3 * (i // 7)) * 0.5 + x[i // 128 * 128]
        torch.testing.assert_close(outputs[:n], expected)
        assert outputs[n] == x[0]
        assert totals.tolist() == [(x[k::3] > 0).sum().item() for k in range(3)]


@native_only
def test_masked_off_elements_are_undefined_without_other():
    @triton.jit
    def careless_sum(x, out, n, block: tl.constexpr):
        i = tl.arange(0, block)
        tl.store(out, tl.sum(tl.load(x + i, mask=i < n)))

    out = torch.zeros(1)
    careless_sum[(1,)](torch.ones(3), out, 3, 4)
    assert out.isnan()


@triton.jit
def _exchange(x, out, n: tl.constexpr):
    i, j = tl.arange(0, n), tl.arange(0, n // 8)
    value = tl.load(x + i)
    tl.store(out + j[:, None] * 8 + tl.arange(0, 8)[None, :], tl.reshape(value, [n // 8, 8]) + 1)


@native_only
def test_lanes_that_exchange_data_fall_back_to_one():
    x, out = torch.randn(64), torch.empty(64)
    kernel = _exchange[(1,)](x, out, 64)
    assert torch.equal(out, x + 1)
    assert kernel.metadata.native_lanes == 1
    assert _multiply_add[(1,)](x, x, x, out, 64, 64).metadata.native_lanes > 1


@triton.autotune(configs=[triton.Config({"block": 64}), triton.Config({"block": 128}, num_warps=8)], key=["n"])
@triton.jit
def _autotuned(x, out, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@native_only
def test_autotuner():
    x, out = torch.randn(300), torch.empty(300)
    _autotuned[lambda meta: (triton.cdiv(300, meta["block"]),)](x, out, 300)
    assert torch.equal(out, 2 * x)


# --- Launching ---


def test_launches_are_counted():
    out = torch.zeros(1)
    with native_triton.launches() as outer:
        _store_scalar[(1,)](out, 2.0)
        with native_triton.launches() as inner:
            _store_scalar[(3,)](out, 2.0)
            thread = threading.Thread(target=lambda: _store_double[(1,)](out, 2.0))
            thread.start()
            thread.join()
        _store_scalar.warmup(out, 2.0, grid=(1,))
    _store_scalar[(1,)](out, 2.0)
    assert outer == {"_store_scalar": 2, "_store_double": 1}
    assert inner == {"_store_scalar": 1, "_store_double": 1}


@triton.jit
def _identify(out, value, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out + i, tl.program_id(0) + value, mask=i < n)


@native_only
def test_threads_launch_independently():
    n, block, expected = 100_000, 32, torch.arange(100_000) // 32
    wrong, barrier = [], threading.Barrier(4)

    def work(number):
        out = torch.empty(n, dtype=torch.int32)
        barrier.wait()  # so all threads also make the first launch at the same time
        for value in range(number, 40, 4):
            _identify[(triton.cdiv(n, block),)](out, value + 2, n, block)
            if not torch.equal(out, expected + value + 2):
                wrong.append((number, value))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.process
@native_only
def test_compile_cache_serves_another_process(tmp_path):
    script = tmp_path / "kernel_in_file.py"
    script.write_text(
        textwrap.dedent(
            """
            import native_triton
            native_triton.setup()
            import torch, triton, triton.language as tl

            @triton.jit
            def constant(out):
                tl.store(out, VALUE)

            hits = []
            triton.knobs.compilation.listener = lambda **known: hits.append(known["cache_hit"])
            out = torch.zeros(1)
            constant[(1,)](out)
            print(out.item(), hits)
            """
        )
    )
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONPATH"] = TESTS + os.pathsep + environment["PYTHONPATH"]
    text = script.read_text()
    outputs = []
    for value in ("3.0", "3.0", "4.0"):  # an edited kernel must not load the library compiled for the old one
        script.write_text(text.replace("VALUE", value))
        done = subprocess.run(
            [sys.executable, str(script)], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.strip())
    assert outputs == ["3.0 [False]", "3.0 [True]", "4.0 [False]"]


@native_only
def test_unknown_intrinsic_is_named():
    with pytest.raises(NotImplementedError, match=r"llvm\.amdgcn\.s\.sleep"):
        native_triton.llvm_ir.intrinsic_body("llvm.amdgcn.s.sleep", "void")


@pytest.mark.parametrize("name", ["%v_65", "%found.1_64", "%a-b", "%r#1", "%7"])
def test_masks_are_found_whatever_the_names(name):
    """Triton 3.8 names values after the variables of a kernel, with a number behind a dot."""
    load = f"  %x = tt.load %p, {name}, %zero : tensor<4x!tt.ptr<f32>> loc(#loc3)"
    store = f"  tt.store {name}, %x, %m : tensor<4x!tt.ptr<f32>> loc(#loc3)"
    loaded, stored = (native_triton.llvm_ir.without_masks(line).splitlines() for line in (load, store))
    assert f"arith.select {name}, %p, " in loaded[3] and loaded[4].endswith(
        "tt.load %native0_d : tensor<4x!tt.ptr<f32>> loc(#loc3)"
    )
    assert f"arith.select %m, {name}, " in stored[3] and stored[4].startswith("tt.store %native0_d, %x : ")


# --- Finding stray accesses ---


@triton.jit
def _unmasked_copy(x, out, block: tl.constexpr):
    i = tl.arange(0, block)
    tl.store(out + i, tl.load(x + i))


def test_guard_finds_a_stray_store():
    x, out = torch.ones(60), torch.zeros(60)
    message = r"4 elements were written outside of guarded tensor 1 .*\[60, 61, 62, 63"
    with pytest.raises(AssertionError, match=message), native_triton.guarded(x, out) as (inputs, outputs):
        _unmasked_copy[(1,)](inputs, outputs, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.float64])
def test_guard_keeps_layout_and_values(dtype):
    x = torch.randint(0, 2, (6, 10)).to(dtype)
    for view in (x, x[:, 1:], x.T, x[::2, ::3], x[1, 3:], x[:0], x[0, 0]):
        with native_triton.guarded(view) as (copy,):
            assert torch.equal(copy, view)
            assert (copy.stride(), copy.shape, copy.dtype) == (view.stride(), view.shape, view.dtype)
            assert view.numel() == 0 or copy.data_ptr() % 64 == view.data_ptr() % 64
            if copy.numel():
                native_triton.poison_(copy)


def test_guard_covers_gaps_and_poisons_loads():
    x = torch.zeros(4, 8)[:, :6]
    with pytest.raises(AssertionError, match=r"\[6\]"), native_triton.guarded(x) as (copy,):
        torch.as_strided(copy, (1,), (1,), copy.storage_offset() + 6).fill_(1.0)
    with native_triton.guarded(x) as (copy,):
        assert torch.as_strided(copy, (1,), (1,), copy.storage_offset() + 6).isnan().all()


def test_poison():
    assert native_triton.poison_(torch.zeros(2)).isnan().all()
    assert native_triton.poison_(torch.zeros(2, dtype=torch.int8)).tolist() == [-128, -128]
    assert native_triton.poison_(torch.zeros(2, dtype=torch.bool)).all()
