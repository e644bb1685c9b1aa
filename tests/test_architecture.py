"""The shape of the code base: who imports whom, which doors exist, and that importing starts nothing."""

import ast
import graphlib
import importlib.machinery
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainer

REPOSITORY = Path(__file__).parents[1]
# A folder with files is one module: it has one place in the drawing, whatever its files import of each other.
MODULES = {path.stem: [path] for path in sorted((REPOSITORY / "trainer").glob("[!_]*.py"))} | {
    init.parent.name: sorted(init.parent.glob("*.py"))
    for init in sorted((REPOSITORY / "trainer").glob("*/__init__.py"))
}
FILES = [path for paths in MODULES.values() for path in paths]
LAUNCHERS = sorted((REPOSITORY / "launch").glob("*.py"))
SOURCES = [*FILES, *LAUNCHERS]

DOORS = {
    "deepspeed": {"engine"},
    "webdataset": {"shards"},
    "timm": {"backbone"},
    "wandb": {"log"},
    "pydantic": {"config"},
    "yaml": {"options"},
    "matplotlib": {"canvas", "figures", "pictures", "rays"},
    "torch.distributed": {"collectives", "distributed"},
}
# Names of types that other modules may import through a door, to say what they take and return.
TYPES = {"matplotlib.figure": {"Figure"}, "torch.distributed": {"ProcessGroup"}}
WITHOUT_TORCH = (
    "errors",
    "config",
    "options",
    "order",
    "scale",
    "schedule",
    "index",
    "shards",
    "sources",
    "packing",
    "check",
    "study",
    "address",
    "remote",
    "cache",
)


def drawing() -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return module -> (level, packages in brackets), as drawn in the docstring of ``trainer``."""
    drawn: dict[str, tuple[int, tuple[str, ...]]] = {}
    level = None
    for line in (trainer.__doc__ or "").splitlines():
        if heading := re.fullmatch(r"level (\d+)", line):
            level = int(heading[1])
        elif level is not None and (entry := re.fullmatch(r"    (\w+) .*?(?:\[([\w., ]+)\])?", line)):
            assert entry[1] not in drawn, f"{entry[1]} is drawn twice"
            drawn[entry[1]] = (level, tuple((entry[2] or "").split(", ")) if entry[2] else ())
    return drawn


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(), path))


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield ("a.b", "c") of ``from a.b import c`` and ("a.b", None) of ``import a.b``, functions included."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield node.module or "", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None


def imported_modules(name: str) -> set[str]:
    """Return which other modules of ``trainer`` a module imports."""
    found = set()
    for module, imported in (pair for path in MODULES[name] for pair in imports(path)):
        if module == "trainer" and imported is not None:
            found.add(imported)
        elif module.startswith("trainer."):
            found.add(module.split(".")[1])
    return found - {name}


def module_of(path: Path) -> str:
    """Return the module of ``trainer`` that a file is part of; "" for an entry point."""
    return next((name for name, paths in MODULES.items() if path in paths), "")


def test_the_drawing_shows_every_module_and_no_other():
    assert drawing().keys() == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_modules_of_lower_levels(name):
    levels = {module: level for module, (level, _) in drawing().items()}
    upward = {other for other in imported_modules(name) if levels[other] >= levels[name]}
    assert not upward, f"{name} (level {levels[name]}) imports {upward}"


@pytest.mark.parametrize("name", [name for name, paths in MODULES.items() if len(paths) > 1])
def test_the_files_of_a_folder_import_each_other_in_one_direction(name):
    prefix = f"trainer.{name}."
    graph = {
        path.stem: {module.removeprefix(prefix) for module, _ in imports(path) if module.startswith(prefix)}
        for path in MODULES[name]
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_library_does_not_know_its_entry_points():
    for path in FILES:
        assert not any(module.split(".")[0] == "launch" for module, _ in imports(path)), path


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_package_has_one_door(package):
    for path in SOURCES:
        if module_of(path) in DOORS[package]:
            continue
        for module, name in imports(path):
            whole = f"{module}.{name}" if name else module
            is_package = (whole + ".").startswith(package + ".")
            assert not is_package or name in TYPES.get(module, ()), f"{path.name} imports {whole}"


@pytest.mark.parametrize("package", DOORS)
def test_a_door_is_used_and_drawn(package):
    users = {
        name
        for name, paths in MODULES.items()
        for path in paths
        for module, imported in imports(path)
        if (f"{module}.{imported}." if imported else module + ".").startswith(package + ".")
        and imported not in TYPES.get(module, ())
    }
    assert users == DOORS[package]
    assert users == {name for name, (_, packages) in drawing().items() if package in packages}


def test_torch_distributed_is_not_reached_through_torch_either():
    """`torch.distributed.barrier()` needs no import of its own."""
    for path in SOURCES:
        reached = [n for n in nodes(path) if isinstance(n, ast.Attribute) and n.attr == "distributed"]
        assert not reached or module_of(path) in DOORS["torch.distributed"], (
            f"{path.name}:{reached[0].lineno}"
        )


@pytest.mark.parametrize("name", ["head", "collectives", "metrics"])
def test_mathematics_knows_neither_configuration_nor_deepspeed(name):
    seen, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting |= imported_modules(module) - seen
    assert not seen & {"config", "options", "engine"}


def test_importing_starts_nothing():
    """In a process of its own: no output, no thread, no process and no process group."""
    program = """
