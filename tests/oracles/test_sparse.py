"""Sparse training: the penalty's gradient by hand and by autograd, and what a step makes of it, alone and stacked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from world import LATENT, World, close, louder, order, recommender, same, silos_of_three, world

from fedprune.axes import Axis, Layout
from fedprune.entries import KOfN
from fedprune.errors import ConfigError, LayoutError
from fedprune.exchange import Report
from fedprune.objective import Objective
from fedprune.sparse import held_widths, slope
from fedprune.strategy import Strategy
from fedprune.submodel import Submodel, positions
from fedprune.types import Tensors

CLIENT, LR, WEIGHT = 5, 0.3, 0.02


def penalty(layout: Layout, submodel: Submodel, model: Tensors, present: Tensor, by: str) -> Tensor:
    """Unit after unit, `[clients]`; what is no row of the client is left out."""
    real = {n: t if layout.kind(n) == "shared" else t * present.reshape(*present.shape, *[1] * (t.dim() - 2))
            for n, t in model.items()}  # fmt: skip
    if by == "entries":
        return sum((t.abs().flatten(1).sum(1) for t in real.values()), torch.zeros(len(present)))
    total = torch.zeros(len(present), dtype=next(iter(model.values())).dtype)
    for axis in layout.prunable:
        for unit in submodel.held[axis].tolist():
            squared = torch.zeros(len(present), dtype=total.dtype)
            for name, tensor in real.items():
                for place, dimension in enumerate(layout.tensors[name], start=1):
                    if isinstance(dimension, int) or axis not in dimension:
                        continue
                    held = positions(layout, dimension, submodel.held)
                    starts = np.cumsum([0, *(layout.axes[part].size for part in dimension)])
                    ours = [int(starts[i]) + unit for i, part in enumerate(dimension) if part == axis]
                    slots = torch.tensor([held.tolist().index(slot) for slot in ours])
                    squared = squared + tensor.index_select(place, slots).square().flatten(1).sum(1)
            total = total + squared.sqrt()
    return total


def drawn(layout: Layout, submodel: Submodel, clients: int, rows: int, kind: torch.dtype = torch.float64) -> Tensors:
    """Random stacked tensors at held widths."""
    chance, result = torch.Generator().manual_seed(3), {}
    for name in layout.named("touched", "shared"):
        shape = layout.shape(name, submodel.widths)
        shape = (clients, rows, *shape[1:]) if layout.kind(name) == "touched" else (clients, *shape)
        result[name] = torch.randn(shape, generator=chance, dtype=kind)
    return result


def some_units(layout: Layout) -> Submodel:
    rng = np.random.default_rng(2)
    return Submodel({a: np.sort(rng.choice(x.size, max(1, x.size // 2), replace=False)) for a, x in layout.prunable.items()})


def test_by_hand():
    """Two units, one row: (3, 4) and (0, -12) with weights (4, 5): norms 5 and 13."""
    layout = Layout.of(
        {"item": Axis(9, touched=True), "latent": Axis(2)}, embedding="item latent", weight="latent", bias="item"
    )
    model = {
        "embedding": torch.tensor([[[3.0, -12.0], [7.0, 7.0]]]),
        "weight": torch.tensor([[4.0, 5.0]]),
        "bias": torch.tensor([[2.0, 2.0]]),
    }
    present = torch.tensor([[True, False]])
    units = slope(layout, {"latent": 2}, model, present, "units")
    torch.testing.assert_close(units["embedding"], torch.tensor([[[3 / 5, -12 / 13], [0.0, 0.0]]]))
    torch.testing.assert_close(units["weight"], torch.tensor([[4 / 5, 5 / 13]]))
    assert (units["bias"] == 0).all(), "a bias belongs to no prunable unit"
    entries = slope(layout, {"latent": 2}, model, present, "entries")
    assert entries["embedding"].tolist() == [[[1.0, -1.0], [0.0, 0.0]]]
    assert entries["bias"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("by", ["units", "entries"])
@pytest.mark.parametrize("model", ["mf", "gmf", "mlp", "neumf"])
def test_autograd_and_finite_differences_agree(model: str, by: str):
    layout = recommender(model).layout
    submodel = some_units(layout)
    tensors = drawn(layout, submodel, 3, 6)
    present = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] + [False] * 5])
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    total = penalty(layout, submodel, leaves, present, by).sum()
    wanted = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = slope(layout, submodel.widths, tensors, present, by)
    for (name, tensor), expected in zip(tensors.items(), wanted, strict=True):
        torch.testing.assert_close(found[name], torch.zeros_like(tensor) if expected is None else expected)
    step = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype) for n, t in tensors.items()}
    up, down = ({n: t + sign * 1e-6 * step[n] for n, t in tensors.items()} for sign in (1, -1))
    difference = (penalty(layout, submodel, up, present, by) - penalty(layout, submodel, down, present, by)) / 2e-6
    expected = sum((found[n] * step[n]).flatten(1).sum(1) for n in tensors)
    torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-5)


def test_nothing_pulls_at_zero():
    layout = recommender("neumf").layout
    zero = {n: torch.zeros_like(t) for n, t in drawn(layout, Submodel.full(layout), 2, 3).items()}
    for by in ("units", "entries"):
        assert all((t == 0).all() for t in slope(layout, layout.full, zero, torch.ones(2, 3).bool(), by).values())


def test_widths_are_read_off_the_tensors():
    for model in ("mf", "gmf", "mlp", "neumf"):
        layout = recommender(model).layout
        submodel = some_units(layout)
        assert held_widths(layout, drawn(layout, submodel, 2, 3)) == submodel.widths
    axes = {"item": Axis(9, touched=True), "a": Axis(4), "b": Axis(3)}
    layout = Layout.of(axes, rows="item a+a", both="a+b+b")
    assert held_widths(layout, {"rows": torch.zeros(1, 2, 6), "both": torch.zeros(1, 7)}) == {"a": 3, "b": 2}
    with pytest.raises(LayoutError, match='axis "a"'):
        held_widths(Layout.of(axes, rows="item a+b"), {"rows": torch.zeros(1, 2, 6)})


def test_logits_are_left_out():
    here = world(Strategy(entries=KOfN(0.5)), fleet="serial")
    layout = here.state.layout
    stacked = {n: t[None] for n, t in here.state.model.items()}
    found = slope(layout, held_widths(layout, stacked), stacked, torch.ones(1, layout.items).bool(), "entries")
    assert set(stacked) - set(found) == {n for n in stacked if n.endswith("_logits")} != set()


def trained(here: World, clients: list[int], submodel: Submodel | None = None, **settings: object) -> dict[int, Report]:
    """One order each, in one go."""
    here.fleet.send([order(here, c, c, submodel=submodel, lr=LR, **settings) for c in clients])
    return {(report := here.fleet.next()).order.client: report for _ in clients}


def update(report: Report) -> Tensors:
    """Of its own rows alone."""
    layout, found = recommender(MODEL).layout, {}
    real = report.updates.present[report.position]
    for name, tensor in report.updates.tensors.items():
        own = tensor[report.position]
        found[name] = own[real] if layout.kind(name) == "touched" else own
    return found


MODEL = "neumf"
WINDOW = Submodel(
    Submodel.full(recommender(MODEL).layout).held,
    {axis: np.arange(0, size.size, 2) for axis, size in recommender(MODEL).layout.prunable.items()},
)


def masked(through: bool) -> Submodel:
    layout, rng = recommender(MODEL).layout, np.random.default_rng(4)
    names = [name for name in layout.named("shared", "touched") if len(layout.tensors[name]) > 1]
    return Submodel(Submodel.full(layout).held, {}, {n: rng.random(layout.shape(n)) < 0.5 for n in names}, through)


@pytest.mark.parametrize("by", ["units", "entries"])
@pytest.mark.parametrize("submodel", [None, WINDOW, masked(False), masked(True)], ids=["whole", "window", "masked", "through"])
def test_a_step_adds_the_penaltys_gradient(submodel: Submodel | None, by: str):
    """In the first of them: -lr * sparse * slope at what was received, on trained entries alone."""
    plain, sparse = (louder(world(fleet="serial", model=MODEL)) for _ in range(2))
    one = update(trained(plain, [CLIENT], submodel)[CLIENT])
    report = trained(sparse, [CLIENT], submodel, sparse=WEIGHT, sparse_by=by)[CLIENT]
    other, what = update(report), submodel or Submodel.full(plain.state.layout)
    layout, rows, received = plain.state.layout, report.updates.rows[0], {}
    for name, tensor in plain.state.model.items():
        there = tensor * torch.from_numpy(what.entries[name]) if name in what.entries else tensor
        received[name] = (there[rows] if layout.kind(name) == "touched" else there)[None]
    pull = slope(layout, layout.full, received, torch.ones(1, len(rows)).bool(), by)
    for name, moved in other.items():
        still = torch.zeros(moved.shape, dtype=torch.bool)
        if submodel is WINDOW:
            for place, dimension in enumerate(layout.tensors[name]):
                if place or layout.kind(name) == "shared":
                    inside = torch.isin(positions(layout, dimension, what.held), positions(layout, dimension, what.trained))
                    still |= ~inside.reshape(*[1] * place, -1, *[1] * (moved.dim() - place - 1))
        expected = torch.where(still, torch.zeros(()), one[name] - LR * WEIGHT * pull[name][0])
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-4)
        if submodel is not None and not what.through:
            assert (moved[still] == 0).all()


@pytest.mark.parametrize("by", ["units", "entries"])
@pytest.mark.parametrize("submodel", [None, WINDOW, masked(False)], ids=["whole", "window", "masked"])
@pytest.mark.parametrize("silos", [False, True])
def test_stacked_as_alone(silos: bool, submodel: Submodel | None, by: str):
    """Whoever else is there, however many steps, with minibatches of which some clients run out first."""
    own = silos_of_three() if silos else None
    settings = {"sparse": WEIGHT, "sparse_by": by, "epochs": 2, "batch": 16, "proximal": 0.1}
    alone, stacked = (louder(world(fleet=f, model=MODEL, client_of_user=own)) for f in ("serial", "vector"))
    clients = list(range(alone.population.clients))
    one, other = (trained(here, clients, submodel, **settings) for here in (alone, stacked))
    assert len({id(report.updates) for report in other.values()}) < len(clients)
    for client in clients:
        assert close(update(one[client]), update(other[client]))
    assert close(alone.private, stacked.private)


def test_off_it_changes_nothing():
    one, *others = (louder(world()) for _ in range(3))
    updates = [trained(here, [CLIENT], **s)[CLIENT].updates.tensors for here, s in
               zip((one, *others), ({}, {"sparse": 0.0, "sparse_by": "entries"}, {"sparse": 1e-3}), strict=True)]  # fmt: skip
    assert same(updates[0], updates[1]) and not same(updates[0], updates[2])


@pytest.mark.parametrize("by", ["units", "entries"])
def test_what_the_task_does_not_need_shrinks(by: str):
    """After thirty rounds the least of the units, or of the entries, are a smaller share of the whole than without."""

    def share(weight: float) -> float:
        objective = Objective(lr=0.05, sparse=weight, sparse_by=by)
        here = louder(world(Strategy(objective=objective)))
        here.rounds(30)
        embedding = here.state.model["item_embedding"]
        sizes = (embedding.norm(dim=0) if by == "units" else embedding.abs().flatten()).sort().values
        return float(sizes[: len(sizes) // 4].sum() / sizes.sum())

    assert share(0.1 if by == "entries" else 1.5) < 0.8 * share(0.0)


def test_a_narrow_model_has_its_own_units():
    narrow = Submodel({"latent": np.array([1, 4, 6])})
    here = louder(world(fleet="serial"))
    report = trained(here, [CLIENT], narrow, sparse=WEIGHT)[CLIENT]
    assert report.updates.tensors["item_embedding"].shape[-1] == 3 < LATENT


def test_refused():
    with pytest.raises(ConfigError, match="sparse is -1"):
        Objective(sparse=-1)
    with pytest.raises(ConfigError, match='sparse_by "rows"'):
        replace(Objective(), sparse_by="rows")  # type: ignore[arg-type]


def test_it_travels():
    pytest.importorskip("flwr", reason="flwr is not installed")
    from fedprune.flower import wire

    here = world()
    sent, layout = order(here, CLIENT, 0, sparse=0.25, sparse_by="entries"), here.state.layout
    (got,) = wire.read_orders(wire.write_orders([sent], layout, run="r", settings="{}"), layout).orders
    assert got.objective == sent.objective
