"""What a student learns from a teacher: its scores, its ranking, where it is active, and which items it finds alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprune.errors import ConfigError, unknown

Teacher: TypeAlias = Literal["local", "sent", "past", "given"]


@dataclass(frozen=True)
class Distillation:
    """Who teaches, and what for. Every term is off at weight 0.

    L = (1 - weight) L_task + weight * T^2 CE(sigmoid(t/T), sigmoid(s/T)) + ranking * L_RD + attention * L_AT + relation * L_R

    with student scores s and teacher scores t; ratings take (s - t)^2 instead of the cross-entropy. All terms grow with the
    client's data as the task's does: those that are means are multiplied by its number of examples (ranking: positives).

    Attributes:
        teacher: "local": the device downloads the whole model and scores its own examples with it and with its whole private
            row. "sent": the same scores come with the order, computed by whoever knows the private row: simulations, or a
            silo's own server, but never fedprune's, so real devices refuse it. "past": the model as received, before this
            order's steps (of use only with several). "given": a model from elsewhere, such as the dense one that is compressed.
        weight: of Hinton et al. 2015 (arXiv:1503.02531), section 2, for one logit.
        temperature: T.
        top: the teacher's first so many unseen items join the examples; they have no label.
        ranking: weight of ranking distillation over that list (Tang & Wang 2018, arXiv:1809.07428): sum_r w_r (-log sigmoid
            s_r), w_r ~ exp(-r / decay). Differs from the paper: no dynamic weights.
        decay: see `ranking`.
        attention: weight of attention transfer (Zagoruyko & Komodakis 2017, arXiv:1612.03928): the squared distance between
            the unit vectors of |h_i|^2 over a client's examples i, h being what the last layer reads.
        relation: weight of the mean squared difference between the cosine similarities of item embeddings (after HeteFedRec's
            relation-based ensemble, Yuan et al. 2023, arXiv:2307.12810). Both of these compare different widths, and a
            rotation of either side changes nothing.
        compared: rows of a client that `relation` compares with one another.
    """

    teacher: Teacher = "local"
    weight: float = 0.0
    temperature: float = 1.0
    top: int = 0
    ranking: float = 0.0
    decay: float = 10.0
    attention: float = 0.0
    relation: float = 0.0
    compared: int = 32

    def __post_init__(self) -> None:
        if self.teacher not in get_args(Teacher):
            raise ConfigError(unknown("teacher", str(self.teacher), get_args(Teacher)))
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"distillation weight is {self.weight}; it must be in [0, 1], a share of the loss")
        for name in ("temperature", "decay"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"distillation {name} is {getattr(self, name)}; it must be above 0")
        for name in ("top", "ranking", "attention", "relation"):
            if getattr(self, name) < 0:
                raise ConfigError(f"distillation {name} is {getattr(self, name)}; it must not be negative")
        if self.ranking and not self.top:
            raise ConfigError("ranking distillation needs a list to learn from: set top to its length, e.g. 20")
        if self.teacher == "past" and self.top:
            raise ConfigError('teacher "past" keeps no list of items; set top to 0, or take the teacher "local"')
        if self.compared < 2:
            raise ConfigError(f"compared is {self.compared}; a relation needs at least 2 rows")

    @property
    def active(self) -> bool:
        """Whether any of the terms counts; a teacher that says nothing is not paid for."""
        return max(self.weight, self.ranking, self.attention, self.relation) > 0


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of a stack's examples.

    Attributes:
        scores: `[clients, batch]`.
        rank: place in the teacher's list, from 1; 0 for a client's own examples; `[clients, batch]`.
        listed: what each place weighs in ranking distillation, times its user's positives, `[clients, batch]`.
        attention: |h|^2 of the teacher, `[clients, batch]`; None where not asked for.
        compared: positions among the client's rows, int64 `[clients, compared]`.
        similarity: per embedding the teacher's cosines between those rows, `[clients, compared, compared]`.
    """

    scores: Tensor
    rank: Tensor
    listed: Tensor
    attention: Tensor | None = None
    compared: Tensor | None = None
    similarity: Mapping[str, Tensor] | None = None

    def at(self, chosen: Tensor) -> Lesson:
        """For some of the examples, int64 `[clients, chosen]`."""
        given = {
            name: tensor.gather(1, chosen)
            for name in ("scores", "rank", "listed", "attention")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **given)


def taught_loss(
    distillation: Distillation,
    lesson: Lesson,
    task: Tensor,
    scores: Tensor,
    weight: Tensor,
    *,
    ratings: bool = False,
    activity: Tensor | None = None,
    embeddings: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Loss per client, summed over its examples; `[clients]`.

    Args:
        task: each example's own loss, `[clients, batch]`.
        scores: the student's, `[clients, batch]`.
        weight: 1.0 for examples, 0.0 for padding and for what is only on the teacher's list.
        activity: the student's |h|^2, `[clients, batch]`.
        embeddings: the student's item embeddings, `[clients, rows, width]` each.
    """
    d, a = distillation, distillation.weight
    loss = (1 - a) * (task * weight).sum(1)
    if a:
        heard = torch.maximum(weight, (lesson.rank > 0).to(weight))
        loss = loss + a * (soft_loss(scores, lesson.scores, d.temperature, ratings=ratings) * heard).sum(1)
    if d.ranking:
        loss = loss + d.ranking * (lesson.listed * F.softplus(-scores)).sum(1)
    count = weight.sum(1)
    if d.attention and activity is not None and lesson.attention is not None:
        loss = loss + d.attention * count * attention_loss(activity * weight, lesson.attention * weight)
    if d.relation and embeddings and lesson.similarity and lesson.compared is not None:
        for name, theirs in lesson.similarity.items():
            loss = loss + d.relation * count * ((cosines(embeddings[name], lesson.compared) - theirs) ** 2).mean((1, 2))
    return loss


def soft_loss(scores: Tensor, teacher: Tensor, temperature: float, *, ratings: bool = False) -> Tensor:
    """T^2 times the cross-entropy between the two softened Bernoullis; for ratings the squared difference. Elementwise.

    Less the teacher's entropy, which has no gradient, it is the KL divergence: a student that equals its teacher does not move.
    """
    if ratings:
        return (scores - teacher) ** 2
    soft = torch.sigmoid(teacher / temperature)
    return temperature**2 * F.binary_cross_entropy_with_logits(scores / temperature, soft, reduction="none")


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance between two maps as unit vectors; `[clients, batch]` -> `[clients]`."""
    return ((F.normalize(student, dim=1) - F.normalize(teacher, dim=1)) ** 2).sum(1)


def cosines(rows: Tensor, at: Tensor) -> Tensor:
    """Cosine similarities between some rows of each client; `[clients, rows, width]` -> `[clients, at, at]`."""
    client = torch.arange(len(at), device=at.device)[:, None]
    unit = F.normalize(rows[client, at], dim=-1, eps=1e-6)
    return unit @ unit.transpose(1, 2)


def from_settings(values: Mapping[str, float | int | str]) -> Distillation:
    """A distillation from a flat table (a message's, a settings file's).

    Raises:
        ConfigError: a value out of range, or an unknown name.
    """
    known = [entry.name for entry in fields(Distillation)]
    for name in values:
        if name not in known:
            raise ConfigError(f"distillation: {unknown('setting', name, known)}")
    try:
        return Distillation(**values)  # type: ignore[arg-type]
    except TypeError as error:  # a text where a number is wanted
        raise ConfigError(f"distillation: {error}") from None
