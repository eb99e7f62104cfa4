"""Measure the cost of a model: parameters, multiply-adds, memory of a training step, firing rates, estimated energy."""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdit_kernels import backend
from sdit_kernels import energy as counter

from .config import Config
from .data import Images, to_batch
from .diffusion import STEPS, add_noise
from .model import SDiT

__all__ = ["Info", "info", "noisy_batch"]


@dataclass(frozen=True)
class Info:
    """The result of :func:`info`. ``str(result)`` is a table.

    Attributes:
        parameters: number of learned values.
        blocks: number of blocks: depth // 2 encoder blocks, one middle block, depth // 2 decoder blocks.
        multiply_adds: {group: multiply-adds with weights for one image}, as the plain form computes them, where images share no
            work.
        computed_multiply_adds: multiply-adds per image that a forward pass of this batch really computes. Work that the images
            of the batch share counts once per batch.
        saved_bytes: bytes per image that autograd keeps for the backward pass.
        plain_saved_bytes: the same for the plain form.
        rates: {layer: mean firing rate of its neurons on the batch}, from 0 to 1; sparsity is 1 - rate.
        silent: {layer: number of neurons (channels) that never fire on the batch}; a larger batch has fewer.
        neurons: number of all neurons.
        synaptic_operations: {layer: additions for one image}, one addition per spike and weight. Only layers with a
            spike-driven matrix multiplication are listed; a model with spiking "rate" has none.
        spiking_multiply_adds: multiply-adds of these layers.
        images: number of images in the batch.
        report: all products of the plain form on the whole batch, a :class:`sdit_kernels.energy.Report`.
    """

    parameters: int
    blocks: int
    multiply_adds: dict[str, int]
    computed_multiply_adds: int
    saved_bytes: int
    plain_saved_bytes: int
    rates: dict[str, float]
    silent: dict[str, int]
    neurons: int
    synaptic_operations: dict[str, float] = field(default_factory=dict)
    spiking_multiply_adds: int = 0
    images: int = 1
    report: counter.Report = field(repr=False, default=None)

    @property
    def total(self) -> int:
        return sum(self.multiply_adds.values())

    @property
    def energy(self) -> dict[str, float]:
        """Estimated millijoules of the forward pass of one image. "mac" counts every product as a multiply-add. "arithmetic"
        counts a spike-driven product as one addition per spike and weight. "with_memory" and "quantised": see ``Report``."""
        found = {"mac": self.total * self.report.costs.mac * 1e-9}
        return found | {name: pj * 1e-9 / self.images for name, pj in self.report.energy_pj.items()}

    def __str__(self) -> str:
        spikes, rest, energy = sum(self.synaptic_operations.values()), self.total - self.spiking_multiply_adds, self.energy
        costs = self.report.costs
        width = max(28, *map(len, (*self.rates, *self.synaptic_operations)))
        lines = [f"parameters {self.parameters:,}, blocks {self.blocks}", ""]
        lines += [f"{'multiply-adds of one image':30s}{'million':>12s}"]
        lines += [f"  {name:28s}{count / 1e6:12,.1f}" for name, count in self.multiply_adds.items()]
        lines += [
            f"  {'in all':28s}{self.total / 1e6:12,.1f}",
            f"  {'computed, sharing in the batch':28s}{self.computed_multiply_adds / 1e6:10,.1f}",
            "",
            f"kept for the backward pass of one image: {self.saved_bytes / 2**20:.1f} MiB "
            f"(plain form: {self.plain_saved_bytes / 2**20:.1f})",
            "",
            f"{'neurons':{width + 2}s}{'rate':>12s}{'sparsity':>12s}{'silent':>12s}{'synaptic operations, million':>32s}",
        ]
        for name, rate in self.rates.items():
            each = f"{rate:12.3f}{1 - rate:12.3f}{self.silent[name]:12d}"
            lines.append(f"  {name:{width}s}{each}{self.synaptic_operations.get(name, 0) / 1e6:32,.2f}")
        for name in [name for name in self.synaptic_operations if name not in self.rates]:  # their inputs are shared, or pixels
            lines.append(f"  {name:{width}s}{'':36s}{self.synaptic_operations[name] / 1e6:32,.2f}")
        lines += [
            f"  {sum(self.silent.values()):,} of {self.neurons:,} neurons fire nowhere in this batch",
            "",
            f"{'one image':30s}{'MAC, million':>14s}{'AC, million':>14s}{'energy, mJ':>12s}"
            f"   (float32, 45 nm: {costs.mac} pJ a MAC, {costs.add} pJ an AC)",
            f"  {'every product a MAC':28s}{self.total / 1e6:14,.1f}{0:14,.1f}{energy['mac']:12.2f}",
            f"  {'AC where a product is of spikes':28s}{rest / 1e6:11,.1f}{spikes / 1e6:14,.1f}{energy['arithmetic']:12.2f}",
            f"  {'the same, with memory':56s}{energy['with_memory']:12.2f}   ({costs.byte} pJ a byte, {costs.memory})",
            f"  {'integers instead of spikes, with memory':56s}{energy['quantised']:12.2f}",
            f"{self.report.products_on_spikes} of {self.report.products} products see spikes",
        ]
        if not self.synaptic_operations:
            lines.append("0 synaptic operations: rates are averaged, added and normalised before any weight meets them.")
        return "\n".join(lines)


