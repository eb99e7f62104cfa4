"""Sampling: how images depend on the seed, guidance, thresholds, and the files that are written."""

import copy
import doctest
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sdit import PRESETS, SDiT, pictures
from sdit import sample as module
from sdit.checkpoint import load_model, save, save_model
from sdit.data import from_uint8, to_uint8
from sdit.lock import lock
from sdit.pictures import Film, save_gif, save_grid, save_npz
from sdit.sample import choose_labels, sample
from sdit.sampler import SAMPLERS, make_scheduler, reverse_step
from sdit_kernels import backend

pytest.importorskip("diffusers", reason="the schedulers come from diffusers")
Image = pytest.importorskip("PIL.Image", reason="files are written with pillow")


class Pointwise(nn.Module):
    """A model that treats each pixel separately and never sums, so its images do not depend on the batch in any bit."""

    def __init__(self, channels=1, size=4, learn_sigma=True, **changes):
        super().__init__()
        self.config = SimpleNamespace(
            **dict(channels=channels, image_size=size, num_classes=3, learn_sigma=learn_sigma, dropout_label=0.1)
            | dict(prediction="epsilon", spiking="rate")
            | changes
        )
        self.weight = nn.Parameter(torch.tensor([0.3, 0.7]))
        self.seen, self.is_frozen, self.frozen_runs = [], False, 0

    @contextmanager
    def frozen(self):
        self.is_frozen, self.frozen_runs = True, self.frozen_runs + 1
        yield self
        self.is_frozen = False

    def forward(self, x, t, y):
        assert self.is_frozen and not self.training and not torch.is_grad_enabled()
        self.seen.append((x.shape, t.tolist(), y.tolist()))
        eps = x * self.weight[0] + (y.view(-1, 1, 1, 1) - 1) * self.weight[1] * 0.1 + t.view(-1, 1, 1, 1) * 1e-4
        return torch.cat([eps, x.clamp(-1, 1)], 1) if self.config.learn_sigma else eps


def fields_for(sampler):
    """Return settings of a model that fits the sampler."""
    return dict(prediction="flow", learn_sigma=False) if sampler in ("euler", "heun") else {}


