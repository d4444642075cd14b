"""What every detector, extractor and preset has to do, over whatever the scan of ``curation/backends`` finds."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import CORE, backends
from curation.backends.extract import families as extractor_families
from curation.backends.faces import detector_class
from curation.errors import InfrastructureError
from curation.extract.answers import Answers
from curation.extract.api import Asker, Directive, ExtractorFamily, dependents
from curation.extract.judging import JudgeSettings
from curation.extract.settings import ModelSettings
from curation.faces import DetectorSettings, FaceDetector
from curation.run.checkpoints import PartialLog
from tests.servers.odd_server import MODEL, Answer, Asked, odd_server
from tests.test_faces import photos

FACES = backends.names("faces")

# ---- face detectors


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FaceDetector]:
    """A detector by name, with its own weights, or with a stand-in's where those do not come with a package."""

    def load(name: str, **more: Any) -> FaceDetector:
        model = None
        if name == "scrfd":
            from curation.backends.faces import centerface
            from tests.backends.scrfd_from_centerface import build_scrfd

            model = build_scrfd(centerface.Backend.model_file(), tmp_path_factory.mktemp("scrfd") / "scrfd.onnx")
        try:
            return detector_class(name)(DetectorSettings(model, **more))
        except InfrastructureError as error:
            pytest.skip(str(error))

    return load


@pytest.mark.parametrize("name", FACES)
def test_a_detector_says_what_it_is(name: str) -> None:
    kind = detector_class(name)
    assert kind.name == name
    assert kind.licence
    assert 32 <= kind.default_det_size <= 4096
    assert kind.default_det_size % 32 == 0
    assert 0 < kind.default_threshold < 1
    assert callable(kind.weights().fetch)


@pytest.mark.parametrize("name", FACES)
def test_a_detectors_boxes(name: str, detectors: Callable[..., FaceDetector]) -> None:
    """They are shares of the picture, the best first, none below the threshold, and the same from several threads."""
    detector = detectors(name)
    assert (detector.name, detector.det_size) == (name, detector_class(name).default_det_size)
    assert detector.threshold == detector_class(name).default_threshold
    assert detector.revision.startswith("sha256:")
    assert detector.wants_pixels >= detector.det_size
    pictures = [pixels for pixels, _ in photos("00000001", 20).values()]
    alone = [detector.detect(picture) for picture in pictures]
    assert sum(map(len, alone)) >= 3
    for boxes in alone:
        assert boxes.dtype == np.float32
        assert boxes.shape[1:] == (5,)
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[:, 2:4] > boxes[:, :2]).all()
        assert (np.diff(boxes[:, 4]) <= 0).all()
        assert (boxes[:, 4] >= detector.threshold).all()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(detector.detect, pictures))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", FACES)
def test_a_detector_takes_images_of_any_shape(name: str, detectors: Callable[..., FaceDetector]) -> None:
    detector = detectors(name, det_size=320)
    for shape in ((1, 1), (1, 3000), (3000, 1), (33, 31), (32, 640)):
        assert detector.detect(np.zeros((*shape, 3), np.uint8)).shape == (0, 5)


@pytest.mark.parametrize("name", FACES)
def test_a_detectors_model_that_is_not_there_or_is_none(name: str, tmp_path: Path) -> None:
    kind = detector_class(name)
    with pytest.raises(InfrastructureError, match=r"nowhere\.onnx"):
        kind(DetectorSettings(tmp_path / "nowhere.onnx"))
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"this is no model")
    with pytest.raises(InfrastructureError, match=r"garbage\.onnx"):
        kind(DetectorSettings(garbage))
    with pytest.raises(InfrastructureError, match="Is a directory"):
        kind(DetectorSettings(tmp_path))


def imported_by(kind: type) -> set[str]:
    """The modules that the file of a backend imports, but for those that every program has."""
    tree = ast.parse(Path(str(inspect.getsourcefile(kind))).read_bytes())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, *CORE, "curation", "__future__"}


@pytest.mark.parametrize("name", FACES)
def test_a_detector_names_the_packages_that_it_imports(name: str) -> None:
    kind = detector_class(name)
    optional = {"torch", "onnx"} if name == "scrfd" else set()  # onnxruntime takes their place
    assert imported_by(kind) - optional <= {*kind.packages}  # type: ignore[arg-type]


# ---- extractors

DIRECTIVES = [(family, directive) for family in extractor_families() for directive in family.directives]
WHOLE = [(family, directive) for family, directive in DIRECTIVES if not directive.is_prefix]
COMPUTED = [(family, directive) for family, directive in WHOLE if not issubclass(family, Asker)]
ASKED = [(family, directive) for family, directive in WHOLE if issubclass(family, Asker)]


@pytest.mark.parametrize("family", extractor_families(), ids=lambda family: family.__module__.rpartition(".")[2])
def test_an_extractor_names_the_packages_that_it_imports(family: Any) -> None:
    """So that a dry run knows what is missing.  SCRFD's depend on its file: torch's or ONNX."""
    if not family.__module__.endswith(".scrfd"):
        assert imported_by(family) <= {package for directive in family.directives for package in directive.packages}


