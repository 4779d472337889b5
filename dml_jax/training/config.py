"""What can be set, what it starts as, and what a variant changes."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from dml_jax import data, losses
from dml_jax.models import (
    BACKBONES,
    HEAD_INITS,
    POOLINGS,
    backbone_options,
    check_image_size,
    pretrained,
)
from dml_jax.models.normalisation import CHANNELS
from dml_jax.models.resnet import STEMS
from dml_jax.training import optimizer, rules, state

METHODS = ("baseline", "ps", "memvir", "ps_memvir", "memvir_baseline")
"""What a variant may add to a loss; see `with_variant`."""

_DTYPES = ("float32", "bfloat16")


def default() -> ConfigDict:
    """The settings that every data set's config starts from: the official CARS196 recipe."""
    return ConfigDict(
        {
            "seed": 0,
            # The same bits at every run on GPUs too, which costs speed. CPUs need no setting.
            "deterministic": False,
            # Steps in a row that may be skipped, because loss or gradient are not finite, before
            # the run stops.
            "skip_nonfinite": 0,
            "epochs": 130,
            "batch_size": 128,
            # Equal parts in which a batch is embedded, one after another, to save memory. The loss
            # is of the whole batch; batch statistics, where they train, are of a part.
            "micro_batches": 1,
            "data": {
                "name": "folder",
                "root": "",
                # What to do about images that cannot be read: "fail", or "skip" and count them.
                "unreadable": "fail",
                # Share of the training classes that is held out to choose the best epoch by.
                "validation_classes": 0.0,
                # Images of each class in a batch; 1 draws images without regard to class.
                "n_instance": 1,
                "image_size": 224,
                # Shorter side of a test image before its centre is cropped to image_size.
                "resize": 256,
                # See dml_jax.data.Augmentation.
                "augmentation": dataclasses.asdict(data.Augmentation()),
                # Processes that decode images; 0 decodes in the training process.
                "num_workers": 4,
                # "host" keeps decoded images in memory, and changes nothing else. "device" keeps
                # them, smaller, in the devices' memory, and crops them inside the step.
                "cache": "none",
                # Of "device": shorter side of an image there; one that is smaller stays so.
                "cache_size": 320,
            },
            "model": {
                "backbone": "bninception",
                # Of the ResNets; by default what they were pretrained with, 64 and "imagenet".
                "width": config_dict.placeholder(int),
                "stem": config_dict.placeholder(str),
                # "none", a .safetensors file, or "hf:OWNER/NAME" such as hf:timm/resnet50.tv_in1k.
                "pretrained": "weights/bninception.safetensors",
                # "rgb" or "bgr", in which the backbone gets an image's channels; by default as its
                # weights were trained.
                "channels": config_dict.placeholder(str),
                "pooling": "gap",
                "dim": 512,
                # Initial values of the linear head; see dml_jax.models.Embedder.
                "head_init": "uniform",
                # Whether running statistics normalise in training too, and stay as they are.
                "freeze_bn": True,
                # Whether their scale and bias stay as they are too, without weight decay.
                "freeze_bn_affine": False,
                "dtype": "float32",
                # Whether activations within blocks are computed again on the way back, to save
                # memory; not of conv4, which would save none.
                "remat": False,
            },
            "loss": {"name": "norm_softmax", "scale": 23.0},
            "proxy_init": "uniform_dim",
            # ratio: synthetic classes per sample; 0 is no Proxy Synthesis.
            "proxy_synthesis": {"ratio": 0.0, "alpha": 0.4},
            # num_steps: earlier steps whose classes take part; 0 is no MemVir.
            "memvir": {
                "num_steps": 0,
                "step_gap": 0,
                "warmup_epochs": 0,
                "dtype": "float32",
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 1e-4,
                "proxy_learning_rate": 1e-2,
                "eps": 0.01,
                "weight_decay": 1e-4,
                # Each learning rate is multiplied by decay_rate at the start of these epochs.
                "decay_rate": 0.1,
                "decay_epochs": (50,),
                # Or after every so many epochs, if this is not 0 and decay_epochs is ().
                "decay_every": 0,
                # Bound on the size of each element of a gradient; none by default.
                "clip_value": config_dict.placeholder(float),
                # Epochs at the beginning in which the backbone stays as it is.
                "frozen_epochs": 0,
            },
            "evaluation": {
                "every_epochs": 5,
                "recall_at": (1, 2, 4, 8),
                "nmi": False,
                # Evaluations without a better R@1, RP or MAP@R that end a run early; 0 for none.
                "patience": 0,
            },
            "checkpoint": {"every_epochs": 1, "keep_last": 2},
            # Project of Weights & Biases that is told too; none by default.
            "wandb": "",
        }
    )


