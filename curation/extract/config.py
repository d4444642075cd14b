"""What stage 06 is asked for: dataset2metadata's YAML as it is, flags that go before it, and the names it may use."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from curation.cluster import Allocation, visible_gpus, workers_for_gpus
from curation.errors import UsageError
from curation.extract import judging
from curation.extract.judging import JudgeSettings, is_judge, parse_judge
from curation.extract.settings import Decode, ModelSettings, Precision, Resize, WeightSource
from curation.options import items_in, plain_path, plain_source
from curation.shards import Shard, discover

logger = logging.getLogger("curation")

MAX_YAML_BYTES = 64 << 20  # input_tars may list every shard of a pool


FIELD_TYPES = ("string", "int64", "float64", "bool", "boxes", "json")


# What DataComp's published metadata calls these columns and features.  It has no other names for other models.
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


PRECISIONS: tuple[str, ...] = get_args(Precision)
ALL = ("all",)  # of the columns or features that the models give


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """The keys of the YAML, dataset2metadata's first.

    device: ``cpu`` or a GPU's number among the visible ones; None: the one that this process was given.
    dtypes: directive → the precision that its entry of ``models`` gives it, in place of ``dtype``.
    judge: keys of all judges.  judges: directive → its settings, where its entry of ``models`` goes before ``judge``.
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
    weights: Mapping[str, WeightSource] = field(default_factory=dict)
    embeddings: WeightSource | None = None
    feature_dtype: str = "float16"
    compress: bool = False
    dtype: Precision = "auto"
    resize: Resize = "exact"
    dtypes: Mapping[str, Precision] = field(default_factory=dict)
    decode: Decode = "cpu"
    judge: Mapping[str, Any] = field(default_factory=dict)
    judges: Mapping[str, JudgeSettings] = field(default_factory=dict)

    @property
    def precision(self) -> str | dict[str, str]:
        """What the models compute in, as the folder's options record it: one word, or also those of directives."""
        return {"": self.dtype, **self.dtypes} if self.dtypes else self.dtype

    @property
    def carried_fields(self) -> dict[str, str | None]:
        """The additional fields without uid and key, which are the first columns whether they are asked for or not."""
        return {name: kind for name, kind in self.additional_fields.items() if name not in ("uid", "key")}

    def input_shards(self, *, allow_pipe: bool) -> list[Shard]:
        """The shards of every entry of ``input_tars``, by id.

        Args:
            allow_pipe: Whether entries may be commands (``pipe:``).

        Raises:
            UsageError: Two different files are one shard.
        """
        return discover(self.input_tars, allow_pipe=allow_pipe, begun=(Path(self.output_metadata_dir),))

    def processes(self, workers: int, num_gpus: int | None, gpus: str | None, *, device_is_flag: bool) -> int:
        """How many processes to start on this machine: one for each GPU, unless ``device`` says which one.

        Args:
            workers: ``--workers``.
            num_gpus: ``--num_gpus``.
            gpus: ``--gpus``.
            device_is_flag: Whether ``device`` comes from a flag and not from the YAML.

        Raises:
            UsageError: The flag names a GPU that this machine does not have.
        """
        if num_gpus is not None or gpus is not None or self.device is None:
            return workers_for_gpus(workers, num_gpus, gpus, device="cpu" if self.device == "cpu" else None)
        if isinstance(self.device, int) and self.device >= (count := visible_gpus()):
            if count or device_is_flag:
                raise UsageError(f"device {self.device}: {count} GPUs can be seen here; --device cpu does without")
            logger.warning(f"device: {self.device} in the YAML, but no GPU can be seen here: on the CPU")
        return workers

    def torch_device(self, allocation: Allocation) -> str:
        """torch's name of a process's device.  ``device`` counts for a lone process; several have a GPU each.

        Raises:
            InfrastructureError: GPUs were promised to this process, and it sees none.
        """
        given = allocation.device("cpu" if self.device == "cpu" else None)
        lone = allocation.world == 1 and isinstance(self.device, int)
        return f"{given.partition(':')[0]}:{self.device}" if lone and given != "cpu" else given

    def public_name(self, name: str) -> str:
        """What a column or feature is called in the files."""
        return DATACOMP_NAMES.get(name, name) if self.use_datacomp_keys else name


