"""Configurations: presets, overrides, and errors that name key, value and remedy in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_implicit.config import config_from_dict, config_to_dict, load_config, save_config
from megatron_implicit.config.load import peek_run_dir
from megatron_implicit.config.resolve import solver_of_phase
from megatron_implicit.config.validate import parse_fault, validate_world
from megatron_implicit.errors import ConfigError

PRESETS = Path(__file__).parents[2] / "launch" / "configs"
FAMILIES = ("implicit_mamba2", "implicit_llama", "explicit_mamba2", "explicit_llama")
TINY = ["--config", str(PRESETS / "implicit_mamba2_tiny.yaml")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["tiny", "130m", "370m", "760m", "1.3b"])
def test_every_preset_loads(family: str, size: str) -> None:
    config = load_config(["--config", str(PRESETS / f"{family}_{size}.yaml")])
    assert (config.model.family, config.model.size) == (family, size)
    if size != "tiny":
        assert config.train.tokens == pytest.approx(207e9, rel=1e-5)
        assert config.train.global_batch_size * config.data.sequence_length == 2**20


def test_the_papers_curriculum() -> None:
    config = load_config(["--config", str(PRESETS / "implicit_llama_1.3b.yaml")])
    bounded, free = (solver_of_phase(config.solver, phase) for phase in config.curriculum)
    assert (bounded.max_iterations, bounded.phantom_steps, bounded.tolerance) == (4, 1, 0.0)
    assert (free.max_iterations, free.phantom_steps, free.tolerance, free.phantom_damping) == (32, 4, 0.05, 0.8)
    assert (config.model.ffn_size, config.model.vocab_size, config.optimizer.learning_rate) == (5461, 50277, 1e-3)


def test_overrides_win_wherever_they_stand() -> None:
    before = load_config(["--parallel.tensor", "2", *TINY, "--train.steps=7"])
    after = load_config([*TINY, "--train.steps=7", "--parallel.tensor", "2"])
    assert before == after
    assert (before.parallel.tensor, before.train.steps) == (2, 7)


def test_a_resumed_runs_values_stand_under_the_arguments(tmp_path: Path) -> None:
    saved = load_config([*TINY, "--train.steps", "7", "--train.stop_after_steps", "3", "--run.dir", "somewhere"])
    save_config(saved, tmp_path / "config.yaml")
    resumed = load_config(["--checkpoint.keep_last", "5"], base=tmp_path / "config.yaml")
    assert (resumed.train.steps, resumed.run.dir, resumed.checkpoint.keep_last) == (7, "somewhere", 5)
    assert resumed.train.stop_after_steps is None
    assert load_config(["--train.steps", "9"], base=tmp_path / "config.yaml").train.steps == 9
    assert peek_run_dir([*TINY, "--run.dir", "else"]) == "else"


def test_dictionaries_round_trip() -> None:
    config = load_config(TINY)
    assert config_from_dict(config_to_dict(config)) == config


LLAMA = ["--config", str(PRESETS / "implicit_llama_tiny.yaml")]
REFUSED = [
    (["--parallel.tensr", "2"], "unknown configuration key 'parallel.tensr': did you mean 'parallel.tensor'"),
    (["--optimizer.lr", "0.5"], "unknown configuration key 'optimizer.lr': did you mean 'optimizer.learning_rate'"),
    (["--optim.lr", "fast"], "unknown configuration key 'optim.lr': did you mean 'optimizer.learning_rate'"),
    (["--gbs", "8"], "unknown configuration key 'gbs': did you mean 'train.global_batch_size'"),
    (["--optimizer.wd", "0"], "unknown configuration key 'optimizer.wd': did you mean 'optimizer.weight_decay'"),
    (["--train.steps", "x"], "train.steps=x is not valid: expected an integer"),
    (["--model.family", "gpt"], "model.family=gpt is not valid: expected one of implicit_mamba2"),
    (["--parallel.sequence", "true"], "parallel.sequence=true needs parallel.tensor > 1"),
    (["--parallel.context", "2"], "parallel.context=2 is not supported"),
    (["--parallel.pipeline", "3"], "parallel.pipeline=3 exceeds model.num_layers=2: every stage needs a layer"),
    (["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[2]"], "has 1 entries for parallel.pipeline=2"),
    (["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[2,0]"], "leaves a stage without layers"),
    (["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[2,1]"], "adds up to 3, not to model.num_layers=2"),
    (["--parallel.tensor", "3"], "=8 is not divisible by parallel.tensor=3"),
    (["--model.num_groups", "3"], "is not divisible by model.num_groups=3"),
    (["--model.head_dim", "48"], "model.head_dim=48 does not divide the inner width"),
    (["--model.dropout", "0.1"], "model.dropout=0.1 is refused for implicit_mamba2"),
    (["--data.split", "[0.5,0.1,0.1]"], "data.split=.* must add up to 1"),
    (["--data.split", "[1.0]"], "data.split=.* must be three shares"),
    (["--solver.tolerance", "-1"], "solver.tolerance=-1.0 must not be negative"),
    (["--solver.damping", "1.5"], r"solver.damping=1.5 must lie in \(0, 1\]"),
    (["--solver.phantom_steps", "0"], "solver.phantom_steps=0 leaves the model without gradient"),
    (["--curriculum", "[{start: 0.1}]"], r"curriculum\[0\].start=0.1 must be 0"),
    (["--curriculum", "[{start: 0.0}, {start: 0.0}]"], r"curriculum\[1\].start=0.0 must be larger"),
    (["--curriculum", "[{strt: 0.0}]"], "unknown configuration key 'strt'"),
    (["--schedule.warmup_fraction", "0.9"], "exceed 1: shorten one of them"),
    (["--train.micro_batch_size", "0"], "train.micro_batch_size=0 must be positive"),
    (["--train.tokens", "1e6"], "train.steps=500 and train.tokens=1e\\+06 .489 steps. disagree"),
    (["--optimizer.beta2", "1.0"], "optimizer.beta2=1.0 must lie in"),
    (["--debug.inject", "fire@3"], "debug.inject=fire@3 must be KIND@STEP"),
    (["--parallel.tensor", "0"], "parallel.tensor=0 must be positive"),
    (["--model.scan_chunk_size", "48"], "model.scan_chunk_size=48 must be a power of two"),
    (["--train.stop_after_steps", "-3"], "train.stop_after_steps=-3 must be positive"),
    (["--schedule.warmup_fraction", "1"], "some step must reach the peak"),
    (
        ["--model.family", "explicit_llama", "--model.num_heads", "4", "--debug.inject", "nonfinite_iterate@1"],
        "needs an",
    ),
    (
        ["--model.family", "explicit_mamba2", "--model.dropout", "0.1", "--parallel.recompute", "layer"],
        "model.dropout=0.1 with parallel.recompute=layer is refused",
    ),
    (["--health.hang_minutes", "20"], "health.hang_minutes=20 must be below parallel.timeout_minutes=10"),
    (["--health.divergence", "skip"], "health.divergence=skip has no limit to go by"),
    (["--health.nonfinite", "log"], "health.nonfinite=log is not valid: expected one of skip, retry, stop"),
    (["--health.window", "2"], "health.window=2 must be at least 8"),
    (["--health.unconverged_limit", "2"], "health.unconverged_limit=2.0 must lie between 0 and 1"),
    (["--model.family", "explicit_mamba2", "--health.residual_limit", "0.5"], "need an implicit model"),
    (["--run.time_limit_minutes", "0"], "run.time_limit_minutes=0.0 must be positive"),
    (["--checkpoint.ephemeral_every", "-1"], "checkpoint.ephemeral_every=-1 must not be negative"),
    (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ([*LLAMA, "--model.num_heads", "3"], "model.hidden_size=128 is not divisible by model.num_heads=3"),
    ([*LLAMA, "--parallel.tensor", "8"], "model.num_heads=4 is not divisible by parallel.tensor=8"),
    ([*LLAMA, "--model.num_query_groups", "3"], "model.num_heads=4 is not divisible by model.num_query_groups=3"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[" ".join(a)[-40:] for a, _ in REFUSED])
def test_impossible_values_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    base = [] if "--config" in arguments else TINY
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([*base, *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"), (b"garbage", "it is no mapping"), (b"train: [1]", "train is no mapping"),
        (b"model:", "model is no mapping"), (b"curriculum: [1]", "curriculum is no list of mappings"),
        (b"train: {steps: ", "not YAML"), (b"\xff\xfe", "not YAML"),
    ],
)  # fmt: skip
def test_a_file_without_the_shape_of_a_configuration_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    for arguments, base in ((["--config", str(path)], None), ([], path)):
        with pytest.raises(ConfigError, match=f"own.yaml .*{reason}.*launch/configs/") as caught:
            load_config(arguments, base=base)
        assert "\n" not in str(caught.value)


def test_the_world_must_hold_whole_replicas_and_whole_batches() -> None:
    config = load_config([*TINY, "--parallel.tensor", "2"])
    validate_world(config, 2)
    with pytest.raises(ConfigError, match="needs a multiple of 2 processes, but the job has 3"):
        validate_world(config, 3)
    with pytest.raises(
        ConfigError, match="train.global_batch_size=8 is not a multiple of train.micro_batch_size=8 x 2"
    ):
        validate_world(config, 4)


def test_faults_are_parsed() -> None:
    assert parse_fault("crash@12:1") == ("crash", 12, 1)
    assert parse_fault("nonfinite_iterate@3") == ("nonfinite_iterate", 3, 0)


def test_layers_are_divided_over_stages_with_fewer_on_the_last() -> None:
    config = load_config([*TINY, "--model.num_layers", "7", "--parallel.pipeline", "4"])
    assert config.parallel.layers_per_stage == [2, 2, 2, 1]
    assert config.parallel.microbatches_in_flight == 8
    own = ["--model.num_layers", "7", "--parallel.pipeline", "4", "--parallel.layers_per_stage", "[3,2,1,1]"]
    assert load_config([*TINY, *own]).parallel.layers_per_stage == [3, 2, 1, 1]


def test_another_number_of_stages_divides_again_what_was_derived(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    save_config(load_config([*TINY, "--model.num_layers", "6", "--parallel.pipeline", "3"]), saved)
    assert load_config([], base=saved).parallel.layers_per_stage == [2, 2, 2]
    parallel = load_config(["--parallel.pipeline", "2"], base=saved).parallel
    assert (parallel.layers_per_stage, parallel.microbatches_in_flight) == ([3, 3], 4)
