"""Tiny captioners, built once, and photos for them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from curation import backends
from curation.caption.captioner import CaptionSettings, resolve
from curation.jsonio import clean_text
from curation.replies import Reply, Verdict
from tests import EXAMPLES


def open_captioner(model: Path | str, **settings: Any) -> Any:
    """The captioner that ``--model`` means."""
    family, source = resolve(str(model), backends.families("caption"))
    return backends.load("caption", family.name)(source, CaptionSettings(**settings))


def accepted(replies: Sequence[Reply]) -> list[Verdict]:
    """What ``caption_batch`` makes of replies under ``any_text``."""
    return [Verdict(clean_text(reply.text)) for reply in replies]


@pytest.fixture(scope="session")
def photos() -> list[Any]:
    """Eight photos of the example shard, then crops of some: many proportions and sizes."""
    with tarfile.open(EXAMPLES / "00000000.tar") as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".jpg")][:8]
        images = [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in members]  # type: ignore[union-attr]
    crops = [p.crop((0, 0, p.width // 3, p.height)) for p in images[:2]]
    return [*images, *crops, *(p.crop((0, 0, p.width, p.height // 4)) for p in images[:2])]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, by its model type.  The test is skipped where none can be built."""
    pytest.importorskip("transformers")
    from tests.backends import tiny_captioners

    root = tmp_path_factory.mktemp("captioners")

    def build(model_type: str) -> Path:
        path = root / model_type
        if not (path / "config.json").exists():
            kinds = [backends.load("caption", name) for name in backends.names("caption")]
            kind = next((kind for kind in kinds if model_type in kind.family.model_types), None)
            try:
                tiny_captioners.save(model_type, path, getattr(kind, "processor_class", None))
            except Exception as error:
                if model_type in tiny_captioners.BUILDERS:
                    raise
                pytest.skip(
                    f"{model_type}: no tiny model can be built from its default config "
                    f"({type(error).__name__}: {error}); add a builder to tests/backends/tiny_captioners.py"
                )
        return path

    return build


@pytest.fixture(scope="module")
def tiny(folder: Callable[[str], Path]) -> Callable[..., Any]:
    """A tiny captioner, by its model type and settings; each is loaded once."""
    loaded: dict[str, Any] = {}

    def load(model_type: str, **settings: Any) -> Any:
        mark = f"{model_type} {settings}"
        if mark not in loaded:
            loaded[mark] = open_captioner(folder(model_type), **{"max_tokens": 12, **settings})
        return loaded[mark]

    return load
