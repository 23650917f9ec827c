# make demo   everything from nothing: environment, package, a winning ticket on the embedded corpus
# make test   the tests        make lint   ruff        make clean   the environment and builds away
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

demo: $(VENV)/installed
	$(BIN)/python train.py --backbone rnnt --sparsity 0.9

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip' || { echo "the venv module is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info *.so

.PHONY: demo test lint clean
