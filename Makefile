# Two commands: `make quickstart` and `make test`. Each sets itself up from nothing but python3 (3.11 or later) and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART ?= runs/quickstart
# minutes of training per stage at most; `make quickstart MINUTES=0.2` is a short one that shows the way, not the quality
MINUTES ?=
SHORT := $(if $(MINUTES),--pretrain.budget.minutes $(MINUTES) --finetune.budget.minutes $(MINUTES))

.PHONY: quickstart test test-slow chaos check bench format clean

quickstart: $(VENV)/.installed
	$(BIN)/maskdm train digits --recipe digits --out $(QUICKSTART) $(SHORT)
	test $(QUICKSTART)/metrics.json -nt $(QUICKSTART)/model || $(BIN)/maskdm evaluate $(QUICKSTART) --num 1000

# a process a core, since a test has one thread; each file in one of them, for what its tests share
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 3600

# kills and broken disks: about half an hour; `make chaos KILLS=10` is a short one; stopped, the same command goes on
KILLS ?= 200
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --kills $(KILLS) --work runs/chaos-$(KILLS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_layers.py

# the short form; `python -m benchmarks.steps --full` and the other files of benchmarks/ for more
bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.steps

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskdm needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build dist
