"""DataComp's baselines beside their published definition, written here row by row, on tables and features as DataComp
publishes them: the files of uids have the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.__main__ import main
from curation.commands.tables import assets
from curation.commands.tables.captions import names_an_entity
from curation.commands.tables.centroids import Options as CentroidOptions
from curation.commands.tables.clusters import Clusters
from curation.commands.tables.saved import saved_blocks
from curation.errors import InfrastructureError, UsageError
from curation.language import find_model
from tests.commands.test_select import MEMORY
from tests.servers.files import file_server

pa = pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
pq = pytest.importorskip("pyarrow.parquet")
fasttext = pytest.importorskip("fasttext")
gcld3 = pytest.importorskip("gcld3")
pytest.importorskip("nltk")
torch = pytest.importorskip("torch")

ROWS, SHARDS, WIDTH, CLUSTERS = 1500, 3, 24, 40
ODD = [
    "", " ", "\n", "a\nb", "dog", "dog dog", "abcdef", "abc de", "two words", "three small words", "a\x1fb c d ef",
    "red car\u00a0in\u3000street", "ünï cödé wörds ab", "x\0y z longer", "\r\n", "Der Hund läuft schnell nach Hause",
    "le chat noir dort dans la maison", "a b c", "mice", "the MICE ran away from us", "they fly over the sea today",
    "it was a very good morning for us", None,
]  # fmt: skip
WORDS = [
    "the", "a", "photo", "of", "dog", "dogs", "mice", "car", "street", "poster", "und",
    "der", "die", "Hund", "free", "shipping", "size", "ran", "flew", "rare", "2019",
]  # fmt: skip


@dataclass(frozen=True)
class Pool:
    folder: Path
    rows: list[dict[str, Any]]
    centroids: Path
    targets: list[Path]
    wordnet: Path
    synsets: Path

    def file(self, fits: Callable[[dict[str, Any]], bool]) -> bytes:
        """The file of uids that DataComp's baselines.py would save."""
        kept = [row["uid"] for row in self.rows if fits(row)]
        uids = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in kept], np.dtype("u8,u8"))
        uids.sort()
        content = io.BytesIO()
        np.save(content, uids)
        return content.getvalue()

    def threshold(self, column: str, fraction: float) -> float:
        values = np.array([row[column] for row in self.rows])
        return float(-np.sort(-values)[int(len(values) * fraction)])


WORDNET = {  # file → its lines: the lemma's synsets in the order of their use
    "index.noun": ["car n 1 0 1 0 00000300", "dog n 2 0 2 0 00000100 00000200", "mouse n 1 0 1 0 00000400"],
    "index.verb": ["dog v 1 0 1 0 00000500", "fly v 1 0 1 0 00000300", "run v 1 0 1 0 00000600"],
    "index.adj": ["good a 2 0 2 0 00000700 00000800", "rare a 1 0 1 0 00000200"],
    "index.adv": ["away r 1 0 1 0 00000900"],
    "data.noun": [],
    "data.verb": [],
    "data.adv": [],
    "data.adj": ["00000700 00 a 01 good 0 000 | fine", "00000800 00 s 01 good 0 000 | whole"],
    "noun.exc": ["mice mouse"],
    "verb.exc": ["flew fly", "ran run"],
    "adj.exc": [],
    "adv.exc": [],
}
SYNSETS = [100, 300, 400]  # the first sense of dog; car, and of another part of speech also fly; mouse
NAMING = {"dog", "dogs", "car", "mice", "fly", "flew"}  # of the words above: by hand


