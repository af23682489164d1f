"""Teachers at work on clients: lists, lessons, gates and narrower selves, against brute force and autograd by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from world import ITEMS, USERS, World, louder, order, same, train, world

from fedprune.data import silos
from fedprune.distill import Distillation
from fedprune.errors import FleetError
from fedprune.exchange import Report
from fedprune.objective import Objective
from fedprune.pruning import Leading
from fedprune.submodel import Submodel
from fedprune.teaching import Teacher, gates
from fedprune.types import Tensors

CLIENT = 5


def one(here: World, submodel: Submodel | None = None, client: int = CLIENT, **objective: Any) -> Report:
    here.fleet.send([order(here, client, 0, submodel=submodel, lr=0.3, **objective)])
    report = here.fleet.next()
    assert isinstance(report, Report)
    return report


def updates(report: Report) -> Tensors:
    return {name: tensor[report.position] for name, tensor in report.updates.tensors.items()}


def scores_of(here: World, user: int) -> torch.Tensor:
    """Of the whole catalogue, as the definition says."""
    stacked = {name: tensor[None] for name, tensor in here.state.model.items()}
    own = {name: rows[user][None, None] for name, rows in here.private.items()}
    return here.fleet.recommender.score(stacked | own)[0]


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silo", [False, True])
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_lists_are_the_teachers_best_unseen_items(model: str, silo: bool):
    owner = silos(train(), 5, by="quantity", seed=3) if silo else np.arange(USERS)
    here = louder(world(model=model, client_of_user=owner))
    population, top = here.population, 6
    objective = Objective(negatives=1, distillation=Distillation(weight=0.5, top=top))
    teacher = Teacher(here.fleet.recommender, here.state.model, here.private, Submodel.full(here.state.layout))
    clients = list(range(population.clients))
    plain = population.draw(clients, clients, objective, 1)
    drawn = population.draw(clients, clients, objective, 1, lister=teacher.lister(top))
    ids = drawn.rows if drawn.item_at is None else drawn.rows.gather(1, drawn.item_at)
    owners = torch.zeros_like(ids) if drawn.user_at is None else drawn.user_at
    assert torch.equal(drawn.count, plain.count), "listed items are no examples of the task"
    for client in clients:
        for place in range(len(population.users_of[client])):
            user, mine = int(drawn.users[client, place]), owners[client] == place
            own = set(ids[client, mine & drawn.weight[client].bool()].tolist())
            ranked = {int(r): int(i) for i, r in zip(ids[client], drawn.rank[client] * mine, strict=True) if r > 0}
            listed = [ranked[rank] for rank in sorted(ranked)]
            assert own >= set(train().items_of(user).tolist()) and not own & set(listed)
            score = scores_of(here, user).tolist()
            best = sorted(set(range(ITEMS)) - own, key=lambda item: -score[item])
            assert sorted(ranked) == list(range(1, 1 + min(top, len(best))))
            assert listed == best[:top]


def test_lists_are_shorter_where_little_is_left():
    here = louder(world())
    objective = Objective(negatives=4, distillation=Distillation(weight=0.5, top=20))
    teacher = Teacher(here.fleet.recommender, here.state.model, here.private, Submodel.full(here.state.layout))
    drawn = here.population.draw([9], [0], objective, 1, lister=teacher.lister(20))
    left = ITEMS - int(drawn.count[0])
    assert left < 20 and int((drawn.rank > 0).sum()) == left
    assert int(drawn.present.sum()) == ITEMS and set(drawn.rows[0][drawn.present[0]].tolist()) == set(range(ITEMS))


def test_who_is_on_a_list_has_no_label():
    """With weight 0 and nothing learned from the list, a list changes no update of a client's own examples."""
    plain, listed = one(louder(world())), one(louder(world()), distillation=Distillation(top=3))
    count = plain.examples
    assert listed.examples == count and listed.loss == plain.loss
    own, other = updates(plain)["item_embedding"], updates(listed)["item_embedding"]
    torch.testing.assert_close(own, other[:count])
    assert other.shape[0] == count + 3 and not other[count:].any()


# ---- a teacher that says what one knows --------------------------------------------------------------------------------

EVERY_TERM = {"weight": 1.0, "attention": 0.5, "relation": 0.5}


