"""Vision transformers with the architecture and the parameter names of timm.

Sources: Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021 (arXiv 2010.11929), the
transformers of DeiT (arXiv 2012.12877) and DINO (arXiv 2104.14294); Oquab et al., DINOv2 (arXiv
2304.07193); Darcet et al., Vision transformers need registers, ICLR 2024 (arXiv 2309.16588);
Radford et al., CLIP (arXiv 2103.00020); Steiner et al., AugReg (arXiv 2106.10270); Zhai et al.,
SigLIP (arXiv 2303.15343); Shazeer, GLU variants improve transformer (arXiv 2002.05202).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from dml_jax._utils.errors import UserError
from dml_jax.models import adapters, layers, linear
from dml_jax.models.normalisation import CLIP, IMAGENET, INCEPTION, InputNormalisation

TOKENS = ("cls_token", "reg_token", "pos_embed", "latent", adapters.PROMPTS)
"""Names of the parameters that are no weights of a layer."""

_CUBIC = -0.5  # Coefficient of the interpolation with antialiasing, as in Pillow and PyTorch.

Tokens = Float[Array, "b 1 tokens f"]
"""A feature map of one row: the class token, the registers and the patches, row by row."""

Map = Float[Array, "b y x f"]
"""A feature map of a convolutional network, or tokens."""


def gelu(x: Map) -> Map:
    """Returns GELU by the error function."""
    return nn.gelu(x, approximate=False)


def quick_gelu(x: Map) -> Map:
    """Returns the approximation of GELU with which CLIP was trained."""
    return x * nn.sigmoid(1.702 * x)


def swiglu(x: Map) -> Float[Array, "b y x half"]:
    """Returns the second half of the features, gated by SiLU of the first half."""
    gate, value = jnp.split(x, 2, axis=-1)
    return nn.silu(gate) * value


class LayerScale(nn.Module):
    """Multiplies each feature by a parameter."""

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Returns the scaled tokens."""
        gamma = self.param("gamma", nn.initializers.constant(1e-5), (x.shape[-1],))
        return x * gamma.astype(x.dtype).reshape(1, 1, 1, -1)


class Attention(nn.Module):
    """Multi-head self-attention.

    Attributes:
        heads: number of heads.
        dense: constructor of a linear layer from features and name.
    """

    heads: int
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Returns the tokens after attention and projection."""
        batch, _, tokens, features = x.shape
        qkv = self.dense(3 * features, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, features // self.heads)
        attended = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)))
        return self.dense(features, name="proj")(attended.reshape(x.shape))


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Attributes:
        dense: constructor of a linear layer from features and name.
        activation: the activation.
        hidden: features before the activation; by default four times those of a token.
    """

    dense: Callable[..., nn.Module]
    activation: Callable[[Map], Array]
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """Returns the result for each token."""
        features = x.shape[-1]
        hidden = self.dense(self.hidden or 4 * features, name="fc1")(x)
        return self.dense(features, name="fc2")(self.activation(hidden))


