import sys

import flax.linen as nn
import pytest

from dml_jax import losses
from dml_jax.data import sources
from dml_jax.models import BACKBONES
from dml_jax.training.schedules import SCHEDULES

REGISTRIES = [losses.LOSSES, BACKBONES, sources.REGISTRY, SCHEDULES]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
@pytest.mark.parametrize("path", ["os:system", "subprocess:run", "builtins:exec", "jax:jit"])
def test_modules_outside_the_current_folder_are_not_reached(registry, path):
    with pytest.raises(ValueError, match=f"{path}' is not available: there is no "):
        registry.get(path)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "registry_test_parts", raising=False)
    (tmp_path / "registry_test_parts.py").write_text(
        "from os import system\n\ndef schedule():\n    return float\n\nclass Other:\n    pass\n"
    )
    return "registry_test_parts"


def test_only_what_a_file_defines_itself_is_reached(parts):
    assert SCHEDULES.get(f"{parts}:schedule")() is float
    with pytest.raises(ValueError, match="is not a class or function that .*parts.py defines"):
        SCHEDULES.get(f"{parts}:system")


@pytest.mark.parametrize(("registry", "base"), [(losses.LOSSES, "Loss"), (BACKBONES, "Module")])
def test_imported_classes_have_the_base_of_their_kind(parts, registry, base):
    with pytest.raises(ValueError, match=f"is not derived from {base}"):
        registry.get(f"{parts}:Other")


def test_a_file_that_another_module_hides_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "os.py").write_text("def system(command):\n    pass\n")
    with pytest.raises(ValueError, match="another module is called os; rename os.py"):
        SCHEDULES.get("os:system")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="name 'conv4' is taken"):
        BACKBONES.register("conv4")(nn.Dense)
