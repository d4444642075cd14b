"""The dataset card: what the parts of a stage hold, in two blocks of a README that others edit.

One block is in the metadata, one in the text.  Everything outside of them stays as it is, byte for byte, and the same
parts give the same card.  That is why ``huggingface_hub.DatasetCard`` is not used to write it: it formats the whole
metadata again, without the owner's comments and without the marks of the block.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from curation.errors import InfrastructureError, SampleError, ShardError
from curation.jsonio import clean_text, dump_json, parse_json
from curation.publish.parts import DATA_FOLDER, Collection, Part
from curation.storage.files import read_record
from curation.tar.samples import read_samples

_BEGIN, _END = "<!-- curation:begin", "<!-- curation:end -->"
_META_BEGIN, _META_END = "# curation:begin", "# curation:end"
_BLOCK = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END), re.S)
_META_BLOCK = re.compile(rf"^{_META_BEGIN}.*?^{_META_END}[^\n]*(?:\n|\Z)", re.S | re.M)
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)((?<=\n)|\r?\n)---[ \t]*(?:\r?\n|\Z)", re.S)
_MARKDOWN = re.compile(r"[&<>|`*_\[\]()#!~\\$^{}@:]")
_LOADED = (".parquet", ".jsonl", ".tar")  # what the hub shows and `datasets` loads, the first of them that there is
# The types of stage 05's rows.  `datasets` would take them from the first file, where a column may be null in all rows,
# and `extra` holds whatever the sources' json have, so that no two files need agree; as a text every file has it.
_ROW_TYPES: dict[str, Any] = {
    **dict.fromkeys(("key", "shard", "url", "uid", "caption", "original_caption"), "string"),
    **dict.fromkeys(("width", "height", "original_width", "original_height"), "int64"),
    **dict.fromkeys(("sha256", "image_sha256"), "string"),
    "image_size": ["int64"],
    **dict.fromkeys(("model", "revision"), "string"),
    "watermark_score": "float64",
    "extra": "string",
}
# Rows have these too where a prompt has fields, where an image gets several captions, or where the answer is JSON.  Not
# every row has each.
_SOME_ROWS: dict[str, Any] = dict.fromkeys(
    ("captioned_as", "captions", "captions_failed", "captions_from", "asked", "answer"), "string"
)
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")  # the hub's bounds, by tens
_MAX_COLUMNS, _MAX_LINE_BYTES, _MAX_VALUE = 200, 8 << 20, 300
LICENCE_UNKNOWN = "unknown"


def write_card(existing: str, found: Collection, home: Path, stage: str, licence: str | None = None) -> str:
    """Write the card.

    Args:
        existing: The card that is there, "" where there is none.
        found: The parts, and what their receipts count.
        home: The stage's output folder.
        stage: The stage's name.
        licence: One of the hub's ids; without it the one of an earlier call, else ``unknown``.  A licence outside of
            the blocks goes before it.

    Returns:
        The whole text.

    Raises:
        InfrastructureError: The card's metadata are not YAML.
    """
    front = _FRONT.match(existing)
    metadata = front[1] + front[2] if front else ""
    body = existing[front.end() :] if front else existing
    before = _META_BLOCK.search(metadata)
    theirs_text = _META_BLOCK.sub("", metadata)
    theirs = _parse(theirs_text)
    licence = licence or (_parse(before[0]).get("license") if before else None) or LICENCE_UNKNOWN
    groups = _groups(found)
    ours = {
        "license": licence,
        "size_categories": [_size_category(found.counts["kept"])],
        "configs": _configs(groups),
        "dataset_info": _dataset_info(groups),
    }
    ours = {name: value for name, value in ours.items() if name not in theirs and value}
    lines = yaml.safe_dump(ours, sort_keys=False, allow_unicode=True) if ours else ""
    marked = f"{_META_BEGIN} (replaced at each upload)\n{lines}{_META_END}\n"
    if before:
        metadata = metadata[: before.start()] + marked + metadata[before.end() :]
    else:
        metadata = theirs_text + ("" if theirs_text.endswith("\n") or not theirs_text else "\n") + marked
    block = _block(found, groups, home, stage)
    if not existing.strip():
        body = f"\n# {_escape(PurePosixPath(home.name).name or stage)}\n\n{block}\n"
    elif _BLOCK.search(body):
        body = _BLOCK.sub(lambda _: block, body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{block}\n" if body.strip() else f"\n{block}\n"
    return f"---\n{metadata.lstrip() if not front else metadata}---\n{body}"


def _parse(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = clean_text(str(error).splitlines()[0]) if str(error) else "?"
        raise InfrastructureError(f"the metadata of the card (README.md) are no YAML ({first}): mend them") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InfrastructureError("the metadata of the card (README.md) are no mapping: mend them")
    return value


def _groups(found: Collection) -> dict[str, list[Part]]:
    """The parts by their kind: ``data/*.parquet`` → its parts in order."""
    groups: dict[str, list[Part]] = defaultdict(list)
    for path in sorted(found.parts):
        pure = PurePosixPath(path)
        folder = pure.parts[0] if len(pure.parts) == 2 else f"{pure.parts[0]}/*"
        groups[f"{folder}/*{pure.suffix}"].append(found.parts[path])
    return dict(groups)


def _configs(groups: Mapping[str, Sequence[Part]]) -> list[dict[str, Any]]:
    """A configuration for each folder of tables, all of one kind: the hub's viewer reads only one per repository."""
    for suffix in _LOADED:
        globs = [glob for glob in groups if glob.endswith(f"/*{suffix}") and glob.count("/") == 1]
        globs.sort(key=lambda glob: (not glob.startswith(f"{DATA_FOLDER}/"), glob))
        if globs:
            names = ["default", *(glob.partition("/")[0] for glob in globs[1:])]
            return [
                {"config_name": name, "data_files": [{"split": "train", "path": glob}]}
                for name, glob in zip(names, globs, strict=True)
            ]
    return []


def _dataset_info(groups: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
    """The columns' types, where the tables are stage 05's rows; parquet has types of its own, and tars need none."""
    configs = _configs(groups)
    tables = [groups[config["data_files"][0]["path"]] for config in configs]
    if len(tables) != 1 or tables[0][0].file.suffix != ".jsonl":
        return {}
    columns = set(_columns(tables[0]))
    if not _ROW_TYPES.keys() <= columns or columns - _ROW_TYPES.keys() - _SOME_ROWS.keys():
        return {}
    more = _SOME_ROWS if "captions" in columns else {name: kind for name, kind in _SOME_ROWS.items() if name in columns}
    features = [
        {"name": name, "list": kind[0]} if isinstance(kind, list) else {"name": name, "dtype": kind}
        for name, kind in (_ROW_TYPES | more).items()
    ]
    return {"config_name": configs[0]["config_name"], "features": features}


def _size_category(samples: int) -> str:
    power = next((power for power in range(len(_SIZES)) if samples < 1000 * 10**power), len(_SIZES))
    if power == len(_SIZES):
        return f"n>{_SIZES[-1]}"
    return f"{_SIZES[power - 1]}<n<{_SIZES[power]}" if power else f"n<{_SIZES[0]}"


def _block(found: Collection, groups: Mapping[str, Sequence[Part]], home: Path, stage: str) -> str:
    counts = found.counts
    lines = [
        f"{_BEGIN} (replaced at each upload: write above or below) -->",
        "## What is here",
        "",
        f"**{counts['kept']:,}** samples in {found.shards:,} shards, of {counts['in']:,} that were read "
        f"({counts['dropped']:,} left out by the options, {counts['failed']:,} failed), made by the stage "
        f"{_code(stage)}.",
        "",
        "| files | number | size | columns |",
        "|---|---:|---:|---|",
    ]
    for glob, parts in groups.items():
        size = f"{sum(part.size for part in parts) / 1e6:,.1f} MB"
        columns = ", ".join(map(_code, _columns(parts)))
        lines.append(f"| {_code(glob)} | {len(parts):,} | {size} | {columns} |")
    options = _options(found, home, stage)
    if options:
        lines += ["", "## How it was made", "", "| option | value |", "|---|---|"]
        lines += [f"| {_code(name)} | {_escape(value)} |" for name, value in options]
    lines += [
        "",
        "The licence in the metadata is what the owner of this repository says of it. The models that are named here "
        "and what the samples were made from have licences of their own, which bind too.",
        _END,
    ]
    return "\n".join(lines)


def _columns(parts: Sequence[Part]) -> list[str]:
    """The columns of the first part; none where it cannot be read."""
    part = parts[0]
    try:
        names = _READERS.get(part.file.suffix, lambda _: [])(part.file)
    except (OSError, ValueError, SampleError, ShardError, ImportError, zipfile.BadZipFile):
        return []
    return [str(name) for name in names[:_MAX_COLUMNS]]


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_schema(path).names)  # its errors are OSError and ValueError


def _jsonl_columns(path: Path) -> list[str]:
    with open(path, "rb") as file:
        value = parse_json(file.readline(_MAX_LINE_BYTES), _MAX_LINE_BYTES)
    return list(value) if isinstance(value, dict) else []


def _tar_columns(path: Path) -> list[str]:
    for sample in read_samples(path, lambda suffix: True):
        return list(sample.members)
    return []


def _npz_columns(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


_READERS = {".parquet": _parquet_columns, ".jsonl": _jsonl_columns, ".tar": _tar_columns, ".npz": _npz_columns}


def _options(found: Collection, home: Path, stage: str) -> list[tuple[str, str]]:
    """The options that decided the output, models among them, as the newest epoch of the receipts recorded them."""
    if not found.epochs:
        return []
    record = read_record(home / "_receipts" / stage / f"_epoch.{max(found.epochs)}.json")
    options = (record or {}).get("options")
    if not isinstance(options, dict):
        return []
    return [(str(name), _shown(value)) for name, value in sorted(options.items()) if value is not None]


def _shown(value: Any) -> str:
    """A value on one line.  Of a path only the name is shown: the rest says nothing to others, or too much."""
    text = value if isinstance(value, str) else dump_json(value).decode()
    text = clean_text(Path(text).name if text.startswith(("/", "~/")) else text)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def _escape(text: str) -> str:
    """Text from data and options as Markdown that shows just this text."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", clean_text(text))


def _code(text: str) -> str:
    return f"<code>{_escape(text)}</code>"
