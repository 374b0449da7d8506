# Two commands on a fresh Debian 12: `make demo` and `make test`. Both install what they need.
PYTHON ?= $(shell test -x /usr/bin/python3 && echo /usr/bin/python3 || echo python3)
BIN    := .venv/bin
PYTEST := $(BIN)/pytest

APT_BUILD := clang llvm libbpf-dev libbpf1 make python3-venv
APT_TEST  := gcc libc6-dev
# The receiver: a real proxy, certificates, a file system whose power can be cut.
APT_TEST  += nginx-light openssl e2fsprogs
# The testbed: systemd and Slurm in namespaces of their own.
APT_TEST  += systemd dbus iproute2 util-linux slurmctld slurmd slurm-client munge
APT_TEST  += iptables iproute2 openssl util-linux
APT_TEST  += nginx-light openssl e2fsprogs
# A state that several hosts share.
APT_TEST  += postgresql-15
# A lossy link, certificates.
APT_TEST  += iptables openssl
# `vagrant validate`; `make test-vm`.
APT_TEST  += vagrant
APT_VM    := qemu-system-x86 debootstrap e2fsprogs busybox-static user-mode-linux
APT_BENCH := acct bpftrace libbpf-tools

# Installs the packages that are missing, and says so only then.
apt = @missing=$$(for p in $(1); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing:" $$missing; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; fi

.PHONY: help setup demo test lint bench soak test-vm clean
help:
	@grep -E '^## ' Makefile | sed 's/^## //'

## setup    install what is needed and make .venv
setup: apt-build $(BIN)/.installed
.PHONY: apt-build apt-test
apt-build:
	$(call apt,$(APT_BUILD))
apt-test:
	$(call apt,$(APT_TEST))

$(BIN)/.installed: pyproject.toml hatch_build.py | apt-build
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[receiver,aggregator,postgresql,dask,dev]'
	touch $@

# Objects are rebuilt when a source changed; the wheel's build hook does the same.
bpf-objects: $(BIN)/.installed
	@$(BIN)/python hatch_build.py >/dev/null
.PHONY: bpf-objects

## demo     a real job through collector, receiver, aggregator, to a report
demo: setup apt-test bpf-objects
	$(BIN)/python -m bench.demo

## lint     ruff and mypy
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## test     everything that CI runs
test: setup apt-test bpf-objects lint
	$(PYTEST)

## bench    benchmarks, written to docs/benchmarks.md (BENCH="name …": only these)
.PHONY: apt-bench
apt-bench:
	$(call apt,$(APT_BENCH))
bench: setup apt-test apt-bench bpf-objects
	PYTHONPATH=tests/support $(BIN)/python -m bench $(BENCH)

## soak     the long repetitions: hours, and to be run before a release (SOAK="path -k …": only these)
soak: setup apt-test bpf-objects
	$(PYTEST) -m soak --timeout 3600 --durations 0 --durations-min 1 $(SOAK)

## test-vm  boot the kernels of vagrant/kernels.yaml, write docs/kernels.md (VM="row …": only these)
.PHONY: apt-vm
apt-vm:
	$(call apt,$(APT_VM))
test-vm: setup apt-vm bpf-objects
	$(BIN)/python vagrant/vm.py $(VM)
