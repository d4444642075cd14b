"""A root on which stage 04 has run, for the tests of each store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.publish.buckets import Place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place on which stage 04 has run, to be copied."""
    place = Place(tmp_path_factory.mktemp("made"))
    assert place.run() == 0
    return place


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    shutil.copytree(made.root, tmp_path / "place", symlinks=True, copy_function=shutil.copy2)
    copied = Place.__new__(Place)
    copied.root, copied.ids = tmp_path / "place", made.ids
    copied.out, copied.source, copied.edits = (copied.root / name for name in ("out", "shards", "edits"))
    return copied
