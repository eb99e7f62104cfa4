"""Measures of drawn images: exact formulas, invariances, and larger distances of worse images. Also stopped runs."""

import doctest
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from perf import train_classifier
from sdit import PRESETS, SDiT, metrics
from sdit import classifier as judging
from sdit import evaluate as module
from sdit import sample as sampling
from sdit.checkpoint import load_model, save, save_model
from sdit.classifier import Classifier, features, label_accuracy, load_classifier
from sdit.cli import main
from sdit.data import Images, load, to_uint8
from sdit.evaluate import draw, evaluate
from sdit.files import sha256
from sdit.lock import lock
from sdit.metrics import frechet_distance, kid, precision_recall

pytest.importorskip("diffusers", reason="the schedulers come from diffusers")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

seeds = st.integers(0, 2**32 - 1)


def points_with(n, mean, covariance, seed):
    """Return n points with exactly this mean and unbiased covariance."""
    z = np.random.default_rng(seed).normal(size=(n, len(mean)))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(n - 1)
    return z @ np.linalg.cholesky(covariance).T + mean


# Frechet distance


@given(seeds, st.integers(1, 20))
def test_frechet_distance_of_commuting_covariances_has_a_closed_form(seed, d):
    g = np.random.default_rng(seed)
    axes, (a, b), (mean_a, mean_b) = np.linalg.qr(g.normal(size=(d, d)))[0], g.uniform(0.1, 3, (2, d)), g.normal(size=(2, d))
    x, y = (points_with(d + 9 + i, m, axes * v @ axes.T, seed + i) for i, (m, v) in enumerate(((mean_a, a), (mean_b, b))))
    closed = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(x, y) == pytest.approx(closed, rel=1e-10, abs=1e-12)


@given(seeds, st.integers(1, 20))
def test_frechet_distance_equals_a_formula_with_eigenvalues(seed, d):
    g = np.random.default_rng(seed)
    x, y = (g.normal(size=(3 * d + 9, d)) @ g.normal(size=(d, d)) + g.normal(size=d) for _ in range(2))
    a, b = (np.cov(z.T).reshape(d, d) for z in (x, y))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-6 * np.trace(a))


def test_frechet_distance_equals_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    g = np.random.default_rng(0)
    x, y = g.normal(size=(300, 64)) @ g.normal(size=(64, 64)), g.exponential(size=(500, 64))
    a, b = np.cov(x.T), np.cov(y.T)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


@given(seeds, st.integers(1, 12))
def test_frechet_distance_is_symmetric_and_rotation_invariant(seed, d):
    g = np.random.default_rng(seed)
    x, y = g.normal(size=(40, d)), g.uniform(size=(30, d)) * g.uniform(0.1, 2, d)
    found, near = frechet_distance(x, y), {"rel": 1e-9, "abs": 1e-12}
    turn, move = np.linalg.qr(g.normal(size=(d, d)))[0], g.normal(size=d)
    assert frechet_distance(y, x) == pytest.approx(found, **near)
    assert frechet_distance(g.permutation(x), y) == pytest.approx(found, **near)
    assert frechet_distance(x @ turn + move, y @ turn + move) == pytest.approx(found, **near)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * found, **near)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == found
    assert frechet_distance(x, x) < 1e-12 and found > 0


def test_singular_covariances_keep_the_distance_accurate():
    g = np.random.default_rng(0)
    x = g.normal(size=(200, 3)) @ g.normal(size=(3, 50))  # of rank 3
    assert frechet_distance(x, x[::-1]) < 1e-12 * np.square(x).sum()
    assert frechet_distance(x, x + 1) == pytest.approx(50)
    copies = np.ones((100, 50))
    assert frechet_distance(x, copies) == pytest.approx(np.square(x.mean(0) - 1).sum() + x.var(0, ddof=1).sum())


# KID


def test_kid_equals_its_definition():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(9, 3)), g.normal(size=(7, 3)) + 1

    def k(a, b):
        return (sum(i * j for i, j in zip(a, b)) / 3 + 1) ** 3

    def mean(a, b, same):
        return np.mean([k(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)])

    assert metrics._mmd(x, y) == pytest.approx(mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))
    a, b = np.full((4, 3), 0.5), np.full((4, 3), -1.0)
    assert kid(a, b, subsets=2) == (pytest.approx(k(a[0], a[0]) + k(b[0], b[0]) - 2 * k(a[0], b[0])), 0)


