"""Weights and inputs by formula, so that a golden case holds only the names of its weights, their shapes and the results.

Every tensor is a function of its checkpoint key and shape, drawn from NumPy's frozen legacy generator seeded with the key's
CRC-32. The published code ran with these weights; the tests build the same ones.
"""

import zlib

import numpy as np


def generator(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values for the checkpoint entry `key` of the given shape (int64 zero for BatchNorm's step counter)."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = generator(key).standard_normal(shape)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        value = 0.5 + np.abs(noise)
    elif last == "running_mean":
        value = 0.1 * noise
    elif "A_log" in key:
        value = np.log(np.arange(1, shape[-1] + 1)) + 0.1 * noise
    elif last.startswith("D") or ".D0." in key:
        value = 1 + 0.1 * noise
    elif len(shape) > 1:
        fan_in = int(np.prod(shape[1:]))
        value = noise / np.sqrt(fan_in)
    elif last == "weight":  # norms
        value = 1 + 0.1 * noise
    else:
        value = 0.1 * noise
    return np.asarray(value, np.float32)


def image(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A standard-normal float32 array for `name`: an input, or the weights of an output in the loss of a gradient test."""
    return np.asarray(generator(name).standard_normal(shape), np.float32)


def positions(name: str, size: int, count: int) -> np.ndarray:
    """`count` of the `size` positions of the map `name`, ascending; all of them where there are no more."""
    if size <= count:
        return np.arange(size)
    return np.sort(np.argsort(generator(f"{name}/positions").random_sample(size), kind="stable")[:count])


def signs(name: str, size: int) -> np.ndarray:
    """Signs by which all values of the map `name` are added: one value that is wrong changes the sum."""
    return np.where(generator(f"{name}/signs").random_sample(size) < 0.5, -1.0, 1.0)


def upsampling(coarse: int, fine: int) -> np.ndarray:
    """(fine, coarse) matrix of linear interpolation as in `F.interpolate(..., align_corners=False)`."""
    at = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0, coarse - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(coarse)))
