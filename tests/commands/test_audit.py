"""``python -m curation audit``: what became of each group, against what is counted by hand."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import PROGRAM
from curation.__main__ import main
from curation.commands.audit.cards import croissant
from curation.commands.audit.command import as_markdown, findings, verdict
from curation.commands.audit.groups import mentions, mentions_another
from curation.commands.audit.intervals import difference, wilson
from curation.commands.audit.words import cell
from curation.commands.places import EDITS, HYBRID, PROMPTS
from curation.rewrite.groups import attributes_of
from curation.shards import bucket_of
from curation.tar.samples import read_samples
from tests import EXAMPLES
from tests.commands.checked_root import CheckedRoot, Made, face
from tests.pipeline import Undisturbed, copy_tree

Audit = Callable[..., dict[str, Any]]


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str]) -> Audit:
    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["audit", *map(str, arguments), "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert result["format"] == 1
        return result

    return run


# ---- a real run


def test_the_counts_are_those_of_the_hybrid_shards(undisturbed: Undisturbed, audit: Audit) -> None:
    """Against a count of the ``curation`` objects in the hybrid shards themselves."""
    found: Counter[str] = Counter()
    for path in (undisturbed.root / "hybrid").glob("*.tar"):
        for sample in read_samples(path, {"json"}):
            metadata = json.loads(bytes(sample.members["json"]))
            if "curation" in metadata:
                found[metadata["curation"]["group"]] += 1
    result = audit(undisturbed.root)
    assert {group["group"]: group["hybrid"] for group in result["groups"] if group["hybrid"]} == dict(found)
    assert result["all"]["hybrid"] == found.total() > 0
    assert set(result["shards"]) == {PROMPTS, EDITS, HYBRID}
    for group in result["groups"]:
        assert group["assigned"] >= group["rewritten"] >= group["accepted"] >= group["generated"] >= group["hybrid"]
        assert group["assigned"] - group["accepted"] == sum(
            number for reason, number in group["refused"].items() if reason.startswith(PROMPTS)
        )
    assert not result["warnings"]


def test_regrouped_shards(undisturbed: Undisturbed, tmp_path: Path, audit: Audit) -> None:
    """Their numbers are those of other shards than the source shards; the counts are the same, once all are written."""
    root = tmp_path / "root"
    copy_tree(undisturbed.root, root)
    before = audit(root)
    shutil.rmtree(root / "hybrid")
    flags = ["--edits", f"{root}/edits", "--prompts", f"{root}/prompts", "--shard_size", "40", "--quiet"]
    command = ["--input", f"{root}/shards", "--output", f"{root}/hybrid", *flags]
    assert importlib.import_module("04_reshard").main(command) == 0
    after = audit(root)
    assert (after["all"], after["groups"], after["warnings"]) == (before["all"], before["groups"], before["warnings"])
    assert after["pictures"] == before["pictures"] == after["all"]["generated"] > 0
    written = [json.loads(path.read_bytes()) for path in (root / "hybrid/_receipts" / HYBRID).glob("*/0*.json")]
    [lost] = [one["notes"]["edited"] for one in written if one["shard"] == "00000000"]
    (root / "hybrid/_receipts" / HYBRID / bucket_of("00000000") / "00000000.json").unlink()
    assert audit(root)["warnings"] == [
        f"{HYBRID}: replaced samples whose shards of the new size are not written yet: {lost}"
    ]


def test_a_stage_that_was_not_run_again(undisturbed: Undisturbed, tmp_path: Path, audit: Audit) -> None:
    """Stage 03 made the edits of one shard again, and the hybrid shard holds the earlier ones."""
    root = tmp_path / "root"
    copy_tree(undisturbed.root, root)
    path = next(
        path
        for path in sorted((root / "edits/_receipts" / EDITS).glob("*/0*.json"))
        if json.loads(path.read_bytes())["outputs"]
    )
    told = json.loads(path.read_bytes())
    later = {"finished": told["finished"] + 1e6}
    path.write_text(json.dumps(told | later))
    assert audit(root)["warnings"] == [], "the same bytes as before"
    path.write_text(json.dumps(told | later | {"outputs": [{**one, "digest": "0" * 32} for one in told["outputs"]]}))
    assert audit(root)["warnings"] == [
        f"{HYBRID}: shards that were done before {EDITS} did them again; run {HYBRID} again: 1"
    ]


def test_words_of_a_real_run(undisturbed: Undisturbed, audit: Audit) -> None:
    """The deterministic server names the group in its prompts as it was told it."""
    result = audit(undisturbed.root)
    assert (
        sum(row["prompts"] for row in result["attributes"] if row["attribute"] == "gender") == result["all"]["accepted"]
    )
    assert all(row["stated"] <= row["prompts"] for row in result["attributes"])


def test_a_run_without_stages_03_and_04(undisturbed: Undisturbed, audit: Audit) -> None:
    result = audit(undisturbed.after[PROMPTS])
    assert result["all"]["accepted"] > 0
    assert result["all"]["generated"] == result["all"]["hybrid"] == 0
    assert all(group["losses"]["image"]["share"] is None for group in result["groups"]), "nothing was to be generated"


def test_an_older_receipt_without_groups_is_said(undisturbed: Undisturbed, tmp_path: Path, audit: Audit) -> None:
    copy_tree(undisturbed.after[PROMPTS], tmp_path / "root")
    for path in (tmp_path / "root").glob(f"prompts/_receipts/{PROMPTS}/*/0*.json"):
        receipt = json.loads(path.read_bytes())
        receipt["notes"].pop("groups", None)
        path.write_text(json.dumps(receipt))
    result = audit(tmp_path / "root")
    assert result["all"]["accepted"] == result["all"]["assigned"] > 0
    assert any("do not contain the number of refused samples" in warning for warning in result["warnings"])


def test_other_outputs_of_stage_04_do_not_count(
    undisturbed: Undisturbed, tmp_path: Path, audit: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    """A subset in the same folder is no hybrid dataset; of two hybrid datasets one has to be named."""
    copy_tree(undisturbed.root, root := tmp_path / "root")
    shard = min(EXAMPLES.glob("*.tar"))
    uids = [json.loads(sample.members["json"])["uid"] for sample in read_samples(shard, {"json"})]
    np.save(tmp_path / "keep.npy", np.sort(np.array([divmod(int(uid, 16), 2**64) for uid in uids], "u8,u8")))
    for name in ("a_subset", "z_subset"):
        subset = ["--subset", tmp_path / "keep.npy", "--output", root / name, "--quiet"]
        assert main(["reshard", "--input", *map(str, [shard, *subset])]) == 0
    before = audit(undisturbed.root)
    assert {**audit(root), "root": ""} == {**before, "root": ""}
    assert main(["report", str(root), "--json", "--no_audit"]) == 0
    assert json.loads(capsys.readouterr().out)["funnel"][-1]["count"] == before["all"]["hybrid"] > 0
    copy_tree(root / "hybrid", root / "hybrid2")
    assert main(["audit", str(root)]) == 2
    assert "name one of them with --hybrid" in capsys.readouterr().err
    assert audit(root, "--hybrid", root / "hybrid2")["all"] == before["all"]
    assert main(["audit", str(root), "--hybrid", str(root / "a_subset" / "_receipts")]) == 2


def test_a_report_counts_the_hybrid_dataset_that_is_named(
    undisturbed: Undisturbed, tmp_path: Path, audit: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two in the root, and of one that lies elsewhere."""
    copy_tree(undisturbed.root, root := tmp_path / "root")
    before = audit(root)
    copy_tree(root / "hybrid", root / "hybrid2")
    copy_tree(root / "hybrid", tmp_path / "elsewhere")
    written = (root / "hybrid" / "_receipts" / HYBRID).glob("*/0*.json")
    next(path for path in written if json.loads(path.read_bytes())["notes"]["edited"]).unlink()

    def told(*more: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["report", str(root), "--json", *map(str, more)]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    without = told()
    assert without["audit"] is None and f"--hybrid of {PROGRAM} audit or {PROGRAM} report" in without["audit_missing"]
    fewer = told("--hybrid", root / "hybrid")
    assert fewer["funnel"][-1]["count"] == fewer["audit"]["all"]["hybrid"] < before["all"]["hybrid"]
    for folder in (root / "hybrid2", tmp_path / "elsewhere"):
        named = told("--hybrid", folder)
        assert named["funnel"][-1]["count"] == named["audit"]["all"]["hybrid"] == before["all"]["hybrid"] > 0
        homes = [stage["folder"] for stage in named["stages"] if stage["stage"] == HYBRID]
        assert homes[0] == str(folder.resolve()) and len(homes) == 2 + (folder.parent == tmp_path)
    page = tmp_path / "report.html"
    assert main(["report", str(root), "-o", str(page), "--hybrid", str(tmp_path / "elsewhere"), "--quiet"]) == 0
    assert f'"elsewhere/_receipts/{HYBRID}' in page.read_text(), "links are relative to the page"
    for wrong, says in ((root / "edits", "has not run here"), (tmp_path / "none", "no such folder")):
        assert main(["report", str(root), "-o", str(page), "--hybrid", str(wrong)]) == 2
        assert says in capsys.readouterr().err


# ---- made-up runs


def write_run(root: Path, counts: dict[str, dict[str, int]], prompt: str = "A black man") -> None:
    """Stage 02's records of one shard: ``counts`` as its receipt notes them."""
    place = root / "prompts" / "_receipts" / PROMPTS / bucket_of("00000000")
    place.mkdir(parents=True)
    receipt = {"shard": "00000000", "status": "done", "notes": {"groups": counts}, "outputs": []}
    (place / "00000000.json").write_text(json.dumps(receipt))
    lines = [
        json.dumps({"key": f"{group} {number}", "group": group, "prompt": prompt})
        for group, of_group in counts.items()
        for number in range(of_group.get("accepted", 0))
    ]
    provenance = root / "prompts" / "_provenance" / PROMPTS
    provenance.mkdir(parents=True)
    (provenance / "00000000.jsonl").write_text("\n".join(lines))


def test_a_group_that_is_refused_more_often_is_named(tmp_path: Path, audit: Audit) -> None:
    fair = {"assigned": 1000, "accepted": 920, "reply_refusal": 80}
    unfair = {"assigned": 1000, "accepted": 860, "reply_refusal": 130, "llm_bad_request": 10}
    write_run(tmp_path, {"white male": fair, "asian male": fair, "black male": unfair})
    result = audit(tmp_path)
    by_name = {group["group"]: group for group in result["groups"]}
    assert by_name["black male"]["rewritten"] == 990, "a request that failed was not rewritten"
    loss = by_name["black male"]["losses"]["prompt"]
    assert (loss["lost"], loss["of"]) == (140, 1000)
    assert loss["share"] == 0.14 and loss["others"] == 0.08
    assert loss["beyond_chance"] and 0 < loss["difference_low"] < 0.06 < loss["difference_high"]
    said = [line for line in findings(result) if "black male" in line]
    assert len(said) == 1
    assert "14.0% of its samples got no prompt, 8.0% of the others': 6.0 points more" in said[0].replace("  ", " ")


def test_one_sample_gives_no_verdict(tmp_path: Path, audit: Audit) -> None:
    """The interval of one lost sample beside a hundred that are kept excludes 0, and proves nothing."""
    lone = {"assigned": 1, "reply_refusal": 1}
    write_run(tmp_path / "few", {"white male": {"assigned": 1, "accepted": 1}, "black male": lone})
    result = audit(tmp_path / "few")
    assert list(findings(result)) == []
    said = "\n".join(as_markdown(result))
    assert "Too few samples to compare the groups (n=2): a group is compared where it and the others" in said
    assert "No significant difference" not in said

    enough = {"assigned": 150, "accepted": 150}
    write_run(tmp_path / "some", {"white male": enough, "asian male": enough, "black male": lone})
    result = audit(tmp_path / "some")
    found = difference(1, 1, 0, 300, comparisons=3)
    assert found is not None and found.low > 0 and not found.beyond_chance
    assert verdict(result).startswith("No significant difference in loss between groups (n=301). 1 group has too few")
    assert [group["losses"]["prompt"]["compared"] for group in result["groups"]] == [True, False, True]

    write_run(tmp_path / "alone", {"white male": enough})
    assert verdict(audit(tmp_path / "alone")).startswith("Too few samples"), "there are no others"


@pytest.mark.parametrize(("count", "compared"), [(19, False), (20, True)])
def test_twenty_samples_are_compared(count: int, compared: bool) -> None:
    for sides in ((count, count, 0, 1000), (0, 1000, count, count)):
        found = difference(*sides, comparisons=12)
        assert found is not None
        assert found.compared is found.beyond_chance is compared


def test_chance_alone_is_not_named(tmp_path: Path, audit: Audit) -> None:
    """Of 200 fair draws of twelve groups, a finding in at most about one of twenty."""
    source = random.Random(5)
    named = 0
    for _ in range(200):
        refused = [sum(source.random() < 0.1 for _ in range(150)) for _ in range(12)]
        for lost in refused:
            found = difference(lost, 150, sum(refused) - lost, 150 * 11, comparisons=12)
            assert found is not None
            if found.beyond_chance:
                named += 1
                break
    assert named / 200 <= 0.08


def test_intervals_are_those_of_the_literature() -> None:
    """Wilson's of 15 in 148 and Newcombe's of 56/70 against 48/80: examples (c) and (a) of their papers."""
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=2e-4)
    found = difference(56, 70, 48, 80)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=2e-4)
    assert difference(0, 0, 1, 2) is None