def with_variant(
    config: ConfigDict,
    variant: str,
    *,
    proxy_synthesis: Mapping[str, Any],
    memvir: Mapping[str, Any],
    loss_settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> ConfigDict:
    """Applies a variant to a data set's config, and locks it.

    A variant is a method and a loss, `METHOD_LOSS`: the method one of `METHODS`, the loss any of
    `dml_jax.losses`. Either may be left out, for `baseline` and for `norm_softmax`.
    `memvir_baseline` is the bare loss with all other settings of `memvir`, such as its epochs and
    learning rates: what MemVir has to be compared with.

    Args:
        config: with the settings of the data set and of the variant's method and loss.
        variant: such as `memvir`, `ps_proxy_nca` or `baseline`.
        proxy_synthesis: its settings for this data set, used by the variants that have it.
        memvir: its settings for this data set, used by the variants that have it.
        loss_settings: hyper-parameters that are not a loss's defaults, by loss.

    Returns:
        The same config, locked.

    Raises:
        ValueError: unknown variant.
    """
    method, loss = parse_variant(variant)
    made = losses.create(loss, **(loss_settings or {}).get(loss, {}))
    config.loss = ConfigDict({"name": loss, **dataclasses.asdict(made)})
    if method in ("ps", "ps_memvir"):
        config.proxy_synthesis.update(proxy_synthesis)
    if method in ("memvir", "ps_memvir"):
        config.memvir.update(memvir)
    return config.lock()


def parse_variant(variant: str) -> tuple[str, str]:
    """The method and the loss of a variant; see `with_variant`.

    Raises:
        ValueError: unknown variant.
    """
    names = {f"{method}_{loss}": (method, loss) for method in METHODS for loss in losses.NAMES}
    names |= {method: (method, "norm_softmax") for method in METHODS}
    names |= {loss: ("baseline", loss) for loss in losses.NAMES}
    if variant not in names:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(sorted(names))}")
    return names[variant]


def _ascend(epochs: Collection[int]) -> bool:
    return list(epochs) == sorted(set(epochs))


def _is_range(ends: Collection[float]) -> bool:
    return len(ends) == 2 and list(ends) == sorted(ends)


RULES = {
    # JAX would cut longer seeds to 32 bits, and give the random numbers of another.
    "seed": rules.whole(0, 2**32 - 1),
    "deterministic": rules.flag(),
    "skip_nonfinite": rules.whole(0),
    "epochs": rules.whole(1),
    "batch_size": rules.whole(1),
    "micro_batches": rules.whole(1),
    "data.name": rules.choice(data.NAMES),
    "data.root": rules.text("it must be the path of a directory", lambda _: True),
    "data.unreadable": rules.choice(data.POLICIES),
    "data.validation_classes": rules.number(least=0.0, below=1.0),
    "data.n_instance": rules.whole(1),
    "data.image_size": rules.whole(1, 2**16),
    "data.resize": rules.whole(1, 2**16),
    "data.augmentation.crop_scale": rules.several(
        rules.number(above=0.0, most=1.0), "it must be least and most, above 0, up to 1", _is_range
    ),
    "data.augmentation.flip": rules.flag(),
    "data.augmentation.rotation": rules.number(least=0.0, most=180.0),
    "data.augmentation.zoom": rules.number(least=0.0, below=1.0),
    "data.augmentation.shift": rules.number(least=0.0, below=1.0),
    "data.num_workers": rules.whole(0),
    "data.cache": rules.choice(("none", "host", "device")),
    "data.cache_size": rules.whole(1, 2**16),
    "model.backbone": rules.choice(BACKBONES),
    "model.width": rules.optional(rules.whole(1)),
    "model.stem": rules.optional(rules.choice(STEMS)),
    "model.pretrained": rules.text(
        f"choose {pretrained.NONE}, a file that ends in .safetensors, or hf:OWNER/NAME",
        pretrained.is_place,
    ),
    "model.channels": rules.optional(rules.choice(CHANNELS)),
    "model.pooling": rules.choice(POOLINGS),
    "model.dim": rules.whole(1),
    "model.head_init": rules.choice(HEAD_INITS),
    "model.freeze_bn": rules.flag(),
    "model.freeze_bn_affine": rules.flag(),
    "model.dtype": rules.choice(_DTYPES),
    "model.remat": rules.flag(),
    "loss.name": rules.choice(losses.NAMES),
    "proxy_init": rules.choice(state.PROXY_INITS),
    "proxy_synthesis.ratio": rules.number(least=0.0),
    "proxy_synthesis.alpha": rules.number(above=0.0),
    "memvir.num_steps": rules.whole(0),
    "memvir.step_gap": rules.whole(0),
    "memvir.warmup_epochs": rules.whole(0),
    "memvir.dtype": rules.choice(_DTYPES),
    "optimizer.name": rules.choice(optimizer.NAMES),
    "optimizer.learning_rate": rules.number(above=0.0),
    "optimizer.proxy_learning_rate": rules.number(above=0.0),
    "optimizer.eps": rules.number(above=0.0),
    "optimizer.weight_decay": rules.number(least=0.0),
    "optimizer.decay_rate": rules.number(above=0.0, most=1.0),
    "optimizer.decay_epochs": rules.several(
        rules.whole(1), "it must be ascending whole numbers of at least 1, or none", _ascend
    ),
    "optimizer.decay_every": rules.whole(0),
    "optimizer.clip_value": rules.optional(rules.number(above=0.0)),
    "optimizer.frozen_epochs": rules.whole(0),
    "evaluation.every_epochs": rules.whole(1),
    "evaluation.recall_at": rules.several(
        rules.whole(1), "it must be whole numbers of at least 1, with 1", lambda ks: 1 in ks
    ),
    "evaluation.nmi": rules.flag(),
    "evaluation.patience": rules.whole(0),
    "checkpoint.every_epochs": rules.whole(1),
    "checkpoint.keep_last": rules.whole(1),
    "wandb": rules.text(
        "it must be a project's name at Weights & Biases, up to 128 characters, none of them one "
        "of /\\#?%:, or empty",
        lambda name: len(name) <= 128 and not set(name) & set("/\\#?%:"),
    ),
}
"""What each setting may be, by its path; the hyper-parameters of a loss are below."""

