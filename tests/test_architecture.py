"""The shape of shardwise, checked from its source text: who may import whom, and what no file does.

A package imports the lines above its own in `LAYERS`; packages on one line do not import each other; inside
one package imports are free but acyclic. The planning side never imports torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

LAYERS = (
    "errors",
    "files",
    "quantities events",
    "describe schedule tasks",
    "layout",
    "comm checkpoint launch",
    "plan trace",
    "parallel",
    "execute",
    "train report",
    "verify elastic generate",
    "cli testing",
    "__main__",
)
PLANNING_SIDE = frozenset("errors files quantities events describe layout schedule plan report".split())
MAY_READ_ENVIRONMENT = frozenset({"launch.environment"})
# the public names, the table of verbs, and what loads a user's `module:factory`
MAY_IMPORT_BY_NAME = frozenset({"", "cli", "testing", "launch", "trace", "tasks", "train"})
LEVEL = {package: level for level, line in enumerate(LAYERS) for package in line.split()}
SOURCE = Path(__file__).parents[1] / "src" / "shardwise"


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file; `name` is relative to shardwise: "" for its `__init__`, "plan.memory", "cli"."""

    name: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def imports(self, root: ast.AST | None = None) -> Iterator[tuple[str, int]]:
        """Absolute names of imported modules with their lines, relative imports resolved.

        `from a import b` yields both a and a.b: b may be a module.
        """
        for node in ast.walk(root or self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    here = ["shardwise", *filter(None, self.name.split("."))]
                    kept = here[: len(here) - node.level + self.is_package]
                    base = ".".join([*kept, *filter(None, [node.module])])
                yield base, node.lineno
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)

    def own_imports(self, root: ast.AST | None = None) -> Iterator[tuple[str, int]]:
        """What it imports of shardwise, named like `Module.name`."""
        for name, line in self.imports(root):
            if name.startswith("shardwise."):
                yield name.removeprefix("shardwise."), line


def all_modules() -> list[Module]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found.append(Module(name=name, text=path.read_text(encoding="utf-8"), is_package=is_package))
    return found


MODULES = all_modules()


# --- the rules: each yields one line for every place that breaks it


def unnamed_packages(module: Module) -> Iterator[str]:
    if module.name and module.package not in LEVEL:
        yield f"{module.name}: package {module.package!r} is on no line of LAYERS; give it one"


def imports_against_the_layers(module: Module) -> Iterator[str]:
    mine = LEVEL.get(module.package, len(LAYERS))
    if not module.name:
        return
    for name, line in module.own_imports():
        package = name.partition(".")[0]
        if package != module.package and LEVEL.get(package, -1) >= mine:
            yield f"{module.name}:{line} imports {package}, which is not on a line above {module.package}"


def imports_hidden_in_functions(module: Module) -> Iterator[str]:
    functions = (n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    for function in functions:
        for name, line in module.own_imports(function):
            yield f"{module.name}:{line} imports {name} inside {function.name}; import it at the top"


def imports_by_name(module: Module) -> Iterator[str]:
    """A table of strings may hide an import from the rules above."""
    if module.package in MAY_IMPORT_BY_NAME:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield f"{module.name}:{node.lineno} imports by name; write an import"


def torch_on_the_planning_side(module: Module) -> Iterator[str]:
    if module.package in PLANNING_SIDE:
        for name, line in module.imports():
            if name.partition(".")[0] == "torch":
                yield f"{module.name}:{line} imports torch; planning is arithmetic on values"


def missing_docstring(module: Module) -> Iterator[str]:
    if ast.get_docstring(module.tree) is None:
        yield f"{module.name or '__init__'}: open with a docstring: what it knows, what it refuses to know"


def ambient_state(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield f"{module.name}:{node.lineno} has a global statement; pass the value"
    for statement in module.tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _is_mutable(statement.value):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for name in (target.id for target in targets if isinstance(target, ast.Name)):
                if name != "__all__" and name.strip("_") != name.strip("_").upper():
                    yield f"{module.name}:{statement.lineno} keeps mutable {name} at module level"


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        makers = {"list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter"}
        return ast.unparse(value.func).rpartition(".")[2] in makers
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def environment_reads(module: Module) -> Iterator[str]:
    if module.name in MAY_READ_ENVIRONMENT:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.putenv"}:
            yield f"{module.name}:{node.lineno} touches the environment; launch/environment.py does that"


def probing(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            yield f"{module.name}:{node.lineno} probes with hasattr; use a Protocol, a type or a field"


RULES = (
    unnamed_packages,
    imports_against_the_layers,
    imports_hidden_in_functions,
    imports_by_name,
    torch_on_the_planning_side,
    missing_docstring,
    ambient_state,
    environment_reads,
    probing,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_the_rule_of(rule) -> None:
    assert [line for module in MODULES for line in rule(module)] == []


def test_files_of_one_package_import_each_other_without_a_cycle() -> None:
    assert cycles(MODULES) == []


def cycles(modules: list[Module]) -> list[list[str]]:
    """Circles of files that import each other at the top; a package's `__init__` may import its own files."""
    names = {module.name for module in modules if not module.is_package}
    files = [module for module in modules if module.name in names]
    graph = {m.name: sorted({name for name, _ in m.own_imports()} & names - {m.name}) for m in files}
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in graph[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_importing_the_whole_planning_side_does_not_import_torch() -> None:
    names = [f"shardwise.{m.name}" for m in MODULES if m.name and m.package in PLANNING_SIDE]
    imports = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    script = imports + "sys.exit('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr or "torch was imported"


BREACHES = [
    (unnamed_packages, Module(name="utils.things", text="")),
    (imports_against_the_layers, Module(name="layout.ranks", text="from shardwise.plan import memory")),
    (imports_against_the_layers, Module(name="plan.memory", text="import shardwise.trace.provenance")),
    (imports_against_the_layers, Module(name="errors", text="from . import events")),
    (imports_against_the_layers, Module(name="plan.memory", text="from shardwise import train")),
    (imports_hidden_in_functions, Module(name="cli.train", text="def f():\n    from shardwise import plan")),
    (imports_by_name, Module(name="plan.memory", text="import importlib\nimportlib.import_module('a')")),
    (torch_on_the_planning_side, Module(name="plan.memory", text="def f():\n    from torch import nn")),
    (missing_docstring, Module(name="plan.memory", text="x = 1")),
    (ambient_state, Module(name="comm.groups", text="_groups: dict[str, int] = {}")),
    (ambient_state, Module(name="comm.groups", text="def f():\n    global rank")),
    (environment_reads, Module(name="comm.groups", text="import os\nrank = os.environ['RANK']")),
    (probing, Module(name="comm.groups", text="hasattr(1, 'x')")),
]


@pytest.mark.parametrize("rule, module", BREACHES, ids=lambda value: getattr(value, "__name__", "breach"))
def test_a_planted_breach_is_found_by_the_rule_of(rule, module) -> None:
    assert len(list(rule(module))) >= 1


def test_a_planted_cycle_is_found() -> None:
    first = Module(name="plan.a", text="from shardwise.plan.b import f")
    second = Module(name="plan.b", text="from . import a")
    assert cycles([first, second]) == [["plan.a", "plan.b", "plan.a"]]
