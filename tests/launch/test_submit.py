"""What SLURM/submit.sh would submit: presets, bounded runs, branches and sweeps, without a Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch.slurm.cluster import is_time_limit, read_cluster
from launch.slurm.runs import Branch, bounded_only, find_config, plan_run
from launch.slurm.snapshot import keep_code
from launch.slurm.sweep import read_sweep
from megatron_implicit.checkpoint import CheckpointFolder
from megatron_implicit.config import load_config, save_config
from megatron_implicit.config.validate import validate_world
from megatron_implicit.errors import CheckpointError, ConfigError, LaunchError
from tests.launch.conftest import REPOSITORY

SIZES = ("130m", "370m", "760m", "1.3b")
RATES = {"130m": 3e-3, "370m": 1.5e-3, "760m": 1.25e-3, "1.3b": 1e-3}
"""Five times GPT-3's of that size (arXiv 2502.07827)."""


def plan(preset: str, folder: Path, *arguments: str):
    return plan_run(find_config(preset, REPOSITORY), folder, arguments, data="", repository=REPOSITORY)


@pytest.mark.parametrize("family", ["implicit_mamba2", "implicit_llama", "explicit_mamba2", "explicit_llama"])
@pytest.mark.parametrize("size", SIZES)
def test_the_paper_s_runs(family: str, size: str, tmp_path: Path) -> None:
    run = plan(f"{family}_{size}", tmp_path / "run")
    config = run.config
    assert config.train.steps == 197_411 and config.data.sequence_length == 2048
    assert config.train.global_batch_size * config.data.sequence_length == 2**20
    assert 206.9e9 < config.train.tokens < 207.1e9
    assert config.optimizer.learning_rate == RATES[size]
    assert config.schedule.decay_fraction == 0.2 and config.schedule.min_learning_rate == 1e-5
    if family.startswith("implicit"):
        bounded, free = config.curriculum
        assert (bounded.max_iterations, bounded.phantom_steps, free.start) == (4, 1, 0.8)
        most = 24 if "mamba2" in family else 32
        assert (config.solver.max_iterations, config.solver.phantom_steps, config.solver.tolerance) == (most, 4, 0.05)
    for nodes in (1, 2, 4):
        validate_world(config, 8 * nodes)


def test_paths_become_absolute_and_the_command_line_wins(tmp_path: Path) -> None:
    run = plan("implicit_mamba2_tiny", tmp_path / "a", "--run.dir=elsewhere", "--train.seed", "7", "--data.path", "d")
    assert run.folder == REPOSITORY / "elsewhere"
    assert run.arguments[-4:] == ["--run.dir", str(REPOSITORY / "elsewhere"), "--data.path", str(REPOSITORY / "d")]
    assert run.arguments[:2] == ["--train.seed", "7"] and run.config.train.seed == 7


