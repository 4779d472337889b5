"""A backbone, a loss, a data set and a schedule of one's own, in one file.

A config names them by import path, such as `my_parts:PatchTransformer`, where this file is in the
folder that the program is started in; nothing in dml_jax has to be changed.
"""

import csv
import dataclasses
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from dml_jax import data, losses
from dml_jax.models.normalisation import IMAGENET, InputNormalisation
from dml_jax.settings import number, setting


class PatchTransformer(nn.Module):
    """A small vision transformer, from normalised images [B, H, W, 3] to [B, H/8, W/8, 48]."""

    input_normalisation: InputNormalisation = IMAGENET

    @nn.compact
    def __call__(self, images, *, train):
        """Maps images to a grid of features."""
        del train  # Nothing in it differs in training.
        x = nn.Conv(48, (8, 8), strides=(8, 8))(images)
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)
        places = self.param("places", nn.initializers.normal(0.02), (1, height * width, dim))
        x = x + jnp.broadcast_to(places, x.shape)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(dim)(nn.gelu(nn.Dense(2 * dim)(nn.LayerNorm()(x))))
        return x.reshape(batch, height, width, dim)


@dataclasses.dataclass(frozen=True)
class ShiftedSoftmax(losses.NormSoftmax):
    """Norm-SoftMax that penalises cosines of other classes only above a threshold."""

    threshold: float = setting(
        0.0, number(least=-1.0, most=1.0), help="Cosine below which logits are zero."
    )

    def logits(self, embeddings, proxies):
        """Returns `scale * max(cosine - threshold, 0)`."""
        cosines = super().logits(embeddings, proxies) / self.scale
        return self.scale * jnp.maximum(cosines - self.threshold, 0.0)


def csv_source(root):
    """Reads `root/images.csv`, with the columns split, path and class."""
    splits = {"train": [], "test": []}
    with (Path(root) / "images.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            splits[row["split"]].append((row["path"], row["class"]))
    sources = {}
    for split, rows in splits.items():
        classes = sorted({name for _, name in rows})
        sources[split] = data.Source(
            records=tuple(str(Path(root) / path) for path, _ in rows),
            labels=np.array([classes.index(name) for _, name in rows], np.int32),
            class_names=tuple(classes),
            names=tuple(path for path, _ in rows),
        )
    return sources


def warmup_then_constant(warmup_steps):
    """Returns a schedule that rises to 1 and stays there."""
    return optax.linear_schedule(0.1, 1.0, warmup_steps)
