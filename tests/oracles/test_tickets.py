"""Lottery tickets, feedback and saliency by hand: what is kept, when, and what comes back."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from world import copied, same, world

from fedprune.axes import Axis, Layout
from fedprune.entries import Feedback, Lottery, Salient
from fedprune.entries.base import group, kept
from fedprune.errors import ConfigError
from fedprune.merge import Adam, Merge
from fedprune.strategy import Strategy, prepared
from fedprune.types import Memory, Tensors

LAYOUT = Layout.of({"item": Axis(2, touched=True), "latent": Axis(4)}, item_embedding="item latent", item_bias="item")
MODEL: Tensors = {
    "item_embedding": torch.tensor([[0.1, -0.9, 0.3, 0.0], [-0.5, 0.2, 0.8, -0.4]]),
    "item_bias": torch.tensor([5.0, 6.0]),
}


def there(memory: Memory, entries: Lottery | Feedback | Salient, rate: float = 1.0) -> list[list[int]]:
    """The mask of the embedding as zeros and ones."""
    return entries.mask(memory, LAYOUT, 0, rate)["item_embedding"].astype(int).tolist()


# ---- lottery ---------------------------------------------------------------------------------------------------------


def test_the_largest_survivors_stay_and_the_rest_returns_to_the_checkpoint():
    entries = Lottery(0.25, every=1, step=0.5, rewind=0)
    early = {name: tensor + 1 for name, tensor in MODEL.items()}
    memory, _ = entries.prepare({}, early, LAYOUT, 0)
    memory, model = entries.prepare(memory, MODEL, LAYOUT, 1)
    assert there(memory, entries) == [[0, 1, 0, 0], [1, 0, 1, 1]] and same(model, early)
    grown = {"item_embedding": torch.tensor([[9.0, 0.1, 9.0, 9.0], [0.2, 9.0, 0.3, 0.4]]), "item_bias": MODEL["item_bias"]}
    memory, model = entries.prepare(memory, grown, LAYOUT, 2)
    assert there(memory, entries) == [[0, 0, 0, 0], [0, 0, 1, 1]], "only survivors can be drawn"
    assert same(model, early) and entries.facts(memory) == {"kept": 0.25, "ticket": 0.25}
    assert entries.prepare(memory, grown, LAYOUT, 3)[1] is grown, "done"


@pytest.mark.parametrize("rewind", [0, 2, None])
def test_the_checkpoint_comes_back_bit_for_bit_and_moments_are_forgotten(rewind: int | None):
    entries = Lottery(0.5, every=3, rewind=rewind)
    here = world(Strategy(entries=entries, merge=Merge(optimiser=Adam(0.02))), noise=0.1)
    checkpoint, start = {}, rewind or 0
    for version in range(8):
        before = here.state
        ready = prepared(here.strategy, before)
        if version == start:
            checkpoint = copied(ready.model)
        if version > start and (version - start) % 3 == 0:
            assert kept(entries.mask(ready.entries, ready.layout, 0, 1.0)) < 1
            if rewind is None:
                assert ready.model is before.model and ready.optimiser is before.optimiser
            else:
                assert same(ready.model, checkpoint) and not same(before.model, checkpoint)
                assert ready.optimiser == {} and before.optimiser
        else:
            assert ready.model is before.model and ready.optimiser is before.optimiser
        here.round()


def test_shares_follow_the_step():
    entries = Lottery(0.4, every=2, step=0.2, rewind=1)
    here, shares, last = world(Strategy(entries=entries)), [], None
    for _ in range(15):
        here.round()
        now = entries.mask(here.state.entries, here.state.layout, 0, 1.0).get("item_embedding")
        shares.append(kept(entries.mask(here.state.entries, here.state.layout, 0, 1.0)))
        assert last is None or not (now & ~last).any(), "a ticket never grows"
        last = now
    expected = [max(0.4, 0.8 ** max(0, (version - 1) // 2)) for version in range(15)]
    assert shares == pytest.approx(expected, abs=0.005)


def test_one_shot():
    entries = Lottery(0.25, every=4, step=0.75, rewind=0)
    here = world(Strategy(entries=entries))
    shares = [done.facts["kept"] for done in here.rounds(10)]
    assert shares == [1.0] * 4 + [0.25] * 6


def test_who_has_as_few_as_whole_numbers_allow_is_not_rewound_again():
    """A third of 320 entries is 107, more than a third: no reason to go back every other round for ever."""
    entries = Lottery(1 / 3, every=1, step=0.7, rewind=0)
    here = world(Strategy(entries=entries))
    here.rounds(2)
    assert entries.facts(here.state.entries)["kept"] == 107 / 320
    for _ in range(3):
        assert prepared(here.strategy, here.state).model is here.state.model
        here.round()


def test_early_birds_draw_when_masks_stand_still():
    entries = Lottery(0.5, early=0.2, patience=2)
    still, memory = [[0, 1, 0, 0], [1, 0, 1, 1]], {}
    turned = {"item_embedding": MODEL["item_embedding"].flip(0), "item_bias": MODEL["item_bias"]}
    grown, larger = ({name: tensor * factor for name, tensor in MODEL.items()} for factor in (1.1, 1.2))
    for version, model in enumerate([MODEL, turned, MODEL, grown]):  # two moves, then one calm version
        memory, after = entries.prepare(memory, model, LAYOUT, version)
        assert after is model and not entries.mask(memory, LAYOUT, 0, 1.0)
    for version in range(4, 9):
        assert entries.prepare(memory, grown, LAYOUT, version)[0] is memory, "nobody reported: that is no calm"
    assert entries.facts(memory) == {"kept": 1.0, "ticket": 1.0}
    memory, after = entries.prepare(memory, larger, LAYOUT, 9)
    assert after is larger and there(memory, entries) == still
    assert entries.facts(memory) == {"kept": 0.5, "ticket": 0.5}
    assert entries.prepare(memory, turned, LAYOUT, 10)[0] is memory, "for good"


# ---- feedback --------------------------------------------------------------------------------------------------------


def test_masks_follow_the_dense_model_and_bring_back_what_grew():
    entries = Feedback(0.5, every=2)
    memory, model = entries.prepare({}, MODEL, LAYOUT, 0)
    assert model is MODEL and there(memory, entries) == [[0, 1, 0, 0], [1, 0, 1, 1]]
    assert entries.facts(memory) == {"reactivated": 0.0, "kept": 0.5}
    grown = {"item_embedding": MODEL["item_embedding"].clone(), "item_bias": MODEL["item_bias"]}
    grown["item_embedding"][0, 3], grown["item_embedding"][1, 0] = -2.0, 0.0
    assert entries.prepare(memory, grown, LAYOUT, 1)[0] is memory, "not before its time"
    memory, _ = entries.prepare(memory, grown, LAYOUT, 2)
    assert there(memory, entries) == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert entries.facts(memory) == {"reactivated": 1.0, "kept": 0.5}
    memory, _ = entries.prepare(memory, grown, LAYOUT, 3)
    assert entries.facts(memory)["reactivated"] == 0.0, "it came back once"
    assert there(memory, entries) == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert entries.prepare(memory, grown, LAYOUT, 5)[0] is memory


def test_what_came_back_is_counted_at_the_share_that_is_served():
    """Of 8 entries 5, 3 and 2 are there, and each mask is held against the one that was served before it."""
    entries = Feedback(0.25, every=1, ramp=4)
    memory, _ = entries.prepare({}, MODEL, LAYOUT, 0)
    assert entries.facts(memory) == {"reactivated": 0.0, "kept": 1.0, "ticket": 1.0}
    memory, _ = entries.prepare(memory, MODEL, LAYOUT, 1)
    assert there(memory, entries) == [[0, 1, 1, 0], [1, 0, 1, 1]]
    assert entries.facts(memory) == {"reactivated": 0.0, "kept": 5 / 8, "ticket": 5 / 8}
    grown = {"item_embedding": MODEL["item_embedding"].clone(), "item_bias": MODEL["item_bias"]}
    grown["item_embedding"][0, 3] = 0.85
    memory, _ = entries.prepare(memory, grown, LAYOUT, 2)
    assert there(memory, entries) == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert entries.facts(memory) == {"reactivated": 1.0, "kept": 3 / 8, "ticket": 3 / 8}
    grown["item_embedding"] = grown["item_embedding"].flip(1)
    memory, _ = entries.prepare(memory, grown, LAYOUT, 4)
    assert there(memory, entries) == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert entries.facts(memory) == {"reactivated": 2.0, "kept": 2 / 8, "ticket": 2 / 8}


def test_a_pruned_entry_comes_back_in_a_run():
    here = world(Strategy(entries=Feedback(0.5, every=1, through=True)))
    masks = []
    for _ in range(6):
        done = here.round()
        masks.append(here.strategy.entries.mask(here.state.entries, here.state.layout, 0, 1.0)["item_embedding"])
    assert done.facts["reactivated"] == (masks[-1] & ~masks[-2]).sum()
    assert sum((now & ~last).sum() for last, now in pairwise(masks)) > 5
    ever = np.logical_or.reduce([~masks[0] & mask for mask in masks[1:]])
    assert ever.any()


def test_when_masks_are_chosen():
    def versions(entries: Feedback) -> list[int]:
        memory, chosen = {}, []
        for version in range(8):
            after, _ = entries.prepare(memory, MODEL, LAYOUT, version)
            chosen += [version] if after is not memory else []
            memory = after
        return chosen

    assert versions(Feedback(0.5, every=3)) == [0, 3, 6]
    assert versions(Feedback(0.5, every=2, until=4)) == [0, 2, 4]
    assert versions(Feedback(0.5, every=0)) == [0], "a permanent mask"


def test_sparsity_grows_as_a_cubic():
    """s_t = s (1 - (1 - t / ramp)^3); of 8 entries, s = .75: at 0 none goes, at t = 2 of 4 (7/8) .65625, then 6."""
    entries = Feedback(0.25, every=1, ramp=4)
    gone = []
    for version in range(6):
        memory, _ = entries.prepare({}, MODEL, LAYOUT, version)
        mask = entries.mask(memory, LAYOUT, 0, 1.0)
        gone.append(8 - int(mask["item_embedding"].sum()) if mask else 0)
    assert gone == [0, 3, 5, 6, 6, 6]  # .75 * (0, 37/64, 56/64, 63/64, 1, 1) of 8, and what is kept is rounded


def test_shares_follow_rates():
    entries = Feedback(None)
    memory, _ = entries.prepare({}, MODEL, LAYOUT, 0)
    assert entries.facts(memory) == {"reactivated": 0.0}, "no one share is everybody's"
    assert there(memory, entries, 0.25) == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert there(memory, entries, 0.01) == [[0, 1, 0, 0], [0, 0, 0, 0]], "at least one"
    assert entries.mask(memory, LAYOUT, 0, 1.0) == {}


# ---- saliency --------------------------------------------------------------------------------------------------------


def chosen(entries: Salient, memory: Memory, gradient: list[list[float]], model: Tensors = MODEL, version: int = 2) -> Memory:
    memory, _ = entries.prepare(memory, model, LAYOUT, version)
    assert entries.mask(memory, LAYOUT, 0, 1.0) == {}, "a dense round"
    update = {"item_embedding": torch.tensor(gradient), "item_bias": torch.full((2,), 100.0)}
    reports = [None]  # only whether there are any matters: the mean is given
    return entries.learn(memory, model, LAYOUT, reports, lambda: update)


def test_saliency_by_hand():
    """8 entries, of which the largest round(.5 * 8) = 4 stay: -.9, .8, -.5, -.4, with gradients 1, 1, 1, 1: Gamma = 4.

    c = .25 * 8 = 2, so Gamma / T = 4 / 6. The others' g^2 in order are 4, 1, .81, 0. 4 > 4/6: in, then Gamma / T = 8/7;
    1 < 8/7, so that one and the rest stay out.
    """
    entries = Salient(keep=0.1, every=2, decrease=0.5, overhead=0.25)
    gradient = [[2.0, 1.0, 0.9, 0.0], [1.0, -1.0, 1.0, 1.0]]
    memory = chosen(entries, {}, gradient)
    assert there(memory, entries) == [[1, 1, 0, 0], [1, 0, 1, 1]]
    assert entries.facts(memory) == {"kept": 5 / 8} and not group(memory, "magnitude")
    # Gamma = 4 * .25, Gamma / T = 1/6; 4, then (1 + 4) / 7 < 1, then 6 / 8 < .81, then 0 < 6.81 / 9.
    quiet = [[2.0, 0.5, 0.9, 0.0], [0.5, -1.0, 0.5, 0.5]]
    assert there(chosen(entries, {}, quiet), entries) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_saliency_can_bring_back_what_was_pruned():
    entries = Salient(keep=0.1, every=2, decrease=0.5, overhead=0.25)
    memory = chosen(entries, {}, [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]])
    assert there(memory, entries) == [[0, 1, 0, 0], [1, 0, 1, 1]]
    # Half of the entries are left, and the larger half of these stays. 25 beats everything.
    memory = chosen(entries, memory, [[0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]], version=4)
    assert there(memory, entries) == [[0, 1, 0, 1], [0, 0, 1, 0]]


def test_tensors_lose_a_share_of_what_each_has_left():
    """Of 8 and of 4 entries, .5 go each time; a gradient brings all of the second tensor back in between.

    Then of 4 and of 4 two are left each: of the first a quarter of all, of the second a half.
    """
    layout = Layout.of({"item": Axis(2, touched=True), "latent": Axis(4)}, item_embedding="item latent", weight="latent")
    layout = Layout(layout.axes, dict(layout.tensors) | {"weight": (1, ("latent",))})
    model = {"item_embedding": MODEL["item_embedding"], "weight": torch.tensor([[0.1, 0.2, 0.3, 0.4]])}
    entries, memory, left = Salient(keep=0.1, every=2, decrease=0.5, overhead=0.25), {}, []
    for version, second in ((2, 9.0), (4, 0.0)):
        memory, _ = entries.prepare(memory, model, layout, version)
        update = {"item_embedding": torch.zeros(2, 4), "weight": torch.full((1, 4), second)}
        memory = entries.learn(memory, model, layout, [None], lambda update=update: update)
        left.append({name: int(mask.sum()) for name, mask in group(memory, "mask").items()})
    assert left == [{"item_embedding": 4, "weight": 4}, {"item_embedding": 2, "weight": 2}]
    assert entries.facts(memory) == {"kept": 4 / 12}


def test_a_dense_round_starts_from_the_masked_model():
    """What had gone is at zero again, whatever it was when it went, or grew to in the last dense round."""
    entries = Salient(keep=0.1, every=2, decrease=0.5, overhead=0.25)
    memory = chosen(entries, {}, [[0.0] * 4] * 2)
    assert entries.prepare(memory, MODEL, LAYOUT, 3)[1] is MODEL, "served through its mask"
    memory, model = entries.prepare(memory, MODEL, LAYOUT, 4)
    assert model["item_embedding"].tolist() == pytest.approx(np.array([[0.0, -0.9, 0.0, 0.0], [-0.5, 0.0, 0.8, -0.4]]))
    assert torch.equal(model["item_bias"], MODEL["item_bias"])
    assert np.array_equal(memory["magnitude/item_embedding"], model["item_embedding"].abs().numpy())
    here = world(Strategy(entries=Salient(0.2, every=2, overhead=1.0)))
    here.rounds(4)
    masks = group(here.state.entries, "mask")
    asked = here.round().orders[0]
    assert not asked.submodel.entries and masks
    assert all(not asked.model[name][torch.from_numpy(~mask)].any() for name, mask in masks.items())


def test_between_reconfigurations_nothing_is_chosen():
    entries = Salient(every=3)
    memory, model = entries.prepare({}, MODEL, LAYOUT, 0)
    assert model is MODEL and entries.learn(memory, MODEL, LAYOUT, [None], lambda: pytest.fail("asked")) is memory
    memory, _ = entries.prepare(memory, MODEL, LAYOUT, 3)
    assert entries.learn(memory, MODEL, LAYOUT, [], lambda: pytest.fail("asked")) is memory, "nobody reported"


def test_the_decrease_halves():
    entries = Salient(keep=0.1, every=2, decrease=0.5, half_life=2.0, overhead=0.25)
    memory = chosen(entries, {}, [[0.0] * 4] * 2, version=2)  # .25 of 8 go, and nothing is worth adding
    assert entries.facts(memory) == {"kept": 6 / 8}


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (Lottery, {"keep": 0.0}, "keep is 0.0"),
        (Lottery, {"keep": 0.5, "step": 1.0}, "step is 1.0"),
        (Lottery, {"keep": 0.5, "every": 0}, "every 0"),
        (Lottery, {"keep": 0.5, "rewind": -1}, "rewind is -1"),
        (Lottery, {"keep": 0.5, "early": 1.0}, "early is 1.0"),
        (Feedback, {"keep": 1.5}, "keep is 1.5"),
        (Feedback, {"keep": 0.5, "ramp": -1}, "ramp -1"),
        (Feedback, {"keep": 0.5, "until": -1}, "until is -1"),
        (Feedback, {"keep": 0.5, "every": 0, "ramp": 4}, "ramp 4 needs more than one choice"),
        (Feedback, {"keep": 0.5, "every": 1, "ramp": 4, "until": 3}, "until must be at least 4"),
        (Feedback, {"keep": 0.5, "every": 3, "ramp": 4, "until": 5}, "last choice at version 3, .* until must be at least 6"),
        (Feedback, {"keep": 0.5, "through": 1}, "through is 1; it must be true or false"),
        (Salient, {"decrease": 1.0}, "decrease 1.0"),
        (Salient, {"half_life": 0.0}, "half_life 0.0 above 0"),
        (Salient, {"every": 0}, "every 0 must be at least 1"),
        (Salient, {"overhead": -0.5}, "overhead -0.5 not negative"),
    ],
)
def test_impossible_settings_are_refused(kind: type, settings: dict, text: str):
    with pytest.raises(ConfigError, match=text):
        kind(**settings)
