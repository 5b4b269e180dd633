"""Importing shardwise costs nothing, and every public name is where its table says."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import shardwise

HEAVY = ("torch", "numpy", "scipy", "transformers", "pydantic", "rich", "typer", "jinja2", "cloudpickle")


def run_python(script: str) -> str:
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_importing_shardwise_imports_nothing_heavy() -> None:
    script = f"import sys, shardwise; print(*[n for n in {HEAVY} if n in sys.modules])"
    assert run_python(script) == ""


def test_importing_shardwise_imports_no_other_file_of_its_own() -> None:
    assert run_python("import sys, shardwise; print(*[n for n in sys.modules if n.startswith('shardwise.')])") == ""


def test_every_public_name_is_an_object_also_after_a_package_of_the_same_name_was_imported() -> None:
    script = """
import sys, importlib, shardwise
from types import ModuleType
for name, module in shardwise.PUBLIC_NAMES.items():
    importlib.import_module(module)
    assert not isinstance(getattr(shardwise, name), ModuleType), name
"""
    run_python(script)


def test_a_package_does_not_take_the_place_of_a_public_name() -> None:
    error = shardwise.ShardwiseError
    shardwise.ShardwiseError = ModuleType("shardwise.ShardwiseError")  # what importing a submodule does
    assert shardwise.ShardwiseError is error is import_module("shardwise.errors").ShardwiseError


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'.*ShardwiseError"):
        _ = shardwise.trian  # type: ignore[attr-defined]


def test_the_table_and_the_block_for_type_checkers_name_the_same_objects() -> None:
    tree = ast.parse(Path(shardwise.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    named = {alias.name: node.module for node in imports for alias in node.names}
    assert named == dict(shardwise.PUBLIC_NAMES)


def test_dir_shows_the_public_names() -> None:
    assert set(shardwise.PUBLIC_NAMES) <= set(dir(shardwise))
