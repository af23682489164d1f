"""Merging reports of any submodels, in any order, stacked or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from reports import report
from world import close, same

from fedprune.axes import Axis, Layout
from fedprune.exchange import Report, Updates
from fedprune.merge import Adam, Average, Merge
from fedprune.submodel import Submodel, mask, positions
from fedprune.types import Tensors

QUICK = settings(max_examples=40, deadline=None)
ITEMS = 5
LAYOUT = Layout.of(
    {"item": Axis(ITEMS, touched=True), "latent": Axis(4), "hidden": Axis(3)},
    item_embedding="item latent",
    item_bias="item",
    weight="hidden latent+latent",
    bias="hidden",
    output="1 latent+hidden",
)
MODEL: Tensors = {name: torch.randn(LAYOUT.shape(name), generator=torch.Generator().manual_seed(1)) for name in LAYOUT.tensors}


@some.composite
def stacks(draw: some.DrawFn) -> list[Report]:
    """One to three stacks of one to three clients each; the clients of a stack hold the same units, and train some.

    Entries are masked in some stacks, client by client; with `through` their updates travel all the same.
    """
    chance = np.random.default_rng(draw(some.integers(0, 2**31)))
    reports: list[Report] = []
    for _ in range(draw(some.integers(1, 3))):
        clients, rows = draw(some.integers(1, 3)), draw(some.integers(1, ITEMS))
        held = {name: some_of(chance, np.arange(axis.size)) for name, axis in LAYOUT.prunable.items()}
        windows, masks = draw(some.booleans()), draw(some.sampled_from(["none", "one", "each"]))
        through, shared = draw(some.booleans()), some_entries(chance)
        submodels = tuple(
            replace(
                Submodel.checked(LAYOUT, held, {a: some_of(chance, u) for a, u in held.items()} if windows else None),
                entries={"none": {}, "one": shared, "each": some_entries(chance)}[masks],
                through=through and masks != "none",
            )
            for _ in range(clients)
        )
        items = torch.stack([torch.from_numpy(chance.permutation(ITEMS)[:rows]) for _ in range(clients)])
        present = torch.arange(rows) < torch.from_numpy(chance.integers(1, rows + 1, clients))[:, None]
        tensors = {}
        for name, dimensions in LAYOUT.tensors.items():
            touched = LAYOUT.kind(name) == "touched"
            inner = dimensions[1:] if touched else dimensions
            shape = [clients, *([rows] if touched else []), *(len(positions(LAYOUT, d, held)) for d in inner)]
            delta = torch.from_numpy(chance.normal(size=shape)).float()
            for place, submodel in enumerate(submodels):
                for axis, dimension in enumerate(inner, start=1 if touched else 0):
                    on = mask(LAYOUT, dimension, submodel.trained)[positions(LAYOUT, dimension, held)]
                    on_shape = [1] * (delta.dim() - 1)
                    on_shape[axis] = len(on)
                    delta[place] *= on.reshape(on_shape)
                if name in submodel.entries and not submodel.through:
                    mesh = [positions(LAYOUT, d, held) for d in dimensions]
                    if touched:
                        mesh[0] = items[place]
                    delta[place] *= torch.from_numpy(submodel.entries[name])[torch.meshgrid(*mesh, indexing="ij")]
            if touched:
                delta *= present.reshape(clients, rows, *[1] * (delta.dim() - 2))
            tensors[name] = delta
        updates = Updates(submodels, items, present, tensors)
        for place in range(clients):
            kwargs = {"examples": int(chance.integers(1, 9)), "staleness": int(chance.integers(0, 3))}
            reports.append(report(updates, place, ticket=len(reports), rate=float(chance.uniform(0.2, 1)), **kwargs))
    return reports


def some_of(chance: np.random.Generator, units: np.ndarray) -> np.ndarray:
    return np.sort(chance.choice(units, size=chance.integers(1, len(units) + 1), replace=False))


def some_entries(chance: np.random.Generator) -> dict[str, np.ndarray]:
    """Masks of some tensors, biases among them."""
    names = chance.permutation(list(LAYOUT.tensors))[: chance.integers(1, len(LAYOUT.tensors) + 1)].tolist()
    return {name: chance.random(LAYOUT.shape(name)) < chance.choice([0.0, 0.3, 0.8, 1.0]) for name in names}


merges = some.builds(
    Merge,
    over=some.sampled_from(["holders", "cohort", "common"]),
    weights=some.sampled_from(["equal", "examples", "period", "coverage"]),
    optimiser=some.sampled_from([Average(), Average(0.5), Adam()]),
)


def dense(sent: Report) -> Tensors:
    """A report's update in the full model's shape, zero elsewhere."""
    result = {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}
    rows = sent.updates.rows[sent.position]
    for name, stacked in sent.updates.tensors.items():
        mesh = [positions(LAYOUT, d, sent.order.submodel.held) for d in LAYOUT.tensors[name]]
        if LAYOUT.kind(name) == "touched":
            mesh[0] = rows
        result[name][torch.meshgrid(*mesh, indexing="ij")] = stacked[sent.position]
    return result


def trained(sent: Report) -> Tensors:
    """1.0 where a report's client trained."""
    result = {}
    there = torch.zeros(ITEMS)
    there[sent.updates.rows[sent.position][sent.updates.present[sent.position]]] = 1.0
    for name, dimensions in LAYOUT.tensors.items():
        on = torch.ones(())
        for dimension in dimensions:
            on = on[..., None] * (there if dimension == ("item",) else mask(LAYOUT, dimension, sent.order.submodel.trained))
        masks = {} if sent.order.submodel.through else sent.order.submodel.entries
        result[name] = on * torch.from_numpy(masks[name]) if name in masks else on
    return result


