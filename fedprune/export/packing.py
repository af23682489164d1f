"""How one tensor lies in a file: dense, behind a bit mask, or k of n per row, whichever takes the fewest bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import BYTES_PER_ENTRY
from fedprune.errors import RecordError
from fedprune.types import Bytes, Tensors

Form = Literal["dense", "bits", "k_of_n"]
SUFFIXES: dict[Form, tuple[str, ...]] = {"dense": ("",), "bits": (".values", ".mask"), "k_of_n": (".values", ".index")}
"""What follows a tensor's name in the names of its parts. Names in a layout hold no dot."""


def sizes(tensor: Tensor) -> dict[Form, Bytes]:
    """Bytes of a float32 tensor in each form that can hold it, without the file's framing.

    k is the count of the fullest row: where every row has as many entries (`entries.KOfN`), nothing is padded.
    """
    present, columns = tensor != 0, tensor.shape[-1]
    result: dict[Form, Bytes] = {"dense": BYTES_PER_ENTRY * tensor.numel()}
    result["bits"] = BYTES_PER_ENTRY * int(present.sum()) + -(-tensor.numel() // 8)
    if columns <= 1 << 16:
        k = max(1, int(present.sum(-1).max()))
        result["k_of_n"] = tensor.numel() // columns * k * (BYTES_PER_ENTRY + _index_type(columns).itemsize)
    return result


def form(tensor: Tensor) -> Form:
    """The cheapest; of equals the simplest."""
    known = sizes(tensor)
    return min(known, key=lambda name: known[name])


def pack(name: str, tensor: Tensor) -> tuple[Form, Tensors]:
    """A float32 tensor's cheapest form and the tensors that it consists of. -0 becomes 0; all else comes back bit for bit."""
    chosen = form(tensor)
    return chosen, dict(zip((name + s for s in SUFFIXES[chosen]), _PACK[chosen](tensor.contiguous() + 0.0), strict=True))


def unpack(name: str, chosen: str, shape: tuple[int, ...], stored: Mapping[str, np.ndarray]) -> Tensor:
    """The tensor of that shape, from all tensors of a file.

    Raises:
        RecordError: an unknown form, a part that is missing, or of another size or type than the shape asks for.
    """
    if chosen not in SUFFIXES:
        raise RecordError(f'tensor "{name}" is stored as {chosen!r}; this fedprune reads {", ".join(SUFFIXES)}')
    try:
        parts = [stored[name + suffix] for suffix in SUFFIXES[chosen]]
        return torch.from_numpy(_UNPACK[chosen](shape, *parts))
    except KeyError as error:
        raise RecordError(f"tensor {error} is missing") from None
    except ValueError as error:
        raise RecordError(f'tensor "{name}" is stored as {chosen}, but {error}') from None


def _pack_bits(tensor: Tensor) -> tuple[Tensor, ...]:
    present = tensor != 0
    return tensor[present], torch.from_numpy(np.packbits(present.numpy()))


def _unpack_bits(shape: tuple[int, ...], values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    count = math.prod(shape)
    _fits("the mask", mask, np.dtype(np.uint8), (-(-count // 8),))
    present = np.unpackbits(mask, count=count).astype(bool)
    _fits("its values", values, np.dtype(np.float32), (int(present.sum()),))
    result = np.zeros(count, np.float32)
    result[present] = values
    return result.reshape(shape)


def _pack_k_of_n(tensor: Tensor) -> tuple[Tensor, ...]:
    rows = tensor.reshape(-1, tensor.shape[-1])
    present = rows != 0
    k = max(1, int(present.sum(-1).max()))
    index = torch.argsort(present, dim=-1, descending=True, stable=True)[:, :k].sort(-1).values  # rows with fewer: zeros too
    return rows.gather(-1, index), torch.from_numpy(index.numpy().astype(_index_type(rows.shape[-1])))


def _unpack_k_of_n(shape: tuple[int, ...], values: np.ndarray, index: np.ndarray) -> np.ndarray:
    count, columns = math.prod(shape) // shape[-1], shape[-1]
    if index.ndim != 2 or not 1 <= index.shape[1] <= columns:
        raise ValueError(f"the index has shape {index.shape}; it must be ({count}, 1..{columns})")
    _fits("the index", index, _index_type(columns), (count, index.shape[1]))
    _fits("its values", values, np.dtype(np.float32), index.shape)
    order = index.astype(np.int64)
    if order.max() >= columns or (np.diff(order, axis=1) <= 0).any():
        raise ValueError(f"the index does not ascend within 0..{columns - 1} in every row")
    result = np.zeros((count, columns), np.float32)
    np.put_along_axis(result, order, values, 1)
    return result.reshape(shape)


def _unpack_dense(shape: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    _fits("it", values, np.dtype(np.float32), shape)
    return values.copy()


def _fits(what: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{what} is {array.dtype} {array.shape}; it must be {dtype} {shape}")


def _index_type(columns: int) -> np.dtype:
    return np.dtype(np.uint8 if columns <= 1 << 8 else np.uint16)


_PACK: dict[Form, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "dense": lambda tensor: (tensor,),
    "bits": _pack_bits,
    "k_of_n": _pack_k_of_n,
}
_UNPACK: dict[str, Callable[..., np.ndarray]] = {"dense": _unpack_dense, "bits": _unpack_bits, "k_of_n": _unpack_k_of_n}
