"""The training loop, for one process or several. A run can be killed at any moment and resumed.

The images of a step, their noise, times and dropped labels are functions of (seed, step). So a checkpoint at step n only holds
the weights, their average, the state of the optimiser and n. On a CPU, a resumed run equals an uninterrupted run bit for bit.
"""

import copy
import dataclasses
import functools
import json
import math
import signal
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sdit_kernels._torch import move_towards

from .checkpoint import about, checkpoints, load, newest, prune_checkpoints, save
from .config import Config
from .data import DATASETS, Images, Order, to_batch
from .data import load as load_data
from .diffusion import draw, training_loss
from .execution import Replayed, make_recorder, matmul_precision, name_switch, to_device
from .files import atomic_write
from .lock import lock
from .log import Log, lines_until
from .model import SDiT
from .pictures import check_pillow, save_grid
from .processes import join_processes, resolve_device
from .sample import class_names, sample
from .sampler import make_scheduler
from .settings import RECIPES, TrainSettings

__all__ = ["RECIPES", "TrainSettings", "train"]

_MAX_BATCH = 4096  # limit of batch_size; a larger data set raises it to its number of images
_ROUNDING = ("tf32", "compile", "graph")  # settings that may change the rounding
# Settings that a resumed run may change
_MAY_CHANGE = ("steps", "log_every", "sample_every", "save_every", "keep", "accumulate", *_ROUNDING)


def train(
    config: Config | None = None,
    settings: TrainSettings | None = None,
    out_dir: str | Path = "run",
    *,
    resume: bool = False,
    data: Images | None = None,
    root: str | Path | None = None,
    device: str | None = None,
    initial: SDiT | None = None,
    progress: bool = True,
) -> SDiT:
    r"""Train a model and write the run into the folder ``out_dir``.

    ======================================  ================================================================================
    run.json                                configuration, settings, versions
    metrics.jsonl                           step, loss, mse, vb, grad_norm, lr, rates per layer, images_per_s, memory_mb
    samples/step_*.png                      images of every class, drawn with the averaged weights
    checkpoints/step_*.safetensors          see ``sdit.checkpoint``
    tensorboard/                            the numbers of metrics.jsonl, if tensorboard is installed
    ======================================  ================================================================================

    During the run, a file ``lock`` names its process, and no other process can train in the folder. A checkpoint also stores
    root, device and the names of the classes.

    Under ``torchrun`` (or an initialised ``torch.distributed``) every process computes its part of each batch, and the gradient
    equals the gradient of one process with the whole batch. SIGINT (Ctrl-C) and SIGTERM end the run after the current step,
    with a checkpoint.

    Args:
        config: configuration of the model; None with ``resume`` takes the configuration of the checkpoint.
        settings: None takes ``TrainSettings.of(config)``, or with ``resume`` the settings of the checkpoint.
        out_dir: folder of the run.
        resume: continue from the newest checkpoint in out_dir. A resumed run may change steps, accumulate, keep, log_every,
            sample_every and save_every. It may also change tf32, compile and graph, with a warning, because they may change the
            rounding.
        data: images to train on; None loads ``sdit.data.load(config.dataset, root)``.
        root: folder of the data set; None with ``resume`` takes the folder that the checkpoint stores.
        device: None takes a GPU if there is one, or with ``resume`` the device that was named at the start.
        initial: start from the weights of this model, which must fit config, with a new optimiser; None draws initial weights
            from the seed.
        progress: show a progress bar with loss and mean firing rate.

    Returns:
        The model in eval mode, with the averaged weights (with the trained weights if no average is kept).

    Raises:
        ValueError, TypeError: an argument is wrong. FileExistsError: out_dir holds a run and resume is False. BlockingIOError:
            another process trains in out_dir; the message names it. FileNotFoundError: there is nothing to resume, or the data
            is missing. OSError: a file cannot be written. FloatingPointError: a loss or gradient is not finite; the message
            says where, and the last checkpoint is kept. KeyboardInterrupt: a signal ended the run, after the checkpoint was
            saved.

    Example:
        >>> import tempfile
        >>> from sdit import PRESETS
        >>> from sdit.train import TrainSettings, train
        >>> settings = TrainSettings.of(PRESETS["digits"], steps=2, batch_size=4, sample_every=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = train(PRESETS["digits"], settings, folder, progress=False)
        >>> model.training
        False
    """
    out, state, start, remembered = Path(out_dir), None, 0, {}
    if resume:
        before = about(newest(out)).get("device")
        if device is None and before is not None:
            try:
                device = resolve_device(before)
            except ValueError as error:
                raise ValueError(f"{error}. The run used it until now: name another device (--device)") from None
    else:
        _refuse_existing_run(out)
        config, settings = _check_arguments(config, settings)
        if initial is not None:
            _check_initial(initial, config)
    if resume and initial is not None:
        raise ValueError("initial must be None with resume, which continues from the weights of the checkpoint")
    named = device
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(device))
        rank, world, device = processes
        if not resume:  # check graph and the data before making the folder
            recorder = make_recorder(settings.graph, device, world)
            data, remembered = _load_images(config, settings, world, data, root)
        held = lock(out / "lock", f"the run in {out}", "wait until it ends, or train in another folder")
        stack.enter_context(processes.only_first(held))
        if resume:
            state, meta = load(path := newest(out))
            config, settings, start, changes = _check_resumed(path, meta, config, settings)
            _check_arguments(config, settings)
            recorder = make_recorder(settings.graph, device, world)
            for text in changes:  # after the errors
                warnings.warn(text, stacklevel=2)
            data, remembered = _load_images(config, settings, world, data, root, meta.get("data", {}))
        else:
            _refuse_existing_run(out)
        remembered = {"data": remembered, "device": named and str(named)}
        stack.enter_context(matmul_precision(device, settings.tf32))
        if device.type == "cuda" and settings.tf32 and not settings.bf16 and progress and rank == 0:
            print("float32 matrix multiplications run in TF32; --no-tf32 turns it off", file=sys.stderr)
        run = Run(config, settings, out, data, remembered, processes, progress, initial)
        run.restore(state, start)
        run.loop(start, recorder)
        return (run.ema or run.model).eval()


