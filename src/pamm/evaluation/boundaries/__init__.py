"""The boundary benchmark on folders of maps and truths, without MATLAB."""

from pamm import PammError


class BoundaryError(PammError, ValueError):
    """Maps or truths that cannot be measured; the message names the file, what was found and the remedy."""
