import json
from pathlib import Path

import pytest

from dml_jax import data
from dml_jax.cli import command_line
from dml_jax.training import config
from tests.helpers import tiny


def exit_code(work):
    with pytest.raises(BaseException) as ended, command_line.user_errors():
        work()
    return getattr(ended.value, "code", ended.value)


def test_what_is_the_users_to_mend_is_told_in_short(capsys):
    assert exit_code(lambda: config.parse_variant("psi")) == 2
    assert capsys.readouterr().err.startswith("error: unknown variant 'psi'")
    assert exit_code(Path("nowhere").read_bytes) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_worker_raises_is_the_users_too(tmp_path, capsys, num_workers):
    images = tiny.write_images(tmp_path / "images")
    path = images / "train" / "class1" / "2.png"
    path.write_bytes(path.read_bytes()[:100])

    def read():
        source = data.create("folder", root=images)["train"]
        settings = {"num_workers": num_workers, "batch_size": 6, "image_size": 8, "resize": 8}
        batches = data.test_batches(source, **settings)
        try:
            list(batches)
        finally:
            batches.close()

    assert exit_code(read) == 2
    assert "class1/2.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: json.loads("{"),
        lambda: dict(zip((1,), (), strict=True)),
        lambda: data.Augmentation(crop_scale=("a", "b", *int("c"))),
    ],
)
def test_an_error_of_an_operation_is_no_users(wrong):
    error = exit_code(wrong)
    assert isinstance(error, ValueError)
