"""Facts that neither the keys nor the shapes of a checkpoint show: from the user, or from a published configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pamm.files import shown
from pamm.official.names import OfficialError


@dataclass(frozen=True)
class Fact:
    """One fact of a published system."""

    kind: type
    """int, float, bool, or tuple for whole numbers."""
    meaning: str
    """Its meaning, in words."""
    where: str = "the shapes"
    """Where it is written, in words."""

    def read(self, name: str, value: Any) -> Any:
        """The value as `kind`. Raises OfficialError."""
        if self.kind is tuple and isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            return tuple(value)
        if self.kind is float and type(value) is int:
            return float(value)
        if type(value) is self.kind and self.kind is not tuple:
            return value
        kinds = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of whole numbers"}
        raise OfficialError(f"facts: found {name} = {shown(repr(value))}, expected {kinds[self.kind]}: {self.meaning}")


@dataclass(frozen=True)
class Published:
    """A published configuration."""

    data: str
    """Its data set."""
    sizes: tuple[int, ...]
    """Its sizes, which a checkpoint's shapes show."""
    image: tuple[int, int]
    """Height and width of its images, pixels."""
    facts: Mapping[str, Any]
    """Facts that the shapes do not show."""


@dataclass
class Facts:
    """The facts of one checkpoint: those given, those of the published configuration it is of, and those assumed."""

    system: str
    known: Mapping[str, Fact]
    given: Mapping[str, Any]
    configurations: Sequence[Published]
    published: str | None = None
    """The data set whose configuration was named."""
    notices: list[str] = field(default_factory=list)
    """Facts that the user did not give, and their source, in words."""

    def __post_init__(self) -> None:
        data_sets = ", ".join(dict.fromkeys(c.data for c in self.configurations))
        if self.published is not None and not any(c.data == self.published for c in self.configurations):
            raise OfficialError(f"published: found '{shown(self.published)}', of {self.system} are known: {data_sets}")
        for name in self.given:
            if name not in self.known:
                raise OfficialError(f"facts: found '{shown(name)}', {self.system} has {', '.join(self.known)}")
        self.given = {name: self.known[name].read(name, value) for name, value in self.given.items()}
        self.chosen = [c for c in self.configurations if c.data == self.published]

    def settle(self, *sizes: int) -> None:
        """Choose the published configuration by its sizes, among those of the data set that was named, if one was."""
        fitting = [c for c in self.chosen or self.configurations if c.sizes == sizes]
        if fitting and not self.chosen:
            told = ", ".join(
                f"{name} {shown(value)}" for name, value in fitting[0].facts.items() if name not in self.given
            )
            self.notices.append(
                f"of the sizes of the configuration published for '{fitting[0].data}', whose facts are taken: {told}"
            )
        self.chosen = fitting or self.chosen

    @property
    def image(self) -> tuple[int, int] | None:
        """Height and width of the images it was trained on, pixels, where the configuration is known."""
        return self.chosen[0].image if self.chosen else None

    def need(self, name: str, assumed: Any = None, why: str = "") -> Any:
        """The value given, published or `assumed` (a notice then gives `why`). Raises OfficialError without any."""
        if name in self.given:
            return self.given[name]
        values = {c.facts[name] for c in self.chosen if name in c.facts}
        if len(values) == 1:
            return values.pop()
        if assumed is not None:
            self.notices.append(
                f"{name} {shown(assumed)} assumed: {why} (give facts={{'{name}': …}} where that is wrong)"
            )
            return assumed
        data_sets = " or ".join(dict.fromkeys(c.data for c in self.configurations))
        fact = self.known[name]
        raise OfficialError(
            f"{name} ({fact.meaning}) is shown by neither the keys nor the shapes of this checkpoint of {self.system}. It is "
            f"written in {fact.where}. Give facts={{'{name}': …}} (--facts {name}=…); for a checkpoint of a published "
            f"configuration, published='…' (--published {data_sets}) does"
        )

    def told(self, **values: Any) -> None:
        """Compare the given facts with those that the shapes show. Raises OfficialError if they differ."""
        for name, value in values.items():
            found = self.given.get(name, value)
            if found != value:
                raise OfficialError(
                    f"facts: found {name} = {shown(found)}, but the checkpoint's shapes show {shown(value)}; leave it out"
                )


def shape_facts(**meanings: str) -> dict[str, Fact]:
    """Facts that shapes show, which need not be given: name → a whole number, or a list of them where it is a plural."""
    return {name: Fact(tuple if name.endswith("s") else int, meaning) for name, meaning in meanings.items()}
