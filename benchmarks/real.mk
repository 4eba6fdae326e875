# Real models and real tasks: the numbers that docs/numbers.md begins with.
#
# `make numbers-real` takes some hours on two cores; `make numbers-real SAMPLES=4` under one.
# What was begun and interrupted goes on where it stopped. `make models` fetches the models.
SAMPLES_REAL := $(if $(filter command environment,$(firstword $(origin SAMPLES))),$(SAMPLES),20)
REAL_STUDY := $(BIN)/pyramidinfer study
REAL_WORKERS ?= 2
REAL_RUN = --samples $(SAMPLES_REAL) --workers $(REAL_WORKERS)
#: The rivals, each as published but for its budget.
RIVALS := full,pyramid,pyramidinfer,snapkv,pyramidkv,h2o,tova
#: `pyramid` with nothing dropped between layers, and with a late start, on a model of 30 layers.
WHOLE := start_layer=29
LATE := start_layer=14,propagate_ratio=.2
NEEDLE := --model smollm2 --tasks niah_single_2 --protocols inside

.PHONY: numbers-real numbers-trials numbers-heads numbers-decode numbers-selection numbers-kv-dtype

# Trials on one needle: what loses the answer, and what brings it back.
numbers-trials: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(REAL_STUDY) ruler $(NEEDLE) --lengths 1000 $(REAL_RUN) --json $(RESULTS)/trial_1000.json --policies "full \
		snapkv:keep=.3 h2o:keep=.3 pyramidkv:keep=.3 tova:keep=.3 $(foreach k,7 15 31,pyramid:keep=.3,$(WHOLE),kernel=$(k)) \
		$(foreach l,22 18 14 10,pyramid:keep=1,start_layer=$(l),propagate_ratio=.2,kernel=7) \
		pyramid:keep=1,$(LATE),kernel=31"
	$(REAL_STUDY) ruler $(NEEDLE) --lengths 2000 $(REAL_RUN) --json $(RESULTS)/trial_2000.json --policies "full \
		pyramid:keep=.45 pyramid:keep=.6 pyramidinfer:keep=.6 pyramidinfer:keep=.45 snapkv:keep=.45 snapkv:keep=.25 \
		$(foreach k,.45 .25 .15,pyramid:keep=$(k),$(LATE),kernel=31) \
		pyramid:keep=.1,start_layer=14,propagate_ratio=.1,kernel=31 \
		$(foreach l,10 6,pyramid:keep=.25,start_layer=$(l),propagate_ratio=.2,kernel=31)"
	$(REAL_STUDY) ruler --model smollm2 --tasks niah_multikey_1 --protocols inside --lengths 1000 $(REAL_RUN) \
		--json $(RESULTS)/trial_four.json --policies "full pyramid:keep=.25,$(LATE),kernel=31 \
		pyramid:keep=.25,$(WHOLE),kernel=31 pyramid:keep=.5,start_layer=18,propagate_ratio=.3,kernel=31 \
		snapkv:keep=.5"
	$(REAL_STUDY) ruler --model smollm2 --tasks niah_single_2 --protocols after --lengths 1000 $(REAL_RUN) \
		--json $(RESULTS)/trial_after.json --policies "full pyramid:keep=.6,$(WHOLE),kernel=31 \
		pyramid:keep=.45,$(LATE),kernel=31 snapkv:keep=.6"
	rm -f $(RESULTS)/trial_*.png

comma := ,

# Policies and bits on one axis: bytes.  The committed result was made with SAMPLES=4.
numbers-kv-dtype: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(REAL_STUDY) ruler --model smollm2 --dtype bfloat16 $(REAL_RUN) --kv-dtypes auto,int8,int4 \
		--tasks niah_single_2,niah_single_3,niah_multikey_1 --policies "full pyramid:keep=.5 \
		pyramid:keep=.42 pyramid:keep=.22 pyramid:keep=.11 duo:keep=.5" \
		--json $(RESULTS)/kv_dtype_ruler.json
	mv $(RESULTS)/kv_dtype_ruler.png docs/images/
	rm -f $(RESULTS)/kv_dtype_ruler_tasks.png
	$(MAKE) pages

# Tasks with quantized weights.  The committed results were made with SAMPLES=6.
EASY := niah_single_2,niah_single_3,niah_multivalue,niah_multiquery
WEIGHTS := --policies full --dtype bfloat16 --weights auto,int8,int4,gguf --lengths 600 --protocols inside

.PHONY: numbers-weights
numbers-weights: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(REAL_STUDY) ruler --model smollm2 $(WEIGHTS) --tasks $(EASY) $(REAL_RUN) \
		--json $(RESULTS)/weights_tasks_smollm2.json
	$(BIN)/pyramidinfer fetch gemma3-270m
	$(REAL_STUDY) ruler --model gemma3-270m $(WEIGHTS) --tasks niah_single_1,niah_single_2,niah_multivalue \
		$(REAL_RUN) --json $(RESULTS)/weights_tasks_gemma3.json
	rm -f $(RESULTS)/weights_tasks_*.png
	$(MAKE) pages