def _check_initial(model, config):
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in SDiT(config).state_dict().items()}
    found = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            shapes = f"{found.get(name, 'no place')} there, and {wanted.get(name, 'no place')} in the configuration of the run"
            raise ValueError(f"initial must be a model whose weights fit the run: {name} has the shape {shapes}")


def _refuse_existing_run(out):
    if checkpoints(out):
        raise FileExistsError(f"{out} holds a run already: resume it (--resume {out}), or choose another folder")


def _check_arguments(config, settings):
    if not isinstance(config, Config):
        raise TypeError(f"config must be a Config, as in sdit.config.PRESETS, got {type(config).__name__}")
    settings = TrainSettings.of(config) if settings is None else settings
    if not isinstance(settings, TrainSettings):
        raise TypeError(f"settings must be a TrainSettings, got {type(settings).__name__}")
    if settings.sample_every:
        make_scheduler(_picture_sampler(config), None, config)  # raises now if a package is missing, not at the first picture
        check_pillow()
    return config, settings


def _picture_sampler(config):
    """Return the name of the sampler that draws pictures during training."""
    return "euler" if config.prediction == "flow" else "ddim"


def _load_images(config, settings, world, data, root, before=None):
    """Return the images and their description for the checkpoint; ``before`` is the description in a resumed checkpoint."""
    if settings.batch_size % (world * settings.accumulate):
        raise ValueError(
            f"batch_size must be a multiple of processes x accumulate, {world} x {settings.accumulate}, "
            f"got {settings.batch_size}"
        )
    if data is None:
        if config.dataset is None:
            raise ValueError(f"config.dataset must be one of {', '.join(DATASETS)}, or data must be given; got None")
        remembered = root is None and before and before["root"]
        root = root or remembered or None
        try:
            data = load_data(config.dataset, root, size=config.image_size)
        except FileNotFoundError as error:
            if not remembered:
                raise
            raise FileNotFoundError(
                f"this run had its data in {root}: {error}; say with root (--data) where the data is now"
            ) from None
        root = root and str(Path(root).expanduser().absolute())
    else:
        root = None
    if data.labels.max() >= config.num_classes:
        raise ValueError(
            f"config.num_classes must be at least {int(data.labels.max()) + 1}, for the labels of {data.name}, "
            f"got {config.num_classes}"
        )
    to_batch(data.images[:1], config)  # raises if the images do not fit the network
    largest = max(len(data), _MAX_BATCH)
    if settings.batch_size > largest:
        raise ValueError(f"batch_size must be at most {largest} for the {len(data)} images, got {settings.batch_size}")
    now = {"name": data.name, "images": len(data), "classes": list(data.names), "root": root}
    for key in ("name", "images", "classes"):
        if before and before[key] != now[key]:
            raise ValueError(
                f"data must be the data set that the run began with: {key} was {before[key]!r} and is {now[key]!r} now. "
                f"Give the first data set (--data), or start a new run"
            )
    return data, now


