"""perf/harness.py: its clock is replaced by one with a known drift, so the reported numbers are known exactly."""

import csv
import gc
import json
import os
import subprocess
import sys

import pytest
import torch

from perf import harness
from perf.harness import Contestant, allocated_bytes, check, compare, saved_bytes


class Clock:
    """Time passes only in calls of `work`, and each call makes the machine a little slower."""

    def __init__(self, monkeypatch):
        self.now, self.speed, self.calls = 0.0, 1.0, []
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def work(self, name, seconds):
        def fn():
            self.calls.append(name)
            self.now += seconds * self.speed
            self.speed *= 1.002

        return fn


def test_a_comparison_forms_ratios_within_each_round(monkeypatch):
    clock, prepared = Clock(monkeypatch), []
    contestants = [
        Contestant("a", clock.work("a", 1.0), bytes=10**9, extra={"case": "T=4"}),
        Contestant("b", clock.work("b", 3.0), prepare=lambda: prepared.append(1)),
        Contestant("peer", skip="not installed"),
    ]
    rows = compare(contestants, rounds=50, min_time=0.5)
    assert clock.calls[-6:] == ["a", "b"] * 3 and clock.calls.count("a") == 50 + 3  # two calls to warm up, one to calibrate
    assert len(prepared) == 51
    a, b, peer = rows
    assert a["case"] == "T=4" and a["ratio"] == 1 and a["ratio_iqr"] == 0 and a["repeats"] == 1
    assert b["ratio"] == pytest.approx(3 * 1.002) and b["ratio_iqr"] < 1e-9 and b["baseline"] == "a"
    assert b["iqr_s"] / b["median_s"] > 0.05  # the drift, which cancels in the paired ratio
    assert a["gb_per_s"] == pytest.approx(1 / a["median_s"], rel=0.01) and "gb_per_s" not in b
    assert len(a["samples_s"]) == 50 and min(a["samples_s"]) == pytest.approx(a["min_s"], rel=1e-4)
    assert peer == {"name": "peer", "note": "skipped: not installed"}
    assert compare(contestants, rounds=3, min_time=0.5, baseline="b")[0]["ratio"] == pytest.approx(1 / 3, rel=0.01)


def test_samples_last_at_least_the_minimum_time(monkeypatch):
    clock = Clock(monkeypatch)
    (row,) = compare([Contestant("short", clock.work("short", 1e-4))], rounds=2, min_time=0.1)
    assert row["repeats"] * row["min_s"] >= 0.1 and len(clock.calls) < 10_000
    with pytest.raises(ValueError, match="names must differ"):
        compare([Contestant("x", clock.work("x", 1)), Contestant("x", clock.work("x", 1))], rounds=1)


def test_unsteady_rows_have_a_note(monkeypatch):
    clock = Clock(monkeypatch)
    steps = iter([1.0] * 5 + [2.0] * 100)

    def fn():
        clock.now += next(steps)

    (row,) = compare([Contestant("stalls", fn)], rounds=9, min_time=0.1)
    assert row["note"] == "unsteady: the median is 2.0 times the minimum"


def test_copy_is_100_percent_of_the_bandwidth():
    contestant = harness.make_copy_contestant(1 << 16)
    assert contestant.bytes == 1 << 16
    rows = compare([Contestant("same", contestant.fn, bytes=1 << 16), contestant], rounds=5, min_time=0.002)
    assert rows[1]["percent_of_copy"] == 100 and rows[0]["percent_of_copy"] > 0  # the second number depends on the machine


def test_check_returns_the_error_or_raises():
    want = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    assert check("same", want.clone(), want, 0, 0) == {"max_abs_error": 0, "rel_rms_error": 0}
    errors = check("near", [torch.tensor([3.0, 4.5]), None], [torch.tensor([3.0, 4.0]), None], rtol=0.2, atol=0)
    assert errors == {"max_abs_error": 0.5, "rel_rms_error": pytest.approx(0.1)}
    assert check("empty", torch.empty(0, 3), torch.empty(0, 3), 0, 0)["max_abs_error"] == 0
    with pytest.raises(AssertionError, match=r"dx: 1 of 6 elements .* worst at \(1, 2\): got 5.5, wanted 5 "):
        check(
            "dx",
            torch.arange(6.0).view(2, 3) + torch.tensor([[0, 0, 0], [0, 0, 0.5]]),
            torch.arange(6.0).view(2, 3),
            0,
            0.1,
        )
    with pytest.raises(AssertionError, match="got nan, wanted 2"):
        check("nan", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), 1, 1)
    with pytest.raises(AssertionError, match=r"shape \(2,\), wanted \(3,\)"):
        check("shape", torch.zeros(2), torch.zeros(3), 0, 0)
    with pytest.raises(AssertionError, match=r"grads\[1\]: got NoneType"):
        check("grads", (torch.zeros(1), None), (torch.zeros(1), torch.zeros(1)), 0, 0)
    with pytest.raises(AssertionError, match="1 results, 2 wanted"):
        check("count", (torch.zeros(1),), (torch.zeros(1), torch.zeros(1)), 0, 0)


class KeepsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        half = x[: len(x) // 2].bfloat16()
        ctx.save_for_backward(x, half, half[:10])  # a view of a saved tensor costs no memory
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_bytes_of_dead_nodes_and_of_earlier_calls_do_not_count():
    x = torch.randn(1000, requires_grad=True)

    def fn():
        y = x.exp()  # saves its result
        y.sin().detach()  # a node that nothing needs: it saves y, which lives on anyway, and then dies
        torch.randn(500, requires_grad=True).square().detach()  # and one whose tensor dies with it
        return y.sum()

    assert saved_bytes(fn, exclude=[x])[0] == 4000
    assert len({allocated_bytes(fn)["kept_bytes"] for _ in range(3)}) == 1
    cycles = []

    def with_cycles():  # the garbage of an earlier call is collected during a later one
        gc.collect()
        cycle = [torch.zeros(1000)]
        cycle.append(cycle)
        cycles[:] = [1]
        return x.exp().sum()

    kept = [allocated_bytes(with_cycles)["kept_bytes"] for _ in range(3)]
    assert len(set(kept)) == 1 and kept[0] >= 4000 + 4


def test_saved_and_allocated_bytes_agree():
    x = torch.randn(1000, 100, requires_grad=True)
    full = x.nbytes
    cases = [  # function, bytes saved besides x, bytes of results not saved, number of tensors saved
        (lambda: torch.sigmoid(torch.relu(x)), 2 * full, 0, 2),
        (lambda: torch.relu(torch.relu(torch.relu(x))), 3 * full, 0, 3),
        (lambda: KeepsInput.apply(x), full // 4, full, 1),
        (lambda: x + 1, 0, full, 0),
    ]
    for fn, saved, result, number in cases:
        nbytes, tensors = saved_bytes(fn, exclude=[x])
        assert nbytes == saved and len(tensors) == number and nbytes == sum(n for *_, n in tensors)
        memory = allocated_bytes(fn)
        assert memory["kept_bytes"] == pytest.approx(saved + result, abs=64)  # a few scalars
        assert memory["peak_bytes"] >= memory["kept_bytes"]
    nbytes, tensors = saved_bytes(lambda: KeepsInput.apply(x))
    assert tensors == [((1000, 100), "float32", full), ((500, 100), "bfloat16", full // 4)] and nbytes == full * 5 // 4
    with torch.no_grad():  # a temporary tensor counts only towards the peak
        memory = allocated_bytes(lambda: torch.relu(x + 1).sum())
    assert memory["kept_bytes"] < 64 and memory["peak_bytes"] == pytest.approx(2 * full, abs=64)


def test_provenance_contains_no_name_of_the_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(harness.ROOT / "perf" / "bench_x.py"), "--json", "/home/me/x.json", "--csv=/a/b.csv"])
    facts = harness.provenance()
    assert facts["command"] == "perf/bench_x.py --json x.json --csv=b.csv"
    assert facts["versions"]["torch"] and facts["threads"] == torch.get_num_threads() and facts["cores"] >= 1
    assert {"date", "commit", "dirty", "cpu", "system"} <= set(facts)
    text = json.dumps(facts)
    assert os.uname().nodename not in text and str(harness.ROOT) not in text


def test_a_report_is_printed_and_written(tmp_path, capsys, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench"])
    paths = ["--json", str(tmp_path / "new" / "r.json"), "--csv", str(tmp_path / "r.csv"), "--quick"]
    args = harness.make_parser("test").parse_args([*paths, "--threads", str(threads)])
    assert harness.setup(args)["device"] == "cpu"
    rows = [
        {"name": "fused", "median_s": 1.5e-3, "ratio": 0.25, "baseline": "eager", "bytes": 3 << 20, "samples_s": [1.0]},
        {"name": "eager", "median_s": 2.0, "ratio": 1.0, "baseline": "eager", "gb_per_s": 1.25, "percent_of_copy": 9.6},
        {"name": "peer", "note": "skipped: not installed"},
    ]
    harness.report("LIF", rows, args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "LIF"
    assert lines[4:] == [
        "name   median  time / eager  bytes  bandwidth  percent of copy  note",
        "-----  ------  ------------  -----  ---------  ---------------  ----------------------",
        "fused  1.5 ms          0.25  3 MiB",
        "eager     2 s             1         1.25 GB/s             10 %",
        "peer                                                            skipped: not installed",
    ]
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written["rows"] == rows and written["title"] == "LIF" and "commit" in written["provenance"]
    with open(tmp_path / "r.csv") as file:
        assert [r["name"] for r in csv.DictReader(file)] == ["fused", "eager", "peer"]


def test_a_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    x = [2**k for k in range(8, 20, 2)]
    series = {"fused": (x, [1e-3 * n for n in x], [1e-4 * n for n in x]), "eager": (x, [5 + 4e-3 * n for n in x])}
    harness.plot_lines(tmp_path / "new" / "lines.png", series, "neurons", "time per call (ms)", "made up")
    assert (tmp_path / "new" / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_a_script_finds_the_harness_from_any_folder(tmp_path):
    folder = tmp_path / "perf"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "harness.py").write_text("found = 'found'")  # a replacement, because importing torch three times takes seconds
    snippet = [line.strip() for line in harness.__doc__.splitlines() if line.startswith(("    import", "    sys.path"))]
    assert len(snippet) == 2
    (folder / "bench_x.py").write_text("\n".join([*snippet, "from perf import harness", "print(harness.found)"]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    calls = ((["perf/bench_x.py"], tmp_path), (["bench_x.py"], folder), (["-m", "perf.bench_x"], tmp_path))
    for command, where in calls:
        done = subprocess.run([sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == "found", done.stderr
