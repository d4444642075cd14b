"""What stage 06 is asked for: dataset2metadata's YAML as it is, flags that go before it, and the names it may use."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from curation.errors import UsageError
from curation.extract.settings import ModelSettings, Precision, Resize

logger = logging.getLogger("curation")

MAX_YAML_BYTES = 64 << 20  # input_tars may list every shard of a pool


FIELD_TYPES = ("string", "int64", "float64", "bool", "boxes", "json")


@dataclass(frozen=True, slots=True)
class Directive:
    """A name that ``models`` may hold.  family: the backend ``extract_<family>``.  What it gives, where that is known
    without loading it."""

    family: str
    columns: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


def _clip(name: str, family: str = "clip") -> Directive:
    return Directive(family, (f"{name}-score",), (f"{name}-image", f"{name}-text"))


DIRECTIVES: Mapping[str, Directive] = MappingProxyType(
    {
        "oai-clip-vit-b32": _clip("oai-clip-vit-b32"),
        "oai-clip-vit-l14": _clip("oai-clip-vit-l14"),
        "nsfw-detoxify": Directive("toxicity", ("nsfw-detoxify-score",)),
        "nsfw-image-oai-clip-vit-l-14": Directive("clip_head", ("nsfw-image-score",)),
        "aesthetic": Directive("clip_head", ("aesthetic-score",)),
        "faces-scrfd10g": Directive("scrfd", ("face-boxes",)),
        "dedup-isc-ft-v107": Directive("isc", ("dedup-isc-ft-v107-score",), ("dedup-isc-ft-v107-image",)),
        "nudenet": Directive("nudenet", ("nudenet-score", "nudenet-label")),
        "hashes": Directive("hashes", ("phash", "dhash")),
        "language": Directive("language", ("language", "language-probability")),
        "statistics": Directive(
            "statistics",
            ("image-width", "image-height", "image-aspect", "image-bytes", "caption-words", "caption-characters"),
        ),
    }
)


HUB_FAMILIES: Mapping[str, str] = MappingProxyType({"clip": "clip", "siglip": "clip"})  # prefix → family


DATACOMP_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "oai-clip-vit-b32-score": "clip_b32_similarity_score",
        "oai-clip-vit-l14-score": "clip_l14_similarity_score",
        "face-boxes": "face_bboxes",
        "oai-clip-vit-b32-image": "b32_img",
        "oai-clip-vit-b32-text": "b32_txt",
        "oai-clip-vit-l14-image": "l14_img",
        "oai-clip-vit-l14-text": "l14_txt",
        "dedup-isc-ft-v107-score": "dedup",
    }
)


ALL = ("all",)  # of the columns or features that the models give


@dataclass(frozen=True, slots=True)
class Weights:
    """A file, a folder, a hub id (``@revision`` behind it), or a URL with its sha256."""

    source: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """The keys of the YAML, dataset2metadata's first.

    device: ``cpu`` or a GPU's number among the visible ones; None: the one that this process was given.
    postprocess_columns, postprocess_features: ``all`` stands for what the models give, in their order.
    additional_fields: name → type, None where the values tell it.  weights: in place of a directive's own.
    embeddings: of the images that ``dedup-isc-ft-v107`` looks for.
    """

    models: tuple[str, ...]
    input_tars: tuple[str, ...]
    output_metadata_dir: str
    postprocess_columns: tuple[str, ...] = ALL
    postprocess_features: tuple[str, ...] = ()
    additional_fields: Mapping[str, str | None] = field(default_factory=dict)
    nworkers: int | None = None
    batch_size: int = 512
    device: str | int | None = None
    custom_pypath: str | None = None
    reprocess: bool = False
    use_datacomp_keys: bool = False
    tars_per_wds: int = 0
    logging: bool = False
    warn_and_continue: bool = False
    weights: Mapping[str, Weights] = field(default_factory=dict)
    embeddings: Weights | None = None
    feature_dtype: str = "float16"
    compress: bool = False
    dtype: Precision = "auto"
    resize: Resize = "exact"

    def public_name(self, name: str) -> str:
        """What a column or feature is called in the files."""
        return DATACOMP_NAMES.get(name, name) if self.use_datacomp_keys else name


KEYS = tuple(item.name for item in fields(ExtractConfig))


_REQUIRED = ("models", "input_tars", "output_metadata_dir")


def read_config(yml: str | None, flags: Mapping[str, Any]) -> ExtractConfig:
    """The YAML's keys with those of ``flags`` that are not None in their place.

    Raises UsageError that names the file and the key: an unknown one (with the nearest known), one whose value makes
    no sense, one that is missing.
    """
    values: dict[str, Any] = {}
    if yml is not None:
        for key, value in _read_yaml(Path(yml)).items():
            if key not in KEYS:
                raise UsageError(f"{yml}: unknown key {key!r}: {nearest(str(key), KEYS)}")
            values[key] = _parse(f"{yml}: {key}", key, value)
    for key, value in flags.items():
        if value is not None:
            values[key] = _parse(f"--{key}", key, value)
    values = {key: value for key, value in values.items() if value is not None}
    for key in _REQUIRED:
        if not values.get(key):
            raise UsageError(
                f"{yml} has no {key}: give it there or as --{key}" if yml else f"give --{key}, or a --yml that has it"
            )
    return ExtractConfig(**values)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def short_name(directive: str) -> str:
    """What the columns of a model are called: ``clip:organisation/model@revision`` → ``model``."""
    return directive.partition(":")[2].rstrip("/").rpartition("/")[2].partition("@")[0] or directive


def family_of(directive: str) -> str | None:
    """The backend of a directive; None where no backend of this package has it."""
    prefix, colon, rest = directive.partition(":")
    if colon and rest and prefix in HUB_FAMILIES:
        return HUB_FAMILIES[prefix]
    known = DIRECTIVES.get(directive)
    return known.family if known else None


def model_settings(config: ExtractConfig, directive: str, device: str = "cpu", threads: int = 1) -> ModelSettings:
    """How the model of a directive is to be loaded."""
    own, known = config.weights.get(directive), config.embeddings
    return ModelSettings(
        weights=own.source if own else None,
        sha256=own.sha256 if own else None,
        embeddings=known.source if known else None,
        embeddings_sha256=known.sha256 if known else None,
        device=device,
        threads=threads,
        dtype=config.dtype,
        resize=config.resize,
    )


def check_directives(config: ExtractConfig, plugin: Iterable[str] = ()) -> None:
    """Raise UsageError for a directive that neither this package nor the plugin has, or one that is there twice; for
    weights of a directive that is not used."""
    plugin = set(plugin)
    known = {*DIRECTIVES, *plugin, *(f"{prefix}:<hub id or folder>" for prefix in HUB_FAMILIES)}
    for directive in config.models:
        if directive not in plugin and family_of(directive) is None:
            raise UsageError(f"models: unknown directive {directive!r}: {nearest(directive, known)}")
        if config.models.count(directive) > 1:
            raise UsageError(f"models: {directive!r} is there twice")
    for directive in config.weights:
        if directive not in config.models:
            raise UsageError(f"weights: {directive!r} is none of the models: {nearest(directive, config.models)}")


def check_outputs(asked: Sequence[str], key: str, given: Sequence[str]) -> None:
    """Raise UsageError for a name that no model gives, or one that is asked for twice.

    key: ``postprocess_columns`` or ``postprocess_features``."""
    for name in asked:
        if name not in given:
            raise UsageError(f"{key}: {name!r} is given by no model of `models`: {nearest(name, given)}")
        if asked.count(name) > 1:
            raise UsageError(f"{key}: {name!r} is there twice")


def check_names_early(config: ExtractConfig) -> None:
    """``check_outputs`` before anything is loaded, where every model is one whose outputs are known."""
    found = [_known_outputs(directive) for directive in config.models]
    for key, part in (("postprocess_columns", "columns"), ("postprocess_features", "features")):
        asked: tuple[str, ...] = getattr(config, key)
        if asked != ALL and all(known is not None for known in found):
            check_outputs(asked, key, [name for known in found for name in getattr(known, part)])


def _known_outputs(directive: str) -> Directive | None:
    prefix, colon, _ = directive.partition(":")
    if colon and prefix in HUB_FAMILIES:
        name = short_name(directive)
        clip = _clip(name)
        return (
            clip if prefix == "clip" else Directive(clip.family, (*clip.columns, f"{name}-probability"), clip.features)
        )
    known = DIRECTIVES.get(directive)
    return known if known is not None and (known.columns or known.features) else None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--yml {path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_YAML_BYTES:
        raise UsageError(f"--yml {path}: larger than {MAX_YAML_BYTES >> 20} MiB")
    try:
        value = yaml.load(data, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise UsageError(f"--yml {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UsageError(f"--yml {path}: no keys in it")
    return value


class _Loader(yaml.SafeLoader):
    """As safe as that, and a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# ---- the values of single keys; each parser raises ValueError that says what is wanted


