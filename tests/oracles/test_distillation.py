"""What is learned from a teacher: every term in plain Python, and the points where there is nothing to learn."""

from __future__ import annotations

import math

import pytest
import torch

from fedprune.distill import Distillation, Lesson, attention_loss, cosines, from_settings, soft_loss, taught_loss
from fedprune.errors import ConfigError
from fedprune.objective import Objective


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def soft(student: float, teacher: float, temperature: float) -> float:
    """T^2 CE(sigmoid(t/T), sigmoid(s/T))."""
    p, q = sigmoid(teacher / temperature), sigmoid(student / temperature)
    return -(temperature**2) * (p * math.log(q) + (1 - p) * math.log(1 - q))


def unit(values: list[float]) -> list[float]:
    size = math.sqrt(sum(value * value for value in values))
    return [value / size for value in values]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(unit(a), unit(b), strict=True))


@pytest.mark.parametrize("ratings", [False, True])
def test_all_terms_together(ratings: bool):
    """Two clients, six columns: positives, negatives, two listed items, and padding."""
    d = Distillation("local", 0.3, 2.5, top=3, ranking=0.7, decay=4.0, attention=0.2, relation=0.6)
    label = torch.tensor([[1.0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    weight = torch.tensor([[1.0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    rank = torch.tensor([[0.0, 0, 0, 1, 2, 0], [0, 0, 1, 2, 3, 0]])
    scores, teacher, task = drawn(2, 6, seed=1), drawn(2, 6, seed=2), drawn(2, 6, seed=3).abs()
    hidden, theirs = drawn(2, 6, 4, seed=4), drawn(2, 6, seed=5).abs()
    rows, others = drawn(2, 5, 3, seed=6), drawn(2, 5, 7, seed=7)
    compared = torch.tensor([[0, 2, 4], [1, 1, 3]])
    norm = sum(math.exp(-place / 4.0) for place in (1, 2, 3))
    listed = torch.where(rank > 0, torch.exp(-rank / 4.0), 0.0) / norm * (label * weight).sum(1, keepdim=True)
    lesson = Lesson(teacher, rank, listed, theirs, compared, {"item_embedding": cosines(others, compared)})
    got = taught_loss(
        d, lesson, task, scores, weight,
        ratings=ratings, activity=(hidden**2).sum(-1), embeddings={"item_embedding": rows, "item_bias": rows[..., 0]},
    )  # fmt: skip
    for client in range(2):
        own = [c for c in range(6) if weight[client, c]]
        listed = [c for c in range(6) if rank[client, c]]
        expected = 0.7 * sum(float(task[client, c]) for c in own)
        for c in own + listed:
            s, t = float(scores[client, c]), float(teacher[client, c])
            expected += 0.3 * ((s - t) ** 2 if ratings else soft(s, t, 2.5))
        total = sum(math.exp(-place / 4.0) for place in (1, 2, 3))
        positives = sum(float(label[client, c]) for c in own)
        for c in listed:
            share = math.exp(-float(rank[client, c]) / 4.0) / total
            expected += 0.7 * positives * share * -math.log(sigmoid(float(scores[client, c])))
        active = unit([float((hidden[client, c] ** 2).sum()) for c in own])
        taught = unit([float(theirs[client, c]) for c in own])
        expected += 0.2 * len(own) * sum((a - b) ** 2 for a, b in zip(active, taught, strict=True))
        at = compared[client].tolist()
        pairs = [(i, j) for i in at for j in at]
        apart = [
            cosine(rows[client, i].tolist(), rows[client, j].tolist())
            - cosine(others[client, i].tolist(), others[client, j].tolist())
            for i, j in pairs
        ]
        expected += 0.6 * len(own) * sum(a * a for a in apart) / 9
        assert float(got[client]) == pytest.approx(expected, rel=1e-5)


def test_terms_are_off_at_zero():
    scores, weight = drawn(2, 6), torch.ones(2, 6)
    lesson = Lesson(drawn(2, 6, seed=2), torch.zeros(2, 6), torch.zeros(2, 6))
    task = drawn(2, 6, seed=3).abs()
    assert torch.equal(taught_loss(Distillation(), lesson, task, scores, weight), task.sum(1))


@pytest.mark.parametrize("ratings", [False, True])
def test_a_student_that_equals_its_teacher_does_not_move(ratings: bool):
    scores = drawn(3, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_loss(scores, scores.detach(), 3.0, ratings=ratings).sum(), scores)
    assert gradient.abs().max() < 1e-6
    away = torch.autograd.grad(soft_loss(scores, scores.detach() + 1, 3.0, ratings=ratings).sum(), scores)[0]
    assert (away < -0.1).all(), "towards the teacher"
    hidden = drawn(3, 5, 4).requires_grad_()
    activity = (hidden**2).sum(-1)
    (gradient,) = torch.autograd.grad(attention_loss(activity, activity.detach()).sum(), hidden)
    assert gradient.abs().max() < 1e-6
    at = torch.tensor([[0, 1, 2, 4]] * 3)
    angles = cosines(hidden, at)
    (gradient,) = torch.autograd.grad(((angles - angles.detach()) ** 2).sum(), hidden)
    assert gradient.abs().max() < 1e-6


def test_softened_gradients_keep_their_size():
    """At high temperatures d/ds T^2 CE = T (sigmoid(s/T) - sigmoid(t/T)) -> (s - t) / 4 (Hinton et al., section 2.1)."""
    scores, teacher = drawn(4, 4).requires_grad_(), drawn(4, 4, seed=1)
    (gradient,) = torch.autograd.grad(soft_loss(scores, teacher, 200.0).sum(), scores)
    torch.testing.assert_close(gradient, (scores.detach() - teacher) / 4, atol=1e-3, rtol=1e-3)


def test_rotations_of_the_latent_space_change_nothing():
    rotation, _ = torch.linalg.qr(drawn(4, 4, seed=9))
    rows, at = drawn(3, 6, 4), torch.tensor([[0, 2, 5]] * 3)
    torch.testing.assert_close(cosines(rows @ rotation, at), cosines(rows, at), atol=1e-5, rtol=1e-5)
    student, teacher = (rows**2).sum(-1), drawn(3, 6, seed=2).abs()
    turned = ((rows @ rotation) ** 2).sum(-1)
    torch.testing.assert_close(attention_loss(turned, teacher), attention_loss(student, teacher), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(cosines(rows * torch.tensor([1.0, 2, 3, 4]), at), cosines(rows, at), atol=1e-2)


def test_attention_compares_directions():
    student = drawn(2, 5).abs()
    assert attention_loss(7 * student, student).abs().max() < 1e-6
    apart = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert attention_loss(*apart).tolist() == [2.0]


def test_impossible_settings_are_refused():
    wrong = [
        ({"teacher": "locale"}, 'unknown teacher "locale".*Did you mean "local"'),
        ({"weight": 1.5}, r"weight is 1.5; it must be in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"decay": -1.0}, "decay is -1.0"),
        ({"attention": -0.1}, "attention is -0.1"),
        ({"ranking": 0.1}, "set top"),
        ({"teacher": "past", "top": 3}, "keeps no list"),
        ({"compared": 1}, "at least 2 rows"),
        ({"wieght": 0.1}, 'unknown setting "wieght".*Did you mean "weight"'),
        ({"weight": "much"}, "distillation: "),
    ]
    for settings, text in wrong:
        with pytest.raises(ConfigError, match=text):
            from_settings(settings)
    assert from_settings({"teacher": "sent", "weight": 0.25}) == Distillation("sent", 0.25)
    with pytest.raises(ConfigError, match="says nothing in the first step"):
        Objective(distillation=Distillation("past", 0.5))
    for more in ({"epochs": 2}, {"batch": 4}, {"private_steps": 1}):
        Objective(distillation=Distillation("past", 0.5), **more)
