"""A model that leaves fedprune scores as it did inside, is as small as it says, and nothing damaged is read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from meters import Hand
from safetensors import safe_open
from world import ITEMS, USERS, recommender, same

from fedprune.entries import KOfN
from fedprune.entries.base import largest, maskable
from fedprune.errors import ConfigError, LayoutError, RecordError
from fedprune.export import Compact, compact, load, measure, measure_all, packing, to_onnx
from fedprune.recommenders import RECOMMENDERS, Recommender
from fedprune.record import save
from fedprune.serving import scorer
from fedprune.submodel import Submodel
from fedprune.types import Tensors

every_recommender = pytest.mark.parametrize("name", sorted(RECOMMENDERS))
EVERYBODY = np.arange(USERS)


def drawn(what: Recommender, seed: int = 5) -> tuple[Tensors, Tensors]:
    """Model and private rows without a zero in them."""
    chance = torch.Generator().manual_seed(seed)
    full = {n: torch.randn(what.layout.shape(n), generator=chance) for n in what.layout.tensors}
    return full, {name: full.pop(name) for name in what.layout.named("private")}


def some(what: Recommender, model: Tensors, keep: float = 0.3) -> Submodel:
    """Scattered units of every axis, and the largest entries of every matrix."""
    rng = np.random.default_rng(11)
    held = {a: np.sort(rng.permutation(axis.size)[: axis.size * 3 // 4]) for a, axis in what.layout.prunable.items()}
    return Submodel.checked(what.layout, held, None, {n: largest(model[n].abs().numpy(), keep) for n in maskable(what.layout)})


def small(name: str = "mf", keep: float = 0.3) -> tuple[Compact, Tensors]:
    what = recommender(name)
    model, private = drawn(what)
    return compact(what, model, some(what, model, keep), item_ids=[f"item {i}" for i in range(ITEMS)]), private


# ---- one tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "form", "size"),
    [
        (torch.ones(4, 16), "dense", 256),
        (torch.eye(64)[:8], "k_of_n", 8 * (4 + 1)),
        (torch.eye(300)[:8], "k_of_n", 8 * (4 + 2)),
        (torch.ones(4, 16) * (torch.arange(16) % 2), "bits", 32 * 4 + 8),
        (torch.tensor([[1.0] * 8 + [0.0] * 9, [0.0] * 17]), "bits", 8 * 4 + 5),
        (torch.zeros(70_000), "bits", 8750),
        (torch.tensor([3.0]), "dense", 4),
    ],
)
def test_the_cheapest_form_is_chosen(tensor: torch.Tensor, form: str, size: int):
    chosen, parts = packing.pack("t", tensor)
    assert (chosen, packing.sizes(tensor)[chosen]) == (form, size)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == size
    assert all(size <= other for other in packing.sizes(tensor).values())


@trials(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.03, 0.2, 0.6, 1.0]),
    st.sampled_from(["dense", "bits", "k_of_n"]),
    st.integers(0, 99),
)
def test_every_form_comes_back_bit_for_bit(shape: list[int], share: float, form: packing.Form, seed: int):
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy((rng.normal(size=shape) * (rng.random(shape) < share)).astype(np.float32)) + 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "form", lambda _: form)
        chosen, parts = packing.pack("t", tensor)
    assert chosen == form
    assert sum(p.numel() * p.element_size() for p in parts.values()) == packing.sizes(tensor)[form]
    back = packing.unpack("t", chosen, tuple(shape), {name: part.numpy() for name, part in parts.items()})
    assert torch.equal(back.view(torch.int32), tensor.view(torch.int32))


# ---- the whole model -------------------------------------------------------------------------------------------------


@every_recommender
def test_scores_are_those_of_the_masked_model(name: str):
    what = recommender(name)
    model, private = drawn(what)
    for submodel in (Submodel.full(what.layout), some(what, model), some(what, model).units):
        exported = compact(what, model, submodel)
        expected = scorer(what, model, private, [submodel] * USERS)(EVERYBODY)
        assert torch.allclose(exported.score(private), expected, atol=1e-5)
        assert torch.equal(exported.scorer(private)(EVERYBODY[3:9]), exported.score({n: r[3:9] for n, r in private.items()}))
        assert torch.equal(exported.score(exported.rows(private)), exported.score(private))


@every_recommender
def test_it_comes_back_from_disk_bit_for_bit(tmp_path: Path, name: str):
    before, private = small(name)
    size = before.save(tmp_path / "compact.safetensors")
    after = load(tmp_path / "compact.safetensors")
    assert same(before.tensors, after.tensors)
    assert torch.equal(before.score(private), after.score(private))
    for what in ("widths", "entries", "parameters", "flops", "flops_dense", "payload_bytes", "item_ids", "items"):
        assert getattr(before, what) == getattr(after, what), what
    assert all((before.held[axis] == after.held[axis]).all() for axis in before.held)
    header = 8 + int.from_bytes((tmp_path / "compact.safetensors").read_bytes()[:8], "little")
    assert size == (tmp_path / "compact.safetensors").stat().st_size == header + before.payload_bytes
    with safe_open(tmp_path / "compact.safetensors", "np") as file:
        assert not any(key.startswith("user") for key in file.keys())  # noqa: SIM118 - not a dict
    assert [path.name for path in tmp_path.iterdir()] == ["compact.safetensors"]


def test_counts_by_hand():
    """mf, 40 items, 6 of 8 dimensions: 2 per entry of the table and 1 per bias, the bias whole."""
    what = recommender()
    model, _ = drawn(what)
    submodel = some(what, model)
    there = int(submodel.entries["item_embedding"][:, submodel.held["latent"]].sum())
    exported = compact(what, model, submodel)
    assert exported.widths == {"latent": 6}
    assert exported.parameters == there + ITEMS
    assert (exported.flops, exported.flops_dense) == (2 * there + ITEMS, 2 * 6 * ITEMS + ITEMS)
    dense = compact(what, model, Submodel.full(what.layout))
    assert (dense.parameters, dense.flops, dense.payload_bytes) == (9 * ITEMS, 17 * ITEMS, 36 * ITEMS)


def test_shared_entries_work_once_per_item():
    what = recommender("gmf")
    exported = compact(what, drawn(what)[0], Submodel.full(what.layout))
    assert exported.flops == exported.flops_dense == ITEMS * (2 * 8 + 2 * 8 + 1)


@every_recommender
def test_units_of_which_only_zeros_are_left_are_cut(name: str):
    what = recommender(name)
    model, private = drawn(what)
    entries = {tensor: np.ones(what.layout.shape(tensor), bool) for tensor in maskable(what.layout)}
    for axis, unit in (("latent", 2), ("tower", 5), ("hidden1", 7)):
        for tensor, dimensions in what.layout.tensors.items():
            for place, dimension in enumerate(dimensions):
                start = 0
                for part in dimension if isinstance(dimension, tuple) else ():
                    if part == axis and tensor in entries:
                        np.moveaxis(entries[tensor], place, 0)[start + unit] = False
                    start += what.layout.axes[part].size
    submodel = Submodel.checked(what.layout, Submodel.full(what.layout).held, None, entries)
    exported = compact(what, model, submodel)
    gone = {
        axis: sorted(set(range(what.layout.axes[axis].size)) - set(units.tolist())) for axis, units in exported.held.items()
    }
    assert {axis: units for axis, units in gone.items() if units} == {
        axis: [unit] for axis, unit in (("latent", 2), ("tower", 5)) if axis in what.layout.axes
    }, "a hidden unit keeps its bias"
    expected = scorer(what, model, private, [submodel] * USERS)(EVERYBODY)
    assert torch.allclose(exported.score(private), expected, atol=1e-5)


def test_an_axis_keeps_its_floor_of_zeros():
    what = recommender()
    model = {name: torch.zeros_like(tensor) for name, tensor in drawn(what)[0].items()}
    exported = compact(what, model, Submodel.full(what.layout))
    assert exported.widths == {"latent": 1}
    assert not exported.score(drawn(what)[1]).any()


@every_recommender
def test_masks_that_are_learned_become_k_of_n(tmp_path: Path, name: str):
    entries = KOfN(keep=0.2)
    what = entries.parametrise(recommender(name))
    model, private = drawn(what)
    submodel = Submodel({axis: units[:6] for axis, units in Submodel.full(what.layout).held.items()})
    exported = compact(what, model, submodel, entries)
    expected = scorer(what, model, private, [submodel] * USERS)(EVERYBODY)
    assert torch.allclose(exported.score(private), expected, atol=1e-5)
    assert not any(tensor.endswith("_logits") for tensor in exported.tensors)
    exported.save(tmp_path / "compact.safetensors")
    assert same(load(tmp_path / "compact.safetensors").tensors, exported.tensors)
    for tensor in maskable(exported.recommender.layout):
        assert {int(row) for row in (exported.tensors[tensor] != 0).sum(-1).flatten()} <= {0, 1, 2}
    with pytest.raises(ConfigError, match="entries=KOfN"):
        compact(what, model, submodel)


def test_one_of_eight_is_stored_by_its_index(tmp_path: Path):
    entries = KOfN(keep=0.05)
    what = entries.parametrise(RECOMMENDERS["mf"](users=3, items=50, latent=40))
    model, _ = drawn(what)
    exported = compact(what, model, Submodel.full(what.layout), entries)
    assert exported.payload_bytes == 50 * 2 * (4 + 1) + 50 * 4


def test_what_does_not_fit_is_refused():
    what = recommender()
    model, private = drawn(what)
    full = Submodel.full(what.layout)
    with pytest.raises(LayoutError, match='"item_bias" is missing'):
        compact(what, {"item_embedding": model["item_embedding"]}, full)
    with pytest.raises(LayoutError, match="this model needs"):
        compact(what, model | {"item_bias": torch.zeros(3)}, full)
    with pytest.raises(LayoutError, match="below its floor"):
        compact(what, model, Submodel({"latent": np.arange(0)}))
    with pytest.raises(LayoutError, match="2 item ids for 40 items"):
        compact(what, model, full, item_ids=["one", "two"])
    exported = compact(what, model, full)
    with pytest.raises(LayoutError, match="user_embedding"):
        exported.score({})
    with pytest.raises(LayoutError, match="must be users x"):
        exported.score({"user_embedding": private["user_embedding"][:, :5]})


# ---- files that are none ---------------------------------------------------------------------------------------------


def altered(path: Path, **changes: object) -> None:
    """The same tensors under other metadata, or without some of them."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fedprune"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    save(path, tensors, {"fedprune": json.dumps(about | changes)})


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"kind": "another"}, "no compact model"),
        ({"format": 99}, "format 99; this fedprune reads 1"),
        ({"recommender": "mff"}, 'unknown recommender "mff"'),
        ({"settings": {}}, "damaged"),
        ({"settings": {"users": 24, "items": 41, "latent": 8}}, "must be"),
        ({"held": {"latent": [0, 1, 2, 3, 4, 99]}}, "must ascend within 0..7"),
        ({"held": {"latent": [0]}}, "must be"),
        ({"held": {"latent": [0.5, "x"]}}, "damaged"),
        ({"held": None}, "damaged"),
        ({"forms": {"item_embedding": "zip", "item_bias": "dense"}}, "stored as 'zip'"),
        ({"forms": {"item_embedding": "dense", "item_bias": "dense"}}, "missing"),
        ({"entries": {"item_embedding": 1, "item_bias": 40}}, "said to have 1 entries"),
        ({"digest": "0" * 16}, "not those that were written"),
        ({"item_ids": ["one"]}, "names 1 items and scores 40"),
    ],
)
def test_changed_metadata_is_refused(tmp_path: Path, changes: dict, saying: str):
    path = tmp_path / "compact.safetensors"
    small()[0].save(path)
    altered(path, **changes)
    with pytest.raises(RecordError, match=saying):
        load(path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path):
    path = tmp_path / "compact.safetensors"
    small()[0].save(path)
    good = path.read_bytes()
    for cut in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(RecordError, match="export it again"):
            load(path)
    header = 8 + int.from_bytes(good[:8], "little")
    for place in range(header, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        with pytest.raises(RecordError):
            load(path)
    path.write_text("not a model")
    with pytest.raises(RecordError, match="no safetensors file"):
        load(path)
    save(path, {"weight": torch.ones(3)}, {})
    with pytest.raises(RecordError, match="no compact model"):
        load(path)
    with pytest.raises(RecordError, match="no file"):
        load(tmp_path / "none")


# ---- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kernels"), [("mf", 2), ("gmf", 2), ("neumf", 1)])
def test_measured(name: str, kernels: int, monkeypatch: pytest.MonkeyPatch):
    exported, private = small(name)
    meter = Hand()
    monkeypatch.setattr(Compact, "forward", lambda self, rows, real=Compact.forward: (meter.work(1.0), real(self, rows))[1])
    figures = measure(exported, private, meter, repetitions=2, at_least=0.0)
    assert figures["parameters"] == exported.parameters and figures["file_bytes"] > exported.payload_bytes
    assert figures["latency_ms"] == min(filter(None, (figures["latency_dense_ms"], figures["latency_packed_ms"]))) > 0
    assert (figures["latency_packed_ms"] is not None) == (kernels == 2)
    assert figures["joules"] == (4e3 if figures["kernel"] == "dense" else 0.0), "4 W for 1 s, a thousand times"
    assert measure(exported, private, repetitions=1, at_least=0.0)["joules"] is None
    assert torch.get_num_threads() == 1


def test_models_side_by_side_take_the_same_rows():
    what = recommender()
    model, private = drawn(what)
    models = {"dense": compact(what, model, Submodel.full(what.layout)), "cut": small()[0]}
    figures = measure_all(models, private, repetitions=1, at_least=0.0)
    assert {name: entry["parameters"] for name, entry in figures.items()} == {n: m.parameters for n, m in models.items()}


def test_nobody_to_measure_with_is_refused():
    exported, private = small()
    with pytest.raises(ConfigError, match="0 users"):
        measure(exported, {name: rows[:0] for name, rows in private.items()})


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", ["mf", "gmf"])
def test_the_packed_kernel_scores_alike(name: str):
    exported, private = small(name)
    packed = exported.packed()
    assert packed is not None
    assert torch.allclose(packed(exported.rows(private)), exported.score(private), atol=1e-5)
    what = recommender(name)
    assert compact(what, drawn(what)[0], Submodel.full(what.layout)).packed() is None, "nothing to skip"


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@every_recommender
def test_onnx_scores_alike(tmp_path: Path, name: str):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    exported, private = small(name)
    to_onnx(exported, tmp_path / "compact.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["compact.onnx"]
    session = runtime.InferenceSession(tmp_path / "compact.onnx", providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == exported.recommender.layout.named("private")
    for users in (1, 2, USERS):
        rows = exported.rows({tensor: own[:users] for tensor, own in private.items()})
        (scores,) = session.run(["scores"], {tensor: own.numpy() for tensor, own in rows.items()})
        assert np.allclose(scores, exported.score(rows).numpy(), atol=1e-5)
