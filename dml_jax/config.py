"""What can be set, what it starts as, and what a variant changes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from dml_jax import data, losses
from dml_jax.models import BACKBONES, POOLINGS, backbone_options, pretrained
from dml_jax.models.resnet import STEMS
from dml_jax.training import optimizer, state


def default() -> ConfigDict:
    """The settings that every data set's config starts from: the official CARS196 recipe."""
    return ConfigDict(
        {
            "seed": 0,
            # The same bits at every run on GPUs too, which costs speed. CPUs need no setting.
            "deterministic": False,
            "epochs": 130,
            "batch_size": 128,
            "data": {
                "name": "folder",
                "root": "",
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
            },
            "model": {
                "backbone": "bninception",
                # Of the ResNets; by default what they were pretrained with, 64 and "imagenet".
                "width": config_dict.placeholder(int),
                "stem": config_dict.placeholder(str),
                # "none", a .safetensors file, or "hf:OWNER/NAME" such as hf:timm/resnet50.tv_in1k.
                "pretrained": "weights/bninception.safetensors",
                "pooling": "gap",
                "dim": 512,
                # Whether running statistics normalise in training too, and stay as they are.
                "freeze_bn": True,
                "dtype": "float32",
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
) -> ConfigDict:
    """Applies a variant to a data set's config, and locks it.

    A variant is a method and a loss, `METHOD_LOSS`: the method one of `baseline`, `ps`, `memvir`
    and `ps_memvir`, the loss any of `dml_jax.losses`. Either may be left out, for `baseline` and
    for `norm_softmax`.

    Args:
        config: with the data set's settings.
        variant: such as `memvir`, `ps_proxy_nca` or `baseline`.
        proxy_synthesis: its settings for this data set, used by the variants that have it.
        memvir: its settings for this data set, used by the variants that have it.

    Returns:
        The same config, locked.

    Raises:
        ValueError: unknown variant.
    """
    method, loss = parse_variant(variant)
    config.loss = ConfigDict({"name": loss, **dataclasses.asdict(losses.create(loss))})
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
    methods = ("baseline", "ps", "memvir", "ps_memvir")
    names = {f"{method}_{loss}": (method, loss) for method in methods for loss in losses.NAMES}
    names |= {method: (method, "norm_softmax") for method in methods}
    names |= {loss: ("baseline", loss) for loss in losses.NAMES}
    if variant not in names:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(sorted(names))}")
    return names[variant]


def validate(config: ConfigDict) -> None:
    """Checks every setting that needs no data to be checked.

    Args:
        config: a whole config.

    Raises:
        ValueError: lists everything that is wrong, by its path in the config.
    """
    wrong: list[str] = []

    def one_of(path: str, allowed: Any) -> None:
        value = _at(config, path)
        if value not in allowed:
            wrong.append(f"config.{path} is {value!r}; choose one of {', '.join(allowed)}")

    def at_least(least: int, *paths: str) -> None:
        for path in paths:
            if not _at(config, path) >= least:
                wrong.append(f"config.{path} is {_at(config, path)}; it must be at least {least}")

    def positive(*paths: str) -> None:
        for path in paths:
            if not _at(config, path) > 0:
                wrong.append(f"config.{path} is {_at(config, path)}; it must be above 0")

    one_of("model.backbone", BACKBONES)
    if config.model.stem is not None:
        one_of("model.stem", STEMS)
    one_of("model.pooling", POOLINGS)
    one_of("model.dtype", ("float32", "bfloat16"))
    one_of("memvir.dtype", ("float32", "bfloat16"))
    one_of("proxy_init", state.PROXY_INITS)
    one_of("optimizer.name", optimizer.NAMES)
    at_least(1, "epochs", "batch_size", "data.n_instance", "data.image_size")
    if config.model.width is not None:
        at_least(1, "model.width")
    at_least(1, "model.dim", "evaluation.every_epochs", "checkpoint.every_epochs")
    at_least(1, "checkpoint.keep_last")
    at_least(0, "seed", "data.num_workers", "proxy_synthesis.ratio", "memvir.num_steps")
    at_least(0, "optimizer.frozen_epochs", "evaluation.patience", "data.validation_classes")
    at_least(0, "memvir.step_gap", "memvir.warmup_epochs", "optimizer.weight_decay")
    at_least(config.data.image_size, "data.resize")
    positive("proxy_synthesis.alpha", "optimizer.learning_rate", "optimizer.eps")
    positive("optimizer.proxy_learning_rate", "optimizer.decay_rate")
    recall_at = tuple(config.evaluation.recall_at)
    if 1 not in recall_at or not all(isinstance(k, int) and k >= 1 for k in recall_at):
        wrong.append(
            f"config.evaluation.recall_at is {recall_at}; it must be whole numbers, with 1"
        )
    if config.data.validation_classes >= 1:
        wrong.append(
            f"config.data.validation_classes is {config.data.validation_classes}; it is a share of "
            "the training classes, below 1"
        )
    if config.memvir.num_steps and config.memvir.warmup_epochs >= config.epochs:
        wrong.append(
            f"config.memvir.warmup_epochs is {config.memvir.warmup_epochs}, but the run ends after "
            f"{config.epochs}, before the memory is used"
        )
    for path, create in (("loss", losses.create), ("data.augmentation", data.Augmentation)):
        try:
            create(**_at(config, path))
        except ValueError as error:
            wrong.append(f"config.{path}: {error}")
    if config.model.backbone in BACKBONES:
        wrong.extend(_wrong_options(config.model))
    try:
        pretrained.check_place(config.model.pretrained)
    except ValueError as error:
        wrong.append(f"config.model.pretrained: {error}")
    if wrong:
        raise ValueError("\n".join(wrong))


def _wrong_options(model: ConfigDict) -> Iterator[str]:
    defaults = backbone_options(model.backbone)
    for option in ("width", "stem"):
        value = model[option]
        if value is None:
            continue
        if option not in defaults:
            yield f"config.model.{option} is {value}, but {model.backbone} has no {option}"
        elif model.pretrained != pretrained.NONE and value != defaults[option]:
            yield (
                f"config.model.{option} is {value}, but {model.backbone} was pretrained with "
                f"{defaults[option]}; leave it out, or set config.model.pretrained to none"
            )


def _at(config: ConfigDict, path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config
