# `make train` and `make test` do all set-up from a fresh clone: Python ≥ 3.11, make and a C++
# compiler must be there. Everything is installed into .venv and written under out/.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/python_stdlib
# ignored outside tests; in them warnings are errors except those listed in pyproject.toml
export TOKENIZERS_PARALLELISM ?= true
export HF_HUB_OFFLINE ?= 1

.PHONY: install train test test-full support-table check format docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=..."; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "error: no C++ compiler found, which torch.compile needs: install g++ or clang"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	# tests compare with its MoE layers, which import without the GPU packages it depends on
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt nemo-automodel
	touch $@

train: install
	$(BIN)/python examples/python_stdlib/prepare.py --out $(OUT)
	$(BIN)/tune run moe_full_finetune --config qwen3_moe/python_stdlib \
	  base_model=$(OUT)/base output_dir=$(OUT)/run plots=true \
	  dataset.data_files=$(OUT)/train.jsonl dataset_val.data_files=$(OUT)/heldout.jsonl
	$(BIN)/python examples/python_stdlib/report.py \
	  --base $(OUT)/base --tuned $(OUT)/run/model --data $(OUT) --out $(OUT)/report

test: install
	$(BIN)/python -m pytest -m "not full"

# the long grids; the result is kept with the commit and versions it was made with
test-full: install
	@mkdir -p tests/results
	{ echo "commit $$(git rev-parse --short HEAD)"; uname -srm; $(BIN)/python -V; \
	  $(BIN)/python -m pip freeze | grep -iE '^(torch|torchtune|torchao|transformers)=='; \
	  $(BIN)/python -m pytest -p no:cacheprovider; } 2>&1 | tee tests/results/test_full.txt

# README's table of families and tests/results/families.json, from the tests' results
support-table: install
	$(BIN)/python tests/support_table.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/test_house.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build -d out/site

clean:
	rm -rf out dist .pytest_cache .ruff_cache
