from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font, LoadFlags
from PIL import ImageFont

from dml_jax import data
from dml_jax.data import images
from dml_jax.data.sources import glyphs

TYPEFACES = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"
DRAW_AGAIN = glyphs.draw_classes.__wrapped__  # Without the cache.


@pytest.fixture(scope="module")
def letters():
    return data.create("glyphs")


def every_image(letters):
    """Yields split, class, typeface, character and pixels of every image."""
    for split, source in letters.items():
        for index, name in enumerate(source.names):
            typeface, code = name.split("/U+")
            pixels = images.decode(source[index], name)
            label = source.class_names[source.labels[index]]
            yield split, label, typeface, chr(int(code, 16)), pixels


def test_numbers_of_classes_and_images(letters):
    # README.md and docs/benchmarks.md state these numbers.
    for split, classes, count in [("train", 423, 5702), ("test", 286, 3204)]:
        source = letters[split]
        assert len(source.class_names) == len(set(source.class_names)) == classes
        assert len(source) == len(source.names) == len(source.labels) == count
        sizes = np.bincount(source.labels)
        assert len(sizes) == classes
        assert sizes.min() == 8
        assert len(set(source.names)) == count
    assert not set(letters["train"].class_names) & set(letters["test"].class_names)


def test_letters_of_one_shape_form_one_class(letters):
    train, test = (set(letters[split].class_names) for split in ("train", "test"))
    assert {"LATIN CAPITAL LETTER A", "LATIN SMALL LETTER A"} <= train
    assert {"LATIN CAPITAL LETTER O", "LATIN SMALL LETTER O"} <= train
    assert {"CYRILLIC CAPITAL LETTER YA", "CYRILLIC SMALL LETTER YA"} <= test
    assert "LATIN SMALL LETTER A WITH ACUTE" not in train
    for same in ("CAPITAL LETTER ALPHA", "SMALL LETTER OMICRON"):
        assert f"GREEK {same}" not in train
    # The outlines of the last two have other points than those of Latin turned M and Greek Phi.
    assert not test & {
        "CYRILLIC CAPITAL LETTER A",
        "ARMENIAN SMALL LETTER OH",
        "ARMENIAN SMALL LETTER AYB",
        "CYRILLIC CAPITAL LETTER EF",
    }


def test_splits_have_disjoint_scripts(letters):
    prefixes = {"train": ("LATIN ", "GREEK "), "test": ("CYRILLIC ", "GEORGIAN ", "ARMENIAN ")}
    for split, source in letters.items():
        assert all(name.startswith(prefixes[split]) for name in source.class_names)
        characters = {int(name.split("/U+")[1], 16) for name in source.names}
        of_train = {c for c in characters if c < 0x400 or 0x1D00 <= c < 0x1D2B}
        assert bool(of_train) == (split == "train")


def test_all_images_are_distinct(letters):
    encoded = [pixels.tobytes() for *_, pixels in every_image(letters)]
    assert len(set(encoded)) == len(encoded)


def test_all_outlines_are_distinct(letters):
    """The outlines are read in font units with FreeType, independently of fontTools."""
    fonts, seen = {}, {}
    for split, label, typeface, character, _ in every_image(letters):
        if typeface not in fonts:
            fonts[typeface] = FT2Font(str(TYPEFACES / f"{typeface}.ttf"))
        fonts[typeface].load_char(ord(character), flags=LoadFlags.NO_SCALE)
        points, codes = fonts[typeface].get_path()
        key = ((points - points.min(0)).tobytes(), codes.tobytes())
        here = (split, label, typeface, character)
        assert seen.setdefault(key, here) == here


def test_classes_share_no_drawing_at_another_size(letters):
    fonts, seen = {}, {}
    for split, label, typeface, character, _ in every_image(letters):
        if typeface not in fonts:
            fonts[typeface] = ImageFont.truetype(
                str(TYPEFACES / f"{typeface}.ttf"), 61, layout_engine=ImageFont.Layout.BASIC
            )
        mask = fonts[typeface].getmask(character)
        left, top, right, bottom = mask.getbbox()
        ink = np.array(mask).reshape(mask.size[::-1])[top:bottom, left:right]
        key = (typeface, ink.shape, ink.tobytes())
        assert seen.setdefault(key, (split, label)) == (split, label)


def test_inspection_report_is_empty(letters, capsys):
    report = data.inspect(letters)
    assert not any(report.unreadable.values())
    assert [copies.images for copies in report.copies.values()] == [0, 0, 0]
    data.report(report)
    assert not capsys.readouterr().err


