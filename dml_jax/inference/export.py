"""A run's embedding function in files that need no dml_jax: JAX reads them by itself."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dml_jax._utils import files, sharding
from dml_jax.evaluation.network import Network
from dml_jax.inference import model_card, trained
from dml_jax.inference.retriever import FUNCTION, WEIGHTS
from dml_jax.training import run_directory

CARD = "README.md"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(run: Path, out: Path, checkpoint: str) -> None:
    """Exports a run's checkpoint; the run's images are not needed.

    Args:
        run: folder of the run.
        out: the folder to write, new or empty; it appears when it is complete.
        checkpoint: `last`, or a key of `dml_jax.training.checkpoint.BEST`.

    Raises:
        FileNotFoundError: there is no run, or no such checkpoint.
        ValueError: there is something in `out`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder; choose a new one")
    device = sharding.make_mesh(jax.local_devices()[:1])
    network, variables, step = trained.load(run, checkpoint, device)
    weights = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    published = _without_places(run_directory.read_config(run))
    card = model_card.write(
        published,
        run_directory.read_result(run),
        [line for line in files.read_json_lines(run / run_directory.METRICS) if "map@r" in line],
        step=step,
        checkpoint=checkpoint,
        platforms=PLATFORMS,
    )
    with files.atomic_write(out) as part:
        part.mkdir(parents=True)
        (part / FUNCTION).write_bytes(serialize(network, weights))
        save_file(weights, part / WEIGHTS)
        files.write_json(part / run_directory.CONFIG, published)
        files.write_text(part / CARD, card)


def serialize(network: Network, weights: dict[str, Any]) -> bytes:
    """The embedding function as `jax.export` serialises it, for `PLATFORMS`.

    Args:
        network: the network.
        weights: its variables by their paths, joined by "/".

    Returns:
        A function of the weights and of images [batch, size, size, 3], uint8, any number of them,
        to raw float32 embeddings [batch, dim].
    """

    def embed(weights: dict[str, Any], images: jax.Array) -> Any:
        variables = traverse_util.unflatten_dict(weights, sep="/")
        return network.embedder.apply(variables, images, train=False)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    size = network.data.image_size
    batch = jax.export.symbolic_shape(f"batch, {size}, {size}, 3")
    exported = jax.export.export(jax.jit(embed), platforms=PLATFORMS)(
        shapes, jax.ShapeDtypeStruct(batch, jnp.uint8)
    )
    return bytes(exported.serialize())


def _without_places(config: ConfigDict) -> dict[str, Any]:
    """The configuration without paths of this machine, which are nobody else's business."""
    plain = json.loads(config.to_json())
    plain["data"]["root"] = Path(plain["data"]["root"]).name
    if not plain["model"]["pretrained"].startswith("hf:"):
        plain["model"]["pretrained"] = Path(plain["model"]["pretrained"]).name
    return plain
