"""What a stage needs on this machine before it can run without internet, declared so that it can be fetched ahead.

A stage's ``weights`` returns a list of needs; ``curation models fetch`` calls ``fetch`` on each of them.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from curation.errors import InfrastructureError
from curation.models.hub_cache import TRANSFORMER, ModelSource, cached_commit, resolve, snapshot
from curation.models.hub_errors import gated_line, hub_trouble
from curation.models.known import Model
from curation.models.weights import (
    CACHE,
    MODEL_FILES,
    OLD_WEIGHTS,
    cached,
    fetch_weights,
    hub_parts,
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
            return f"{self.source}: your own, nothing to fetch"
        model, revision, file = hub_parts(self.name, self.source)
        try:
            listing = list_model(model, revision or "main")
        except Exception as error:
            if cached_commit(model, revision or "main", file or TRANSFORMER[0]):
                return f"{self.source}: is in the hub's cache; the hub itself was not asked"
            if isinstance(error, InfrastructureError):
                raise
            raise hub_trouble(error, model, revision or "main", asked_by=self.name) from error
        if listing.gated and get_hub_token() is None:
            raise InfrastructureError(f"{self.name} {model}: {gated_line(model, ())}")
        wanted = _weights_of(listing.files) if file is None else [one for one in listing.files if one.path == file]
        if not wanted:
            raise InfrastructureError(f"{self.name} {self.source}: the hub has no such file in this model")
        size = megabytes(sum(one.size for one in wanted))
        there = len(_in_cache(model, listing.commit, wanted)) == len(wanted)
        return f"{self.source}: {size} of the hub, {'is there' if there else 'would be fetched'}"


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
        from huggingface_hub import constants, hf_hub_download

        cached = cached_commit(self.model, self.revision, self.marker)
        try:
            listing = list_model(self.model, self.revision)
        except Exception as error:
            if dry_run and cached:
                print(f"{self.model} {cached}: is in the hub's cache; the hub itself was not asked")
                return
            if isinstance(error, InfrastructureError):
                raise
            raise self._trouble(error) from error
        wanted = self.wanted(listing.files)
        there = _in_cache(self.model, listing.commit, wanted)
        whole = len(there) == len(wanted) and cached == listing.commit
        if dry_run:
            self._print(listing, wanted, there)
        if listing.gated and not whole and get_hub_token() is None:
            raise InfrastructureError(f"--model {self.model}: {gated_line(self.model, self.known)}")
        if dry_run:
            return
        if not whole:
            print(f"{self.model} {listing.commit}: fetching into {constants.HF_HUB_CACHE}", flush=True)
        try:
            if not whole:  # the marker records what the revision is
                cached = Path(hf_hub_download(self.model, self.marker, revision=self.revision)).parent.name
            folder = snapshot(self.model, listing.commit) if whole else self.download(cached or listing.commit)
        except InfrastructureError:
            raise
        except Exception as error:
            raise self._trouble(error) from error
        fetched = _verify(folder, listing.files, self.model)
        print(f"{folder}: {fetched} files, whole.  HF_HUB_OFFLINE=1 keeps the stage from asking the hub")

    def _print(self, listing: HubListing, wanted: Sequence[HubFile], there: Sequence[HubFile]) -> None:
        for file in wanted:
            print(f"  {megabytes(file.size):>12}  {'is there: ' if file in there else ''}{file.path}")
        gated = f"gated ({listing.gated}): needs a token" if listing.gated else "not gated: needs no token"
        size = megabytes(sum(file.size for file in wanted))
        here = f"; {megabytes(sum(file.size for file in there))} of it are there already" if there else ""
        here = "; all of it is there already" if len(there) == len(wanted) else here
        print(f"{self.model} {listing.commit}: {size} in {len(wanted)} files, {gated}{here}")

    def _trouble(self, error: BaseException) -> InfrastructureError:
        return hub_trouble(error, self.model, self.revision, asked_by="--model", known=self.known)


@dataclass(frozen=True, slots=True)
class HubListing:
    """What the hub says of a model at one revision.  gated: its word for how, else False."""

    commit: str
    files: list[HubFile]
    gated: str | bool


def list_model(model: str, revision: str) -> HubListing:
    """Ask the hub for a model's files, with their sizes.

    Raises:
        InfrastructureError: HF_HUB_OFFLINE is set.
        Exception: What the hub's client raises (``hub_trouble`` makes a message of it).
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise InfrastructureError("HF_HUB_OFFLINE is set: unset it to fetch")
    info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    return HubListing(str(info.sha), [_hub_file(sibling) for sibling in info.siblings or []], info.gated or False)


def get_hub_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _in_cache(model: str, commit: str, files: Sequence[HubFile]) -> list[HubFile]:
    folder = snapshot(model, commit)
    return [file for file in files if (folder / file.path).is_file()]


def _weights_of(files: Sequence[HubFile]) -> list[HubFile]:
    """The files that ``fetch_weights`` takes of a whole model."""

    def of(patterns: Sequence[str]) -> list[HubFile]:
        return [file for file in files if any(fnmatch.fnmatch(file.path, pattern) for pattern in patterns)]

    found = of(MODEL_FILES)
    return found if any(file.path.endswith(".safetensors") for file in found) else of((*MODEL_FILES, *OLD_WEIGHTS))


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
