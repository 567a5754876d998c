"""Procedural rooms for the synthetic data set: solids, surfaces, furniture, figures, the room around them and the renderer.

World coordinates are metres with z up. trimesh, embreex and scikit-image are imported inside the functions that need them.
"""

from pamm.data.scenes.figures import PARTS
from pamm.data.scenes.rooms import CLASSES

__all__ = ["CLASSES", "PARTS"]
