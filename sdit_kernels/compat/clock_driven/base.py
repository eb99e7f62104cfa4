"""State of stateful modules, as ``spikingjelly.clock_driven.base`` keeps it."""

import copy

import torch
from torch import nn


def refuse_names(module: str, *names: str):
    """Return a ``__getattr__`` for a module: the names that SpikingJelly has and this package does not raise an ImportError."""

    def getattr_of_module(name):
        if name in names:
            text = f"spikingjelly.clock_driven serves no {name} in {module}: SpikingJelly 0.0.0.0.12 itself has it"
            raise ImportError(text, name=name)
        raise AttributeError(f"module {module} has no attribute {name!r}")

    return getattr_of_module


class MemoryModule(nn.Module):
    """Base class of modules with state. A state is an attribute that ``reset`` sets back; the state_dict does not contain it.

    ``_memories`` and ``_memories_rv`` hold the states and their reset values, under SpikingJelly's names, so that a pickled
    module of SpikingJelly loads here.

    Source: the interface of SpikingJelly 0.0.0.0.12, ``clock_driven.base.MemoryModule``.

    Example:
        >>> from sdit_kernels.compat.clock_driven.base import MemoryModule
        >>> module = MemoryModule()
        >>> module.register_memory("v", 0.0)
        >>> module.v = 1.0
        >>> module.reset()
        >>> module.v
        0.0
    """

    def __init__(self):
        super().__init__()
        self._memories = {}
        self._memories_rv = {}

    def register_memory(self, name: str, value):
        """Add a state with its value, which is also its reset value."""
        if hasattr(self, name):
            raise ValueError(f"name must be new, but the module has an attribute {name!r} already")
        self._memories[name] = value
        self.set_reset_value(name, value)

    def set_reset_value(self, name: str, value):
        self._memories_rv[name] = copy.deepcopy(value)

    def reset(self):
        for name, value in self._memories_rv.items():
            self._memories[name] = copy.deepcopy(value)

    def detach(self):
        """Detach every state from the graph in place, for truncated backpropagation through time."""
        for value in self._memories.values():
            if isinstance(value, torch.Tensor):
                value.detach_()

    def memories(self):
        yield from self._memories.values()

    def named_memories(self):
        yield from self._memories.items()

    def __getattr__(self, name):
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name, value):
        memories = self.__dict__.get("_memories", {})
        if name in memories:
            memories[name] = value
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name):
        if name in self.__dict__.get("_memories", {}):
            del self._memories[name], self._memories_rv[name]
        else:
            super().__delattr__(name)

    def __dir__(self):
        return sorted({*super().__dir__(), *self._memories})

    def _apply(self, fn, *args, **kwargs):
        for values in (self._memories, self._memories_rv):
            values.update({name: fn(value) for name, value in values.items() if isinstance(value, torch.Tensor)})
        return super()._apply(fn, *args, **kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._memories = self._memories.copy()
        return replica