import importlib, sys, threading
names, light = sys.argv[1].split(","), sys.argv[2].split(",")
for name in light:
    importlib.import_module("trainer." + name)
assert "torch" not in sys.modules, "torch was imported by one of " + ", ".join(light)
for name in names:
    importlib.import_module("trainer." + name)
import torch
assert not torch.distributed.is_initialized()
assert threading.active_count() == 1, threading.enumerate()
import multiprocessing
assert not multiprocessing.active_children()
"""
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}  # as on a user's machine
    done = subprocess.run(
        [sys.executable, "-c", program, ",".join(MODULES), ",".join(WITHOUT_TORCH)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_no_file_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    names = {path.stem for path in REPOSITORY.glob("[!.]*/**/*.py")}
    assert not names & drawers


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_says_why_it_exists_and_is_ascii(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert text.isascii()


def test_one_module_names_a_kind_of_accelerator():
    for path in SOURCES:
        if module_of(path) == "distributed":
            continue
        for node in nodes(path):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.Attribute):
                text = node.attr
            assert "cuda" not in text.lower(), f"{path.name}:{node.lineno}"


def test_no_code_can_come_out_of_data():
    """No pickle, no shell, no eval; numpy reads without pickle."""
    for path in SOURCES:
        for module, name in imports(path):
            top = module.split(".")[0]
            assert top not in {"pickle", "dill", "marshal", "shelve", "joblib"}, path.name
            assert (module, name) not in {("os", "system"), ("os", "popen")}, path.name
        for node in nodes(path):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno}: {called}"
            assert called not in {"eval", "exec", "os.system", "os.popen", "yaml.load"}, where
            assert keywords.get("shell", "False") == "False", where
            if called in {"np.load", "np.save"}:
                assert keywords.get("allow_pickle") == "False", where
            if called in {"torch.load", "torch.save"}:
                assert keywords.get("weights_only") == "True", where


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_an_entry_point_holds_no_class_and_shadows_no_module(path):
    """`python launch/x.py` puts launch/ first on sys.path: a file named like a package would hide it."""
    assert not [n.name for n in nodes(path) if isinstance(n, ast.ClassDef)], "logic belongs into trainer/"
    assert path.stem not in sys.stdlib_module_names
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != path.parent]
    assert importlib.machinery.PathFinder.find_spec(path.stem, elsewhere) is None
