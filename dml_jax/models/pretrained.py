"""Weights that PyTorch trained, as variables of our backbones.

They come from a local .safetensors file, or from one on the Hugging Face hub.

A backbone's modules are named as PyTorch's are, dots included, so that
`("params", "layer1.0", "conv1", "kernel")` is `layer1.0.conv1.weight`.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dml_jax.models.registry import create_backbone

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


_CLASSIFIERS = ("fc.", "last_linear.", "classifier.")

# A revision with ".." in it would be looked for outside the hub's cache.
_HUB = re.compile(r"hf:(?P<repo_id>[\w.-]+/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?")

# How PyTorch's hub names files: with at least the first eight digits of their SHA-256.
_HASHED = re.compile(r".*-(?P<digits>[0-9a-f]{8,64})\.pth")

_LISTED = 50  # Tensors that an error names.

NONE = "none"
"""The place of weights that are drawn at random."""


def is_place(where: str) -> bool:
    """Whether a place of weights is of a known form; nobody goes there.

    Args:
        where: `none`, a local file that ends in .safetensors, or hf:OWNER/NAME, with @REVISION
            behind it or not.
    """
    local = where.endswith(".safetensors") and not where.startswith("hf:")
    return where == NONE or local or _HUB.fullmatch(where) is not None


def absolute(where: str) -> str:
    """The same place, whatever directory a later program starts in."""
    return where if where == NONE or where.startswith("hf:") else str(Path(where).absolute())


def load(name: str, where: str) -> dict[str, Any]:
    """Reads the weights of a backbone.

    Args:
        name: a backbone of `create_backbone`, made without options.
        where: a local .safetensors file, or hf:OWNER/NAME for the file model.safetensors there;
            its tensors have PyTorch's names.

    Returns:
        {"params": ..., "batch_stats": ...}, float32.

    Raises:
        FileNotFoundError: there is no such file, or the hub does not give it.
        ValueError: it is no safetensors file, or its tensors are not those of the backbone.
    """
    hub = _HUB.fullmatch(where)
    path = _download(where, **hub.groupdict()) if hub else Path(where)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    try:
        return convert(name, safetensors.numpy.load_file(path))
    except OSError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # SafetensorError, and others where its header lies.
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); "
            "scripts/convert_weights.py makes one of a .pth"
        ) from None


def _download(where: str, repo_id: str, revision: str | None) -> Path:
    """The hub's file in its local cache, where it stays."""
    try:
        path = huggingface_hub.hf_hub_download(repo_id, "model.safetensors", revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{where} has no model.safetensors, or cannot be reached "
            f"({reason}); check the name, or, for a machine without a network, run "
            f"`hf download {repo_id} model.safetensors` on one that has it and give the file's "
            "path, or copy the cache and set HF_HUB_OFFLINE=1"
        ) from None
    return Path(path)


def check_hash(path: Path) -> None:
    """Makes sure that a file holds what its name promises, if its name promises anything.

    Args:
        path: a file; of NAME-DIGITS.pth, such as bn_inception-52deb4733.pth, the SHA-256 has to
            begin with the digits, which are hexadecimal and at least eight.

    Raises:
        ValueError: the SHA-256 is another.
        FileNotFoundError: there is no such file.
    """
    named = _HASHED.fullmatch(path.name)
    if named is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(named["digits"]):
        raise ValueError(
            f"{path} is not what its name says: its SHA-256 begins with "
            f"{digest[: len(named['digits'])]}, not with {named['digits']}; download it again, or, "
            "if these digits are no hash, rename the file"
        )


def backbone_tensors(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A PyTorch state dict without what no backbone has: classifier and `num_batches_tracked`."""
    return {
        key: array
        for key, array in state_dict.items()
        if not key.startswith(_CLASSIFIERS) and not key.endswith("num_batches_tracked")
    }


def from_port(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A backbone's tensors as their files should have them, of a state dict of any age.

    Args:
        state_dict: arrays by PyTorch name, perhaps those of a parallel model, which begin with
            `module.`, and perhaps of PyTorch before 0.2, which gave the vectors of a batch
            normalisation a leading axis of 1.

    Returns:
        Those of `backbone_tensors`, contiguous, since safetensors writes others wrongly.
    """
    plain = {key.removeprefix("module."): array for key, array in state_dict.items()}
    return {
        key: np.ascontiguousarray(array[0] if array.ndim == 2 and len(array) == 1 else array)
        for key, array in backbone_tensors(plain).items()
    }


def convert(name: str, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a PyTorch state dict to the variables of a backbone.

    The classifier and the counters of `backbone_tensors` are left out; every other tensor must
    find its place, and every place its tensor.

    Args:
        name: a backbone of `create_backbone`, made without options.
        state_dict: arrays by PyTorch name, convolution kernels as [out, in, height, width].

    Returns:
        {"params": ..., "batch_stats": ...}, float32.

    Raises:
        ValueError: on an unknown name, or listing all missing, unexpected and misshapen tensors.
    """
    init = partial(create_backbone(name).init, train=False)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    template = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), image))
    paths = {".".join((*path[1:-1], _LEAVES[path[-1]])): path for path in template}
    arrays = {
        key: np.transpose(array, (2, 3, 1, 0)) if array.ndim == 4 else array
        for key, array in backbone_tensors(state_dict).items()
    }
    problems = [f"{key} is missing" for key in paths.keys() - arrays.keys()]
    problems += [f"{key} is unexpected" for key in arrays.keys() - paths.keys()]
    for key in paths.keys() & arrays.keys():
        expected, shape = template[paths[key]].shape, arrays[key].shape
        if shape != expected:
            problems.append(f"{key} is {_torch(shape)}, but should be {_torch(expected)}")
        if not jnp.issubdtype(arrays[key].dtype, jnp.floating):
            problems.append(f"{key} is {arrays[key].dtype}, but should be floating-point")
        elif not np.isfinite(arrays[key].astype(np.float32)).all():
            problems.append(f"{key} is not finite")
    if problems:
        listed = sorted(problems)[:_LISTED]
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise ValueError(f"these are no weights of {name}: {'; '.join(listed + more)}")
    return flax.traverse_util.unflatten_dict(
        {path: jnp.array(arrays[key], jnp.float32) for key, path in paths.items()}
    )


def _torch(shape: tuple[int, ...]) -> list[int]:
    """A shape of ours as PyTorch lays it out: kernels [out, in, height, width], the rest alike."""
    return [shape[axis] for axis in (3, 2, 0, 1)] if len(shape) == 4 else list(shape)
