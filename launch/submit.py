"""Submits runs to Slurm: ``bash SLURM/submit.sh`` calls it; SLURM/README.md has the tour."""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.slurm.cluster import TIME_FORMS, Cluster, is_time_limit, read_cluster  # noqa: E402
from launch.slurm.runs import Branch, Run, bounded_only, find_config, plan_run  # noqa: E402
from launch.slurm.script import JobScript, resources  # noqa: E402
from launch.slurm.snapshot import keep_code, take_back  # noqa: E402
from launch.slurm.summary import describe  # noqa: E402
from launch.slurm.sweep import read_sweep  # noqa: E402
from megatron_implicit.cli import CommandParser, run_command  # noqa: E402
from megatron_implicit.config.validate import validate_world  # noqa: E402
from megatron_implicit.errors import ConfigError, LaunchError  # noqa: E402

DESCRIPTION = """Submit a pretraining run to Slurm, or show what would be submitted.

    bash SLURM/submit.sh implicit_mamba2_1.3b --dry-run             the exact script, and what the run will cost
    bash SLURM/submit.sh implicit_mamba2_1.3b                       start it, or go on with it
    bash SLURM/submit.sh implicit_mamba2_1.3b --bounded             the bounded phase alone, to branch off
    bash SLURM/submit.sh implicit_mamba2_1.3b --branch implicit_mamba2_1.3b_bounded@0.8
    bash SLURM/submit.sh --sweep SLURM/sweeps/catbabi.yaml          every point of a grid, as an array
    bash SLURM/submit.sh evaluate perplexity --checkpoint RUN       tools/evaluate.py as a job
    bash SLURM/submit.sh convert --from megatron --to hf ...        tools/convert_checkpoint.py as a job

A preset is a name in launch/configs/ or a YAML file; every --SECTION.KEY VALUE of launch/pretrain.py may follow.
The same command goes on with the run that its folder holds, with the code that was kept there.
"""
NODES = {"130m": 1, "370m": 2, "760m": 4, "1.3b": 4}
"""Of a preset's job, by size; the paper's machines are 4 nodes of 8 GPUs."""
TOOLS = {"evaluate": "evaluate", "convert": "convert_checkpoint"}
"""Programs in tools/ that are jobs of their own, by the names they have here."""


@dataclass(frozen=True)
class Submission:
    """A script, where it goes and what it belongs to."""

    script: JobScript
    folder: Path
    """Of the run, or of the sweep's runs."""
    code: Path
    runs: Sequence[Run]
    parent: Path | None = None
    """Checkpoint that the run branches off."""


def main() -> int:
    """Submits, or prints."""
    if sys.argv[1:2] and sys.argv[1] in TOOLS:
        return _submit_tool(sys.argv[1], sys.argv[2:])
    own, overrides = _set_apart(sys.argv[1:])
    options = _parser().parse_args(own)
    cluster = read_cluster(options.cluster)
    submission = (_sweep if options.sweep else _single)(options, overrides, cluster)
    text = submission.script.text()
    if options.dry_run:
        print(text, end="")
        return 0
    new_code, jobs = _keep(submission, text, cluster, update_code=options.update_code), 0
    try:
        for job in _submit(submission, options.chain):
            print(f"job {job}: {submission.script.name} in {submission.folder}", flush=True)
            jobs += 1
    except LaunchError:
        if new_code and not jobs:
            take_back(submission.code)  # or the next submission would run it, whatever has changed meanwhile
        raise
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(DESCRIPTION)
    parser.usage = "bash SLURM/submit.sh PRESET [options] [--SECTION.KEY VALUE ...]"
    parser.add_argument("preset", nargs="?", help="a name in launch/configs/ or a YAML file")
    _add_destination(parser)
    parser.add_argument(
        "--chain", type=_count, default=1, metavar="N", help="jobs in line, each for the one before that failed"
    )
    parser.add_argument("--bounded", action="store_true", help="only the first phase of the curriculum")
    parser.add_argument(
        "--branch", metavar="RUN@FRACTION", help="the last phase, off a bounded run at a share of its steps"
    )
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="a grid of runs as an array")
    parser.add_argument("--nodes", type=_count, metavar="N", help="default: by the preset's size")
    parser.add_argument(
        "--time", type=_time, metavar="LIMIT", help="of one job, as sbatch takes it (default: cluster.env's)"
    )
    parser.add_argument("--update-code", action="store_true", help="go on with today's code instead of the run's")
    return parser


