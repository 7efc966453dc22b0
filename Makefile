# A thin front door. `make` says what there is.
#
# From nothing on two cores `make test` takes about half an hour: two tools are built from source once and kept under
# target/ (cargo-deny, bpf-linker).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

export PATH := $(HOME)/.cargo/bin:$(PATH)

CARGO ?= cargo
# Arguments of `make demo` and `make bench`, for example ARGS=--once.
ARGS ?=
# Seconds for each fuzz target.
FUZZ_SECONDS ?= 60
# Where `make install` puts things, for packagers.
DESTDIR ?=

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

.PHONY: demo
demo: release ## build, then a small fleet and the gateway before it, with a request through both (ARGS=--once to end)
	target/release/gateway demo $(ARGS)

.PHONY: release
release: ## target/release/gateway and gateway-bench
	$(CARGO) build --release --locked --bin gateway --bin gateway-bench

.PHONY: install
install: ## put the release build, the unit and a first configuration in place (root; DESTDIR=)
	systemd/install.sh --destdir "$(DESTDIR)"

.PHONY: bench
bench: ## what the gateway costs, beside nginx and no proxy (ARGS="--rounds 1 --seconds 4")
	bench/run.sh $(ARGS)

.PHONY: bench-all
bench-all: release ## all targets that are installed and all scenarios, by turns (hours; ARGS="--window 5s")
	target/release/gateway-bench compare --targets all --scenarios all --rounds 3 $(ARGS)

.PHONY: bench-capacity
bench-capacity: release ## the highest rate that holds (ARGS="--scenario json-1k --p99 total=20ms --from 1000")
	target/release/gateway-bench capacity $(or $(ARGS),--scenario mixed --p99 ttft=1s --from 50)

.PHONY: bench-soak
bench-soak: release ## the mixed fleet for ten minutes: does anything grow? (ARGS="--duration 1h")
	target/release/gateway-bench soak $(ARGS)

.PHONY: bench-peers
bench-peers: ## install what the gateway is compared with (nginx, HAProxy, Envoy, LiteLLM, Portkey; under target/peers)
	bench/peers.sh

# The test command. Its parts are targets, in the order in which they fail fastest.
.PHONY: test
test: setup fmt-check layers lint build unit unit-epoll systemd-check systemd-boot ebpf-check deny instructions ## everything that CI runs
	@echo "test: ok"

.PHONY: setup
setup: ## install what the tests need and this machine lacks
	tests/setup.sh

.PHONY: fmt
fmt: ## format the source
	$(CARGO) fmt --all

.PHONY: fmt-check
fmt-check:
	$(CARGO) fmt --all --check

.PHONY: layers
layers: ## which folder may name what
	tests/layers.sh

.PHONY: lint
lint: ## clippy, warnings are errors
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

.PHONY: build
build:
	$(CARGO) build --workspace --locked

# A thousand streams are some thousand descriptors in the test's own process; 1024 is the usual soft limit.
.PHONY: unit
unit: ## the tests
	ulimit -Sn "$$(ulimit -Hn)" && $(CARGO) test --workspace --locked

# What passes through the data plane, once more without io_uring. `engine` and `streaming` run on both drivers by themselves.
EPOLL_TESTS := bodies disconnect failover failures fairness lifecycle limits limits_cut proxy sdk smuggling tls
.PHONY: unit-epoll
unit-epoll: ## the tests of the data plane on its portable driver
	ulimit -Sn "$$(ulimit -Hn)" && GATEWAY_TEST_DRIVER=epoll $(CARGO) test -p gateway --locked $(addprefix --test ,$(EPOLL_TESTS))

.PHONY: systemd-check
systemd-check: ## the unit: valid, and exposed no further than it needs
	systemd/check.sh

.PHONY: systemd-boot
systemd-boot: build ## the installed service under a systemd of its own: sandbox, reload, restart, end
	systemd/boot.sh

.PHONY: ebpf
ebpf: ## build gateway-ebpf/gateway.bpf.o from source
	gateway-ebpf/build.sh

# Elsewhere than on Debian as root the object's compiler cannot be installed; where it is there the check runs.
.PHONY: ebpf-check
ebpf-check: ## the committed eBPF object agrees with its source
	@if [ -x /usr/bin/rustc ] && [ -d /usr/lib/rustlib/bpfel-unknown-none ]; then gateway-ebpf/build.sh --check; \
	elif ! command -v apt-get >/dev/null; then echo "skipped: eBPF object against its source: no apt-get here"; \
	elif [ "$$(id -u)" -ne 0 ] && ! sudo -n true 2>/dev/null; then echo "skipped: eBPF object against its source: neither root nor sudo"; \
	else gateway-ebpf/build.sh --check; fi

.PHONY: deny
deny: ## licences, sources, doubled crates, advisories
	tests/deny.sh

.PHONY: instructions
instructions: ## the hot path's instruction counts against their baseline (perf/instructions.tsv)
	perf/instructions.sh --check

.PHONY: fuzz
fuzz: ## each fuzz target for FUZZ_SECONDS
	tests/fuzz.sh $(FUZZ_SECONDS)

.PHONY: clean
clean: ## remove what was built, the tools too
	rm -rf target fuzz/target
