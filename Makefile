# Every command of the project. Each target sets up .venv first if that was not done yet.

.DEFAULT_GOAL := help
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# As flows/__init__.py has them, for the tools, tests and benchmarks, which run without it.
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export GIT_PYTHON_REFRESH ?= quiet
export OMP_WAIT_POLICY ?= active
export GOMP_SPINCOUNT ?= 1000

# The name holds what was installed: a changed lock makes .venv again, a touched one does not. It is
# written last, so that an interrupted install does not count.
lock_digest := $(firstword $(shell cksum <requirements.lock))
python_version := $(shell { $(PY) -V || $(PYTHON) -V; } 2>/dev/null | cut -d. -f1,2 | tr -d ' ')
PACKAGES := .venv/.packages-$(lock_digest)-$(python_version)
READY := .venv/.ready

# A value as one word of the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: $(READY) ## Make .venv from requirements.lock; the other targets do so by themselves

.PHONY: train
train: $(READY) ## Train, judge and register: RECIPE EPOCHS BATCH_SIZE LEARNING_RATE SEED DEVICE DEVICES NUM_SAMPLES PROMOTE PUBLISH_TO RESUME
	@$(PY) -m flows.train_gan \
	    $(if $(RECIPE),--recipe $(call quoted,$(RECIPE))) \
	    $(if $(EPOCHS),--epochs $(call quoted,$(EPOCHS))) \
	    $(if $(BATCH_SIZE),--batch-size $(call quoted,$(BATCH_SIZE))) \
	    $(if $(LEARNING_RATE),--learning-rate $(call quoted,$(LEARNING_RATE))) \
	    $(if $(filter undefined,$(origin SEED)),,--seed $(call quoted,$(SEED))) \
	    $(if $(DEVICE),--device $(call quoted,$(DEVICE))) \
	    $(if $(DEVICES),--devices $(call quoted,$(DEVICES))) \
	    $(if $(NUM_SAMPLES),--num-samples $(call quoted,$(NUM_SAMPLES))) \
	    $(if $(PROMOTE),--promote $(call quoted,$(PROMOTE))) \
	    $(if $(PUBLISH_TO),--publish-to $(call quoted,$(PUBLISH_TO))) \
	    $(if $(RESUME),--resume $(call quoted,$(RESUME)))

.PHONY: evaluate
evaluate: $(READY) ## Look closely at a registered version, the champion or VERSION, for minutes: NUM_SAMPLES NUM_DRAWS SEED DEVICE
	@$(PY) -m flows.evaluate_generator \
	    $(if $(VERSION),--version $(call quoted,$(VERSION))) \
	    $(if $(NUM_SAMPLES),--num-samples $(call quoted,$(NUM_SAMPLES))) \
	    $(if $(NUM_DRAWS),--num-draws $(call quoted,$(NUM_DRAWS))) \
	    $(if $(SEED),--seed $(call quoted,$(SEED))) \
	    $(if $(DEVICE),--device $(call quoted,$(DEVICE)))

.PHONY: table
table: $(READY) ## Make the README's first table again, in a registry of its own: hours, or less with EPOCHS and NUM_SAMPLES
	@mkdir -p runs/table
	@export MLFLOW_TRACKING_URI=sqlite:///runs/table/mlflow.db MNIST_GAN_PUBLISH_TO=; \
	for row in vanilla:0 quick:0 best:1 best:0; do \
	    $(MAKE) --no-print-directory train RECIPE=$${row%:*} SEED=$${row#*:} PROMOTE=always || exit 1; \
	    $(MAKE) --no-print-directory evaluate VERSION=champion || exit 1; \
	done

.PHONY: sweep
sweep: $(READY) ## Search settings of recipe quick, or of RECIPE, on this machine: TRIALS EPOCHS SEED WORKERS RESUME
	@$(PY) -m flows.sweep_gan --space sweep.yaml \
	    --trials $(call quoted,$(or $(TRIALS),8)) \
	    --epochs $(call quoted,$(or $(EPOCHS),2)) \
	    $(if $(RECIPE),--recipe $(call quoted,$(RECIPE))) \
	    $(if $(SEED),--seed $(call quoted,$(SEED))) \
	    $(if $(WORKERS),--workers $(call quoted,$(WORKERS))) \
	    $(if $(RESUME),--resume $(call quoted,$(RESUME)))

.PHONY: ui
ui: $(READY) ## Open MLflow's UI on the local store, at http://127.0.0.1:5000 or the port in MLFLOW_PORT
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m mlflow ui --workers 1

.PHONY: stack
stack: $(READY) ## Run Prefect, MLflow, an S3 store and a worker on this machine, until Ctrl-C
	@$(PY) -m deployments.stack

.PHONY: test
test: $(READY) ## Run all tests that this machine can; what is skipped is listed with the reason
	$(PY) -m pytest

.PHONY: chaos
chaos: $(READY) ## Kill, cut off and starve the whole pipeline, in CHAOS_RUNS runs
	CHAOS_RUNS=$(or $(CHAOS_RUNS),30) $(PY) -m pytest -m chaos

.PHONY: bench
bench: $(READY) ## Measure speed, judging, memory, growth and the pipeline's own cost, into runs/bench: ten minutes
	@for part in speed evaluation memory growth pipeline; do \
	    echo "== $$part: $$(date +%H:%M:%S)"; $(PY) -m benchmarks.$$part || exit 1; echo; done

.PHONY: ablation
ablation: $(READY) ## Train recipe quick with one thing changed at a time, SEEDS times: eleven trainings a seed
	$(PY) -m benchmarks.ablation --seeds $(or $(SEEDS),3)

.PHONY: temperature
temperature: $(READY) ## Judge what sampling temperatures do to the generator in BUNDLE, as gan pull leaves it
	$(PY) -m benchmarks.temperature $(if $(BUNDLE),--bundle $(call quoted,$(BUNDLE)))

.PHONY: screenshots
screenshots: $(READY) ## Take the README's pictures of the pages again: about ten minutes
	SCREENSHOTS=docs $(PY) -m pytest tests/deployments/test_pages.py

.PHONY: check
check: $(READY) ## Lint, and check the format and the types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

.PHONY: format
format: $(READY) ## Format the code and mend what the linter can
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format

.PHONY: lock
lock: $(READY) ## Bring requirements.lock in line with pyproject.toml; UPGRADE=1 takes newer versions
	$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate \
	    --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade) \
	    --output-file requirements.lock pyproject.toml

.PHONY: system-packages
system-packages: ## Install what some tests use beside Python (Debian, as root): git, Chromium, PostgreSQL
	@dpkg -s git chromium postgresql >/dev/null 2>&1 || { $(call apt_install,git chromium postgresql); }

.PHONY: clean
clean: ## Remove .venv and the tools' caches; data, runs and the MLflow store stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): $(PACKAGES) pyproject.toml
	@$(PIP) install -qq --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(PACKAGES):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    $(call fail,Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing). \
	    To use another add PYTHON=... to the command)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call apt_install,python3-venv); }
	@echo 'Installing requirements.lock into .venv, once: a few minutes and 7 GB.'
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install -qq -r requirements.lock
	@touch $@

fail = { echo "error: $(strip $(1))" >&2; exit 1; }

apt = DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120
define apt_install
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo 'Installing $(1) with apt-get.'; \
    $(apt) update && $(apt) install --no-install-recommends $(1) >/dev/null; \
else \
    $(call fail,$(1) must be installed first; on Debian or Ubuntu: sudo apt-get install $(1)); \
fi
endef
