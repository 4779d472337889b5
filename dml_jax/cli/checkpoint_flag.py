"""The flag `--checkpoint`."""

from absl import flags

from dml_jax.training import checkpoint


def define(help: str) -> flags.FlagHolder[str | None]:
    """Defines the flag; None stands for the last checkpoint.

    Args:
        help: what the checkpoint is for.
    """
    names = f"last, {', '.join(checkpoint.BEST)}, or that of a step, such as step1200"
    holder = flags.DEFINE_string("checkpoint", None, f"{help}: {names}; default: last.")

    @flags.validator("checkpoint")
    def check(name: str | None) -> bool:
        if name is not None:
            try:
                checkpoint.check_name(name)
            except ValueError as error:
                raise flags.ValidationError(str(error)) from error
        return True

    del check
    return holder
