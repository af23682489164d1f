"""Vocabulary: what the bare numbers in signatures mean."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ClientId: TypeAlias = int
"""0 .. clients-1; a client is a device, with one user's data or a silo of users."""
Ticket: TypeAlias = int
"""Number of an order, unique in a run and rising in the order of sending."""
Version: TypeAlias = int
"""How many merges the global model has behind it."""
Seconds: TypeAlias = float
Joules: TypeAlias = float
Bytes: TypeAlias = int
Rate: TypeAlias = float
"""Share of every prunable axis, 0 < rate <= 1: how much of the model (its width) a client gets."""

Tensors: TypeAlias = dict[str, Tensor]
IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
Memory: TypeAlias = dict[str, np.ndarray]
"""What a part of a strategy remembers between rounds: named arrays, so that it can be saved as it is."""
