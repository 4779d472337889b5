import pytest

from dml_jax.configs import cars196, glyphs, inshop
from dml_jax.training import cost
from dml_jax.training.config import parse
from tests.helpers import tiny


def test_placeholders_are_as_many_as_were_published(tmp_path):
    made = inshop.get_config()
    made.data.root = str(tmp_path / "nowhere")
    found, is_found = cost.sources(parse(made).data)
    assert not is_found
    assert {split: (len(x.class_names), len(x)) for split, x in found.items()} == {
        "train": (3997, 25882),
        "test": (3985, 14218),
        "gallery": (3985, 12612),
    }
    # 202 steps of 128 images; queries and gallery are embedded 26 times.
    assert cost.amount(parse(made), found) == (130, 202, 130 * 202 * 128, 26 * (14218 + 12612))


def test_images_that_exist_are_counted(tmp_path):
    made = tiny.config(tiny.write_images(tmp_path), evaluation__every_epochs=2)
    found, is_found = cost.sources(parse(made).data)
    assert is_found
    # 36 images are four batches of 8; epochs 2 and 3 are evaluated, on 24 images.
    assert cost.amount(parse(made), found) == (3, 4, 96, 48)
    made.data.validation_classes = 0.5
    held_out, _ = cost.sources(parse(made).data)
    assert len(held_out["train"]) == len(held_out["validation"]) == 18
    assert cost.amount(parse(made), held_out) == (3, 2, 48, 36)


def test_images_of_an_unknown_number_must_exist(tmp_path):
    made = tiny.config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cost.sources(parse(made).data)


def products(side, kernel, stride, channels, filters):
    """Returns the products of a convolution with values of its input, not with the padding."""
    pad = (kernel - 1) // 2
    along = sum(
        0 <= start - pad + tap < side for start in range(0, side, stride) for tap in range(kernel)
    )
    return along**2 * channels * filters


def test_the_operations_of_resnet18_are_those_of_its_convolutions():
    made = cars196.get_config()
    made.model.update(backbone="resnet18", pretrained="none")
    training, evaluation = cost.operations(parse(made))
    # He et al. 2015, table 1, which counts 1.8e9 products, with those of the padding.
    first = products(224, 7, 2, 3, 64)
    others = 4 * products(56, 3, 1, 64, 64)
    for side, c in ((56, 64), (28, 128), (14, 256)):
        others += products(side, 3, 2, c, 2 * c) + products(side, 1, 2, c, 2 * c)
        others += 3 * products(side // 2, 3, 1, 2 * c, 2 * c)
    assert evaluation == pytest.approx(2 * (first + others), rel=0.02)
    # The backward pass has two products for each, except for the gradient of the images.
    assert training == pytest.approx(2 * (2 * first + 3 * others), rel=0.02)


def test_frozen_parts_have_no_backward_pass():
    made = cars196.get_config()
    made.model.update(backbone="conv4", width=8, pretrained="none", train_from="head")
    training, evaluation = cost.operations(parse(made))
    assert training == pytest.approx(evaluation, rel=0.01)


def test_stochastic_depth_costs_nothing_and_larger_test_images_more():
    made = glyphs.get_config()
    made.update_from_flattened_dict(
        {"model.backbone": "resnet6", "model.stem": "small", "model.width": 4}
    )
    training, evaluation = cost.operations(parse(made))
    made.model.drop_path = 0.5
    made.data.update(test_size=64, resize=64)
    dropping, larger = cost.operations(parse(made))
    assert dropping == pytest.approx(training, rel=0.02)
    assert larger == pytest.approx(4 * evaluation, rel=0.05)
