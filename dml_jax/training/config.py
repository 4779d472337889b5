"""The configuration of a run: all settings, from config files and flags and back.

Config files, `--config.x=` flags and `config.json` hold a ConfigDict, whose defaults `default`
makes from the dataclasses. `parse` converts it back, once, and checks everything.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from dml_jax import losses, settings
from dml_jax._utils.errors import UserError
from dml_jax.data.config import DataConfig
from dml_jax.evaluation.config import EvaluationConfig
from dml_jax.memvir import MemVirConfig
from dml_jax.mixup import MixupConfig
from dml_jax.models import check_image_size, create_backbone
from dml_jax.models.config import ModelConfig
from dml_jax.models.embedder import ALL, mixing_places, trainable_from
from dml_jax.proxy_synthesis import ProxySynthesisConfig
from dml_jax.settings import choice, flag, group, integer, setting, text, together
from dml_jax.training.optimizer import OptimizerConfig
from dml_jax.training.state import PROXY_INITS
from dml_jax.xbm import XbmConfig

SWITCHES = {
    "proxy_synthesis": "ratio",
    "memvir": "num_steps",
    "mixup": "alpha",
    "xbm": "num_steps",
}
"""Groups of settings of a method, and the setting that is 0 without it."""


def _parse_loss(values: Any, path: str, problems: dict[str, str]) -> losses.Loss:
    name = values.get("name") if isinstance(values, Mapping | ConfigDict) else None
    check = settings.registered(losses.LOSSES)
    if not check.holds(name):
        problems[f"{path}.name"] = f"{path}.name is {name!r}; {check.allowed()}"
        return losses.NormSoftmax()
    hyperparameters = {key: value for key, value in values.items() if key != "name"}
    loss = losses.LOSSES.get(str(name))
    if not issubclass(loss, losses.ProxyLoss | losses.PairLoss):
        problems[f"{path}.name"] = (
            f"{path}.name is {name!r}, which is derived from neither ProxyLoss nor PairLoss of "
            "dml_jax.losses"
        )
        return losses.NormSoftmax()
    return settings.parse(loss, hyperparameters, path, problems, of=f" of {name}")


def loss_to_dict(loss: losses.Loss) -> dict[str, Any]:
    """Returns the settings of a loss: its name and its hyper-parameters."""
    return {"name": losses.LOSSES.name_of(type(loss)), **settings.to_dict(loss)}


def _loss_group() -> Any:
    about = settings.Setting(
        "The loss's name and hyper-parameters; see `dml_jax.losses`.", None, False
    )
    return dataclasses.field(
        default_factory=losses.NormSoftmax,
        metadata={"group": about, "parse": _parse_loss, "to_dict": loss_to_dict},
    )


def _frozen_statistics(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Returns whether batch statistics are frozen, so that micro-batches have none of their own."""
    del old
    return new["model"]["freeze_bn"]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The interval between checkpoints and the number that are kept."""

    every_epochs: int = setting(1, integer(1), help="Epochs between checkpoints.")
    keep_last: int = setting(
        2, integer(1), help="Number of latest checkpoints kept, besides the best of each metric."
    )
    keep_every: int = setting(
        0,
        integer(0),
        help="Epochs between checkpoints that are kept for good, such as `step1200`; 0 keeps none.",
    )

    @together("keep_every", "every_epochs")
    def _kept(self) -> str | None:
        if self.keep_every % self.every_epochs == 0:
            return None
        return (
            f"config.checkpoint.keep_every is {self.keep_every}; it must be a multiple of "
            f"config.checkpoint.every_epochs, {self.every_epochs}, since only these are saved"
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run; the defaults are the official recipe for CARS196."""

    seed: int = setting(
        0,
        # JAX would cut longer seeds to 32 bits, and give the random numbers of another.
        integer(0, 2**32 - 1),
        help="Seed of all random numbers: initial values, batches, crops, mixtures.",
    )
    deterministic: bool = setting(
        False,
        flag(),
        help="Whether GPUs compute the same bits in every run, at the cost of speed; CPUs always "
        "do.",
    )
    skip_nonfinite: int = setting(
        0,
        integer(0),
        help="Steps in a row that may be skipped because loss or gradient are not finite, before "
        "the run stops.",
        resumable=True,
    )
    epochs: int = setting(130, integer(1), help="Epochs of training.", resumable=True)
    batch_size: int = setting(128, integer(1), help="Images in a batch, over all devices.")
    micro_batches: int = setting(
        1,
        integer(1),
        help="Number of equal micro-batches that embed a batch, one after another, to save memory. "
        "The loss is that of the whole batch; unless frozen, batch normalisation uses the "
        "statistics of each micro-batch.",
        resumable=_frozen_statistics,
    )
    data: DataConfig = group(DataConfig, help="The images.")
    model: ModelConfig = group(ModelConfig, help="The network.")
    loss: losses.Loss = _loss_group()
    proxy_init: str = setting(
        "uniform_dim",
        choice(PROXY_INITS),
        help="Initial proxies; see `dml_jax.training.state.initial_proxies`.",
    )
    proxy_synthesis: ProxySynthesisConfig = group(ProxySynthesisConfig, help="Proxy Synthesis.")
    memvir: MemVirConfig = group(MemVirConfig, help="MemVir.")
    mixup: MixupConfig = group(MixupConfig, help="Mixup and manifold mixup, for comparison.")
    xbm: XbmConfig = group(XbmConfig, help="Cross-batch memory, for losses of pairs.")
    optimizer: OptimizerConfig = group(OptimizerConfig, help="The optimizer.")
    evaluation: EvaluationConfig = group(
        EvaluationConfig, help="The evaluation by retrieval.", resumable=True
    )
    checkpoint: CheckpointConfig = group(CheckpointConfig, help="Checkpoints.", resumable=True)
    wandb: str = setting(
        "",
        text(
            "it must be a project's name at Weights & Biases, up to 128 characters, none of them "
            "one of /\\#?%:, or empty",
            lambda name: len(name) <= 128 and not set(name) & set("/\\#?%:"),
        ),
        help="Project at Weights & Biases that the metrics are logged to; empty for none.",
        resumable=True,
    )
    mlflow: str = setting(
        "",
        text(
            "it must be the name of an MLflow experiment, up to 256 printable characters without "
            "a space at either end, or empty",
            lambda name: len(name) <= 256 and name.isprintable() and name == name.strip(),
        ),
        help="Experiment at MLflow that the metrics are logged to; empty for none.",
        resumable=True,
    )

    @together("batch_size", "data.n_instance")
    def _instances(self) -> str | None:
        if self.batch_size % self.data.n_instance == 0:
            return None
        return (
            f"config.batch_size is {self.batch_size}; it must be a multiple of "
            f"config.data.n_instance, {self.data.n_instance}"
        )

    @together("batch_size", "micro_batches")
    def _micro_batches(self) -> str | None:
        if self.batch_size % self.micro_batches == 0:
            return None
        return (
            f"config.micro_batches is {self.micro_batches}; it must be a divisor of "
            f"config.batch_size, {self.batch_size}"
        )

    @together("model.backbone", "data.image_size")
    def _image_size(self) -> str | None:
        try:
            check_image_size(self.model.backbone, self.data.image_size)
        except ValueError as error:
            return f"config.data.image_size is {self.data.image_size}: {error}"
        return None

    @together("data.cache", "model.train_from", "model.backbone")
    def _features(self) -> str | None:
        if self.data.cache != "features" or self.model.train_from != ALL:
            return None
        return (
            "config.data.cache is 'features', but config.model.train_from is 'all', so nothing of "
            "the network is frozen; set it to 'head' or to a part of the backbone"
        )

    @together("evaluation.test", "data.validation_classes")
    def _result(self) -> str | None:
        if self.evaluation.test or self.data.validation_classes:
            return None
        return (
            "config.evaluation.test is False, but config.data.validation_classes is 0, so the run "
            "would have no scores; set one of them"
        )

    @together("memvir.warmup_epochs", "epochs", "memvir.num_steps")
    def _warmup(self) -> str | None:
        if not self.memvir.num_steps or self.memvir.warmup_epochs < self.epochs:
            return None
        return (
            f"config.memvir.warmup_epochs is {self.memvir.warmup_epochs}, but the run ends after "
            f"{self.epochs}, before the memory is used"
        )

    @together("loss", "proxy_synthesis.ratio", "memvir.num_steps", "mixup.alpha", "xbm.num_steps")
    def _method(self) -> str | None:
        with_proxies = {
            "config.proxy_synthesis.ratio": self.proxy_synthesis.ratio,
            "config.memvir.num_steps": self.memvir.num_steps,
            "config.mixup.alpha": self.mixup.alpha,
        }
        used = [path for path, value in with_proxies.items() if value]
        name = losses.LOSSES.name_of(type(self.loss))
        if isinstance(self.loss, losses.PairLoss) and used:
            return (
                f"{' and '.join(used)} must be 0: the loss {name} has no proxies; a "
                "memory for it is config.xbm.num_steps"
            )
        if self.xbm.num_steps and not isinstance(self.loss, losses.PairLoss):
            return (
                f"config.xbm.num_steps is {self.xbm.num_steps}, but the loss {name} has "
                f"no pairs; choose one of {', '.join(losses.pair_names())}, or config.memvir"
            )
        if self.mixup.alpha and len(used) > 1:
            return (
                f"{' and '.join(used)} are used together; a mixture of two images has no class "
                "that the others could use, so set one of them to 0"
            )
        return None

    @together("mixup.alpha", "batch_size", "micro_batches")
    def _partners(self) -> str | None:
        size, rest = divmod(self.batch_size, self.micro_batches)
        is_even = size % 2 == 0 or (self.micro_batches == 1 and size > 1)
        if not self.mixup.alpha or rest or is_even:
            return None
        return (
            f"config.mixup.alpha mixes the halves of a micro-batch, but it has {size} of "
            f"config.batch_size {self.batch_size}; choose config.micro_batches so that it is even"
        )

    @together("mixup.alpha", "mixup.depth", "model.backbone", "model.train_from")
    def _mixing_depth(self) -> str | None:
        backbone = create_backbone(self.model.backbone)
        if not self.mixup.alpha or self.model.train_from not in trainable_from(backbone):
            return None
        places = mixing_places(backbone, self.model.train_from)
        if self.mixup.depth < len(places):
            return None
        return (
            f"config.mixup.depth is {self.mixup.depth}, but the part of the network that trains "
            f"has {len(places)} places: the inputs of {', '.join(places)}; choose at most "
            f"{len(places) - 1}"
        )

    @together("xbm.warmup_epochs", "epochs", "xbm.num_steps")
    def _xbm_warmup(self) -> str | None:
        if not self.xbm.num_steps or self.xbm.warmup_epochs < self.epochs:
            return None
        return (
            f"config.xbm.warmup_epochs is {self.xbm.warmup_epochs}, but the run ends after "
            f"{self.epochs}, before the memory is used"
        )

    @together("proxy_synthesis.ratio", "batch_size")
    def _mixtures(self) -> str | None:
        ratio = self.proxy_synthesis.ratio
        if ratio == 0 or ratio * self.batch_size >= 1:
            return None
        return (
            f"config.proxy_synthesis.ratio is {ratio}, which makes no synthetic class of "
            f"{self.batch_size} images; it must be 0, or at least 1 / config.batch_size"
        )


