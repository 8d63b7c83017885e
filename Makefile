# `make demo`: the whole job on a planted catalog, on this machine.  `make test`: lint and all tests.
PYTHON ?= python3
BIN := .venv/bin
DATE ?= 2026-11-23
export RAY_AUTH_MODE ?= disabled
# Keep the bytecode cache: hundreds of processes import the same modules, and each would compile them again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-cluster test-ray test-unit unit lint results clean

demo: demo/data/plant.json
	$(BIN)/python jobs/nightly.py --config jobs/demo.yaml --date $(DATE)

demo/data/plant.json: .venv/base
	$(BIN)/python jobs/synthesize.py --out demo/data --items 800 --users 4000 --seed 7

# Two parts at a time, the longest first: of three Ray clusters on two cores, one may miss its start timeout.
test:
	$(MAKE) --no-print-directory --output-sync=target -j2 test-cluster lint test-ray test-unit

test-cluster: .venv/test
	$(BIN)/python -m pytest -m cluster --durations 15

test-ray: .venv/test
	$(BIN)/python -m pytest -m "ray and not serve" --durations 30
	$(BIN)/python -m pytest -m serve

# One thread: with tiny tensors a second thread costs more time than it saves.
test-unit: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray and not cluster"

unit: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray and not cluster" --numprocesses 2

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compare the model with its rivals on the Amazon data sets in one table. Takes hours; finished stages are skipped.
# MODEL: settings of the nights besides jobs/amazon.yaml, such as another budget, "--training.num_steps 100000".
results: .venv/studies
	$(BIN)/python jobs/studies/run.py jobs/studies/amazon.yaml --data "$(TIGER_DATA)" -- $(MODEL)

clean:
	rm -rf demo .venv

# Install torch first and by its exact version: otherwise pip may take a build with gigabytes of CUDA.
.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/base
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

.venv/studies: .venv/base
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[studies]"
	touch $@
