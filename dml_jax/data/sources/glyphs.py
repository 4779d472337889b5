"""Letters of five scripts, drawn in the typefaces of matplotlib's wheel.

Some letters of different scripts look the same, such as Latin A, Greek Alpha and Cyrillic A. So a
class is a set of letters whose drawings coincide in some typeface, and belongs to one split only.
"""

import functools
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from dml_jax._utils import extras
from dml_jax.data.sources.source import Sources, from_classes

_SIZE = 32
_FONT_SIZE = 22  # Pixels; the largest at which nearly all letters fit into the image.
_MIN_IMAGES = 8
_SCRIPTS = {"train": ("LATIN", "GREEK"), "test": ("CYRILLIC", "GEORGIAN", "ARMENIAN")}
_TYPEFACES = tuple(
    f"DejaVu{family}{style}"
    for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")
) + ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")

# Tolerances within which two drawings coincide: pixels for outlines, grey levels for images.
_OUTLINE_TOLERANCE = 0.25
_INK_TOLERANCE = 64.0  # A quarter of black.

# Name and PNG file of each image, by class name.
_Classes = dict[str, list[tuple[str, bytes]]]

_Pairs = Int[np.ndarray, "pairs 2"]


class _Drawing(NamedTuple):
    """A letter in one typeface.

    Attributes:
        letter: one character.
        typeface: one of `_TYPEFACES`.
        outline: points of its contours in pixels, relative to the lower left corner of their
            bounding box.
        contours: index of the last point of each contour, and flags of the points on the curve.
        image: the letter in black on white.
    """

    letter: str
    typeface: str
    outline: Float[np.ndarray, "points 2"]
    contours: Hashable
    image: UInt8[np.ndarray, "h w"]

    @property
    def split(self) -> str:
        """The split that the letter's script belongs to."""
        title = unicodedata.name(self.letter)
        return next(split for split, scripts in _SCRIPTS.items() if title.startswith(scripts))


def load() -> Sources:
    """Returns Latin and Greek letters as "train", and Cyrillic, Georgian and Armenian as "test".

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileNotFoundError: it is installed without its typefaces.
    """
    return {split: from_classes(classes) for split, classes in draw_classes().items()}


@functools.cache  # Drawing takes several seconds, and a comparison loads the letters for each run.
def draw_classes() -> dict[str, _Classes]:
    """Draws the images of all classes.

    Letters whose drawings coincide in some typeface form one class, named after the first of them.
    A class with letters of both splits becomes a training class without its test letters. Of the
    coinciding drawings in a class only the first is kept. Classes with fewer than 8 images are
    dropped. So no two classes share an image, and no image occurs twice.

    Returns:
        The images by split and by class name, in the order of the letters.
    """
    drawings = sorted(_draw_all(), key=lambda drawing: drawing.letter)
    coinciding = _coinciding(drawings)
    duplicate_of = _components(len(drawings), coinciding)
    letters = np.unique([drawing.letter for drawing in drawings], return_inverse=True)[1]
    first = np.unique(letters, return_index=True)[1]
    same_letter = np.stack([np.arange(len(drawings)), first[letters]], axis=1)
    labels = _components(len(drawings), np.concatenate([coinciding, same_letter]))
    members = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)

    classes: dict[str, _Classes] = {split: {} for split in _SCRIPTS}
    for indices in members.values():
        splits = {index: drawings[index].split for index in indices}
        split = next(split for split in _SCRIPTS if split in splits.values())
        kept: dict[int, _Drawing] = {}
        for index in indices:
            if splits[index] == split:
                kept.setdefault(duplicate_of[index], drawings[index])
        if len(kept) >= _MIN_IMAGES:
            title = unicodedata.name(next(iter(kept.values())).letter)
            classes[split][title] = [_encode(drawing) for drawing in kept.values()]
    return classes


def _draw_all() -> Iterator[_Drawing]:
    """Yields every letter without an accent, in every typeface that contains it."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            'the glyphs need the typefaces in matplotlib\'s wheel: pip install "dml_jax[demo]"'
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
        yield from _draw(typeface, path, letters)


def _draw(typeface: str, path: Path, letters: Iterable[str]) -> Iterator[_Drawing]:
    """Yields those of the letters that the typeface at `path` contains."""
    with extras.required_by("demo"):
        from fontTools.ttLib import TTFont

    # The other layout engine needs libraqm; the images must not depend on what is installed.
    engine = ImageFont.Layout.BASIC
    font = ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=engine)
    with TTFont(path) as tables:
        names, glyphs = tables.getBestCmap(), tables["glyf"]
        pixels = _FONT_SIZE / tables["head"].unitsPerEm
        for letter in letters:
            if ord(letter) not in names:
                continue
            points, ends, flags = glyphs[names[ord(letter)]].getCoordinates(glyphs)
            if len(points):  # A letter without points would be an empty image.
                outline = np.array(points, float) * pixels
                contours = (tuple(ends), bytes(flag & 1 for flag in flags))
                image = _render(font, letter)
                yield _Drawing(letter, typeface, outline - outline.min(0), contours, image)


def _render(font: ImageFont.FreeTypeFont, letter: str) -> UInt8[np.ndarray, "h w"]:
    """Returns the letter in black on white, the box of its ink and advance in the centre."""
    left, top, right, bottom = font.getbbox(letter)
    origin = ((_SIZE - left - right) // 2, (_SIZE - top - bottom) // 2)
    image = Image.new("L", (_SIZE, _SIZE), 255)
    ImageDraw.Draw(image).text(origin, letter, fill=0, font=font)
    return np.asarray(image)


def _coinciding(drawings: Sequence[_Drawing]) -> _Pairs:
    """Returns pairs of drawings, by index, that coincide up to a translation.

    Two drawings coincide if the points of their outlines agree within a quarter of a pixel. Their
    pixels may still differ, because hinting and side bearings move an outline by parts of a pixel.
    Some letters have one shape but other points. So two drawings also coincide if the bounding
    boxes of their ink have the same size and no pixel differs by more than a quarter of black.
    """
    inks = [_crop_ink(drawing.image) for drawing in drawings]
    outline_pairs = _close_pairs(
        [drawing.contours for drawing in drawings],
        [drawing.outline.ravel() for drawing in drawings],
        _OUTLINE_TOLERANCE,
    )
    ink_pairs = _close_pairs(
        [ink.shape for ink in inks], [ink.ravel() for ink in inks], _INK_TOLERANCE
    )
    return np.concatenate([outline_pairs, ink_pairs])


def _crop_ink(image: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
    """Returns the inverted image (0 is white, 255 black), cropped to its ink."""
    ink = 255 - image
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _close_pairs(
    keys: Sequence[Hashable], values: Sequence[np.ndarray], tolerance: float
) -> _Pairs:
    """Returns pairs, by index, of equal keys whose values differ by at most `tolerance` anywhere.

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
    """Returns the connected component of each of `count` nodes; the pairs are the edges."""
    edges = coo_array((np.ones(len(pairs), bool), tuple(pairs.T)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def _encode(drawing: _Drawing) -> tuple[str, bytes]:
    """Returns the unique name of a drawing, and its image as a PNG file."""
    name = f"{drawing.typeface}/U+{ord(drawing.letter):04X}"
    return name, cv2.imencode(".png", drawing.image)[1].tobytes()
