"""Data sets: find, read, download and refuse files; exact conversions; an order of images that depends only on the step."""

import doctest
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdit import data
from sdit.data import Order, from_uint8, load, to_batch, to_uint8
from sdit.download import has_checksum


@pytest.fixture(autouse=True)
def no_files_and_no_network(tmp_path, monkeypatch):
    """Hide the data files of this machine and disable the network. A test then provides its own files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SDIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    bases = data._base_folders
    monkeypatch.setattr(data, "_base_folders", lambda root: [base for base in bases(root) if not str(base).startswith("/usr/")])
    for name, spec in data.DATASETS.items():
        monkeypatch.setitem(data.DATASETS, name, replace(spec, mirrors=()))


def idx(array):
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def random_bytes(*shape, most=256, seed=0):
    return np.random.default_rng(seed).integers(most, size=shape).astype(np.uint8)


IMAGES, LABELS = random_bytes(20, 28, 28), random_bytes(20, most=10)


def write_idx(folder, images=IMAGES, labels=LABELS, prefix="train", gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        content = idx(array)
        (folder / (stem + ".gz" if gz else stem)).write_bytes(gzip.compress(content) if gz else content)
    return folder


# Conversions


def test_every_level_of_a_pixel_converts_exactly_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(levels)
    assert x.dtype == torch.float32
    assert torch.equal(x, levels.float() / 127.5 - 1) and x[0] == -1 and x[255] == 1
    assert (x.double() - (torch.arange(256, dtype=torch.float64) / 127.5 - 1)).abs().max() < 1e-7
    assert torch.equal(to_uint8(x), levels)
    assert torch.equal(to_uint8(x + 0.0039), levels) and torch.equal(to_uint8(x - 0.0039), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0, float("inf"), float("-inf"), float("nan")])).tolist() == [0, 255, 255, 0, 0]


def test_to_batch_repeats_grey_and_moves_channels():
    images = torch.from_numpy(random_bytes(5, 6, 6, 1))
    x = to_batch(images, SimpleNamespace(channels=3, image_size=6))
    assert x.shape == (5, 3, 6, 6) and x.is_contiguous()
    assert torch.equal(x, (images.float() / 127.5 - 1).permute(0, 3, 1, 2).repeat(1, 3, 1, 1))
    colour = random_bytes(5, 6, 6, 3)
    y = to_batch(colour, SimpleNamespace(channels=3, image_size=6))
    assert torch.equal(to_uint8(y).permute(0, 2, 3, 1), torch.from_numpy(colour))
    assert to_batch(images[:0], SimpleNamespace(channels=1, image_size=6)).shape == (0, 1, 6, 6)


def test_to_batch_flips_the_chosen_images():
    images, flip = torch.from_numpy(random_bytes(4, 6, 6, 3)), torch.tensor([True, False, False, True])
    config = SimpleNamespace(channels=3, image_size=6)
    x, plain = to_batch(images, config, flip), to_batch(images, config)
    assert torch.equal(x[~flip], plain[~flip]) and torch.equal(x[flip], plain[flip].flip(3)) and x.is_contiguous()


def test_resizing_equals_pillows_bilinear_of_the_central_square():
    Image = pytest.importorskip("PIL.Image")
    images = random_bytes(3, 32, 40, 3)
    ours = to_uint8(to_batch(images, SimpleNamespace(channels=3, image_size=28))).permute(0, 2, 3, 1).numpy().astype(int)
    for mine, image in zip(ours, images):
        theirs = np.asarray(Image.fromarray(image[:, 4:36]).resize((28, 28), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(mine - theirs).max() <= 1
    constant = to_batch(np.full((1, 8, 8, 1), 77, np.uint8), SimpleNamespace(channels=1, image_size=5))
    assert (to_uint8(constant) == 77).all()


@pytest.mark.parametrize(
    "images, channels, flip, error, message",
    [
        (torch.zeros(2, 4, 4, 1), 1, None, TypeError, "images must be uint8 of 0..255, got torch.float32"),
        ([1], 1, None, TypeError, "images must be uint8 of 0..255, got list"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 1, None, ValueError, r"images must be \(B, H, W, C\) with C 1 or 3"),
        (torch.zeros(2, 0, 4, 1, dtype=torch.uint8), 1, None, ValueError, "images must be"),
        (
            torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
            1,
            None,
            ValueError,
            "config.channels must be 3 for images of 3 channels, got 1",
        ),
        (
            torch.zeros(2, 4, 4, 1, dtype=torch.uint8),
            2,
            None,
            ValueError,
            "config.channels must be 1 or 3 for images of 1 channels, got 2",
        ),
        (
            torch.zeros(2, 4, 4, 1, dtype=torch.uint8),
            1,
            torch.zeros(2),
            ValueError,
            r"flip must be a bool tensor of shape \(2,\)",
        ),
        (torch.zeros(2, 4, 4, 1, dtype=torch.uint8), 1, torch.zeros(3, dtype=torch.bool), ValueError, "flip must be"),
    ],
)
def test_wrong_images_are_named_in_the_error(images, channels, flip, error, message):
    with pytest.raises(error, match=message):
        to_batch(images, SimpleNamespace(channels=channels, image_size=4), flip)


# The order of images


@given(n=st.integers(1, 50), seed=st.integers(0, 2**40), batch=st.integers(1, 120), steps=st.integers(1, 12))
def test_every_epoch_has_every_image_once(n, seed, batch, steps):
    order = Order(n, seed)
    stream = torch.cat([order.indices(step, batch) for step in range(steps)])
    assert stream.dtype == torch.int64 and len(stream) == steps * batch
    for epoch in stream.split(n):
        assert len(epoch.unique()) == len(epoch) and set(epoch.tolist()) <= set(range(n))
    step = steps - 1
    assert torch.equal(Order(n, seed).indices(step, batch), stream[step * batch :])  # no earlier step is needed


@given(world=st.integers(1, 6), each=st.integers(1, 9), step=st.integers(0, 1000))
def test_ranks_share_the_images_of_a_step(world, each, step):
    order = Order(37, 5)
    parts = [order.indices(step, world * each, rank, world) for rank in range(world)]
    assert all(len(part) == each for part in parts)
    assert torch.equal(torch.cat(parts), order.indices(step, world * each))
    flips = [order.flips(step, world * each, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(flips), order.flips(step, world * each))


def test_orders_differ_between_epochs_and_seeds():
    order = Order(1000, 1)
    first, second = order.indices(0, 1000), order.indices(1, 1000)
    assert not torch.equal(first, second) and not torch.equal(first, Order(1000, 2).indices(0, 1000))
    flips = order.flips(0, 1000)
    assert 400 < flips.sum() < 600 and not torch.equal(flips, order.flips(1, 1000))
    assert torch.equal(pickle.loads(pickle.dumps(order)).indices(1, 1000), second)


def test_the_order_never_changes():
    """A checkpoint from today must continue with the same images in a later version."""
    assert Order(10, 0).indices(0, 10).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert Order(10, 7).indices(1, 14).tolist() == [3, 7, 9, 0, 6, 5, 6, 8, 1, 3, 0, 9, 2, 7]
    assert Order(10, 7).flips(2, 8).int().tolist() == [0, 0, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Order(0), ValueError, "n must be at least 1, got 0"),
        (lambda: Order(3.0), TypeError, "n must be an int, got 3.0"),
        (lambda: Order(3, -1), ValueError, "seed must be at least 0, got -1"),
        (lambda: Order(3).indices(-1, 2), ValueError, "step must be at least 0, got -1"),
        (lambda: Order(3).indices(0, 3, 0, 2), ValueError, "batch_size must be a positive multiple of world = 2, got 3"),
        (lambda: Order(3).indices(0, 0), ValueError, "batch_size must be a positive multiple of world = 1, got 0"),
        (lambda: Order(3).indices(0, 2, 2, 2), ValueError, r"rank must be in 0\.\.world-1, got rank 2 of world 2"),
    ],
)
def test_wrong_arguments_of_an_order_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Digits


def test_digits_equal_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    train, test = load("digits"), load("digits", split="test")
    assert train.images.shape == (1500, 8, 8, 1) and len(test) == 297 and train.names == tuple("0123456789")
    assert train.images.min() == 0 and train.images.max() == 255 and train.labels.dtype == torch.int64
    original = datasets.load_digits()
    assert torch.equal(torch.cat([train.labels, test.labels]), torch.from_numpy(original.target).long())
    again = (torch.cat([train.images, test.images]).double() * 16 / 255).round().squeeze(-1)
    assert torch.equal(again, torch.from_numpy(original.images))  # all 17 levels stay distinct
    assert not train.mirror and train.labels.bincount().min() > 140
    assert load("digits", size=16).images.shape == (1500, 16, 16, 1)


def test_digits_without_scikit_learn_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="the digits come with scikit-learn: pip install scikit-learn"):
        load("digits")


# idx files


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name, folder", [("mnist", "MNIST/raw"), ("fashion_mnist", "fashion-mnist"), ("mnist", ".")])
def test_idx_files_are_found_below_root(tmp_path, name, folder, gz):
    write_idx(tmp_path / "root" / folder, gz=gz)
    found = load(name, root=tmp_path / "root")
    assert found.images.shape == (20, 28, 28, 1) and np.array_equal(found.images.numpy()[..., 0], IMAGES)
    assert np.array_equal(found.labels.numpy(), LABELS) and len(found.names) == 10
    with pytest.raises(FileNotFoundError, match="t10k-images"):
        load(name, root=tmp_path / "root", split="test")
    write_idx(tmp_path / "root" / folder, IMAGES[:3], LABELS[:3], prefix="t10k")
    assert len(load(name, root=tmp_path / "root", split="test")) == 3


def test_default_folders_are_searched_in_order(tmp_path, monkeypatch):
    places = [
        tmp_path / "env" / "fashion_mnist",
        tmp_path / "data" / "FashionMNIST" / "raw",
        tmp_path / "cache/sdit/fashion-mnist",
    ]
    monkeypatch.setenv("SDIT_DATA", str(tmp_path / "env"))
    for n, place in reversed(list(enumerate(places, start=1))):
        write_idx(place, IMAGES[:n], LABELS[:n])
        assert len(load("fashion_mnist")) == n
    # mnist has files of the same names: a base folder itself is searched only if it is named after the data set
    with pytest.raises(FileNotFoundError):
        load("mnist")
    monkeypatch.setenv("SDIT_DATA", str(places[0]))
    assert len(load("fashion_mnist")) == 1
    with pytest.raises(FileNotFoundError):
        load("mnist")


def test_debians_fashion_mnist_is_read(monkeypatch):
    folder = "/usr/share/datasets/fashion-mnist"
    if not os.path.exists(f"{folder}/t10k-images-idx3-ubyte.gz"):
        pytest.skip(f"no {folder}: Debian's package dataset-fashion-mnist is not installed")
    monkeypatch.undo()
    monkeypatch.delenv("SDIT_DATA", raising=False)
    test = load("fashion_mnist", split="test")
    assert test.images.shape == (10000, 28, 28, 1) and (test.labels.bincount() == 1000).all()
    assert test.names[int(test.labels[0])] == "ankle boot" and test.mirror
    spec = data.DATASETS["fashion_mnist"]
    for file in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        assert has_checksum(data._read_bytes(Path(folder, f"{file}.gz")), spec.checksums[file])


def test_an_error_for_a_missing_data_set_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion_mnist")
    message = str(caught.value)
    assert "\n" not in message and "train-images-idx3-ubyte[.gz]" in message
    for part in ("dataset-fashion-mnist", "SDIT_DATA", str(tmp_path / "cache/sdit/fashion_mnist"), "root"):
        assert part in message


def damage(folder, stem, change):
    path = folder / stem
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "stem, change, message",
    [
        ("images-idx3", lambda b: b[:-1], r"is damaged: it says shape \(20, 28, 28\), 15680 bytes, and holds 15679"),
        ("images-idx3", lambda b: b + b"x", "is damaged"),
        ("images-idx3", lambda b: b[:7], "is not an idx file of bytes in 3 dimensions"),
        ("images-idx3", lambda b: b"", "is not an idx file.*starts with nothing"),
        ("images-idx3", lambda b: b"\0\0\x0d" + b[3:], "is not an idx file.*00 00 0d 03"),
        ("images-idx3", lambda b: b"<html>" + b, "is not an idx file"),
        ("images-idx3", lambda b: b[:4] + b"\xff" * 12 + b[16:], "is damaged: it says shape"),
        ("images-idx3", lambda b: idx(IMAGES[:0]), "holds 0 images"),
        ("labels-idx1", lambda b: b[:8] + b"\x0a" + b[9:], r"is damaged: label 10 where 0\.\.9 are allowed"),
        ("labels-idx1", lambda b: idx(LABELS[:5]), "holds 20 images and .* 5 labels"),
        ("labels-idx1", lambda b: idx(IMAGES), "is not an idx file of bytes in 1 dimensions"),
    ],
)
def test_damaged_idx_files_give_one_clear_error(tmp_path, stem, change, message):
    damage(write_idx(tmp_path / "mnist"), f"train-{stem}-ubyte", change)
    with pytest.raises(ValueError, match=message) as caught:
        load("mnist", root=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [lambda b: b[:-20], lambda b: b[:50] + b"\0" * 9 + b[59:], lambda b: b"no gzip", lambda b: b""]
)
def test_damaged_compressed_files_give_one_clear_error(tmp_path, change):
    damage(write_idx(tmp_path / "mnist", gz=True), "train-images-idx3-ubyte.gz", change)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is (damaged|not an idx file)"):
        load("mnist", root=tmp_path)


# Downloads from a local server


class Server:
    """Serve ``files``: path -> bytes, or a function that answers a request itself."""

    def __init__(self):
        self.files, self.asked = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                content = outer.files.get(self.path)
                if callable(content):
                    content(self)
                elif content is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def mnist_server(server, monkeypatch):
    files = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS)}
    checksums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    server.files = {f"/good/{file}.gz": gzip.compress(content) for file, content in files.items()}
    mirrors = (f"{server.url}/bad/", f"{server.url}/good/")
    monkeypatch.setitem(data.DATASETS, "mnist", replace(data.DATASETS["mnist"], mirrors=mirrors, checksums=checksums))
    return server


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


WHOLE = ["mnist/train-images-idx3-ubyte", "mnist/train-labels-idx1-ubyte"]


def test_download_tries_the_next_mirror_and_keeps_the_files(tmp_path, mnist_server):
    got = load("mnist")
    assert np.array_equal(got.images.numpy()[..., 0], IMAGES) and np.array_equal(got.labels.numpy(), LABELS)
    assert files_below(tmp_path / "cache/sdit") == WHOLE
    requests = len(mnist_server.asked)
    load("mnist")
    assert len(mnist_server.asked) == requests


def send_too_few_bytes(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(gzip.compress(idx(IMAGES))[:500])


def close_without_length(handler):
    """Close the connection in the middle, without a Content-Length."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(gzip.compress(idx(IMAGES))[:500])


