"""The edits of a shard: for each edited sample a jpg, a txt and a json, in one tar or as loose files.

An **edit** is all three together.  Anything less is no edit: stage 01 may have left a lone json, and a generator that
was killed may have left a jpg without its text.  ``EditWriter`` writes edits, an ``EditReader`` reads them by key, and
``PreviousEdits`` are those of an earlier run that may be kept.  ``OriginalMetadata`` is what the samples' json said
before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Callable, Collection, Iterator, KeysView, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any, Protocol, Self

import xxhash

from curation.errors import LostClaim, SampleError, ShardError
from curation.jsonio import KEY_SUFFIX, clean_text, dump_json, parse_json_object, read_dictionary
from curation.storage.files import AtomicFile, fast_digest
from curation.tar.samples import MAX_MEMBER_BYTES, TarWriter, problem_of, read_samples
from curation.tar.scan import TarReport, TarScan
from curation.tar.splice import Edit

# The fields of a sample that are wrong for the new image and text; they are kept as curation.original_<field>.
REPLACED_FIELDS = ("caption", "sha256", "face_bboxes", "width", "height")

# The fields of `curation` that determine the image, besides its model and the stage's version.
RECIPE_FIELDS = (
    "prompt", "prompt_suffix", "negative_prompt", "seed", "steps", "guidance", "text_tokens", "size", "quality",
)  # fmt: skip
# Later ones.  A sample without them has the recipe that it always had.
LATER_RECIPE_FIELDS = ("true_cfg_scale", "prompt_shortened", "compile")
# What checks of the picture said; absent where nothing was checked.
CHECK_FIELDS = ("check", "tries", "round", "checks")

# IPTC's term for images made by a trained model, in the field where readers expect it: Digital Source Type of the photo
# metadata standard (Iptc4xmpExt), https://iptc.org/std/photometadata/specification.
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


GENERATED_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
).encode()


# ---- what an edit says


def edited_metadata(
    original: Mapping[str, Any],
    curation: Mapping[str, Any],
    sha256: str,
    width: int,
    height: int,
    boxes: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
    """The sample's metadata, updated for the new image and text, with ``curation`` as its last field.

    original: the source sample's whole metadata; every field stays, in its order.
    boxes: the faces of the new image, if somebody has looked for them.  Without, a list of face boxes becomes null,
    because the new image's faces are unknown; readers of DataComp understand null in this way.
    ``curation`` gets the earlier value of each changed field that existed, as ``original_<field>``; the ``curation``
    object of an earlier pass is kept inside it as ``previous``.
    sha256: that of the new jpg's bytes, in hex.  width, height: in pixels.
    """
    before = {f"original_{name}": original[name] for name in REPLACED_FIELDS if name in original}
    metadata = {name: value for name, value in original.items() if name != "curation"}
    metadata |= {"caption": curation["prompt"], "sha256": sha256, "width": width, "height": height}
    if boxes is not None:
        metadata["face_bboxes"] = boxes
    elif "face_bboxes" in metadata:
        metadata["face_bboxes"] = None
    earlier = {"previous": original["curation"]} if "curation" in original else {}
    metadata["curation"] = {**before, **curation, **earlier}
    return metadata


def original_metadata(metadata: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """Undo ``edited_metadata`` if ``stage`` has edited this sample: loose files hold only the last state."""
    curation = metadata.get("curation")
    if not isinstance(curation, dict) or stage not in (curation.get("stages") or {}):
        return metadata
    restored = {name: value for name, value in metadata.items() if name != "curation"}
    for name in REPLACED_FIELDS:
        if f"original_{name}" in curation:
            restored[name] = curation[f"original_{name}"]
        else:
            restored.pop(name, None)
    if "previous" in curation:
        restored["curation"] = curation["previous"]
    return restored


def recipe(curation: Mapping[str, Any], stage: str, *, any_round: bool = False) -> list[Any]:
    """Everything that determines the image, as one comparable value.  Samples with the same recipe have the same image,
    except for rounding differences that depend on the other images of the batch.

    any_round: The recipe of all tries of the sample: without the round in which this one was made.
    """
    models, stages = (curation.get(name) for name in ("models", "stages"))
    image_model = models.get("image") if isinstance(models, dict) else None
    version = stages.get(stage) if isinstance(stages, dict) else None
    later = [[name, curation[name]] for name in LATER_RECIPE_FIELDS if curation.get(name) is not None]
    if curation.get("round") and not any_round:  # the first round is what there was before there were rounds
        later.append(["round", curation["round"]])
    return [*(curation.get(name) for name in RECIPE_FIELDS), image_model, version, *later]


def txt_of(prompt: str) -> bytes:
    """The sample's text member: the prompt without a newline, as in DataComp."""
    return prompt.encode("utf-8", "replace")


