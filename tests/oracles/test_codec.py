"""What a codec does to a model on its way down and to updates on their way up: bytes, errors and chances by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reports import report
from world import ITEMS, USERS, World, copied, louder, order, recommender, same, silos_of_three, world

from fedprune.axes import Axis, Layout
from fedprune.codec import Codec, sizes
from fedprune.distill import Distillation
from fedprune.errors import ConfigError
from fedprune.exchange import Order, Updates
from fedprune.fleet.trainer import CUTS, Result, Stacked, cut_here, once_each, one_by_one
from fedprune.merge import Merge
from fedprune.precision import codes, decoded, nearest, stochastic
from fedprune.strategy import Strategy
from fedprune.submodel import Submodel, extract, scatter
from fedprune.thinning import chances, thinned

AXES = {"item": Axis(50, touched=True), "latent": Axis(6), "hidden": Axis(4)}
LAYOUT = Layout.of(AXES, rows="item latent", bias="item", tower="hidden latent", shift="hidden")
INT8 = Codec(precision="int8")
TICKETS = range(20_000)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "down", "up"),
    [
        (Codec(), 4 * (50 * 7 + 28), 4 * (50 * 7 + 28)),
        (INT8, 50 * (6 + 2 + 2) + 4 * (6 + 2 + 2), 50 * (6 + 2 + 2) + 4 * (6 + 2 + 2)),
        (Codec("touched", sampled=0.3), 4 * (50 * 7 + 28), 4 * (15 * 7 + 28)),
        (Codec("touched", "int8", 0.3), 50 * 10 + 4 * 10, 15 * 10 + 4 * 10),
    ],
)
def test_bytes_of_a_whole_model(codec: Codec, down: int, up: int):
    got = sizes(LAYOUT, Submodel.full(LAYOUT), 50, codec)
    assert (got.down, got.up, got.masks, got.parameters) == (down, up, 0, 50 * 7 + 28)


def test_bytes_of_a_window_and_of_a_mask():
    window = Submodel(Submodel.full(LAYOUT).held, {"latent": np.arange(2), "hidden": np.arange(1, 4)})
    got = sizes(LAYOUT, window, 10, INT8)
    assert got.down == 10 * (6 + 2 + 2) + 4 * (6 + 2 + 2)
    assert got.up == 10 * (2 + 2 + 2) + 3 * (2 + 2 + 2), "two columns and their scale, and three rows of the tower"
    some = np.zeros((50, 6), bool)
    some[:, :2] = True
    tower = np.zeros((4, 6), bool)
    tower[0, 0] = True
    masked = replace(Submodel.full(LAYOUT), entries={"rows": some, "tower": tower})
    got = sizes(LAYOUT, masked, 10, INT8)
    assert got.masks == math.ceil((10 * 6 + 24) / 8), "one bit per entry that may be missing"
    assert got.up == 10 * (2 + 2 + 2) + (1 + 4 * 2) + 4 * 2, "a row without entries has a scale all the same"
    assert got.down == got.up + got.masks


def test_a_quarter_of_the_bytes_and_a_little():
    layout = recommender("mf").layout
    whole = Submodel.full(layout)
    ratio = sizes(layout, whole, ITEMS).up / sizes(layout, whole, ITEMS, INT8).up
    assert ratio == pytest.approx(4 * 9 / (8 + 2 + 2))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"sampled": 0.0, "rows": "touched"}, r"sampled is 0.0; it is a share in \(0, 1\]"),
        ({"sampled": 1.5, "rows": "touched"}, r"sampled is 1.5; it is a share in \(0, 1\]"),
        ({"sampled": math.nan, "rows": "touched"}, "sampled is nan"),
        ({"sampled": 0.5}, 'rows "table" moves all there are; set rows to "touched", or sampled to 1'),
        ({"precision": "int4"}, 'precision "int4"; it is float32 or int8'),
        ({"rows": "some"}, 'rows "some"; it is table or touched'),
    ],
)
def test_what_a_codec_cannot_be(wrong: dict, why: str):
    with pytest.raises(ConfigError, match=why):
        Codec(**wrong)


# ---- down ------------------------------------------------------------------------------------------------------------


def test_rounding_by_hand():
    layout = Layout.of({"item": Axis(3, touched=True), "latent": Axis(3)}, rows="item latent", bias="item")
    rows = torch.tensor([[127.0, -1.4, 0.6], [0.0, 0.0, 0.0], [0.0, 254.0, -3.1]])
    got = nearest(layout, {"rows": rows, "bias": torch.tensor([1.0, 1.0 + 2**-10, 2**-25])})
    scales = got.scales["rows"]
    assert scales.dtype == torch.float16 and [float(s) for s in scales] == [1 + 2**-10, 0.0, 2 * (1 + 2**-10)]
    assert codes(got.tensors["rows"], scales).tolist() == [[127, -1, 1], [0, 0, 0], [0, 127, -2]]
    assert got.tensors["rows"][0].tolist() == pytest.approx([127 * (1 + 2**-10), -1 - 2**-10, 1 + 2**-10], abs=0)
    assert got.tensors["bias"].tolist() == [1.0, 1.0 + 2**-10, 0.0]


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-5, 1.0, 1e4])
def test_the_error_is_half_a_step_and_steps_are_small(size: float):
    model = {name: size * drawn(1, *LAYOUT.shape(name)) for name in LAYOUT.tensors}
    got = nearest(LAYOUT, model)
    for name, scales in got.scales.items():
        step, largest = scales.float()[:, None], model[name].abs().amax(1, keepdim=True)
        assert bool(((got.tensors[name] - model[name]).abs() <= step * 0.5 * (1 + 1e-5) + 1e-37).all())
        assert bool((127 * step >= largest).all()) and bool((step <= largest / 127 * (1 + 2**-9) + 2**-24).all())
        whole = codes(got.tensors[name], scales)
        assert whole.abs().max() <= 127 and same({"x": decoded(whole, scales)}, {"x": got.tensors[name]})
    for name in ("bias", "shift"):
        assert bool(((got.tensors[name] - model[name]).abs() <= model[name].abs() * 2**-11 + 2**-25).all())


def test_what_has_diverged_stays_visible():
    model = {name: drawn(1, *LAYOUT.shape(name)) for name in LAYOUT.tensors}
    model["rows"][3, 2], model["rows"][4, 1], model["bias"][5], model["shift"][1] = math.nan, math.inf, math.nan, math.inf
    for got in (
        nearest(LAYOUT, model).tensors,
        {n: t[0] for n, t in stochastic(LAYOUT, _stacked(model, 1), torch.arange(50)[None], 1, [0]).tensors.items()},
    ):
        assert not got["rows"][3].isfinite().any() and not got["rows"][4].isfinite().all()
        assert not got["bias"][5].isfinite() and not got["shift"][1].isfinite()
        assert got["rows"][:3].isfinite().all() and got["tower"].isfinite().all()


# ---- up --------------------------------------------------------------------------------------------------------------


def _stacked(update: dict, clients: int) -> dict:
    return {name: tensor.expand(clients, *tensor.shape).clone() for name, tensor in update.items()}


def small_update(size: float = 1.0) -> tuple[dict, torch.Tensor]:
    """Four item rows and all that is shared, with zeros."""
    update = {"rows": drawn(1, 4, 6), "bias": drawn(2, 4), "tower": drawn(3, 4, 6), "shift": drawn(4, 4)}
    update["rows"][1] = 0.0
    update["rows"][2, 3:] = 0.0
    update["tower"][:, 2] = 0.0
    update["shift"][0] = 0.0
    return {name: size * tensor for name, tensor in update.items()}, torch.tensor([[7, 49, 0, 3]])


def is_mean(many: torch.Tensor, of: torch.Tensor, spread: torch.Tensor | float) -> bool:
    """Whether the mean over clients is `of`, within five standard errors of draws that lie `spread` apart."""
    error = (many.double().mean(0) - of.double()).abs()
    return bool((error <= 5 * 0.5 * spread / len(many) ** 0.5 + 1e-12 * of.abs().max()).all())


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0])
def test_rounding_up_is_unbiased_and_within_a_step(size: float):
    update, rows = small_update(size)
    many = stochastic(LAYOUT, _stacked(update, len(TICKETS)), rows.expand(len(TICKETS), -1), 1, TICKETS)
    for name in ("rows", "tower"):
        step = many.scales[name][0].float()[:, None]
        assert is_mean(many.tensors[name], update[name], step)
        assert bool(((many.tensors[name] - update[name]).abs() < step + 1e-37).all())
        assert bool((many.tensors[name].std(0)[update[name].abs() > 0.01 * step] > 0).any()), "nothing was drawn"
        assert not is_mean(many.tensors[name] + 0.05 * step, update[name], step), "the test would not see a bias"
    for name in ("bias", "shift"):
        step = torch.maximum(update[name].abs() * 2**-10, torch.tensor(2**-24))
        assert is_mean(many.tensors[name], update[name], step)
        assert bool(((many.tensors[name] - update[name]).abs() < step).all())
    for name, tensor in update.items():
        assert bool((many.tensors[name][:, tensor == 0] == 0).all()), "what was not trained is exactly zero"


def test_chance_is_of_seed_ticket_tensor_row_and_column():
    update, rows = small_update()
    whole = stochastic(LAYOUT, _stacked(update, 9), rows.expand(9, -1), 1, range(9)).tensors
    alone = [stochastic(LAYOUT, _stacked(update, 1), rows, 1, [ticket]).tensors for ticket in range(9)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([one[name] for one in alone]))
        assert not torch.equal(tensor[0], tensor[1])
    order_ = torch.tensor([2, 0, 3, 1])
    wide = {n: torch.cat([t[order_], t[:1] * 0]) if LAYOUT.kind(n) == "touched" else t for n, t in update.items()}
    padded = stochastic(LAYOUT, _stacked(wide, 1), torch.cat([rows[:, order_], rows[:, :1] * 0], 1), 1, [4]).tensors
    assert torch.equal(padded["rows"][0, :4], alone[4]["rows"][0][order_]) and not padded["rows"][0, 4].any()
    assert torch.equal(padded["bias"][0, :4], alone[4]["bias"][0][order_]) and torch.equal(padded["tower"], alone[4]["tower"])
    equal = {name: torch.full((1, *tensor.shape), 0.123) for name, tensor in update.items()}
    equal["rows"][..., 0], equal["tower"][..., 0] = 1.0, 1.0
    first = torch.arange(4)[None]  # item rows of the numbers that the tower's have
    got = stochastic(LAYOUT, copied(equal), first, 1, [0]).tensors
    assert not torch.equal(got["rows"], got["tower"]) and not torch.equal(got["rows"][0, 0], got["rows"][0, 1])
    assert not same(got, stochastic(LAYOUT, equal, first, 2, [0]).tensors)


# ---- fewer rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted", "chance"),
    [
        ([3.0, 1.0, 2.0], 1.5, [0.75, 0.25, 0.5]),
        ([1.0, 8.0, 1.0], 2.0, [0.5, 1.0, 0.5]),
        ([4.0, 8.0, 1.0, 1.0], 3.0, [1.0, 1.0, 0.5, 0.5]),
        ([2.0, 2.0], 2.0, [1.0, 1.0]),
        ([2.0, 1.0], 2.0, [1.0, 1.0]),
        ([2.0, 0.0, 1.0], 2.5, [1.0, 0.0, 1.0]),
        ([0.0, 0.0], 1.0, [0.0, 0.0]),
    ],
)
def test_chances_by_hand(size: list[float], wanted: float, chance: list[float]):
    padded = torch.tensor([[*size, 0.0, 0.0]], dtype=torch.float64)
    assert chances(padded, torch.tensor([wanted]))[0].tolist() == pytest.approx([*chance, 0.0, 0.0])


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_rows_that_go_up_make_up_for_the_others(share: float):
    update, rows = small_update()
    update["rows"][0] *= 9
    update["rows"][1] = 0.01
    padded = {n: torch.cat([t, 0 * t[:1]]) if LAYOUT.kind(n) == "touched" else t for n, t in update.items()}
    numbers, present = torch.cat([rows, torch.zeros(1, 1).long()], 1), torch.tensor([[True] * 4 + [False]])
    count = len(TICKETS)
    many = thinned(LAYOUT, _stacked(padded, count), numbers.expand(count, -1), present.expand(count, -1), share, 1, TICKETS)
    norm = (padded["rows"].square().sum(1) + padded["bias"] ** 2).sqrt()
    chance = chances(norm.double()[None], torch.tensor([share * 4]))[0]
    assert float(chance.sum()) == pytest.approx(4 * share)
    sent = (many["rows"] != 0).any(2)
    assert bool(((sent.float().mean(0) - chance).abs() <= 5 * 0.5 / count**0.5).all()) and not bool(sent[:, 4].any())
    spread = torch.where(chance > 0, 1 / chance, 0.0)
    assert is_mean(many["rows"], padded["rows"], 2 * spread[:, None] * padded["rows"].abs())
    assert is_mean(many["bias"], padded["bias"], 2 * spread * padded["bias"].abs())
    assert sent.float().mean(0)[:4].min() < 0.9 and torch.equal(many["tower"][5], update["tower"])
    assert torch.equal((many["bias"] != 0)[:, :4], sent[:, :4]), "a row goes up with all its tensors"
    both = thinned(
        LAYOUT, {n: t[:2].clone() for n, t in many.items()}, numbers.expand(2, -1), present.expand(2, -1), 1.0, 1, [0, 1]
    )
    assert torch.allclose(both["rows"], many["rows"][:2]), "a share of 1 changes nothing"
    alone = thinned(LAYOUT, _stacked(update, 1), rows, present[:, :4], share, 1, [11])
    assert torch.allclose(alone["rows"][0], many["rows"][11, :4]), "who stands beside it makes no difference"


def test_the_merge_expects_what_it_would_have_had():
    """The weighted mean over those who touched a row: its numerator keeps its expected value, its denominator all of them."""
    layout = Layout.of({"item": Axis(6, touched=True), "latent": Axis(2)}, rows="item latent")
    full, rows = Submodel.full(layout), torch.tensor([[0, 1, 2], [1, 2, 5]])
    update, present = {"rows": drawn(5, 2, 3, 2)}, torch.ones(2, 3, dtype=torch.bool)
    model, total, rounds = {"rows": torch.zeros(6, 2)}, torch.zeros(6, 2), 4000

    def mean(tensors: dict) -> tuple[torch.Tensor, torch.Tensor]:
        updates = Updates((full, full), rows, present, tensors)
        told = [report(updates, place, examples=3 + place) for place in range(2)]
        return Merge().means(model, layout, [replace(r, order=replace(r.order, ticket=t)) for t, r in enumerate(told)])["rows"]

    exact, held = mean(update)
    for number in range(rounds):
        rare = thinned(layout, copied(update), rows, present, 0.5, 1, [2 * number, 2 * number + 1])
        own = stochastic(layout, rare, rows, 1, [2 * number, 2 * number + 1]).tensors
        got, covered = mean(own)
        assert torch.equal(covered, held)
        total += got
    assert torch.allclose(total / rounds, exact, atol=0.08) and not torch.allclose(total / rounds * 0.8, exact, atol=0.08)


# ---- in a fleet ------------------------------------------------------------------------------------------------------


def half(here: World) -> Submodel:
    return Submodel({name: np.arange(axis.size // 2) for name, axis in here.state.layout.prunable.items()})


def window(here: World) -> Submodel:
    units = {name: np.arange(1, axis.size // 2) for name, axis in here.state.layout.prunable.items()}
    return Submodel(Submodel.full(here.state.layout).held, units)


def masked(here: World) -> Submodel:
    rng, layout = np.random.default_rng(3), here.state.layout
    return replace(window(here), entries={n: rng.random(layout.shape(n)) < 0.6 for n in layout.named("touched")})


def trained(here: World, orders: list[Order]) -> list[Result]:
    return one_by_one(here.fleet.recommender, here.population, orders, [1.0] * len(orders))


TEACHERS = {
    None: {},
    "local": {"distillation": Distillation("local", weight=0.5, top=3, ranking=0.1)},
    "sent": {"distillation": Distillation("sent", weight=0.5)},
    "past": {"distillation": Distillation("past", weight=0.5), "epochs": 2},
}


@pytest.mark.parametrize("silos", [None, silos_of_three()], ids=["users", "silos"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("cut", [half, window, masked])
def test_a_client_trains_from_what_it_received_and_reports_that_rounded(cut, teacher: str | None, silos):
    here = louder(world(model="neumf", client_of_user=silos))
    layout, submodel = here.state.layout, cut(here)
    plain = order(here, 2, 5, submodel=submodel, **TEACHERS[teacher])
    received = copied(here.state.model)
    if teacher in ("local", "sent"):
        received = nearest(layout, received).tensors
    else:  # what is not held has no part in the scales, nor does it matter what is there
        scatter(received, layout, submodel.units, nearest(layout, extract(received, layout, submodel.units)).tensors)
    assert not same(received, here.state.model)
    (exact,) = trained(here, [replace(plain, model=received)])
    (got,) = trained(here, [replace(plain, codec=INT8)])
    rounded = stochastic(layout, copied(exact.updates.tensors), exact.updates.rows, plain.seed, [5])
    assert same(rounded.tensors, dict(got.updates.tensors)) and same(rounded.scales, dict(got.updates.scales))
    assert not same(rounded.tensors, dict(exact.updates.tensors))
    (other,) = trained(here, [plain])
    assert not torch.equal(other.updates.tensors["item_tower"], exact.updates.tensors["item_tower"])
    for name, tensor in got.updates.tensors.items():
        assert bool((tensor[exact.updates.tensors[name] == 0] == 0).all()), "a window stays a window"


CODECS = [INT8, Codec("touched", "int8"), Codec("touched", sampled=0.5), Codec("touched", "int8", 0.5)]


@pytest.mark.parametrize("silos", [None, silos_of_three()], ids=["users", "silos"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("cut", [half, window, masked])
def test_stacking_makes_no_difference_but_where_a_draw_hangs_by_a_hair(codec: Codec, cut, silos):
    here = louder(world(model="mf", client_of_user=silos))
    clients = range(USERS if silos is None else 8)
    orders = [replace(order(here, n, 10 + n, submodel=cut(here)), codec=codec) for n in clients]
    alone = trained(here, orders)
    together = Stacked()(here.fleet.recommender, here.population, orders, [1.0] * len(orders))
    apart, entries = 0, 0
    for one, other in zip(alone, together, strict=True):
        present, own = other.updates.present[other.position], other.updates.tensors["item_embedding"][other.position]
        mine, theirs = one.updates.tensors["item_embedding"][0][one.updates.present[0]], own[present]
        assert mine.shape == theirs.shape and bool(mine.any())
        apart += int((~torch.isclose(mine, theirs, rtol=1e-3, atol=1e-6)).sum())
        entries += mine.numel()
    assert apart <= 0.01 * entries


@pytest.mark.parametrize("fleet", ["serial", "vector"])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_run_learns_with_every_codec(fleet: str, codec: Codec):
    plain, here = world(fleet=fleet), world(Strategy(codec=codec), fleet=fleet)
    loss = {}
    for name, one in (("plain", plain), ("here", here)):
        done = one.rounds(12)
        loss[name] = [float(np.mean([report.loss for report in each.reports])) for each in done]
    assert loss["here"][-1] < loss["here"][0] - 0.5 * (loss["plain"][0] - loss["plain"][-1])
    assert done[0].reports[0].cost.bytes_up < plain.round().reports[0].cost.bytes_up


def test_a_cut_is_made_once_for_orders_that_share_it():
    here = louder(world())
    made: list[Order] = []

    def cut(order: Order, layout: Layout) -> dict:
        made.append(order)
        return cut_here(order, layout)

    plain = [order(here, n, n) for n in range(6)]
    other = [replace(order(here, n, n, submodel=half(here)), codec=INT8) for n in range(6, 12)]
    taught = [replace(order(here, n, n, submodel=half(here), **TEACHERS["local"]), codec=INT8) for n in range(12, 18)]
    everything = [*plain, *other, *taught]
    one_by_one(here.fleet.recommender, here.population, everything, [1.0] * 18, cut)
    assert len(made) == 3
    once, layout = once_each(cut), here.state.layout
    made.clear()
    for width in [*range(1, CUTS + 2), 1, 1]:  # Axis latent has just as many widths: the ninth is the same as none
        held = {"latent": np.arange(width) if width <= 8 else np.arange(1, 8)}
        once(order(here, 0, 0, submodel=Submodel(held)), layout)
    assert len(made) == CUTS + 2, "the oldest is forgotten first"
