# Each target makes the environment first where it is missing or pyproject.toml has changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
READY := $(VENV)/.pipetutor-ready
NOTEBOOKS := $(notdir $(wildcard notebooks/*.ipynb))
EXECUTED := $(addprefix build/notebooks/,$(NOTEBOOKS))

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: run test prove bench lab html clean
.DELETE_ON_ERROR:

run: $(READY)
	rm -rf build/notebooks
	$(MAKE) $(EXECUTED)

html: $(READY) $(EXECUTED)
	$(VENV)/bin/python -m nbconvert --to html --embed-images --output-dir build/html $(EXECUTED)

build/notebooks/%.ipynb: notebooks/%.ipynb $(READY)
	mkdir -p build/notebooks
	$(VENV)/bin/python -m papermill --cwd notebooks --kernel python3 --execution-timeout 600 --log-output \
		$< build/notebooks/.$*.ipynb
	mv build/notebooks/.$*.ipynb $@

test: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m nbstripout --keep-id --verify notebooks/*.ipynb
	$(VENV)/bin/python -m pytest

prove: $(READY)
	$(VENV)/bin/python -m pytest -m slow -s

bench: $(READY)
	$(VENV)/bin/python -m pipetutor.bench

lab: $(READY)
	$(VENV)/bin/python -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/00_first_pipeline.ipynb

clean:
	rm -rf build runs notebooks/runs .pytest_cache .ruff_cache .mypy_cache

$(READY): pyproject.toml
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	# pip writes DeepSpeed's script with a first line that cannot hold a path with spaces
	sed -i '1s|^#!.* .*|#!/usr/bin/env python3|' $(VENV)/bin/deepspeed
	touch $@
