# Everything a developer does here, one target each. `make` lists them.
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/installed
TE := build/te/.complete
TE_SOURCE := build/te_source/.complete
NVRX := build/nvrx/.complete
SERVING_VENV ?= serving/.venv
SERVING_PY := $(SERVING_VENV)/bin/python
SERVING := $(SERVING_VENV)/installed
ifneq ($(words $(VENV)) $(words $(SERVING_VENV)),1 1)
$(error VENV and SERVING_VENV are paths without spaces)
endif
PYTEST_ARGS ?=
# One worker begins with the jobs of the process pool, the other with everything else (tests/conftest.py). On two cores a
# third makes it slower; more help on a machine with many.
WORKERS ?= 2
PIP_QUIET := --quiet --disable-pip-version-check --progress-bar off
# Compiled modules are kept whatever the environment says: else every process of a test compiles them again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS)) $(PYTEST_ARGS)

export PYTHON PIP_ARGS

.DEFAULT_GOAL := help
.PHONY: help venv te demo test test-all test-faults test-slurm test-te fuzz test-serving serving-bench serve-demo public-demo sweep-smoke \
	lint format bench docs wheel doctor clean clean-all

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "PYTHON=path picks the Python (3.12 or 3.13) that the environment is built with."

venv: $(READY) ## build or update the virtual environment in .venv (a 3 GB download, once)

$(READY): pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(VENV)

te: $(READY) $(TE) $(NVRX) ## the Python of Transformer Engine and nvidia-resiliency-ext, for tests on a CPU, which `make test` then runs (60 MB)

demo: $(READY) ## train a small PLT and its one-loop baseline on text this machine has (four minutes on two cores)
	@$(PY) tools/demo.py

test: $(READY) ## the test suite (about 8 minutes on 2 cores)
	$(PYTEST) -m "not slow and not bench and not slurm_faults"

test-all: $(READY) ## every test, including slow ones
	$(PYTEST)

test-faults: $(READY) ## whole runs under faults, such as ranks killed at 20 random times (10 minutes)
	$(PYTEST) -m "not bench" tests/distributed/test_run_faults.py

test-slurm: $(READY) ## every kind of fault, on a Slurm cluster started on this machine; needs root
	$(PYTEST) -m "not bench" tests/slurm

test-te: $(READY) $(TE) $(TE_SOURCE) ## Transformer Engine's layers and FP8 on the CPU, all tests (under 10 minutes)
	$(PYTEST) -m "not bench" tests/te

fuzz: $(READY) ## search for faults at random: FUZZ_SEED=1 FUZZ_MINUTES=10, or FUZZ_CASES of each of FUZZ_KINDS
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --seed $(or $(FUZZ_SEED),1) $(FUZZ_CASES:%=--cases %) $(FUZZ_MINUTES:%=--minutes %) $(FUZZ_KINDS:%=--kinds %)

# Only its Python, and outside the environment, where it would be mistaken for a usable installation.
$(TE): tests/te/requirements.txt
	rm -rf $(@D)
	$(PY) -m pip install $(PIP_QUIET) $(PIP_ARGS) --no-deps --target $(@D) --requirement $<
	touch $@

$(NVRX): tests/distributed/nvrx_requirements.txt
	rm -rf $(@D)
	$(PY) -m pip install $(PIP_QUIET) $(PIP_ARGS) --no-deps --only-binary :all: --python-version 3.12 --target $(@D) \
	    --requirement $< && touch $@ || echo "warning: no nvidia-resiliency-ext: its test is skipped" >&2

# Not built; the tests compare their stand-in with it. pip asks it for its name, which takes a while.
$(TE_SOURCE): tests/te/requirements.txt
	rm -rf $(@D)
	$(PY) -m pip download $(PIP_QUIET) $(PIP_ARGS) --no-deps --no-build-isolation --no-binary :all: \
	    --dest $(@D) "transformer_engine_torch$$(sed -n 's/^transformer_engine==/==/p' $<)" && touch $@ || \
	    echo "warning: no source of Transformer Engine's extension: the tests that read it are skipped" >&2

# Its Python is another one: vLLM pins its torch and has no CPU build for ours.
$(SERVING): serving/pyproject.toml serving/make_venv.sh
	@serving/make_venv.sh $(SERVING_VENV)

test-serving: $(SERVING) ## serving/, the vLLM plugin, with vLLM's CPU build (a 4 GB environment, once)
	$(SERVING_PY) -m pytest -n 2 --dist loadfile --config-file serving/pyproject.toml $(PYTEST_ARGS) serving/tests

serving-bench: $(SERVING) ## what loops cost when vLLM decodes them, against one loop; needs a quiet machine
	$(SERVING_PY) benchmarks/serving.py

serve-demo: $(SERVING) ## serve the demo's export with vLLM and ask it something; `make demo` first
	@$(SERVING_PY) serving/demo.py

sweep-smoke: $(READY) ## a tiny sweep over loop counts with its report (under 5 minutes)
	$(PY) tools/sweep.py configs/sweeps/smoke.yaml
	$(PY) tools/report.py runs/sweeps/smoke

lint: $(READY) ## style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## rewrite the sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(READY) ## benchmarks/train.py: training speed compared with plain megatron-core; needs a quiet machine
	$(PY) benchmarks/train.py

docs: $(READY) ## build the documentation as a searchable site that works offline, build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo build/site/index.html

wheel: $(READY) ## build the wheel, build/wheel/*.whl
	rm -rf build/wheel
	$(PY) -m hatchling build -t wheel -d build/wheel

doctor: $(READY) ## show what this machine can run, and what is missing for the rest
	@$(PY) tools/doctor.py

public-demo: $(READY) $(SERVING) ## give a public model of 135M a second loop, teach it, and chat with it (13 minutes on two quiet cores)
	OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),$(shell nproc)) $(PY) benchmarks/public_model.py --folder .public
	@$(SERVING_PY) serving/public_chat.py .public

clean: ## remove caches and the demo's files, but not the environment and runs
	rm -rf .demo .public build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './$(SERVING_VENV)/*' -prune -exec rm -rf {} +

clean-all: clean ## remove the environments too
	rm -rf $(VENV) $(SERVING_VENV)