def test_glyphs_are_dark_centred_and_not_placeholder_boxes(letters):
    found = list(every_image(letters))
    assert found[0][1:4] == ("LATIN CAPITAL LETTER A", "DejaVuSans", "A")
    pixels = np.stack([image for *_, image in found])
    assert pixels.shape[1:] == (32, 32, 3)
    ink = 255 - pixels[..., 0].astype(int)
    assert (ink.max((1, 2)) > 200).all()
    for axis in (1, 2):
        has_ink = ink.max(3 - axis) > 0
        off_centre = abs(has_ink.argmax(1) - has_ink[:, ::-1].argmax(1))
        assert np.quantile(off_centre, 0.95) <= 3
    # Fonts draw a box for a missing character, and no font has U+FFFF.
    drawings = {image.tobytes() for image in pixels[..., 0]}
    for path in {TYPEFACES / f"{typeface}.ttf" for _, _, typeface, _, _ in found}:
        font = ImageFont.truetype(str(path), 22, layout_engine=ImageFont.Layout.BASIC)
        assert glyphs._render(font, "\uffff").tobytes() not in drawings


def test_glyphs_are_deterministic():
    assert DRAW_AGAIN() == glyphs.draw_classes()


def drawing(letter, typeface, shape):
    """Returns a drawing whose outline and image depend on the number `shape` alone."""
    rng = np.random.default_rng(shape)
    outline = rng.uniform(0, 20, (5, 2))
    return glyphs._Drawing(letter, typeface, outline, (5,), rng.integers(0, 255, (4, 4), np.uint8))


def test_coinciding_letters_are_merged_without_duplicates(monkeypatch):
    # The shape of each letter by typeface. Greek Alpha equals Latin A in one typeface, Cyrillic A
    # equals Alpha in another. The last two drawings of B are equal, and so are those of C.
    shapes = {
        "\N{CYRILLIC CAPITAL LETTER A}": range(119, 129),
        "\N{CYRILLIC CAPITAL LETTER BE}": range(200, 208),
        "\N{CYRILLIC SMALL LETTER BE}": range(300, 307),
        "\N{GREEK CAPITAL LETTER ALPHA}": range(109, 120),
        "A": range(100, 110),
        "B": [*range(400, 408), 407],
        "C": [*range(500, 507), 506],
    }
    monkeypatch.setattr(
        glyphs,
        "_draw_all",
        lambda: (drawing(c, f"t{i}", s) for c, row in shapes.items() for i, s in enumerate(row)),
    )
    names = {
        split: {label: [name for name, _ in members] for label, members in classes.items()}
        for split, classes in DRAW_AGAIN().items()
    }
    assert names == {
        "train": {
            "LATIN CAPITAL LETTER A": [f"t{i}/U+0041" for i in range(10)]
            + [f"t{i}/U+0391" for i in range(1, 11)],
            "LATIN CAPITAL LETTER B": [f"t{i}/U+0042" for i in range(8)],
        },
        "test": {"CYRILLIC CAPITAL LETTER BE": [f"t{i}/U+0411" for i in range(8)]},
    }


def test_drawings_coincide_within_the_tolerances():
    original = drawing("A", "t", 0)
    other = original.outline + 9

    def coincide(**changes):
        return len(glyphs._coinciding([original, original._replace(**changes)])) > 0

    assert coincide()
    assert coincide(outline=other)
    assert not coincide(outline=other, image=255 - original.image)
    assert coincide(outline=original.outline + 0.24, image=255 - original.image)
    assert not coincide(outline=original.outline + 0.26, image=255 - original.image)
    assert not coincide(contours=(4,), image=255 - original.image)
    shifted = np.pad(original.image, ((2, 0), (0, 3)), constant_values=255)
    assert coincide(outline=other, image=shifted)
    assert not coincide(outline=other, image=shifted[:-1])
    for change, same in ((64, True), (65, False)):
        image = original.image.copy()
        row, column = np.unravel_index(image.argmin(), image.shape)
        image[row, column] += change
        assert coincide(outline=other, image=image) == same


def test_missing_package_or_typeface_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, "draw_classes", DRAW_AGAIN)
    monkeypatch.setattr(glyphs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dml_jax\[demo\]"'):
        data.create("glyphs")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(glyphs, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match=r"DejaVuSans\.ttf is missing: install matplotlib"):
        data.create("glyphs")
