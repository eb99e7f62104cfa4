"""The sdit command: its output, its files, and one clear error line for each mistake."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_sdit_train import hear_ctrl_c

from sdit import PRESETS, SDiT
from sdit.checkpoint import load, load_model, newest, save
from sdit.cli import main
from sdit.research import research_name

TINY = ["--set", "dim=32", "--set", "depth=2", "--batch-size", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train for 4 steps and return the run's folder."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--preset", "digits", "--out", str(out), "--steps", "4", "--log-every", "2", *TINY]) == 0
    return out


def error_line(capsys):
    """Return stderr, which must be one line."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_train_writes_a_run(run):
    assert load_model(run).config.dim == 32
    assert (run / "samples" / "step_00000004.png").exists()


def test_resume_trains_further_steps(run, capsys):
    before = load(newest(run))[1]
    assert main(["train", "--resume", str(run), "--steps", "6", "--sample-every", "0"]) == 0
    assert before["step"] == 4 and load(newest(run))[1]["step"] == 6
    found = capsys.readouterr()
    assert "6/6" in found.err and "loss=" in found.err and "firing=" in found.err and f"sdit sample {run}" in found.out
    assert main(["train", "--resume", str(run)]) == 0 and "its 6 steps were done before" in capsys.readouterr().out
    assert main(["train", "--resume", str(run), "--lr", "1"]) == 2
    assert "--lr is 0.003 in" in error_line(capsys)


