"""Reading of picture files and arrays. This room imports no other room of the package.

Every picture file is opened here, by its content and as one of `FORMATS`, whatever its name says. Pillow's other plugins,
some of which start programs, are never reached.
"""

from pamm.images.arrays import open_array
from pamm.images.formats import FORMATS, HEIF, IMAGE_SUFFIXES, ImageError
from pamm.images.png import NOTE
from pamm.images.reading import (
    MAX_PIXELS,
    LabelPicture,
    decoding,
    image_orientation,
    image_size,
    open_label,
    open_picture,
    quiet,
    read_image,
    read_values,
    to_rgb,
)

__all__ = [
    "FORMATS",
    "HEIF",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "NOTE",
    "ImageError",
    "LabelPicture",
    "decoding",
    "image_orientation",
    "image_size",
    "open_array",
    "open_label",
    "open_picture",
    "quiet",
    "read_image",
    "read_values",
    "to_rgb",
]
