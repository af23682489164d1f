"""A trained model as it goes to a device that only recommends: cut, packed, measured, as a file of ours or as ONNX."""

from fedprune.export.folder import export as export
from fedprune.export.measuring import measure as measure
from fedprune.export.measuring import measure_all as measure_all
from fedprune.export.model import Compact as Compact
from fedprune.export.model import compact as compact
from fedprune.export.model import load as load
from fedprune.export.portable import to_onnx as to_onnx
