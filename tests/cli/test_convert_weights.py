"""The convert program, on files that torch.save wrote."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli.test_programs import run, succeed
from tests.helpers import tiny, weights
from tests.models.test_pretrained import assert_golden_features

NAME = "resnet18"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the convert extra is not installed")


@pytest.fixture(scope="module")
def tensors(torch):
    return {key: torch.from_numpy(np.array(x)) for key, x in weights.state_dict(NAME).items()}


def arguments(source, out, name=NAME):
    return ["convert_weights.py", f"--backbone={name}", f"--source={source}", f"--out={out}"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


def test_an_old_checkpoint_of_a_data_parallel_model_is_converted(torch, tmp_path):
    source, out = tmp_path / "old.pth", tmp_path / "new.safetensors"
    old = {key: torch.from_numpy(np.array(x)) for key, x in weights.port(NAME).items()}
    old["module.bn1.num_batches_tracked"] = torch.tensor(3)
    # A memory layout that is not contiguous.
    old["module.conv1.weight"] = old["module.conv1.weight"].to(memory_format=torch.channels_last)
    torch.save({"state_dict": old, "epoch": 3}, source, _use_new_zipfile_serialization=False)
    succeed(*arguments(source, out))
    written, expected = load_file(out), weights.backbone(NAME)
    assert written.keys() == expected.keys()
    for key, array in written.items():
        np.testing.assert_array_equal(array, expected[key], strict=True)

    before = out.read_bytes()
    done = run(*arguments(source, out))
    assert done.returncode == 2 and f"{out} exists" in done.stderr
    assert out.read_bytes() == before


def test_weights_of_the_bninception_port_give_its_golden_features(torch, images, tmp_path):
    source, out = tmp_path / "bn_inception.pth", tmp_path / "bninception.safetensors"
    port = {key: torch.from_numpy(x) for key, x in weights.port("bninception").items()}
    plain = {key.removeprefix("module."): x for key, x in port.items()}
    torch.save(plain, source, _use_new_zipfile_serialization=False)
    succeed(*arguments(source, out, "bninception"))
    assert_golden_features("bninception", out, images)


def test_wrong_or_unsafe_files_are_rejected(torch, tensors, tmp_path):
    source, out = tmp_path / "bad.pth", tmp_path / "new.safetensors"
    bad = {
        "bn1.weight is missing": {k: x for k, x in tensors.items() if k != "bn1.weight"},
        "neither a state dict": {"epoch": 3},
        "holds no weights that torch.load can read safely": {
            "state_dict": tensors,
            "code": pytest.raises,
        },
    }
    for message, saved in bad.items():
        torch.save(saved, source)
        done = run(*arguments(source, out))
        assert done.returncode == 2 and str(source) in done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_a_file_that_does_not_match_the_hash_in_its_name_is_rejected_unread(tmp_path):
    # This check does not need PyTorch.
    source, out = tmp_path / "bn_inception-52deb4733.pth", tmp_path / "new.safetensors"
    source.write_bytes(b"half of a download")
    done = run(*arguments(source, out, "bninception"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{source} does not match the hash in its name" in done.stderr
    assert "not with 52deb4733" in done.stderr
    assert list(tmp_path.iterdir()) == [source]
