"""Which entries of a client's units are there? Lottery tickets and their kin; they compose with any choice of units."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from fedprune.entries.base import All as All
from fedprune.entries.base import Entries as Entries
from fedprune.entries.base import joined as joined
from fedprune.entries.feedback import Feedback as Feedback
from fedprune.entries.learned import KOfN as KOfN
from fedprune.entries.lottery import Lottery as Lottery
from fedprune.entries.personal import Personal as Personal
from fedprune.entries.salient import Salient as Salient
from fedprune.errors import ConfigError, unknown

KINDS = {"lottery": Lottery, "feedback": Feedback, "k_of_n": KOfN, "personal": Personal, "salient": Salient}
"""By the names that settings use."""


def from_settings(values: Mapping[str, Any]) -> Entries:
    """A choice of entries from a table: its `kind`, and what that kind takes.

    Raises:
        ConfigError: an unknown kind or setting, or a value out of range.
    """
    kind = str(values.get("kind"))
    if kind not in KINDS:
        raise ConfigError(unknown("kind of entries", kind, KINDS))
    settings = {name: value for name, value in values.items() if name != "kind"}
    known = {entry.name: entry for entry in fields(KINDS[kind])}
    for name in settings:
        if name not in known:
            raise ConfigError(f"entries {kind}: {unknown('setting', name, known)}")
    for name, entry in known.items():
        if entry.default is MISSING and name not in settings:
            raise ConfigError(f'entries {kind} needs "{name}"; set it as entries.{name}=...')
    try:
        return KINDS[kind](**settings)
    except TypeError as error:  # a text where a number is wanted
        raise ConfigError(f"entries {kind}: {error}") from None
