# Each target makes .venv itself when it is missing; repeating a target is harmless.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help speedrun test check bench clean

help:
	@echo "make speedrun   the whole pipeline on the embedded data, from text to a chat, in minutes"
	@echo "make test       lint, and all tests except the long ones"
	@echo "make check      the library of the kernels, the long tests, planted faults, a real Slurm"
	@echo "make bench      benchmarks of the data loader, the tokenizer, operations and a step on this machine"
	@echo "make clean      removes .venv and build/; PYTHON=python3.12 chooses the Python for .venv"

speedrun: $(INSTALLED)
	$(BIN)/nanochat speedrun --preset cpu

test: $(INSTALLED)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# what takes long: the library of all kernels in the dtypes of training, tests marked long, every planted fault, and the preset cpu
# under a real Slurm where that is installed
check: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist load tests/kernels/test_library.py -m long
	$(BIN)/python -m pytest -n 2 --dist load -m long --ignore tests/slurm --ignore tests/kernels/test_library.py
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/slurm tests/kernels/test_planted_faults.py -m "" --plant --slurm-preset cpu --timeout 2400

bench: $(INSTALLED)
	mkdir -p build
	$(BIN)/python -m pytest bench -o python_files="bench_*.py" --benchmark-json=build/bench.json

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	"nanochat needs Python 3.10 or newer, found %d.%d; load a newer one (on a cluster: module load python/3.12.5) or: make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
