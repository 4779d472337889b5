"""Decoding, cropping and resizing of single images, as pure functions."""

import dataclasses
import io
import math
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

CROP_RATIO = (3 / 4, 4 / 3)
"""Range of width / height of a random crop."""

MAX_PIXELS = 1 << 26
"""The largest image that is decoded, 8192 x 8192; a small file may claim to be far larger."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP")
"""What is read, whatever a file is called. Pillow reads more, some of it with other programs, or
with an image inside whose size only its decoder sees."""

_LONGEST = 32  # Longer side of a test image over its shorter one, beyond which it is cut first.

# MAX_PIXELS is lower, and an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How a training image is varied at random.

    Attributes:
        crop_scale: least and greatest area of the crop as a fraction of the image's; (1, 1) keeps
            square images whole.
        flip: whether left and right may change places.
        rotation: greatest rotation either way, in degrees.
        zoom: greatest change of size either way, as a fraction of the size.
        shift: greatest shift either way along each axis, as a fraction of the image's side.

    Raises:
        ValueError: a range that makes no sense.
    """

    crop_scale: Sequence[float] = (0.08, 1.0)
    flip: bool = True
    rotation: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is {self.crop_scale}; it must be least and most, above 0, up to 1"
            )
        for name, below in (("rotation", 181), ("zoom", 1), ("shift", 1)):
            if not 0 <= getattr(self, name) < below:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 0 and below {below}"
                )


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
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(image)
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if image.format == "JPEG" and image.mode in ("L", "RGB") and upright:
            return _decode_jpeg(data, image, enough)
        return _upright(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on broken input.
        raise ValueError(f"{name}: not a readable image ({error})") from error


def _decode_jpeg(data: bytes, image: Image.Image, enough: int) -> np.ndarray:
    try:
        # The same pixels as Pillow in 60 % of the time.
        return simplejpeg.decode_jpeg(data, "RGB", min_height=enough, min_width=enough)
    except ValueError:  # It also refuses harmless flaws; whether this is one, Pillow decides.
        return np.asarray(_to_rgb(image))


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
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resizes bilinearly, or by averaging the covered pixels when the image shrinks.

    The average stands for the antialiasing with which Pillow and torchvision shrink an image:
    plain bilinear interpolation would skip pixels.
    """
    if image.shape[:2] == (height, width):
        return image
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation)


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
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    size: int,
    augmentation: Augmentation,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A random view: turned, zoomed and shifted; a resized crop of that; perhaps mirrored.

    Args:
        image: upright RGB.
        rng: source of randomness.
        size: side of the result, pixels.
        augmentation: how far the view may differ from the image.
    """
    if augmentation.rotation or augmentation.zoom or augmentation.shift:
        image = _moved(image, rng, augmentation)
    height, width = image.shape[:2]
    top, left, height, width = random_crop_box(height, width, rng, scale=augmentation.crop_scale)
    view = resize(image[top : top + height, left : left + width], size, size)
    return view[:, ::-1] if augmentation.flip and rng.random() < 0.5 else view


def _moved(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, augmentation: Augmentation
) -> UInt8[np.ndarray, "h w 3"]:
    """The image turned and zoomed about its middle, and shifted; its border goes on outside."""
    height, width = image.shape[:2]
    turn, zoom, right, down = rng.uniform(-1, 1, 4) * (
        augmentation.rotation,
        augmentation.zoom,
        augmentation.shift * width,
        augmentation.shift * height,
    )
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), turn, 1 + zoom)
    matrix[:, 2] += right, down
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


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
