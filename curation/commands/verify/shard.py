"""``verify`` of one shard: the proof of its bytes, its edits, and what the stages counted."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

from curation import PROGRAM
from curation.captioned.rows import CaptionsOfShard
from curation.commands.findings import Findings
from curation.commands.verify.conservation import (
    Record,
    check_count,
    check_keys,
    check_outputs,
    names_to_keys,
    provenance_lines,
    read_stage,
)
from curation.commands.verify.edited_samples import original_problems, self_problems
from curation.commands.verify.explain import explain
from curation.commands.verify.tries import Mark, check_caption_tries, check_mark, check_tries
from curation.edits import EditReader, LooseEditReader, TarEditReader
from curation.errors import InfrastructureError, SampleError, ShardError, UsageError
from curation.images import encoders
from curation.jsonio import KEY_SUFFIX, MAX_SAMPLE_JSON_BYTES, clean_text, read_dictionary
from curation.reshard.captions import CAPTIONS_STAGE, ROWS, CaptionSource
from curation.reshard.fitting import Fitting, ImageSuffix
from curation.reshard.mix import CAPTIONS_NOTE, Mix, Mixer
from curation.run.inputs import published_below
from curation.run.records import is_there, place_of
from curation.shards import Shard, home_of
from curation.tar.prove import Proof, prove_splice
from curation.tar.samples import AUTO, PLAIN
from curation.tar.scan import SampleSpan, TarScan, Window
from curation.tar.splice import Action, DecidedWindow, Decision, Edit, Neighbours

# The stages of the main job, whose receipts are compared with one another.
CAPTIONS, PROMPTS, EDITS, HYBRID = "01_filter_noface", "02_captions_processor", "03_generate_images", "04_reshard"

REMEDIES: Final[Mapping[str, str]] = {
    "missing_shard": "run stage 04 for it: 04_reshard.py --shards <shard>",
    "extra_shard": "move it out of the hybrid folder: the source has no such shard",
    "lost_sample": "run stage 04 again for the shard: --rerun --shards <shard>",
    "doubled_sample": "run stage 04 again for the shard: --rerun --shards <shard>",
    "unknown_sample": "run stage 04 again for the shard: --rerun --shards <shard>",
    "wrong_order": "run stage 04 again for the shard: --rerun --shards <shard>",
    "other_encoder": "run verify with the software that stage 04 used, or stage 04 again with the software here",
    "bytes_differ": "run stage 04 again for the shard (--rerun --shards <shard>), and check the disk that contained it",
    "wrong_members": "run stage 04 again for the shard: --rerun --shards <shard>",
    "wrong_caption": "run stage 04 again for the shard: --rerun --shards <shard>",
    "not_the_edit": "run stage 04 again for the shard: --rerun --shards <shard>",
    "readers_differ": "run stage 04 again for the shard: --rerun --shards <shard>",
    "damaged_tar": f"run stage 04 again for the shard; `{PROGRAM} fsck` lists its undamaged samples",
    "stale": "run the first stage in the message again, without --rerun: it processes the changed inputs",
    "stale_prompt": "run stages 03 and 04 again: they process the changed prompts",
    "edit_without_sample": "the edits belong to another dataset, or the source was replaced: run stages 01 to 04 on it",
    "bad_edits": "run stage 03 again for the shard (--rerun --shards <shard>), then stage 04",
    "wrong_sha256": "run stage 03 again for the shard (--rerun --shards <shard>), then stage 04",
    "wrong_size": "run stage 03 again for the shard (--rerun --shards <shard>), then stage 04",
    "caption_differs": "run stage 03 again for the shard (--rerun --shards <shard>), then stage 04",
    "bad_json": "run stage 03 again for the shard (--rerun --shards <shard>), then stage 04",
    "undecodable": "run stage 03 again for the shard (--rerun --shards <shard>), then stage 04",
    "no_provenance": "run stage 03 again for the shard, then stage 04; for edits from other programs: --no_provenance",
    "original_lost": "run stage 03 again for the shard (--rerun --shards <shard>), then stage 04",
    "no_receipt": "run the stage in the message for the shard: files without a receipt cannot be trusted",
    "not_done": f"see `{PROGRAM} status` for why, and `{PROGRAM} retry`",
    "bad_record": "run the stage that is named again for the shard: --rerun --shards <shard>",
    "missing_output": "run the stage that is named again for the shard",
    "wrong_digest": "run the stage that is named again for the shard: --rerun --shards <shard>",
    "tries_differ": "run stage 03, or 05 if it is named, again for the shard (--rerun --shards <shard>), then stage 04",
    "counts_differ": "run the stage that is named again for the shard: --rerun --shards <shard>",
    "lost_between_stages": "run the stage that is named again for the shard: --rerun --shards <shard>",
    "from_nowhere": "run the stage that is named again for the shard: --rerun --shards <shard>",
    "source_changed": "stage 04 read other bytes of the source: run stages 01 to 04 again for the shard",
    "unreadable": "check the file and the disk; copy it again",
    "stray_edits": "move them away: the source has no such shard",
}


@dataclass(frozen=True, slots=True)
class MixTask:
    """How stage 04 mixed captions into a shard.

    Attributes:
        captions: Its ``--captions``.
        weights, seed: As its options record them.
        scratch: A folder for an index of another tool's captions.
    """

    captions: str
    weights: str
    seed: int
    scratch: Path

    def source(self) -> CaptionSource:
        """The captions.  Raises UsageError."""
        return CaptionSource(self.captions, self.scratch, Mix.parse(self.weights, self.seed))


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to verify.  A folder is None if there is none to compare with."""

    shard_id: str
    source: Path
    hybrid: Path
    edits: Path
    prompts: Path | None
    captions: Path | None
    provenance: bool
    mix: MixTask | None = None


