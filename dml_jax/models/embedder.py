"""The embedder: input normalisation, backbone, pooling and a linear head."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num, PRNGKeyArray

from dml_jax._utils.errors import UserError

POOLINGS = ("gap", "gmp", "gap+gmp", "gem", "token")
HEAD_INITS = ("uniform", "kaiming_fan_out")
ALL, HEAD = "all", "head"
"""Values of `train_from`: the whole network trains, or the linear head alone."""


class GeM(nn.Module):
    """Generalised mean over space with a learned exponent p.

    (mean of x^p)^(1/p), for values below 1e-6 with 1e-6 in their place. p = 1 is the mean, and a
    large p the maximum. Source: Radenovic et al., Fine-tuning CNN image retrieval with no human
    annotation, TPAMI 2019, arXiv 1711.02512, equation 2, with its initial value of 3.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
        """Returns the pooled features."""
        p = self.param("p", nn.initializers.constant(3.0), (1,))
        powers = jnp.maximum(x, 1e-6) ** p.reshape(1, 1, 1, 1)
        return powers.mean((1, 2)) ** (1 / p.reshape(1, 1))


class Embedder(nn.Module):
    """A backbone with pooling and a linear head, split into a frozen and a trained part.

    The embedding of images is `trained(frozen(images))`.

    Attributes:
        backbone: module with an attribute `input_normalisation`, from normalised images
            [B, H, W, 3] to a feature map [B, h, w, F]. To be split, it needs an attribute `parts`,
            names of consecutive parts, and must accept some of them as the argument `parts`. A
            method `normalise_pooled`, if it has one, is applied to pooled features [B, F].
        pooling: over space: "gap" is the mean, "gmp" the maximum, "gap+gmp" their sum, "gem" the
            generalised mean of `GeM`. "token" is the first token of a backbone that has an
            attribute `prefix_tokens`, the number of tokens before those of space: the class token,
            or that of SigLIP's attention pooling.
        dim: size of an embedding.
        head_init: initial values of the head, for F pooled features. "uniform" draws kernel and
            bias from U(-1/sqrt(F), 1/sqrt(F)), like PyTorch's nn.Linear; "kaiming_fan_out" draws
            the kernel from N(0, 2/dim) and sets the bias to zero, like the code of Proxy-Anchor.
        train_from: the first part that trains: "all", a part of the backbone, or "head". Everything
            below it is frozen, its batch statistics too.

    Raises:
        ValueError: the pooling, head_init or train_from is unknown.
    """

    backbone: nn.Module
    pooling: str
    dim: int
    head_init: str = "uniform"
    train_from: str = ALL

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(
                f"unknown pooling {self.pooling!r}: choose one of {', '.join(POOLINGS)}"
            )
        if self.pooling == "token" and not prefix_tokens(self.backbone):
            raise UserError("pooling 'token' needs a backbone with a class token, such as a ViT")
        if self.head_init not in HEAD_INITS:
            raise UserError(
                f"unknown head_init {self.head_init!r}: choose one of {', '.join(HEAD_INITS)}"
            )
        if self.train_from not in trainable_from(self.backbone):
            raise UserError(
                f"unknown train_from {self.train_from!r}: choose one of "
                f"{', '.join(trainable_from(self.backbone))}"
            )
        super().__post_init__()

    def setup(self) -> None:
        """Makes the generalised mean, which both parts of the network may apply."""
        if self.pooling == "gem":
            self.gem = GeM()

    def __call__(self, images: Num[Array, "b h w 3"], *, train: bool) -> Float[Array, "b d"]:
        """Returns raw float32 embeddings [B, dim] of RGB images in 0..255, uint8 or float.

        With `train`, the collection "batch_stats" must be mutable.
        """
        return self.trained(self.frozen(images), train=train)

    def frozen(self, images: Num[Array, "b h w 3"]) -> Num[Array, "b *features"]:
        """Returns the result of the frozen part, which is not differentiated.

        It is the images themselves if everything trains, a feature map [B, h, w, C], or pooled
        features [B, F] if the head alone trains.
        """
        if self.train_from == ALL:
            return images
        x = self.backbone.input_normalisation.normalise(images)
        if self.train_from == HEAD:
            x = self._pool(self.backbone(x, train=False))
        else:
            below = self.backbone.parts[: self.backbone.parts.index(self.train_from)]
            x = self.backbone(x, train=False, parts=below)
        return jax.lax.stop_gradient(x)

    @nn.compact
    def trained(
        self,
        x: Num[Array, "b *features"],
        *,
        train: bool,
        mix: Callable[[int, Array], Array] | None = None,
    ) -> Float[Array, "b d"]:
        """Returns the embeddings [B, dim] of the results of `frozen`.

        With `train`, the collection "batch_stats" must be mutable.

        Args:
            x: results of `frozen`.
            train: whether the network is being trained.
            mix: function of the number of a place of `mixing_places` and of its inputs, which
                returns the inputs to use instead; None changes nothing.
        """
        *above, _ = places = mixing_places(self.backbone, self.train_from)
        if self.train_from == ALL:
            x = self.backbone.input_normalisation.normalise(x)
        if mix is None and self.train_from == ALL:
            x = self.backbone(x, train=train)
        elif mix is None and above:
            x = self.backbone(x, train=train, parts=above)
        elif mix is not None:
            for depth, part in enumerate(above):
                only = {} if part == ALL else {"parts": (part,)}
                x = self.backbone(mix(depth, x), train=train, **only)
        if above:
            x = self._pool(x)
        if mix is not None:
            x = mix(len(places) - 1, x)
        # By default accelerators round the operands of a float32 product to bfloat16 or TF32.
        kernel_init, bias_init = _head_inits(self.head_init, features=x.shape[-1])
        return nn.Dense(
            self.dim,
            precision="highest",
            kernel_init=kernel_init,
            bias_init=bias_init,
            name="head",
        )(x)

    def _pool(self, x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
        x = x.astype(jnp.float32)
        pooled = x[:, 0, 0] if self.pooling == "token" else self._pool_space(x)
        if hasattr(self.backbone, "normalise_pooled"):
            return self.backbone.normalise_pooled(pooled)
        return pooled

    def _pool_space(self, x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
        x = x[:, :, prefix_tokens(self.backbone) :]
        if self.pooling == "gem":
            return self.gem(x)
        average, maximum = x.mean((1, 2)), _maximum(x)
        return {"gap": average, "gmp": maximum, "gap+gmp": average + maximum}[self.pooling]


def prefix_tokens(backbone: nn.Module) -> int:
    """Returns the number of tokens before those of space; 0 for a convolutional network."""
    return getattr(backbone, "prefix_tokens", 0)


def trainable_from(backbone: nn.Module) -> tuple[str, ...]:
    """Returns the values of `train_from` for a backbone."""
    # The first part stands for the whole network, which is ALL.
    return (ALL, *getattr(backbone, "parts", ())[1:], HEAD)


def mixing_places(backbone: nn.Module, train_from: str) -> tuple[str, ...]:
    """Returns the parts that train, whose inputs `Embedder.trained` may mix; the head is last.

    A backbone that cannot be split is one part, called "all".
    """
    if train_from == HEAD:
        return (HEAD,)
    parts = getattr(backbone, "parts", (ALL,))
    first = 0 if train_from == ALL else parts.index(train_from)
    return (*parts[first:], HEAD)


def parts_above(embedder: Embedder, image_size: int) -> dict[tuple[str, ...], int]:
    """Returns the number of parts of the network above each parameter, by path.

    Of a backbone with n parts, those of the head have 0, of the last part 1, and of the first n.

    Args:
        embedder: the network.
        image_size: sides of the images, pixels.
    """
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.uint8)

    def below(part: str) -> set[tuple[str, ...]]:
        init = partial(embedder.clone(train_from=part).init, method="frozen")
        found = jax.eval_shape(init, jax.random.key(0), image)
        return set(traverse_util.flatten_dict(found.get("params", {})))

    init = partial(embedder.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), image)["params"]
    counts = dict.fromkeys(traverse_util.flatten_dict(shapes), 0)
    for part in trainable_from(embedder.backbone)[1:]:
        for path in below(part):
            counts[path] += 1
    return counts


def _head_inits(
    name: str, *, features: int
) -> tuple[nn.initializers.Initializer, nn.initializers.Initializer]:
    """Returns the initialisers of the head's kernel and bias; see `Embedder`."""
    if name == "kaiming_fan_out":
        return nn.initializers.variance_scaling(2.0, "fan_out", "normal"), nn.initializers.zeros

    def uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, dtype, -(features**-0.5), features**-0.5)

    return uniform, uniform


def _maximum(x: Float[Array, "b h w f"]) -> Float[Array, "b f"]:
    """Returns the maximum over space, with the gradient at a single position.

    The backward pass of `x.max()` divides by the number of entries equal to the maximum. If the
    compiler recomputes `x` with different rounding, there are none.
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    position = jnp.argmax(flat, axis=1, keepdims=True)
    return jnp.take_along_axis(flat, position, axis=1)[:, 0]
