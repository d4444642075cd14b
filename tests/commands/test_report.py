"""``python -m curation report``: the page's numbers are the receipts', and whatever the data says is text on it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from curation.__main__ import main
from curation.commands.report.charts import histogram, over_time, short_time
from curation.commands.report.command import MAX_PAGE_BYTES
from curation.commands.report.facts import gather
from curation.commands.report.page import render
from curation.commands.report.pictures import Known
from curation.commands.report.samples import decoded
from tests import ROOT
from tests.commands.synthetic_root import HOSTILE, Synthetic, make_root
from tests.pipeline import Undisturbed
from tests.processes import ended_at_last, help_answers_at_once, imported_modules
from tests.run.toy_runs import Place

STAGES = {
    "01_filter_noface": "captions",
    "02_captions_processor": "prompts",
    "03_generate_images": "edits",
    "04_reshard": "hybrid",
}


class Page(HTMLParser):
    """What is on a page: its tags, its text, and the rows of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.inside: dict[str, str] = {}
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("style", "script"):
            self.inside[self._open] = self.inside.get(self._open, "") + data
            return
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for name, a in self.tags if name == tag and all(a.get(k) == v for k, v in wanted.items())]

    def row(self, first: str, cells: int = 1) -> list[str]:
        """The first row that begins so and has so many cells at least."""
        return next(row for row in self.rows if len(row) >= cells and row[0].startswith(first))


def report(root: Path, output: Path, *more: str) -> Page:
    assert main(["report", str(root), "-o", str(output), *more]) == 0
    assert output.stat().st_size <= MAX_PAGE_BYTES
    return Page(output.read_text("utf-8"))


