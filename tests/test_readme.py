"""The README's example runs as it stands, on a smaller file."""

from __future__ import annotations

import re
from pathlib import Path

from files import interactions

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(tmp_path: Path, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "range(20)" in code and '"ml-100k"' in code
    exec(code.replace('"ml-100k"', repr(str(interactions(tmp_path)))).replace("range(20)", "range(3)"), {})
    assert capsys.readouterr().out.count("reports") == 3
