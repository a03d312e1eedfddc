"""Image files from outside: decoded as upright RGB images, or refused by name."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.infra.errors import DataError
from pipeline.infra.safe_io import open_regular, truncate

# Not among them, though PIL opens them: EPS and WMF, which take other programs to draw; formats without
# a signature (TGA, PCX); floats (PFM), whose brightness has no known range; icons and layers, which are
# several images.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif",
})  # fmt: skip
MAX_BYTES = 1 << 30  # of a file; some decoders take all of it into memory
MAX_SIDE = 65_535  # what JPEG allows; PIL refuses over 179 million pixels
BACKGROUND = (128, 128, 128, 255)  # of transparent images: dark and light drawings stand out from it
BILINEAR = Image.Resampling.BILINEAR
_LIST_AGAIN = "`dvc repro -f prepare` lists it again"


def open_image(path: Path, *, size: int | None = None) -> Image.Image:
    """An upright RGB image, decoded.

    Args:
        size: bytes that the file must have; None: any number.

    Raises:
        DataError: the file is missing, changed or damaged, no image, or one whose brightness has no
            known range.
    """
    try:
        with open_regular(path, MAX_BYTES) as file, Image.open(file, formats=IMAGE_FORMATS) as opened:
            if max(opened.size) > MAX_SIDE:  # decoding a long narrow image takes much memory too
                raise ValueError(f"its side of {max(opened.size)} pixels is over {MAX_SIDE}")
            actual = os.fstat(file.fileno()).st_size
            if size is not None and actual != size:
                raise ValueError(f"it has {actual:,} bytes and had {size:,} at `prepare`; {_LIST_AGAIN}")
            image = ImageOps.exif_transpose(opened)
            is_16_bit = image.mode.startswith("I;16") or (opened.format, image.mode) == ("PPM", "I")
            if image.mode in ("F", "I") and not is_16_bit:
                raise ValueError(f"its mode {image.mode} has no known range; save it with 8 or 16 bits")
            if is_16_bit:  # PIL would clip 16 bits to 8; scale them
                image = Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8))
            return _opaque(image).convert("RGB")
    except Exception as error:  # each decoder raises what the damaged bytes happen to break
        reason = getattr(error, "strerror", None) or truncate(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"it is none of {', '.join(IMAGE_FORMATS)}, or its beginning is damaged"
        raise DataError(
            f"{truncate(path)} can't be read as an image ({reason}); repair or remove it"
        ) from None


def _opaque(image: Image.Image) -> Image.Image:
    """The image on BACKGROUND, as a viewer shows it: the colours of transparent pixels mean nothing."""
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    lowest, highest = rgba.getchannel("A").getextrema()
    if highest == 0:
        raise ValueError("all of it is transparent, so it shows nothing")
    if lowest == 255:
        return rgba
    background = Image.new("RGBA", rgba.size, BACKGROUND)
    background.alpha_composite(rgba)
    return background