def default() -> ConfigDict:
    """Returns the defaults of all settings, for a config file to change."""
    return _config_dict(Config())


def to_dict(config: Config) -> dict[str, Any]:
    """Returns a configuration as plain values, as `config.json` holds it."""
    return settings.to_dict(config)


def to_config_dict(config: Config) -> ConfigDict:
    """Returns a configuration as a locked ConfigDict, the inverse of `parse`."""
    return _config_dict(config).lock()


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recorded settings of a run, with the defaults of settings that are newer.

    Args:
        values: settings as an earlier version of the package recorded them, or this one.
    """
    try:
        loss = loss_to_dict(losses.create(values["loss"]["name"]))
    except (KeyError, TypeError, ValueError):
        loss = {}  # `parse` reports the unknown loss.
    # As JSON has them: without tuples, like the recorded values.
    defaults = json.loads(json.dumps(to_dict(Config()) | {"loss": loss}))
    return _merged(defaults, values)


def _merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **values}
    for name, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(values.get(name), Mapping):
            merged[name] = _merged(default, values[name])
    return merged


def _config_dict(group_of_settings: Any) -> ConfigDict:
    made = ConfigDict()
    for field in dataclasses.fields(group_of_settings):
        value = getattr(group_of_settings, field.name)
        if "to_dict" in field.metadata:
            made[field.name] = ConfigDict(field.metadata["to_dict"](value))
        elif "group" in field.metadata:
            made[field.name] = _config_dict(value)
        elif field.default is None:
            # A placeholder has a type, so that flags can set it.
            made[field.name] = config_dict.placeholder(typing.get_args(field.type)[0])
            made[field.name] = value
        else:
            made[field.name] = value
    return made


def parse(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Converts and checks a whole configuration.

    Args:
        config: all settings, as from a config file, flags or `config.json`.

    Raises:
        ValueError: lists everything that is wrong, by its path in the config.
    """
    problems: dict[str, str] = {}
    parsed = settings.parse(Config, config, "config", problems)
    if problems:
        raise UserError("\n".join(problems.values()))
    return parsed


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every setting of a config by its path, which begins with `prefix`."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
