"""Which extractor stands behind each directive of a configuration: a family's, or one of the user's plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from curation.errors import InfrastructureError, UsageError, require
from curation.extract.api import Directive, Extractor, ExtractorFamily
from curation.extract.config import ALL, ExtractConfig, check_outputs, model_settings, nearest
from curation.extract.judging import columns_of, is_judge
from curation.extract.plugins import BuiltIns, Plugin, extractors_of, make_extractor
from curation.extract.settings import ModelSettings, WeightSource, file_revision
from curation.models.hub_cache import TRANSFORMER, folder_digest, resolve
from curation.models.known import Model, find
from curation.models.listing import on_this_machine
from curation.models.needs import NothingToFetch, WeightsBySource, WeightsNeed
from curation.models.weights import cached, is_hub_id, is_url
from curation.serving.pool import LONG

_READ_BY = {".onnx": "onnxruntime", ".pt": "torch", ".pth": "torch"}  # of directives that take several kinds of files
_HUB_ID = "<hub id or folder>"  # what stands behind a prefix, in messages


class Catalogue:
    """The extractors that a configuration may name."""

    def __init__(
        self, families: Iterable[ExtractorFamily], config: ExtractConfig, built_in: BuiltIns | None = None
    ) -> None:
        """Load the plugin, if the configuration has one, and check every directive.

        Args:
            families: Those that have a file in ``curation/backends/extract``.
            config: What the user asks for.
            built_in: What a plugin may name beside its own.

        Raises:
            UsageError: A directive is unknown or there twice, or weights are given for one that is not used.
            InfrastructureError: The plugin cannot be loaded.
        """
        self._known = {directive.name: (family, directive) for family in families for directive in family.directives}
        self._plugin: Mapping[str, Callable[[str, ModelSettings], Any]] = {}
        self.plugin_file: Plugin | None = None
        if config.custom_pypath is not None:
            self.plugin_file = Plugin(str(Path(config.custom_pypath).expanduser().absolute()), built_in)
            self._plugin = extractors_of(self.plugin_file)
        self.waiting = LONG  # how long judges send a request again and again
        self._models = known_models(families)
        self._config = self._by_known_names(config)
        self._check_directives()

    @property
    def config(self) -> ExtractConfig:
        """What the user asks for, with the directives' own spelling."""
        return self._config

    def _by_known_names(self, config: ExtractConfig) -> ExtractConfig:
        models = tuple(map(self._known_name, config.models))
        weights = {self._known_name(name): source for name, source in config.weights.items()}
        dtypes = {self._known_name(name): dtype for name, dtype in config.dtypes.items()}
        return replace(config, models=models, weights=weights, dtypes=dtypes)

    def _known_name(self, directive: str) -> str:
        """The directive that a name in another spelling, or the hub id of its weights, stands for."""
        if directive in self._plugin or directive in self._known:
            return directive
        prefix, colon, rest = directive.partition(":")
        if colon:
            lower = f"{prefix.strip().lower()}:"
            return f"{lower}{rest}" if lower in self._known else directive
        found = find(directive, self._models)
        return directive if found is None else found.short

    def make(self, directive: str, device: str, threads: int) -> Extractor:
        """Load the directive's model.

        Args:
            directive: One of the configuration's.
            device: torch's name of it.
            threads: CPU threads of one session.

        Raises:
            InfrastructureError: The model cannot be loaded.
        """
        settings = replace(model_settings(self._config, directive, device, threads), waiting=self.waiting)
        if directive in self._plugin:
            return make_extractor(self._plugin[directive], directive, settings)
        return self._family(directive)(directive, settings)

    def check_outputs_early(self) -> None:
        """Raise UsageError for a column or feature that no model gives, where that is known without loading one."""
        if self._plugin:
            return
        known = [directive for _, directive in map(self._entry, self._config.models)]
        if not all(directive.columns or directive.features or is_judge(directive.name) for directive in known):
            return
        outputs = [
            ([*columns_of(name, self._config.judges[name].axes)], [])
            if name in self._config.judges
            else directive.outputs(name)
            for directive, name in zip(known, self._config.models, strict=True)
        ]
        for number, key in enumerate(("postprocess_columns", "postprocess_features")):
            asked: tuple[str, ...] = getattr(self._config, key)
            if asked != ALL:
                check_outputs(asked, key, [name for names in outputs for name in names[number]])

    def weights(self) -> list[WeightsNeed]:
        """What the models of the configuration are loaded from.  A plugin's models fetch what they need."""
        needs: list[WeightsNeed] = []
        for directive in self._config.models:
            if directive in self._plugin:
                place = self._config.custom_pypath
                needs.append(NothingToFetch(f"{directive}: of {place}, which fetches what it needs"))
            else:
                needs.append(_DirectiveWeights(self._family(directive), directive, self._settings(directive)))
        return needs

    def require(self) -> None:
        """Look whether the packages that load the configuration's models are on this machine.

        Raises:
            InfrastructureError: One is missing; the message has the command that installs it.
        """
        for directive in self._config.models:
            if directive not in self._plugin:
                family, entry = self._entry(directive)
                sources = family.sources(directive, self._settings(directive))
                named = [source.source.partition("#")[0] for source in sources if not entry.packages]
                read_by = (_READ_BY.get(Path(name).suffix.lower()) for name in named)
                require(*entry.packages, *filter(None, read_by))

    def try_judges(self) -> None:
        """Find the judges' servers, and let go of them again.

        Raises:
            InfrastructureError: No server answers, or one does not have the model.
        """
        for directive in self._config.judges:
            self.make(directive, "cpu", 1).close()

    def identify(self, on_trouble: Callable[[InfrastructureError], None] | None = None) -> dict[str, list[str]]:
        """Which exact weights each directive loads, found without loading them.

        Args:
            on_trouble: Called with what keeps a directive's from being found, which is then left out.

        Returns:
            A line for each of a directive's weights; other weights give another line, wherever they are.

        Raises:
            InfrastructureError: Weights are not here, or the revision of a hub id cannot be found out.
        """
        found = {}
        for directive in self._config.models:
            if directive in self._plugin:
                continue
            try:
                sources = self._family(directive).sources(directive, self._settings(directive))
                found[directive] = [_identify(directive, source) for source in sources]
            except InfrastructureError as error:
                if on_trouble is None:
                    raise
                on_trouble(error)
        return found

    def _settings(self, directive: str) -> ModelSettings:
        return model_settings(self._config, directive)

    def _find(self, directive: str) -> tuple[ExtractorFamily, Directive] | None:
        prefix, colon, rest = directive.partition(":")
        if colon and rest:
            return self._known.get(f"{prefix}:")
        return None if colon else self._known.get(directive)

    def _entry(self, directive: str) -> tuple[ExtractorFamily, Directive]:
        entry = self._find(directive)
        assert entry is not None, f"{directive} was checked"
        return entry

    def _family(self, directive: str) -> ExtractorFamily:
        return self._entry(directive)[0]

    def _check_directives(self) -> None:
        config = self._config
        names = [f"{d.name}{_HUB_ID}" if d.is_prefix else d.name for _, d in self._known.values()]
        names += self._plugin
        for directive in config.models:
            if directive not in self._plugin and self._find(directive) is None:
                hint = f"{nearest(directive, names)}; --list_models shows all of them"
                if is_hub_id(directive):
                    prefixes = " or ".join(f"{name}{directive}" for name in self._known if name.endswith(":"))
                    hint = f"for a model of the hub write {prefixes}"
                raise UsageError(f"models: unknown directive {directive!r}: {hint}")
            if config.models.count(directive) > 1:
                raise UsageError(f"models: {directive!r} is there twice")
        for directive in config.weights:
            if directive not in config.models and not (self._plugin and directive in self._known):
                raise UsageError(f"weights: {directive!r} is none of the models: {nearest(directive, config.models)}")


