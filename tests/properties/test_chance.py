"""Random draws: fair, without replacement, and the same whoever else is in the stack."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats
from world import ITEMS, USERS, train, world

from fedprune.data import silos
from fedprune.objective import Objective
from fedprune.population import Population
from fedprune.random import PRIORITIES, drawn, keys, permuted, priorities, stream, uniform

QUICK = settings(max_examples=40, deadline=None)


@QUICK
@given(some.integers(1, 3000), some.integers(0, 2**20), some.data())
def test_permuted_is_a_permutation(size: int, seed: int, data: some.DataObject):
    whole = permuted(keys(seed, "test", range(3)), size, size)
    assert (whole.sort(1).values == torch.arange(size)).all()
    draws = data.draw(some.integers(0, size))
    assert torch.equal(permuted(keys(seed, "test", range(3)), draws, size), whole[:, :draws])


@QUICK
@given(some.lists(some.integers(0, 2**40), min_size=1, max_size=6), some.integers(1, 200), some.integers(0, 99))
def test_a_permutation_does_not_depend_on_the_stack(numbers: list[int], size: int, seed: int):
    together = permuted(keys(seed, "test", numbers), size, size)
    for place, number in enumerate(numbers):
        assert torch.equal(together[place], permuted(keys(seed, "test", [number]), size, size)[0])


def test_every_value_comes_at_every_place_equally_often():
    """Chi-square over 40,000 keys at the first, a middle and the last place."""
    size, many = 23, 40_000
    taken = permuted(keys(5, "test", range(many)), size, size).numpy()
    for place in (0, 11, 22):
        assert stats.chisquare(np.bincount(taken[:, place], minlength=size)).pvalue > 1e-4


def test_pairs_of_values_are_nearly_independent():
    """Eighths of a catalogue of MovieLens' size; three Feistel rounds leave traces in catalogues of a few dozen."""
    size, bins, many = 1682, 8, 40_000
    taken = permuted(keys(5, "test", range(many)), 2, size).numpy()
    eighth = np.arange(size) * bins // size
    pairs = np.bincount(eighth[taken[:, 0]] * bins + eighth[taken[:, 1]], minlength=bins * bins)
    in_bin = np.bincount(eighth)
    expected = np.outer(in_bin, in_bin) - np.diag(in_bin)
    assert stats.chisquare(pairs, many * expected.flatten() / expected.sum()).pvalue > 1e-4


def test_every_order_of_a_few_values_comes():
    taken = permuted(keys(6, "test", range(24_000)), 4, 4).numpy() @ np.array([64, 16, 4, 1])
    _, counts = np.unique(taken, return_counts=True)
    assert len(counts) == 24, "some order of four values never comes"


def test_priorities_do_not_depend_on_how_many_are_drawn_and_are_distinct():
    key = keys(7, "test", range(4))
    many = priorities(key, 3000)
    assert torch.equal(priorities(key, 10), many[:, :10]) and int(many.max()) < PRIORITIES
    assert all(len(row.unique()) == 3000 for row in many)
    first = priorities(keys(8, "test", range(20_000)), 3).argmin(1)
    assert stats.chisquare(np.bincount(first, minlength=3)).pvalue > 1e-4


@QUICK
@given(some.integers(1, 60), some.integers(0, 999), some.integers(0, 100))
def test_drawn_takes_the_first_that_are_not_barred(size: int, seed: int, percent: int):
    chance = np.random.default_rng(seed)
    barred = chance.random((5, size)) < percent / 100
    wanted = np.array([chance.integers(0, free + 1) for free in (~barred).sum(1)])
    key = keys(seed, "test", range(5))
    got, order = drawn(key, wanted, torch.from_numpy(barred)), permuted(key, size, size)
    for row in range(5):
        first = [int(value) for value in order[row] if not barred[row, value]][: wanted[row]]
        assert got[row].tolist() == first + [0] * (got.shape[1] - len(first))


def test_drawn_serves_the_unlucky_too():
    """Of 3000 rows that want one value of a half-barred catalogue, some find the first dozen barred."""
    barred = torch.from_numpy(np.random.default_rng(1).random((3000, 500)) < 0.5)
    key = keys(3, "test", range(3000))
    got, order = drawn(key, np.ones(3000, np.int64), barred)[:, 0], permuted(key, 500, 500)
    first = (~barred.gather(1, order)).int().argmax(1)
    assert torch.equal(got, order.gather(1, first[:, None])[:, 0])
    assert int(first.max()) > 8, "nobody was unlucky, so this shows nothing"


