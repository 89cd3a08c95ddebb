# holdfast: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# .ci/setup unpacks a Go toolchain into .cache/go when the machine has none.
export PATH := $(CURDIR)/.cache/go/bin:$(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin
export GOTOOLCHAIN := local

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
BUILD = CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)

# The layers of `make test`, in the order in which they run: a name, a budget in
# seconds on two cores with warm caches, where temporary files lie (memory: the
# layer simulates its disks, and a flush proves nothing), flags of go test, and
# the packages: an extended regular expression over import paths. A package
# belongs to the first layer that matches it; `rest` is whatever no other layer
# claims, so a new package is never forgotten. A layer over its budget is
# reported, not cut.
define LAYERS
pure      140  disk   -      rest
engine    420  memory -race  ^holdfast/(engine|metadata|api)(/|$$)
templates 400  disk   -race  ^holdfast/templates(/|$$)
vm        500  disk   -      ^holdfast/(internal/guest|internal/vmtest|blockdev/lvm|.*guesttest)(/|$$)
kernel    260  disk   -      ^holdfast/(blockdev|internal/sys|internal/sandbox)(/|$$)
powercut   60  disk   -      ^holdfast/internal/powercut(/|$$)
sdk       130  disk   -      ^holdfast/.*sdk
browser    50  disk   -      ^holdfast/.*browsertest
e2e       360  disk   -      ^holdfast/cmd/
endef
export LAYERS

.PHONY: help setup build test test-vm lint demo demo-vm bench bench-io clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10

setup: ## install what is missing (apt; a Go toolchain into .cache/go)
	@.ci/setup all

build: ## bin/holdfastd, bin/holdfast, bin/holdfast-blockd and bin/holdfast-guest
	@mkdir -p bin
	$(BUILD) -o bin/holdfastd ./cmd/holdfastd
	$(BUILD) -o bin/holdfast ./cmd/holdfast
	$(BUILD) -o bin/holdfast-blockd ./cmd/holdfast-blockd
	$(BUILD) -o bin/holdfast-guest ./cmd/holdfast-guest

test: ## everything that this machine can run; LAYER="pure engine" for some
	@.ci/test $(LAYER)

test-vm: ## the tests that run in guests (QEMU), alone
	@.ci/test vm

lint: ## gofmt, go vet, go.mod, golangci-lint, shellcheck
	@.ci/lint

demo: ## install what is missing, build, and show the whole job once
	@.ci/setup run
	@$(MAKE) --no-print-directory build
	@$(SUDO) bin/holdfast demo

demo-vm: ## the same with virtual machines: plug in, write, grow, unplug, plug in elsewhere
	@.ci/setup vm
	@$(MAKE) --no-print-directory build
	@$(SUDO) env "PATH=$$PATH" bin/holdfast demo --vm

bench: build ## measure what is claimed; writes a report
	@$(SUDO) bin/holdfast bench lifecycle --out docs
	@$(SUDO) bin/holdfast bench attach --out docs
	@$(SUDO) bin/holdfast bench templates --out docs
	@$(SUDO) env "PATH=$$PATH" bin/holdfast bench vm --out docs
	@$(SUDO) env "PATH=$$PATH" bin/holdfast bench lvm --out docs

bench-io: build ## measure the I/O path beside its peers; writes docs/performance.md's tables and charts
	@.ci/setup vm
	@$(SUDO) env "PATH=$$PATH" bin/holdfast bench io --missed-ok --out docs
	@$(SUDO) env "PATH=$$PATH" bin/holdfast bench io --guest --out docs
	@$(SUDO) env "PATH=$$PATH" bin/holdfast bench overlay --missed-ok --out docs
	@$(SUDO) env "PATH=$$PATH" bin/holdfast bench worker --missed-ok --out docs
	@$(SUDO) bin/holdfast bench page docs

clean: ## remove what was built
	rm -rf bin .cache/bin
