"""Image files of unknown hands, opened as upright RGB pictures or refused by name."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import DataError
from pipeline.untrusted import cut, open_regular

IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "WEBP",
    "TIFF",
    "GIF",
    "PPM",
    "JPEG2000",
)  # EPS would run a program
MAX_SIDE = 65_535  # what JPEG allows; PIL refuses over 179 million pixels


def open_image(path: Path, *, size: int | None = None) -> Image.Image:
    """An upright RGB image, decoded.

    Args:
        size: bytes that the file must have; None where nobody has said it.

    Raises:
        DataError: the file is missing, changed or damaged, no image, or one whose brightness has no
            known range.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=IMAGE_FORMATS) as opened:
            if max(opened.size) > MAX_SIDE:  # a narrow one of few pixels takes as much memory as many
                raise ValueError(f"its side of {max(opened.size)} pixels is over {MAX_SIDE}")
            held = os.fstat(file.fileno()).st_size
            if size is not None and held != size:
                raise ValueError(f"it has {held:,} bytes and had {size:,} at `prepare`; {_ANEW}")
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("F", "I"):
                raise ValueError(f"its mode {image.mode} has no known range; save it with 8 or 16 bits")
            if image.mode.startswith("I;16"):  # PIL would clip 16 bits to 8; scale them
                image = Image.fromarray((np.asarray(image, dtype=np.uint16) // 257).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # each decoder raises what the damaged bytes happen to break
        raise DataError(f"{cut(path)} can't be read as an image ({_said(error)}); {_MEND}") from None


def _said(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(IMAGE_FORMATS)}, or its beginning is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return cut(error) or type(error).__name__


_MEND = "repair or remove it"
_ANEW = "`dvc repro -f prepare` lists it anew"