def counted(merge: Merge, sent: Report, name: str) -> float:
    """w_k, coverage being counted entry by entry, as if every row were there."""
    match merge.weights:
        case "examples":
            return sent.examples
        case "period":
            return 1 + sent.staleness
        case "coverage":
            everywhere = replace(sent.updates, rows=torch.arange(ITEMS)[None], present=torch.ones(1, ITEMS).bool())
            on = trained(replace(sent, updates=everywhere, position=0))[name]
            return on.numel() / float(on.sum()) if on.any() else 1.0
    return 1.0


@QUICK
@given(stacks(), merges, some.randoms(use_true_random=False))
def test_the_order_of_reports_does_not_matter_to_a_bit(reports: list[Report], merge: Merge, chance):
    shuffled = list(reports)
    chance.shuffle(shuffled)
    one, memory = merge(MODEL, {}, LAYOUT, reports)
    other, again = merge(MODEL, {}, LAYOUT, shuffled)
    assert same(one, other) and same(memory, again)


@QUICK
@given(stacks(), merges)
def test_equals_the_definition(reports: list[Report], merge: Merge):
    """mean_j = sum_k w_k m_kj d_kj / sum_k w_k m_kj (or / sum_k w_k), one client and coordinate at a time."""
    merged, _ = Merge(merge.over, merge.weights)(MODEL, {}, LAYOUT, reports)
    updates, masks = [dense(sent) for sent in reports], [trained(sent) for sent in reports]
    for name, tensor in MODEL.items():
        weight = [counted(merge, sent, name) for sent in reports]
        total = sum(w * update[name] for w, update in zip(weight, updates, strict=True))
        holders = sum(w * on[name] for w, on in zip(weight, masks, strict=True))
        count = torch.full_like(holders, sum(weight)) if merge.over == "cohort" else holders
        if merge.over == "common":  # whoever had the row trained it, one coordinate and client at a time
            for at in np.ndindex(*tensor.shape):
                had = [k for k, sent in enumerate(reports) if LAYOUT.kind(name) != "touched" or at[0] in rows_of(sent)]
                if not all(masks[k][name][at] > 0 for k in had):
                    holders[at] = 0
        expected = tensor + torch.where(holders > 0, total / count.clamp(min=1e-9), 0.0)
        torch.testing.assert_close(merged[name], expected, atol=1e-5, rtol=1e-5)


def rows_of(sent: Report) -> list[int]:
    return sent.updates.rows[sent.position][sent.updates.present[sent.position]].tolist()


@QUICK
@given(stacks(), some.sampled_from(["equal", "examples", "period", "coverage"]))
def test_the_cohort_conserves_mass(reports: list[Report], weights: str):
    """What the model gains, times all the weight, is what the clients sent."""
    merge = Merge(over="cohort", weights=weights)
    merged, _ = merge(MODEL, {}, LAYOUT, reports)
    for name, tensor in MODEL.items():
        weight = [merge.weight(sent, LAYOUT, name) for sent in reports]
        sent = sum(w * float(dense(r)[name].double().sum()) for w, r in zip(weight, reports, strict=True))
        gained = float((merged[name] - tensor).double().sum()) * sum(weight)
        assert abs(gained - sent) < 1e-4 * (1 + sum(weight))


@QUICK
@given(stacks(), merges)
def test_stacked_or_alone_is_the_same(reports: list[Report], merge: Merge):
    apart = []
    for sent in reports:
        part = slice(sent.position, sent.position + 1)
        updates = Updates(
            sent.updates.submodels[part],
            sent.updates.rows[part],
            sent.updates.present[part],
            {name: tensor[part] for name, tensor in sent.updates.tensors.items()},
        )
        kwargs = {"rate": sent.order.rate, "examples": sent.examples, "staleness": sent.staleness}
        apart.append(report(updates, 0, ticket=sent.order.ticket, **kwargs))
    plain = Merge(merge.over, merge.weights)
    assert close(plain(MODEL, {}, LAYOUT, reports)[0], plain(MODEL, {}, LAYOUT, apart)[0])


@QUICK
@given(stacks(), merges)
def test_what_nobody_trained_stays_to_a_bit(reports: list[Report], merge: Merge):
    merged, _ = merge(MODEL, {}, LAYOUT, reports)
    for name, tensor in MODEL.items():
        untouched = sum(trained(sent)[name] for sent in reports) == 0
        assert torch.equal(merged[name][untouched], tensor[untouched])
