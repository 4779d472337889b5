"""Decoding, cropping and resizing of single images, as pure functions."""

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Collection, Iterator, Sequence

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float64, UInt8
from PIL import ExifTags, Image, ImageOps

from dml_jax.settings import check_of, flag, number, setting, several

CROP_RATIO = (3 / 4, 4 / 3)
"""Range of width / height of a random crop."""

MAX_PIXELS = 1 << 26
"""The largest image that is decoded, 8192 x 8192; a small file may claim to be far larger."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP")
"""What is read, whatever a file is called. Pillow reads more, some of it with other programs, or
with an image inside whose size only its decoder sees."""

_JPEG_SCALES = (1, 2, 4, 8)  # Others are not faster than the whole image.
_LONGEST = 32  # Longer side of a test image over its shorter one, beyond which it is cut first.

# MAX_PIXELS is lower, and an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _is_range(ends: Collection[float]) -> bool:
    return len(ends) == 2 and list(ends) == sorted(ends)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How a training image is varied at random.

    Raises:
        ValueError: a value is out of its bounds.
    """

    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0),
        several(
            number(above=0.0, most=1.0), "it must be least and most, above 0, up to 1", _is_range
        ),
        help="Least and greatest area of the crop as a fraction of the image's; (1, 1) keeps "
        "square images whole.",
    )
    flip: bool = setting(True, flag(), help="Whether to mirror images with probability 1/2.")
    rotation: float = setting(
        0.0,
        number(least=0.0, most=180.0),
        help="Greatest rotation either way, in degrees.",
    )
    zoom: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Greatest change of size either way, as a fraction of the size.",
    )
    shift: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Greatest shift either way along each axis, as a fraction of the image's side.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        problems: dict[str, str] = {}
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), check_of(field)
            if not check.holds(value):
                problems[field.name] = f"{field.name} is {value!r}; {check.allowed()}"
        if problems:
            raise ValueError("; ".join(problems.values()))