def told(root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", str(root), "--json", *more]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def receipts(root: Path, stage: str) -> Iterator[dict[str, Any]]:
    for path in (root / STAGES[stage] / "_receipts" / stage).glob("[!_]*/*.json"):
        yield json.loads(path.read_bytes())


@pytest.fixture(scope="module")
def page(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(undisturbed.root, tmp_path_factory.mktemp("page") / "report.html")


# ---- numbers


def test_every_number_is_the_receipts_sum(
    undisturbed: Undisturbed, page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    result = told(undisturbed.root, capsys)
    assert [stage["stage"] for stage in result["stages"]] == list(STAGES)
    for stage in result["stages"]:
        of_stage = list(receipts(undisturbed.root, stage["stage"]))
        counts = [receipt["counts"] for receipt in of_stage]
        assert stage["done"] == stage["shards"] == len(of_stage)
        assert stage["samples"]["in"] == sum(c["in"] for c in counts)
        assert stage["samples"]["kept"] == sum(c["kept"] for c in counts)
        dropped: Counter[str] = Counter()
        phases: Counter[str] = Counter()
        for receipt in of_stage:
            dropped.update(receipt["counts"]["dropped"])
            phases.update(receipt["seconds"])
        assert stage["samples"]["dropped"] == dict(dropped)
        assert stage["phases"] == pytest.approx(dict(phases), abs=0.002)
        assert stage["output_bytes"] == sum(o["size"] for receipt in of_stage for o in receipt["outputs"])
        took = [receipt["finished"] - receipt["started"] for receipt in of_stage]
        assert stage["worker_seconds"] == pytest.approx(sum(took), abs=0.1)
        assert stage["slowest"][0]["seconds"] == pytest.approx(max(took), abs=0.001)
        cells = [cell.strip() for cell in page.row(stage["title"])]
        assert cells[1:8] == [
            *(f"{stage['done']:,}", "0", "0", "0", "0"),
            f"{stage['samples']['in']:,}",
            f"{stage['samples']['kept']:,}",
        ]
        for reason, count in dropped.items():
            assert any(row[0] == reason and row[2] == f"{count:,}" for row in page.rows if len(row) > 2)


def test_the_funnel_and_what_samples_look_like(
    undisturbed: Undisturbed, page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    result = told(undisturbed.root, capsys)
    edited = sum(receipt["notes"]["edited"] for receipt in receipts(undisturbed.root, "04_reshard"))
    steps = [step["count"] for step in result["funnel"]]
    assert steps[0] == sum(r["counts"]["in"] for r in receipts(undisturbed.root, "01_filter_noface"))
    assert steps[-1] == edited > 0
    assert steps == sorted(steps, reverse=True)
    assert page.row("replaced in the hybrid shards")[1] == f"{edited:,}"
    languages: Counter[str] = Counter()
    for receipt in receipts(undisturbed.root, "02_captions_processor"):
        languages.update(receipt["notes"]["languages"])
    assert result["languages"] == dict(languages.most_common())
    detected: Counter[str] = Counter()
    for path in (undisturbed.root / "captions" / "_provenance" / "01_filter_noface").glob("*.jsonl"):
        detected.update(str(json.loads(line)["faces"]) for line in path.read_bytes().splitlines())
    assert detected["2"] == result["faces"]["2"]
    assert sum(result["faces"].values()) == result["stages"][0]["samples"]["kept"]
    groups = {group["group"] for group in result["audit"]["groups"]}
    assert groups
    assert all(page.row(group) for group in groups)


def test_the_gallery_shows_original_and_generated_side_by_side(undisturbed: Undisturbed, page: Page) -> None:
    lines = [
        json.loads(line)
        for path in (undisturbed.root / "prompts" / "_provenance" / "02_captions_processor").glob("*.jsonl")
        for line in path.read_bytes().splitlines()
    ]
    pictures = page.all("img")
    for line in lines:
        assert decoded(line["caption"]) in page.text
        assert line["prompt"] in page.text
        for alt in (f"original of {line['key']}", f"generated for {line['key']}"):
            picture = next(image for image in pictures if image["alt"] == alt)
            data = base64.b64decode((picture["src"] or "").removeprefix("data:image/jpeg;base64,"))
            with Image.open(io.BytesIO(data)) as image:
                assert image.format == "JPEG"
                assert max(image.size) <= 176
    assert any("no_face" in (card["data-find"] or "") for card in page.all("li", **{"class": "card"}))


def test_the_same_page_each_time(undisturbed: Undisturbed, page: Page, tmp_path: Path) -> None:
    again = report(undisturbed.root, tmp_path / "report.html")
    assert [a["data-find"] for a in again.all("li", **{"class": "card"})] == [
        a["data-find"] for a in page.all("li", **{"class": "card"})
    ]


def test_links_lead_to_receipts_that_are_there(undisturbed: Undisturbed, tmp_path: Path) -> None:
    root = tmp_path / "dataset # 50%"
    shutil.copytree(undisturbed.root, root)
    (root / "pages").mkdir()
    page = report(root, root / "pages" / "report.html")
    from urllib.parse import unquote

    links = [a["href"] or "" for a in page.all("a") if not (a["href"] or "").startswith("#")]
    assert len(links) >= 20
    assert all((root / "pages" / unquote(link)).exists() for link in links), links
    assert sum(link.endswith(".json") for link in links) == 20


# ---- how it was made


def test_models_revisions_seeds_and_thresholds_are_named(undisturbed: Undisturbed, page: Page) -> None:
    faces, prompts, images, hybrid = (
        [cell.strip() for cell in next(row for row in page.rows if len(row) == 5 and stage in row[0])]
        for stage in STAGES
    )
    assert "centerface" in faces[2] and faces[3].startswith("sha256:")
    assert "threshold 0.4 (the detector's own)" in faces[4] and "min_faces 1" in faces[4]
    epoch = json.loads((undisturbed.root / "prompts/_receipts/02_captions_processor/_epoch.1.json").read_bytes())
    assert epoch["options"]["model"] in prompts[2]
    assert "seed 0" in prompts[4] and "lang_threshold 0.0" in prompts[4] and "white female" in prompts[4]
    assert "embedded/tiny-sd" in images[2] and images[3] == "1"
    assert all(text in images[4] for text in ("steps 1", "guidance 0.0", "seed 0", "dtype float32", "width 64"))
    assert "variant" not in images[4], "what is off has no entry"
    assert hybrid[2] == "–" and "on_missing keep" in hybrid[4]
    assert [row[1] for row in (faces, prompts, images, hybrid)] == ["5"] * 4


def test_stand_ins_have_a_banner(undisturbed: Undisturbed, page: Page, tmp_path: Path) -> None:
    assert "Stand-in models made the pictures." in page.text
    assert "tests the installation; it is meaningless as data" in page.text
    assert page.text.index("Stand-in models") < page.text.index("What happened to the samples")
    alone = report(undisturbed.root / "hybrid", tmp_path / "a.html").text
    assert "Stand-in models made the pictures." in alone and "(03_generate_images)" in alone
    before = report(undisturbed.after["02_captions_processor"], tmp_path / "a.html")
    assert "Stand-in" not in before.text, "stage 02 had a server"
    root = tmp_path / "root"
    shutil.copytree(undisturbed.root, root)
    place = root / "edits" / "_receipts" / "03_generate_images"
    first = json.loads((place / "_epoch.1.json").read_bytes())
    options = first["options"] | {"model": f"org/{HOSTILE}", "seed": 7, "prompt_suffix": HOSTILE, HOSTILE: [HOSTILE]}
    (place / "_epoch.2.json").write_text(json.dumps(first | {"epoch": 2, "options": options}))
    done = sorted(place.glob("0*/*.json"))
    for path in done[1:]:
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"epoch": 2}))
    mixed = report(root, tmp_path / "b.html")
    assert "(03_generate_images, 1 shard)" in mixed.text
    rows = [row for row in mixed.rows if len(row) == 5 and "03_generate_images, options" in row[0]]
    assert [row[1] for row in rows] == ["4", "1"], "the newest first"
    assert HOSTILE in rows[0][2] and rows[0][4].count(HOSTILE) == 3 and "seed 7" in rows[0][4]
    assert "window.hacked" not in mixed.inside["script"]
    done[0].write_text(json.dumps(json.loads(done[0].read_bytes()) | {"epoch": 2}))
    assert gather(root, None, 2000, 0, audit=False).told["stand_ins"] == [], "nothing is left of what it made"


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("&amp;quot;We must act&quot; &#39;now&#x27;", "\"We must act\" 'now'"),
        ("Fish &amp; chips, a&nbsp;b, caf&eacute;", "Fish & chips, a b, café"),
        ("?a=1&copy=2&lt", "?a=1&copy=2&lt"),
        ("&lt;img src=x onerror=hacked&gt;", "<img src=x onerror=hacked>"),
        ("&amp;amp;amp;lt;", "&lt;"),
        ("a&#8238;b&#0;&#55296;&#x110000;&#27;c&unknown;", "ab\ufffd\ufffd\ufffdc&unknown;"),
    ],
)
def test_entities_are_shown_as_the_characters_they_stand_for(caption: str, text: str) -> None:
    assert decoded(caption) == text


