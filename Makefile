# Everything runs in .venv, which these targets make. A torch already chosen: make test TORCH="torch==2.12.1"
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# Where threads that are not torch's work, ours and those of BLAS, torch's would take a core from them while they wait for
# its next op. Between ops they wait as torch has it: to be woken would take longer than a short op, ours or a peer's.
BESIDE_TORCH := OMP_WAIT_POLICY=PASSIVE

.PHONY: help setup build demo test test-all bench bench-data bench-metrics bench-spectral lint format package clean

help:
	@echo "make demo     set up, train ProtoVAE on generated sprites, write runs/demo, print the op table"
	@echo "make test     set up and run the tests (make test-all: the slow ones too)"
	@echo "make build    set up: .venv, torch, the compiled extension"
	@echo "make bench    measure every op against its peers, print the table, write benchmarks/results/cpu.json"
	@echo "make bench-data      images a second of the generators      make bench-metrics   metrics against the reference"
	@echo "                     implementation, which is fetched; FULL=1 adds DCI at full size and a whole model: an hour"
	@echo "make bench-spectral  whole fits of the eigenmap against scikit-learn's"
	@echo "make lint     ruff, clang-format, mypy      make format: apply the first two"
	@echo "make package  sdist, a wheel from it, and that wheel in an empty environment"

build: .venv/built

.venv/tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade "pip>=24"
	$(BIN)/python -m pip install -q "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel ninja
	FASTDIS_NO_EXT=1 $(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

.venv/built: .venv/tools $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

demo: build
	$(BIN)/fastdis demo --out runs/demo
	$(BIN)/python -m pytest benchmarks/ops --quick

test: build
	$(BIN)/python -m pytest -n 2

test-all: build
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

bench: build
	$(BIN)/python -m pytest benchmarks/ops --benchmark-json=benchmarks/results/cpu.json

bench-data: build
	$(BESIDE_TORCH) $(BIN)/python -m pytest benchmarks/data --benchmark-json=benchmarks/results/data.json

bench-metrics: build
	$(BESIDE_TORCH) $(BIN)/python -m pytest benchmarks/metrics $(if $(FULL),--full) --benchmark-json=benchmarks/results/metrics.json

bench-spectral: build
	$(BESIDE_TORCH) $(BIN)/python -m pytest benchmarks/spectral --benchmark-json=benchmarks/results/spectral.json

CPP_FILES = $(shell find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

lint: .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy

format: .venv/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

package: .venv/tools
	TORCH="$(TORCH)" bash tests/packaging/check.sh $(BIN)/python

clean:
	rm -rf .venv build dist *.egg-info fastdis/*.so
