"""Any image in, maps at its size out; and the files of a whole batch of images."""

from pamm.prediction.batch import Summary, check_output, predict_files
from pamm.prediction.inputs import ImageLike, PredictError, expand_inputs, file_names, list_inputs, to_array
from pamm.prediction.maps import DEFAULT_FORMATS, FORMATS, Maps, check_formats
from pamm.prediction.predictor import Predictor

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
