"""The arrows between modules point downwards, and no file is too long to read."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedprune"
LAYERS = [
    "types errors random",
    "axes submodel",
    "recommenders data distill objective sparse codec precision thinning "
    "exchange devices energy metrics ranking evaluation "
    "baselines warmstart",
    "selection rates spending pruning entries gather merge",
    "strategy catalog population training teaching serving workload",
    "fleet",
    "config record experiment snapshot simulation report export compress",
    "flower",
    "comparison cli __init__ __main__",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
DECISIONS = set(LAYERS[3].split())
"""Siblings that know nothing of each other, so that each can be answered on its own."""
LONGEST = 400


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part(name: str) -> str:
    """`fedprune.fleet.virtual` -> `fleet`; the package itself is `__init__`."""
    return [*name.split("."), "__init__"][1]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    package = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from fedprune import axes` imports a module, `from fedprune.axes import Axis` a name of one.
            found.update(f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names)
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def own(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "fedprune"}


def test_every_module_has_a_layer():
    unknown = sorted({part(module(path)) for path in files()} - set(RANK))
    assert not unknown, f"add {', '.join(unknown)} to LAYERS in {Path(__file__).name}, as low as its imports allow"


@pytest.mark.parametrize("path", files(), ids=module)
def test_arrows_point_downwards(path: Path):
    here = part(module(path))
    for name in sorted(own(path)):
        there = part(name)
        assert RANK[there] <= RANK[here], f"{module(path)} (layer {RANK[here]}) imports {name} (layer {RANK[there]})"
        assert here == there or not {here, there} <= DECISIONS, f"{module(path)} imports its sibling {name}"


def test_there_is_no_circle():
    """Also within a layer, and within a package but for its own `__init__`."""
    graph = {module(path): {name for name in own(path) if is_module(name)} - {module(path)} for path in files()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle in it


@pytest.mark.parametrize("path", files(), ids=module)
def test_flower_is_imported_under_flower_only(path: Path):
    foreign = {name.split(".")[0] for name in imports(path)}
    assert "flwr" not in foreign or part(module(path)) == "flower"
    assert "ray" not in foreign, "Ray comes with Flower's simulation; nobody imports it"


@pytest.mark.parametrize("path", files(), ids=module)
def test_every_module_imports(path: Path):
    if part(module(path)) == "flower":
        pytest.importorskip("flwr", reason="flwr is not installed")
    importlib.import_module(module(path))


def test_no_file_is_too_long():
    paths = [*files(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "simulations").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): count for path in paths if (count := len(path.read_text().splitlines())) > LONGEST}
    assert not long, f"over {LONGEST} lines: {long}"


def test_the_parser_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert {"fedprune.axes", "fedprune.merge", "fedprune.random"} <= own(PACKAGE / "strategy.py")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    folder = tmp_path / "fedprune" / "fleet"
    folder.mkdir(parents=True)
    (tmp_path / "fedprune" / "axes.py").touch()
    example = folder / "one.py"
    example.write_text("from fedprune import axes\nfrom ..axes import Axis\ndef f():\n    import flwr.client as c\n")
    assert imports(example) == {"fedprune.axes", "flwr.client"}
    (folder / "__init__.py").write_text("from . import one\nfrom fedprune.fleet.one import f\n")
    assert imports(folder / "__init__.py") == {"fedprune.fleet.one"}
