"""A recommender with all that a mask or a narrower width takes away really gone; one safetensors file, no pickle.

The file holds metadata (JSON under `fedprune`) and every tensor in its cheapest form (`export.packing`). Users' private
rows are not part of it: they are on their devices, and whoever scores brings them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedprune import recommenders
from fedprune.axes import Layout, Widths
from fedprune.entries import Entries, KOfN
from fedprune.errors import ConfigError, FedpruneError, LayoutError, RecordError
from fedprune.experiment import digest
from fedprune.export import packing
from fedprune.ranking import Scorer
from fedprune.recommenders import Recommender
from fedprune.recommenders.base import LOGITS
from fedprune.record import save
from fedprune.submodel import Submodel, extract, positions, scatter, there
from fedprune.types import Bytes, IntArray, Tensors

KIND, FORMAT = "fedprune compact model", 1


@dataclass(frozen=True, eq=False)
class Compact:
    """A model that only recommends. `compact` makes one, `load` reads one.

    Attributes:
        recommender: without tensors that learn masks; its layout has the full sizes.
        tensors: what travels, at held widths, float32; zero where a mask took an entry away.
        held: axis -> unit numbers in the full model, as in `Submodel`: which units of a user's row to take.
        entries: tensor -> how many of its entries are there, whatever their value.
        item_ids: the file's text for each item number; empty if not known.
    """

    recommender: Recommender
    tensors: Tensors
    held: Mapping[str, IntArray]
    entries: Mapping[str, int]
    item_ids: tuple[str, ...] = ()

    @cached_property
    def widths(self) -> Widths:
        """Held units per axis."""
        return {axis: len(units) for axis, units in self.held.items()}

    @property
    def items(self) -> int:
        """Size of the catalogue."""
        return self.recommender.layout.items

    @property
    def parameters(self) -> int:
        """Entries that are there."""
        return sum(self.entries.values())

    @property
    def flops(self) -> float:
        """Floating-point operations of one recommendation: one user and the whole catalogue, by the rule of `Layout.work`.

        2 per entry of a matrix that is there, 1 per entry of a vector; an item's own entries count once, shared ones once per
        item. This counts packed arithmetic: a dense kernel also multiplies the zeros (`flops_dense`), so a mask of entries
        makes this number smaller and a dense kernel not faster. Narrower widths make both smaller.
        """
        layout, total = self.recommender.layout, 0.0
        for name, count in self.entries.items():
            times = 1 if layout.kind(name) == "touched" else self.items
            total += (1.0 if len(layout.tensors[name]) == 1 else 2.0) * count * times
        return total

    @property
    def flops_dense(self) -> float:
        """The same where zeros are multiplied like all else."""
        return self.recommender.layout.work(self.widths, self.widths).forward * self.items

    @property
    def payload_bytes(self) -> Bytes:
        """Bytes of the stored tensors, without the file's header."""
        return sum(min(packing.sizes(tensor).values()) for tensor in self.tensors.values())

    def rows(self, private: Tensors) -> Tensors:
        """Users' private rows at held widths.

        Args:
            private: every private tensor, `[users, ...]`, as a device keeps it (all units), or cut already.

        Raises:
            LayoutError: a tensor is missing or has another shape than one of these.
        """
        layout, cut = self.recommender.layout, {}
        for name in layout.named("private"):
            if name not in private:
                raise LayoutError(f'no private rows "{name}"; this model needs {", ".join(layout.named("private"))}')
            own = private[name]
            held, whole = layout.shape(name, self.widths)[1:], layout.shape(name)[1:]
            if tuple(own.shape[1:]) not in (held, whole) or own.dim() != len(held) + 1:
                raise LayoutError(f'private rows "{name}" are {tuple(own.shape)}; they must be users x {held}, or x {whole}')
            if tuple(own.shape[1:]) != held:
                for axis, dimension in enumerate(layout.tensors[name][1:], start=1):
                    own = own.index_select(axis, positions(layout, dimension, self.held))
            cut[name] = own
        return cut

    def score(self, private: Tensors) -> Tensor:
        """Scores of the whole catalogue, `[users, items]`, for users with these private rows (see `rows`)."""
        with torch.no_grad():
            return self.forward(self.rows(private))

    def forward(self, rows: Tensors) -> Tensor:
        """The same for rows at held widths."""
        stacked = {name: tensor[None] for name, tensor in self.tensors.items()}
        return self.recommender.score(stacked | {name: own[:, None] for name, own in rows.items()})

    def scorer(self, private: Tensors) -> Scorer:
        """For evaluation: users by their numbers, out of the whole population's rows."""
        return lambda users: self.score({name: rows[torch.from_numpy(users)] for name, rows in private.items()})

    def packed(self) -> Callable[[Tensors], Tensor] | None:
        """A kernel that skips the zeros of the item table, rows at held widths -> `[users, items]`; None where there is none.

        For products of user and item (mf, gmf) whose table has zeros: the table as compressed sparse rows.
        """
        table = self.tensors.get("item_embedding")
        if table is None or "hidden1_weight" in self.tensors or bool((table != 0).all()):
            return None
        present = table != 0
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)])
        sparse = torch.sparse_csr_tensor(starts, present.nonzero()[:, 1], table[present], table.shape, check_invariants=False)
        bias, weight = self.tensors["item_bias"], self.tensors.get("output_weight")

        def score(rows: Tensors) -> Tensor:
            user = rows["user_embedding"] if weight is None else rows["user_embedding"] * weight
            return (sparse @ user.T).T + bias

        return score

    def save(self, path: Path) -> Bytes:
        """Write the file in one step; how large it is.

        Raises:
            ConfigError: a recommender that `load` could not build again.
        """
        settings = _settings(self.recommender.layout)
        if recommenders.build(self.recommender.name, **settings).layout.tensors != self.recommender.layout.tensors:
            raise ConfigError(f'recommender "{self.recommender.name}" has other tensors than the one of that name')
        forms: dict[str, str] = {}
        stored: Tensors = {}
        for name, tensor in self.tensors.items():
            forms[name], parts = packing.pack(name, tensor)
            stored |= parts
        about = {
            "kind": KIND,
            "format": FORMAT,
            "recommender": self.recommender.name,
            "settings": settings,
            "widths": dict(self.widths),
            "held": {axis: np.asarray(units).tolist() for axis, units in self.held.items()},
            "entries": dict(self.entries),
            "forms": forms,
            "digest": digest(self.tensors),
            "item_ids": list(self.item_ids) or None,
        }
        save(path, stored, {"fedprune": json.dumps(about)})
        return path.stat().st_size