@pytest.mark.parametrize(
    "sampler, changes",
    [(s, fields_for(s)) for s in SAMPLERS] + [(s, dict(learn_sigma=False)) for s in SAMPLERS if not fields_for(s)],
)
def test_an_image_depends_only_on_its_seed_number_and_label(sampler, changes):
    model = Pointwise(channels=3, size=6, **changes)
    labels = [0, 1, 2, 0, 3]
    settings = {"sampler": sampler, "steps": 10}
    images = sample(model, labels, seed=5, **settings)
    assert images.shape == (5, 3, 6, 6) and images.dtype == torch.float32 and images.abs().max() <= 1
    for batch_size in (1, 2, 3):
        assert torch.equal(sample(model, labels, seed=5, batch_size=batch_size, **settings), images)
    assert torch.equal(sample(model, labels[:2], seed=5, **settings), images[:2])
    assert torch.equal(sample(model, labels[2:], seed=5, first=2, **settings), images[2:])
    state = torch.get_rng_state()
    other = sample(model, labels, seed=6, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(other, images) and not torch.equal(images[0], images[3])
    relabelled = sample(model, [0, 1, 1, 0, 3], seed=5, **settings)
    assert torch.equal(relabelled[[0, 1, 3, 4]], images[[0, 1, 3, 4]]) and not torch.equal(relabelled[2], images[2])


def test_images_equal_the_schedulers_chain():
    model = Pointwise()
    images = sample(model, [2], sampler="ddpm", steps=7, seed=1)
    generator = module._make_generator(1, 0)
    x = torch.randn(1, 1, 4, 4, generator=generator)
    scheduler = make_scheduler("ddpm", 7, model.config)
    model.eval()
    with torch.no_grad(), model.frozen():
        for t in scheduler.timesteps.tolist():
            x = reverse_step(scheduler, model(x, torch.tensor([t]), torch.tensor([2])), t, x, generator)
    assert torch.equal(images, x.clamp(-1, 1))


def test_sample_uses_the_default_steps_and_freezes_the_model_once():
    for sampler, steps in SAMPLERS.items():
        model = Pointwise(**fields_for(sampler)).train()
        sample(model, [0, 1, 2], sampler=sampler, batch_size=2)
        calls = 2 * steps - 1 if sampler == "heun" else steps
        assert len(model.seen) == 2 * calls and model.frozen_runs == 1 and model.training and not model.is_frozen
        assert [t for _, (t, *_), _ in model.seen[:calls]] == make_scheduler(sampler, steps, model.config).timesteps.tolist()
    images = sample(model, [0, 1])
    assert torch.equal(images, sample(model, [0, 1], sampler="euler"))
    assert torch.equal(sample(Pointwise(), [0]), sample(Pointwise(), [0], sampler="dpm++"))


def test_guidance_doubles_the_batch_and_changes_images():
    model = Pointwise()
    plain = sample(model, [0, 2], steps=5)
    assert all(shape[0] == 2 for shape, *_ in model.seen)
    model.seen.clear()
    guided = sample(model, [0, 2], steps=5, guidance=3.0)
    assert all(shape[0] == 4 and y == [0, 2, 3, 3] for shape, _, y in model.seen) and not torch.equal(guided, plain)
    assert torch.equal(
        sample(model, [3, 3], steps=5, sampler="ddim", guidance=3.0), sample(model, [3, 3], steps=5, sampler="ddim")
    )


def test_guidance_applies_in_its_interval_only():
    model, guided = Pointwise(), dict(sampler="ddim", steps=5, guidance=3.0)
    sample(model, [0, 2], guidance_interval=(200, 600), **guided)
    assert [(t[0], len(t)) for _, t, _ in model.seen] == [(800, 2), (600, 4), (400, 4), (200, 4), (0, 2)]
    inside = sample(model, [0, 2], guidance_interval=[0, 1000], **guided)
    assert torch.equal(inside, sample(model, [0, 2], **guided))
    outside = sample(model, [0, 2], guidance_interval=(801, 999), **guided)
    assert torch.equal(outside, sample(model, [0, 2], sampler="ddim", steps=5)) and not torch.equal(outside, inside)


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm", "ddim"])
def test_the_predicted_noise_is_scaled_in_every_step(sampler):
    class Scaled(Pointwise):  # its prediction is the noise
        def forward(self, x, t, y):
            out = super().forward(x, t, y)
            return torch.cat([1.125 * out[:, :1], out[:, 1:]], 1)

    how = dict(sampler=sampler, steps=5, seed=3)
    found = sample(Pointwise(), [0, 2], noise_scale=1.125, **how)
    assert torch.equal(found, sample(Scaled(), [0, 2], **how)) and not torch.equal(found, sample(Pointwise(), [0, 2], **how))


def test_clip_limits_every_prediction():
    class Far(Pointwise):
        def forward(self, x, t, y):
            return torch.cat([x - 2, x], 1) if self.config.learn_sigma else x - 2

    for sampler in SAMPLERS:
        for clip in (True, False):
            states = []
            model, keep = Far(**fields_for(sampler)), states.append
            sample(model, [0], sampler=sampler, steps=20, clip=clip, callback=lambda *given, keep=keep: keep(given[3]))
            assert (states[-1].abs().max() <= 1 + 1e-6) == clip


def test_the_threshold_is_set_only_while_sampling():
    class Spiking(Pointwise):
        def __init__(self):
            super().__init__()
            self.neuron = nn.Identity()
            self.neuron.v_threshold, self.seen_thresholds = 1.0, set()

        def forward(self, x, t, y):
            self.seen_thresholds.add(self.neuron.v_threshold)
            return super().forward(x, t, y)

    model = Spiking()
    sample(model, [0], steps=2)
    sample(model, [0], steps=2, threshold=0.9)
    assert model.seen_thresholds == {1.0, 0.9} and model.neuron.v_threshold == 1.0
    for wrong in (0, -1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ValueError, match="threshold must be a positive number, got"):
            sample(model, [0], steps=2, threshold=wrong)


def test_weights_may_have_other_dtypes():
    labels = [0, 1, 2]
    reference = sample(Pointwise().double(), labels, steps=10)
    assert (sample(Pointwise(), labels, steps=10) - reference).abs().max() < 1e-4
    assert (sample(Pointwise().bfloat16(), labels, steps=10) - reference).abs().max() < 0.1


def test_callbacks_see_every_state():
    calls = []
    sample(Pointwise(), [0, 1, 2], steps=4, batch_size=2, callback=lambda *a: calls.append((*a[:3], a[3].shape[0])))
    assert calls == [(0, k, 4, 2) for k in range(5)] + [(2, k, 4, 1) for k in range(5)]


def test_progress_shows_images_per_second(capfd):
    sample(Pointwise(), [0, 1, 2], steps=4, progress=True)
    err = capfd.readouterr().err
    assert "3/3" in err and "images/s" in err
    sample(Pointwise(), [0], steps=4)
    assert capfd.readouterr().err == ""


def test_values_that_are_not_finite_raise_an_error():
    class Broken(Pointwise):
        def forward(self, x, t, y):
            return torch.cat([x, x], 1) * float("nan")

    model = Broken().train()
    with pytest.raises(ValueError, match=r"not finite \(guidance 1, noise scale 1\): images 0\.\.1 are lost"):
        sample(model, [0, 1], steps=3)
    assert model.training


@pytest.mark.parametrize(
    "labels, settings, error, message",
    [
        ([0, 4], {}, ValueError, r"labels must be in 0\.\.3 \(3 for no class\), got 0\.\.4"),
        ([-1], {}, ValueError, "labels must be in"),
        ([], {}, ValueError, "labels must name at least one image, got none"),
        ([0.5], {}, TypeError, "labels must be ints in one dimension, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.long), {}, TypeError, r"labels must be ints in one dimension.*\(2, 2\)"),
        ([0], {"seed": -1}, ValueError, "seed must be an int of at least 0, got -1"),
        ([0], {"seed": 1.5}, ValueError, "seed must be an int"),
        ([0], {"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, got 0"),
        ([0], {"sampler": "euler"}, ValueError, "sampler must be one of"),
        ([0], {"steps": 0}, ValueError, r"steps of dpm\+\+"),
        ([0], {"guidance": float("inf")}, ValueError, "guidance must be a finite number"),
        *(
            (
                [0],
                {"guidance": 2.0, "guidance_interval": wrong},
                ValueError,
                "guidance_interval must be two times, 0 <= low <= high <= 1000, or",
            )
            for wrong in ((600, 200), (-1, 5), (0, 1001), (0, float("nan")), (1, 2, 3), (True, 5), 5, "ab")
        ),
        ("12", {}, TypeError, "labels must be ints in a sequence or tensor, got '12'"),
        (["1"], {}, TypeError, r"labels must be ints in a sequence or tensor, got \['1'\]"),
        ([0], {"clip": 2}, TypeError, "clip must be true or false, got 2"),
        ([0], {"noise_scale": 0.0}, ValueError, "noise_scale must be a positive number, got 0.0"),
        ([0], {"guidance_interval": (0, 9)}, ValueError, r"guidance_interval needs a guidance other than 1, got \(0, 9\)"),
    ],
)
def test_wrong_arguments_are_named(labels, settings, error, message):
    with pytest.raises(error, match=message):
        sample(Pointwise(), labels, **settings)


# With the real network


@pytest.fixture(scope="module")
def network():
    """A small SDiT whose neurons fire and whose weights are far from their initial zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SDiT(PRESETS["digits"], dim=32, depth=2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_batch_sizes_change_no_more_than_rounding(network, guidance):
    network = copy.deepcopy(network).double()  # in float32, rounding may change a spike
    labels = [3, 1, 4, 1, 5]
    settings = dict(sampler="ddim", steps=10, guidance=guidance, clip=True)
    images = sample(network, labels, **settings)
    assert torch.equal(sample(network, labels, **settings), images)
    for batch_size in (1, 2):
        torch.testing.assert_close(sample(network, labels, batch_size=batch_size, **settings), images, rtol=0, atol=1e-3)
    with backend("reference"):
        torch.testing.assert_close(sample(network, labels, **settings), images, rtol=0, atol=1e-3)


def test_the_threshold_reaches_every_neuron(network):
    trained = network.config.v_threshold
    half = trained / 2
    images = {}
    rates = {}
    for threshold in (None, half, 1e9):
        with network.record() as recorded:
            images[threshold] = sample(network, [0, 1], sampler="ddim", steps=5, threshold=threshold)
        rates[threshold] = torch.stack(list(recorded.values()))
    assert (rates[1e9] == 0).all() and rates[half].mean() > rates[None].mean() > 0
    assert not torch.equal(images[None], images[half])
    assert {m.v_threshold for m in network.modules() if hasattr(m, "v_threshold")} == {trained}


def test_sample_runs_under_the_callers_autocast(network):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = sample(network, [0, 1], sampler="ddim", steps=5, clip=True)
    assert images.dtype == torch.float32 and images.isfinite().all()


# Labels


def test_labels_are_read_as_users_type_them():
    names = ("cat", "dog", "10")
    assert choose_labels("all", None, names).bincount().tolist() == [14, 13, 13]
    assert choose_labels("all", 3, names).tolist() == [0, 1, 2]
    assert choose_labels("dog", 2, names).tolist() == [1, 1]
    assert choose_labels("0,dog , 10,none", None, names).tolist() == [0, 1, 2, 3]
    drawn = choose_labels("random", 300, names, seed=3)
    assert torch.equal(drawn, choose_labels("random", 300, names, seed=3)) and drawn.bincount().min() > 70
    assert torch.equal(drawn[:5], choose_labels("random", 5, names, seed=3)) and len(choose_labels("random", None, names)) == 40
    assert not torch.equal(drawn, choose_labels("random", 300, names, seed=4))
    said = r"labels must be all, random, .*: 0 to 2 or by name \(cat, dog, 10\), or none for no class; 'cow' is not one"
    with pytest.raises(ValueError, match=said):
        choose_labels("cat,cow", None, names)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        choose_labels("all", 0, names)


# Files


def levels(n, channels, size, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(256, size=(n, channels, size, size)).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 70])
def test_the_grid_shows_every_pixel(tmp_path, channels, size):
    pixels = levels(5, channels, size)
    save_grid(tmp_path / "grid.png", from_uint8(pixels), [0, 1, 2, 0, 3], ("one", "two", "three"), columns=3)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == ("L" if channels == 1 else "RGB")
    array = np.asarray(picture).reshape(picture.height, picture.width, channels)
    scale = max(1, -(-64 // size))
    cell_w, cell_h = size * scale + 4, size * scale + 18
    assert array.shape[:2] == (2 * cell_h + 4, 3 * cell_w + 4)
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        y, x = 4 + i // 3 * cell_h, 4 + i % 3 * cell_w
        tile = array[y + 14 : y + 14 + size * scale, x : x + size * scale]
        assert np.array_equal(tile, image.repeat(scale, 0).repeat(scale, 1))
        assert array[y : y + 14, x : x + size * scale].min() < 100  # the label above the image
    assert (array[4 + cell_h :, 4 + 2 * cell_w :] == 255).all()  # the cell of a sixth image is empty


def test_grey_in_three_channels_is_written_as_grey_and_without_labels(tmp_path):
    save_grid(tmp_path / "grid.png", from_uint8(levels(4, 1, 8)).expand(-1, 3, -1, -1))
    picture = Image.open(tmp_path / "grid.png")
    assert picture.mode == "L" and picture.size == (2 * 68 + 4, 2 * 68 + 4)


def test_long_names_are_cut_to_their_cell(tmp_path):
    save_grid(tmp_path / "grid.png", from_uint8(levels(2, 1, 8)), [0, 0], ("a very long name of a class " * 3,))
    array = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (array[:18, 68:72] == 255).all()  # no text crosses from one cell to the next


def test_the_gif_has_every_frame(tmp_path):
    film = Film(frames=5)
    images = sample(Pointwise(size=8), [0, 1, 2], sampler="ddim", steps=10, batch_size=2, callback=film)
    assert len(film.frames) == 6 and torch.equal(film.frames[-1], images)
    assert all(frame.shape == (3, 1, 8, 8) for frame in film.frames)
    save_gif(tmp_path / "film.gif", film.frames, [0, 1, 2], ("a", "b", "c"))
    save_grid(tmp_path / "grid.png", images, [0, 1, 2], ("a", "b", "c"))
    gif = Image.open(tmp_path / "film.gif")
    assert gif.n_frames == 6
    gif.seek(5)
    assert gif.info["duration"] == 2000
    assert np.array_equal(np.asarray(gif.convert("L")), np.asarray(Image.open(tmp_path / "grid.png")))


def test_a_film_keeps_few_images_and_at_most_one_frame_per_step():
    film = Film(frames=40, images=3)
    sample(Pointwise(), [0] * 5, steps=3, batch_size=2, callback=film)
    assert [len(frame) for frame in film.frames] == [3] * 4


def test_npz_holds_images_and_labels(tmp_path):
    pixels = levels(4, 3, 8)
    save_npz(tmp_path / "images.npz", from_uint8(pixels), torch.tensor([3, 1, 0, 2]))
    with np.load(tmp_path / "images.npz") as file:
        assert np.array_equal(file["images"], pixels.permute(0, 2, 3, 1).numpy()) and file["images"].dtype == np.uint8
        assert file["labels"].tolist() == [3, 1, 0, 2] and file["labels"].dtype == np.int64
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)


def test_files_are_written_completely_or_not_at_all(tmp_path, monkeypatch):
    save_npz(tmp_path / "images.npz", from_uint8(levels(4, 3, 8)), [0] * 4)
    before = (tmp_path / "images.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save_npz(tmp_path / "images.npz", from_uint8(levels(4, 3, 8)), [0] * 4)
    assert (tmp_path / "images.npz").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["images.npz"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda path: save_grid(path, torch.zeros(2, 2, 4, 4)), r"images must be \(N, 1 or 3, S, S\)"),
        (lambda path: save_grid(path, torch.zeros(0, 1, 4, 4)), "with N > 0"),
        (lambda path: save_grid(path, torch.zeros(2, 1, 4, 4), [0]), "labels must be one for each of 2 images, got 1"),
        (lambda path: save_gif(path, []), "frames must hold at least one frame, got none"),
    ],
)
def test_wrong_files_are_named(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "x")
    assert not list(tmp_path.iterdir())


# The function behind the command


@pytest.fixture
def checkpoint(network, monkeypatch):
    """Replace sdit.checkpoint: every path gives the small network. Return the recorded arguments."""
    asked = []

    def load_model(path, ema=True):
        asked.append((str(path), ema))
        return network

    monkeypatch.setitem(sys.modules, "sdit.checkpoint", SimpleNamespace(load_model=load_model))
    return asked


def test_run_writes_a_grid_a_film_and_arrays(tmp_path, network, checkpoint, capfd):
    out = tmp_path / "new" / "digits.png"
    settings = dict(sampler="ddim", steps=5, seed=3, guidance=2.0, clip=True)
    written = module.run("ckpt", out, n=12, npz=True, ema=False, device="cpu", **settings)
    assert written == [out, out.with_suffix(".gif"), out.with_suffix(".npz")]
    assert sorted(path.name for path in out.parent.iterdir()) == ["digits.gif", "digits.npz", "digits.png"]
    assert checkpoint == [("ckpt", False)]
    captured = capfd.readouterr()
    assert (
        "12 images in" in captured.out and "images/s" in captured.out and str(out) in captured.out and "12/12" in captured.err
    )
    labels = [*range(10), 0, 1]
    with np.load(written[2]) as file:
        assert file["labels"].tolist() == labels
        assert np.array_equal(file["images"], to_uint8(sample(network, labels, **settings)).permute(0, 2, 3, 1).numpy())
    assert Image.open(out).size == (10 * 68 + 4, 2 * 82 + 4) and Image.open(written[1]).n_frames == 6


def test_run_shows_100_images_and_saves_all(tmp_path, checkpoint, capfd):
    settings = dict(sampler="ddim", steps=2, device="cpu", batch_size=50)
    written = module.run("ckpt", tmp_path / "a.png", labels="random", n=104, gif=False, npz=True, bf16=True, **settings)
    assert [path.suffix for path in written] == [".png", ".npz"] and "the first 100 shown" in capfd.readouterr().out
    assert Image.open(written[0]).size == (10 * 68 + 4, 10 * 82 + 4)
    with np.load(written[1]) as file:
        assert len(file["images"]) == 104


def test_run_checks_its_arguments_before_it_loads_the_model(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="out must end in .png, got .*a.jpg"):
        module.run("ckpt", tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used: .*abacus"):
        module.run("ckpt", tmp_path / "a.png", device="abacus")
    assert checkpoint == []
    with pytest.raises(ValueError, match="labels must be all, random, or .*: 0 to 9, or none for no class; '12' is not one"):
        module.run("ckpt", tmp_path / "a.png", labels="12", device="cpu")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_up_to(size):
    """Limit the size of files, as a full disk does."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


QUICK = dict(sampler="ddim", steps=2, device="cpu", gif=False)


def test_a_full_disk_is_noticed_before_any_image_is_drawn(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(module, "sample_batches", lambda *args, **kwargs: pytest.fail("an image is drawn"))
    with files_up_to(100_000), pytest.raises(OSError, match=r"out: no file of 1,048,576 bytes can be .*: File too large"):
        module.run("ckpt", tmp_path / "a.png", n=1, **QUICK)
    with files_up_to(3 << 20), pytest.raises(OSError, match=r"out: no file of 3,608,576 bytes can be written"):
        module.run("ckpt", tmp_path / "a.png", n=40_000, npz=True, **QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("npz, size", [(False, 1500), (True, 1500), (True, 10)])
def test_a_disk_that_fills_while_drawing_loses_no_image(tmp_path, checkpoint, monkeypatch, npz, size):
    """The error names the file and where the images are: in the .npz, in the folder for temporary files, or lost."""
    draw, limits = module.sample_batches, ExitStack()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def fill_disk(*args, **kwargs):
        ((start, images),) = draw(*args, **kwargs)
        drawn.append(images)
        limits.enter_context(files_up_to(size))
        yield start, images

    drawn, out = [], tmp_path / "out" / "a.png"
    monkeypatch.setattr(module, "sample_batches", fill_disk)
    with limits, pytest.raises(OSError) as caught:
        module.run("ckpt", out, n=10, npz=npz, **QUICK)
    said = str(caught.value)
    assert said.startswith(f"{out if size > 10 else out.with_suffix('.npz')}: File too large; the images ")
    if size == 10:
        assert said.endswith(f"are lost, {tmp_path}/temporary cannot hold them either: File too large")
        return
    where = Path(said.rpartition(" ")[2])
    assert where == out.with_suffix(".npz") if npz else where.is_relative_to(tmp_path / "temporary")
    with np.load(where) as file:
        assert np.array_equal(file["images"], to_uint8(drawn[0]).permute(0, 2, 3, 1).numpy()) and len(file["labels"]) == 10


def test_two_processes_do_not_write_one_picture(tmp_path, checkpoint):
    with lock(tmp_path / ".a.lock", "it", "wait"):
        with pytest.raises(BlockingIOError, match=r"a.png is in use by process .* choose another out \(--out\)"):
            module.run("ckpt", tmp_path / "a.png", n=1, **QUICK)
        module.run("ckpt", tmp_path / "b.png", n=1, **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png"]


@pytest.mark.parametrize("module", [module, pictures])
def test_docstring_examples_run(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


def test_the_settings_that_a_checkpoint_recommends_are_the_default(tmp_path, monkeypatch):
    model, used = SDiT(PRESETS["digits"], dim=32, depth=2), []
    model.recommended = {"guidance": 3.0, "guidance_interval": [0, 500], "noise_scale": 1.01}
    save_model(tmp_path / "a.safetensors", model)
    assert load_model(tmp_path / "a.safetensors").recommended == model.recommended

    def batches(model, labels, starts=None, **settings):
        used.append({key: value for key, value in settings.items() if "guidance" in key or "noise" in key})
        return iter([(0, torch.zeros(len(labels), 1, 8, 8))])

    monkeypatch.setattr("sdit.sample.sample_batches", batches)
    for given in ({}, {"guidance": 1.0}, {"guidance": 2.0}, {"noise_scale": 1.0}, {"guidance_interval": (5, 9)}):
        module.run(tmp_path / "a.safetensors", tmp_path / "a.png", n=2, gif=False, **given)
    assert used == [
        model.recommended, {"guidance": 1.0, "noise_scale": 1.01}, model.recommended | {"guidance": 2.0},
        model.recommended | {"noise_scale": 1.0}, model.recommended | {"guidance_interval": (5, 9)},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 20}, "recommended must be a dict of guidance, guidance_interval, noise_scale, got {'steps': 20}"),
        ([3.0], r"recommended must be a dict of .*, got \[3.0\]"),
        ({"guidance": "3"}, "guidance must be a finite number, got '3'"),
        ({"guidance": 3.0, "guidance_interval": [5, 1]}, "guidance_interval must be two times"),
        ({"noise_scale": -1}, "noise_scale must be a positive number, got -1"),
    ],
)
def test_recommended_settings_are_checked_when_written_and_read(tmp_path, wrong, message):
    model, path = SDiT(PRESETS["digits"], dim=32, depth=2), tmp_path / "a.safetensors"
    model.recommended = wrong
    with pytest.raises(ValueError, match=message):
        save_model(path, model)
    assert not path.exists()
    save(path, {"model": model.state_dict()}, {"config": model.config.to_dict(), "recommended": wrong})
    with pytest.raises(ValueError, match=f"a.safetensors recommends settings that cannot be used: {message}"):
        load_model(path)
