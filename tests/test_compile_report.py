"""perf/compile/: the kernels as compiled for an NVIDIA and an AMD GPU. No GPU is needed."""

import importlib.metadata
import importlib.util
import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true"):
    pytest.skip("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled", allow_module_level=True)
VERSION = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
if not (3, 6) <= VERSION < (3, 9):
    pytest.skip(f"perf/compile/ knows Triton 3.6 to 3.8, not {VERSION[0]}.{VERSION[1]}", allow_module_level=True)

import torch  # noqa: E402

import sdit_kernels  # noqa: E402
from perf import compile_report  # noqa: E402
from perf.compile.code import inspect  # noqa: E402
from perf.compile.launch import launches  # noqa: E402
from perf.compile.lif import Case, SpikingJelly  # noqa: E402
from perf.compile.mix import MixCase  # noqa: E402
from perf.compile.report import find_faults, markdown, rows_of_all, verdict  # noqa: E402
from perf.compile.rows import TYPES, rows_of  # noqa: E402
from perf.compile.wkv import Fla, WkvCase  # noqa: E402
from sdit_kernels.layout import norm_columns  # noqa: E402
from sdit_kernels.tuning import Tuning, tuned  # noqa: E402

FACTS = {"date": "today", "command": "report", "commit": "0", "dirty": False}
FACTS["versions"] = dict.fromkeys(("torch", "triton", "spikingjelly", "fla-core"))


TARGETS = ("cuda:90", "hip:gfx942")


@pytest.fixture(scope="module")
def rows_of_both():
    # in other processes, because this process uses small tiles
    return rows_of_all(TARGETS, [Case("T=4"), Case("T=16", T=16), Case("T=4", "lif_rate")], jobs=2)


@pytest.fixture(params=TARGETS)
def rows(rows_of_both, request):
    return [row for row in rows_of_both if row["target"] == request.param]


def test_lif_kernels_have_no_spills_and_move_minimal_bytes(rows):
    assert len(rows) == 12  # 3 cases, forward and backward, 2 dtypes
    assert find_faults(rows) == []
    for row in rows:
        assert row["spills"] == row["spill_bytes"] == row["shared"] == 0, row
        size = {"fp32": 4, "bf16": 2}[row["data"]]
        assert row["bytes_per_element"] == row["floor"] == size * (3 if "backward" in row["kernel"] else 2), row
        narrow = row["kernel"] == "lif_backward" and row["variant"] == "T=16" and row["data"] == "bf16"
        assert row["narrowest"] == (64 if narrow else 128), row


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("T, dtype", [(4, torch.float32), (8, torch.bfloat16), (4, torch.float64)], ids=str)
def test_lif_kernels_with_a_norm_have_no_spills_up_to_the_stated_size(target, T, dtype):
    C = norm_columns("triton", T, max(4, dtype.itemsize))
    x = torch.empty(T, 8, C, dtype=dtype, requires_grad=True)
    tau, factor = (torch.full(size, 2.0, dtype=torch.float64, requires_grad=True) for size in ((C,), ()))
    with launches(target) as found, sdit_kernels.backend("triton"), tuned(Tuning()):
        s = sdit_kernels.lif(x, tau=tau, v_threshold=factor, threshold="rms")
        torch.autograd.grad(s, (x, tau, factor), torch.empty_like(s))
    rows = [inspect(kernel) for kernel, _ in found]
    assert len(rows) == 2 and all(arguments["BC"] == C for _, arguments in found)
    assert all(row["spills"] == row["spill_bytes"] == 0 for row in rows), rows


def test_lif_kernels_need_few_instructions(rows):
    for row in rows:
        # about 9 operations forward and 30 backward; the others compute addresses and masks, or run once
        assert 5 < row["instructions_per_step"] < (45 if "backward" in row["kernel"] else 20), row
        assert row["special_per_step"] < (1.3 if "backward" in row["kernel"] else 0.3), row
    assert ("paper_limit_memory_ms" in rows[0]) == (rows[0]["target"] == "cuda:90")


