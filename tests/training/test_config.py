import ast
import dataclasses
import functools
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dml_jax import data, losses
from dml_jax._utils import sharding
from dml_jax.configs import glyphs
from dml_jax.data import splits
from dml_jax.data.prepare import DATA_SETS, prepare
from dml_jax.training import builder, config, resume, run, run_directory, variants
from dml_jax.training.batches import device_batches
from dml_jax.training.state import network_variables
from tests.helpers import public_data

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))

# Writers and counts of small copies of the public data sets; other data sets include their images.
LAYOUTS = {
    "cars196": (public_data.cars196_annos, public_data.CARS_COUNTS),
    "cub200": (public_data.cub200, public_data.CUB_COUNTS),
    "sop": (public_data.sop, public_data.SOP_COUNTS),
    "inshop": (public_data.inshop, public_data.INSHOP_COUNTS),
    "omniglot": (public_data.omniglot, public_data.OMNIGLOT_COUNTS),
    "grocery": (public_data.grocery, public_data.GROCERY_COUNTS),
    "folder": (public_data.folder, public_data.FOLDER_COUNTS),
}


def parse_with_root(made):
    made.data.root = "images"
    return config.parse(made)


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Roots of the images by data set; images are read once for all variants."""
    folders = {"glyphs": "", "orl_faces": ""}
    for name, (write, counts) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        published = dataclasses.replace(DATA_SETS[name], counts=counts)
        prepare(name, source=write(folder / "source"), out=folder / "out", published=published)
        folders[name] = str(folder / "out")
    folders["hyp_vit"] = folders["resnet50"] = folders["cub200"]
    read = data.create

    @functools.cache
    def few(name, *, root=None):
        sources = read(name, root=root)
        few = three_images(sources["train"])
        # Some small copies have a single test class, which would be refused.
        return sources | {"train": few, "test": few}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "create", few)
        patch.setattr(splits, "_inspect_once", lambda sources: data.InspectionReport({}, {}))
        # Variants of equal shape are compiled once for all files, without optimisation.
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield folders
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def three_images(source):
    """Returns three images of two classes, so that all data sets have the same shapes."""
    chosen = np.flatnonzero(source.labels < 2)[[0, 1, -1]].tolist()
    return data.Source(
        records=[source.records[i] for i in chosen],
        labels=source.labels[chosen],
        class_names=source.class_names[:2],
        names=tuple(source.names[i] for i in chosen),
    )


# Another test shows that `memvir_baseline` is `memvir` without the memory.
REGULARISED = ["baseline", "ps", "memvir", "ps_memvir"]
PEERS = ["mixup", "manifold_mixup", "mixup_proxy_anchor", "contrastive", "xbm_multi_similarity"]

SMALL = {
    "batch_size": 2,
    "data.image_size": 8,
    "data.resize": 8,
    "data.num_workers": 0,
    "data.n_instance": 1,
    "model.backbone": "conv1",
    "model.width": None,
    "model.stem": None,
    "model.pretrained": "none",
    "model.dim": 4,
    "model.freeze_bn": False,
    "model.freeze_bn_affine": False,
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
}


VARIANTS = [f"{method}_{loss}" for method in REGULARISED for loss in losses.names()] + PEERS
# All variants of one file, and one variant of each other file.
STEPS = [
    pytest.param("cars196", f"{method}_{loss}", marks=[pytest.mark.slow] * (method != "ps_memvir"))
    for method in REGULARISED
    for loss in losses.names()
] + [("cars196", variant) for variant in PEERS]
STEPS += [
    # The letters are drawn first, all 8,906 of them.
    pytest.param(
        file.stem,
        "ps_memvir",
        marks=[pytest.mark.slow] * (file.stem in ("glyphs", "hyp_vit", "resnet50")),
    )
    for file in FILES
    if file.stem != "cars196"
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_variant_of_every_file_is_valid(file, roots):
    for variant in VARIANTS:
        made = load(file).get_config(variant)
        made.data.root = roots[file.stem]
        parsed = config.parse(made)
        method, loss = variants.parse_variant(variant)
        assert parsed.loss == losses.create(**made.loss) and made.loss.name == loss
        assert bool(parsed.proxy_synthesis.ratio) == ("ps" in method)
        assert bool(parsed.memvir.num_steps) == ("memvir" in method)
        assert bool(parsed.mixup.alpha) == ("mixup" in method)
        assert bool(parsed.xbm.num_steps) == ("xbm" in method)
        assert config.to_config_dict(parsed).to_dict() == made.to_dict()
    with pytest.raises(AttributeError, match="epoch"):
        made.epoch = 3


@pytest.mark.parametrize(("file", "variant"), STEPS)
def test_variants_take_two_steps(file, variant, roots, tmp_path):
    made = load(ROOT / "configs" / f"{file}.py").get_config(variant)
    if file == "hyp_vit":
        made.model.update(pooling="gap", train_from="all")
    made.update_from_flattened_dict(SMALL | {"data.root": roots[file]})
    has_memory = "memvir" in variant
    if has_memory:
        made.update_from_flattened_dict(SMALL_MEMORY)
    if "xbm" in variant:
        made.xbm.update(num_steps=2, warmup_epochs=0)
    made.mixup.depth = min(made.mixup.depth, 1)  # The network is one block and the head.
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = builder.build(config.parse(made), mesh)
    state = built.init()
    variables = network_variables(state)
    built = builder.with_features(built, variables, tmp_path / "run", lambda: None)
    before = jax.device_get(state.params)
    for _, batch in device_batches(built, 0, 2):
        state, metrics = built.take_step(state, batch)
        chex.assert_tree_all_finite(metrics)
    chex.assert_tree_all_finite(state.params)
    if variants.parse_variant(variant)[1] in losses.names():
        assert (before["proxies"] != state.params["proxies"]).any()
    assert (state.memory is not None) == (has_memory or "xbm" in variant)
    if state.memory is not None:
        assert int(state.memory.steps) == 2
    if has_memory:
        assert state.memory.ring.proxies.dtype == made.memvir.dtype


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_variant_has_a_network_for_its_images(file, roots):
    get_config = load(file).get_config
    made = [get_config(f"{x}_{loss}") for x in variants.METHODS for loss in losses.names()]
    for one in made:
        one.data.root = roots[file.stem]
    different = {one.model.to_json(): config.parse(one) for one in made}
    assert len(different) <= 2  # Proxy-Anchor's may differ.
    for one in different.values():
        network = builder.make_network(one, sharding.make_mesh(jax.devices()[:1]))
        assert network.variables_shape["params"]["head"]["kernel"].shape[1] == one.model.dim
    assert len({one.data.image_size for one in made}) == 1


@pytest.mark.parametrize("loss", losses.names())
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_baseline_of_memvir_differs_only_in_the_memory(file, loss):
    bare, with_memory, with_both = (
        load(file).get_config(f"{method}_{loss}").to_dict()
        for method in ("memvir_baseline", "memvir", "ps_memvir")
    )
    if file.stem == "folder":
        bare["data"]["root"] = with_memory["data"]["root"] = with_both["data"]["root"] = "photos"
    config.parse(ConfigDict(bare))
    assert bare["memvir"] == config.default().memvir.to_dict()
    assert bare["proxy_synthesis"] == config.default().proxy_synthesis.to_dict()
    assert bare == with_memory | {"memvir": bare["memvir"]}
    assert with_memory == with_both | {"proxy_synthesis": bare["proxy_synthesis"]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_variant_may_leave_out_its_loss_or_its_method(file):
    get_config = load(file).get_config
    assert get_config("ps").to_dict() == get_config("ps_norm_softmax").to_dict()
    assert get_config("cosface").to_dict() == get_config("baseline_cosface").to_dict()
    assert get_config().to_dict() == get_config("baseline_norm_softmax").to_dict()


# The settings of both official READMEs for CARS196, by their flags or the defaults of these.
OFFICIAL = {
    "epochs": 130,
    "batch_size": 128,
    "skip_nonfinite": 0,
    "data.name": "cars196",
    "data.unreadable": "fail",
    "data.validation_classes": 0.0,
    "data.validation_fold": 0,
    "data.n_instance": 1,
    "data.image_size": 224,
    "data.test_size": None,
    "data.resize": 256,
    "data.augmentation.crop_scale": (0.08, 1.0),
    "data.augmentation.flip": True,
    "data.augmentation.rotation": 0.0,
    "data.augmentation.zoom": 0.0,
    "data.augmentation.shift": 0.0,
    "data.augmentation.brightness": 0.0,
    "data.augmentation.contrast": 0.0,
    "data.augmentation.saturation": 0.0,
    "data.augmentation.erasing": 0.0,
    "model.backbone": "bninception",
    "model.width": None,
    "model.stem": None,
    "model.pretrained": "weights/bninception.safetensors",
    "model.pooling": "gap",
    "model.dim": 512,
    "model.head_init": "uniform",
    "model.channels": None,
    "model.normalisation": None,
    "model.train_from": "all",
    "model.lora_rank": 0,
    "model.prompts": 0,
    "model.freeze_bn": True,
    "model.freeze_bn_affine": False,
    "model.dtype": "float32",
    "model.drop_path": 0.0,
    "loss.name": "norm_softmax",
    "loss.scale": 23.0,
    "loss.label_smoothing": 0.0,
    "proxy_init": "uniform_dim",
    "proxy_synthesis.ratio": 0.0,
    "proxy_synthesis.alpha": 0.4,
    "proxy_synthesis.lam": None,
    "proxy_synthesis.per_sample": False,
    "proxy_synthesis.same_class": False,
    "proxy_synthesis.mix": "both",
    "proxy_synthesis.stop_gradient": False,
    "memvir.num_steps": 0,
    "memvir.step_gap": 0,
    "memvir.warmup_epochs": 0,
    "memvir.dtype": "float32",
    "memvir.virtual": "both",
    "memvir.growth": "gradual",
    "mixup.alpha": 0.0,
    "mixup.depth": 0,
    "xbm.num_steps": 0,
    "xbm.weight": 1.0,
    "xbm.warmup_epochs": 1,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-4,
    "optimizer.proxy_learning_rate": 1e-2,
    "optimizer.eps": 0.01,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_vectors": True,
    "optimizer.layer_decay": 1.0,
    "optimizer.decay_rate": 0.1,
    "optimizer.schedule": "step_decay",
    "optimizer.decay_epochs": (50,),
    "optimizer.decay_every": 0,
    "optimizer.clip_value": None,
    "optimizer.clip_norm": None,
    "optimizer.frozen_epochs": 0,
    "optimizer.average_decay": 0.0,
    "evaluation.every_epochs": 5,
    "evaluation.recall_at": (1, 2, 4, 8),
    "evaluation.nmi": False,
    "evaluation.test": True,
    "evaluation.patience": 0,
}
# Settings without an official counterpart.
OURS = {
    "seed",
    "deterministic",
    "data.root",
    "data.split_classes",
    "data.num_workers",
    "data.cache",
    "data.cache_size",
    "data.feature_views",
    "data.features",
    "micro_batches",
    "model.remat",
    "checkpoint.every_epochs",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "wandb",
    "mlflow",
}
NCA = {"loss.name": "proxy_nca", "loss.scale": 12.0}
MIXED = {"proxy_synthesis.ratio": 1.0}
LONG = {
    "epochs": 2000,
    "optimizer.decay_epochs": (2000,),
    "evaluation.every_epochs": 10,
}
OFFICIAL_CHANGES = {
    "norm_softmax": {},
    "ps_norm_softmax": MIXED,
    "memvir_baseline_norm_softmax": LONG | {"proxy_init": "uniform_classes"},
    "memvir_norm_softmax": {
        **LONG,
        "memvir.warmup_epochs": 40,
        "memvir.num_steps": 45,
        "memvir.step_gap": 10,
        "proxy_init": "uniform_classes",
    },
    "proxy_nca": NCA,
    "ps_proxy_nca": NCA | MIXED,
    "memvir_baseline_proxy_nca": NCA | LONG | {"proxy_init": "normal_dim"},
    "memvir_proxy_nca": {
        **NCA,
        **LONG,
        "memvir.warmup_epochs": 40,
        "memvir.num_steps": 20,
        "memvir.step_gap": 25,
        "proxy_init": "normal_dim",
    },
}


@pytest.mark.parametrize("variant", OFFICIAL_CHANGES)
def test_cars196_has_the_official_settings(variant):
    made = dict(config.leaves(load(ROOT / "configs" / "cars196.py").get_config(variant)))
    assert made.keys() >= OURS
    official = {path: value for path, value in made.items() if path not in OURS}
    assert official == OFFICIAL | OFFICIAL_CHANGES[variant]


@pytest.mark.parametrize("name", ["cars196", "cub200"])
def test_long_schedules_save_as_often_as_they_evaluate(name):
    made = load(ROOT / "configs" / f"{name}.py").get_config("memvir")
    assert (made.epochs, made.checkpoint.every_epochs, made.evaluation.every_epochs) == (
        2000,
        10,
        10,
    )


# The commands of tjddus9597/Proxy-Anchor-CVPR2020, and the defaults of its train.py.
PROXY_ANCHOR = {
    "epochs": 60,
    "batch_size": 180,
    "proxy_init": "normal_classes",
    "model.dim": 512,
    "model.head_init": "kaiming_fan_out",
    "model.backbone": "bninception",
    "model.pooling": "gap+gmp",
    "loss.alpha": 32.0,
    "loss.margin": 0.1,
    "optimizer.name": "adamw",
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay_epochs": (),
    "optimizer.clip_value": 10.0,
    "optimizer.frozen_epochs": 1,
}
# --lr, --bn-freeze, --lr-decay-step and --lr-decay-gamma.
PROXY_ANCHOR_FLAGS = {
    "cub200": (1e-4, True, 10, 0.5),
    "cars196": (1e-4, True, 20, 0.5),
    "sop": (6e-4, False, 20, 0.25),
    "inshop": (6e-4, False, 20, 0.25),
}


@pytest.mark.parametrize("name", PROXY_ANCHOR_FLAGS)
def test_proxy_anchor_has_the_settings_of_its_authors(name):
    rate, freeze, every, factor = PROXY_ANCHOR_FLAGS[name]
    get_config = load(ROOT / "configs" / f"{name}.py").get_config
    made = dict(config.leaves(get_config("proxy_anchor")))
    expected = PROXY_ANCHOR | {
        "optimizer.learning_rate": rate,
        "optimizer.proxy_learning_rate": 100 * rate,
        "model.freeze_bn": freeze,
        "model.freeze_bn_affine": freeze,
        "optimizer.decay_every": every,
        "optimizer.decay_rate": factor,
    }
    assert {path: made[path] for path in expected} == expected
    # MemVir has its own epochs, without a decay before the last one.
    long = get_config("memvir_proxy_anchor")
    assert long.optimizer.decay_every == 0 and long.optimizer.decay_epochs == (long.epochs,)
    assert long.batch_size == 180 and long.proxy_init == "normal_classes"


def documented_commands(page):
    """Yields the arguments of each train.py command in the code blocks of a page."""
    for block in re.findall(r"^```\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if block.startswith("python scripts/train.py"):
            yield shlex.split(block.replace("\\\n", " "))[1:]


def test_proxy_anchor_of_the_pull_request_has_the_settings_of_the_other_losses():
    (command,) = documented_commands(ROOT / "docs" / "official.md")
    _, named, workdir_flag, *overrides = command
    assert (named, workdir_flag) == ("--config=configs/cars196.py:proxy_anchor", "--workdir=DIR")
    made = load(ROOT / "configs" / "cars196.py").get_config("proxy_anchor")
    for override in overrides:
        path, _, value = override.removeprefix("--config.").partition("=")
        is_word = value.isalpha() and value not in ("True", "False")
        value = value if is_word else ast.literal_eval(value)
        made.update_from_flattened_dict({path: value})
    ours = {path: value for path, value in config.leaves(made) if path not in OURS}
    expected = OFFICIAL | {
        "loss.name": "proxy_anchor",
        "loss.alpha": 32.0,
        "loss.margin": 0.1,
        "proxy_init": "normal_classes",
        "optimizer.clip_value": 1e9,
    }
    del expected["loss.scale"], expected["loss.label_smoothing"]
    assert ours == expected


@pytest.mark.parametrize("name", PROXY_ANCHOR_FLAGS)
def test_soft_triple_has_the_regulariser_of_its_authors(name):
    get_config = load(ROOT / "configs" / f"{name}.py").get_config
    assert get_config("ps_soft_triple").loss.tau == 0.2


@pytest.mark.parametrize(("name", "classes"), [("sop", 11318), ("inshop", 3997)])
def test_the_memory_has_the_documented_size(name, classes):
    module, sizes = load(ROOT / "configs" / f"{name}.py"), {}
    for loss in ("norm_softmax", "soft_triple"):
        made = module.get_config(f"memvir_{loss}")
        shape = jax.eval_shape(lambda m=made: builder._memory(parse_with_root(m), classes))
        sizes[loss] = f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shape)) / 1e9:.1f}"
    words = " ".join(module.__doc__.split())
    assert f"keep the memory at {sizes['norm_softmax']} GB" in words
    assert f"takes {sizes['soft_triple']} GB" in words


def test_an_unknown_variant_is_refused_with_a_list_of_the_known_ones():
    with pytest.raises(ValueError, match="unknown variant 'memvir_ps'.*ps_memvir_proxy_nca"):
        glyphs.get_config("memvir_ps")


# The commands of the README of htdt/hyp_metric for vit_small_patch16_224, with the defaults of its
# train.py and the images of each training set: --num_samples, --bs, --resize, iterations.
HYP_VIT = {
    "cub200": (9, 900, 256, 50, 5864),
    "cars196": (9, 882, 224, 300, 8054),
    "sop": (2, 900, 224, 200 * (11318 * 2 // 900), 59551),
    "inshop": (2, 900, 224, 400 * (3997 * 2 // 900), 25882),
}


@pytest.mark.parametrize("name", HYP_VIT)
def test_hyp_vit_has_the_recipe_of_its_authors(name):
    samples, batch_size, resize, steps, images = HYP_VIT[name]
    module = load(ROOT / "configs" / "hyp_vit.py")
    made = module.get_config(name)
    assert made.to_dict() == module.get_config(f"{name}_baseline_norm_softmax").to_dict()
    assert module.get_config(f"{name}_ps_proxy_nca").loss.name == "proxy_nca"
    parsed = config.parse(made)
    assert (parsed.data.name, parsed.data.n_instance) == (name, samples)
    assert (parsed.batch_size, parsed.data.resize, parsed.data.image_size) == (
        batch_size,
        resize,
        224,
    )
    of_epoch = images // batch_size
    assert (parsed.epochs - 1) * of_epoch < steps <= parsed.epochs * of_epoch
    of_optimizer = parsed.optimizer
    assert (of_optimizer.name, of_optimizer.learning_rate) == ("adamw", 3e-5)
    assert (of_optimizer.weight_decay, of_optimizer.clip_norm) == (0.01, 3.0)
    assert (parsed.model.dim, parsed.data.augmentation.crop_scale) == (128, (0.2, 1.0))


@pytest.mark.parametrize(("name", "decay_every"), [("cub200", 5), ("cars196", 10)])
def test_resnet50_has_the_recipe_of_proxy_anchors_authors(name, decay_every):
    made = load(ROOT / "configs" / "resnet50.py").get_config(f"{name}_proxy_anchor")
    parsed = config.parse(made)
    assert (parsed.data.name, parsed.model.backbone) == (name, "resnet50")
    assert (parsed.batch_size, parsed.epochs) == (120, 60)
    of_optimizer = parsed.optimizer
    assert (of_optimizer.frozen_epochs, of_optimizer.decay_every) == (5, decay_every)
    assert (of_optimizer.name, of_optimizer.learning_rate) == ("adamw", 1e-4)
    assert parsed.loss == losses.create("proxy_anchor") and parsed.model.freeze_bn


BAD = {
    "seed": (2**32, "config.seed is 4294967296; it must be an integer from 0 to 4294967295"),
    "skip_nonfinite": (-1, "config.skip_nonfinite is -1; it must be an integer from 0 to"),
    "epochs": (0, "config.epochs is 0; it must be an integer from 1 to"),
    "batch_size": (127, "config.batch_size is 127; it must be a multiple of .*n_instance, 2"),
    "micro_batches": (3, "config.micro_batches is 3; it must be a divisor of .*batch_size, 128"),
    "data.name": (
        "cifar",
        "config.data.name is 'cifar'; choose one of folder, table, tar, glyphs, .*inshop",
    ),
    "data.root": ("letters", "config.data.root is 'letters', but glyphs comes with its images"),
    "data.resize": (16, "config.data.resize is 16; it must be at least config.data.image_size, 32"),
    "data.test_size": (
        48,
        "config.data.resize is 32; it must be at least config.data.test_size, 48",
    ),
    "data.augmentation.crop_scale": (
        (0.9, 0.5),
        r"crop_scale is \(0.9, 0.5\); .* a minimum and a maximum",
    ),
    "data.cache": ("gpu", "config.data.cache is 'gpu'; choose one of none, host, device"),
    "data.cache_size": (0, "config.data.cache_size is 0; it must be an integer from 1 to"),
    "model.channels": ("RGB", "config.model.channels is 'RGB'; choose one of rgb, bgr, or None"),
    "model.freeze_bn_affine": (True, "freeze_bn_affine is True, but config.model.freeze_bn is"),
    "data.validation_fold": (1, "validation_fold is 1; with .*validation_classes=0.0 .* below 1"),
    "evaluation.test": (
        False,
        "evaluation.test is False, but .*validation_classes is 0",
    ),
    "model.train_from": ("layer4", "train_from is 'layer4'; with conv4 choose one of all, block2"),
    "model.pooling": ("max", "config.model.pooling is 'max'; choose one of gap, gmp"),
    "model.backbone": ("bninception", "config.model.width is 48, but bninception has no width"),
    "model.pretrained": ("x.pth", "config.model.pretrained is 'x.pth'; choose none, a file that"),
    "optimizer.learning_rate": (0.0, "config.optimizer.learning_rate is 0.0; .* number above 0"),
    "optimizer.clip_value": (-1.0, "clip_value is -1.0; it must be a finite number above 0, or"),
    "optimizer.decay_epochs": ((9, 9), r"decay_epochs is \(9, 9\); it must be ascending integers"),
    "optimizer.decay_every": (-1, "decay_every is -1; it must be an integer from 0 to"),
    "proxy_synthesis.ratio": (1e-3, "ratio is 0.001, which makes no synthetic class of 128 images"),
    "proxy_synthesis.lam": (1.5, "lam is 1.5; it must be a finite number at least 0 and at most 1"),
    "proxy_synthesis.mix": ("none", "mix is 'none'; choose one of both, proxies, embeddings"),
    "evaluation.recall_at": ((2, 4), "config.evaluation.recall_at is .* with 1"),
    "memvir.warmup_epochs": (99, "warmup_epochs is 99, but the run ends after"),
    "checkpoint.keep_every": (6, "keep_every is 6; it must be a multiple of .*every_epochs, 4"),
    "wandb": ("my/letters", "config.wandb is 'my/letters'; it must be a project's name at Weights"),
    "mlflow": ("letters\n", r"config.mlflow is .*; it must be the name of an MLflow experiment"),
    "loss.name": (
        "n_pair",
        "config.loss.name is 'n_pair'; choose one of softmax, virtual_softmax",
    ),
}


@pytest.mark.parametrize("path", BAD)
def test_an_invalid_value_is_refused_with_its_path(path):
    value, message = BAD[path]
    made = glyphs.get_config("memvir")
    made.data.n_instance = 2
    made.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        config.parse(made)


def test_the_device_cache_holds_images_of_at_least_the_evaluated_size():
    made = glyphs.get_config()
    made.data.cache_size = 31
    config.parse(made)
    made.data.cache = "device"
    with pytest.raises(ValueError, match=r"cache_size is 31; .* at least config.data.resize, 32"):
        config.parse(made)


def test_rematerialisation_is_refused_for_backbones_without_blocks():
    made = glyphs.get_config()
    made.model.update(backbone="resnet18", remat=True)
    config.parse(made)
    made.model.backbone = "conv4"
    with pytest.raises(ValueError, match=r"config.model.remat is True, but conv4 has no blocks"):
        config.parse(made)


def test_stochastic_depth_is_refused_without_blocks_that_train():
    made = glyphs.get_config()
    made.model.update(backbone="resnet18", drop_path=0.1)
    config.parse(made)
    made.model.train_from = "head"
    with pytest.raises(ValueError, match=r"drop_path is 0.1, but .*train_from='head' no block"):
        config.parse(made)
    made.model.update(backbone="conv4", train_from="all")
    with pytest.raises(ValueError, match=r"drop_path is 0.1, but conv4 has no residual blocks"):
        config.parse(made)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "erasing"])
def test_cached_features_have_no_changes_of_the_training_step(name):
    made = load(ROOT / "configs" / "grocery.py").get_config()
    made.data.augmentation[name] = 0.5
    with pytest.raises(ValueError, match=rf"augmentation.{name} is 0.5, but the views of .*cache"):
        config.parse(made)
    made.data.cache = "host"
    config.parse(made)


def test_decay_epochs_and_decay_every_are_exclusive():
    made = load(ROOT / "configs" / "cars196.py").get_config()
    made.optimizer.decay_every = 10
    with pytest.raises(ValueError, match=r"decay_every is 10 and .*decay_epochs \(50,\); set"):
        config.parse(made)
    made.optimizer.decay_epochs = ()
    config.parse(made)


def test_all_errors_are_reported_at_once(tmp_path):
    made = glyphs.get_config("memvir")
    made.update_from_flattened_dict({path: value for path, (value, _) in BAD.items()})
    with pytest.raises(ValueError) as error:
        run.train(made, tmp_path / "run")
    # Checks of several settings are made only if each setting is valid by itself.
    reported = [line.split()[0].removeprefix("config.") for line in str(error.value).splitlines()]
    together = {"batch_size", "data.root", "model.backbone", "memvir.warmup_epochs"}
    # The message about data.test_size begins with data.resize.
    assert set(reported) == BAD.keys() - together - {"data.test_size"}
    assert len(reported) == len(set(reported))
    assert not (tmp_path / "run").exists()


NOT_NUMBERS = (True, "1", math.nan, -1, 1e300, (), None)
BAD_OF_TYPE = {
    bool: (0, "yes", None),
    int: (*NOT_NUMBERS, 1.5, 2**70),
    float: (*NOT_NUMBERS, math.inf, -math.inf, -0.5),
    str: (3, None, "\0", ("gap",)),
    tuple: (3, None, "12", (math.nan,), ("1",), (-1,), (True, 1.5)),
}
OPTIONAL = {
    "data.test_size": int,
    "model.width": int,
    "model.stem": str,
    "model.channels": str,
    "model.normalisation": str,
    "proxy_synthesis.lam": float,
    "optimizer.clip_value": float,
    "optimizer.clip_norm": float,
}


def every_setting():
    for loss in losses.names():
        for path, value in config.leaves(glyphs.get_config(f"ps_memvir_{loss}")):
            if path.startswith("loss.") or loss == losses.names()[0]:
                yield loss, path, OPTIONAL.get(path, type(value))


@pytest.mark.parametrize(("loss", "path", "kind"), list(every_setting()))
def test_every_setting_is_checked(loss, path, kind):
    """A new setting without a check, or a hyper-parameter without bounds, fails here."""
    settings = glyphs.get_config(f"ps_memvir_{loss}").to_dict()
    *sections, name = path.split(".")
    section = functools.reduce(dict.get, sections, settings)
    for bad in BAD_OF_TYPE[kind]:
        if bad is not None or path not in OPTIONAL:
            section[name] = bad
            # As read from a file: a typed ConfigDict would refuse more of these.
            with pytest.raises(ValueError, match=rf"config\.{path} is .*; (it must be|choose) "):
                config.parse(ConfigDict(settings))


@dataclasses.dataclass(frozen=True)
class Banded(losses.NormSoftmax):
    """A custom loss with fields of every type."""

    shape: str = "box"
    bands: tuple[float, ...] = (0.5, 1.0)
    shift: int = 0
    hard: bool = False

    def logits(self, embeddings, proxies):
        return super().logits(embeddings, proxies) * self.bands[0]


BANDED = f"{__name__}:Banded"


def banded_config(**hyperparameters):
    made = glyphs.get_config("ps_memvir")
    with made.unlocked():
        made.loss = ConfigDict(config.loss_to_dict(Banded(**hyperparameters)))
    return made


def test_the_fields_of_a_custom_loss_are_settings_of_any_type(tmp_path):
    expected = Banded(scale=23.0, shape="disc", bands=(0.25, 2.0), shift=-1, hard=True)
    made = banded_config(**dataclasses.asdict(expected))
    assert made.loss.name.endswith(":Banded")
    resume.claim(tmp_path, config.parse(made))
    read = config.parse(run_directory.read_config(tmp_path))
    assert read.loss == config.parse(made).loss == expected
    assert hash(read.loss) == hash(expected)


@pytest.mark.parametrize(
    ("field", "bad"), [("shape", 1), ("bands", ("a",)), ("bands", 0.5), ("shift", 0.5), ("hard", 1)]
)
def test_a_custom_loss_is_checked_by_the_types_of_its_fields(field, bad):
    made = banded_config().to_dict()
    made["loss"][field] = bad
    with pytest.raises(ValueError, match=rf"config\.loss\.{field} is .*; it must be "):
        config.parse(ConfigDict(made))


@dataclasses.dataclass(frozen=True)
class Windowed(losses.NormSoftmax):
    """A loss with a field whose default implies no check."""

    window: float | None = None


def test_a_field_whose_default_implies_no_check_is_reported():
    with pytest.raises(TypeError, match="window is None by default, .* dml_jax.settings.setting"):
        made = glyphs.get_config().to_dict()
        made["loss"] = {"name": f"{__name__}:Windowed", "scale": 23.0, "window": None}
        config.parse(ConfigDict(made))


@pytest.mark.parametrize("name", ["n_pair", "no_such_file:Loss", "math:nothing", "math:pi"])
def test_an_unknown_loss_is_refused(name):
    made = glyphs.get_config()
    made.loss.name = name
    with pytest.raises(ValueError, match=f"config.loss.name is '{name}'; choose one of softmax"):
        config.parse(made)


def test_unknown_and_missing_settings_are_reported():
    made = glyphs.get_config("cosface")
    with made.unlocked():
        made.momentum = 0.9
        made.loss.name = "proxy_nca"
        del made.data.resize
    with pytest.raises(ValueError) as error:
        config.parse(made)
    assert sorted(str(error.value).splitlines()) == [
        "config.data.resize is missing",
        "config.loss.margin is no setting of proxy_nca",
        "config.momentum is no setting",
    ]


def test_a_run_of_an_earlier_version_has_the_defaults_of_newer_settings(tmp_path):
    made = glyphs.get_config("memvir_cosface")
    resume.claim(tmp_path, config.parse(made))
    recorded = json.loads((tmp_path / "config.json").read_text())
    for path in ("xbm", "model.prompts", "loss.label_smoothing", "evaluation.recall_at"):
        *groups, name = path.split(".")
        del functools.reduce(dict.get, groups, recorded)[name]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    read = run_directory.read_config(tmp_path)
    assert config.parse(read) == config.parse(made)
    assert resume.check(tmp_path, config.parse(made)) == []
    made.loss.label_smoothing = 0.1
    with pytest.raises(ValueError, match="loss.label_smoothing"):
        resume.check(tmp_path, config.parse(made))
    recorded["loss"]["name"] = "unknown"
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match="config.loss.name is 'unknown'"):
        config.parse(run_directory.read_config(tmp_path))


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_the_order_of_channels_reaches_the_network(channels, tmp_path):
    made = glyphs.get_config()
    made.model.channels = channels
    resume.claim(tmp_path, config.parse(made))
    # Search and export build the network from the recorded config.
    read = config.parse(run_directory.read_config(tmp_path))
    network = builder.make_network(read, sharding.make_mesh(jax.devices()[:1]))
    assert network.embedder.backbone.input_normalisation.channels == channels


@pytest.mark.parametrize(("backbone", "size"), [("conv4", 15), ("bninception", 40)])
def test_images_that_a_backbone_cannot_halve_are_refused(backbone, size):
    made = glyphs.get_config()
    made.model.update(backbone=backbone, width=None, stem=None)
    made.data.update(image_size=size, resize=size)
    with pytest.raises(ValueError, match=f"image_size is {size}: {backbone} cannot halve images"):
        config.parse(made)


@pytest.mark.parametrize("root", ["", "photos"])
def test_a_data_set_without_included_images_needs_a_root(root):
    made = load(ROOT / "configs" / "folder.py").get_config()
    made.data.root = root
    if root:
        config.parse(made)
    else:
        with pytest.raises(ValueError, match="config.data.root is empty; .* where folder is"):
            config.parse(made)


def test_pretrained_weights_require_the_pretrained_width_and_stem():
    made = glyphs.get_config()
    made.model.update(
        backbone="resnet18", width=16, stem="small", pretrained="hf:timm/resnet18.tv_in1k"
    )
    with pytest.raises(ValueError) as error:
        config.parse(made)
    assert [line.partition(";")[0] for line in str(error.value).splitlines()] == [
        "config.model.width is 16, but resnet18 was pretrained with 64",
        "config.model.stem is small, but resnet18 was pretrained with imagenet",
    ]
    made.model.update(width=64, stem="imagenet")
    config.parse(made)
    made.model.update(width=None, stem=None)
    config.parse(made)
