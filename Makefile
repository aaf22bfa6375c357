# `make run` and `make test` do all set-up on a fresh machine; nothing else has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per rank: the ranks share the cores. The progress bars of downloads do not belong into logs.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Files of tests go to as many workers as tests/conftest.py says; in their order, in which the long ones come first.
IN_PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: run serve test test-lowest test-newest test-plugins lint docs dist bench clean elixir soak

run: $(STAMP)
	$(BIN)/lockstep run --model examples/small_moe --workload examples/small_moe/prompts.jsonl --dtype float32 --data-parallel-size 4 --verify --out runs/latest --overwrite

# OpenAI's completions and chats on http://127.0.0.1:8000/v1, until Ctrl-C.
PORT ?= 8000
serve: $(STAMP)
	$(BIN)/lockstep serve --model examples/small_moe --dtype float32 --data-parallel-size 2 --port $(PORT)

test: $(STAMP) lint
	$(BIN)/python -m pytest $(IN_PARALLEL)

# The lowest declared versions of everything, in an environment of their own: the suite's core passes there too.
LOWEST := .venv-lowest
CORE := $(addprefix tests/unit/test_,$(addsuffix .py,checkpoint_reading chunks dp_metadata experts from_pretrained_arguments \
	loading metrics norms quantised rank_engine report sampling seal sizes step tiny traces transformers_internals wire)) \
	$(addprefix tests/ranks/test_,$(addsuffix .py,join layer one_row refused_models tensor_parallel wrappers))
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(IN_PARALLEL) $(CORE)

# The newest versions of everything. NEWEST_TORCH='torch==2.13.0' keeps to a torch that is there.
NEWEST := .venv-newest
NEWEST_TORCH ?= torch
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pip list | grep -i -E '^(torch|transformers|typer|rich|pyarrow|plotly|numpy) '
	$(NEWEST)/bin/python -m pytest $(IN_PARALLEL) $(CORE) tests/ranks/test_transformers.py

# What needs packages of others, in an environment of its own; `make test` skips these tests.
PLUGINS := .venv-plugins
WITH_PLUGINS := $(addprefix tests/ranks/test_,$(addsuffix .py,compile lm_eval peft ray refused_models transformers wrappers))
test-plugins: $(PLUGINS)/.installed
	$(PLUGINS)/bin/python -m pytest $(IN_PARALLEL) $(WITH_PLUGINS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into site/; warnings are errors. `make docs DOCS_DO=serve` shows it while pages are written.
DOCS := .venv-docs
DOCS_DO ?= build --strict
docs: $(DOCS)/.installed
	PATH=$(abspath $(DOCS)/bin):$$PATH NO_MKDOCS_2_WARNING=1 mkdocs $(DOCS_DO)

# Wheel and sdist into dist/, each checked: metadata, contents, and the wheel built from the sdist.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python tests/check_dist.py dist

bench: $(STAMP)
	for name in dp_metadata agreement alltoall generate simulator; do $(BIN)/python benchmarks/bench_$$name.py || exit 1; done

# Random faults, about half an hour; SEED=... for another half hour.
SEED ?= 1
soak: $(STAMP)
	$(BIN)/python tests/soak.py --cases 2000 --minutes 30 --seed $(SEED) --protocol

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(PLUGINS) $(ELIXIR) $(DOCS) build dist site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(STAMP): pyproject.toml constraints.txt constraints-torch.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints-torch.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --constraint constraints-torch.txt --editable '.[dev]'
	touch $(STAMP)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	touch $@

$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet '$(NEWEST_TORCH)'
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]' '$(NEWEST_TORCH)'
	touch $@

$(PLUGINS)/.installed: pyproject.toml constraints.txt constraints-torch.txt
	$(PYTHON) -m venv $(PLUGINS)
	$(PLUGINS)/bin/python -m pip install --quiet --upgrade pip
	$(PLUGINS)/bin/python -m pip install --quiet --constraint constraints-torch.txt torch
	$(PLUGINS)/bin/python -m pip install --quiet --constraint constraints-torch.txt --editable '.[dev,plugins]'
	touch $@

$(DOCS)/.installed: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints-docs.txt mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# Runs examples/elixir in an environment of its own, which gets the packages of Snakepit's worker. Needs Elixir 1.18 and
# uv. ELIXIR_SOURCES='/src/snakebridge /src/snakepit' takes these two, or more of their dependencies, from folders.
ELIXIR := .venv-elixir
elixir: $(ELIXIR)/.installed
	VENV=$(ELIXIR) examples/elixir/run.sh $(ELIXIR_SOURCES)

$(ELIXIR)/.installed: pyproject.toml constraints-torch.txt
	$(PYTHON) -m venv $(ELIXIR)
	$(ELIXIR)/bin/python -m pip install --quiet --upgrade pip
	$(ELIXIR)/bin/python -m pip install --quiet --constraint constraints-torch.txt torch
	$(ELIXIR)/bin/python -m pip install --quiet --constraint constraints-torch.txt --editable .
	touch $@
