"""ONNX, for runtimes that are not PyTorch: one user's private rows in, scores of the whole catalogue out."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fedprune.axes import BYTES_PER_ENTRY
from fedprune.errors import ConfigError
from fedprune.export.model import Compact

LARGEST = 2**31 - 2**20
"""Bytes: protobuf, and so an ONNX file, ends at 2 GiB."""


def require() -> None:
    """Nothing, where the exporter is installed.

    Raises:
        ConfigError: it is not.
    """
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise ConfigError(f"{name} is not installed, and writing ONNX needs it; pip install 'fedprune[onnx]'") from None


def to_onnx(compact: Compact, path: Path) -> None:
    """Write the model as an ONNX file in one step.

    Inputs are named like the private tensors, `[batch, ...]` at held widths (`Compact.rows` cuts them), the output `scores`
    is `[batch, items]`; the batch is as long as the caller likes. Entries that are masked are zeros here: ONNX stores and
    multiplies them densely.

    Raises:
        ConfigError: onnx or onnxscript is not installed, or the model is larger than an ONNX file can be.
    """
    require()
    size = BYTES_PER_ENTRY * sum(tensor.numel() for tensor in compact.tensors.values())
    if size > LARGEST:
        raise ConfigError(f"the model has {size:,} dense bytes, an ONNX file at most {LARGEST:,}; export it narrower")
    names = compact.recommender.layout.named("private")
    shapes = [compact.recommender.layout.shape(name, compact.widths)[1:] for name in names]
    batch, new = torch.export.Dim("batch"), path.with_name(path.name + ".new")
    with _quiet():
        torch.onnx.export(
            _Scoring(compact, names),
            tuple(torch.ones(2, *shape) for shape in shapes),  # one user would be taken for a constant
            new,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=names,
            output_names=["scores"],
            dynamic_shapes=(tuple({0: batch} for _ in names),),
        )
    os.replace(new, path)


class _Scoring(nn.Module):
    def __init__(self, compact: Compact, names: list[str]) -> None:
        super().__init__()
        self._compact, self._names = compact, names
        for name, tensor in compact.tensors.items():
            self.register_buffer(name, tensor)
        self.eval()

    def forward(self, *rows: Tensor) -> Tensor:
        given = {name: buffer[None] for name, buffer in self.named_buffers()}
        given |= {name: own[:, None] for name, own in zip(self._names, rows, strict=True)}
        return self._compact.recommender.score(given)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporter says of itself: its own deprecated calls, and operators of packages nobody asked for."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"# The axis name: batch will not be used", UserWarning)  # shared by two inputs
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