@dataclass(slots=True)
class Verdict:
    """The result for one shard.

    sha256: that of the hybrid tar; empty if it could not be read.  elsewhere: where the tar lies, if it was published
    and removed from this filesystem; its bytes are not compared then.  captions: how many samples should have which, if
    captions were mixed.
    """

    shard_id: str
    findings: Findings = field(default_factory=Findings)
    sha256: str = ""
    elsewhere: str = ""
    samples: int = 0
    edited: int = 0
    hybrid_bytes: int = 0
    source_bytes: int = 0
    seconds: float = 0.0
    captions: Counter[str] = field(default_factory=Counter)


class Expectation:
    """The expected result for each sample of the source.

    prompts: "<key>.json" → prompt, of the samples that were to be edited; None: those that have an edit.
    dropped: what stage 04 says it left out.  fitting: how it fitted the edits' images into the shard.
    mixer, captions: how it mixed captions; None if it did not.

    Attributes:
        edit: Of the sample that was asked for last, as it is without a mix; None if the sample has none.
    """

    def __init__(
        self,
        edits: EditReader,
        prompts: Mapping[str, Any] | None,
        dropped: Collection[str],
        fitting: Fitting,
        mixer: Mixer | None,
        captions: CaptionsOfShard | None,
    ) -> None:
        self._edits, self._prompts, self._dropped, self._fitting = edits, prompts, dropped, fitting
        self._mixer, self._captions = mixer, captions
        self._edited = edits.keys()
        self._kept = Neighbours()
        self.edit: Edit | None = None

    def __call__(self, window: Window, span: SampleSpan) -> Edit | Action:
        decision = self._decide(span)
        if decision is not Action.DROP and self._kept.meet(span):
            decision = Action.DROP
        self.edit = decision if isinstance(decision, Edit) else None
        if decision is Action.DROP or self._mixer is None or self._captions is None:
            return decision
        edited = self.edit is not None
        return self._mixer.mix(window, span, self.edit, self._captions, edited=edited) or Action.KEEP

    def _decide(self, span: SampleSpan) -> Edit | Action:
        if span.torn or span.refused:
            return Action.DROP
        if span.repeated or (self._prompts is not None and span.key + KEY_SUFFIX not in self._prompts):
            return Action.KEEP
        if span.key in self._edited:
            edit = self._edits.read(span.key)
            try:
                return self._fitting.fit(span, edit)
            except SampleError:  # stage 04 could not encode it either, and left the sample out
                return Action.DROP if span.key in self._dropped else edit
        return Action.DROP if self._prompts is not None and span.key in self._dropped else Action.KEEP


@dataclass(slots=True)
class Samples:
    """The keys of the source's samples in order; of them, those that should be replaced, and those that should go."""

    keys: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, key: str, decision: Decision, *, edited: bool) -> None:
        self.keys.append(key)
        if decision is Action.DROP:
            self.left_out.append(key)
        elif edited:
            self.edited.append(key)

    @property
    def kept(self) -> int:
        """Samples that should be in the hybrid shard."""
        return len(self.keys) - len(self.left_out)


