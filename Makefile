# Everything runs in a virtual environment of its own, with the versions that pyproject.toml pins. Needs python3, g++ 11
# or later, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Tests in as many processes as there are CPUs, but, for their memory's sake, 4 at most; PYTEST_ARGS=-n0 is one.
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal
# Torch without CUDA, which is 200 MB instead of several GB; where it is out of reach, PyPI's.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

SOURCES := pyproject.toml CMakeLists.txt $(shell find include src python third_party -type f -not -name '*.pyc')
CPP := $(shell find bench include src tests -name '*.[ch]pp')

# A second environment, with the newest torch; the first has the oldest that is supported.
NEWEST := $(VENV)-newest-torch
# What has nothing to do with torch's version: kernels by themselves, builds, the benchmark.
NOT_OF_TORCH := build_kernels cuda_build emulated kernels large bench bench_gpu bench_idle gpus on_gpu policies tiles types \
                unfused_core unfused_policies window

.PHONY: test test-newest-torch demo bench lint format sanitize races aarch64 emulation emulation-sanitize emulation-races faults clean

test: $(VENV)/natten $(VENV)/test emulation
	$(PYTEST) $(PYTEST_ARGS)

# The tests that torch's version can matter to.
test-newest-torch: $(NEWEST)/natten $(NEWEST)/tools
	$(subst $(BIN)/,$(NEWEST)/bin/,$(PYTEST)) $(patsubst %,--ignore=tests/test_%.py,$(NOT_OF_TORCH)) --ignore=tests/emulation \
	  $(PYTEST_ARGS)

demo: $(VENV)/natten $(VENV)/demo
	$(BIN)/python examples/denoise.py

bench: $(VENV)/natten $(VENV)/bench
	$(BIN)/python -m bench $(BENCH_ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The suite, or what PYTEST_ARGS names, on kernels that check every access. Torch leaks; the preloaded libstdc++ lets the
# sanitizer see exceptions.
sanitize: build/sanitized/natten/.stamp $(VENV)/test
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized \
	$(PYTEST) $(PYTEST_ARGS)

# All kernels under ThreadSanitizer, which cannot be preloaded into Python: by a program of their own.
races: $(VENV)/build
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/races -G Ninja -DNATTEN_SANITIZE=thread \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/races --target fused_test
	setarch --addr-no-randomize build/races/fused_test

# The kernels for ARM, on an emulated CPU. Needs g++-aarch64-linux-gnu and qemu-user.
aarch64:
	$(PYTHON) -B src/codegen/generate.py --architecture aarch64 --output build/aarch64
	aarch64-linux-gnu-g++ -std=c++17 -O3 -Wall -Wextra -Werror -Iinclude -Isrc -o build/aarch64/fused_test \
	  tests/fused_test.cpp build/aarch64/*.cpp src/cpu/parallel.cpp src/cpu/scratch.cpp \
	  src/dispatch/dispatch.cpp src/dispatch/libraries.cpp src/dispatch/planning.cpp -ldl -lpthread
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/fused_test

# The CUDA kernels for the CPU (tests/emulation), without a CUDA toolkit: a library that natten.load_kernels loads, and
# programs that run its kernels on random problems. The sanitized ones check fewer of these.
emulation: build/emulation
emulation-sanitize: build/emulation-address
	build/emulation-address/kernels_test $(or $(PROBLEMS),2)
emulation-races: build/emulation-thread
	TSAN_OPTIONS=halt_on_error=1 setarch --addr-no-randomize build/emulation-thread/kernels_test $(or $(PROBLEMS),2)

.PHONY: build/emulation build/emulation-address build/emulation-thread
build/emulation build/emulation-address build/emulation-thread: build/emulation%: $(VENV)/build $(VENV)/emulation
	PATH="$(abspath $(BIN)):$$PATH" cmake -S tests/emulation -B $@ -G Ninja -DNATTEN_SANITIZE=$(*:-%=%) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_CXX_COMPILER=$(CXX)
	PATH="$(abspath $(BIN)):$$PATH" ninja -C $@

# Every fault that tests/emulation/test_faults.py knows; `test` tries a few of them. Takes 20 minutes.
faults: $(VENV)/test emulation
	NATTEN_FAULTS=all $(BIN)/python -m pytest tests/emulation/test_faults.py

clean:
	rm -rf build $(VENV) $(NEWEST)

# Packages are installed without the isolation of builds, which would put the tools elsewhere each time and so compile
# everything anew: only what changed is.
BUILD := $(BIN)/pip install --no-deps --no-build-isolation

$(BIN)/python $(NEWEST)/bin/python: %/bin/python:
	$(PYTHON) -m venv $*
	$@ -m pip install --quiet pip==26.3

$(VENV)/torch $(NEWEST)/newest-torch: pyproject.toml
$(VENV)/torch: | $(BIN)/python
$(NEWEST)/newest-torch: | $(NEWEST)/bin/python
$(VENV)/torch $(NEWEST)/newest-torch:
	$(@D)/bin/pip install --quiet --no-deps --group $(@F) --extra-index-url $(TORCH_INDEX)
	$(@D)/bin/pip install --quiet --group $(@F)
	touch $@

$(VENV)/test $(VENV)/demo $(VENV)/bench $(VENV)/lint: $(VENV)/%: pyproject.toml | $(VENV)/torch
	$(BIN)/pip install --quiet --group $*
	touch $@

# The headers of CUTLASS without their dependencies, Python packages that they do not need.
$(VENV)/build: pyproject.toml third_party/cutlass/requirement.txt | $(BIN)/python
	$(BIN)/pip install --quiet --group build
	$(BIN)/pip install --quiet --no-deps -r third_party/cutlass/requirement.txt
	touch $@

$(VENV)/emulation: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --no-deps --group emulation
	touch $@

$(NEWEST)/tools: pyproject.toml | $(NEWEST)/newest-torch
	$(NEWEST)/bin/pip install --quiet --group tools
	touch $@

$(VENV)/natten: $(SOURCES) | $(VENV)/torch $(VENV)/build
	$(BUILD) .
	touch $@

# The same files: the package knows no torch when it is compiled.
$(NEWEST)/natten: $(VENV)/natten | $(NEWEST)/newest-torch
	rm -rf build/wheel
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(NEWEST)/bin/pip install --no-deps --force-reinstall build/wheel/natten-*.whl
	touch $@

build/sanitized/natten/.stamp: $(SOURCES) | $(VENV)/torch $(VENV)/build
	rm -rf build/sanitized
	$(BUILD) --target build/sanitized --config-settings build-dir=build/sanitize \
	  --config-settings cmake.define.NATTEN_SANITIZE=address,undefined .
	touch $@
