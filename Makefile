# The project's commands. `make run` and `make test` set up what they need; both can be repeated.
SHELL := /bin/bash
STATE ?=
HOST ?= 127.0.0.1
PORT ?= 8870
state_flag = $(if $(STATE),--state-dir $(STATE))

.PHONY: help setup run test unit check bench lock

help:
	@echo "make run     set everything up and start the gateway (HOST=, PORT=, STATE= to change where)"
	@echo "make test    set up what the tests need and run them"
	@echo "make unit    the tests of single modules; those of the gateway start machines: some ten minutes"
	@echo "make check   ruff, mypy --strict, import contracts"
	@echo "make bench   the measurements of the README"
	@echo "make setup   only the system packages and .venv"

setup:
	@tools/setup test

run:
	@tools/setup run
	@.venv/bin/hypercelld image build $(state_flag)
	@exec .venv/bin/hypercelld serve --host $(HOST) --port $(PORT) $(state_flag)

test: setup check
	@.venv/bin/hypercelld image build --state-dir .state/test
	@.venv/bin/python -m pytest

unit: setup
	@.venv/bin/python -m pytest tests/unit

check:
	@tools/setup run
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

bench:
	@tools/setup test
	@.venv/bin/python -m benchmarks $(state_flag)

lock:
	@.venv/bin/python -m pip install -q uv
	@.venv/bin/uv pip compile pyproject.toml sdk/pyproject.toml --all-extras --group test --group check --universal \
	    --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q -o requirements.lock
