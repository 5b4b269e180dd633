"""Where code finds its modules and files: taken from the caller, taken on by a rank before it runs a call.

So a function of a script's helper file, of a test file or of a notebook's folder means the same on a rank as
in the process that sent it. It knows nothing of calls.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

__all__ = ["ModuleFiles", "Surroundings", "surroundings_here"]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """working_folder, sys_path of the caller, and the files of modules that no entry of sys_path leads to."""

    working_folder: str
    sys_path: tuple[str, ...]
    module_files: Mapping[str, str]


def surroundings_here() -> Surroundings:
    """Those of this process."""
    return Surroundings(working_folder=os.getcwd(), sys_path=tuple(sys.path), module_files=_modules_off_the_path())


def _modules_off_the_path() -> dict[str, str]:
    """Modules imported from files in another way than by sys.path: by pytest, by editable installs.

    A module `a.b` is on the path when its file is ENTRY/a/b.py or ENTRY/a/b/__init__.py for an entry of it.
    """
    entries = {os.path.abspath(entry) for entry in sys.path}
    found = {}
    for name, module in list(sys.modules.items()):
        file = module.__dict__.get("__file__") if isinstance(module, ModuleType) else None
        if name == "__main__" or not isinstance(file, str) or not file.endswith(".py"):
            continue
        place = file.removesuffix(".py").removesuffix(f"{os.sep}__init__")
        tail = os.sep + name.replace(".", os.sep)
        if not (place.endswith(tail) and place[: -len(tail)] in entries) and os.path.isfile(file):
            found[name] = file
    return found


class ModuleFiles(importlib.abc.MetaPathFinder):
    """Finds the caller's modules that lie off the import path; packages without a file are made empty."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._packages: set[str] = set()

    def follow(self, surroundings: Surroundings) -> None:
        """Stands where the caller stands."""
        if surroundings.working_folder != os.getcwd():
            os.chdir(surroundings.working_folder)
        sys.path[:] = surroundings.sys_path
        for name, file in surroundings.module_files.items():
            self._files[name] = file
            parents = name.split(".")[:-1]
            self._packages.update(".".join(parents[: end + 1]) for end in range(len(parents)))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        file = self._files.get(fullname)
        if file is not None:
            folder = [os.path.dirname(file)] if os.path.basename(file) == "__init__.py" else None
            return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=folder)
        if fullname in self._packages and importlib.machinery.PathFinder.find_spec(fullname, path) is None:
            return importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        return None