# Without what the entries of ``models`` say.
KEYS = tuple(item.name for item in fields(ExtractConfig) if item.name not in ("dtypes", "judges"))
FLAGS = MappingProxyType({"input_tars": "input", "output_metadata_dir": "output"})  # all others are named as their keys


_REQUIRED = ("input_tars", "output_metadata_dir", "models")


def read_config(yml: str | None, flags: Mapping[str, Any], *, folders: bool = True) -> ExtractConfig:
    """The YAML's keys with those of ``flags`` that are not None in their place.

    Args:
        yml: The file, if there is one.
        flags: Key → value.
        folders: Whether the source shards and the output folder must be named.  Who only asks for the models' weights
            needs neither.

    Raises:
        UsageError: Names the file and the key: an unknown one (with the nearest known), one whose value makes no sense,
            one that is missing.
    """
    values: dict[str, Any] = {}
    if yml is not None:
        for key, value in _read_yaml(Path(yml)).items():
            if key not in KEYS:
                raise UsageError(f"{yml}: unknown key {key!r}: {nearest(str(key), KEYS)}")
            values[key] = _parse(f"{yml}: {key}", key, value)
    for key, value in flags.items():
        if value is not None and (folders or key not in _REQUIRED[:2]):
            values[key] = _parse(f"--{FLAGS.get(key, key)}", key, value)
    values = {key: value for key, value in values.items() if value is not None}
    if not folders:
        values = {"input_tars": (), "output_metadata_dir": "", **values}
    if missing := [key for key in (_REQUIRED if folders else _REQUIRED[-1:]) if not values.get(key)]:
        names = _listed([f"--{FLAGS.get(key, key)}" for key in missing])
        it = "it" if len(missing) == 1 else "them"
        if yml:
            raise UsageError(f"{yml} has no {_listed(missing)}: give {it} there or as {names}")
        raise UsageError(f"give {names}, or a --yml that has {it}")
    models = values.pop("models")
    dtypes = {name: keys["dtype"] for name, keys in models if keys.get("dtype") is not None}
    judges = _judges(yml, models, values.get("judge", {}))
    return ExtractConfig(models=tuple(name for name, _ in models), dtypes=dtypes, judges=judges, **values)


def _judges(
    yml: str | None, models: Iterable[tuple[str, Mapping[str, Any]]], common: Mapping[str, Any]
) -> dict[str, JudgeSettings]:
    """The settings of each judge among the models.

    Raises:
        UsageError: They make no sense, or there is no judge that ``common`` could be meant for.
    """
    found: dict[str, JudgeSettings] = {}
    giver: dict[str, str] = {}
    for name, keys in models:
        if is_judge(name):
            try:
                found[name] = parse_judge(common, keys)
                for column in judging.columns_of(name, found[name].axes):
                    if (other := giver.setdefault(column, name)) != name:
                        raise ValueError(f"gives the column {column}, as {other} does: rename one of them, or an axis")
            except ValueError as error:
                raise UsageError(f"{f'{yml}: ' if yml else ''}{name}: {error}") from None
    if common and not found:
        raise UsageError("judge: none of the models is a judge: add judge to the models, or leave this key out")
    return found


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"there {'are' if known else 'is'} {', '.join(known) or 'none'}"


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
        dtype=config.dtypes.get(directive, config.dtype),
        resize=config.resize,
        judge=config.judges.get(directive),
    )


def check_outputs(asked: Sequence[str], key: str, given: Sequence[str]) -> None:
    """Raise UsageError for a name that no model gives, or one that is asked for twice.

    key: ``postprocess_columns`` or ``postprocess_features``."""
    for name in asked:
        if name not in given:
            raise UsageError(f"{key}: {name!r} is given by no model of `models`: {nearest(name, given)}")
        if asked.count(name) > 1:
            raise UsageError(f"{key}: {name!r} is there twice")


def _read_yaml(path: Path) -> dict[str, Any]:
    from curation.storage.yaml_files import read_yaml

    value = read_yaml("--yml", path, MAX_YAML_BYTES)
    if not isinstance(value, dict):
        raise UsageError(f"--yml {path}: no keys in it")
    return value


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
        raise ValueError("needs a list of names")
    return tuple(value)