def test_several_processes_count_what_one_does(tmp_path: Path, audit: Audit) -> None:
    write_run(tmp_path, {"a": {"assigned": 3, "accepted": 2, "reply_refusal": 1}})
    (first,) = tmp_path.glob(f"prompts/_receipts/{PROMPTS}/*/0*.json")
    for number in range(1, 130):
        first.with_name(f"{number:08d}.json").write_bytes(first.read_bytes())
    alone = audit(tmp_path, "--workers", "1")
    assert alone["all"]["assigned"] == 390
    assert audit(tmp_path, "--workers", "2") == alone


# ---- words


@pytest.mark.parametrize(
    ("group", "parts"),
    [
        ("middle east female", (("gender", "female"), ("ethnicity", "middle east"))),
        ("Black Male", (("gender", "male"), ("ethnicity", "black"))),
        ("elderly", (("group", "elderly"),)),
        ("wheelchair user female", (("gender", "female"), ("group", "wheelchair user"))),
    ],
)
def test_a_group_is_taken_apart(group: str, parts: tuple[tuple[str, str], ...]) -> None:
    assert attributes_of(group) == parts


@pytest.mark.parametrize(
    ("prompt", "attribute", "value", "says", "says_another"),
    [
        ("A Black woman in a white dress", "ethnicity", "black", True, False),
        ("A man in a black suit", "ethnicity", "black", False, False),
        ("Black and white photograph of a man", "ethnicity", "white", False, False),
        ("An African-American man reads", "ethnicity", "black", True, False),
        ("A Middle-Eastern girl", "ethnicity", "middle east", True, False),
        ("A Chinese woman beside an Indian man", "ethnicity", "asian", True, True),
        ("The manager smiles", "gender", "male", False, False),
        ("She waters her plants", "gender", "female", True, False),
        ("A mother and her son", "gender", "female", True, True),
        ("An elderly couple", "group", "elderly", True, False),
        ("(elderly", "group", "elderly", True, False),
    ],
)
def test_words_that_state_a_group(prompt: str, attribute: str, value: str, says: bool, says_another: bool) -> None:
    assert mentions(prompt, attribute, value) is says
    assert mentions_another(prompt, attribute, value) is says_another


