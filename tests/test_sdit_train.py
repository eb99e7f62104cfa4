"""Training: the arithmetic of a step, the files of a run, and resuming after the process was killed."""

import dataclasses
import doctest
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import sdit.settings
from sdit import PRESETS, SDiT
from sdit import train as trainer
from sdit.checkpoint import about, checkpoints, load, load_model, newest, save, save_model
from sdit.data import Images, Order, to_batch
from sdit.data import load as load_data
from sdit.diffusion import draw, training_loss
from sdit.lock import lock
from sdit.plot import plot, read_metrics
from sdit.processes import Processes
from sdit.sample import class_names
from sdit.settings import TrainSettings
from sdit.train import train

TINY = dataclasses.replace(PRESETS["digits"], dim=32, depth=2)
QUICK = dict(steps=6, batch_size=8, warmup=2, log_every=2, save_every=4, sample_every=0)
TIMES = ("images_per_s", "memory_mb")


def settings(**changes):
    return TrainSettings.of(TINY, **(QUICK | changes))


def comparable_rows(run):
    """Rows of metrics.jsonl without the fields that differ between two equal runs."""
    rows = read_metrics(run)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def states_equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run of 6 steps and its model."""
    out = tmp_path_factory.mktemp("whole")
    return out, train(TINY, settings(), out, progress=False)


# Settings


def test_settings_of_a_preset_may_be_changed():
    faithful = TrainSettings.of(PRESETS["mnist"])
    assert (faithful.lr, faithful.weight_decay, faithful.batch_size) == (1e-4, 0.01, 256)
    assert not (faithful.warmup or faithful.cosine or faithful.clip or faithful.ema or faithful.flip)
    improved = TrainSettings.of(PRESETS["digits"])
    assert improved.warmup and improved.cosine and improved.clip and improved.ema and improved.lr > faithful.lr
    assert TrainSettings.of(PRESETS["digits"], lr=5e-4).lr == 5e-4


def test_learning_rate_warms_up_and_decays():
    s = TrainSettings(steps=110, warmup=10, cosine=True, lr=2.0)
    assert s.learning_rate(0) == pytest.approx(2 / 11) and s.learning_rate(10) == 2.0
    assert s.learning_rate(60) == pytest.approx(1.0) and s.learning_rate(109) == pytest.approx(1 - math.cos(math.pi / 100))
    constant = TrainSettings(lr=1e-4)
    assert constant.learning_rate(0) == constant.learning_rate(99_999) == 1e-4


@pytest.mark.parametrize(
    "changes, error",
    [
        (dict(lr=-1.0), "lr must be positive and finite, got -1.0"),
        (dict(lr=0.0), "lr must be positive and finite, got 0.0"),
        (dict(lr=math.nan), "lr must be positive and finite"),
        (dict(clip=math.inf), "clip must be at least 0 and finite"),
        (dict(ema=1.0), "ema must be below 1"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(batch_size=2.5), "batch_size must be an int"),
        (dict(bf16=1), "bf16 must be true or false"),
        (dict(clip="1"), "clip must be a number"),
    ],
)
def test_wrong_settings_are_refused(changes, error):
    with pytest.raises((ValueError, TypeError), match=error):
        TrainSettings(**changes)
    with pytest.raises(TypeError, match="TrainSettings does not have the fields rate"):
        TrainSettings.of(TINY, rate=1)


# Steps


def test_three_steps_equal_a_plain_loop(tmp_path):
    """Compare the loop with AdamW, gradient clipping and the weight average written out."""
    s = settings(steps=3, clip=0.5, ema=0.9, log_every=1)
    got = train(TINY, s, tmp_path, progress=False)
    torch.manual_seed(s.seed)
    model = SDiT(TINY)
    data, order = load_data("digits"), Order(1500, s.seed)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
    average = [p.detach().clone() for p in model.parameters()]
    rows = read_metrics(tmp_path)
    for n in range(3):
        chosen = order.indices(n, 8)
        noise_seed = trainer.np.random.SeedSequence((s.seed, 2, n)).generate_state(1, trainer.np.uint64)[0]
        t, noise, drop = draw(TINY, 8, torch.Generator().manual_seed(int(noise_seed)))
        losses = training_loss(model, to_batch(data.images[chosen], TINY), data.labels[chosen], t=t, noise=noise, drop=drop)
        model.zero_grad()
        losses["loss"].backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        assert rows[n]["loss"] == pytest.approx(losses["loss"].item(), rel=1e-5)
        assert rows[n]["loss"] == pytest.approx(rows[n]["mse"] + rows[n]["vb"], rel=1e-6)
        assert rows[n]["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > s.clip
        rate = s.learning_rate(n)
        for p, (first, second), mean in zip(model.parameters(), moments, average):
            g = p.grad * (s.clip / norm)
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.999).add_(g * g, alpha=0.001)
            root = (second / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8
            with torch.no_grad():
                p.mul_(1 - rate * s.weight_decay).sub_(rate * first / (1 - 0.9 ** (n + 1)) / root)
                mean.lerp_(p, 1 - min(0.9, (1 + n) / (10 + n)))
    for name, p, mean in zip(dict(got.named_parameters()), got.parameters(), average):
        torch.testing.assert_close(p, mean, rtol=1e-3, atol=2e-5, msg=name)


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path):
    grads = {}
    for parts in (1, 4):
        alone = Processes(0, 1, torch.device("cpu"))
        run = trainer.Run(TINY, settings(accumulate=parts), tmp_path, load_data("digits"), {}, alone, False)
        run.compute_gradients(run.model, run.batch(5))
        grads[parts] = [p.grad for p in run.parameters]
    for one, four in zip(*grads.values()):
        torch.testing.assert_close(four, one, rtol=1e-4, atol=1e-6)


def test_bf16_trains(tmp_path):
    train(TINY, settings(bf16=True), tmp_path, progress=False)
    assert all(p.dtype == torch.float32 for p in load_model(tmp_path).parameters())
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path))


def test_a_run_leaves_metrics_checkpoints_and_settings(whole, tmp_path):
    out, model = whole
    assert [row["step"] for row in read_metrics(out)] == [2, 4, 6]
    row = read_metrics(out)[-1]
    assert list(row["rates"]) == [f"blocks.{i}.{part}" for i in range(3) for part in ("attention", "mlp")]
    assert row["images_per_s"] > 0 and row["memory_mb"] > 0
    assert [path.name for path in checkpoints(out)] == ["step_00000004.safetensors", "step_00000006.safetensors"]
    assert states_equal(load_model(out).state_dict(), model.state_dict())
    assert not states_equal(load_model(out, ema=False).state_dict(), model.state_dict())
    assert json.loads((out / "run.json").read_text())["config"] == TINY.to_dict()
    assert plot(out, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_keeps_the_newest_checkpoints_and_draws_pictures(tmp_path):
    train(TINY, settings(steps=4, save_every=1, sample_every=2, keep=2), tmp_path, progress=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003.safetensors", "step_00000004.safetensors"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]


# Resuming


def test_a_resumed_run_equals_an_uninterrupted_one(whole, tmp_path):
    """Resume from step 3, between two log lines. The interrupted run saved at other steps."""
    out, _ = whole
    train(TINY, settings(save_every=3), tmp_path, progress=False)
    checkpoints(tmp_path)[-1].unlink()
    assert newest(tmp_path).name == "step_00000003.safetensors"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # a line that was cut short when the process was killed
    model = train(out_dir=tmp_path, resume=True, progress=False)
    assert comparable_rows(tmp_path) == comparable_rows(out)
    assert all(states_equal(a, b) for a, b in zip(load(newest(out))[0].values(), load(newest(tmp_path))[0].values()))
    assert states_equal(model.state_dict(), load_model(out).state_dict())


_CHILD = """
import sys
sys.path.insert(0, {root!r})
import torch
from sdit.train import TrainSettings, train
import test_sdit_train as t
torch.set_num_threads(1)
train(t.TINY, t.settings({changes}), sys.argv[1], resume=sys.argv[2] == "resume", progress=False)
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def start_training(out, how="start", steps=40):
    code = _CHILD.format(root=str(ROOT), changes=f"steps={steps}, save_every=5")
    command = [sys.executable, "-c", code, str(out), how]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=out.parent, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)


