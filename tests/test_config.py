import dataclasses
import functools
import importlib.util
import math
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import glyphs
from dml_jax import config, data, losses, sharding
from dml_jax.data.prepare import DATA_SETS, prepare
from dml_jax.training import experiment, loop, run, step
from tests import public_data

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))


# What is prepared of each public data set, in small; the others come with their images.
LAYOUTS = {
    "cars196": (public_data.cars196_annos, public_data.CARS_COUNTS),
    "cub200": (public_data.cub200, public_data.CUB_COUNTS),
    "sop": (public_data.sop, public_data.SOP_COUNTS),
    "inshop": (public_data.inshop, public_data.INSHOP_COUNTS),
    "omniglot": (public_data.omniglot, public_data.OMNIGLOT_COUNTS),
    "folder": (public_data.folder, public_data.FOLDER_COUNTS),
}


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Where the images of each data set are; they are read once for all of its variants."""
    folders = {"glyphs": "", "orl_faces": ""}
    for name, (write, counts) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        published = dataclasses.replace(DATA_SETS[name], counts=counts)
        prepare(name, source=write(folder / "source"), out=folder / "out", published=published)
        folders[name] = str(folder / "out")
    read = data.create

    @functools.cache
    def few(name, *, root=None):
        sources = read(name, root=root)
        few = three_images(sources["train"])
        # In small, some have only one class to test on, which would be refused.
        return sources | {"train": few, "test": few}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "create", few)
        patch.setattr(experiment, "_inspected", lambda sources: data.Findings({}, {}))
        # Variants of equal shape compile once for all files, and not for long.
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield folders
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def three_images(source):
    """Of the first two classes, so that all data sets have the same shapes."""
    chosen = np.flatnonzero(source.labels < 2)[[0, 1, -1]].tolist()
    return data.Source(
        records=[source.records[i] for i in chosen],
        labels=source.labels[chosen],
        class_names=source.class_names[:2],
        names=tuple(source.names[i] for i in chosen),
    )


SMALL = {
    "batch_size": 2,
    "data.image_size": 8,
    "data.resize": 8,
    "data.num_workers": 0,
    "data.n_instance": 1,
    "model.backbone": "colours",
    "model.width": None,
    "model.stem": None,
    "model.pretrained": "none",
    "model.dim": 4,
    "model.freeze_bn": False,
    "proxy_init": "uniform_dim",
    "optimizer.learning_rate": 0.1,
    "optimizer.proxy_learning_rate": 0.1,
    "optimizer.eps": 0.01,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_epochs": (),
    "evaluation.recall_at": (1,),
}
SMALL_MEMORY = {
    "memvir.num_steps": 2,
    "memvir.step_gap": 0,
    "memvir.warmup_epochs": 0,
    "memvir.dtype": "float32",
}


@pytest.mark.parametrize("loss", losses.NAMES)
@pytest.mark.parametrize("method", ["baseline", "ps", "memvir", "ps_memvir"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_variant_of_every_file_takes_two_steps(file, method, loss, roots):
    made = load(file).get_config(f"{method}_{loss}")
    made.data.root = roots[file.stem]
    config.validate(made)
    assert made.loss.name == loss
    assert bool(made.proxy_synthesis.ratio) == ("ps" in method)
    assert bool(made.memvir.num_steps) == ("memvir" in method)
    with pytest.raises(AttributeError, match="epoch"):
        made.epoch = 3

    made.update_from_flattened_dict(SMALL | {"data.root": roots[file.stem]})
    if "memvir" in method:
        made.update_from_flattened_dict(SMALL_MEMORY)
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = experiment.build(made, mesh)
    compiled = step.compile_step(built.recipe, built.state_sharding, sharding.by_row(mesh))
    state = built.init()
    before = jax.device_get(state.params)
    for _, batch in loop.batches(built, 0, 2):
        # Other files' steps differ in numbers alone: taken operation by operation, since the
        # compilation of 256 of them would be a quarter of all that the tests do.
        with jax.disable_jit(file.stem != "cars196"):
            state, observed = compiled(state, batch)
        chex.assert_tree_all_finite(observed)
    chex.assert_tree_all_finite(state.params)
    assert (before["proxies"] != state.params["proxies"]).any()
    assert (state.memory is not None) == ("memvir" in method)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_variant_may_leave_out_its_loss_or_its_method(file):
    get_config = load(file).get_config
    assert get_config("ps").to_dict() == get_config("ps_norm_softmax").to_dict()
    assert get_config("cosface").to_dict() == get_config("baseline_cosface").to_dict()
    assert get_config().to_dict() == get_config("baseline_norm_softmax").to_dict()


def test_cars196_is_set_as_its_authors_set_it():
    get_config = load(ROOT / "configs" / "cars196.py").get_config
    for loss, scale in (("norm_softmax", 23.0), ("proxy_nca", 12.0)):
        plain = get_config(loss)
        assert plain.loss.scale == scale
        assert (plain.epochs, plain.batch_size, plain.data.n_instance) == (130, 128, 1)
        assert (plain.model.backbone, plain.model.dim, plain.model.freeze_bn) == (
            "bninception",
            512,
            True,
        )
        assert tuple(plain.optimizer.decay_epochs) == (50,)
        assert (plain.optimizer.learning_rate, plain.optimizer.proxy_learning_rate) == (1e-4, 1e-2)
        assert (plain.optimizer.eps, plain.optimizer.weight_decay) == (0.01, 1e-4)
        assert plain.evaluation.every_epochs == 5
        mixed = get_config(f"ps_{loss}")
        assert mixed.proxy_synthesis.to_dict() == {"ratio": 1.0, "alpha": 0.4}
        assert mixed.epochs == 130
    for loss, num_steps, step_gap in (("norm_softmax", 45, 10), ("proxy_nca", 20, 25)):
        remembering = get_config(f"memvir_{loss}")
        assert remembering.memvir.to_dict() == {
            "num_steps": num_steps,
            "step_gap": step_gap,
            "warmup_epochs": 40,
            "dtype": "float32",
        }
        assert (remembering.epochs, remembering.evaluation.every_epochs) == (2000, 10)
        assert tuple(remembering.optimizer.decay_epochs) == (2000,)


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown variant 'memvir_ps'.*ps_memvir_proxy_nca"):
        glyphs.get_config("memvir_ps")


BAD = {
    "seed": (2**32, "config.seed is 4294967296; it must be a whole number from 0 to 4294967295"),
    "skip_nonfinite": (-1, "config.skip_nonfinite is -1; it must be a whole number from 0 to"),
    "epochs": (0, "config.epochs is 0; it must be a whole number from 1 to"),
    "batch_size": (127, "config.batch_size is 127; it must be a multiple of .*n_instance, 2"),
    "data.name": ("cifar", "config.data.name is 'cifar'; choose one of folder, glyphs, .*inshop"),
    "data.root": ("letters", "config.data.root is 'letters', but glyphs comes with its images"),
    "data.resize": (16, "config.data.resize is 16; it must be at least config.data.image_size, 32"),
    "data.augmentation.crop_scale": ((0.9, 0.5), r"crop_scale is \(0.9, 0.5\); .* least and most"),
    "data.cache": ("gpu", "config.data.cache is 'gpu'; choose one of none, host, device"),
    "data.cache_size": (0, "config.data.cache_size is 0; it must be a whole number from 1 to"),
    "model.pooling": ("max", "config.model.pooling is 'max'; choose one of gap, gmp"),
    "model.backbone": ("bninception", "config.model.width is 16, but bninception has no width"),
    "model.pretrained": ("x.pth", "config.model.pretrained is 'x.pth'; choose none, a file that"),
    "optimizer.learning_rate": (0.0, "config.optimizer.learning_rate is 0.0; .* number above 0"),
    "optimizer.clip_value": (-1.0, "clip_value is -1.0; it must be a finite number above 0, or"),
    "optimizer.decay_epochs": ((9, 9), r"decay_epochs is \(9, 9\); it must be ascending whole"),
    "proxy_synthesis.ratio": (1e-3, "ratio is 0.001, which makes no synthetic class of 128 images"),
    "evaluation.recall_at": ((2, 4), "config.evaluation.recall_at is .* with 1"),
    "memvir.warmup_epochs": (6, "warmup_epochs is 6, but the run ends after 6"),
    "wandb": ("my/letters", "config.wandb is 'my/letters'; it must be a project's name at Weights"),
    "loss.name": ("triplet", "config.loss.name is 'triplet'; choose one of softmax, norm_softmax"),
}


@pytest.mark.parametrize("path", BAD)
def test_a_bad_value_is_refused_by_its_path(path):
    value, message = BAD[path]
    made = glyphs.get_config("memvir")
    made.data.n_instance = 2
    made.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        config.validate(made)


def test_images_on_the_device_are_no_smaller_than_tests_need_them():
    made = glyphs.get_config()
    made.data.cache_size = 31
    config.validate(made)
    made.data.cache = "device"
    with pytest.raises(ValueError, match=r"cache_size is 31; .* at least config.data.resize, 32"):
        config.validate(made)


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    made = glyphs.get_config("memvir")
    made.update_from_flattened_dict({path: value for path, (value, _) in BAD.items()})
    with pytest.raises(ValueError) as error:
        run.run(made, tmp_path / "run")
    # What two settings have to do with one another is looked at where each is right by itself.
    told = [line.split()[0].removeprefix("config.") for line in str(error.value).splitlines()]
    together = {"batch_size", "data.root", "model.backbone", "memvir.warmup_epochs"}
    assert set(told) == BAD.keys() - together
    assert len(told) == len(set(told))
    assert not (tmp_path / "run").exists()


NO_NUMBER = (True, "1", math.nan, -1, 1e300, (), None)
BAD_OF_TYPE = {
    bool: (0, "yes", None),
    int: (*NO_NUMBER, 1.5, 2**70),
    float: (*NO_NUMBER, math.inf, -math.inf, -0.5),
    str: (3, None, "\0", ("gap",)),
    tuple: (3, None, "12", (math.nan,), ("1",), (-1,), (True, 1.5)),
}
OPTIONAL = {"model.width": int, "model.stem": str, "optimizer.clip_value": float}


def every_setting():
    for loss in losses.NAMES:
        for path, value in config.leaves(glyphs.get_config(f"ps_memvir_{loss}")):
            if path.startswith("loss.") or loss == losses.NAMES[0]:
                yield loss, path, OPTIONAL.get(path, type(value))


@pytest.mark.parametrize(("loss", "path", "kind"), list(every_setting()))
def test_every_setting_is_checked(loss, path, kind):
    """A new one without a rule, or a hyper-parameter without bounds, fails here."""
    settings = glyphs.get_config(f"ps_memvir_{loss}").to_dict()
    *sections, name = path.split(".")
    section = functools.reduce(dict.get, sections, settings)
    for bad in BAD_OF_TYPE[kind]:
        if bad is not None or path not in OPTIONAL:
            section[name] = bad
            # As it comes from a file: a ConfigDict that has types lets fewer of these in.
            with pytest.raises(ValueError, match=rf"config\.{path} is .*; (it must be|choose) "):
                config.validate(ConfigDict(settings))


def test_settings_too_many_or_too_few_are_named():
    made = glyphs.get_config("cosface")
    with made.unlocked():
        made.momentum = 0.9
        made.loss.name = "proxy_nca"
        del made.data.resize
    with pytest.raises(ValueError) as error:
        config.validate(made)
    assert sorted(str(error.value).splitlines()) == [
        "config.data.resize is missing",
        "config.loss.margin is no setting of proxy_nca",
        "config.momentum is no setting",
    ]


@pytest.mark.parametrize(("backbone", "size"), [("conv4", 15), ("bninception", 40)])
def test_images_that_a_backbone_cannot_halve_are_refused(backbone, size):
    made = glyphs.get_config()
    made.model.update(backbone=backbone, width=None, stem=None)
    made.data.update(image_size=size, resize=size)
    with pytest.raises(ValueError, match=f"image_size is {size}: {backbone} cannot halve images"):
        config.validate(made)


@pytest.mark.parametrize("root", ["", "photos"])
def test_images_have_a_root_if_they_do_not_come_along(root):
    made = load(ROOT / "configs" / "folder.py").get_config()
    made.data.root = root
    if root:
        config.validate(made)
    else:
        with pytest.raises(ValueError, match="config.data.root is empty; .* where folder is"):
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