def _add_destination(parser: CommandParser) -> None:
    """What every submission has: where it goes."""
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    parser.add_argument(
        "--cluster", type=Path, default=ROOT / "SLURM" / "cluster.env", metavar="FILE",
        help="default: SLURM/cluster.env",
    )  # fmt: skip


def _set_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(this program's words, launch/pretrain.py's keys with their values), for '--key value' and '--key=value'."""
    own, overrides, left = [], [], list(words)
    while left:
        word = left.pop(0)
        key, given, _ = word.partition("=")
        if not key.startswith("--") or not ("." in key or key == "--curriculum"):
            own.append(word)
            continue
        overrides.append(word)
        if not given and left and not left[0].startswith("--"):
            overrides.append(left.pop(0))
    return own, overrides


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return int(text)


def _time(text: str) -> str:
    if not is_time_limit(text):
        raise argparse.ArgumentTypeError(f"{text} must be {TIME_FORMS}")
    return text


def _runs_folder(cluster: Cluster) -> Path:
    return Path(cluster.runs or ROOT / "runs").expanduser().resolve()


def _single(options: argparse.Namespace, overrides: list[str], cluster: Cluster) -> Submission:
    """One run: of a preset, its bounded part, or a branch."""
    runs_folder = _runs_folder(cluster)
    if not options.preset:
        raise ConfigError("name a preset, or --sweep FILE (see bash SLURM/submit.sh --help)")
    if options.bounded and options.branch:
        raise ConfigError("--bounded and --branch are different runs: choose one")
    config_file = find_config(options.preset, ROOT)
    name, extra, remarks, done, checkpoint = config_file.stem, [], [], 0, None
    if options.bounded:
        name, extra = f"{name}_bounded", bounded_only(config_file)
    elif options.branch:
        branch = Branch.parse(options.branch, runs_folder)
        extra, checkpoint = branch.arguments(config_file)
        name = f"{name}_branch{100 * branch.fraction:g}"
        remarks, done = [f"branches off {checkpoint}"], int(checkpoint.name.partition("_")[2])
    run = plan_run(config_file, runs_folder / name, [*extra, *overrides], data=cluster.data, repository=ROOT)
    nodes = options.nodes or NODES.get(run.config.model.size, 1)
    validate_world(run.config, nodes * cluster.ranks)
    folder = run.folder
    comments = [f"run {folder}", *describe(run.config, cluster, nodes, done / run.config.train.steps), *remarks]
    output = f"--output={folder}/logs/slurm.out"
    return _submission(options, cluster, folder, [run], nodes, comments, output, parent=checkpoint)


def _sweep(options: argparse.Namespace, overrides: list[str], cluster: Cluster) -> Submission:
    """All runs of a grid."""
    if options.preset or options.bounded or options.branch or options.chain > 1:
        raise ConfigError("--sweep goes without a preset, --bounded, --branch and --chain: its file says what to run")
    sweep = read_sweep(options.sweep)
    config_file = find_config(sweep.preset, ROOT)
    folder = _runs_folder(cluster) / options.sweep.stem
    nodes = options.nodes or sweep.nodes
    runs = [
        plan_run(config_file, folder / name, [*arguments, *overrides], data=cluster.data, repository=ROOT)
        for name, arguments in sweep.points()
    ]
    for run in runs:
        validate_world(run.config, nodes * cluster.ranks)
    comments = [
        f"{len(runs)} runs in {folder}, {sweep.at_once} at once",
        "the first:",
        *describe(runs[0].config, cluster, nodes),
    ]
    options_ = f"--array=0-{len(runs) - 1}%{sweep.at_once}", f"--output={folder}/logs/%a.out"
    return _submission(options, cluster, folder, runs, nodes, comments, *options_)


def _submission(
    options: argparse.Namespace, cluster: Cluster, folder: Path, runs: Sequence[Run], nodes: int,
    comments: Sequence[str], *more: str, parent: Path | None = None,
) -> Submission:  # fmt: skip
    code = folder / "code"
    script = JobScript(
        body=(code if code.exists() and not options.update_code else ROOT) / "SLURM" / "pretrain.sbatch",
        cluster=cluster,
        name=folder.name if folder.parent == _runs_folder(cluster) else f"{folder.name}@{folder.parent}",
        comments=comments,
        options=[
            *resources(cluster, nodes, options.time or cluster.time),
            "--requeue", "--open-mode=append", f"--signal=B:USR1@{cluster.warning_seconds}", *more,
        ],
        variables={
            "CODE": str(code),
            "CLUSTER": str(folder / "slurm" / "cluster.env"),
            "PYTHON": cluster.python or str(ROOT / ".venv" / "bin" / "python"),
            **({"CHAIN": str(options.chain)} if options.chain > 1 else {}),
        },
        arguments=[[_config_of(run, folder), *run.arguments] for run in runs],
    )  # fmt: skip
    return Submission(script, folder, code, runs, parent)


def _config_of(run: Run, folder: Path) -> str:
    """A preset's name, or where another file is kept."""
    return run.config_file.stem if run.is_preset else str(folder / "slurm" / run.config_file.name)


