"""The seam of stage 06: what computes scores and features, the inputs that several share, and their order.

An extractor stands behind each directive of ``models``.  Its preparations run ahead of it in processes of their own,
one sample at a time; its ``compute`` takes a batch of what they made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from curation.errors import UsageError
from curation.extract.answers import Answers
from curation.extract.settings import ModelSettings, WeightSource
from curation.libraries import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["float32", "float64", "int64", "bool", "string", "boxes", "hash"]


"""Of a column.  boxes: a list of [x0, y0, x1, y1]; hash: hexadecimal digits."""


Takes = Literal["image", "text", "sample"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the parquet.  needs_image, needs_text: whether a sample without a readable image, or without a
    caption, has null there; None: as the extractor's preparations and needs tell.  counted: a text that begins with a
    word; the receipt says how often each word is there."""

    name: str
    kind: Kind
    needs_image: bool | None = None
    needs_text: bool | None = None
    counted: bool = False


@dataclass(frozen=True, slots=True)
class Feature:
    """A row of ``width`` numbers for each sample, for the npz.  needs_image, needs_text: as of ``Column``, with NaN
    for null."""

    name: str
    width: int
    needs_image: bool | None = None
    needs_text: bool | None = None


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """What a preparation of the kind ``sample`` is given.

    caption: the clean line that stages 01, 02 and 05 work on, None where the sample has none.
    image: as it lies in the shard, empty where there is none.
    size: (width, height) upright, None where the image cannot be read.
    """

    key: str
    metadata: Mapping[str, Any]
    caption: str | None
    image: bytes
    size: tuple[int, int] | None


class Preparation(Protocol):
    """What is made of one sample ahead of the model, in a worker process: a frozen, hashable, picklable dataclass at a
    module's top level.  Equal ones are computed once, whoever asks for them.

    takes: the decoded picture (uint8 RGB, height × width × 3, upright), the caption ("" where there is none), or
    SampleFacts.  Returns an array whose shape and dtype are the same for every sample (a uint8 crop of height × width
    × 3, int32 tokens), or a dict of plain values.  A picture's is not called for an image that cannot be read: the
    array's row is zeros, the dict is empty.  Loads what it needs at the first call (``functools.cache`` at the module's
    top level); imports no torch.  One that takes a second or more for a sample has a number ``at_once``: of samples
    that a process is given together, 16 otherwise.
    """

    @property
    def takes(self) -> Takes: ...

    def __call__(self, given: Any, /) -> NDArray[Any] | dict[str, Any]: ...


@runtime_checkable
class DevicePreparation(Preparation, Protocol):
    """A picture's preparation that a device can compute too, for ``--decode gpu``."""

    def fits_device(self, width: int, height: int) -> bool:
        """Whether a device is given a picture of this size; else the worker process prepares it."""

    def on_device(self, pictures: Sequence[Any], /) -> Any:
        """A row for each picture, as a call of the preparation gives it: with the same numbers, or some by one level.

        pictures: torch tensors of height × width × 3, uint8, on one device.
        """


