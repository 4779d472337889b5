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

from dml_jax._utils.errors import UserError
from dml_jax.settings import check_of, flag, number, setting, several

CROP_RATIO = (3 / 4, 4 / 3)
"""Range of width / height of a random crop."""

MAX_PIXELS = 1 << 26
"""Largest image that is decoded, 8192 x 8192; the header of a small file may claim far more."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP")
"""Formats that are read, whatever the extension of the file. Pillow reads more, but some of them
with external programs, and some contain an image whose size is known only to its decoder."""

COLOURS = ("brightness", "contrast", "saturation")
"""Fields of `Augmentation` that change colours; see `data.colour`."""

IN_STEP = (*COLOURS, "erasing")
"""Fields of `Augmentation` that do not concern single images: the training step applies them."""

_JPEG_SCALES = (1, 2, 4, 8)  # Decoding at other scales is not faster than at full size.
_MAX_ASPECT = 32  # Longer side of a test image over its shorter one; longer images are cut first.

# Images above MAX_PIXELS, a lower limit than Pillow's, raise an error instead.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _is_range(ends: Collection[float]) -> bool:
    return len(ends) == 2 and list(ends) == sorted(ends)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training images.

    Raises:
        ValueError: a value is out of bounds.
    """

    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0),
        several(
            number(above=0.0, most=1.0), "it must be a minimum and a maximum in (0, 1]", _is_range
        ),
        help="Minimum and maximum area of the crop as a fraction of the image's area; (1, 1) "
        "does not crop square images.",
    )
    flip: bool = setting(True, flag(), help="Whether to mirror images with probability 1/2.")
    rotation: float = setting(
        0.0,
        number(least=0.0, most=180.0),
        help="Maximum rotation in either direction, degrees.",
    )
    zoom: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Maximum relative change of size in either direction.",
    )
    shift: float = setting(
        0.0,
        number(least=0.0, below=1.0),
        help="Maximum shift in either direction along each axis, as a fraction of the side.",
    )
    brightness: float = setting(
        0.0,
        number(least=0.0, most=10.0),
        help="Maximum relative change of brightness in either direction. The three changes of "
        "colour are those of torchvision's ColorJitter, in random order.",
    )
    contrast: float = setting(
        0.0,
        number(least=0.0, most=10.0),
        help="Maximum relative change of contrast in either direction.",
    )
    saturation: float = setting(
        0.0,
        number(least=0.0, most=10.0),
        help="Maximum relative change of saturation in either direction.",
    )
    erasing: float = setting(
        0.0,
        number(least=0.0, most=1.0),
        help="Random erasing: probability that a rectangle of 1/50 to 1/3 of the image is replaced "
        "by noise.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        problems: dict[str, str] = {}
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), check_of(field)
            if not check.holds(value):
                problems[field.name] = f"{field.name} is {value!r}; {check.allowed()}"
        if problems:
            raise UserError("; ".join(problems.values()))


