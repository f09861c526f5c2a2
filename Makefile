# make train: install into .venv and train a DeltaNet on real text.  make test: install and run the tests.
# make lint, make types, make docs: what a change must pass besides.  EXTRAS= chooses what is installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without parity (flash-linear-attention) the tests that compare with it skip, each with a sentence.
EXTRAS ?= test,parity,lint,docs

.PHONY: install train test test-all test-part wheel lint types docs clean

install: $(VENV)/.installed

# The stamp is renewed when what is to be installed changes; the code itself is installed in place.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("zoo needs Python 3.11 to 3.13; this is %d.%d, try make PYTHON=python3.12" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

train: install
	$(BIN)/zoo train model=deltanet

# Two workers, each with one thread: processes that both use all cores slow each other down several times.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The default tier, at most 10 minutes on two quiet cores: every operator's proofs, each mixer and each model once.
test: install
	$(PYTEST)

# Every pair and every long run, too; then what measures time, alone.
test-all: install
	$(PYTEST) -m "not timing"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m timing

# make test-part PART=1/4: one part of what `make test` leaves out.
test-part: install
	$(PYTEST) -m everything --part $(PART)

# The wheel in an environment of its own.
wheel: install
	.ci/wheel

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# mypy reads the package as a user gets it: built as a wheel and installed, folders mapped to zoo.ops, zoo.layers, ...
types: install
	rm -rf build/lib build/bdist.* build/types && mkdir -p build/types  # what an earlier build left there would be packed again
	$(BIN)/python -m build --wheel --outdir build/types . > build/types/build.log 2>&1 || (cat build/types/build.log; exit 1)
	$(BIN)/python -m pip install --quiet --no-deps --target build/types/site build/types/*.whl
	cd build/types && MYPYPATH=site ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p zoo

# The site, with the API read from the docstrings; a link that leads nowhere is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
