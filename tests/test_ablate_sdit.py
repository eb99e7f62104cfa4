"""perf/ablate_sdit.py: the words of an arm change the model as they say, and a run writes one row of results."""

import json
import math
import sys

import pytest
import torch

from perf import ablate_sdit
from sdit import PRESETS, SDiT
from sdit.settings import TrainSettings


def test_an_arm_changes_the_named_settings():
    config, settings, old, stds = ablate_sdit.parse_arm(
        "dim=32 learn_sigma=false lr=3e-4 clip=0 old=gate,smooth std.labels.weight=2", "digits"
    )
    assert (config.dim, config.learn_sigma, config.T) == (32, False, PRESETS["digits"].T)
    assert (settings.lr, settings.clip, old, stds) == (3e-4, 0, ["gate", "smooth"], {"labels.weight": 2.0})
    for words, variant in (("variant=faithful", "faithful"), ("settings=faithful", "improved")):
        config, settings, *_ = ablate_sdit.parse_arm(words, "digits")
        assert (config.variant, settings.lr, settings.clip, settings.ema) == (variant, 1e-4, 0, 0)
        assert settings.batch_size == TrainSettings.of(PRESETS["digits"]).batch_size
    for words, message in (("nope=1", "'nope'"), ("old=nope", "nope")):
        with pytest.raises(ValueError, match=message):
            ablate_sdit.parse_arm(words, "digits")


@pytest.mark.parametrize("part", ablate_sdit.PARTS)
def test_an_old_part_changes_only_its_own_parameters(part):
    config = PRESETS["digits"]
    torch.manual_seed(0)
    new = SDiT(config).state_dict()
    torch.manual_seed(0)
    old = ablate_sdit.build_model(config, [part], {}).state_dict()
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed and all(ablate_sdit.re.search(ablate_sdit.PARTS[part], name) for name in changed)


def test_a_given_standard_deviation_is_used():
    assert math.isclose(
        ablate_sdit.build_model(PRESETS["digits"], [], {"labels.weight": 0.5}).labels.weight.std().item(), 0.5, rel_tol=0.2
    )


def test_a_run_writes_a_row_and_is_not_repeated(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    words = ["--preset", "digits", "--steps", "2", "--images", "10", "--arm", "batch_size=8 dim=32", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["perf/ablate_sdit.py", *words])
    threads = torch.get_num_threads()
    try:
        ablate_sdit.main()
        (row,) = json.loads(path.read_text())["rows"]
        assert (row["steps"], row["batch_size"], row["config"]["dim"], row["settings"]["seed"]) == (2, 8, 32, 0)
        assert row["neurons"] == 2 * 3 * 32 and 0 <= row["dead_neurons"] <= row["neurons"] and len(row["rates"]) == 6
        assert 0 < row["mse"] < 2 and math.isclose(row["mse"], sum(row["mse_by_time"]) / 8, abs_tol=1e-4)
        assert row["images"] == 10 and 0 <= row["label_found_guidance_1.5"] <= 1
        monkeypatch.setattr(ablate_sdit, "train_arm", None)
        ablate_sdit.main()
    finally:
        torch.set_num_threads(threads)
