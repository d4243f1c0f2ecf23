# `make demo` in a new clone installs everything into .venv (no root needed), then runs. A second time it is quick.
#   make test VENV=/path/to/venv    another environment
#   make test EXTRAS=               no optional packages (DALI and the like)
#   make gpu                        on a machine with a GPU: its tests and benchmarks, with python3 as it is
VENV ?= .venv
EXTRAS ?= dev,dali-cuda13,dicom,deepspeed,parquet

comma := ,
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$$p" && break; done)
BIN := $(VENV)/bin
# One stamp a choice of extras, so that another choice installs again.
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
# What `make test` runs is needed whatever the extras.
TOOLS := pytest pytest-xdist hypothesis ruff mypy
# Files of tests at a time, of one thread each (those that are about threads say how many): what the tests of a file share
# is costly to make. One more than there are processors, since a fifth of the time is waiting; more than four take memory
# for little.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n + 1 : 4)))

.DELETE_ON_ERROR:
.PHONY: install demo test test-system lint bench bench-full gpu clean

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/fastmoco demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope --no-loadscope-reorder --durations=10

# Two files at a time: much of theirs is waiting, for clusters, kills and installations.
test-system: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder --durations=20 -m system

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# On two cores that do nothing else about ten minutes, and half an hour; the page is $(BENCH)/README.md.
bench: BENCH ?= build/bench
bench: $(STAMP)
	@$(BIN)/python -m bench.suite --out $(BENCH)

bench-full: BENCH ?= build/bench-full
bench-full: $(STAMP)
	@$(BIN)/python -m bench.suite --full --out $(BENCH)

# Installs nothing: whichever python3 has torch, or the one named by PYTHON. Nine minutes at most; results land in $(OUT).
OUT ?= build/gpu
gpu:
	@$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)) -m bench.gpu --out $(OUT)

clean:
	rm -rf build dist *.egg-info fastmoco/*.so .mypy_cache .pytest_cache .ruff_cache $(VENV)/.installed-*
	find fastmoco kernels bench tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "fastmoco needs Python 3.11 or 3.12 and found neither on PATH;" \
		"name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "making a virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		: "Debian parts venv from ensurepip; a pip outside can stand in for it."; \
		rm -rf $(VENV); \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install -q pip; \
	} || { rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments: install its venv module" \
		"(Debian, Ubuntu: apt install python3-venv), or name another: make PYTHON=..." >&2; exit 1; }

$(STAMP): $(BIN)/python pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@command -v "$${CXX:-g++}" >/dev/null || command -v c++ >/dev/null || echo "warning: no C++ compiler found (g++):" \
		"fastmoco._C will not be built, and PyTorch implementations run in its place, more slowly" >&2
	@echo "installing fastmoco[$(EXTRAS)] into $(VENV): about 3 minutes and 7 GB the first time, seconds later on"
	@DS_BUILD_OPS=0 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install -q -e '.$(if $(EXTRAS),[$(EXTRAS)])' $(TOOLS)
	@$(BIN)/python -c 'from fastmoco.ops import dispatch; print(dispatch.NATIVE_MISSING or "fastmoco._C: built")'
	@rm -f $(VENV)/.installed-*; touch $@