def write_wordnet(folder: Path, version: str = "3.0") -> Path:
    folder.mkdir()
    for name, lines in WORDNET.items():
        header = [] if name.endswith(".exc") else [f"  1 WordNet {version} Copyright 2006 by Princeton University.  "]
        (folder / name).write_text("".join(f"{line}\n" for line in [*header, *lines]))
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    root = tmp_path_factory.mktemp("baselines")
    folder = root / "metadata"
    folder.mkdir()
    random = np.random.default_rng(3)
    halves = random.integers(0, 1 << 64, (ROWS, 2), dtype=np.uint64)
    halves[7:10] = halves[6]
    made = [" ".join(random.choice(WORDS, random.integers(1, 12))) for _ in range(ROWS - 10 * len(ODD))]
    texts = [(ODD * 10 + made)[place] for place in random.permutation(ROWS)]
    centroids = random.normal(size=(CLUSTERS, WIDTH)).astype(np.float32)
    centroids[11] = centroids[4]  # the first of the two is the nearest
    features = (centroids[random.integers(0, CLUSTERS, ROWS)] + random.normal(0, 0.3, (ROWS, WIDTH))).astype(np.float16)
    rows = [
        {
            "uid": f"{high:016x}{low:016x}",
            "url": f"https://example.org/{number}.jpg",
            "text": text,
            "original_width": int(random.choice([100, 199, 200, 300, 600, 601])),
            "original_height": int(random.choice([100, 200, 201, 400, 1800])),
            "clip_b32_similarity_score": round(float(random.normal(0.27, 0.04)), 3),
            "clip_l14_similarity_score": round(float(random.normal(0.22, 0.05)), 3),
            "face_bboxes": [],
            "sha256": "0" * 64,
        }
        for number, ((high, low), text) in enumerate(zip(halves.tolist(), texts, strict=True))
    ]
    for shard in range(SHARDS):
        part = slice(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS)
        pq.write_table(pa.Table.from_pylist(rows[part]), folder / f"{shard:032x}.parquet", row_group_size=300)
        np.savez_compressed(folder / f"{shard:032x}.npz", b32_img=features[part, :8], l14_img=features[part])
    for row, feature in zip(rows, features, strict=True):
        row["feature"] = feature
    torch.save(centroids, root / "small_centroids_l14.pt", pickle_protocol=4)  # as image_based_clustering.py does
    hits = torch.from_numpy(centroids[random.choice(CLUSTERS, 14, replace=False)]).half()
    targets = [root / f"in1k_clip_vit_l14_{number}.pt" for number in range(2)]
    for number, path in enumerate(targets):
        torch.save({"image_features": hits[number * 7 : (number + 1) * 7]}, path)
    synsets = root / "imagenet21k_wordnet_ids.txt"
    synsets.write_text("".join(f"n{offset:08d}\n" for offset in SYNSETS))
    return Pool(folder, rows, root / "small_centroids_l14.pt", targets, write_wordnet(root / "wordnet"), synsets)


# ---- the published definition


LANGUAGE = fasttext.load_model(str(find_model()))
CLD3 = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)


def is_english(row: dict[str, Any]) -> bool:
    text = row["text"]
    return text is not None and LANGUAGE.predict(text.replace("\n", " "))[0][0] == "__label__en"


def is_basic(row: dict[str, Any]) -> bool:
    small, large = sorted((row["original_width"], row["original_height"]))
    return (
        is_english(row)
        and len(row["text"].split()) > 2
        and len(row["text"]) > 5
        and small >= 200
        and large / small <= 3
    )


def is_laion2b(row: dict[str, Any]) -> bool:
    text = row["text"]
    english = text is not None and CLD3.FindLanguage(text=text.replace("\n", " ")).language == "en"
    return english and row["clip_b32_similarity_score"] >= 0.28


def is_text_based(row: dict[str, Any]) -> bool:
    return is_english(row) and any(word.lower() in NAMING for word in row["text"].split())


def tokens(text: str) -> int:
    """fastText's Dictionary::readWord: runs without its whitespace, and the end of a line is a token."""
    return len(re.findall(r"[^ \n\r\t\v\f\0]+|\n", text))


def image_based(pool: Pool) -> Callable[[dict[str, Any]], bool]:
    centroids = torch.load(pool.centroids, weights_only=False).astype(np.float64)
    targets = np.concatenate([torch.load(path, weights_only=False)["image_features"].numpy() for path in pool.targets])
    wanted = set((targets.astype(np.float64) @ centroids.T).argmax(axis=1).tolist())
    assert 5 < len(wanted) < CLUSTERS / 2

    def fits(row: dict[str, Any]) -> bool:
        text = row["text"]
        if not is_english(row) or tokens(text) <= 1 or len(text) <= 5:
            return False
        return int((centroids @ row["feature"].astype(np.float64)).argmax()) in wanted

    return fits


def select(pool: Pool | Path, out: Path, *flags: object) -> bytes:
    folder = pool.folder if isinstance(pool, Pool) else pool
    assert main(["select", str(folder), "--out", str(out), *map(str, flags)]) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing else is left behind"
    return out.read_bytes()


def clusters(pool: Pool) -> list[object]:
    return ["--centroids", pool.centroids, "--targets", ",".join(map(str, pool.targets))]


