"""Shards in folders (``14/00000744.tar``, as DataCompDR has them), through all stages and commands."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import wids

from curation.__main__ import main as command
from curation.errors import UsageError
from curation.options import set_up_logging
from curation.shards import Shard, discover, id_of_record, is_safe_id, record_name, record_path, select
from tests import EXAMPLES, ROOT
from tests.servers import ollama_stub
from tests.shards import decoded, image_of, samples_of
from tests.stages import recaption_stub
from tests.stages.harness import Records, hashes, read_json

IDS = ["14/00000000", "15/b/00000000"]


def run(script: str, *arguments: object) -> int:
    """A stage in this process, but not in pytest's main thread, whose signal handlers stay as they are."""
    main = recaption_stub.main if script == "05_recaption" else importlib.import_module(script).main
    with ThreadPoolExecutor(1) as thread:
        return int(thread.submit(main, list(map(str, arguments))).result())


@dataclass(frozen=True)
class Dataset:
    root: Path
    port: int

    def stage(self, number: str, *more: object) -> int:
        r, quiet = self.root, ["--quiet", *more]
        if number == "01":
            folders = ["--input", r / "dr", "--output", r / "captions", "--edits", r / "edits"]
            return run("01_filter_noface", *folders, "--embedded", "--threads", 1, *quiet)
        if number == "02":
            folders = ["--input", r / "captions", "--output", r / "prompts"]
            return run("02_captions_processor", *folders, "--ports", self.port, "--api", "ollama", *quiet)
        if number == "03":
            size = ["--embedded", "--height", 64, "--width", 64, "--batch_size", 4]
            return run("03_generate_images_multigpu", "--input", r / "prompts", "--output", r / "edits", *size, *quiet)
        if number == "04":
            folders = [
                "--input",
                r / "dr",
                "--edits",
                r / "edits",
                "--prompts",
                r / "prompts",
                "--output",
                r / "hybrid",
            ]
            return run("04_reshard", *folders, "--index", *quiet)
        if number == "05":
            flags = ["--format", "all", "--batch_size", 8, "--device", "cpu"]
            return run("05_recaption", r / "hybrid", "-o", r / "recaptions", *flags, *quiet)
        flags = ["--custom_pypath", ROOT / "tests/extract/stub.py", "--models", "stub,hashes", "--nworkers", 1]
        flags += ["--postprocess_features", "all", "--device", "cpu", "--batch_size", 8]
        return run("06_metadata", "--input", r / "hybrid", "--output", r / "metadata", *flags, *quiet)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    """Stages 01 to 06 on two shards of one name in two folders; 02 and 03 follow the stage before."""
    root = tmp_path_factory.mktemp("nested")
    for shard_id, example in zip(IDS, ("00000000", "00000001"), strict=True):
        (root / "dr" / shard_id).parent.mkdir(parents=True)
        shutil.copy2(EXAMPLES / f"{example}.tar", root / "dr" / f"{shard_id}.tar")
    with ollama_stub(slots=4, log=root / "requests.jsonl", system="You are a helpful assistant.") as port:
        made = Dataset(root, port)
        follow = {"02": ["--follow"], "03": ["--follow"]}
        for number in ("01", "02", "03", "04", "05", "06"):
            assert made.stage(number, *follow.get(number, ())) == 0
        yield made


def test_outputs_lie_in_the_same_folders_and_records_side_by_side(dataset: Dataset) -> None:
    made = {
        "captions": [".json"], "prompts": [".json"], "edits": [".json"], "hybrid": [".tar", ".idx"],
        "metadata": [".parquet", ".npz"], "recaptions/rows": [".jsonl"], "recaptions/parquet": [".parquet"],
        "recaptions/shards": [".tar"], "recaptions/files": [""],
    }  # fmt: skip
    for folder, suffixes in made.items():
        for path in (dataset.root / folder / f"{shard_id}{suffix}" for shard_id in IDS for suffix in suffixes):
            assert path.exists(), path
    for stage, folder in (("01_filter_noface", "captions"), ("04_reshard", "hybrid"), ("06_metadata", "metadata")):
        assert sorted(Records(stage).receipts(dataset.root / folder)) == [record_name(shard_id) for shard_id in IDS]
    drops = dataset.root / "captions/_rejects/01_filter_noface"
    assert sorted(path.name for path in drops.iterdir()) == [f"{record_name(i)}.drops.tsv.gz" for i in IDS]
    assert not [path for path in dataset.root.rglob("_*/*") if path.parent.name in ("14", "15")]


