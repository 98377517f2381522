# Nemotron-H, end to end. `make` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
PY := $(VENV)/bin/python
DVC := PATH="$(abspath $(VENV))/bin:$$PATH" SHELL=$(SHELL) $(PY) -m dvc --wait-for-lock
REPRO = $(if $(PROFILE),$(PY) -m flows.profile $(PROFILE) &&) $(PY) -m flows.mend && $(DVC) repro
PORT ?= 4200
PYTORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/.*"torch==\([^"]*\)".*/\1/p' pyproject.toml)
TRITON := 3.6.0
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m 1 -o GPU)
READY := $(VENV)/.setup-complete $(if $(GPU),$(VENV)/.gpu-complete) .dvc/config.local
STAGES := sources annotate curate tokenizer tokenize pretrain compress export items evaluate reference benchmark report
# Of what is installed only the profile's name is read from params.yaml; PROFILE=NAME wins.
CURRENT_PROFILE = $(or $(PROFILE),$(shell sed -n 's/^profile: *\([a-z0-9-]*\).*/\1/p' params.yaml))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUTF8 := 1
# What asks for a user's name must find one, in a container too.
export USER := $(or $(USER),$(shell id -u))

.PHONY: help setup reproduce plan repro-plain stage $(STAGES) ui test chaos lint doctor lock clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / {printf "  make %-22s %s\n", $$1, $$2}' Makefile
	@echo "  make STAGE                  One of: $(STAGES)"
	@echo
	@echo "  PROFILE=NAME with reproduce and STAGE: $$(ls profiles | sed 's/\.yaml//' | paste -sd ' ')"

setup: $(READY) ## Install everything into .venv (nothing to do when it is up to date)
	@echo "Set up: $(VENV) ($$($(PY) -V))."

reproduce: $(READY) ## The whole pipeline as a flow, what changed only; PROFILE=NAME
	@exec $(PY) -m flows.reproduce $(if $(PROFILE),--profile $(PROFILE))

plan: $(READY) ## What pretraining would take: memory of a GPU, speed, days; PROFILE=NAME [MACHINE=h200]
	@$(PY) -m flows.plan $(PROFILE) $(if $(MACHINE),--machine $(MACHINE))

repro-plain: $(READY) ## The same result by DVC alone, one stage after the other
	@$(REPRO)

stage: $(READY) ## One stage and what it needs; STAGE=pretrain@hybrid-fp8
	@$(if $(STAGE),,echo 'make stage: which one?'; echo 'Say STAGE=pretrain@hybrid-fp8; `dvc stage list` names them.'; exit 2)
	@$(REPRO) $(STAGE)

$(filter-out curate,$(STAGES)): $(READY)
	@$(REPRO) $@

# From the environment, where make puts what it is given: blanks and quotes in paths stay what they are.
OWN := DOMAIN OUT TEXT_COLUMN EXTRACTOR LANGUAGES AGAINST LABELS SET
curate: $(READY) ## The stage; or text of your own: SOURCE="DIR x.warc.gz" [OUT=DIR DOMAIN=web TEXT_COLUMN= LANGUAGES= ...]
	@$(if $(SOURCE),,$(if $(filter command,$(foreach name,$(OWN),$(origin $(name)))), \
		echo '$(OWN) are for text of your own. Name it: SOURCE=...'; exit 2))
	@$(if $(SOURCE),$(PY) -m flows.curate_own "$$SOURCE" $(foreach name,$(OWN),$(if $($(name)),$(call flag,$(name)))), \
		$(REPRO) $@)
flag = --$(subst _,-,$(shell echo $(1) | tr A-Z a-z)) "$$$(1)"

ui: $(READY) ## Prefect's pages: start, watch and cancel runs; PORT=4200
	@exec $(PY) -m flows.server --port $(PORT)

test: $(READY) $(if $(GPU),,$(VENV)/.triton-$(TRITON)) ## The tests
	@$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

chaos: $(READY) ## Faults injected into the smoke profile for half an hour; must come to nothing
	@$(PY) -m tests.chaos

lint: $(READY) ## ruff, mypy, and which package may import which
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-cache --no-logo

doctor: $(READY) ## What is installed, what is missing, and the cure
	@$(PY) -m flows.doctor

lock: $(READY) ## Resolve requirements.in into requirements.lock
	@$(PY) -m pip install -q uv
	@$(PY) -m uv pip compile -q --python-version 3.11 --universal --generate-hashes --no-emit-package torch \
		requirements.in -o requirements.lock

