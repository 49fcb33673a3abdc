"""Groups, monoids and the words made of their elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.sampling import TaskSamples, read_microbatch
from megatron_implicit.data.tasks import open_task
from megatron_implicit.data.tasks.groups import Monoid, monoid_named
from megatron_implicit.data.tasks.word_problem import WordProblem
from megatron_implicit.errors import ConfigError

GROUPS = [f"{kind}{points}" for kind in "SA" for points in (3, 4, 5, 6)] + ["Z1", "Z2", "Z60", "A4xZ5", "S3xZ4"]
ORDERS = {
    "S3": 6,
    "A4": 12,
    "A5": 60,
    "S5": 120,
    "A6": 360,
    "S6": 720,
    "Z60": 60,
    "A4xZ5": 60,
    "S3xZ4": 24,
    "A5xM": 240,
}


def _check_monoid(monoid: Monoid) -> None:
    """Closure, identity, and associativity: of all triples, or in a large table of all pairs with some thirds."""
    table, size = monoid.table.astype(np.intp), len(monoid)
    assert table.min() >= 0 and table.max() < size
    assert (table[0] == np.arange(size)).all() and (table[:, 0] == np.arange(size)).all()
    thirds = np.arange(size) if size <= 120 else np.random.default_rng(0).integers(size, size=24)
    for third in thirds:
        assert (table[table, third] == table[:, table[:, third]]).all()


@pytest.mark.parametrize("name", GROUPS)
def test_every_group_offered_is_a_group(name: str) -> None:
    group = monoid_named(name)
    _check_monoid(group)
    assert group.is_group
    everything = np.arange(len(group))
    for lines in (group.table, group.table.T):  # each element once in every row and column: so there are inverses
        assert (np.sort(lines, axis=1) == everything).all()
    inverses = (group.table == 0).argmax(axis=1)
    assert (group.table[everything, inverses] == 0).all() and (group.table[inverses, everything] == 0).all()


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_orders(name: str, order: int) -> None:
    assert len(monoid_named(name)) == order


def test_only_the_permutations_do_not_commute() -> None:
    commutes = {name: bool((monoid_named(name).table == monoid_named(name).table.T).all()) for name in GROUPS}
    assert {name for name, value in commutes.items() if value} == {"A3", "Z1", "Z2", "Z60"}


def test_a5_is_its_own_commutator_subgroup() -> None:
    table = monoid_named("A5").table
    inverses = (table == 0).argmax(axis=1)
    commutators = table[table, table[inverses[:, None], inverses]]  # a b a^-1 b^-1
    assert set(commutators.ravel()) == set(range(60)), "a group that is not solvable"


def test_the_monoid_of_the_paper_is_associative_and_aperiodic() -> None:
    monoid = monoid_named("M")
    _check_monoid(monoid)
    assert not monoid.is_group
    e, a, b, x = range(4)
    products = {(a, a): x, (a, b): x, (a, x): x, (b, a): a, (b, b): b, (b, x): x, (x, x): x, (x, a): x, (x, b): x}
    assert all(monoid.table[pair] == product for pair, product in products.items())
    power, powers = np.arange(4), []
    for _ in range(5):
        powers.append(power)
        power = monoid.table[power, np.arange(4)]
    assert (powers[-1] == powers[-2]).all(), "x^(n+1) = x^n for every x"


def test_a_product_multiplies_factor_by_factor() -> None:
    product, left, right = monoid_named("S3xM"), monoid_named("S3"), monoid_named("M")
    _check_monoid(product)
    first, second = np.divmod(np.arange(24), 4)
    assert (product.table // 4 == left.table[first[:, None], first]).all()
    assert (product.table % 4 == right.table[second[:, None], second]).all()
    assert (product.without_groups == second).all() and not product.is_group


@pytest.mark.parametrize("name", ["A7", "S2", "Q8", "Z0", "a5", "A5x", "", "S6xS6", "Z9999"])
def test_what_is_not_offered_is_refused_in_a_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"data.group={name} ") as refusal:
        monoid_named(name)
    assert "use" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("length", [1, 4, 7, 33])
def test_labels_are_the_products_through_each_position(length: int) -> None:
    monoid = monoid_named("A5xM")
    batch = WordProblem(monoid).samples("train", 10, length, seed=3).batch(range(2, 7))
    for word, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist()):
        running = 0
        for element, label in zip(word, labels, strict=True):
            running = monoid.table[running, element]
            assert label == running
    assert batch["tokens"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64
    assert (batch["loss_mask"] == 1).all() and batch["position_ids"][4].tolist() == list(range(length))


def test_a_sample_depends_on_its_index_alone() -> None:
    task = WordProblem(monoid_named("A5"), 0.5)
    whole = task.samples("train", 100, 9, seed=1).batch(range(64))["tokens"]
    parts = [task.samples("train", 64, 9, seed=1).batch(range(start, start + 4)) for start in range(0, 64, 4)]
    assert torch.equal(whole, torch.cat([part["tokens"] for part in parts]))
    assert len({tuple(word) for word in whole.tolist()}) == 64
    for other in (task.samples("test", 100, 9, seed=1), task.samples("train", 100, 9, seed=2)):
        assert not torch.equal(whole, other.batch(range(64))["tokens"])


def test_elements_come_as_often_as_asked() -> None:
    everything = WordProblem(monoid_named("A5")).samples("train", 2000, 60, seed=1).batch(range(2000))["tokens"]
    counts = np.bincount(everything.ravel().numpy(), minlength=60)
    assert abs(counts / 2000 - 1).max() < 0.12  # 2000 of each are expected, with a deviation of 45
    product = WordProblem(monoid_named("Z4xM"), 0.25).samples("train", 2000, 60, seed=1).batch(range(2000))["tokens"]
    group, monoid = np.divmod(product.ravel().numpy(), 4)
    assert (group != 0).mean() == pytest.approx(0.25 * 3 / 4, abs=0.01)
    assert np.bincount(monoid) / monoid.size == pytest.approx([0.25] * 4, abs=0.01)


def test_a_data_section_opens_its_task() -> None:
    task = open_task(DataConfig(task="word_problem", group="S5", non_identity_share=0.5))
    assert task.vocab_size == 120
    assert task.fingerprint != open_task(DataConfig(task="word_problem", group="S5")).fingerprint
    samples = task.samples("validation", 8, 16, seed=1)
    assert isinstance(samples, TaskSamples)
    assert read_microbatch(samples, range(4, 8))["tokens"].shape == (4, 16)
    with pytest.raises(ConfigError, match="data.task=text has no samples of its own"):
        open_task(DataConfig())
