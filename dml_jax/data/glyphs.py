"""Letters of five scripts in the typefaces of matplotlib's wheel, as classes of encoded images.

Many letters of different scripts are one drawing: Latin A, Greek Alpha and Cyrillic A. So a class
is a set of letters whose drawings coincide in some typeface, and each class is in one split only.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from fontTools.ttLib import TTFont
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

_SIZE = 32
_FONT_SIZE = 22  # Pixels; the largest at which practically every letter lies inside the image.
_MIN_IMAGES = 8
_SCRIPTS = {"train": ("LATIN", "GREEK"), "test": ("CYRILLIC", "GEORGIAN", "ARMENIAN")}
_TYPEFACES = tuple(
    f"DejaVu{family}{style}"
    for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")
) + ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")

# Drawings coincide if they differ by at most this: a quarter of a pixel, or a quarter of black.
_SAME_POINT = 0.25
_SAME_INK = 64.0

Classes = dict[str, list[tuple[str, bytes]]]
"""By name of the class: the name and the PNG file of each of its images."""

_Pairs = Int[np.ndarray, "pairs 2"]


class _Drawing(NamedTuple):
    """A letter in one typeface.

    Attributes:
        letter: one character.
        typeface: one of `_TYPEFACES`.
        outline: points of its contours in pixels, from the lower left corner of their box.
        contours: the index of each contour's last point, and which points lie on the curve.
        picture: the letter in black on white.
    """

    letter: str
    typeface: str
    outline: Float[np.ndarray, "points 2"]
    contours: Hashable
    picture: UInt8[np.ndarray, "h w"]

    @property
    def split(self) -> str:
        """The split that the letter's script is for."""
        title = unicodedata.name(self.letter)
        return next(split for split, scripts in _SCRIPTS.items() if title.startswith(scripts))


def create() -> dict[str, Classes]:
    """Draws the classes of "train" (Latin and Greek) and of "test" (the other scripts).

    Letters whose drawings coincide in some typeface are one class, named after the first of them.
    If such a class has letters of both splits, it is a training class without its test letters.
    Of the drawings in a class that coincide, only the first is kept. A class that has fewer than
    8 images left is dropped. So no two classes share an image, and no image occurs twice.

    Returns:
        By split, then by class name in the order of the letters: the images.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileNotFoundError: it is installed without its typefaces.
    """
    drawings = sorted(_drawings(), key=lambda drawing: drawing.letter)
    same = _coinciding(drawings)
    images = _components(len(drawings), same)
    letters = np.unique([drawing.letter for drawing in drawings], return_inverse=True)[1]
    first = np.unique(letters, return_index=True)[1]
    of_letter = np.stack([np.arange(len(drawings)), first[letters]], axis=1)
    members = defaultdict(list)
    for index, label in enumerate(_components(len(drawings), np.concatenate([same, of_letter]))):
        members[label].append(index)

    classes: dict[str, Classes] = {split: {} for split in _SCRIPTS}
    for indices in members.values():
        splits = {index: drawings[index].split for index in indices}
        split = next(split for split in _SCRIPTS if split in splits.values())
        kept: dict[int, _Drawing] = {}
        for index in indices:
            if splits[index] == split:
                kept.setdefault(images[index], drawings[index])
        if len(kept) >= _MIN_IMAGES:
            title = unicodedata.name(next(iter(kept.values())).letter)
            classes[split][title] = [_encode(drawing) for drawing in kept.values()]
    return classes


def _drawings() -> Iterator[_Drawing]:
    """Every letter without an accent, in every typeface that has it."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the glyphs are drawn with the typefaces of matplotlib's wheel: pip install matplotlib"
        )
    scripts = tuple(script for scripts in _SCRIPTS.values() for script in scripts)
    letters = [
        letter
        for letter in map(chr, range(0x10000))
        if unicodedata.name(letter, "").startswith(scripts)
        and unicodedata.category(letter).startswith("L")
        and not unicodedata.decomposition(letter)  # An accented letter decomposes.
    ]
    for typeface in _TYPEFACES:
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{typeface}.ttf"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: install matplotlib from its wheel")
        yield from _drawn(typeface, path, letters)


def _drawn(typeface: str, path: Path, letters: Iterable[str]) -> Iterator[_Drawing]:
    """The letters that the typeface at `path` has."""
    # The other layout engine exists only where libraqm does; the images must not depend on it.
    engine = ImageFont.Layout.BASIC
    font = ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=engine)
    with TTFont(path) as tables:
        names, glyphs = tables.getBestCmap(), tables["glyf"]
        pixels = _FONT_SIZE / tables["head"].unitsPerEm
        for letter in letters:
            if ord(letter) not in names:
                continue
            points, ends, flags = glyphs[names[ord(letter)]].getCoordinates(glyphs)
            if len(points):  # A letter without any would be an empty image.
                outline = np.array(points, float) * pixels
                contours = (tuple(ends), bytes(flag & 1 for flag in flags))
                picture = _picture(font, letter)
                yield _Drawing(letter, typeface, outline - outline.min(0), contours, picture)


def _picture(font: ImageFont.FreeTypeFont, letter: str) -> UInt8[np.ndarray, "h w"]:
    """The letter in black, the box of its ink and its advance in the middle of a white square."""
    left, top, right, bottom = font.getbbox(letter)
    origin = ((_SIZE - left - right) // 2, (_SIZE - top - bottom) // 2)
    image = Image.new("L", (_SIZE, _SIZE), 255)
    ImageDraw.Draw(image).text(origin, letter, fill=0, font=font)
    return np.asarray(image)


def _coinciding(drawings: Sequence[_Drawing]) -> _Pairs:
    """Pairs of drawings that coincide wherever in the image they lie, by index.

    Two coincide if their outlines have the same points to a quarter of a pixel. The pixels may
    still differ, because hinting and side bearings move an outline by parts of a pixel. Some
    letters are the same shape drawn with other points. So two also coincide if the boxes around
    their ink have one size and no pixel in them differs by more than a quarter of black.
    """
    inks = [_ink(drawing.picture) for drawing in drawings]
    outlines = _close(
        [drawing.contours for drawing in drawings],
        [drawing.outline.ravel() for drawing in drawings],
        _SAME_POINT,
    )
    pictures = _close([ink.shape for ink in inks], [ink.ravel() for ink in inks], _SAME_INK)
    return np.concatenate([outlines, pictures])


def _ink(picture: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
    """How black the picture is, 0 .. 255, in the smallest box around all that is not white."""
    ink = 255 - picture
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _close(keys: Sequence[Hashable], values: Sequence[np.ndarray], tolerance: float) -> _Pairs:
    """Pairs, by index, of equal keys and of values that differ by at most `tolerance` everywhere.

    Values of equal keys must be vectors of one length.
    """
    groups = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    pairs = [np.empty((0, 2), int)]
    for group in groups.values():
        tree = KDTree(np.stack([values[index] for index in group]))
        pairs.append(np.array(group)[tree.query_pairs(tolerance, np.inf, output_type="ndarray")])
    return np.concatenate(pairs)


def _components(count: int, pairs: _Pairs) -> Int[np.ndarray, " count"]:
    """Labels the connected components of a graph with `count` nodes and an edge for each pair."""
    edges = coo_array((np.ones(len(pairs), bool), tuple(pairs.T)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def _encode(drawing: _Drawing) -> tuple[str, bytes]:
    """The drawing's unique name, and its picture as a PNG file."""
    name = f"{drawing.typeface}/U+{ord(drawing.letter):04X}"
    return name, cv2.imencode(".png", drawing.picture)[1].tobytes()
