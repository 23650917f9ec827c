# make try    environment, package, and then in seconds: what a shipped ticket hears, how well, how fast
# make demo   everything from nothing: environment, package, a winning ticket on the embedded corpus
# make test   the tests        make soak   kills and damage at length      make sanitize   operators under ASan, UBSan
# make lint   ruff             make baseline   operators without AVX       make clean      environment and builds away
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPERATORS := tests/test_ops.py tests/test_sparse.py tests/test_fused.py tests/test_transducer_loss.py tests/test_bytes.py

try: $(VENV)/installed
	$(BIN)/python -m bench try

demo: $(VENV)/installed
	$(BIN)/python train.py --backbone rnnt --sparsity 0.9

test: $(VENV)/dev
	$(BIN)/python -m pytest

# what must never break, tried at length: about half an hour
soak: $(VENV)/dev
	$(BIN)/python tests/soak.py audio 30000
	$(BIN)/python tests/soak.py recordings 20000
	$(BIN)/python tests/soak.py tickets 1000000
	$(BIN)/python tests/soak.py ledgers 10000
	$(BIN)/python tests/soak.py lies 10000
	$(BIN)/python tests/soak.py kills 1000

# the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, CPU form
sanitize: $(VENV)/dev
	rm -rf build/sanitize
	PATH=$(abspath $(BIN)):$$PATH USE_CUDA=0 CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
	-fno-sanitize-recover=all" $(BIN)/python setup.py build_ext --build-temp build/sanitize/temp --build-lib build/sanitize
	export LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0; \
	(cd build/sanitize && $(abspath $(BIN))/python -c 'import torch, _lottery; assert "sanitize" in _lottery.__file__') && \
	$(BIN)/python -m pytest -o pythonpath="build/sanitize . tests" $(OPERATORS)

# the operators' tests on the code for other processors: no AVX2, no AVX-512
baseline: $(VENV)/dev
	rm -rf build/baseline
	PATH=$(abspath $(BIN)):$$PATH USE_CUDA=0 CXXFLAGS=-DAUDIO_LOTTERY_BASELINE $(BIN)/python setup.py build_ext \
	--build-temp build/baseline/temp --build-lib build/baseline
	(cd build/baseline && $(abspath $(BIN))/python -c 'import torch, _lottery; \
	assert "baseline" in _lottery.__file__ and _lottery.build_facts()["instructions"] == "baseline"') && \
	$(BIN)/python -m pytest -o pythonpath="build/baseline . tests" $(OPERATORS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt setup.py pyproject.toml audio_lottery/__init__.py $(wildcard csrc/*.* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip' || { echo "the venv module is missing: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info *.so

.PHONY: try demo test soak sanitize baseline lint clean
