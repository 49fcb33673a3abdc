"""Generated stories are true, only answers count, and the published files are read in both of their forms."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Callable, Optional

import pytest
import torch

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.sampling import TaskSamples
from megatron_implicit.data.tasks import open_task
from megatron_implicit.data.tasks.stories import GeneratedStories, PublishedStories
from megatron_implicit.data.tasks.stories.generated import draws, tell_story
from megatron_implicit.data.tasks.stories.worlds import VOCABULARY, WORLDS
from megatron_implicit.errors import ConfigError, DataError

WAYS, NUMBERS = ["north", "east", "south", "west"], ["none", "one", "two", "three"]


class Reader:
    """Reads the words of a story of any task and answers its questions, knowing nothing of how it was made."""

    def __init__(self) -> None:
        self.at: dict[str, str] = {}
        self.owner: dict[str, Optional[str]] = {}
        self.lies: dict[str, Optional[str]] = {}
        self.way: dict[str, int] = {}

    def hear(self, sentence: str) -> None:
        rules: dict[str, Callable[..., None]] = {
            r"(\w+) enters (\w+)": lambda who, where: self.at.update({who: where}),
            r"(\w+) and (\w+) swap": self._swap,
            r"(\w+) takes (\w+)": self._take,
            r"(\w+) leaves (\w+)": self._leave,
            r"(\w+) gives (\w+) (\w+)": self._give,
            r"(\w+) faces (\w+)": lambda who, way: self.way.update({who: WAYS.index(way)}),
            r"(\w+) turns (\w+)": self._turn,
        }
        for pattern, act in rules.items():
            match = re.fullmatch(pattern, sentence)
            if match:
                return act(*match.groups())
        raise AssertionError(f"what is {sentence!r}?")

    def _swap(self, first: str, second: str) -> None:
        assert first != second
        self.at[first], self.at[second] = self.at[second], self.at[first]

    def _take(self, who: str, thing: str) -> None:
        assert self.owner.get(thing) is None, "somebody has it"
        assert self.lies.get(thing) is None or self.lies[thing] == self.at[who], "it is elsewhere"
        self.owner[thing] = who

    def _leave(self, who: str, thing: str) -> None:
        assert self.owner[thing] == who
        self.owner[thing], self.lies[thing] = None, self.at.get(who)

    def _give(self, who: str, other: str, thing: str) -> None:
        assert self.owner[thing] == who != other
        self.owner[thing] = other

    def _turn(self, who: str, turn: str) -> None:
        self.way[who] = (self.way[who] + {"right": 1, "around": 2, "left": 3}[turn]) % 4

    def answer(self, question: str) -> str:
        words = question.split()
        if words[:2] == ["where", "faces"]:
            return WAYS[self.way[words[2]]]
        held = [thing for thing in ("lantern", "rope", "coin") if self.owner.get(thing) == words[-1]]
        if words[:2] == ["how", "many"]:
            return NUMBERS[len(held)]
        if words[:2] == ["what", "has"]:
            return ",".join(held) or "nothing"
        if words[0] == "is":
            return "yes" if self.at[words[1]] == words[3] else "no"
        name = words[2]
        if name in self.at:
            return self.at[name]
        bearer = self.owner.get(name)
        place = self.at[bearer] if bearer else self.lies[name]
        assert place
        return place


def _check(text: str) -> list[tuple[str, str]]:
    """Questions and answers of a story, each answer found to be right; no statement contradicts those before it."""
    reader, sentence, found, words = Reader(), [], [], iter(text.split())
    for word in words:
        if word == ".":
            reader.hear(" ".join(sentence))
        elif word == "?":
            found.append((" ".join(sentence), next(words)))
            assert found[-1][1] == reader.answer(found[-1][0]), text
        else:
            sentence.append(word)
            continue
        sentence = []
    assert not sentence
    return found


@pytest.mark.parametrize("task", WORLDS)
def test_every_answer_is_right(task: str) -> None:
    answers: dict[str, int] = defaultdict(int)
    for number in range(300):
        statements = number % 40 + 1
        text = VOCABULARY.text(tell_story(task, statements, draws(f"{task}{number}")))
        assert text.split().count(".") == statements
        for _, answer in _check(text):
            answers[answer] += 1
    assert max(answers.values()) < 0.55 * sum(answers.values()), "no answer is a good guess"


def test_questions_are_never_far_apart_and_one_is_at_the_end() -> None:
    for number in range(100):
        text = VOCABULARY.text(tell_story("places", 20, draws(str(number))))
        assert all(part.count(".") <= 3 for part in text.split("?"))
        assert text.split()[-2] == "?"


def test_only_answers_count_and_each_is_the_label_of_its_question_mark() -> None:
    samples = GeneratedStories().samples("train", 50, 97, seed=1)
    batch = samples.batch(range(8, 40))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        name: (32, 97) for name in ("tokens", "labels", "position_ids", "loss_mask")
    }
    assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    assert torch.equal(batch["loss_mask"] == 1, batch["tokens"] == VOCABULARY.id("?"))
    assert batch["loss_mask"].sum(dim=1).min() > 0 and batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    for row in batch["tokens"].tolist():  # the last story is cut, the others are whole
        assert row[0] == VOCABULARY.id("<eos>")
        for story in VOCABULARY.text(row[1:]).split("<eos>")[:-1]:
            assert _check(story)


def test_a_sample_depends_on_its_index_alone() -> None:
    task = GeneratedStories(["turns", "things"], 6)
    whole = task.samples("train", 100, 64, seed=1).batch(range(32))["tokens"]
    parts = [task.samples("train", 32, 64, seed=1).batch(range(start, start + 4)) for start in range(0, 32, 4)]
    assert torch.equal(whole, torch.cat([part["tokens"] for part in parts]))
    assert len({tuple(row) for row in whole.tolist()}) == 32
    for other in (task.samples("test", 100, 64, seed=1), task.samples("train", 100, 64, seed=2)):
        assert not torch.equal(whole, other.batch(range(32))["tokens"])


def test_stories_are_told_fast() -> None:
    samples = GeneratedStories().samples("train", 512, 256, seed=1)
    began = time.process_time()
    samples.batch(range(512))
    assert 512 * 256 / (time.process_time() - began) > 200_000  # tokens a second; 2.8M were measured


def test_a_data_section_opens_its_stories() -> None:
    task = open_task(DataConfig(task="stories", story_tasks=["turns"], story_statements=3))
    assert task.tasks == ("turns",) and task.vocab_size == len(VOCABULARY)
    assert task.fingerprint != open_task(DataConfig(task="stories", story_statements=3)).fingerprint
    assert isinstance(task.samples("train", 1, 64, seed=1), TaskSamples)


def test_impossible_stories_are_refused_in_a_line() -> None:
    with pytest.raises(ConfigError, match="data.story_tasks=dragons is not told here: use some of people, things, "):
        GeneratedStories(["dragons"])
    with pytest.raises(ConfigError, match="data.story_statements=0 must be at least 1"):
        GeneratedStories(statements=0)
    with pytest.raises(ConfigError, match="data.sequence_length=16 may leave a sample without a question"):
        GeneratedStories().samples("train", 1, 16, seed=1)


CATBABI = {
    "train": "1\tmim ran to the shed . where is mim ? shed\n"
    "8\tmim got the pear . mim got the fig . what is mim carrying ? pear,fig mim left the fig . "
    "what is mim carrying ? pear\n"
    "1\ttol ran to the barn . mim ran to the barn . where is tol ? barn\n",
    "valid": "1\ttol ran to the shed . where is tol ? shed\n",
    "test": "8\ttol got the fig . what is tol carrying ? fig\n",
}
BABI = {
    "qa1_{}.txt": {
        "train": "1 Mim ran to the shed.\n2 Where is Mim? \tshed\t1\n1 Tol ran to the barn.\n2 Mim ran to the barn.\n"
        "3 Where is Tol? \tbarn\t1\n",
        "valid": "1 Tol ran to the shed.\n2 Where is Tol? \tshed\t1\n",
        "test": "",
    },
    "qa8_lists-sets_{}.txt": {
        "train": "1 Mim got the pear.\n2 Mim got the fig.\n3 What is Mim carrying? \tpear,fig\t1 2\n"
        "4 Mim left the fig.\n"
        "5 What is Mim carrying? \tpear\t1 4\n",
        "valid": "",
        "test": "1 Tol got the fig.\n2 What is Tol carrying?\tfig\t1\n",
    },
}


@pytest.fixture(params=["catbabi", "babi"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same stories in either form."""
    if request.param == "catbabi":
        for split, text in CATBABI.items():
            (tmp_path / f"en-valid-10k_{split}.txt").write_text(text, encoding="utf-8")
    else:
        for name, splits in BABI.items():
            for split, text in splits.items():
                (tmp_path / name.format(split)).write_text(text, encoding="utf-8")
    return tmp_path


