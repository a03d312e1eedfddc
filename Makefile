# `make repro` and `make test` each set up everything they need and do their job; so do all other targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
# DVC's stages take the python of the PATH; .venv itself is made by a Python from outside
OUTSIDE := $(value PATH)
export PATH := $(CURDIR)/.venv/bin:$(OUTSIDE)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
# tests of one file share fixtures that take long to make, so a worker gets whole files
PYTEST := python -m pytest -n logical --maxprocesses 4 --dist loadfile --max-worker-restart=0
PORT :=
HOST := 127.0.0.1
MODEL :=
CPU :=
TO := export
# of `make study`
BUDGET :=
SEEDS :=
SET :=
STUDY :=
TRIALS :=
# values that users give reach the tools unchanged, by the environment: neither make (`value`) nor the shell
# ("$$NAME") interprets them
NAMED := BUDGET CPU FILE HOST IMAGES MODEL NAME PORT PYTHON SEEDS SET STAGE STUDY TO TRIALS
$(foreach name,$(NAMED),$(eval override $(name) := $$(value $(name))))
export $(NAMED)

.PHONY: help setup repro benchmark preset preset-show import predict demo export peers sync ui front study promote notebook check lint test test-avx2 slow sweep chaos lock

help: ## show this list
	@sed -nE 's/^## (.+)/\n\1/p; s/^([a-z0-9-]+):.*## (.*)/  \1 - \2/p' $(MAKEFILE_LIST)

## The pipeline

setup: export PATH := $(OUTSIDE)
setup: ## install requirements.txt into .venv, if something is missing there (PYTHON=python3.12 chooses the Python, CPU=1 leaves CUDA out)
	@.venv/bin/python -m tools.environment --check >/dev/null 2>&1 || { \
		command -v -- "$$PYTHON" >/dev/null || { \
			echo "error: there is no $$PYTHON; name a Python, as in \`make setup PYTHON=python3.12\`" >&2; \
			exit 1; }; \
		"$$PYTHON" -m tools.environment; }

repro: setup ## run the stages whose parameters, code or data changed
	@python -m tools.repair_dvc
	BLOCKDROP_SYNCED_LATER=1 dvc repro
	-@python -m tools.sync
	@python -m tools.repair_dvc --check

benchmark: setup ## measure inference time again, on this machine, and report it
	dvc repro --single-item --force benchmark report
	-@python -m tools.sync

preset: setup ## copy a file of presets/ to params.yaml: NAME=cifar10_resnet32
	@python -m tools.preset -- "$$NAME"

preset-show: setup ## NAME=cifar10_resnet32: print what `make preset` would write, and write nothing
	@python -m tools.preset --show -- "$$NAME"

import: setup ## start a stage from a checkpoint: FILE=path STAGE=pretrain|prune|policy_pretrain|curriculum|finetune
	@python -m tools.import_checkpoint -- "$$FILE" "$$STAGE"

predict: setup ## classify images, and show the blocks that run: IMAGES="a.png 'b c.png' photos/*.jpg"
	@python -m tools.predict $${MODEL:+--model="$$MODEL"} --words="$$IMAGES"

demo: setup ## try the shipped CIFAR-10 model in a browser, on 127.0.0.1 (PORT=7860): nothing is trained
	@python -m tools.demo $${MODEL:+--model="$$MODEL"} $${PORT:+--port="$$PORT"}

export: peers ## write the trained model as ONNX graphs with a runner that needs no PyTorch: TO=folder MODEL=models/finetune
	@python -m tools.export --to="$$TO" -- "$${MODEL:-models/finetune}"

peers: setup ## install ONNX Runtime and OpenVINO, which `make benchmark` then times too, and oneDNN for ImageNet's ResNets
	@uv pip install --quiet --group peers --constraint requirements.txt

## Experiments

sync: setup ## log every DVC experiment to MLflow that is not there yet
	@python -m tools.sync

ui: setup ## serve the MLflow UI on 127.0.0.1 (PORT=5050; HOST=0.0.0.0 opens it to everybody, without a password)
	python -m tools.ui --host="$$HOST" $${PORT:+--port="$$PORT"}

front: setup ## plot accuracy against FLOPs for all gammas that were run: results/own/front.png
	@python -m tools.front

study: setup ## search parameters with Optuna (BUDGET=0.5 TRIALS=20 SET="gamma=1..20:log"), or repeat one setting: SEEDS=5
	@uv pip install --quiet --group study --constraint requirements.txt
	@python -m tools.study $${STUDY:+--study="$$STUDY"} $${TRIALS:+--trials="$$TRIALS"} \
		$${BUDGET:+--budget="$$BUDGET"} $${SEEDS:+--seeds="$$SEEDS"} $${SET:+--set="$$SET"}
	-@python -m tools.sync

notebook: setup ## run examples/walkthrough.ipynb on the results that are here: results/own/walkthrough.html
	@uv pip install --quiet --group notebook --constraint requirements.txt
	@python -m nbconvert --execute --to html --output-dir results/own examples/walkthrough.ipynb

promote: setup ## make an experiment's model the champion of MLflow's registry: NAME=experiment
	@python -m tools.promote -- "$$NAME"

## Development

check: lint ## lint, format, types, and the tests that run no DVC
	$(PYTEST) -m "not e2e and not slow and not sweep"

lint: setup ## lint, format and types alone
	ruff check .
	ruff format --check .
	mypy

test: setup ## all tests but slow and sweep
	$(PYTEST) -m "not slow and not sweep"

test-avx2: setup ## the tests of inference and training, as on a CPU that has AVX2 and no AVX-512
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "not e2e and not slow and not sweep" \
		tests/inference tests/policy tests/training/test_loop.py tests/models/test_resnet_imagenet.py \
		tests/stages/test_training_stages.py tests/benchmark/test_runner.py

slow: setup ## the tests with the real CIFAR-10, which they download, with servers, which they start, and with a browser
	@uv pip install --quiet --group peers --group docs --group servers --group study --group notebook \
		--constraint requirements.txt
	$(PYTEST) -m slow

sweep: setup ## the tests of whole sweeps and queues, with four DVC workers, and of a few kills (10 minutes)
	@uv pip install --quiet --group study --constraint requirements.txt
	python -m pytest -m sweep

chaos: setup ## kill trainings at random moments, fill disks, kill the server, and look for violations (10 minutes)
	PYTHONPATH=tests python -m chaos

lock: setup ## resolve requirements.txt from pyproject.toml again
	uv pip compile --universal --python-version 3.11 --group dev --upgrade --quiet \
		--no-header --no-annotate pyproject.toml -o requirements.txt
