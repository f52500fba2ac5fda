# make demo    the whole job, on data it renders itself: ends with a table, a report and a video
# make test    the tests
# make tools   an environment with annotation tools' own libraries, for the tests of export and import
# make check   formatting, lint, types, tests: what a change has to pass
#
# Each makes the environment .venv first, and again when pyproject.toml changes.

# The Python to make it with; by default the first of these that is 3.11 or newer.
PYTHON ?= python3.11 python3.12 python3.13 python3
# More arguments for pip, such as the index of a smaller torch without CUDA: `make demo PIP_ARGS=...`
PIP_ARGS ?=
# Tests at a time.
WORKERS ?= 2

VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test tools check clean

demo: $(INSTALLED)
	$(VENV)/bin/pipeline run configs/demo.yaml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS)

tools: $(VENV)-tools/.installed

check: $(INSTALLED) tools
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(MAKE) test

# Results of the demo, builds and caches; the environment, datasets and weights stay.
clean:
	rm -rf runs/demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@if [ ! -x $(VENV)/bin/python ]; then \
		for python in $(PYTHON); do \
			if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
				echo "making $(VENV) with $$python"; \
				exec $$python -m venv $(VENV); \
			fi; \
		done; \
		echo "expected Python 3.11 or newer as one of: $(PYTHON); found none" >&2; \
		exit 1; \
	fi
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --editable ".[dev]"
	@touch $@

$(VENV)-tools/.installed: tests/annotation_tools.txt $(INSTALLED)
	$(VENV)/bin/python -m venv $(VENV)-tools
	$(VENV)-tools/bin/python -m pip install --requirement tests/annotation_tools.txt
	@touch $@
