"""perf/bench_pictures.py: passes of an image, rows that are measured once, the chart."""

import json
import sys

import pytest
import torch

from perf import bench_pictures
from sdit import PRESETS


def test_passes_are_counted():
    config = PRESETS["fashion_tiny"]
    assert bench_pictures.count_passes(config, "dpm++", 20, 1.0, None) == 20
    assert bench_pictures.count_passes(config, "dpm++", 20, 1.5, None) == 40
    assert bench_pictures.count_passes(config, "ddim", 5, 1.5, (200, 600)) == 8  # times 800, 600, 400, 200, 0


def test_rows_are_measured_once_and_drawn(tmp_path, monkeypatch, capsys):
    measures = {"frechet_distance": 0.5, "precision": 0.9, "recall": 0.8, "label_accuracy": 0.9}
    monkeypatch.setattr(bench_pictures, "draw", lambda path, n, **settings: (torch.zeros(n), torch.zeros(n), settings))
    monkeypatch.setattr(bench_pictures, "evaluate", lambda *_: dict.fromkeys(("drawn", "floor", "test"), measures))
    monkeypatch.setattr(bench_pictures, "measure_energy", lambda model: dict(arithmetic=1.0, with_memory=2.0, quantised=3.0))
    path, picture = tmp_path / "rows.json", tmp_path / "chart.png"
    words = ["--model", "best=pretrained", "--steps", "5", "--guidance", "1", "--guidance", "2", "--interval", "100", "800"]
    words += ["--noise-scale", "1.01"]
    for more in ([], ["--steps", "10", "--plot", str(picture)]):
        monkeypatch.setattr(sys, "argv", ["perf/bench_pictures.py", *words, "-n", "200", "--json", str(path), *more])
        bench_pictures.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["steps"], row["guidance"], row["guidance_interval"]) for row in rows] == [
        (5, 1.0, None), (5, 2.0, [100.0, 800.0]), (10, 1.0, None), (10, 2.0, [100.0, 800.0]),
    ]  # fmt: skip
    assert {row["noise_scale"] for row in rows} == {1.01}
    assert rows[0]["energy_mj"] == pytest.approx({"arithmetic": 5, "with_memory": 10, "quantised": 15})
    assert capsys.readouterr().out.count("distance 0.5") == 4 and picture.stat().st_size > 5000
