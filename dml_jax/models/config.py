"""The settings of the network."""

import dataclasses

from dml_jax.models import pretrained
from dml_jax.models.embedder import (
    ALL,
    HEAD,
    HEAD_INITS,
    POOLINGS,
    prefix_tokens,
    trainable_from,
)
from dml_jax.models.normalisation import CHANNELS, NORMALISATIONS
from dml_jax.models.registry import BACKBONES, create_backbone
from dml_jax.models.resnet import STEMS
from dml_jax.settings import (
    choice,
    flag,
    integer,
    number,
    optional,
    registered,
    setting,
    text,
    together,
)

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The backbone, its weights and normalisation, and the head."""

    backbone: str = setting("bninception", registered(BACKBONES), help="The backbone.")
    width: int | None = setting(
        None,
        optional(integer(1)),
        help="Channels of the first stage; by default those the backbone was pretrained with.",
    )
    stem: str | None = setting(
        None,
        optional(choice(STEMS)),
        help="First layers of a ResNet; by default those it was pretrained with, `imagenet`.",
    )
    pretrained: str = setting(
        "weights/bninception.safetensors",
        text(
            f"choose {pretrained.NONE}, a file that ends in .safetensors, or hf:OWNER/NAME",
            pretrained.is_location,
        ),
        help="Pretrained weights: `none`, a .safetensors file, or `hf:OWNER/NAME` on the Hugging "
        "Face hub, such as `hf:timm/resnet50.tv_in1k`.",
    )
    normalisation: str | None = setting(
        None,
        optional(choice(NORMALISATIONS)),
        help="Mean and deviation of the input: `imagenet`, `inception` (0.5, as AugReg's and "
        "SigLIP's transformers), `clip` or `caffe`; by default that of the backbone.",
    )
    channels: str | None = setting(
        None,
        optional(choice(CHANNELS)),
        help="Order of an image's channels, `rgb` or `bgr`; by default that of the pretraining.",
    )
    pooling: str = setting(
        "gap",
        choice(POOLINGS),
        help="Pooling over space: average, maximum, their sum, or the generalised mean with a "
        "learned exponent; or the class token of a ViT, for SigLIP that of its attention pooling.",
    )
    dim: int = setting(512, integer(1), help="Dimensions of an embedding.")
    head_init: str = setting(
        "uniform",
        choice(HEAD_INITS),
        help="Initial values of the linear head: PyTorch's, or those of Proxy-Anchor's authors.",
    )
    train_from: str = setting(
        ALL,
        text(f"it must be {ALL}, a part of the backbone such as layer4, or {HEAD}"),
        help=f"First part of the network that trains: `{ALL}`, a part of the backbone such as "
        f"`layer4`, or `{HEAD}`. What lies below is frozen, batch statistics too.",
    )
    lora_rank: int = setting(
        0,
        integer(0),
        help="Rank of the products of two matrices that train in place of a ViT's own weights, "
        "beside the layers of its attentions (LoRA); 0 for none.",
    )
    prompts: int = setting(
        0,
        integer(0),
        help="Number of learned tokens that each block of a ViT has besides its input, which train "
        "in place of its own weights (VPT-Deep); 0 for none.",
    )
    freeze_bn: bool = setting(
        True,
        flag(),
        help="Whether batch normalisation uses its running statistics in training too, and leaves "
        "them unchanged.",
    )
    freeze_bn_affine: bool = setting(
        False,
        flag(),
        help="Whether scale and bias of batch normalisation stay unchanged too, without weight "
        "decay.",
    )
    dtype: str = setting("float32", choice(DTYPES), help="Dtype of convolutions and activations.")
    remat: bool = setting(
        False,
        flag(),
        help="Whether to rematerialise activations within blocks in the backward pass, which saves "
        "memory.",
        resumable=True,
    )
    drop_path: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Stochastic depth: rate at which training leaves out the last residual block of a "
        "ViT, a ConvNeXt or a ResNet for an image. The rate grows linearly from 0 at the first.",
    )

    @together("width", "backbone", "pretrained")
    def _width(self) -> str | None:
        return self._option("width", self.width)

    @together("stem", "backbone", "pretrained")
    def _stem(self) -> str | None:
        return self._option("stem", self.stem)

    def _option(self, option: str, value: int | str | None) -> str | None:
        if value is None:
            return None
        defaults = BACKBONES.options(self.backbone)
        if option not in defaults:
            return f"config.model.{option} is {value}, but {self.backbone} has no {option}"
        if self.pretrained == pretrained.NONE or value == defaults[option]:
            return None
        return (
            f"config.model.{option} is {value}, but {self.backbone} was pretrained with "
            f"{defaults[option]}; leave it out, or set config.model.pretrained to none"
        )

    @together("pooling", "backbone")
    def _pooling(self) -> str | None:
        if self.pooling != "token" or prefix_tokens(create_backbone(self.backbone)):
            return None
        return f"config.model.pooling is 'token', but {self.backbone} has no class token"

    @together("train_from", "backbone")
    def _train_from(self) -> str | None:
        allowed = trainable_from(create_backbone(self.backbone))
        if self.train_from in allowed:
            return None
        return (
            f"config.model.train_from is {self.train_from!r}; with {self.backbone} choose one of "
            f"{', '.join(allowed)}"
        )

    @together("lora_rank", "backbone", "train_from")
    def _lora_rank(self) -> str | None:
        return self._adapter("lora_rank", self.lora_rank)

    @together("prompts", "backbone", "train_from")
    def _prompts(self) -> str | None:
        return self._adapter("prompts", self.prompts)

    def _adapter(self, option: str, value: int) -> str | None:
        if not value:
            return None
        if option not in BACKBONES.options(self.backbone):
            return (
                f"config.model.{option} is {value}, but {self.backbone} has no {option}; choose a "
                "ViT, or set it to 0"
            )
        if self.train_from == ALL:
            return None
        return (
            f"config.model.{option} is {value}, which trains in every block, but "
            f"config.model.train_from is {self.train_from!r}; set it to {ALL!r}: the backbone's "
            "own weights are fixed anyway"
        )

    @together("remat", "backbone")
    def _remat(self) -> str | None:
        if not self.remat or "remat" in BACKBONES.options(self.backbone):
            return None
        return f"config.model.remat is True, but {self.backbone} has no blocks to rematerialise"

    @together("drop_path", "backbone", "train_from")
    def _drop_path(self) -> str | None:
        if not self.drop_path:
            return None
        given = f"config.model.drop_path is {self.drop_path}"
        if "drop_path" not in BACKBONES.options(self.backbone):
            return f"{given}, but {self.backbone} has no residual blocks to drop; set it to 0"
        if self.train_from == HEAD:
            return (
                f"{given}, but with config.model.train_from={HEAD!r} no block trains; set it to 0"
            )
        return None

    @together("freeze_bn_affine", "freeze_bn")
    def _affine(self) -> str | None:
        if self.freeze_bn or not self.freeze_bn_affine:
            return None
        return (
            "config.model.freeze_bn_affine is True, but config.model.freeze_bn is False; set both, "
            "or neither"
        )
