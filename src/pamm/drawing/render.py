"""Pages from templates. Every value in them is escaped: nothing that a name from outside holds has a meaning in a page."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pamm.files import escaped

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str | Path, **values: object) -> str:
    """The page that a template gives: `templates/<name>`, or a file anywhere; ".html" escapes for HTML, ".md" for Markdown.

    A table (see `pamm.drawing.table`) is written in the page's own form; what a template's macros give stands as it is.
    """
    environment = _environment(Path(template).suffix)
    if isinstance(template, Path):
        return environment.from_string(template.read_text(encoding="utf-8")).render(values)
    return environment.get_template(template).render(values)


def markdown_text(text: object) -> str:
    """Text on one line in which no character has a meaning for Markdown, HTML or a terminal."""
    line = " ".join(str(text).split())
    return escaped(re.sub(r"([\\`*\[\]<>|#~&]|(?<!\w)_|_(?!\w))", r"\\\1", line))


@cache
def _environment(suffix: str) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def html(value: object) -> object:
        return value if hasattr(value, "__html__") else escaped(str(value), keep="\n")

    def markdown(value: object) -> object:
        if isinstance(value, Markup):
            return value
        form = getattr(value, "markdown", None)
        return Markup(markdown_text(value) if form is None else form())

    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        finalize={".html": html, ".md": markdown}[suffix],
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
