"""Where the configuration of a run came from: config file, variant, changes, published scores."""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from dml_jax.published import Reference, Score


class Origin(NamedTuple):
    """The origin of a configuration, recorded in the folder of a run for the report."""

    config_file: str
    """As it was given: a path, or the name of a packaged config."""
    variant: str
    """Of the config file; empty for its default."""
    overrides: Mapping[str, Any]
    """Other settings given on the command line, by path."""
    published: tuple[Reference, ...]
    """Published scores of the variant, from the config file."""

    def to_json(self) -> dict[str, Any]:
        """Returns the origin as plain values."""
        published = [{"source": x.source, "scores": x.scores} for x in self.published]
        return {**self._asdict(), "overrides": dict(self.overrides), "published": published}

    def command(self, workdir: str, fork_from: str | None = None) -> list[str]:
        """Returns the words of the command that trains the configuration, quoted for a shell.

        Args:
            workdir: folder or URL of the run.
            fork_from: folder or URL of the run that it is forked from.
        """
        config = f"{self.config_file}:{self.variant}" if self.variant else self.config_file
        return [
            "dml-jax train",
            f"--config={shlex.quote(config)}",
            f"--workdir={shlex.quote(workdir)}",
            *([f"--fork_from={shlex.quote(fork_from)}"] if fork_from else []),
            *(
                f"--config.{path}={shlex.quote(_flag(value))}"
                for path, value in self.overrides.items()
                # The flag parser does not read None, which is the default where it is allowed.
                if value is not None
            ),
        ]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Origin":
        """Returns the origin of the values that `to_json` returned."""
        published = tuple(
            Reference(x["source"], {name: Score(*score) for name, score in x["scores"].items()})
            for x in values["published"]
        )
        return cls(values["config_file"], values["variant"], values["overrides"], published)


def _flag(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ",".join(map(str, value)) + ("," if len(value) == 1 else "") + ")"
    return str(value)
