PYTHON ?= python3
VENV ?= .venv

python := $(VENV)/bin/python
interpreter := $(if $(wildcard $(python)),$(python),$(PYTHON))
pip := $(python) -m pip --disable-pip-version-check
tools := $(VENV)/.tools
# A process per core, each with one thread (tests/conftest.py).
parallel := -n auto --maxprocesses 8 --dist worksteal
# One stamp per environment, kept in this checkout: another VENV gets its own installation.
built := build/.installed$(subst /,-,$(abspath $(VENV)))
# The extension, built in place for whatever torch the interpreter has: a GPU machine may have its
# own, and no network to make an environment from.
library := fused_bottleneck/_C.abi3.so
# Side by side on one GPU, if pytest-xdist is there: most of the time goes into compiling.
gpu_parallel = $(if $(shell $(interpreter) -c "import xdist; print(1)" 2>/dev/null),-n 8 --dist worksteal)
sources := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
emulator := $(wildcard tests/cuda_emulator/*)

gpu_tests := $(shell grep -l "mark\.gpu\|ON_GPU" tests/test_*.py)
# Every kernel at small sizes: the sanitizer takes a hundred times as long.
sanitized := tests/test_cuda.py tests/test_cuda_passes.py tests/test_cuda_junctions.py -m gpu -k "test_stage or agrees or misaligned"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help check venv build wheel demo test test-fast test-gpu sanitize kernel-report bench bench-gpu \
  report lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
	@echo "PYTHON=$(PYTHON) makes the virtual environment VENV=$(VENV); either can be given."
	@echo "An environment that exists is used, and gets the versions of constraints.txt."

check:
	@command -v $(interpreter) >/dev/null || \
	  { echo "$(interpreter) was not found: install Python 3.10 or later, or give PYTHON=<path>."; exit 1; }
	@$(interpreter) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(interpreter) is older than Python 3.10: install a later one, or give PYTHON=<path>."; exit 1; }
	@$(interpreter) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(interpreter) cannot make virtual environments: install its venv module" \
	    "(Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v "$${CXX:-g++}" >/dev/null || \
	  { echo "No C++ compiler ($${CXX:-c++, g++}) was found: install one" \
	    "(Debian, Ubuntu: apt install g++), or give CXX=<path>."; exit 1; }

$(tools): constraints.txt | check
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(pip) install -c constraints.txt torch
	$(pip) install -r constraints.txt
	@touch $@

$(built): $(tools) setup.py pyproject.toml $(sources)
	$(pip) install --no-build-isolation --no-deps -e .
	@mkdir -p $(@D) && touch $@

$(library): setup.py $(sources)
	$(interpreter) setup.py build_ext --inplace
	@touch $@

venv: $(tools) ## make the virtual environment, with the tested versions

build: $(built) ## compile the extension and install the package into the environment

wheel: $(tools) ## build a wheel in dist/, with the CUDA passes where nvcc is found
	$(pip) wheel --no-build-isolation --no-deps -w dist .

demo: build ## train a small ResNet on real images, plain and fused (at most 3 minutes)
	$(python) examples/train.py

test: build ## run every test (at most 10 minutes)
	$(python) -m pytest $(parallel)

test-fast: build ## run the tests that are not slow (90 s on two cores)
	$(python) -m pytest $(parallel) -m "not slow"

test-gpu: $(library) ## run the tests that need a CUDA device, in VENV if it is there, else by PYTHON
	$(interpreter) -m benchmarks.warm_up
	$(interpreter) -m pytest $(gpu_parallel) -m "gpu and not large" $(gpu_tests)
	$(interpreter) -m pytest -m large tests/test_cuda.py

sanitize: $(library) ## run every kernel under compute-sanitizer (needs a GPU and the CUDA toolkit)
	compute-sanitizer --tool memcheck --error-exitcode 1 \
	  $(interpreter) -m pytest -x $(sanitized)
	compute-sanitizer --tool racecheck --error-exitcode 1 \
	  $(interpreter) -m pytest -x $(sanitized)

kernel-report: venv ## what the compiler makes of the kernels, and their floors; needs no GPU
	$(python) -m benchmarks.kernel_report

bench: build ## measure on the CPU; write benchmarks/results/ (about half an hour; QUICK=--quick: does it run?)
	$(python) -m benchmarks.bench_block $(QUICK)
	$(python) -m benchmarks.bench_stages $(QUICK)
	$(python) -m benchmarks.bench_resnet50 $(QUICK)
	$(python) -m benchmarks.bench_scaling $(QUICK)
	$(python) -m benchmarks.bench_ranks $(QUICK)
	$(python) -m benchmarks.convergence $(QUICK)

bench-gpu: ## build, test, tune and measure on a GPU, with $(interpreter) as it is, in 9 minutes
	$(interpreter) -m benchmarks.suite --device cuda $(SUITE)

report: venv ## write the tables of README.md and docs/scaling.md, the plots and docs/compatibility.md
	$(python) -m benchmarks.report
	$(python) -m benchmarks.compatibility

lint: venv ## check style, formatting, types, and that the written tables are current
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(sources) $(emulator)
	$(python) -m mypy
	$(python) -m benchmarks.report --check
	$(python) -m benchmarks.compatibility --check

format: venv ## format the Python and C++ sources
	$(python) -m ruff check --fix
	$(python) -m ruff format
	$(VENV)/bin/clang-format -i $(sources) $(emulator)

clean: ## remove what was built, and the environment this checkout made
	rm -rf .venv build dist *.egg-info fused_bottleneck/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
