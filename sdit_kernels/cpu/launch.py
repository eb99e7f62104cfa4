"""Code that the launchers of CPU kernels share: addresses and strides, and neuron parameters.

A kernel takes a tensor as one tuple (address, *strides), and a group of tensors with the same role as a tuple of these. A
contiguous tensor is only its address. The ``placed`` functions return (tensor, this tuple). The tensor may be a copy, so the
launcher must hold it until the kernel returns. R is the number of rows and C the number of columns of a step (see
../layout.py). All of this runs before every kernel, and each Python call costs 0.1 us.
"""

import functools

import torch

from ..layout import row_view, step_view

FORWARD_COLUMNS = 1024  # the most columns of a forward task of a neuron
BACKWARD_COLUMNS = 256  # the most columns of a backward task, which keeps LIF_CHECKPOINT_STEPS steps of them: 16 KiB
GROUPS = 64  # the most partial sums per channel


def address(t):
    return 0 if t is None else t.data_ptr()


def placed(layout, t):
    """Return (t, (address, stride of T, stride of R))."""
    if t is None:
        return None, (0, 0, 0)
    t, step, row = row_view(layout, t)
    return t, (t.data_ptr(), step, row)


def placed_state(layout, t):
    """Return (t, (address, stride of R)) of a tensor without the T axis."""
    if t is None:
        return None, (0, 0)
    t, row = step_view(layout, t)
    return t, (t.data_ptr(), row)


def placed_gradient(layout, g, like, columns=BACKWARD_COLUMNS):
    """Return (g, (address, stride of T, stride of R, factor of the column offset)) of an upstream gradient.

    If g repeats one value, the result holds this value for the columns of one task, not for all elements.
    """
    if g is None or (g.numel() > columns and not any(g.stride())):
        value = like.new_zeros(()) if g is None else g.as_strided((), ()).to(like.dtype)
        value = value.repeat(columns)
        return value, (value.data_ptr(), 0, 0, 0)
    g, step, row = row_view(layout, g.to(like.dtype))
    return g, (g.data_ptr(), step, row, 1)


def placed_rows(t, axes=2):
    """Return (t, (address, strides of all axes except the last)) of a tensor whose last axis holds the channels.

    The function copies t if its channels are not contiguous. If all rows are the same memory, it copies only one row.
    """
    if t is None:
        return None, (0,) * (1 + axes)
    *strides, c = t.stride()
    if c == 1 or t.shape[-1] == 1:
        return t, (t.data_ptr(), *strides)
    if not any(strides):
        t = t[(0,) * axes].contiguous()
        return t, (t.data_ptr(), *strides)
    return placed_rows(t.contiguous(), axes)


def placed_all(layout, *groups):
    """Return (tensors, one tuple with the addresses and strides of all). A group is a ``placed`` function and its tensors."""
    tensors, found, C = [], [], layout.C
    step = layout.R * C
    for place, group in groups:
        states = place is placed_state
        for t in group:
            if t is None:
                found += (0, 0) if states else (0, 0, 0)
            elif layout.order is None and t.is_contiguous():  # as ``place`` does, without a call
                tensors.append(t)
                found += (t.data_ptr(), C) if states else (t.data_ptr(), step, C)
            else:
                t, addresses = place(layout, t)
                tensors.append(t)
                found += addresses
    return tensors, tuple(found)


@functools.lru_cache(maxsize=256)
def constants_of(variant):
    """Return (code, numbers) of a neuron whose parameters are numbers; see Parameters."""
    neuron, flags, values, _, alpha, *_ = variant
    given = dict(zip((*neuron.parameters, *neuron.numbers), values))
    zeros = tuple(name for name in neuron.numbers if given[name] == 0)
    return (neuron, flags, zeros), (*values, *(given.get(name, 0.0) for name in neuron.start), alpha)


CONSTANT, CHANNELS, ROWS, TOKENS = range(4)  # what Parameters.spread says


class Parameters:
    """The parameters and numbers of a neuron for a kernel.

    ``code`` holds the arguments of ``trace`` for the neuron: each set of them is generated code of its own. ``numbers`` holds
    the parameters and numbers in the order of ``variant.values``, then the value of each state before the first step, then the
    sharpness of the surrogate. ``addresses`` holds, per parameter and number, the address of one value per channel, or 0.

    ``spread`` is CONSTANT if all are single values, CHANNELS if some have a value per channel, ROWS if some have a value per
    token (a token is a row of the data), TOKENS if some have a value per token and some per channel. With ROWS and TOKENS,
    ``addresses`` holds for each (address, 1 if it has a value per step, number of tokens after which its values repeat, 1 if it
    has a value per channel).
    """

    def __init__(self, variant, parameters, dtype, axes=0):
        """axes: the number of axes of the data, T included. A parameter with as many has a value per step."""
        self.code, self.numbers = constants_of(variant)
        self._dtype, self._count, self._alive = dtype, len(variant.neuron.learnt), []
        places, self.are_numbers, kinds = [(0, 0, 0, 0)] * len(variant.values), True, set()
        for i, p in enumerate(parameters):
            if p is not None:
                self.are_numbers = False
                steps, tokens = p.dim() == axes, p.dim() > 1
                if p.dim() > 2 and p.stride(-3) == 0:  # the same values for every sample, behind a normalisation
                    p = p.select(-3, 0)
                p = p.detach().to(dtype)
                if variant.neuron.parameters[i] in variant.neuron.reciprocals:
                    p = 1.0 / p
                if p.numel() == 1 and not tokens:
                    self.numbers = *self.numbers[:i], p.item(), *self.numbers[i + 1 :]
                else:
                    p = p.contiguous()
                    self._alive.append(p)
                    period = p.numel() // (p.shape[0] if steps else 1) if tokens else 0
                    places[i] = p.data_ptr(), int(steps), period, int(not tokens)
                    kinds.add(tokens)
        self.spread = TOKENS if len(kinds) > 1 else ROWS if True in kinds else CHANNELS if kinds else CONSTANT
        self._places, self.per_channel = places, self.spread != CONSTANT
        flat = self.spread < ROWS
        self.addresses = tuple(place[0] for place in places) if flat else tuple(n for place in places for n in place)

    def partial_sums(self, layout, wanted, steps=1, columns=BACKWARD_COLUMNS, normed=-1):
        """Return (rows per group, number of groups, partial sums or None, their addresses).

        A task processes a block of columns of one group. The partial sums of a parameter have the shape (groups, C) if one of
        the parameters has several values, otherwise (tasks,). For a parameter with a value per token it is
        (blocks of columns, number of values); for the parameter ``normed``, a factor of a norm, (1, steps * rows).
        """
        group = -(-layout.R // GROUPS) if wanted else 1
        groups = -(-layout.R // group)
        if not wanted:
            return group, groups, None, ()
        chunks = -(-layout.C // columns)
        shape = (groups, layout.C) if self.per_channel else (groups * chunks,)
        sums = torch.empty((self._count, *shape), dtype=self._dtype, device="cpu")
        if self.spread >= ROWS or normed >= 0:
            sums = list(sums)
            for i, (_, step, token, _) in enumerate(self._places[: self._count]):
                if token or i == normed:
                    sums[i] = torch.empty(
                        (chunks, layout.R * (steps if step or i == normed else 1)), dtype=self._dtype, device="cpu"
                    )
        return group, groups, sums, tuple(map(address, sums))
