# Each target makes the environment first where it is missing or pyproject.toml has changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
READY := $(VENV)/.pipetutor-ready
# Which notebooks make run and make smoke execute: all, or make run NOTEBOOKS="00_first_pipeline 05_schedules"
NOTEBOOKS ?=
# The files of tests that make other-kernels runs
NUMBERS := accumulate certify checkpoint data dropout evaluate memory recompute torch_engine train

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: run smoke html lab map test other-kernels browser has-chromium prove bench clean

run: $(READY)
	$(VENV)/bin/python tools/run_notebooks.py $(NOTEBOOKS)

smoke: $(READY)
	$(VENV)/bin/python tools/run_notebooks.py --smoke $(NOTEBOOKS)

html: $(READY)
	$(VENV)/bin/python tools/run_notebooks.py --stale
	$(VENV)/bin/python tools/build_html.py

# A learner's own copies, without answers. JUPYTER_CONFIG_PATH: JupyterLab shows markdown rendered.
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/tools/jupyter$(addprefix :,$(JUPYTER_CONFIG_PATH))
lab: $(READY)
	$(VENV)/bin/python tools/fill_workbook.py
	$(VENV)/bin/python -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) \
		--LabApp.default_url=/lab/tree/workbook/index.md

map: $(READY)
	$(VENV)/bin/python tools/course.py

test: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m nbstripout --keep-id --verify notebooks/*.ipynb
	$(VENV)/bin/python -m pytest

# The tests that compare numbers, as on a processor without vector instructions: torch, oneDNN and MKL take other
# kernels there, which add up in another order.
other-kernels: export ATEN_CPU_CAPABILITY := default
other-kernels: export ONEDNN_MAX_CPU_ISA := SSE41
other-kernels: export MKL_CBWR := COMPATIBLE
other-kernels: $(READY)
	$(VENV)/bin/python -m pytest $(NUMBERS:%=tests/test_%.py)

browser: has-chromium $(READY)
	$(VENV)/bin/python -m pytest -m browser

has-chromium:
	@command -v chromium > /dev/null || { echo "make browser needs Chromium: apt-get install chromium" >&2; exit 1; }

prove: $(READY)
	$(VENV)/bin/python -m pytest -m slow -s

bench: $(READY)
	$(VENV)/bin/python -m pipetutor.bench

clean:
	rm -rf build runs notebooks/runs .pytest_cache .ruff_cache .mypy_cache

$(READY): pyproject.toml
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	# pip writes DeepSpeed's script with a first line that cannot hold a path with spaces
	sed -i '1s|^#!.* .*|#!/usr/bin/env python3|' $(VENV)/bin/deepspeed
	touch $@