def test_a_recorded_launch_has_the_launchers_settings():
    from sdit_kernels.triton import tiles
    from sdit_kernels.tuning import current

    with launches("hip:gfx942") as found:
        Case("T=4").launch(TYPES["bf16"])
    assert [compiled.metadata.name for compiled, _ in found] == ["lif_forward_kernel", "lif_backward_kernel"]
    for compiled, arguments in found:
        assert compiled.metadata.num_warps == max(1, current().elementwise_threads // 64)
        assert arguments["BR"] * arguments["BC"] == current().elementwise_threads * 8
        assert arguments["K"] == 4 and not arguments["LONG"] and arguments["R"] == 1
        assert not compiled.metadata.enable_fp_fusion
    assert tiles.warps_of.cache_info().currsize == 0  # the target's warp size must not be cached


@pytest.mark.parametrize("case", [SpikingJelly("T=4"), Fla()], ids=lambda case: case.op)
def test_a_peer_is_compiled_or_named_as_missing(case):
    rows = rows_of("cuda:90", [case])
    if importlib.util.find_spec(case.op) is None:
        assert [row["note"] for row in rows] == [f"skipped: {case.op} is not installed (make peers)"] * 2
    assert all("note" in row or row["bytes_per_element"] > row["floor"] for row in rows)
    assert find_faults(rows) == []  # peers are not checked for faults
    assert case.op in markdown(rows, FACTS)


def test_the_floor_counts_the_bytes_of_all_tensors():
    assert Case("", T=4).floor("forward", 4) == 8 and Case("", T=4).floor("backward", 2) == 6
    assert Case("", T=32).floor("backward", 4) == 12.25  # a checkpoint of 4 bytes per 16 steps
    assert Case("", T=4, v=True).floor("backward", 4) == 14
    assert Case("", "lif_rate", extras=True).floor("forward", 2) == 8
    assert Case("", "lif_rate", extras=True).floor("backward", 2) == 10  # x, gate, g and two gradients
    assert Case("", T=4, parameters="channel").floor("forward", 2, 2) == 5


def test_faults_name_spills_narrow_accesses_and_extra_bytes():
    good = {"kernel": "lif_forward", "variant": "T=4", "data": "fp32", "target": "cuda:90", "neurons_per_thread": 4.0}
    good |= {"spills": 0, "spill_bytes": 0, "narrowest": 128, "bytes_per_element": 8.0, "floor": 8.0}
    good |= {"instructions_per_step": 10.0}
    assert find_faults([good], {"rows": [good]}) == []
    where = "lif_forward T=4 fp32 cuda:90: "
    assert find_faults([good | {"spills": 2, "spill_bytes": 8}]) == [where + "spills 2, 8 bytes a thread"]
    assert find_faults([good | {"narrowest": 32}]) == [where + "an access of 32 bits, 128 wanted"]
    assert find_faults([good | {"bytes_per_element": 9.0}]) == [where + "9.00 bytes per element, the floor is 8.00"]
    more = good | {"instructions_per_step": 11.1}
    assert find_faults([more], {"rows": [good]}) == [where + "instructions per neuron and step 10.0 -> 11.1"]
    assert find_faults([more | {"kernel": "spikingjelly_forward"}], {"rows": []}) == []
    assert "1 with spills" in verdict([good | {"spills": 2}])


def test_the_report_refuses_the_interpreter(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        compile_report.main(["--quick"])


@pytest.fixture(scope="module")
def wkv_rows():
    return rows_of_all(TARGETS, [WkvCase("serial")], jobs=2)


def test_wkv_kernels_have_no_spills_and_move_minimal_bytes(wkv_rows):
    walks = [row for row in wkv_rows if row["kernel"] != "wkv_sums"]
    assert len(walks) == 8 and len(wkv_rows) == 12  # 2 targets, forward, backward and its sums, 2 dtypes
    assert find_faults(wkv_rows) == []
    for row in walks:
        assert row["spills"] == row["spill_bytes"] == row["shared"] == 0, row
        size, backward = {"fp32": 4, "bf16": 2}[row["data"]], row["kernel"] == "wkv_backward"
        assert row["floor"] == size * (5 if backward else 3) + 12 / 16, row
        assert row["bytes_per_element"] == pytest.approx(row["floor"]), row
        assert row["narrowest"] == 8 * size, row
        assert row["instructions_per_step"] < (125 if backward else 55), row  # three instructions treat NaN and infinities
        # two exponentials and a reciprocal; the backward pass computes half of them twice
        assert row["special_per_step"] < (3.7 if backward else 3.1), row
    assert "The WKV kernels" in markdown(wkv_rows, FACTS)


def test_mix_kernels_have_no_spills_and_move_minimal_bytes():
    cases = [MixCase("relu_squared", 0), MixCase("1 mix"), MixCase("3 mixes, norm, C=8192", 3, True, 8192)]
    cases.append(MixCase("2 mixes, bf16 results", 2, autocast=True))
    rows = rows_of_all(TARGETS, cases, jobs=2)
    found = [row for row in rows if "(call)" not in row["kernel"]]
    assert len(found) == 40  # 2 targets, 2 dtypes, forward and backward; C=8192 has two kernels each
    assert find_faults(rows) == []
    for row in found:
        assert row["spills"] == row["spill_bytes"] == 0, row
        size, backward = {"fp32": 4, "bf16": 2}[row["data"]], "backward" in row["kernel"]
        mixes = next((n for n in (1, 2, 3) if row["variant"].startswith(str(n))), 0)
        mixed = 2 if "bf16 results" in row["variant"] else size
        moved = size + mixes * mixed + backward * size if mixes else (2 + backward) * size
        if "stats" in row["kernel"]:
            moved = size + backward * mixes * mixed
        assert row["bytes_per_element"] == row["floor"] == moved, row
        assert row["instructions_per_step"] < 80, row
    calls = {(row["kernel"], row["data"]): row for row in rows if row not in found}
    forward, backward = (calls[f"token_shift_{direction} (call)", "fp32"] for direction in ("forward", "backward"))
    assert (forward["bytes_per_element"], forward["floor"]) == (20, 16)  # x is read twice
    assert (backward["bytes_per_element"], backward["floor"]) == (36, 20)  # and so are the three gradients
    assert "The MIX kernels" in markdown(rows, FACTS)
