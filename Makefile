# Everything a person does here, one word each. A fresh machine needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
RUN ?= runs/demo
WORKERS ?= 15

.PHONY: demo test gpu oldest check bench clean

# `demo` needs only the library and a plot; `test` needs the test extra. Each stamp is remade when the dependencies change.
.stamps/base: pyproject.toml constraints.txt
	@mkdir -p .stamps
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

.stamps/test: .stamps/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: .stamps/base  ## train a small Gated DeltaNet on this machine's Python source and let it write
	$(BIN)/gdn train demo --directory $(RUN)

test: .stamps/test  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2  # two workers with one thread each: more threads only wait for each other

gpu: .stamps/test  ## the tests of operators and models on this machine's GPUs, which the workers share
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxschedchunk 1 tests/ops tests/models tests/core/test_portable_product.py

oldest: $(OLDEST)/.complete  ## the whole test suite with the oldest torch, Triton and transformers that are supported
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2

$(OLDEST)/.complete: pyproject.toml constraints.oldest.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.oldest.txt -e '.[test]'
	@touch $@

check: .stamps/test  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .stamps/test  ## time the gated delta rule beside transformers'
	$(BIN)/gdn bench ops

clean:  ## forget the environment and the demo
	rm -rf $(VENV) $(OLDEST) .stamps runs
