"""sdit sample and sdit evaluate in two processes: the same images, figures and files as in one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from perf.train_classifier import save_classifier
from sdit import PRESETS, SDiT
from sdit.checkpoint import save_model
from sdit.classifier import Classifier
from sdit.cli import main
from sdit.data import load
from sdit.pictures import save_images

pytestmark = pytest.mark.process
Image = pytest.importorskip("PIL.Image", reason="files are written with pillow")

BOTH = """
import sys
import torch.distributed
from sdit.cli import main
torch.distributed.init_process_group("gloo")  # for both commands: a second group would find the addresses of the first
for command in sys.argv[1:]:
    if main(command.split()):
        sys.exit(2)
torch.distributed.destroy_process_group()
"""


def commands(folder, files):
    """Three batches each, the last one smaller."""
    how = "--sampler dpm++ --steps 3 --guidance 2 --device cpu"
    yield f"sample {files}/model.safetensors --out {folder}/a.png --npz --images {folder}/sample -n 10 --batch-size 4 {how}"
    outputs = f"--json {folder}/b.json --npz {folder}/b.npz --images {folder}/evaluate"
    yield f"evaluate {files}/model.safetensors --classifier {files}/judge.safetensors -n 40 --batch-size 16 {outputs} {how}"


def in_two_processes(*words, cache):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run([*torchrun, *words], env=environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = SDiT(PRESETS["digits"], dim=32, depth=2)
    torch.nn.init.normal_(model.final.weight, std=0.1)
    save_model(folder / "model.safetensors", model)
    save_classifier(folder / "judge.safetensors", Classifier(1, 8, load("digits").names, "digits", (8, 8, 8, 16)))
    return folder


def content(path):
    return sorted((each.relative_to(path).as_posix(), each.read_bytes()) for each in path.rglob("*.png"))


def test_two_processes_draw_and_measure_as_one(files, tmp_path, monkeypatch, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it, because the number of threads changes the rounding
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_of_one"))
    try:
        for line in commands(one, files):
            assert main(line.split()) == 0, capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
    cache = tmp_path / "cache_of_two"
    (tmp_path / "both.py").write_text(BOTH)
    done = in_two_processes(str(tmp_path / "both.py"), *commands(two, files), cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("10 images in") == done.stdout.count("40 drawn images") == 1  # the first process alone
    assert [f.name for f in sorted(one.iterdir())] == [f.name for f in sorted(two.iterdir())]
    assert len(content(one)) == 51 and content(one) == content(two)
    assert (one / "a.gif").read_bytes() == (two / "a.gif").read_bytes()
    for name in ("a.npz", "b.npz"):
        with np.load(one / name) as a, np.load(two / name) as b:
            assert np.array_equal(a["images"], b["images"]) and np.array_equal(a["labels"], b["labels"])
            folder = one / ("sample" if name == "a.npz" else "evaluate")
            for i, image in enumerate(a["images"]):
                assert np.array_equal(np.asarray(Image.open(folder / f"{i:05d}.png")), image[..., 0])
    assert json.loads((one / "b.json").read_text()) == json.loads((two / "b.json").read_text())

    (kept,) = (cache / "sdit/evaluate").iterdir()
    assert sorted(f.name for f in kept.iterdir()) == ["0000000.npz", "0000016.npz", "0000032.npz"]

    done = in_two_processes("-m", "sdit", *next(commands(two, files)).split(), cache=cache)
    said = f"sdit sample: error: --images must be an empty or new folder, {two}/sample holds files already"
    assert done.returncode and said in done.stderr and "images/s" not in done.stderr


def test_images_are_written_as_other_tools_read_them(tmp_path):
    images = torch.randint(256, (3, 5, 5, 3), dtype=torch.uint8)
    save_images(tmp_path / "new", images)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new/00002.png")), images[2].numpy())
    with pytest.raises(ValueError, match="images must be an empty or new folder, .*new holds files already"):
        save_images(tmp_path / "new", images)
    with pytest.raises(ValueError, match=r"images must be \(N, S, S, 1 or 3\) uint8, got \(3, 5, 5\)"):
        save_images(tmp_path / "other", images[..., 0])