def _parse(where: str, key: str, value: Any) -> Any:
    """The value of a key; None for YAML's null, which stands for the default."""
    if value is None:
        return None
    try:
        return _PARSERS[key](value)
    except ValueError as error:
        text = repr(value)
        raise UsageError(f"{where}: {error}, not {text if len(text) < 80 else text[:77] + '...'}") from None


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("wants a list of names")
    return tuple(value)


def _paths(value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value  # commas belong to braces
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError("wants a path or a list of paths")
    return tuple(value)


def _fields(value: Any) -> dict[str, str | None]:
    """``name`` or ``name:type`` each."""
    found: dict[str, str | None] = {}
    for item in _names(value):
        name, colon, kind = item.rpartition(":")
        typed = bool(colon) and kind in FIELD_TYPES
        found[name if typed else item] = kind if typed else None
    return found


def _weights(value: Any) -> dict[str, Weights]:
    if isinstance(value, str):
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        value = {name: source for name, _, source in pairs}
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("wants directive: path, or directive=path with commas between several")
    return {name: _one_weights(source) for name, source in value.items()}


def _one_weights(value: Any) -> Weights:
    """``source``, or ``source#sha256=<64 hex digits>``."""
    if not isinstance(value, str) or not value:
        raise ValueError("wants a path, a hub id, or a URL with #sha256=… behind it")
    source, mark, sha256 = value.rpartition("#sha256=")
    return Weights(source, sha256) if mark else Weights(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("wants a text")
    return value


def _number(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"wants a whole number, at least {least}")
        return value

    return parse


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("wants True or False")
    return value


def _device(value: Any) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        word = value.strip().lower().removeprefix("cuda:")
        if word.isdecimal():
            return int(word)
        if word in ("cpu", "cuda"):
            return "cpu" if word == "cpu" else 0
    raise ValueError("wants cpu or the number of a GPU")


def _one_of(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"wants one of {', '.join(words)}")
        return str(value)

    return parse


_PARSERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "models": _names,
        "input_tars": _paths,
        "output_metadata_dir": _text,
        "postprocess_columns": _names,
        "postprocess_features": _names,
        "additional_fields": _fields,
        "nworkers": _number(0),
        "batch_size": _number(1),
        "device": _device,
        "custom_pypath": _text,
        "reprocess": _truth,
        "use_datacomp_keys": _truth,
        "tars_per_wds": _number(0),
        "logging": _truth,
        "warn_and_continue": _truth,
        "weights": _weights,
        "embeddings": _one_weights,
        "feature_dtype": _one_of("float16", "float32"),
        "compress": _truth,
        "resize": _one_of("exact", "fast"),
        "dtype": _one_of("auto", "float32", "float16", "bfloat16"),
    }
)
