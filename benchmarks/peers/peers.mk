# Engines to compare with, each in an environment of its own: .peers/NAME.  One that cannot be
# installed leaves .peers/NAME/failed.txt, and the comparison says so; remove the folder to try it
# again.
PEERS ?= transformers openvino kvpress llamacpp vllm
PEER_FILES := benchmarks/peers

.PHONY: peers bench-peers bench-kept

peers: $(PEERS:%=.peers/%/.tried)

.peers/%/.tried: $(PEER_FILES)/requirements/%.txt
	@sh $(PEER_FILES)/install.sh $* .peers/$* $(PYTHON) "$(TORCH)"
	@touch $@

# The same model and prompts on every engine, one after the other (about half an hour on two cores):
#   make bench-peers ONLY="ours; OpenVINO" WORKLOADS=A
WORKLOADS ?= A,B
ONLY ?=
THREADS ?= 2

bench-peers: peers $(VENV)/.installed
	$(BIN)/python -m pyramidinfer.lab.bench.peers --workloads $(WORKLOADS) --only "$(ONLY)" \
		--threads $(THREADS)

# Which entries our methods keep, beside kvpress's own, on one text (two minutes).
bench-kept: .peers/kvpress/.tried $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(BIN)/python -m pyramidinfer.lab.bench.kept
	$(MAKE) pages