def known_models(families: Iterable[ExtractorFamily]) -> list[Model]:
    """The directives as ``--list_models`` shows them, but for those that name a hub id behind a prefix."""
    return [
        Model(d.name, d.source, d.parameters, d.licence, _outputs(d), bits=d.bits)
        for family in families
        for d in family.directives
        if not d.is_prefix
    ]


def _outputs(directive: Directive) -> str:
    columns, features = directive.outputs(directive.name)
    return " and ".join([", ".join(columns)] * bool(columns) + ["features"] * bool(features))


def here(families: Iterable[ExtractorFamily], model: Model) -> str:
    """Whether all weights that a directive loads by default are on this machine; see ``listing.Here``."""
    [family] = [family for family in families if any(d.name == model.short for d in family.directives)]
    settings = ModelSettings()
    try:
        sources = family.sources(model.short, settings)
    except InfrastructureError:
        return "no"
    found = [_is_here(source, settings.cache, model) for source in sources]
    return "yes" if set(found) <= {"yes"} else "in part" if {"yes", "in part"} & set(found) else "no"


def _is_here(source: WeightSource, cache: Path, model: Model) -> str:
    if is_url(source.source):
        return "yes" if cached(source.source, source.sha256 or "", cache).is_file() else "no"
    if Path(source.source).expanduser().exists():
        return "yes"
    return on_this_machine(TRANSFORMER[0])(model)


@dataclass(frozen=True, slots=True)
class _DirectiveWeights:
    """What one directive's model is loaded from."""

    family: ExtractorFamily
    directive: str
    settings: ModelSettings

    def fetch(self, *, dry_run: bool) -> None:
        sources: Sequence[WeightSource] = self.family.sources(self.directive, self.settings)
        if not sources:
            print(f"{self.directive}: nothing to fetch")
        for source in sources:
            need = WeightsBySource(self.directive, source.source, source.sha256, self.settings.cache)
            need.fetch(dry_run=dry_run)


def _identify(directive: str, source: WeightSource) -> str:
    if is_url(source.source):
        return f"sha256:{source.sha256}"
    path = Path(source.source).expanduser()
    if path.is_dir():
        return folder_digest(path)
    if path.exists():
        return file_revision(path)
    model, _, revision = source.source.partition("@")
    if is_hub_id(model):
        kind = (source.marker, TRANSFORMER[1])
        return f"{model}@{resolve(model, revision or None, kind=kind, asked_by=directive).revision}"
    if path.is_absolute() or source.source.startswith((".", "~")):
        raise InfrastructureError(
            f"{directive} {source.source}: no such file (nor is it a URL or a hub id, organisation/name)"
        )
    return source.source