def verify_shard(task: Task) -> Verdict:
    """Check everything about one shard.  It raises only if there is a bug."""
    began = time.perf_counter()
    verdict = Verdict(task.shard_id)
    findings = verdict.findings
    try:
        _verify(task, verdict)
    except (ShardError, InfrastructureError) as error:
        findings.add("unreadable", "", str(error))
    except OSError as error:
        findings.add("unreadable", "", f"{error.filename}: {error.strerror}")
    verdict.seconds = time.perf_counter() - began
    return verdict


def _verify(task: Task, verdict: Verdict) -> None:
    findings, shard_id = verdict.findings, task.shard_id
    home = home_of(task.hybrid, shard_id)
    last = read_stage(home, HYBRID, shard_id, findings)
    if last is None and not findings:
        findings.add("no_receipt", "", f"there are no receipts of {HYBRID} in {home}")
    if not task.hybrid.is_file():
        verdict.elsewhere = _published_at(last, f"{shard_id}.tar")
        if not verdict.elsewhere:
            findings.add("missing_shard", "", f"there is no {task.hybrid}")
        return
    verdict.source_bytes = task.source.stat().st_size
    prompts = None if task.prompts is None else read_dictionary(task.prompts / f"{shard_id}.json")
    try:
        edits = _open_edits(task, last)
    except ShardError as error:
        findings.add("bad_edits", "", str(error))
        return
    third = read_stage(task.edits, EDITS, shard_id, findings)
    lines = provenance_lines(third, shard_id) if third is not None and third.done else ()
    told = [(str(line.get("key", "")), Mark.of(line)) for line in lines]
    marks = dict(told)
    with edits, _open_captions(task) as captions:
        fitting = Fitting(_image_suffix(last), _image_member(last))
        mixer = None if task.mix is None else Mixer(Mix.parse(task.mix.weights, task.mix.seed), fitting)
        expect = Expectation(edits, prompts, last.gone if last is not None else (), fitting, mixer, captions)

        samples = Samples()

        def counted() -> Iterator[DecidedWindow]:
            for window in TarScan(task.source).windows():
                decisions: list[tuple[SampleSpan, Decision]] = []
                for span in window.spans:
                    decision: Decision = Action.KEEP
                    if span.key:
                        decision = expect(window, span)
                        samples.add(span.key, decision, edited=expect.edit is not None)
                        if expect.edit is not None:
                            _check_edit(task, span.key, expect.edit, _source_json(window, span), prompts, findings)
                            check_mark(span.key, bytes(expect.edit.json or b""), marks, findings)
                    decisions.append((span, decision))
                yield window, decisions

        proof = prove_splice(counted(), task.hybrid)
        verdict.sha256, verdict.hybrid_bytes = proof.sha256, proof.size
        verdict.samples, verdict.edited = len(samples.keys), len(samples.edited)
        if proof.readers:
            findings.add("readers_differ", "", proof.readers)
        if mixer is not None:
            verdict.captions = mixer.taken.copy()
            _check_captions(last, verdict.captions, findings)
        other = _other_encoder(last) if fitting.encoded else ""
        if not proof.equal and other:
            findings.add("other_encoder", "", other)
        elif not proof.equal:
            explain(task.source, task.hybrid, expect, findings, provenance=task.provenance, mixed=task.mix is not None)
        for key in edits.keys() - set(samples.keys):
            findings.add("edit_without_sample", key, f"the source has no such sample; the edit is in {task.edits}")
        edited = [key for key in sorted(edits.keys()) if prompts is None or key + KEY_SUFFIX in prompts]
    if third is not None and third.done:
        _check_edits(third, told, edited, last, findings)
    _check_stages(task, proof, samples, prompts, edited, third, last, findings)


def _open_captions(task: Task) -> AbstractContextManager[CaptionsOfShard | None]:
    if task.mix is None:
        return contextlib.nullcontext()
    try:
        return task.mix.source().open(Shard(task.shard_id, task.source), {})
    except UsageError as error:
        raise ShardError(str(error)) from None


