"""Few parameters that adapt a vision transformer whose own ones are fixed.

Sources: Hu et al., LoRA: low-rank adaptation of large language models, ICLR 2022 (arXiv
2106.09685); Jia et al., Visual prompt tuning, ECCV 2022 (arXiv 2203.12119).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from dml_jax.models import linear

PROMPTS = "prompts"
"""Name of the parameter of `Prompts`."""

_DOWN, _UP = "lora_down", "lora_up"


class LowRankDense(linear.Dense):
    """A linear layer plus a product of low rank that is zero at first, with the same names.

    W x + B A x, equation 3 with alpha equal to the rank: with Adam, alpha acts as the learning rate
    does (section 4.1). A starts as in the authors' code, U(-1/sqrt(c), 1/sqrt(c)).

    Attributes:
        rank: rank of the product.
    """

    rank: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows f"]:
        """Returns the features, of dtype `dtype`."""
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        down = linear.Dense(
            self.rank, use_bias=False, kernel_init=uniform, dtype=self.dtype, name=_DOWN
        )
        up = linear.Dense(
            self.features,
            use_bias=False,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name=_UP,
        )
        return super().__call__(x) + up(down(x))


class Prompts(nn.Module):
    """Learned tokens for a block, which replace those of the block before: VPT-Deep, section 3.2.

    They start as in the authors' code: U(-b, b) with b^2 = 6 / (3 patch^2 + features).

    Attributes:
        count: number of prompts.
        patch: side of a patch in pixels.
    """

    count: int
    patch: int

    @nn.compact
    def __call__(self, x: Float[Array, "b 1 tokens f"]) -> Float[Array, "b 1 prompted f"]:
        """Returns the tokens followed by the prompts."""
        features = x.shape[-1]
        bound = (6 / (3 * self.patch**2 + features)) ** 0.5

        def uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        prompts = self.param(PROMPTS, uniform, (1, self.count, features))
        prompts = jnp.broadcast_to(
            prompts.astype(x.dtype)[:, None], (x.shape[0], 1, self.count, features)
        )
        return jnp.concatenate([x, prompts], axis=2)


def is_adapter(path: tuple[str, ...]) -> bool:
    """Returns whether a parameter of a backbone, given by its path, is that of an adapter."""
    return not {_DOWN, _UP, PROMPTS}.isdisjoint(path)
