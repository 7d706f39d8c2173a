# Thin names for dev.py, which does the work and needs nothing but Python.
PYTHON ?= python3
.PHONY: demo test check fmt size clean

demo test check fmt size:
	@$(PYTHON) dev.py $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
