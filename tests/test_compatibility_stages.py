"""What the stages and commands write, in the programs and libraries that the docs name as its readers.

Each picture, caption and number is compared with what Python's tarfile reads from the shards, not with the project's
own reader.  Hybrid shards are in ``test_compatibility.py``.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset
import wids

from curation.__main__ import main as command
from curation.commands.audit.cards import croissant
from curation.publish.push import PushOptions, push
from tests import EXAMPLES, ROOT
from tests.servers import photo_server
from tests.servers.hub import serve
from tests.shards import all_samples, decoded, image_of, noise, samples_of, shards_as, write_shard
from tests.stages import recaption_stub

Samples = dict[str, dict[str, bytes]]
Load = Callable[..., Any]


def in_a_thread(main: Callable[[list[str]], int], *arguments: object) -> None:
    """A stage that must do all; only the main thread's signals could stop it."""
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main, list(map(str, arguments))).result() == 0


@pytest.fixture(autouse=True)
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """``datasets.load_dataset`` of one split without network; everything in memory and as a stream."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    def both(*arguments: Any, **options: Any) -> list[Any]:
        options |= {"split": "train", "cache_dir": str(tmp_path / "datasets")}
        loaded = datasets.load_dataset(*arguments, **options)
        streamed = datasets.load_dataset(*arguments, **options, streaming=True)
        return [list(loaded), list(streamed)]

    return both


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example shards; the one webp among them as JPEG too, as readers with fixed columns want it."""
    return shards_as("jpg", EXAMPLES, tmp_path_factory.mktemp("source") / "shards")


@pytest.fixture(scope="module")
def samples(source: Path) -> Samples:
    return all_samples(source)


@pytest.fixture(scope="module")
def recaptions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 05 in all formats, with a captioner of hashes."""
    out = tmp_path_factory.mktemp("recaptions") / "out"
    flags = ["--format", "all", "--batch_size", 8, "--device", "cpu", "--quiet"]
    in_a_thread(recaption_stub.main, source, "-o", out, *flags)
    return out


@pytest.fixture(scope="module")
def metadata(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 06: features that tell the picture and the caption."""
    out = tmp_path_factory.mktemp("metadata") / "out"
    flags = ["--custom_pypath", ROOT / "tests/extract/stub.py", "--models", "stub,statistics,hashes", "--quiet"]
    flags += ["--postprocess_features", "all", "--additional_fields", "url,caption,sha256,original_width"]
    flags += ["--nworkers", 1, "--device", "cpu", "--batch_size", 8]
    main = importlib.import_module("06_metadata").main
    in_a_thread(main, "--input", source, "--output", out, *flags)
    return out


def told(members: dict[str, bytes]) -> dict[str, Any]:
    return dict(json.loads(members["json"]))


def check_pictures(found: list[dict[str, Any]], expected: Samples) -> None:
    """Of ``load_dataset`` on tars: every sample once, with its picture, caption and uid."""
    assert [sample["__key__"] for sample in found] == list(expected)
    for sample in found:
        members = expected[sample["__key__"]]
        assert np.array_equal(image_of(sample).convert("RGB"), decoded(image_of(members)))
        assert sample["txt"] == members["txt"].decode()
        assert sample["json"]["uid"] == told(members)["uid"]