clean: ## Remove the profile's outputs and resume state (DVC's cache stays); PROFILE=NAME
	rm -rf data/$(CURRENT_PROFILE) runs/$(CURRENT_PROFILE) reports/$(CURRENT_PROFILE) .scratch logs

# A tree that git does not know (an unpacked archive, a folder that an outer repository ignores) must tell DVC so.
.dvc/config.local:
	@git check-ignore -q dvc.yaml 2>/dev/null && status=0 || status=$$?; \
		if [ $$status = 1 ]; then touch $@; else printf '[core]\n    no_scm = true\n' > $@; fi

# The stamp comes last. A set-up that was interrupted leaves its mark, and the next one starts over: half-unpacked
# packages look installed to pip.
$(VENV)/.setup-complete: requirements.lock pyproject.toml
	@if [ -e $(VENV)/.setup-started ] || { [ -e $(VENV) ] && ! $(PY) -m pip --version >/dev/null 2>&1; }; then \
		echo 'The last set-up was interrupted: starting over.'; rm -rf $(VENV); fi
	@if [ ! -e $(VENV) ]; then \
		for python in $(or $(PYTHON),python3.11 python3.12 python3 python); do \
			if $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; \
			then found=$$python; break; fi; done; \
		if [ -z "$${found:-}" ]; then \
			echo '$(if $(PYTHON),PYTHON=$(PYTHON) is no,No) Python 3.11 or 3.12 with venv$(if $(PYTHON),., was found.)'; \
			echo 'Install one (Debian: apt install python3.11-venv) or say where: make setup PYTHON=/path/to/python'; exit 1; fi; \
		mkdir -p $(VENV); touch $(VENV)/.setup-started; \
		echo "Creating $(VENV) with $$($$found -V)"; $$found -m venv $(VENV); fi
	@touch $(VENV)/.setup-started; rm -f $@
	@echo 'Installing PyTorch $(TORCH) ($(if $(GPU),CUDA,CPU) build)'
	@$(if $(GPU),$(PY) -m pip install -qq 'torch==$(TORCH)', \
		$(PY) -m pip install -qq --no-deps 'torch==$(TORCH)+cpu' 2>/dev/null || \
		$(PY) -m pip install -qq --no-deps 'torch==$(TORCH)+cpu' --extra-index-url $(PYTORCH_CPU_INDEX) \
			--retries 1 --timeout 10 2>/dev/null || \
		{ echo 'No CPU wheel was found: taking the default build.'; $(PY) -m pip install -qq 'torch==$(TORCH)'; }) \
		|| { $(CANNOT_INSTALL); }
	@echo 'Installing the locked packages (2 to 5 minutes)'
	@$(PY) -m pip install -qq --no-deps --require-hashes -r requirements.lock || { $(CANNOT_INSTALL); }
	@$(PY) -m pip install -qq --no-deps -e . || { $(CANNOT_INSTALL); }
	@rm $(VENV)/.setup-started; touch $@

# Transformer Engine is compiled against the PyTorch just installed.
$(VENV)/.gpu-complete: $(VENV)/.setup-complete pyproject.toml
	@echo 'Installing Transformer Engine for this GPU (compiles its PyTorch part: 5 to 20 minutes)'
	@$(PY) -m pip install -qq --no-build-isolation -e '.[gpu]' || { \
		echo 'Transformer Engine could not be installed: pip says why above.'; \
		echo 'It needs nvcc (CUDA 13) and the headers of cuDNN and NCCL; docs/gpu.md says how. Then `make setup` again.'; \
		exit 1; }
	@touch $@

# PyTorch's CUDA builds bring Triton. Where there is no GPU, its interpreter runs the tests of the CUDA kernels.
$(VENV)/.triton-%: $(VENV)/.setup-complete
	@echo 'Installing Triton $*, whose interpreter tests the CUDA kernels on a CPU'
	@$(PY) -m pip install -qq --no-deps 'triton==$*' || { $(CANNOT_INSTALL); }
	@touch $@

CANNOT_INSTALL = echo 'The packages could not be installed: pip says why above.'; \
	echo 'Without network, give pip a mirror (PIP_INDEX_URL=...) or wheels (PIP_FIND_LINKS=DIR); then `make setup` again.'; \
	exit 1
