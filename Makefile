# Everything a fresh machine needs: Python 3.11 or 3.12 and network. `make` alone prints the targets.

PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV := $(VENV)/uv/bin/uv
DOCKER ?= docker
VARIANT ?= cuda
TAG ?= $(VARIANT)
# On CPU everywhere, so that the demo is the same on a laptop and beside GPUs.
DEMO := DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_gpus 2 launch/train.py

.PHONY: help setup check format test test-cluster docker docker-test demo docs lock clean

help: ## print this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv with the exact packages of requirements.lock

# Older than the lock: install again. Written last: an interrupted installation is repeated.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	  2>/dev/null || { echo "error: $(PYTHON) is not Python 3.11 or 3.12 with the module venv;" \
	  "install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages of requirements.lock into $(VENV): a few GB, some minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

check: setup ## format, lint and types: changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## put the code into its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup ## the whole test suite, on CPU, in two processes
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-cluster: setup ## training on several hosts, made of namespaces, for real; root on Linux, else skips
	$(BIN)/pytest -rs tests/cluster/test_hosts.py

docker: ## the image coco-trainer:$(TAG), VARIANT=cuda or cpu; TAG, BASE_IMAGE, DOCKER_OPTIONS as you like
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --tag coco-trainer:$(TAG) \
	  --build-arg VARIANT=$(VARIANT) --build-arg GIT_REVISION=$$(git describe --always --dirty --abbrev=40) \
	  --build-arg LOCK_SHA256=$$(sha256sum requirements.lock | cut -c1-64) \
	  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(DOCKER_OPTIONS) .

docker-test: setup ## build the image twice, compare, train in it; starts an engine of its own if there is none
	$(BIN)/pytest -rs tests/cluster/test_docker.py

demo: setup ## real data, training on 2 ranks, evaluation, pictures
	$(BIN)/python launch/pack.py mnist5k data/mnist --if-missing
	$(DEMO) --config configs/demo.yaml
	$(DEMO) --config configs/demo.yaml run.name=demo-softmax loss.name=softmax loss.softmax.bias=false \
	  backbone.neck=linear_prelu head.lr_multiplier=1
	$(BIN)/python launch/evaluate.py runs/demo runs/demo-softmax
	@echo "pictures: runs/demo/figures; everything else of a run: runs/demo, runs/demo-softmax"

docs: setup ## write docs/config.md from the field docstrings
	$(BIN)/python -m trainer.options --markdown > docs/config.md

lock: ## write requirements.lock from pyproject.toml; keeps the versions it has where they still fit
	@test -x $(UV) || { $(PYTHON) -m venv $(VENV)/uv && $(VENV)/uv/bin/pip install --quiet uv; }
	$(UV) pip compile --universal --generate-hashes --extra demo --extra dev --python-version 3.11 \
	  pyproject.toml -o requirements.lock

clean: ## remove what can be made again: environment and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find trainer launch tests -name __pycache__ -prune -exec rm -rf {} +
