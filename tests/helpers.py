"""What several test files share."""

import contextlib
import importlib
import sys
from unittest import mock

import native_triton

USERS = dict(TILE=16, PAIRS=16, HELD=8, SUMS=32, lif_threads=128, wkv_threads=64, spiking_threads=32)
SMALL = dict(TILE=4, PAIRS=8, HELD=2, SUMS=8, lif_threads=8, wkv_threads=8, spiking_threads=8)
_COMPILED_IN = ("wkv", "spiking_wkv")  # modules of sdit_kernels.cpu that take the tile from layout when they are imported
_cpu_modules = {}  # tile -> those two


def _cpu_modules_for(tile):
    """The modules themselves, or a second pair of them, imported under another tile."""
    from sdit_kernels import cpu, layout

    if tile not in _cpu_modules:
        names = [f"sdit_kernels.cpu.{name}" for name in _COMPILED_IN]
        own = [importlib.import_module(name) for name in names]
        _cpu_modules[own[0].TILE] = own
        if tile != own[0].TILE:
            with mock.patch.object(layout, "TILE", tile), mock.patch.dict(sys.modules):
                for name in names:
                    del sys.modules[name]
                _cpu_modules[tile] = [importlib.import_module(name) for name in names]
            for name, module in zip(_COMPILED_IN, own):
                setattr(cpu, name, module)
    return _cpu_modules[tile]


@contextlib.contextmanager
def tiles(size):
    """Run the kernels of both backends with these numbers: ``USERS``, what users run, or ``SMALL``, which compile in less time
    and cut small tensors into many programs with ragged edges.
    """
    from sdit_kernels import layout
    from sdit_kernels.ops.operator import kernels

    with contextlib.ExitStack() as stack:
        if native_triton.setup() != "interpreter":
            import sdit_kernels.triton.mix as mix
            import sdit_kernels.triton.spiking_wkv as triton_spiking_wkv
            import sdit_kernels.triton.tiles as shared
            import sdit_kernels.triton.wkv as triton_wkv

            for module, threads in (
                (shared, "lif_threads"), (mix, "lif_threads"), (triton_wkv, "wkv_threads"),
                (triton_spiking_wkv, "spiking_threads"),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(module, "_THREADS", size[threads]))
            stack.enter_context(mock.patch.multiple(triton_wkv, _HELD=size["HELD"], _SUMS=size["SUMS"]))
        stack.callback(kernels.cache_clear)
        for name, module in zip(_COMPILED_IN, _cpu_modules_for(size["TILE"])):
            own = sys.modules[f"sdit_kernels.cpu.{name}"]
            stack.callback(sys.modules.__setitem__, own.__name__, own)
            sys.modules[own.__name__] = module
        kernels.cache_clear()
        stack.enter_context(mock.patch.object(layout, "TILE", size["TILE"]))
        stack.enter_context(mock.patch.dict(layout.PAIRS, triton=size["PAIRS"]))
        yield
