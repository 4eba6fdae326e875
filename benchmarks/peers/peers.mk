# Engines to compare with, each in an environment of its own: .peers/NAME.  One that cannot be
# installed leaves .peers/NAME/failed.txt, and the comparison says so; remove the folder to try it
# again.
PEERS ?= transformers openvino kvpress llamacpp vllm
PEER_FILES := benchmarks/peers

.PHONY: peers bench-peers bench-peers-larger bench-kept

peers: $(PEERS:%=.peers/%/.tried)

.peers/%/.tried: $(PEER_FILES)/requirements/%.txt
	@sh $(PEER_FILES)/install.sh $* .peers/$* $(PYTHON) "$(TORCH)"
	@touch $@

# The same model and prompts on every engine at equal bits, one engine after the other (about half an
# hour on two cores).  An interrupted run goes on with  RESUME=--resume:
#   make bench-peers ONLY="ours; OpenVINO" BITS=8/8 WORKLOADS=C
SHAPE ?= smollm2
WORKLOADS ?= A,B,C
ONLY ?=
BITS ?=
THREADS ?= 2
RESUME ?=
PEER_OPTIONS ?=
PEER_RUN := $(BIN)/python -m pyramidinfer.lab.bench.peers

bench-peers: peers $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(PEER_RUN) --shape $(SHAPE) --workloads $(WORKLOADS) $(if $(ONLY),--only "$(ONLY)") \
		$(if $(BITS),--bits $(BITS)) --threads $(THREADS) $(RESUME) $(PEER_OPTIONS)
	$(MAKE) pages

# The same on random weights in the shape of a larger model, for one user and four
# (LARGER=llama3.2-1b: a larger one).
LARGER ?= qwen2.5-0.5b

bench-peers-larger: peers $(VENV)/.installed
	$(PEER_RUN) --shape $(LARGER) --workloads C,A=4x512+64 $(if $(ONLY),--only "$(ONLY)") \
		$(if $(BITS),--bits $(BITS)) --threads $(THREADS) $(RESUME) $(PEER_OPTIONS) \
		--json $(RESULTS)/peers_$(LARGER).json --picture docs/images/peers_$(LARGER).png
	$(MAKE) pages

# Which entries our methods keep, beside kvpress's own, on one text (two minutes).
bench-kept: .peers/kvpress/.tried $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(BIN)/python -m pyramidinfer.lab.bench.kept
	$(MAKE) pages