def test_both_forms_of_the_published_files_hold_the_same_stories(published: Path) -> None:
    task = PublishedStories(published)
    assert task.tasks == ("1", "8")
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        lines = {f"{number}\t{task.vocabulary.text(tokens)}" for number, tokens in task.stories(split)}
        assert lines == set(CATBABI[name].splitlines())
    assert [number for number, _ in PublishedStories(published, ["8"]).stories("train")] == ["8"]


def test_published_stories_fill_rows_and_come_again_in_another_order(published: Path) -> None:
    task = PublishedStories(published)
    samples = task.samples("train", 40, 40, seed=1)
    batch = samples.batch(range(40))
    texts = [task.vocabulary.text(row) for row in batch["tokens"].tolist()]
    told = [story.replace("<pad>", "").strip() for text in texts for story in text.split("<eos>")[1:]]
    stories = [line.split("\t")[1] for line in CATBABI["train"].splitlines()]
    rounds = [told[start : start + 3] for start in range(0, len(told) - 2, 3)]
    assert all(sorted(one) == sorted(stories) for one in rounds) and len({tuple(one) for one in rounds}) > 1
    assert torch.equal(batch["loss_mask"] == 1, batch["tokens"] == task.vocabulary.id("?"))
    assert torch.equal(samples.batch(range(7, 9))["tokens"], batch["tokens"][7:9])
    assert not torch.equal(task.samples("train", 40, 40, seed=2).batch(range(40))["tokens"], batch["tokens"])