def compact(
    recommender: Recommender,
    model: Tensors,
    submodel: Submodel,
    entries: Entries | None = None,
    item_ids: Sequence[str] = (),
) -> Compact:
    """Cut away what a submodel does not hold, and zero what its masks take away.

    Units of which every tensor that travels has nothing but zeros left (a masked column of an embedding; a hidden unit without
    weights and bias) are cut as well, down to an axis' floor: in products, sums and ReLUs, of which all recommenders here
    are made, they make no difference whatever a user's row holds there.

    Args:
        recommender: as it was trained. Where `entries.KOfN` has wrapped it, each row's k largest logits become a mask, and
            the logits themselves are left out.
        model: all tensors of the full model that travel.
        submodel: `Submodel.full(layout)` cuts nothing.
        entries: the strategy's, needed only for a wrapped recommender: they know k.

    Raises:
        LayoutError: a tensor is missing or has another shape; the submodel does not fit the layout; too many or few item ids.
        ConfigError: a wrapped recommender without its entries.
    """
    layout = recommender.layout
    for name in layout.named("shared", "touched"):
        if name not in model or tuple(model[name].shape) != layout.shape(name):
            found = tuple(model[name].shape) if name in model else "missing"
            raise LayoutError(f'tensor "{name}" is {found}; this model needs {layout.shape(name)}')
    if item_ids and len(item_ids) != layout.items:
        raise LayoutError(
            f"{len(item_ids)} item ids for {layout.items} items; one each, in the order of their numbers, or none"
        )
    Submodel.checked(layout, submodel.held, submodel.trained, submodel.entries)
    model = {n: model[n].detach().cpu().float() + 0.0 for n in layout.named("shared", "touched")}
    if any(name.endswith(LOGITS) for name in layout.tensors):
        submodel = _masked_by_logits(layout, model, submodel, entries)
        recommender = recommenders.build(recommender.name, **_settings(layout))
        layout = recommender.layout
        model = {name: tensor for name, tensor in model.items() if name in layout.tensors}
    submodel = _useful(layout, extract(model, layout, submodel), submodel)
    tensors = {name: tensor + 0.0 for name, tensor in extract(model, layout, submodel).items()}  # -0 becomes 0
    masks = {name: there(layout, submodel, name) for name in tensors}
    count = {n: tensors[n].numel() if mask is None else int(mask.sum()) for n, mask in masks.items()}
    held = {axis: np.asarray(units, np.int64) for axis, units in submodel.held.items()}
    return Compact(recommender, tensors, held, count, tuple(item_ids))


