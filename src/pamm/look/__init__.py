"""Looking inside a network: its predictions beside another's, its features, its router, its scan orders (`pamm look`).

Each view is a module with plain functions for notebooks: `predictions`, `features`, `router`, `scans`. `subjects` holds the
images that are looked at, `readout` takes features and router weights out of a forward pass, `figure` lays tiles out.
"""

from pamm import PammError


class LookError(PammError, ValueError):
    """A network or image that cannot be shown; the message gives the cause and the remedy."""
