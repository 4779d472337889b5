import importlib.util
from pathlib import Path

import pytest

from configs import glyphs
from dml_jax import config, losses

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("loss", ["", *losses.NAMES])
@pytest.mark.parametrize("method", ["baseline", "ps", "memvir", "ps_memvir"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_variant_of_every_file_is_valid(file, method, loss):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_config(f"{method}_{loss}" if loss else method)
    config.validate(made)
    assert made.loss.name == (loss or "norm_softmax")
    assert bool(made.proxy_synthesis.ratio) == ("ps" in method)
    assert bool(made.memvir.num_steps) == ("memvir" in method)
    with pytest.raises(AttributeError, match="epoch"):
        made.epoch = 3


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown variant 'memvir_ps'.*ps_memvir_proxy_nca"):
        glyphs.get_config("memvir_ps")


BAD = {
    "epochs": (0, "config.epochs is 0; it must be at least 1"),
    "data.resize": (16, "config.data.resize is 16; it must be at least 32"),
    "data.augmentation.crop_scale": ((0.9, 0.5), r"augmentation: crop_scale is \(0.9, 0.5\)"),
    "model.pooling": ("max", "config.model.pooling is 'max'; choose one of gap, gmp"),
    "model.backbone": ("bninception", "config.model.width is 16, but bninception has no width"),
    "model.pretrained": ("x.pth", "config.model.pretrained: 'x.pth' is no place of weights"),
    "optimizer.learning_rate": (0.0, "config.optimizer.learning_rate is 0.0; it must be above 0"),
    "evaluation.recall_at": ((2, 4), "config.evaluation.recall_at is .* with 1"),
    "memvir.warmup_epochs": (6, "warmup_epochs is 6, but the run ends after 6"),
    "loss.name": ("triplet", "config.loss: unknown loss 'triplet'"),
}


@pytest.mark.parametrize("path", BAD)
def test_a_bad_value_is_refused_by_its_path(path):
    value, message = BAD[path]
    made = glyphs.get_config("memvir")
    made.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        config.validate(made)


def test_pretrained_weights_fit_the_pretrained_width_and_stem_alone():
    made = glyphs.get_config()
    made.model.pretrained = "hf:timm/resnet18.tv_in1k"
    with pytest.raises(ValueError) as error:
        config.validate(made)
    assert [line.partition(";")[0] for line in str(error.value).splitlines()] == [
        "config.model.width is 16, but resnet18 was pretrained with 64",
        "config.model.stem is small, but resnet18 was pretrained with imagenet",
    ]
    made.model.update(width=64, stem="imagenet")
    config.validate(made)
    made.model.update(width=None, stem=None)
    config.validate(made)


def test_everything_that_is_wrong_is_told_at_once():
    made = glyphs.get_config()
    made.update_from_flattened_dict({path: value for path, (value, _) in BAD.items()})
    with pytest.raises(ValueError) as error:
        config.validate(made)
    # Without MemVir its warm-up does not matter; the backbone has neither the width nor the stem.
    assert len(str(error.value).splitlines()) == len(BAD)