@pytest.mark.parametrize("term", sorted(EVERY_TERM))
@pytest.mark.parametrize("teacher", ["local", "sent", "past"])
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_a_model_learns_nothing_from_itself(model: str, teacher: str, term: str):
    """At full width the first step's gradient is the task's alone, times 1 - weight: for "past" at any width."""
    submodel = Leading().carve({}, louder(world(model=model)).state.layout, 0, 0, 0.5 if teacher == "past" else 1.0)
    given = {"lr_private": 1e-12, "private_steps": 1}  # the first step of what is shared is the only one
    plain = updates(one(louder(world(model=model)), submodel, **given))
    taught = Distillation(teacher, **{term: EVERY_TERM[term]})
    got = updates(one(louder(world(model=model)), submodel, distillation=taught, **given))
    for name, update in got.items():
        expected = torch.zeros_like(update) if term == "weight" else plain[name]
        torch.testing.assert_close(update, expected, atol=3e-5, rtol=1e-4)
    assert all(tensor.any() for tensor in plain.values())


def test_a_narrow_student_learns_from_the_whole_model():
    """One step against autograd by hand: scores of the full model with the full private row, T = 2."""
    here = louder(world(fleet="serial"))
    layout, what = here.state.layout, here.fleet.recommender
    submodel = Leading().carve({}, layout, 0, 0, 0.5)
    drawn = here.population.draw([CLIENT], [0], Objective(), here.state.seed)
    rows, label = drawn.rows[0], drawn.label[0]
    theirs = scores_of(here, CLIENT)[rows]
    leaf = here.state.model["item_embedding"][rows][:, :4].clone().requires_grad_()
    own = here.private["user_embedding"][CLIENT, :4]
    score = leaf @ own + here.state.model["item_bias"][rows]
    task = torch.nn.functional.binary_cross_entropy_with_logits(score, label, reduction="sum")
    p, q = torch.sigmoid(theirs / 2), torch.sigmoid(score / 2)
    soft = -4 * (p * q.log() + (1 - p) * (1 - q).log()).sum()
    (0.4 * task + 0.6 * soft).backward()
    got = one(here, submodel, distillation=Distillation("local", 0.6, 2.0))
    torch.testing.assert_close(updates(got)["item_embedding"], -0.3 * leaf.grad, atol=1e-5, rtol=1e-4)
    assert what.layout is layout


def test_a_teacher_from_elsewhere_must_be_there():
    here = world()
    with pytest.raises(FleetError, match="nobody gave one"):
        one(here, distillation=Distillation("given", 0.5))
    here = louder(world())
    here.population.teacher = ({n: t.clone() for n, t in here.state.model.items()}, dict(here.private))
    given = updates(one(here, distillation=Distillation("given", 0.5)))
    assert same(given, updates(one(louder(world()), distillation=Distillation("local", 0.5))))


