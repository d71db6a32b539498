# make demo      draw images, train small captioners on them, score them, write the pages (a few minutes on two cores)
# make test      run the tests (five minutes on two cores)
# make test-fast run all tests but those of a third of a second and more (a minute)
# make npm       install transformers.js into node_modules, with which the tests try the exports; they are skipped without
# make test-floors  run the tests with the oldest releases of torch, transformers and the like, in .venv-floors (of 6 GB)
# make quality   ruff check, ruff format --check
# make bench     the benchmarks (20 to 30 minutes on two cores; the last wants Java)
# make gpu-check  check and time everything on a CUDA card, with the packages of PYTHON (at most 8 minutes)
# Each sets up .venv by itself; it is made once and reused until setup.cfg or pyproject.toml changes. Where uv is installed it does
# that. For an install of 1 GB in place of 6, without CUDA: make TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLOORS := .venv-floors
INSTALL := $(if $(shell command -v uv 2>/dev/null),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install)

# glibc gives big blocks back to the system after every layer and faults them in again: up to four times slower on a CPU.
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 8589934592
export TOKENIZERS_PARALLELISM = false
# The tests start dozens of processes, which need not compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-floors npm quality bench gpu-check clean

# Both captioners train at the same time, with half of the cores each.
THREADS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null | awk '{print ($$1 > 1) ? int($$1 / 2) : 1}')
LAUNCH := $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $(or $(THREADS),1)
DEMO := outputs/demo

demo: $(READY)
	@mkdir -p $(DEMO)
	@echo "Drawing scenes and training both captioners on them; the logs: $(DEMO)/lstm.log and $(DEMO)/vit_gpt2.log"
	@$(LAUNCH) train_lstm.py recipes/lstm_demo.yaml --disable_tqdm true > $(DEMO)/lstm.log 2>&1 & lstm=$$!; \
	 $(LAUNCH) train_vit_gpt2.py recipes/vit_gpt2_demo.yaml --disable_tqdm true > $(DEMO)/vit_gpt2.log 2>&1 & vit_gpt2=$$!; \
	 trap 'kill $$lstm $$vit_gpt2 2>/dev/null' INT TERM; \
	 wait $$lstm || { tail -n 20 $(DEMO)/lstm.log; kill $$vit_gpt2; exit 1; }; \
	 wait $$vit_gpt2 || { tail -n 20 $(DEMO)/vit_gpt2.log; exit 1; }
	@echo "The pages: $(DEMO)/lstm/captions.html and $(DEMO)/vit_gpt2/captions.html"
	@echo "In a browser: $(BIN)/python app.py"
	@$(BIN)/python -m reporting.compare $(DEMO)/lstm $(DEMO)/vit_gpt2 --output $(DEMO)/compare.png --min_true_captions 0.95

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Without npm, or a network, the tests that need it are skipped.
npm:
	-npm install --ignore-scripts --no-audit --no-fund --no-save --no-package-lock @huggingface/transformers@4.3.1

# The same target in an environment of its own, whose packages are held to the lower bounds.
test-floors:
	$(MAKE) VENV=$(FLOORS) PIP_CONSTRAINT=$(CURDIR)/tests/floors.txt UV_CONSTRAINT=$(CURDIR)/tests/floors.txt test

# In the environment that is there: a cluster's image has its own torch, and no network to make another with.
gpu-check:
	$(PYTHON) -m benchmarks.gpu --json gpu.json

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(INSTALL) --quiet --editable '.[java]'
	@for name in images decoder_step generate train_epoch metrics; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit; done

$(READY): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "showtell needs Python 3.10 or newer; $(PYTHON) was not found. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "showtell needs Python 3.10 or newer; $(PYTHON) is older. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(INSTALL) --quiet torch torchvision --index-url $(TORCH_INDEX))
	$(INSTALL) --quiet --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv .venv-floors node_modules