def directive_name(value: Any) -> str:
    return value.name if isinstance(value, Directive) else "family"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small weights for directives whose own are large, or are not here."""
    pytest.importorskip("transformers")
    from tests.backends import tiny_extractors as tiny

    folder = tmp_path_factory.mktemp("weights")
    return {
        "oai-clip-vit-b32": tiny.save_clip(folder / "b32"),
        "oai-clip-vit-l14": tiny.save_clip(folder / "l14", width=768, seed=8),
        "nsfw-detoxify": tiny.save_toxicity(folder / "toxicity"),
        "nsfw-image-oai-clip-vit-l-14": tiny.save_nsfw_head(folder / "nsfw.pt"),
        "aesthetic": tiny.save_aesthetic_head(folder / "aesthetic.pth"),
        "aesthetic-v1-l14": tiny.save_linear_head(folder / "l14.pth", 768),
        "aesthetic-v1-b32": tiny.save_linear_head(folder / "b32.pth", 512),
        "aesthetic-v1-b16": tiny.save_linear_head(folder / "b16.pth", 512),
        "aesthetic-v2-5": tiny.save_siglip_head(folder / "v2_5.pth"),
        "sscd": tiny.save_sscd(folder / "sscd.torchvision.pt"),
        "faces-scrfd10g": tiny.save_scrfd(folder / "scrfd.pt"),
        "dedup-isc-ft-v107": tiny.save_isc(folder / "isc.pth.tar"),
    }


def test_directives_are_distinct() -> None:
    names = [directive.name for _, directive in DIRECTIVES]
    assert len(names) == len({*names})
    assert {"statistics", "oai-clip-vit-b32", "clip:"} <= {*names}


@pytest.mark.parametrize(("family", "directive"), COMPUTED, ids=directive_name)
def test_an_extractor_computes_what_its_directive_says(
    family: ExtractorFamily, directive: Directive, stand_ins: dict[str, Path]
) -> None:
    """The columns and features of the directive, and a value of each for every sample."""
    from tests.backends.tiny_extractors import CAPTIONS, SampleBatch, picture

    own = stand_ins.get(directive.name)
    settings = ModelSettings(weights=None if own is None else str(own), embeddings="none")
    try:
        sources = family.sources(directive.name, settings)
    except InfrastructureError as error:
        pytest.skip(str(error))
    if not all(Path(source.source).exists() for source in sources):
        pytest.skip(f"its weights are not here: {sources}")
    extractor = family(directive.name, settings)
    columns, features = directive.outputs(directive.name)
    if directive.name == "dedup-isc-ft-v107":
        columns = []  # without embeddings there is no score
    assert [column.name for column in extractor.columns] == columns
    assert [feature.name for feature in extractor.features] == features
    assert extractor.name
    assert extractor.revision
    widths = {name: extractor.widths.get(name, 768) for name in extractor.needs}
    given = {name: np.ones((3, width), np.float32) / width**0.5 for name, width in widths.items()}
    assert len(directive.needs) == len(extractor.needs)
    batch = SampleBatch([picture(n, 60 + n, 50) for n in range(3)], list(CAPTIONS[:3]), given)
    found = extractor.compute(batch)
    assert {*columns, *features} <= {*found}
    assert all(len(found[name]) == 3 for name in (*columns, *features))
    for feature in extractor.features:
        assert tuple(found[feature.name].shape) == (3, feature.width)
    assert dependents([extractor], "image") <= {*columns, *features}
    extractor.close()


@pytest.mark.parametrize(("family", "directive"), ASKED, ids=directive_name)
def test_an_extractor_that_asks_servers_answers_what_its_directive_says(
    family: type[Asker], directive: Directive, tmp_path: Path
) -> None:
    """A value of each column for every sample; what is recorded is not asked again."""
    from tests.backends.tiny_extractors import CAPTIONS, SampleBatch, picture

    def scored(asked: Asked) -> Answer:
        schema = asked.body["response_format"]["json_schema"]["schema"]
        return Answer(json.dumps(dict.fromkeys(schema["required"], 4)))

    keys, asked = ["0", "1", "2"], []
    with odd_server(scored) as server:
        settings = ModelSettings(judge=JudgeSettings(model=MODEL, endpoints=server.url))
        assert family.sources(directive.name, settings) == []
        extractor = family(directive.name, settings)
        columns, _ = directive.outputs(directive.name)
        assert {column.name for column in extractor.columns} >= {*columns}
        assert extractor.asks >= 1
        for token in "01":
            batch = SampleBatch([picture(n, 60 + n, 50) for n in range(3)], list(CAPTIONS[:3]), {})
            log = PartialLog(tmp_path, "0", "fingerprint", token)
            answers = Answers(log)
            found = {name: due.result(60) for name, due in extractor.ask(batch, keys, answers).items()}
            assert {*columns} <= {*found}
            assert all(len(found[name]) == 3 for name in columns)
            assert extractor.doing() == ""
            answers.close()
            log.close()
            asked.append(len(server.questions))
        extractor.close()
    assert 1 <= asked[0] == asked[1]


# ---- presets


def test_every_preset_is_whole_and_found_by_its_models_name() -> None:
    pytest.importorskip("diffusers")
    from curation.backends.generate.presets import families, family_for, preset_for, presets, text_results

    assert sum(len(kind.presets) for kind in families().values()) == len(presets()), "two presets have one name"
    assert {*text_results()} >= {"StableDiffusionPipeline", "FluxPipeline"}
    for name, preset in presets().items():
        assert preset_for(preset.model) == (name, preset)
        assert preset.licence
        assert preset.batch_size >= 1
        kind = family_for(preset.model)
        assert name in kind.presets or families()["tiny"].presets.keys() == {name}