def test_every_baseline_writes_the_file_of_uids_that_its_definition_gives(pool: Pool, tmp_path: Path) -> None:
    near = image_based(pool)
    l14, b32 = "clip_l14_similarity_score", "clip_b32_similarity_score"
    share = pool.threshold(l14, 0.3)
    words = ["--wordnet", pool.wordnet, "--synsets", pool.synsets]
    both = ["image_based_intersect_clip_score", *clusters(pool)]
    expected: list[tuple[list[object], Callable[[dict[str, Any]], bool]]] = [
        (["no_filter"], lambda row: True),
        (["basic"], is_basic),
        (["basic_filter", "--lid_model", find_model()], is_basic),
        (["laion2b"], is_laion2b),
        (["text_based", *words], is_text_based),
        (["image_based", *clusters(pool)], near),
        (["clip_score", "--arch", "l14", "--fraction", 0.3], lambda row: row[l14] >= share),
        (["clip_score", "--arch", "b32", "--threshold", 0.25], lambda row: row[b32] >= 0.25),
        ([*both, "--arch", "l14", "--fraction", 0.3], lambda row: row[l14] >= share and near(row)),
        ([*both, "--arch", "b32", "--threshold", 0.25], lambda row: row[b32] >= 0.25 and near(row)),
        (["image_based", *clusters(pool), "--where", f"{l14} > 0.2"], lambda row: row[l14] > 0.2 and near(row)),
    ]
    for flags, fits in expected:
        found = select(pool, tmp_path / "keep.npy", "--baseline", *flags)
        assert found == pool.file(fits), flags
        assert 20 < np.load(tmp_path / "keep.npy").size <= ROWS, flags


