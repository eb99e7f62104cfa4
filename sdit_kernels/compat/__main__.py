"""Run a Python program with SpikingJelly's neurons on the kernels of sdit_kernels.

usage: python -m sdit_kernels.compat [--root NAME] SCRIPT ARGS...
       python -m sdit_kernels.compat [--root NAME] -m MODULE ARGS...

The program may import spikingjelly.clock_driven: it is served where it is not installed, and neither it nor CuPy is needed. The
neurons of an installed SpikingJelly run on the kernels too.

  --root NAME   the same for a copy of SpikingJelly that the program imports as NAME, for example src.spikingjelly
"""

import runpy
import sys
from pathlib import Path

from .imports import install


def main(arguments: list[str]) -> None:
    roots, module = [], None
    while arguments and arguments[0].startswith("-") and module is None:
        option = arguments.pop(0)
        if option in ("-h", "--help"):
            print(__doc__.strip())
            return
        if option not in ("--root", "-m"):
            _stop(f"unknown option {option}: options of the program come after its name")
        if not arguments:
            _stop(f"{option} needs a name")
        if option == "--root":
            roots.append(arguments.pop(0))
        else:
            module = arguments.pop(0)
    if module is None and not arguments:
        _stop("the name of a script is missing")
    if module is None and not Path(arguments[0]).is_file():
        _stop(f"the file {arguments[0]} does not exist")
    for root in [*roots, "spikingjelly"]:
        try:
            install(root)
        except ValueError as error:
            _stop(f"--root: {error}")
    if module is not None:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


def _stop(message):
    print(f"python -m sdit_kernels.compat: {message}\n\n{__doc__.strip()}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
