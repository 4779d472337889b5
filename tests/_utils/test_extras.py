import sys

import pytest

from dml_jax._utils import extras
from dml_jax._utils.errors import MissingExtraError


def test_a_missing_package_is_reported_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    expected = r'the package plotly is not installed: pip install "dml_jax\[report\]"$'
    with pytest.raises(MissingExtraError, match=expected), extras.required_by("report"):
        import plotly  # noqa: F401


def test_alternative_extras_are_all_named():
    expected = r'pip install "dml_jax\[cpu\]" or pip install "dml_jax\[cuda\]"$'
    with pytest.raises(MissingExtraError, match=expected), extras.required_by("cpu", "cuda"):
        import no_such_package  # noqa: F401


def test_other_errors_pass():
    with pytest.raises(ImportError) as raised, extras.required_by("report"):
        from json import no_such_name  # noqa: F401
    assert not isinstance(raised.value, MissingExtraError)
