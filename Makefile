# The one door to everything: `make` alone says what there is.
#
# A machine needs Python 3.11 to 3.14 with headers and venv, a C compiler, make, and PyPI by way of pip's own settings.
# Everything else is put into $(VENV). Stamp files there make repeated runs fast; a change of ext/ rebuilds the kernels.
#
#   PYTHON=python3.12 make test       another interpreter (make clean first)
#   make test SUITE=tests/storage     a part of the suite
#   make test ARGS="-k crash -x"      anything that pytest takes
#   make test WORKERS=0               one test after the other (a debugger needs it)
#   make sim SEED=229 SEEDS=1         play one seed of the simulator again (ARGS=--trace shows all of it)
#   make demo ARGS="--records 5000"   anything that `srengine demo` takes

PYTHON ?= python3
VENV ?= .venv
SUITE ?= tests
ARGS ?=
# Of `make test`: most tests wait for nodes more than they work. 0 is one after the other, in the process itself.
WORKERS ?= 2
SEED ?= 0
SEEDS ?= 10000
BIN := $(VENV)/bin
# cython-lint and others look for their helpers on the PATH.
export PATH := $(abspath $(BIN)):$(PATH)
KERNELS := $(wildcard ext/*.pyx ext/*.pxi ext/*.c ext/*.h srengine/_native/*.pxd) setup.py tools/vendor.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check lint types layers bench crash fuzz sim soak docs wheel clean

help:
	@echo "make demo    three real nodes on loopback: kill one, write on, watch it catch up"
	@echo "make test    every test (SUITE=tests/room, ARGS=\"-k word\")"
	@echo "make check   ruff, mypy, stubtest, cython-lint, layers, docs: the gate without the tests"
	@echo "make bench   the benchmark table against plain C loops and peers"
	@echo "make crash   rebuild many crash images and open every one"
	@echo "make fuzz    feed every decoder anything, for 20 minutes (ARGS=\"--minutes 5 tests/codec\")"
	@echo "make sim     many nodes in one thread under every fault (SEED=0 SEEDS=10000)"
	@echo "make soak    real nodes for long: kills, calm, distance, many observers (ARGS=\"kills --kills 50\")"
	@echo "make docs    run the examples of the documentation and check its links"
	@echo "make wheel   build wheel and sdist, try each in a fresh environment"
	@echo "make clean   remove what the others made"

# --- environments ------------------------------------------------------------------------------------------------------

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "srengine: there is no $(PYTHON); install Python 3.11 to 3.14 or name one in PYTHON." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "srengine: $(PYTHON) has no venv; install it (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# To run it: the package alone.
$(VENV)/.run: $(VENV)/.made pyproject.toml $(KERNELS)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# To work on it: the tools as well.
$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Both compile what is out of date and nothing else; the second is the yardstick of benchmarks/, which tests look at.
$(VENV)/.kernels: $(VENV)/.dev $(KERNELS) benchmarks/build.py $(wildcard benchmarks/ext/*.pyx)
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python benchmarks/build.py
	@touch $(VENV)/.run $@

$(VENV)/.bench: $(VENV)/.kernels
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	@touch $@

# --- what a user does --------------------------------------------------------------------------------------------------

demo: $(VENV)/.run
	$(BIN)/srengine demo $(ARGS)

# Tests start hundreds of nodes: none should compile the whole project again, whatever the environment says.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.kernels
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --max-worker-restart 0 $(SUITE) $(ARGS)

check: lint types layers docs

lint: $(VENV)/.kernels
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/cython-lint ext benchmarks/ext

types: $(VENV)/.kernels
	$(BIN)/mypy
	$(BIN)/python tools/check_stubs.py

layers: $(VENV)/.kernels
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_kernels.py

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

crash: $(VENV)/.kernels
	$(BIN)/python -m tests.crash --images 600 $(ARGS)
	$(BIN)/python -m tests.crash --images 300 --kind log $(ARGS)

fuzz: $(VENV)/.kernels
	$(BIN)/python -m tests.fuzz $(ARGS)

sim: $(VENV)/.kernels
	$(BIN)/python -m tests.simulator --seed $(SEED) --seeds $(SEEDS) $(ARGS)

soak: $(VENV)/.kernels
	$(BIN)/python -m tests.soak $(ARGS)

docs: $(VENV)/.kernels
	$(BIN)/python tools/check_docs.py

wheel: $(VENV)/.kernels
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python tools/try_dist.py dist

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find srengine benchmarks tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f srengine/_native/*.so srengine/_native/build_info.py benchmarks/*.so
