# make demo   tune a 135M model on a service desk's messages and print where the report is
# make test   the fast suite, then the tests on real models
# make lint   ruff and mypy
# make bench  the short comparisons with TRL, a few minutes; fails where a ratio fell by 15 % (RECORD=1 records anew)
# All of them make .venv first; nothing outside this folder and the model cache is touched.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev

# Two processes with one thread each: tiny models gain nothing from threads. A file stays in one process: its fixtures
# are made once.
FAST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"
SLOW := $(BIN)/python -m pytest -m "slow and not gpu" --durations=10
# Many short trainings (and tests that start processes of their own) gain more from two processes than from two threads.
MANY := tests/test_real_methods.py tests/test_peft_door.py tests/test_ranks.py tests/test_kill.py

.PHONY: help venv demo test test-fast test-slow lint format bench clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "luthier needs Python 3.11 or newer; name it with: make PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)

# --resume makes a second `make demo` go on where the first was stopped, instead of refusing the name.
demo: venv
	$(BIN)/luthier models pull smollm2-135m
	$(BIN)/luthier train demo/task.yaml --resume
	@echo
	@echo "The report: $(CURDIR)/runs/demo/report.html"
	@echo "Ask it:     $(BIN)/luthier chat runs/demo"

test: test-fast test-slow

test-fast: venv
	$(FAST)

test-slow: venv
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(SLOW) -n 2 --dist load $(MANY)
	$(SLOW) $(addprefix --ignore=,$(MANY))

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/luthier models pull smollm2-135m
	$(BIN)/python bench/record.py $(if $(RECORD),--record)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
