# make demo | make study | make test | make lint | make bench: each first makes .venv and installs requirements.txt
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo study test lint bench
.DELETE_ON_ERROR:

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11, 3.12 or 3.13 is needed, got %s; run: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet --no-deps --editable .
	@touch $@

# checkov has a hundred dependencies, pinned to versions of its own: it looks at the Kubernetes manifests from outside
CHECKOV := .venv-checkov
$(CHECKOV)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(CHECKOV)
	$(CHECKOV)/bin/python -m pip install --quiet checkov==3.3.30
	@touch $@

# make demo DATALIST=... DATASET_DIR=... runs it on your images; BUNDLE=... runs another bundle's
BUNDLE ?= cxr_autoencoder_kl
demo: $(VENV)/.installed
	@test -x bundles/$(BUNDLE)/demo.sh || { echo "no bundle $(BUNDLE) with a demo; there are: $(patsubst bundles/%/demo.sh,%,$(wildcard bundles/*/demo.sh))" >&2; exit 1; }
	PYTHON=$(PY) OUT="$(OUT)" DATALIST="$(DATALIST)" DATASET_DIR="$(DATASET_DIR)" bundles/$(BUNDLE)/demo.sh

# make study DATALIST=...: trains and measures all presets of a bundle and writes one table; what is done is not done again.
# BUNDLE=augmentation_classifier is the other bundle with a study; ARGS="--epoch_share 0.01" passes settings on
study: BUNDLE := skin_sngan
study: $(VENV)/.installed
	@test -f bundles/$(BUNDLE)/configs/study.json || { echo "no bundle $(BUNDLE) with a study; there are: $(patsubst bundles/%/configs/study.json,%,$(wildcard bundles/*/configs/study.json))" >&2; exit 1; }
	@test -f "$(DATALIST)" || { echo "make study needs real images, got no file '$(DATALIST)'; name them with DATALIST=/data/datalist.json" >&2; exit 1; }
	$(PY) -m monai.bundle run --config_file bundles/$(BUNDLE)/configs/study.json --bundle_root bundles/$(BUNDLE) --datalist "$(DATALIST)" $(if $(DATASET_DIR),--dataset_dir "$(DATASET_DIR)") $(if $(OUT),--output_dir "$(OUT)") $(ARGS)

# one thread each: two processes that compute with two threads each are slower than one
WORKERS ?= 2
test: $(VENV)/.installed $(CHECKOV)/.installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(VENV)/.installed
	@for benchmark in tests/benchmarks/bench_*.py; do echo "== $$benchmark"; $(PY) $$benchmark || exit 1; done
