"""``curation measure``: error rates of checks on pictures whose truth is known, by a CLIP that knows them by heart."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from curation.__main__ import main
from curation.commands.audit.intervals import wilson
from tests import ROOT
from tests.backends.planted import GROUPS, Planted, make_planted, prompt_of


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    torch.set_num_threads(1)
    return make_planted(tmp_path_factory.mktemp("planted") / "clip")


@pytest.fixture
def measured(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*flags: object) -> Any:
        assert main(["measure", *map(str, flags), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def error(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    assert main(["measure", *map(str, flags)]) == 2
    return capsys.readouterr().err


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def photo(want_face: bool) -> bytes:
    """A photo of the example shards in which people counted a face, or none."""
    rows = [line.split("\t") for line in (ROOT / "examples" / "truth.tsv").read_text("utf-8").splitlines()[1:]]
    shard, key = next((r[0], r[1]) for r in rows if r[2] == "jpg" and r[3] == ("1" if want_face else "0"))
    with tarfile.open(ROOT / "examples" / "shards" / f"{shard}.tar") as tar:
        return tar.extractfile(f"{key}.jpg").read()  # type: ignore[union-attr]


def test_the_confusion_of_groups(planted: Planted, tmp_path: Path, measured: Any) -> None:
    """Two pictures lie in the folder of another group, as if the model were wrong about them."""
    folder = tmp_path / "labelled"
    wrong = {"asian male": "asian female", "black male": "white male"}
    for group, jpeg in planted.jpegs.items():
        put(folder / wrong.get(group, group).replace(" ", "_") / f"{group}.jpg", jpeg)
    put(folder / "white_female" / "broken.png", b"no picture")
    put(folder / "outside.jpg", b"without a label")
    put(folder / "white_female" / "notes.txt", b"no picture either")
    found = measured(folder, "--check", "group", "--group_model", f"clip:{planted.folder}", "--groups", "default")
    assert (found["pictures"], found["unlabelled"], found["unreadable"]) == (13, 1, 1)
    groups = {row["group"]: row for row in found["checks"]["group"]["groups"]}
    assert set(groups) == set(GROUPS)
    assert groups["asian female"]["seen"] == {"asian male": 1, "asian female": 1}
    recall = groups["asian female"]["recall"]
    assert (recall["count"], recall["of"], (recall["low"], recall["high"])) == (1, 2, wilson(1, 2))
    assert groups["asian male"]["precision"]["of"] == 1 and groups["asian male"]["precision"]["share"] == 0
    assert groups["asian male"]["recall"]["share"] is None, "no picture has that label"
    assert groups["asian male"]["wrongly_passed"]["count"] == 1
    assert groups["latino male"]["recall"]["share"] == groups["latino male"]["precision"]["share"] == 1
    assert found["checks"]["group"]["right"]["count"] == 10 and found["checks"]["group"]["right"]["of"] == 12
    values = {(row["attribute"], row["value"]): row for row in found["checks"]["group"]["attributes"]}
    assert values["gender", "female"]["seen"] == {"female": 6, "male": 1}
    assert values["ethnicity", "white"]["seen"] == {"white": 2, "black": 1}
    assert values["ethnicity", "asian"]["recall"]["share"] == 1


def test_the_groups_are_those_of_the_labels(planted: Planted, tmp_path: Path, measured: Any) -> None:
    for group in ("asian female", "black male"):
        put(tmp_path / "l" / group / "a.jpg", planted.jpegs[group])
    found = measured(tmp_path / "l", "--check", "group", "--group_model", f"clip:{planted.folder}")
    assert found["checks"]["group"]["record"]["groups"] == ["asian female", "black male"]


def test_prompts_are_also_measured_with_those_of_other_pictures(
    planted: Planted, tmp_path: Path, measured: Any
) -> None:
    lines = []
    for number, (group, jpeg) in enumerate(planted.jpegs.items()):
        put(tmp_path / "l" / f"{number}.jpg", jpeg)
        prompt = prompt_of("black male" if number == 3 else group)  # one prompt is of another picture
        lines.append(json.dumps({"file": f"{number}.jpg", "prompt": prompt, "group": group}))
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(lines))
    model = ("--prompt_model", f"clip:{planted.folder}", "--min_prompt_score", 0.5)
    found = measured(tmp_path / "l", "--check", "prompt", "--labels", labels, *model)["checks"]["prompt"]
    assert found["confusion"] == {
        "should_pass": {"passed": 11, "failed": 1},
        "should_fail": {"passed": 0, "failed": 12},
    }
    assert found["scores"]["should_pass"]["p50"] > 0.5 > found["scores"]["should_fail"]["p99"]
    assert [row["group"] for row in found["groups"] if row["recall"]["share"] == 0] == [GROUPS[3]]
    labels.write_text("\n".join([*lines, json.dumps({"file": "3.jpg", "prompt": prompt_of(GROUPS[4]), "match": "no"})]))
    found = measured(tmp_path / "l", "--check", "prompt", "--labels", labels, *model)["checks"]["prompt"]
    assert found["confusion"]["should_fail"] == {"passed": 0, "failed": 1}, "the labels' own are enough"


def test_faces_and_safety_by_folder_and_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real CenterFace and Open NSFW; a picture with two labels counts for both."""
    folder = tmp_path / "l"
    put(folder / "asian_female" / "face" / "safe" / "a.jpg", photo(want_face=True))
    put(folder / "no_face" / "b.jpg", photo(want_face=False))
    put(folder / "No Face" / "c.jpg", photo(want_face=True))
    put(folder / "faces" / "d.jpg", photo(want_face=True))
    assert main(["measure", str(folder), "--check", "face,safety", "--out", str(tmp_path / "out.json")]) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_bytes())
    face, safety = found["checks"]["face"], found["checks"]["safety"]
    assert face["confusion"] == {"should_pass": {"passed": 1, "failed": 0}, "should_fail": {"passed": 1, "failed": 1}}
    assert face["wrongly_passed"]["share"] == face["precision"]["share"] == 0.5
    assert [(row["group"], row["pictures"]) for row in face["groups"]] == [("asian female", 1)]
    assert safety["confusion"]["should_pass"] == {"passed": 1, "failed": 0} and safety["pictures"] == 1
    assert (face["without_label"], safety["without_label"]) == (1, 3)
    assert "3 of the pictures have no label for this check, and do not count here." in told
    assert "| all | 1 | 0 | 1 | 1 | 50.0% (9.5% to 90.5%) | 100.0% (20.7% to 100.0%) | 0.0% (0.0% to 79.3%) |" in told
    assert face["record"]["model"] == "centerface" and safety["record"]["model"] == "open-nsfw"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("../secret.jpg,yes", "lies outside of the folder"),
        ("/etc/passwd,yes", "lies outside of the folder"),
        ("a/../../b.jpg,yes", "lies outside of the folder"),
        ("a.jpg,perhaps", "`face` is 'perhaps'; write yes or no"),
        (",yes", "a row has no `file`"),
    ],
)
def test_hostile_labels_are_refused(row: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(f"file,face\n{row}\n")
    (tmp_path / "l").mkdir()
    assert told in error(capsys, tmp_path / "l", "--labels", labels)


def test_what_cannot_be_measured_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no such folder" in error(capsys, tmp_path / "none")
    put(tmp_path / "l" / "face" / "a.jpg", b"x")
    assert "--check smile: there are face, prompt, group, safety" in error(capsys, tmp_path / "l", "--check", "smile")
    assert "--check safety needs labels: subfolders `safe` and `nsfw`" in error(
        capsys, tmp_path / "l", "--check", "safety"
    )
    put(tmp_path / "g" / "martian" / "a.jpg", b"x")
    assert "labels name 'martian'" in error(capsys, tmp_path / "g", "--check", "group", "--groups", "default")
    for two in ("asian_female/batch 1", "face/asian/no-face"):
        put(tmp_path / two.partition("/")[0] / two / "a.jpg", b"x")
        assert "its folders give a picture two values of" in error(capsys, tmp_path / two.partition("/")[0])
    assert "no picture in a subfolder" in error(capsys, tmp_path / "l" / "face")
    (tmp_path / "labels.parquet").touch()
    assert "give a .csv, .tsv or .jsonl" in error(capsys, tmp_path / "l", "--labels", tmp_path / "labels.parquet")
    (tmp_path / "labels.jsonl").write_text("[1]\n")
    assert "cannot be read" in error(capsys, tmp_path / "l", "--labels", tmp_path / "labels.jsonl")


def test_each_label_of_a_picture_counts_once(tmp_path: Path, measured: Any) -> None:
    put(tmp_path / "in/a.jpg", photo(want_face=False))
    table = tmp_path / "labels.jsonl"
    rows = [
        {"file": "a.jpg", "nsfw": "no", "group": "x"},
        {"file": "./a.jpg", "nsfw": False, "group": "x", "face": "no"},
        {"file": "in/../a.jpg", "face": 0},
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    found = measured(tmp_path / "in", "--labels", table, "--check", "face,safety")
    assert [found["pictures"], *(found["checks"][name]["pictures"] for name in ("face", "safety"))] == [1, 1, 1]
    assert [row["group"] for row in found["checks"]["safety"]["groups"]] == ["x"]


@pytest.mark.parametrize(
    "labels", ["a.jpg,no,x,\na.jpg,yes,x,", "a.jpg,no,x,\na.jpg,,y,", "a.jpg,no,x,\na.jpg,no,x,no"]
)
def test_rows_that_contradict_each_other(labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{line},a person" for line in labels.split("\n")]
    (tmp_path / "l.csv").write_text("file,nsfw,group,match,prompt\n" + "\n".join(rows))
    said = error(capsys, tmp_path, "--labels", tmp_path / "l.csv", "--check", "safety")
    assert "l.csv: rows about" in said and "a.jpg contradict each other" in said


def test_pictures_that_cannot_be_read_are_named(
    tmp_path: Path, measured: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    labels = ["missing.jpg,no", "pipe.jpg,no", "folder,no"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "l.csv").write_text("\n".join(["file,nsfw", *labels]))
    said = error(capsys, tmp_path, "--labels", tmp_path / "l.csv", "--check", "safety")
    assert "none of 3 pictures with labels can be read" in said and "missing.jpg: cannot be read" in said
    put(tmp_path / "a.jpg", photo(want_face=False))
    (tmp_path / "l.csv").write_text("\n".join(["file,nsfw", *labels, "a.jpg,no"]))
    found = measured(tmp_path, "--labels", tmp_path / "l.csv", "--check", "safety")
    assert (found["pictures"], found["unreadable"], found["checks"]["safety"]["pictures"]) == (4, 3, 1)
