"""``python -m sdit_kernels.neuron NAME``: print the code that a neuron becomes."""

import argparse
import ast
import re

from . import NEURONS
from .printer import ENTRIES, LANGUAGES, text
from .trace import Trace


def parse_flags(words, flags):
    """Return the settings of "soft,decay=False": a name alone is True."""
    found = {}
    for word in filter(None, re.split(r",(?![^(]*\))", words)):  # not at the commas of a tuple
        name, given, value = word.partition("=")
        if name not in flags:
            raise ValueError(f"--flags must name some of {', '.join(flags) or 'none (this neuron has no flags)'}, got {name!r}")
        try:
            found[name] = ast.literal_eval(value) if given else True
        except (ValueError, SyntaxError):
            found[name] = value
        if type(found[name]) is not type(flags[name]):
            raise ValueError(
                f"the flag {name} must be a {type(flags[name]).__name__}, as in {name}={flags[name]}, got {word!r}"
            )
    return found


def main():
    lines = [f"  {name}: {', '.join(f'{flag}={value}' for flag, value in n.flags.items())}" for name, n in NEURONS.items()]
    parser = argparse.ArgumentParser(
        "python -m sdit_kernels.neuron",
        description="Print the code that a neuron's step becomes on a backend: the step, what the backward pass records, the "
        "pullback, and the forward derivative.",
        epilog="\n".join(["neurons and their flags:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NEURONS, help="the neuron")
    parser.add_argument("--backend", choices=LANGUAGES, default="torch", help="the language of the code (default: torch)")
    parser.add_argument(
        "--flags",
        default="",
        metavar="F,F=VALUE",
        help="settings of the step, for example soft,decay=False or soft,levels=integer,span=(0,4)",
    )
    parser.add_argument("--parameters", action="store_true", help="with the gradients of the parameters")
    parser.add_argument("--only", choices=ENTRIES, help="print this function only")
    options = parser.parse_args()
    neuron = NEURONS[options.name]
    try:
        trace = Trace(neuron, parse_flags(options.flags, neuron.flags))
        code = text(trace, LANGUAGES[options.backend], options.parameters, [options.only] if options.only else ENTRIES)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print(code, end="")


if __name__ == "__main__":
    main()
