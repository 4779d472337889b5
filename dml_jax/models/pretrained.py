"""Loads pretrained PyTorch weights as variables of the backbones.

The weights are a .safetensors file, local or on the Hugging Face hub. The modules of a backbone
have PyTorch's names, dots included: `("params", "layer1.0", "conv1", "kernel")` is
`layer1.0.conv1.weight`. Other parameters, such as `cls_token`, have the same name in both.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dml_jax._utils import hub, storage
from dml_jax._utils.errors import UserError
from dml_jax.models.normalisation import NORMALISATIONS, InputNormalisation
from dml_jax.models.registry import create_backbone

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# Of a kernel in Flax's layout, from PyTorch's: [out, in, height, width] or [out, in].
_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}

_CLASSIFIERS = ("fc.", "last_linear.", "classifier.", "head.")
_FEATURES = ("head.norm.",)  # ConvNeXt's normalisation of pooled features.

# PyTorch's hub puts at least eight digits of a file's SHA-256 into its name.
_HASHED = re.compile(r".*-(?P<digits>[0-9a-f]{8,64})\.pth")

_LISTED = 50  # Maximum number of tensors in an error message.

NONE = "none"
"""Stands for random initialisation."""


def is_location(location: str) -> bool:
    """Returns whether a location of weights is valid, without accessing it.

    Args:
        location: valid are `none`, a local .safetensors file, hf:OWNER/NAME and
            hf:OWNER/NAME@REVISION.
    """
    local = location.endswith(".safetensors") and not hub.is_location(location)
    return location == NONE or local or hub.parse(location) is not None


def absolute(location: str) -> str:
    """Returns the location with an absolute path, valid in any working directory."""
    if location == NONE or hub.is_location(location):
        return location
    return storage.absolute(location)


def find(location: str) -> Path | None:
    """Returns the local file of weights, downloaded if needed; None for the location `none`.

    Args:
        location: see `is_location`.

    Raises:
        FileNotFoundError: the file does not exist or cannot be downloaded.
    """
    if location == NONE:
        return None
    on_hub = hub.parse(location)
    path = _download(location, on_hub) if on_hub else storage.local(location)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    return path


def load(
    name: str, location: str, normalisation: InputNormalisation | None = None
) -> dict[str, Any] | None:
    """Returns the pretrained variables of a backbone; None for the location `none`.

    Args:
        name: a backbone of `create_backbone`, with its default options.
        location: `none`, a local .safetensors file, or hf:OWNER/NAME for the file
            model.safetensors there; its tensors have PyTorch's names.
        normalisation: that of the network's input, compared with the one that a config.json on the
            hub gives, if there is one.

    Returns:
        {"params": ..., "batch_stats": ...}, float32.

    Raises:
        FileNotFoundError: the file does not exist or cannot be downloaded.
        ValueError: it is not a safetensors file, its tensors do not fit the backbone, or its input
            is normalised otherwise.
    """
    path = find(location)
    if path is None:
        return None
    if normalisation is not None:
        _check_normalisation(location, normalisation)
    try:
        return convert(name, safetensors.numpy.load_file(path))
    except OSError:
        raise
    except ValueError as error:
        stated = published_input(location)
        theirs = None if stated is None else stated.architecture
        other = f" ({location} is said to hold {theirs})" if theirs not in (None, name) else ""
        raise UserError(f"{path}: {error}{other}") from None
    except Exception as error:  # SafetensorError, and others for a corrupt header.
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error}); "
            "scripts/convert_weights.py converts a .pth file"
        ) from None


def _check_normalisation(location: str, ours: InputNormalisation) -> None:
    theirs = published_input(location)
    if theirs is None or _is_normalised_by(theirs, ours):
        return
    known = theirs.normalisation
    advice = f"set config.model.normalisation={known}" if known else "choose other weights"
    raise UserError(
        f"{location} was trained with images of mean {list(theirs.mean)} and standard deviation "
        f"{list(theirs.std)}, which are not those of the network's input; {advice}"
    )


class PublishedInput(NamedTuple):
    """The images that weights on the hub were trained with, as their config.json states it."""

    mean: tuple[float, ...]
    """Of each channel, in units of 0..1."""
    std: tuple[float, ...]
    """Of each channel, in units of 0..1."""
    image_size: int | None
    """Side of an image, pixels; None if it is not stated."""
    crop: float
    """Share of the shorter side that the centre crop keeps."""
    crop_mode: str
    """How the crop is taken: `center`, or by timm's other names."""
    interpolation: str
    """Interpolation of the resizing."""
    architecture: str | None
    """timm's name of the network; None if it is not stated."""

    @property
    def resize(self) -> int | None:
        """Shorter side of an image before the centre crop, pixels."""
        return None if self.image_size is None else math.floor(self.image_size / self.crop)

    @property
    def normalisation(self) -> str | None:
        """The key of `NORMALISATIONS` with this mean and deviation; None if there is none."""
        return next((k for k, one in NORMALISATIONS.items() if _is_normalised_by(self, one)), None)


