"""A shard as stage 00 publishes it: tar or loose files beside their table; and what of an earlier one still holds."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from curation.download_rows import SUCCESS, Outcome, read_outcomes
from curation.errors import InfrastructureError, SampleError, ShardError
from curation.images import decode_rgb, image_facts
from curation.jsonio import clean_text
from curation.storage.buckets import Folder, object_at, place_of
from curation.storage.files import Output, fast_digest
from curation.storage.urls import RemoteFile, Source
from curation.tar.samples import IMAGE_SUFFIXES, Sample, TarWriter, read_samples
from curation.threads import in_order

OutputFormat = Literal["webdataset", "files"]
Members = Mapping[str, bytes | memoryview]
"""Suffix → bytes, of one sample."""
_AHEAD_BYTES = 256 << 20


class Work(Protocol):
    """What is needed of a shard's work."""

    def output(self, path: Source, /) -> AbstractContextManager[Output]: ...


def write_samples(
    layout: OutputFormat, output: Folder, shard_id: str, samples: Iterable[tuple[str, Members]], work: Work
) -> None:
    """``<shard>.tar``, or ``<shard>/<key>.<suffix>``, in ``output``."""
    if layout == "files":
        for key, members in samples:
            for suffix, data in members.items():
                with work.output(output / f"{shard_id}/{key}.{suffix}") as file:
                    file.write(data)
        return
    with work.output(output / f"{shard_id}.tar") as file:
        tar = TarWriter(file)
        for key, members in samples:
            for suffix, data in members.items():
                tar.add(f"{key}.{suffix}", data)
        tar.close()


class Earlier:
    """What the last attempt published of a shard: the outcome of every row, and the samples that are sound.

    outcomes: by key, with suffix for those whose sample is there and sound.  lost: why others are not.
    """

    def __init__(self, output: Path, shard_id: str, receipt: Mapping[str, Any], layout: OutputFormat) -> None:
        self._output, self._shard_id, self._layout = output, shard_id, layout
        named = {entry["path"]: entry for entry in receipt.get("outputs", [])}
        self._files = sorted(path for path in named if path.startswith(f"{shard_id}/"))
        tar = next((path for path in named if path.rpartition("/")[2] == f"{shard_id}.tar"), None)
        self._tar = None if tar is None else place_of(output, tar)
        table = output / f"{shard_id}.parquet"
        self.lost: dict[str, str] = {}
        try:
            data = table.read_bytes()
            self.outcomes = read_outcomes(data)
            self.is_whole = all(_is_whole(place_of(output, path), entry) for path, entry in named.items())
        except InfrastructureError:
            raise
        except Exception as error:
            raise ShardError(
                f"{table}: not what was published: {type(error).__name__}: {error}", "bad_table"
            ) from error

    def check(self, pool: Executor, threads: int, *, decode: bool, as_it_came: bool) -> None:
        """Find which samples are sound.  decode: look into every image, else only where a file is not as published.

        as_it_came: images are stored byte for byte, so that a row's sha256 is that of its image.
        """
        decode = decode or not self.is_whole

        def begin(sample: Sample) -> Any:
            outcome = self.outcomes.get(sample.key)
            return pool.submit(_flaw, sample, outcome, as_it_came) if decode and outcome is not None else None

        found = set()
        samples = in_order(self._read(), begin, lambda s: sum(map(len, s.members.values())), 4 * threads, _AHEAD_BYTES)
        for sample, flaw in samples:
            why = flaw.result() if flaw is not None else sample.problem and ": ".join(sample.problem)
            outcome = self.outcomes.get(sample.key)
            if outcome is None or outcome.status != SUCCESS:
                continue
            if why:
                self.lost[sample.key] = why
            else:
                found.add(sample.key)
                self.outcomes[sample.key] = replace(outcome, suffix=sample.image_suffix or "")
        for key, outcome in self.outcomes.items():
            if outcome.status == SUCCESS and key not in found:
                self.lost.setdefault(key, "its sample is not there")

    def members(self, keys: Collection[str]) -> Iterator[tuple[str, Members]]:
        """The samples of these keys, in order, each byte as it was."""
        for sample in self._read():
            if sample.key in keys and sample.problem is None:
                yield sample.key, sample.members

    def _read(self) -> Iterator[Sample]:
        if self._layout == "webdataset":
            if isinstance(self._tar, RemoteFile) or (self._tar is not None and self._tar.exists()):
                yield from read_samples(self._tar)
            return
        by_key: dict[str, list[str]] = {}
        for path in self._files:
            by_key.setdefault(path.partition("/")[2].partition(".")[0], []).append(path)
        for key, paths in sorted(by_key.items()):
            members = {}
            for path in sorted(paths, key=_images_first):
                try:
                    members[path.rpartition(".")[2]] = (self._output / path).read_bytes()
                except OSError:
                    continue  # its sample lacks it
            yield Sample(key, members, {}, tuple(members))


def _images_first(path: str) -> tuple[bool, str]:
    return path.rpartition(".")[2] not in IMAGE_SUFFIXES, path


def _is_whole(path: Source, entry: Mapping[str, Any]) -> bool:
    """Of an object, as the store tells: it has checked each part that came, and keeps them."""
    if isinstance(path, RemoteFile):
        found = object_at(path).look()
        return found is not None and found.is_of(entry)
    try:
        return bool(path.stat().st_size == entry["size"] and fast_digest(path) == entry["digest"])
    except OSError:
        return False


def _flaw(sample: Sample, outcome: Outcome, as_it_came: bool) -> str | None:
    """Why a stored sample is not what its row says; None for a sound one."""
    suffix = sample.image_suffix
    try:
        sample.check()
        if suffix is None or "json" not in sample.members:
            return "a member is not there"
        data = sample.members[suffix]
        facts = image_facts(data)
        decode_rgb(data)
    except SampleError as error:
        return clean_text(str(error))
    if (facts.width, facts.height) != (outcome.width, outcome.height):
        return f"{facts.width} × {facts.height} pixels, its row says {outcome.width} × {outcome.height}"
    if as_it_came and hashlib.sha256(data).hexdigest() != outcome.sha256:
        return "its sha256 is another"
    return None