def test_sample_writes_images(run, tmp_path, capsys):
    out = tmp_path / "a.png"
    command = ["sample", str(run), "--out", str(out), "--labels", "3,none", "-n", "5", "--sampler", "dpm++", "--steps", "4"]
    assert main([*command, "--guidance", "2", "--clip", "--threshold", "0.9", "--npz"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.npz", "a.png"]
    assert "5 images in" in capsys.readouterr().out


def test_the_pretrained_model_draws_images(tmp_path, capsys):
    """`sdit sample` uses this model if no path is given."""
    assert main(["sample", "-n", "2", "--sampler", "dpm++", "--steps", "2", "--no-gif", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000 and "2 images" in capsys.readouterr().out
    for name, spiking, parameters in (("pretrained", "pure", 1_178_810), ("pretrained-hybrid", "rate", 1_215_302),
                                      ("pretrained-pure", "pure", 1_178_810)):  # fmt: skip
        model = load_model(name)
        assert (model.config.dataset, model.config.prediction, model.config.spiking) == ("fashion_mnist", "v", spiking)
        assert sum(p.numel() for p in model.parameters()) == parameters and model.recommended["guidance"] > 1


def test_plot_and_info_read_a_run(run, tmp_path, capsys):
    assert main(["plot", str(run), "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["info", str(run), "--batch-size", "2"]) == 0
    trained = capsys.readouterr().out
    assert main(["info", "digits", "--batch-size", "2", "--set", "dim=32", "--set", "depth=2"]) == 0
    preset = capsys.readouterr().out
    assert trained.splitlines()[0] == preset.splitlines()[0] and "blocks.0.attention" in trained


def test_info_works_without_the_data(tmp_path, capsys, monkeypatch):
    """It does not use the network, and it says how to get the data."""
    small = ["--batch-size", "2", "--set", "dim=32", "--set", "depth=2", "--set", "dataset=cifar10"]
    monkeypatch.setattr("sdit.data.download", lambda url: pytest.fail(f"{url} is asked for"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for more, way in (
        ([], """python -c "from sdit.data import load; load('cifar10')" """),
        (["--data", str(tmp_path)], "--data"),
    ):
        assert main(["info", "digits", *small, *more]) == 0
        out = capsys.readouterr().out
        assert "parameters" in out and "blocks 3" in out and "are of noise, not of images: cifar10: " in out and way in out


def test_convert_writes_a_checkpoint(tmp_path, capsys):
    model = SDiT(PRESETS["digits"], dim=32, depth=2, variant="faithful")
    theirs = {}
    for name, value in model.state_dict().items():
        value = value.reshape(32, 1, 2, 2) if name == "patches.weight" else value
        theirs[research_name(name, 1)] = value
    torch.save({"model": theirs, "opt": {}, "args": argparse.Namespace(model="x")}, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "in.pt"), str(out), "--dataset", "digits"]) == 0
    assert "8x8x1, patch 2, 32 wide, depth 2 (3 blocks)" in capsys.readouterr().out
    got = load_model(out)
    assert got.config.dataset == "digits"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), got.state_dict().values()))
    assert main(["convert", str(tmp_path / "in.pt"), str(out)]) == 2
    assert "exists already" in error_line(capsys)


@pytest.mark.parametrize(
    "command, message",
    [
        ("train", "give one of --preset to start a run, --initial .*, and --resume to continue a run; got none"),
        ("train --preset digits --resume nonsense", "give one of --preset .*; got --preset and --resume"),
        ("train --initial {run}", "--initial needs --out, the folder of the new run"),
        ("train --initial= --out {tmp}/n", "--initial must name a model, got ''"),
        ("train --initial {tmp}/none --out {tmp}/n", "none does not exist"),
        ("train --initial {run} --out {tmp}/n --set dim=16", ": --initial must be a model whose weights fit the run: "),
        ("train --preset nope", "--preset must be one of mnist, fashion_mnist, .*, got 'nope'"),
        ("train --preset digits --lr -1", ": --lr must be positive and finite, got -1.0"),
        ("train --preset digits --lr 0", ": --lr must be positive and finite, got 0.0"),
        ("train --preset digits --batch-size 0", ": --batch-size must be at least 1"),
        ("train --preset digits --set dataset=nope", ": --set dataset must be one of digits"),
        ("train --preset digits --set dataset=folder", ": --data must name the folder of images"),
        ("train --preset digits --set dataset=folder --data {tmp}/none", ": the folder .*none does not exist"),
        ("train --preset digits --set num_classes=9", ": --set num_classes must be at least 10, for the labels of digits"),
        ("train --preset mnist --set channels=2 --set dataset=digits", ": --set channels must be 1 or 3"),
        ("train --preset digits --set T=x", "--set T must be an int, got 'x'"),
        ("train --preset digits --set learn_sigma=maybe", "--set learn_sigma must be true or false"),
        ("train --preset digits --set colour=3", "--set takes FIELD=VALUE with FIELD one of image_size"),
        ("train --preset digits --set image_size=9", ": --set image_size must be a multiple of patch_size"),
        ("train --preset digits --device nope", ": --device 'nope' cannot be used"),
        ("train --preset digits --device meta --out {tmp}/meta", "device 'meta' cannot be used: it holds no numbers"),
        (
            "train --preset digits --out {tmp}/huge --batch-size 1000000000000",
            ": --batch-size must be at most 4096 for the 1500 images",
        ),
        ("train --preset digits --seed 99999999999999999999999", r": --seed must be at least 0 and below 2\^63"),
        ("train --preset digits --out=", "--out must name a folder, got ''"),
        ("train --resume /dev/null", "--resume takes the folder of a run, .*; /dev/null is not a folder"),
        ("train --resume {run}/run.json", "--resume takes the folder of a run, .*run.json is not a folder"),
        (
            "train --resume {tmp}/nothing",
            "--resume takes the folder of a run, which sdit train --out made; .*nothing does not exist",
        ),
        ("train --preset digits --set v_threshold=-1", ": --set v_threshold must be positive, got -1"),
        ("train --preset digits --data /nowhere", "leave --data out, got '/nowhere'"),
        ("sample {run} --labels 3,1,4 -n 2", ": -n must be at least 3, the number of labels, got 2"),
        ("evaluate {run} --npz {tmp}/images.txt", ": --npz must end in .npz"),
        ("evaluate {tmp}/text.npz", "must hold the arrays .*: it is not an npz file, but 13 bytes of something else"),
        ("evaluate {tmp}/text.npz --seed 1 --batch-size 3", "images that exist already: --seed, --batch-size cannot"),
        ("sample {run} --batch-size 0", ": --batch-size must be an int of at least 1, got 0"),
        ("sample {run} --images {run}", ": --images must be an empty or new folder, .* holds files already"),
        ("sample {run} --guidance nan", ": --guidance must be a finite number, got nan"),
        ("sample {run} --out /proc/o.png", ": --out: no file of [0-9,]+ bytes can be written in /proc"),
        ("train --preset mnist --data {tmp}", "not found in folders named .*Leave --data out to have them downloaded"),
        ("train --preset digits --out {run}", "holds a run already: resume it .--resume .*., or choose another folder"),
        ("train --resume {tmp}", "holds no checkpoint"),
        ("train --resume {run} --set T=3", "--resume keeps the model and the folder of the run"),
        ("sample {tmp}/none", "does not exist"),
        ("sample {tmp}/text", "is not a checkpoint of sdit, or damaged"),
        (
            "sample {tmp}/nothing",
            "does not exist: give a checkpoint, the folder of a run, or one of pretrained, pretrained-hybrid,",
        ),
        ("sample {run}/checkpoints", "holds no checkpoint: give one of the files in it"),
        ("sample {tmp}/other", "is not a checkpoint of sdit: its header has no entry"),
        ("sample {tmp}/wrong", "holds no model: .*size mismatch"),
        ("sample {run} --labels 11", ": --labels must be all, random, or a list .*: 0 to 9, or none for no class; '11' is not"),
        ("sample {run} --sampler heun", ": --sampler must be one of dpm[+][+], ddpm, ddim"),
        ("sample {run} --out a.jpg", ": --out must end in .png"),
        ("convert {tmp}/text {tmp}/o.safetensors", "is not a checkpoint of PyTorch"),
        ("convert {tmp}/text {tmp}/o.pt", "the file to write must end in .safetensors, got .*o.pt"),
        ("convert {tmp}/text {tmp}/o.safetensors --dataset x", "--dataset must be one of digits"),
        ("info {tmp}/none", "is neither a file, nor a folder, nor one of mnist, "),
        ("info {run} --set T=3", "--set is for presets"),
        ("info digits --batch-size 0", "--batch-size must be at least 1"),
        ("plot {tmp}", "is not the folder of a run"),
        ("plot {run} --out a.jpg", ": --out must end in .png"),
    ],
)
def test_bad_input_gives_one_error_line(command, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text", "text.npz"):
        (tmp_path / name).write_text("no checkpoint")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "other")
    save(tmp_path / "wrong", {"model": SDiT(PRESETS["digits"], dim=32).state_dict()}, {"config": PRESETS["digits"].to_dict()})
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(tmp=tmp_path, run=run) for word in command.split()]
    assert main(words) == 2
    line = error_line(capsys)
    assert line.startswith(f"sdit {words[0]}: error: ") and re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [[], ["nope"], ["train", "--steps", "x"], ["convert"]])
def test_bad_arguments_give_one_error_line(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert "--help says more" in error_line(capsys)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["sample", str(tmp_path / "none"), "--debug"])


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "convert", "info", "plot"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"  sdit {command} " in capsys.readouterr().out


def test_a_full_disk_gives_one_error_line(run, tmp_path, capsys):
    """A limit on file sizes replaces the full disk."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    command = ["train", "--preset", "digits", "--out", str(out), "--sample-every", "0", "--log-every", "2", *TINY]
    assert main([*command, "--steps", "2"]) == 0
    kept = newest(out).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, limit[1]))
    try:
        assert main(["train", "--resume", str(out), "--steps", "4"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "this checkpoint is not saved, earlier ones are intact" in capsys.readouterr().err.splitlines()[-1]
    assert newest(out).read_bytes() == kept and newest(out).name == "step_00000002.safetensors"


def test_ctrl_c_saves_and_exits_with_130(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sdit", "train", "--preset", "digits", "--out", str(out), "--log-every", "1", *TINY]
    child = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                             stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)  # fmt: skip
    deadline = time.monotonic() + 1800
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=1800)
    assert child.returncode == 130 and "Traceback" not in err
    assert "saved" in err.splitlines()[-1] and load(newest(out))[1]["step"] > 0


# Ctrl-C


def interrupted(words, moment, folder):
    """Run ``sdit``, send SIGINT after stderr matches ``moment``, and return (exit code, later lines of stderr)."""
    command = [sys.executable, "-X", "importtime", "-m", "sdit", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c) as child:
        seen = b""
        while not re.search(moment, seen):
            part = os.read(child.stderr.fileno(), 1 << 16)
            assert part, (moment, seen[-2000:])
            seen += part
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read().decode()
    return child.wait(1800), [line for line in rest.splitlines() if "import time:" not in line]


LONG = ["pretrained", "-n", "1000", "--sampler", "ddpm"]


@pytest.mark.parametrize("moment", ["argparse", "numpy", "torch.storage", "sdit.diffusion"])
def test_ctrl_c_during_imports_is_one_line(moment, tmp_path):
    """``moment`` names the module that was just imported."""
    code, err = interrupted(["sample", *LONG], rf"\| +{moment}\n".encode(), tmp_path)
    assert code == 130 and err in (["sdit: stopped"], ["sdit sample: stopped"])


@pytest.mark.parametrize("command, message", [
    ("sample", r"sdit sample: stopped, samples.png is not written"),
    ("evaluate", r"sdit evaluate: stopped after 0 of 1000 images, which .* keeps: the same command continues"),
])  # fmt: skip
def test_ctrl_c_while_drawing_is_one_line(command, message, tmp_path, monkeypatch):
    if command == "evaluate":
        pytest.importorskip("sklearn")
        words = ["evaluate", str(tmp_path / "digits"), "--classifier", str(tmp_path / "judge"), "-n", "1000"]
        from sdit.checkpoint import save_model
        from sdit.evaluate import Classifier

        save_model(tmp_path / "digits", SDiT(PRESETS["digits"]))
        names = tuple("0123456789")
        about = {"channels": 1, "image_size": 8, "names": names, "dataset": "digits", "widths": (4, 4, 4, 4)}
        save(tmp_path / "judge", {"classifier": Classifier(**about).state_dict()}, {"classifier": about})
    else:
        words = ["sample", *LONG]
    code, err = interrupted(words, rb"images/s", tmp_path)
    assert code == 130 and re.fullmatch(message, err[-1]) and not any("Traceback" in line for line in err), err
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.rglob("*lock"))


def test_ctrl_c_inside_exec_exits_with_130(tmp_path):
    """As when a dataclass is built: python -m then wants to exit by the signal, even if the exception is caught."""
    code = """if 1:
        from sdit import cli
        cli.make_parser = lambda: exec("raise KeyboardInterrupt")
        raise SystemExit(cli.main([]))"""
    (tmp_path / "interrupted.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-m", "interrupted"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "sdit: stopped\n")


def test_an_interrupt_without_a_message_is_one_line(monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdit.evaluate.run", stopped)
    assert main(["evaluate", "pretrained"]) == 130
    assert error_line(capsys) == "sdit evaluate: stopped\n"


def test_a_wrong_environment_variable_is_one_line(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SDIT_NVTX": "yes"}
    done = subprocess.run([sys.executable, "-m", "sdit", "info", "digits"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "sdit info: error: SDIT_NVTX must be 0 or 1; got 'yes'\n")


# A folder of images


def test_a_folder_of_images_trains_and_samples(tmp_path, monkeypatch, capsys):
    """Train on it, resume from another folder without naming it again, sample a class by name, and run info."""
    Image = pytest.importorskip("PIL.Image")
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 30 * i).save(tmp_path / "photos" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    own = ["--set", "dataset=folder", "--set", "num_classes=2", "--data", "photos", "--sample-every", "0"]
    assert main(["train", "--preset", "digits", *own, *TINY, "--steps", "2", "--out", "run"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "../run", "--steps", "3"]) == 0
    assert load(newest(tmp_path / "run"))[1]["step"] == 3
    assert main(["sample", "../run", "--labels", "dog", "-n", "1", "--sampler", "ddim", "--steps", "2", "--no-gif"]) == 0
    assert main(["info", "../run", "--batch-size", "2"]) == 0
    assert "of noise, not of images" not in capsys.readouterr().out
    assert main(["sample", "../run", "--labels", "cow"]) == 2
    assert "0 to 1 or by name (cat, dog), or none for no class; 'cow' is not one" in error_line(capsys)
    (tmp_path / "photos").rename(tmp_path / "gone")
    assert main(["train", "--resume", "../run", "--steps", "4"]) == 2
    err = error_line(capsys)
    assert f"this run had its data in {tmp_path}/photos: the folder" in err and "say with --data where" in err


@pytest.mark.process
@pytest.mark.parametrize(
    "given, want", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_the_command_limits_how_long_openmp_threads_spin(given, want):
    """The command sets the spin count of OpenMP threads, unless the user has set one. Importing torch first leaves it unset."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given | {"PYTHONPATH": str(ROOT)}
    code = "import os, sys\n{}from sdit.cli import main\nmain(['info', 'nothing'])\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    for before, expected in (("", want), ("import torch\n", given.get("GOMP_SPINCOUNT", "None"))):
        command = [sys.executable, "-c", code.format(before)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == expected, done.stderr


def test_an_unknown_option_names_its_command(capsys):
    with pytest.raises(SystemExit) as left:
        main(["sample", "--nope"])
    expected = "sdit sample: error: unrecognized arguments: --nope (sdit sample --help says more)"
    assert left.value.code == 2 and capsys.readouterr().err.strip() == expected


def test_info_says_which_guidance_is_the_default(capsys):
    assert main(["info", "pretrained", "--batch-size", "2"]) == 0
    guidance = load_model("pretrained").recommended["guidance"]
    assert f"sdit sample and sdit evaluate use guidance {guidance:g} at times " in capsys.readouterr().out