def test_a_bounded_run_has_the_first_phase_only(tmp_path: Path) -> None:
    run = plan("implicit_llama_1.3b", tmp_path, *bounded_only(find_config("implicit_llama_1.3b", REPOSITORY)))
    [phase] = run.config.curriculum
    assert (phase.name, phase.start, phase.max_iterations) == ("bounded", 0.0, 4)
    with pytest.raises(ConfigError, match="no second phase"):
        bounded_only(find_config("explicit_llama_1.3b", REPOSITORY))


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A bounded run of a hundred steps with checkpoints at 60, 70 and 100."""
    run = plan("implicit_mamba2_tiny", tmp_path / "parent", "--train.steps", "100")
    for step in (60, 70, 100):
        (run.folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    save_config(run.config, run.folder / "config.yaml")
    return run.folder


def test_a_branch_starts_from_the_checkpoint_before_and_is_free_from_the_fraction_on(parent: Path) -> None:
    config_file = find_config("implicit_mamba2_tiny", REPOSITORY)
    for text, step, fraction in (("parent@0.7", 70, 0.7), ("parent@80%", 70, 0.8), (f"{parent}@0.65", 60, 0.65)):
        branch = Branch.parse(text, parent.parent)
        arguments, checkpoint = branch.arguments(config_file)
        assert checkpoint == parent / "checkpoints" / f"step_{step:08d}"
        config = load_config(["--config", str(config_file), *arguments])
        assert config.checkpoint.load == str(checkpoint)
        assert [(phase.name, phase.start) for phase in config.curriculum] == [("bounded", 0.0), ("free", fraction)]
    with pytest.raises(CheckpointError, match="no checkpoint at or before 50% of its 100 steps .it has 60, 70, 100"):
        Branch.parse("parent@0.5", parent.parent).arguments(config_file)
    with pytest.raises(ConfigError, match="there is no run nobody"):
        Branch.parse("nobody@0.5", parent.parent)
    for wrong in ("parent", "parent@1.5", "parent@half"):
        with pytest.raises(ConfigError, match="expected RUN@FRACTION"):
            Branch.parse(wrong, parent.parent)


def test_the_sweep_of_catbabi_is_the_paper_s_grid(tmp_path: Path) -> None:
    sweep = read_sweep(REPOSITORY / "SLURM" / "sweeps" / "catbabi.yaml")
    points = sweep.points()
    assert len(points) == len({name for name, _ in points}) == 8
    found = set()
    for name, arguments in points:
        config = plan(sweep.preset, tmp_path / name, *arguments).config
        validate_world(config, 8 * sweep.nodes)
        found.add((config.optimizer.learning_rate, config.train.global_batch_size))
        assert config.train.steps == 15_000
        assert [phase.gradient for phase in config.curriculum] == ["unrolled", None]
        assert round(config.curriculum[1].start * 15_000) == 5_000
        assert (config.solver.tolerance, config.solver.max_iterations, config.inference.max_iterations) == (
            0.03,
            50,
            200,
        )
        assert (config.solver.phantom_steps, config.solver.phantom_damping) == (6, 0.5)
    assert found == {(rate, batch) for rate in (1e-4, 5e-4, 1e-3, 5e-3) for batch in (128, 256)}


def test_a_sweep_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    for text, words in (
        ("preset: x\ngrd: {}", "expected preset, grid"),
        ("preset: x\ngrid: {a.b: 3}", "grid.a.b must be"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_sweep(file)
    with pytest.raises(ConfigError, match="no such file"):
        read_sweep(tmp_path / "nothing.yaml")


def test_cluster_settings_come_from_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTITION", "of-the-shell")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    file = tmp_path / "cluster.env"
    file.write_text("GPUS_PER_NODE=4\nRUNS=$SCRATCH/runs\nSBATCH_ARGUMENTS='--exclusive --nice=1'\n")
    cluster = read_cluster(file)
    assert (cluster.ranks, cluster.runs, cluster.partition) == (4, "/scratch/me/runs", "")
    file.write_text("GPUS_PER_NODE=four\n")
    with pytest.raises(LaunchError, match="GPUS_PER_NODE=four must be a whole number"):
        read_cluster(file)
    file.write_text("if then\n")
    with pytest.raises(LaunchError, match="bash says"):
        read_cluster(file)
    with pytest.raises(LaunchError, match="copy one and fill it in .SLURM/cluster.nvidia.env"):
        read_cluster(tmp_path / "nothing.env")


def submit(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPOSITORY / "SLURM" / "submit.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    """Two CPU nodes of a rank each, say."""
    file = tmp_path / "cluster.env"
    file.write_text(f"GPUS_PER_NODE=0\nRANKS_PER_NODE=1\nRUNS={tmp_path / 'runs'}\n")
    return file


def test_a_dry_run_prints_a_script_and_writes_nothing(cluster_file: Path) -> None:
    done = submit("implicit_mamba2_tiny", "--dry-run", "--cluster", cluster_file, "--nodes", 2, "--parallel.tensor", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    runs = cluster_file.parent / "runs"
    assert not runs.exists()
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "#SBATCH --nodes=2" in lines and "#SBATCH --ntasks-per-node=1" in lines and "#SBATCH --requeue" in lines
    assert not any("gpus" in line for line in lines if line.startswith("#SBATCH"))
    words = shlex.split(next(line for line in lines if line.startswith("set -- ")))[2:]
    assert words[0] == "implicit_mamba2_tiny" and f"{runs}/implicit_mamba2_tiny" in words
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0


def test_a_folder_with_spaces_is_one_word_for_sbatch(tmp_path: Path) -> None:
    file = tmp_path / "cluster.env"
    file.write_text(f"GPUS_PER_NODE=0\nRANKS_PER_NODE=1\nRUNS='{tmp_path}/my runs'\n")
    done = submit("implicit_mamba2_tiny", "--dry-run", "--cluster", file)
    assert f"#SBATCH --output='{tmp_path}/my runs/implicit_mamba2_tiny/" in done.stdout, done.stderr


def test_an_array_s_tasks_get_a_point_each(cluster_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text(
        yaml.safe_dump(
            {"preset": "implicit_mamba2_tiny", "grid": {"optimizer.learning_rate": [0.001, 0.01]}, "at_once": 1}
        )
    )
    done = submit("--sweep", file, "--dry-run", "--cluster", cluster_file)
    assert done.returncode == 0 and "#SBATCH --array=0-1%1" in done.stdout, done.stderr
    script = done.stdout.partition("# ---- the job ----")[0] + 'printf "%s\\n" "$@"\n'
    for task, rate in enumerate(("0.001", "0.01")):
        shown = subprocess.run(
            ["bash", "-s"], input=script, capture_output=True, text=True, env={"SLURM_ARRAY_TASK_ID": str(task)}
        )
        words = shown.stdout.splitlines()
        assert words[words.index("--optimizer.learning_rate") + 1] == rate
        assert f"{tmp_path}/runs/rates/learning_rate={rate}" in words


@pytest.mark.parametrize("key", [["--data.stories", "/scratch/catbabi"], ["--data.stories=/scratch/catbabi"]])
def test_the_sweep_of_the_readme_with_its_key_in_either_spelling(cluster_file: Path, key: list[str]) -> None:
    sweep = "SLURM/sweeps/catbabi.yaml"
    command = f"bash SLURM/submit.sh --sweep {sweep} --data.stories /scratch/catbabi --dry-run"
    assert command in (REPOSITORY / "SLURM" / "README.md").read_text()
    done = submit("--sweep", REPOSITORY / sweep, *key, "--dry-run", "--cluster", cluster_file)
    assert done.returncode == 0 and done.stdout.count(shlex.join(key)) == 8, done.stderr


def test_keys_may_stand_before_the_preset(cluster_file: Path) -> None:
    phases = "[{name: bounded, start: 0.0, max_iterations: 4}]"
    for key in (["--curriculum", phases], [f"--curriculum={phases}"]):
        done = submit(*key, "implicit_mamba2_tiny", "--dry-run", "--cluster", cluster_file)
        assert done.returncode == 0 and "# phases: bounded (4+" in done.stdout, done.stderr
    done = submit("implicit_mamba2_tiny", "--cluster", cluster_file, "--data.path", "--dry-run")
    assert done.returncode == 2 and "data.path" in done.stderr, "an option is no key's value"


def test_what_cannot_run_is_refused_before_it_is_submitted(cluster_file: Path) -> None:
    for arguments, words in (
        (["implicit_mamba2_huge"], "implicit_mamba2_huge: neither a file nor a preset (catbabi_"),
        (["implicit_mamba2_tiny", "--parallel.tensor", "2"], "needs a multiple of 2 processes, but the job has 1"),
        (["implicit_mamba2_tiny", "--train.stps", "2"], "unknown configuration key 'train.stps'"),
        (["implicit_mamba2_tiny", "--dry-rum"], "unrecognized arguments: --dry-rum"),
        (["--chain", "0"], "0 must be a number above 0"),
        (["implicit_mamba2_tiny", "--time", "forever"], "forever must be minutes, M:S, H:M:S, D-H"),
        ([], "name a preset, or --sweep FILE"),
    ):
        done = submit(*arguments, "--cluster", cluster_file)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, (arguments, done.stderr)
    assert not (cluster_file.parent / "runs").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["evaluate"], "the following arguments are required: NAME"),
        (["evaluate", "nope"], "argument NAME: invalid choice: 'nope'"),
        (["evaluate", "perplexity"], "the following arguments are required: --checkpoint"),
        (["evaluate", "perplexity", "--checkpoint", "R", "--split", "tset"], "--split: invalid choice: 'tset'"),
        (["evaluate", "perplexity", "--checkpoint", "R", "--cluster"], "argument --cluster: expected one argument"),
        (["convert"], "the following arguments are required: --from, --to, --input, --output"),
        (["convert", "--from", "hf", "--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
    ],
)
def test_a_tool_s_wrong_arguments_are_refused_before_it_waits_in_the_queue(arguments: list[str], words: str) -> None:
    done = submit(*arguments[:1], "--dry-run", *arguments[1:])
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr and f"(see submit.sh {arguments[0]}" in done.stderr, done.stderr


def test_a_tool_gets_the_words_it_was_given(cluster_file: Path) -> None:
    words = ["perplexity", "--checkpoint", "a run", "--split", "test"]
    done = submit("evaluate", *words, "--dry-run", "--cluster", cluster_file)
    assert done.returncode == 0 and f"set -- {shlex.join(words)}\n" in done.stdout, done.stderr
    assert submit("convert", "--help").stdout.startswith("usage: submit.sh convert ")


def test_time_limits_are_those_that_slurm_takes(tmp_path: Path) -> None:
    for text in ("90", "90:00", "24:00:00", "2-0", "2-12:30", "7-00:00:00", "UNLIMITED", "infinite"):
        assert is_time_limit(text), text
    for text in ("", "forever", "1h", "1:2:3:4", "-1", "1-", "2-1:2:3:4", "24:00:00 "):
        assert not is_time_limit(text), text
    file = tmp_path / "cluster.env"
    file.write_text("TIME=1d\n")
    with pytest.raises(LaunchError, match="TIME=1d must be minutes, M:S"):
        read_cluster(file)


def test_the_code_is_kept_with_the_run_and_replaced_only_on_demand(tmp_path: Path) -> None:
    for folder in ("launch", "megatron_implicit", "tools", "SLURM"):
        (tmp_path / "repository" / folder / "__pycache__").mkdir(parents=True)
        (tmp_path / "repository" / folder / "a.py").write_text("1")
    target = tmp_path / "code"
    keep_code(tmp_path / "repository", target, update=False)
    (tmp_path / "repository" / "tools" / "a.py").write_text("2")
    keep_code(tmp_path / "repository", target, update=False)
    assert (target / "tools" / "a.py").read_text() == "1" and not list(target.rglob("__pycache__"))
    keep_code(tmp_path / "repository", target, update=True)
    assert (target / "tools" / "a.py").read_text() == "2"
    assert (tmp_path / "code.1" / "tools" / "a.py").read_text() == "1"
    assert (target / "VERSION").read_text().strip()


@pytest.fixture
def submit_with(cluster_file: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Submits to a Slurm that accepts as many jobs as it is told."""
    accepts, sbatch = tmp_path / "accepts", tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f"#!/bin/bash\nleft=$(cat {accepts})\n((left > 0)) || {{ echo 'sbatch: error: no account' >&2; exit 1; }}\n"
        f"echo $((left - 1)) >{accepts}\necho $((100 - left))\n"
    )
    sbatch.chmod(0o755)

    def submit_(count: int, *arguments: object, preset: str = "explicit_llama_tiny") -> subprocess.CompletedProcess[str]:
        accepts.write_text(str(count))
        path = f"{sbatch.parent}:{os.environ['PATH']}"
        return submit(preset, "--cluster", cluster_file, *arguments, PATH=path)

    return submit_