# Heads with lengths of their own: `duo` on the tasks that the full cache can do, and on one needle.
CAN_DO := niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue,niah_multiquery,fwe
DUO := full $(foreach k,.3 .2 .5 .12,pyramid:keep=$(k)) duo:keep=.2,spare=.1 duo:keep=.3,spare=.1 duo:keep=.5,spare=.1 snapkv:keep=.3 \
	pyramidinfer:keep=.45
LATER := full $(foreach k,.3 .2 .1,kvzip:keep=$(k)) $(foreach k,.3 .2,expected_attention:keep=$(k)) \
	keydiff:keep=.3 chunkkv:keep=.3 pyramid:keep=.2
CHATS := full pyramid:keep=.5 pyramid:keep=.3 duo:keep=.5,spare=0 duo:keep=.3,spare=0 duo:keep=.5,spare=.1 duo:keep=.3,spare=.1

numbers-heads: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(REAL_STUDY) ruler --model smollm2 --tasks $(CAN_DO) --lengths 2000 $(REAL_RUN) \
		--json $(RESULTS)/heads_ruler.json --policies "$(DUO)"
	$(REAL_STUDY) ruler --model smollm2 --tasks niah_single_2 --protocols after --lengths 1000 $(REAL_RUN) \
		--json $(RESULTS)/heads_needle.json --policies "full \
		$(foreach k,.5 .3 .2 .12,duo:keep=$(k),spare=.1)"
	$(REAL_STUDY) ruler --model smollm2 --tasks $(CAN_DO) --protocols after --lengths 2000 $(REAL_RUN) \
		--json $(RESULTS)/heads_spare.json --policies "full $(foreach k,.5 .3 .2,duo:keep=$(k)$(comma)spare=0)"
	$(REAL_STUDY) ruler --model smollm2 --tasks $(CAN_DO) --lengths 2000 $(REAL_RUN) \
		--json $(RESULTS)/calibrated_ruler.json --policies "full \
		$(foreach k,.5 .3 .2,pyramid:keep=$(k)$(comma)start_layer=23$(comma)propagate_ratio=.2)"
	$(REAL_STUDY) ruler --model smollm2 --tasks $(CAN_DO) --protocols after --lengths 1000 $(REAL_RUN) \
		--json $(RESULTS)/later_ruler.json --policies "$(LATER)"
	mv $(RESULTS)/later_ruler*.png docs/images/
	$(REAL_STUDY) turns --model smollm2 --policies "$(CHATS)" $(REAL_RUN) --json $(RESULTS)/heads_turns.json
	$(REAL_STUDY) turns --model smollm2 --policies "full pyramid:keep=.5 pyramid:keep=.3" --compress-idle $(REAL_RUN) \
		--json $(RESULTS)/heads_turns_idle.json
	rm -f $(RESULTS)/heads_needle*.png $(RESULTS)/heads_spare*.png $(RESULTS)/calibrated_ruler*.png
	mv $(RESULTS)/heads_*.png docs/images/

# A text read again, in both protocols; chats under other methods; a model with sliding windows.
NEEDLES := niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue
CUT := ,pin_prompt=False
TALKS := full kvzip:keep=.5 kvzip:keep=.3 $(foreach p,expected_attention keydiff chunkkv rkv snapkv,$(p):keep=.5) \
	triattention:keep=.5$(CUT)
KEYS := full kvzip:keep=.2 expected_attention:keep=.3 expected_attention:keep=.1 \
	$(foreach p,keydiff chunkkv rkv,$(p):keep=.3)

#: Every method at one budget, and three at equal bytes with 8 bits.
ALL := full $(foreach p,expected_attention keydiff chunkkv rkv kvzip pyramid duo snapkv tova h2o pyramidkv fastkv \
	scissorhands streaming_llm pyramidinfer triattention,$(p):keep=.3)
BITS := $(foreach p,kvzip pyramid duo,$(foreach k,.19 .38 .57,$(p):keep=$(k)))
FRESH := --dtype bfloat16 --lengths 2000 --seed 1