def _check_captions(last: Record | None, taken: Mapping[str, int], findings: Findings) -> None:
    """Check that stage 04 counted as many captions of each kind as there should be."""
    noted = _noted(last, CAPTIONS_NOTE)
    said = noted if isinstance(noted, dict) else {}
    for name in sorted({*map(str, said), *taken}):
        number = said.get(name, 0)
        check_count(f"{HYBRID}, samples with the caption {name}", number if isinstance(number, int) else -1,
                    taken.get(name, 0), findings)  # fmt: skip


def _published_at(last: Record | None, name: str) -> str:
    """Where a hybrid shard lies whose file was removed after its upload; empty for nowhere."""
    if last is None or not last.done:
        return ""
    for output in last.receipt.get("outputs", ()):
        if output.get("path") == name and is_there(last.home, HYBRID, last.receipt, output):
            return str(place_of(last.home, HYBRID, last.receipt, output))
    return ""


def _image_suffix(last: Record | None) -> ImageSuffix:
    """What stage 04 called new images here.  Receipts of older versions do not tell: they kept the edits' own names."""
    if last is None:
        return "source"
    noted = _noted(last, "image_suffix")
    return next((known for known in get_args(ImageSuffix) if known == noted), "keep")


def _image_member(last: Record | None) -> str:
    """Which picture stage 04 replaced.  Its receipt tells it where the option decided of any sample of the shard."""
    if last is None:
        return AUTO
    noted = _noted(last, "image_member")
    return noted if isinstance(noted, str) else PLAIN


def _other_encoder(last: Record | None) -> str:
    """Empty if this machine encodes images with the software that stage 04 used."""
    noted = _noted(last, "encoded")
    by = noted.get("by") if isinstance(noted, dict) else None
    if by == encoders():
        return ""
    return f"stage 04 encoded images with {clean_text(str(by))[:200]}, which gives other bytes than {encoders()} here"


def _noted(last: Record | None, name: str) -> object:
    notes = None if last is None else last.receipt.get("notes")
    return notes.get(name) if isinstance(notes, dict) else None


def _source_json(window: Window, span: SampleSpan) -> bytes | None:
    for member in span.members:
        if member.suffix == "json" and member.regular and member.size <= MAX_SAMPLE_JSON_BYTES:
            return window.read(member.data, member.size)
    return None


def _open_edits(task: Task, last: Record | None) -> EditReader:
    """Open the edits that stage 04 used, or should have used."""
    tar, loose = task.edits / f"{task.shard_id}.tar", task.edits / task.shard_id
    if tar.is_file() and not _read_as_absent(last, tar.name):
        return TarEditReader(tar)
    return LooseEditReader(loose, published_below(loose, EDITS, task.shard_id) if loose.is_dir() else {})


def _read_as_absent(last: Record | None, name: str) -> bool:
    """Whether stage 04 looked for edits under that name and found none, because they had the other layout."""
    if last is None or not last.done:
        return False
    pairs = zip(last.receipt.get("inputs", ()), last.receipt.get("sources", ()), strict=False)
    named = [was for was, source in pairs if source.get("stage") == EDITS]
    mine = [was for was in named if was.get("path") == name]
    return bool(named) and all(was.get("absent") for was in mine) and any(not was.get("absent") for was in named)


def _check_edit(
    task: Task, key: str, edit: Edit, original: bytes | None, prompts: Mapping[str, Any] | None, findings: Findings
) -> None:
    """What the edit that a sample was replaced with says of itself, of its original, and of its prompt."""
    jpg, txt, json = (bytes(edit.part(part) or b"") for part in ("image", "txt", "json"))
    for kind, detail in self_problems(jpg, txt, json, provenance=task.provenance):
        findings.add(kind, key, detail)
    if original is not None:
        for kind, detail in original_problems(json, original):
            findings.add(kind, key, detail)
    prompt = None if prompts is None else prompts[key + KEY_SUFFIX]
    if isinstance(prompt, str) and clean_text(prompt).encode("utf-8", "replace") != txt:
        findings.add("stale_prompt", key, f"it was made of {txt[:100]!r}; the prompt is {prompt[:100]!r}")


