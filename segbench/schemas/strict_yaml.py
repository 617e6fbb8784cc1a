"""Strict reading of YAML that comes from strangers: recipes, descriptions of data sets."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from segbench.errors import ContentError


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases, which a stranger's file could multiply without end, and without double keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed: write the value out")
        return super().compose_node(parent, index)

    def plain_int(self, node: Any) -> int:
        """A whole number; not one like 010, which is 8 in YAML 1.1."""
        text = self.construct_scalar(node)
        if re.fullmatch(r"[-+]?0[0-9_]+", text):
            plain = text.lstrip("+-0_") or "0"
            raise yaml.YAMLError(f"{text} has a leading zero, so YAML takes it as octal. Write {plain}, or quote it.")
        return int(self.construct_yaml_int(node))

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError("what is tagged as a mapping is none")
        keys = Counter(str(self.construct_object(key, deep=True)) for key, _ in node.value)
        if twice := [key for key, times in keys.items() if times > 1]:
            raise yaml.YAMLError(f"the key {twice[0]!r} occurs twice")
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.plain_int)


def parse(text: str) -> Any:
    """YAML without aliases, double keys, numbers that look octal, and tags that are not of YAML itself.

    >>> parse("classes: [sky, road]")
    {'classes': ['sky', 'road']}

    Raises:
        ContentError: what is wrong, and for faults of syntax where.
    """
    try:
        return yaml.load(text, _Loader)
    except (AttributeError, LookupError, TypeError) as error:  # PyYAML on tags like !!bool that do not fit
        raise ContentError("a tag (!!name) does not fit its value.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        raise ContentError(str(error)) from error
