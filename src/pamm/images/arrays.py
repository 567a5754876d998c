"""Arrays of NumPy's files, mapped into memory only after their header was judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pamm.images.reading import MAX_PIXELS


def open_array(path: Path) -> np.ndarray:
    """A .npy file of plain numbers or truth values, read only, in either order of axes; no value is read before it is used.

    Raises ValueError, which tells what was found, for a damaged file, an archive (.npz), Python objects, records, texts and
    more than MAX_PIXELS values; OSError for a file that may not be read.
    """
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"PK"):
        raise ValueError("an archive of arrays (.npz); write its one array with numpy.save")
    if start != b"\x93NUMPY":
        raise ValueError("no .npy file")
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # NumPy's parser of headers raises many kinds
        raise ValueError(str(error)) from None
    if values.dtype.kind not in "biuf" or values.dtype.names or values.dtype.itemsize > 16:
        raise ValueError(f"{values.dtype} values")
    if values.size > MAX_PIXELS:
        raise ValueError(f"{values.size:,} values of shape {values.shape}, expected at most {MAX_PIXELS:,}")
    return values
