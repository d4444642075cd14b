"""Which exact weights a check loads, found on this machine without loading them and without asking the hub.

A check's model is never fetched by a stage: every process of a run would judge by whatever it got.  ``models fetch``
gets it, and a stage whose model is not there ends with a line that names the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curation import PROGRAM, backends
from curation.errors import InfrastructureError, UsageError, require
from curation.extract.api import ExtractorFamily, packages_of
from curation.extract.settings import ModelSettings, WeightSource, file_revision
from curation.models.hub_cache import cached_commit, public_name, resolve, snapshot
from curation.models.known import Model, find
from curation.models.needs import WeightsBySource, WeightsNeed
from curation.models.weights import MODEL_FILES, OLD_WEIGHTS, cached, hub_parts, is_url

_WEIGHTS = tuple(pattern for pattern in (*MODEL_FILES, *OLD_WEIGHTS) if pattern.endswith((".safetensors", ".bin")))


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that a check is to judge by.

    Attributes:
        check: The check's name.
        flag: The option that names the model.
        directive: What the option says, in the directive's own spelling.
        default: Whether that is the option's default.
        family: The extractors that have the directive.
        stage: The stage whose check it is.
        named_by: What the option says where it names the model only through another one.
    """

    check: str
    flag: str
    directive: str
    default: bool
    family: ExtractorFamily
    stage: str = "03"
    named_by: str = ""

    @property
    def fetch(self) -> str:
        """The command that fetches it."""
        more = "" if self.default else f" --{self.flag} {self.named_by or self.directive}"
        return f"{PROGRAM} models fetch {self.stage} --check {self.check}{more}"

    def require(self) -> None:
        """Look whether the packages that load it are on this machine.

        Raises:
            InfrastructureError: One is missing; the message has the command that installs it.
        """
        require(*packages_of(self.family, self.directive))


@dataclass(frozen=True, slots=True)
class Located:
    """A model that is on this machine.

    Attributes:
        directive: Stage 06's name for it.
        public: The same without a path of this machine, for records.
        revision: The hub's commit, or a digest of its content.
        path: Its file or folder.
    """

    directive: str
    public: str
    revision: str
    path: Path


def wanted(check: str, flag: str, name: str, default: str, family: str) -> Wanted:
    """What an option that names a model asks for.

    Args:
        check: The check's name.
        flag: The option's name.
        name: A directive of stage 06 in any spelling, or the hub id of its weights.
        default: The option's default.
        family: The file in ``curation/backends/extract`` that has the directive.
    """
    kind: ExtractorFamily = backends.load("extract", family)
    known = [Model(d.name, d.source, d.parameters, d.licence) for d in kind.directives if not d.is_prefix]
    prefix, colon, rest = name.partition(":")
    meant = None if colon else find(name, known)
    directive = f"{prefix.strip().lower()}:{rest}" if colon else name if meant is None else meant.short
    return Wanted(check, flag, directive, directive == default, kind)


def locate(model: Wanted, cache: Path) -> Located:
    """Find a model's weights.

    Args:
        model: Which.
        cache: The folder that downloads from URLs stay in.

    Raises:
        UsageError: There is no such directive.
        InfrastructureError: The weights are not on this machine; the message names the command that fetches them.
    """
    source = _source(model, cache)
    path = _file(source, cache) if is_url(source.source) else _folder(model, source)
    if path is None:
        raise InfrastructureError(
            f"--check {model.check}: its model {model.directive} is not on this machine.  `{model.fetch}`, with the "
            "--model or --embedded of the run, fetches it where there is internet"
        )
    prefix, colon, rest = model.directive.partition(":")
    name = rest if Path(rest).expanduser().exists() else rest.partition("@")[0]
    public = f"{prefix}:{public_name(name)}" if colon else model.directive
    if path.is_file():
        return Located(model.directive, public, file_revision(path), path)
    kind = (source.marker, "model of the kind that this directive loads")
    return Located(model.directive, public, resolve(str(path), kind=kind, asked_by=f"--{model.flag}").revision, path)


def weights_of(model: Wanted, cache: Path) -> Sequence[WeightsNeed]:
    """What ``models fetch`` fetches for it.

    Raises:
        UsageError: There is no such directive.
        InfrastructureError: It comes with a package that is not installed.
    """
    source = _source(model, cache)
    return [WeightsBySource(f"--check {model.check}: {model.directive}", source.source, source.sha256, cache)]


def _source(model: Wanted, cache: Path) -> WeightSource:
    try:
        [source] = model.family.sources(model.directive, ModelSettings(cache=cache))
    except UsageError as error:
        raise UsageError(f"--{model.flag} {error}") from None
    except KeyError:
        names = ", ".join(d.name for d in model.family.directives)
        raise UsageError(f"--{model.flag} {model.directive}: no such model; there are {names}") from None
    return source


def _file(source: WeightSource, cache: Path) -> Path | None:
    path = cached(source.source, source.sha256 or "", cache)
    return path if path.is_file() else None


def _folder(model: Wanted, source: WeightSource) -> Path | None:
    own = Path(source.source).expanduser()
    if own.exists():
        return own
    hub_id, revision, _ = hub_parts(f"--{model.flag}", source.source)
    commit = cached_commit(hub_id, revision or "main", source.marker)
    folder = None if commit is None else snapshot(hub_id, commit)
    has_weights = folder is not None and any(True for pattern in _WEIGHTS for _ in folder.glob(pattern))
    return folder if has_weights else None
