# Everything here works on a machine with nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
TESTS ?= tests

# Where it is set, each process of the tests would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long mutations lint types docs notebook fuzz bench clean

demo: .venv/installed ## merge the built-in models, and explore their merges
	$(BIN)/m3jax demo

# A file goes to one worker: its tests share what they compile.
test: .venv/installed-dev ## the tests, minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" -rs $(TESTS)

test-long: .venv/installed-dev ## what takes long: dense grids, kill, resume, soak
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow -rs $(TESTS)

mutations: .venv/installed-dev ## faults are planted, and `make test` has to see each
	$(BIN)/python tests/mutations/run.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

docs: .venv/installed-docs ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebook: .venv/installed-docs ## runs examples/m3.ipynb from top to bottom
	$(BIN)/jupyter-execute examples/m3.ipynb

fuzz: .venv/installed-dev ## the readers, coverage-guided, ten minutes
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python tests/fuzz/run.py --seconds=200

SIZE ?= 1.1b
bench: .venv/installed-dev ## beside mergekit, 20 minutes; see benchmarks/README.md
	$(BIN)/python benchmarks/end_to_end.py --size=$(SIZE) --recipes=table --fsync \
		--rounds=3 --mergekit_rounds=1 --mergekit=install
	$(BIN)/python benchmarks/startup.py --rounds=3

clean:
	rm -rf .venv build dist site *.egg-info m3jax-demo

.venv/installed: pyproject.toml
	@echo "installing m3jax into .venv: some minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[plot]'
	touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what the tests need"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
