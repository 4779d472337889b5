"""Export of a run's embedding function to files that JAX reads without dml_jax."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dml_jax._utils import files, sharding
from dml_jax._utils.errors import UserError
from dml_jax.evaluation import embedding_files, thresholds
from dml_jax.evaluation.network import Network
from dml_jax.evaluation.thresholds import Threshold
from dml_jax.inference import model_card, trained
from dml_jax.inference.retriever import FUNCTION, THRESHOLD, WEIGHTS
from dml_jax.training import run_directory

CARD = "README.md"
PLATFORMS = ("cpu", "cuda", "tpu")


def threshold(
    run: Path, checkpoint: str, given: float | None, fmr: float | None
) -> Threshold | None:
    """Returns the threshold of an export: given, or for a false match rate among the test images.

    Args:
        run: folder of the run.
        checkpoint: name of the checkpoint.
        given: the threshold.
        fmr: the false match rate, instead.

    Raises:
        FileNotFoundError: the run has no test embeddings.
        ValueError: both are given, or the test embeddings are not those of the checkpoint.
    """
    if fmr is None:
        return None if given is None else thresholds.checked(given)
    if given is not None:
        raise UserError("give either --threshold or --fmr, not both")
    if checkpoint != "last":
        raise UserError(
            f"a run keeps the test embeddings of its last checkpoint only, not of {checkpoint}; "
            "`dml-jax evaluate --checkpoint --fmr` prints the threshold, for --threshold"
        )
    images = embedding_files.load_embeddings(run / run_directory.EMBEDDINGS)
    gallery = run / run_directory.GALLERY
    others = embedding_files.load_embeddings(gallery) if gallery.exists() else None
    return thresholds.at_fmr(fmr, images, others)


def write(
    run: Path,
    out: Path,
    checkpoint: str,
    threshold: Threshold | None = None,
    *,
    licence: str = model_card.UNKNOWN,
) -> None:
    """Exports a checkpoint of a run; the images of the run are not needed.

    Args:
        run: folder of the run.
        out: the folder to write, new or empty; it is written atomically.
        checkpoint: name of the checkpoint; see `dml_jax.training.checkpoint.check_name`.
        threshold: the similarity below which a search result is unknown.
        licence: identifier of the licence of the weights, for the model card.

    Raises:
        FileNotFoundError: the folder holds no run, or the run no such checkpoint.
        ValueError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; choose a new one")
    device = sharding.make_mesh(jax.local_devices()[:1])
    network, variables, step = trained.load(run, checkpoint, device)
    weights = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    published = _without_local_paths(run_directory.read_config(run))
    card = model_card.write(
        published,
        run_directory.read_result(run),
        [line for line in files.read_json_lines(run / run_directory.METRICS) if "map@r" in line],
        step=step,
        checkpoint=checkpoint,
        platforms=PLATFORMS,
        threshold=threshold,
        licence=licence,
    )
    with files.atomic_write(out) as part:
        part.mkdir(parents=True)
        (part / FUNCTION).write_bytes(serialize(network, weights))
        save_file(weights, part / WEIGHTS)
        files.write_json(part / run_directory.CONFIG, published)
        if threshold is not None:
            files.write_json(part / THRESHOLD, threshold._asdict())
        files.write_text(part / CARD, card)


def serialize(network: Network, weights: dict[str, Any]) -> bytes:
    """Returns the embedding function, serialised by `jax.export` for `PLATFORMS`.

    Args:
        network: the network.
        weights: its variables by path, joined by "/".

    Returns:
        A serialised function (weights, images [batch, size, size, 3] uint8) -> raw embeddings
        [batch, dim] float32, for any batch size.
    """

    def embed(weights: dict[str, Any], images: jax.Array) -> Any:
        variables = traverse_util.unflatten_dict(weights, sep="/")
        return network.embedder.apply(variables, images, train=False)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    size = network.data.test_side
    batch = jax.export.symbolic_shape(f"batch, {size}, {size}, 3")
    with _without_source_files():
        exported = jax.export.export(jax.jit(embed), platforms=PLATFORMS)(
            shapes, jax.ShapeDtypeStruct(batch, jnp.uint8)
        )
        return bytes(exported.serialize())


@contextlib.contextmanager
def _without_source_files() -> Iterator[None]:
    """Leaves the local paths of the code out of functions exported in this context, for privacy."""
    settings = {
        "jax_hlo_source_file_canonicalization_regex": ".*",
        "jax_include_full_tracebacks_in_locations": False,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _without_local_paths(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration with paths reduced to file names, for privacy."""
    plain = json.loads(config.to_json())
    plain["data"]["root"] = Path(plain["data"]["root"]).name
    if not plain["model"]["pretrained"].startswith("hf:"):
        plain["model"]["pretrained"] = Path(plain["model"]["pretrained"]).name
    return plain