def _keep(submission: Submission, text: str, cluster: Cluster, *, update_code: bool) -> bool:
    """Writes everything the job needs into the run's folder; returns whether the code is new there."""
    for folder in ("logs", "slurm"):
        (submission.folder / folder).mkdir(parents=True, exist_ok=True)
    if submission.parent:
        _keep_parent(submission.parent)
    new_code = keep_code(ROOT, submission.code, update=update_code)
    shutil.copyfile(cluster.path, submission.folder / "slurm" / "cluster.env")
    run = submission.runs[0]
    if not run.is_preset:
        shutil.copyfile(run.config_file, _config_of(run, submission.folder))
    (submission.folder / "slurm" / "job.sbatch").write_text(text, encoding="utf-8")
    return new_code


def _keep_parent(checkpoint: Path) -> None:
    """The parent may train on, and must not prune the checkpoint while the branch waits in the queue."""
    from megatron_implicit.checkpoint.layout import CheckpointFolder  # with torch: only if need be

    try:
        CheckpointFolder.keep(checkpoint)
    except OSError as error:
        print(f"warning: {checkpoint} may be pruned before the branch starts ({error.strerror})", file=sys.stderr)


def _submit(submission: Submission, chain: int) -> Iterator[str]:
    """Job numbers, each as sbatch accepts it. No two jobs of a run go at once; a job of a chain starts when the one
    before did not end well."""
    script, job = submission.folder / "slurm" / "job.sbatch", None
    array = len(submission.runs) > 1
    for _ in range(chain):
        after = f"afternotok:{job},singleton" if job else "singleton"
        dependency = [] if array else [f"--dependency={after}", "--kill-on-invalid-dep=yes"]
        job = _sbatch(*dependency, str(script))
        yield job


def _sbatch(*arguments: str, script: str | None = None) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", *arguments], input=script, capture_output=True, text=True)
    except FileNotFoundError:
        raise LaunchError("there is no sbatch here: submit on a login node of a Slurm cluster") from None
    if done.returncode:
        raise LaunchError(f"sbatch refuses the job: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip().split(";")[0]


def _submit_tool(tool: str, words: list[str]) -> int:
    """evaluate or convert, on one GPU or on none. The tool itself judges its arguments."""
    parser = CommandParser("", f"submit.sh {tool}", add_help=False)
    _add_destination(parser)
    options, words = parser.parse_known_args(words)
    sys.path.insert(0, str(ROOT / "tools"))
    importlib.import_module(TOOLS[tool]).read_arguments(words, f"submit.sh {tool}")
    cluster = read_cluster(options.cluster)
    script = JobScript(
        body=ROOT / "SLURM" / f"{tool}.sbatch",
        cluster=cluster,
        name=tool,
        comments=[f"tools/{TOOLS[tool]}.py {' '.join(words)}"],
        options=[
            *resources(cluster, 1, cluster.time, ranks=1, gpus=min(1, cluster.gpus) if tool == "evaluate" else 0),
            "--output=%x-%j.out",
        ],
        variables={
            "CODE": str(ROOT), "CLUSTER": str(options.cluster.resolve()),
            "PYTHON": cluster.python or str(ROOT / ".venv" / "bin" / "python"),
        },
        arguments=[words],
    )  # fmt: skip
    if options.dry_run:
        print(script.text(), end="")
    else:
        print(f"job {_sbatch(script=script.text())}: {tool}")
    return 0


if __name__ == "__main__":
    run_command(main)