def json_of(metadata: Mapping[str, Any]) -> bytes:
    """The sample's json member."""
    return dump_json(metadata, indent=True)


# ---- the inputs of an edit


def unsafe_key(key: str) -> str:
    """Why a key cannot name a tar member or a file below the output folder; empty if it can."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "an empty, . or .. part"
    if "." in parts[-1]:
        return "a dot in its name, where WebDataset would cut it"
    if any(ord(char) < 32 or char in "\\\x7f" or "\ud800" <= char <= "\udfff" for char in key):
        return "a control character, a backslash or half a surrogate pair"
    if any(len(part.encode()) > 240 for part in parts) or len(key.encode()) > 1000:
        return "too long"
    return ""


def checked_prompt(key: str, prompt: object) -> str:
    """The prompt as one line of text.  Raises SampleError if it is not text, or if the key cannot name a file."""
    if problem := unsafe_key(key):
        raise SampleError("unsafe_key", problem)
    if not isinstance(prompt, str):
        raise SampleError("prompt_not_text", f"it is a {type(prompt).__name__}")
    if not (text := clean_text(prompt)):
        raise SampleError("empty_prompt")
    return text


def with_suffix(prompt: str, suffix: str) -> str:
    """The prompt for the model: a suffix that begins with punctuation follows directly, a word after a space."""
    return f"{prompt}{'' if not suffix or suffix[0] in ' ,.;:' else ' '}{suffix}"


def read_provenance(path: Path) -> dict[str, Mapping[str, Any]]:
    """key → the line that the previous stage recorded about its prompt; empty if the prompts were made elsewhere."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
    found: dict[str, Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json_object(line, keep_surrogates=True)
        except SampleError as error:
            raise ShardError(f"{path}, line {number}: {error}") from None
        found[str(record.get("key", ""))] = record
    return found


class OriginalMetadata:
    """The original metadata of a shard's samples: ``edits/<shard>.json``, or else loose ``edits/<shard>/<key>.json``.

    stage: the stage that edits; a loose file may already contain its edit, which is then undone.
    Raises ShardError if neither exists.
    """

    def __init__(self, edits: Path, shard_id: str, stage: str) -> None:
        self._dictionary, self._folder, self._stage = edits / f"{shard_id}.json", edits / shard_id, stage
        self._known: Mapping[str, Any] | None = None
        if self._dictionary.exists():
            self._known = read_dictionary(self._dictionary)
        elif not self._folder.is_dir():
            raise ShardError(
                f"no metadata of the samples: neither {self._dictionary} nor {self._folder}/ exists; give the folder "
                "that stage 01 wrote as --edits"
            )

    def find(self, key: str) -> Mapping[str, Any]:
        """The metadata of a key that ``unsafe_key`` accepts.  Raises SampleError if there is none."""
        found = self._loose(key) if self._known is None else self._known.get(key + KEY_SUFFIX)
        if found is None:
            raise SampleError("no_metadata", f"{self._dictionary.name} has no entry")
        if not isinstance(found, dict):
            raise SampleError("bad_metadata", f"a {type(found).__name__} in {self._dictionary.name}")
        return found

    def _loose(self, key: str) -> Mapping[str, Any]:
        try:
            data = loose_path(self._folder, key + KEY_SUFFIX).read_bytes()
            return original_metadata(parse_json_object(data), self._stage)
        except OSError as error:
            raise SampleError("no_metadata", error.strerror or "") from error
        except SampleError as error:
            raise SampleError("bad_metadata", str(error)) from None


# ---- writing


EDIT_PARTS = ("jpg", "txt", "json")


_ROW = Struct("6q")


class EditWriter:
    """Writes the edits of a shard, as one tar or as loose files; a context manager.

    Times in the tar are 0, because stage 04 uses the times of the source's members.

    Args:
        edits: The folder of all shards' edits.
        shard_id: The shard.
        layout: ``tar`` or ``files``.
        output: Opens a file that is published under the given path.
    """

    def __init__(
        self, edits: Path, shard_id: str, layout: str, output: Callable[[Path], AbstractContextManager[AtomicFile]]
    ) -> None:
        self._path, self._folder = edits / f"{shard_id}.tar", edits / shard_id
        self._is_tar, self._output = layout != "files", output
        self._opened = contextlib.ExitStack()
        self._tar: TarWriter | None = None

    def __enter__(self) -> Self:
        if self._is_tar:
            self._tar = TarWriter(self._opened.enter_context(self._output(self._path)))
        return self

    def add(self, key: str, jpg: bytes, txt: bytes, json: bytes) -> None:
        """Write one edited sample.  Raises ShardError if its key cannot name files below the folder."""
        for suffix, data in zip(EDIT_PARTS, (jpg, txt, json), strict=True):
            if self._tar is not None:
                self._tar.add(f"{key}.{suffix}", data)
                continue
            try:
                path = loose_path(self._folder, f"{key}.{suffix}")
            except SampleError as error:
                raise ShardError(f"{self._folder}: {key}: {error}") from None
            with self._output(path) as file:
                file.write(data)

    def __exit__(self, *exc_info: object) -> None:
        if self._tar is not None and exc_info[0] is None:
            self._tar.close()
        self._opened.__exit__(*exc_info)  # type: ignore[arg-type]


def loose_path(folder: Path, name: str) -> Path:
    """Return ``folder/name``; raises SampleError ``unsafe_key`` if a link below the folder leads out of it."""
    path = folder / name
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise SampleError("unsafe_key", "a link leads out of the folder")
    return path


# ---- reading


class EditReader(Protocol):
    """Reads the edits of one shard by key; a context manager.

    Attributes:
        incomplete: How many keys have a jpg, but not all three files.
    """

    incomplete: int

    def keys(self) -> KeysView[str]: ...

    def read(self, key: str) -> Edit:
        """Read one edit.  Raises ShardError if it cannot be read, or is not what was published."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


class TarEditReader:
    """Edits in a tar, in any order: one pass finds their offsets, and each edit is read on request.

    Args:
        path: The tar.
        digest: The digest of the whole file according to its receipt, if it has one.

    Raises:
        ShardError: The file has another digest, is damaged, or has two edits of one key, so that an edit could be
            lost without notice.
    """

    def __init__(self, path: Path, digest: str | None = None) -> None:
        self._path = path
        if digest is not None and fast_digest(path) != digest:
            raise ShardError(f"{path}: is not what its receipt says; generate this shard's images again")
        self.incomplete = 0
        self._rows: dict[str, int] = {}
        self._places = array("q")  # for each edit, offset and size of its jpg, txt and json: 1 MB for 10,000
        report = TarReport()
        tar = TarScan(path, report, ahead=False)
        for window in tar.windows():
            for span in window.spans:
                if span.torn or span.repeated:
                    raise ShardError(f"{path}: {_short(span.key)}: {span.torn or 'two edits of one key'}")
                members = {member.suffix: member for member in span.members}
                if not members.keys() >= {*EDIT_PARTS}:
                    self.incomplete += "jpg" in members
                    continue
                if problem := problem_of(span):
                    raise ShardError(f"{path}: {_short(span.key)}: {problem[0]}: {problem[1]}")
                self._rows[span.key] = len(self._rows)
                if max(member.size for member in span.members) > MAX_MEMBER_BYTES:
                    raise ShardError(f"{path}: {_short(span.key)}: a member of more than {MAX_MEMBER_BYTES:,} bytes")
                for part in EDIT_PARTS:
                    self._places.append(members[part].data)
                    self._places.append(members[part].size)
        if report.damages or report.missing_end:
            raise ShardError("; ".join(report.warnings()))
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def keys(self) -> KeysView[str]:
        return self._rows.keys()

    def read(self, key: str) -> Edit:
        jpg, jpg_size, txt, txt_size, json, json_size = _ROW.unpack_from(self._places, _ROW.size * self._rows[key])
        begin = min(jpg, txt, json)
        size = max(jpg + jpg_size, txt + txt_size, json + json_size) - begin
        data = memoryview(os.pread(self._descriptor, size, begin))  # the three are adjacent
        if len(data) < size:
            raise ShardError(f"{self._path}: changed while it was read")
        return Edit(data[jpg - begin :][:jpg_size], data[txt - begin :][:txt_size], data[json - begin :][:json_size])

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class LooseEditReader:
    """Edits as ``<key>.jpg``, ``<key>.txt`` and ``<key>.json`` below one folder; keys may contain subfolders.

    Args:
        folder: The folder.
        published: The files that count, with size and digest; None if all files count, because they were made
            elsewhere.
    """

    def __init__(self, folder: Path, published: dict[str, tuple[int, str]] | None) -> None:
        self._folder = folder
        self._published = published
        found: dict[str, set[str]] = {}
        for name in published if published is not None else _files_below(folder):
            key, _, suffix = name.rpartition(".")
            if suffix in EDIT_PARTS:
                found.setdefault(key, set()).add(suffix)
        complete = sorted(key for key, parts in found.items() if len(parts) == len(EDIT_PARTS))
        self.incomplete = sum("jpg" in parts for parts in found.values()) - len(complete)
        self._keys = dict.fromkeys(complete)

    def keys(self) -> KeysView[str]:
        return self._keys.keys()

    def read(self, key: str) -> Edit:
        jpg, txt, json = (self._read(f"{key}.{part}") for part in EDIT_PARTS)
        return Edit(jpg, txt, json)

    def _read(self, name: str) -> bytes:
        try:
            path = loose_path(self._folder, name)
            with open(path, "rb") as file:
                data = file.read(MAX_MEMBER_BYTES + 1)
        except OSError as error:
            raise ShardError(f"{self._folder / name}: cannot be read ({error.strerror})") from error
        except SampleError as error:
            raise ShardError(f"{self._folder / name}: {error.detail}") from None
        if len(data) > MAX_MEMBER_BYTES:
            raise ShardError(f"{path}: more than {MAX_MEMBER_BYTES:,} bytes")
        if self._published is not None and self._published[name] != (len(data), xxhash.xxh3_128_hexdigest(data)):
            raise ShardError(f"{path}: is not what its receipt says; generate this shard's images again")
        return data

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


def _files_below(folder: Path) -> Iterator[str]:
    """Yield paths relative to ``folder``, with one listing per folder; links to folders are not followed."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise ShardError(f"{folder}: cannot be listed ({error.strerror})") from error

    for place, _, names in os.walk(folder, onerror=fail):
        below = os.path.relpath(place, folder)
        yield from names if below == "." else (f"{below}/{name}" for name in names)


def _short(key: str) -> str:
    return clean_text(key)[:200]


# ---- the edits of an earlier run that are still valid


@dataclass(frozen=True, slots=True)
class KeptEdit:
    """An edit of an earlier run whose image may be kept.

    Attributes:
        sha256: Of the image, in hex.
        checked: ``CHECK_FIELDS`` of its json's ``curation``, those that it has.
        record: What the checks recorded of themselves, if the image was checked.
        boxes: Its json's ``face_bboxes``.
        group: That it was made for, as its ``curation`` says.
    """

    sha256: str
    checked: Mapping[str, Any]
    record: Any = None
    boxes: Any = None
    group: Any = None


class PreviousEdits:
    """The edits that an earlier run left for a shard, as a tar or as loose files.

    An edit is kept if its json records the wanted recipe and its image has the sha256 in the json.  All others, and
    those that cannot be read, are made again.
    """

    def __init__(self, edits: Path, shard_id: str) -> None:
        self._tar = edits / f"{shard_id}.tar"
        self._folder = edits / shard_id
        self._matching: dict[str, KeptEdit] = {}
        self._stream: Iterator[tuple[str, bytes]] | None = None
        self._passed: dict[str, bytes] = {}

    def matching(
        self, wanted: Mapping[str, list[Any]], stage: str, *, any_round: bool = False
    ) -> Mapping[str, KeptEdit]:
        """Those of ``wanted`` (key → recipe) whose image exists and is intact.

        any_round: Whether any of a sample's tries will do.
        """
        try:
            for key, jpg, metadata in self._edits(wanted):
                curation = metadata.get("curation")
                if not isinstance(curation, dict) or recipe(curation, stage, any_round=any_round) != wanted[key]:
                    continue
                sha256 = hashlib.sha256(jpg).hexdigest()
                if sha256 == metadata.get("sha256"):
                    checked = {name: curation[name] for name in CHECK_FIELDS if name in curation}
                    record = curation["models"].get("checks") if checked else None
                    boxes, group = metadata.get("face_bboxes"), curation.get("group")
                    self._matching[key] = KeptEdit(sha256, checked, record, boxes, group)
        except ShardError:  # the tar ends early; the edits before that point were checked
            pass
        return dict(self._matching)

    def pictures(self, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """(key, image) of some matching keys, in one pass over the earlier tar.

        Raises LostClaim if an image has changed, because another worker has published this shard.
        """
        wanted, found = dict.fromkeys(keys), 0
        try:
            for key, jpg, _ in self._edits(wanted) if wanted else ():
                self._check(key, jpg)
                found += 1
                yield key, jpg
        except ShardError:
            pass
        if found < len(wanted):
            raise LostClaim(f"{self._tar} changed while it was read")

    def keep(self, keys: Collection[str]) -> None:
        """Only these matching keys are asked for from now on; the images of others are not read into memory."""
        self._matching = {key: edit for key, edit in self._matching.items() if key in keys}

    def jpg(self, key: str) -> bytes:
        """The image of a matching key.  The earlier tar is read in one pass; calls in its order need little memory.

        Raises LostClaim if the image has changed, because another worker has published this shard.
        """
        if self._stream is None:
            self._stream = ((name, jpg) for name, jpg, _ in self._edits(self._matching))
        try:
            while key not in self._passed:
                name, jpg = next(self._stream)
                self._passed[name] = jpg
        except (StopIteration, ShardError):
            raise LostClaim(f"{self._tar} changed while it was read") from None
        found = self._passed.pop(key)
        self._check(key, found)
        return found

    def _check(self, key: str, jpg: bytes) -> None:
        if hashlib.sha256(jpg).hexdigest() != self._matching[key].sha256:
            raise LostClaim(f"{self._tar} changed while it was read")

    def _edits(self, keys: Mapping[str, Any]) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
        """Yield (key, jpg, metadata) of the samples in ``keys`` that have both, in the order of the tar or ``keys``."""
        if self._tar.is_file():
            for sample in read_samples(self._tar, want=("jpg", "json")):
                if sample.key in keys and not sample.problem and sample.members.keys() >= {"jpg", "json"}:
                    yield from _readable(sample.key, bytes(sample.members["jpg"]), bytes(sample.members["json"]))
        elif self._folder.is_dir():
            for key in keys:
                try:
                    jpg = loose_path(self._folder, f"{key}.jpg").read_bytes()
                    json = loose_path(self._folder, f"{key}.json").read_bytes()
                except (OSError, SampleError):
                    continue
                yield from _readable(key, jpg, json)


def _readable(key: str, jpg: bytes, json: bytes) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
    try:
        yield key, jpg, parse_json_object(json)
    except SampleError:
        return
