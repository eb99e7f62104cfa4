"""--graph: the same step, recorded once and replayed. A recording of operators on the CPU stands in for the CUDA graph."""

import dataclasses
import math
import warnings

import pytest
import torch
from test_sdit_train import TINY, comparable_rows, settings, states_equal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdit import SDiT
from sdit import train as trainer
from sdit.checkpoint import checkpoints, load, newest
from sdit.cli import main
from sdit.data import load as load_data
from sdit.execution import make_recorder
from sdit.processes import Processes
from sdit.sample import sample
from sdit.train import train

# Without a variance: on the CPU its bound looks for images of time 0, so its operators depend on the data.
CONFIG = dataclasses.replace(TINY, learn_sigma=False)


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from tensors(each)


class Recording(TorchDispatchMode):
    """A list of the operators that a function calls.

    As in a CUDA graph, a replay reads and writes the memory of the recording and repeats its Python numbers, and the recording
    itself changes no memory from before it.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        values = dict(zip((a.name for a in schema.arguments), args)) | kwargs
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tensors(values.get(argument.name)):
                    if t.untyped_storage().data_ptr() not in self.made:
                        self.before.setdefault(id(t), (t, t.clone()))
        out = function(*args, **kwargs)
        # in-place operators and views need no copy of their result
        new = [] if any(r.alias_info is not None for r in schema.returns) else list(tensors(out))
        self.made |= {t.untyped_storage().data_ptr() for t in new}
        self.calls.append((function, args, kwargs, new))
        return out

    @torch.no_grad()
    def undo(self):
        for t, old in self.before.values():
            t.copy_(old)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, old in self.calls:
            for a, b in zip(old, tensors(function(*args, **kwargs))):
                a.copy_(b)


class Recorder:
    """Has the methods of CudaGraphs."""

    def __init__(self):
        self.recorded = 0

    def warm_up(self, work):
        return work()

    def record(self, work):
        with Recording() as recording:
            out = work()
        recording.undo()
        self.recorded += 1

        def replay():
            recording.replay()
            return out

        return replay


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    for module in ("train", "sample"):
        monkeypatch.setattr(f"sdit.{module}.make_recorder", lambda graph, device, world=1: found if graph else None)
    return found


def run(folder, graph, **changes):
    """Train; warm-up and cosine change the learning rate, and the average its weight, in every step."""
    s = settings(**dict(steps=7, warmup=3, cosine=True, clip=0.5, ema=0.9, log_every=1, save_every=4) | changes)
    return train(CONFIG, dataclasses.replace(s, graph=graph), folder, progress=False)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "bf16": True}, {"ema": 0.0, "clip": 0.0, "warmup": 0}])
def test_a_replayed_run_equals_an_eager_one(tmp_path, recorder, changes):
    for name in ("eager", "graph"):
        run(tmp_path / name, name == "graph", **changes)
    assert recorder.recorded == 2  # forward and backward pass with clipping; the update
    eager, graph = (comparable_rows(tmp_path / name) for name in ("eager", "graph"))
    if "accumulate" in changes:  # the rates of an eager run are the means of both parts
        eager, graph = ([{k: v for k, v in row.items() if k != "rates"} for row in rows] for rows in (eager, graph))
    assert eager == graph and len({row["loss"] for row in graph}) == 7
    for a, b in zip(*(load(newest(tmp_path / name))[0].values() for name in ("eager", "graph"))):
        assert states_equal(a, b)


def test_the_recording_notices_a_python_number(tmp_path, recorder, monkeypatch):
    """With a learning rate that is a Python number, a replay repeats the rate of the recorded step."""
    update = trainer.Run.update

    def with_a_number(self):
        group = self.optimizer.param_groups[0]
        rate, group["lr"] = group["lr"], group["lr"].item()
        update(self)
        group["lr"] = rate

    for name in ("eager", "graph"):
        monkeypatch.setattr(trainer.Run, "update", with_a_number)
        run(tmp_path / name, name == "graph")
    eager, graph = (comparable_rows(tmp_path / name) for name in ("eager", "graph"))
    assert eager[:4] == graph[:4] and eager[5]["loss"] != graph[5]["loss"]


def test_a_step_reads_no_value(tmp_path, monkeypatch):
    """A GPU cannot record a step that needs a value on the CPU, or whose shapes depend on values."""
    run = trainer.Run(TINY, settings(ema=0.9), tmp_path, load_data("digits"), {}, Processes(0, 1, torch.device("cpu")), False)
    batch = run.batch(0)

    def names_of_operators():
        with Recording() as recording:
            run.compute_row(run.model, **batch)
            run.update()
        return [str(function) for function, *_ in recording.calls]

    reads = {"aten._local_scalar_dense.default", "aten.nonzero.default"}
    assert reads <= set(names_of_operators())  # values that only CPU tensors have checked, see the next line
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    names = names_of_operators()
    assert len(names) > 500 and "aten._fused_adamw_.tensor_lr" in names and not reads & set(names)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, recorder):
    for name in ("whole", "parts"):
        run(tmp_path / name, True)
    checkpoints(tmp_path / "parts")[-1].unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(out_dir=tmp_path / "parts", resume=True, progress=False)
    assert recorder.recorded == 6
    assert comparable_rows(tmp_path / "parts") == comparable_rows(tmp_path / "whole")
    for a, b in zip(*(load(newest(tmp_path / name))[0].values() for name in ("whole", "parts"))):
        assert states_equal(a, b)
    stored = load(newest(tmp_path / "parts"))[1]["settings"]
    assert stored["graph"]
    checkpoints(tmp_path / "parts")[-1].unlink()
    with pytest.warns(UserWarning, match="graph was True until step 4 and is False from here on"):
        train(None, trainer.TrainSettings(**stored | {"graph": False}), tmp_path / "parts", resume=True, progress=False)


def test_a_loss_that_is_not_finite_stops_a_replayed_run(tmp_path, recorder, monkeypatch):
    batch = trainer.Run.batch

    def poisoned(run, step):
        found = batch(run, step)
        if step == 5:
            found["noise"][0, 0, 0, 0] = math.nan
        return found

    monkeypatch.setattr(trainer.Run, "batch", poisoned)
    said = []
    for name in ("eager", "graph"):
        with pytest.raises(FloatingPointError, match="step 6: mse is nan") as caught:
            run(tmp_path / name, name == "graph")
        said.append(str(caught.value).replace(name, ""))
    assert said[0] == said[1] and "the gradient of position and" in said[0] and recorder.recorded == 2


def test_replayed_sampling_draws_the_same_images(recorder):
    """Two shapes, since the last batch is smaller, so two recordings."""
    model = SDiT(TINY)
    nn.init.normal_(model.final.weight, std=0.1)
    for how in (dict(sampler="dpm++", steps=6), dict(sampler="ddpm", steps=5, guidance=2.0, threshold=0.5)):
        how |= dict(batch_size=2)
        recorder.recorded = 0
        assert torch.equal(sample(model, [1, 2, 3, 4, 5], graph=True, **how), sample(model, [1, 2, 3, 4, 5], **how))
        assert recorder.recorded == 2
    how = dict(sampler="dpm++", steps=20, guidance=2.0, guidance_interval=(300, 700), batch_size=3)
    assert torch.equal(sample(model, [1, 2, 3], graph=True, **how), sample(model, [1, 2, 3], **how))
    assert recorder.recorded == 4  # with and without guidance


def test_a_device_without_graphs_and_several_processes_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^graph \(--graph\) needs a GPU with CUDA graphs, the device is cpu$"):
        train(TINY, settings(graph=True), tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()
    train(TINY, settings(steps=1), tmp_path / "eager", device="cpu", progress=False)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"^graph \(--graph\) needs a GPU"):
        warnings.simplefilter("error")
        train(None, settings(steps=2, graph=True), tmp_path / "eager", resume=True, progress=False)
    with pytest.raises(ValueError, match=r"^graph \(--graph\) needs a GPU"):
        sample(SDiT(TINY), [1], graph=True)
    with pytest.raises(ValueError, match=r"^graph \(--graph\) trains in one process, got 2 processes"):
        make_recorder(True, torch.device("cuda"), 2)
    for command in (["sample", "--out", str(tmp_path / "a.png")], ["evaluate", "pretrained", "-n", "150"]):
        assert main([*command, "--graph", "--device", "cpu"]) == 2
        assert "error: --graph needs a GPU with CUDA graphs, the device is cpu" in capsys.readouterr().err


def test_a_failed_recording_names_the_switch(tmp_path, recorder, monkeypatch):
    def fails(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", fails)
    said = r"^graph \(--graph\) failed, {} without it: operation not permitted"
    with pytest.raises(RuntimeError, match=said.format("train")):
        run(tmp_path, True)
    with pytest.raises(RuntimeError, match=said.format("draw")):
        sample(SDiT(TINY), [1], graph=True, steps=4)