def hear_ctrl_c():
    """A shell lets its background jobs ignore SIGINT, and they pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def torchrun(folder, changes, out):
    """Train with two processes."""
    script = folder / "child.py"
    script.write_text(_CHILD.format(root=str(ROOT), changes=changes))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(out)]
    return subprocess.run([*command, "start"], env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)


def wait_for(condition, child):
    deadline = time.monotonic() + 1800
    while not condition():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_killed_twice_equals_an_uninterrupted_one(tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    child = start_training(calm)
    assert child.wait(1800) == 0, child.stderr.read()
    for how, until in (("start", 7), ("resume", 21)):
        child = start_training(killed, how)
        wait_for(lambda until=until: (killed / "metrics.jsonl").exists() and len(complete_lines(killed)) >= until // 2, child)
        child.kill()
        assert child.wait(1800) == -signal.SIGKILL
        assert checkpoints(killed)
    child = start_training(killed, "resume")
    assert child.wait(1800) == 0, child.stderr.read()
    assert [row["step"] for row in comparable_rows(killed)] == list(range(2, 41, 2))
    assert comparable_rows(killed) == comparable_rows(calm)
    assert all(states_equal(a, b) for a, b in zip(load(newest(calm))[0].values(), load(newest(killed))[0].values()))
    assert not list(killed.rglob("*.part"))


def complete_lines(run):
    return [line for line in (run / "metrics.jsonl").read_bytes().splitlines(True) if line.endswith(b"\n")]


def test_a_signal_saves_a_checkpoint(tmp_path):
    child = start_training(tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and complete_lines(tmp_path / "run"), child)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=1800)
    assert "KeyboardInterrupt" in said and "saved" in said
    step = load(newest(tmp_path / "run"))[1]["step"]
    assert f"stopped at step {step}" in said
    assert read_metrics(tmp_path / "run")[-1]["step"] == step // 2 * 2


def test_runs_that_cannot_be_resumed_are_refused(whole, tmp_path):
    out, _ = whole
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(TINY, settings(), out, progress=False)
    with pytest.raises(ValueError, match=r"settings.lr is 0.003 in .*cannot change it to 0.1"):
        train(None, settings(lr=0.1), out, resume=True)
    with pytest.raises(ValueError, match=r"config.dim is 32 in .*cannot change it to 64"):
        train(PRESETS["digits"], None, out, resume=True)
    with pytest.raises(ValueError, match="steps must be at least the 6 steps that"):
        train(None, settings(steps=5), out, resume=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train(out_dir=tmp_path / "none", resume=True)
    save_model(tmp_path / "checkpoints" / "step_00000001.safetensors", SDiT(TINY))
    with pytest.raises(ValueError, match="cannot be resumed, it holds no training state"):
        train(out_dir=tmp_path, resume=True)


def test_a_run_may_start_from_the_weights_of_a_model(whole, tmp_path):
    out, model = whole
    first = TrainSettings.of(TINY, **QUICK | dict(steps=1, ema=0.0, lr=1e-9))
    got = train(TINY, first, tmp_path / "next", initial=model, progress=False)
    for a, b in zip(got.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(got.position, SDiT(TINY).position)
    config = dataclasses.replace(TINY, times="logit_normal")  # the same weights
    got = train(config, settings(steps=1), tmp_path / "times", initial=model, progress=False)
    assert got.config.times == "logit_normal"
    fit = r"initial must be a model whose weights fit the run: position has the shape \(1, 17, 32\) there, and \(1, 17, 64\) in"
    with pytest.raises(ValueError, match=fit):
        train(PRESETS["digits"], settings(), tmp_path / "other", initial=model, progress=False)
    with pytest.raises(ValueError, match="initial must be None with resume"):
        train(out_dir=out, resume=True, initial=model, progress=False)


# Errors


def test_a_loss_that_is_not_finite_stops_training(tmp_path, monkeypatch):
    batch = trainer.Run.batch

    def poisoned(run, step):
        found = batch(run, step)
        found["noise"][0, 0, 0, 0] = math.nan if step == 5 else found["noise"][0, 0, 0, 0]
        return found

    monkeypatch.setattr(trainer.Run, "batch", poisoned)
    with pytest.raises(FloatingPointError) as caught:
        train(TINY, settings(save_every=2), tmp_path, progress=False)
    said = str(caught.value)
    assert said.startswith("step 6: mse is nan") and "first layer with outputs that are not finite is patches" in said
    assert "the gradient of position and" in said and "step_00000004.safetensors" in said
    assert all(p.isfinite().all() for p in load_model(tmp_path).parameters())


def test_a_full_disk_keeps_earlier_checkpoints(tmp_path):
    """A limit on file sizes replaces the full disk: the write fails half way."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    save(path, {"model": {"w": torch.ones(10)}}, {"step": 1})
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match="this checkpoint is not saved, earlier ones are intact") as caught:
            save(path, {"model": {"w": torch.ones(100_000)}}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="not a checkpoint of sdit, or damaged"):
        load_model(path)
    save_model(path, SDiT(TINY))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a checkpoint of sdit, or damaged"):
        load(path)
    save(path, {"model": SDiT(TINY).state_dict()}, {"config": dataclasses.replace(TINY, dim=64).to_dict()})
    with pytest.raises(ValueError, match="holds no model: .*size mismatch"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_model(tmp_path)


def test_data_that_does_not_fit_is_refused(tmp_path):
    images = Images("own", torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1, 2, 10]), ())
    with pytest.raises(ValueError, match="config.num_classes must be at least 11, for the labels of own, got 10"):
        train(TINY, settings(), tmp_path, data=images)
    with pytest.raises(ValueError, match="config.dataset must be one of digits, .*, or data must be given; got None"):
        train(dataclasses.replace(TINY, dataset=None), settings(), tmp_path)
    with pytest.raises(ValueError, match="batch_size must be a multiple of processes x accumulate, 1 x 3, got 8"):
        train(TINY, settings(accumulate=3), tmp_path)
    with pytest.raises(ValueError, match="device 'nope' cannot be used"):
        train(TINY, settings(), tmp_path, device="nope")


