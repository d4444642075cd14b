"""A first look at captions: a trial on a few images, and the captions of two runs side by side.

The comparison is one HTML page without any other file.  Captions come from the open web and from models, so the page
shows them as text, whatever is in them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from curation.caption.rows import named_columns, parse_rows, rows_path
from curation.captioned.adopted import COLUMN_PREFIX
from curation.errors import InfrastructureError, SampleError, ShardError, install
from curation.images import decode_rgb, encode_jpeg
from curation.jsonio import clean_text
from curation.libraries import Image, np
from curation.shards import Shard
from curation.storage.urls import Source
from curation.tar.samples import USUAL, Parts, image_of, problem_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES, TarScan

PAGE_NAME = "compare.html"
MAX_PAIRS = 200  # on one page: thumbnails of 10 to 20 kB each
THUMBNAIL = 256  # pixels
MAX_OTHER_BYTES = 16 << 30

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Captions side by side</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; }
td, th { border-top: 1px solid #ccc; padding: .6em; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; white-space: pre-line; }
.key { color: #666; font-size: 12px; }
.same { color: #666; }
</style>
</head>
<body>
<h1>Captions side by side</h1>
<p>{{ pairs | length }} of {{ total }} images that both have; {{ same }} captions on this page are alike.</p>
<table>
<tr><th>Image</th><th>{{ mine }}</th><th>{{ theirs }}</th><th>In the source</th></tr>
{% for pair in pairs %}
<tr{% if pair.left == pair.right %} class="same"{% endif %}>
<td>{% if pair.image %}<img alt="" src="data:image/jpeg;base64,{{ pair.image }}">{% endif %}
<div class="key">{{ pair.shard }}/{{ pair.key }}</div></td>
<td>{{ pair.left }}</td><td>{{ pair.right }}</td><td>{{ pair.original }}</td>
</tr>
{% endfor %}
</table>
</body>
</html>
"""


def write_comparison(output: Path, shards: Sequence[Shard], other: Path, parts: Parts = USUAL) -> Path:
    """Write ``compare.html``: the first images that two runs have both captioned, with both captions.

    Args:
        output: The folder of this run, where the page is written.
        shards: The shards of this run.
        other: The ``captions.jsonl`` of another run.
        parts: Which member of a sample is its picture.

    Returns:
        The path of the page.

    Raises:
        InfrastructureError: ``other`` is no such file, the page cannot be written, or jinja2 is missing.
    """
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise InfrastructureError(f"--compare needs jinja2 ({error}): {install('jinja2')}") from None
    theirs = _captions(other)
    pairs: list[dict[str, Any]] = []
    total = 0
    model = ""
    sources = {shard.id: shard.path for shard in shards}
    for shard_id in sorted(sources):
        rows = {row["key"]: row for row in _rows(output, shard_id) if (shard_id, row["key"]) in theirs}
        total += len(rows)
        chosen = dict(list(rows.items())[: MAX_PAIRS - len(pairs)])
        images = dict(_thumbnails(sources[shard_id], set(chosen), parts)) if chosen else {}
        for key, row in chosen.items():
            model = f"{row['model']} ({row['revision']})"
            pair = {"shard": shard_id, "key": key, "image": images.get(key, ""), "left": all_captions(row)}
            pairs.append(pair | {"right": theirs[shard_id, key], "original": row["original_caption"]})
    template = Environment(autoescape=True).from_string(_PAGE)
    same = sum(pair["left"] == pair["right"] for pair in pairs)
    page = output / PAGE_NAME
    text = template.render(pairs=pairs, total=total, same=same, mine=model or "this run", theirs=str(other))
    try:
        page.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InfrastructureError(f"{page}: cannot be written ({error.strerror})") from None
    return page


def all_captions(row: Mapping[str, Any]) -> str:
    """The caption of a row or of a line of ``captions.jsonl``; of several each on a line of its own, with its name."""
    columns = named_columns(row) if isinstance(row.get("captions"), dict) else row
    failed = columns.get("captions_failed")
    if not isinstance(failed, dict):
        return str(row.get("caption", ""))
    told = []
    for name, reason in failed.items():
        text = columns.get(f"{COLUMN_PREFIX}{name}")
        told.append(f"{name}: {text if text is not None else f'(none: {reason})'}")
    return "\n".join(told)


def _rows(output: Path, shard_id: str) -> Iterator[dict[str, Any]]:
    path = rows_path(output, shard_id)
    if path.is_file():
        yield from parse_rows(path.read_bytes(), path)


def _captions(path: Path) -> dict[tuple[str, str], str]:
    """(shard, key) → captions of a ``captions.jsonl``.  Raises InfrastructureError where it is something else."""
    try:
        if path.stat().st_size > MAX_OTHER_BYTES:
            raise InfrastructureError(f"--compare {path}: larger than {MAX_OTHER_BYTES:,} bytes")
        data = path.read_bytes()
        rows = list(parse_rows(data, path))
        return {(str(row["tar_file"]).removesuffix(".tar"), str(row["key"])): all_captions(row) for row in rows}
    except (OSError, ShardError, KeyError) as error:
        raise InfrastructureError(f"--compare {path}: not a captions.jsonl ({error})") from None


def _thumbnails(source: Source, keys: set[str], parts: Parts) -> Iterator[tuple[str, str]]:
    """The images of some samples as small JPEGs in base64.  Those that cannot be decoded are left out."""
    for sample in read_samples(source, IMAGE_SUFFIXES.__contains__, parts=parts):
        if sample.problem or sample.key not in keys:
            continue
        keys.discard(sample.key)
        try:
            image = Image.fromarray(decode_rgb(image_of(sample), at_least=THUMBNAIL))
        except SampleError:
            continue
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        yield sample.key, base64.b64encode(encode_jpeg(np.asarray(image), 80)).decode("ascii")
        if not keys:
            return


def first_images(shards: Sequence[Shard], count: int, parts: Parts = USUAL) -> dict[str, int]:
    """How many images of each shard belong to the first ``count`` images of all shards.

    It depends on the shards alone, so that any number of workers agree.

    Returns:
        Numbers of images by shard id, without the shards that have none of them.  A shard that cannot be read has none.
    """
    limits: dict[str, int] = {}
    for shard in shards:
        if count <= 0:
            break
        found = min(count, _images(shard.path, count, parts))
        if found:
            limits[shard.id] = found
            count -= found
    return limits


def _images(path: Source, enough: int, parts: Parts) -> int:
    found = 0
    try:
        for window in TarScan(path).windows():
            for span in window.spans:
                has_image = parts.picture([member.suffix for member in span.members]) is not None
                found += bool(span.key) and has_image and problem_of(span) is None
            if found >= enough:
                break
    except ShardError:
        return 0
    return found


def show_trial(output: Path, shard_ids: Sequence[str]) -> None:
    """Print the captions of the shards of a trial, and where its output is."""
    for shard_id in shard_ids:
        path = rows_path(output, shard_id)
        if path.is_file():
            for row in parse_rows(path.read_bytes(), path):
                told = all_captions(row).replace("\n", "\n  ")
                print(f"{shard_id}/{clean_text(row['key'])} ({row['width']}×{row['height']}): {told}")
    print(f"everything of the trial is in {output}")