def test_uniform_is_uniform_and_independent_of_purpose():
    one, other = uniform(3, "one", range(20_000)), uniform(3, "other", range(20_000))
    assert stats.kstest(one, "uniform").pvalue > 1e-4 and one.min() >= 0 and one.max() < 1
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.03


def test_streams_follow_from_seed_purpose_and_number():
    assert stream(1, "a", 2).integers(2**60) == stream(1, "a", 2).integers(2**60)
    values = {int(stream(*which).integers(2**60)) for which in ((1, "a", 2), (2, "a", 2), (1, "b", 2), (1, "a", 3), (1, "a"))}
    assert len(values) == 5


@QUICK
@given(some.lists(some.integers(0, USERS - 1), min_size=1, max_size=8, unique=True), some.integers(1, 6), some.data())
def test_negatives_are_unseen_and_distinct_and_no_business_of_others(clients: list[int], negatives: int, data):
    population, objective = world().population, Objective(negatives=negatives)
    tickets = data.draw(some.lists(some.integers(0, 10**6), min_size=len(clients), max_size=len(clients)))
    stack = population.draw(clients, tickets, objective, seed=3)
    for place, (client, ticket) in enumerate(zip(clients, tickets, strict=True)):
        items = stack.rows[place][stack.present[place]]
        label = stack.label[place][stack.present[place]]
        seen = set(train().items_of(client).tolist())
        taken = items[label == 0].tolist()
        assert items[label == 1].tolist() == train().items_of(client).tolist()
        assert len(taken) == len(set(taken)) == min(negatives * len(seen), ITEMS - len(seen))
        assert not set(taken) & seen
        alone = population.draw([client], [ticket], objective, seed=3)
        assert torch.equal(alone.rows[0][alone.present[0]], items)
        assert torch.equal(alone.age[0][alone.present[0]], stack.age[place][stack.present[place]])


def test_negatives_are_drawn_evenly_from_all_that_is_unseen():
    """Held-out items included: leaving them out would tell the model which they are."""
    population, client = world().population, 4
    seen = set(train().items_of(client).tolist())
    counts = np.zeros(ITEMS, int)
    for ticket in range(1500):
        taken = population.draw([client], [ticket], Objective(negatives=1), seed=3)
        counts[taken.rows[0][(taken.label[0] == 0) & taken.present[0]].numpy()] += 1
    unseen = np.array([item for item in range(ITEMS) if item not in seen])
    assert counts.sum() == counts[unseen].sum() == 1500 * len(seen)
    # Draws within one order are without replacement, so counts vary a little less than chi-square says.
    assert stats.chisquare(counts[unseen]).pvalue > 1e-4


def test_a_new_order_draws_new_negatives():
    population = world().population
    one, other = (population.draw([4], [ticket], Objective(negatives=1), seed=3).rows[0].tolist() for ticket in (0, 1))
    assert one != other
    again = population.draw([4], [0], Objective(negatives=1), seed=4).rows[0].tolist()
    assert one != again


@QUICK
@given(some.integers(1, 6), some.integers(0, 50), some.booleans())
def test_a_silo_trains_on_what_its_users_drew(count: int, seed: int, partly: bool):
    owner = silos(train(), count, by="quantity", seed=seed)
    what = world().fleet.recommender
    population = Population(train(), owner, what.layout, what.initial_private(0))
    clients = list(range(count))
    share = [0.5] * count if partly else None
    taken = population.draw(clients, [7 + c for c in clients], Objective(), 3, share)
    alone = world().population
    for silo in clients:
        pairs = set()
        for column in taken.weight[silo].nonzero().flatten().tolist():
            if taken.item_at is None:
                user, item = int(taken.users[silo, 0]), int(taken.rows[silo, column])
            else:
                user = int(taken.users[silo, taken.user_at[silo, column]])
                item = int(taken.rows[silo, taken.item_at[silo, column]])
            pairs.add((user, item, float(taken.label[silo, column])))
        expected = set()
        for user in np.flatnonzero(owner == silo).tolist():
            one = alone.draw([user], [7 + silo], Objective(), 3, share and share[:1])
            for column in one.weight[0].nonzero().flatten().tolist():
                expected.add((user, int(one.rows[0, column]), float(one.label[0, column])))
        assert pairs == expected
        assert len(taken.rows[silo][taken.present[silo]].unique()) == int(taken.present[silo].sum())
