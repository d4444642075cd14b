"""The report's chapter on what the pictures show: rows of the worst pictures, figures, and near copies."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from curation.commands.report.charts import counted
from curation.commands.report.checked import MAX_ROWS
from curation.commands.report.facts import gather
from curation.commands.report.page import render
from tests.commands.checked_root import CheckedRoot, Made, face, prompt, seen
from tests.commands.synthetic_root import HOSTILE
from tests.commands.test_audit_checks import A, B, planted_root
from tests.commands.test_report import Page, report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_root(tmp_path_factory.mktemp("checked") / "root").root


@pytest.fixture(scope="module")
def page(root: Path) -> Page:
    return report(root, root.parent / "report.html")


def alts(page: Page, words: str = "generated image of") -> list[str]:
    """What the pictures of the page are called, in order."""
    found = [str(attributes.get("alt")) for attributes in page.all("img")]
    return [alt for alt in found if alt.startswith(words) and "Prompt:" in alt]


def test_twelve_pictures_of_each_group_the_worst_first(page: Page) -> None:
    found = alts(page)
    assert len(found) == 24
    first, second = found[:12], found[12:]
    assert [alt.startswith("generated image of a") for alt in found] == [True] * 12 + [False] * 12
    assert ["failed: face 0, prompt 0.100, group 0.70 (white male)" in alt for alt in first] == [True] * 5 + [False] * 7
    assert all(", passed. Prompt: A person." in alt for alt in (*first[5:], *second))
    assert "2 tries" in page.text and "1 try" in page.text
    assert len({attributes["src"] for attributes in page.all("img")}) >= 1
    assert all(str(attributes["src"]).startswith("data:image/jpeg;base64,") for attributes in page.all("img"))


def test_the_figures_are_those_of_the_audit(page: Page) -> None:
    assert (
        "105 pictures were made for 80 samples: 70 were kept, 5 of them though they failed a check, and 10" in page.text
    )
    row = page.row(A, 8)
    rows = [row for row in page.rows if row and row[0] == A]
    assert any(row[1:5] == ["40", "65", "10", "0"] and row[6].startswith("62.5 %") for row in rows), row
    assert any(row[1:3] == ["30", "33"] and row[3].startswith("83.3 %") and row[5] == "white male 5" for row in rows)
    assert any(row[1].startswith("61.5 %") for row in rows)
    assert "got a first picture that failed a check, 0.0 % of the others'" in " ".join(page.text.split())
    assert "Scores of picture and prompt" in page.text
    assert "Not measured: stage 06 has computed no features" in page.text


def test_a_folder_that_was_not_checked_says_so(tmp_path: Path) -> None:
    CheckedRoot(tmp_path / "root").add("00000000", [Made("a", A, [{}])], checked=False)
    text = report(tmp_path / "root", tmp_path / "a.html").text
    assert "Not checked: stage 03 made these pictures without" in text and "The worst pictures" not in text
    without = report(tmp_path / "root", tmp_path / "b.html", "--no_audit")
    assert without.text.count("Left out (--no_audit).") == 2


def test_near_copies_are_shown(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("pyarrow")
    from tests.commands.test_audit_variety import write_features

    made = CheckedRoot(tmp_path / "root")
    made.add("00000000", [Made(f"k{number}", A if number % 2 else B, [{"face": face()}]) for number in range(8)])
    rows = np.eye(8, dtype=np.float32)
    rows[:3] = rows[0]
    write_features(tmp_path / "root" / "scores", "00000000", [f"k{n}" for n in range(8)], rows, made.root / "edits")
    page = report(tmp_path / "root", tmp_path / "a.html")
    assert "Cluster 1" in page.text and "3 pictures" in page.text
    assert any(row[:2] == [A, "4"] and row[4].startswith("25.0 %") for row in page.rows if len(row) > 5)
    other = np.eye(8, dtype=np.float32)
    write_features(tmp_path / "root" / "more", "00000000", [f"k{n}" for n in range(8)], other, made.root / "edits")
    (tmp_path / "root" / "more" / "00000000.npz").write_bytes(b"no zip")
    (tmp_path / "root" / "scores" / "_receipts").rename(tmp_path / "root" / "scores" / "receipts")
    assert "diversity and near copies are not measured" in report(tmp_path / "root", tmp_path / "b.html").text


def test_what_the_data_says_is_text(tmp_path: Path) -> None:
    said = {"face": face(False), "prompt": prompt(0.3), "group": seen(HOSTILE, A), HOSTILE: {"passed": False}}
    made = CheckedRoot(tmp_path / "root")
    made.add("00000000", [Made(f"k{n}", HOSTILE, [said], prompt=HOSTILE) for n in range(3)])
    page = report(tmp_path / "root", tmp_path / "a.html")
    assert not [a for _, a in page.tags if "onerror" in a] and len(page.all("script")) == 1
    assert page.text.count(HOSTILE) > 5
    assert not page.all("img", src="x")


ODD_KEYS = ("plain", "two  spaces", "nb\u00a0sp", "rtl\u202eabc", "  lead", "trail ", "ünï/çödé", "a/b/c", "x" * 230)


@pytest.mark.parametrize(("shard", "loose"), [("00000000", False), ("00000000", True), ("folder/a-shard", True)])
def test_every_picture_is_found(shard: str, loose: bool, tmp_path: Path) -> None:
    """Under any key that an edit may have, in tars and in folders of loose files of any name."""
    made = CheckedRoot(tmp_path / "root")
    made.add(shard, [Made(key, A, [{"face": face(False)}]) for key in ODD_KEYS])
    tar = made.root / "edits" / f"{shard}.tar"
    if loose:
        with tarfile.open(tar) as opened:
            opened.extractall(made.root / "edits" / shard, filter="data")
        tar.unlink()
    page = report(made.root, tmp_path / "a.html")
    assert len(alts(page)) == len(ODD_KEYS)
    assert "no picture" not in page.text and "generated image of two spaces, failed: face 0" in alts(page)[-3]


def test_many_groups_stay_within_the_size(tmp_path: Path) -> None:
    """Rows of pictures are bounded, and a small page has fewer pictures."""
    samples = [
        Made(f"k{n:04d}", f"group {n % 30:02d}", [{"face": face(), "prompt": prompt(0.3)}], prompt="word " * 200)
        for n in range(360)
    ]
    CheckedRoot(tmp_path / "root").add("00000000", samples)
    facts = gather(tmp_path / "root", None, 2000, 1, audit=True)
    page = Page(render(facts, tmp_path / "a.html", 48, 5_000_000).decode())
    assert len(page.all("ol")) >= MAX_ROWS and len(alts(page)) == MAX_ROWS * 12
    assert f"{MAX_ROWS} of 30 groups are shown" in page.text
    small = render(facts, tmp_path / "b.html", 48, 700_000)
    assert len(small) <= 700_000 and len(alts(Page(small.decode()))) < MAX_ROWS * 12
    assert render(facts, tmp_path / "c.html", 0, 5_000_000).count(b"<img") == 0


def test_counts_in_bins_as_a_chart() -> None:
    assert counted("x", {}, 0.01, "score") is None
    chart = counted("x", {20: 3, 22: 1}, 0.01, "score")
    assert chart is not None
    assert chart.rows == [("0.2 to 0.21", "3"), ("0.21 to 0.22", "0"), ("0.22 to 0.23", "1")]
    wide = counted("x", dict.fromkeys(range(-100, 101), 2), 0.01, "score")
    assert wide is not None and len(wide.rows) <= 48
    assert sum(int(count) for _, count in wide.rows) == 402
    assert "402 values" in wide.note
