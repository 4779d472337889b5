from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.ft2font import FT2Font, LoadFlags
from PIL import ImageFont

from dml_jax import data
from dml_jax.data import glyphs, images

TYPEFACES = Path(find_spec("matplotlib").origin).parent / "mpl-data" / "fonts" / "ttf"


@pytest.fixture(scope="module")
def letters():
    return data.create("glyphs")


def every_image(letters):
    """Split, class, typeface, character and pixels of every image."""
    for split, source in letters.items():
        for index, name in enumerate(source.names):
            typeface, code = name.split("/U+")
            picture = images.decode(source[index], name)
            label = source.class_names[source.labels[index]]
            yield split, label, typeface, chr(int(code, 16)), picture


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


def test_letters_of_one_shape_are_one_class_and_of_other_shapes_are_not(letters):
    train, test = (set(letters[split].class_names) for split in ("train", "test"))
    assert {"LATIN CAPITAL LETTER A", "LATIN SMALL LETTER A"} <= train
    assert {"LATIN CAPITAL LETTER O", "LATIN SMALL LETTER O"} <= train
    assert {"CYRILLIC CAPITAL LETTER YA", "CYRILLIC SMALL LETTER YA"} <= test
    assert "LATIN SMALL LETTER A WITH ACUTE" not in train
    for same in ("CAPITAL LETTER ALPHA", "SMALL LETTER OMICRON"):
        assert f"GREEK {same}" not in train
    # The last two are drawn with other points than Latin turned M and Greek Phi.
    assert not test & {
        "CYRILLIC CAPITAL LETTER A",
        "ARMENIAN SMALL LETTER OH",
        "ARMENIAN SMALL LETTER AYB",
        "CYRILLIC CAPITAL LETTER EF",
    }


def test_scripts_of_the_splits(letters):
    prefixes = {"train": ("LATIN ", "GREEK "), "test": ("CYRILLIC ", "GEORGIAN ", "ARMENIAN ")}
    for split, source in letters.items():
        assert all(name.startswith(prefixes[split]) for name in source.class_names)
        characters = {int(name.split("/U+")[1], 16) for name in source.names}
        of_train = {c for c in characters if c < 0x400 or 0x1D00 <= c < 0x1D2B}
        assert bool(of_train) == (split == "train")


def test_no_two_images_are_equal(letters):
    pictures = [picture.tobytes() for *_, picture in every_image(letters)]
    assert len(set(pictures)) == len(pictures)


def test_no_two_images_have_the_same_outline(letters):
    """Reads the outlines in font units with FreeType, instead of fontTools."""
    fonts, seen = {}, {}
    for split, label, typeface, character, _ in every_image(letters):
        if typeface not in fonts:
            fonts[typeface] = FT2Font(str(TYPEFACES / f"{typeface}.ttf"))
        fonts[typeface].load_char(ord(character), flags=LoadFlags.NO_SCALE)
        points, codes = fonts[typeface].get_path()
        key = ((points - points.min(0)).tobytes(), codes.tobytes())
        here = (split, label, typeface, character)
        assert seen.setdefault(key, here) == here


def test_no_two_classes_share_a_drawing_at_another_size(letters):
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


def test_inspection_finds_nothing(letters, capsys):
    findings = data.inspect(letters)
    assert not any(findings.unreadable.values())
    assert [copies.images for copies in findings.copies.values()] == [0, 0, 0]
    data.report(findings)
    assert not capsys.readouterr().err


def test_glyphs_are_dark_letters_in_the_middle_and_never_boxes(letters):
    found = list(every_image(letters))
    assert found[0][1:4] == ("LATIN CAPITAL LETTER A", "DejaVuSans", "A")
    pictures = np.stack([picture for *_, picture in found])
    assert pictures.shape[1:] == (32, 32, 3)
    ink = 255 - pictures[..., 0].astype(int)
    assert (ink.max((1, 2)) > 200).all()
    for axis in (1, 2):
        drawn = ink.max(3 - axis) > 0
        off_centre = abs(drawn.argmax(1) - drawn[:, ::-1].argmax(1))
        assert np.quantile(off_centre, 0.95) <= 3
    # A font draws a box for a character that it lacks. No font has U+FFFF.
    drawn_pictures = {picture.tobytes() for picture in pictures[..., 0]}
    for path in {TYPEFACES / f"{typeface}.ttf" for _, _, typeface, _, _ in found}:
        font = ImageFont.truetype(str(path), 22, layout_engine=ImageFont.Layout.BASIC)
        assert glyphs._picture(font, "\uffff").tobytes() not in drawn_pictures


def test_glyphs_are_the_same_every_time(letters):
    again = data.create("glyphs")["test"]
    assert again.records == letters["test"].records
    assert again.names == letters["test"].names


def drawing(letter, typeface, shape):
    """A drawing whose outline and picture depend on the number `shape` alone."""
    rng = np.random.default_rng(shape)
    outline = rng.uniform(0, 20, (5, 2))
    return glyphs._Drawing(letter, typeface, outline, (5,), rng.integers(0, 255, (4, 4), np.uint8))


def test_coinciding_letters_are_joined_and_their_copies_left_out(monkeypatch):
    # By letter, the shape in each typeface. Greek Alpha is as Latin A in one typeface, Cyrillic A
    # as Alpha in another, and B's last two typefaces draw it alike.
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
        "_drawings",
        lambda: (drawing(c, f"t{i}", s) for c, row in shapes.items() for i, s in enumerate(row)),
    )
    names = {
        split: {label: [name for name, _ in members] for label, members in classes.items()}
        for split, classes in glyphs.create().items()
    }
    assert names == {
        "train": {
            "LATIN CAPITAL LETTER A": [f"t{i}/U+0041" for i in range(10)]
            + [f"t{i}/U+0391" for i in range(1, 11)],
            "LATIN CAPITAL LETTER B": [f"t{i}/U+0042" for i in range(8)],
        },
        "test": {"CYRILLIC CAPITAL LETTER BE": [f"t{i}/U+0411" for i in range(8)]},
    }


def test_drawings_coincide_within_a_quarter_of_a_pixel_or_of_black():
    original = drawing("A", "t", 0)
    other = original.outline + 9

    def coincide(**changes):
        return len(glyphs._coinciding([original, original._replace(**changes)])) > 0

    assert coincide()
    assert coincide(outline=other)
    assert not coincide(outline=other, picture=255 - original.picture)
    assert coincide(outline=original.outline + 0.24, picture=255 - original.picture)
    assert not coincide(outline=original.outline + 0.26, picture=255 - original.picture)
    assert not coincide(contours=(4,), picture=255 - original.picture)
    shifted = np.pad(original.picture, ((2, 0), (0, 3)), constant_values=255)
    assert coincide(outline=other, picture=shifted)
    assert not coincide(outline=other, picture=shifted[:-1])
    for change, same in ((64, True), (65, False)):
        picture = original.picture.copy()
        row, column = np.unravel_index(picture.argmin(), picture.shape)
        picture[row, column] += change
        assert coincide(outline=other, picture=picture) == same


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(glyphs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        data.create("glyphs")
    there = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(glyphs, "find_spec", lambda name: there)
    with pytest.raises(FileNotFoundError, match=r"DejaVuSans\.ttf is missing: install matplotlib"):
        data.create("glyphs")
