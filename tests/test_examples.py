"""examples/: each file runs by itself in short time, has --help, and is short enough to copy."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = {  # file: (library it needs, arguments that make it short, words in its output)
    "spikingjelly_digits.py": ("spikingjelly", ("--epochs", "1"), ("SpikingJelly: ", "accelerated: ", "% right")),
    "snntorch_digits.py": ("snntorch", ("--epochs", "1"), ("loop: ", "unroll: ", "% right")),
    "rwkv_text.py": ("transformers", ("--steps", "1"), ("loss", "ms a step", "def ")),
    "own_neuron.py": ("sklearn", ("--epochs", "1"), ("epoch 1: loss ", "% right")),
    "ops_digits.py": ("sklearn", ("--epochs", "1"), ("epoch 1: loss ", "% right")),
    "sdit_digits.py": ("diffusers", ("--steps", "2", "--dim", "32"), ("10 digits in samples.png",)),
}


def test_every_example_is_tested_and_short():
    files = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert files.keys() == CASES.keys()
    for name, text in files.items():
        assert len(text.splitlines()) < 40 and "from perf" not in text, name  # users copy the file and do not have perf/
        assert "argparse.ArgumentParser(description=__doc__)" in text, name


@pytest.mark.process
@pytest.mark.parametrize("name", CASES)
def test_an_example_runs(name, tmp_path):
    library, arguments, words = CASES[name]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (make peers, or pip install '.[sdit]')")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    output = done.stdout
    assert all(word in output for word in words), output
