"""perf/spike_information.py: arms, the figures of a neuron whose loss is known, and a run that writes rows once."""

import json
import sys

import pytest
import torch

from perf import spike_information
from sdit import PRESETS
from sdit.pure import Spikes


def test_arms_are_parsed():
    assert spike_information.parse_arm("-4..4+learnt") == ((-4, 4), True, False)
    assert spike_information.parse_arm("binary+learnt+scale") == (None, True, True)
    for arm in ("4..0", "4", "ternary", "0..4+scale", "0..4+nope"):
        with pytest.raises(ValueError, match=r"an arm is LO\.\.HI or binary"):
            spike_information.parse_arm(arm)


def test_an_arm_replaces_all_neurons():
    config = PRESETS["fashion_pure"]
    for arm, kind, parameters in (("-2..3", Spikes, 0), ("binary+learnt+scale", spike_information.BinarySpikes, 2)):
        neurons = [m for m in spike_information.build_model(config, arm).modules() if isinstance(m, Spikes)]
        assert all(type(m) is kind for m in neurons)
        assert sum(p.requires_grad for m in neurons for p in m.parameters()) == parameters * len(neurons)
        assert {(m.lo, m.hi) for m in neurons} == ({(-2, 3), (0, 3)} if kind is Spikes else {(0, 4)})


def test_figures_of_a_neuron():
    neuron, found = Spikes(0, 1), spike_information.Information()
    x = torch.tensor([[3.0, -1.0], [1.0, 3.0]])  # the mean square is 5, theta is sqrt(5) / 2
    found(neuron, (x,), neuron(x))
    theta = 5**0.5 / 2
    lost = (3 - theta) ** 2 + 1 + (1 - theta) ** 2 + (3 - theta) ** 2
    figures = found.figures()
    assert figures["rate"] == 0.75 and abs(figures["error"] - lost / 20) < 1e-4
    assert figures["information"] == 0.5  # the first channel fires always, the second in half of the rows


def test_binary_spikes_with_factors_of_one_equal_those_without():
    x = torch.randn(2, 5, 8, requires_grad=True)
    results = []
    for scaled in (False, True):
        s = spike_information.BinarySpikes(scaled)(x)
        results.append((s, torch.autograd.grad((s * x.detach()).sum(), x)[0]))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].unique().tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.slow
def test_a_run_writes_rows_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    words = ["--dry-run", "--arm=-4..4+learnt", "--arm=binary+learnt+scale", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["perf/spike_information.py", *words])
    for _ in range(2):
        spike_information.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["-4..4+learnt", "binary+learnt+scale"] and capsys.readouterr().out.count("arm") == 2
    assert rows[0]["mean_error"] < rows[1]["mean_error"]
    monkeypatch.setattr(
        sys, "argv", ["perf/spike_information.py", *words[:2], *words[-2:], "--cpu-seconds", "0.3", "--seed", "1"]
    )
    for _ in range(2):
        spike_information.main()
    *_, last = rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 and (last["seed"], last["wanted_cpu_seconds"]) == (1, 0.3) and last["steps"] >= 1
    picture = tmp_path / "chart.png"
    monkeypatch.setattr(sys, "argv", ["perf/spike_information.py", "--json", str(path), "--plot", str(picture)])
    spike_information.main()
    assert picture.stat().st_size > 5000
