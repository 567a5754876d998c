"""Any image in, maps at its size out; and the files of a whole batch of images.

Names are imported when first used, so that `pamm predict --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pamm.prediction.batch import Summary, check_output, predict_files
    from pamm.prediction.inputs import ImageLike, PredictError, expand_inputs, file_names, list_inputs, to_array
    from pamm.prediction.maps import DEFAULT_FORMATS, FORMATS, Maps, check_formats
    from pamm.prediction.predictor import Predictor

_HOME = {
    "batch": ("Summary", "check_output", "predict_files"),
    "inputs": ("ImageLike", "Inputs", "PredictError", "expand_inputs", "file_names", "list_inputs", "to_array"),
    "maps": ("DEFAULT_FORMATS", "FORMATS", "Maps", "check_formats"),
    "predictor": ("Predictor",),
}

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "ImageLike",
    "Maps",
    "PredictError",
    "Predictor",
    "Summary",
    "check_formats",
    "check_output",
    "expand_inputs",
    "file_names",
    "list_inputs",
    "predict_files",
    "to_array",
]


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it has: {', '.join(__all__)}")