LOSS_RULES = {
    "alpha": rules.number(above=0.0),
    "bias": rules.flag(),
    "centers_per_class": rules.whole(1),
    "gamma": rules.number(above=0.0),
    "la": rules.number(above=0.0),
    "margin": rules.number(least=0.0),
    "arcface.margin": rules.number(least=0.0, below=math.pi),
    "sphereface.margin": rules.number(least=1.0),
    "scale": rules.number(above=0.0),
    "tau": rules.number(least=0.0),
}
"""What each hyper-parameter may be, of all losses that have it or of one."""

_BY_TYPE = {
    bool: rules.flag(),
    int: rules.whole(-(2**31)),
    float: rules.number(),
    str: rules.text("it must be text", lambda _: True),
}


def _loss_rules(name: Any) -> dict[str, rules.Rule]:
    """What the hyper-parameters of a loss may be, by path; one not named above goes by its type."""
    if name not in losses.NAMES:
        return {}
    return {
        f"loss.{field}": LOSS_RULES.get(f"{name}.{field}")
        or LOSS_RULES.get(field)
        or _by_type(value, f"{name}.{field}")
        for field, value in dataclasses.asdict(losses.create(name)).items()
    }


def _by_type(default: Any, of: str) -> rules.Rule:
    if isinstance(default, tuple) and default:
        each = _by_type(default[0], of)
        return rules.several(each, f"it must be several; of each, {each.allowed}", lambda _: True)
    if type(default) not in _BY_TYPE:
        raise TypeError(
            f"nothing says what {of} of a loss may be, which is {default!r} by default: name it in "
            "LOSS_RULES"
        )
    return _BY_TYPE[type(default)]


def _resize(resize: int, size: int) -> str | None:
    if resize >= size:
        return None
    return f"config.data.resize is {resize}; it must be at least config.data.image_size, {size}"


def _cache_size(cache: str, cache_size: int, resize: int) -> str | None:
    if cache != "device" or cache_size >= resize:
        return None
    return (
        f"config.data.cache_size is {cache_size}; it must be at least config.data.resize, {resize}"
    )


def _root(name: str, root: str) -> str | None:
    if name in data.WITH_IMAGES:
        return f"config.data.root is {root!r}, but {name} comes with its images" if root else None
    return None if root else f"config.data.root is empty; it must say where {name} is"


def _instances(batch_size: int, n_instance: int) -> str | None:
    if batch_size % n_instance == 0:
        return None
    return (
        f"config.batch_size is {batch_size}; it must be a multiple of config.data.n_instance, "
        f"{n_instance}"
    )


def _parts(batch_size: int, micro_batches: int) -> str | None:
    if batch_size % micro_batches == 0:
        return None
    return (
        f"config.micro_batches is {micro_batches}; it must be a divisor of config.batch_size, "
        f"{batch_size}"
    )


