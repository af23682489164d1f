"""Where a dense model and its students are trained and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.compress.cutting import share, tickets, turned, units
from fedprune.config import Settings
from fedprune.data import Split
from fedprune.distill import Distillation
from fedprune.errors import ConfigError, unknown
from fedprune.evaluation import evaluate, rating_errors
from fedprune.pruning import Given
from fedprune.random import stream
from fedprune.serving import listen, scorer
from fedprune.simulation import Simulation, prepare
from fedprune.strategy import one_round
from fedprune.submodel import Submodel
from fedprune.types import FloatArray, IntArray, Tensors

METHODS = ("sp-sad", "lth-sad", "ss-sad", "magnitude")
Task = Literal["implicit", "ratings"]
Watch = Callable[[str, int, int], None]
"""Called as training goes on: what is trained, which round, of how many."""


TAUGHT = Distillation("given", weight=0.9, relation=0.05)
"""What students hear from the dense model: its scores, and its item embeddings' similarities, the analogue of a
self-attention map. The weights are ours, chosen on validation; attention transfer on activations did not help."""


@dataclass(frozen=True)
class Recipe:
    """How long and how to train.

    Attributes:
        dense: rounds of the dense model.
        rounds: of a student's last training.
        retrain: of each ticket on the way.
        prunings: steps in which a ticket shrinks to its final share.
        early: round of the checkpoint that tickets rewind to.
        evaluations: how often validation looks at a training; the best round counts.
        implicit, ratings: what the teacher says, by task.
        lr_private, decay_private, server_lr: of ratings, where all examples are a user's own and overfit sooner.
    """

    dense: int = 60
    rounds: int = 40
    retrain: int = 10
    prunings: int = 3
    early: int = 3
    evaluations: int = 10
    implicit: Distillation = TAUGHT
    ratings: Distillation = TAUGHT
    lr_private: float = 0.02
    decay_private: float = 0.3
    server_lr: float = 0.01

    def __post_init__(self) -> None:
        if min(self.dense, self.rounds, self.retrain, self.prunings, self.evaluations) < 1 or not 0 <= self.early < self.dense:
            raise ConfigError(
                f"dense {self.dense}, rounds {self.rounds}, retrain {self.retrain}, prunings {self.prunings} and evaluations "
                f"{self.evaluations} must be at least 1, early {self.early} from 0 to dense - 1"
            )


@dataclass(frozen=True)
class Fitted:
    """A model at the round that validation chose.

    Attributes:
        model, private: shared tensors, and everybody's private rows.
        submodel: what of the model counts.
        early: model and private rows of the early checkpoint (a dense model's).
        test: `hr10_full` and so on, or `mse` and `mae`.
    """

    model: Tensors
    private: Tensors
    submodel: Submodel
    validation: dict[str, float]
    test: dict[str, float]
    early: tuple[Tensors, Tensors] | None = None


@dataclass
class Bench:
    """One data set, one architecture, one task: where models are trained and judged; `Bench.of` sets it up.

    Attributes:
        start: model and private rows before any training.
    """

    simulation: Simulation
    task: Task
    start: tuple[Tensors, Tensors]
    recipe: Recipe
    watch: Watch | None = None

    @classmethod
    def of(
        cls, settings: Settings, split: Split, task: Task = "implicit", recipe: Recipe | None = None, watch: Watch | None = None
    ) -> Bench:
        """Build data, model and private rows.

        Args:
            settings: of the dense model's training; its devices, strategy, masks and teachers do not matter here.

        Raises:
            ConfigError: ratings are asked for and there are none.
        """
        train, recipe = split.train, recipe or Recipe()
        if task == "ratings" and train.rating is None:
            raise ConfigError(f'{settings.data} has no ratings; leave them out (task "implicit"), or add a column "rating"')
        one: dict[str, Any] = {
            "strategy": "fedavg", "sigma": 1.0, "workload": "equal", "silos": None, "tables": {}, "strategies": [],
            "entries": {}, "distillation": {}, "nested": 0.0, "dropout": 0.0, "availability": 1.0, "noise": 0.0,
        }  # fmt: skip
        if task == "ratings":
            names = ("lr_private", "decay_private", "server_lr")
            one |= {name: getattr(recipe, name) for name in names} | {"recency": False}
        simulation = prepare(settings.model_copy(update=one), split)
        strategy = simulation.strategy
        simulation = replace(simulation, strategy=replace(strategy, objective=replace(strategy.objective, task=task)))
        model = dict(simulation.state.model)
        if train.rating is not None and task == "ratings":
            model["item_bias"] = mean_ratings(train.item, train.rating, train.items)
        rows = {name: t.clone() for name, t in simulation.fleet.population.private.values.items()}
        return cls(simulation, task, (model, rows), recipe, watch)

    @property
    def split(self) -> Split:
        """The data."""
        return self.simulation.split

    @property
    def layout(self) -> Layout:
        """Of the dense model."""
        return self.simulation.recommender.layout

    # ---- the four ways, and the dense model --------------------------------------------------------------------------

    def dense(self, given: Tensors | None = None) -> Fitted:
        """The teacher: trained here, or a run's model to which private rows are fitted.

        A run has no early checkpoint, so that tickets of its model go on from it instead of being rewound.
        """
        if given is None:
            return self._train("dense", Submodel.full(self.layout), None, self.start, self.recipe.dense)
        return self._fitted_to(given)

    def student(self, method: str, keep: float, teacher: Fitted) -> Fitted:
        """A model of at most `keep` of the dense one's parameters, by one of `METHODS`.

        Raises:
            ConfigError: an unknown method, or a share that is out of range or below the smallest model.
        """
        if method not in METHODS:
            raise ConfigError(unknown("method", method, METHODS))
        if not 0 < keep <= 1:
            raise ConfigError(f"keep is {keep}; it must be in (0, 1], the share of the dense model's parameters that is left")
        distillation = self.recipe.implicit if self.task == "implicit" else self.recipe.ratings
        self.simulation.fleet.population.teacher = teacher.model, teacher.private
        layout, rounds = self.layout, self.recipe.rounds
        match method:
            case "magnitude":
                ticket = tickets(teacher.model, layout, Submodel.full(layout), keep)
                return self._train(method, ticket, None, (teacher.model, teacher.private), rounds)
            case "sp-sad":
                start = turned(self.simulation.recommender, teacher.model, teacher.private)
                return self._train(method, units(start[0], layout, keep), distillation, start, rounds)
            case "lth-sad":
                return self._lottery(method, Submodel.full(layout), distillation, keep, teacher, teacher)
            case _:
                cut = units(teacher.model, layout, keep**0.5)
                start = teacher.model, teacher.private
                first = self._train(f"{method}, cut", cut, distillation, start, self.recipe.retrain)
                return self._lottery(method, cut, distillation, keep, teacher, first)

    def _lottery(
        self, method: str, held: Submodel, distillation: Distillation, keep: float, teacher: Fitted, first: Fitted
    ) -> Fitted:
        """Prune what was trained, rewind, train again; the last ticket gets the longest training."""
        fitted, ticket, steps = first, held, self.recipe.prunings
        assert teacher.early is not None
        early = teacher.early
        begun = share(self.layout, held)
        for step in range(1, steps + 1):
            ticket = tickets(fitted.model, self.layout, ticket, begun * (keep / begun) ** (step / steps))
            rounds = self.recipe.rounds if step == steps else self.recipe.retrain
            fitted = self._train(f"{method}, ticket {step} of {steps}", ticket, distillation, early, rounds)
        return fitted

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _train(
        self, name: str, submodel: Submodel, distillation: Distillation | None, start: tuple[Tensors, Tensors], rounds: int
    ) -> Fitted:
        """Train a submodel from here; the best of the validated rounds. Rounds and optimisers start anew.

        Chance is each training's own: a student that met the negatives again that its teacher has learned by heart was
        measured to lose .01 of NDCG.
        """
        simulation, population = self.simulation, self.simulation.fleet.population
        objective = replace(simulation.strategy.objective, distillation=distillation)
        strategy = replace(simulation.strategy, pruning=Given(submodel), objective=objective)
        simulation.fleet.settle()
        population.restart(start[1])
        seed = int(stream(self.simulation.settings.seed, name).integers(2**31))
        state = replace(simulation.state, model=dict(start[0]), seed=seed)
        best: Fitted | None = None
        early = None if self.recipe.early else (dict(start[0]), {n: t.clone() for n, t in start[1].items()})
        looks = {round(rounds * look / self.recipe.evaluations) for look in range(1, self.recipe.evaluations + 1)}
        for number in range(1, rounds + 1):
            state, _ = one_round(strategy, state, simulation.fleet)
            if number == self.recipe.early or number in looks:
                simulation.fleet.settle()
                rows = {n: t.clone() for n, t in population.private.values.items()}
                if number == self.recipe.early:
                    early = state.model, rows
                if number in looks:
                    here = Fitted(state.model, rows, submodel, self.judge(state.model, rows, submodel, "validation"), {})
                    best = here if best is None or self._value(here) > self._value(best) else best
            if self.watch is not None:
                self.watch(name, number, rounds)
        assert best is not None
        return replace(
            best, early=early if name == "dense" else None, test=self.judge(best.model, best.private, submodel, "test")
        )

    def judge(
        self, model: Tensors, private: Tensors, submodel: Submodel, on: Literal["validation", "test"]
    ) -> dict[str, float]:
        """Ranking quality, or rating errors, of everybody scored with one submodel."""
        everybody = [submodel] * self.split.train.users
        score = scorer(self.simulation.recommender, model, private, everybody)
        if self.task == "ratings":
            return rating_errors(score, self.split, on)
        return evaluate(score, self.split, on)

    def _value(self, fitted: Fitted) -> float:
        return -fitted.validation["mse"] if self.task == "ratings" else fitted.validation["ndcg10_expected"]

    def _fitted_to(self, model: Tensors) -> Fitted:
        population = self.simulation.fleet.population
        shapes = {name: tuple(t.shape) for name, t in model.items()}
        wanted = {name: self.layout.shape(name) for name in self.layout.named("shared", "touched")}
        if shapes != wanted:
            raise ConfigError(f"the run's model has tensors {shapes}; these settings need {wanted}")
        listen(
            self.simulation.recommender, population, model, list(range(population.clients)),
            self.simulation.strategy.objective, steps=60, seed=self.simulation.settings.seed, version=0,
        )  # fmt: skip
        rows = {n: t.clone() for n, t in population.private.values.items()}
        full = Submodel.full(self.layout)
        judged = [self.judge(model, rows, full, on) for on in ("validation", "test")]
        return Fitted(model, rows, full, judged[0], judged[1], (model, rows))


def mean_ratings(item: IntArray, rating: FloatArray, items: int) -> Tensor:
    """Each item's mean rating, drawn towards the mean of all as if by ten further ratings; float32 `[items]`."""
    counts = np.bincount(item, minlength=items)
    sums = np.bincount(item, weights=rating, minlength=items)
    return torch.from_numpy((sums + 10.0 * rating.mean()) / (counts + 10.0)).float()
