"""YAML as people write settings: plain mappings, lists and scalars, each key once, read in bounded time and memory.

What serves other ends than settings, and surprises whoever reads a file of somebody else, is an error: aliases (`*a`), by which
a few lines become gigabytes, merged mappings (`<<`) and tags (`!!set`). A date and a lone `=` are texts, as they are written.
"""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from pamm.files import shown

LARGEST = 2**20
"""Characters that a document may have."""

DEEPEST = 32
"""Mappings and lists that may lie inside each other."""

LARGEST_NUMBER = 2**63
"""Whole numbers are below it, and above its negative."""

TAG = "tag:yaml.org,2002:"
PLAIN = tuple(f"{TAG}{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null"))


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader of settings: what it would pass over, merge or multiply in silence raises a YAMLError."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value of the document."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error(f"an alias, *{event.anchor}, is not read: write its value out here", event.start_mark)
        if self.depth >= DEEPEST:
            raise _error(f"more than {DEEPEST} lists or mappings inside each other", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        assert node is not None  # not even of an empty document
        if node.tag in (f"{TAG}timestamp", f"{TAG}value") and not event.tag:
            node.tag = f"{TAG}str"
        if node.tag == f"{TAG}merge":
            raise _error("a merged mapping, <<, is not read: write its keys out here", node.start_mark)
        if node.tag not in PLAIN:
            raise _error(f"the tag {node.tag.replace(TAG, '!!')} is not read: remove it", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """One mapping of the document, each key once."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a list or mapping stands for a key; a key is a text", key.start_mark)
            earlier = first.setdefault((key.tag, key.value), key)
            if earlier is not key:
                lines = f"line {earlier.start_mark.line + 1} and again in line {key.start_mark.line + 1}"
                raise _error(f"the key '{shown(key.value)}' stands in {lines}; keep one of the two", key.start_mark)
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """One scalar: a number of a size that others can read, or a text that can be written."""
        value = super().construct_scalar(node)
        if node.tag == f"{TAG}int" and len(value) > 100:
            raise _error(f"the number {shown(value, 40)} is too large", node.start_mark)
        if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
            raise _error(f"{shown(value)!r} holds half a character (\\ud800 to \\udfff)", node.start_mark)
        return value

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """One whole number."""
        value = self.construct_yaml_int(node)
        if abs(value) >= LARGEST_NUMBER:
            raise _error(f"the number {shown(node.value, 40)} is too large", node.start_mark)
        return value


StrictLoader.add_constructor(f"{TAG}int", StrictLoader.construct_int)


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return ComposerError(None, None, problem, mark)


def load_yaml(text: str) -> Any:
    """The content of a YAML document: mappings, lists and scalars. Raises yaml.YAMLError, of one line, for anything else."""
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"{len(text)} characters, expected at most {LARGEST}: these are no settings")
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        told = [part for part in (error.context, error.problem) if part]
        raise yaml.YAMLError(where + shown(", ".join(told), 200)) from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise yaml.YAMLError(f"a value that cannot be read ({shown(error, 200)})") from None


def read_yaml(path: Path) -> Any:
    """As `load_yaml`, of a file in UTF-8, with or without its mark. Raises yaml.YAMLError and OSError."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise yaml.YAMLError("not a plain file")
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise yaml.YAMLError(f"more than {LARGEST} bytes: these are no settings")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise yaml.YAMLError("its text is UTF-16, or no text; save it as UTF-8")
    try:
        return load_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"byte {error.start} is no text in UTF-8; save the file as UTF-8") from None
