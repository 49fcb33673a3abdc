"""Imports point one way, every folder says what belongs there, and only device/ and ops/ know about GPUs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_implicit"
NAME = PACKAGE.name
_BASE = {"config", "device", "errors"}
_COMM = _BASE | {"comm"}
_LAYERS = _COMM | {"ops", "solver"}
_SPECS = _LAYERS | {"layers"}
_MODELS = _SPECS | {"specs"}
_ABOVE_MODELS = _MODELS | {"models", "telemetry", "data"}
_CHECKPOINT = _ABOVE_MODELS | {"schedules", "inference"}
_TRAINING = _CHECKPOINT | {"checkpoint", "conversion", "api", "cli", "exits", "planning"}
ALLOWED: dict[str, set[str]] = {
    "exits": set(),
    "errors": {"exits"},
    "config": {"errors"},
    "device": {"errors"},
    "comm": _BASE,
    "data": _COMM,
    "telemetry": _COMM,
    "ops": _COMM,
    "solver": _COMM,
    "layers": _LAYERS,
    "specs": _SPECS,
    "models": _MODELS | {"telemetry"},
    "schedules": _ABOVE_MODELS,
    "planning": _COMM | {"telemetry", "schedules"},
    "inference": _ABOVE_MODELS,
    "checkpoint": _CHECKPOINT,
    "conversion": _CHECKPOINT | {"checkpoint"},
    "api": _CHECKPOINT | {"checkpoint", "conversion"},
    "training": _TRAINING,
    "evaluation": _TRAINING | {"training"},
    "cli": {"errors", "exits"},
    "__init__": {"api"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def _folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_folders(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith(f"{NAME}.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    folder = _folder(path)
    forbidden = _imported_folders(path) - ALLOWED[folder] - {folder}
    assert not forbidden, f"{folder} must not import {', '.join(sorted(forbidden))}"


def test_every_folder_says_what_belongs_there() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
        assert docstring, f"{init} has no docstring"


def test_every_module_and_public_name_has_a_docstring() -> None:
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [
            node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
        ]
        missing += [path] if not ast.get_docstring(tree) else []
        missing += [f"{path}: {node.name}" for node in public if not ast.get_docstring(node)]
    assert not missing


def test_only_device_and_ops_ask_for_a_gpu() -> None:
    asking = re.compile(r"cuda\.is_available|cuda\.device_count|is_cuda\b")
    for path in MODULES:
        if _folder(path) not in ("device", "ops"):
            assert not asking.search(path.read_text(encoding="utf-8")), path
