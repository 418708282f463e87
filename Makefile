# Speaks, tests and cleans up; makes its own .venv on the way, with the versions of constraints.txt.
# Wants Python 3.11 to 3.13 (the first of $PYTHON, python3.13, python3.12, python3.11, python3 that fits) and POSIX tools.

TEXT = Hello there. How can I help you today?
OUT = hello.wav
ARGS =
WORK = build/voice
VENV = .venv
# Where to take torch from; empty: pip's own index. A Linux machine without a card saves gigabytes by naming an index of
# CPU wheels.
TORCH_INDEX ?=
# Torch with the CUDA libraries takes 5 GB of disk, without them 2.
NEEDED_GB = $(if $(TORCH_INDEX)$(filter Darwin,$(shell uname -s)),3,7)

# Through the environment, so that quotes and dollars of the text reach the program as they were typed.
export SAY_TEXT = $(value TEXT)
export SAY_OUT = $(value OUT)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

PY = $(VENV)/bin/python

.DEFAULT_GOAL = help
.PHONY: say test test-slow web test-web video eval parity voice cubins dist samples lint format clean help

say: $(VENV)/installed ## speak TEXT="…" into OUT=hello.wav; ARGS="--seed 7" are passed on
	@$(PY) -m pipecat_qwen3 say -o "$$SAY_OUT" $(ARGS) -- "$$SAY_TEXT"

test: lint ## lint, types, and all tests but the slow ones; ARGS="-k codec" are passed on to pytest
	$(PY) -m pytest $(ARGS)

test-slow: $(VENV)/installed-dev ## the tests that take minutes
	$(PY) -m pytest -m slow $(ARGS)

web: ## build the page that the bots serve (needs node)
	cd bots/web && npm ci --ignore-scripts --no-audit --no-fund && npm run build

test-web: $(VENV)/installed-dev ## talk to the page in a real Chromium; SCREENSHOTS=docs/images keeps what it looks like
	PIPECAT_QWEN3_TEST_WEB=1 PIPECAT_QWEN3_SCREENSHOTS="$(SCREENSHOTS)" $(PY) -m pytest tests/test_page.py $(ARGS)

video: $(VENV)/installed-dev ## film half a minute of conversation in Chromium, into docs/conversation.webm
	PYTHONPATH=. $(PY) -m tests.web.film docs/conversation.webm

eval: $(VENV)/installed-dev ## hold Pipecat's eval conversations with the voice agent, in real time; ARGS="--repeat 5"
	PYTHONPATH=. $(PY) -m pipecat.evals suite bots/evals/suite.yaml $(ARGS)

parity: $(VENV)/installed-dev ## compare with the official qwen-tts package, installed into a venv of its own
	$(PY) -m tests.parity $(ARGS)

cubins: $(VENV)/installed-dev ## compile the kernels that a wheel brings along (needs no GPU)
	$(PY) -m megakernel.prebuild

voice: $(VENV)/installed-training ## train the embedded voice from nothing in WORK=build/voice (hours without a GPU), or go on with it
	@$(PY) -m training "$(WORK)" $(ARGS)

dist: $(VENV)/installed ## build the sdist and the wheel (with the kernels of `make cubins`, if made) and hear the wheel speak from a venv of its own
	@$(PY) -m pip install -q build twine
	rm -rf dist build/wheel
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) -m venv build/wheel
	@build/wheel/bin/python -m pip install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@build/wheel/bin/python -m pip install -q -c constraints.txt dist/*.whl
	cd build && wheel/bin/pipecat-qwen3 say "Hello there." -o wheel/hello.wav

samples: $(VENV)/installed ## the README's samples, into docs/samples
	@mkdir -p docs/samples
	@for voice in rms slt; do \
		$(PY) -m pipecat_qwen3 say --voice $$voice --seed 7 -o docs/samples/$$voice.wav \
			"Hello there. Your table for two is booked for half past seven. Is there anything else that I can do for you?"; \
	done

lint: $(VENV)/installed-dev ## ruff and pyright
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/installed-dev ## let ruff rewrite the code
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## remove what make made: the venvs, caches, build outputs; a voice in training stays
	[ ! -d build ] || find build -mindepth 1 -maxdepth 1 ! -name voice -exec rm -rf {} +
	rm -rf $(VENV) .parity dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# -- the virtual environment; the stamps spare a second call all of pip ---------------------------------------------

SUITS = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# a variable, since a comma would end an argument of $(call …)
FOR_TESTS = dev,server,bench,bots
PIP_INSTALL = $(PY) -m pip install -q -c constraints.txt

# $(call quietly,what is installed,command): pip's noise is shown only if it fails
define quietly
@echo "installing $(1) into $(VENV)" >&2
@$(2) >$(VENV)/pip.log 2>&1 || { tail -n 30 $(VENV)/pip.log >&2; \
	echo "could not install $(1): see the lines above, or $(VENV)/pip.log" >&2; exit 1; }
endef

$(PY):
	@free=$$(df -Pk "$$(dirname $(VENV))" | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	if [ "$$free" -lt $(NEEDED_GB) ]; then \
		echo "$(VENV) needs about $(NEEDED_GB) GB (3 with TORCH_INDEX=an index of CPU wheels), but $$free GB are free;" \
			"make room, or set VENV=/elsewhere" >&2; exit 1; \
	fi; \
	for python in $$PYTHON python3.13 python3.12 python3.11 python3; do \
		if "$$python" -c '$(SUITS)' 2>/dev/null; then \
			echo "making $(VENV) with $$("$$python" -V); this takes a few minutes, once" >&2; exec "$$python" -m venv --clear $(VENV); \
		fi; \
	done; \
	case $$(uname -s) in Darwin) fix="brew install python@3.13" ;; *) fix="sudo apt-get install python3 python3-venv" ;; esac; \
	echo "no Python 3.11 to 3.13 with its venv module was found; install one ($$fix) or set PYTHON=/path/to/python" >&2; exit 1

$(VENV)/installed: pyproject.toml constraints.txt | $(PY)
	@$(PY) -m pip -V >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	$(call quietly,torch,$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch)
	$(call quietly,pipecat-qwen3 and what it needs,$(PIP_INSTALL) -e .)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(call quietly,the test tools,$(PIP_INSTALL) -e '.[$(FOR_TESTS)]')
	@touch $@

$(VENV)/installed-training: $(VENV)/installed
	$(call quietly,what training needs,$(PIP_INSTALL) -e '.[training]')
	@touch $@
