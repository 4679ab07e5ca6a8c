# Every target sets up .venv from requirements.lock first. PYTHON chooses the interpreter (3.11 or newer), and
# TORCH_INDEX a wheel index for another build of torch, e.g. a CPU-only one: see README.md. It is asked for torch and
# torchvision alone: what they need, which the lock pins as PyPI has it, comes from PyPI with all the rest.
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
# Half of the tests' time is waiting. A file at a time in each: its tests share what is costly to make.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint requirements.lock

.PHONY: demo services test test-full check bench bench-quick chaos chaos-points photos lock clean

demo: .venv/ready
	$(BIN)/codecmill demo

# PostgreSQL, S3, Prefect's and MLflow's servers and a worker, on this machine until Ctrl-C: see infra/README.md.
services: .venv/ready
	$(BIN)/python -m infra.services.run

test: .venv/ready
	$(PYTEST)

test-full: .venv/ready
	$(PYTEST) --no-loadscope-reorder -m full --durations=30

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(PYTEST)

# Beside webdataset, MosaicML streaming, litdata, torchvision and a plain step, interleaved: some 25 minutes, after an
# environment for the peers is set up once (6 GB). Report, figures and plots: codecmill-data/bench/latest.md and beside it.
BENCH := $(BIN)/python -m infra.bench.run $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
bench: .venv/ready
	$(BENCH)

# The same in about five minutes; fails, and says why, if a figure is worse than infra/bench/expected.toml allows.
bench-quick: .venv/ready
	$(BENCH) --scale quick

# Kills small runs at random moments and compares what they end with; KILLS=100 for more. About half a minute a kill.
KILLS ?= 40
chaos: .venv/ready
	$(BIN)/python -m infra.chaos.run --kills $(KILLS)

# Kills a small run at each write, fsync, rename, log call and collective, one by one: POINTS=40 for a sample of them.
chaos-points: .venv/ready
	$(BIN)/python -m infra.chaos.points $(if $(POINTS),--points $(POINTS)) --seed $(or $(SEED),0)

# Photographs to train and to measure codecs on, from Debian packages, into codecmill-data/photos and photos-heldout.
photos: .venv/ready
	$(BIN)/python -m infra.photos.run

.venv/ready: requirements.lock pyproject.toml
	@echo "Setting up .venv from requirements.lock (several GB with a CUDA build of torch; minutes the first time)"
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) --no-deps torch torchvision)
	$(INSTALL) --editable '.[dev]'
	@touch $@

# Take the newest versions that pyproject.toml allows and write them down.
lock:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev,ray]'
	{ sed '/^[^#]/,$$d' requirements.lock; \
	  $(BIN)/python -m pip freeze --exclude-editable; } > .venv/new.lock && mv .venv/new.lock requirements.lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
