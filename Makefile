# The two commands: `make demo` and `make test`. Each sets up all it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
THREADS ?= 2

.PHONY: demo test lint types unit coverage docs wheel-test browser-test tour check-fresh clean

demo: .venv/.package
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/quickstart.py

test: lint types unit

lint: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.test
	$(BIN)/mypy

unit: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Lines and branches that the default tests run, those of their processes too.
coverage: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report --skip-covered

# The documentation as a site, docs/_build/html/index.html, without a single warning.
docs: .venv/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The wheel in an environment of its own: is everything in it that the demo needs?
wheel-test: .venv/.package
	folder=$$(mktemp -d) && $(BIN)/python -m pip install --quiet --disable-pip-version-check build && \
	$(BIN)/python -m build --wheel --outdir $$folder . > /dev/null && ls -l $$folder/*.whl && \
	$(PYTHON) -m venv $$folder/venv && \
	$$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check $$folder/*.whl && \
	cd $$folder && OMP_NUM_THREADS=$(THREADS) venv/bin/lmc-lightning demo --small && rm -rf $$folder

# TensorBoard as somebody sees it. Installs Chromium where apt-get does (Debian); screenshots go to $(SCREENSHOTS).
SCREENSHOTS ?= screenshots

browser-test: .venv/.test
	command -v chromedriver > /dev/null || { \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update -qq && $$sudo apt-get install -qq -y chromium chromium-driver; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	OMP_NUM_THREADS=1 SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest -m browser tests/browser

# The notebook from its script, run from the first cell to the last.
tour: .venv/.test
	$(BIN)/jupytext --quiet --to ipynb examples/tour.py
	OMP_NUM_THREADS=$(THREADS) $(BIN)/jupyter-execute --inplace --NotebookClient.record_timing=False examples/tour.ipynb

# Both commands as a newcomer meets them: from a clone of the last commit, in a folder of its own.
check-fresh:
	folder=$$(mktemp -d) && git clone --quiet . $$folder/lmc_lightning && \
	$(MAKE) -C $$folder/lmc_lightning demo && $(MAKE) -C $$folder/lmc_lightning test && rm -rf $$folder

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/.package: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.test: .venv/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

.venv/.docs: .venv/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@