def test_a_command_line_of_datacomp_is_taken(pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of its ``baselines.py``, all of whose options are here."""
    out = tmp_path / "keep.npy"
    line = (
        f"--name image_based_intersect_clip_score --metadata_dir {pool.folder} --save_path {out} --arch b32 "
        f"--threshold 0.25 --image_based_scale {clusters(pool)[1]} --num_workers 2 --num_gpus 1 --batch_size 512"
    )
    assert main(["select", *line.split(), *map(str, clusters(pool)[2:])]) == 0
    assert "--batch_size has no effect here" in capsys.readouterr().err
    near = image_based(pool)
    assert out.read_bytes() == pool.file(lambda row: row["clip_b32_similarity_score"] >= 0.25 and near(row))


def test_what_was_used_is_said(pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select(pool, tmp_path / "keep.npy", "--baseline", "image_based", *clusters(pool), "--json")
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["used"]["lid_model"] == str(find_model())
    assert told["used"]["centroids"] == str(pool.centroids)
    assert re.fullmatch(rf"\d+ of {CLUSTERS}", told["used"]["clusters"])
    assert told["rows"] == ROWS
    assert "DataComp used lid.176.bin" in said.err
    assert said.err.count("\n") == 1


def test_without_gcld3_fasttext_answers_and_a_line_says_so(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcld3", None)
    found = select(pool, tmp_path / "keep.npy", "--baseline", "laion2b", "--lid_model", find_model())
    assert found == pool.file(lambda row: is_english(row) and row["clip_b32_similarity_score"] >= 0.28)
    said = capsys.readouterr().err
    assert "the package cld3-py is not installed: fastText says" in said
    assert said.count("\n") == 1


def test_tables_without_captions_use_their_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "metadata"
    folder.mkdir()
    columns = {"uid": [f"{n:032x}" for n in range(4)], "clip_b32_similarity_score": [0.3, 0.3, 0.1, 0.3]}
    pq.write_table(pa.table({**columns, "language": ["en", "de", "en", None]}), folder / "0.parquet")
    out = tmp_path / "out" / "keep.npy"
    select(folder, out, "--baseline", "laion2b")
    assert np.load(out).tolist() == [(0, 0)]
    assert "their column language says which are English" in capsys.readouterr().err
    pq.write_table(pa.table(columns), folder / "0.parquet")
    assert main(["select", str(folder), "--out", str(out), "--baseline", "laion2b"]) == 2
    assert "no column 'text' in the tables" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--baseline basics", "choose one of no_filter, basic"),
        ("--baseline clip_score --arch l14", "needs --arch b32 or l14, and either --fraction or --threshold"),
        ("--baseline clip_score --arch l14 --fraction 0.3 --threshold 0.1", "either --fraction or --threshold"),
        ("--baseline clip_score --arch l14 --fraction 1.5", "--fraction 1.5: a number between 0 and 1"),
        ("--baseline clip_score --arch l14 --threshold nan", "--threshold nan: not a number"),
        ("--baseline basic --fraction 0.3", "--fraction goes with --baseline clip_score"),
        ("--where true --arch l14", "--arch goes with --baseline clip_score"),
        ("--baseline basic --centroids small", "--centroids goes with --baseline image_based, image_based_intersect"),
        ("--baseline laion2b --wordnet .", "--wordnet goes with --baseline text_based only"),
        ("--baseline image_based", "needs --centroids: small, medium, large, xlarge for DataComp's pools, or a file"),
        ("--baseline image_based --centroids small", "models fetch select --baseline image_based --centroids small"),
        ("--baseline image_based --centroids nowhere.npy", "--centroids nowhere.npy: no such file"),
        ("--baseline text_based --synsets nowhere", "--synsets nowhere: no such file"),
        ("--baseline basic --lid_model nowhere.bin", "--lid_model nowhere.bin: no such file"),
        ("--baseline basic --where true)or(true", "--where: not one SQL condition"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: str,
    says: str,
    pool: Pool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # nothing was fetched
    out = tmp_path / "out" / "keep.npy"
    assert main(["select", str(pool.folder), "--out", str(out), *flags.split()]) == 2
    said = capsys.readouterr().err
    assert says in said.splitlines()[-1]
    assert not list(tmp_path.glob("out/*"))


# ---- WordNet


def test_words_are_looked_up_as_wordnet_does(pool: Pool) -> None:
    """Lower case, exceptions, endings, the first part of speech that has the word, and its first sense."""
    test = names_an_entity(str(pool.wordnet), pool.synsets)
    for word in ("dog", "DOGS", "Mice", "cars", "flew", "flies", "mouse"):
        assert test([word, f"oh {word}\u3000oh"]).tolist() == [True, True], word
    assert not test(["ran", "rare", "good", "away", "dog's", "dog,", "dogss", "", "constructor"]).any()


@pytest.mark.skipif(not os.path.isdir("/usr/share/wordnet"), reason="Debian's wordnet-base is not installed")
def test_the_real_wordnet(tmp_path: Path) -> None:
    (tmp_path / "synsets").write_text("n02084071\nn02330245\n")  # dog, mouse
    test = names_an_entity("/usr/share/wordnet", tmp_path / "synsets")
    assert test(["two dogs", "mice ran", "run quickly"]).tolist() == [True, True, False]


def test_other_versions_and_other_files_are_refused(tmp_path: Path, pool: Pool) -> None:
    """The offsets of later versions mean other things."""
    with pytest.raises(UsageError, match=r"WordNet 3\.1; the offsets in ImageNet's list are those of 3\.0"):
        names_an_entity(str(write_wordnet(tmp_path / "later", "3.1")), pool.synsets)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InfrastructureError, match=r"--wordnet .*empty: cannot be read"):
        names_an_entity(str(tmp_path / "empty"), pool.synsets)
    for content in (b"n00000100\nn2\n", b"\xff\xfe", b"", b"n00000100 <script>"):
        (tmp_path / "synsets").write_bytes(content)
        with pytest.raises(UsageError, match=r"--synsets .*: (.* is no synset|cannot be read|there is no synset)"):
            names_an_entity(str(pool.wordnet), tmp_path / "synsets")


def debian_package(files_in_it: dict[str, bytes]) -> bytes:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        for name, content in files_in_it.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": inner.getvalue()}
    package = b"!<arch>\n"
    for name, content in members.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    return package


def test_wordnet_is_fetched_as_debians_package(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "none"))
    monkeypatch.setattr(assets, "_DEBIAN_WORDNET", str(tmp_path / "none"))
    inside = {f"./usr/share/wordnet/{path.name}": path.read_bytes() for path in pool.wordnet.iterdir()}
    for name, content, right in (
        ("good.deb", debian_package({**inside, "../../../../outside": b"no"}), True),
        ("short.deb", debian_package({"./usr/share/wordnet/data.noun": b""}), False),
        ("odd.deb", b"no archive", False),
    ):
        with file_server() as server:
            digest = hashlib.sha256(content).hexdigest()
            wordnet = assets.WordNet(assets.Asset("--wordnet", server.add(name, content), digest))
            with pytest.raises(InfrastructureError, match="`a command` fetches it"):
                wordnet.find(None, "a command")
            wordnet.fetch(dry_run=True)
            assert "would be fetched" in capsys.readouterr().out
            if not right:
                with pytest.raises(InfrastructureError, match="not Debian's wordnet-base"):
                    wordnet.fetch(dry_run=False)
                continue
            wordnet.fetch(dry_run=False)
        found = wordnet.find(None, "")
        assert sorted(os.listdir(found)) == sorted(WORDNET)
        assert names_an_entity(found, pool.synsets)(["dogs"]).all()
    assert not list(tmp_path.rglob("outside"))


def test_models_fetch_says_what_a_baseline_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for flags, says in (
        ("basic", ["lid.176.bin, would be fetched"]),
        (
            "text_based",
            ["lid.176.bin, would be fetched", "wordnet-base_3.0-37_all.deb, would be fetched", "--synsets: "],
        ),
        (
            "image_based --centroids medium",
            ["lid.176.bin", "medium_centroids_l14.pt", *(f"in1k_clip_vit_l14_{number}.pt" for number in range(5))],
        ),
        ("clip_l14_30", ["needs nothing"]),
    ):
        assert main(["models", "fetch", "select", "--dry_run", "--baseline", *flags.split()]) == 0
        said = capsys.readouterr().out
        assert all(one in said for one in says), said
    assert main(["models", "fetch", "select"]) == 2
    assert not list(tmp_path.iterdir())


# ---- centroids and features


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_saved_file_runs_no_code_and_holds_a_table(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    table = np.zeros((2, 3), np.float32)
    for protocol in (2, 4):
        odd: list[Any] = [Hostile(ran), [table, Hostile(ran)], {"image_features": Hostile(ran)}, table[0], "text"]
        odd += [
            table.astype(int),
            {"other": torch.zeros(2, 3)},
            torch.zeros(2, dtype=torch.int),
            np.array([["x"]], object),
        ]
        for content in odd:
            torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
            with pytest.raises(UsageError, match=r"--centroids .*a\.pt: (not a|no) table of numbers"):
                list(saved_blocks(tmp_path / "a.pt", "--centroids"))
    (tmp_path / "a.pt").write_bytes(b"\x80\x04junk")
    with pytest.raises(UsageError):
        list(saved_blocks(tmp_path / "a.pt", "--centroids"))
    assert not ran.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_and_tensors_are_read_in_every_type(protocol: int, tmp_path: Path) -> None:
    table = np.random.default_rng(1).normal(size=(1500, 3)).astype(np.float32)
    kinds: list[Any] = [table, table.astype(">f8"), np.asfortranarray(table)]
    kinds += [torch.from_numpy(table), {"image_features": torch.from_numpy(table)}] if protocol < 4 else []
    for kind in kinds:
        torch.save(kind, tmp_path / "a.pt", pickle_protocol=protocol)
        assert np.array_equal(np.concatenate(list(saved_blocks(tmp_path / "a.pt", "--centroids"))), table)


def test_centroids_and_targets_of_ones_own(pool: Pool, tmp_path: Path) -> None:
    """.npy, .npz and folders of tables, beside what torch wrote."""
    expected = select(pool, tmp_path / "a" / "keep.npy", "--baseline", "image_based", *clusters(pool))
    np.save(tmp_path / "own.npy", torch.load(pool.centroids, weights_only=False))
    hits = np.concatenate([torch.load(path, weights_only=True)["image_features"].numpy() for path in pool.targets])
    target = tmp_path / "mine"
    target.mkdir()
    np.savez(target / "0.npz", **{"oai-clip-vit-l14-image": hits})  # stage 06's name
    pq.write_table(pa.table({"uid": [f"{n:032x}" for n in range(len(hits))]}), target / "0.parquet")
    for targets in (target, target / "0.npz"):
        flags = ["--centroids", tmp_path / "own.npy", "--targets", targets, "--device", "cpu"]
        assert select(pool, tmp_path / "b" / "keep.npy", "--baseline", "image_based", *flags) == expected


def test_rows_without_features_and_ties(tmp_path: Path) -> None:
    centroids = np.zeros((9000, 2), np.float32)  # more than are compared at a time
    centroids[8999] = centroids[8500] = [1, 0]
    centroids[3] = [0, 1]
    rows = np.array([[2, 0], [0, 5], [np.nan, 1], [-1, -1]], np.float32)
    assert Clusters(centroids).nearest(rows).tolist() == [8500, 3, -1, 0]
    with pytest.raises(UsageError, match="they have 2 numbers each, the features have 3"):
        Clusters(centroids).nearest(np.zeros((1, 3), np.float32))


def test_features_that_do_not_belong_to_the_table(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "metadata"
    folder.mkdir()
    texts = ["a photo of the dog in the street"] * 3
    table = {"uid": [f"{n:032x}" for n in range(3)], "text": texts}
    pq.write_table(pa.table(table), folder / "0.parquet")
    command = ["select", str(folder), "--out", str(tmp_path / "k.npy"), "--baseline", "image_based"]
    command += map(str, clusters(pool))
    assert main(command) == 2
    assert "has no 0.npz" in capsys.readouterr().err.splitlines()[-1]
    np.savez(folder / "0.npz", l14_img=np.zeros((4, WIDTH), np.float16))
    assert main(command) == 2
    assert "has 4 rows of l14_img, 0.parquet has 3" in capsys.readouterr().err
    np.savez(folder / "0.npz", l14_img=np.zeros((3, 5), np.float16))
    assert main(command) == 2
    assert "the features have 5" in capsys.readouterr().err
    pq.write_table(pa.table({**table, "file_index": [0, 0, 0]}), folder / "0.parquet")
    assert main(command) == 2
    assert "a column 'file_index'" in capsys.readouterr().err
    np.save(tmp_path / "odd.npy", np.full((3, WIDTH), np.nan, np.float32))
    command[command.index("--centroids") + 1] = str(tmp_path / "odd.npy")
    pq.write_table(pa.table(table), folder / "0.parquet")
    assert main(command) == 2
    assert "a number in it is not finite" in capsys.readouterr().err


def test_centroids_are_those_of_faiss_on_the_rows_that_pass(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faiss = pytest.importorskip("faiss")
    out = tmp_path / "out" / "own.npy"
    command = ["centroids", str(pool.folder), "--out", str(out), "--clusters", "20", "--rounds", "5", "--seed", "4"]
    assert main(command) == 0
    passing = [r for r in pool.rows if is_english(r) and tokens(r["text"]) > 1 and len(r["text"]) > 5]
    rows = np.array([row["feature"] for row in passing]).astype(np.float32)
    means = faiss.Clustering(WIDTH, 20)
    means.niter, means.seed, means.max_points_per_centroid = 5, 4, 10_000_000
    means.train(rows, faiss.IndexFlatL2(WIDTH))
    expected = faiss.vector_float_to_array(means.centroids).reshape(20, WIDTH)
    assert np.array_equal(np.load(out), expected)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    capsys.readouterr()
    assert main([*command, "--no-caption_filter", "--sample", "0.5", "--json"]) == 0
    assert 0.4 * ROWS < json.loads(capsys.readouterr().out)["rows"] < 0.6 * ROWS
    assert main([*command[:4], "--clusters", "5000"]) == 2
    assert "--clusters 5,000: only" in capsys.readouterr().err
    assert main([*command, "--no-caption_filter", "--lid_model", "x"]) == 2
    select(pool, tmp_path / "b" / "k.npy", "--baseline", "image_based", "--centroids", out, *clusters(pool)[2:])


def test_the_page_tells_every_flag_of_centroids() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/centroids.md").read_text("utf-8")
    flags = {field.name for field in dataclasses.fields(CentroidOptions)} - {"folder"}
    assert set(re.findall(r"^\| `--(\w+)`", page, flags=re.M)) == flags


def test_memory_is_bounded_in_rows(tmp_path: Path) -> None:
    """All rows pass the condition, so that every caption comes by."""
    folder = tmp_path / "metadata"
    folder.mkdir()
    rows = 100_000
    table = pa.table(
        {
            "uid": [f"{n:032x}" for n in range(rows)],
            "text": [f"a photo of the dog in the street number {n} " * 10 for n in range(rows)],
            "original_width": [300] * rows,
            "original_height": [300] * rows,
        }
    )
    pq.write_table(table, folder / "0.parquet", row_group_size=20_000)
    command = [sys.executable, "-c", MEMORY, "select", str(folder), "--out", str(tmp_path / "k.npy")]
    command += ["--memory_mb", "100", "--threads", "1", "--baseline", "basic"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], check=True)
    assert np.load(tmp_path / "k.npy").size == rows
    assert int(done.stdout.splitlines()[-1]) < 400
