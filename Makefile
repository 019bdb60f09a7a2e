# Each target makes the environment first where it is missing or half-made, or pyproject.toml has changed.
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.11 python3; do $$name -Ec '$(RECENT)' 2> /dev/null && echo $$name && break; done)
VENV ?= .venv
READY := $(VENV)/.pipetutor-ready
# Which notebooks make run and make smoke execute: all, or make run NOTEBOOKS="00_first_pipeline 06_schedules"
NOTEBOOKS ?=
# The files of tests that make other-kernels runs
NUMBERS := certify/test_certify certify/test_own_engine core/test_accumulate core/test_checkpoint core/test_clipping core/test_dropout \
	core/test_evaluate core/test_model core/test_play core/test_recompute core/test_torch_engine costs/test_memory \
	data/test_data test_schedules test_train
# Debian's packages for make clusters
DAEMONS := slurmctld slurmd slurm-client munge openssh-server pdsh iproute2 util-linux
# Two workers; those that are done early take over from the others.
PYTEST := -m pytest -n 2 --dist worksteal

export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin:$(PATH)
# What a user has set for other Pythons is none of this one's.
export PIP_USER := 0
export PYTHONNOUSERSITE := 1
unexport PIP_PREFIX PIP_ROOT PIP_TARGET PYTHONHOME PYTHONOPTIMIZE PYTHONPATH PYTHONSAFEPATH
# Programs keep settings and caches at home: here, where there is none that they can write to.
ifeq ($(shell test -w "$$HOME" && echo yes),)
export HOME := $(CURDIR)/build/home
$(shell mkdir -p build/home)
endif

.PHONY: run smoke html lab map test other-kernels browser has-chromium clusters has-daemons gpu prove mutations bench clean

run: $(READY)
	$(VENV)/bin/python tools/run_notebooks.py $(NOTEBOOKS)

smoke: $(READY)
	$(VENV)/bin/python tools/run_notebooks.py --smoke $(NOTEBOOKS)

html: $(READY)
	$(VENV)/bin/python tools/run_notebooks.py --stale
	$(VENV)/bin/python tools/build_html.py

# A learner's own copies, without answers. JUPYTER_CONFIG_PATH: JupyterLab shows markdown rendered. JUPYTER_PATH: the
# kernel is the Python of this environment, whatever the user has called python3.
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/tools/jupyter$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH))
lab: export JUPYTER_PATH := $(CURDIR)/tools/jupyter$(if $(JUPYTER_PATH),:$(JUPYTER_PATH))
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
	$(VENV)/bin/python -c 'from importlinter.cli import lint_imports_command as check; check()' --no-cache --no-logo
	$(VENV)/bin/python -m nbstripout --keep-id --verify notebooks/*.ipynb
	$(VENV)/bin/python $(PYTEST)

# The tests that compare numbers, as on a processor without vector instructions: torch, oneDNN and MKL take other
# kernels there, which add up in another order.
other-kernels: export ATEN_CPU_CAPABILITY := default
other-kernels: export ONEDNN_MAX_CPU_ISA := SSE41
other-kernels: export MKL_CBWR := COMPATIBLE
other-kernels: $(READY)
	$(VENV)/bin/python $(PYTEST) $(NUMBERS:%=tests/%.py)

browser: has-chromium $(READY)
	$(VENV)/bin/python -m pytest -m browser

has-chromium:
	@command -v chromium > /dev/null || { echo "make browser needs Chromium: apt-get install chromium" >&2; exit 1; }

clusters: has-daemons $(READY)
	$(VENV)/bin/python -m pytest -m cluster

has-daemons:
	@unshare -nmup --fork true 2> /dev/null || \
		{ echo "make clusters needs root, and a machine that lets root make namespaces" >&2; exit 1; }
	@for name in slurmctld slurmd srun munged sshd pdsh ip nsenter; do command -v $$name > /dev/null || \
		{ echo "make clusters needs $$name: apt-get install $(DAEMONS)" >&2; exit 1; }; done

gpu: $(READY)
	@$(VENV)/bin/python -c 'from pipetutor.system.gpus import gpus; found = gpus(); raise SystemExit( \
		None if found.count else "make gpu needs a GPU that torch can use: " + (found.why or "there is none"))'
	$(VENV)/bin/python -m pytest -m gpu

prove: $(READY)
	$(VENV)/bin/python -m pytest -m slow -s

# Mistakes put into the package on purpose: which tests notice them
mutations: $(READY)
	$(VENV)/bin/python tests/mutations.py

bench: $(READY)
	$(VENV)/bin/python -m benchmarks

clean:
	rm -rf build runs notebooks/runs .pytest_cache .ruff_cache .mypy_cache

# A folder of .dist-info without RECORD is what an interrupted installation leaves, and pip would take it for whole.
# pip writes DeepSpeed's script with a first line that cannot hold a path with spaces.
.PHONY: again
$(READY): pyproject.toml $(shell test -x $(VENV)/bin/python || echo again)
	@{ $(VENV)/bin/python -c 'import pip; $(RECENT)'; } 2> /dev/null || \
		if ! "$(PYTHON)" -c '$(RECENT)' 2> /dev/null; then \
			echo "Python 3.11 or later is needed, and $(or $(PYTHON),python3) is none: make run PYTHON=PATH" >&2; exit 1; \
		elif test -e $(VENV)/bin/python -a ! -e $(VENV)/pyvenv.cfg; then \
			echo "$(VENV) is an environment without pip, or of a Python before 3.11: give another one" >&2; exit 1; \
		else \
			"$(PYTHON)" -m venv --clear $(VENV); \
		fi
	@test ! -e $(VENV)/pyvenv.cfg || \
		find $(VENV) -name '*.dist-info' -prune ! -exec test -e {}/RECORD ';' -exec rm -r {} +
	@echo "installing into $(VENV): some minutes, and up to 6.5 GB"
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	sed -i '1s|^#!.* .*|#!/usr/bin/env python3|' $(VENV)/bin/deepspeed
	touch $@
