"""A dataset card with the audit in it, and a Croissant description, of finished hybrid shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from curation.commands.places import StagePlace
from curation.errors import InfrastructureError
from curation.jsonio import clean_text
from curation.publish.card import write_card
from curation.publish.parts import DATA_FOLDER, collect
from curation.storage.files import write_whole

CARD, CROISSANT = "README.md", "croissant.json"
_BEGIN, _END = "<!-- curation-audit:begin (replaced by `curation audit --card`) -->", "<!-- curation-audit:end -->"
_BLOCK = re.compile(r"<!-- curation-audit:begin.*?" + re.escape(_END), re.S)
_IMAGES, _TEXTS, _METADATA = "images", "texts", "metadata"
_SETS = (
    (_IMAGES, "image/*", ("jpg", "jpeg", "png", "webp")),
    (_TEXTS, "text/plain", ("txt",)),
    (_METADATA, "application/json", ("json",)),
)


_MAX_GROUPS = 200  # in the Croissant file
_LOSSES = {
    "prompt": "samples that got no prompt",
    "image": "samples that got no image",
    "check": "samples that a check rejected",
    "hybrid": "samples that did not reach the hybrid shards",
}


_CONTENTS = {
    _IMAGES: ("sc:ImageObject", "The picture, original or generated."),
    _TEXTS: ("sc:Text", "What the picture shows, or was generated from."),
    _METADATA: ("sc:Text", "JSON; its `curation` describes the origin of an edit."),
}


_KEY: Mapping[str, Any] = {"extract": {"fileProperty": "filename"}, "transform": {"regex": r"^(.*)\.[a-z]+$"}}


# https://docs.mlcommons.org/croissant/docs/croissant-spec.html, version 1.0
_CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def write_cards(
    folder: Path,
    hybrid: StagePlace,
    manifest: Path | None,
    audit: Iterable[str],
    licence: str | None,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> list[Path]:
    """Write the card and the Croissant file into ``folder``; what others wrote in the card stays.

    manifest: ``verify``'s list of SHA-256, which Croissant asks for; without it the shards are a set without digests.
    audit: lines of Markdown.  said: fields for the Croissant file, as ``figures`` gives them.
    """
    found = collect(hybrid.home, hybrid.stage)
    card = folder / CARD
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = card.read_text("utf-8") if card.exists() else ""
        text = write_card(before, found, hybrid.home, hybrid.stage, licence)
        block = "\n".join((_BEGIN, "## Groups", "", *audit, _END))
        if _BLOCK.search(text):
            text = _BLOCK.sub(lambda _: block, text, count=1)
        else:
            text = f"{text.rstrip()}\n\n{block}\n"
        write_whole(card, text.encode())
        described = croissant(hybrid.home.name, found.shards, found.counts["kept"], _digests(manifest), licence) | dict(
            said
        )
        write_whole(folder / CROISSANT, orjson.dumps(described, option=orjson.OPT_INDENT_2) + b"\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InfrastructureError(f"{folder}: the cards cannot be written ({error})") from error
    return [card, folder / CROISSANT]


def figures(result: Mapping[str, Any], findings: Iterable[str]) -> dict[str, Any]:
    """The audit's figures as fields of a Croissant file.

    Args:
        result: Of the audit.
        findings: Sentences about groups.

    Returns:
        ``variableMeasured`` of schema.org, a value with its interval for each group and figure, and ``dataBiases`` of
        Croissant's vocabulary for responsible AI.
    """
    values = []
    for group in result["groups"][:_MAX_GROUPS]:
        for name, loss in group["losses"].items():
            values.append(_figure(group["group"], _LOSSES[name], loss["share"], loss["low"], loss["high"]))
    checked = result["checks"]
    for group in checked["groups"][:_MAX_GROUPS] if checked else ():
        for name, share in group["by_check"].items():
            values.append(_figure(group["group"], f"tries that failed the check {name}", *_shares(share)))
        values.append(_figure(group["group"], "pictures in which the check sees the group", *_shares(group["agreed"])))
        for name, mean in group["scores"].items():
            values.append(_figure(group["group"], f"mean of {name}", mean["mean"], mean["low"], mean["high"]))
    variety = result["variety"]
    for group in variety["generated"]["groups"][:_MAX_GROUPS] if variety else ():
        distance = (group["distance"], group["distance_low"], group["distance_high"])
        values.append(_figure(group["group"], "mean distance of the pictures", *distance))
        values.append(_figure(group["group"], "pictures with a near copy", *_shares(group["near"])))
    for name, part in (("checks of the pictures", checked), ("diversity and near copies", variety)):
        if not part:
            values.append({"@type": "sc:PropertyValue", "name": name, "value": "not measured"})
    return {"variableMeasured": values, "rai:dataBiases": [clean_text(text) for text in findings]}


def _shares(share: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    return share["share"], share["low"], share["high"]


def _figure(group: str, what: str, value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    told: dict[str, Any] = {"@type": "sc:PropertyValue", "name": clean_text(f"{group}: {what}")[:300]}
    told["value"] = "not measured" if value is None else round(value, 6)
    if low is not None and high is not None:
        told |= {"minValue": round(low, 6), "maxValue": round(high, 6)}
    return told


def croissant(name: str, shards: int, count: int, digests: Mapping[str, str], licence: str | None) -> dict[str, Any]:
    """Hybrid shards, where ``publish`` puts them, in the vocabulary of Croissant 1.0.  digests: file name → SHA-256."""
    archives: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": file,
            "name": file,
            "contentUrl": f"{DATA_FOLDER}/{file}",
            "encodingFormat": "application/x-tar",
            "sha256": digest,
        }
        for file, digest in sorted(digests.items())
    ]
    sets = [
        {
            "@type": "cr:FileSet",
            "@id": kind,
            "name": kind,
            "encodingFormat": encoding,
            "includes": [f"*.{suffix}" for suffix in suffixes],
            **({"containedIn": [{"@id": archive["@id"]} for archive in archives]} if archives else {}),
        }
        for kind, encoding, suffixes in _SETS
    ]
    records = []  # a set for each kind of member, which join on the key: its readers know one source a set best
    for kind, _, _ in _SETS:
        held, told = _CONTENTS[kind]
        fields = [
            _field(f"{kind}/key", "sc:Text", kind, _KEY, "The sample's key, which its members share."),
            _field(f"{kind}/content", held, kind, {"extract": {"fileProperty": "content"}}, told),
        ]
        records.append({"@type": "cr:RecordSet", "@id": f"{kind}-records", "name": f"{kind}-records", "field": fields})
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "dataset",
        "description": f"{count:,} image-text samples in {shards:,} WebDataset shards, some with generated pictures.",
        "license": licence or "unknown",
        "distribution": [*archives, *sets],
        "recordSet": records,
    }


def _field(name: str, kind: str, source: str, how: Mapping[str, Any], description: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": name,
        "name": name.rpartition("/")[2],
        "description": description,
        "dataType": kind,
        "source": {"fileSet": {"@id": source}, **how},
    }


def _digests(manifest: Path | None) -> dict[str, str]:
    """Of ``verify``'s manifest: ``<sha256>  <file name>`` a line.  Names that it had to escape are left out."""
    if manifest is None or not manifest.is_file():
        return {}
    found = {}
    for line in manifest.read_text("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        if re.fullmatch(r"[0-9a-f]{64}", digest) and name.endswith(".tar") and clean_text(name) == name:
            found[name] = digest
    return found
