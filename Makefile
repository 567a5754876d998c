# make demo: a network learns six maps from one image, in minutes on a CPU.   make test: the test suite (test-all: with tests of minutes).
# make fuzz: 12 000 damaged files for all readers of foreign files, some minutes.
# make bench: speed and memory against plain forms, some thirty minutes on two cores, and their page in benchmarks/speed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all fuzz lint bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,demo,bench,heif,dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/pamm demo

test: $(VENV)/ready
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not exhaustive" --numprocesses 2 --dist loadfile

test-all: $(VENV)/ready
	$(BIN)/python -m pytest

fuzz: $(VENV)/ready
	cd tests && ../$(BIN)/python -W error -m fuzz --inputs 12000

lint: $(VENV)/ready
	$(BIN)/ruff check --fix src tests
	$(BIN)/ruff format src tests

bench: $(VENV)/ready
	$(BIN)/pamm bench all --out benchmarks/speed/results.jsonl
	$(BIN)/pamm bench report benchmarks/speed/results.jsonl --out benchmarks/speed

clean:
	rm -rf $(VENV) runs
