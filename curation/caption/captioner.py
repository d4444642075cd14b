"""What a captioner is: what its file in ``backends/caption/`` declares, how it is called, and what a name means."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from curation.caption.schema import AnswerSchema
from curation.caption.templates import Filled, Template, Values
from curation.errors import InfrastructureError, SampleError
from curation.models.hub_cache import TRANSFORMER, hub_config
from curation.models.known import Model, find, model_of
from curation.models.needs import WeightsNeed
from curation.replies import FIRST, Attempt, Reply
from curation.serving import OwnServers, Waiting
from curation.serving.pool import LONG

Detail = Literal["brief", "detailed", "more_detailed"]
Quantize = Literal["4bit", "8bit"]
Compile = Literal["none", "decode", "all"]
Attention = Literal["auto", "sdpa", "flash"]
Gather = Literal["images", "tensors"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class OutOfMemory(Exception):
    """A batch did not fit on the device.  A smaller one may fit.

    Attributes:
        certain: See ``models.batch_size.Shortage``.
    """

    def __init__(self, message: str = "", *, certain: bool = True) -> None:
        super().__init__(message)
        self.certain = certain


@dataclass(frozen=True, slots=True)
class Family:
    """What the file of a captioner declares.  It holds for all models of the family unless a flag says otherwise.

    Attributes:
        name: The name of the file.
        batch_size: Images captioned at once on the CPU, where ``--batch_size auto`` tries nothing.
        max_tokens: Length of a caption.
        model_types: Of ``config.json``, by which a folder's family is known.
        hub_names: A regular expression for the name of a model on the hub, by which the family of a model that is not
            in ``models`` is known without asking the hub.  It is compared in lower case, with ``-`` for ``_``.
        models: The models that have short names.
        served: Model servers load the model, and it is named ``<family>:<the server's name for it>``.
        chats: Its models answer as in a chat, so that they may refuse, reason or introduce their answer.
        general: It opens models of many types in the same way.  A type that another family has too belongs to that one.
        packages: Modules that it imports when a model is loaded.
    """

    name: str
    batch_size: int
    max_tokens: int
    model_types: tuple[str, ...] = ()
    hub_names: str | None = None
    models: tuple[Model, ...] = ()
    served: bool = False
    chats: bool = True
    general: bool = False
    packages: tuple[str, ...] = ("torch", "transformers", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One of the captions that every image gets.

    Attributes:
        name: Of the caption; "" where an image gets only one.
        template: What the model is asked; None: the family's own words for ``detail``.
        otherwise: What it is asked about a sample that has a value for none of the template's fields, where that would
            make no sense.
        detail: See ``CaptionSettings``, as are the following.
        max_tokens: Length of the caption.
        temperature: How it is sampled.
    """

    name: str = ""
    template: Template | None = None
    otherwise: Template | None = None
    detail: Detail = "more_detailed"
    max_tokens: int | None = None
    temperature: float = 0.0

    @property
    def varies(self) -> bool:
        """Whether it is another text for each sample."""
        return self.template is not None and bool(self.template.fields)

    def fill(self, sample: Values) -> Filled | None:
        """What is asked about a sample; None where it is the same for all."""
        if self.template is None or not self.varies:
            return None
        filled = self.template.fill(sample)
        if self.otherwise is None or {*self.template.fields} - {*filled.empty}:
            return filled
        return replace(self.otherwise.fill(sample), empty=filled.empty)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionSettings:
    """How a captioner is to work: the options of stage 05, which has a flag for each.

    Attributes:
        revision: Branch, tag or commit of a model on the hub.
        schema: The JSON schema by which servers decode; the models of this process cannot.
        prompt: What the model is asked, in place of the family's own words for ``detail``, literally.
        questions: What it is asked about each image, in place of ``prompt``, ``detail``, ``max_tokens`` and
            ``temperature``.
        max_tokens: Length of a caption; None: the family's.
        max_words: How many words the family's own prompt asks for at most; 0: it does not say; None: what fits.
        temperature: 0 takes the likeliest token; above it, each image's seed decides.
        quantize: Keep the language model's weights in 4 or 8 bits.
        offload: What does not fit on the GPU stays in the machine's memory and is moved when it is needed.
        device: ``cpu``, ``cuda:<n>`` or ``xpu:<n>``.
        threads: Threads that compute on the CPU.
        dtype: The name of a torch dtype, or ``auto``.
        compile: ``decode``: keys and values stay in place, and on a GPU each step is one captured graph; ``all``: the
            encoder of the images is compiled too.
        code_beside: The output folder beside whose files compiled code is kept for all workers; None: in torch's own.
        attention: ``sdpa``: torch's, as transformers calls it; ``auto``: the same in fewer calls, where the family has
            that; ``flash``: by the package flash-attn.
        gather: What waits until a batch is complete; with ``tensors`` lengths are padded as before version 0.5.0.
        ports, endpoints, endpoints_dir: Where the model servers are; see ``endpoint_urls`` and ``Registry``.
        own: The servers that the stage starts itself, in place of those.
        timeout_s: Seconds that a server has for one caption.
        load_timeout_s: Seconds that it has to load its model.
        api_key_env: The environment variable with its key, where one is named; see ``read_key``.
        waiting: How long a request is sent again and again.
    """

    revision: str | None = None
    schema: AnswerSchema | None = None
    prompt: str | None = None
    questions: tuple[Question, ...] = ()
    detail: Detail = "more_detailed"
    max_tokens: int | None = None
    max_words: int | None = None
    temperature: float = 0.0
    quantize: Quantize | None = None
    offload: bool = False
    device: str = "cpu"
    threads: int = 1
    dtype: str = "auto"
    compile: Compile = "none"
    code_beside: Path | None = None
    attention: Attention = "auto"
    gather: Gather = "images"
    ports: str = ""
    endpoints: str | None = None
    endpoints_dir: Path | None = None
    own: OwnServers | None = None
    timeout_s: float = 120.0
    load_timeout_s: float = 300.0
    api_key_env: str | None = None
    waiting: Waiting = LONG

    @property
    def asked(self) -> tuple[Question, ...]:
        """The questions about each image, at least one."""
        if self.questions:
            return self.questions
        template = Template.literal(self.prompt) if self.prompt else None
        return (
            Question(template=template, detail=self.detail, max_tokens=self.max_tokens, temperature=self.temperature),
        )


