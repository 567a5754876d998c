"""YAML as people write it: a key that stands twice in one mapping is an error, not a lost line."""

from __future__ import annotations

from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps the last of equal keys in silence; here they raise a YAMLError naming both lines."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """One mapping of the document."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            earlier = first.setdefault((key.tag, key.value), key)
            if earlier is not key:
                lines = f"line {earlier.start_mark.line + 1} and again in line {key.start_mark.line + 1}"
                told = f"the key '{key.value}' stands in {lines}; keep one of the two"
                raise yaml.composer.ComposerError(None, None, told, key.start_mark)
        return node


def load_yaml(text: str) -> Any:
    """The content of a YAML document: mappings, lists and scalars. Raises yaml.YAMLError, also for a repeated key."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except (RecursionError, ValueError) as error:
        raise yaml.YAMLError(f"a value that cannot be read ({error})") from None