def test_decoded_captions_are_text_on_the_page(undisturbed: Undisturbed, page: Page, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(undisturbed.root, root)
    for path in (root / "prompts" / "_provenance" / "02_captions_processor").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        caption = HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&amp;quot;")
        path.write_text("\n".join(json.dumps(line | {"caption": caption}) for line in lines))
    changed = report(root, tmp_path / "a.html")
    assert changed.text.count(HOSTILE) >= 5
    assert len(changed.all("script")) == 1 and not [a for _, a in changed.tags if "onerror" in a]
    assert "are shown as the characters that they stand for" in changed.text


def test_funnel_gallery_and_groups_come_first_and_speed_last(page: Page) -> None:
    found = [attributes["id"] for attributes in page.all("section") if "id" in attributes]
    parts = ["funnel", "gallery", "groups", "pictures", "rejects", "stages", "made", "shards", "content", "speed"]
    assert found == parts


# ---- one file, nothing from outside, nothing from the data but text


def test_nothing_is_loaded_and_only_the_pages_own_script_may_run(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "poster", "data"):
            value = attributes.get(name) or ""
            assert not re.match(r"(?i)\s*(\w+:)?//|javascript:|file:", value), (tag, value)
            assert name != "src" or name not in attributes or value.startswith("data:image/jpeg;base64,"), (tag, value)
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.inside[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_hostile_texts_are_text(tmp_path: Path) -> None:
    made = make_root(tmp_path / HOSTILE.replace("/", ""), 12, host=HOSTILE)
    home = made.root / "prompts"
    for path in (home / "_receipts" / "02_captions_processor").glob("[!_]*/*.json"):
        receipt = json.loads(path.read_bytes())
        receipt["counts"]["dropped"] = {HOSTILE: 5, "x" * 5000: 2, "</style><script>window.hacked=1</script>": 1}
        receipt["notes"]["languages"] = {HOSTILE: 4, "a\u202eb": 1}
        receipt["seconds"][HOSTILE] = 3.0
        receipt["warnings"] = [HOSTILE]
        if receipt["status"] == "failed":
            receipt["error"] = {"reason": HOSTILE, "message": HOSTILE * 100}
        path.write_text(json.dumps(receipt))
    for stage, folder in (("02_captions_processor", "prompts"), ("03_generate_images", "edits")):
        lines = [
            {
                "key": f"{HOSTILE}{n}",
                "caption": HOSTILE,
                "prompt": "</li><script>window.hacked=1</script>",
                "group": HOSTILE,
            }
            for n in range(4)
        ]
        target = made.root / folder / "_provenance" / stage / "00000003.jsonl"
        target.parent.mkdir(parents=True)
        target.write_text("\n".join([*map(json.dumps, lines), "not json", "[]", '{"key": 5, "caption": ["x"]}']))
    rejects = home / "_rejects" / "02_captions_processor"
    rejects.mkdir(parents=True)
    (rejects / "00000003.jsonl").write_text(json.dumps({"key": HOSTILE, "reason": HOSTILE, "detail": HOSTILE}))
    with gzip.open(rejects / "00000003.drops.tsv.gz", "wb") as file:
        file.write(HOSTILE.encode() + b"\t" + json.dumps(HOSTILE).encode() + b"\n\xff\t{\nno tab\n")
    page = report(made.root, tmp_path / "report.html")
    assert page.all("img") == []
    assert len(page.all("script")) == 1
    assert "window.hacked" not in page.inside["script"] + page.inside["style"]
    assert page.text.count(HOSTILE) > 12
    assert "\u202e" not in page.html
    assert "x" * 200 not in page.html


@pytest.mark.parametrize(
    "change",
    [
        {"started": 1e308, "finished": 1.5e308},
        {"started": -5, "finished": 1e18},
        {"started": "x", "finished": None, "seconds": {"read": 1e300, "x": "y"}, "outputs": [{"size": -1}]},
        {"counts": {"in": 2**63 - 1, "kept": -3, "dropped": {"a": 1.5}, "failed": []}, "notes": {"languages": [1]}},
        {"host": {"a": 1}, "warnings": [{}], "notes": None, "outputs": []},
        {"outputs": None},
        {"counts": None, "seconds": [], "host": None},
    ],
)
def test_receipts_made_by_hand_break_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    made = make_root(tmp_path / "root", 12)
    path = made.root / "captions" / "_receipts" / "01_filter_noface" / "00000" / "00000002.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    assert "Samples a second" in report(made.root, tmp_path / "report.html").text


# ---- stages that are there, and those that are not


def test_missing_stages(undisturbed: Undisturbed, tmp_path: Path) -> None:
    page = report(undisturbed.after["02_captions_processor"], tmp_path / "report.html")
    assert "with a prompt" in page.text
    assert "with a new image" not in page.text
    assert "No sample has a generated image yet." in page.text
    only = report(undisturbed.root / "hybrid", tmp_path / "hybrid.html")
    assert "None of the stages 01 to 03 has run here." in only.text
    assert "there is no 02_captions_processor" in only.text


def test_an_empty_root_is_a_wrong_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "report.html")]) == 2
    assert "no stage has run here" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_stage_that_the_report_does_not_know(tmp_path: Path) -> None:
    place = Place(tmp_path / "toy")
    place.shards(3)
    assert place.run() == 0
    page = report(place.root, tmp_path / "report.html")
    assert page.row("toy", 12)[1:8] == ["3", "0", "0", "0", "0", "9", "6"]