class Batch(Protocol):
    """Samples of one shard that are computed together.

    readable: which of them have an image that could be read.  What is computed for the others is thrown away, but for
    columns and features that need no image; likewise where there is no caption.
    """

    @property
    def readable(self) -> NDArray[np.bool_]: ...

    @property
    def features(self) -> Mapping[str, Any]:
        """Of the extractors before: arrays or tensors on the device, one row per sample."""

    def __len__(self) -> int: ...

    def prepared(self, preparation: Preparation) -> Any:
        """Stacked: an array with one row per sample, or a list of dicts.  Valid until ``compute`` returns."""

    def device_tensor(self, preparation: Preparation) -> Any:
        """The same array as a torch tensor on the device, transferred once for all extractors of the batch."""

    def beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have a worker process call a function while the device computes the next batch.

        function: at a module's top level, without torch.  arguments: arrays and plain values, which are copied.
        Returns what ``compute`` may give in the place of a column's values: they are what the function returns.
        """


class Extractor(Protocol):
    """One directive of ``models``, on one device.  torch and the like are imported inside the constructor.

    name, revision: exactly which model it is.  needs: features of other extractors that it computes on.  widths: how
    many numbers each of these has to have, where that is fixed.
    compute: called from one thread; raises RuntimeError "out of memory", as torch does, where a batch is too large.
    """

    name: str
    revision: str = "1"
    columns: tuple[Column, ...] = ()
    features: tuple[Feature, ...] = ()
    needs: tuple[str, ...] = ()
    widths: Mapping[str, int] = MappingProxyType({})
    preparations: tuple[Preparation, ...] = ()

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        """What has to be on this machine before it can be loaded.  Default: it has no weights."""
        return []

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """One value per sample for each of its columns (an array, or a list with None for null) and of its features
        (samples × width, an array or a tensor)."""

    def close(self) -> None:
        """Let go of what was loaded."""


class Asker(Extractor):
    """An extractor that asks model servers about each sample, and does not compute here.

    It comes behind all others, because a part of a batch for which memory was short is computed again.

    Attributes:
        asks: How many requests are in flight at most.
        patience_s: How long an answer may take.
        facts: What the tables say of the model beside its name and revision.
    """

    asks: int
    patience_s: float
    facts: Mapping[str, Any]

    @abstractmethod
    def ask(self, batch: Batch, keys: Sequence[str], answers: Answers) -> Mapping[str, Future[list[Any]]]:
        """Begin to ask, and return at once.

        Args:
            batch: The samples.
            keys: Of the samples.
            answers: About the samples of the shard: what is recorded there is not asked again.

        Returns:
            For each column its values, one per sample.
        """

    @abstractmethod
    def adaptations(self) -> dict[str, list[str]]:
        """How servers are asked that refused the usual request, by name, for receipts."""

    @abstractmethod
    def doing(self) -> str:
        """What requests wait for; empty for nothing (``Stage.doing``)."""

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        """Nothing is computed here."""
        raise NotImplementedError(f"{self.name} asks servers")


class PreparedColumns(Extractor):
    """An extractor whose preparation has computed everything: a dict with the columns' values for each sample."""

    preparation: ClassVar[Preparation]

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        self.name = directive
        self.preparations = (self.preparation,)

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        found = batch.prepared(self.preparation)
        return {column.name: [row.get(column.name) for row in found] for column in self.columns}


@dataclass(frozen=True, slots=True)
class Directive:
    """A name that ``models`` may hold, and what its extractor computes, as far as that is known without loading it.

    Attributes:
        name: The whole directive; or, ending in a colon, the prefix of every directive that names a hub id or a folder
            behind it (``clip:organisation/model``).
        columns: Names of its columns.  ``{}`` stands for the model's name: the directive itself, or the last part of
            the hub id or folder.
        features: Names of its features, likewise.
        source: The hub id of its weights, or where they come from in a few words; "" where it has none.
        licence: Of the weights.
        parameters: How many the weights have, in thousand millions; 0 where they are no network.
        bits: Of one parameter on a GPU.
        needs: The directives whose features it computes on.
        packages: Modules that its extractor imports, beside those that every program of the project needs.
    """

    name: str
    columns: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    parameters: float = 0.0
    bits: float = 32
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def is_prefix(self) -> bool:
        return self.name.endswith(":")

    def outputs(self, directive: str) -> tuple[list[str], list[str]]:
        """The names of the columns and of the features that the directive's extractor computes."""
        name = short_name(directive)
        return [column.format(name) for column in self.columns], [feature.format(name) for feature in self.features]