def test_kid_is_unbiased_and_its_standard_error_is_right():
    """Draw both sets from one distribution. The mean KID is 0, and the spread of KID equals the standard error it returns."""
    g = np.random.default_rng(0)
    found = np.array([kid(g.normal(size=(60, 4)), g.normal(size=(90, 4)), subsets=5, seed=i) for i in range(200)])
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean()) < 3 * spread / np.sqrt(200)
    # 200 standard errors of 5 values each: about 5 % error
    assert np.sqrt(np.square(found[:, 1]).mean()) == pytest.approx(spread, rel=0.2)
    assert (found[:, 0] < 0).any()


@given(seeds)
def test_kid_is_symmetric_and_rotation_invariant(seed):
    g = np.random.default_rng(seed)
    x, y = g.normal(size=(40, 5)), g.normal(size=(30, 5))
    turn = np.linalg.qr(g.normal(size=(5, 5)))[0]
    assert kid(x @ turn, y @ turn) == pytest.approx(kid(x, y))
    assert kid(x, y) == kid(torch.from_numpy(x), torch.from_numpy(y))
    assert metrics._mmd(x, y) == pytest.approx(metrics._mmd(y, x))


# Precision and recall


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_their_definition(k, monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS", 7)
    g = np.random.default_rng(k)
    a, b = g.normal(size=(40, 3)) + 0.8, g.normal(size=(25, 3))

    def inside(points, centres):
        radii = [sorted(np.linalg.norm(c - other) for other in centres)[k] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points])

    assert precision_recall(a, b, k=k) == (inside(a, b), inside(b, a))
    assert precision_recall(b, a, k=k) == precision_recall(a, b, k=k)[::-1]


def test_precision_and_recall_tell_quality_from_variety():
    real = np.random.default_rng(0).normal(size=(500, 2))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    assert precision_recall(np.repeat(real, 5, 0), real) == (1, 1)  # copies: the balls of a have the radius 0
    precision, recall = precision_recall(real[:20], real[20:], k=1)  # few images
    assert precision > 0.5
    precision, recall = precision_recall(real[real[:, 0] > 0], real)  # half of the kinds
    assert precision == 1 and 0.5 <= recall < 0.6
    precision, recall = precision_recall(np.concatenate([real, real + 100]), real)  # half of the images are wrong
    assert precision == 0.5 and recall == 1