def test_a_branch_keeps_its_checkpoint_from_being_pruned(parent: Path, submit_with: Callable) -> None:
    branch = ["--branch", f"{parent}@0.7"]
    checkpoints = CheckpointFolder(parent / "checkpoints")
    checkpoints.point_to(checkpoints.step_folder(100))
    assert submit_with(1, *branch, "--dry-run", preset="implicit_mamba2_tiny").returncode == 0
    assert not list(checkpoints.path.glob("*.keep"))
    done = submit_with(1, *branch, preset="implicit_mamba2_tiny")
    assert (done.returncode, done.stderr) == (0, "")
    checkpoints.prune(keep_last=1, keep_every=0)
    assert checkpoints.steps() == [70, 100]


def test_a_run_goes_on_with_its_own_batch_script(tmp_path: Path, submit_with: Callable) -> None:
    run = tmp_path / "runs" / "explicit_llama_tiny"
    assert submit_with(1).returncode == 0
    script = run / "code" / "SLURM" / "pretrain.sbatch"
    script.write_text(script.read_text() + "# of the run\n")
    assert submit_with(1).returncode == 0
    assert (run / "slurm" / "job.sbatch").read_text().endswith("# of the run\n")
    assert submit_with(1, "--update-code").returncode == 0
    assert "# of the run" not in (run / "slurm" / "job.sbatch").read_text()


