"""What the package promises of itself: nothing unpickles, and what only plans needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import shardwise.checkpoint

FOLDER = Path(shardwise.checkpoint.__file__).parent
PURE = ["slices", "strict_json", "disk", "header", "manifest", "storage", "source"]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_nothing_in_the_package_can_unpickle() -> None:
    unpicklers = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for path in FOLDER.glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & unpicklers, path.name
        called = {
            f"{node.func.value.id}.{node.func.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        }
        assert not called & {"torch.load", "torch.save", "np.load", "numpy.load"}, path.name


def test_the_pure_modules_never_import_torch() -> None:
    lines = "; ".join(f"import shardwise.checkpoint.{name}" for name in PURE)
    subprocess.run([sys.executable, "-c", f"import sys; {lines}; assert 'torch' not in sys.modules"], check=True)