def test_a_story_longer_than_a_row_is_cut_and_left_out_where_nothing_is_asked(published: Path) -> None:
    task = PublishedStories(published)
    batch = task.samples("train", 9, 11, seed=1).batch(range(9))
    assert batch["loss_mask"].sum(dim=1).tolist() == [1.0] * 9  # the list's first question comes too late
    with pytest.raises(DataError, match="no test story has a question within data.sequence_length=5 tokens: raise it"):
        task.samples("test", 1, 5, seed=1)


def test_generated_stories_in_the_published_form_are_read_back(tmp_path: Path) -> None:
    told = [tell_story("lists", 5, draws(str(number))) for number in range(6)]
    for split in ("train", "valid", "test"):
        lines = "".join(f"5\t{VOCABULARY.text(story)}\n" for story in told)
        (tmp_path / f"en-valid_{split}.txt").write_text(lines, encoding="utf-8")
    read = PublishedStories(tmp_path)
    assert [read.vocabulary.text(tokens) for _, tokens in read.stories("test")] == list(map(VOCABULARY.text, told))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("en-valid-10k_train.txt", "mim ran .", r"train.txt:1 is not a task's number, a tab and a story with answered"),
        ("en-valid-10k_train.txt", "1\tmim ran . where is mim ?", "train.txt:1 is not a task's number"),
        ("en-valid-10k_train.txt", "1\tmim ran .\n", "train.txt:1 is not a task's number"),
        ("qa1_train.txt", "1 Mim ran to the shed.\n2 Where is Mim?\n", "train.txt:2 is neither a statement nor a"),
        ("qa1_train.txt", "Mim ran to the shed.\n", "train.txt:1 does not begin with a line's number"),
        ("notes.txt", "", "has neither en-valid-10k_train.txt .CatbAbI. nor qa1_train.txt .bAbI.: name the folder"),
    ],
)
def test_files_that_are_not_in_the_format_are_refused_in_a_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as refusal:
        open_task(DataConfig(task="stories", stories=str(tmp_path)))
    assert "\n" not in str(refusal.value)


def test_files_that_are_not_text_and_tasks_that_are_not_there_are_refused(published: Path) -> None:
    with pytest.raises(DataError, match="data.story_tasks=3: .* has no stories of that number to train on"):
        PublishedStories(published, ["3"])
    for path in published.glob("*train.txt"):
        path.write_bytes(b"1\t\xff\xfe")
    with pytest.raises(DataError, match="is not text .invalid start byte at byte 2.: copy it again"):
        PublishedStories(published)