@pytest.mark.parametrize(
    "answer, message",
    [
        (send_too_few_bytes, "IncompleteRead|the connection ended after 500 of 100000 bytes"),
        (close_without_length, "end-of-stream|ended before"),
        (gzip.compress(idx(IMAGES[::-1])), "train-images-idx3-ubyte has the wrong checksum"),
        (b"<html>captive portal</html>", "[Nn]ot a gzipped file"),
        (None, "404"),
    ],
)
def test_a_failed_download_leaves_no_file(tmp_path, mnist_server, answer, message):
    mnist_server.files["/good/train-images-idx3-ubyte.gz"] = answer
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load("mnist")
    assert "nor downloaded" in str(caught.value) and "SDIT_DATA" in str(caught.value)
    assert files_below(tmp_path / "cache/sdit") == []


def test_an_interrupted_download_can_be_repeated(tmp_path, mnist_server, monkeypatch):
    whole = data.download

    def interrupted(url):
        if "labels" in url:
            raise KeyboardInterrupt
        return whole(url)

    monkeypatch.setattr(data, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("mnist")
    assert files_below(tmp_path / "cache/sdit") == WHOLE[:1]  # this file is complete: its checksum was right
    monkeypatch.setattr(data, "download", whole)
    load("mnist")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_file_that_cannot_be_written_completely_is_removed(tmp_path, mnist_server, monkeypatch, error):
    def fsync(handle):
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else FileNotFoundError, match=None) as caught:
        load("mnist")
    assert error is KeyboardInterrupt or "No space left on device" in str(caught.value)
    assert files_below(tmp_path / "cache/sdit") == []


