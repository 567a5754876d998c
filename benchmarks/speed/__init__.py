"""`pamm bench`: speed and memory, measured against plain forms of the same functions in the same run.

Every case runs in a process of its own, so that one that needs more memory than there is, or crashes, is reported and the
others go on. Results are JSON lines; `pamm bench report` draws committed ones as a page.
"""

from __future__ import annotations

from pamm import PammError


class BenchError(PammError, ValueError):
    """A measurement that cannot be made; the message tells what was found and what to do."""
