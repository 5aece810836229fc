"""The house: which folders ship, and which way imports run."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Folder of the checkout -> package that it is imported as.
FOLDERS = {
    "qcompiler": "qcompiler",
    "passes": "qcompiler.passes",
    "backends": "qcompiler.backends",
    "models": "qcompiler.models",
}
GROUND = ("ir", "numerics", "ops")


def _setuptools():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _packages():
    """Package name -> folder, for every folder that holds Python files."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.parent.relative_to(ROOT / folder).parts
            found[".".join((package, *parts))] = path.parent
    return found


def _modules():
    """Module name -> file."""
    found = {}
    for package, folder in _packages().items():
        for path in folder.glob("*.py"):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def _imports(module, path):
    """Every module of ours that a file imports, wherever in it: `from a import b` counts as `a.b` where that is one."""
    modules = _modules()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "qcompiler")


def _within(name, *packages):
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def test_every_folder_with_python_files_ships():
    assert sorted(_setuptools()["packages"]) == sorted(_packages())


def test_every_package_has_an_init():
    assert not [folder for folder in _packages().values() if not (folder / "__init__.py").exists()]


def test_folders_map_to_packages():
    assert _setuptools()["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


def test_packages_are_imported_from_the_checkout():
    import importlib

    for package, folder in _packages().items():
        module = importlib.import_module(package)
        assert Path(module.__file__).resolve().parent == folder, package


TOP = (
    "api",
    "flax_adapter",
    "cli",
    "recipe",
    "target",
    "pipeline",
    "__main__",
    "candidates",
    "data_passes",
    "granularity",
    "interchange",
    "precision",
    "recipe_files",
    "rules",
    "sensitivity",
    "sensitivity_table",
    "stages",
    "strategy",
    "switchable",
)


@pytest.mark.parametrize("module", sorted(_modules()))
def test_imports_run_one_way(module):
    imported = set(_imports(module, _modules()[module]))
    top = [f"qcompiler.{name}" for name in TOP]
    passes, backends, models = "qcompiler.passes", "qcompiler.backends", "qcompiler.models"
    if _within(module, *(f"qcompiler.{g}" for g in GROUND)):
        wrong = {n for n in imported if _within(n, passes, backends, models, *top) or n == "qcompiler"}
    elif _within(module, passes):
        shared = lambda n: n.rpartition(".")[2].startswith("_")
        wrong = {n for n in imported if _within(n, backends, models, *top) or n == "qcompiler"}
        wrong |= {n for n in imported if _within(n, passes) and n != passes and not shared(n)}
    elif _within(module, backends):
        wrong = {n for n in imported if _within(n, passes, models, *top) or n == "qcompiler"}
    elif _within(module, models):
        wrong = {n for n in imported if _within(n, passes, backends)}
    else:
        wrong = set()
    assert not wrong


#: `Program.text` prints; debug stands above ir and is imported when it is called.
_UPWARD = {("qcompiler.ir.program", "qcompiler.debug.printing")}


@pytest.mark.parametrize("module", sorted(m for m in _modules() if _within(m, *(f"qcompiler.{g}" for g in GROUND))))
def test_the_ground_floor_has_floors(module):
    """numerics stands below ops, and neither ir nor numerics knows ops or debug."""
    imported = set(_imports(module, _modules()[module]))
    above = {"ir": ("ops", "debug"), "numerics": ("ops", "ir", "debug"), "ops": ("debug",)}[module.split(".")[1]]
    wrong = {n for n in imported if _within(n, *(f"qcompiler.{a}" for a in above))}
    assert not {(module, n) for n in wrong} - _UPWARD
