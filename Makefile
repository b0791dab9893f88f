# nodeplane: every target says what it does in `make help`. setup needs root once, for Debian's packages.
SHELL := /bin/bash
PY := .venv/bin/python
TIMEOUT ?= 1500

.PHONY: help setup demo test check lab bench bench-full test-c golden explore clean
help: ## what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

setup: .venv/.done ## install Debian's packages (packages.txt) and the program into .venv

.venv/.done: pyproject.toml packages.txt $(wildcard setup.py packetpath/Makefile packetpath/*/*.[ch])
	@want=$$(sed 's/#.*//' packages.txt); missing=$$(for p in $$want; do dpkg -s $$p 2>/dev/null | grep -q '^Status: install ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing Debian packages:" $$missing; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
	@echo "installing nodeplane into .venv"
	@[ -x $(PY) ] || /usr/bin/python3 -m venv --system-site-packages .venv
	@.venv/bin/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup ## three nodes, nine pods, a Service, one packet explained; about a minute, leaves nothing
	@.venv/bin/nodeplane lab demo

test: setup ## every test: unit, golden, property, kernel
	@timeout $(TIMEOUT) $(PY) -m pytest -q

check: setup ## what CI runs before the tests: ruff, mypy strict, import-linter
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports --no-cache

lab: setup ## bring up the default lab and leave it running; `.venv/bin/nodeplane lab down` takes it away
	@.venv/bin/nodeplane lab up

bench: setup ## every benchmark, as JSON, plots and one page in bench/results/
	@.venv/bin/nodeplane bench

bench-full: setup ## the same, with IPVS in a virtual machine: some minutes more
	@failed=0; .venv/bin/nodeplane bench || failed=1; .venv/bin/nodeplane bench ipvs-in-vm || failed=1; exit $$failed

test-c: setup ## the packet path in C under sanitizers: random packets, and ten minutes of mutated ones (SECONDS=600)
	@$(MAKE) -C packetpath check fuzz

golden: setup ## write the golden files again; review the diff
	@GOLDEN=write $(PY) -m pytest -q tests/golden

explore: setup ## the property tests with new random examples instead of the usual ones
	@EXPLORE=1 $(PY) -m pytest -q tests/property

clean: ## remove what setup made
	rm -rf .venv build *.egg-info