def noisy_batch(config: Config, data: Images | None, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return n noisy images at times spaced evenly over 0 .. 999, their times and labels: a batch for :func:`info`.

    Args:
        config: configuration of the model.
        data: images to choose from; None: the batch is noise, and the labels are the classes in turn.
        n: at least 1.

    Example:
        >>> from sdit import PRESETS
        >>> from sdit.info import noisy_batch
        >>> x, t, y = noisy_batch(PRESETS["digits"], None, 4)
        >>> x.shape, t.tolist()
        (torch.Size([4, 1, 8, 8]), [125, 375, 625, 875])
    """
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(n) * STEPS // n + STEPS // (2 * n)
    noise = torch.randn(n, config.channels, config.image_size, config.image_size, generator=generator)
    if data is None:
        return noise, t, torch.arange(n) % config.num_classes
    chosen = torch.randint(len(data), (n,), generator=generator)
    xt, t, _ = add_noise(config, to_batch(data.images[chosen], config), noise, t)
    return xt, t, data.labels[chosen]


def info(model: SDiT, batch: tuple[Tensor, Tensor, Tensor]) -> Info:
    """Count the operations of a model and measure its memory and firing rates on a batch of real data.

    :func:`sdit_kernels.energy.count` counts the matrix multiplications and convolutions while the plain form runs. The energy
    is an estimate: these counts times the energy per operation. It leaves out scans and neurons, so it compares forms of one
    network and does not predict the energy of a chip. With ``spiking="rate"`` there are 0 synaptic operations: the model
    averages the rates over T, adds them to real numbers and normalises them before the next matrix multiplication. So an
    estimate from additions alone does not apply to it. ``spiking="wkv"`` has spike-driven matrix multiplications, and
    ``spiking="pure"`` has no others.

    Args:
        model: any :class:`SDiT`.
        batch: (x, t, y), the arguments of the model; x are noisy images of the data.

    Raises:
        TypeError, ValueError: the model refuses the batch.

    Source: energy per operation: Horowitz, Computing's energy problem, ISSCC 2014.

    Example:
        >>> import torch
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.info import info
        >>> found = info(SDiT(PRESETS["digits"]), (torch.randn(2, 1, 8, 8), torch.tensor([0, 500]), torch.tensor([1, 2])))
        >>> found.parameters, sum(found.synaptic_operations.values())
        (202657, 0)
    """
    B = len(batch[0])
    fired = {}
    with torch.no_grad():
        with model.record(fired) as rates, _plain_form(model):
            report = counter.count(model, *batch)
        computed = counter.count(model, *batch)  # once more, in the fast form
    groups, rates = {}, {name: rate.item() for name, rate in rates.items()}
    for row in report.rows:
        groups[_group(row.layer)] = groups.get(_group(row.layer), 0) + row.macs // B
    spike_driven = [row for row in report.rows if row.on_spikes]
    with _plain_form(model):
        plain = _saved_bytes(model, [part[:1] for part in batch])
    return Info(
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=len(model.blocks),
        multiply_adds=groups,
        computed_multiply_adds=computed.macs // B,
        saved_bytes=_saved_bytes(model, batch) // B,
        plain_saved_bytes=plain,
        rates=rates,
        silent={name: int((~some).sum()) for name, some in fired.items()},
        neurons=sum(some.numel() for some in fired.values()),
        synaptic_operations={row.layer: row.synaptic_operations / B for row in spike_driven},
        spiking_multiply_adds=sum(row.macs for row in spike_driven) // B,
        images=B,
        report=report,
    )


@contextlib.contextmanager
def _plain_form(model):
    """Switch the model to the plain form with the reference: images share no work, and all operations are PyTorch's own."""
    before, model.plain = model.plain, True
    try:
        with backend("reference"):
            yield
    finally:
        model.plain = before


def _saved_bytes(model, batch):
    """Return the bytes that autograd keeps for the backward pass: every storage once, without weights and the batch."""
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch)}
    storages = []

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            storages.append(storage)  # keep it alive, so that its address is not reused
        return t.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*batch)
    del out
    return sum(storage.nbytes() for storage in storages)


def _group(name):
    """Return the row of the table that counts a layer: layers of blocks are grouped by kind."""
    parts = name.split(".")
    return f"blocks: {parts[2].split('_')[0]}" if parts[0] == "blocks" else parts[0]