def check_webdataset(folder: Path, expected: Samples) -> None:
    """Each member byte for byte, and each picture as webdataset decodes it."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    raw = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in raw] == list(expected)
    for sample in raw:
        members = expected[sample["__key__"]]
        assert {name: sample[name] for name in sample if not name.startswith("__")} == members
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"):
        assert np.array_equal(image_of(sample), decoded(image_of(expected[sample["__key__"]])))


# ---- stage 00


@pytest.mark.parametrize("encode", ["keep", "jpg"])
def test_downloaded_shards(encode: str, load: Load, tmp_path: Path) -> None:
    """As tars and as img2dataset's files; kept originals have several suffixes, which only webdataset takes."""
    main = importlib.import_module("00_download").main
    with photo_server(EXAMPLES) as port:
        rows = [
            {"url": f"http://127.0.0.9:{port}/photo/{i}", "text": f"photo {i}", "uid": f"{i:032x}"} for i in range(76)
        ]
        (tmp_path / "urls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for layout in ("webdataset", "files"):
            flags = ["--allow_private", "127.0.0.0/8", "--rows_per_shard", 40, "--encode", encode, "--quiet"]
            flags += ["--output_format", layout, "--per_host", 64]
            in_a_thread(main, "--input", tmp_path / "urls.jsonl", "--output", tmp_path / layout, *flags)
    originals = [image_of(members) for members in all_samples(EXAMPLES).values()]
    found = all_samples(tmp_path / "webdataset")
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "webdataset").glob("0*.parquet"))]
    table = pd.concat(tables, ignore_index=True)
    assert list(table["key"]) == list(found) and len(found) == 76
    assert [members["txt"].decode() for members in found.values()] == [f"photo {i}" for i in range(76)]
    for number, (members, row) in enumerate(zip(found.values(), table.to_dict("records"), strict=True)):
        assert row["sha256"] == hashlib.sha256(originals[number]).hexdigest()
        assert (row["url"], row["caption"], row["uid"]) == (rows[number]["url"], f"photo {number}", f"{number:032x}")
        assert {name: told(members)[name] for name in ("key", "uid", "sha256", "width")} == {
            name: row[name] for name in ("key", "uid", "sha256", "width")
        }
        if encode == "keep":
            assert image_of(members) == originals[number]
        else:
            assert decoded(image_of(members)).shape[1::-1] == (row["width"], row["height"])
            assert np.abs(decoded(image_of(members)).astype(int) - decoded(originals[number])).mean() < 4
    check_webdataset(tmp_path / "webdataset", found)
    for shard in ("00000000", "00000001"):
        loose = {path.name: path.read_bytes() for path in (tmp_path / "files" / shard).iterdir()}
        with tarfile.open(tmp_path / "webdataset" / f"{shard}.tar") as tar:
            assert loose == {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    suffixes = {suffix for members in found.values() for suffix in members}
    assert suffixes == {"txt", "json", "jpg", *(("webp",) if encode == "keep" else ())}
    if encode == "jpg":
        for read in load("webdataset", data_files={"train": str(tmp_path / "webdataset" / "*.tar")}):
            check_pictures(read, found)


# ---- stage 05


def test_recaptioned_tars(recaptions: Path, samples: Samples, load: Load) -> None:
    """The source with the new captions: every picture byte for byte, in each of the readers."""
    rows = [json.loads(line) for line in (recaptions / "captions.jsonl").read_bytes().splitlines()]
    found = all_samples(recaptions / "shards")
    assert list(found) == list(samples) == [row["key"] for row in rows]
    for row in rows:
        new, old = found[row["key"]], samples[row["key"]]
        assert new.keys() == old.keys() and image_of(new) == image_of(old)
        assert new["txt"].decode() == told(new)["caption"] == row["caption"] != row["original_caption"]
        same = told(old).keys() - {"caption", "curation"}
        assert {name: told(new)[name] for name in same} == {name: told(old)[name] for name in same}
    check_webdataset(recaptions / "shards", found)
    for read in load("webdataset", data_files={"train": str(recaptions / "shards" / "*.tar")}):
        check_pictures(read, found)


def test_tables_of_captions(recaptions: Path, samples: Samples, load: Load) -> None:
    """jsonl and parquet in pandas, DuckDB, pyarrow and ``datasets``: the same rows, which are the tars' samples."""
    captions = {key: members["txt"].decode() for key, members in all_samples(recaptions / "shards").items()}
    expected = [
        (key, captions[key], told(members)["caption"], told(members)["uid"], told(members)["url"])
        for key, members in samples.items()
    ]
    whole, parts, lines = recaptions / "all_captions.parquet", recaptions / "parquet", recaptions / "captions.jsonl"
    in_parquet = ["key", "vlm_caption", "original_caption", "uid", "url"]
    in_lines = ["key", "caption", "original_caption", "uid", "url"]
    assert list(pd.read_parquet(whole)[in_parquet].itertuples(index=False, name=None)) == expected
    assert list(pd.read_json(lines, lines=True, dtype=False)[in_lines].itertuples(index=False, name=None)) == expected
    for columns, files in ((in_parquet, whole), (in_parquet, f"{parts}/*.parquet"), (in_lines, lines)):
        found = duckdb.sql(f"select {', '.join(columns)} from '{files}'").fetchall()
        assert sorted(found) == sorted(expected)
    assert [tuple(row.values()) for row in pq.read_table(parts, columns=in_parquet).to_pylist()] == expected
    for kind, columns, files in (("parquet", in_parquet, f"{parts}/*.parquet"), ("json", in_lines, str(lines))):
        for read in load(kind, data_files={"train": files}):
            assert [tuple(row[name] for name in columns) for row in read] == expected


def test_files_named_by_their_content(recaptions: Path, source: Path) -> None:
    for tar in sorted(source.glob("*.tar")):
        captions = samples_of(recaptions / "shards" / tar.name)
        there = {path.name: path.read_bytes() for path in (recaptions / "files" / tar.stem).iterdir()}
        expected = {}
        for key, members in samples_of(tar).items():
            name = hashlib.sha256(image_of(members)).hexdigest()
            expected[f"{name}.jpg"] = image_of(members)
            pair = json.loads(there[f"{name}.json"])
            assert (pair["original"], pair["predicted"]) == (told(members)["caption"], captions[key]["txt"].decode())
        assert {name: data for name, data in there.items() if not name.endswith(".json")} == expected
        assert len(there) == 2 * len(expected)


# ---- stage 06


def test_rows_and_features_are_the_samples(metadata: Path, source: Path, load: Load) -> None:
    """Row for row the tar's samples; the features are those of this picture and this caption."""
    for tar in sorted(source.glob("*.tar")):
        expected = samples_of(tar)
        table = pd.read_parquet(metadata / f"{tar.stem}.parquet")
        assert list(table["key"]) == list(expected) and set(table["tar"]) == {tar.name}
        assert list(table.columns) == pq.read_schema(metadata / f"{tar.stem}.parquet").names
        with np.load(metadata / f"{tar.stem}.npz", allow_pickle=False) as arrays:
            assert {len(arrays[name]) for name in arrays.files} == {len(expected)}
            features = zip(arrays["stub-image"], arrays["stub-text"], strict=True)
        rows = table.to_dict("records")
        for row, members, (image, text) in zip(rows, expected.values(), features, strict=True):
            carried = ("uid", "url", "caption", "sha256", "original_width")
            assert {name: row[name] for name in carried} == {name: told(members)[name] for name in carried}
            pixels = decoded(image_of(members))
            assert (row["image-height"], row["image-width"]) == pixels.shape[:2]
            assert row["image-bytes"] == len(image_of(members))
            of_pixels = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest() * 6, np.uint8)
            assert np.array_equal(image, (of_pixels.astype(np.float32) / 255).astype(np.float16))
            of_words = np.frombuffer(hashlib.sha256(members["txt"]).digest(), np.int32)
            assert np.array_equal(text, (of_words.astype(np.float32) / 2**31).astype(np.float16))
    keys = list(all_samples(source))
    for read in load("parquet", data_files={"train": f"{metadata}/*.parquet"}):
        assert [row["key"] for row in read] == keys


