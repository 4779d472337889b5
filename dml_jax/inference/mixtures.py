"""The synthetic classes that Proxy Synthesis makes of a run's training images."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Integer, PRNGKeyArray

from dml_jax import data, losses, proxy_synthesis
from dml_jax._utils import files
from dml_jax._utils.errors import UserError
from dml_jax.evaluation.embedding import embed_images
from dml_jax.inference import trained
from dml_jax.proxy_synthesis import ProxySynthesisConfig
from dml_jax.training import run_directory
from dml_jax.training.config import parse


class Mixtures(NamedTuple):
    """Synthetic classes, prepared for the loss; each has one embedding."""

    embeddings: Float32[np.ndarray, "n pdim"]
    proxies: Float32[np.ndarray, "n per_class*pdim"]
    """All proxies of a class are concatenated."""
    classes: Integer[np.ndarray, "n 2"]
    """The two classes that are mixed."""
    weights: Float32[np.ndarray, " n"]
    """The weight of the first class; the second has the rest."""
    row_mask: Bool[np.ndarray, " n"]
    """Whether the embedding joins the batch; not of pairs of one class. See also `mix`."""
    class_mask: Bool[np.ndarray, " n"]
    """Whether the proxy joins the batch."""


def of_batch(
    key: PRNGKeyArray,
    embeddings: Float[Array, "batch dim"],
    proxies: Float[Array, "proxies pdim"],
    labels: Int[Array, " batch"],
    *,
    loss: losses.ProxyLoss,
    mixing: ProxySynthesisConfig,
) -> Mixtures:
    """Returns the synthetic classes that a training step would make of a batch.

    Args:
        key: the key of the step.
        embeddings: raw embeddings.
        proxies: raw proxies.
        labels: classes of the embeddings.
        loss: the loss, which prepares the vectors.
        mixing: settings of Proxy Synthesis.
    """
    lam, partner = proxy_synthesis.draw(key, labels, **mixing.of_draw())
    mixed = proxy_synthesis.synthesize(
        embeddings,
        proxies,
        labels,
        lam=lam,
        partner=partner,
        loss=loss,
        **mixing.of_synthesis(),
    )
    batch, classes = len(labels), len(proxies) // loss.proxies_per_class
    made = np.asarray(mixed.embeddings)[batch:]
    first = np.arange(len(made)) % batch
    second = np.asarray(partner).ravel()[: len(made)]
    of_class = np.asarray(labels)
    weights = np.broadcast_to(np.reshape(lam, (len(lam), -1)), (len(lam), batch)).ravel()
    return Mixtures(
        embeddings=made,
        proxies=np.asarray(mixed.proxies)[len(proxies) :].reshape(len(made), -1),
        classes=np.stack([of_class[first], of_class[second]], axis=1),
        weights=weights[: len(made)],
        row_mask=np.asarray(mixed.row_mask)[batch:],
        class_mask=np.asarray(mixed.class_mask)[classes:],
    )


def of_run(folder: Path, name: str) -> tuple[Mixtures, tuple[str, ...]]:
    """Returns the synthetic classes of an epoch of a run, with the vectors of a checkpoint.

    Batches, partners and weights are those of the epoch after the checkpoint. The embeddings are of
    the images as they are tested, without augmentation, and all are of the same network.

    Args:
        folder: folder of the run.
        name: name of the checkpoint; see `checkpoint.check_name`.

    Returns:
        The synthetic classes that would join the batches, and the names of all training classes.

    Raises:
        FileNotFoundError: there is no such run or checkpoint, or its images are missing.
        ValueError: the run has no Proxy Synthesis, or a file of it is damaged.
    """
    config = parse(run_directory.read_config(folder))
    if not config.proxy_synthesis.ratio:
        raise UserError(
            f"the run in {folder} has no synthetic classes: its config.proxy_synthesis.ratio is 0"
        )
    built = trained.build(folder)
    state = trained.read_training_state(built, folder, name)
    train = built.sources["train"]
    embeddings = embed_images(built.network, state.variables, train)
    proxies, key = jnp.asarray(state.proxies), jax.random.key(config.seed)
    epoch = state.step // built.steps_per_epoch
    order = data.epoch_order(
        train.labels,
        batch_size=config.batch_size,
        n_instance=config.data.n_instance,
        seed=config.seed,
        epoch=epoch,
    )
    parts = []
    for i, images in enumerate(order):
        made = of_batch(
            jax.random.fold_in(key, epoch * len(order) + i),
            jnp.asarray(embeddings[images]),
            proxies,
            jnp.asarray(train.labels[images]),
            loss=losses.of_proxies(config.loss),
            mixing=built.step_config.mixing,
        )
        joins = made.row_mask | made.class_mask
        parts.append(Mixtures(*(x[joins] for x in made)))
    together = Mixtures(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    return together, train.class_names


def save(path: Path, mixtures: Mixtures, class_names: tuple[str, ...]) -> None:
    """Writes synthetic classes atomically to an .npz file without pickles.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        mixtures: the synthetic classes.
        class_names: names of the training classes.
    """
    arrays = {"class_names": np.asarray(class_names, dtype=str), **mixtures._asdict()}
    with files.errors_with_path(path), files.atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)