# More than one process


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Under torchrun, with accumulation over two parts of the batch. Weights agree too."""
    done = torchrun(tmp_path, "steps=4, batch_size=16, accumulate=2, log_every=1", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one = train(TINY, settings(steps=4, batch_size=16, log_every=1), tmp_path / "one", progress=False)
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=2e-5), name
    two = load_model(tmp_path / "two")
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


def test_an_error_for_a_damaged_checkpoint_names_the_one_before(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"checkpoints/step_{step:08d}.safetensors", {"model": {"w": torch.ones(9)}}, {"step": step})
    path = newest(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(
        ValueError, match=r"step_00000002.* damaged: .*remove it to continue from the earlier checkpoint step_00000001"
    ):
        load(path)


@pytest.mark.parametrize("place", ["tensor", "step", "names"])
def test_a_flipped_bit_is_detected(tmp_path, place):
    """The bit is in a tensor, or in the header where the JSON stays valid."""
    for step in (1, 2):
        groups = {"model": {"w": torch.ones(999)}, "ema": {"w": torch.ones(999)}}
        save(tmp_path / f"checkpoints/step_{step:08d}.safetensors", groups, {"step": step, "names": "abc"})
    path = newest(tmp_path)
    whole = path.read_bytes()
    at = {"tensor": len(whole) - 1500, "step": whole.index(b"step") + 8, "names": whole.index(b"abc")}[place]
    for damaged in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole + b"x"):
        path.write_bytes(damaged)
        for read in (load, load_model):
            with pytest.raises(
                ValueError, match=r"step_00000002.* damaged: its checksum .* the earlier checkpoint step_00000001"
            ):
                read(path)
    path.write_bytes(whole)
    assert load(path)[1] == about(path) == {"step": 2, "names": "abc"}


def test_files_without_a_checksum_are_read(tmp_path):
    from safetensors.torch import save_file

    old = tmp_path / "old.safetensors"
    about = {"text": json.dumps({"crc32": "00000000"})}
    save_file({"model.w": torch.ones(3)}, old, {"sdit": json.dumps(about)})
    assert torch.equal(load(old)[0]["model"]["w"], torch.ones(3))
    save(old, {"model": {"w": torch.ones(3)}}, about)
    content = old.read_bytes()
    assert load(old)[1] == about
    save(old, {"model": {"w": torch.ones(3)}}, about)
    assert old.read_bytes() == content
    for n in range(0, 256, 8):  # any length of the header, also lengths whose bytes look like a brace
        save(old, {"model": {"w": torch.ones(3)}}, {"text": "x" * n})
        assert load(old)[1] == {"text": "x" * n} and b"--------" not in old.read_bytes()


# One process at a time


def test_a_second_process_may_read_but_not_write_a_run(whole, tmp_path, capsys):
    """While a run trains, others can read it, but cannot start or resume in it. After kill -9 a resume works."""
    out = tmp_path / "run"
    child = start_training(out, steps=10**6)
    wait_for(lambda: checkpoints(out), child)
    said = rf"the run in .*run is in use by process {child.pid} on .*, started 20.*: wait until it ends, or"
    with pytest.raises(BlockingIOError, match=said):
        train(out_dir=out, resume=True, progress=False)
    with pytest.raises(FileExistsError, match="holds a run already: resume it"):
        train(TINY, settings(), out, progress=False)
    assert load_model(out).config == TINY and read_metrics(out)
    child.kill()
    child.wait()
    assert (out / "lock").read_text().startswith(f"process {child.pid} ")
    step = about(newest(out))["step"]
    train(None, dataclasses.replace(settings(), save_every=5, steps=step + 2), out, resume=True, progress=False)
    assert about(newest(out))["step"] == step + 2 and not (out / "lock").exists()


def test_only_one_of_two_starting_processes_may_train(tmp_path):
    """Neither has a checkpoint yet. The refused process writes nothing."""
    with lock(tmp_path / "lock", "the folder", "wait"):
        with pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on "):
            train(TINY, settings(), tmp_path, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_second_torchrun_is_refused_in_every_process(tmp_path):
    with lock(tmp_path / "run" / "lock", "the folder", "wait"):
        done = torchrun(tmp_path, "steps=4, batch_size=16", tmp_path / "run")
    assert done.returncode and len(re.findall(r"BlockingIOError: the run in .* is in use by process", done.stderr)) == 2


# The record of a run's data and device


def folder_of_images(path, classes="ab", n=4, size=8):
    Image = pytest.importorskip("PIL.Image")
    for label in classes:
        (path / label).mkdir(parents=True)
        for i in range(n):
            pixels = torch.randint(256, (size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)).numpy()
            Image.fromarray(pixels).save(path / label / f"{i}.png")
    return path


def test_a_run_records_its_folder_of_images(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, dataset="folder", num_classes=2)
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path / "own")
    train(config, settings(steps=2), "run", root="own", device="cpu", progress=False)
    monkeypatch.chdir("/")
    run = tmp_path / "run"
    train(None, settings(steps=3), run, resume=True, progress=False)
    meta = about(newest(run))
    assert meta["step"] == 3 and meta["device"] == "cpu"
    assert meta["data"] == {"name": "folder", "images": 8, "classes": ["a", "b"], "root": str(tmp_path / "own")}
    model = load_model(run)
    assert model.trained_on == meta["data"] and class_names(model.config, model.trained_on["classes"]) == ("a", "b")
    save_model(tmp_path / "alone.safetensors", model)
    assert load_model(tmp_path / "alone.safetensors").trained_on == meta["data"]

    (tmp_path / "own").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"this run had its data in .*own: the folder .* not exist; .*root \(--data\)"):
        train(None, settings(steps=4), run, resume=True, progress=False)
    train(None, settings(steps=4), run, resume=True, root=tmp_path / "moved", progress=False)
    assert about(newest(run))["data"]["root"] == str(tmp_path / "moved")
    (tmp_path / "moved" / "a").rename(tmp_path / "moved" / "c")
    with pytest.raises(ValueError, match=r"classes was \['a', 'b'\] and is \['b', 'c'\] now"):
        train(None, settings(steps=5), run, resume=True, progress=False)
    (tmp_path / "moved" / "c").rename(tmp_path / "moved" / "a")
    (tmp_path / "moved" / "a" / "0.png").unlink()
    with pytest.raises(ValueError, match="images was 8 and is 7 now"):
        train(None, settings(steps=5), run, resume=True, progress=False)


def test_a_run_on_images_in_memory_needs_them_for_a_resume(tmp_path):
    own = Images("own", load_data("digits").images[:50], load_data("digits").labels[:50], tuple("0123456789"))
    train(TINY, settings(steps=2), tmp_path, data=own, progress=False)
    with pytest.raises(ValueError, match="the data set that the run began with: name was 'own' and is 'digits' now"):
        train(None, settings(steps=3), tmp_path, resume=True, progress=False)
    train(None, settings(steps=3), tmp_path, resume=True, data=own, progress=False)


def test_an_error_for_a_missing_device_names_the_option(whole, tmp_path):
    out, _ = whole
    groups, meta = load(newest(out))
    assert meta["device"] is None
    save(tmp_path / "checkpoints" / "step_00000006.safetensors", groups, meta | {"device": "tpu9"})
    with pytest.raises(ValueError, match=r"'tpu9' cannot be used: .*used it until now: name another device \(--device\)"):
        train(None, None, tmp_path, resume=True, progress=False)
    train(None, None, tmp_path, resume=True, device="cpu", progress=False)


def test_parameter_names_of_earlier_versions_are_read(tmp_path):
    config = dataclasses.replace(TINY, condition="every")
    train(config, settings(steps=2), tmp_path, progress=False)
    groups, meta = load(newest(tmp_path))
    wanted = load_model(tmp_path)
    old = {g: {n.replace("condition_to_patches", "spread"): t for n, t in named.items()} for g, named in groups.items()}
    assert all(any("spread" in name for name in old[g]) for g in ("model", "ema", "optimizer"))
    save(newest(tmp_path), old, meta)
    assert states_equal(load_model(tmp_path).state_dict(), wanted.state_dict())
    train(None, settings(steps=3), tmp_path, resume=True, progress=False)


def test_runs_of_earlier_versions_can_be_resumed(whole, tmp_path):
    groups, meta = load(newest(whole[0]))
    save(tmp_path / "checkpoints" / "step_00000006.safetensors", groups, {k: meta[k] for k in ("config", "settings", "step")})
    train(None, settings(steps=7), tmp_path, resume=True, progress=False)
    assert about(newest(tmp_path))["data"]["images"] == 1500


def test_a_picture_missing_after_a_kill_is_drawn(tmp_path):
    train(TINY, settings(steps=4, save_every=2, sample_every=2), tmp_path, progress=False)
    missing = tmp_path / "samples" / "step_00000002.png"
    picture = missing.read_bytes()
    missing.unlink()
    newest(tmp_path).unlink()
    (tmp_path / "samples" / "step_00000004.png").unlink()
    train(None, None, tmp_path, resume=True, progress=False)
    assert missing.read_bytes() == picture and (tmp_path / "samples" / "step_00000004.png").exists()


def test_a_picture_that_does_not_fit_the_disk_is_named(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    limit, sample = resource.getrlimit(resource.RLIMIT_FSIZE), trainer.sample

    def fills_the_disk(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
        return sample(*args, **kwargs)

    monkeypatch.setattr(trainer, "sample", fills_the_disk)
    try:
        with pytest.raises(OSError, match="this picture is not written; free some space, then --resume") as caught:
            train(TINY, settings(steps=2, sample_every=2), tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(tmp_path / "samples" / "step_00000002.png")
    monkeypatch.setattr(trainer, "sample", sample)
    train(None, None, tmp_path, resume=True, progress=False)
    assert (tmp_path / "samples" / "step_00000002.png").exists()


def test_docstring_examples_run():
    failed, attempted = doctest.testmod(sdit.settings)
    assert attempted and not failed
