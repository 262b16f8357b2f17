# Developer commands. Users need only scripts/serve and scripts/test.
VENV ?= .venv

.PHONY: install fmt check test test-slow test-e2e mutate fuzz bench playground vsix serve clean

install:
	sh scripts/install dev

fmt: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

check:
	sh scripts/check

test:
	sh scripts/test

test-slow:
	sh scripts/test -m slow

# Needs Chromium: apt-get install chromium.
test-e2e:
	sh tests/e2e/editors.sh
	sh tests/e2e/vscode.sh

# How many small changes to the core logic the tests notice; the goal is 85 %.
mutate: install
	$(VENV)/bin/mutmut run

# Hostile requests and model files; see fuzz/README.md. FUZZ_SECONDS is for each loader.
FUZZ_SECONDS ?= 1800
fuzz: install
	$(VENV)/bin/pip install --quiet ".[fuzz]"
	$(VENV)/bin/python -m fuzz.raw --cases 50000
	$(VENV)/bin/python -m fuzz.http_schema --cases 20000
	$(VENV)/bin/python -m fuzz.coverage_guided gguf --seconds $(FUZZ_SECONDS)
	$(VENV)/bin/python -m fuzz.coverage_guided hf --seconds $(FUZZ_SECONDS)
	$(VENV)/bin/python -m fuzz.coverage_guided load --seconds $(FUZZ_SECONDS)
	$(VENV)/bin/python -m fuzz.coverage_guided foreign --seconds $(FUZZ_SECONDS)

bench:
	sh scripts/install dev
	sh scripts/install bench
	$(VENV)/bin/albor-bench decode

# The editor library that the page at / carries; needs Node 20 or newer.
playground:
	cd scripts/playground && npm ci --ignore-scripts && node build.mjs

# The VS Code extension, editors/vscode/dist/albor.vsix; needs Node 20 or newer.
vsix:
	cd editors/vscode && npm ci --ignore-scripts --no-audit --no-fund && npm run check && npm test && npm run package

serve:
	sh scripts/serve

clean:
	rm -rf $(VENV) build mutants dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
