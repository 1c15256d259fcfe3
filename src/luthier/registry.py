"""A plug-in by its name: shelves are folders, names are file names, unknown names get a suggestion."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from luthier import contracts
from luthier.errors import Fault, LuthierError, SpecError, UnknownName

SHELVES: dict[str, type[contracts.Plugin]] = {
    "sources": contracts.Source,
    "templates": contracts.Template,
    "methods": contracts.Method,
    "objectives": contracts.Objective,
    "scorers": contracts.Scorer,
    "backends": contracts.Backend,
}


@cache
def names(shelf: str) -> tuple[str, ...]:
    """All names on a shelf, sorted: our own files and installed entry points `luthier.<shelf>`."""
    package = importlib.import_module(f"luthier.{shelf}")
    own = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")}
    return tuple(sorted(own | {point.name for point in _points(shelf)}))


@cache
def find(shelf: str, name: str) -> type[contracts.Plugin]:
    """Return the plug-in class called `name`; raise UnknownName with the nearest name and the list."""
    if name not in names(shelf):
        raise UnknownName(f"no {shelf[:-1]} is called '{name}'", remedy=suggestion(name, names(shelf)))
    for point in _points(shelf):
        if point.name == name:
            module_or_class: Any = point.load()
            break
    else:
        module_or_class = importlib.import_module(f"luthier.{shelf}.{name}")
    own_file = not inspect.isclass(module_or_class)
    plugin: type[contracts.Plugin] = _only_class(module_or_class, SHELVES[shelf]) if own_file else module_or_class
    plugin.name = name
    return plugin


def make(shelf: str, wanted: str | Mapping[str, Any], where: str = "") -> Any:
    """Build a plug-in from `name` or `{name: ..., option: ...}`; raise SpecError with every wrong option."""
    options = {"name": wanted} if isinstance(wanted, str) else dict(wanted)
    found = check(shelf, options, where)
    if found:
        raise SpecError(f"{where or shelf}: options that cannot be", faults=found)
    plugin = find(shelf, options.pop("name"))
    return plugin(plugin.Options(**options))


def check(shelf: str, wanted: Mapping[str, Any], where: str = "") -> list[Fault]:
    """All faults in `{name: ..., option: ...}` for a shelf; an empty list means `make` will succeed."""
    options = dict(wanted)
    name = options.pop("name", None)
    if not isinstance(name, str):
        return [Fault(f"{where}.name", "is missing", f"one of: {', '.join(names(shelf))}")]
    try:
        plugin = find(shelf, name)
        plugin.Options(**options)
    except UnknownName as error:
        return [Fault(f"{where}.name", error.what, error.remedy)]
    except ValidationError as error:
        return faults_of(error, where, plugin.Options.model_fields)
    return []


def faults_of(error: ValidationError, where: str, known: Mapping[str, Any]) -> list[Fault]:
    """Turn pydantic's list into faults with a dotted place and a did-you-mean for unknown keys."""
    faults = []
    for item in error.errors():
        path = ".".join([where, *(str(part) for part in item["loc"])]).strip(".")
        if item["type"] == "extra_forbidden":
            faults.append(Fault(path, "is not a known setting", suggestion(str(item["loc"][-1]), known)))
        else:
            faults.append(Fault(path, f"{item['msg']} (got {item.get('input')!r})"))
    return faults


def suggestion(name: str, known: Any) -> str:
    """`did you mean 'x'? known: ...` for an unknown name."""
    listing = sorted(known)
    near = difflib.get_close_matches(name.lower(), listing, n=1, cutoff=0.6)
    head = f"did you mean '{near[0]}'? " if near else ""
    return f"{head}known: {', '.join(listing)}"


def _points(shelf: str) -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=f"luthier.{shelf}"))


def _only_class(module: Any, contract: type[contracts.Plugin]) -> type[contracts.Plugin]:
    found = [
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, contract) and thing.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise LuthierError(f"{module.__name__} must define exactly one {contract.__name__}, it defines {len(found)}")
    return found[0]