def load(path: Path) -> Compact:
    """Read what `Compact.save` has written, and check all of it.

    Raises:
        RecordError: no such file, another kind of file, one of a newer fedprune, or a damaged one.
    """
    if not path.is_file():
        raise RecordError(f"no file {path}; `fedprune export RUN --out FOLDER` makes a compact.safetensors")
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get("fedprune", "{}"))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, TypeError) as error:
        raise RecordError(f"{path} is no safetensors file, or a damaged one ({error}); export it again") from None
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise RecordError(f"{path} holds no compact model of fedprune; `fedprune export` makes one from a run")
    if about.get("format") != FORMAT:
        raise RecordError(f"{path} has format {about.get('format')}; this fedprune reads {FORMAT}. Export it again, or update.")
    try:
        return _read(about, stored)
    except (FedpruneError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecordError(f"{path} is damaged: {error}; export it again") from None


def _read(about: dict[str, Any], stored: Mapping[str, np.ndarray]) -> Compact:
    recommender = recommenders.build(about["recommender"], **about["settings"])
    layout = recommender.layout
    held = {axis: np.asarray(about["held"][axis], np.int64) for axis in layout.prunable}
    widths = Submodel.checked(layout, held).widths
    forms, count = about["forms"], about["entries"]
    names = layout.named("shared", "touched")
    tensors = {name: packing.unpack(name, forms[name], layout.shape(name, widths), stored) for name in names}
    expected = {name + suffix for name in names for suffix in packing.SUFFIXES[forms[name]]}
    if extra := sorted(set(stored) - expected):
        raise RecordError(f'tensor "{extra[0]}" belongs to nothing')
    if digest(tensors) != about["digest"]:
        raise RecordError("its tensors are not those that were written")
    for name, tensor in tensors.items():
        least, most = int((tensor != 0).sum()), tensor.numel()
        if not isinstance(count[name], int) or not least <= count[name] <= most:
            raise RecordError(f'"{name}" is said to have {count[name]} entries; it has {least} to {most}')
    item_ids = tuple(about["item_ids"] or ())
    if item_ids and len(item_ids) != layout.items:
        raise RecordError(f"it names {len(item_ids)} items and scores {layout.items}")
    return Compact(recommender, tensors, held, {name: count[name] for name in names}, item_ids)


def _settings(layout: Layout) -> dict[str, Any]:
    """What `recommenders.build` needs to make this layout again, read from its axes."""
    axes = layout.axes
    users = next((axis.size for axis in axes.values() if axis.private), 1)
    latent = next((axes[name].size for name in ("latent", "tower") if name in axes), 1)
    hidden = [axes[name].size for name in sorted(axes, key=lambda n: (len(n), n)) if name.startswith("hidden")]
    return {"users": users, "items": layout.items, "latent": latent} | ({"hidden": hidden} if hidden else {})


def _masked_by_logits(layout: Layout, model: Tensors, submodel: Submodel, entries: Entries | None) -> Submodel:
    """The submodel with the masks that its logits come to, in the full model's shape: a row's k is a share of what is held."""
    if not isinstance(entries, KOfN):
        raise ConfigError("this recommender learns its masks; name the entries that it was trained with: entries=KOfN(...)")
    units = submodel.units
    cut = extract(model, layout, units)
    masks = {name.removesuffix(LOGITS): name for name in cut if name.endswith(LOGITS)}
    whole = {name: torch.zeros(layout.shape(name)) for name in masks}
    scatter(whole, layout, units, {name: entries.of(name, cut) for name in masks})
    both = {name: mask.bool().numpy() & submodel.entries.get(name, True) for name, mask in whole.items()}
    others = {n: mask for n, mask in submodel.entries.items() if not n.endswith(LOGITS)}
    return replace(submodel, entries=others | both)


def _useful(layout: Layout, cut: Tensors, submodel: Submodel) -> Submodel:
    """Without the units that have nothing but zeros left in every tensor that travels."""
    held: dict[str, IntArray] = {}
    for axis, units in submodel.held.items():
        alive = torch.zeros(len(units), dtype=torch.bool)
        for name, tensor in cut.items():
            for place, dimension in enumerate(layout.tensors[name]):
                if isinstance(dimension, int) or axis not in dimension:
                    continue
                used, start = (tensor != 0).movedim(place, 0).flatten(1 if tensor.dim() > 1 else 0), 0
                used = used.any(1) if used.dim() > 1 else used
                for part in dimension:
                    width = layout.extent((part,), submodel.widths)
                    if part == axis:
                        alive |= used[start : start + width]
                    start += width
        count = max(int(alive.sum()), layout.axes[axis].floor)
        first = np.argsort(~alive.numpy(), kind="stable")[:count]
        held[axis] = np.asarray(units)[np.sort(first)]
    if math.prod(map(len, held.values())) == math.prod(submodel.widths.values()):
        return submodel
    return replace(submodel, held=held, trained=held)
