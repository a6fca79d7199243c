# Two commands: `make sample` draws digits, `make test` runs the tests. The rest is for developers.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* csrc/include/*/*.h examples/cpp/*.cpp tests/*.cpp tests/*.h)

GPU_TESTS := $(patsubst %,tests/test_%.py,cuda cuda_layers captured_loop captured_streams graphs \
  loops backend)

.PHONY: sample test test-gpu bench bench-gpu in-place lint format info clean

sample: $(VENV)/built
	$(PY) -m ddpm_fast.sample --graphs auto

test: $(VENV)/built $(VENV)/tested
	$(PY) -m pytest

bench: $(VENV)/built
	$(PY) -m pytest benchmarks --benchmark-only

# These use $(PYTHON) with the torch it has, and install nothing; each keeps a JSON file in
# benchmarks/results/ up to date while it runs, and goes on from it with RESUME=--resume.
test-gpu: in-place
	$(PYTHON) tests/gpu_session.py $(RESUME) --json benchmarks/results/test_gpu.json $(GPU_TESTS)

bench-gpu: in-place
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) benchmarks/bench_captured.py $(RESUME)

in-place:
	$(PYTHON) setup.py --quiet build_ext --inplace

lint: $(VENV)/built
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/built
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

info: $(VENV)/built
	$(PY) -m ddpm_fast.info

clean:
	rm -rf $(VENV) build ddpm_fast.egg-info ddpm_fast/_C*.so

$(VENV)/installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "ddpm_fast needs Python 3.10 or newer: set PYTHON=... to one."; exit 1; }
	@if [ -n "$$CXX" ]; then command -v "$${CXX%% *}"; else \
	  command -v c++ || command -v g++ || command -v clang++; fi >/dev/null || { \
	  echo "ddpm_fast needs a C++ compiler: install one (Debian, Ubuntu: g++)."; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
	  echo "ddpm_fast needs Python's headers: install them (Debian, Ubuntu: python3-dev)."; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null || { \
	  echo "ddpm_fast needs Python's venv: install it (Debian, Ubuntu: python3-venv)."; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -r constraints.txt
	@touch $@

$(VENV)/tested: constraints-test.txt $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -c constraints-test.txt 'diffusers; python_version >= "3.11"'
	@touch $@

$(VENV)/built: $(VENV)/installed $(CPP) CMakeLists.txt setup.py pyproject.toml
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
