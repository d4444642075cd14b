"""What a stage needs on this machine before it can run without internet, declared so that it can be fetched ahead.

A stage's ``weights`` returns a list of needs; ``curation models fetch`` calls ``fetch`` on each of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from curation.errors import InfrastructureError
from curation.models.hub_cache import ModelSource, resolve
from curation.models.hub_errors import gated_line, hub_trouble
from curation.models.known import Model
from curation.models.weights import (
    CACHE,
    cached,
    fetch_weights,
    is_hub_id,
    is_url,
    megabytes,
    sha256_of,
)
from curation.storage.urls import redact

_TIMEOUT_S = 30.0


_OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".pkl", ".pt", ".pth")


class WeightsNeed(Protocol):
    """One thing that has to be on this machine before a stage can load its model."""

    def fetch(self, *, dry_run: bool) -> None:
        """Get it if it is not here, and print where it is.

        Args:
            dry_run: Only print what would be fetched, and how large it is where that is known.

        Raises:
            InfrastructureError: It cannot be fetched, or what arrived is damaged.
        """


@dataclass(frozen=True, slots=True)
class NothingToFetch:
    """A model that is here already, or that another program fetches.  line: says so."""

    line: str

    def fetch(self, *, dry_run: bool) -> None:
        print(self.line)


@dataclass(frozen=True, slots=True)
class WeightsBySource:
    """Weights that ``fetch_weights`` finds: a path, a URL with its sha256, or a hub id.

    name: What messages call them, such as a directive or a flag.
    """

    name: str
    source: str
    sha256: str | None = None
    cache: Path = CACHE

    def fetch(self, *, dry_run: bool) -> None:
        if dry_run:
            print(f"{self.name}: {self._where()}")
        else:
            print(f"{self.name}: {fetch_weights(self.source, self.sha256, self.cache, name=self.name)}", flush=True)

    def _where(self) -> str:
        if is_url(self.source):
            there = cached(self.source, self.sha256 or "", self.cache).is_file()
            return f"{redact(self.source)}, {'is there' if there else 'would be fetched'}"
        if Path(self.source).expanduser().exists():
            return f"{self.source}: one's own, nothing to fetch"
        return f"{self.source}: would be fetched from the hub, or is in its cache"


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a model on the hub.  sha256: of its content, where the hub tells it."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """A whole model of the hub, which goes into the hub's cache; each file is compared with what the hub says of it.

    It is fetched under its commit and under the branch or tag that was asked for, so that a stage without network
    finds both.

    Attributes:
        model: The hub id.
        revision: A branch, tag or commit.
        marker: The file that makes a repository a model of this kind.
        wanted: Chooses among the repository's files.
        download: Fetches a commit and returns its folder.
        known: Models with short names, among which messages suggest another one.
    """

    model: str
    revision: str
    marker: str
    wanted: Callable[[Sequence[HubFile]], list[HubFile]] = field(repr=False)
    download: Callable[[str], Path] = field(repr=False)
    known: Sequence[Model] = field(default=(), repr=False)

    def fetch(self, *, dry_run: bool) -> None:
        from huggingface_hub import HfApi, constants, get_token, hf_hub_download

        if constants.HF_HUB_OFFLINE:
            raise InfrastructureError("HF_HUB_OFFLINE is set: unset it to fetch")
        try:
            info = HfApi().model_info(self.model, revision=self.revision, files_metadata=True, timeout=_TIMEOUT_S)
        except Exception as error:
            raise self._trouble(error) from error
        files = [_hub_file(sibling) for sibling in info.siblings or []]
        if dry_run:
            wanted = self.wanted(files)
            for file in wanted:
                print(f"  {megabytes(file.size):>12}  {file.path}")
            gated = f"gated ({info.gated}): needs a token" if info.gated else "not gated: needs no token"
            size = megabytes(sum(file.size for file in wanted))
            print(f"{self.model} {info.sha}: {size} in {len(wanted)} files, {gated}")
        if info.gated and get_token() is None:
            raise InfrastructureError(f"--model {self.model}: {gated_line(self.model, self.known)}")
        if dry_run:
            return
        print(f"{self.model} {info.sha}: fetching into {constants.HF_HUB_CACHE}", flush=True)
        try:
            marker = hf_hub_download(self.model, self.marker, revision=self.revision)  # records what the revision is
            folder = self.download(Path(marker).parent.name)
        except InfrastructureError:
            raise
        except Exception as error:
            raise self._trouble(error) from error
        fetched = _verify(folder, files, self.model)
        print(f"{folder}: {fetched} files, whole.  HF_HUB_OFFLINE=1 keeps the stage from asking the hub")

    def _trouble(self, error: BaseException) -> InfrastructureError:
        return hub_trouble(error, self.model, self.revision, asked_by="--model", known=self.known)


def whole_model(
    model: str,
    revision: str | None,
    variant: str | None,
    kind: tuple[str, str],
    wanted: Callable[[Sequence[HubFile]], list[HubFile]],
    download: Callable[[ModelSource], Path],
    known: Sequence[Model] = (),
) -> WeightsNeed:
    """A model that a stage loads from a folder of the user's or from the hub's cache.

    Args:
        model: A folder or a hub id.
        revision: A branch, tag or commit of a hub id; None for ``main``.
        variant: Which weight files of the model are read, such as ``fp16``.
        kind: ``hub_cache.PIPELINE`` or ``hub_cache.TRANSFORMER``.
        wanted: Chooses among a repository's files.
        download: Returns the model's folder, filled if need be.
        known: Models with short names, among which messages suggest another one.

    Raises:
        InfrastructureError: It is neither a folder with such a model nor a hub id.
    """
    if os.path.isdir(model) or not is_hub_id(model):
        found = resolve(model, revision, variant, kind)
        return NothingToFetch(f"{found.location}: a folder, nothing to fetch (revision {found.revision})")
    return HubModel(
        model=model,
        revision=revision or "main",
        marker=kind[0],
        wanted=wanted,
        download=lambda commit: download(resolve(model, commit, variant, kind, known=known)),
        known=known,
    )


def is_other_weight(path: str) -> bool:
    """Whether a repository's file holds weights in a format that is never loaded here."""
    return path.endswith((*_OTHER_WEIGHTS, *(f"{end}.index.json" for end in _OTHER_WEIGHTS)))


def _hub_file(sibling: Any) -> HubFile:
    lfs = getattr(sibling, "lfs", None)
    return HubFile(str(sibling.rfilename), int(sibling.size or 0), getattr(lfs, "sha256", None))


def _verify(folder: Path, files: Sequence[HubFile], model: str) -> int:
    """Count the files of the folder that the hub knows, each of which has its size and, where it is known, its SHA-256.

    A damaged file is removed, so that the next start fetches it again.
    """
    known = {file.path: file for file in files}
    count = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = known.get(path.relative_to(folder).as_posix())
        if file is None:
            continue
        count += 1
        whole = path.stat().st_size == file.size and (file.sha256 is None or sha256_of(path) == file.sha256)
        if not whole:
            blob = path.resolve()
            path.unlink(missing_ok=True)
            if blob.parent == folder.parent.parent / "blobs":
                blob.unlink(missing_ok=True)
            raise InfrastructureError(f"{model}: {file.path} was damaged on its way and is removed; start again")
    return count
