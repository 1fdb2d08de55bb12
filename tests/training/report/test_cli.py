"""`elbow-train report` as typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from training.__main__ import main
from training.report.make import Report


def test_options_reach_the_report(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Report] = []

    def write(self: Report) -> Path:
        seen.append(self)
        return self.folder / "index.html"

    monkeypatch.setattr(Report, "write", write)
    arguments = ["--landscape", trained("z2"), "--direct", trained("direct"), "--to", tmp_path, "--rows", "20", "--digit", "3"]
    assert main(["report", str(trained("iterative")), *map(str, arguments), "--optimum"]) == 0
    (made,) = seen
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"
    assert (made.effort.race.rows, made.effort.landscape_row, made.effort.race.with_optimum) == (20, 3, True)
    assert (made.z2 is not None, made.direct is not None) == (True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rows", "64"], "at most 63")],
)
def test_a_mistake_is_one_line_on_stderr(
    trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["report", str(trained("iterative")), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
