"""perf/gpu_code.py: what is known of the code of small kernels, on every target, without a GPU."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: a process that interprets kernels cannot compile them", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from perf import gpu_code  # noqa: E402
from perf.gpu_code import compile_for, inspect, limits_h100, markdown_table, per_element  # noqa: E402


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr = 1024):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def decay(x_ptr, y_ptr, n, steps, tau: "fp64", BLOCK: tl.constexpr):  # noqa: F821
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = (1 / tau).to(tl.float32)
    for t in range(steps):
        x = tl.load(x_ptr + t * n + offsets, mask=offsets < n, other=0.0)
        tl.store(y_ptr + t * n + offsets, tl.exp(x * scale), mask=offsets < n)


@triton.jit
def softmax(x_ptr, y_ptr, BLOCK: tl.constexpr):  # one program holds the whole row in registers
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    x = x / tl.sum(x)
    tl.store(y_ptr + offsets, x / tl.sum(x * x))


COPY = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}
every_target = pytest.mark.parametrize("target", gpu_code.TARGETS)


@every_target
def test_a_copy_moves_16_bytes_at_a_time(target):
    compiled = compile_for(copy, COPY, {"BLOCK": 2048}, target)
    threads = inspect(compiled)["threads"]
    row = inspect(compiled, elements_per_thread=2048 / threads)
    accesses = 2048 // threads // 4
    assert row["target"] == target and row["kernel"] == "copy"
    assert row["loads"] == row["stores"] == {128: accesses}
    assert row["bytes_per_element"] == 8.0
    assert row["spills"] == row["spill_bytes"] == row["shared"] == 0
    assert 4 <= row["registers"] <= 64
    assert row["warps_resident"] == row["warps_max"] and row["limited_by"] == "warps"
    assert row["special"] == {} and row["loops"] == [] and row["special_per_element"] == 0
    assert 2 * accesses < row["instructions"] < 120
    assert "other" not in row["histogram"] and "fp64" not in row["histogram"]


@every_target
def test_unaligned_and_narrow_accesses(target):
    for types, aligned, width in ((COPY, (), 32), (COPY, ("x_ptr",), 32), (COPY, None, 128)):
        assert set(inspect(compile_for(copy, types, {}, target, aligned))["loads"]) == {width}
    bytes_ = COPY | {"x_ptr": "*i8", "y_ptr": "*i8"}
    assert set(inspect(compile_for(copy, bytes_, {}, target, ()))["stores"]) == {8}
    halves = COPY | {"x_ptr": "*bf16", "y_ptr": "*bf16"}
    assert set(inspect(compile_for(copy, halves, {}, target, ()))["loads"]) == {16}


@every_target
def test_special_operations_and_loop_body(target):
    compiled = compile_for(decay, COPY | {"steps": "i32"}, {"BLOCK": 1024}, target)
    row = inspect(compiled)
    (body,) = row["loops"]
    steps = 2 if body["loads"] == {128: 2 * 1024 // row["threads"] // 4} else 1  # LLVM may unroll the loop
    n = steps * 1024 // row["threads"]
    assert body["loads"] == body["stores"] == {128: n // 4}
    ((operation, count),) = body["special"].items()
    assert count == n and operation in ("MUFU.EX2", "v_exp_f32")
    assert per_element(body, n)["special_per_element"] == 1.0
    assert per_element(body, n)["bytes_per_element"] == 8.0
    assert n < body["instructions"] < row["instructions"]
    assert "fp64" not in body["histogram"] and "fp64" in row["histogram"]  # the reciprocal of tau, once


@every_target
def test_spills_are_seen(target):
    # 64 to 128 values a thread, all alive across a sum, where the limit leaves fewer registers
    limit, size = {"maxnreg": 32}, 2048
    if target.startswith("hip"):
        limit, size = ({"waves_per_eu": 16}, 4096) if target == "hip:gfx1100" else ({"waves_per_eu": 8}, 8192)
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    row = inspect(compile_for(softmax, types, {"BLOCK": size}, target, num_warps=1, **limit))
    assert row["spills"] > 0 and row["spill_bytes"] > 0 and row["histogram"]["spill"] > 0
    assert inspect(compile_for(softmax, types, {"BLOCK": 512}, target, num_warps=1))["spills"] == 0


def test_dual_issue_counts_once_as_instruction_and_twice_as_operation():
    row = inspect(compile_for(decay, COPY | {"steps": "i32"}, {"BLOCK": 1024}, "hip:gfx1100"))
    assert sum(row["histogram"].values()) > row["instructions"]


def test_occupancy():
    softmax_types = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    row = inspect(compile_for(softmax, softmax_types, {"BLOCK": 16384}, "cuda:90", num_warps=4))
    assert row["registers"] > 128 and row["limited_by"] == "registers"
    assert row["warps_resident"] == 4 * (65536 // (-(-row["registers"] // 8) * 8 * 32 * 4))
    row = inspect(compile_for(copy, COPY, {"BLOCK": 128}, "cuda:90", num_warps=1))
    assert (row["warps_resident"], row["limited_by"]) == (32, "blocks")


def test_no_driver_is_asked(monkeypatch):
    class Refuses:
        def __getattr__(self, name):
            raise AssertionError(f"the active driver was asked for {name}")

    monkeypatch.setattr(triton.runtime.driver, "_active", Refuses())
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    for target in gpu_code.TARGETS:
        assert inspect(compile_for(copy, COPY, {"BLOCK": 512}, target))["loads"]


def test_errors():
    with pytest.raises(ValueError, match="type of 'n' is missing"):
        compile_for(copy, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {}, "cuda:90")
    with pytest.raises(ValueError, match="copy has no argument z_ptr"):
        compile_for(copy, COPY | {"z_ptr": "*fp32"}, {}, "cuda:90")
    with pytest.raises(ValueError, match="cuda:90 has no option num_wraps"):
        compile_for(copy, COPY, {}, "cuda:90", num_wraps=8)
    with pytest.raises(TypeError, match="not a compiled kernel"):
        compile_for(lambda x: x, COPY, {}, "cuda:90")
    with pytest.raises(ValueError, match="hip:gfx942"):
        limits_h100(inspect(compile_for(copy, COPY, {}, "hip:gfx942"), 4))


def test_limits_and_table():
    limits = limits_h100({"bytes_per_element": 12.0, "special_per_element": 5.0, "instructions_per_element": 60.0})
    assert limits["paper_limit_memory_ms"] == pytest.approx(3.582, rel=1e-3)
    assert limits["paper_limit_special_ms"] == pytest.approx(1.349, rel=1e-3)
    assert limits["paper_limit_issue_ms"] == pytest.approx(2.024, rel=1e-3)
    assert limits["paper_bound_by"] == "memory"
    assert markdown_table([{"kernel": "a", "loads": {128: 4}, "x": 0.12345, "loops": []}, {"kernel": "b", "x": 2}]) == (
        "| kernel | loads | x |\n| --- | --- | --: |\n| a | 128 x 4 | 0.123 |\n| b |  | 2 |"
    )
