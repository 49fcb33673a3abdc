"""The stages of the quickstart, each skipped where its output exists. Called by ``bash launch/quickstart.sh``."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_implicit import exits  # noqa: E402
from megatron_implicit.config import config_from_dict, load_config, read_config_file  # noqa: E402
from megatron_implicit.config.validate import validate_world  # noqa: E402
from megatron_implicit.data.shipped import CORPUS, VOCABULARY  # noqa: E402
from megatron_implicit.errors import MegatronImplicitError  # noqa: E402
from megatron_implicit.telemetry.metrics_file import read_metrics  # noqa: E402
from megatron_implicit.telemetry.plots import write_plots  # noqa: E402
from megatron_implicit.telemetry.summary import PhaseSummary, RunSummary, summarize  # noqa: E402


@dataclass(frozen=True)
class Places:
    """Where the quickstart's files are."""

    model: str
    base: Path

    @property
    def tokenizer(self) -> Path:
        return self.base / "data" / "tokenizer.model"

    @property
    def dataset(self) -> Path:
        """Prefix of the .bin and .idx files."""
        return self.base / "data" / "corpus"

    @property
    def run(self) -> Path:
        return self.base / self.model

    @property
    def latest(self) -> Path:
        """The text file that names the newest checkpoint."""
        return self.run / "checkpoints" / "latest"

    @property
    def saved_config(self) -> Optional[Path]:
        """Of the newest checkpoint; None where there is none yet."""
        if not self.latest.is_file():
            return None
        path = self.latest.parent / self.latest.read_text(encoding="utf-8").strip() / "config.yaml"
        return path if path.is_file() else None

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    @property
    def perplexity(self) -> Path:
        return self.run / "perplexity.json"

    @property
    def log(self) -> Path:
        """What the launcher and the processes wrote to stderr."""
        return self.run / "logs" / "quickstart.log"


