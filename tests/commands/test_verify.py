"""``python -m curation verify``: sound on a real run of stages 01 to 04, and no fault put into one is overlooked."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from curation.__main__ import main
from curation.commands.fsck.shard import REMEDIES as FSCK_REMEDIES
from curation.commands.verify.shard import REMEDIES
from curation.storage.files import fast_digest, manifest_line, write_manifest
from curation.tar.samples import TarWriter, read_samples
from curation.tar.scan import TarScan
from tests import ROOT
from tests.pipeline import Undisturbed, copy_tree
from tests.processes import help_answers_at_once

SHARD = "00000004"  # with three edits
FOLDERS = ("captions", "prompts", "edits", "hybrid")


@dataclass
class Dataset:
    """A copy of a run's folders, in which faults are put."""

    root: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def hybrid(self) -> Path:
        return self.root / "hybrid" / f"{SHARD}.tar"

    @property
    def edits(self) -> Path:
        return self.root / "edits" / f"{SHARD}.tar"

    def verify(self, *more: str, hybrid: str = "hybrid") -> tuple[int, dict[str, Any]]:
        self.capsys.readouterr()
        folders = [str(self.root / "shards"), str(self.root / hybrid)]
        code = main(["verify", *folders, "--json", "--quiet", "--workers", "1", *more])
        return code, json.loads(self.capsys.readouterr().out)

    def findings(self, *more: str, hybrid: str = "hybrid") -> dict[str, set[str]]:
        """kind → keys that are named with it; the exit code is as it should be."""
        code, result = self.verify(*more, hybrid=hybrid)
        assert result["ok"] == (code == 0)
        found: dict[str, set[str]] = {}
        for shard in result["findings"].values():
            for finding in shard["findings"]:
                assert finding["remedy"] == REMEDIES[finding["kind"]]
                found.setdefault(finding["kind"], set()).add(finding["key"])
        assert bool(found) == (code == 1)
        return found

    def receipt_path(self, folder: str, shard: str = SHARD) -> Path:
        (path,) = [
            path
            for path in (self.root / folder / "_receipts").glob(f"*/*/{shard}.json")
            if not (path.parent.parent / "_home.json").exists()
        ]
        return path

    def change_receipt(self, folder: str, change: Callable[[dict[str, Any]], None], shard: str = SHARD) -> None:
        path = self.receipt_path(folder, shard)
        receipt = json.loads(path.read_bytes())
        change(receipt)
        path.write_text(json.dumps(receipt))

    def sign(self) -> None:
        """Every receipt is made to say what its files hold now: no digest gives a fault away any more."""
        digests: dict[str, dict[str, tuple[int, str]]] = {}

        def outputs(folder: str) -> Callable[[dict[str, Any]], None]:
            def change(receipt: dict[str, Any]) -> None:
                for output in receipt["outputs"]:
                    path = self.root / folder / output["path"]
                    output["size"], output["digest"] = path.stat().st_size, fast_digest(path)
                    mine = digests.setdefault(receipt["stage"], {})
                    mine[path.resolve().relative_to(self.root.resolve()).as_posix()] = output["size"], output["digest"]

            return change

        def inputs(folder: str) -> Callable[[dict[str, Any]], None]:
            def change(receipt: dict[str, Any]) -> None:
                for was, source in zip(receipt["inputs"], receipt["sources"], strict=True):
                    place = os.path.normpath(os.path.join(folder, source.get("folder", ""), was["path"]))
                    known = digests.get(source.get("stage", ""), {})
                    if "digest" in was and place in known:
                        was["size"], was["digest"] = known[place]

            return change

        for folder in FOLDERS:
            self.change_receipt(folder, inputs(folder))
            self.change_receipt(folder, outputs(folder))