def test_runs_in_different_places_have_different_names(cluster_file: Path, tmp_path: Path) -> None:
    for folder, name in (("runs/a", "a"), ("runs/sub/a", f"a@{tmp_path}/runs/sub"), ("a", f"a@{tmp_path}")):
        done = submit("explicit_llama_tiny", "--dry-run", "--cluster", cluster_file, "--run.dir", tmp_path / folder)
        assert f"#SBATCH --job-name={name}\n" in done.stdout, done.stderr


def test_a_refused_submission_leaves_no_code_that_the_next_would_run(tmp_path: Path, submit_with: Callable) -> None:
    code = tmp_path / "runs" / "explicit_llama_tiny" / "code"
    refused = submit_with(0)
    assert (refused.returncode, refused.stderr) == (1, "error: sbatch refuses the job: sbatch: error: no account\n")
    assert not code.exists()
    half_a_chain = submit_with(1, "--chain", 2)
    assert half_a_chain.returncode == 1 and half_a_chain.stdout.startswith("job 99: ") and code.is_dir()
    (code / "VERSION").write_text("the first job's")
    assert submit_with(0, "--update-code").returncode == 1
    assert (code / "VERSION").read_text() == "the first job's" and len(list(code.parent.glob("code*"))) == 1
    assert submit_with(1, "--update-code").returncode == 0
    assert (code / "VERSION").read_text() != "the first job's" and code.with_name("code.1").is_dir()