def test_a_given_root_is_never_filled_from_the_network(tmp_path, mnist_server):
    with pytest.raises(FileNotFoundError):
        load("mnist", root=tmp_path)
    assert mnist_server.asked == []


def test_published_checksums_have_the_right_length():
    for name, lengths in (("mnist", {64}), ("fashion_mnist", {64}), ("cifar10", {32})):
        checksums = data.DATASETS[name].checksums
        assert {len(digest) for digest in checksums.values()} == lengths and len(set(checksums.values())) == len(checksums)


# CIFAR-10


def python2_pickle(images, labels):
    """Pickle {"batch_label": .., "labels": [..], "data": array} as Python 2 does with protocol 2: all strings are byte
    strings."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"M" + struct.pack("<H", value) if value < 65536 else b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = (
        b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"".join(number(n) for n in images.shape) + b"\x86"
    content = images.tobytes()
    array += b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(content)) + content + b"tb"
    items = text(b"batch_label") + text(b"testing") + text(b"labels") + b"](" + b"".join(map(number, labels.tolist())) + b"e"
    return b"\x80\x02}(" + items + text(b"data") + array + b"u."


def write_cifar(folder, n=4):
    folder.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(python2_pickle(random_bytes(n, 3072, seed=i), random_bytes(n, most=10, seed=i)))
    return folder


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py", "."])
def test_cifar10_batches_are_read(tmp_path, folder):
    write_cifar(tmp_path / "root" / folder) if folder != "." else write_cifar(tmp_path / "root")
    train, test = (load("cifar10", root=tmp_path / "root", split=split) for split in ("train", "test"))
    assert train.images.shape == (20, 32, 32, 3) and len(test) == 4 and train.names[0] == "airplane" and train.mirror
    # the planes are red, green and blue
    planes = np.concatenate([random_bytes(4, 3072, seed=i) for i in range(5)]).reshape(20, 3, 1024)
    assert np.array_equal(train.images.numpy().reshape(20, 1024, 3).transpose(0, 2, 1), planes)
    assert np.array_equal(test.labels.numpy(), random_bytes(4, most=10, seed=5)) and train.images.is_contiguous()
    assert load("cifar10", root=tmp_path / "root", size=28).images.shape == (20, 28, 28, 3)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_batches_written_by_python_3_are_read_or_refused(tmp_path, protocol):
    images, labels = random_bytes(4, 3072), random_bytes(4, most=10)
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol))
    if protocol == 5:  # with this protocol numpy pickles a call of one of its functions
        with pytest.raises(ValueError, match="it asks for numpy"):
            data._read_cifar(path)
    elif protocol == 2:  # with this protocol bytes are pickled as a call
        with pytest.raises(ValueError, match="it asks for _codecs.encode"):
            data._read_cifar(path)
    else:
        got = data._read_cifar(path)
        assert np.array_equal(got[1], labels)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "content, message",
    [
        (pickle.dumps({b"data": Evil()}), "it asks for posix.mkdir|it asks for nt.mkdir"),
        (python2_pickle(random_bytes(2, 3072), random_bytes(2, most=10))[:-100], "is not a python batch"),
        (b"", "is not a python batch of CIFAR-10: EOFError"),
        (b"hello", "is not a python batch"),
        (pickle.dumps([1, 2]), "is not a python batch"),
        (pickle.dumps({b"labels": [1]}), "is not a python batch of CIFAR-10: KeyError"),
        (python2_pickle(random_bytes(2, 100), random_bytes(2, most=10)), r"its data must be bytes of shape \(N, 3072\)"),
        (python2_pickle(random_bytes(2, 3072), random_bytes(3, most=10)), "is damaged: 2 images and labels of shape"),
        (python2_pickle(random_bytes(2, 3072), np.array([3, 10])), r"is damaged: labels 3\.\.10"),
    ],
)
def test_files_that_are_not_batches_are_refused(tmp_path, content, message):
    folder = write_cifar(tmp_path / "cifar10")
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load("cifar10", root=tmp_path)
    assert "data_batch_3" in str(caught.value) and not (tmp_path / "owned").exists()


def test_cifar10_is_downloaded_and_unpacked(tmp_path, server, monkeypatch):
    folder = write_cifar(tmp_path / "made")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(folder, arcname="cifar-10-batches-py")
    server.files["/c.tar.gz"] = archive.getvalue()
    checksums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    spec = replace(data.DATASETS["cifar10"], mirrors=(f"{server.url}/c.tar.gz",), checksums=checksums)
    monkeypatch.setitem(data.DATASETS, "cifar10", spec)
    assert len(load("cifar10")) == 20
    assert len(load("cifar10", split="test")) == 4
    server.files["/c.tar.gz"] = archive.getvalue()[:-200]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="nor downloaded.*unpack cifar-10-python.tar.gz"):
        load("cifar10")


# A folder of images


@pytest.fixture
def pictures(tmp_path):
    Image = pytest.importorskip("PIL.Image")

    def write(path, size=(6, 6), mode="RGB", seed=0):
        path = tmp_path / "pictures" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        array = random_bytes(size[1], size[0], 3, seed=seed)
        Image.fromarray(array).convert(mode).save(path)
        return np.asarray(Image.open(path))

    return write


def test_subfolders_are_classes(tmp_path, pictures):
    written = [pictures(f"{c}/{i}.png", seed=10 * i + ord(c)) for c in "ab" for i in range(3)]
    pictures("c/deep/er.png")
    (tmp_path / "pictures/a/notes.txt").write_text("no image")
    (tmp_path / "pictures/.hidden").mkdir()
    found = load("folder", root=tmp_path / "pictures")
    assert found.names == ("a", "b", "c") and found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert np.array_equal(found.images[:6].numpy(), np.stack(written))


def test_a_flat_folder_is_one_class_and_grey_stays_grey(tmp_path, pictures):
    written = [pictures(f"{i}.png", mode="L", seed=i) for i in range(3)]
    found = load("folder", root=str(tmp_path / "pictures"))
    assert found.names == ("image",) and found.images.shape == (3, 6, 6, 1)
    assert np.array_equal(found.images[..., 0].numpy(), np.stack(written))
    colour = pictures("9.png", seed=4)
    mixed = load("folder", root=tmp_path / "pictures")
    assert mixed.images.shape == (4, 6, 6, 3) and np.array_equal(mixed.images[3].numpy(), colour)
    assert np.array_equal(mixed.images[1].numpy(), np.repeat(written[1][..., None], 3, -1))


def test_images_of_different_sizes_need_a_size(tmp_path, pictures):
    pictures("0.png"), pictures("1.jpg", size=(20, 12))
    with pytest.raises(
        ValueError, match=r"size must be given for images of different sizes: 0.png is \(6, 6\), .*1.jpg \(12, 20\)"
    ):
        load("folder", root=tmp_path / "pictures")
    assert load("folder", root=tmp_path / "pictures", size=8).images.shape == (2, 8, 8, 3)


def test_train_and_test_folders_are_splits(tmp_path, pictures):
    pictures("train/a/0.png"), pictures("train/b/0.png"), pictures("test/a/0.png"), pictures("test/b/1.png")
    train, test = (load("folder", root=tmp_path / "pictures", split=split) for split in ("train", "test"))
    assert train.names == test.names == ("a", "b") and len(train) == len(test) == 2
    with pytest.raises(ValueError, match="train has no test split, all of it is 'train': make folders train and test"):
        load("folder", root=tmp_path / "pictures/train", split="test")


def test_folders_that_cannot_be_read_are_named(tmp_path, pictures):
    with pytest.raises(ValueError, match=r"root \(--data\) must name the folder of images"):
        load("folder")
    with pytest.raises(FileNotFoundError, match="the folder .*missing does not exist"):
        load("folder", root=tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image in .*empty"):
        load("folder", root=tmp_path / "empty")
    pictures("a/0.png")
    for name, content in (("1.png", b"not an image"), ("1.png", (tmp_path / "pictures/a/0.png").read_bytes()[:60])):
        (tmp_path / "pictures/a" / name).write_bytes(content)
        with pytest.raises(ValueError, match="1.png cannot be read as an image"):
            load("folder", root=tmp_path / "pictures")


# load


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            dict(name="imagenet"),
            ValueError,
            "name must be one of digits, mnist, fashion_mnist, cifar10, folder, got 'imagenet'",
        ),
        (dict(name="digits", split="valid"), ValueError, "split must be 'train' or 'test', got 'valid'"),
        (dict(name="digits", size=0), ValueError, "size must be a positive int or None, got 0"),
        (dict(name="digits", root="x"), ValueError, "leave root .--data. out, got 'x'"),
    ],
)
def test_wrong_arguments_of_load_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load(**arguments)


def test_docstring_examples_run():
    pytest.importorskip("sklearn")
    failed, attempted = doctest.testmod(data)
    assert attempted and not failed
