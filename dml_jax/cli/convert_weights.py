"""Converts PyTorch weights to a .safetensors file for `config.model.pretrained`.

dml-jax convert --backbone=resnet50 --source=FILE.pth --out=FILE.safetensors

PyTorch's hub names its files NAME-DIGITS.pth, with the first digits of the SHA-256. A file with
such a name is checked against them before it is read.
"""

import pickle
from pathlib import Path

import numpy as np
import safetensors.numpy
from absl import flags

from dml_jax._utils import extras, files
from dml_jax._utils.errors import UserError
from dml_jax.cli import command_line
from dml_jax.models import BACKBONES, pretrained

_BACKBONE = flags.DEFINE_enum(
    "backbone", None, BACKBONES.names(), "The backbone of the weights.", required=True
)
_SOURCE = flags.DEFINE_string("source", None, "The file that torch.save wrote.", required=True)
_OUT = flags.DEFINE_string("out", None, "The .safetensors file to write.", required=True)


def main() -> None:
    """Runs the program."""
    with command_line.user_errors():
        out = Path(_OUT.value)
        if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
            raise UserError(f"--out={out} must end in .safetensors and be in an existing folder")
        if out.exists():
            raise FileExistsError(f"{out} exists; remove it or choose another --out")
        pretrained.check_hash(Path(_SOURCE.value))
        tensors = pretrained.from_port(_read(_SOURCE.value))
        try:
            pretrained.convert(_BACKBONE.value, tensors)
        except ValueError as error:
            raise UserError(f"{_SOURCE.value}: {error}") from None
        with files.atomic_write(out) as part:
            safetensors.numpy.save_file(tensors, part)
    print(f"{len(tensors)} tensors of {_BACKBONE.value}: {out}")


def _read(source: str) -> dict[str, np.ndarray]:
    with extras.required_by("convert"):
        import torch
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise UserError(f"{source} holds no weights that torch.load can read safely") from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not tensors or not all(isinstance(x, torch.Tensor) for x in tensors.values()):
        raise UserError(f"{source} holds neither a state dict nor one under the key 'state_dict'")
    return {
        key: (x.detach().float() if x.is_floating_point() else x).numpy()
        for key, x in tensors.items()
    }


def start() -> None:
    """Parses the command line and runs the program."""
    command_line.run(main)
