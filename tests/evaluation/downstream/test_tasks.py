"""The seven tasks from files in their published formats: how they are asked, scores, and files that do not fit."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_implicit.errors import ConfigError, DataError, LaunchError
from megatron_implicit.evaluation.downstream import command, documents
from megatron_implicit.evaluation.downstream.sources import PLACES, check_files, choose_tasks
from tests.evaluation.downstream.conftest import QUESTIONS
from tests.evaluation.downstream.scripted import ByLength

FIRST_ASKED = {
    "lambada": [
        ("The baker had promised her sister a loaf of the dark bread. When the oven cooled at last, she wrapped it in "
         "a cloth, walked to the mill, and handed her sister the", " bread"),
    ],
    "hellaswag": [
        ("Mending a kite: A girl lays a torn kite on the table. She", " eats the kite with a spoon."),
        ("Mending a kite: A girl lays a torn kite on the table. She", " glues a strip of paper over the tear."),
    ],
    "piqa": [
        ("Question: To keep a door from slamming in the wind,\nAnswer:", " put a heavy stone against it."),
        ("Question: To keep a door from slamming in the wind,\nAnswer:", " put a feather against it."),
    ],
    "arc_easy": [("Question: Which of these gives the Earth its light by day?\nAnswer:", " the Moon")],
    "arc_challenge": [
        ("Question: A metal spoon in hot tea soon feels warm at its handle. Which process explains this best?\nAnswer:",
         " conduction through the metal"),
    ],
    "winogrande": [
        ("The pot did not fit into the sack because the pot", " was too large."),
        ("The pot did not fit into the sack because the sack", " was too large."),
    ],
    "openbookqa": [("A cat that is cold will most likely look for", " a warm hearth")],
}  # fmt: skip
BY_HAND = {
    "lambada": {"perplexity": math.exp((6 + 8 + 6) / 3), "acc": 1.0},  # " bread", " lantern", " sheep"
    "hellaswag": {"acc": 1 / 3, "acc_norm": 1 / 3},  # right are a middling, the longest, the shortest ending
    "piqa": {"acc": 1 / 3, "acc_norm": 2 / 3},
    "arc_easy": {"acc": 1 / 3, "acc_norm": 1 / 3},
    "arc_challenge": {"acc": 2 / 3, "acc_norm": 0.0},
    "winogrande": {"acc": 2 / 3},  # both sentences end alike: the first is taken
    "openbookqa": {"acc": 0.0, "acc_norm": 1 / 3},
}
"""Where a character costs 1, acc takes the shortest answer (the first of several), and acc_norm the longest: an answer
of n characters has -(n + 1) / n."""


@pytest.fixture(scope="module")
def scored() -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(lm-eval's results, what was asked) of the model that knows only lengths."""
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    model = ByLength()
    with command.quiet_harness():
        manager = TaskManager(
            include_path=str(command.TASKS), include_defaults=False, metadata={"data": str(QUESTIONS)}
        )
        results = evaluate(lm=model, task_dict=manager.load(list(PLACES)), bootstrap_iters=0)
    return results, model.asked


@pytest.mark.parametrize("task", PLACES)
def test_questions_are_asked_as_published(scored: tuple, task: str) -> None:
    asked = [pair for sample in scored[0]["samples"][task][:1] for pair in sample["arguments"]]
    assert [tuple(pair) for pair in asked[: len(FIRST_ASKED[task])]] == FIRST_ASKED[task]


def test_texts_from_wikihow_lose_their_marks(scored: tuple) -> None:
    arguments = scored[0]["samples"]["hellaswag"][1]["arguments"]
    assert arguments[0][0] == (
        "Home and Garden: How to store onions. Let them dry first. Spread the onions in one layer on a rack."
    )
    assert arguments[0][1] == " Leave them in the shade for two weeks. Turn them once a day."
    assert arguments[2][1] == " Throw the rack away. Buy another one."


@pytest.mark.parametrize("task", PLACES)
def test_scores_are_those_worked_out_by_hand(scored: tuple, task: str) -> None:
    found = scored[0]["results"][task]
    assert {metric: found[f"{metric},none"] for metric in BY_HAND[task]} == pytest.approx(BY_HAND[task])
    assert scored[0]["n-samples"][task] == {"original": 3, "effective": 3}


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(each) for each in given])


