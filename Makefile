# Two commands are all it takes: `make demo` and `make test`. PYTHON may name another Python (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin

# As many test processes as there are cores, each with one thread: the networks of the tests are small
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test test-oldest test-device lint types coverage notebooks slow bench golden clean

demo: .venv/demo.stamp
	$(BIN)/python -m captum_classfilters demo --out demo

test: .venv/test.stamp lint types
	$(PYTEST) --durations 20

# Lines of the package that `make test` reaches
coverage: .venv/test.stamp
	$(PYTEST) --cov captum_classfilters --cov-report term:skip-covered

# The oldest versions that are supported, for which PYTHON must be 3.10 to 3.12; the notebooks are shown with the newest
test-oldest: .venv-oldest/test.stamp
	$(PYTEST:.venv/%=.venv-oldest/%) --ignore tests/tutorials

# Every public call on a second device, torch_xla's on the CPU, and on an emulated one without float64. Some minutes
test-device: .venv-device/test.stamp .venv/test.stamp
	PJRT_DEVICE=CPU SECOND_DEVICE=xla OMP_NUM_THREADS=1 .venv-device/bin/python -m pytest tests/field/test_devices.py -k xla
	SECOND_DEVICE=slim OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/field/test_devices.py -k slim

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test.stamp
	$(BIN)/mypy

# Run the tutorials again and keep their outputs
notebooks: .venv/test.stamp
	cd tutorials && ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace *.ipynb

slow: .venv/test.stamp
	$(PYTEST) -m slow --timeout 3600

bench: .venv/test.stamp
	$(BIN)/python -m benchmarks

.venv/bin/python .venv-oldest/bin/python .venv-device/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(@:/bin/python=)

.venv/demo.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/demo.stamp

.venv-oldest/test.stamp: .venv-oldest/bin/python pyproject.toml tests/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable '.[test]'
	touch $@

# Versions of torch and torch_xla belong together
.venv-device/test.stamp: .venv-device/bin/python pyproject.toml
	.venv-device/bin/python -m pip install --quiet 'torch==2.9.*' 'torch_xla==2.9.*' torchvision --editable . \
		hypothesis pytest pytest-timeout timm
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-device demo build *.egg-info