@pytest.fixture
def dataset(undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Dataset:
    root = tmp_path / "run"
    for folder in FOLDERS:
        copy_tree(undisturbed.root / folder, root / folder)
    (root / "shards").symlink_to(undisturbed.root / "shards")
    return Dataset(root, capsys)


def keys_of(path: Path) -> list[str]:
    return [sample.key for sample in read_samples(path)]


def edited_keys(path: Path) -> list[str]:
    return [s.key for s in read_samples(path) if "curation" in json.loads(s.members["json"])]


Samples = list[tuple[str, dict[str, bytes]]]


def rewrite(path: Path, change: Callable[[Samples], Samples | None]) -> None:
    """The tar with its samples changed: members and times stay but for what ``change`` does."""
    with tarfile.open(path) as tar:
        members = [(info.name, int(info.mtime), tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        modes = {info.mode for info in tar}
    mtimes = {name: mtime for name, mtime, _ in members}
    samples: dict[str, dict[str, bytes]] = {}
    for name, _, data in members:
        key, _, suffix = name.partition(".")
        samples.setdefault(key, {})[suffix] = data
    listed = [*samples.items()]
    changed = change(listed)
    assert modes == {0o644}
    with open(path, "wb") as file:
        writer = TarWriter(file)
        for key, parts in listed if changed is None else changed:
            for suffix, data in parts.items():
                writer.add(f"{key}.{suffix}", data, mtimes.get(f"{key}.{suffix}", 0))
        writer.close()


def change_sample(path: Path, key: str, change: Callable[[dict[str, bytes]], None]) -> None:
    rewrite(path, lambda samples: change(dict(samples)[key]))


def change_json(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, bytes]], None]:
    def apply(parts: dict[str, bytes]) -> None:
        metadata = json.loads(parts["json"])
        change(metadata)
        parts["json"] = json.dumps(metadata, indent=2).encode()

    return apply


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


# ---- sound


def test_a_real_run_is_sound_and_its_manifest_is_for_sha256sum(dataset: Dataset) -> None:
    code, result = dataset.verify()
    assert (code, result["ok"], result["shards"], result["edited"]) == (0, True, 5, 6)
    assert result["samples"] == sum(len(keys_of(path)) for path in (dataset.root / "shards").glob("*.tar"))
    manifest = dataset.root / "hybrid" / "manifest.tsv"
    assert result["manifest"] == str(manifest)
    check = ["sha256sum", "--strict", "-c", "manifest.tsv"]
    done = subprocess.run(check, cwd=manifest.parent, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 5


def test_the_text_form_ends_in_one_line(dataset: Dataset) -> None:
    arguments = ["verify", str(dataset.root / "shards"), str(dataset.root / "hybrid"), "--quiet", "--workers", "2"]
    assert main(arguments) == 0
    out = dataset.capsys.readouterr().out.splitlines()
    assert len(out) == 1
    assert out[0].startswith("OK: 5 shards, ")
    flip(dataset.hybrid, 700)
    assert main(arguments) == 1
    *lines, last = dataset.capsys.readouterr().out.splitlines()
    assert last.startswith("FAULTY: 2 findings in 1 shards; ")
    assert any(line.startswith(f"{SHARD}: bytes_differ: {keys_of(dataset.hybrid)[0]}: ") for line in lines)
    assert any(line.startswith("fix for bytes_differ (1): run stage 04 again") for line in lines)


def test_a_set_in_which_nothing_was_edited_is_told(dataset: Dataset) -> None:
    unedited = next(
        path.stem
        for path in sorted((dataset.root / "shards").glob("*.tar"))
        if not edited_keys(dataset.root / "hybrid" / path.name)
    )
    arguments = ["verify", str(dataset.root / "shards"), str(dataset.root / "hybrid"), "--quiet", "--shards", unedited]
    assert main(arguments) == 0
    assert dataset.capsys.readouterr().out.startswith(
        "OK, but nothing was edited: every sample is that of the source: 1 "
    )


@pytest.mark.parametrize(("flag", "value"), [("subset", True), ("blur_faces", "recorded"), ("shard_size", 20)])
def test_what_does_not_come_from_edits_alone_is_refused(dataset: Dataset, flag: str, value: object) -> None:
    (path,) = (dataset.root / "hybrid/_receipts/04_reshard").glob("_epoch.1.json")
    record = json.loads(path.read_bytes())
    record["options"][flag] = value
    path.write_text(json.dumps(record))
    assert main(["verify", str(dataset.root / "shards"), str(dataset.root / "hybrid")]) == 2
    assert f"stage 04 made {dataset.root}/hybrid with --{flag}: " in dataset.capsys.readouterr().err


def test_the_folder_of_the_whole_dataset_is_taken_for_its_shards(dataset: Dataset) -> None:
    root = dataset.root / "whole"
    root.mkdir()
    (dataset.root / "hybrid").rename(root / "shards")
    edits = str(dataset.root / "edits")
    assert main(["verify", str(dataset.root / "shards"), str(root), "--edits", edits, "--quiet"]) == 0
    assert (root / "shards/manifest.tsv").is_file()
    assert f"the hybrid shards in {root}/shards are verified" in dataset.capsys.readouterr().err


def test_swapped_arguments_are_told(dataset: Dataset) -> None:
    places = {name: str(dataset.root / name) for name in ("shards", "hybrid", "edits", "prompts", "captions")}
    for arguments, told in (
        ([places["hybrid"], places["shards"], "--edits", places["edits"]], "were the two swapped?"),
        ([places["shards"], places["edits"]], "HYBRID: "),
        ([places["shards"], str(dataset.root)], f"did you mean {places['hybrid']}?"),
        ([places["shards"], places["hybrid"], "--edits", places["prompts"]], "--edits: "),
        ([places["shards"], places["hybrid"], "--prompts", places["captions"]], "--prompts: "),
        ([places["shards"], places["hybrid"], "--captions", places["edits"]], "--captions: "),
    ):
        assert main(["verify", *arguments]) == 2
        assert told in dataset.capsys.readouterr().err


def test_nothing_but_the_manifest_is_written_and_none_where_there_are_findings(dataset: Dataset) -> None:
    def look() -> dict[str, bytes]:
        return {str(p.relative_to(dataset.root)): p.read_bytes() for p in dataset.root.rglob("*") if p.is_file()}

    flip(dataset.hybrid, 700)
    before = look()
    assert dataset.findings()
    assert look() == before
    elsewhere = dataset.root / "digests.txt"
    shutil.copy2(dataset.hybrid.with_name("00000001.tar"), dataset.root)
    assert dataset.verify("--shards", "00000001", "--manifest", str(elsewhere))[0] == 0
    assert look().keys() - before.keys() == {"digests.txt", "00000001.tar"}
    assert elsewhere.read_text().split("  ")[1] == "hybrid/00000001.tar\n"
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "digests.txt"], cwd=dataset.root, check=True)