# The measures must rise on worse images of digits. The features come from a classifier trained here.


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Return a classifier of digits with 32 features."""
    data = load("digits")
    torch.manual_seed(0)
    small = Classifier(1, 8, data.names, "digits", (8, 16, 16, 32)).to(memory_format=torch.channels_last)
    train_classifier.train(small, data, epochs=15, shift=0, lr=1e-2, progress=lambda text: None)
    test = load("digits", split="test")
    assert label_accuracy(small, features(small, test.images), test.labels) > 0.9
    return small


@pytest.fixture(scope="module")
def judge_file(judge, tmp_path_factory):
    path = tmp_path_factory.mktemp("judge") / "digits.safetensors"
    train_classifier.save_classifier(path, judge)
    return path


def last_images(n, data=None):
    """Return the last n train images and their labels. evaluate() does not use them for its floor."""
    data = load("digits") if data is None else data
    return data.images[-n:], data.labels[-n:]


def blur(images, weight):
    x = images.permute(0, 3, 1, 2).float()
    soft = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return ((1 - weight) * x + weight * soft).round().to(torch.uint8).permute(0, 2, 3, 1)


def noise(images, deviation):
    g = torch.Generator().manual_seed(0)
    return (images + deviation * torch.randn(images.shape, generator=g)).round().clamp(0, 255).to(torch.uint8)


def shift(images, pixels):
    return torch.nn.functional.pad(images, (0, 0, pixels, 0))[:, :, : images.shape[2]]


def fade(images, share):
    return (images * (1 - share)).round().to(torch.uint8)


WORSE = {
    "noise": (noise, (25, 50, 100)),
    "blur": (blur, (0.4, 0.7, 1.0)),
    "shift": (shift, (1, 2, 3)),
    "fade": (fade, (0.25, 0.5, 0.75)),
}


@pytest.fixture(scope="module")
def distances_of(judge):
    """Return a function from images to their distances from half of the train split."""
    reference = features(judge, load("digits").images[::2])

    def measured(images):
        found = features(judge, images)
        return {"frechet_distance": frechet_distance(found, reference), "kid": kid(found, reference)[0]}

    return measured


@pytest.fixture(scope="module")
def other_half():
    """Return the other half of the train split, shuffled, because images by one writer are next to each other in the file."""
    data, order = load("digits"), torch.randperm(750, generator=torch.Generator().manual_seed(0))
    return Images("digits", data.images[1::2][order], data.labels[1::2][order], data.names)


def is_rising(values):
    return all(a < b for a, b in zip(values, values[1:]))


@pytest.mark.parametrize("how", WORSE)
def test_distances_rise_on_worse_images(distances_of, other_half, how):
    change, amounts = WORSE[how]
    found = [distances_of(other_half.images)] + [distances_of(change(other_half.images, amount)) for amount in amounts]
    for measure in ("frechet_distance", "kid"):
        assert is_rising([one[measure] for one in found]), (measure, found)


def test_distances_rise_when_classes_are_missing(judge, distances_of, other_half):
    """The number of images stays the same. The label accuracy stays high."""
    found = [distances_of(other_half.images[other_half.labels >= lost][:450]) for lost in (0, 1, 4)]
    for measure in ("frechet_distance", "kid"):
        assert is_rising([one[measure] for one in found]), (measure, found)
    kept = other_half.labels >= 4
    assert label_accuracy(judge, features(judge, other_half.images[kept]), other_half.labels[kept]) > 0.95


def test_distances_rise_when_images_are_copies(judge, distances_of, other_half):
    """Each set has 600 images, with ever fewer different images per class."""
    first = [[int((other_half.labels == c).nonzero()[i]) for c in range(10)] for i in range(60)]
    images = [other_half.images[torch.tensor(first[:k] * (60 // k)).flatten()] for k in (60, 10, 1)]
    found = [distances_of(one) for one in (*images, other_half.images[:1].expand(600, -1, -1, -1))]
    for measure in ("frechet_distance", "kid"):
        assert is_rising([one[measure] for one in found]), (measure, found)
    assert label_accuracy(judge, features(judge, images[2]), torch.arange(600) % 10) > 0.95


def test_kid_between_halves_of_a_data_set_is_zero(judge, other_half):
    mean, error = kid(features(judge, load("digits").images[::2]), features(judge, other_half.images))
    assert abs(mean) < 4 * error


def test_label_accuracy_follows_the_labels(judge):
    images, labels = last_images(600)
    right = evaluate(images, labels, judge)["drawn"]
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    wrong = evaluate(images, shuffled, judge)["drawn"]
    assert right["label_accuracy"] > 0.95 and 0.05 < wrong["label_accuracy"] < 0.15
    assert {k: v for k, v in right.items() if "label" not in k} == {k: v for k, v in wrong.items() if "label" not in k}
    by_class = [right["label_accuracy_by_class"][name] * int((labels == i).sum()) for i, name in enumerate(judge.names)]
    assert sum(by_class) / 600 == pytest.approx(right["label_accuracy"])
    some = evaluate(images, torch.where(labels < 5, labels, 10), judge)["drawn"]
    assert some["label_accuracy"] == pytest.approx(sum(by_class[:5]) / int((labels < 5).sum()))
    assert evaluate(images, torch.full((600,), 10), judge)["drawn"]["label_accuracy"] is None


def test_the_floor_uses_train_images_and_the_reference_test_images(judge):
    train, test = load("digits"), load("digits", split="test")
    found = evaluate(*last_images(105), judge)
    assert (found["n"], found["dataset"], found["test"]["n"]) == (105, "digits", 297)
    images = torch.cat([train.images[train.labels == c][: 11 if c < 5 else 10] for c in range(10)])
    floor, reference = features(judge, images), features(judge, test.images)
    assert found["floor"]["frechet_distance"] == pytest.approx(frechet_distance(floor, reference), rel=1e-5)
    assert found["test"]["label_accuracy"] == label_accuracy(judge, reference, test.labels)


def test_features_do_not_depend_on_batch_or_channels(judge):
    images = load("digits").images[:700]
    found = features(judge, images)
    assert found.shape == (700, 32) and found.dtype == torch.float64 and (found >= 0).all()
    torch.testing.assert_close(features(judge, images[650:].numpy()), found[650:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features(judge, images.expand(-1, -1, -1, 3)), found, rtol=1e-5, atol=1e-6)
    x = torch.rand(5, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(judge(x), judge.head(judge.features(x)))
    colour = Classifier(3, 8, ["a", "b"], widths=(4, 4, 4, 4)).eval()
    torch.testing.assert_close(features(colour, images[:5]), features(colour, images[:5].expand(-1, -1, -1, 3)))
    assert features(judge, images[:0]).shape == (0, 32)


def test_wrong_arguments_are_refused(judge):
    x, y = np.random.default_rng(0).normal(size=(2, 50, 8))
    for a, b, error, message in (
        (x[:8], y, ValueError, "a must hold more images than there are features, 8, got 8"),
        (x, y[:5], ValueError, "b must hold more images than there are features, 8, got 5"),
        (x, y[:, :7], ValueError, r"a and b must be \(N, D\) and \(M, D\), got \(50, 8\) and \(50, 7\)"),
        (x[0], y, ValueError, "a and b must be"),
        (x[:0], y, ValueError, "a and b must be"),
        (np.where(x > 2, np.nan, x), y, ValueError, "a must be finite"),
        (x, np.ones((50, 8), int), TypeError, "b must be of a float dtype, got int64"),
    ):
        with pytest.raises(error, match=message):
            frechet_distance(a, b)
    for subsets in (1, 26, 2.0, True):
        with pytest.raises(ValueError, match="subsets must be an int of 2 to half of the smaller set, 25, got"):
            kid(x, y, subsets=subsets)
    for k in (0, 50, 3.0, True):
        with pytest.raises(ValueError, match="k must be an int of 1 to 49, below the smaller set, got"):
            precision_recall(x, y, k=k)
    images, labels = last_images(100)
    for wrong, error, message in (
        (({"images": images.float()}), TypeError, "images must be uint8, got torch.float32"),
        (({"images": images[:, :7]}), ValueError, r"images must be \(N, 8, 8, 1 or 3\), got \(100, 7, 8, 1\)"),
        (({"images": images[:99]}), ValueError, "labels must be one for each of 99 images, got 100"),
        (
            ({"images": images[:32], "labels": labels[:32]}),
            ValueError,
            "n must be at least 33, for a covariance of 32 features, got 32",
        ),
        (({"labels": labels + 2}), ValueError, r"labels must be in 0..10 \(10 for none\), got 2..11"),
        (({"labels": labels.float()}), TypeError, "labels must be ints in one dimension, got torch.float32"),
        (({"root": "."}), ValueError, "leave root"),
    ):
        with pytest.raises(error, match=message):
            evaluate(**({"images": images, "labels": labels, "classifier": judge} | wrong))
    with pytest.raises(ValueError, match="n must be smaller for a floor of as many train images: it takes 200 of 0, dig"):
        evaluate(images.repeat(20, 1, 1, 1), labels.repeat(20), judge)
    with pytest.raises(ValueError, match="the classes of digits must be the classifier's, .*'b'.*, got .*'1'"):
        evaluate(images, labels % 2, Classifier(1, 8, ["a", "b"], "digits", judge.widths))


# The classifier of the package


def test_the_pretrained_classifier_has_the_documented_size():
    classifier = load_classifier()
    assert (classifier.dataset, classifier.channels, classifier.image_size) == ("fashion_mnist", 1, 28)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 98_682
    assert not classifier.training and not any(parameter.requires_grad for parameter in classifier.parameters())
    (row,) = json.loads((ROOT / "perf/results/fashion_mnist_classifier.json").read_text())["rows"]
    assert row["sha256"] == judging.SHA256 == sha256(judging.FASHION_MNIST)
    assert judging.FASHION_MNIST.stat().st_size < 500_000
    page = ROOT / "docs" / "sdit.md"  # docs/ is in the repository only, not in the sdist
    assert (
        not page.exists() or f"classifies {100 * row['test_accuracy']:.1f} % of Fashion-MNIST's test images" in page.read_text()
    )


def test_another_classifier_is_refused(tmp_path, monkeypatch, judge_file):
    content = bytearray(judging.FASHION_MNIST.read_bytes())
    content[-1] ^= 1  # change one bit of a weight: the file stays valid
    path = tmp_path / "fashion_mnist_classifier.safetensors"
    path.write_bytes(content)
    assert load_classifier(path).names[9] == "ankle boot"
    monkeypatch.setattr(judging, "FASHION_MNIST", path)
    with pytest.raises(ValueError, match=f"is not the classifier of this package: its sha256 is {sha256(path)}, not"):
        load_classifier()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="fashion_mnist_classifier"):
        load_classifier()
    path.write_bytes(judge_file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        load_classifier(path)
    save_model(path, SDiT(PRESETS["digits"], dim=32, depth=2))
    with pytest.raises(ValueError, match="holds no classifier of perf/train_classifier.py"):
        load_classifier(path)
    save(path, {"classifier": {"w": torch.ones(1)}}, {"classifier": {"channels": 1, "image_size": 8, "names": ["a"]}})
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(path)


def test_the_pretrained_classifier_ranks_fashion_mnist():
    """The accuracy equals the recorded one, and distances rise on worse images."""
    folder = "/usr/share/datasets/fashion-mnist"
    if not os.path.isdir(folder):
        pytest.skip(f"no {folder}: Debian's package dataset-fashion-mnist is not installed")
    train, test = load("fashion_mnist", folder), load("fashion_mnist", folder, split="test")
    classifier = load_classifier()
    (row,) = json.loads((ROOT / "perf/results/fashion_mnist_classifier.json").read_text())["rows"]
    reference = features(classifier, test.images[:2000])
    found = label_accuracy(classifier, reference, test.labels[:2000])
    # 2,000 images have a standard error of 0.006
    assert row["test_accuracy"] > 0.91 and abs(found - row["test_accuracy"]) < 0.02
    images = train.images[-1000:]
    for change, amounts in ((noise, (10, 30, 90)), (blur, (0.3, 0.6, 1.0)), (shift, (1, 2, 4)), (fade, (0.2, 0.4, 0.6))):
        sets = [features(classifier, images)] + [features(classifier, change(images, amount)) for amount in amounts]
        for measure in (frechet_distance, lambda a, b: kid(a, b)[0]):
            values = [measure(one, reference) for one in sets]
            assert values == sorted(values), (change, values)
    kept = train.images[train.labels != 8][-1000:]
    assert frechet_distance(features(classifier, kept), reference) > 3 * frechet_distance(sets[0], reference)


# Drawing, stopping and resuming


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_model(path, SDiT(PRESETS["digits"], dim=32, depth=2))
    return path


FAST = {"sampler": "ddim", "steps": 2, "batch_size": 16}


@pytest.fixture
def drawn_batches(monkeypatch):
    """Return the (first, number of images) of each batch of ``sample_batches``, and that function, which stops at ``stop``."""
    calls, sample_batches = [], sampling.sample_batches

    def counted(*args, **settings):
        for start, images in sample_batches(*args, **settings):
            calls.append((start, len(images)))
            if len(calls) == counted.stop:
                raise KeyboardInterrupt
            yield start, images

    counted.stop = None
    monkeypatch.setattr(sampling, "sample_batches", counted)
    return calls, counted


def test_drawn_images_equal_those_of_sample(tiny, tmp_path, capsys):
    images, labels, facts = draw(tiny, 40, folder=tmp_path, seed=3, guidance=1.5, **FAST)
    assert images.shape == (40, 8, 8, 1) and images.dtype == torch.uint8 and labels.tolist() == [i % 10 for i in range(40)]
    expected = sampling.sample(load_model(tiny), labels, sampler="ddim", steps=2, seed=3, guidance=1.5, batch_size=16)
    assert torch.equal(images, to_uint8(expected).permute(0, 2, 3, 1))
    assert facts["checkpoint_sha256"] == sha256(tiny) and (facts["steps"], facts["seed"]) == (2, 3)
    assert "40/40" in capsys.readouterr().err


def test_a_stopped_run_draws_the_missing_images_only(tiny, tmp_path, drawn_batches):
    calls, sample = drawn_batches
    whole = draw(tiny, 50, folder=tmp_path / "whole", **FAST)
    assert calls == [(0, 16), (16, 16), (32, 16), (48, 2)]
    calls.clear()
    sample.stop = 3
    with pytest.raises(KeyboardInterrupt, match="stopped after 32 of 50 images"):
        draw(tiny, 50, folder=tmp_path / "part", **FAST)
    calls.clear()
    sample.stop = None
    part = draw(tiny, 50, folder=tmp_path / "part", **FAST)
    assert calls == [(32, 16), (48, 2)]
    assert torch.equal(part[0], whole[0]) and torch.equal(part[1], whole[1]) and part[2] == whole[2]
    calls.clear()
    fewer, more = draw(tiny, 33, folder=tmp_path / "part", **FAST), draw(tiny, 64, folder=tmp_path / "part", **FAST)
    assert calls == [(48, 16)]  # the incomplete batch is drawn again, so that rounding is the same as in a whole batch
    assert torch.equal(fewer[0], whole[0][:33]) and torch.equal(more[0][:48], whole[0][:48])


def test_damaged_files_are_drawn_again(tiny, tmp_path, drawn_batches):
    calls, _ = drawn_batches
    whole = draw(tiny, 64, folder=tmp_path, **FAST)[0]
    (folder,) = tmp_path.iterdir()
    (folder / "0000000.npz").write_bytes((folder / "0000000.npz").read_bytes()[:100])
    (folder / "0000016.npz").write_bytes(b"")
    np.savez(folder / "0000032.npz", images=np.zeros((16, 8, 8, 1), np.uint8), labels=np.zeros(16, int))
    content = bytearray((folder / "0000048.npz").read_bytes())
    content[300] ^= 255
    (folder / "0000048.npz").write_bytes(content)
    calls.clear()
    assert torch.equal(draw(tiny, 64, folder=tmp_path, **FAST)[0], whole)
    assert calls == [(0, 16), (16, 16), (32, 16), (48, 16)]


def test_saved_images_are_separate_for_every_setting(tiny, tmp_path, drawn_batches):
    calls, _ = drawn_batches
    other_half = tmp_path / "other.safetensors"
    save_model(other_half, SDiT(PRESETS["digits"], dim=32, depth=2))
    same = tmp_path / "same.safetensors"
    shutil.copy(tiny, same)
    variants = (
        {"seed": 1},
        {"guidance": 2.0},
        {"guidance": 2.0, "guidance_interval": (0, 9)},
        {"steps": 4},
        {"clip": True},
        {"sampler": "dpm++"},
        {"threshold": 0.5},
    )
    for i, change in enumerate(({}, *variants, {"batch_size": 8}, {"bf16": True}, {"ema": False}), start=1):
        draw(tiny, 8, folder=tmp_path / "kept", **(FAST | change))
        assert len(calls) == i, change
    draw(other_half, 8, folder=tmp_path / "kept", **FAST)
    assert len(calls) == i + 1
    draw(same, 8, folder=tmp_path / "kept", **FAST)
    assert len(calls) == i + 1


DYING = """
import os, signal, sys
from sdit.cli import main
replace, files = os.replace, []
def dying(source, target):
    files.extend(name for name in [str(target)] if name.endswith(".npz"))
    os.kill(os.getpid(), signal.SIGKILL) if len(files) == 3 else replace(source, target)
