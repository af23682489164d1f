"""Cutting and putting back, on layouts that nobody would think of."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fedprune.axes import Axis, Layout
from fedprune.codec import Sizes, sizes
from fedprune.errors import LayoutError
from fedprune.submodel import Submodel, extract, mask, scatter
from fedprune.types import Tensors

QUICK = settings(max_examples=60, deadline=None)
PRUNABLE = ("a", "b", "c")
WORDS = (
    "item a",
    "item a+b",
    "item",
    "a",
    "b",
    "c",
    "a b",
    "b a+c",
    "2 a+b+c",
    "c 3",
    "a+a b",
    "c b+b",
    "3",
    "user a",
    "user",
)


@some.composite
def layouts(draw: some.DrawFn) -> Layout:
    """Two to eight tensors over up to three prunable axes, with concatenations, plain numbers and rows."""
    words = draw(some.lists(some.sampled_from(WORDS), min_size=2, max_size=8))
    used = {axis for word in words for axis in word.replace("+", " ").split() if not axis.isdigit()}
    axes = {name: Axis(draw(some.integers(1, 5))) for name in PRUNABLE if name in used}
    if "item" in used:
        axes["item"] = Axis(draw(some.integers(1, 5)), touched=True)
    if "user" in used:
        axes["user"] = Axis(draw(some.integers(1, 4)), private=True)
    return Layout.of(axes, **{f"tensor{number}": word for number, word in enumerate(words)})


def subset(draw: some.DrawFn, of: list[int]) -> list[int]:
    return sorted(draw(some.sets(some.sampled_from(of), min_size=1)))


@some.composite
def cuts(draw: some.DrawFn) -> tuple[Layout, Submodel, Tensors, torch.Tensor | None]:
    """A layout, a submodel (perhaps a window), a model whose entries are all different, and perhaps some rows."""
    layout = draw(layouts())
    held = {name: np.array(subset(draw, list(range(axis.size)))) for name, axis in layout.prunable.items()}
    trained = {name: np.array(subset(draw, units.tolist())) for name, units in held.items()}
    submodel = Submodel.checked(layout, held, trained if draw(some.booleans()) else None)
    rows = None
    if "item" in layout.axes and draw(some.booleans()):
        rows = torch.tensor(subset(draw, list(range(layout.axes["item"].size))))
    model, start = {}, 1
    for name in layout.tensors:
        shape = layout.shape(name)
        count = int(np.prod(shape))
        model[name] = torch.arange(start, start + count).float().reshape(shape)
        start += count
    return layout, submodel, model, rows


def kept(layout: Layout, submodel: Submodel, name: str, rows: torch.Tensor | None) -> list[list[int]]:
    """Kept entries per dimension, counted one by one."""
    result = []
    for place, dimension in enumerate(layout.tensors[name]):
        if isinstance(dimension, int):
            result.append(list(range(dimension)))
            continue
        entries, position = [], 0
        for axis in dimension:
            for unit in range(layout.axes[axis].size):
                if axis == "item":
                    wanted = rows is None or unit in rows.tolist()
                else:
                    wanted = axis == "user" or unit in submodel.held[axis].tolist()
                if wanted:
                    entries.append(position)
                position += 1
        assert place == 0 or "item" not in dimension
        result.append(entries)
    return result


@QUICK
@given(cuts())
def test_extract_takes_the_held_entries_and_nothing_else(cut: tuple):
    layout, submodel, model, rows = cut
    part = extract(model, layout, submodel, rows)
    for name, tensor in model.items():
        expected = tensor.numpy()[np.ix_(*kept(layout, submodel, name, rows))]
        assert np.array_equal(part[name].numpy(), expected) and part[name].is_contiguous()
        if rows is None:
            assert tuple(part[name].shape) == layout.shape(name, submodel.widths)


@QUICK
@given(cuts())
def test_scatter_undoes_extract(cut: tuple):
    layout, submodel, model, rows = cut
    part = extract(model, layout, submodel, rows)
    again = {name: tensor.clone() for name, tensor in model.items()}
    scatter(again, layout, submodel, {name: -tensor for name, tensor in part.items()}, rows)
    for name, tensor in model.items():
        negative = (again[name] < 0).numpy()
        expected = np.zeros(tensor.shape, bool)
        expected[np.ix_(*kept(layout, submodel, name, rows))] = True
        assert np.array_equal(negative, expected)
    scatter(again, layout, submodel, part, rows)
    assert all(torch.equal(again[name], model[name]) for name in model)


@QUICK
@given(cuts())
def test_parameters_and_masks_count_what_is_cut(cut: tuple):
    layout, submodel, model, _ = cut
    rows = layout.axes["item"].size if "item" in layout.axes else 0
    part = extract(model, layout, submodel)
    travelling = sum(part[name].numel() for name in layout.named("shared", "touched"))
    assert layout.parameters(submodel.widths, rows) == travelling
    assert layout.bytes(submodel.widths, rows) == 4 * travelling
    for name, tensor in model.items():
        if layout.kind(name) == "shared":
            covered = torch.ones(())
            for dimension in layout.tensors[name]:
                covered = covered[..., None] * mask(layout, dimension, submodel.held)
            assert covered.shape == tensor.shape and covered.sum() == part[name].numel()


@QUICK
@given(layouts(), some.floats(0.05, 1.0), some.floats(0.05, 1.0))
def test_cost_grows_with_the_rate(layout: Layout, one: float, other: float):
    small, large = sorted(max(rate, layout.smallest_rate) for rate in (one, other))
    narrow, wide = layout.widths(small), layout.widths(large)
    assert all(narrow[axis] <= wide[axis] for axis in narrow)
    assert layout.bytes(narrow, 3) <= layout.bytes(wide, 3)
    assert layout.work(narrow, narrow).total <= layout.work(wide, wide).total
    assert layout.work(wide, narrow).total <= layout.work(wide, wide).total
    assert layout.work(narrow, narrow).total <= layout.work(wide, narrow).total


@QUICK
@given(cuts())
def test_equal_submodels_are_equal_and_others_are_not(cut: tuple):
    layout, submodel, _, _ = cut
    again = Submodel({a: u.copy() for a, u in submodel.held.items()}, {a: u.copy() for a, u in submodel.trained.items()})
    assert again == submodel and hash(again) == hash(submodel)
    full = Submodel.full(layout)
    whole = all(len(submodel.trained[axis]) == kind.size for axis, kind in layout.prunable.items())
    assert (submodel == full) == whole


@QUICK
@given(cuts(), some.data())
def test_units_that_do_not_fit_are_refused(cut: tuple, data: some.DataObject):
    layout, submodel, _, _ = cut
    if not layout.prunable:
        return
    axis = data.draw(some.sampled_from(sorted(layout.prunable)))
    size = layout.axes[axis].size
    for wrong in ([], [size], [-1], [0, 0], [1, 0] if size > 1 else [0, 0]):
        held = dict(submodel.held) | {axis: np.array(wrong, int)}
        try:
            Submodel.checked(layout, held)
        except LayoutError as error:
            assert f'"{axis}"' in str(error)
        else:
            raise AssertionError(f"{wrong} of {size} units passed")


def test_layouts_that_make_no_sense_are_refused():
    wrong = [
        ({"a": Axis(2)}, {"one": "b"}, "b"),
        ({"a": Axis(2), "b": Axis(2)}, {"one": "a"}, 'no tensor uses axis "b"'),
        ({"a": Axis(2), "item": Axis(3, touched=True)}, {"one": "a item"}, "must stand first"),
        ({"a": Axis(2), "item": Axis(3, touched=True)}, {"one": "a+item"}, "must stand first and alone"),
        ({"a": Axis(2, floor=3)}, {"one": "a"}, "1 <= floor <= size"),
        ({"a": Axis(2)}, {"one": "a", "two": ""}, "names no axis"),
    ]
    for axes, words, text in wrong:
        try:
            Layout.of(axes, **words)
        except LayoutError as error:
            assert text in str(error)
        else:
            raise AssertionError(f"{words} passed")


# ---- masks of entries ------------------------------------------------------------------------------------------------


@some.composite
def masked(draw: some.DrawFn) -> tuple[Layout, Submodel, Tensors, torch.Tensor | None]:
    """A cut whose entries are masked, in some tensors."""
    layout, submodel, model, rows = draw(cuts())
    chance = np.random.default_rng(draw(some.integers(0, 2**31)))
    names = [name for name in layout.named("shared", "touched") if chance.random() < 0.7]
    entries = {name: chance.random(layout.shape(name)) < chance.choice([0.0, 0.4, 1.0]) for name in names}
    checked = Submodel.checked(layout, submodel.held, submodel.trained, entries)
    return layout, replace(checked, through=bool(entries) and draw(some.booleans())), model, rows


@QUICK
@given(masked())
def test_masked_entries_are_cut_to_zero_and_not_put_back(cut: tuple):
    layout, submodel, model, rows = cut
    part = extract(model, layout, submodel, rows)
    again = {name: tensor.clone() for name, tensor in model.items()}
    scatter(again, layout, submodel, {name: tensor - 1000 for name, tensor in part.items()}, rows)
    for name, tensor in model.items():
        grid = np.ix_(*kept(layout, submodel, name, rows))
        there = submodel.entries.get(name, np.ones(tensor.shape, bool))
        assert np.array_equal(part[name].numpy(), np.where(there, tensor.numpy(), 0)[grid]) and part[name].is_contiguous()
        expected = tensor.numpy().copy()
        expected[grid] = np.where(there, tensor.numpy() - 1000, tensor.numpy())[grid]
        assert np.array_equal(again[name].numpy(), expected), "what is masked keeps the target's value"


@QUICK
@given(masked())
def test_bytes_are_counted_entry_by_entry(cut: tuple):
    layout, submodel, _, _ = cut
    items = layout.axes["item"].size if "item" in layout.axes else 0
    down = up = bits = 0
    trained = Submodel(submodel.trained)
    for name in layout.named("shared", "touched"):
        there = submodel.entries.get(name, np.ones(layout.shape(name), bool))
        held = there[np.ix_(*kept(layout, submodel, name, None))]
        down += int(held.sum())
        bits += held.size if name in submodel.entries else 0
        everything = submodel.through or name not in submodel.entries
        sent = np.ones_like(there) if everything else there
        up += int(sent[np.ix_(*kept(layout, trained, name, None))].sum())
    masks = math.ceil(bits / 8)
    assert sizes(layout, submodel, items) == Sizes(down, 4 * down + masks, masks, 4 * up)
    plain = sizes(layout, submodel.units, items)
    assert (plain.parameters, plain.masks) == (layout.parameters(submodel.widths, items), 0)
    assert plain.down == layout.bytes(submodel.widths, items) and plain.up == layout.bytes(submodel.trained_widths, items)


@QUICK
@given(masked())
def test_masks_are_part_of_what_a_submodel_is(cut: tuple):
    layout, submodel, _, _ = cut
    copied = {name: there.copy() for name, there in reversed(submodel.entries.items())}
    again = Submodel(submodel.held, submodel.trained, copied, submodel.through)
    assert again == submodel and hash(again) == hash(submodel) and again.held_key == submodel.held_key
    assert replace(submodel, through=not submodel.through) != submodel
    assert submodel.units == Submodel(submodel.held, submodel.trained) and submodel.units.units_key == submodel.units_key
    for name, there in submodel.entries.items():
        other = there.copy()
        other.flat[-1] = ~other.flat[-1]
        assert replace(submodel, entries={**submodel.entries, name: other}).held_key != submodel.held_key
    for name in layout.named("shared", "touched"):
        for wrong in (np.ones(layout.shape(name)), np.ones((*layout.shape(name), 1), bool)):
            with pytest.raises(LayoutError, match=f'mask of "{name}"'):
                Submodel.checked(layout, submodel.held, None, {name: wrong})
    for name in (*layout.named("private"), "nothing"):
        with pytest.raises(LayoutError, match=f'"{name}", which is no tensor that travels'):
            Submodel.checked(layout, submodel.held, None, {name: np.ones(1, bool)})