class StageFailed(Exception):
    """A command of a stage failed and has said why."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(frozen=True)
class Stage:
    """A step of the quickstart: what it makes, and whether that is there."""

    name: str
    output: Path
    done: Callable[[], bool]
    make: Callable[[], None]


class Quickstart:
    """Runs the stages in order.

    Args:
        places: where everything goes.
        overrides: dotted configuration for the training, ``--section.key=value``.
    """

    def __init__(self, places: Places, overrides: Sequence[str]) -> None:
        self.places, self.overrides = places, list(overrides)
        self.console = Console(highlight=False, soft_wrap=True)

    def run(self) -> None:
        """All stages, then the table.

        Raises:
            ConfigError, CheckpointError: the training would refuse the overrides; nothing has been made then.
        """
        if self.overrides:
            self._check_overrides()
        stages = self._stages()
        for number, stage in enumerate(stages, start=1):
            title = rf"\[{number}/{len(stages)}] {stage.name}"
            if stage.done():
                self.console.print(f"[bold]{title}[/bold]: {shown(stage.output)} is there")
                continue
            self.console.print(f"\n[bold]{title}[/bold]")
            began = time.monotonic()
            stage.make()
            self.console.print(f"[dim]{stage.name}: {duration(time.monotonic() - began)}[/dim]")
        self._show_result()

    def _stages(self) -> list[Stage]:
        places, plots = self.places, self.places.run / "plots"
        return [
            Stage("tokenizer", places.tokenizer, places.tokenizer.is_file, self._make_tokenizer),
            Stage("dataset", places.dataset.with_suffix(".bin"), self._finished, self._make_dataset),
            Stage(f"pretraining of {places.model}", places.run, self._finished, self._pretrain),
            Stage(
                "held-out perplexity", places.perplexity, lambda: is_newer(places.perplexity, places.latest),
                self._measure_perplexity,
            ),
            Stage("plots", plots, lambda: is_newer(plots / "loss.png", places.metrics), self._draw_plots),
        ]  # fmt: skip

    def _finished(self) -> bool:
        """Whether the newest checkpoint is that of the last step; where anything is overridden, the trainer decides."""
        config = self.places.run / "config.yaml"
        if self.overrides or not (self.places.latest.is_file() and config.is_file()):
            return False
        steps = config_from_dict(read_config_file(config)).train.steps
        return self.places.latest.read_text(encoding="utf-8").strip() == f"step_{steps:08d}"

    def _check_overrides(self) -> None:
        arguments, processes = self._training()
        saved = self.places.saved_config
        config = load_config(arguments, prog="launch/quickstart.sh", base=saved)
        validate_world(config, processes)
        if saved is None:
            return
        from megatron_implicit.device import prepare_megatron

        prepare_megatron()  # first: it quietens what the next import brings along
        from megatron_implicit.checkpoint.fingerprint import refuse_changes

        before = load_config(["--config", str(saved)])
        refuse_changes(before, config, shown(saved.parent), "train anew with --dir FOLDER")

    def _training(self) -> tuple[list[str], int]:
        """(launch/pretrain.py's arguments, number of processes)."""
        from megatron_implicit.device import current_platform

        places = self.places
        processes = min(2, current_platform().device_count() or 2)
        arguments = [
            f"--config={ROOT / 'launch' / 'configs' / f'{places.model}_tiny.yaml'}", f"--parallel.tensor={processes}",
            f"--data.path={shown(places.base / 'data')}", f"--run.dir={shown(places.run)}", *self.overrides,
        ]  # fmt: skip
        return arguments, processes

    def _make_tokenizer(self) -> None:
        call(
            "tools/train_tokenizer.py", "--input", shown(CORPUS), "--output", shown(self.places.tokenizer),
            "--vocab-size", str(VOCABULARY),
        )  # fmt: skip

    def _make_dataset(self) -> None:
        call(
            "tools/preprocess_data.py", "--input", shown(CORPUS), "--tokenizer", shown(self.places.tokenizer),
            "--output", shown(self.places.dataset),
        )  # fmt: skip

    def _pretrain(self) -> None:
        places, (arguments, processes) = self.places, self._training()
        places.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            call(
                "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "launch/pretrain.py",
                *arguments, threads=max(1, min(4, len(os.sched_getaffinity(0)) // processes)), log=places.log,
            )  # fmt: skip
        except StageFailed:
            explain_failure(places.log)
            raise

    def _measure_perplexity(self) -> None:
        places = self.places
        call(
            "tools/evaluate.py", "perplexity", "--checkpoint", shown(places.run), "--split", "validation",
            "--json", shown(places.perplexity),
        )  # fmt: skip

    def _draw_plots(self) -> None:
        for path in write_plots(self.places.run):
            self.console.print(shown(path))

    def _show_result(self) -> None:
        places = self.places
        measured = json.loads(places.perplexity.read_text(encoding="utf-8"))
        table = Table(show_header=False, title=f"quickstart: {places.model}", title_justify="left")
        for name, value in result_rows(summarize(read_metrics(places.metrics)), measured):
            table.add_row(name, value)
        self.console.print()
        self.console.print(table)
        checkpoint = places.latest.parent / places.latest.read_text(encoding="utf-8").strip()
        for name, path in (("checkpoint", checkpoint), ("metrics", places.metrics), ("plots", places.run / "plots")):
            self.console.print(f"{name:<10}  {shown(path)}")


def result_rows(summary: RunSummary, measured: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the closing table.

    Args:
        summary: of the run's metrics.
        measured: what ``tools/evaluate.py perplexity --json`` wrote.
    """
    after = f"{measured['perplexity']:,.1f} after"
    if summary.first_validation_loss is not None:
        after = f"{math.exp(summary.first_validation_loss):,.1f} before, {after}"
    rate = summary.tokens / summary.seconds
    rows = [
        ("steps", f"{summary.steps:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("time in steps", f"{duration(summary.seconds)} ({rate:,.0f} tokens a second)"),
        ("held-out perplexity", after),
    ]
    if measured.get("parameters") is not None:
        rows.insert(0, ("parameters", f"{measured['parameters']:,}"))
    solved = [phase for phase in summary.phases if phase.evaluations is not None]
    if solved:
        rows.append(("evaluations a solve", "; ".join(map(_evaluations, solved))))
        rows.append(("residual", "; ".join(f"{p.name} {p.residual:.3g}" for p in solved if p.residual is not None)))
    return rows


def _evaluations(phase: PhaseSummary) -> str:
    return f"{phase.name} {phase.evaluations:.1f} (at most {phase.evaluations_max:.0f})"


def call(*arguments: str, threads: int = 1, log: Optional[Path] = None) -> None:
    """Runs one of the project's Python programs from the repository's root.

    Its progress is on the terminal. With ``log``, its stderr goes there: the launcher's notes, warnings of libraries.

    Raises:
        StageFailed: it exited with another code than 0.
        KeyboardInterrupt: Ctrl-C or a request to terminate; the program has ended then.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    stderr = open(log, "wb") if log else None
    try:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stderr=stderr, preexec_fn=_end_with_parent
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise
    finally:
        if stderr:
            stderr.close()
    if code:
        raise StageFailed(code if code > 0 else 128 - code)


def _end_with_parent() -> None:
    """Asks the kernel to terminate the program if this process is killed (PR_SET_PDEATHSIG is 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]", patience: float = 20.0) -> None:
    """Ends a program and, since launchers pass it on, what it launched."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def explain_failure(log: Path) -> None:
    """Repeats the job's own errors from its log; without one, the end of what stands before the launcher's report."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = list(dict.fromkeys(line for line in lines if line.startswith("error: ")))
    if not errors:
        report = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
        errors = [*lines[max(0, report - 15) : report], f"error: the training failed; its whole log is {shown(log)}"]
    for line in errors:
        print(line, file=sys.stderr)


def is_newer(path: Path, source: Path) -> bool:
    """Whether ``path`` was written after ``source``, and both are there."""
    return path.is_file() and source.is_file() and path.stat().st_mtime >= source.stat().st_mtime


def shown(path: Path) -> str:
    """A path as a user of the repository's root writes it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def duration(seconds: float) -> str:
    """'8.1 s' or '3 min 20 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def main() -> None:
    """Runs the quickstart; errors are one line, the exit code that of the stage that failed."""
    parser = argparse.ArgumentParser(prog="launch/quickstart.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="implicit_mamba2", help="the family")
    parser.add_argument("--dir", type=Path, default=ROOT / "runs" / "quickstart", help="where everything goes")
    arguments, overrides = parser.parse_known_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        Quickstart(Places(arguments.model, arguments.dir.resolve()), overrides).run()
    except StageFailed as failure:
        sys.exit(failure.code)
    except MegatronImplicitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(exits.INTERRUPTED)


if __name__ == "__main__":
    main()
