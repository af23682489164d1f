"""FedMP-style rates: the tree of arms and its bounds, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from reports import NOTHING, report

from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Report, Roster
from fedprune.rates import Bandit, Offer

RATES = np.array([0.05, 1.0])
OFFER = Offer(RATES, np.repeat(RATES[:, None], len(PARTS), 1))
NOBODY = Roster(np.array([], int), 0, np.array([]))
BOTH = np.arange(2)


def told(client: int, rate: float, seconds: float, loss: float) -> Report:
    return replace(report(NOTHING, client=client, rate=rate, seconds=seconds), loss=loss)


def test_the_first_round_trains_the_whole_model_and_rewards_nothing():
    learner = Bandit()
    assert learner.propose({}, BOTH, NOBODY, OFFER).tolist() == [1, 1]
    memory = learner.learn({}, [told(c, 1.0, 1.0 + c, 9.0) for c in BOTH], [], 2, OFFER)
    assert memory["drawn"].sum() == 0 and memory["halved"].sum() == 0 and memory["loss"].tolist() == [9, 9]
    assert learner.learn(memory, [], [], 2, OFFER) is memory


def test_a_reward_is_progress_in_the_others_time():
    """Times 1 and 3, mean 2: distances 1, and a tenth of 2 each. Decreases 1 and .5, so rewards 1/1.2 and .5/1.2: 1 to .5."""
    learner = Bandit(width=0.2, floor=0.2, discount=0.5)
    memory = learner.learn({}, [told(c, 1.0, 1.0, 9.0) for c in BOTH], [], 2, OFFER)
    memory = learner.learn(memory, [told(0, 0.3, 1.0, 8.0), told(1, 0.9, 3.0, 8.5)], [], 2, OFFER)
    assert memory["reward"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0.5]]
    assert memory["drawn"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    memory = learner.learn(memory, [told(0, 0.3, 1.0, 8.5), told(1, 0.5, 1.0, 8.0)], [], 2, OFFER)
    assert memory["reward"].tolist() == [[0.5, 0, 0, 0], [0, 1, 0, 0.25]], "a loss that rose earns nothing; older is discounted"
    assert memory["drawn"].tolist() == [[1.5, 0, 0, 0], [0, 1, 0, 0.5]]


def test_the_average_has_no_infinite_reward():
    """Times 2, 3, 4: distances 1, 0, 1, and a tenth of 3 each. Equal decreases earn .3 / 1.3 of what the middle one earns."""
    learner = Bandit(width=0.4, floor=0.2)
    memory = learner.learn({}, [told(c, 1.0, 1.0, 9.0) for c in range(3)], [], 3, OFFER)
    memory = learner.learn(memory, [told(c, 0.9, 2.0 + c, 8.0) for c in range(3)], [], 3, OFFER)
    assert memory["reward"][:, 1] == pytest.approx([0.3 / 1.3, 1.0, 0.3 / 1.3])


def test_an_arm_that_was_drawn_is_halved_down_to_the_width():
    learner = Bandit(width=0.2, floor=0.2)
    memory = learner.learn({}, [told(0, 1.0, 1.0, 9.0)], [], 1, OFFER)
    seen = []
    for _ in range(4):
        memory = learner.learn(memory, [told(0, 0.3, 1.0, 9.0)], [], 1, OFFER)
        seen.append(np.flatnonzero(memory["halved"][0]).tolist())
    assert seen == [[0], [0, 1], [0, 1], [0, 1]], "[.2, 1], then [.2, .6]; [.2, .4] is as narrow as arms get"


def test_the_bound_by_hand():
    """4 draws earned 3 below, one earned .5 above: .75 + c sqrt(2 ln 5 / 4) = .75 + .897 c to .5 + 1.794 c; equal at .279."""
    for explore, low, high in ((0.27, 0.2, 0.6), (0.29, 0.6, 1.0)):
        learner = Bandit(width=0.4, floor=0.2, explore=explore)
        memory = learner.learn({}, [told(0, 1.0, 1.0, 9.0)], [], 1, OFFER)
        memory["drawn"][0], memory["reward"][0], memory["halved"][0] = [4, 1], [3, 0.5], [True, False, False]
        rates = [learner.propose(memory | {"round": np.array(r)}, np.array([0]), NOBODY, OFFER)[0] for r in range(40)]
        assert low <= min(rates) < low + 0.1 and high - 0.1 < max(rates) <= high


def test_what_was_never_drawn_comes_first_the_larger_before_the_smaller():
    learner = Bandit(width=0.4, floor=0.2)
    memory = learner.learn({}, [told(0, 1.0, 1.0, 9.0)], [], 1, OFFER)
    memory["halved"][0, 0] = True
    assert learner.propose(memory, np.array([0]), NOBODY, OFFER)[0] > 0.6
    memory["drawn"][0, 1] = 1.0
    assert learner.propose(memory, np.array([0]), NOBODY, OFFER)[0] < 0.6


def test_chance_follows_from_the_memory_alone():
    learner = Bandit(seed=3)
    memory = learner.learn({}, [told(c, 1.0, 1.0, 9.0) for c in BOTH], [], 2, OFFER)
    rates = learner.propose(memory, BOTH, NOBODY, OFFER)
    assert np.array_equal(rates, learner.propose(memory, BOTH, NOBODY, OFFER)) and rates[0] != rates[1]
    assert np.array_equal(rates[1:], learner.propose(memory, BOTH[1:], NOBODY, OFFER)), "whoever is asked beside it"
    later = learner.learn(memory, [told(c, rates[c], 1.0, 9.0) for c in BOTH], [], 2, OFFER)
    assert not np.isin(rates, learner.propose(later, BOTH, NOBODY, OFFER)).any()
    assert not np.isin(rates, Bandit(seed=4).propose(memory, BOTH, NOBODY, OFFER)).any()


def test_it_draws_most_where_it_pays():
    """Client 1 is four times as slow as five others, which keep the whole model: in their time it trains a quarter."""
    learner, memory, rates = Bandit(explore=0.1), {}, []
    for number in range(400):
        rate = float(learner.propose(memory, np.array([1]), NOBODY, OFFER)[0])
        rates.append(rate)
        others = [told(c, 1.0, 1.0, 9.0 - 0.01 * number) for c in (0, 2, 3, 4, 5)]
        memory = learner.learn(memory, [told(1, rate, 4 * rate, 9.0 - 0.01 * number), *others], [], 6, OFFER)
    assert np.mean(np.abs(np.array(rates[200:]) - 0.25) < 0.0625) > 0.5
    assert all(isinstance(value, np.ndarray) for value in memory.values())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"width": 0.0}, "width 0.0"),
        ({"discount": 1.5}, "discount 1.5"),
        ({"explore": -1.0}, "explore"),
        ({"floor": 0.0}, "floor"),
    ],
)
def test_bad_arguments_are_refused(bad: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        Bandit(**bad)