class Picture:
    """An image whose size is known before it is decoded; each scale is decoded once and kept.

    Attributes:
        height: of the upright image, pixels.
        width: of the upright image, pixels.
        scales: it can be decoded at one part in so many of its size; a JPEG that is shrunk while
            it is decoded takes a fraction of the time.
    """

    height: int
    width: int
    scales: tuple[int, ...]

    def __init__(self, data: bytes, name: str) -> None:
        """Reads the header, and of what is no usual JPEG the pixels too; see `decode`.

        Raises:
            ValueError: `data` cannot be decoded; the message begins with `name`.
        """
        self._data, self._name = data, name
        self._decoded: dict[int, np.ndarray] = {}
        with _named(name):
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(image)
            upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
            if image.format == "JPEG" and image.mode in ("L", "RGB") and upright:
                self.scales = _JPEG_SCALES
                self.height, self.width = image.height, image.width
            else:
                self.scales = (1,)
                self._data, self._decoded[1] = b"", _upright(image)
                self.height, self.width = self._decoded[1].shape[:2]

    def pixels(self, scale: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """The upright pixels; not to be written to.

        Args:
            scale: one of `scales`; both sides are divided by it and rounded up.

        Raises:
            ValueError: it cannot be decoded; the message begins with the image's name.
        """
        if scale not in self._decoded:
            with _named(self._name):
                self._decoded[scale] = self._decode_jpeg(scale)
        return self._decoded[scale]

    def scale_for(self, height: int, width: int, size: int) -> int:
        """The coarsest of the scales at which a part of the image is no smaller than a square.

        Args:
            height: of the part, pixels of the whole image.
            width: of the part.
            size: the square's side, pixels; where the part is smaller at once, the scale is 1.
        """
        return max((x for x in self.scales if min(height, width) >= x * size), default=1)

    def _decode_jpeg(self, scale: int) -> np.ndarray:
        # The least sides that a decoded image must have choose the scale; 0 is the whole image.
        least = [-(-side // scale) if scale > 1 else 0 for side in (self.height, self.width)]
        try:
            # The same pixels as Pillow in 60 % of the time.
            decoded = simplejpeg.decode_jpeg(
                self._data, "RGB", min_height=least[0], min_width=least[1]
            )
        except ValueError:  # It also refuses harmless flaws; whether this is one, Pillow decides.
            whole = np.asarray(_to_rgb(Image.open(io.BytesIO(self._data), formats=FORMATS)))
            height, width = (-(-side // scale) for side in whole.shape[:2])
            decoded = resize(whole, height, width)
        return decoded


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input.
        raise ValueError(f"{name}: not a readable image ({error})") from error


def decode(data: bytes, name: str, *, enough: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an encoded image to upright 8-bit RGB.

    Grey becomes RGB, 16-bit grey is scaled to 8 bits, transparent pixels show white behind them,
    CMYK and palettes are converted, an EXIF orientation is applied, and of an animation the first
    frame is taken. Images of more than `MAX_PIXELS` are refused before they are decoded.

    Args:
        data: the encoded image, of one of `FORMATS`.
        name: what to call the image in an error.
        enough: a length that both sides must have, pixels: a larger JPEG is decoded at a fraction
            of its size, which takes a fraction of the time. By default all images are read whole.

    Raises:
        ValueError: `data` cannot be decoded; the message begins with `name`.
    """
    picture = Picture(data, name)
    scale = picture.scale_for(picture.height, picture.width, enough) if enough else 1
    return picture.pixels(scale)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip instead of scale
        levels = np.asarray(image, np.float32) / 257
        image = Image.fromarray(np.uint8(levels.clip(0, 255).round()))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_pillow(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """An opened image as upright 8-bit RGB, as `decode` makes it.

    Raises:
        ValueError: it has more than `MAX_PIXELS`.
    """
    check_size(image)
    return _upright(image)


def check_size(image: Image.Image) -> None:
    """Refuses an opened image of more than `MAX_PIXELS`, by its header alone.

    Raises:
        ValueError: it has more, or none.
    """
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels; up to {MAX_PIXELS} are read")


def _upright(image: Image.Image) -> np.ndarray:
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def resize(
    image: UInt8[np.ndarray, "h w 3"],
    height: int,
    width: int,
    out: UInt8[np.ndarray, "{height} {width} 3"] | None = None,
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resizes bilinearly, or by averaging the covered pixels when the image shrinks.

    The average stands for the antialiasing with which Pillow and torchvision shrink an image:
    plain bilinear interpolation would skip pixels.

    Args:
        image: upright RGB.
        height: of the result, pixels.
        width: of the result, pixels.
        out: where to put the result, contiguous; by default in a new array, or nowhere if the image
            has that size already.
    """
    if image.shape[:2] == (height, width):
        if out is None:
            return image
        out[:] = image
        return out
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), dst=out, interpolation=interpolation)


def random_crop_box(
    height: int, width: int, rng: np.random.Generator, *, scale: Sequence[float]
) -> tuple[int, int, int, int]:
    """Draws a crop whose area and aspect ratio are random ("Inception" crop, arXiv 1409.4842).

    The area is uniform in `scale`, the ratio log-uniform in `CROP_RATIO`, the place uniform. A
    crop that does not fit is drawn again, ten times at most; then it is the largest centred one
    within `CROP_RATIO`. This is torchvision's `RandomResizedCrop`.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        rng: source of randomness.
        scale: least and greatest area of the crop as a fraction of the image's.

    Returns:
        top, left, height and width of the crop in pixels.
    """
    (low, high), (least, most) = CROP_RATIO, scale
    for _ in range(10 if least < 1 else 0):  # No other shape than the image's has all of its area.
        area = height * width * rng.uniform(least, most)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_h, crop_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_h <= height and 0 < crop_w <= width:
            top = int(rng.integers(height - crop_h + 1))
            return top, int(rng.integers(width - crop_w + 1)), crop_h, crop_w
    crop_h = min(height, max(1, round(width / low)))
    crop_w = min(width, max(1, round(height * high)))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def random_view(
    picture: Picture,
    rng: np.random.Generator,
    *,
    augmentation: Augmentation,
    out: UInt8[np.ndarray, "size size 3"],
) -> None:
    """Makes a random view: turned, zoomed and shifted; a resized crop of that; perhaps mirrored.

    Where the crop is at least twice as large as the view, the picture is decoded at a fraction of
    its size; the crop is then rounded to the pixels that are left.

    Args:
        picture: what to look at.
        rng: source of randomness.
        augmentation: how far the view may differ from the picture.
        out: where to put the view, contiguous.
    """
    size = len(out)
    movement = _movement(picture, rng, augmentation)
    top, left, height, width = random_crop_box(
        picture.height, picture.width, rng, scale=augmentation.crop_scale
    )
    if movement is None:
        scale = picture.scale_for(height, width, size)
        image = picture.pixels(scale)
    else:
        scale = 1
        border = cv2.BORDER_REPLICATE  # It goes on outside.
        sides = picture.width, picture.height
        image = cv2.warpAffine(picture.pixels(), movement, sides, borderMode=border)
    # Each edge goes to the nearest that is left, so that the crop stays as large as the view.
    rows, columns = (
        slice(*((edge + scale // 2) // scale for edge in (start, start + length)))
        for start, length in ((top, height), (left, width))
    )
    resize(image[rows, columns], size, size, out)
    if augmentation.flip and rng.random() < 0.5:
        cv2.flip(out, 1, dst=out)


def _movement(
    picture: Picture, rng: np.random.Generator, augmentation: Augmentation
) -> Float64[np.ndarray, "2 3"] | None:
    """Where a turn and a zoom about the middle and a shift take each point; None for nowhere."""
    if not (augmentation.rotation or augmentation.zoom or augmentation.shift):
        return None
    height, width = picture.height, picture.width
    turn, zoom, right, down = rng.uniform(-1, 1, 4) * (
        augmentation.rotation,
        augmentation.zoom,
        augmentation.shift * width,
        augmentation.shift * height,
    )
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), turn, 1 + zoom)
    matrix[:, 2] += right, down
    return matrix


def centre_view(
    image: UInt8[np.ndarray, "h w 3"], *, size: int, resize_to: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resizes the shorter side, then crops the centre.

    Args:
        image: upright RGB.
        size: side of the crop, pixels.
        resize_to: length of the shorter side before the crop, at least `size`.
    """
    shorter = min(image.shape[:2])
    # Resized whole, a line of 60,000 x 1 pixels would fill gigabytes, of which the centre is kept.
    image = _middle(image, _LONGEST * shorter)
    height, width = image.shape[:2]
    height, width = height * resize_to // shorter, width * resize_to // shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, height, width)[top : top + size, left : left + size]


def _middle(image: UInt8[np.ndarray, "h w 3"], longest: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The image's centre, no side of it above a length."""
    height, width = image.shape[:2]
    top, left = max(height - longest, 0) // 2, max(width - longest, 0) // 2
    return image[top : top + longest, left : left + longest]