def test_every_picture_is_read_by_webdataset_datasets_and_wids(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    hybrid = dataset.root / "hybrid"
    expected = {key: parts for i in IDS for key, parts in samples_of(hybrid / f"{i}.tar").items()}
    assert sum("curation" in json.loads(parts["json"]) for parts in expected.values()) == 1, "one is edited"
    tars = [str(hybrid / f"{i}.tar") for i in IDS]
    by_webdataset = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    streamed = list(datasets.load_dataset("webdataset", data_files=f"{hybrid}/**/*.tar", split="train", streaming=True))
    for found in (by_webdataset, streamed):
        assert [sample["__key__"] for sample in found] == list(expected)
    for sample in by_webdataset:
        assert np.array_equal(image_of(sample), decoded(image_of(expected[sample["__key__"]])))
    for sample in streamed:
        assert np.array_equal(image_of(sample).convert("RGB"), decoded(image_of(expected[sample["__key__"]])))


def test_wids_reads_shards_in_folders(tmp_path: Path) -> None:
    """It keeps its copies by the files' names, so that these must differ."""
    for name in ("14/00000000.tar", "15/00000001.tar"):
        (tmp_path / "dr" / name).parent.mkdir(parents=True)
        shutil.copy2(EXAMPLES / Path(name).name, tmp_path / "dr" / name)
    out = tmp_path / "out"
    assert run("04_reshard", "--input", tmp_path / "dr", "--output", out, "--index", "--quiet") == 0
    for name in ("14/00000000.tar", "15/00000001.tar"):
        sizes = json.loads((out / name).with_name("sizes.json").read_bytes())
        assert sizes == {Path(name).name: len(samples_of(out / name))}
    index = wids.ShardListDataset(str(out / "wids.json"), base=str(out), cache_dir=str(tmp_path / "cache"))
    expected = samples_of(EXAMPLES / "00000000.tar") | samples_of(EXAMPLES / "00000001.tar")
    found = [index[number] for number in range(len(index))]
    assert [sample["__key__"] for sample in found] == list(expected)
    for sample in found:
        picture = next(value for name, value in sample.items() if name.rpartition(".")[2] in ("jpg", "png", "webp"))
        assert np.array_equal(np.asarray(picture.convert("RGB")), decoded(image_of(expected[sample["__key__"]])))


def told(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The code and the standard output of a command."""
    capsys.readouterr()
    code = command(list(map(str, words)))
    return code, capsys.readouterr().out


def test_the_commands(dataset: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root, source = dataset.root, dataset.root / "dr"
    code, text = told(capsys, "status", root, "--json")
    stages = json.loads(text)["stages"]
    assert code == 0 and len(stages) == 6
    assert [(stage["done"], stage["stale"], stage["pending"]) for stage in stages] == [(2, {}, 0)] * 6
    code, text = told(capsys, "verify", root / "hybrid", "--source", source, "--edits", root / "edits")
    assert code == 0, text
    assert [line.split()[1] for line in (root / "hybrid/manifest.tsv").read_text().splitlines()] == [
        f"{shard_id}.tar" for shard_id in IDS
    ]
    assert told(capsys, "fsck", root / "hybrid", "--shards", "14/*")[1].splitlines()[-1].startswith("OK: 1 shards")
    code, text = told(capsys, "plan", source, root, "--json")
    assert code == 0 and json.loads(text)["stages"][0]["done"] == 2
    assert told(capsys, "report", root, "--output", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "14/00000000" in page and "14%2F00000000" not in page
    assert told(capsys, "audit", root)[0] == 0
    where = ["--where", "uid is not null", "--out", tmp_path / "keep.npy"]
    assert told(capsys, "select", root / "metadata", *where)[0] == 0
    assert len(np.load(tmp_path / "keep.npy")) == 32


def test_what_verify_finds(dataset: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A shard that was changed, and one that nobody asked for."""
    shutil.copytree(dataset.root, tmp_path / "copy", copy_function=shutil.copy2)
    hybrid = tmp_path / "copy/hybrid"
    data = bytearray((hybrid / f"{IDS[0]}.tar").read_bytes())
    data[600] ^= 1
    (hybrid / f"{IDS[0]}.tar").write_bytes(data)
    shutil.copy2(hybrid / f"{IDS[1]}.tar", hybrid / "14/00000005.tar")
    where = [hybrid, "--source", tmp_path / "copy/dr", "--edits", tmp_path / "copy/edits", "--json"]
    code, text = told(capsys, "verify", *where)
    assert code == 1
    assert sorted(json.loads(text)["findings"]) == [IDS[0], "14/00000005"]


def test_one_folder_is_done_again_and_no_other(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    before = {i: read_json(record_path(dataset.root / "hybrid/_receipts/04_reshard", i)) for i in IDS}
    tars = hashes(dataset.root / "hybrid")
    assert dataset.stage("04", "--shards", "14/*", "--rerun") == 0
    after = {i: read_json(record_path(dataset.root / "hybrid/_receipts/04_reshard", i)) for i in IDS}
    assert (after[IDS[0]]["generation"], after[IDS[1]]) == (2, before[IDS[1]])
    assert hashes(dataset.root / "hybrid") == tars
    code, text = told(capsys, "retry", dataset.root / "hybrid", "--stage", "04", "--shards", "15/b/0..7")
    assert code == 0 and "1 of the shards that you named have not failed" in text


def test_the_output_is_never_the_folder_of_the_source(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    source, edits = dataset.root / "dr", dataset.root / "edits"
    assert run("04_reshard", "--input", source, "--edits", edits, "--output", source) == 2
    assert "--output must not be the folder of the source shards" in capsys.readouterr().err
    assert run("01_filter_noface", "--input", source, "--output", dataset.root / "new", "--edits", source) == 2
    assert told(capsys, "fsck", source, "--repair", source)[0] == 2
    foreign = dataset.root / "foreign/14/00000000.tar"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    assert run("04_reshard", "--input", source, "--edits", edits, "--output", dataset.root / "foreign") == 2
    assert "already holds 1 shards that 04_reshard has not made: 14/00000000" in capsys.readouterr().err


@pytest.mark.parametrize("done", ["output", "edits"])
def test_a_root_with_ids_without_folders_goes_on(
    done: str, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older version flattened the folders.  The same shards then, by hand: flat first, and in folders afterwards."""
    (tmp_path / "flat").mkdir()
    for name in ("00000000", "00000001"):
        shutil.copy2(EXAMPLES / f"{name}.tar", tmp_path / "flat")
    subset = ["--shards", "00000000"]
    folders = ["--output", tmp_path / "out", "--edits", tmp_path / "edits", "--embedded", "--threads", 1]
    if done == "output":
        assert run("01_filter_noface", "--input", tmp_path / "flat", *folders, *subset) == 0
    else:  # an earlier stage has them, and this one begins
        stand_in = tmp_path / "edits/_receipts/03_generate_images/0"
        stand_in.mkdir(parents=True)
        for name in ("00000000", "00000001"):
            (stand_in / f"{name}.json").write_text('{"status": "done", "notes": {}}')
    for folder, name in (("14", "00000000"), ("15", "00000001")):
        (tmp_path / "nested" / folder).mkdir(parents=True)
        shutil.move(tmp_path / "flat" / f"{name}.tar", tmp_path / "nested" / folder / f"{name}.tar")
    capsys.readouterr()
    set_up_logging(quiet=False)  # a process of its own would print the line without it
    assert run("01_filter_noface", "--input", tmp_path / "nested", *folders) == 0
    log = capsys.readouterr().err
    assert "was begun with shards' ids without folders (00000000), and goes on so" in log
    assert sorted(Records("01_filter_noface").receipts(tmp_path / "out")) == ["00000000", "00000001"]
    if done == "output":
        assert "of 2 shards 1 done, 1 were done before" in log


# ---- ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dr/14/0.tar", "dr/14/1.tar", "dr/15/0.tar", "dr/_receipts/x/y.tar", "dr/.hidden/3.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_ids_hold_the_folders_below_the_one_that_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ["14/0", "14/1", "15/0"]
    (folder / "dr/list.txt").write_text("14/0.tar\n./14/1.tar\n15/0.tar\n")
    (folder / "dr/globs.txt").write_text("14/*.tar\n1?/0.tar\n")
    monkeypatch.chdir(folder)
    for source in ("dr", "dr/", "dr/*", "dr/*/*.tar", "./dr/1[45]/*.tar", "dr/{14,15}/{0..3}.tar", "dr/list.txt",
                   f"{folder}/dr/*/*.tar", f"{folder}/dr/globs.txt"):  # fmt: skip
        assert [shard.id for shard in discover(source)] == every, source
    assert [shard.id for shard in discover("dr/14")] == ["0", "1"]
    assert [shard.id for shard in discover(["dr/14", "dr/14/0.tar"])] == ["0", "1"]
    assert {shard.home.resolve() for shard in discover("dr")} == {folder / "dr"}
    (folder / "dr/list.txt").write_text(f"{folder}/dr/14/0.tar\n../dr/14/1.tar\n")
    assert [shard.id for shard in discover("dr/list.txt")] == ["0", "1"], "their own names, where no folder is named"
    with pytest.raises(UsageError, match=r"two files are shard 0: .* or give the folder above both"):
        discover(["dr/14", "dr/15"])
    urls = discover("https://example.org/dr/{14,15}/0.tar")
    assert [shard.id for shard in urls] == ["14/0", "15/0"]


def test_a_list_beside_the_folder_of_shards(tmp_path: Path) -> None:
    (tmp_path / "shards/14").mkdir(parents=True)
    for name in ("shards/0.tar", "shards/14/0.tar"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("shards/0.tar\nshards/14/0.tar\n")
    assert [shard.id for shard in discover(str(tmp_path / "list.txt"))] == ["0", "14/0"]


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("14/0", True), ("a/b/c.d", True), ("../0", False), ("14/..", False), ("14/../0", False), ("/0", False),
        ("14//0", False), ("14/", False), ("./0", False), ("14/.0", False), ("_receipts/0", False), ("a.json/0", False),
        ("a.tar/0", False), ("14\\0", False), ("14%2F0", False), (f"{'a/' * 60}0", False), ("", False),
    ],
)  # fmt: skip
def test_which_ids_are_safe(text: str, safe: bool) -> None:
    assert is_safe_id(text) == safe
    assert id_of_record(record_name(text)) == text or not safe


def test_a_hostile_name_of_a_record_is_no_path() -> None:
    assert id_of_record("..%2F..%2Fetc%2Fpasswd") == "..%2F..%2Fetc%2Fpasswd"


def test_folders_with_other_characters_get_a_name(tmp_path: Path) -> None:
    for name in ("a b/0.tar", "é/0.tar", "x.json/0.tar", "+/0.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found = discover(str(tmp_path))
    assert len({shard.id for shard in found}) == 4 and all(is_safe_id(shard.id) for shard in found)
    assert {shard.home for shard in found} == {tmp_path}
    deep = tmp_path.joinpath("a" * 120, "b" * 120)
    deep.mkdir(parents=True)
    (deep / "0.tar").touch()
    with pytest.raises(UsageError, match="give a folder that is nearer"):
        discover(str(tmp_path))


def test_choices_in_folders() -> None:
    shards = [Shard(i, Path(f"/dr/{i}.tar")) for i in ("14/0007", "14/0008", "15/0007", "9")]
    found: dict[str, Any] = {spec: [shard.id for shard in select(shards, spec)] for spec in (
        "14/*", "14/7..9", "15/7", "14/0007.tar", "9", "*", "1?/0007"
    )}  # fmt: skip
    assert list(found.values()) == [
        ["14/0007", "14/0008"], ["14/0007", "14/0008"], ["15/0007"], ["14/0007"], ["9"],
        ["14/0007", "14/0008", "15/0007", "9"], ["14/0007", "15/0007"],
    ]  # fmt: skip
    meant = {
        "0007": "Did you mean 14/0007 or 15/0007?", "0007.tar": "Did you mean 14/0007 or 15/0007?",
        "14": "Did you mean '14/*'?", "14/": "Did you mean '14/*'?",
        "7": "14/0007 to 9", "16/*": "14/0007 to 9", "../9": "14/0007 to 9",
    }  # fmt: skip
    for wrong, said in meant.items():
        with pytest.raises(UsageError, match=re.escape(said)):
            select(shards, wrong)