def _check_stages(
    task: Task,
    proof: Proof,
    samples: Samples,
    prompts: Mapping[str, Any] | None,
    edited: list[str],
    third: Record | None,
    last: Record | None,
    findings: Findings,
) -> None:
    """What each stage kept is what the next took in, by its counts and by the keys."""
    shard_id = task.shard_id
    if task.mix is not None:
        _check_stage_05(Path(task.mix.captions), shard_id, findings)
    known: dict[Path, tuple[int, str]] = {}
    if last is not None and last.done:
        path = Path(os.path.normpath(last.home / task.hybrid.name))
        known[path] = (proof.size, proof.digest)
        _check_last(last, samples, findings)
        _check_source(last, task, findings)
        check_outputs(last, known, findings)
    if task.prompts is None or prompts is None:
        return
    check_keys(EDITS, names_to_keys(prompts), edited, third, findings)
    second = read_stage(task.prompts, PROMPTS, shard_id, findings)
    if third is not None and third.done:
        check_count(f"{EDITS} took in, prompts", third.count("in"), len(prompts), findings)
    if second is not None and second.done:
        check_outputs(second, {}, findings)
        check_count(f"{PROMPTS} kept, prompts", second.count("kept"), len(prompts), findings)
    if task.captions is None:
        return
    captions = read_dictionary(task.captions / f"{shard_id}.json")
    check_keys(PROMPTS, names_to_keys(captions), names_to_keys(prompts), second, findings)
    if second is not None and second.done:
        check_count(f"{PROMPTS} took in, captions", second.count("in"), len(captions), findings)
    first = read_stage(task.captions, CAPTIONS, shard_id, findings)
    check_keys(CAPTIONS, samples.keys, names_to_keys(captions), first, findings)
    if first is not None and first.done:
        check_outputs(first, {}, findings)
        check_count(f"{CAPTIONS} kept, captions", first.count("kept"), len(captions), findings)
        check_count(f"{CAPTIONS} took in, samples of the source", first.count("in"), len(samples.keys), findings)


def _check_stage_05(captions: Path, shard_id: str, findings: Findings) -> None:
    """What stage 05 says of the captions that were mixed in.  captions: its output folder, or the rows in it; or the
    captions of another tool, of which nothing is known."""
    home = captions.parent if captions.name == ROWS else captions
    record = read_stage(home, CAPTIONS_STAGE, shard_id, findings) if home.is_dir() else None
    if record is not None and record.done:
        check_caption_tries(record, home / ROWS / f"{shard_id}.jsonl", findings)


def _check_edits(
    third: Record, told: Sequence[tuple[str, Mark]], edited: list[str], last: Record | None, findings: Findings
) -> None:
    """What stage 03 counts, and what its provenance tells, is what is there.  told: the lines of its provenance."""
    check_outputs(third, {}, findings)
    check_count(f"{EDITS} kept, edits that are there", third.count("kept"), len(edited), findings)
    if last is not None and last.done:
        check_count(f"{HYBRID} replaced, {EDITS} kept", last.note("edited"), third.count("kept"), findings)
    made = Counter(key for key, _ in told)
    if made != Counter(edited):
        odd = sorted({*made} ^ {*edited})[:3]
        findings.add("no_provenance", "", f"{EDITS}'s _provenance is not of the edits that are there: {odd}")
    check_tries(third, dict(told), findings)


def _check_last(last: Record, samples: Samples, findings: Findings) -> None:
    check_count(f"{HYBRID} took in, samples of the source", last.count("in"), len(samples.keys), findings)
    check_count(f"{HYBRID} kept, samples that should be here", last.count("kept"), samples.kept, findings)
    check_count(f"{HYBRID} replaced, edits of this shard", last.note("edited"), len(samples.edited), findings)
    if samples.left_out or last.gone:
        for key in Counter(samples.left_out) - last.gone:
            findings.add("lost_sample", key, f"left out, but no reject or drop of {HYBRID} gives a reason")
        for key in last.gone - Counter(samples.left_out):
            findings.add(
                "from_nowhere", key, f"{HYBRID} recorded that it left this sample out, but there was no reason for it"
            )


def _check_source(last: Record, task: Task, findings: Findings) -> None:
    sizes = [
        was.get("size")
        for was, source in zip(last.receipt["inputs"], last.receipt["sources"], strict=False)
        if not source and was.get("path") == task.source.name
    ]
    size = task.source.stat().st_size
    if sizes and sizes[0] != size:
        findings.add("source_changed", "", f"{HYBRID} read {sizes[0]:,} bytes of {task.source.name}; it has {size:,}")
