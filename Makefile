# The project's commands. `make` says what there is. Everything that is built goes into .venv and build/.
#
#   make demo    set up, then run the bookshop in a mesh: numbers, identities, and a proof
#   make test    set up, then lint, types, import contracts and every test
#   make lint    set up, then ruff, mypy and import-linter only
#   make bench   set up, then measure the data path beside a direct connection and a pair of Envoys
#                (BENCH="..." are arguments of `python -m perf`; perf/README.md has them)
#
#   make cluster       a Kubernetes of two nodes with the project's images, for developers; make cluster-down ends it
#                      (LAB=name; tests use it when AMBIENT_LAB=name is set; tests/kube/README.md has more)
#
# Needs: Linux, Python 3.11 or newer with venv. The tests and benchmarks also need root, and real programs as peers
# (see PROGRAMS); on Debian and Ubuntu they are installed as needed when run as root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
BIN := $(VENV)/bin
# Its build backend's warnings about editable installs tell a newcomer nothing.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --quiet
export PATH := $(PATH):/usr/sbin:/sbin

# The newest interpreter of at least 3.11 that works; PYTHON=... chooses another.
PYTHON ?= $(shell for candidate in python3.13 python3.12 python3.11 python3 python; do \
	$$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$candidate; break; }; done)

# program:package, for what the tests talk to
PROGRAMS := nginx:nginx-light wrk:wrk iperf3:iperf3 ncat:ncat nghttp:nghttp2-client nghttpd:nghttp2-server \
	nghttpx:nghttp2-proxy h2load:nghttp2-client nft:nftables curl:curl ip:iproute2 ss:iproute2 openssl:openssl \
	dig:bind9-dnsutils setpriv:util-linux postgres:postgresql conntrack:conntrack etcd:etcd-server containerd:containerd \
	runc:runc /usr/lib/cni/ptp:containernetworking-plugins gcc:gcc /usr/include/stdio.h:libc6-dev ps:procps
BENCH_PROGRAMS := nginx:nginx-light wrk:wrk iperf3:iperf3

JOBS ?= 2
PYTEST ?= -n $(JOBS) --dist loadscope

LAB ?= dev

.PHONY: help demo test lint bench programs bench-programs kubernetes cluster cluster-down clean

help:
	@awk '/^#/ { sub(/^# ?/, ""); print; next } { exit }' Makefile

demo: $(VENV)/.demo
	@$(BIN)/ambient demo

# What takes longest when it is not there yet, building Kubernetes, begins while the checks run.
test: $(VENV)/.test programs
	@$(BIN)/python -m tests.kube.binaries --begin
	@$(MAKE) --no-print-directory lint kubernetes
	@echo "tests"
	@$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.test
	@echo "ruff";           $(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	@echo "mypy";           $(BIN)/mypy
	@echo "import-linter";  $(BIN)/lint-imports

bench: $(VENV)/.bench bench-programs
	@$(BIN)/python -m perf $(BENCH)

$(BIN)/python:
	@if [ "$$(uname -s)" != Linux ]; then echo "error: needs Linux: network namespaces and nftables" >&2; exit 1; fi
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer with the venv module found;" \
			"install one (Debian: apt-get install python3 python3-venv) or say PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi
	@echo "setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PIP) install --upgrade pip

# A file a set of packages: set up again when pyproject.toml changed.
$(VENV)/.demo: $(BIN)/python pyproject.toml
	@echo "installing the project"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	@echo "installing the project and what its tests need"
	@$(PIP) install --editable '.[test]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(BIN)/python pyproject.toml
	@echo "installing the project and what its benchmarks need"
	@$(PIP) install --editable '.[bench]'
	@touch $@ $(VENV)/.demo

kubernetes: $(VENV)/.test
	@$(BIN)/python -m tests.kube.binaries >/dev/null

cluster: $(VENV)/.test programs
	@$(BIN)/python -m tests.kube.lab up --name $(LAB)

cluster-down: $(VENV)/.test
	@$(BIN)/python -m tests.kube.lab down --name $(LAB)

programs:
	@tests/programs.sh $(PROGRAMS)

bench-programs:
	@tests/programs.sh $(BENCH_PROGRAMS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
