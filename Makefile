# Every target is complete from a clean clone: it makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
unexport PYTHONDONTWRITEBYTECODE  # the tests start many processes, and each would compile every module anew

# Image data for the tests: unpacked from a bundle beside the repository where there is one; torchvision downloads it elsewhere.
BUNDLE := $(wildcard ../shared/tools/unpack-data)
ifneq ($(BUNDLE),)
export NNCOMP_DATA ?= $(CURDIR)/.data
export NNCOMP_REQUIRE_DATA ?= $(if $(CI),1,0)
endif

.PHONY: help demo test slow docs notebooks results clean

help:
	@echo "make demo       train, prune, share, code, reload and check one network (ARGS='--data mnist --model lenet-5')"
	@echo "make test       export and cleanliness checks, every notebook, tests/, the site"
	@echo "make slow       the notebooks with their slow cells, where only the package is installed, and on a make-believe GPU; colours on every page"
	@echo "make docs       render the site into _docs/"
	@echo "make notebooks  run every notebook and save its outputs, then export"
	@echo "make results    check the shipped files against their records"
	@echo "make clean      remove what the other targets made (not the data)"

.venv/.installed: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# CI installs a browser for tests/test_browser.py where it has none and may; elsewhere those tests skip without one.
.venv/.browser: .venv/.installed
	$(if $(CI),command -v chromium > /dev/null || command -v google-chrome > /dev/null || (apt-get update -qq && apt-get install -qq -y chromium) > /dev/null 2>&1 || echo "no browser could be installed")
	touch $@

.data/.unpacked: .venv/.installed
	$(if $(BUNDLE),$(BIN)/python $(BUNDLE) .data > /dev/null,mkdir -p .data)
	touch $@

demo: .venv/.installed $(if $(BUNDLE),.data/.unpacked)
	$(BIN)/nncomp demo --force $(ARGS)

test: .venv/.installed .venv/.browser $(if $(BUNDLE),.data/.unpacked)
	$(BIN)/python -m pytest $(ARGS)

slow: .venv/.installed $(if $(BUNDLE),.data/.unpacked)
	$(BIN)/python tools/run_notebooks.py --slow --check $(ARGS)
	NNCOMP_SLOW=1 $(BIN)/python -m pytest tests/test_wheel.py tests/test_devices.py tests/test_browser.py

docs: .venv/.installed
	$(BIN)/python tools/build_site.py $(ARGS)

notebooks: .venv/.installed
	$(BIN)/nbdev_export
	$(BIN)/python tools/run_notebooks.py $(ARGS)

results: .venv/.installed $(if $(BUNDLE),.data/.unpacked)
	$(BIN)/nncomp verify $(ARGS)

clean:
	rm -rf .venv _docs _proc build dist runs *.egg-info