# ---- what a model sees


def test_a_clip_model_looks_at_the_images(undisturbed: Undisturbed, tmp_path: Path, audit: Audit) -> None:
    from tests.backends.tiny_extractors import save_clip

    model = save_clip(tmp_path / "clip")
    result = audit(undisturbed.root, "--clip", f"clip:{model}")
    everything, made = result["images"], result["all"]["generated"]
    assert everything["images"] == everything["originals"] == made, "each with the photo that it replaced"
    assert sum(row["images"] for row in everything["shown"] if row["attribute"] == "gender") == made
    for kind in ("generated", "source"):
        of_gender = [row[kind] for row in everything["found"] if row["attribute"] == "gender"]
        assert sum(share["count"] for share in of_gender) == of_gender[0]["of"] == made
    variety = result["variety"]
    assert (variety["feature"], variety["sampled"]) == (f"clip:{model}", False), "its features, as there are no others"
    assert variety["generated"]["all"]["pictures"] == variety["source"]["all"]["pictures"] == made
    assert 0 < variety["source"]["all"]["distance"] < 1
    text = "\n".join(as_markdown(result))
    assert f"in {made} of the photos that were replaced" in text and "originals: mean distance" in text
    assert everything == audit(undisturbed.root, "--clip", f"clip:{model}")["images"], "the same again"
    few = audit(undisturbed.root, "--clip", f"clip:{model}", "--images", "3")
    assert few["images"]["images"] <= 3 and few["variety"]["sampled"]
    assert "Only a part of the pictures was compared" in "\n".join(as_markdown(few))