# ---- one's narrower self ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_the_narrower_self_learns_the_wider_ones_scores(model: str):
    """nested * CE(sigmoid(s), sigmoid(s_narrow)) with s held fixed, the narrow one being the leading .25 of each axis held."""
    here = louder(world(fleet="serial", model=model))
    layout, what = here.state.layout, here.fleet.recommender
    drawn = here.population.draw([CLIENT], [0], Objective(), here.state.seed)
    rows, label = drawn.rows[0], drawn.label[0]
    touched = [name for name in here.state.model if layout.kind(name) == "touched"]
    leaves = {n: (t[rows] if n in touched else t).clone().requires_grad_() for n, t in here.state.model.items()}
    own = {name: tensor[CLIENT][None, None] for name, tensor in here.private.items()}

    def narrow(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Sliced by hand, to 2 of 8, 4 of 16, 2 of 8."""
        match name:
            case "item_embedding" | "user_embedding" | "item_tower" | "user_tower":
                return tensor[..., :2]
            case "hidden1_weight":
                return torch.cat([tensor[..., :4, :2], tensor[..., :4, 8:10]], -1)
            case "hidden1_bias":
                return tensor[..., :4]
            case "hidden2_weight":
                return tensor[..., :2, :4]
            case "hidden2_bias":
                return tensor[..., :2]
            case "output_weight":
                return torch.cat([tensor[..., :2], tensor[..., 8:10]], -1)
            case _:
                return tensor

    stacked = {n: t[None] for n, t in leaves.items()} | own
    wide = what.score(stacked)[0]
    slim = what.score({n: narrow(n, t) for n, t in stacked.items()})[0]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    (bce(wide, label, reduction="sum") + 0.7 * bce(slim, torch.sigmoid(wide.detach()), reduction="sum")).backward()
    got = updates(one(here, nested=0.7, narrower=0.25))
    plain = updates(one(louder(world(fleet="serial", model=model))))
    for name, leaf in leaves.items():
        gradient = leaf.grad if name in touched else leaf.grad / len(rows)
        torch.testing.assert_close(got[name], -0.3 * gradient, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got["item_embedding"][:, :2], plain["item_embedding"][:, :2], atol=1e-3)


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silo", [False, True])
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_gates_count_who_is_outscored(model: str, silo: bool):
    """Per client: pairs of a user's held-out item and one of the user's drawn negatives, won, or tied for half."""
    owner = silos(train(), 5, by="quantity", seed=3) if silo else np.arange(USERS)
    here = louder(world(model=model, client_of_user=owner))
    here.population.held_out = here.population.held_out.copy()
    here.population.held_out[[3, 4]] = -1
    layout = here.state.layout
    if model == "mf":  # whole scores, so that many tie
        here.state = replace(here.state, model={n: t.round() for n, t in here.state.model.items()})
        for rows in here.population.private.values.values():
            rows.round_()
    clients = list(range(here.population.clients))
    for client in clients:
        here.fleet.send([order(here, client, client, gate=True)])
    reports = {}
    while (report := here.fleet.next()) is not None:
        reports[report.order.client] = report
    before = louder(world(model=model, client_of_user=owner))
    before.state = here.state
    if model == "mf":
        for rows in before.population.private.values.values():
            rows.round_()
    ties = 0
    for client in clients:
        drawn = before.population.draw([client], [client], Objective(), before.state.seed)
        ids = drawn.rows if drawn.item_at is None else drawn.rows.gather(1, drawn.item_at)
        owners = torch.zeros_like(ids) if drawn.user_at is None else drawn.user_at
        won, pairs = 0.0, 0
        for place, user in enumerate(here.population.users_of[client]):
            held = int(here.population.held_out[user])
            if held < 0:
                continue
            score = scores_of(before, int(user))
            negative = (owners[0] == place) & drawn.weight[0].bool() & (drawn.label[0] == 0)
            for item in ids[0, negative].tolist():
                if item != held:
                    won += 1.0 if score[held] > score[item] else 0.5 if score[held] == score[item] else 0.0
                    ties += int(score[held] == score[item])
                    pairs += 1
        if pairs:
            assert reports[client].gate == pytest.approx(won / pairs, abs=1e-6)
        else:
            assert np.isnan(reports[client].gate)
    assert ties > 20 or model != "mf"
    assert layout is here.state.layout and len(reports) == len(clients)


def test_a_gate_judges_what_was_received_and_changes_nothing():
    """Through the client's own mask and width; training is the same without it."""
    here = louder(world())
    layout = here.state.layout
    narrow = Leading().carve({}, layout, 0, 0, 0.5)
    blind = replace(narrow, entries={"item_embedding": np.zeros((ITEMS, 8), bool)})
    got = {}
    for name, submodel in {"whole": Submodel.full(layout), "narrow": narrow, "blind": blind}.items():
        for gate in (True, False):
            report = one(louder(world()), submodel, gate=gate)
            got[name, gate] = report
        assert same(updates(got[name, True]), updates(got[name, False])) and got[name, False].gate is None
    assert got["whole", True].gate != got["narrow", True].gate
    bias = here.state.model["item_bias"]
    drawn = here.population.draw([CLIENT], [0], Objective(), here.state.seed)
    negatives = drawn.rows[0][(drawn.label[0] == 0) & (drawn.rows[0] != int(here.population.held_out[CLIENT]))]
    won = (bias[int(here.population.held_out[CLIENT])] > bias[negatives]).float().mean()
    assert got["blind", True].gate == pytest.approx(float(won)), "nothing but biases is left"


def test_ratings_are_no_negatives():
    here = louder(world())
    drawn = here.population.draw([CLIENT], [0], Objective(), 1)
    rated = replace(drawn, label=torch.where(drawn.label > 0, 4.0, 3.0))
    whole = Submodel.full(here.state.layout)
    model = {n: t[drawn.rows] for n, t in here.state.model.items()}
    own = {n: t[drawn.users] for n, t in here.private.items()}
    judged = [
        gates(here.fleet.recommender, here.population, [whole], here.state.model, model, own, examples)
        for examples in (drawn, rated)
    ]
    assert 0 <= float(judged[0]) <= 1 and bool(judged[1].isnan())
