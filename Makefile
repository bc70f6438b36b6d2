# `make help` lists the targets. Everything made goes to .bin, bench/out and Go's own caches.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
BIN := .bin
IMAGE ?= stepcache/stepcache:dev
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)

# The demo's scale: parallel steps, the large file's size, and how many steps the direct leg runs.
STEPS ?= 100
SIZE ?= 256MiB
DIRECT_STEPS ?= 100
DEMO_FLAGS ?=
TEST_FLAGS ?=
RUNNER_FLAGS ?=
E2E_FLAGS ?= -test.v -test.failfast -test.timeout $(if $(FULL),180m,60m)
# The bench's scale: SIZE too, where that is a word.
BENCH_SIZE := $(if $(filter small medium full,$(SIZE)),$(SIZE),full)
BENCH_FLAGS ?=
LAYERS_FLAGS ?=
LAYERS_FLAGS_small := --size 2MiB --files 20 --rounds 1
LAYERS_FLAGS_medium := --size 64MiB --files 1000 --rounds 3
LAYERS_FLAGS_full := --rounds 3

.DEFAULT_GOAL := help
.PHONY: help build demo test lint generate bench bench-peers image e2e cluster-up cluster-down clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(BIN)/stepcache ## the stepcache binary, in .bin

demo: $(BIN)/stepcache $(BIN)/demo $(BIN)/versitygw ## the main job on this machine: STEPS steps read one dataset, direct, cold and warm
	@$(BIN)/demo --stepcache $(BIN)/stepcache --versitygw $(BIN)/versitygw --steps $(STEPS) --size $(SIZE) --direct-steps $(DIRECT_STEPS) $(DEMO_FLAGS)

test: $(BIN)/versitygw $(BIN)/gotestsum ## every test, with the race detector
	@echo "an API server and etcd for the controllers' tests (built once, about ten minutes)"
	go test -timeout 60m ./controllers/envtest
	$(BIN)/gotestsum --format pkgname --format-hide-empty-pkg $(RUNNER_FLAGS) --packages ./... -- -race -timeout 30m $(TEST_FLAGS)

lint: $(BIN)/staticcheck ## gofmt, go vet and staticcheck
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$unformatted" ]; then echo "run gofmt -w on:"; echo "$$unformatted"; exit 1; fi
	go vet ./...
	$(BIN)/staticcheck ./...

generate: ## deepcopy, CustomResourceDefinitions, roles and the artifact wire, from the code
	go generate ./api/... ./artifact/...
	go tool -modfile=tools/generate/go.mod controller-gen rbac:roleName=stepcache-controller paths=./controllers/... output:rbac:dir=config/rbac

bench: $(BIN)/stepcache $(BIN)/versitygw $(BIN)/compare $(BIN)/layers ## this project beside its peers and native files, then its layers: SIZE=small|medium|full (bench/README.md)
	@status=0; \
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/compare --stepcache $(BIN)/stepcache --versitygw $(BIN)/versitygw --size $(BENCH_SIZE) $(BENCH_FLAGS) || status=$$?; \
	if [ $$status = 130 ]; then exit $$status; fi; \
	$(BIN)/layers --stepcache $(BIN)/stepcache --versitygw $(BIN)/versitygw $(LAYERS_FLAGS_$(BENCH_SIZE)) $(LAYERS_FLAGS) || status=$$?; \
	exit $$status

bench-peers: ## what `make bench` compares with and Go can build, in .bin (minutes); others are taken from the PATH
	@CGO_ENABLED=0 go -C tools/peers build -trimpath -ldflags '-s -w' -o ../../$(BIN)/rclone github.com/rclone/rclone
	@$(BIN)/rclone version | head -n 1
	@for p in s3fs geesefs mount-s3; do command -v $$p || echo "no $$p on the PATH"; done

image: $(BIN)/image ## an OCI image, in .bin/stepcache.tar, without Docker
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/linux/stepcache ./cmd/stepcache
	$(BIN)/image -binary $(BIN)/linux/stepcache -arch "$$(go env GOARCH)" -tag $(IMAGE) -o $(BIN)/stepcache.tar

cluster-up: $(BIN)/cluster ## a real Kubernetes cluster of three nodes on this machine (test/cluster/README.md)
	$(BIN)/cluster up

e2e: image $(BIN)/cluster ## a real cluster with Argo, end to end (FULL=1: a hundred steps, every fault; KUBECONFIG: a cluster to spare)
	CGO_ENABLED=0 go test -c -o $(BIN)/e2e.test ./test/e2e
ifdef KUBECONFIG
	cd test/e2e && STEPCACHE_E2E=$(or $(STEPCACHE_E2E),1) ../../$(BIN)/e2e.test $(E2E_FLAGS)
else
	$(BIN)/cluster up
	$(BIN)/cluster load-image $(BIN)/stepcache.tar
	cd test/e2e && STEPCACHE_E2E=1 ../../$(BIN)/cluster exec-in-lab ../../$(BIN)/e2e.test $(E2E_FLAGS)
endif

cluster-down: $(BIN)/cluster ## its end: nothing is left
	$(BIN)/cluster down

clean: ## remove what was built
	rm -rf $(BIN) bench/out

# Programs. Go's build cache decides what is out of date, so these rules always run it.
.PHONY: $(BIN)/stepcache $(BIN)/demo $(BIN)/cluster $(BIN)/compare $(BIN)/layers
$(BIN)/stepcache:
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/stepcache
$(BIN)/demo:
	@CGO_ENABLED=0 go build -trimpath -o $@ ./bench/demo
$(BIN)/compare $(BIN)/layers:
	@CGO_ENABLED=0 go build -trimpath -o $@ ./bench/$(@F)
$(BIN)/cluster:
	@CGO_ENABLED=0 go -C test/cluster build -o ../../$@ .
$(BIN)/versitygw: tools/bucket/go.mod
	@echo "building the S3 server of tests and demo (once, about a minute)"
	@CGO_ENABLED=0 go -C tools/bucket build -o ../../$@ github.com/versity/versitygw/cmd/versitygw
$(BIN)/staticcheck: tools/lint/go.mod
	@CGO_ENABLED=0 go -C tools/lint build -o ../../$@ honnef.co/go/tools/cmd/staticcheck
$(BIN)/gotestsum: tools/lint/go.mod
	@CGO_ENABLED=0 go -C tools/lint build -o ../../$@ gotest.tools/gotestsum
$(BIN)/image: tools/image/go.mod tools/image/main.go
	@CGO_ENABLED=0 go -C tools/image build -o ../../$@ .
