"""``install``: code that imports SpikingJelly runs on the kernels, without a change in the code."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable

from .swap import unfuse_class

_SERVED = "sdit_kernels.compat.clock_driven"
_FILES = ("base", "encoding", "functional", "layer", "neuron", "surrogate")
_SERVED_CEXT = f"{_SERVED}.cext_neuron"


class _Alias(importlib.abc.Loader):
    """Puts a module of this package into ``sys.modules`` under another name."""

    def __init__(self, target):
        self.target = target

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        if self.target is not None:
            sys.modules[module.__name__] = importlib.import_module(self.target)


class _FuseAfterwards(importlib.abc.Loader):
    """Loads a neuron module of SpikingJelly with its own loader, and then fuses its classes."""

    def __init__(self, loader, finder):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.finder.fuse(module)

    def __getattr__(self, name):  # get_source, get_filename, ...
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one SpikingJelly, or copy of it, whose name is ``root``."""

    def __init__(self, root):
        self.root = root
        self.clock_driven = f"{root}.clock_driven"
        self.cext = f"{root}.cext"
        self.files = [f"{root}.clock_driven.{file}" for file in _FILES]
        self.neurons = [f"{root}.{interface}.neuron" for interface in ("activation_based", "clock_driven")]
        self.no_library = False  # no SpikingJelly is installed
        self.undo: list[Callable[[], None]] = []  # what uninstall calls

    def find_spec(self, name, path=None, target=None):
        if name != self.root and not name.startswith(f"{self.root}."):
            return None
        # A served clock_driven is the package _SERVED, whose files other finders would load again under a second name.
        served = name.startswith(f"{self.clock_driven}.") and sys.modules.get(self.clock_driven) is sys.modules.get(_SERVED)
        served = served or (name == f"{self.cext}.neuron" and importlib.util.find_spec("_C_neuron") is None)
        spec = None if served else self._find_elsewhere(name, path, target)
        if spec is not None:
            if name in self.neurons and spec.loader is not None:
                spec.loader = _FuseAfterwards(spec.loader, self)
            return spec
        if name == self.root:
            self.no_library = True
            return importlib.machinery.ModuleSpec(name, _Alias(None), is_package=True)
        if name == self.cext:
            return importlib.machinery.ModuleSpec(name, _Alias(None), is_package=True)
        if name == f"{self.cext}.neuron":
            return importlib.machinery.ModuleSpec(name, _Alias(_SERVED_CEXT))
        if name == self.clock_driven or name in self.files:
            return importlib.machinery.ModuleSpec(name, _Alias(_SERVED + name[len(self.clock_driven) :]), is_package=True)
        if name.startswith(f"{self.clock_driven}.") or self.no_library:
            raise ModuleNotFoundError(f"{name} is not served: {_what_is_served(self)}", name=name)
        return None

    def fuse(self, neurons):
        from .spikingjelly import fuse_classes  # late, because it imports the kernels

        self.allow_cupy(neurons, "check_backend")  # clock_driven
        self.allow_cupy(getattr(neurons, "base", None), "check_backend_library")  # activation_based 0.0.0.0.14
        fused = fuse_classes(neurons)
        self.undo.append(lambda: [unfuse_class(cls) for cls in fused])

    def allow_cupy(self, module, name):
        """Without CuPy, a constructor of SpikingJelly refuses the backend "cupy". The kernels need no CuPy, so accept it."""
        own = getattr(module, name, None)
        if own is not None and getattr(module, "cupy", True) is None:
            setattr(module, name, lambda backend: None if backend == "cupy" else own(backend))
            self.undo.append(lambda: setattr(module, name, own))

    def _find_elsewhere(self, name, path, target):
        for finder in sys.meta_path:
            if not isinstance(finder, _Finder) and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None


def _installed():
    return [finder for finder in sys.meta_path if isinstance(finder, _Finder)]


def _what_is_served(finder):
    files = f"{finder.clock_driven}, its files {', '.join(_FILES)}, and {finder.cext}.neuron"
    return f"sdit_kernels serves {files}; a SpikingJelly that is installed has the rest"


def install(root: str = "spikingjelly") -> None:
    """Serve ``spikingjelly.clock_driven`` where it is not installed, and run SpikingJelly's neurons on the kernels where it is.

    After the call, ``from spikingjelly.clock_driven.neuron import MultiStepLIFNode`` works without SpikingJelly and without
    CuPy, and also beside an installed SpikingJelly 2.x, which has no clock_driven. The files base, encoding, functional, layer,
    neuron and surrogate are served, and ``spikingjelly.cext.neuron`` where its CUDA extension is missing. Other names of
    SpikingJelly raise an ImportError that names them.

    If SpikingJelly, or a copy of it under ``root``, is installed, its own classes stay in place. All its LIF, IF and parametric
    LIF neurons then run on the kernels, also neurons that are made later; ``compat.spikingjelly.accelerate`` does the same for
    one model. Subclasses that override the charge, the fire or the reset run their own code, with a warning. A copy may be
    edited, so its classes are first compared with the fused ones on random data.

    Args:
        root: name of the package. A project that holds a copy imports it as "src.spikingjelly", for example.

    Raises:
        TypeError: root is not a string.
        ValueError: root is not a module name.

    Call it before the first import of the code that needs it. From outside: ``python -m sdit_kernels.compat SCRIPT ARGS...``.

    Example:
        >>> from sdit_kernels.compat import install
        >>> install()
        >>> from spikingjelly.clock_driven.neuron import MultiStepLIFNode
        >>> MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy").tau
        2.0
    """
    if not isinstance(root, str):
        raise TypeError(f"root must be a string, got {type(root).__name__}")
    if not all(part.isidentifier() for part in root.split(".")):
        raise ValueError(f'root must be the name of a module, for example "src.spikingjelly", got {root!r}')
    if root in [finder.root for finder in _installed()]:
        return
    finder = _Finder(root)
    for name in finder.neurons:
        if name in sys.modules:
            finder.fuse(sys.modules[name])
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()


def uninstall() -> None:
    """Undo :func:`install`, for all roots: nothing is served any more, and SpikingJelly's classes run their own code.

    Modules and neurons that a program imported or made before stay as they are.

    Example:
        >>> from sdit_kernels.compat import install, uninstall
        >>> install()
        >>> uninstall()
    """
    for finder in _installed():
        sys.meta_path.remove(finder)
        for undo in finder.undo:
            undo()
        for name, module in list(sys.modules.items()):
            if f"{name}.".startswith(f"{finder.root}.") and _is_served(module):
                del sys.modules[name]
        library = vars(sys.modules.get(finder.root, object))
        for part in ("clock_driven", "cext"):
            if _is_served(library.get(part)):
                delattr(sys.modules[finder.root], part)


def _is_served(module):
    loader = getattr(getattr(module, "__spec__", None), "loader", None)
    return isinstance(loader, _Alias) or getattr(module, "__name__", "").startswith(_SERVED)