def test_a_manifest_escapes_names_as_sha256sum_does(tmp_path: Path) -> None:
    rows = []
    for name in (
        "plain.tar",
        "back\\slash.tar",
        "line\nbreak.tar",
        "carriage\rreturn.tar",
        " two  spaces.tar",
        "é.tar",
    ):
        (tmp_path / name).write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        rows.append((tmp_path / name, digest))
        theirs = subprocess.run(["sha256sum", name], cwd=tmp_path, capture_output=True, check=True).stdout
        if "\r" not in name:  # older coreutils leave it as it is, and read it either way
            assert manifest_line(name, digest) == theirs
    write_manifest(tmp_path / "manifest.tsv", [row for row in rows if "\r" not in row[0].name])
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "manifest.tsv"], cwd=tmp_path, check=True)


def test_loose_edits_and_dropped_samples(dataset: Dataset) -> None:
    """Edits made elsewhere, one of them not there: stage 04 drops its sample, and verify knows why it is gone."""
    loose = dataset.root / "loose"
    first, *others = edited_keys(dataset.hybrid)
    for path in (dataset.root / "edits").glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(loose / path.stem, filter="data")
    for path in (loose / SHARD).glob(f"{first}.*"):
        path.unlink()
    shutil.copytree(dataset.root / "prompts", dataset.root / "words", ignore=shutil.ignore_patterns("_*"))
    stage_04 = importlib.import_module("04_reshard")
    folders = {"input": "shards", "edits": "loose", "prompts": "words", "output": "second"}
    argv = [word for flag, name in folders.items() for word in (f"--{flag}", f"{dataset.root}/{name}")]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(stage_04.main, [*argv, "--on_missing", "drop", "--quiet"]).result() == 0
    assert dataset.findings(hybrid="second") == {}
    assert first not in keys_of(dataset.root / "second" / f"{SHARD}.tar")
    victim = loose / SHARD / f"{others[0]}.jpg"
    data = victim.read_bytes()
    flip(victim, len(data) // 2)
    found = dataset.findings(hybrid="second")
    assert others[0] in found["not_the_edit"]
    assert others[0] in found["wrong_sha256"]
    victim.write_bytes(data)
    (drops,) = (dataset.root / "second" / "_rejects").glob("*/*.drops.tsv.gz")
    drops.write_bytes(gzip.compress(b""))
    found = dataset.findings(hybrid="second")
    assert {"lost_sample", "counts_differ", "wrong_digest"} <= found.keys()
    assert found["lost_sample"] == {first}


def test_a_damaged_source_is_accounted_for_by_rejects(dataset: Dataset, tmp_path: Path) -> None:
    source = tmp_path / "cut"
    source.mkdir()
    data = (dataset.root / "shards" / f"{SHARD}.tar").read_bytes()
    (source / f"{SHARD}.tar").write_bytes(data[: len(data) * 3 // 4 + 77])
    shutil.copytree(dataset.root / "edits", dataset.root / "loose", ignore=shutil.ignore_patterns("_*"))
    kept = set(keys_of(source / f"{SHARD}.tar")[:-1])
    rewrite(dataset.root / "loose" / f"{SHARD}.tar", lambda samples: [s for s in samples if s[0] in kept])
    stage_04 = importlib.import_module("04_reshard")
    argv = ["--input", f"{source}", "--edits", f"{dataset.root}/loose", "--output", f"{dataset.root}/third", "--quiet"]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(stage_04.main, argv).result() == 0
    dataset.root = shutil.copytree(dataset.root, tmp_path / "moved", symlinks=True)  # a dataset may be moved
    (dataset.root / "shards").unlink()
    shutil.copytree(source, dataset.root / "shards")
    for path in (dataset.root / "loose").glob("*.tar"):
        if path.stem != SHARD:
            path.unlink()
    assert dataset.findings("--edits", f"{dataset.root}/loose", hybrid="third") == {}
    rejects = dataset.root / "third" / "_rejects" / "04_reshard" / f"{SHARD}.jsonl"
    rejects.unlink()
    found = dataset.findings("--edits", f"{dataset.root}/loose", hybrid="third")
    assert {"lost_sample", "missing_output"} <= found.keys()


# ---- faults: each in a copy whose receipts give it away, and in one whose receipts were made to fit


def flip_unedited(dataset: Dataset) -> tuple[str, str]:
    key = next(k for k in keys_of(dataset.hybrid) if k not in edited_keys(dataset.hybrid))
    with tarfile.open(dataset.hybrid) as tar:
        flip(dataset.hybrid, tar.getmember(f"{key}.jpg").offset_data + 1000)
    return "bytes_differ", key


def flip_padding(dataset: Dataset) -> tuple[str, str]:
    key = keys_of(dataset.hybrid)[0]
    with tarfile.open(dataset.hybrid) as tar:
        info = tar.getmember(f"{key}.txt")
        flip(dataset.hybrid, info.offset_data + info.size + 3)
    return "bytes_differ", key


def swap(dataset: Dataset) -> tuple[str, str]:
    keys = keys_of(dataset.hybrid)

    def change(samples: Samples) -> None:
        samples[5], samples[9] = samples[9], samples[5]

    rewrite(dataset.hybrid, change)
    return "wrong_order", keys[9]


def lose(dataset: Dataset) -> tuple[str, str]:
    key = keys_of(dataset.hybrid)[7]
    rewrite(dataset.hybrid, lambda samples: [s for s in samples if s[0] != key])
    return "lost_sample", key


def double(dataset: Dataset) -> tuple[str, str]:
    rewrite(dataset.hybrid, lambda samples: [*samples, samples[3]])
    return "doubled_sample", keys_of(dataset.hybrid)[3]


def double_in_place(dataset: Dataset) -> tuple[str, str]:
    """Its members twice, one behind the other: by WebDataset's rule one sample."""
    rewrite(dataset.hybrid, lambda samples: [s for pair in zip(samples, samples, strict=True) for s in pair][:-19])
    return "wrong_members", keys_of(dataset.hybrid)[0]


def strange(dataset: Dataset) -> tuple[str, str]:
    rewrite(dataset.hybrid, lambda samples: [*samples, ("stranger", samples[3][1])])
    return "unknown_sample", "stranger"


def lose_member(dataset: Dataset) -> tuple[str, str]:
    key = keys_of(dataset.hybrid)[2]
    change_sample(dataset.hybrid, key, lambda parts: parts.pop("txt") and None)
    return "wrong_members", key


def cut(dataset: Dataset) -> tuple[str, str]:
    data = dataset.hybrid.read_bytes()
    dataset.hybrid.write_bytes(data[: len(data) // 2])
    return "damaged_tar", ""


def cut_end(dataset: Dataset) -> tuple[str, str]:
    data = dataset.hybrid.read_bytes()
    dataset.hybrid.write_bytes(data[:-512])
    return "bytes_differ", ""


def other_picture(dataset: Dataset) -> tuple[str, str]:
    key = edited_keys(dataset.hybrid)[1]
    other = next(s.members["jpg"] for s in read_samples(dataset.hybrid) if s.key != key)
    change_sample(dataset.hybrid, key, lambda parts: parts.update(jpg=other))
    return "wrong_sha256", key


def the_original(dataset: Dataset) -> tuple[str, str]:
    shutil.copyfile(dataset.root / "shards" / f"{SHARD}.tar", dataset.hybrid)
    return "not_the_edit", "*edited"


def edit_unedited(dataset: Dataset) -> tuple[str, str]:
    key = next(k for k in keys_of(dataset.hybrid) if k not in edited_keys(dataset.hybrid))
    edit = next(iter(read_samples(dataset.edits))).members
    change_sample(dataset.hybrid, key, lambda parts: parts.update(edit))
    return "bytes_differ", key


def in_both(dataset: Dataset, change: Callable[[dict[str, bytes]], None], kind: str) -> tuple[str, str]:
    """The edit itself is wrong, and the hybrid has it as it is."""
    key = edited_keys(dataset.hybrid)[0]
    change_sample(dataset.edits, key, change)
    change_sample(dataset.hybrid, key, change)
    return kind, key


def stale_sha256(dataset: Dataset) -> tuple[str, str]:
    old = "0" * 64
    return in_both(dataset, change_json(lambda m: m.update(sha256=old)), "wrong_sha256")


def wrong_size(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, change_json(lambda m: m.update(width=512)), "wrong_size")


def caption_differs(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, lambda parts: parts.update(txt=b"something else"), "caption_differs")


def no_provenance(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, change_json(lambda m: m.pop("curation")), "no_provenance")


def no_seed(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, change_json(lambda m: m["curation"].pop("seed")), "no_provenance")


def no_revision(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, change_json(lambda m: m["curation"]["models"]["image"].pop("revision")), "no_provenance")


def field_lost(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, change_json(lambda m: m.pop("url")), "original_lost")


def caption_lost(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, change_json(lambda m: m["curation"].pop("original_caption")), "original_lost")


def bad_json(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, lambda parts: parts.update(json=b"{]"), "bad_json")


def not_an_image(dataset: Dataset) -> tuple[str, str]:
    return in_both(dataset, lambda parts: parts.update(jpg=b"\xff\xd8 no"), "undecodable")


def prompt_changed(dataset: Dataset) -> tuple[str, str]:
    path = dataset.root / "prompts" / f"{SHARD}.json"
    prompts = json.loads(path.read_bytes())
    name = next(iter(prompts))
    path.write_text(json.dumps({**prompts, name: "A photo of somebody else"}))
    return "stale_prompt", name.removesuffix(".json")


def later_edit(dataset: Dataset) -> tuple[str, str]:
    """Stage 03 has made an edit anew, whole and sound, and stage 04 has not taken it over."""
    key = edited_keys(dataset.hybrid)[0]
    other = next(s.members["jpg"] for s in read_samples(dataset.edits) if s.key != key)

    def change(parts: dict[str, bytes]) -> None:
        parts["jpg"] = other
        change_json(lambda m: m.update(sha256=hashlib.sha256(other).hexdigest()))(parts)

    change_sample(dataset.edits, key, change)
    return "not_the_edit", key


def lost_caption(dataset: Dataset) -> tuple[str, str]:
    path = dataset.root / "captions" / f"{SHARD}.json"
    captions = json.loads(path.read_bytes())
    name = next(iter(captions))
    captions.pop(name)
    path.write_text(json.dumps(captions))
    return "lost_between_stages", name.removesuffix(".json")


def lost_prompt(dataset: Dataset) -> tuple[str, str]:
    path = dataset.root / "prompts" / f"{SHARD}.json"
    prompts = json.loads(path.read_bytes())
    name = next(iter(prompts))
    prompts.pop(name)
    path.write_text(json.dumps(prompts))
    return "lost_between_stages", name.removesuffix(".json")


def prompt_from_nowhere(dataset: Dataset) -> tuple[str, str]:
    path = dataset.root / "prompts" / f"{SHARD}.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"stranger.json": "A photo"}))
    return "from_nowhere", "stranger"


def edit_of_nothing(dataset: Dataset) -> tuple[str, str]:
    rewrite(dataset.edits, lambda samples: [*samples, ("stranger", samples[0][1])])
    return "edit_without_sample", "stranger"


def drop_lost(dataset: Dataset) -> tuple[str, str]:
    path = dataset.root / "captions" / "_rejects" / "01_filter_noface" / f"{SHARD}.drops.tsv.gz"
    first, *others = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(others)))
    return "lost_between_stages", str(json.loads(first.split(b"\t")[1]))


FAULTS = [
    flip_unedited, flip_padding, swap, lose, double, double_in_place, strange, lose_member, cut, cut_end, other_picture,
    the_original, edit_unedited, stale_sha256, wrong_size, caption_differs, no_provenance, no_seed, no_revision,
    field_lost, caption_lost, bad_json, not_an_image, prompt_changed, later_edit, lost_caption, lost_prompt,
    prompt_from_nowhere, edit_of_nothing, drop_lost,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_named_with_its_sample(fault: Callable[[Dataset], tuple[str, str]], dataset: Dataset) -> None:
    edited = set(edited_keys(dataset.hybrid))
    kind, key = fault(dataset)
    found = dataset.findings()
    assert kind in found
    assert (edited if key == "*edited" else {key}) <= found[kind] or not key
    assert "wrong_digest" in found  # a file is not what its receipt says
    dataset.sign()  # whoever did it mended the receipts as well
    found = dataset.findings()
    assert kind in found
    assert (edited if key == "*edited" else {key}) <= found[kind] or not key
    assert "wrong_digest" not in found


def test_a_missing_shard(dataset: Dataset) -> None:
    dataset.hybrid.unlink()
    assert dataset.findings() == {"missing_shard": {""}}


def test_an_extra_shard_with_and_without_a_receipt(dataset: Dataset) -> None:
    extra = dataset.hybrid.with_name("00000099.tar")
    shutil.copyfile(dataset.hybrid, extra)
    assert dataset.findings() == {"extra_shard": {""}}
    shutil.copyfile(dataset.receipt_path("hybrid"), dataset.receipt_path("hybrid").with_name("00000099.json"))
    assert dataset.findings() == {"extra_shard": {""}}
    extra.unlink()
    assert dataset.findings() == {"extra_shard": {""}}
    shutil.copyfile(dataset.edits, dataset.edits.with_name("00000098.tar"))
    assert dataset.findings().keys() == {"extra_shard", "stray_edits"}
    assert dataset.findings("--shards", SHARD) == {}


def test_a_shard_that_no_receipt_names(dataset: Dataset) -> None:
    path = dataset.receipt_path("hybrid")
    path.unlink()
    assert dataset.findings() == {"no_receipt": {""}}


def test_a_folder_without_any_receipts_is_not_trusted(dataset: Dataset) -> None:
    shutil.rmtree(dataset.root / "hybrid" / "_receipts")
    folders = ["--edits", f"{dataset.root}/edits", "--prompts", f"{dataset.root}/prompts"]
    assert dataset.findings(*folders) == {"no_receipt": {""}}
    with pytest.raises(json.JSONDecodeError):
        dataset.verify()  # a usage error: nobody says where the edits are
    assert main(["verify", f"{dataset.root}/shards", f"{dataset.root}/hybrid"]) == 2
    assert "--edits" in dataset.capsys.readouterr().err


@pytest.mark.parametrize("status", ["failed", "retry", None])
def test_a_receipt_that_does_not_say_done(dataset: Dataset, status: str | None) -> None:
    dataset.change_receipt("hybrid", lambda receipt: receipt.update(status=status))
    assert "not_done" in dataset.findings()


def test_a_receipt_for_other_bytes(dataset: Dataset) -> None:
    dataset.change_receipt("hybrid", lambda receipt: receipt["outputs"][0].update(digest="0" * 32))
    assert dataset.findings() == {"wrong_digest": {""}}


def test_edits_that_were_done_again_and_not_taken_over(dataset: Dataset) -> None:
    """The bytes are the same: the receipts alone tell."""
    dataset.change_receipt("hybrid", lambda receipt: receipt["inputs"][1].update(digest="0" * 32))
    assert dataset.findings() == {"stale": {""}}


@pytest.mark.parametrize("folder", FOLDERS)
def test_counts_that_differ_from_the_keys(dataset: Dataset, folder: str) -> None:
    def change(receipt: dict[str, Any]) -> None:
        receipt["counts"]["in"] += 1
        receipt["counts"]["kept"] += 1

    dataset.change_receipt(folder, change)
    assert "counts_differ" in dataset.findings()


@pytest.mark.parametrize("folder", FOLDERS)
def test_counts_that_do_not_add_up(dataset: Dataset, folder: str) -> None:
    dataset.change_receipt(folder, lambda receipt: receipt["counts"]["failed"].update(odd=1))
    assert "counts_differ" in dataset.findings()


@pytest.mark.parametrize("value", [[], {"counts": 3}, {"inputs": None}, {"counts": {"in": "x"}}], ids=repr)
def test_a_receipt_that_makes_no_sense(dataset: Dataset, value: Any) -> None:
    path = dataset.receipt_path("edits")
    receipt = json.loads(path.read_bytes())
    path.write_text(json.dumps({**receipt, **value} if value else value))
    assert dataset.findings().keys() & {"bad_record", "no_receipt", "counts_differ"}


@pytest.mark.parametrize("seed", range(40))
def test_no_changed_byte_is_overlooked(dataset: Dataset, seed: int) -> None:
    """Any byte of any hybrid shard, also where the receipt was made to fit."""
    dice = random.Random(seed)
    victim = dice.choice(sorted((dataset.root / "hybrid").glob("*.tar")))
    flip(victim, dice.randrange(victim.stat().st_size))
    size, digest = victim.stat().st_size, fast_digest(victim)
    dataset.change_receipt("hybrid", lambda r: r["outputs"][0].update(size=size, digest=digest), victim.stem)
    assert dataset.findings("--shards", victim.stem)


# ---- what is asked of every command


def test_usage_errors(dataset: Dataset, tmp_path: Path) -> None:
    shards, hybrid = str(dataset.root / "shards"), str(dataset.root / "hybrid")
    assert main(["verify", str(tmp_path / "none"), hybrid]) == 2
    assert main(["verify", shards, str(tmp_path / "none")]) == 2
    assert main(["verify", shards, shards]) == 2
    assert main(["verify", shards, hybrid, "--edits", str(tmp_path / "none")]) == 2
    assert main(["verify", shards, hybrid, "--workers", "0"]) == 2
    assert main(["verify", shards, hybrid, "--manifest", str(tmp_path / "none" / "m")]) == 2
    assert main(["verify", shards, hybrid, "--nonsense"]) == 2


def test_output_is_bounded_and_names_are_cleaned(dataset: Dataset) -> None:
    def change(samples: Samples) -> Samples:
        return [(f"\x1b[31mx{number}", parts) for number, (_, parts) in enumerate(samples * 40)]

    rewrite(dataset.hybrid, change)
    assert main(["verify", f"{dataset.root}/shards", f"{dataset.root}/hybrid", "--quiet", "--workers", "1"]) == 1
    out = dataset.capsys.readouterr().out
    assert len(out.splitlines()) < 60
    assert "\x1b" not in out


@pytest.mark.parametrize("command", ["verify", "fsck"])
def test_help_answers_in_under_a_second(command: str) -> None:
    assert "--workers" in help_answers_at_once("-m", "curation", command).stdout


@pytest.mark.parametrize("command", ["verify", "fsck"])
def test_every_flag_and_every_kind_of_finding_is_documented(command: str) -> None:
    page = (ROOT / "docs" / "verify.md").read_text("utf-8")
    section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    fields = dataclasses.fields(importlib.import_module(f"curation.commands.{command}.command").Options)
    flags = {("no_" if f.default is True else "") + f.name for f in fields if f.default is not dataclasses.MISSING}
    assert {row.split("`")[1][2:] for row in section.splitlines() if row.startswith("| `--")} == flags
    if command == "fsck":
        table = section.partition("| kinds |")[2].partition("\n\n")[0]
        assert set(re.findall(r"`([a-z0-9_]+)`", table)) - {"curation"} == set(FSCK_REMEDIES)


def test_every_kind_of_finding_has_its_remedy() -> None:
    """As the sources name them: the first argument of add, the first of a pair."""
    folder = ROOT / "curation" / "commands"
    for pattern, remedies in (
        ("verify/*.py", REMEDIES),
        ("fsck/*.py", FSCK_REMEDIES),
    ):
        text = "".join(path.read_text("utf-8") for path in folder.glob(pattern))
        kinds = set(re.findall(r'(?:findings\.add\(|yield |found\.append\(\(|\[\*found, \()\s*"(\w+)"', text))
        assert len(kinds) > 8
        assert kinds - {"original_lost"} <= remedies.keys()


def test_the_proof_foretells_a_sample_of_several_images(tmp_path: Path) -> None:
    """By another road than the code that writes: what is foretold is what stage 04 makes of odd samples."""
    from curation.tar.prove import prove_splice
    from curation.tar.splice import Action, Copies, Decision, Edit, decided, splice

    def tar_of(*names: str) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = 10 + number, 1000 + number, 0o600
                tar.addfile(info, io.BytesIO(bytes([65 + number]) * info.size))
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        return file.getvalue()

    long = "k" * 150
    source = tmp_path / "source.tar"
    source.write_bytes(
        tar_of(
            "readme", "a.png", "a.jpg", "a.cls", "a.json", "b.txt", "b.webp", "c.jpg", "c.json", "c.txt", f"{long}.json"
        )
    )
    edit = Edit(b"jpg" * 300, b"txt", b"{}")
    result = tmp_path / "result.tar"
    edited = {"a", "b", long}

    class Target:
        def __init__(self) -> None:
            self.data = b""

        def write_pieces(self, pieces: Any) -> None:
            self.data += b"".join(map(bytes, pieces))

    for gone in (set(), {"c"}):
        target = Target()

        def decide(span: Any, gone: set[str] = gone) -> Decision:
            if span.key == long:
                return Copies(["x", long * 2], Edit(b"j", None, b"{}"))
            return edit if span.key in edited else Action.DROP if span.key in gone else Action.KEEP

        splice(decided(TarScan(source), decide), target)
        result.write_bytes(target.data)
        proof = prove_splice(decided(TarScan(source), decide), result)
        assert proof.equal
        assert proof.sha256 == hashlib.sha256(target.data).hexdigest()
        result.write_bytes(target.data + bytes(512))
        proof = prove_splice(decided(TarScan(source), decide), result)
        assert (proof.equal, proof.differs_at, proof.key) == (False, len(target.data), "")
