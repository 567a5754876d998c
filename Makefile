# make demo: a network learns six maps from one image, in minutes on a CPU.   make test: the test suite (test-fast: without its slow tests; test-all: with tests of minutes).
# make lint: style, types, spelling, large files.   make format: the linter's repairs.   make hooks: the same checks before every commit.
# make sanitize, make test-clang: the C kernels' tests with sanitizers, and with clang.   make test-oldest: the oldest torch, timm and numpy.
# make fuzz: 12 000 damaged files for all readers of foreign files, some minutes.
# make bench: speed and memory against plain forms, some thirty minutes on two cores, and their page in benchmarks/speed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHON_FILES := src tests benchmarks

OLDEST := .venv-oldest
KERNEL_TESTS := tests/ops tests/kernels
ASAN = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so)

.PHONY: demo test test-fast test-all fuzz lint format hooks sanitize test-clang test-oldest bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,demo,plots,bench,heif,dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/pamm demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not exhaustive" --numprocesses 2 --dist worksteal

test-fast: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not exhaustive" --numprocesses 2 --dist worksteal

test-all: $(VENV)/ready
	$(BIN)/python -m pytest

fuzz: $(VENV)/ready
	cd tests && ../$(BIN)/python -W error -m fuzz --inputs 12000

lint: $(VENV)/ready
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/check-added-large-files --enforce-all --maxkb=1000 $$(git ls-files)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/ready
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)

hooks: $(VENV)/ready
	$(BIN)/pre-commit install

# A kernel is compiled by what CC names, flags included; a cache of its own keeps these libraries apart.
sanitize: $(VENV)/ready
	CC="gcc -g -fsanitize=address,undefined -fno-sanitize-recover=all" LD_PRELOAD="$(ASAN)" ASAN_OPTIONS=detect_leaks=0 \
	XDG_CACHE_HOME=$(CURDIR)/$(VENV)/sanitize OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(KERNEL_TESTS)

test-clang: $(VENV)/ready
	CC=clang XDG_CACHE_HOME=$(CURDIR)/$(VENV)/clang OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(KERNEL_TESTS)

# The lower bounds of pyproject.toml as pins; an environment of some six gigabytes, removed afterwards.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/^ *"([A-Za-z_-]+)(\[[a-z]+\])?>=([0-9.]+)".*/\1==\3.*/p' pyproject.toml | sort -u > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt --editable '.[train,demo,plots,bench,heif,dev]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow and not exhaustive" --numprocesses 2 --dist loadfile
	rm -rf $(OLDEST)

bench: $(VENV)/ready
	$(BIN)/pamm bench all --out benchmarks/speed/results.jsonl
	$(BIN)/pamm bench report benchmarks/speed/results.jsonl --out benchmarks/speed

clean:
	rm -rf $(VENV) runs