@pytest.mark.parametrize("mode", ["simultaneous", "sequential"])
def test_all_tasks_run_from_a_checkpoint_to_results_in_lm_evals_format(
    implicit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    chosen = list(PLACES) if mode == "simultaneous" else ["piqa"]
    command.measure(
        arguments("--checkpoint", implicit_folder, "--data", QUESTIONS, "--output", tmp_path, "--mode", mode,
                  "--tasks", ",".join(chosen), "--limit", 2, "--log-samples", "--batch-size", 3)
    )  # fmt: skip
    shown = capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    assert str(written) in shown.replace("\n", "")
    results = json.loads(written.read_text())
    assert list(results["results"]) == chosen
    for task in chosen:
        assert task in shown
        assert results["versions"][task] == 1.0 and results["n-shot"][task] == 0
        assert results["n-samples"][task] == {"original": 3, "effective": 2}
        assert results["configs"][task]["metadata"]["data"] == str(QUESTIONS)
        assert set(BY_HAND[task]) <= {key.split(",")[0] for key in results["results"][task]}
        assert len(list(tmp_path.rglob(f"samples_{task}_*.jsonl"))) == 1
    assert results["model_name"] == str(implicit_folder)
    config = results["config"]
    assert config["model_args"]["mode"] == mode and config["limit"] == 2 and config["family"] == "implicit_mamba2"
    assert config["evaluations_mean"] > 1 and "evaluations a token" in shown
    assert {"lm_eval_version", "transformers_version", "date", "task_hashes"} <= set(results)


def test_tasks_are_chosen_by_name() -> None:
    assert choose_tasks(None) == list(PLACES)
    assert choose_tasks("piqa, lambada,piqa") == ["piqa", "lambada"]
    with pytest.raises(ConfigError, match="there is no task 'arc'; choose from lambada,hellaswag,piqa"):
        choose_tasks("piqa,arc")


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        check_files(tmp_path / "nowhere", ["piqa"])
    with pytest.raises(DataError) as refused:
        check_files(tmp_path, PLACES)
    assert all(f"{places[0]} ({task})" in str(refused.value) for task, places in PLACES.items())
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").touch()
    with pytest.raises(DataError, match=r"has no piqa/valid-labels.lst \(piqa\):"):
        check_files(tmp_path, ["piqa"])


BROKEN = [
    ("lambada", '{"text": "word"}', "does not end in a word after a space"),
    ("lambada", "not json", "line 1: not a JSON object"),
    ("lambada", "", "is empty"),
    ("hellaswag", '{"activity_label": "a", "ctx_a": "b"}', "no ctx_b that is a str"),
    ("hellaswag", '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"], "label": 1}', "label 1 of 1"),
    ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c"}', "1 lines, but 3 labels in dev-labels.lst"),
    ("arc_easy", '{"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}]}, "answerKey": "B"}',
     "answerKey 'B' is not among the choices A"),
    ("openbookqa", '{"question": {"stem": "a", "choices": ["b"]}, "answerKey": "B"}', "a choice without label"),
    ("winogrande", '{"sentence": "a b", "answer": "1"}', "no blank _ in the sentence"),
    ("winogrande", '{"sentence": "a _ b", "answer": ""}', "answer '' is not 1 or 2"),
]  # fmt: skip


@pytest.mark.parametrize("task, content, words", BROKEN)
def test_files_that_are_not_as_published_are_refused_by_line(
    tmp_path: Path, task: str, content: str, words: str
) -> None:
    shutil.copytree(QUESTIONS, tmp_path / "data")
    (tmp_path / "data" / PLACES[task][0]).write_text(content)
    with pytest.raises(DataError, match=words):
        getattr(documents, task)(data=str(tmp_path / "data"))


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    given = ("--checkpoint", tmp_path, "--data", QUESTIONS)
    for options, words in (
        (("--limit", 0), "--limit 0 must be at least 1"),
        (("--log-samples",), "give one with --output"),
        (("--output", tmp_path / "results.json"), "must be a folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            command.run(arguments(*given, *options))


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LaunchError, match="lm_eval is not installed: run bash launch/setup.sh"):
        command.run(arguments("--checkpoint", tmp_path, "--data", QUESTIONS))
