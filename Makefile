# `make help` lists the targets. Variables: VENV, PYTHON (3.11 or later), TORCH, PYTEST (arguments), JOBS (processes of
# make test); of the quickstart PEFT (lora: an adapter in place of all weights) and ARGS; of the
# image ENGINE, IMAGE and BASE_IMAGE.
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
PYTEST ?= tests
JOBS   ?= 2
PEFT   ?= none
ARGS   ?=
ENGINE ?= docker
IMAGE  ?= nemo_dpo

bin := $(VENV)/bin
stamp := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test lint unit test-slow test-cluster test-faults test-image parity mutants image clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(stamp)  ## the virtual environment in VENV, made once and again when setup.py or constraints.txt change

# torch comes first and alone: asked for by another package, pip would take the newest one.
$(stamp): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	@echo "Installing into $(VENV): one to two minutes, about 2 GB"
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet "$(TORCH)"
	$(bin)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(stamp)  ## a small real model: convert, train, plot, compare answers; PEFT=lora
	$(bin)/python tools/quickstart.py --peft $(PEFT) $(ARGS)

test: lint unit  ## lint, types, import contracts, tests; PYTEST="tests/data -k name" chooses tests

lint: $(stamp)  ## ruff, mypy, import-linter
	$(bin)/ruff check .
	$(bin)/mypy nemo_dpo
	$(bin)/lint-imports

# One thread per process: the tests start several ranks on the same cores.
unit test-slow test-cluster test-faults test-image parity mutants: export OMP_NUM_THREADS := 1

# Whole files to each of JOBS processes: what a file prepares once is not prepared twice.
unit: $(stamp)
	$(bin)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(PYTEST)

test-slow: $(stamp)  ## the long tests
	$(bin)/python -m pytest -m slow $(PYTEST)

test-cluster: $(stamp)  ## batch scripts and preemption on a real Slurm cluster of this host's processes (root, Slurm)
	$(bin)/python -m pytest -m cluster $(PYTEST)

test-faults: $(stamp)  ## what goes wrong: ranks killed and hung, kills in saves, full disks, every layout to every other
	$(bin)/python -m pytest -m faults $(PYTEST)

test-image: $(stamp)  ## the container image on a plain base, built and run; as root, with buildah and mmdebstrap
	$(bin)/python -m pytest -m image $(PYTEST)

parity: $(stamp)  ## TRL's per-step figures on a real model
	$(bin)/python -m pytest -m parity $(PYTEST)

mutants: $(stamp)  ## deliberate bugs, each of which must turn a named test red
	$(bin)/python -m pytest -m mutants $(PYTEST)

image:  ## the container image; ENGINE=docker|podman|buildah, IMAGE, BASE_IMAGE
	$(ENGINE) build --tag $(IMAGE) --build-arg REVISION=$$(git describe --always --dirty) \
	    $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) .

clean:  ## remove VENV, caches and build folders; results stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
