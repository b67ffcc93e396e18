# `make demo` and `make test` need Python 3.11 or newer and pip, nothing else: they make .venv first.
# PYTHON picks the interpreter that .venv is made with: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
AUDIT := .venv-audit/bin
AUDIT_INSTALLED := .venv-audit/.installed
SBOM := out/sbom.json

.PHONY: demo test chromium test-faults test-docs docs lint venv sbom audit clean

demo: $(INSTALLED)
	$(BIN)/ldm demo out/demo

test: $(INSTALLED) chromium
	$(BIN)/pytest -m "not faults_long and not docs"

# For the tests of the page, which are skipped without it. Root on Debian may install it; others do so themselves.
chromium:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install -y -qq chromium >/dev/null 2>&1; } || \
		echo "no chromium: the tests of the page are skipped"

test-faults: $(INSTALLED)
	$(BIN)/pytest -m faults_long

# Runs the commands of README.md and docs/; -rs names what is not run, and why.
test-docs: $(INSTALLED)
	$(BIN)/pytest -m docs -rs tests/docs

docs: $(INSTALLED)
	$(BIN)/python -m jobs.reference docs/reference.md

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(INSTALLED)

# What is installed in .venv, as a bill of materials (CycloneDX).
sbom: $(INSTALLED) $(AUDIT_INSTALLED)
	@mkdir -p $(dir $(SBOM))
	@$(AUDIT)/cyclonedx-py environment --output-reproducible --output-format JSON --output-file $(SBOM) $(BIN)/python
	@echo "bill of materials: $(SBOM)"

# Known weaknesses of what is installed in .venv, as https://api.osv.dev has them.
audit: $(INSTALLED) $(AUDIT_INSTALLED)
	@curl --silent --show-error --fail --max-time 20 --output /dev/null https://api.osv.dev/v1/vulns/PYSEC-2021-142 2>/dev/null || \
		{ echo "error: nothing was audited: https://api.osv.dev cannot be reached from here; run it where it can" >&2; exit 1; }
	@$(AUDIT)/pip-audit --vulnerability-service osv --skip-editable --progress-spinner off \
		--path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Where Python comes without ensurepip (Debian's without python3-venv), the interpreter's own pip
# puts one into the environment. The stamp is written last, so a broken install is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' is not Python 3.11 or newer; set PYTHON, as in: make test PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv install --quiet pip; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		-c constraints.txt -e '.[demo,text,dev]'
	@touch $@

# The tools of sbom and audit have an environment of their own, so that neither lists itself. They are the extra `audit`.
$(AUDIT_INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv-audit >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv --clear --without-pip .venv-audit && $(PYTHON) -m pip --python .venv-audit install --quiet pip; }
	@$(AUDIT)/python -c 'import pathlib, tomllib; print(*tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["optional-dependencies"]["audit"], sep="\n")' | \
		$(AUDIT)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -r /dev/stdin
	@touch $@

clean:
	rm -rf .venv .venv-audit build out/demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
