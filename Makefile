# `make repro` and `make test` each set up everything and do their job; all other targets likewise.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
# DVC's stages take the python of the PATH; .venv itself is made by one from outside
OUTSIDE := $(value PATH)
export PATH := $(CURDIR)/.venv/bin:$(OUTSIDE)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
# tests of one file share what takes long to make, so a worker gets whole files
WORKERS := -n logical --maxprocesses 4 --dist loadfile --max-worker-restart=0
PORT := 5000
HOST := 127.0.0.1
# what users name goes to the tools as it is, by the environment: make (`value`) and shell ("$$NAME") do not read it
NAMED := FILE HOST IMAGES NAME PORT PYTHON STAGE
$(foreach name,$(NAMED),$(eval override $(name) := $$(value $(name))))
export $(NAMED)

.PHONY: help setup repro benchmark test test-avx2 slow sweep chaos check sync ui front predict promote preset preset-show import lock

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: export PATH := $(OUTSIDE)
setup: ## .venv from requirements.txt, where it is not so already (PYTHON=python3.12 takes that one)
	@.venv/bin/python -m tools.environment --check >/dev/null 2>&1 || { \
		command -v -- "$$PYTHON" >/dev/null || { \
			echo "error: there is no $$PYTHON; name a Python, as in \`make setup PYTHON=python3.12\`" >&2; \
			exit 1; }; \
		"$$PYTHON" -m tools.environment; }

repro: setup ## run the pipeline: whatever params.yaml, code or data changed
	@python -m tools.repair_dvc
	dvc repro
	-@python -m tools.sync
	@python -m tools.repair_dvc --check

benchmark: setup ## measure inference time anew, on this machine, and report it
	dvc repro --single-item --force benchmark report
	-@python -m tools.sync

test: setup ## all tests but the slow ones
	python -m pytest -m "not slow and not sweep" $(WORKERS)

test-avx2: setup ## the tests of executors and trainings as on a CPU that has AVX2 alone
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m pytest -m "not e2e and not slow and not sweep" \
		$(WORKERS) tests/inference tests/training/test_loop.py tests/models/test_resnet_imagenet.py \
		tests/policy/test_learner.py tests/stages/test_training_stages.py tests/benchmark/test_runner.py

slow: setup ## the tests on real CIFAR-10 (fetches it), and with servers
	python -m pytest -m slow $(WORKERS)

sweep: setup ## the tests of whole sweeps and queues, with four workers, and of a few kills (10 minutes)
	python -m pytest -m sweep

chaos: setup ## kill trainings 50 times at random moments, fill disks, kill the server: nothing is lost (10 minutes)
	PYTHONPATH=tests python -m chaos

check: setup ## lint, format, types and the fast tests
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -m "not e2e and not slow and not sweep" $(WORKERS)

sync: setup ## one finished run in MLflow for every experiment that DVC knows
	@python -m tools.sync

ui: setup ## the MLflow UI on 127.0.0.1 (PORT=5000; HOST=0.0.0.0 opens it to everybody, without a password)
	python -m tools.ui --host="$$HOST" --port="$$PORT"

front: setup ## the trade-off of the gammas that were run, as a figure: results/own/front.png
	@python -m tools.front

predict: setup ## IMAGES="a.png 'b c.png' photos/*.jpg": class, confidence, which blocks run, what is saved
	@python -m tools.predict --words="$$IMAGES"

promote: setup ## NAME=experiment: make its model the registry's champion
	@python -m tools.promote -- "$$NAME"

preset: setup ## NAME=cifar10_resnet32: write params.yaml anew, the defaults with what presets/NAME.yaml changes
	@python -m tools.preset -- "$$NAME"

preset-show: setup ## NAME=cifar10_resnet32: print what `make preset` would write
	@python -m tools.preset --show -- "$$NAME"

import: setup ## FILE=path STAGE=pretrain|curriculum|finetune: start a stage from a checkpoint
	@python -m tools.import_checkpoint -- "$$FILE" "$$STAGE"

lock: setup ## requirements.txt anew from pyproject.toml
	uv pip compile --universal --python-version 3.11 --group dev --upgrade --quiet \
		--no-header --no-annotate pyproject.toml -o requirements.txt
