"""Arrays of NumPy's files, mapped into memory only after their header was checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pamm.images.reading import MAX_PIXELS


def open_array(path: Path) -> np.ndarray:
    """Open a .npy file of numbers or booleans, mapped read-only: values are read when they are used.

    Args:
        path: the file.

    Returns:
        The array, in either order of axes.

    Raises:
        ValueError: a damaged file, an archive (.npz), Python objects, records, texts, or more than `MAX_PIXELS` values.
        OSError: the file cannot be read.
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
