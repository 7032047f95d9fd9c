# Everything a newcomer runs. Needs Python 3.10+ and make; all else is brought in by `setup`.
#
#   make demo                                  a still image becomes demo.mp4, through a real ComfyUI
#   make demo IMAGE=cat.jpg PROMPT="zoom in"   your own picture; also SEED, STEPS, WIDTH, HEIGHT, FRAMES
#   make demo WORKERS=2                        each step shared by two processes, on any Linux machine
#   make test                                  all tests, the real host included; ARGS="-k vae" picks,
#                                              ARGS="-n 0" runs them one after the other
#   make bench                                 our model and VAE beside the host's and diffusers'
#   make bench-gpu                             everything worth knowing of a GPU, within ten minutes;
#                                              ARGS="--only step,vae" picks (docs/gpu-benchmark.md)
#   make pack-for-gpu                          one archive for a GPU machine without network
#   make train-tiny                            trains the bundled files anew, hours without a GPU
#   make distil-tiny                           of that the last part alone: four steps, ten minutes
#   make eval-tiny                             measures them through a real ComfyUI; ARGS="--cases 18" is quick
#   make lint                                  ruff and pyright
#   make clean                                 removes what demo, tests and benchmark wrote
#
# COMFYUI_PATH=/path/to/ComfyUI uses an installation of yours. PYTHON=python3.12 picks the Python.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

.PHONY: setup demo test bench bench-gpu pack-for-gpu train-tiny distil-tiny eval-tiny lint clean

setup: .venv/created
	$(VENV_PYTHON) scripts/setup_host.py

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  "Python " + sys.version.split()[0] + " is too old: 3.10 or newer is needed. Try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	touch $@

# Variables given on make's command line reach the script as environment variables.
demo: setup
	$(VENV_PYTHON) scripts/demo.py

# A group is what shares a server or an expensive fixture: it stays in one worker.
TEST_WORKERS := -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

test: setup
	$(VENV_PYTHON) -m pytest $(TEST_WORKERS) $(ARGS)

bench: setup
	$(VENV_PYTHON) scripts/bench.py $(ARGS)

bench-gpu: setup
	$(VENV_PYTHON) scripts/bench_gpu.py $(ARGS)

pack-for-gpu: setup
	$(VENV_PYTHON) scripts/pack_for_gpu.py $(ARGS)

train-tiny: setup
	$(VENV_PYTHON) training/train.py $(ARGS)

distil-tiny: setup
	$(VENV_PYTHON) training/distil.py $(ARGS)

eval-tiny: setup
	$(VENV_PYTHON) training/evaluate.py $(ARGS)

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m basedpyright --level error

clean:
	rm -rf build demo.mp4 demo.jpg bench.json .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './.host/*' -prune -exec rm -rf {} +