class AttentionPool(nn.Module):
    """A token that attends to all tokens, with a perceptron: the pooling of SigLIP.

    Attributes:
        heads: number of heads.
        dense: constructor of a linear layer from features and name.
        perceptron: constructor of the perceptron from a name.
        normalise: constructor of a normalisation from its name.
    """

    heads: int
    dense: Callable[..., nn.Module]
    perceptron: Callable[..., nn.Module]
    normalise: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, "b 1 1 f"]:
        """Returns the pooled token of each image."""
        batch, _, tokens, features = x.shape
        width = features // self.heads
        latent = self.param("latent", layers.truncated_normal, (1, 1, features))
        query = self.dense(features, name="q")(latent.astype(x.dtype))
        query = jnp.repeat(query.reshape(1, 1, self.heads, width), batch, axis=0)
        kv = self.dense(2 * features, name="kv")(x).reshape(batch, tokens, 2, self.heads, width)
        attended = jax.nn.dot_product_attention(query, kv[:, :, 0], kv[:, :, 1])
        y = self.dense(features, name="proj")(attended.reshape(batch, 1, 1, features))
        return y + self.perceptron(name="mlp")(self.normalise(name="norm")(y))


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation and added to its input.

    Attributes:
        heads: number of heads of the attention.
        layer_scale: whether each is multiplied by a parameter for each feature.
        dense: constructor of a linear layer of the attention from features and name.
        perceptron: constructor of the perceptron from a name.
        normalise: constructor of a normalisation from its name.
        prompts: constructor of the prompts from a name; None for none.
    """

    heads: int
    layer_scale: bool
    dense: Callable[..., nn.Module]
    perceptron: Callable[..., nn.Module]
    normalise: Callable[..., nn.Module]
    prompts: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Tokens, drop: Callable[..., Tokens]) -> Tokens:
        """Returns the tokens after the block; see `layers.stochastic_depth` for `drop`."""
        parts = Attention(self.heads, self.dense, name="attn"), self.perceptron(name="mlp")
        count = x.shape[2]
        if self.prompts is not None:
            x = self.prompts(name="prompt")(x)
        for number, part in enumerate(parts, start=1):
            y = part(self.normalise(name=f"norm{number}")(x))
            x = x + drop(LayerScale(name=f"ls{number}")(y) if self.layer_scale else y, number)
            # What becomes of the prompts is dropped, and after the attention concerns no token.
            x = x[:, :, :count]
        return x


class ViT(nn.Module):
    """A vision transformer without pooling and classifier.

    Submodules have timm's names, dots included, which `pretrained.convert` relies on. Images may
    have any size that is a multiple of the patch: the position embeddings are interpolated as timm
    does it.

    Attributes:
        patch: side of a patch in pixels.
        features: features of a token.
        depth: number of blocks.
        heads: number of heads of each attention.
        grid: patches along a side of the images of the pretraining.
        class_token: whether there is a class token.
        registers: number of register tokens.
        position_of_class: whether the class token has a position embedding.
        attention_pool: whether `AttentionPool` puts its token before the others at the end.
        layer_scale: see `Block`.
        activation: activation of the perceptrons.
        hidden: features before that activation; by default four times those of a token.
        epsilon: added to the variances of the normalisations.
        normalises_input: whether the tokens are normalised before the first block; the embedding of
            the patches then has no bias.
        dtype: dtype of the computation. Parameters and statistics of normalisations are float32.
        remat: rematerialise the activations of each block in the backward pass.
        drop_path: rate at which training drops the branches of the last block; see
            `layers.stochastic_depth`.
        lora_rank: rank of the products added to the layers `qkv` and `proj` of each block's
            attention; 0 for none. See `adapters`.
        prompts: number of learned tokens that each block has besides its input; see `adapters`.
        input_normalisation: the normalisation of the images that the backbone expects.
    """

    patch: int
    features: int
    depth: int
    heads: int
    grid: int
    class_token: bool = True
    registers: int = 0
    position_of_class: bool = True
    attention_pool: bool = False
    layer_scale: bool = False
    activation: Callable[[Map], Array] = gelu
    hidden: int | None = None
    epsilon: float = 1e-6
    normalises_input: bool = False
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    drop_path: float = 0.0
    lora_rank: int = 0
    prompts: int = 0
    input_normalisation: InputNormalisation = IMAGENET

    @property
    def prefix_tokens(self) -> int:
        """The number of tokens of the result before those of the patches."""
        return self.attention_pool + self.class_token + self.registers

    @property
    def parts(self) -> tuple[str, ...]:
        """The consecutive parts of the network: the embedding of the patches, and the blocks."""
        return ("patch_embed", *(f"blocks.{number}" for number in range(self.depth)))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, parts: Sequence[str] | None = None
    ) -> Float[Array, "b y x f"]:
        """Returns the normalised tokens [B, 1, tokens, F] of normalised images [B, H, W, 3].

        Args:
            x: normalised images, or the tokens that the previous part returned.
            train: whether the network is being trained: it then drops branches.
            parts: consecutive parts to apply; all by default.

        Raises:
            ValueError: the patches do not cover the images.
        """
        parts = self.parts if parts is None else parts
        dense = partial(linear.Dense, dtype=self.dtype, kernel_init=layers.truncated_normal)
        perceptron = partial(Mlp, dense, self.activation, self.hidden)
        options = perceptron, self._normalise
        adapted: Callable[..., nn.Module] = dense
        if self.lora_rank:
            adapted = partial(adapters.LowRankDense, rank=self.lora_rank, **dense.keywords)
        prompts = partial(adapters.Prompts, self.prompts, self.patch) if self.prompts else None
        drops = layers.stochastic_depth(self, self.depth, train=train)
        if "patch_embed" in parts:
            x = self._embed_patches(x)

        def transform(x: Tokens, name: str, drop: Callable[..., Tokens]) -> Tokens:
            block = Block(self.heads, self.layer_scale, adapted, *options, prompts, name=name)
            return block(x, drop)

        for name, drop in zip(self.parts[1:], drops, strict=True):
            if name in parts:
                x = layers.block(self, partial(transform, name=name, drop=drop), x)
        if parts and parts[-1] == self.parts[-1]:
            x = self._normalise(name="norm")(x)
            if self.attention_pool:
                pooled = AttentionPool(self.heads, dense, *options, name="attn_pool")(x)
                x = jnp.concatenate([pooled, x], axis=2)
        return x

    @property
    def _normalise(self) -> Callable[..., nn.Module]:
        return partial(
            nn.LayerNorm, epsilon=self.epsilon, use_fast_variance=False, dtype=self.dtype
        )

    def _embed_patches(self, x: Float[Array, "b h w c"]) -> Tokens:
        rows, columns = (side // self.patch for side in x.shape[1:3])
        if (rows * self.patch, columns * self.patch) != x.shape[1:3]:
            raise UserError(
                f"patches of {self.patch} pixels do not cover images of {x.shape[1]}x{x.shape[2]}; "
                f"choose multiples of {self.patch}"
            )
        patches = linear.Conv(
            self.features,
            self.patch,
            self.patch,
            use_bias=not self.normalises_input,
            dtype=self.dtype,
            name="patch_embed.proj",
        )
        tokens = patches(x).reshape(x.shape[0], 1, rows * columns, self.features)

        def parameter(name: str, count: int) -> Array:
            value = self.param(name, layers.truncated_normal, (1, count, self.features))
            return value.astype(self.dtype)[:, None]

        classes, positions = self.position_of_class, self.grid**2
        position = parameter("pos_embed", positions + classes)
        weights = interpolation(self.grid, rows), interpolation(self.grid, columns)
        of_patches = position[:, 0, classes:].reshape(self.grid, self.grid, self.features)
        of_patches = jnp.einsum("rp,cq,pqf->rcf", *weights, of_patches.astype(jnp.float32))
        tokens += of_patches.astype(self.dtype).reshape(1, 1, -1, self.features)
        prefix = []
        if self.class_token:
            prefix = [parameter("cls_token", 1) + (position[:, :, :1] if classes else 0)]
        if self.registers:
            prefix.append(parameter("reg_token", self.registers))
        # Not `len`, which is no integer in a function exported for any batch size.
        repeated = [jnp.broadcast_to(one, (x.shape[0], *one.shape[1:])) for one in prefix]
        tokens = jnp.concatenate([*repeated, tokens], axis=2)
        return self._normalise(name="norm_pre")(tokens) if self.normalises_input else tokens


def interpolation(before: int, after: int) -> Float32[np.ndarray, "{after} {before}"]:
    """Returns the weights of a bicubic interpolation along one axis, with antialiasing.

    They are those of PyTorch's `interpolate(mode="bicubic", antialias=True)`, with which timm
    adapts position embeddings.

    Args:
        before: number of samples.
        after: number of interpolated samples.
    """
    if before == after:
        return np.eye(before, dtype=np.float32)
    scale = before / after
    width = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    distance = (np.arange(before)[None] + 0.5 - centres[:, None]) / width
    weights = _cubic(np.abs(distance))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Returns the cubic convolution kernel at distances from its centre."""
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"features": 192, "depth": 12, "heads": 3},
    "small": {"features": 384, "depth": 12, "heads": 6},
    "base": {"features": 768, "depth": 12, "heads": 12},
    "large": {"features": 1024, "depth": 24, "heads": 16},
    "so400m": {"features": 1152, "depth": 27, "heads": 16, "hidden": 4304},
    "giant": {"features": 1536, "depth": 40, "heads": 24, "hidden": 8192, "activation": swiglu},
}
_PATCH16 = partial(ViT, patch=16, grid=14)
_PATCH32 = partial(ViT, patch=32, grid=7)
_PATCH8 = partial(ViT, patch=8, grid=28)
_DINOV2 = partial(ViT, patch=14, grid=37, layer_scale=True)
# timm's CLIP has GELU; OpenAI's weights were trained with the approximation.
_CLIP = partial(_PATCH16, epsilon=1e-5, normalises_input=True, input_normalisation=CLIP)
_CLIP32 = partial(_CLIP, patch=32, grid=7)
_REGISTERS = partial(_DINOV2, registers=4, position_of_class=False)
_SIGLIP_GAP = partial(
    _PATCH16, class_token=False, position_of_class=False, input_normalisation=INCEPTION
)
_SIGLIP = partial(_SIGLIP_GAP, attention_pool=True)
# timm approximates GELU in this one alone.
_SIGLIP32 = partial(_SIGLIP, patch=32, grid=8, activation=nn.gelu)

