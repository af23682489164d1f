"""Settings: one flat, typed table per experiment, so that the same file serves every way of running it."""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedprune.catalog import CATALOG
from fedprune.errors import ConfigError, unknown


class Settings(BaseModel):
    """Everything that decides a run's result. Settings of one strategy stand in a table of its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # ---- data and clients
    data: str = Field("ml-100k", description="a known data set, or the path of a user's own file")
    min_interactions: int = Field(1, ge=1, description="k-core: fewest interactions per user and item")
    catalogue: str | None = Field(None, description="item ids, one per line, for devices that bring their own data")
    silos: int | None = Field(None, ge=1, description="number of silos of users; none: one client per user")
    silos_by: Literal["equal", "quantity", "dirichlet"] = Field("equal", description="how users are dealt to silos")

    silos_alpha: float = Field(0.5, gt=0, description="concentration of the Dirichlet; small: a taste sits in few silos")

    # ---- model
    recommender: str = Field("mf", description="see `fedprune list recommenders`")
    latent: int = Field(32, ge=1, description="embedding dimensions")
    hidden: list[int] = Field([32, 16], description="widths of the tower, for mlp and neumf")
    scale: float = Field(0.05, gt=0, description="standard deviation of the initial embeddings")
    warm_start: int = Field(8, ge=0, description="iterations of the federated SVD; 0: random embeddings")
    popularity_bias: bool = Field(True, description="start item biases from their log popularity (one released sum)")

    # ---- strategy
    strategy: str = Field("fedavg", description="see `fedprune list strategies`")
    strategies: list[str] = Field([], description="what `compare` compares")
    cohort: int | None = Field(None, ge=1, description="clients per round; none: everybody")
    rows: Literal["table", "touched"] = Field("table", description="item rows that travel: all, or a client's own")

    # ---- local and server optimisation
    negatives: int = Field(4, ge=1, description="unseen items per positive, drawn anew for every report")
    epochs: int = Field(1, ge=1, description="passes over the local examples per report")
    batch: int | None = Field(None, ge=1, description="examples per local step; none: all in one")
    lr: float = Field(1.0, gt=0, description="local learning rate of what is shared")
    lr_private: float = Field(0.08, gt=0, description="learning rate of the private rows")
    decay_private: float = Field(0.001, ge=0, description="L2 penalty on the private rows")
    private_steps: int = Field(0, ge=0, description="further local steps on the private rows alone")
    recency: bool = Field(False, description="newer positives weigh more in the private rows' gradient")
    recency_weight: float = Field(20.0, ge=0, description="how much more the newest weighs")
    recency_horizon: float = Field(4.0, gt=0, description="after how many later positives that has fallen to 1/e")
    sparse: float = Field(0.0, ge=0, description="weight of a penalty that makes units or entries prunable")
    sparse_by: Literal["units", "entries"] = Field("units", description="group lasso over units, or L1 over entries")
    nested: float = Field(0.0, ge=0, description="weight of the self-distillation from a client's width to half of it")
    distillation: dict[str, float | int | str] = Field({}, description="a teacher: see distill.Distillation")
    entries: dict[str, Any] = Field({}, description="a mask of entries: kind (see entries.KINDS) and its own settings")
    server: Literal["adam", "average"] = Field("adam", description="server optimiser")
    server_lr: float = Field(0.015, gt=0, description="its learning rate")

    # ---- devices
    devices: Literal["linear", "phones", "named"] = Field("linear", description="see `fedprune list devices`")
    sigma: float = Field(10.0, ge=1, description="slowest over fastest, for linear devices")
    device_class: str = Field("balanced", description="compute_bound, balanced or slow_uplink, for linear devices")
    report_seconds: float = Field(10.0, gt=0, description="an average full report on the fastest linear device")
    mix: dict[str, int] = Field({}, description="named devices and their proportions")
    workload: Literal["own", "equal"] = Field("own", description="charge each client its own work, or all the average")
    memory_limited: float = Field(0.0, ge=0, le=1, description="share of devices whose memory cannot hold the full model")
    memory_rate: float = Field(0.5, gt=0, lt=1, description="the largest rate whose float32 parameters these can hold")
    memory_who: Literal["slowest", "random"] = Field("slowest", description="which devices these are")
    noise: float = Field(0.0, ge=0, le=2, description="standard deviation of the log of an order's duration")
    availability: float = Field(1.0, gt=0, le=1, description="share of the time that a client can be reached")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of vanishing in the middle of an order")

    # ---- how long, and what is measured
    rounds: int = Field(200, ge=1, description="at most so many")
    virtual_seconds: float | None = Field(None, gt=0, description="stop at this virtual time; none: by rounds alone")
    evaluations: int = Field(30, ge=1, description="how often quality is measured on the way, evenly in virtual time or rounds")
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without a better one")
    target: float | None = Field(None, gt=0, lt=1, description="validation NDCG@10 (expected 1+99) to be timed")
    listen_steps: int = Field(10, ge=0, description="private steps per evaluation of clients that are never asked")
    fleet: Literal["vector", "serial"] = Field("vector", description="stacked clients, or the reference")
    checkpoint: int = Field(20, ge=1, description="rounds between checkpoints")
    seed: int = Field(0, ge=0, description="of everything that is random")

    # ---- per strategy
    tables: dict[str, dict[str, Any]] = Field({}, description="[strategy] tables: its own settings, or any of the above")

    def of(self, strategy: str) -> tuple[Settings, dict[str, Any]]:
        """Settings for one strategy, its table applied, and the arguments for its row of the catalog."""
        if strategy not in CATALOG:
            raise ConfigError(unknown("strategy", strategy, CATALOG))
        own = inspect.signature(CATALOG[strategy]).parameters
        table = self.tables.get(strategy, {})
        arguments = {key: value for key, value in table.items() if key in own}
        general = {key: value for key, value in table.items() if key not in own}
        for key in general:
            if key not in Settings.model_fields or key in ("tables", "strategies", "strategy"):
                raise ConfigError(f"[{strategy}]: {unknown('setting', key, sorted({*own, *_general()}))}")
            if key in COMMON:
                raise ConfigError(f'[{strategy}]: "{key}" is the same for all that is compared; set it outside the table')
        if self.cohort is not None and "cohort" in own:
            arguments.setdefault("cohort", self.cohort)
        values = self.model_dump() | general | {"strategy": strategy, "strategies": [], "tables": {}}
        values["tables"] = {strategy: arguments} if arguments else {}
        return validated(values), arguments

    def only(self, strategy: str) -> Settings:
        """These settings for one strategy alone, its table still apart.

        Raises:
            ConfigError: an unknown strategy, or a bad setting in its table.
        """
        self.of(strategy)
        table = {strategy: self.tables[strategy]} if strategy in self.tables else {}
        return self.model_copy(update={"strategy": strategy, "strategies": [], "tables": table})

    def changed(self) -> dict[str, Any]:
        """Settings that differ from their defaults."""
        default = Settings.model_validate({})
        return {name: value for name, value in self.model_dump().items() if value != getattr(default, name)}

    def to_json(self) -> str:
        """The same settings from `from_json`, on another machine."""
        return json.dumps(self.changed(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Settings:
        """Settings that another process wrote.

        Raises:
            ConfigError: a setting that this version does not know.
        """
        return validated(json.loads(text))

    def identity(self) -> str:
        """`<strategy>-<hash of settings that differ from their defaults>`: a new setting at its default renames nothing."""
        changed = {name: value for name, value in self.changed().items() if name not in ("seed", "strategies")}
        digest = hashlib.blake2b(json.dumps(changed, sort_keys=True).encode(), digest_size=4).hexdigest()
        return f"{self.strategy}-{digest}"


COMMON = (
    "data", "catalogue",
    "min_interactions", "silos", "silos_by", "silos_alpha", "devices", "sigma", "device_class", "report_seconds", "mix",
    "memory_limited", "memory_rate", "memory_who", "workload", "noise", "availability", "dropout", "virtual_seconds",
    "evaluations", "target", "seed",
)  # fmt: skip
"""Settings that runs must share to be comparable."""


def _general() -> list[str]:
    return [name for name in Settings.model_fields if name not in ("tables", "strategies", "strategy")]


def validated(values: Mapping[str, Any]) -> Settings:
    """Settings from a table.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type, or a value out of range.
    """
    values = dict(values)
    tables = dict(values.pop("tables", {}))
    for key in list(values):
        if key in CATALOG and isinstance(values[key], Mapping):
            tables[key] = dict(tables.get(key, {})) | dict(values.pop(key))
        elif key not in Settings.model_fields:
            raise ConfigError(unknown("setting", key, [*_general(), "strategy", "strategies", *CATALOG]))
    try:
        return Settings(**values, tables=tables)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        about = Settings.model_fields[str(first["loc"][0])].description if first["loc"] else ""
        raise ConfigError(f"{name} = {first['input']!r}: {first['msg']} ({name}: {about})") from None


def read(path: Path | None, changes: Sequence[str] = (), base: Mapping[str, Any] = MappingProxyType({})) -> Settings:
    """Settings from a TOML file, if any, and `key=value` changes.

    A change's value is read as TOML where it is valid TOML, else as text: `sigma=5`, `recency=true`, `data=my.csv`,
    `skip.pace=1.5`.

    Args:
        base: what holds where neither says otherwise.

    Raises:
        ConfigError: no such file, broken TOML, or a bad setting.
    """
    try:
        values = dict(base) | ({} if path is None else tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"no settings file {path}; see configs/ for examples") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a .toml file in it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(f'--set {change}: write it as key=value, as in "sigma=5" or "skip.pace=1.5"')
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = None if text.strip() in ("none", "null") else text
        *table, name = key.strip().split(".")
        target = values
        for part in table:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise ConfigError(f'--set {change}: "{part}" is a setting, not a table')
        if name == "kind" and target.get("kind", value) != value:
            target.clear()  # what the file says of another kind
        target[name] = value
    return validated(values)
