# Two commands on a fresh clone: `make demo` and `make test`. Both make their own .venv and install what they need.

PYTHON ?= python3
VENV := .venv
# Test processes; each uses one thread.
JOBS ?= 2
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# Of `make fuzz`, for all fuzzers together; SEED repeats a run.
FUZZ_SECONDS ?= 240
SEED ?=

.PHONY: demo test lint fuzz clean

demo: $(INSTALLED)
	$(RUN) -m train.demo

test: $(INSTALLED) lint
	$(RUN) -m pip check
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m tests.fuzz.run --seconds $(FUZZ_SECONDS) $(if $(SEED),--seed $(SEED))

# torch first and by itself: with it in place nothing else pulls another build of it.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 12) and f"Python 3.10 to 3.12 is needed, {v[0]}.{v[1]} found; try: make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,serve,web,structured,gguf,train,qlora,eval]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
