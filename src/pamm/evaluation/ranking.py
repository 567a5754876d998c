"""The best and worst images of a split for one task, found in one pass with little memory."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pamm.runtime.distributed import gathered


@dataclass(frozen=True)
class Ranked:
    """One image: its id, its score, and what is shown of it, name → data URI of a picture; "truth" may be absent."""

    id: str
    score: float
    pictures: Mapping[str, str] = field(default_factory=dict)


class Ranking:
    """The `count` best and the `count` worst images by one score; ties are ordered by id. score: what it is, in words.

    The choice depends only on ids and scores, not on the order of the images or on the process that saw them. No
    image is in both lists: of fewer than 2 · `count` images the better half counts as best.
    """

    def __init__(self, count: int, *, higher_is_better: bool, score: str = ""):
        self.count = count
        self.score = score
        self.sign = 1 if higher_is_better else -1
        self.kept: list[Ranked] = []
        """Worst first; of more than 2 · `count` images only those at both ends."""

    def add(self, image_id: str, score: float, draw: Callable[[], Mapping[str, str]] = dict) -> None:
        """Take an image into account; `draw` makes its pictures and is called only where the image is among the kept."""
        at = bisect(self.kept, self._order(Ranked(image_id, score)), key=self._order)
        full = len(self.kept) == 2 * self.count
        if full and at == self.count:
            return
        self.kept.insert(at, Ranked(image_id, score, draw()))
        if full:
            del self.kept[self.count]

    @property
    def worst(self) -> list[Ranked]:
        """Worst first."""
        return self.kept[: len(self.kept) // 2]

    @property
    def best(self) -> list[Ranked]:
        """Best first."""
        return self.kept[len(self.kept) // 2 :][::-1]

    def gather(self) -> None:
        """Join the rankings of all processes; each has the whole afterwards. Only pictures of kept images are sent."""
        orders = sorted(order for share in gathered([self._order(one) for one in self.kept]) for order in share)
        ends = {*orders[: self.count], *orders[max(0, len(orders) - self.count) :]}
        shares = gathered([one for one in self.kept if self._order(one) in ends])
        self.kept = sorted((one for share in shares for one in share), key=self._order)

    def _order(self, one: Ranked) -> tuple[float, str]:
        return self.sign * one.score, one.id
