# make demo   from nothing to a parity report: exports the bundled checkpoint, builds engines, generates, validates
# make test   the tests in five minutes, CPU only: of long ones a sample, another one each day
# make test-all  the tests that `make test` leaves out; make test-long: of these, those that are no whole grids
# make check  ruff, mypy
# make plugins  the TensorRT plugin library alone
# make wheels   the wheels of both distributions, into dist/; WHEELS=--twice proves that their bytes are reproducible
# make install-check  both wheels in an empty environment: what they bring, how large, how fast to import, the same tokens
# make faults proves the validator: every fault in random models, none in healthy ones; writes docs/faults.md
# make kernels proves the kernels without a GPU; writes docs/kernels.md
# make gpu    kernels and plugin library on this machine's GPU, right and how fast; report under reports/gpu
#
# Needs Python 3.11+ with venv, make and a C++17 compiler. Everything is installed into .venv, in versions pinned by constraints.txt.
# On Linux, `pip install torch` may take a CUDA build of several gigabytes; to get the CPU build, point pip at
# PyTorch's CPU index (pip's own setting PIP_EXTRA_INDEX_URL).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUNDLE := build/tiny-llama
REPORT := build/report

.PHONY: demo test test-all test-long test-seconds check plugins wheels install-check kernels faults gpu bench constraints clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,export,tensorrt-rtx,parity,dev,plugins-dev]'
	touch $@

# The plugin library: Triton compiles the kernels for every chip, without a GPU. Again only when a source changes.
$(VENV)/.plugins: $(VENV)/.installed $(shell find plugins -type f -not -name '*.pyc' -not -path '*/build/*')
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps ./plugins
	touch $@

demo: $(VENV)/.plugins
	$(BIN)/python examples/demo.py --checkpoint examples/tiny-llama --bundle $(BUNDLE) --report $(REPORT)

# Two processes, a file each at a time: fixtures that export or build are made once per file at most.
test: $(VENV)/.plugins
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=20 -m "not slow and not long"

test-all: $(VENV)/.plugins
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=20 -m "slow or long"

test-long: $(VENV)/.plugins
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=20 -m long

# After tests have become much slower or faster: what each takes, from a run of all of them.
test-seconds: $(VENV)/.plugins
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" --write-seconds

plugins: $(VENV)/.plugins

# With an empty Triton cache, minutes; WHEELS=--twice builds everything from nothing two times.
wheels: $(VENV)/.installed
	$(BIN)/python scripts/build_wheels.py $(WHEELS)

# Under a minute with the Triton cache that the plugins leave. Needs a package index. Figures: build/install.json
install-check: $(VENV)/.plugins
	$(BIN)/python scripts/check_install.py --json build/install.json

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# About 20 minutes on two cores.
faults: $(VENV)/.plugins
	OMP_NUM_THREADS=1 $(BIN)/python scripts/faults.py --write

# The kernels against float64 on the CPU, every variant; writes docs/kernels.md. A few minutes.
kernels: $(VENV)/.plugins
	OMP_NUM_THREADS=1 $(BIN)/python scripts/kernel_proof.py --write

# For a machine with a GPU, bare or not: whatever Python is there, and the plugins it has or that build/plugins holds.
gpu:
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) scripts/gpu_suite.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/decode_speed.py

constraints: $(VENV)/.installed
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
