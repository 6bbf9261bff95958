# make demo   the main job, end to end, on real weights and text
# make test   all tests
# make test-newest   those that touch other libraries, with the newest that pyproject.toml allows
# make check  format, lint, types, import floors
# Each makes .venv when it is missing and installs exact versions; the second time it starts at once.

SHELL := /bin/bash
BIN := .venv/bin
INSTALLED := .venv/installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-newest anew check setup clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python examples/fetch_demo.py
	$(BIN)/drawplate tune examples/climate-demo.yaml --set output_dir=runs/climate-demo-$$(date +%Y%m%d-%H%M%S)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

# The libraries whose newest versions are tried, and made anew after a day. They lie over .venv, so that nothing else is
# fetched again; torch is left out, because each of its versions is gigabytes.
NEWEST := transformers peft trl datasets
CORE_TESTS := tests/model/base tests/model/layer/test_adapter.py tests/model/layer/test_attention.py \
  tests/model/test_causal_lm.py tests/model/ends/test_head.py tests/model/load tests/model/support tests/integrations \
  tests/data/chat tests/data/test_tokens.py tests/run/test_tune.py tests/evaluation/test_score.py \
  tests/faults/test_families.py

test-newest: .newest/installed
	PYTHONPATH=$(CURDIR)/.newest $(BIN)/python -m pytest -n auto --maxprocesses 4 $(or $(ARGS),$(CORE_TESTS))

.newest/installed: pyproject.toml constraints.txt $(if $(shell find .newest/installed -mtime +0 2>/dev/null),anew) \
  | $(INSTALLED)
	rm -rf .newest
	$(BIN)/python -m pip install --quiet --no-deps --target .newest \
	  $$($(BIN)/python .ci/requirements.py $(NEWEST))
	@echo "Newest: $$(cd .newest && echo *.dist-info | sed 's/\.dist-info//g')"
	@touch $@

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(INSTALLED)

# The stamp lies inside .venv, so that it goes when .venv goes.
$(INSTALLED): pyproject.toml constraints.txt | .venv/bin/pip
	@echo "Installing into .venv; the first time this takes some minutes."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

.venv/bin/pip:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  new_enough=$$python; \
	  $$python -c 'import ensurepip, venv' 2>/dev/null && found=$$python && break; \
	done; \
	if [ -z "$$new_enough" ]; then \
	  echo "Drawplate needs Python 3.11 or newer, and none was found." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	if [ -z "$$found" ]; then \
	  echo "$$new_enough cannot make a virtual environment: its venv module is missing." >&2; \
	  echo "On Debian and Ubuntu: sudo apt install python3-venv; then give the same command again." >&2; exit 1; \
	fi; \
	echo "Making .venv with $$($$found --version)."; \
	$$found -m venv .venv || { rm -rf .venv; exit 1; }

clean:
	rm -rf .venv .newest build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