def test_a_shard_that_is_being_worked_on(tmp_path: Path) -> None:
    place = Place(tmp_path / "toy")
    place.shards(3)
    with ended_at_last(place.start("--hold", "00000000")) as process:
        place.wait_for("sample", process)
        page = report(place.root, tmp_path / "report.html")
    assert page.row("toy", 12)[1:4] == ["0", "1", "2"]
    titles = [cell["title"] or "" for cell in page.all("span") if "title" in cell]
    assert [title.partition(": ")[2] for title in titles] == ["running", "pending", "pending"]


def test_scores_of_parquets_and_new_captions(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    made = make_root(tmp_path / "root", 3)
    for folder, stage in (("scores", "06_metadata"), ("recaptions", "05_recaption")):
        place = made.root / folder / "_receipts" / stage / "00000"
        place.mkdir(parents=True)
        for shard in ("00000000", "00000001"):
            receipt = {"shard": shard, "status": "done", "epoch": 1, "counts": {"in": 100, "kept": 100}, "notes": {}}
            (place / f"{shard}.json").write_text(json.dumps(receipt))
    table = pyarrow.table(
        {
            "uid": ["a"] * 100,
            "clip_l14_similarity_score": [n / 100 for n in range(98)] + [None, float("nan")],
            "<b>odd</b>": pyarrow.array([0.5] * 100, pyarrow.float32()),
            "width": [5] * 100,
        }
    )
    parquet.write_table(table, made.root / "scores" / "00000000.parquet")
    (made.root / "scores" / "00000001.parquet").write_bytes(b"PAR1 not one")
    (made.root / "recaptions" / "rows").mkdir()
    row = {"key": "k1", "caption": "a new one", "original_caption": "the old one <i>"}
    (made.root / "recaptions" / "rows" / "00000000.jsonl").write_text(json.dumps(row))
    (made.root / "recaptions" / "compare.html").write_text("")
    page = report(made.root, tmp_path / "report.html")
    labels = [chart["aria-label"] or "" for chart in page.all("svg", role="img")]
    score = next(label for label in labels if label.startswith("clip_l14_similarity_score"))
    assert "98 values, median 0.485" in score
    assert any(label.startswith("<b>odd</b>. Histogram. 100 values") for label in labels)
    assert not any(label.startswith("width") for label in labels)
    assert "00000001" in next(text for text in page.texts if "06_metadata, " in text)
    assert "a new one" in page.text
    assert "the old one <i>" in page.text
    assert any((a["href"] or "").endswith("recaptions/compare.html") for a in page.all("a"))


def test_recorded_faces_are_read_from_the_metadata(undisturbed: Undisturbed, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(undisturbed.after["01_filter_noface"], root)
    shutil.rmtree(root / "captions" / "_provenance")
    expected = 0
    for path in (root / "edits").glob("*.json"):
        metadata = json.loads(path.read_bytes())
        expected += len(metadata)
        changed = {key: value | {"face_bboxes": [[0, 0, 0.5, 0.5]] * 3} for key, value in metadata.items()}
        path.write_text(json.dumps(changed))
    facts = gather(root, None, 2000, 200, audit=False)
    assert facts.told["faces"] == {3: expected}
    assert set(facts.looked.sides) == {0.5}


# ---- many shards


def test_ten_thousand_shards(many_shards: Synthetic, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    page = report(many_shards.root, tmp_path / "report.html")
    took_s = time.process_time() - began
    print(f"a page of {len(page.html):,} characters about 4 x 10,000 shards in {took_s:.1f} s")
    assert took_s < 30
    result = told(many_shards.root, capsys, "--no_audit")
    for stage in result["stages"]:
        for what in ("in", "kept"):
            assert stage["samples"][what] == many_shards.sums[stage["stage"], what]
        assert stage["done"] == many_shards.sums[stage["stage"], "done"]
        assert stage["shards"] == 10_000
        assert stage["done"] + stage["pending"] + sum(stage["failed"].values()) == 10_000
    grids = re.findall(r'<ol class="grid".*?</ol>', page.html, flags=re.S)
    assert [grid.count("<li>") for grid in grids] == [2000] * 4
    assert sum("1 failed" in label for label in re.findall(r'title="([^"]*)"', grids[1])) == 90


@pytest.mark.parametrize(("shards_page", "cells"), [("250", [250]), ("100", [100]), ("7", [6, 7])])
def test_shards_are_put_together_where_they_are_too_many(shards_page: str, cells: list[int], tmp_path: Path) -> None:
    made = make_root(tmp_path / "root", 2500 if shards_page == "250" else 1100)
    page = report(made.root, tmp_path / "report.html", "--shards_page", shards_page, "--no_audit")
    for grid in re.findall(r'<ol class="grid.*?</ol>', page.html, flags=re.S):
        assert grid.count("<li>") in cells


def test_the_page_keeps_within_its_bytes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    facts = gather(undisturbed.root, None, 2000, 200, audit=True)
    whole = render(facts, tmp_path / "report.html", 48, MAX_PAGE_BYTES)
    little = render(facts, tmp_path / "report.html", 48, 190_000)
    assert len(little) <= 190_000 < len(whole)
    assert b"pictures left out" in little
    assert little.count(b"data:image/jpeg") < whole.count(b"data:image/jpeg")


# ---- watching


def refreshes(page: Page) -> list[str | None]:
    return [meta["content"] for meta in page.all("meta", **{"http-equiv": "refresh"})]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_written_again_while_it_is_watched(number: signal.Signals, tmp_path: Path) -> None:
    """From before the first stage has begun until Ctrl-C; then once more, without the browser's loading it again."""
    place, output = Place(tmp_path / "toy"), tmp_path / "report.html"
    place.shards(3)
    command = [sys.executable, "-m", "curation", "report", str(place.root), "-o", str(output), "--watch", "0.2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        assert "no stage has run here" in watch.stdout.readline()
        assert place.run("--shards", "00000001") == 0
        assert "written again every 0.2 s until Ctrl-C" in watch.stdout.readline()
        with ended_at_last(place.start("--hold", "00000000")) as process:
            place.wait_for("sample", process)
            until = time.monotonic() + 30
            while True:
                page = Page(output.read_text("utf-8"))
                now = page.row("toy", 9)
                if now[2] == "1" or time.monotonic() > until:
                    break
                time.sleep(0.1)
            assert refreshes(page) == ["1"]
            assert page.text.index("Running now") < page.text.index("What happened to the samples")
            assert now[1:4] == ["1", "1", "1"] and "% of the time" in now[8]
        watch.send_signal(number)
        said, errors = watch.communicate(timeout=30)
    assert (watch.returncode, errors) == (0, "")
    assert re.search(r"report\.html: written \d+ times; it is no longer updated", said)
    assert refreshes(Page(output.read_text("utf-8"))) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "toy"]


def test_pictures_that_an_earlier_page_has_made_are_not_read_again(undisturbed: Undisturbed, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(undisturbed.root, root)
    known: Known = {}
    facts = gather(root, None, 2000, 200, audit=False)
    first = render(facts, tmp_path / "report.html", 48, MAX_PAGE_BYTES, known=known)
    for path in (root / "edits").glob("*.tar"):
        there = path.stat()
        path.write_bytes(bytes(there.st_size))
        os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert render(facts, tmp_path / "report.html", 48, MAX_PAGE_BYTES, known=known) == first
    os.utime(path)
    assert render(facts, tmp_path / "report.html", 48, MAX_PAGE_BYTES, known=known) != first


# ---- flags


def originals(page: Page) -> int:
    return sum((image["alt"] or "").startswith("original") for image in page.all("img"))


def record_source(root: Path, **source: str) -> None:
    """Has every receipt say that the source shards were in another folder, or nothing, as older versions did."""
    for stage in ("01_filter_noface", "04_reshard"):
        for path in (root / STAGES[stage] / "_receipts" / stage).glob("[!_]*/*.json"):
            receipt = json.loads(path.read_bytes())
            path.write_text(json.dumps(receipt | {"sources": [source, *receipt["sources"][1:]]}))


def test_originals_are_found_where_the_receipts_say(undisturbed: Undisturbed, page: Page, tmp_path: Path) -> None:
    for receipt in receipts(undisturbed.root, "01_filter_noface"):
        sources = undisturbed.after["01_filter_noface"] / "shards"
        assert receipt["sources"][0] == {"folder": "../shards", "absolute": str(sources)}
    root, moved = tmp_path / "root", tmp_path / "elsewhere"
    shutil.copytree(undisturbed.root, root)
    (root / "shards").rename(moved)
    count = originals(page)
    assert count > 5
    assert originals(report(root, tmp_path / "a.html")) == count, "the root is a copy; the sources are where they were"
    record_source(root, folder="../../elsewhere", absolute="/nowhere")
    odd = moved / "a name that is no id.tar"
    (moved / "00000004.tar").rename(odd)
    for stage in ("01_filter_noface", "04_reshard"):
        path = root / STAGES[stage] / "_receipts" / stage / "00000" / "00000004.json"
        receipt = json.loads(path.read_bytes())
        receipt["inputs"][0]["path"] = odd.name
        path.write_text(json.dumps(receipt))
    assert originals(report(root, tmp_path / "a.html")) == count, "the root was moved with its sources"
    odd.rename(moved / "00000004.tar")
    record_source(root, folder="../shards", absolute="/nowhere\x1b[1m/shards")
    gone = report(root, tmp_path / "b.html")
    assert originals(gone) == 0
    assert "original not found" in gone.text
    assert "/nowhere[1m/shards: the original images are no longer in this folder; name their folder with" in gone.text
    given = report(root, tmp_path / "b.html", "--source", str(moved))
    assert originals(given) == count and "no longer in this folder" not in given.text
    record_source(root)
    assert originals(report(root, tmp_path / "c.html")) == 0, "an older root does not say it"
    (root / "shards").symlink_to(moved)
    assert originals(report(root, tmp_path / "c.html")) == count


@pytest.mark.parametrize(
    "source",
    [
        {"folder": "../other"},  # shards of the same names and other sizes
        {"folder": "x" * 9000},
        {"folder": "\0", "absolute": ["/"]},
        {"folder": "/dev", "absolute": "/proc/self"},
    ],
)
def test_a_source_that_is_another_is_not_shown(source: Any, undisturbed: Undisturbed, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(undisturbed.root, root)
    (root / "shards").rename(root / "other")
    for path in (root / "other").glob("*.tar"):
        path.write_bytes(path.read_bytes() + bytes(512))
    record_source(root, **source)
    assert originals(report(root, tmp_path / "a.html")) == 0


def test_gallery(undisturbed: Undisturbed, tmp_path: Path) -> None:
    few = report(undisturbed.root, tmp_path / "a.html", "--gallery", "2")
    assert sum((image["alt"] or "").startswith("generated") for image in few.all("img")) == 2
    assert "Left out (--no_audit)." in report(undisturbed.root, tmp_path / "c.html", "--no_audit").text
    none = report(undisturbed.root, tmp_path / "d.html", "--gallery", "0", "--sample_shards", "0")
    assert none.all("img") == []


def test_it_says_one_line_or_none(undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(undisturbed.root, tmp_path / "a.html")
    assert re.fullmatch(r"\S+a\.html: 0\.\d\d MB, 4 stages, 5 shards \(\d+\.\d s\)\n", capsys.readouterr().out)
    report(undisturbed.root, tmp_path / "a.html", "--quiet")
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shards_page", "0"], "--shards_page"),
        (["--gallery", "501"], "--gallery"),
        (["--sample_shards", "-1"], "--sample_shards"),
        (["--source", "/nowhere"], "--source /nowhere: no such folder"),
        (["-o", "."], "it is a folder"),
        (["--watch", "0"], "--watch takes a positive number of seconds"),
        (["--watch=nan"], "--watch takes a positive number of seconds"),
        (["--watch", "--json"], "--watch writes the page repeatedly, but --json writes no page"),
        (["-o", "/nowhere/report.html"], "cannot be written"),
    ],
)
def test_wrong_flags(flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_root(tmp_path / "root", 2)
    assert main(["report", str(made.root), *flags]) == 2
    assert words in capsys.readouterr().err


def test_help_answers_in_under_a_second() -> None:
    said = help_answers_at_once("-m", "curation", "report")
    assert "--shards_page" in said.stdout
    assert not imported_modules(said.stderr) & {"pygal", "jinja2", "numpy", "pyarrow"}


def test_every_flag_is_documented() -> None:
    from dataclasses import fields

    from curation.commands.report.command import Options

    text = (ROOT / "docs" / "report.md").read_text("utf-8")
    for field in fields(Options):
        assert field.name == "root" or f"`--{field.name}`" in text, field.name


# ---- charts


def test_a_histogram_counts_every_value() -> None:
    values = [0.1, 0.25, 0.25, 7.0, 1e6, float("nan")]
    chart = histogram("t", values, "s")
    assert chart is not None
    assert sum(int(count.replace(",", "")) for _, count in chart.rows) == 5
    assert histogram("t", [], "s") is None
    alike = histogram("t", [3.0] * 4, "s", whole=True)
    assert alike is not None
    assert [count for _, count in alike.rows if count != "0"] == ["4"]


def test_rates_add_up_to_the_samples() -> None:
    spans = array("d", [1e9, 1e9 + 10, 100, 1e9 + 5, 1e9 + 15, 200, 1e9 + 100, 1e9 + 100, 7])
    chart = over_time("t", spans, bins=50)
    assert chart is not None
    rates = [float(rate.replace(",", "")) for _, rate in chart.rows]
    assert sum(rates) * 100 / 50 == pytest.approx(307, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (0.0123, "12.3 ms"), (12.34, "12.3 s"), (250, "4 min 10 s"), (12000, "3 h 20 min"), (187200, "2 d 4 h")],
)
def test_times(seconds: float, text: str) -> None:
    assert short_time(seconds) == text
