from pathlib import Path

import pytest

from dml_jax._utils.errors import UserError
from dml_jax.cli import packaged_configs

CONFIGS = Path(__file__).parents[2] / "configs"


def test_names_are_those_of_the_config_files():
    assert packaged_configs.names() == sorted(file.stem for file in CONFIGS.glob("[!_]*.py"))


@pytest.mark.parametrize("variant", ["", ":ps", ":memvir_proxy_nca"])
def test_a_name_stands_for_the_packaged_file(variant):
    file = packaged_configs.path("cars196")
    assert file.read_text() == (CONFIGS / "cars196.py").read_text()
    given = ["train", "--workdir=runs/a", f"--config=cars196{variant}", "--config.epochs=1"]
    expected = [*given[:2], f"--config={file}{variant}", given[3]]
    assert packaged_configs.resolve(given) == expected
    spaced = ["train", "--config", f"cars196{variant}"]
    assert packaged_configs.resolve(spaced) == ["train", "--config", f"{file}{variant}"]


@pytest.mark.parametrize("value", ["configs/cars196.py:ps", "nowhere/mine.py"])
def test_a_path_is_kept(value):
    assert packaged_configs.resolve([f"--config={value}"]) == [f"--config={value}"]


def test_a_file_without_the_suffix_is_kept(tmp_path):
    file = tmp_path / "cars196"
    file.touch()
    assert packaged_configs.resolve([f"--config={file}:ps"]) == [f"--config={file}:ps"]


def test_other_arguments_are_kept():
    given = ["train", "--config.data.name=cars196", "--configs=cars196", "--", "--config=cars196"]
    assert packaged_configs.resolve(given) == given
    assert packaged_configs.resolve(["train", "--config"]) == ["train", "--config"]


@pytest.mark.parametrize("value", ["birds", "birds:ps", "configs/cars196", ""])
def test_an_unknown_name_is_reported_with_all_names(value):
    expected = f"there is no config '{value.partition(':')[0]}'.* cars196, cub200, folder, glyphs"
    with pytest.raises(UserError, match=expected):
        packaged_configs.resolve([f"--config={value}"])
