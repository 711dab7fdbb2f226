# make demo     sets up .venv if needed, then classifies the held-out digits with the Triton kernels
# make test     adds the tests' tools to it if needed, then lint and the whole suite;
#               ARGS="-k conv2d" selects
# make lint     ruff and mypy alone
# make gate     the machine code's tests on another Triton: make gate TRITON=3.6.0
# make codegen  compiles all that the kernels' lists of tiles can give for GPUs, and checks it
# make format   lets ruff rewrite what it can
# make clean    removes all that make made, .venv included
#
# TORCH=cpu|cuda|system names the build of torch (tools/setup.sh), JOBS=1 the processes of a test run.

PY := .venv/bin/python
JOBS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

.PHONY: demo test lint gate codegen format clean

demo: .venv/.ok
	@$(PY) -m alexnet_triton.engine demo

# A process a core, a thread a process: torch's own threads would fight over the same cores.
test: lint
	@if $(PY) -c 'import xdist' 2>/dev/null; then \
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS); \
	else $(PY) -m pytest $(ARGS); fi

# The repository root is the package, and mypy finds a package by its folder's name: hence the link.
lint: .venv/.test-ok
	@mkdir -p build/typing && ln -sfn ../.. build/typing/alexnet_triton
	@if $(PY) -c 'import mypy, ruff' 2>/dev/null || test "$$(cat .venv/.torch)" != system; then \
	$(PY) -m ruff check && $(PY) -m ruff format --check && \
	$(PY) -m mypy && $(PY) -m mypy --explicit-package-bases tests examples; \
	else echo "lint skipped: TORCH=system, and ruff and mypy are not installed there"; fi

TRITON ?= 3.6.0
gate: .venv/.test-ok
	@test -d build/triton-$(TRITON) || \
	$(PY) -m pip install --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	@PYTHONPATH=build/triton-$(TRITON) $(PY) -m pytest tests/test_codegen.py tests/test_inspect.py $(ARGS)

# An hour of two cores the first time, then only what is new.
codegen: .venv/.test-ok
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal tests/test_codegen.py \
	-k test_candidates --every-candidate $(ARGS)

format: .venv/.test-ok
	@$(PY) -m ruff check --fix && $(PY) -m ruff format

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Another build of torch than the one in place sets up anew.
ifneq ($(filter-out $(shell cat .venv/.torch 2>/dev/null),$(TORCH)),)
.PHONY: .venv/.ok
endif

.venv/.ok: pyproject.toml requirements/cpu.txt tools/setup.sh
	@sh tools/setup.sh
	@touch $@

.venv/.test-ok: .venv/.ok
	@sh tools/setup.sh test
	@touch $@
