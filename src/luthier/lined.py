"""YAML as a user writes it, safe to read, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from luthier.errors import SpecError


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (1e-3 is a number, yes is a word), and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tfTF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def parse(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A mapping and the line of every key, by its dotted path; SpecError with the line where it is no YAML."""
    try:
        tree = yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
        node = yaml.compose(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise SpecError(str(error.problem or error), where=f"{where}:{line}", remedy="mend the YAML there") from None
    if not isinstance(tree, dict):
        raise SpecError("must be a mapping such as `model: smollm2-135m`", where=where)
    return tree, dict(_lines(node))


def _lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}.{key.value}".strip(".")
            yield path, key.start_mark.line + 1
            yield from _lines(value, path)
