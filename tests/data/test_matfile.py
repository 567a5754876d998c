"""MATLAB files as SciPy reads them; files made to harm stand in test_untrusted.py."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from fuzz.damage import nested
from pamm.data.matfile import MatError, read_mat


def same(one: object, other: object) -> bool:
    if not isinstance(one, np.ndarray) or one.shape != other.shape or one.dtype.names != other.dtype.names:
        return False
    if one.dtype.names:
        return all(same(one[name], other[name]) for name in one.dtype.names)
    if one.dtype == object:
        return all(map(same, one.ravel(), other.ravel()))
    return one.dtype.kind == other.dtype.kind and np.array_equal(one, other)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(nested, st.booleans())
def test_what_is_read_of_a_matlab_file_is_what_scipy_reads(value, packed):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.mat"
        savemat(path, {"value": value}, do_compression=packed)
        try:
            found = read_mat(path, ("value",))["value"]
        except MatError as error:
            assert "complex" in str(error)  # the one kind that `nested` makes and no data set holds
        else:
            assert same(found, loadmat(path)["value"])