os.replace = dying
main(sys.argv[1:])
"""


def test_a_killed_run_draws_the_missing_images_only(tiny, judge_file, tmp_path, drawn_batches):
    """kill -9 while a batch is written. The images equal the images of an uninterrupted run."""
    words = [
        "evaluate",
        tiny,
        "--classifier",
        judge_file,
        "-n",
        "50",
        "--sampler",
        "ddim",
        "--steps",
        "2",
        "--batch-size",
        "16",
    ]
    process = subprocess.run([sys.executable, "-c", DYING, *words], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    calls, _ = drawn_batches
    images, labels, _ = draw(tiny, 50, **FAST)
    assert calls == [(32, 16), (48, 2)]
    assert torch.equal(images, draw(tiny, 50, folder=tmp_path / "whole", **FAST)[0])


# The command


def test_the_command_prints_and_writes_the_measures(tiny, judge_file, tmp_path, capsys):
    command = ["evaluate", str(tiny), "--classifier", str(judge_file), "-n", "60", "--sampler", "dpm++", "--steps", "3"]
    assert main([*command, "--npz", str(tmp_path / "out/a.npz"), "--json", str(tmp_path / "out/a.json")]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "out/a.json").read_text())
    with np.load(tmp_path / "out/a.npz") as file:
        images, labels = file["images"], file["labels"]
    measured = evaluate(images, labels, load_classifier(judge_file))
    assert {key: found[key] for key in measured} == measured and found["n"] == len(images) == 60
    assert found["classifier_sha256"] == sha256(judge_file) and found["images"]["checkpoint_sha256"] == sha256(tiny)
    assert (found["images"]["sampler"], found["images"]["steps"], found["torch"]) == ("dpm++", 3, torch.__version__)
    for part in (
        "Frechet distance",
        "KID x 1000",
        f"{found['drawn']['precision']:.3f}",
        f"{found['floor']['recall']:.3f}",
        "60 drawn images",
        "floor: 60 train images",
        "297 test images",
        "by class: 0 ",
    ):
        assert part in text
    assert f"{found['drawn']['frechet_distance']:.4f}" in text and f"{found['floor']['frechet_distance']:.4f}" in text
    assert "FID" not in text + json.dumps(found)

    command = ["evaluate", str(tmp_path / "out/a.npz"), "--classifier", str(judge_file)]
    assert main([*command, "--json", str(tmp_path / "b.json")]) == 0
    again = json.loads((tmp_path / "b.json").read_text())
    assert {key: again[key] for key in measured} == measured
    assert again["images"] == {"images": "a.npz", "images_sha256": sha256(tmp_path / "out/a.npz")}
    assert main([*command, "-n", "50"]) == 0 and "50 drawn images" in capsys.readouterr().out


def test_two_processes_do_not_write_the_same_file(tiny, judge_file, tmp_path, capsys):
    """Neither the saved images nor the JSON file."""
    images, _, _ = draw(tiny, 64, **FAST)
    (folder,) = (tmp_path / "cache/sdit/evaluate").iterdir()
    with lock(folder / "lock", "it", "wait"), pytest.raises(BlockingIOError, match="where these images are kept, is in use by"):
        draw(tiny, 64, **FAST)
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=np.arange(64) % 10)
    command = ["evaluate", str(tmp_path / "a.npz"), "--classifier", str(judge_file), "--json"]
    with lock(tmp_path / ".a.json.lock", "it", "wait"):
        assert main([*command, str(tmp_path / "a.json")]) == 2
        assert "a.json is in use by process" in (err := capsys.readouterr().err) and "choose another --json" in err
        assert main([*command, str(tmp_path / "b.json")]) == 0
    assert not list(tmp_path.rglob("*lock")) and not (tmp_path / "a.json").exists()


def test_a_full_disk_names_the_file_and_keeps_the_images(tiny, judge_file, tmp_path, capsys, monkeypatch):
    """The results are printed before the error, and another call does not draw the images again."""
    resource = pytest.importorskip("resource")
    limit, measure = resource.getrlimit(resource.RLIMIT_FSIZE), module.evaluate

    def fills(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        return measure(*args)

    monkeypatch.setattr(module, "evaluate", fills)
    command = ["evaluate", str(tiny), "--classifier", str(judge_file), "-n", "60", "--sampler", "ddim", "--steps", "2"]
    try:
        assert main([*command, "--json", str(tmp_path / "a.json")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    found = capsys.readouterr()
    said = f"{tmp_path}/a.json: File too large; free some space, then the same command writes it, "
    said += "without drawing the images again"
    assert found.err.splitlines()[-1] == f"sdit evaluate: error: {said}" and "60 drawn images" in found.out
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        assert main([*command, "--seed", "1"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    err = capsys.readouterr().err.splitlines()[-1]
    assert "folder (XDG_CACHE_HOME moves it): no file of" in err and str(tmp_path / "cache") in err


def test_sample_and_evaluate_draw_the_same_images(tiny, judge_file, tmp_path):
    same = ["--sampler", "ddim", "--steps", "4", "--seed", "7", "-n", "40", "--guidance", "2"]
    assert main(["sample", str(tiny), "--out", str(tmp_path / "a.png"), "--npz", "--no-gif", *same]) == 0
    assert main(["evaluate", str(tiny), "--classifier", str(judge_file), "--npz", str(tmp_path / "b.npz"), *same]) == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert (a["images"] == b["images"]).all() and (a["labels"] == b["labels"]).all()


def test_wrong_arguments_of_the_command_give_one_error_line(tiny, judge_file, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=np.zeros((150, 8, 8, 1), np.uint8), labels=np.arange(150) % 10)
    np.savez(tmp_path / "b.npz", pictures=np.zeros((50, 8, 8, 1), np.uint8))
    (tmp_path / "c.npz").write_text("no array")
    np.save(tmp_path / "d.npy", np.zeros(3))
    (tmp_path / "e.npz").write_bytes(b"PK")
    fashion, big, three, none = (tmp_path / f"{name}.safetensors" for name in ("fashion", "big", "three", "none"))
    for path, changes in (
        (fashion, {"dataset": "mnist"}),
        (big, {"image_size": 16}),
        (three, {"num_classes": 3}),
        (none, {"dataset": None}),
    ):
        save_model(path, SDiT(PRESETS["digits"], dim=32, depth=2, **changes))
    judged = ["--classifier", str(judge_file)]
    for words, message in (
        ([tiny, *judged, "--images", tmp_path], ": --images must be an empty or new folder, "),
        ([tiny], "the model draws images of digits, the classifier is for fashion_mnist: give --classifier FILE, which "
                 "perf/train_classifier.py --dataset digits --size 8 --out FILE trains"),
        ([fashion, *judged], "the model draws images of mnist, the classifier is for digits"),
        ([big, *judged], "images of 16 pixels a side, the classifier is for 8: give --classifier FILE, which "
                         "perf/train_classifier.py --dataset digits --size 16"),
        ([three, *judged], "the model has 3 classes, the classifier 10"),
        ([none, *judged], "does not say which data set"),
        ([tiny, *judged, "-n", "32"], ": -n must be at least 33"),
        ([tiny, *judged, "-n", "-1"], ": -n must be at least 33"),
        ([tiny, *judged, "-n", "9999"], ": -n must be smaller for a floor"),
        ([tiny, *judged, "--steps", "0", "--sampler", "ddim"], ": --steps of ddim must be in 2..1000, got 0"),
        ([tiny, *judged, "--sampler", "euler"], ": --sampler must be one of"),
        ([tiny, *judged, "--guidance", "nan"], ": --guidance must be"),
        ([tiny, *judged, "--seed", "-1"], ": --seed must be an int of at least 0, got -1"),
        ([tiny, *judged, "--batch-size", "0"], ": --batch-size must be an int of at least 1, got 0"),
        ([tiny, *judged, "--threshold", "-1"], ": --threshold must be a positive number"),
        ([tiny, *judged, "--device", "tpu9"], ": --device 'tpu9' cannot be used"),
        ([tiny, *judged, "--data", tmp_path], ": digits come with scikit-learn, not from a folder: leave --data out"),
        ([tiny, *judged, "--json", tmp_path], ": --json must be a file"),
        ([tiny, *judged, "--npz", tiny / "a.npz"], "tiny.safetensors"),
        ([tmp_path / "nope"], "does not exist"),
        ([tmp_path / "nope.npz", *judged], "nope.npz"),
        ([tmp_path / "a.npz", *judged, "--seed", "1", "--clip"], "exist already: --seed, --clip cannot be combined"),
        ([tmp_path / "a.npz", *judged, "--npz", tmp_path / "x.npz"], "--npz cannot be combined with it"),
        ([tmp_path / "a.npz", *judged, "--images", tmp_path / "x"], "--images cannot be combined with it"),
        ([tmp_path / "a.npz", *judged, "-n", "151"], ": -n must be 1 to 150, as many as"),
        ([tmp_path / "a.npz"], r"images must be (N, 28, 28, 1 or 3), got (150, 8, 8, 1)"),
        ([tmp_path / "b.npz", *judged], "must hold the arrays images and labels"),
        ([tmp_path / "c.npz", *judged], "must hold the arrays images and labels"),
        ([tmp_path / "d.npy", *judged], "is not a checkpoint of sdit"),
        ([tmp_path / "e.npz", *judged], "it is not an npz file, but 2 bytes of something else"),
        ([tiny, "--classifier", tiny], "holds no classifier"),
    ):  # fmt: skip
        assert main(["evaluate", *map(str, words)]) == 2, words
        err = capsys.readouterr().err
        assert err.splitlines()[-1].startswith("sdit evaluate: error: ") and message in err, (words, err)
    assert not (tmp_path / "cache").exists()  # no image was drawn


def test_training_a_classifier_is_reproducible(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    try:
        for name in "ab":
            words = [
                "--dataset",
                "digits",
                "--size",
                "6",
                "--epochs",
                "1",
                "--shift",
                "1",
                "--json",
                str(tmp_path / "row.json"),
            ]
            monkeypatch.setattr(sys, "argv", ["perf/train_classifier.py", *words, "--out", str(tmp_path / name)])
            train_classifier.main()
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (row,) = json.loads((tmp_path / "row.json").read_text())["rows"]
    classifier = load_classifier(tmp_path / "a")
    test = load("digits", split="test", size=6)
    assert (classifier.dataset, classifier.image_size, classifier.names) == ("digits", 6, tuple("0123456789"))
    assert row["test_accuracy"] == pytest.approx(
        label_accuracy(classifier, features(classifier, test.images), test.labels), abs=1e-5
    )
    assert row["sha256"] == sha256(tmp_path / "a") and row["parameters"] == 98_682


def test_images_are_mirrored_only_where_the_data_set_allows(monkeypatch):
    half = Images("halves", torch.zeros(128, 8, 8, 1, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64), ("a", "b"))
    half.images[:, :, 4:] = 255
    for mirror in (False, True):
        net = Classifier(1, 8, half.names, widths=(4, 4, 4, 4))
        seen = []
        net.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][:, 0, 0, 0] > 0))
        one = Images("halves", half.images, half.labels, half.names, mirror)
        train_classifier.train(net, one, epochs=1, shift=0, lr=1e-3, progress=lambda text: None)
        assert bool(torch.cat(seen).any()) is mirror


def test_docstring_examples_run():
    found = [doctest.testmod(each) for each in (module, judging, metrics)]
    assert sum(each.attempted for each in found) > 10 and not any(each.failed for each in found)
