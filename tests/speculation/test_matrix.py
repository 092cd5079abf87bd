"""`python -m speculation.matrix`: pieces go on where the last one stopped, and the page says what was found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from . import matrix
from .report import HEADING

if TYPE_CHECKING:
    from pathlib import Path


def test_pieces_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record, page, found = tmp_path / "record", tmp_path / "page.md", tmp_path / "matrix.json"
    piece = ["--record", str(record), "--models", "random", "--method", "pld", "--seconds", "0"]
    for done in (1, 2):  # the first cell of a piece is run however little time there is
        monkeypatch.setattr("sys.argv", ["matrix", *piece])
        matrix.main()
        assert capsys.readouterr().out == f"{done} of 180 cells, 0 wrong\n"
    about, *lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert about["versions"]["torch"]
    assert [line["cell"] for line in lines] == ["k1-depth0-batch1-plain", "k1-depth0-batch1-prefix_hit"]
    record.write_text(record.read_text() + json.dumps({**lines[0], "cell": "another", "wrong": "own: a token"}) + "\n")

    page.write_text(f"# Page\n\nText.\n\n{HEADING}\n\nWhat was before.\n")
    found.write_text("{}")
    monkeypatch.setattr(matrix, "PAGE", page)
    monkeypatch.setattr(matrix, "MATRIX", found)
    # The second of two, which runs nothing that the first has.
    other = tmp_path / "other"
    shared = ["--models", "random", "--method", "pld", "--seconds", "0", "--share", "1/2"]
    monkeypatch.setattr("sys.argv", ["matrix", *shared, "--record", str(other), str(record)])
    matrix.main()
    assert "4 of 180 cells, 1 wrong" in capsys.readouterr().out
    assert [json.loads(line)["cell"] for line in other.read_text().splitlines()[1:]] == ["k1-depth0-batch1-preempted"]
    both = json.loads(other.read_text().splitlines()[0]) | {"device": {"cpu": "another", "cores": 3, "cpu_capability": "none"}}
    other.write_text("\n".join([json.dumps(both), *other.read_text().splitlines()[1:]]) + "\n")
    monkeypatch.setattr("sys.argv", ["matrix", "--models", "random", "--publish", "--record", str(record), str(other)])
    matrix.main()
    text = page.read_text()
    assert text.startswith("# Page\n\nText.\n\n## The whole matrix\n")
    assert "What was before" not in text
    assert "| pld | 180 | 4 | 3 |" in text
    assert "| mtp | 180 | 0 | 0 |" in text
    assert "; another, 3 cores, none; python " in text
    assert lines[0]["date"][:10] in text
    assert json.loads(found.read_text())["random"]["rows"]["pld"] == {"run": 4, "equal": 3}


def test_a_wrong_proposer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["matrix", "--record", str(tmp_path / "r"), "--models", "trained", "--method", "pld"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "--method is 'pld'; it may be longcat-nano: mtp" in capsys.readouterr().err


def test_a_wrong_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["matrix", "--record", str(tmp_path / "r"), "--share", "3/2"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "'3/2' is not like 2/14" in capsys.readouterr().err