def _check_resumed(path, meta, config, settings):
    """Check that the arguments of a resumed run change only what may change.

    Return (config, settings, step, warnings about settings that may change the rounding).
    """
    try:
        stored_config, stored, step = Config.from_dict(meta["config"]), TrainSettings(**meta["settings"]), int(meta["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be resumed, it holds no training state: {error}") from None
    for name, old, new, free in (("config", stored_config, config, ()), ("settings", stored, settings, _MAY_CHANGE)):
        if new is None:
            continue
        before, after = dataclasses.asdict(old), dataclasses.asdict(new)
        changed = [key for key in before if before[key] != after[key] and key not in free]
        if changed:
            key = changed[0]
            raise ValueError(f"{name}.{key} is {before[key]!r} in {path}, a resumed run cannot change it to {after[key]!r}")
    settings = settings or stored
    changes = [
        f"{key} was {before} until step {step} and is {after} from here on: the rounding may differ"
        for key in _ROUNDING
        if (before := getattr(stored, key)) != (after := getattr(settings, key))
    ]
    if settings.steps < step:
        raise ValueError(f"steps must be at least the {step} steps that {path} has done, got {settings.steps}")
    return stored_config, settings, step, changes


class Run:
    """The state of one training run in one process."""

    def __init__(self, config, settings, out, data, remembered, processes, progress, initial=None):
        self.config, self.settings, self.out, self.data = config, settings, out, data
        self.meta = {"config": config.to_dict(), "settings": dataclasses.asdict(settings), **remembered}
        self.processes, (self.rank, self.world, self.device) = processes, processes
        self.progress = progress and self.rank == 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = SDiT(config)
        if initial is not None:
            self.model.load_state_dict(initial.state_dict())
        self.model.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval() if settings.ema else None
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = list(self.model.parameters())
        # Tensors, because a recorded step repeats Python numbers
        rate, self.ema_weight = (torch.zeros((), dtype=torch.float32, device=self.device) for _ in range(2))
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=settings.weight_decay, fused=fused)
        self.loss = torch.compile(training_loss, fullgraph=True) if settings.compile else training_loss
        self.order = Order(len(data), settings.seed)
        self.pending = []  # (loss, mse, vb, gradient norm) of each step since the last line of metrics.jsonl

    # State

    def restore(self, state, step):
        """Load the state of a checkpoint, if any, and remove the lines after its step from metrics.jsonl."""
        metrics = self.out / "metrics.jsonl"
        if state is not None:
            try:
                self.model.load_state_dict(state["model"])
                if self.ema is not None:
                    self.ema.load_state_dict(state["ema"])
                moments = {}
                for key, tensor in state["optimizer"].items():
                    name, kind = key.rsplit(".", 1)
                    moments.setdefault(self.names.index(name), {})[kind] = tensor
                groups = self.optimizer.state_dict()["param_groups"]
                self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            except (KeyError, ValueError, RuntimeError) as error:
                raise ValueError(f"{self.out}: its newest checkpoint is not of this model: {error}") from None
            self.pending = list(state.get("pending", {}).get("steps", torch.empty(0, 4)).to(self.device))
        if self.rank == 0:
            lines = b"" if state is None else lines_until(metrics, step)
            with atomic_write(metrics) as file:
                file.write(lines)
            with atomic_write(self.out / "run.json") as file:
                file.write(json.dumps(self.meta | {"torch": torch.__version__}, indent=2).encode())
            (self.out / "checkpoints").mkdir(exist_ok=True)
            prune_checkpoints(self.out, self.settings.keep)

    def save(self, step):
        if self.rank:
            return
        moments = {
            f"{self.names[i]}.{kind}": tensor
            for i, moments_of_one in self.optimizer.state_dict()["state"].items()
            for kind, tensor in moments_of_one.items()
        }
        groups = {"model": self.model.state_dict(), "optimizer": moments}
        if self.ema is not None:
            groups["ema"] = self.ema.state_dict()
        if self.pending:
            groups["pending"] = {"steps": torch.stack(self.pending)}
        save(self.out / "checkpoints" / f"step_{step:08d}.safetensors", groups, self.meta | {"step": step})
        prune_checkpoints(self.out, self.settings.keep)

    # Steps

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.settings.bf16 else nullcontext()

    def batch(self, step):
        """Return this process's part of the batch of a step, a dict of arguments of ``training_loss``."""
        s, config = self.settings, self.config
        part = (s.batch_size, self.rank, self.world)
        chosen, share = self.order.indices(step, *part), s.batch_size // self.world
        flip = to_device(self.order.flips(step, *part), self.device) if s.flip and self.data.mirror else None
        x0 = to_batch(to_device(self.data.images[chosen], self.device), config, flip)
        y = to_device(self.data.labels[chosen], self.device)
        noise_seed = np.random.SeedSequence((s.seed, 2, step)).generate_state(1, np.uint64)[0]
        drawn = draw(config, s.batch_size, torch.Generator(self.device).manual_seed(int(noise_seed)))
        t, noise, drop = (tensor[self.rank * share : (self.rank + 1) * share] for tensor in drawn)
        return {"x0": x0, "y": y, "t": t, "noise": noise, "drop": drop}

    def parts(self, batch):
        """Split a batch into ``accumulate`` parts of equal size."""
        chunks = zip(*(tensor.chunk(self.settings.accumulate) for tensor in batch.values()))
        return [dict(zip(batch, chunk)) for chunk in chunks]

    def compute_gradients(self, network, batch):
        """Run forward and backward passes over all parts; return the means of (loss, mse, vb) over this process's part."""
        total, parts = 0, self.parts(batch)
        self.optimizer.zero_grad(set_to_none=True)
        for i, part in enumerate(parts, start=1):
            with nullcontext() if i == len(parts) or network is self.model else network.no_sync():
                with self.autocast(), name_switch(self.settings.compile, "train"):
                    losses = self.loss(network, **part)
                (losses["loss"] / len(parts)).backward()
            total = total + torch.stack([losses[name].detach() for name in ("loss", "mse", "vb")])
        if self.world > 1 and network is self.model:
            for p in self.parameters:
                dist.all_reduce(p.grad)
                p.grad /= self.world
        return total / len(parts)

    def compute_row(self, network, **batch):
        """Compute the gradients of a batch and clip them; return (loss, mse, vb, norm of the gradient)."""
        losses = self.compute_gradients(network, batch)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        return torch.cat([losses, norm.float().view(1)])

    def set_rates(self, step):
        """Set the learning rate and the weight of the new values in the average; return the learning rate."""
        rate = self.settings.learning_rate(step)
        self.optimizer.param_groups[0]["lr"].fill_(rate)
        self.ema_weight.fill_(1 - min(self.settings.ema, (1 + step) / (10 + step)))
        return rate

    @torch.no_grad()
    def update(self):
        """Update the weights and their average."""
        recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.optimizer.param_groups[0]["capturable"] = recording  # outside a recording, AdamW warns about it
        self.optimizer.step()
        if self.ema is not None:
            move_towards(list(self.ema.parameters()), self.parameters, self.ema_weight)

    @torch.no_grad()
    def measure_rates(self, batch):
        """Return the firing rates of a compiled or recorded step, from another forward pass over its first part."""
        with self.model.record() as rates, self.autocast():
            training_loss(self.model, **self.parts(batch)[0])
        return rates

    def loop(self, start, recorder=None):
        s, model = self.settings, self.model
        # DistributedDataParallel breaks a graph, so a compiled run averages the gradients itself
        network = DistributedDataParallel(model) if self.world > 1 and not s.compile else model
        compute, update = functools.partial(self.compute_row, network), self.update
        if recorder is not None:  # two recordings, so that check_finite can stop between them
            compute, update = Replayed(compute, recorder, "train"), Replayed(update, recorder, "train")
        records_rates = not s.compile and recorder is None
        model.train()
        with ExitStack() as stack:
            stop = stack.enter_context(_catch_signals())
            log = stack.enter_context(Log(self, start))
            if start and self.wants_picture(start) and not self.picture_file(start).exists():
                self.save_picture(start)  # the earlier process stopped between its checkpoint and its picture
                log.restart_clock()
            for step in range(start, s.steps):
                done = step + 1
                logs, saves = done % s.log_every == 0 or done == s.steps, done % s.save_every == 0 or done == s.steps
                batch = self.batch(step)
                with model.record() if logs and records_rates else nullcontext({}) as rates, self.weights_in_errors(done):
                    row = compute(**batch)
                if logs and not records_rates:
                    rates = self.measure_rates(batch)
                if self.world > 1:
                    dist.all_reduce(row)
                    row = row / self.world
                self.pending.append(row)
                stopping = self.any_process_stops(stop)
                if self.device.type == "cpu" or logs or saves or stopping:  # on a GPU, checking every step would wait for it
                    self.check_finite(step, batch)
                rate = self.set_rates(step)
                update()
                if logs:
                    log.write_line(done, rate, rates)
                log.advance()
                if saves or stopping:
                    log.flush()  # before the checkpoint: metrics.jsonl must hold all its steps
                    self.save(done)
                if self.wants_picture(done) and not stopping:
                    self.save_picture(done)
                if saves or s.sample_every and done % s.sample_every == 0:
                    log.restart_clock()
                if stopping:
                    raise KeyboardInterrupt(f"stopped at step {done}, saved: {self.out}")

    def any_process_stops(self, stop):
        """Return True if any process has received a signal."""
        if self.world == 1:
            return bool(stop)
        flag = torch.tensor(float(bool(stop)))
        dist.all_reduce(flag)
        return bool(flag)

    def check_finite(self, step, batch):
        """Raise FloatingPointError if one of the pending steps has a loss or gradient that is not finite."""
        rows = torch.stack(self.pending)
        bad = (~rows.isfinite()).any(1).nonzero()
        if not len(bad):
            return
        i = int(bad[0])
        values = dict(zip(("loss", "mse", "vb", "norm of the gradient"), rows[i].tolist()))
        terms = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value) and name != "loss")
        lost = [name for name, p in zip(self.names, self.parameters) if p.grad is not None and not p.grad.isfinite().all()]
        where = [f"step {step - len(rows) + 1 + i + 1}: {terms or 'loss is not finite'}"]
        layer = self.first_not_finite(batch)
        if layer:
            where.append(f"the first layer with outputs that are not finite is {layer}")
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            where.append(f"the gradient of {lost[0]}{more} is not finite")
        self.stop_diverged(where)

    def stop_diverged(self, where):
        kept = checkpoints(self.out)
        where.append(f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet")
        raise FloatingPointError("; ".join(where) + ". A lower lr (--lr), or another clip (--clip), may help")

    @contextmanager
    def weights_in_errors(self, step):
        """Turn a ValueError of a step into FloatingPointError: a neuron refuses a learnt threshold that is infinite or NaN."""
        try:
            yield
        except ValueError as error:
            self.stop_diverged([f"step {step}: a weight diverged: {error}"])

    @torch.no_grad()
    def first_not_finite(self, batch):
        """Return the name of the first module with an output that is not finite for this batch, or None."""
        found = []

        def hook(name):
            def look(_, __, out):
                if not found and isinstance(out, torch.Tensor) and not out.isfinite().all():
                    found.append(name)

            return look

        handles = [m.register_forward_hook(hook(name)) for name, m in self.model.named_modules() if name]
        try:
            for part in self.parts(batch):
                with self.autocast():
                    training_loss(self.model, **part)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None

    def wants_picture(self, step):
        every = self.settings.sample_every
        return every and (step % every == 0 or step == self.settings.steps)

    def picture_file(self, step):
        return self.out / "samples" / f"step_{step:08d}.png"

    def save_picture(self, step):
        if self.rank:
            return
        model, names = self.ema or self.model, class_names(self.config, self.data.names)
        n = min(len(names), 10)
        labels = torch.arange(4 * n) % n
        with self.autocast():
            images = sample(model, labels, sampler=_picture_sampler(self.config), seed=self.settings.seed)
        lost = f"this picture is not written; free some space, then --resume {self.out} continues from the newest checkpoint"
        save_grid(self.picture_file(step), images, labels, names, columns=n, lost=lost)


@contextmanager
def _catch_signals():
    """Yield a list that collects SIGINT and SIGTERM. After the first signal, the earlier handlers act again."""
    received, before = [], {}

    def handle(number, frame):
        received.append(number)
        for each, old in before.items():
            signal.signal(each, old)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)
