# Each environment is one stamp file in .venv: a target installs only what it needs and only once.
PYTHON ?= python3
# Processes that share the tests; each takes up to 2 GB.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SETUP := pyproject.toml constraints.txt

.PHONY: demo test lint bench samples clean

demo: $(VENV)/.base
	$(BIN)/curvscope analyze sample_models/digits_vit.pt --force

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

samples: $(VENV)/.samples
	$(BIN)/python -m sample_models.train

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python $(SETUP)
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) -e '.[test,lint]'
	touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.samples: $(VENV)/.base
	$(PIP) -e '.[samples]'
	touch $@
