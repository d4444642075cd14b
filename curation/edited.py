"""The edited sample: its json, txt and jpg, a picture's recipe, and which pictures of an earlier run still hold."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from curation.dictionaries import dump_json, parse_json_object
from curation.errors import LostClaim, SampleError, ShardError
from curation.publish import OutputFile
from curation.tar import TarWriter, read_samples

# The fields of a sample that a new picture and text make untrue, kept as curation.original_<field>.
REPLACED_FIELDS = ("caption", "sha256", "face_bboxes", "width", "height")

# What of a `curation` object decides how the picture looks, beside its image model and this stage's version.
RECIPE_FIELDS = (
    "prompt", "prompt_suffix", "negative_prompt", "seed", "steps", "guidance", "text_tokens", "size", "quality",
)  # fmt: skip

# IPTC's term for pictures made by a trained model, where readers look for it: the photo metadata standard's Digital
# Source Type (Iptc4xmpExt), https://iptc.org/std/photometadata/specification.
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
GENERATED_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
).encode()


def edited_metadata(
    original: Mapping[str, Any], curation: Mapping[str, Any], sha256: str, width: int, height: int
) -> dict[str, Any]:
    """The sample's metadata with everything that the new picture and text change, and ``curation`` as its last field.

    original: the source sample's whole metadata; every field stays, in its order.  Where the old picture had a list of
    face boxes, the new one's are not known: null, which readers of DataComp take as just that.
    ``curation`` gains what was there before, as ``original_<field>`` for each field that was there at all; a
    ``curation`` object of an earlier pass is kept inside it as ``previous``.
    sha256: of the new jpg's bytes, hex.  width, height: pixels.
    """
    before = {f"original_{name}": original[name] for name in REPLACED_FIELDS if name in original}
    metadata = {name: value for name, value in original.items() if name != "curation"}
    metadata |= {"caption": curation["prompt"], "sha256": sha256, "width": width, "height": height}
    if "face_bboxes" in metadata:
        metadata["face_bboxes"] = None
    earlier = {"previous": original["curation"]} if "curation" in original else {}
    metadata["curation"] = {**before, **curation, **earlier}
    return metadata


def original_metadata(metadata: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """Undo ``edited_metadata`` where ``stage`` has edited this sample before: loose files hold only the last state."""
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


def recipe(curation: Mapping[str, Any], stage: str) -> list[Any]:
    """What decides the picture, as one comparable value: two samples with the same recipe have the same picture, but
    for the rounding that its batch neighbours cause."""
    models, stages = (curation.get(name) for name in ("models", "stages"))
    image_model = models.get("image") if isinstance(models, dict) else None
    version = stages.get(stage) if isinstance(stages, dict) else None
    return [*(curation.get(name) for name in RECIPE_FIELDS), image_model, version]


def unsafe_key(key: str) -> str:
    """Why a key cannot name a tar member or a file below the output folder; empty where it can."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "an empty, . or .. part"
    if "." in parts[-1]:
        return "a dot in its name, at which WebDataset would cut it"
    if any(ord(char) < 32 or char in "\\\x7f" or "\ud800" <= char <= "\udfff" for char in key):
        return "a control character, a backslash or half a surrogate pair"
    if any(len(part.encode()) > 240 for part in parts) or len(key.encode()) > 1000:
        return "too long"
    return ""


@contextlib.contextmanager
def edits_sink(
    edits: Path, shard_id: str, layout: str, output: Callable[[Path], AbstractContextManager[OutputFile]]
) -> Iterator[Callable[[str, bytes, bytes, bytes], None]]:
    """A function ``add(key, jpg, txt, json)`` for a shard's edited samples, which become one tar or loose files.

    layout: ``tar`` or ``files``.  output: opens a file that is published under the given path.
    Times in the tar are 0: stage 04 takes those of the source's members.
    """
    if layout == "files":

        def add_files(key: str, jpg: bytes, txt: bytes, json: bytes) -> None:
            for suffix, data in (("jpg", jpg), ("txt", txt), ("json", json)):
                try:
                    path = loose_path(edits / shard_id, f"{key}.{suffix}")
                except SampleError as error:
                    raise ShardError(f"{edits / shard_id}: {key}: {error}") from None
                with output(path) as file:
                    file.write(data)

        yield add_files
        return
    with output(edits / f"{shard_id}.tar") as file:
        writer = TarWriter(file)

        def add_members(key: str, jpg: bytes, txt: bytes, json: bytes) -> None:
            for suffix, data in (("jpg", jpg), ("txt", txt), ("json", json)):
                writer.add(f"{key}.{suffix}", data)

        yield add_members
        writer.close()


class EarlierEdits:
    """The edits that an earlier run left for a shard, as a tar or as loose files.

    Each answers for itself: its json records the recipe, and its picture must have the sha256 that the json says.  What
    does not hold, or cannot be read, is made again.
    """

    def __init__(self, edits: Path, shard_id: str) -> None:
        self._tar = edits / f"{shard_id}.tar"
        self._folder = edits / shard_id
        self._matching: dict[str, str] = {}  # key → sha256
        self._stream: Iterator[tuple[str, bytes]] | None = None
        self._passed: dict[str, bytes] = {}

    def matching(self, wanted: Mapping[str, list[Any]], stage: str) -> Mapping[str, str]:
        """Those of ``wanted`` (key → recipe) whose picture is here and whole, with the picture's sha256."""
        try:
            for key, jpg, metadata in self._edits(wanted):
                curation = metadata.get("curation")
                if not isinstance(curation, dict) or recipe(curation, stage) != wanted[key]:
                    continue
                sha256 = hashlib.sha256(jpg).hexdigest()
                if sha256 == metadata.get("sha256"):
                    self._matching[key] = sha256
        except ShardError:  # a tar that breaks off: what came before the break was checked
            pass
        return self._matching

    def jpg(self, key: str) -> bytes:
        """The picture of a matching key.  One pass over the earlier tar, which holds little when asked in its order.

        Raises LostClaim when it is not what it was: another worker has published this shard.
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
        if hashlib.sha256(found).hexdigest() != self._matching[key]:
            raise LostClaim(f"{self._tar} changed while it was read")
        return found

    def _edits(self, keys: Mapping[str, Any]) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
        """(key, jpg, metadata) of the samples in ``keys`` that have both, in the tar's order or that of ``keys``."""
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


def loose_path(folder: Path, name: str) -> Path:
    """``folder/name``, or SampleError ``unsafe_key`` where a link below the folder leads out of it."""
    path = folder / name
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise SampleError("unsafe_key", "a link leads out of the folder")
    return path


def txt_of(prompt: str) -> bytes:
    """The sample's text member: the prompt, without a newline, as DataComp has it."""
    return prompt.encode("utf-8", "replace")


def json_of(metadata: Mapping[str, Any]) -> bytes:
    """The sample's json member."""
    return dump_json(metadata, indent=True)


def _readable(key: str, jpg: bytes, json: bytes) -> Iterator[tuple[str, bytes, Mapping[str, Any]]]:
    try:
        yield key, jpg, parse_json_object(json)
    except SampleError:
        return