def _directives(value: Any) -> tuple[str, ...]:
    return _names(items_in(value) if isinstance(value, str) else value)


def _models(value: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Directives, each with its own keys if it has some: an entry of a list is a name, or ``name: {dtype: …}``."""
    entries = value if isinstance(value, list | tuple) else _directives(value)
    return tuple(map(_model, entries))


def _model(entry: Any) -> tuple[str, Mapping[str, Any]]:
    name: Any = entry
    keys: Any = {}
    if isinstance(entry, dict) and len(entry) == 1:
        [(name, keys)] = entry.items()
    if not isinstance(name, str) or not name:
        raise ValueError("needs a list of names, or `name: {dtype: …}`")
    if is_judge(name.strip().lower()):
        name = name.strip().lower()
        try:
            return name, _judge(keys)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not isinstance(keys, dict) or set(keys) - {"dtype"}:
        raise ValueError(f"{name}: behind a directive may be {{dtype: …}} and no other key")
    dtype = keys.get("dtype")
    if dtype is not None and dtype not in PRECISIONS:
        raise ValueError(f"{name}: dtype needs one of {', '.join(PRECISIONS)}")
    return name, keys


def _judge(value: Any) -> Mapping[str, Any]:
    """Keys of a judge, in the YAML or as text: ``{model: …, endpoints: …}``."""
    if isinstance(value, str):
        from curation.storage.yaml_files import parse_yaml

        value = parse_yaml("judge", value.encode("utf-8", "replace"))
    if not isinstance(value, dict):
        raise ValueError("needs keys: {model: …, endpoints: …}")
    for key in value:
        if key not in judging.KEYS:
            raise ValueError(f"has no key {str(key)[:60]!r}: {nearest(str(key), judging.KEYS)}")
    return judging.with_one_name(value)


def _paths(value: Any) -> tuple[str, ...]:
    value = [value] if isinstance(value, str) else value  # commas belong to braces
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError("needs a path or a list of paths")
    return tuple(plain_source("input_tars", name) for name in value)


def _fields(value: Any) -> dict[str, str | None]:
    """``name`` or ``name:type`` each."""
    found: dict[str, str | None] = {}
    for item in _names(value):
        name, colon, kind = item.rpartition(":")
        typed = bool(colon) and kind in FIELD_TYPES
        found[name if typed else item] = kind if typed else None
    return found


def _weights(value: Any) -> dict[str, WeightSource]:
    if isinstance(value, str):
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        value = {name: source for name, _, source in pairs}
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("needs directive: path, or directive=path separated by commas")
    return {name: _one_weights(source) for name, source in value.items()}


def _one_weights(value: Any) -> WeightSource:
    """``source``, or ``source#sha256=<64 hex digits>``."""
    if not isinstance(value, str) or not value:
        raise ValueError("needs a path, a hub id, or a URL followed by #sha256=…")
    source, mark, sha256 = value.rpartition("#sha256=")
    return WeightSource(source, sha256) if mark else WeightSource(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("needs a text")
    return value


def _path(value: Any) -> str:
    return plain_path("", _text(value))


def _number(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"needs a whole number, at least {least}")
        return value

    return parse


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("needs True or False")
    return value


def _device(value: Any) -> str | int | None:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        word = value.strip().lower().removeprefix("cuda:").removeprefix("xpu:")
        if word.isdecimal():
            return int(word)
        if word == "auto":
            return None
        if word in ("cpu", "cuda", "xpu"):
            return "cpu" if word == "cpu" else 0
    raise ValueError("needs cpu or the number of a GPU, or auto")


def _one_of(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"needs one of {', '.join(words)}")
        return str(value)

    return parse


_PARSERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "models": _models,
        "input_tars": _paths,
        "output_metadata_dir": _path,
        "postprocess_columns": _directives,
        "postprocess_features": _directives,
        "additional_fields": _fields,
        "nworkers": _number(0),
        "batch_size": _number(1),
        "device": _device,
        "custom_pypath": _path,
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
        "decode": _one_of("cpu", "gpu"),
        "dtype": _one_of(*PRECISIONS),
        "judge": _judge,
    }
)
