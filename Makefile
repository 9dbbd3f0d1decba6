# From a clean clone, with Python 3.10+, git and make:  make demo  |  make test  |  make bench  |  make lint  |  make docs  |  make clean
# Each installs what it needs into .venv, once. PYTHON=... picks the interpreter for it; ARGS=... goes to the command (make test ARGS="-k linear").
# WITH=... replaces pins of constraints.txt, a bare name by its newest release: make test VENV=.venv-old WITH="torch==2.10.0 triton==3.6.0".

PYTHON ?= python3
ARGS :=
WITH :=
AT_LEAST := 65
VENV := .venv
# The compile checks run on a second Triton too: kernels must stay good on the oldest release still in wide use, not only on the pinned one.
OLD_TRITON := 3.6.0
INSTALLED := $(VENV)/.installed
# Integrations, and the package for the Hub, are tested against the real packages.
PEERS := $(VENV)/.installed-peers
BENCH_PEERS := $(VENV)/.installed-bench-peers
LINTER := $(VENV)/.installed-lint
PINS := $(VENV)/constraints.txt
SITE := $(VENV)/.installed-docs
PIP_INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check
# Triton is published for Linux only; elsewhere the tests skip what needs it.
ifeq ($(shell uname -s),Linux)
OLD_TRITON_INSTALLED := $(VENV)/triton-$(OLD_TRITON)/.installed
endif

.PHONY: demo test coverage mutants bench bench-static bench-accuracy bench-linear hub gpu lint docs dist clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(VENV)/bin/fastkl demo $(ARGS)

test: $(INSTALLED) $(PEERS) $(OLD_TRITON_INSTALLED)
	$(VENV)/bin/python -m pytest $(ARGS)

# Lines and branches of fastkl/ and kernels/ that the tests run, in the processes they start too.
coverage: $(INSTALLED) $(PEERS)
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest $(ARGS)
	$(VENV)/bin/coverage combine
	$(VENV)/bin/coverage report

# Half an hour: the nearest tests for each of some 100 faults. ARGS="--only merge row_load.py" runs some.
mutants: $(INSTALLED)
	$(VENV)/bin/python tests/mutants.py $(ARGS)

# Results go to build/; without a GPU nothing but Python is timed. Fewer rows and a smaller vocabulary
# than the committed results have: 6 minutes at the most. What takes no times runs side by side.
bench: $(INSTALLED) $(BENCH_PEERS)
	mkdir -p build
	$(MAKE) --no-print-directory -j 2 bench-static bench-accuracy bench-linear
	$(VENV)/bin/python -m benchmarks.overhead --json build/overhead.json
	$(VENV)/bin/python -m benchmarks.speed --check --suite smoke --out build $(ARGS)

bench-static:
	$(VENV)/bin/python -m benchmarks.static_costs --arch sm_90 --dtype bf16 --baseline --json build/static_costs.json

bench-accuracy:
	$(VENV)/bin/python -m benchmarks.accuracy --rows 2 --vocabulary 8192 --json build/accuracy.json --plot build/accuracy.png

bench-linear:
	$(VENV)/bin/python -m benchmarks.linear_accuracy --json build/linear_accuracy.json

# On a machine with a CUDA GPU: doctor, its tests, right results, and a share of a copy's bandwidth. A missing GPU is an error.
gpu: $(INSTALLED) $(PEERS)
	$(VENV)/bin/fastkl doctor --device cuda
	FASTKL_REQUIRE_GPU=1 $(VENV)/bin/python -m pytest -m gpu $(ARGS)
	$(VENV)/bin/python -m benchmarks.speed --check --suite smoke --providers fastkl
	$(VENV)/bin/python -m benchmarks.speed --suite main --providers fastkl --at-least $(AT_LEAST) --out build/gpu

# The repository of a kernel on Hugging Face's Hub, into build/hub: hub/README.md.
hub: $(INSTALLED)
	rm -rf build/hub
	$(VENV)/bin/python hub/build.py build/hub

lint: $(INSTALLED) $(LINTER)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy --python-version 3.10
	$(VENV)/bin/python -m mypy --python-version 3.13
	$(VENV)/bin/lint-imports
	$(VENV)/bin/vermin --quiet --no-tips --violations --target=3.10- --exclude tomllib fastkl kernels benchmarks tests hub docs setup.py
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(VENV)/bin/zizmor --offline --quiet .github

# Build the sdist and wheel of a release into dist, and test the public functions on the wheel. pytest, not python -m pytest, keeps the checkout off the path.
dist: $(INSTALLED)
	rm -rf dist build/lib build/wheel
	$(VENV)/bin/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist"); build_meta.build_wheel("dist")'
	$(PIP_INSTALL) --quiet --no-deps --target build/wheel dist/*.whl
	PYTHONPATH=build/wheel $(VENV)/bin/pytest -o pythonpath=tests tests/test_divergence.py tests/test_tokens.py $(ARGS)

# The site, in build/site; a broken link is an error. The variable silences an advertisement.
docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build $(ARGS)

# Leaves .venv alone: it takes minutes to rebuild. To start over, remove it.
clean:
	rm -rf build dist *.egg-info demo-run .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Order-only: the folder's time changes whenever something is installed into it.
$(INSTALLED): setup.py $(PINS) | $(VENV)/bin/pip
	$(PIP_INSTALL) -c $(PINS) -e '.[test,demo,compare]'
	@touch $@

$(PEERS): setup.py $(PINS) | $(INSTALLED)
	$(PIP_INSTALL) -c $(PINS) -e '.[trl]' peft kernels
	@touch $@

$(BENCH_PEERS): setup.py $(PINS) | $(INSTALLED)
	$(PIP_INSTALL) -c $(PINS) -e '.[bench-peers]'
	@touch $@

$(LINTER): $(PINS) | $(VENV)/bin/pip
	$(PIP_INSTALL) -c $(PINS) ruff import-linter vermin check-jsonschema zizmor
	@touch $@

$(PINS): constraints.txt | $(VENV)/bin/pip
	sed $(foreach pin,$(WITH),-e '/^$(firstword $(subst =, ,$(pin)))==/d') -e '' $< > $@
	printf '%s\n' $(WITH) >> $@

$(SITE): setup.py $(PINS) | $(INSTALLED)
	$(PIP_INSTALL) -c $(PINS) -e '.[docs]'
	@touch $@

# --no-deps and a folder of its own: beside the pinned Triton, never in its place.
$(VENV)/triton-$(OLD_TRITON)/.installed: | $(INSTALLED)
	rm -rf $(@D)
	$(PIP_INSTALL) --no-deps --target $(@D) triton==$(OLD_TRITON)
	@touch $@

# Checked first, because `python -m venv` without ensurepip leaves half an environment behind. venv writes pip last, so pip stands for the whole.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "PYTHON: expected Python 3.10 or newer, got '$(PYTHON)' ($$($(PYTHON) --version 2>&1)); remedy: make PYTHON=/path/to/a/newer/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "PYTHON: expected a Python with venv and ensurepip, got '$(PYTHON)' without; remedy: install them (Debian, Ubuntu: apt install python3-venv)" \
	        "or use another interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
