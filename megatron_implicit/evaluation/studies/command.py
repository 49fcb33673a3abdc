"""Repeats an experiment of the paper, or all of them with a report.

    python tools/evaluate.py paper --size tiny

What has been trained and measured is not made again: an interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path
from typing import Any

from megatron_implicit.errors import ConfigError
from megatron_implicit.evaluation.studies.report import Chapter, write_report
from megatron_implicit.evaluation.studies.study import (
    StudyContext,
    StudyResult,
    Table,
    load_result,
    save_result,
    settings_mark,
)

_HERE = "megatron_implicit.evaluation.studies"
STUDIES: dict[str, str] = {
    "state-tracking": f"{_HERE}.state_tracking",
    "catbabi": f"{_HERE}.catbabi",
    "length-extrapolation": f"{_HERE}.length_extrapolation",
    "duality": f"{_HERE}.duality",
    "jacobian": f"{_HERE}.jacobian",
    "adaptive-compute": f"{_HERE}.adaptive_compute",
    "phantom-gradient": f"{_HERE}.phantom_gradient",
}
"""Modules of the studies by the names of their commands, in the report's order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of every study, and of all together."""
    parser.add_argument(
        "--size", default="tiny", metavar="NAME", help="tiny (two CPU cores) or paper (GPUs); default: tiny"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/paper"), metavar="FOLDER",
        help="where models, results and figures go; what is there is not made again (default: runs/paper)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N",
        help="trainings at a time (default: one a CPU core; one on a machine with GPUs, over all of them)",
    )  # fmt: skip
    if parser.get_default("evaluation") == "paper":  # some studies take no model but their own
        parser.set_defaults(checkpoint=None)
    else:
        parser.add_argument(
            "--checkpoint", type=Path, metavar="PATH",
            help="measure this model where a study needs no training of its own",
        )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """The study of ``arguments.evaluation``, or all of "paper"."""
    return run_paper(arguments) if arguments.evaluation == "paper" else run_study(arguments.evaluation, arguments)


def run_study(name: str, arguments: argparse.Namespace) -> int:
    """Runs one study, or shows what it found before, and rewrites the report."""
    module, settings = _open(name, arguments.size)
    context = _context(name, settings, arguments)
    result, seconds, fresh = _run(module, settings, context)
    if not fresh:
        print(f"from before: {context.folder} holds this study's results; remove it to measure again", flush=True)
    _show(module.TITLE, result, seconds, context.folder)
    if arguments.checkpoint is None:
        _write_report(arguments)
    return 0


def run_paper(arguments: argparse.Namespace) -> int:
    """Runs all studies, each only where it is not finished, and writes the report after each."""
    for number, name in enumerate(STUDIES, start=1):
        module, settings = _open(name, arguments.size)
        print(f"[{number}/{len(STUDIES)}] {module.TITLE}", flush=True)
        result, seconds, fresh = _run(module, settings, _context(name, settings, arguments))
        print(f"      {result.finding} ({seconds:.0f} s{'' if fresh else ', from before'})", flush=True)
        paths = _write_report(arguments)
    for path in paths:
        print(path)
    return 0


def _open(name: str, size: str) -> tuple[Any, Any]:
    module = importlib.import_module(STUDIES[name])
    if size not in module.SIZES:
        raise ConfigError(f"--size {size}: {name} has {', '.join(module.SIZES)}")
    return module, module.SIZES[size]


def _context(name: str, settings: Any, arguments: argparse.Namespace) -> StudyContext:
    root = arguments.output / arguments.size
    if arguments.checkpoint is not None:  # a model of the user's own: its results never stand for the study's
        root = root / "checkpoints" / _name_of(arguments.checkpoint)
    return StudyContext(
        name, arguments.size, root, _workers(arguments.workers), lambda line: print(f"      {line}", flush=True),
        arguments.checkpoint, settings_mark(settings),
    )  # fmt: skip


def _name_of(checkpoint: Path) -> str:
    """Of a model's results: by what it holds, since runs in different folders share names and a run goes on."""
    from megatron_implicit.checkpoint import locate_checkpoint
    from megatron_implicit.checkpoint.integrity import identify
    from megatron_implicit.conversion.formats import recognise

    foreign = checkpoint.is_dir() and recognise(checkpoint) not in (None, "megatron")
    return f"{checkpoint.resolve().name}-{identify(checkpoint if foreign else locate_checkpoint(checkpoint))}"


def _workers(wanted: int) -> int:
    from megatron_implicit.device import current_platform

    if wanted < 0:
        raise ConfigError(f"--workers {wanted} must not be negative")
    return wanted or (1 if current_platform().device_count() else len(os.sched_getaffinity(0)))


def _run(module: Any, settings: Any, context: StudyContext) -> tuple[StudyResult, float, bool]:
    """(what was found, seconds it took, whether it was run just now)."""
    before = load_result(context.folder, settings)
    if before is not None:
        return *before, False
    context.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result = module.run(settings, context)
    seconds = time.monotonic() - began
    save_result(context.folder, result, settings, seconds)
    return result, seconds, True


def _write_report(arguments: argparse.Namespace) -> list[Path]:
    root, chapters = arguments.output / arguments.size, []
    for name in STUDIES:
        module, settings = _open(name, arguments.size)
        result, seconds = load_result(root / name, settings) or (None, 0.0)
        chapters.append(Chapter(name, module.TITLE, module.CLAIM, result, seconds))
    return write_report(root, f"Implicit language models are RNNs: the experiments, size {arguments.size}", chapters)


def _show(title: str, result: StudyResult, seconds: float, folder: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{title}[/bold] ({seconds:.0f} s)\n{result.finding}")
    for table in result.tables:
        console.print(_rich(table))
    for figure in result.figures:
        console.print(f"{folder / figure.file}: {figure.caption}", soft_wrap=True)


def _rich(table: Table) -> Any:
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*map(str, row))
    return shown
