# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
VENV := .venv
# Compiled modules are kept, or each process that the tests start would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin

.PHONY: install quickstart test test-fast soak check format bench clean

install: $(VENV)/.installed  ## make the environment with the package and its development tools

# `vlm` is installed in editable mode, so only a change of pyproject.toml asks for a new install.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(None if sys.version_info >= (3, 11) else "vlm needs Python 3.11 or newer, found " + v + "; name one with `make PYTHON=...`")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# Chinese-CLIP and CLIP_benchmark, which the tests compare with, pin versions of long ago.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps cn_clip==1.6.0 clip-benchmark==1.6.2
	@touch $@

quickstart: install  ## train, score and index a bilingual model on real pictures (minutes)
	$(BIN)/vlm quickstart

# Up to four workers; a file's tests stay in one of them, with the fixtures that they share. Files
# with few tests are not left to the end: these are the slow ones.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: install  ## run the whole test suite
	$(PYTEST)

soak: install  ## count the promises of docs/reliability.md in full (long); make soak ONLY="P5 or P6"
	$(BIN)/python -m pytest tests/soak -k "$(ONLY)" --results benchmarks/results/soak_2cpu_202611

test-fast: install  ## run the quick tests of one process (under 3 minutes on two quiet cores)
	$(PYTEST) -m "not slow and not distributed and not peer"

check: install  ## formatting, lint, types and layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## format the code and mend what lint can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: install  ## run the benchmarks side by side with the peers (long)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	$(BIN)/python benchmarks/loss_scaling.py
	$(BIN)/python benchmarks/loss.py --rows 256 --repeats 25
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/emoji_loss.py
	$(BIN)/python benchmarks/emoji_objectives.py
	$(BIN)/python benchmarks/emoji_training.py
	$(BIN)/python benchmarks/data_scale.py
	$(BIN)/python benchmarks/retrieval_eval.py
	$(BIN)/python benchmarks/tokenizer_speed.py
	$(BIN)/python benchmarks/vocabulary_growth.py

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs
