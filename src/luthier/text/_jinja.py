"""The Jinja environment behind `sandbox`: transformers' settings and helpers, with every cost metered."""

from __future__ import annotations

import functools
import json
import string
import types
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import ext, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.runtime import BlockReference, LoopContext, Macro, TemplateReference, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from luthier.text.sandbox import Refused, budget

_STRING = """
    strip lstrip rstrip split rsplit splitlines startswith endswith upper lower title capitalize swapcase casefold
    replace join find rfind index rindex count partition rpartition removeprefix removesuffix format isascii isdigit
    isalpha isalnum isdecimal isnumeric isspace isupper islower istitle isidentifier
"""
_KEPT_FILTERS = """
    abs capitalize count d default dictsort e escape first float int items join last length list lower map max min
    reject rejectattr replace reverse safe select selectattr sort string title trim unique upper
"""


def _words(text: str) -> list[str]:
    return text.split()


_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_words(_STRING)),
    dict: frozenset(["get", "items", "keys", "values"]),
    list: frozenset(["index", "count"]),
    tuple: frozenset(["index", "count"]),
}
_OPEN = (Namespace, Undefined, LoopContext, TemplateReference)
WIDEST = 100_000  # numbers in one range
DEEPEST = 16  # columns of an indentation


class Names(Namespace):
    """`namespace(...)` that takes no underscored names and pays for what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is a legal name in a template
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            Names._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        Names._check(name)
        budget().spend()
        budget().measure(value)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a template may not use the name {name!r}")


class Generation(ext.Extension):
    """`{% generation %}` marks answers in some templates; we find answers by prefixes and print the block as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class Metered(NodeTransformer):
    """Put a price on what Jinja's sandbox does not see: loops, `~`, and lists written out."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not allowed in a chat template", node.lineno)
        copied = nodes.Const(sum(len(data.data) for data in node.find_all(nodes.TemplateData)))
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "#loop", [copied])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "#concat")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "#literal")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "#literal")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "#literal") if node.ctx == "load" else node


def _filtered(node: Any, name: str, args: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)


def _loop(values: Any, copied: int) -> Any:
    if isinstance(values, Undefined) or not hasattr(values, "__iter__"):
        return values  # undefined is empty; anything else fails in the loop with Jinja's own words
    values = values if isinstance(values, (range, Mapping, str, list, tuple)) else list(values)
    budget().spend(len(values) + 1, len(values) * copied)
    return values


def _literal(value: Any) -> Any:
    budget().spend()
    budget().measure(value)
    return value


def _concat(values: list[Any]) -> str:
    budget().measure(values, strict=True)
    text = "".join(map(str, values))
    budget().measure(text)
    return text


@pass_context
def _finalize(_: Any, value: Any) -> Any:
    budget().show(len(value) if isinstance(value, str) else budget().measure(value, strict=True))
    return value


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter: arguments and result are measured, and growth is foreseen where a filter multiplies."""
    skip = 1 if _PassArg.from_obj(function) is not None else 0

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = [_settled(value) for value in args[skip:]]
        budget().spend()
        budget().measure([*given, *kwargs.values()], strict=name == "string")
        if name == "replace":
            _foresee_replace(*given[:3], **kwargs)
        if name == "join":
            _foresee_join(given[1] if len(given) > 1 else kwargs.get("d", ""), given[0])
        result = function(*args[:skip], *given, **kwargs)
        budget().measure(result)
        return result

    return wrapper


def _settled(value: Any) -> Any:
    """Generators and ranges as lists, so that they have a size."""
    return list(value) if isinstance(value, (range, types.GeneratorType)) else value


def _foresee_replace(text: Any, old: Any = "", new: Any = "", **_: Any) -> None:
    times = str(text).count(str(old)) if str(old) else len(str(text)) + 1
    budget().fits(times * len(str(new)) <= budget().largest)


def _foresee_join(separator: Any, values: Any) -> None:
    count = len(values) if hasattr(values, "__len__") else 0
    budget().fits(len(str(separator)) * count <= budget().largest)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    budget().measure(value)
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= DEEPEST):
        raise SecurityError(f"`indent` must be a number up to {DEEPEST}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    space = width if isinstance(width, str) else " " * min(int(width), DEEPEST + 1)
    if len(space) > DEEPEST:
        raise SecurityError(f"`indent` may be at most {DEEPEST} wide")
    lines = str(text).splitlines(keepends=True)
    return "".join(
        space + line if (index or first) and (blank or line.strip()) else line for index, line in enumerate(lines)
    )


def _range(*args: int) -> range:
    numbers = range(*args)
    budget().fits(len(numbers) <= WIDEST)
    return numbers


def _raise(message: Any) -> None:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    return budget().today.strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one kind of program: a conversation goes in, a text comes out."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants would be folded while compiling, where nobody pays
            finalize=_finalize,
            extensions=[Generation, ext.loopcontrols],
        )
        own = {"tojson": _tojson, "indent": _indent, "#loop": _loop, "#concat": _concat, "#literal": _literal}
        kept = {name: _metered(name, self.filters[name]) for name in _words(_KEPT_FILTERS)}
        self.filters = {**kept, **own}
        self.globals = {"range": _range, "dict": _dict, "namespace": Names}
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for banned in source.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise TemplateSyntaxError("a chat template may not load other files", banned.lineno)
        Metered().visit(source).set_environment(self)
        return str(super()._generate(source, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return attr in allowed if allowed is not None else isinstance(obj, _OPEN)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        fields = list(string.Formatter().parse(str(value.__self__)))
        if value.__name__ != "format" or any(spec for _, _, spec, _ in fields):
            raise SecurityError("format specifications are not allowed in a chat template")

        def bounded(*args: Any, **kwargs: Any) -> str:
            size = budget().measure([*args, *kwargs.values()], strict=True)
            budget().fits(size * len(fields) <= budget().largest)
            return wrapped(*args, **kwargs)

        return bounded

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        spending = budget()
        spending.spend()
        if isinstance(__obj, (Macro, BlockReference)):
            spending.spend(10, spending.template)
        text = getattr(__obj, "__self__", None)
        args = tuple(_settled(value) for value in args)
        if isinstance(text, str) and getattr(__obj, "__name__", "") == "replace":
            _foresee_replace(text, *args[:2])
        if isinstance(text, str) and getattr(__obj, "__name__", "") == "join" and args:
            _foresee_join(text, args[0])
        result = super().call(__context, __obj, *args, **kwargs)
        spending.measure(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        spending = budget()
        spending.spend()
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    spending.fits(spending.measure(many) * max(times, 1) <= spending.largest)
        if operator == "**" and not (abs(left) <= 1_000_000 and abs(right) <= 64):
            spending.fits(False)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("`%` on text is not allowed in a chat template")
        result = super().call_binop(context, operator, left, right)
        spending.measure(result)
        return result


ENVIRONMENT = Sandbox()
