"""Keeps pytest from importing programs: `tests/test_site.py` runs the notebooks."""

collect_ignore = ["execute_notebooks.py", "figures", "hooks.py", "notebooks"]