def test_duckdb_and_datacomps_tables(metadata: Path, samples: Samples, tmp_path: Path) -> None:
    """The queries of docs/formats.md and docs/extractors.md as they stand there, and the join on the uid."""
    (query,) = re.findall(r"```sql\n(SELECT uid FROM .*?);\n```", (ROOT / "docs/formats.md").read_text(), re.S)
    query = query.replace("/path/to/metadata", str(metadata)).replace("clip_l14_similarity_score", '"stub-score"')
    rows = [row for path in sorted(metadata.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    chosen = {row["uid"] for row in rows if row["stub-score"] > 0.28}
    assert 0 < len(chosen) < len(rows) and {uid for (uid,) in duckdb.sql(query).fetchall()} == chosen

    theirs = pd.DataFrame([{"uid": told(members)["uid"], "link": told(members)["url"]} for members in samples.values()])
    theirs.to_parquet(tmp_path / "datacomp.parquet")
    joined = duckdb.sql(
        f"select m.key, m.url, d.link from '{metadata}/*.parquet' m join '{tmp_path}/datacomp.parquet' d using (uid)"
    ).fetchall()
    assert sorted(key for key, _, _ in joined) == sorted(samples) and all(url == link for _, url, link in joined)

    (differ,) = re.findall(r"`(bit_count\(xor\(.*?)`\.", (ROOT / "docs/extractors.md").read_text())
    pairs = duckdb.sql(f"select a.phash, b.phash, {differ} from '{metadata}/*.parquet' a, '{metadata}/*.parquet' b")
    assert all(bits == (int(a, 16) ^ int(b, 16)).bit_count() for a, b, bits in pairs.fetchall())


def test_datacomps_resharder_takes_the_subset(metadata: Path, samples: Samples, tmp_path: Path) -> None:
    """It looks up each sample's uid in the sorted array, and writes the sample as often as it is there."""
    where = ["--where", '"stub-score" > 0.28', "--out", str(tmp_path / "keep.npy")]
    assert command(["select", str(metadata), *where]) == 0
    subset = np.load(tmp_path / "keep.npy", mmap_mode="r", allow_pickle=False)
    assert subset.dtype == np.dtype("u8,u8") and subset.ndim == 1
    scores = {
        row["uid"]: row["stub-score"] for path in metadata.glob("*.parquet") for row in pq.read_table(path).to_pylist()
    }
    for members in samples.values():
        uid = told(members)["uid"]
        pair = np.array((int(uid[:16], 16), int(uid[16:32], 16)), np.dtype("u8,u8"))
        often = np.searchsorted(subset, pair, "right") - np.searchsorted(subset, pair, "left")
        assert often == (scores[uid] > 0.28)


# ---- fsck, wids, Croissant


def test_repaired_shards(source: Path, samples: Samples, load: Load, tmp_path: Path) -> None:
    """Garbage within a sample and a missing end: every other sample, with its picture, in each of the readers."""
    (tmp_path / "damaged").mkdir()
    torn = set()
    for number, tar in enumerate(sorted(source.glob("*.tar"))):
        data = bytearray(tar.read_bytes())
        with tarfile.open(tar) as file:
            members = list(file)
        victim = members[3 * (number + 2) + 1]  # its header
        data[victim.offset : victim.offset + 512] = b"\xa5" * 512
        cut = members[-2]
        del data[cut.offset + 600 :]
        torn |= {victim.name.partition(".")[0], cut.name.partition(".")[0]}
        (tmp_path / "damaged" / tar.name).write_bytes(data)
    assert command(["fsck", str(tmp_path / "damaged"), "--quiet", "--repair", str(tmp_path / "new")]) == 1
    expected = {key: members for key, members in samples.items() if key not in torn}
    found = all_samples(tmp_path / "new")
    assert found == expected and len(torn) == 10
    check_webdataset(tmp_path / "new", expected)
    for read in load("webdataset", data_files={"train": str(tmp_path / "new" / "*.tar")}):
        check_pictures(read, expected)


def test_indexes_lead_to_each_samples_bytes(source: Path, samples: Samples, tmp_path: Path) -> None:
    """``_index/<shard>.npy`` and ``<shard>.idx`` as docs/formats.md describes them, by NumPy, json and tarfile."""
    main = importlib.import_module("04_reshard").main
    chosen = [told(members)["uid"] for members in list(samples.values())[::2]]
    pairs = [divmod(int(uid, 16), 2**64) for uid in chosen + chosen[:5]]
    np.save(tmp_path / "keep.npy", np.sort(np.array(pairs, "u8,u8")))
    out = tmp_path / "out"
    flags = ["--subset", tmp_path / "keep.npy", "--shard_size", 16, "--index", "--quiet"]
    in_a_thread(main, "--input", source, "--output", out, *flags)

    placed = Counter[str]()
    for tar in sorted(source.glob("*.tar")):
        records = np.load(out / "_index" / f"{tar.stem}.npy", allow_pickle=False)
        assert records.dtype == np.dtype([("start", "<i8"), ("end", "<i8"), ("copies", "<i4"), ("bits", "<i4")])
        for start, end, copies, bits in records.tolist():
            ((key, members),) = samples_of(tar.read_bytes()[start:end]).items()
            assert members == samples[key] and bits == 0
            placed[told(members)["uid"]] += copies
    assert placed == Counter(chosen + chosen[:5])

    for tar in sorted(out.glob("*.tar")):
        expected = samples_of(tar)
        lines = [line.split("\t") for line in tar.with_suffix(".idx").read_text().splitlines()]
        assert [json.loads(key) for key, _, _ in lines] == list(expected)
        for key, offset, length in lines:
            part = tar.read_bytes()[int(offset) : int(offset) + int(length)]
            assert samples_of(part) == {json.loads(key): expected[json.loads(key)]}


def test_wids_reads_names_of_100_bytes_and_no_longer_ones(tmp_path: Path) -> None:
    """As docs/stage-04.md says."""
    for length, all_found in ((100, True), (101, False)):
        key = "k" * (length - len(".json"))
        folder = tmp_path / str(length)
        members = {"png": noise(1), "txt": b"words", "json": b'{"uid": "%032x"}' % 1}
        write_shard(folder / "in" / "0.tar", {key: members})
        main = importlib.import_module("04_reshard").main
        in_a_thread(main, "--input", folder / "in", "--output", folder / "out", "--index", "--shard_size", 5, "--quiet")
        assert samples_of(folder / "out" / "00000000.tar") == {key: members}
        dataset = wids.ShardListDataset(str(folder / "out" / "wids.json"), cache_dir=str(folder), transformations=[])
        try:
            read = {name: dataset[0][f".{name}"].read() for name in members}
        except (KeyError, ValueError, IndexError):
            read = {}
        assert (read == members) == all_found


def test_croissant_leads_to_every_member(source: Path, samples: Samples, tmp_path: Path) -> None:
    """Followed as the specification says: archives by name and digest, members by pattern, records by key."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(source.glob("*.tar"))}
    described = json.loads(json.dumps(croissant("set", len(digests), len(samples), digests, "cc-by-4.0")))
    things = {thing["@id"]: thing for thing in described["distribution"]}
    found: dict[str, dict[str, bytes]] = {}
    for records in described["recordSet"]:
        key_field, content_field = records["field"]
        assert content_field["source"]["extract"] == {"fileProperty": "content"}
        files = things[key_field["source"]["fileSet"]["@id"]]
        assert files is things[content_field["source"]["fileSet"]["@id"]]
        for place in files["containedIn"]:
            archive = things[place["@id"]]
            data = (source / Path(archive["contentUrl"]).name).read_bytes()
            assert archive["contentUrl"].startswith("data/") and hashlib.sha256(data).hexdigest() == archive["sha256"]
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for info in tar:
                    if any(fnmatch.fnmatchcase(info.name, pattern) for pattern in files["includes"]):
                        key = re.search(key_field["source"]["transform"]["regex"], info.name)
                        assert key is not None
                        content = tar.extractfile(info).read()  # type: ignore[union-attr]
                        found.setdefault(key[1], {})[files["@id"]] = content
    assert found.keys() == samples.keys()
    for key, members in samples.items():
        assert found[key] == {"images": image_of(members), "texts": members["txt"], "metadata": members["json"]}


# ---- publish


@dataclass
class Published:
    """A repository as somebody who clones it has it."""

    folder: Path

    def configs(self) -> dict[str, str]:
        import huggingface_hub

        card = huggingface_hub.metadata_load(self.folder / "README.md")
        return {config["config_name"]: config["data_files"][0]["path"] for config in card["configs"]}


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Published]:
    def go(home: Path, stage: str, *only: str) -> Published:
        import huggingface_hub

        with serve() as server, monkeypatch.context() as patched:
            server.datasets.token = "hf_" + "t0ken" * 4
            patched.setenv("HF_TOKEN", server.datasets.token)
            patched.setenv("HF_ENDPOINT", server.url)
            patched.setenv("HF_HUB_OFFLINE", "0")
            patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            patched.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
            push(home, stage, "somebody/set", PushOptions(only=only, licence="cc-by-4.0"))
            files = server.datasets.repos["somebody/set"].files
        for path, data in files.items():
            (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "clone" / path).write_bytes(data)
        return Published(tmp_path / "clone")

    return go


@pytest.mark.parametrize("only", [(), ("rows/*",), ("shards/*",)])
def test_load_dataset_of_published_captions(
    only: tuple[str, ...], publish: Any, recaptions: Path, samples: Samples, load: Load
) -> None:
    """By the card's metadata, without any option."""
    clone = publish(recaptions, "05_recaption", *only)
    kind = {(): "data/*.parquet", ("rows/*",): "rows/*.jsonl", ("shards/*",): "shards/*.tar"}[only]
    assert clone.configs() == {"default": kind}
    found = all_samples(recaptions / "shards")
    for read in load(str(clone.folder)):
        if only == ("shards/*",):
            check_pictures(read, found)
            continue
        assert [row["key"] for row in read] == list(samples)
        for row in read:
            new, old = row["caption"] if only else row["vlm_caption"], told(samples[row["key"]])
            assert new == found[row["key"]]["txt"].decode()
            assert (row["uid"], row["url"], row["sha256"]) == (old["uid"], old["url"], old["sha256"])
            assert json.loads(row["extra"])["error_message"] == old["error_message"]


def test_load_dataset_of_published_rows_that_differ(publish: Any, load: Load, tmp_path: Path) -> None:
    """Columns that are null in the whole first shard, and fields of every type in the sources' json."""
    facts: dict[str, list[dict[str, Any]]] = {
        "0": [{}, {}],
        "1": [
            {"url": "https://example.org/1", "uid": "1" * 32, "a": 1},
            {"a": "one"},
            {"a": [1, {"b": None}]},
        ],
        "2": [{"a": {"b": 1}, "original_width": 900, "original_height": 600}],
    }
    for shard, each in facts.items():
        members = [{"png": noise(number), "json": json.dumps(fact).encode()} for number, fact in enumerate(each)]
        write_shard(tmp_path / "in" / f"{shard}.tar", {f"{shard}{i}": one for i, one in enumerate(members)})
    in_a_thread(recaption_stub.main, tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu", "--quiet")
    clone = publish(tmp_path / "out", "05_recaption")
    assert clone.configs() == {"default": "rows/*.jsonl"}
    expected = [fact for each in facts.values() for fact in each]
    for read in load(str(clone.folder)):
        for row, fact in zip(read, expected, strict=True):
            carried = ("url", "uid", "original_width", "original_height")
            assert {name: row[name] for name in carried} == {name: fact.get(name) for name in carried}
            assert row["image_size"] == [48, 32] and row["caption"].startswith("A photo of")
            extra = {name: value for name, value in json.loads(row["extra"]).items() if value is not None}
            # where the field has several types, each value may be a text
            extra = {name: json.loads(value) if isinstance(value, str) else value for name, value in extra.items()}
            assert extra == {name: value for name, value in fact.items() if name not in carried}


def test_load_dataset_of_published_shards(
    publish: Any, source: Path, samples: Samples, load: Load, tmp_path: Path
) -> None:
    main = importlib.import_module("04_reshard").main
    in_a_thread(main, "--input", source, "--output", tmp_path / "hybrid", "--index", "--shard_size", 20, "--quiet")
    clone = publish(tmp_path / "hybrid", "04_reshard")
    assert clone.configs() == {"default": "data/*.tar"}
    for read in load(str(clone.folder)):
        check_pictures(read, samples)


def test_load_dataset_of_published_scores(publish: Any, metadata: Path, samples: Samples, load: Load) -> None:
    clone = publish(metadata, "06_metadata")
    assert clone.configs() == {"default": "data/*.parquet"}
    for path in metadata.glob("*.npz"):
        assert (clone.folder / "data" / path.name).read_bytes() == path.read_bytes()
    for read in load(str(clone.folder)):
        assert [(row["key"], row["caption"]) for row in read] == [(k, told(m)["caption"]) for k, m in samples.items()]
