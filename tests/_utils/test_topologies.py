import importlib.util

import pytest

from dml_jax._utils import sharding, topologies
from dml_jax._utils.errors import MissingExtraError


@pytest.mark.parametrize(
    "name",
    [
        "",
        "v5e",
        "v5e:",
        "v5e:4x",
        "v5e:0x4",
        "v5e:²x2",
        "v5e:2x2x2",
        "v5p:4x4",
        "v2:2x2",
        "h100:8:2",
    ],
)
def test_an_unknown_topology_is_an_error_that_shows_known_ones(name):
    with pytest.raises(ValueError, match="is not known; give a kind, v5e.*such as v5e:4x4"):
        topologies.get(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda")])
def test_a_missing_compiler_is_told_with_its_extra(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf'pip install "dml_jax\[{extra}\]"'):
        topologies.get(name)


@pytest.mark.parametrize(
    ("name", "count"), [("v5e:2x2", 4), ("v5e:4x4", 16), ("v5p:2x2x1", 4), ("v6e:2x4", 8)]
)
def test_every_kind_of_tpu_makes_a_mesh(name, count):
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    assert sharding.make_mesh(topologies.get(name).devices).size == count


def test_a_shape_that_no_tpu_has_is_an_error():
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    with pytest.raises(ValueError, match="has no --topology=v5e:3x7: .*not divisible"):
        topologies.get("v5e:3x7")
