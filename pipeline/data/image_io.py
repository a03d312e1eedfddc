"""Image files of unknown hands, opened as upright RGB pictures or refused by name."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.infra.errors import DataError
from pipeline.infra.safe_io import open_regular, truncate

# Left out of what PIL opens: EPS and WMF, which other programs draw; formats without a signature (TGA,
# PCX); floats (PFM), whose brightness has no known range; icons and layers, which are several images.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
IMAGE_SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif",
})  # fmt: skip
MAX_BYTES = 1 << 30  # of a file; some decoders take all of it into memory
MAX_SIDE = 65_535  # what JPEG allows; PIL refuses over 179 million pixels
BEHIND = (128, 128, 128, 255)  # what is transparent: dark and light drawings both stand out from it


def open_image(path: Path, *, size: int | None = None) -> Image.Image:
    """An upright RGB image, decoded.

    Args:
        size: bytes that the file must have; None where nobody has said it.

    Raises:
        DataError: the file is missing, changed or damaged, no image, or one whose brightness has no
            known range.
    """
    try:
        with open_regular(path, MAX_BYTES) as file, Image.open(file, formats=IMAGE_FORMATS) as opened:
            if max(opened.size) > MAX_SIDE:  # a narrow one of few pixels takes as much memory as many
                raise ValueError(f"its side of {max(opened.size)} pixels is over {MAX_SIDE}")
            held = os.fstat(file.fileno()).st_size
            if size is not None and held != size:
                raise ValueError(f"it has {held:,} bytes and had {size:,} at `prepare`; {_ANEW}")
            image = ImageOps.exif_transpose(opened)
            is_16_bit = image.mode.startswith("I;16") or (opened.format, image.mode) == ("PPM", "I")
            if image.mode in ("F", "I") and not is_16_bit:
                raise ValueError(f"its mode {image.mode} has no known range; save it with 8 or 16 bits")
            if is_16_bit:  # PIL would clip 16 bits to 8; scale them
                image = Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8))
            return _opaque(image).convert("RGB")
    except Exception as error:  # each decoder raises what the damaged bytes happen to break
        raise DataError(
            f"{truncate(path)} can't be read as an image ({_said(error)}); {_MEND}"
        ) from None


def _opaque(image: Image.Image) -> Image.Image:
    """As it is shown: colours that lie under full transparency mean nothing.

    Raises:
        ValueError: all of it is transparent.
    """
    if not image.has_transparency_data:
        return image
    seen = image.convert("RGBA")
    least, most = seen.getchannel("A").getextrema()
    if most == 0:
        raise ValueError("all of it is transparent, so it shows nothing")
    if least == 255:
        return seen
    behind = Image.new("RGBA", seen.size, BEHIND)
    behind.alpha_composite(seen)
    return behind


def _said(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(IMAGE_FORMATS)}, or its beginning is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return truncate(error) or type(error).__name__


_MEND = "repair or remove it"
_ANEW = "`dvc repro -f prepare` lists it anew"
