"""Publication of an export in a repository of the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from dml_jax._utils import hub
from dml_jax._utils.errors import UserError
from dml_jax.inference.export import CARD
from dml_jax.inference.retriever import FUNCTION, THRESHOLD, WEIGHTS
from dml_jax.training import run_directory

FILES = (CARD, run_directory.CONFIG, FUNCTION, WEIGHTS)
"""The files of an export that are published, beside a threshold if there is one."""


def check_access(repository: str) -> None:
    """Checks the name of a repository, the token and the network, before any other work.

    Args:
        repository: OWNER/NAME.

    Raises:
        ValueError: the name is invalid, or there is no token or an invalid one.
        OSError: the hub cannot be reached.
    """
    try:
        huggingface_hub.hf_hub_url(repository, CARD)  # It validates the name.
    except HFValidationError as error:
        raise UserError(f"--repo={repository} is no name of a repository: {error}") from None
    if "/" not in repository:
        raise UserError(f"--repo={repository} lacks its owner: give OWNER/NAME")
    if huggingface_hub.get_token() is None:
        raise UserError(
            "there is no token of the Hugging Face hub: run `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    try:
        huggingface_hub.whoami()
    except huggingface_hub.errors.HfHubHTTPError as error:
        raise UserError(
            f"the hub refuses the token ({hub.reason(error)}): run `hf auth login` again, or "
            "correct HF_TOKEN"
        ) from None
    except Exception as error:  # Those of its HTTP client have no common base of ours.
        raise OSError(f"the Hugging Face hub cannot be reached: {hub.reason(error)}") from error


def check_export(folder: Path) -> None:
    """Checks that a folder holds a complete export.

    Raises:
        FileNotFoundError: a file is missing.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no export, which `dml-jax export` writes: it has no {name}"
            )


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads an export in one commit, and creates the repository if it does not exist.

    Args:
        folder: the export.
        repository: OWNER/NAME.
        private: whether a new repository is private.

    Returns:
        The URL of the repository.

    Raises:
        OSError: the hub refuses the upload or cannot be reached.
    """
    try:
        url = huggingface_hub.create_repo(repository, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*FILES, THRESHOLD],
            commit_message="Upload an export of dml_jax",
        )
    except Exception as error:  # Those of its HTTP client have no common base of ours.
        raise OSError(f"{repository} cannot be written: {' '.join(str(error).split())}") from error
    return str(url)
