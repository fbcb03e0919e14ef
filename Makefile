# Two commands are enough to begin: `make run` and `make test`. Everything else is below.
PYTHON ?= python3.11
CORPUS ?= voicesearch
PROFILE ?= quick
SEED ?= 0
BIN = .venv/bin
export PYTHONUNBUFFERED = 1
export RAY_USAGE_STATS_ENABLED = 0
# numpy's small products need no threads of their own beside torch's and the loader's
export OPENBLAS_NUM_THREADS = 1
# glibc gives the pages of a training step back and asks for them again, unless told to keep them
LEARNING = MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000

.PHONY: setup run cycle serve lab test bench bench-cycle bench-quality bench-live bench-keywords bench-an4 bench-speed bench-words bench-train bench-labels bench-serve bench-search bench-policy bench-curve bench-noise bench-slices bench-import bench-verify base audit clean lock

setup: .venv/.ready ## .venv from requirements.lock, and the Jupyter kernel

.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install -q --no-deps --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name voicelab >/dev/null
	touch $@

run: setup ## the whole life cycle on the default corpus, then the application on http://127.0.0.1:8000
	$(BIN)/voicelab cycle --corpus voicesearch --profile $(PROFILE)
	$(BIN)/voicelab serve

cycle: setup ## the whole life cycle: make cycle CORPUS=an4 PROFILE=full
	$(BIN)/voicelab cycle --corpus $(CORPUS) --profile $(PROFILE)

serve: setup ## the application with the champion
	$(BIN)/voicelab serve

lab: setup ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

test: setup ## everything that CI runs: repository rules, notebooks, rooms, and the quick cycles
	$(BIN)/pytest tests

base: setup ## make the base model again (an hour or two): voicelab/base
	$(LEARNING) $(BIN)/voicelab phase 0_base

bench: bench-cycle bench-quality bench-live bench-keywords bench-speed bench-words bench-train bench-labels bench-serve bench-search bench-policy bench-curve bench-slices bench-import bench-verify ## all benchmarks but bench-an4

bench-cycle: setup ## time and quality of the two cycles, into reports/benchmarks/cycle.json
	$(BIN)/python tests/bench_cycle.py

bench-quality: setup ## WER on unheard people, AN4's test set among them, into reports/benchmarks/quality.json
	$(BIN)/python tests/bench_quality.py

bench-live: setup ## eight people speak at once: time to the first word and to the final text, into reports/benchmarks/live.json
	$(BIN)/python tests/bench_live.py

bench-keywords: setup ## names that no training heard, given as keywords among 100 and 1,000, into reports/benchmarks/keywords.json
	$(BIN)/python tests/bench_keywords.py

bench-an4: setup ## from scratch on AN4 alone, and its test set once, into reports/benchmarks/an4: make bench-an4 SEED=0
	$(LEARNING) $(BIN)/python tests/bench_an4.py --seed $(SEED) --test

bench-speed: setup ## recognition on one core, against sherpa-onnx and pocketsphinx, into reports/benchmarks/speed.json
	$(BIN)/python tests/bench_speed.py

bench-words: setup ## word times and confidence, into reports/benchmarks/words.json
	$(BIN)/python tests/bench_words.py

bench-train: setup ## the training step against a bare loop, into reports/benchmarks/train.json
	$(LEARNING) $(BIN)/python tests/bench_train.py

bench-labels: setup ## a twentieth of AN4's labels is spoilt: how many does the ranking of suspects find? into reports/benchmarks/labels.json
	$(LEARNING) $(BIN)/python tests/bench_labels.py

bench-serve: setup ## requests a second and CPU time a request, against in process and plain FastAPI, into reports/benchmarks/serve.json
	$(BIN)/python tests/bench_serve.py --hour

bench-search: setup ## is the right page among the first five results of a spoken query? into reports/benchmarks/search.json
	$(BIN)/python tests/bench_search.py

bench-policy: setup ## what evening out and trimming do to transcripts, and what they cost, into reports/benchmarks/policy.json
	$(BIN)/python tests/bench_policy.py

bench-curve: setup ## what more data of AN4's kind would bring, and whether half of it foretells the whole, into reports/benchmarks/curve.json
	$(LEARNING) $(BIN)/python tests/bench_curve.py

bench-slices: setup ## how often the search for bad slices finds some where there are none, and one that was planted, into reports/benchmarks/slices.json
	$(BIN)/python tests/bench_slices.py

bench-import: setup ## ten thousand clips are imported, into reports/benchmarks/import.json
	$(BIN)/python tests/bench_import.py

bench-verify: setup ## damaged copies of AN4's clips: how many are caught, and how many true clips are accused, into reports/benchmarks/verify.json
	$(BIN)/python tests/bench_verify.py

bench-noise: setup ## the noise story, told on AN4's test speakers: after `make cycle CORPUS=an4`, into reports/benchmarks/noise.json
	$(LEARNING) $(BIN)/voicelab phase 8_noise -p gold=true

audit: setup ## known weaknesses of what the server needs; fails where a package's record cannot be read
	$(BIN)/uv run -q --no-project --python $(BIN)/python --with pip-audit==2.10.1 pip-audit --strict --no-deps --disable-pip -r requirements-serve.lock

lock: ## pin everything again, from requirements.in
	$(BIN)/uv pip compile -q requirements.in --excludes requirements-without.in -o requirements.lock --python-version 3.11
	$(BIN)/uv pip compile -q requirements-serve.in -o requirements-serve.lock --python-version 3.11

clean: ## working state and reports of runs; the environment stays
	rm -rf var reports/*-quick reports/*-full
