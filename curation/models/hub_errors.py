"""What the hub's client raises, turned into one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from curation import PROGRAM
from curation.errors import InfrastructureError
from curation.models.known import Model, find, free_alternative, nearest
from curation.storage.urls import redact

LOG_IN = "`hf auth login`, or HF_TOKEN"  # of huggingface_hub since 0.34
FETCH_FIRST = (
    f"`{PROGRAM} models fetch STAGE` with the same options, where there is internet, downloads it to this machine; "
    "or give a folder"
)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises when the hub or the network fails.  Its HTTP library has changed twice."""
    import huggingface_hub.errors as errors

    transport = getattr(errors, "HTTPError", OSError)
    return (OSError, errors.HfHubHTTPError, errors.EntryNotFoundError, transport)


def hub_error_line(error: BaseException) -> str:
    """The first line of an error that says something, without secrets and short enough for a terminal."""
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def hub_trouble(
    error: BaseException, model: str, revision: str | None = None, *, asked_by: str, known: Sequence[Model] = ()
) -> InfrastructureError:
    """The one line about a model that the hub does not give.

    Args:
        error: What the hub's client raised, or what another library has made of that.
        model: The hub id.
        revision: The branch, tag or commit that was asked for.
        asked_by: What messages call the model: the flag or the directive that names it.
        known: Models with short names, among which other ones are suggested.
    """
    from huggingface_hub import errors

    where = called(asked_by, model)
    for cause in _causes(error):
        if isinstance(cause, errors.GatedRepoError):
            return InfrastructureError(f"{where}: {gated_line(model, known)}")
        if isinstance(cause, errors.RevisionNotFoundError):
            return InfrastructureError(f"{where}: the hub has no revision {revision or 'main'!r} of it")
        if isinstance(cause, errors.RepositoryNotFoundError):
            return InfrastructureError(f"{where}: {_not_found_line(model, known)}")
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            file = str(cause.response.request.url.path).partition("/resolve/")[2].partition("/")[2]
            return InfrastructureError(f"{where}: its repository has no {file or 'such file'}: {_WRONG_KIND}")
        if is_refusal(cause):
            return InfrastructureError(
                f"{where}: the hub refuses the token ({hub_error_line(cause)}).  Give one that may read this model: "
                f"{LOG_IN}"
            )
    gated = also_gated(model, known)
    return InfrastructureError(f"{where}: cannot be fetched: {hub_error_line(error)}; start again to continue{gated}")


_WRONG_KIND = "it is a model of another kind, or its weights are in a format that is not loaded here"


def called(asked_by: str, model: str) -> str:
    """What messages call a model: the flag with the hub id, or a directive that has the hub id in it."""
    return asked_by if asked_by.endswith(model) else f"{asked_by} {model}"


def gated_line(model: str, known: Sequence[Model]) -> str:
    """The advice for a gated model, without the model's name in front."""
    from huggingface_hub import constants

    text = f"gated; accept its licence at {constants.ENDPOINT}/{model}, then give a token of that account: {LOG_IN}"
    if (other := free_alternative(model, known)) is not None:
        return f"{text}.  Or take one that needs no token: --model {other.short} ({other.source}, {other.licence})"
    return text


def also_gated(model: str, known: Sequence[Model]) -> str:
    """What to add where a model cannot be fetched for another reason: that it is gated, if that is known."""
    found = find(model, known)
    return f".  The model is {gated_line(model, known)}" if found is not None and found.gated else ""


def _not_found_line(model: str, known: Sequence[Model]) -> str:
    meant = nearest(model, [one.source for one in known])
    hint = f"  Did you mean {' or '.join(meant)}?" if meant else ""
    return f"no such folder, and the hub shows no such model.{hint}  A private one needs a token ({LOG_IN})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those behind it: libraries wrap what the hub's client raises."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_refusal(error: BaseException) -> bool:
    """Whether the hub has refused what it was asked because of who asks: 401 or 403."""
    return getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
