"""perf/compile/launch.py and code.py: the machine code of small kernels for every target, without a GPU."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: a process that interprets kernels cannot compile them", allow_module_level=True)

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from perf.compile.code import inspect, limits_h100, per_element  # noqa: E402
from perf.compile.launch import TARGETS, launches  # noqa: E402
from perf.compile.report import markdown_table  # noqa: E402


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


N = 4096
every_target = pytest.mark.parametrize("target", TARGETS)


def data(dtype=torch.float32, offset=0):
    """Return a tensor whose address is a multiple of 16 bytes, or lies ``offset`` elements behind one."""
    return torch.empty(N + 1, dtype=dtype)[offset:]


def compiled(target, kernel, *arguments, **options):
    """Compile the kernel as a launch with these arguments does."""
    with launches(target) as found:
        kernel[(1,)](*arguments, **options)
    ((kernel, _),) = found
    return kernel


def copied(target, **options):
    return compiled(target, copy, data(), data(), N, **options)


def decayed(target):
    return compiled(target, decay, data(), data(), N, 64, 2.0, BLOCK=1024)


def test_a_recorded_launch_writes_nothing_and_keeps_its_arguments():
    x, y = torch.ones(N), torch.zeros(N)
    with launches("cuda:90") as found:
        copy[(4,)](x, y, N, BLOCK=512, num_warps=2)
        decay[(4,)](x, y, N, 1, tau=2.0, BLOCK=512)
    assert [k.metadata.name for k, _ in found] == ["copy", "decay"] and found[0][0].metadata.num_warps == 2
    assert found[0][1]["x_ptr"] is x and found[0][1]["BLOCK"] == 512 and "num_warps" not in found[0][1]
    assert found[1][1]["tau"] == 2.0 and not y.any()


@every_target
def test_a_copy_moves_16_bytes_per_access(target):
    kernel = copied(target, BLOCK=2048)
    threads = inspect(kernel)["threads"]
    row = inspect(kernel, elements_per_thread=2048 / threads)
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
def test_unaligned_and_narrow_accesses_are_seen(target):
    for x, n, width in ((data(offset=1), N - 1, 32), (data(), N - 1, 32), (data(), N, 128)):
        assert set(inspect(compiled(target, copy, x, data(), n))["loads"]) == {width}
    for dtype, width in ((torch.int8, 8), (torch.bfloat16, 16)):
        x, y = data(dtype, offset=1), data(dtype, offset=1)
        row = inspect(compiled(target, copy, x, y, N - 1))
        assert set(row["loads"]) == set(row["stores"]) == {width}


@every_target
def test_special_operations_in_a_loop_are_counted(target):
    row = inspect(decayed(target))
    (body,) = row["loops"]
    steps = 2 if body["loads"] == {128: 2 * 1024 // row["threads"] // 4} else 1  # LLVM may unroll the loop
    n = steps * 1024 // row["threads"]
    assert body["loads"] == body["stores"] == {128: n // 4}
    ((operation, count),) = body["special"].items()
    assert count == n and operation in ("MUFU.EX2", "v_exp_f32")
    assert per_element(body, n)["special_per_element"] == 1.0
    assert per_element(body, n)["bytes_per_element"] == 8.0
    assert n < body["instructions"] < row["instructions"]
    assert "fp64" not in body["histogram"] and "fp64" in row["histogram"]  # the reciprocal of tau, once before the loop


@every_target
def test_spills_are_counted(target):
    # each thread keeps 64 to 128 values across a sum, and the limit leaves fewer registers
    limit, size = {"maxnreg": 32}, 2048
    if target.startswith("hip"):
        limit, size = ({"waves_per_eu": 16}, 4096) if target == "hip:gfx1100" else ({"waves_per_eu": 8}, 8192)
    row = inspect(compiled(target, softmax, data(), data(), BLOCK=size, num_warps=1, **limit))
    assert row["spills"] > 0 and row["spill_bytes"] > 0 and row["histogram"]["spill"] > 0
    assert inspect(compiled(target, softmax, data(), data(), BLOCK=512, num_warps=1))["spills"] == 0


def test_a_dual_issue_is_one_instruction_and_two_operations():
    row = inspect(decayed("hip:gfx1100"))
    assert sum(row["histogram"].values()) > row["instructions"]


def test_occupancy_is_limited_by_registers_or_blocks():
    row = inspect(compiled("cuda:90", softmax, data(), data(), BLOCK=16384, num_warps=4))
    assert row["registers"] > 128 and row["limited_by"] == "registers"
    assert row["warps_resident"] == 4 * (65536 // (-(-row["registers"] // 8) * 8 * 32 * 4))
    row = inspect(copied("cuda:90", BLOCK=128, num_warps=1))
    assert (row["warps_resident"], row["limited_by"]) == (32, "blocks")


def test_inspection_needs_no_driver(monkeypatch):
    class Refuses:
        def __getattr__(self, name):
            raise AssertionError(f"the active driver was asked for {name}")

    monkeypatch.setattr(triton.runtime.driver, "_active", Refuses())
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    for target in TARGETS:
        assert inspect(copied(target, BLOCK=512))["loads"]


def test_limits_of_an_h100_and_the_table_are_right():
    limits = limits_h100({"bytes_per_element": 12.0, "special_per_element": 5.0, "instructions_per_element": 60.0})
    assert limits["paper_limit_memory_ms"] == pytest.approx(3.582, rel=1e-3)
    assert limits["paper_limit_special_ms"] == pytest.approx(1.349, rel=1e-3)
    assert limits["paper_limit_issue_ms"] == pytest.approx(2.024, rel=1e-3)
    assert limits["paper_bound_by"] == "memory"
    with pytest.raises(ValueError, match="hip:gfx942"):
        limits_h100(inspect(copied("hip:gfx942"), 4))
    assert markdown_table([{"kernel": "a", "loads": {128: 4}, "x": 0.12345, "loops": []}, {"kernel": "b", "x": 2}]) == (
        "| kernel | loads | x |\n| --- | --- | --: |\n| a | 128 x 4 | 0.123 |\n| b |  | 2 |"
    )