class ExtractorFamily(Protocol):
    """What the ``Backend`` class of a file in ``curation/backends/extract`` is: it makes extractors.

    Attributes:
        directives: The names that it has extractors for.
    """

    directives: tuple[Directive, ...]

    def __call__(self, directive: str, settings: ModelSettings) -> Extractor:
        """Load the model of one of its directives.

        Raises:
            InfrastructureError: Its weights are not there, or are of another network.
        """

    def sources(self, directive: str, settings: ModelSettings) -> list[WeightSource]:
        """What has to be on this machine before the directive's model can be loaded; empty where it has no weights.

        Raises:
            InfrastructureError: The user has to name the weights.
        """


def packages_of(family: ExtractorFamily, directive: str) -> tuple[str, ...]:
    """The modules that the extractor of a directive imports; none where the family has no such directive."""
    names = (directive, f"{directive.partition(':')[0]}:")
    return next((known.packages for known in family.directives if known.name in names), ())


def short_name(directive: str) -> str:
    """What the columns of a model are called: ``clip:organisation/model@revision`` → ``model``."""
    return directive.partition(":")[2].rstrip("/").rpartition("/")[2].partition("@")[0] or directive


def order(extractors: Sequence[Extractor], directives: Sequence[str] = ()) -> list[Extractor]:
    """The extractors with each behind those whose features it needs, and those that ask servers behind all others;
    else as they were given.

    Args:
        extractors: In the order of the configuration.
        directives: What each of them is called there, for messages; several may be one model.  Default: the models'.

    Raises:
        UsageError: It names a cycle, a feature that nobody gives or that has another width than the one who needs it
            takes, or a name that two give.
    """
    called = {id(e): name for e, name in zip(extractors, directives or [e.name for e in extractors], strict=True)}
    giver: dict[str, Extractor] = {}
    for extractor in extractors:
        for name in (*(c.name for c in extractor.columns), *(f.name for f in extractor.features)):
            other = giver.setdefault(name, extractor)
            if other is not extractor:
                raise UsageError(
                    f"{called[id(other)]} and {called[id(extractor)]} both give {name!r}: leave one of them out"
                )
    features = {feature.name: feature.width for extractor in extractors for feature in extractor.features}
    for extractor in extractors:
        for name in extractor.needs:
            if name not in features:
                raise UsageError(
                    f"{called[id(extractor)]} needs the feature {name!r}, which no model of `models` gives"
                )
            wanted = getattr(extractor, "widths", {}).get(name, features[name])  # a plugin's may have none
            if features[name] != wanted:
                raise UsageError(
                    f"{called[id(extractor)]} takes {wanted} numbers of {name!r}, and {called[id(giver[name])]} gives "
                    f"{features[name]}: one of the two has weights for another model"
                )
    placed: list[Extractor] = []

    def place(extractor: Extractor, trail: tuple[Extractor, ...]) -> None:
        if any(extractor is passed for passed in trail):
            names = [called[id(e)] for e in (*trail[trail.index(extractor) :], extractor)]
            raise UsageError(f"these models need one another's features: {' → '.join(names)}")
        if not any(extractor is done for done in placed):
            for name in extractor.needs:
                place(giver[name], (*trail, extractor))
            placed.append(extractor)

    for extractor in extractors:
        place(extractor, ())
    return sorted(placed, key=lambda extractor: isinstance(extractor, Asker))


def dependents(extractors: Sequence[Extractor], takes: Literal["image", "text"]) -> frozenset[str]:
    """The names of the columns and features that a sample without a readable image, or without a caption, has no value
    of.  extractors: in ``order``."""
    found: set[str] = set()
    for extractor in extractors:
        inferred = any(p.takes == takes for p in extractor.preparations) or not found.isdisjoint(extractor.needs)
        outputs: list[Column | Feature] = [*extractor.columns, *extractor.features]
        for output in outputs:
            told = output.needs_image if takes == "image" else output.needs_text
            if inferred if told is None else told:
                found.add(output.name)
    return frozenset(found)