def published_input(location: str) -> PublishedInput | None:
    """Returns the input that timm's config.json on the hub states.

    Returns:
        None for a location that is not on the hub, or has no such file.
    """
    on_hub = hub.parse(location)
    if on_hub is None:
        return None
    try:
        text = hub.file(on_hub, "config.json").read_text(encoding="utf-8")
        whole = json.loads(text)
        config = whole["pretrained_cfg"]
        if not config.get("crop_pct", 1.0) > 0:
            return None
        size = config.get("input_size")
        return PublishedInput(
            mean=tuple(map(float, config["mean"])),
            std=tuple(map(float, config["std"])),
            image_size=None if size is None else int(size[-1]),
            crop=float(config.get("crop_pct", 1.0)),
            crop_mode=str(config.get("crop_mode", "center")),
            interpolation=str(config.get("interpolation", "bicubic")),
            architecture=whole.get("architecture"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


def other_images(location: str, image_size: int, resize: int) -> str | None:
    """Returns how images of a test differ from those the weights were made for, in a sentence.

    None if they do not differ, or if no config.json of timm's on the hub states it.

    Args:
        location: see `is_location`.
        image_size: side of the images, pixels.
        resize: shorter side before the centre crop, pixels.
    """
    made_for = published_input(location)
    if made_for is None or made_for.image_size is None:
        return None
    stated = made_for.image_size, made_for.resize, made_for.crop_mode
    if stated == (image_size, resize, "center"):
        return None
    return (
        f"{location} was made for images of {made_for.image_size} pixels, resized to "
        f"{made_for.resize} with {made_for.interpolation} interpolation (crop mode "
        f"{made_for.crop_mode}); this run has config.data.image_size={image_size} and "
        f"config.data.resize={resize} with a centre crop"
    )


def _is_normalised_by(published: PublishedInput, ours: InputNormalisation) -> bool:
    stated = 255 * np.array([published.mean, published.std])
    return np.allclose(stated, (ours.mean, ours.std), rtol=1e-3)


def _download(location: str, on_hub: hub.Location) -> Path:
    """Returns the path of the hub's file in its local cache."""
    try:
        return hub.file(on_hub, "model.safetensors")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{location} has no model.safetensors or cannot be reached ({hub.reason(error)}); "
            f"check the name. Without a network, run `hf download {on_hub.repo_id} "
            "model.safetensors` on another machine, then pass the path of the file, or copy the "
            "cache and set HF_HUB_OFFLINE=1"
        ) from None


def check_hash(path: Path) -> None:
    """Checks a file against the hash in its name, if there is one.

    Args:
        path: a file. If its name is NAME-DIGITS.pth with at least eight hexadecimal digits, such as
            bn_inception-52deb4733.pth, its SHA-256 must begin with these digits.

    Raises:
        ValueError: the SHA-256 differs.
        FileNotFoundError: the file does not exist.
    """
    match = _HASHED.fullmatch(path.name)
    if match is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    expected = match["digits"]
    if not digest.startswith(expected):
        raise UserError(
            f"{path} does not match the hash in its name: its SHA-256 begins with "
            f"{digest[: len(expected)]}, not with {expected}; download it again, or rename the "
            "file if these digits are not a hash"
        )


def backbone_tensors(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a PyTorch state dict without the classifier and `num_batches_tracked`."""
    return {
        key: array
        for key, array in state_dict.items()
        if (key.startswith(_FEATURES) or not key.startswith(_CLASSIFIERS))
        and not key.endswith("num_batches_tracked")
    }


def from_port(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a backbone from a PyTorch state dict, ready to be written.

    Args:
        state_dict: arrays by PyTorch name. The names may begin with `module.`, as those of a
            parallel model do. The vectors of batch normalisations may have a leading axis of 1, as
            before PyTorch 0.2.

    Returns:
        The tensors of `backbone_tensors`, contiguous, since safetensors writes others incorrectly.
    """
    plain = {key.removeprefix("module."): array for key, array in state_dict.items()}
    return {
        key: np.ascontiguousarray(array[0] if array.ndim == 2 and len(array) == 1 else array)
        for key, array in backbone_tensors(plain).items()
    }


def convert(name: str, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the variables of a backbone from a PyTorch state dict.

    Ignores the classifier and counters. All other tensors must match the variables one to one.

    Args:
        name: a backbone of `create_backbone`, with its default options.
        state_dict: arrays by PyTorch name, convolution kernels as [out, in, height, width] and
            matrices as [out, in].

    Returns:
        {"params": ..., "batch_stats": ...}, float32.

    Raises:
        ValueError: the name is unknown, or tensors are missing, unexpected or of the wrong shape,
            dtype or value; the message lists them.
    """
    backbone = create_backbone(name)
    init = partial(backbone.init, train=False)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    template = flax.traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0), image))
    paths = {".".join((*path[1:-1], _LEAVES.get(path[-1], path[-1]))): path for path in template}
    arrays = {
        key: array.transpose(_AXES[array.ndim]) if array.ndim in _AXES else array
        for key, array in backbone_tensors(state_dict).items()
    }
    problems = [f"{key} is missing" for key in paths.keys() - arrays.keys()]
    problems += [f"{key} is unexpected" for key in arrays.keys() - paths.keys()]
    for key in paths.keys() & arrays.keys():
        expected, shape = template[paths[key]].shape, arrays[key].shape
        if shape != expected:
            problems.append(f"{key} is {_torch(shape)}, but should be {_torch(expected)}")
            if key == "pos_embed":
                side = backbone.grid * backbone.patch
                problems[-1] += f" (choose weights made for images of {side} pixels)"
        if not jnp.issubdtype(arrays[key].dtype, jnp.floating):
            problems.append(f"{key} is {arrays[key].dtype}, but should be floating-point")
        elif not np.isfinite(arrays[key].astype(np.float32)).all():
            problems.append(f"{key} is not finite")
    if problems:
        listed = sorted(problems)[:_LISTED]
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise UserError(f"the weights do not fit {name}: {'; '.join(listed + more)}")
    found = {path: jnp.array(arrays[key], jnp.float32) for key, path in paths.items()}
    # A network without batch normalisation has no statistics.
    return {"batch_stats": {}} | flax.traverse_util.unflatten_dict(found)


def _torch(shape: tuple[int, ...]) -> list[int]:
    """Returns a shape in PyTorch's layout; see `_AXES`."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
    return [shape[axis] for axis in axes]