class LazyImage:
    """An image of known size that is decoded on demand, once at each scale.

    Attributes:
        height: height of the upright image, pixels.
        width: width of the upright image, pixels.
        scales: divisors of its size at which it can be decoded. Decoding a JPEG at a fraction of
            its size takes a fraction of the time.
    """

    height: int
    width: int
    scales: tuple[int, ...]

    def __init__(self, data: bytes, name: str) -> None:
        """Reads the header, and also the pixels unless the image is an ordinary JPEG.

        Args:
            data: the encoded image; see `decode`.
            name: name of the image in error messages.

        Raises:
            ValueError: `data` cannot be decoded; the message begins with `name`.
        """
        self._data, self._name = data, name
        self._decoded: dict[int, np.ndarray] = {}
        with _errors_named(name):
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
        """Returns the upright pixels, which must not be written to.

        Args:
            scale: one of `scales`; both sides are divided by it and rounded up.

        Raises:
            ValueError: it cannot be decoded; the message begins with the name of the image.
        """
        if scale not in self._decoded:
            with _errors_named(self._name):
                self._decoded[scale] = self._decode_jpeg(scale)
        return self._decoded[scale]

    def scale_for(self, height: int, width: int, size: int) -> int:
        """Returns the coarsest scale at which a region of the image still covers a square.

        Args:
            height: height of the region, pixels at full size.
            width: width of the region, pixels at full size.
            size: side of the square, pixels. If the region is smaller already, the scale is 1.
        """
        return max((x for x in self.scales if min(height, width) >= x * size), default=1)

    def _decode_jpeg(self, scale: int) -> np.ndarray:
        # The minimum sides of the result determine the scale; 0 means full size.
        minimum = [-(-side // scale) if scale > 1 else 0 for side in (self.height, self.width)]
        try:
            # The same pixels as with Pillow in 60 % of the time.
            decoded = simplejpeg.decode_jpeg(
                self._data, "RGB", min_height=minimum[0], min_width=minimum[1]
            )
        except ValueError:  # It also rejects files with harmless flaws, which Pillow reads.
            full = np.asarray(_to_rgb(Image.open(io.BytesIO(self._data), formats=FORMATS)))
            height, width = (-(-side // scale) for side in full.shape[:2])
            decoded = resize(full, height, width)
        return decoded


@contextlib.contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Turns any exception into a ValueError whose message begins with `name`."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise nearly any exception on damaged input.
        raise UserError(f"{name}: not a readable image ({error})") from error


def decode(data: bytes, name: str, *, min_side: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an encoded image to upright 8-bit RGB.

    Grey, CMYK and palette images become RGB, 16-bit grey is scaled to 8 bits, transparent pixels
    are blended with white, the EXIF orientation is applied, and an animation yields its first
    frame. Images of more than `MAX_PIXELS` are rejected before they are decoded.

    Args:
        data: the encoded image, in one of `FORMATS`.
        name: name of the image in error messages.
        min_side: minimum length of both sides, pixels. A larger JPEG is then decoded at a fraction
            of its size, which takes a fraction of the time. By default images have full size.

    Raises:
        ValueError: `data` cannot be decoded; the message begins with `name`.
    """
    image = LazyImage(data, name)
    scale = image.scale_for(image.height, image.width, min_side) if min_side else 1
    return image.pixels(scale)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip.
        levels = np.asarray(image, np.float32) / 257
        image = Image.fromarray(np.uint8(levels.clip(0, 255).round()))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_pillow(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Converts an image opened with Pillow to upright 8-bit RGB, as `decode` does.

    Raises:
        ValueError: it has more than `MAX_PIXELS`.
    """
    check_size(image)
    return _upright(image)


def check_size(image: Image.Image) -> None:
    """Checks the number of pixels in the header of an opened image.

    Raises:
        ValueError: it has no pixels, or more than `MAX_PIXELS`.
    """
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise UserError(f"{image.width} x {image.height} pixels; up to {MAX_PIXELS} are read")


def _upright(image: Image.Image) -> np.ndarray:
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


def resize(
    image: UInt8[np.ndarray, "h w 3"],
    height: int,
    width: int,
    out: UInt8[np.ndarray, "{height} {width} 3"] | None = None,
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resizes an image, bilinearly if it grows and by area averaging if it shrinks.

    Averaging takes the place of the antialiasing of Pillow and torchvision: plain bilinear
    interpolation would skip pixels.

    Args:
        image: upright RGB.
        height: height of the result, pixels.
        width: width of the result, pixels.
        out: contiguous array for the result; by default the result is a new array, or `image`
            itself if it has that size already.
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
    """Draws a crop of random area and aspect ratio ("Inception" crop, arXiv 1409.4842).

    The area is uniform in `scale`, the aspect ratio log-uniform in `CROP_RATIO`, the position
    uniform. A crop that does not fit is drawn again, up to ten times; after that the result is the
    largest central crop within `CROP_RATIO`. This is torchvision's `RandomResizedCrop`.

    Args:
        height: height of the image, pixels.
        width: width of the image, pixels.
        rng: the random generator.
        scale: minimum and maximum area of the crop as a fraction of the image's area.

    Returns:
        Top, left, height and width of the crop in pixels.
    """
    (low, high), (smallest, largest) = CROP_RATIO, scale
    for _ in range(10 if smallest < 1 else 0):  # Only the image's own shape has its full area.
        area = height * width * rng.uniform(smallest, largest)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_h, crop_w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_h <= height and 0 < crop_w <= width:
            top = int(rng.integers(height - crop_h + 1))
            return top, int(rng.integers(width - crop_w + 1)), crop_h, crop_w
    crop_h = min(height, max(1, round(width / low)))
    crop_w = min(width, max(1, round(height * high)))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def random_view(
    image: LazyImage,
    rng: np.random.Generator,
    *,
    augmentation: Augmentation,
    out: UInt8[np.ndarray, "size size 3"],
) -> None:
    """Writes a random view of an image: rotated, zoomed, shifted, cropped, resized and mirrored.

    If the crop is at least twice as large as the view, the image is decoded at a fraction of its
    size, and the edges of the crop are rounded to the remaining pixels.

    Args:
        image: the image.
        rng: the random generator.
        augmentation: ranges of the random changes.
        out: contiguous array for the view.
    """
    size = len(out)
    matrix = _random_affine(image, rng, augmentation)
    top, left, height, width = random_crop_box(
        image.height, image.width, rng, scale=augmentation.crop_scale
    )
    if matrix is None:
        scale = image.scale_for(height, width, size)
        pixels = image.pixels(scale)
    else:
        scale = 1
        border = cv2.BORDER_REPLICATE
        sides = image.width, image.height
        pixels = cv2.warpAffine(image.pixels(), matrix, sides, borderMode=border)
    # Both edges are rounded to the nearest pixel, so that the crop is no smaller than the view.
    rows, columns = (
        slice(*((edge + scale // 2) // scale for edge in (start, start + length)))
        for start, length in ((top, height), (left, width))
    )
    resize(pixels[rows, columns], size, size, out)
    if augmentation.flip and rng.random() < 0.5:
        cv2.flip(out, 1, dst=out)


def _random_affine(
    image: LazyImage, rng: np.random.Generator, augmentation: Augmentation
) -> Float64[np.ndarray, "2 3"] | None:
    """Draws the matrix of a rotation and zoom about the centre and a shift; None for no change."""
    if not (augmentation.rotation or augmentation.zoom or augmentation.shift):
        return None
    height, width = image.height, image.width
    angle, zoom, right, down = rng.uniform(-1, 1, 4) * (
        augmentation.rotation,
        augmentation.zoom,
        augmentation.shift * width,
        augmentation.shift * height,
    )
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1 + zoom)
    matrix[:, 2] += right, down
    return matrix


def centre_view(
    image: UInt8[np.ndarray, "h w 3"], *, size: int, resize_to: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Resizes the shorter side of an image to a length, then crops the centre.

    Args:
        image: upright RGB.
        size: side of the crop, pixels.
        resize_to: length of the shorter side before the crop, at least `size`.
    """
    shorter = min(image.shape[:2])
    # Resizing all of an image of 60,000 x 1 pixels would take gigabytes.
    image = _crop_centre(image, _MAX_ASPECT * shorter)
    height, width = image.shape[:2]
    height, width = height * resize_to // shorter, width * resize_to // shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(image, height, width)[top : top + size, left : left + size]


def _crop_centre(image: UInt8[np.ndarray, "h w 3"], max_side: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns the centre of an image, with neither side longer than `max_side`."""
    height, width = image.shape[:2]
    top, left = max(height - max_side, 0) // 2, max(width - max_side, 0) // 2
    return image[top : top + max_side, left : left + max_side]
