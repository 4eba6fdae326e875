# What is measured of the server over HTTP (see docs/bench.md); each within five minutes or so on two cores.
SERVING := benchmarks/serving
GUIDELLM_OPTIONS ?=
SOAK_OPTIONS ?=

.PHONY: bench-serving bench-guidellm check-clients soak

bench-serving: $(VENV)/.installed-dev
	$(BENCH) serve --policies full,pyramidinfer,pyramid --kv-memory 16MiB --requests 48 \
		--rates 2,4,8,16,inf --json $(RESULTS)/bench_serve.json
	$(BENCH) turns --conversations 10 --json $(RESULTS)/bench_turns.json
	$(BENCH) turns --conversations 10 --prompt-len 3000 --json $(RESULTS)/bench_turns_long.json
	mv $(RESULTS)/bench_serve.png $(RESULTS)/bench_turns*.png docs/images/
	$(MAKE) pages

# An independent load generator, in an environment of its own, against the same server.
bench-guidellm: .peers/guidellm/.tried $(VENV)/.installed-dev
	$(BIN)/pyramidinfer fetch smollm2
	$(BIN)/python $(SERVING)/drive_guidellm.py --environment .peers/guidellm --model smollm2 \
		--kv-memory 128MiB --prompt-len 256 --output-len 32 --rates 1,2,4 \
		--json $(RESULTS)/guidellm.json $(GUIDELLM_OPTIONS)
	$(MAKE) pages

# Agent frameworks, chat front ends and a proxy, in an environment of their own, against the same server.
#   make check-clients CLIENTS_OPTIONS="--only llm,litellm"
CLIENTS_OPTIONS ?=

check-clients: .peers/clients/.tried $(VENV)/.installed-dev
	$(BIN)/pyramidinfer fetch smollm2
	$(BIN)/python $(SERVING)/check_clients.py --environment .peers/clients \
		--json $(RESULTS)/clients.json $(CLIENTS_OPTIONS)
	$(MAKE) pages

soak: $(VENV)/.installed-dev
	$(BIN)/pyramidinfer bench soak --json $(RESULTS)/soak.json $(SOAK_OPTIONS)
