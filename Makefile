# Two commands: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
# The first of either compiles llama.cpp (through pip, about 6 minutes on 2 cores; pip caches the wheel).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow clean

demo: $(VENV)/installed
	$(BIN)/cerebellum demo

test: $(VENV)/installed-test
	$(BIN)/ruff check cerebellum tests benchmarks
	$(BIN)/ruff format --check cerebellum tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -m slow

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing; llama.cpp is compiled for this machine, which takes some minutes the first time."
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) cerebellum-demo