.PHONY: numbers-methods
numbers-methods: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(REAL_STUDY) ruler --model smollm2 --tasks $(NEEDLES) --lengths 2000 $(REAL_RUN) \
		--json $(RESULTS)/methods_ruler.json --policies "full kvzip:keep=.3 kvzip:keep=.1"
	$(REAL_STUDY) turns --model smollm2 --policies "$(TALKS)" $(REAL_RUN) --json $(RESULTS)/methods_turns.json
	$(REAL_STUDY) turns --model smollm2 --policies "full triattention:keep=.5" $(REAL_RUN) \
		--json $(RESULTS)/pinned_turns.json
	$(REAL_STUDY) ruler --model smollm2 --tasks niah_single_2,niah_single_3,niah_multikey_1 --lengths 2000 \
		$(REAL_RUN) --json $(RESULTS)/keys_ruler.json --policies "$(KEYS)"
	rm -f $(RESULTS)/keys_*.png
	mv $(RESULTS)/pinned_turns.png docs/images/
	$(REAL_STUDY) ruler --model smollm2 $(FRESH) --tasks $(NEEDLES) --protocols after --kv-dtypes int8 $(REAL_RUN) \
		--json $(RESULTS)/later_bits.json --policies "$(BITS)"
	$(REAL_STUDY) ruler --model smollm2 $(FRESH) --tasks $(NEEDLES) $(REAL_RUN) \
		--json $(RESULTS)/all_ruler.json --policies "$(ALL)"
	rm -f $(RESULTS)/later_bits_tasks.png
	mv $(RESULTS)/later_bits.png $(RESULTS)/all_ruler*.png docs/images/
	$(BIN)/pyramidinfer fetch gemma3-270m
	$(REAL_STUDY) ruler --model gemma3-270m $(FRESH) --tasks niah_single_1,niah_single_2,niah_multivalue \
		$(REAL_RUN) --json $(RESULTS)/gemma_quarter.json --policies "full pyramid:keep=.25 duo:keep=.25"
	rm -f $(RESULTS)/gemma_quarter*.png
	$(REAL_STUDY) ruler --model gemma3-270m --tasks niah_single_1,niah_single_2,niah_multivalue --lengths 2000 \
		$(REAL_RUN) --json $(RESULTS)/gemma_ruler.json --policies "full pyramid:keep=.5 duo:keep=.5"
	mv $(RESULTS)/methods_*.png $(RESULTS)/gemma_*.png docs/images/

# Methods that go on cutting while an answer grows.
DECODE := full rkv:keep=.5 triattention:keep=.5$(CUT) pyramid:keep=.5 h2o:keep=.5

numbers-decode: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(REAL_STUDY) long --model smollm2 --policies "$(DECODE)" $(REAL_RUN) --json $(RESULTS)/decode_long.json
	mv $(RESULTS)/decode_long.png docs/images/

# What choosing by keys or chunks costs, as a share of prefill.
numbers-selection: $(VENV)/.installed
	$(BIN)/pyramidinfer fetch smollm2
	$(BIN)/python -m pyramidinfer.lab.bench.selection_shares --json $(RESULTS)/selection_shares.json

# Everything about real models, then the pages.
BOTH := smollm2 gemma3-270m
HALF = $(shell expr $(SAMPLES_REAL) / 2)
LIKE := --workers $(REAL_WORKERS)
SHORT := --policies full,pyramid,pyramidinfer,snapkv --keeps .45,.15

numbers-real: models
	$(REAL_STUDY) ruler --model smollm2 --policies $(RIVALS) --keeps .45,.3,.15 --lengths 2000 \
		$(REAL_RUN) --json $(RESULTS)/ruler.json
	$(REAL_STUDY) ruler --model smollm2 --policies full,pyramid,pyramidinfer --keeps .45 --lengths 4000 \
		--samples $(HALF) $(LIKE) --json $(RESULTS)/ruler_long.json
	$(MAKE) numbers-trials SAMPLES=$(SAMPLES_REAL)
	$(MAKE) numbers-heads SAMPLES=$(SAMPLES_REAL)
	$(MAKE) numbers-weights SAMPLES=$(SAMPLES_REAL)
	$(MAKE) numbers-methods SAMPLES=$(SAMPLES_REAL)
	$(MAKE) numbers-decode SAMPLES=$(SAMPLES_REAL)
	$(MAKE) numbers-decode SAMPLES=$(HALF)
	for model in $(BOTH); do \
		$(REAL_STUDY) turns --model $$model $(SHORT) $(REAL_RUN) --json $(RESULTS)/turns_$$model.json && \
		$(REAL_STUDY) text --model $$model $(SHORT) $(REAL_RUN) --json $(RESULTS)/text_$$model.json && \
		$(REAL_STUDY) long --model $$model $(SHORT) --samples $(HALF) $(LIKE) --json $(RESULTS)/long_$$model.json && \
		$(REAL_STUDY) icr --model $$model --shares .1,.2,.5 --samples $(HALF) $(LIKE) --json $(RESULTS)/icr_$$model.json && \
		$(REAL_STUDY) rac --model $$model --samples $(HALF) $(LIKE) --json $(RESULTS)/rac_$$model.json && \
		$(REAL_STUDY) heads --model $$model $(LIKE) --json $(RESULTS)/heads_$$model.json || exit 1; \
	done
	$(BIN)/pyramidinfer demo --model smollm2 --out out/real
	cp out/real/demo.json $(RESULTS)/demo_real.json
	cp out/real/pyramid.png docs/images/demo_real.png
	mv $(RESULTS)/*.png docs/images/
	$(MAKE) pages
