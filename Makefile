# Two commands: `make demo` sets up and runs the main job, `make test` sets up and passes the tests.
# The first of either compiles llama.cpp (through pip, about 6 minutes on 2 cores; pip caches the wheel).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# GCC before 12.4 and 13.3 builds kernels for Intel AMX that end the process (llama.cpp issue 20824), so there are none,
# unless somebody gives flags of their own. Compilers that do not know the flag have no such kernels.
AMX := $(shell grep -qsw amx_int8 /proc/cpuinfo && echo | $(CC) -mno-amx-int8 -E - >/dev/null 2>&1 && echo yes)
ifeq ($(AMX)$(findstring CMAKE_C_FLAGS,$(CMAKE_ARGS)),yes)
override CMAKE_ARGS += -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8
export CMAKE_ARGS
endif

.PHONY: demo test docs site slow clean

demo: $(VENV)/installed
	$(BIN)/cerebellum demo

test: $(VENV)/installed-test
	$(BIN)/ruff check cerebellum tests benchmarks
	$(BIN)/ruff format --check cerebellum tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

# The demo's card and report for docs/demo, from a run; the tests then hold the card to them.
docs: demo
	rm -rf docs/demo/charts docs/demo/bench.json
	mkdir -p docs/demo
	cp -r $(addprefix cerebellum-demo/,source.json groups.json measurements.json plan.json verify.json) docs/demo/
	cp -r $(addprefix cerebellum-demo/,manifest.json README.md report.html charts) docs/demo/
	if [ -f cerebellum-demo/bench.json ]; then cp cerebellum-demo/bench.json docs/demo/; fi
	$(BIN)/cerebellum card docs/demo
	$(BIN)/python benchmarks/session.py docs/demo/session.svg demo -o cerebellum-demo
	if $(BIN)/python -c 'import playwright' 2>/dev/null; then \
		$(BIN)/python benchmarks/screenshots.py docs/demo/report.html docs/demo; \
	else echo "the pictures of the report in docs/demo are not new: pip install playwright, and a Chromium"; fi

# The pages of docs/ as a site in site/; whatever leads nowhere is an error. `.venv/bin/mkdocs serve` shows it while you write.
site: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) cerebellum-demo site
