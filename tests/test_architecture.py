"""The house keeps its shape: imports go one way, files and functions stay small, nothing untrusted is executed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

import luthier
from luthier import registry

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "luthier"
FILES = sorted(SOURCE.rglob("*.py"))
SHELVES = set(registry.SHELVES)
# Rooms in the order of imports; rooms of one rank do not import each other.
RANKS = [
    {"errors"}, {"records"}, {"contracts"}, {"registry"}, {"familiar"}, {"lined"}, {"spec"}, {"store"}, {"text", "data"}, {"model"}, {"adapt"}, SHELVES,
    {"training", "evaluate", "anatomy", "hub"}, {"serve"}, {"flows"}, {"cli", "web"}, {"__main__"},
]  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
WORKSHOPS = {"text", "data", "model", "adapt", "training", "evaluate", "anatomy", "hub", "serve"}
GROUND = {"errors", "records", "contracts", "registry", "familiar", "lined", "spec", "store"}
# The public face may lead to flows; a contract's default may lead to the room that does the work.
ALLOWED = {("contracts", "adapt")}
LIGHT = GROUND | {"text", "data", "cli", "__init__", "__main__"} | SHELVES
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "trl"}
NO_SUCH_NAMES = {"utils", "common", "helpers", "misc", "base", "util", "helper"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports_of(tree: ast.AST):
    """Every import, wherever it stands, as (dotted name, line); `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def rooms_imported(path: Path):
    for name, line in imports_of(tree_of(path)):
        parts = name.split(".")
        if parts[0] == "luthier" and len(parts) > 1 and parts[1] in RANK:
            yield parts[1], line


def ids(paths):
    return [str(path.relative_to(SOURCE)) for path in paths]


def test_every_room_is_known():
    rooms = {room_of(path) for path in FILES}
    assert rooms - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_imports_go_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return  # the public names lead to flows, inside functions
    wrong = [
        f"line {line}: {room} imports {other}"
        for other, line in rooms_imported(path)
        if other != room and (room, other) not in ALLOWED and RANK[other] >= RANK[room]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_only_the_registry_opens_a_shelf(path):
    room = room_of(path)
    opened = [f"line {line}: {other}" for other, line in rooms_imported(path) if other in SHELVES and other != room]
    assert not opened


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_no_torch_at_import_in_light_rooms(path):
    if room_of(path) not in LIGHT:
        return
    heavy = [name for name, _ in imports_of(_without_functions(tree_of(path))) if name.split(".")[0] in HEAVY]
    assert not heavy


def _without_functions(tree: ast.Module) -> ast.Module:
    """What runs at import: no function bodies, no `if TYPE_CHECKING:`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.copy_location(ast.Pass(), node)

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            guarded = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return ast.copy_location(ast.Pass(), node) if guarded else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def test_light_rooms_load_without_torch():
    """The whole of ground, text, data and shelves, and the verbs that must answer at once, in one fresh process."""
    modules = [
        ".".join(("luthier", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in FILES
        if room_of(path) in LIGHT - {"__main__"} and path.name != "__init__.py"
    ]
    modules += ["luthier.model.catalog", *(f"luthier.flows.{verb}" for verb in ("check", "show", "init", "prepare"))]
    code = f"import sys\nfor name in {modules!r}: __import__(name)\nprint([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_files_and_functions_stay_small(path):
    assert len(path.read_text("utf-8").splitlines()) <= 420
    assert path.stem not in NO_SUCH_NAMES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 65
    ]
    assert not long


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_modules_and_public_things_say_what_they_are(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not (isinstance(node, ast.ClassDef) and (_is_plain(node) or room_of(path) in SHELVES))
    ]
    assert not silent


def _is_plain(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id.endswith(("Error", "Exception")) for base in node.bases)


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_nothing_untrusted_is_executed(path):
    imported = {name.split(".")[0] for name, _ in imports_of(tree_of(path))}
    assert not imported & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for name, call in calls(tree_of(path)):
        place = f"{path.name}:{call.lineno}"
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), place
        assert name not in ("torch.load", "torch.jit.load", "np.load", "numpy.load"), place
        assert name not in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), place
        if name == "yaml.load":
            assert room_of(path) in ("spec", "lined"), f"{place}: only the spec's own SafeLoader reads YAML"
        if name.endswith("Environment"):
            assert name.endswith("ImmutableSandboxedEnvironment"), place
        for keyword in call.keywords:
            literal = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            assert not (keyword.arg in ("trust_remote_code", "shell") and literal), place


def test_the_spec_reads_yaml_with_a_safe_loader():
    import yaml

    from luthier import lined

    assert issubclass(lined.Loader, yaml.SafeLoader)
    for file in ("spec.py", "lined.py"):
        loads = [call for name, call in calls(tree_of(SOURCE / file)) if name == "yaml.load"]
        assert loads and all(ast.unparse(call.args[1]) in ("Loader", "lined.Loader") for call in loads)


def test_the_map_names_every_file():
    told = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    lines = dict(re.findall(r"^\s*([\w./]+\.(?:py|css|jinja))\s{2,}(\S.*)$", told, re.MULTILINE))
    files = [p for p in SOURCE.rglob("*") if p.is_file() and p.suffix in (".py", ".css", ".jinja")]
    wanted = {path.relative_to(SOURCE).as_posix() for path in files if path.name != "__init__.py"} | {"__init__.py"}
    missing, gone = sorted(wanted - lines.keys()), sorted(lines.keys() - wanted)
    assert not missing, "write a line on each into ARCHITECTURE.md"
    assert not gone, "ARCHITECTURE.md names what is not there"


def test_public_names_are_sorted_and_there():
    assert luthier.__all__ == sorted(luthier.__all__)
    for name in luthier.__all__:
        assert hasattr(luthier, name)


def test_help_answers_at_once_and_without_torch():
    code = (
        "import sys\nfrom luthier.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: print(end.code)\n"
        f"print([m for m in {sorted(HEAVY)!r} if m in sys.modules], file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    assert done.stderr.strip() == "[]"
    assert "train" in done.stdout and done.stdout.rstrip().endswith("0")
    assert seconds < 3, f"{seconds:.2f} s, on a busy machine; alone it is below 0.5"


def test_troubleshooting_quotes_what_the_code_says():
    told = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = [text for line in told.splitlines() if line.startswith("### ") for text in re.findall(r"`([^`]+)`", line)]
    code = "\n".join(path.read_text("utf-8") for path in FILES)
    assert len(quoted) > 15
    assert not [text for text in quoted if text not in code]


def test_pages_link_to_what_is_there():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    dead = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not dead


def test_every_command_has_a_page():
    told = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    from luthier.cli import app

    for command in app.registered_commands:
        assert f"luthier {command.name or command.callback.__name__}" in told


def test_both_readmes_say_the_same():
    """Equal commands, YAML, links and code; only the words differ."""
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    for pattern in (r"^    (\S[^#\n]*?)\s*(?:#|$)", r"```\w+\n(.*?)```", r"\]\((docs/[^)]+|[A-Z]+\.md)\)"):
        found = [re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in (english, chinese)]
        assert found[0], pattern
        assert [one for one in found[0] if "README" not in one] == [one for one in found[1] if "README" not in one]
    assert len(re.findall(r"^## ", english, re.MULTILINE)) == len(re.findall(r"^## ", chinese, re.MULTILINE))
