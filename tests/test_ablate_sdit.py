"""perf/ablate_sdit.py: the words of an arm change the model as they say, and a run writes one row of results."""

import dataclasses
import json
import math
import sys

import pytest
import torch

from perf import ablate_sdit
from sdit import PRESETS, SDiT
from sdit.settings import TrainSettings


def test_an_arm_changes_the_named_settings():
    config, settings, patches = ablate_sdit.parse_arm(
        "dim=32 learn_sigma=false lr=3e-4 clip=0 old=gate,smooth std.labels.weight=2", "digits"
    )
    assert (config.dim, config.learn_sigma, config.T) == (32, False, PRESETS["digits"].T)
    assert (settings.lr, settings.clip) == (3e-4, 0)
    assert patches == (("gate", "smooth"), {"labels.weight": 2.0}, (), None, None)
    for words, variant in (("variant=faithful", "faithful"), ("settings=faithful", "improved")):
        config, settings, *_ = ablate_sdit.parse_arm(words, "digits")
        assert (config.variant, settings.lr, settings.clip, settings.ema) == (variant, 1e-4, 0, 0)
        assert settings.batch_size == TrainSettings.of(PRESETS["digits"]).batch_size
    *_, patches = ablate_sdit.parse_arm("averages=0,0.9 times=logit_normal:-1 norm=keys", "fashion_pure")
    assert patches == ((), {}, (0, 0.9), ("logit_normal", -1), "keys")
    for words, message in (
        ("nope=1", "'nope'"),
        ("old=nope", "nope"),
        ("times=nope:1", "nope"),
        ("times=power", "times must be 'uniform' or 'logit_normal'"),
        ("norm=nope", "nope"),
        ("norm=keys", 'spiking="pure"'),
    ):
        with pytest.raises(ValueError, match=message):
            ablate_sdit.parse_arm(words, "digits")


@pytest.mark.parametrize("part", ablate_sdit.PARTS)
def test_an_old_part_changes_only_its_own_parameters(part):
    config = PRESETS["digits"]
    torch.manual_seed(0)
    new = SDiT(config).state_dict()
    torch.manual_seed(0)
    old = ablate_sdit.build_model(config, ablate_sdit.Patches(old=(part,))).state_dict()
    changed = {name for name in new if not torch.equal(new[name], old[name])}
    assert changed and all(ablate_sdit.re.search(ablate_sdit.PARTS[part], name) for name in changed)


def test_a_given_standard_deviation_is_used():
    model = ablate_sdit.build_model(PRESETS["digits"], ablate_sdit.Patches(deviations={"labels.weight": 0.5}))
    assert math.isclose(model.labels.weight.std().item(), 0.5, rel_tol=0.2)


@pytest.mark.parametrize("norm", ablate_sdit.NORMS)
def test_normed_keys_have_a_mean_square_of_1(norm):
    config = dataclasses.replace(PRESETS["fashion_pure"], dim=32, depth=2)
    torch.manual_seed(0)
    before = SDiT(config).state_dict()
    torch.manual_seed(0)
    model = ablate_sdit.build_model(config, ablate_sdit.Patches(norm=norm))
    after = model.state_dict()
    assert {name for name in after if name not in before} == {name for name in after if name.endswith("key.factor")}
    assert any(name.endswith("key.factor") for name in after) == (norm == "keys_learnt")
    assert all(torch.equal(after[name], before[name]) for name in before)
    found = []
    for module in model.modules():
        if isinstance(module, ablate_sdit.NormedKeys):
            module.register_forward_hook(lambda _, __, k: found.append(k.square().mean(-1)))
    model(torch.randn(2, 1, 28, 28), torch.tensor([3, 999]), torch.tensor([0, 1]))
    assert len(found) == 3 and all(torch.allclose(each, torch.ones_like(each), atol=1e-3) for each in found)


def test_times_have_the_named_distribution_and_the_rest_stays_the_same():
    def drawn(words):
        config, _, patches = ablate_sdit.parse_arm(words, "digits")
        return ablate_sdit.draw_at(patches.times, config, 4000, torch.Generator().manual_seed(0))

    t, noise, drop = drawn("")
    assert torch.equal(drawn("times=logit_normal")[0], drawn("times=logit_normal:-1")[0])
    for words, below in (("times=power:1.5", 0.25 ** (2 / 3)), ("times=logit_normal:-1", 0.4608)):  # P(t < 250)
        changed, same_noise, same_drop = drawn(words)
        assert torch.equal(noise, same_noise) and torch.equal(drop, same_drop)
        assert changed.dtype == t.dtype and changed.min() >= 0 and changed.max() <= 999
        assert math.isclose((changed < 250).double().mean().item(), below, abs_tol=0.03)
        assert (changed[t.argsort()].diff() >= 0).all()


def test_each_average_equals_the_average_of_a_run_with_that_decay():
    def trained(words):
        return ablate_sdit.train_arm(*ablate_sdit.parse_arm(f"dim=32 batch_size=4 steps=12 warmup=0 {words}", "digits"))[0]

    together = trained("ema=0.5 averages=0,0.3,0.9")
    assert list(together) == [0.5, 0, 0.3, 0.9]
    for decay, model in together.items():
        (alone,) = trained(f"ema={decay}").values()
        for a, b in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


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
