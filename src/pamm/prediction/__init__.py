"""Any image in, maps at its size out; and the files of a whole batch of images."""

from pamm.prediction.batch import Summary, predict_files
from pamm.prediction.inputs import ImageLike, PredictError, expand_inputs, file_names, list_inputs, to_array
from pamm.prediction.maps import FORMATS, Maps
from pamm.prediction.predictor import Predictor

__all__ = [
    "FORMATS",
    "ImageLike",
    "Maps",
    "PredictError",
    "Predictor",
    "Summary",
    "expand_inputs",
    "file_names",
    "list_inputs",
    "predict_files",
    "to_array",
]
