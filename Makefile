# What a newcomer needs: `make demo`, then `make test`. Everything is cached: a second run is quick.
# The work is done by cargo and by the scripts in .ci/; this file only names the entrances.

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-hardware lint fuzz-smoke bench counts image packages

CARGO ?= cargo

help: ## Lists these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: packages ## Runs a program in a guest that a warm pool hands out, and shows the time of each phase
	@.ci/demo

test: packages ## Runs all checks and tests of the CI tier: at most 30 minutes from nothing
	@.ci/test short

test-long: packages ## Runs the tests that take longer
	@.ci/test long

test-hardware: packages ## Runs the tests on hardware KVM, which QEMU emulates: hours; PART='pool/6.12/*' runs some of them
	@.ci/hardware/test $(if $(PART),'$(PART)')

lint: ## Checks formatting, clippy and the documentation
	@.ci/test lint

fuzz-smoke: ## Runs each fuzz target for a few seconds; needs a nightly compiler
	@.ci/fuzz-smoke

bench: packages ## Measures everything for some minutes and writes the figures into README.md; QEMU=PATH, FIRECRACKER=PATH add peers
	@$(CARGO) run --quiet --locked --release --package hearth-bench -- all \
		$(if $(QEMU),--qemu $(QEMU)) $(if $(FIRECRACKER),--firecracker $(FIRECRACKER))
	@$(CARGO) run --quiet --locked --release --package hearth-bench -- figures bench-results/results.json README.md

counts: packages ## Compares instruction counts of the hot paths with benches/counts.txt; needs valgrind
	@.ci/counts || [ $$? = 77 ]

image: packages ## Builds the guest's kernel and initramfs, unless they are cached
	@$(CARGO) run --quiet --locked --package hearth-pool --features cli -- image build base

packages: ## Installs the Debian packages that the builds need, unless they are there
	@.ci/packages