def _image_size(backbone: str, size: int) -> str | None:
    try:
        check_image_size(backbone, size)
    except ValueError as error:
        return f"config.data.image_size is {size}: {error}"
    return None


def _warmup(warmup: int, epochs: int, num_steps: int) -> str | None:
    if not num_steps or warmup < epochs:
        return None
    return (
        f"config.memvir.warmup_epochs is {warmup}, but the run ends after {epochs}, before the "
        "memory is used"
    )


def _mixtures(ratio: float, batch_size: int) -> str | None:
    if ratio == 0 or ratio * batch_size >= 1:
        return None
    return (
        f"config.proxy_synthesis.ratio is {ratio}, which makes no synthetic class of "
        f"{batch_size} images; it must be 0, or at least 1 / config.batch_size"
    )


def _width(value: int | None, backbone: str, place: str) -> str | None:
    return _backbone_option("width", value, backbone, place)


def _stem(value: str | None, backbone: str, place: str) -> str | None:
    return _backbone_option("stem", value, backbone, place)


def _backbone_option(option: str, value: Any, backbone: str, place: str) -> str | None:
    defaults = backbone_options(backbone)
    if value is None:
        return None
    if option not in defaults:
        return f"config.model.{option} is {value}, but {backbone} has no {option}"
    if place == pretrained.NONE or value == defaults[option]:
        return None
    return (
        f"config.model.{option} is {value}, but {backbone} was pretrained with "
        f"{defaults[option]}; leave it out, or set config.model.pretrained to none"
    )


def _remat(remat: bool, backbone: str) -> str | None:
    if not remat or "remat" in backbone_options(backbone):
        return None
    return (
        f"config.model.remat is True, but {backbone} has no blocks whose activations, computed "
        "again, would save memory"
    )


def _affine(freeze_bn_affine: bool, freeze_bn: bool) -> str | None:
    if freeze_bn or not freeze_bn_affine:
        return None
    return (
        "config.model.freeze_bn_affine is True, but config.model.freeze_bn is False; set both, or "
        "neither"
    )


def _decays(every: int, epochs: Collection[int]) -> str | None:
    if not every or not len(epochs):
        return None
    return (
        f"config.optimizer.decay_every is {every} and config.optimizer.decay_epochs {epochs}; set "
        "the first to 0, or the second to ()"
    )


_TOGETHER: dict[Callable[..., str | None], tuple[str, ...]] = {
    _resize: ("data.resize", "data.image_size"),
    _cache_size: ("data.cache", "data.cache_size", "data.resize"),
    _root: ("data.name", "data.root"),
    _instances: ("batch_size", "data.n_instance"),
    _parts: ("batch_size", "micro_batches"),
    _image_size: ("model.backbone", "data.image_size"),
    _warmup: ("memvir.warmup_epochs", "epochs", "memvir.num_steps"),
    _mixtures: ("proxy_synthesis.ratio", "batch_size"),
    _width: ("model.width", "model.backbone", "model.pretrained"),
    _stem: ("model.stem", "model.backbone", "model.pretrained"),
    _remat: ("model.remat", "model.backbone"),
    _affine: ("model.freeze_bn_affine", "model.freeze_bn"),
    _decays: ("optimizer.decay_every", "optimizer.decay_epochs"),
}
"""What says that settings do not fit one another, if each is right by itself; None if they do."""


def validate(config: ConfigDict) -> None:
    """Checks every setting that needs no data to be checked.

    Args:
        config: a whole config.

    Raises:
        ValueError: lists everything that is wrong, by its path in the config.
    """
    values = dict(leaves(config))
    of_loss = _loss_rules(values.get("loss.name"))
    wrong = {path: f"config.{path} is missing" for path in RULES if path not in values}
    for path, value in values.items():
        rule = (RULES | of_loss).get(path)
        if rule is not None and not rule.holds(value):
            wrong[path] = f"config.{path} is {value!r}; {rule.allowed}"
        elif rule is None and (of_loss or not path.startswith("loss.")):
            wrong[path] = f"config.{path} is no setting" + (
                f" of {values['loss.name']}" if path.startswith("loss.") else ""
            )
    for complaint, paths in _TOGETHER.items():
        if not wrong.keys() & set(paths):
            message = complaint(*(values[path] for path in paths))
            if message is not None:
                wrong[complaint.__name__] = message
    if wrong:
        raise ValueError("\n".join(wrong.values()))


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a config by its path, which begins with `prefix`."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
