"""Train SDiT of the paper's size on Fashion-MNIST for some minutes of a GPU, then draw and measure images.

    python perf/gpu_train.py --out first
    python perf/gpu_train.py --out second --start first/weights    from the averaged weights of an earlier call
    python perf/gpu_train.py --dry-run --out small                 a small run on the CPU, to test this script

It trains the preset fashion_mnist with the recipe "improved" in bf16, with --graph; if that fails, with --compile; if that
fails too, without both. report.json says which, and the errors. A call with --start has a new optimiser and a warm-up, so
several short calls make one long training. Everything that the next call and a reader need lies in the folder --out and fits a
transfer of few files of 16 MiB:

report.json        settings, speed, memory, the distances of the drawn images; written after every part
metrics.jsonl      the log of the run
samples.png        drawn images
weights/*          the averaged weights in bf16, in files below 16 MiB
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness
from perf.gpu_checks import graphs
from sdit import PRESETS, SDiT
from sdit.checkpoint import checkpoints, load, load_model, save
from sdit.classifier import Classifier
from sdit.config import Config
from sdit.data import from_uint8
from sdit.evaluate import draw, evaluate
from sdit.pictures import save_grid
from sdit.plot import read_metrics
from sdit.train import TrainSettings, train

SHARD = 15 << 20  # bytes of tensors in a file
MODES = {"graph": {"graph": True}, "compile": {"compile": True}, "eager": {}}
PROBE = 40  # steps of the run that measures the speed
SHARE_OF_TRAINING = 0.7  # of the time that is left after the probe; drawing 5,000 images needs the rest


def save_shards(folder, model, limit=SHARD):
    """Write the weights of a model in bf16, in files of at most ``limit`` bytes of tensors."""
    shards, size = [{}], 0
    for name, t in model.state_dict().items():
        t = t.to(torch.bfloat16)
        if t.nbytes > limit:
            raise ValueError(f"{name} has {t.nbytes} bytes, limit must be at least as large, got {limit}")
        if size + t.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    meta = {"config": model.config.to_dict(), "data": model.trained_on, "shards": len(shards)}
    for i, shard in enumerate(shards):
        save(pathlib.Path(folder) / f"weights_{i}.safetensors", {"model": shard}, meta)


def load_shards(folder):
    """Return the model that ``save_shards`` wrote, in float32."""
    files = sorted(pathlib.Path(folder).glob("weights_*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights_*.safetensors")
    weights = {}
    for file in files:
        groups, meta = load(file)
        weights |= groups["model"]
    if len(files) != meta["shards"]:
        raise ValueError(f"{folder} must hold {meta['shards']} files, got {len(files)}")
    model = SDiT(Config.from_dict(meta["config"]))
    model.load_state_dict(weights)
    return model


def find_mode(config, settings, chosen, device, root, initial, report):
    """Return the first mode that trains, and its images per second."""
    for mode in MODES if chosen is None else [chosen]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                train(
                    config, dataclasses.replace(settings, **MODES[mode]), folder,
                    root=root, device=device, initial=initial, progress=False,
                )  # fmt: skip
            except Exception as error:  # the run is worth more than the mode; the report keeps the error
                report.setdefault("failed", {})[mode] = f"{type(error).__name__}: {error}"[:2000]
                print(f"{mode} failed: {error}", flush=True)
                continue
            return mode, read_metrics(folder)[-1]["images_per_s"]
    raise SystemExit("gpu_train.py: no mode trains; report.json has the errors")


@contextlib.contextmanager
def stop_after(seconds):
    """Send this process Ctrl-C after some seconds, on which ``train`` saves a checkpoint and stops."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        timer.cancel()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", metavar="FOLDER", required=True, help="a new folder for the results")
    p.add_argument("--start", metavar="FOLDER", help="start from the weights of an earlier call")
    p.add_argument("--data", metavar="FOLDER", help="folder of Fashion-MNIST")
    p.add_argument("--mode", choices=MODES, help="train in this mode only (default: the first that works)")
    p.add_argument("--minutes", type=float, default=7, help="minutes for everything (default: %(default)s)")
    p.add_argument("--lr", type=float, help="learning rate (default: the value of the recipe)")
    p.add_argument("--dry-run", action="store_true", help="a small run on the CPU, to test this script")
    options = p.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu_train.py: torch sees no GPU; --dry-run runs on the CPU")
    began, out, small = time.monotonic(), pathlib.Path(options.out), options.dry_run
    if out.exists():
        p.error(f"--out must be a new folder, {out} exists")
    out.mkdir(parents=True)
    device = "cpu" if small else "cuda"
    sizes = {"dim": 32, "depth": 2} if small else {}
    config = dataclasses.replace(PRESETS["digits" if small else "fashion_mnist"], variant="improved", **sizes)
    changes = {"batch_size": 8, "log_every": 2} if small else {"batch_size": 256, "log_every": 20}
    changes |= {"lr": options.lr} if options.lr else {}
    # without flips, because every sneaker and boot of Fashion-MNIST points to the left
    settings = TrainSettings.of(config, bf16=True, flip=False, sample_every=0, save_every=10**6, keep=1, **changes)
    initial = load_shards(options.start) if options.start else None
    report = {"provenance": harness.provenance(device), "start": options.start, "settings": dataclasses.asdict(settings)}

    def seconds_left():
        return 60 * options.minutes - (time.monotonic() - began)

    def record(**facts):
        report.update(facts, seconds=round(time.monotonic() - began, 1))
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    with contextlib.ExitStack() as stack:
        stack.enter_context(graphs(device))
        run = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        probe = dataclasses.replace(settings, steps=6 if small else PROBE)
        try:
            mode, speed = find_mode(config, probe, options.mode, device, options.data, initial, report)
        finally:
            record()
        seconds = SHARE_OF_TRAINING * seconds_left()
        steps = 6 if small else max(settings.warmup + 1, int(seconds * speed / settings.batch_size))
        settings = dataclasses.replace(settings, steps=steps, **MODES[mode])
        record(mode=mode, dry_run=small, probe_images_per_s=speed, settings=dataclasses.asdict(settings))
        print(f"{mode}{' (a stand-in on the CPU)' if small else ''}: {speed:.0f} images/s, {steps} steps", flush=True)

        with stop_after(1.15 * seconds):
            train(config, settings, run, root=options.data, device=device, initial=initial, progress=False)
        shutil.copy(run / "metrics.jsonl", out)
        model = load_model(checkpoint := checkpoints(run)[-1])
        save_shards(out / "weights", model)
        rows = read_metrics(run)
        speeds = sorted(row["images_per_s"] for row in rows)
        record(
            steps_done=rows[-1]["step"], loss=rows[-1]["loss"], images_per_s=speeds[len(speeds) // 2],
            memory_mb=max(row["memory_mb"] for row in rows),
        )  # fmt: skip
        print(f"step {rows[-1]['step']}, loss {rows[-1]['loss']:.4f}; weights are saved", flush=True)

        images, labels, facts = draw(
            checkpoint, 40 if small else 5000, folder=run / "images", bf16=True, device=device, sampler="dpm++",
            steps=3 if small else 50, guidance=2.0, batch_size=20 if small else 500, graph=mode == "graph",
        )  # fmt: skip
        shown = from_uint8(images[:40].permute(0, 3, 1, 2))
        save_grid(out / "samples.png", shown, labels[:40], model.trained_on["classes"], columns=10)
        record(drawn=len(images), drawing=facts)
        classifier = Classifier(1, 8, tuple("0123456789"), "digits", (8, 8, 8, 16)) if small else None
        found = evaluate(images, labels, classifier, options.data)
        record(distances=found)
    print(f"Frechet distance {found['drawn']['frechet_distance']:.3f}, label accuracy {found['drawn']['label_accuracy']:.3f}; "
          f"{(time.monotonic() - began) / 60:.1f} minutes")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
