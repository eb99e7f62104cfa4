"""The training loop, for one process or several. A run can be killed at any moment and resumed.

The images of a step, their noise, times and dropped labels are functions of (seed, step). So a checkpoint at step n only holds
the weights, their average, the state of the optimiser and n. On a CPU, a resumed run equals an uninterrupted run bit for bit.
"""

import copy
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .checkpoint import about, checkpoints, load, newest, prune_checkpoints, save
from .config import Config
from .data import DATASETS, Images, Order, to_batch
from .data import load as load_data
from .diffusion import draw, make_scheduler, training_loss
from .files import atomic_write, name_in_errors
from .lock import lock
from .model import SDiT
from .pictures import check_pillow, save_grid
from .sample import class_names, matmul_precision, name_switch, resolve_device, sample
from .settings import RECIPES, TrainSettings

__all__ = ["RECIPES", "TrainSettings", "train"]

_MAX_BATCH = 4096  # limit of batch_size; a larger data set raises it to its number of images
# Settings that a resumed run may change
_MAY_CHANGE = ("steps", "log_every", "sample_every", "save_every", "keep", "accumulate", "tf32", "compile")


def train(
    config: Config | None = None,
    settings: TrainSettings | None = None,
    out_dir: str | Path = "run",
    *,
    resume: bool = False,
    data: Images | None = None,
    root: str | Path | None = None,
    device: str | None = None,
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
            sample_every and save_every. It may also change tf32 and compile, with a warning, because they change the rounding.
        data: images to train on; None loads ``sdit.data.load(config.dataset, root)``.
        root: folder of the data set; None with ``resume`` takes the folder that the checkpoint stores.
        device: None takes a GPU if there is one, or with ``resume`` the device that was named at the start.
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
    named = device
    with ExitStack() as stack:
        rank, world, device = stack.enter_context(_join_processes(device))
        if not resume:  # check the data before making the folder
            data, remembered = _load_images(config, settings, world, data, root)
        stack.enter_context(_hold_run_lock(out, rank, world))
        if resume:
            state, meta = load(path := newest(out))
            config, settings, start = _check_resumed(path, meta, config, settings)
            _check_arguments(config, settings)
            data, remembered = _load_images(config, settings, world, data, root, meta.get("data", {}))
        else:
            _refuse_existing_run(out)
        remembered = {"data": remembered, "device": named and str(named)}
        stack.enter_context(matmul_precision(device, settings.tf32))
        if device.type == "cuda" and settings.tf32 and not settings.bf16 and progress and rank == 0:
            print("float32 matrix multiplications run in TF32; --no-tf32 turns it off", file=sys.stderr)
        run = _Run(config, settings, out, data, remembered, device, rank, world, progress)
        run.restore(state, start)
        run.loop(start)
        return (run.ema or run.model).eval()


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


@contextmanager
def _hold_run_lock(out, rank, world):
    """Hold the lock of the run's folder in the first process. If it cannot take the lock, all processes raise its error."""
    refused = None
    with ExitStack() as stack:
        if rank == 0:
            try:
                stack.enter_context(lock(out / "lock", f"the run in {out}", "wait until it ends, or train in another folder"))
            except OSError as error:
                refused = error
        if world > 1:
            shared = [refused]
            dist.broadcast_object_list(shared)
            refused = shared[0]
        if refused is not None:
            raise refused
        yield


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
    """Return (config, settings, step) of a resumed run, after checking that the arguments change only what may change."""
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
    for key in ("tf32", "compile"):
        before, after = getattr(stored, key), getattr(settings, key)
        if before != after:
            warnings.warn(
                f"{key} was {before} until step {step} and is {after} from here on: the rounding differs", stacklevel=3
            )
    if settings.steps < step:
        raise ValueError(f"steps must be at least the {step} steps that {path} has done, got {settings.steps}")
    return stored_config, settings, step


@contextmanager
def _join_processes(device):
    """Yield (rank, world, device) of this process. Under torchrun, join the process group until the with block ends."""
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    local = int(os.environ.get("LOCAL_RANK", "0")) if ours or dist.is_initialized() else 0
    if device is None:
        device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    device = resolve_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)
    finally:
        if ours:
            dist.destroy_process_group()


