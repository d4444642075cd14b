# From a fresh clone: `make demo` shows the whole pipeline, `make test` runs everything that must hold.
.PHONY: demo test newcomer format lint soak bench install gpu clean
.DELETE_ON_ERROR:
unexport PYTHONDONTWRITEBYTECODE  # each of the thousands of processes would compile the package anew

PY := .venv/bin/python
READY := .venv/.installed
OLLAMA := .venv-ollama/.installed
VLLM := .venv-vllm/.installed

demo: $(READY)
	$(PY) examples/demo.py

test: $(READY) $(OLLAMA) lint
	@tests/slurm/install.sh
	@tests/browser/install.sh
	$(PY) -m pytest -q -n 3 --no-loadscope-reorder

# Long repetitions: kills at many moments, large shards; and a stage that starts a real vLLM.
soak: $(READY) $(OLLAMA) $(VLLM)
	$(PY) -m pytest -q -m soak --timeout 3600

# What somebody meets who installs the wheel and has no clone, with this Python and with those that are named here.
NEWCOMER_PYTHONS := 3.12 3.13
newcomer: $(READY)
	$(PY) tests/newcomer/run.py $(NEWCOMER_PYTHONS)

bench: $(READY)
	$(PY) benchmarks/run_all.py

format: $(READY)
	$(PY) -m ruff check --quiet --fix .
	$(PY) -m ruff format --quiet .

lint: $(READY)
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --diff .
	$(PY) -m mypy

install: $(READY)

# For NVIDIA's GPUs: torch with CUDA and onnxruntime-gpu.
gpu:
	./install.sh gpu

# The stamp is written last, so an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt model-packages.txt install.sh
	./install.sh

$(OLLAMA): tests/ollama-requirements.txt install.sh
	./install.sh ollama

$(VLLM):
	./install.sh vllm

clean:
	rm -rf .venv .venv-ollama .venv-vllm demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
