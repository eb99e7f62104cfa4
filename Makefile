# Each target fills .venv by itself. Another interpreter or torch: make test PYTHON=python3.12 TORCH=torch==2.14.1
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: test quick demo check format docs peers bench package clean

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

# Every op on every backend against the oracle, and the contract.
quick: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not process" tests/test_oracle.py tests/test_contract.py

# Trains on two cores in minutes, or goes on where it was stopped, then draws samples.png.
demo: .venv/installed
	$(BIN)/sdit train $(if $(wildcard runs/demo/checkpoints/step_*.safetensors),--resume runs/demo,--preset digits --out runs/demo)
	$(BIN)/sdit sample runs/demo --guidance 2 --clip --out samples.png

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/words.py
	$(BIN)/python perf/compile_report.py --check --quick

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site. --strict makes a dead link or anchor an error. mkdocs reads the docstrings without importing the package.
docs: .venv/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: peers
	$(BIN)/python perf/bench_lif.py

# SpikingJelly 2.0.0 is for Python 3.11 and later. 0.0.0.0.12 is the last version with clock_driven; it has a folder of its own.
JELLY12 := spikingjelly-0.0.0.0.12
peers: .venv/installed
	$(BIN)/pip install --quiet loguru scipy tqdm matplotlib transformers
	$(BIN)/pip install --quiet --no-deps snntorch==1.0.0 fla-core==0.6.0 nir nirtorch h5py
	$(BIN)/pip install --quiet --no-deps spikingjelly==2.0.0 || $(BIN)/pip install --quiet --no-deps spikingjelly==0.0.0.0.14
	test -d build/peers/$(JELLY12) || $(BIN)/pip install --quiet --no-deps --target build/peers/$(JELLY12) $(subst -,==,$(JELLY12))

# dist/: a wheel and an sdist as they would be uploaded, and whether an index would show README.md.
package:
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip install --quiet build twine
	build/venv/bin/python -m build
	build/venv/bin/twine check --strict dist/*

# A torch with GPU support brings the Triton that fits it; only a CPU build of torch needs one beside it.
.venv/installed: setup.py pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet triton==3.7.1
	$(BIN)/pip install --quiet --editable ".[sdit,test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