class _Run:
    """The state of one training run in one process."""

    def __init__(self, config, settings, out, data, remembered, device, rank, world, progress):
        self.config, self.settings, self.out, self.data = config, settings, out, data
        self.meta = {"config": config.to_dict(), "settings": dataclasses.asdict(settings), **remembered}
        self.device, self.rank, self.world, self.progress = device, rank, world, progress and rank == 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = SDiT(config).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval() if settings.ema else None
        self.names = [name for name, _ in self.model.named_parameters()]
        self.parameters = list(self.model.parameters())
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
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
            lines = b""
            if state is not None and metrics.exists():
                lines = b"".join(line for line in metrics.read_bytes().splitlines(True) if _step_of_line(line) <= step)
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

    def batches(self, step):
        """Yield this process's part of the batch in ``accumulate`` parts, each a dict of arguments of ``training_loss``."""
        s, config = self.settings, self.config
        part = (s.batch_size, self.rank, self.world)
        chosen, share = self.order.indices(step, *part), s.batch_size // self.world
        flip = self.order.flips(step, *part) if s.flip and self.data.mirror else None
        x0 = to_batch(self.data.images[chosen].to(self.device), config, flip)
        y = self.data.labels[chosen].to(self.device)
        noise_seed = np.random.SeedSequence((s.seed, 2, step)).generate_state(1, np.uint64)[0]
        drawn = draw(config, s.batch_size, torch.Generator(self.device).manual_seed(int(noise_seed)))
        t, noise, drop = (tensor[self.rank * share : (self.rank + 1) * share] for tensor in drawn)
        for piece in torch.arange(share).chunk(s.accumulate):
            i = slice(int(piece[0]), int(piece[-1]) + 1)
            yield {"x0": x0[i], "y": y[i], "t": t[i], "noise": noise[i], "drop": drop[i]}

    def compute_gradients(self, network, step):
        """Run forward and backward passes over all parts; return the means of (loss, mse, vb) over this process's part."""
        total = 0
        for i, batch in enumerate(self.batches(step), start=1):
            last = i == self.settings.accumulate
            with nullcontext() if last or network is self.model else network.no_sync():
                with self.autocast(), name_switch(self.settings.compile, "train"):
                    losses = self.loss(network, **batch)
                (losses["loss"] / self.settings.accumulate).backward()
            total = total + torch.stack([losses[name].detach() for name in ("loss", "mse", "vb")])
        if self.world > 1 and network is self.model:
            for p in self.parameters:
                dist.all_reduce(p.grad)
                p.grad /= self.world
        return total / self.settings.accumulate

    @torch.no_grad()
    def measure_rates(self, step):
        """Return the firing rates of a step that ran compiled, from another forward pass over its first part."""
        with self.model.record() as rates, self.autocast():
            training_loss(self.model, **next(self.batches(step)))
        return rates

    def loop(self, start):
        s, model = self.settings, self.model
        # DistributedDataParallel breaks a graph, so a compiled run averages the gradients itself
        network = DistributedDataParallel(model) if self.world > 1 and not s.compile else model
        model.train()
        with ExitStack() as stack:
            stop = stack.enter_context(_catch_signals())
            log = stack.enter_context(_Log(self, start))
            if start and self.wants_picture(start) and not self.picture_file(start).exists():
                self.save_picture(start)  # the earlier process stopped between its checkpoint and its picture
                log.restart_clock()
            for step in range(start, s.steps):
                done = step + 1
                logs, saves = done % s.log_every == 0 or done == s.steps, done % s.save_every == 0 or done == s.steps
                self.optimizer.zero_grad(set_to_none=True)
                with model.record() if logs and not s.compile else nullcontext({}) as rates:
                    losses = self.compute_gradients(network, step)
                if logs and s.compile:
                    rates = self.measure_rates(step)
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, s.clip or math.inf)
                row = torch.cat([losses, norm.float().view(1)])
                if self.world > 1:
                    dist.all_reduce(row)
                    row = row / self.world
                self.pending.append(row)
                stopping = self.any_process_stops(stop)
                if self.device.type == "cpu" or logs or saves or stopping:  # on a GPU, checking every step would wait for it
                    self.check_finite(step)
                rate = s.learning_rate(step)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.optimizer.step()
                if self.ema is not None:
                    decay = min(s.ema, (1 + step) / (10 + step))
                    get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), self.parameters, None)
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

    def check_finite(self, step):
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
        layer = self.first_not_finite(step)
        if layer:
            where.append(f"the first layer with outputs that are not finite is {layer}")
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            where.append(f"the gradient of {lost[0]}{more} is not finite")
        kept = checkpoints(self.out)
        where.append(f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet")
        raise FloatingPointError("; ".join(where) + ". A lower lr (--lr), or another clip (--clip), may help")

    @torch.no_grad()
    def first_not_finite(self, step):
        """Return the name of the first module with an output that is not finite for this step's batch, or None."""
        found = []

        def hook(name):
            def look(_, __, out):
                if not found and isinstance(out, torch.Tensor) and not out.isfinite().all():
                    found.append(name)

            return look

        handles = [m.register_forward_hook(hook(name)) for name, m in self.model.named_modules() if name]
        try:
            for batch in self.batches(step):
                with self.autocast():
                    training_loss(self.model, **batch)
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


def _step_of_line(line):
    """Return the step of a line of metrics.jsonl; infinity if the line is incomplete."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


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


class _Log:
    """Write the metrics to metrics.jsonl, the progress bar and TensorBoard."""

    def __init__(self, run, start):
        self.run, self.start, self.file, self.board, self.bar = run, start, None, None, None

    def __enter__(self):
        run = self.run
        if run.rank == 0:
            self.file = (run.out / "metrics.jsonl").open("ab")
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(run.out / "tensorboard"), purge_step=self.start + 1)
        if run.progress:
            try:
                from tqdm import tqdm
            except ImportError:
                raise ImportError("the progress bar needs tqdm: pip install tqdm") from None
            name = run.out.name
            self.bar = tqdm(total=run.settings.steps, initial=self.start, desc=name, unit=" steps", dynamic_ncols=True)
        self.restart_clock()
        return self

    def __exit__(self, *_):
        for each in (self.bar, self.board, self.file):
            if each is not None:
                each.close()

    def restart_clock(self):
        self.began, self.seen = time.perf_counter(), 0

    def advance(self):
        self.seen += 1
        if self.bar is not None:
            self.bar.update()

    def write_line(self, step, rate, rates):
        """Write the means of the pending steps, and empty the list of pending steps."""
        run = self.run
        loss, mse, vb, norm = torch.stack(run.pending).mean(0).tolist()
        run.pending.clear()
        if self.file is None:
            return
        rates = {name: round(value.item(), 6) for name, value in rates.items()}
        speed = (self.seen + 1) * run.settings.batch_size / (time.perf_counter() - self.began)
        record = {"step": step, "loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, "lr": rate, "rates": rates}
        record |= {"images_per_s": round(speed, 1), "memory_mb": _peak_memory_mb(run.device)}
        advice = f"free some space, then --resume {run.out} continues from the newest checkpoint"
        with name_in_errors(run.out / "metrics.jsonl", advice):
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
        self.restart_clock()
        self.seen = -1  # advance() still counts this step, whose time is already measured
        firing = sum(rates.values()) / max(1, len(rates))
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", firing=f"{firing:.3f}", refresh=False)
        if self.board is not None:
            for name in ("loss", "mse", "vb", "grad_norm", "lr", "images_per_s"):
                self.board.add_scalar(name, record[name], step)
            for name, value in rates.items():
                self.board.add_scalar(f"firing rate/{name}", value, step)

    def flush(self):
        if self.file is not None:
            os.fsync(self.file.fileno())


def _peak_memory_mb(device):
    """Return the peak memory so far in MB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    with suppress(ImportError):
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
