"""Measure a checkpoint on downstream tasks with lm-eval, zero-shot, from local files.

    python tools/evaluate.py downstream --checkpoint runs/NAME --data FOLDER
    python tools/evaluate.py downstream --checkpoint runs/NAME --data FOLDER --tasks lambada,piqa --limit 100

Tasks: lambada, hellaswag, piqa, arc_easy, arc_challenge, winogrande, openbookqa. docs/downstream.md says which files
they read and where those are published.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator

from megatron_implicit.errors import ConfigError, DataError, LaunchError
from megatron_implicit.evaluation.downstream.sources import check_files, choose_tasks

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker

    from megatron_implicit.evaluation.downstream.harness_model import HarnessModel

TASKS = Path(__file__).parent / "tasks"
"""Folder of the tasks' definitions."""
_BOOTSTRAPS = 1000
"""Resamples for the standard error of a perplexity; those of accuracies have a formula."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``tools/evaluate.py downstream``."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH")
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="where the tasks' files are")
    parser.add_argument("--tasks", metavar="A,B,...", help="some of the tasks above (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_argument("--max-length", type=int, metavar="N",
                        help="most tokens of a text, of which the end is kept (default: as in training)")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FILE", help="if not beside the checkpoint or its data")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write lm-eval's results file there")
    parser.add_argument("--log-samples", action="store_true", help="with --output: also every question with its scores")
    solve = parser.add_argument_group("the solve of implicit models (default: as the model was trained for)")
    solve.add_argument("--mode", choices=["simultaneous", "sequential", "chunked", "window"], default="simultaneous",
                       help="how texts are solved (default: simultaneous)")  # fmt: skip
    solve.add_argument("--chunk-size", type=int, metavar="N", help="tokens of a chunk in chunked mode")
    solve.add_argument("--window-size", type=int, metavar="N", help="tokens of the window in window mode")
    solve.add_argument("--max-iterations", type=int, metavar="N", help="most passes a solve, output pass included")
    solve.add_argument("--tolerance", type=float, metavar="X", help="relative residual that ends a solve")


def run(arguments: argparse.Namespace) -> int:
    """What the command does in a process of its own."""
    measure(arguments)
    from megatron_implicit.comm.groups import stop_process_group  # torch is loaded by now

    stop_process_group()
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Scores the tasks, prints a table, and writes the results where asked to.

    Raises:
        ConfigError, DataError, CheckpointError: arguments, files or a model that cannot be used, in one line.
        LaunchError: lm-eval is not installed.
    """
    tasks = choose_tasks(arguments.tasks)
    check_files(arguments.data, tasks)
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit} must be at least 1")
    if arguments.log_samples and arguments.output is None:
        raise ConfigError("--log-samples writes to the results' folder: give one with --output")
    _make_folder(arguments.output)
    with quiet_harness():
        _measure(tasks, arguments)


def _measure(tasks: list[str], arguments: argparse.Namespace) -> None:
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    folder = arguments.data.resolve()
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(folder)})
    loaded = list(manager.load(tasks)["tasks"].values())
    tracker = EvaluationTracker(output_path=str(arguments.output) if arguments.output else None)
    results = _evaluate(loaded, manager, tracker, arguments)
    if results is not None:  # the first process of a job has them
        samples = results.pop("samples")
        _print(results)
        if arguments.output is not None:
            print(_save(results, samples, tracker, arguments))


def _evaluate(
    tasks: list[Any], manager: Any, tracker: EvaluationTracker, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    from lm_eval import simple_evaluate

    from megatron_implicit.telemetry.progress import counted_progress

    with counted_progress("scoring", "texts") as report:
        model = _open_model(arguments, report)
        with contextlib.redirect_stdout(io.StringIO()):  # lm-eval announces its bootstrap there
            return simple_evaluate(
                model=model, model_args=_described(arguments, model), tasks=tasks, task_manager=manager,
                batch_size=arguments.batch_size, device=str(next(model.lm.parameters()).device),
                limit=arguments.limit, bootstrap_iters=_BOOTSTRAPS, evaluation_tracker=tracker,
            )  # fmt: skip


def _open_model(arguments: argparse.Namespace, report: Any) -> HarnessModel:
    from megatron_implicit.api import load_pretrained
    from megatron_implicit.evaluation.downstream.harness_model import HarnessModel, HowToSolve
    from megatron_implicit.inference.text import find_tokenizer

    overrides = {
        name: value for name in ("max_iterations", "tolerance") if (value := getattr(arguments, name)) is not None
    }
    how = HowToSolve(arguments.mode, arguments.chunk_size, arguments.window_size, overrides)
    lm = load_pretrained(arguments.checkpoint, dtype=arguments.dtype)
    tokenizer = find_tokenizer(lm, Path(arguments.checkpoint), arguments.tokenizer)
    return HarnessModel(lm, tokenizer, how, arguments.batch_size, arguments.max_length, report)


def _described(arguments: argparse.Namespace, model: HarnessModel) -> dict[str, Any]:
    """What the results say of the model, in lm-eval's words where it has some."""
    names = ("dtype", "mode", "chunk_size", "window_size", "max_iterations", "tolerance")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return {"pretrained": arguments.checkpoint, "max_length": model.max_length, **given}


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """lm-eval without its progress bars, its remarks, and processes of its own.

    Raises:
        LaunchError: it is not installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that may hold a GPU
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise LaunchError(f"{error.name} is not installed: run bash launch/setup.sh") from None
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# ------------------------------------------------------------------------------------------------------------- results


def _make_folder(folder: Path | None) -> None:
    """Before anything long is begun."""
    if folder is None:
        return
    if folder.suffix == ".json":  # which lm-eval would take as the name of a file
        raise ConfigError(f"--output {folder} must be a folder: drop the .json")
    folder.mkdir(parents=True, exist_ok=True)


def _save(results: dict[str, Any], samples: dict[str, Any], tracker: EvaluationTracker, arguments: Any) -> Path:
    """The file that lm-eval wrote; it only remarks on errors."""
    tracker.save_results_aggregated(results=results, samples=samples)
    folder = arguments.output / tracker.general_config_tracker.model_name_sanitized
    path = folder / f"results_{tracker.date_id}.json"
    if not path.is_file():
        raise DataError(f"lm-eval could not write its results to {folder}: check the folder's rights and space")
    if arguments.log_samples:
        for task, scored in samples.items():
            tracker.save_results_samples(task_name=task, samples=scored)
    return path


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("task", "metric", "value", "standard error", "questions"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, values in results["results"].items():
        questions, name = f"{results['n-samples'][task]['effective']:,}", task
        for metric, value, error in _metrics(values):
            table.add_row(name, metric, f"{value:,.4f}", "" if error is None else f"{error:,.4f}", questions)
            name = questions = ""
    console = Console(highlight=False)
    console.print(table)
    config = results["config"]
    if config["evaluations_mean"] is not None:
        console.print(
            f"evaluations a token: {config['evaluations_mean']:.2f} · unconverged: {config['unconverged_fraction']:.2%}"
        )


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """(metric, value, standard error) of a task; lm-eval's keys are "acc,none" and "acc_stderr,none"."""
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}")
            yield metric, value, error if isinstance(error, float) else None