def test_the_model_is_asked_about_each_image(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that know the answer: every choice is right, and wrong where they are turned round."""
    from curation.commands.audit import zero_shot
    from curation.commands.audit.groups import shards_tried, stage_places
    from curation.commands.places import provenance
    from curation.extract.settings import ModelSettings

    places = stage_places(undisturbed.root)
    groups = sorted({str(r["group"]) for s in shards_tried(places[PROMPTS]) for r in provenance(places[PROMPTS], s)})
    answers: list[str] = []

    class Knows:
        revision = "one that knows"

        def __init__(self, *_: object) -> None:
            pass

        def texts(self, texts: list[str]) -> Any:
            return np.array([[1.0, 0.0] if "woman" in text else [0.0, 1.0] for text in texts], np.float32)

        def prepare(self, picture: Any) -> Any:
            return picture

        def pictures(self, pictures: list[Any]) -> Any:
            taken = [answers.pop(0) for _ in pictures]
            return np.array([[1.0, 0.0] if "female" in group else [0.0, 1.0] for group in taken], np.float32)

    monkeypatch.setattr(zero_shot, "ClipFeatures", Knows)
    for turned in (False, True):
        chosen = list(zero_shot._chosen(places, 1000))
        asked = [picture.group for picture in chosen]
        answers[:] = [("male" if "female" in group else "female") if turned else group for group in asked]
        seen = zero_shot.look_at_images(places, groups, "clip:x", ModelSettings(), 1000)
        for (attribute, _), (count, agreed) in seen.shown.items():
            if attribute == "gender":
                assert agreed == (0 if turned else count)


def test_images_without_a_group_cannot_be_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from curation.commands.audit import zero_shot

    class Silent:
        revision = "none"

        def __init__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(zero_shot, "ClipFeatures", Silent)
    CheckedRoot(tmp_path).add("00000000", [Made("a", "", [{"face": face()}])])
    assert main(["audit", str(tmp_path), "--clip", "clip:x", "--workers", "1"]) == 2
    assert "no generated image has a group" in capsys.readouterr().err


# ---- cards


def test_the_card_and_croissant(undisturbed: Undisturbed, tmp_path: Path, audit: Audit) -> None:
    card = tmp_path / "card" / "README.md"
    card.parent.mkdir()
    card.write_text("---\nlanguage: en\n---\n# Mine\n\nWords of my own.\n")
    for _ in range(2):
        audit(undisturbed.root, "--card", card.parent, "--license", "cc-by-4.0")
    text = card.read_text("utf-8")
    assert text.count("## Groups") == 1 and "Words of my own." in text
    assert "| group | assigned |" in text and "license: cc-by-4.0" in text
    described = json.loads((card.parent / "croissant.json").read_bytes())
    measured = {value["name"]: value for value in described["variableMeasured"]}
    assert measured["diversity and near copies"]["value"] == "not measured"
    assert any(name.endswith(": samples that got no prompt") and 0 <= measured[name]["value"] <= 1 for name in measured)
    assert len(described["rai:dataBiases"]) == 1, "the verdict, as no group differs significantly"
    assert described["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert [records["name"] for records in described["recordSet"]] == [
        "images-records", "texts-records", "metadata-records"
    ]  # fmt: skip


def test_croissant_names_every_digest() -> None:
    described = croissant("my set/1", 2, 10, {"00000000.tar": "a" * 64, "00000001.tar": "b" * 64}, None)
    files = {entry["@id"]: entry for entry in described["distribution"]}
    assert files["00000001.tar"]["sha256"] == "b" * 64
    assert files["images"]["containedIn"] == [{"@id": "00000000.tar"}, {"@id": "00000001.tar"}]
    assert described["name"] == "my-set-1"
    sources = {field["source"]["fileSet"]["@id"] for records in described["recordSet"] for field in records["field"]}
    assert sources <= files.keys()


# ---- hostile and bad input


def test_names_of_groups_are_only_text(tmp_path: Path, audit: Audit) -> None:
    evil = "<img src=x onerror=alert(1)> | [x](javascript:1) `a`"
    write_run(
        tmp_path, {evil: {"assigned": 10, "accepted": 5, "reply_refusal": 5}, "b": {"assigned": 10, "accepted": 10}}
    )
    result = audit(tmp_path)
    text = "\n".join(as_markdown(result))
    assert "<img" not in text and "[x](" not in text
    assert cell("a|b") == "a\\|b"


def test_receipts_that_make_no_sense(tmp_path: Path, audit: Audit) -> None:
    counts: Any = {"a": {"assigned": -5, "accepted": "many"}, "b": 7, "c": {"assigned": 3, "accepted": 3}}
    write_run(tmp_path, {"c": {"assigned": 3, "accepted": 3}})
    (path,) = tmp_path.glob(f"prompts/_receipts/{PROMPTS}/*/0*.json")
    path.write_text(json.dumps({"status": "done", "notes": {"groups": counts}}))
    with open(tmp_path / "prompts" / "_provenance" / PROMPTS / "00000000.jsonl", "a") as file:
        file.write('\nnot json\n[1]\n{"key": 1, "group": 2, "prompt": 3}\n')
    assert audit(tmp_path)["all"]["accepted"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--workers", "0"), "--workers"),
        (("--images", "0"), "--images"),
        (("--clip_weights", "x"), "--clip"),
        (("--clip", "oai-clip-vit-b32"), "has made none"),
        (("--card", "somewhere"), "has made none"),
    ],
)
def test_what_cannot_be(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, {"c": {"assigned": 3, "accepted": 3}})
    assert main(["audit", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_no_groups_and_no_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, {})
    assert main(["audit", str(tmp_path)]) == 2
    assert "no sample was assigned to a group" in capsys.readouterr().err
    (tmp_path / "other" / "_receipts" / "toy").mkdir(parents=True)
    assert main(["audit", str(tmp_path / "other")]) == 2
    assert PROMPTS in capsys.readouterr().err
