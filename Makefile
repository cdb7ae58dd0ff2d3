# `make bench` and `make test` are all a fresh machine needs; CONTRIBUTING.md explains the rest.
PYTHON      ?= python3
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
TRITON      ?= triton==3.6.0
RESULTS     ?= benchmarks/results
ARGS        ?=

VENV := .venv
RUN  := $(VENV)/bin/python

.PHONY: bench test lint extension sanitize clean
.DELETE_ON_ERROR:

bench: extension
	$(RUN) -m fastlm bench --out $(RESULTS) $(ARGS)

# A second process runs on another core: Triton's kernels, interpreted, for Triton reads TRITON_INTERPRET when it is
# imported, then CUDA's, emulated.
SECOND := tests/test_cuda_sources.py
test: extension
	@{ TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/test_ops.py tests/cases -k triton $(ARGS); failed=$$?; \
		$(RUN) -m pytest $(SECOND) $(ARGS) || failed=1; exit $$failed; } > build/second.log 2>&1 & second=$$!; \
	$(RUN) -m pytest --ignore $(SECOND) $(ARGS); failed=$$?; \
	wait $$second || failed=1; echo "Triton's kernels, interpreted, and CUDA's, emulated:"; cat build/second.log; exit $$failed

lint: $(VENV)/installed
	$(RUN) -m ruff check .

# On a machine with a GPU: no network, no pip, the Python that is there. Each stage is a target of its own, for machines
# that are lent for minutes: what tells most comes first, has its own limit of time, and fails without the next ones.
# SHARDS processes compile Triton's kernels side by side. The sanitizer sees small layers.
SHARDS     ?= 14
GPU_STAGES := gpu-cudnn gpu-exchange gpu-recurrent gpu-sanitize gpu-parity gpu-bench
SMALL      := tests/cases/test_recurrent.py -q --device cuda -k
.PHONY: gpu-check gpu-build $(GPU_STAGES)
gpu-check: gpu-build
	$(MAKE) -k $(GPU_STAGES)

gpu-build:
	FASTLM_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace

gpu-cudnn: gpu-build
	PYTHONPATH=. timeout 120 $(PYTHON) benchmarks/cudnn_rnn.py $(RESULTS)

# Each way to exchange on small layers, in a process of its own that ends even where a kernel waits for ever; then both
# against each other, but for one that failed.
gpu-exchange: gpu-build
	right=; for way in grid cluster; do timeout 90 $(PYTHON) -m pytest $(SMALL) "test_exchange and $$way" && \
		right="$$right $$way"; done; \
		PYTHONPATH=. timeout 180 $(PYTHON) benchmarks/cuda_exchange.py $(RESULTS) $$right && test "$$right" = " grid cluster"

gpu-recurrent: gpu-build
	timeout 300 $(PYTHON) -m fastlm bench --suite rnn-cuda --device cuda --every --out $(RESULTS)

gpu-sanitize: gpu-build
	if command -v compute-sanitizer; then for tool in memcheck synccheck racecheck; do timeout 180 \
		compute-sanitizer --tool $$tool --kernel-name kns=fastlm --error-exitcode 1 $(PYTHON) -m pytest $(SMALL) test_exchange || exit 1; done; fi

gpu-parity: gpu-build
	seq $(SHARDS) | xargs -P $(SHARDS) -I{} $(PYTHON) -m pytest tests/test_ops.py tests/test_nn.py tests/cases \
		--device cuda --shard {}/$(SHARDS) $(ARGS)

gpu-bench: gpu-build
	for suite in head norms attention; do \
		timeout 300 $(PYTHON) -m fastlm bench --suite $$suite --device cuda --every --out $(RESULTS) || failed=1; done; \
		test -z "$$failed"
	$(PYTHON) -m fastlm bench --device cuda --every --full --out $(RESULTS)

extension: $(VENV)/installed
	@$(RUN) setup.py -q build_ext --inplace

# The C++ kernels under the address and undefined-behaviour sanitizers, on the parity matrix, beside the usual build;
# those for AMX by emulation.
sanitize: extension
	rm -rf build/sanitize
	FASTLM_CUDA=0 FASTLM_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" \
		FASTLM_LDFLAGS="-fsanitize=address,undefined" $(RUN) setup.py -q build_ext --build-lib build/sanitize
	cp -rn fastlm build/sanitize/
	cd build/sanitize && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=.:../.. $(abspath $(RUN)) -m pytest ../../tests/test_ops.py ../../tests/cases/test_nn_steps.py \
		../../tests/cases/test_recurrent.py ../../tests/cases/test_recurrent_cpu.py -k "(error_rule and native) or (not compiled and not opcheck and \
		(test_cell or test_stream or recurrent))" $(ARGS)
	$(RUN) -m pytest tests/test_amx_sources.py --deep $(ARGS)

# A virtual environment of our own; no other environment is touched.
$(VENV)/installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastlm needs Python 3.10 or newer: apt-get install python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing Python's venv module: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "missing Python's headers: apt-get install python3-dev"; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || { echo "missing a C++ compiler: apt-get install g++"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install -q $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install -q $(TRITON) || echo "no Triton for this platform: its tests will be skipped"
	$(RUN) -m pip install -q "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	$(RUN) -m pip install -q --no-build-isolation -e '.[all,test]'
	@touch $@

clean:
	rm -rf build dist *.egg-info fastlm/*.so fastlm/_build.json .ruff_cache
	find fastlm tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
