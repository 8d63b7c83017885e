# `make demo`: the whole job on a planted catalog, on this machine.  `make test`: lint and all tests.
PYTHON ?= python3
BIN := .venv/bin
DATE ?= 2026-11-23
export RAY_AUTH_MODE ?= disabled

.PHONY: demo test test-pipeline test-cluster test-rest unit lint clean

demo: demo/data/plant.json
	$(BIN)/python jobs/nightly.py --config jobs/demo.yaml --date $(DATE)

demo/data/plant.json: .venv/base
	$(BIN)/python jobs/synthesize.py --out demo/data --items 800 --users 4000 --seed 7

# Three parts side by side: each waits for processes to start more than it computes.
test: lint
	$(MAKE) --no-print-directory --output-sync=target -j3 test-pipeline test-cluster test-rest

test-pipeline: .venv/test
	$(BIN)/python -m pytest tests/pipeline --ignore tests/pipeline/test_serving.py --durations 15

test-cluster: .venv/test
	$(BIN)/python -m pytest tests/cluster --durations 15

test-rest: .venv/test
	$(BIN)/python -m pytest tests/docs tests/unit
	$(BIN)/python -m pytest tests/pipeline/test_serving.py

unit: .venv/test
	$(BIN)/python -m pytest tests/unit

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo .venv

# torch first and by its exact version: without that pip may take a build with gigabytes of CUDA.
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/base
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[report,test]"
	touch $@