class Inquiry(NamedTuple):
    """A question about one image.

    Attributes:
        number: Of the question among ``CaptionSettings.asked``.
        filled: Its text for the image; None where all images have the same.
    """

    number: int
    filled: Filled | None = None


class Prepared(Protocol):
    """An image as the model takes it, on the host.  All images of a batch have the same ``shape``."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


class CaptionBackend(Protocol):
    """One captioner on one device: an object of the class ``Backend`` in a captioner's file.

    Attributes:
        family: What the file declares.
        name: The model.
        revision: Which version of it; together they say exactly which model it is.
        device_kind: A GPU's name and memory, on which the fitting batch size and the last bits depend.
        asked: What the model is asked in words; "" where it is not.  Of several questions, the first.

    A backend that can ask several questions about an image, or one with fields, takes two more arguments: ``prepare``
    what is asked about this image, and ``caption`` the number of the question, which is the same for all images of a
    batch.  They are left out for a single question without fields.
    """

    family: Family
    name: str
    revision: str
    device_kind: str
    asked: str

    def asked_of(self, number: int) -> str:
        """What the model is asked in words by the question of this number; "" where it is not."""

    @classmethod
    def weights(cls, source: str, revision: str | None) -> WeightsNeed:
        """What has to be on this machine before the model can be loaded without internet.

        Args:
            source: From ``resolve``.
            revision: Branch, tag or commit of a model on the hub.
        """

    def prepare(self, image: Any, inquiry: Inquiry | None = None) -> Any:
        """Turn an image into what the model takes.  It is called in many threads at once.

        A backend may also have ``pack(batch)``, which is called in another thread than ``caption``, and returns the
        same images for the coming call as the device takes them fastest.

        Args:
            image: A Pillow image.
            inquiry: The question and its text for this image; None: the first one, without fields.

        Returns:
            A ``Prepared``.

        Raises:
            SampleError: ``processor_refused``: the model's processor cannot use the image.  ``prompt_too_long`` and
                ``prompt_refused``: the model cannot be asked this.
        """

    def caption(
        self, batch: Sequence[Any], seeds: Sequence[int], attempt: Attempt = FIRST, number: int = 0
    ) -> Sequence[Reply | str | SampleError]:
        """Caption a batch by one call of the device.  It is called from one thread.

        If servers caption, it is called for one image at a time, in many threads at once.

        Args:
            batch: Images from ``prepare`` that have one shape.
            seeds: One for each image, for models that sample.
            attempt: Which request for their captions it is.
            number: Of the question.

        Returns:
            For each image what the model wrote (a text alone is a whole reply), or the reason why there is nothing.

        Raises:
            OutOfMemory: The batch does not fit on the device.
        """

    def close(self) -> None:
        """Release the device."""


def resolve(model: str, families: Mapping[str, Family], revision: str | None = None) -> tuple[Family, str]:
    """Find the family and the source that a value of ``--model`` means.

    The ``model_type`` in the ``config.json`` decides, of a folder and of a model on the hub.  Where the hub's is
    neither in the cache nor to be had, the model's name does.

    Args:
        model: A short name, a hub id, a folder, or ``endpoint:`` and the name that a server has for its model.
        families: By name, as ``curation.backends.families`` finds them.
        revision: Branch, tag or commit of a model on the hub.

    Returns:
        The family, and the hub id, the folder or the server's name for the model.

    Raises:
        InfrastructureError: No family can load it.
    """
    prefix, colon, rest = model.partition(":")
    if colon and prefix in families and families[prefix].served:
        return families[prefix], rest
    name, _ = named(model, families)
    if os.path.isdir(name):
        return _family_of_type(name, _folder_type(name), families), name
    for family in families.values():
        if (known := find(name, family.models)) is not None:
            return family, known.source
    if not _HUB_ID.fullmatch(name):
        raise InfrastructureError(f"--model {name}: there is no such folder (nor is it a hub id, organisation/name)")
    if (config := hub_config(name, revision or "main")) is not None:
        return _family_of_type(name, config.get("model_type"), families), name
    hub_name = name.lower().partition("/")[2].replace("_", "-")
    for family in _special_first(families):
        if family.hub_names is not None and re.search(family.hub_names, hub_name):
            return family, name
    raise InfrastructureError(
        f"--model {name}: the hub does not give its config.json, and its name fits no family ({', '.join(families)}); "
        "give a folder with the model, or try again where there is internet"
    )


def known_models(families: Mapping[str, Family]) -> tuple[Model, ...]:
    """The models of all families that have short names."""
    return tuple(model for family in families.values() for model in family.models)


def named(model: str, families: Mapping[str, Family]) -> tuple[str, str]:
    """The hub id or folder that a value of ``--model`` means, and a line for the log; see ``known.model_of``."""
    prefix, colon, _ = model.partition(":")
    if colon and prefix in families and families[prefix].served:
        return model, ""
    return model_of(model, known_models(families), TRANSFORMER[0])


def _special_first(families: Mapping[str, Family]) -> list[Family]:
    return sorted(families.values(), key=lambda family: family.general)


def _folder_type(folder: str) -> object:
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            return json.load(file)["model_type"]
    except OSError:
        raise InfrastructureError(f"--model {folder}: not the folder of a model (it has no config.json)") from None
    except (ValueError, KeyError, TypeError):
        raise InfrastructureError(f"--model {folder}: its config.json has no model_type") from None


def _family_of_type(model: str, model_type: object, families: Mapping[str, Family]) -> Family:
    for family in _special_first(families):
        if model_type in family.model_types:
            return family
    types = ", ".join(sorted({kind for family in families.values() for kind in family.model_types}))
    raise InfrastructureError(
        f"--model {model}: its model_type is {str(model_type)[:80]!r}; the families here load {types}.  A model server "
        "may have it: --model endpoint:<its name there>"
    )
