"""What a model costs: parameters, multiply-adds, memory of a training step, firing rates, and what follows for energy."""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdit_kernels import backend

from .model import SDiT, SpikingTimeMix

__all__ = ["Info", "info"]

MAC_PJ, AC_PJ = 4.6, 0.9  # picojoules of a float32 multiply-add and of an addition, 45 nm: Horowitz, ISSCC 2014


@dataclass(frozen=True)
class Info:
    """What :func:`info` finds. ``str`` of it is a table.

    Attributes:
        parameters: numbers that are learned.
        blocks: depth // 2 encoder blocks, one in the middle, depth // 2 decoder blocks.
        multiply_adds: of one image's forward pass by the equations, in products with weights; {group: count}.
        computed_multiply_adds: of those, how many a forward pass of this batch computes per image, what the batch shares
            counted once.
        saved_bytes: what autograd keeps for the backward pass, per image; plain_saved_bytes: for the plain form.
        rates: mean firing rate of each layer of neurons on the batch, 0 .. 1; sparsity is 1 - rate.
        silent: of each layer, how many of its neurons (channels) fire nowhere in the batch; the larger the batch, the fewer.
        neurons: all there are.
        synaptic_operations: {layer: additions for one image}: a spike that meets a weight. A layer is listed if a product
            with its weights is of spikes; none is in the default model.
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

    @property
    def total(self) -> int:
        return sum(self.multiply_adds.values())

    @property
    def energy(self) -> dict[str, float]:
        """Millijoules for one image's forward pass, estimated: "mac", if every product is a multiply-add; "ac", if each product
        of spikes is an addition per spike and all others stay what they are."""
        spikes = sum(self.synaptic_operations.values())
        return {
            "mac": self.total * MAC_PJ * 1e-9,
            "ac": ((self.total - self.spiking_multiply_adds) * MAC_PJ + spikes * AC_PJ) * 1e-9,
        }

    def __str__(self) -> str:
        spikes, rest, energy = sum(self.synaptic_operations.values()), self.total - self.spiking_multiply_adds, self.energy
        lines = [f"parameters {self.parameters:,}, blocks {self.blocks}", ""]
        lines += [f"{'multiply-adds of one image':30s}{'million':>12s}"]
        lines += [f"  {name:28s}{count / 1e6:12,.1f}" for name, count in self.multiply_adds.items()]
        lines += [
            f"  {'in all':28s}{self.total / 1e6:12,.1f}",
            f"  {'computed, sharing in the batch':28s}{self.computed_multiply_adds / 1e6:10,.1f}",
            "",
            f"kept for backward, of one image: {self.saved_bytes / 2**20:.1f} MiB "
            f"(plain form: {self.plain_saved_bytes / 2**20:.1f})",
            "",
            f"{'neurons':30s}{'rate':>12s}{'sparsity':>12s}{'silent':>12s}{'synaptic operations, million':>32s}",
        ]
        for name, rate in self.rates.items():
            each = f"{rate:12.3f}{1 - rate:12.3f}{self.silent[name]:12d}"
            lines.append(f"  {name:28s}{each}{self.synaptic_operations.get(name, 0) / 1e6:32,.2f}")
        lines += [
            f"  {sum(self.silent.values()):,} of {self.neurons:,} neurons fire nowhere in this batch",
            "",
            f"{'arithmetic of one image':30s}{'MAC, million':>14s}{'AC, million':>14s}{'energy, mJ':>12s}"
            f"   (float32, 45 nm: {MAC_PJ} pJ a MAC, {AC_PJ} pJ an AC)",
            f"  {'every product a MAC':28s}{self.total / 1e6:14,.1f}{0:14,.1f}{energy['mac']:12.2f}",
            f"  {'AC where a product is of spikes':28s}{rest / 1e6:11,.1f}{spikes / 1e6:14,.1f}{energy['ac']:12.2f}",
        ]
        if not self.synaptic_operations:
            lines.append("0 synaptic operations: rates are averaged, added and normalised before any weight meets them.")
        return "\n".join(lines)


def info(model: SDiT, batch: tuple[Tensor, Tensor, Tensor]) -> Info:
    """Count and measure a model on a batch of real data.

    Multiply-adds are counted in matrix multiplications with weights, as they run. Energy follows by a table of costs that
    leaves out memory, scans and neurons: it compares forms of one network, it does not predict a chip. In the default model
    rates are averaged over T, added to real numbers and normalised before any weight meets them, so that its synaptic
    operations are 0 and an estimate by additions alone does not apply (``spiking="wkv"`` has products of spikes).

    Args:
        model: any :class:`SDiT`.
        batch: (x, t, y) as the model is called with; x noisy images of the data.

    Raises:
        TypeError, ValueError: as the model's.

    Source: costs: Horowitz, Computing's energy problem, ISSCC 2014.

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
    with torch.no_grad(), model.record(fired) as rates, _counted(model) as counts, _plain(model):
        model(*batch)
    with torch.enable_grad(), FlopCounterMode(display=False) as computed:  # it stumbles over views made without gradients
        model(*batch)
    counts = {name: count // B for name, count in counts.items()}
    groups, rates = {}, {name: rate.item() for name, rate in rates.items()}
    for name, count in counts.items():
        groups[_group(name)] = groups.get(_group(name), 0) + count
    of_spikes = [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, SpikingTimeMix)
        for part in ("key", "value", "receptance", "output")
    ]
    with _plain(model):
        plain = _saved_bytes(model, [part[:1] for part in batch])
    return Info(
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=len(model.blocks),
        multiply_adds=groups,
        computed_multiply_adds=computed.get_total_flops() // 2 // B,
        saved_bytes=_saved_bytes(model, batch) // B,
        plain_saved_bytes=plain,
        rates=rates,
        silent={name: int((~some).sum()) for name, some in fired.items()},
        neurons=sum(some.numel() for some in fired.values()),
        synaptic_operations={name: rates[name] * counts[name] for name in of_spikes},
        spiking_multiply_adds=sum(counts[name] for name in of_spikes),
    )


@contextlib.contextmanager
def _plain(model):
    """The plain form with the reference: no work is shared, and autograd keeps what it keeps of PyTorch's own operations."""
    before, model.plain = model.plain, True
    try:
        with backend("reference"):
            yield
    finally:
        model.plain = before


@contextlib.contextmanager
def _counted(model):
    """{layer: multiply-adds} of the calls inside the block."""
    counts = {}

    def hook(name, module, out):
        if isinstance(module, nn.Conv2d):
            each = out.numel() * module.weight[0].numel()
        else:
            each = out.numel() * module.in_features
        counts[name] = counts.get(name, 0) + each

    handles = [
        module.register_forward_hook(lambda module, _, out, name=name: hook(name, module, out))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _saved_bytes(model, batch):
    """What autograd keeps for the backward pass, every storage once, weights and the batch left out."""
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch)}
    storages = []

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            storages.append(storage)  # alive, so that its address is not used again
        return t.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(*batch)
    del out
    return sum(storage.nbytes() for storage in storages)


def _group(name):
    """Layers that the table sums up: blocks by the kind of their layer."""
    parts = name.split(".")
    return f"blocks: {parts[2].split('_')[0]}" if parts[0] == "blocks" else parts[0]