VARIANTS: dict[str, Callable[..., nn.Module]] = {
    f"vit_{size}_{name}": partial(variant, **_SIZES[size])
    for name, variant, sizes in (
        ("patch16", _PATCH16, ("tiny", "small", "base", "large")),
        ("patch32", _PATCH32, ("small", "base")),
        ("patch8", _PATCH8, ("small", "base")),
        ("patch16_clip", _CLIP, ("base",)),
        ("patch16_clip_quickgelu", partial(_CLIP, activation=quick_gelu), ("base",)),
        ("patch32_clip", _CLIP32, ("base",)),
        ("patch32_clip_quickgelu", partial(_CLIP32, activation=quick_gelu), ("base",)),
        ("patch16_siglip", _SIGLIP, ("base",)),
        ("patch16_siglip", partial(_SIGLIP, grid=16), ("large",)),
        ("patch14_siglip", partial(_SIGLIP, patch=14, grid=16), ("so400m",)),
        ("patch32_siglip", _SIGLIP32, ("base",)),
        ("patch16_siglip_gap", _SIGLIP_GAP, ("base",)),
        ("patch14_dinov2", _DINOV2, ("small", "base", "large", "giant")),
        ("patch14_reg4_dinov2", _REGISTERS, ("small", "base", "large", "giant")),
    )
    for size in sizes
}
