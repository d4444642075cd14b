"""Stage 03's tries: what fails a check is made again, the best is kept, and a kill at any point changes no byte.

The checks are stubs that read planted verdicts from the pixels, so that each round ends as it is planted; the real ones
are tested in ``tests/backends/test_checks.py``, and here on photos with and without faces.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.backends.generate.diffusers import Backend
from curation.backends.generate.tiny import save_tiny_sd
from curation.check import Asked, Verdict
from curation.check.counts import problems_of
from curation.cluster import StopSignal
from curation.commands.findings import Findings
from curation.commands.verify.conservation import provenance_lines, read_stage
from curation.commands.verify.tries import Mark, check_mark, check_tries
from curation.errors import SampleError, UsageError
from curation.faces import recorded_boxes
from curation.generate.batches import seed_of
from curation.images import Pixels, decode_rgb
from curation.run.checkpoints import Partials
from tests import EXAMPLES
from tests.shards import contents
from tests.stages.harness import read_jsonl
from tests.stages.test_stage_03_generate_images import (
    NAME,
    SHARD,
    SMALL,
    change,
    make_input,
    metadata_of,
    on_batch,
    read_tar,
    receipt,
    rejects,
    run,
)

pytest.importorskip("torch")
stage = importlib.import_module("03_generate_images_multigpu")
pytestmark = pytest.mark.usefixtures("stage_in_process")

TIMES = {"_receipts", "_claims", "_plan", "_batch_sizes"}
STEP = 20  # of the grey levels that carry what is planted through a JPEG


@dataclass
class Stub:
    """A check that reads its verdict from the colour of a picture: red is the sample's number, green the round."""

    name: str
    planted: Mapping[tuple[int, int], Any]
    threshold: float = 0.5
    judged: list[tuple[int, int]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    @property
    def record(self) -> Mapping[str, Any]:
        return {"model": f"stub-{self.name}", "revision": "1", "threshold": self.threshold}

    def prepare(self, picture: Pixels) -> tuple[int, int]:
        red, green, _ = (int(value) // STEP for value in picture.mean(axis=(0, 1)))
        return red, green

    def judge(self, prepared: Sequence[tuple[int, int]], asked: Sequence[Asked]) -> list[Verdict]:
        self.judged.extend(prepared)
        self.asked.extend(asked)
        return [self._verdict(self.planted.get(one, 0.0)) for one in prepared]

    def _verdict(self, score: float) -> Verdict:
        passed = score >= self.threshold
        if self.name == "face":
            boxes = [[0.25, 0.25, 0.75, 0.75, score]] if passed else []
            return Verdict(passed, {"faces": len(boxes), "largest": 0.5 * len(boxes), "boxes": boxes})
        return Verdict(passed, {"score": score})

    def close(self) -> None:
        pass


class Planted:
    """Pictures whose colour says which sample's try they are; blank ones where that is planted."""

    def __init__(self, levels: Sequence[tuple[int, int]], blank: set[tuple[int, int]]) -> None:
        self._levels, self._blank = levels, blank

    def __len__(self) -> int:
        return len(self._levels)

    def image(self, index: int) -> Pixels:
        if self._levels[index] in self._blank:
            raise SampleError("blank_image", "planted")
        number, round_number = self._levels[index]
        pixels = np.empty((64, 64, 3), np.uint8)
        pixels[:] = number * STEP + STEP // 2, round_number * STEP + STEP // 2, 128
        return pixels


@dataclass
class Plan:
    """What is planted: for each check (sample, round) → its score; 0.5 passes.  made: the batches, in their order."""

    scores: dict[str, dict[tuple[int, int], float]]
    blank: set[tuple[int, int]] = field(default_factory=set)
    made: list[list[tuple[int, int]]] = field(default_factory=list)
    stubs: dict[str, Stub] = field(default_factory=dict)
    threshold: float = 0.5

    @contextlib.contextmanager
    def applied(
        self,
        act: Callable[[int], None] = lambda number: None,
        picture: type[Planted] = Planted,
        with_real_checks: bool = False,
    ) -> Iterator[None]:
        seeds = {}
        for shard in (SHARD, "00000004"):
            for number in range(12):
                key = f"{hashlib.md5(f'{shard}{number}'.encode()).hexdigest()}-0"
                seeds |= {seed_of(0, key, r): (number, r) for r in range(8)}

        def generate(_: Any, requests: Any, *__: Any, **___: Any) -> Planted:
            levels = [seeds[request.seed] for request in requests]
            self.made.append(levels)
            act(len(self.made))
            return picture(levels, self.blank)

        def load(names: Sequence[str], settings: Any) -> list[Any]:
            self.stubs = {name: Stub(name, self.scores[name], self.threshold) for name in names}
            return list(self.stubs.values())

        def identify(names: Sequence[str], settings: Any) -> dict[str, Any]:
            return {name: dict(Stub(name, self.scores[name], self.threshold).record) for name in names}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Backend, "generate", generate)
            patch.setattr("curation.backends.generate.tiny.Backend.generate", generate)
            if not with_real_checks:
                patch.setattr("curation.backends.check.load_checks", load)
                patch.setattr("curation.backends.check.identify", identify)
            yield


def passing(rounds: Mapping[int, int | None], tries: int = 4) -> dict[tuple[int, int], float]:
    """Scores of samples that pass in the given round, and in no earlier one; None: in none."""
    return {
        (number, r): float(first is not None and r >= first) for number, first in rounds.items() for r in range(tries)
    }


# Sample 0, 3, 4, 7 and 8 pass at once; 1 in the second round, 2 and 5 in the third, 9 in the fourth, 6 never.
FIRST = {0: 0, 1: 1, 2: 2, 3: 0, 4: 0, 5: 2, 6: None, 7: 0, 8: 0, 9: 3}


def run_planted(root: Path, plan: Plan, *flags: str, check: str = "face", act: Any = None, small: Any = SMALL) -> int:
    with plan.applied(*([act] if act else [])):
        return run(root, "--check", check, *flags, small=small)


def curation_of(root: Path, shard: str = SHARD) -> list[dict[str, Any]]:
    """In the order of the shard; None for samples that are left out."""
    prompts = json.loads((root / f"prompts/{shard}.json").read_bytes())
    found = metadata_of(root, shard)
    return [found.get(name[:-5], {}).get("curation") for name in prompts]


def levels_of(root: Path) -> list[tuple[int, int]]:
    """(sample, round) of every picture that was published, by its pixels."""
    stub = Stub("face", {})
    return [stub.prepare(decode_rgb(data)) for name, data in read_tar(root).items() if name.endswith(".jpg")]


def state(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not TIMES & {*path.parts}
    }


def facts(root: Path) -> dict[str, Any]:
    """What a receipt says that does not depend on times, or on how often the work was interrupted."""
    told = receipt(root)
    notes = {name: value for name, value in told["notes"].items() if name != "recovered"}
    outputs = [{**output, "temporary": None} for output in told["outputs"]]
    return {"counts": told["counts"], "notes": notes, "outputs": outputs}


# ---- what is kept


def test_what_fails_is_made_again_until_it_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, plan = make_input(tmp_path / "data"), Plan({"face": passing(FIRST)})
    assert run_planted(root, plan, small=[flag for flag in SMALL if flag != "--quiet"]) == 0
    assert plan.made == [
        [(0, 0), (1, 0), (2, 0), (3, 0)],
        [(4, 0), (5, 0), (6, 0), (7, 0)],
        [(8, 0), (9, 0)],
        [(1, 1), (2, 1), (5, 1), (6, 1)],
        [(9, 1)],
        [(2, 2), (5, 2), (6, 2), (9, 2)],
        [(6, 3), (9, 3)],
    ], "each round has what failed the one before, in the shard's order and in batches of --batch_size"
    assert levels_of(root) == [(number, first or 0) for number, first in FIRST.items()]
    for number, said in enumerate(curation_of(root)):
        first = FIRST[number]
        assert said["check"] == ("failed" if first is None else "passed")
        assert (said["round"], said["tries"]) == ((0, 4) if first is None else (first, first + 1))
        faces = int(first is not None)
        assert said["checks"] == {"face": {"passed": bool(faces), "faces": faces, "largest": 0.5 * faces}}
        assert said["models"]["checks"] == {"face": {"model": "stub-face", "revision": "1", "threshold": 0.5}}
        boxes = [value["face_bboxes"] for value in metadata_of(root).values()][number]
        assert boxes == ([[0.25, 0.25, 0.75, 0.75, 1.0]] if faces else [])
    six = {"tries": 21, "kept": 10, "failed_tries": 11, "kept_though_failed": 1, "rejected": 0}
    six |= {"by_check": {"face": 12}}  # type: ignore[dict-item]
    assert receipt(root)["notes"]["checks"] == {**six, "groups": {"": six}}
    assert receipt(root)["counts"] == {"in": 10, "kept": 10, "dropped": {}, "failed": {}}
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        "21 images generated; 21 tries: 10 kept, 1 of them though they failed; "
        "11 failed and not kept (failed checks: 12 face)" in last
    )


def test_the_provenance_tells_every_try(tmp_path: Path) -> None:
    root, plan = make_input(tmp_path / "data"), Plan({"face": passing(FIRST)})
    assert run_planted(root, plan) == 0
    lines = {line["key"]: line for line in read_jsonl(root / f"edits/_provenance/{NAME}/{SHARD}.jsonl")}
    for number, (key, metadata) in enumerate(metadata_of(root).items()):
        first, line = FIRST[number], lines[key]
        missed = [1, 2, 3] if first is None else list(range(first))
        none = {"face": {"passed": False, "faces": 0, "largest": 0.0}}
        assert line["failed_tries"] == [{"round": r, "seed": seed_of(0, key, r), "checks": none} for r in missed]
        same = {name: value for name, value in metadata["curation"].items() if not name.startswith("original_")}
        assert {name: line[name] for name in same} == same


def test_a_picture_that_passes_has_the_bytes_that_it_has_without_checks(tmp_path: Path) -> None:
    one, two = (make_input(tmp_path / name) for name in ("one", "two"))
    plan = Plan({"face": passing(dict.fromkeys(range(10), 0))})
    with plan.applied():
        assert run(one) == 0
    assert run_planted(two, plan) == 0
    before, after = read_tar(one), read_tar(two)
    assert list(before) == list(after)
    assert all(after[name] == data for name, data in before.items() if not name.endswith(".json"))
    assert "checks" not in receipt(one)["notes"] and not {"check", "tries"} & {*curation_of(one)[0]}


def test_of_several_failed_tries_the_best_is_kept(tmp_path: Path) -> None:
    """Most checks passed, then the higher prompt score, then the earlier try."""
    face = {(0, 2): 1.0, (1, 1): 0.0}
    prompt = {(0, 0): 0.4, (0, 1): 0.45, (1, 0): 0.1, (1, 1): 0.3, (1, 2): 0.3, (2, 1): 0.9}
    root, plan = make_input(tmp_path / "data", 4), Plan({"face": face, "prompt": prompt}, blank={(3, 0), (3, 1)})
    assert run_planted(root, plan, "--tries", "3", check="prompt,face") == 0
    assert levels_of(root) == [(0, 2), (1, 1), (2, 1), (3, 2)]
    assert [said["check"] for said in curation_of(root)] == ["failed"] * 4
    assert list(curation_of(root)[0]["checks"]) == ["face", "prompt"]
    assert receipt(root)["notes"]["checks"]["by_check"] == {"blank_image": 2, "face": 9, "prompt": 9}


def test_blank_pictures_are_failed_tries_too(tmp_path: Path) -> None:
    root = make_input(tmp_path / "data", 4)
    plan = Plan({"face": passing(dict.fromkeys(range(4), 0))}, blank={(1, 0), *((2, r) for r in range(4))})
    assert run_planted(root, plan, "--max_error_rate", "0.5") == 0
    assert receipt(root)["counts"] == {"in": 4, "kept": 3, "dropped": {}, "failed": {"blank_image": 1}}
    assert [said and said["round"] for said in curation_of(root)] == [0, 1, None, 0]
    told = receipt(root)["notes"]["checks"]
    assert (told["tries"], told["kept"], told["failed_tries"]) == (8, 3, 5)
    assert told["by_check"] == {"blank_image": 5}
    lines = read_jsonl(root / f"edits/_provenance/{NAME}/{SHARD}.jsonl")
    assert [line["failed_tries"][0]["reason"] for line in lines if line["failed_tries"]] == ["blank_image"]


def test_rejected_samples_are_drops_that_fail_no_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_input(tmp_path / "data")
    provenance = root / "prompts/_provenance/02_captions_processor"
    provenance.mkdir(parents=True)
    keys = [name[:-5] for name in json.loads((root / f"prompts/{SHARD}.json").read_bytes())]
    lines = [json.dumps({"key": key, "group": f"group {n % 2}", "model": "m"}) for n, key in enumerate(keys)]
    (provenance / f"{SHARD}.jsonl").write_text("\n".join(lines) + "\n")
    plan = Plan({"face": passing(dict.fromkeys(range(4), 0)), "safety": passing(dict.fromkeys(range(9), 0))})
    flags = ("--on_check_failure", "reject", "--tries", "2", "--max_error_rate", "0")
    loud = [flag for flag in SMALL if flag != "--quiet"]
    assert run_planted(root, plan, *flags, check="face,safety", small=loud) == 0
    assert receipt(root)["counts"] == {"in": 10, "kept": 4, "dropped": {"check_face": 6}, "failed": {}}
    assert rejects(root) == dict.fromkeys(keys[4:], "check_face")
    [line] = [line for line in read_jsonl(root / f"edits/_rejects/{NAME}/{SHARD}.jsonl") if line["key"] == keys[9]]
    assert line == {
        "key": keys[9],
        "reason": "check_face",
        "group": "group 1",
        "tries": 2,
        "round": 0,
        "checks": {
            "face": {"passed": False, "faces": 0, "largest": 0.0},
            "safety": {"passed": False, "score": 0.0},
        },
    }
    told = receipt(root)["notes"]["checks"]
    assert list(problems_of(told)) == []
    assert told["groups"]["group 0"] == {
        "tries": 8,
        "kept": 2,
        "failed_tries": 6,
        "kept_though_failed": 0,
        "rejected": 3,
        "by_check": {"face": 6},
    }
    assert told["groups"]["group 1"]["by_check"] == {"face": 6, "safety": 2}
    assert {one.group for one in plan.stubs["face"].asked} == {"group 0", "group 1"}
    assert "6 samples rejected (failed checks: 12 face, 2 safety)" in capsys.readouterr().err.splitlines()[-1]


# ---- with a real detector, on photos


@pytest.fixture(scope="module")
def photos() -> tuple[list[Pixels], list[Pixels]]:
    """Photos of 256×256 with a face that CenterFace finds, and without one."""
    with_face, without = [], []
    truth = [line.split("\t") for line in (EXAMPLES.parent / "truth.tsv").read_text("utf-8").splitlines()[1:]]
    for shard, key, kind, faces, *_ in truth:
        if kind != "jpg" or faces not in ("0", "1") or len(with_face if faces == "1" else without) == 2:
            continue
        picture = contents(EXAMPLES / f"{shard}.tar")[f"{key}.jpg"]
        with Image.open(io.BytesIO(picture)) as image:
            pixels = np.asarray(image.convert("RGB").resize((256, 256)))
        (with_face if faces == "1" else without).append(pixels)
    return with_face, without


def test_photos_with_and_without_faces_are_judged_by_centerface(
    photos: tuple[list[Pixels], list[Pixels]], tmp_path: Path
) -> None:
    """Samples 0 and 1 show a face at once, 2 and 3 in the second round."""
    with_face, without = photos
    assert len(with_face) == len(without) == 2
    root = make_input(tmp_path / "data", 4)
    plan = Plan({})

    class Photos(Planted):
        def image(self, index: int) -> Pixels:
            number, round_number = self._levels[index]
            return (with_face if number < 2 or round_number else without)[number % 2]

    with plan.applied(picture=Photos, with_real_checks=True):
        assert run(root, "--check", "face", "--width", "256", "--height", "256") == 0
        said, before = curation_of(root), state(root)
        assert [one["round"] for one in said] == [0, 0, 1, 1]
        assert {one["check"] for one in said} == {"passed"}
        assert all(one["models"]["checks"]["face"]["model"] == "centerface" for one in said)
        for metadata in metadata_of(root).values():
            [box, *_] = recorded_boxes(metadata) or [[]]
            assert len(box) == 5 and metadata["curation"]["checks"]["face"]["largest"] >= 0.05
        assert receipt(root)["notes"]["checks"]["by_check"] == {"face": 2}
        # The same scores from the file: it is judged anew where the edits forget that they were judged.
        change_edits(root, lambda curation: curation["models"].pop("checks"))
        assert run(root, "--check", "face", "--width", "256", "--height", "256", "--rerun") == 0
    assert len(plan.made) == 2, "nothing is made again"
    after = state(root)
    assert {name: data for name, data in after.items() if "_provenance" not in name} == {
        name: data for name, data in before.items() if "_provenance" not in name
    }


def change_edits(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change ``curation`` in the json of every edit."""
    members = read_tar(root)
    for name, data in members.items():
        if name.endswith(".json"):
            metadata = json.loads(data)
            edit(metadata["curation"])
            members[name] = json.dumps(metadata).encode()
    write_edits(root, members)


def write_edits(root: Path, members: Mapping[str, bytes]) -> None:
    """Replace the tar of edits."""
    with tarfile.open(root / f"edits/{SHARD}.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# ---- killed and stopped


def checkpoint_of_a_whole_run(root: Path, plan: Plan, *flags: str) -> tuple[str, bytes]:
    """The name below ``edits`` and the bytes of the checkpoint that a run has at its end, before it is removed."""
    found: list[tuple[str, bytes]] = []
    real = Partials.remove

    def remove(self: Partials, shard_id: str, own: Any = (), **more: Any) -> None:
        for name in own:
            path = self.folder(shard_id) / name
            found.append((str(path.relative_to(root / "edits")), path.read_bytes()))
        real(self, shard_id, own, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partials, "remove", remove)
        assert run_planted(root, plan, *flags) == 0
    [one] = found
    return one


def test_killed_at_any_point_it_gives_the_same_bytes(tmp_path: Path) -> None:
    """A kill leaves a checkpoint that ends anywhere: between batches, between rounds, inside a record."""
    whole, plan = make_input(tmp_path / "whole"), Plan({"face": passing(FIRST)})
    name, log = checkpoint_of_a_whole_run(whole, plan)
    undisturbed, told = state(whole), facts(whole)
    for number, cut in enumerate((0, 40, len(log) // 5, len(log) // 2, len(log) - 700, len(log) - 1, len(log))):
        root, again = make_input(tmp_path / str(number)), Plan({"face": passing(FIRST)})
        path = root / "edits" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(log[:cut])
        assert run_planted(root, again) == 0
        assert state(root) == undisturbed
        assert facts(root) == told
        made = sum(len(batch) for batch in again.made)
        assert made == len(again.stubs["face"].judged), "what was judged before is not judged again"
        assert again.made == plan.made[len(plan.made) - len(again.made) :], "only the rest is made, in the same batches"
    assert not again.made


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Callable[[signal.Signals], None]:
    """Sends this process a signal from a shard's thread, and waits until the main thread has handled it."""
    handled, ask = threading.Event(), StopSignal.ask

    def asked_to_stop(self: StopSignal, *args: Any, **more: Any) -> None:
        ask(self, *args, **more)
        handled.set()

    def send_and_wait(number: signal.Signals) -> None:
        handled.clear()
        os.kill(os.getpid(), number)
        assert handled.wait(60), "the main thread handles it"

    monkeypatch.setattr(StopSignal, "ask", asked_to_stop)
    return send_and_wait


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_stopped_in_a_later_round_it_goes_on_there(
    number: signal.Signals, tmp_path: Path, send: Callable[[signal.Signals], None]
) -> None:
    whole, root = (make_input(tmp_path / name) for name in ("whole", "root"))
    plan = Plan({"face": passing(FIRST)})
    assert run_planted(whole, plan) == 0
    first, second = Plan({"face": passing(FIRST)}), Plan({"face": passing(FIRST)})
    assert run_planted(root, first, act=lambda batch: send(number) if batch == 5 else None) == 75
    assert run_planted(root, second) == 0
    assert first.made + second.made == plan.made
    assert state(root) == state(whole)


def test_a_checkpoint_holds_only_pictures_that_may_be_kept(tmp_path: Path) -> None:
    """Tries without a chance leave their scores."""
    sizes = {}
    for what in ("best", "reject"):
        root, plan = make_input(tmp_path / what), Plan({"face": passing({}, 8)})
        _, log = checkpoint_of_a_whole_run(root, plan, "--on_check_failure", what, "--tries", "8")
        assert sum(len(batch) for batch in plan.made) == 80
        sizes[what] = log.count(b"\xff\xd8\xff")
    assert sizes == {"best": 10, "reject": 0}


# ---- the device


def test_the_next_shard_has_the_device_between_two_rounds(tmp_path: Path) -> None:
    root, alone = tmp_path / "data", tmp_path / "alone"
    scores = {"face": passing(FIRST)}
    for target in (root, alone):
        for shard in (SHARD, "00000004"):
            make_input(target, 10, shard)
    waits = threading.Event()

    class Slow(Stub):
        """The verdicts of the first shard's first round come when the second shard has begun."""

        def judge(self, prepared: Sequence[tuple[int, int]], asked: Sequence[Asked]) -> list[Verdict]:
            waits.wait(20)
            return super().judge(prepared, asked)

    plan = Plan(scores)
    shards: list[str] = []
    real = stage.GenerateImages._make

    def make(self: Any, work: Any, *args: Any) -> Any:
        shards.append(work.shard.id)
        if work.shard.id != SHARD:
            waits.set()
        return real(self, work, *args)

    with plan.applied(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("curation.backends.check.load_checks", lambda names, _: [Slow("face", scores["face"])])
        patch.setattr(stage.GenerateImages, "_make", make)
        assert run(root, "--check", "face", "--batch_size", "10") == 0
    assert waits.is_set()
    assert shards[:2] == [SHARD, "00000004"], "round 0 of the second shard fills the device"
    assert shards.count(SHARD) == shards.count("00000004") == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.GenerateImages, "shards_in_flight", 1)
        assert run_planted(alone, Plan(scores), "--batch_size", "10") == 0
    assert state(root) == state(alone)


def test_the_device_has_the_next_batch_while_one_is_judged(tmp_path: Path) -> None:
    """The first batch is judged only when the third one is made: one is encoded and one is judged behind the device."""
    third, waited = threading.Event(), []
    plan = Plan({"face": passing(dict.fromkeys(range(10), 0))})

    class Waiting(Stub):
        def judge(self, prepared: Sequence[tuple[int, int]], asked: Sequence[Asked]) -> list[Verdict]:
            waited.append(third.wait(20))
            return super().judge(prepared, asked)

    with plan.applied(act=lambda number: third.set() if number == 3 else None), pytest.MonkeyPatch.context() as patch:
        patch.setattr("curation.backends.check.load_checks", lambda names, _: [Waiting("face", plan.scores["face"])])
        assert run(make_input(tmp_path / "data"), "--check", "face") == 0
    assert waited == [True, True, True]


class Short(Stub):
    """A check for which the device has no memory the first few times."""

    failures = 0

    def judge(self, prepared: Sequence[tuple[int, int]], asked: Sequence[Asked]) -> list[Verdict]:
        import torch

        if Short.failures:
            Short.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().judge(prepared, asked)


def test_a_check_waits_for_memory_that_the_image_model_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("curation.generate.judging._PAUSES_S", (0.01, 0.01))
    root, plan = make_input(tmp_path / "data"), Plan({"face": passing(FIRST)})
    with plan.applied(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("curation.backends.check.load_checks", lambda names, _: [Short("face", plan.scores["face"])])
        monkeypatch.setattr(Short, "failures", 100)
        assert run(root, "--check", "face") == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "--check face: there is too little memory for it beside the image model" in last
        assert "Tried to allocate" in last and last.endswith("give a smaller --batch_size")
        monkeypatch.setattr(Short, "failures", 2)
        assert run(root, "--check", "face") == 0
    whole = make_input(tmp_path / "whole")
    assert run_planted(whole, Plan({"face": passing(FIRST)})) == 0
    assert state(root) == state(whole)


def test_checks_are_loaded_and_asked_where_their_device_is_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is broken is told as such, before a model is loaded onto it."""
    told: list[str] = []
    monkeypatch.setattr(stage, "use_device", lambda device: told.append(device))
    monkeypatch.setattr("curation.generate.judging.use_device", lambda device: told.append(f"{device} in the thread"))
    plan = Plan({"face": passing(FIRST)})
    with plan.applied(), pytest.MonkeyPatch.context() as patch:

        def load(*_: Any) -> list[Any]:
            told.append("load")
            return [Stub("face", plan.scores["face"])]

        patch.setattr("curation.backends.check.load_checks", load)
        assert run(make_input(tmp_path / "data", 1), "--check", "face") == 0
    assert told == ["cpu", "load", "cpu in the thread"]


def test_prompts_are_encoded_ahead_in_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    real = stage.GenerateImages._encode_texts

    def encode(self: Any, work: Any, prompts: Sequence[str]) -> Any:
        told.append(len(prompts))
        return real(self, work, prompts)

    monkeypatch.setattr(stage.GenerateImages, "_encode_texts", encode)
    root = make_input(tmp_path / "data")
    assert run_planted(root, Plan({"face": passing(FIRST)}), "--text_batches", "2") == 0
    assert told == [8, 2, 5, 4, 2]


# ---- reruns


def test_a_rerun_that_changes_only_checks_judges_what_is_there(tmp_path: Path) -> None:
    root = make_input(tmp_path / "data")
    with Plan({}).applied():
        assert run(root) == 0
    plan = Plan({"face": passing(FIRST)})
    assert run_planted(root, plan, "--rerun") == 0
    assert sorted(plan.stubs["face"].judged)[:2] == [(0, 0), (1, 0)]
    assert [one for batch in plan.made for one in batch if one[1] == 0] == [], "round 0 is there"
    assert sum(len(batch) for batch in plan.made) == 11
    fresh = make_input(tmp_path / "fresh")
    assert run_planted(fresh, Plan({"face": passing(FIRST)})) == 0
    assert state(root) == state(fresh)
    assert receipt(root)["notes"]["checks"] == receipt(fresh)["notes"]["checks"]


def test_a_rerun_with_the_same_checks_judges_nothing(tmp_path: Path) -> None:
    root, plan = make_input(tmp_path / "data"), Plan({"face": passing(FIRST)})
    assert run_planted(root, plan) == 0
    before, told = state(root), receipt(root)["notes"]["checks"]
    again = Plan({"face": passing(FIRST)})
    assert run_planted(root, again, "--rerun") == 0
    assert again.made == [] == again.stubs["face"].judged
    assert state(root) == before
    assert receipt(root)["notes"]["checks"] == told
    assert receipt(root)["notes"]["reused"] == 10


@pytest.mark.parametrize("layout", ["tar", "files"])
def test_a_rerun_with_another_threshold_makes_only_what_fails_it(layout: str, tmp_path: Path) -> None:
    root, plan = make_input(tmp_path / "data"), Plan({"face": passing(FIRST)})
    flags = ("--edits_layout", layout)
    assert run_planted(root, plan, *flags) == 0
    stricter = {**passing(FIRST), (0, 0): 0.5, (0, 1): 0.6}
    again = Plan({"face": stricter}, threshold=0.7)
    assert run_planted(root, again, "--rerun", *flags) == 0
    assert sorted(again.stubs["face"].judged)[0] == (0, 0)
    assert [one for batch in again.made for one in batch] == [(0, 1), (6, 1), (0, 2), (6, 2), (6, 3)]
    if layout == "tar":
        assert curation_of(root)[0]["round"] == 2
        assert list(problems_of(receipt(root)["notes"]["checks"])) == []


def write_groups(root: Path, groups: Mapping[int, str]) -> tuple[str, ...]:
    """What stage 02 tells of the groups of some samples.  Returns the flags that ask about them."""
    keys = [name[:-5] for name in json.loads((root / f"prompts/{SHARD}.json").read_bytes())]
    path = root / f"prompts/_provenance/02_captions_processor/{SHARD}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"key": keys[n], "group": group}) + "\n" for n, group in groups.items()))
    (root / "groups.yml").write_text("[young, old]")
    return "--groups", f"{root}/groups.yml"


@pytest.mark.parametrize("killed", [False, True])
def test_a_picture_of_another_group_is_judged_again(
    killed: bool, tmp_path: Path, send: Callable[[signal.Signals], None]
) -> None:
    """Stage 02 ran again, and gave a sample the same prompt for another group."""
    root = make_input(tmp_path / "data", 6)
    flags = write_groups(root, dict.fromkeys(range(6), "young"))
    passes = {"group": passing(dict.fromkeys(range(6), 0))}
    plan = Plan(passes)

    def stop(batch: int) -> None:
        if killed and batch == 1:
            send(signal.SIGUSR1)

    assert run_planted(root, plan, *flags, check="group", act=stop) == (75 if killed else 0)
    write_groups(root, {**dict.fromkeys(range(6), "young"), 0: "old"})
    again = Plan(passes)
    assert run_planted(root, again, *flags, *(() if killed else ("--rerun",)), check="group") == 0
    assert (0, 0) in again.stubs["group"].judged
    assert curation_of(root)[0]["group"] == "old"
    if not killed:
        assert again.stubs["group"].judged == [(0, 0)] and again.made == []


def test_more_tries_are_made_of_what_failed_alone(tmp_path: Path) -> None:
    root = make_input(tmp_path / "data")
    assert run_planted(root, Plan({"face": passing({**FIRST, 6: 5}, 8)})) == 0
    again = Plan({"face": passing({**FIRST, 6: 5}, 8)})
    assert run_planted(root, again, "--rerun", "--tries", "6") == 0
    assert {one[0] for batch in again.made for one in batch} == {6}
    assert curation_of(root)[6]["round"] == 5
    again = Plan({"face": passing({**FIRST, 6: 5}, 8)})
    assert run_planted(root, again, "--rerun", "--tries", "6", "--on_check_failure", "reject") == 0
    assert again.made == [], "all passed"


def test_fewer_tries_throw_nothing_away(tmp_path: Path) -> None:
    """They bound what is made; a picture of a later round that is there counts with its own tries."""
    root = make_input(tmp_path / "data")
    assert run_planted(root, Plan({"face": passing(FIRST)})) == 0
    before = {name: data for name, data in read_tar(root).items() if name.endswith(".jpg")}
    again = Plan({"face": passing(FIRST)})
    assert run_planted(root, again, "--rerun", "--tries", "2") == 0
    assert again.made == []
    assert {name: data for name, data in read_tar(root).items() if name.endswith(".jpg")} == before
    assert (curation_of(root)[9]["round"], curation_of(root)[9]["tries"]) == (3, 4)
    assert list(problems_of(receipt(root)["notes"]["checks"])) == []
    stricter = Plan({"face": {**passing(FIRST), (9, 3): 0.6}}, threshold=0.7)
    assert run_planted(root, stricter, "--rerun", "--tries", "2") == 0
    assert sorted({one for batch in stricter.made for one in batch if one[0] == 9}) == [(9, 0), (9, 1)]
    assert (curation_of(root)[9]["check"], curation_of(root)[9]["tries"]) == ("failed", 3), "rounds 0, 1 and 3"
    assert list(problems_of(receipt(root)["notes"]["checks"])) == []


def test_rejecting_afterwards_makes_nothing_and_checking_no_more_makes_the_first_try(tmp_path: Path) -> None:
    root = make_input(tmp_path / "data")
    assert run_planted(root, Plan({"face": passing(FIRST)})) == 0
    again = Plan({"face": passing(FIRST)})
    assert run_planted(root, again, "--rerun", "--on_check_failure", "reject") == 0
    assert again.made == []
    assert receipt(root)["counts"]["dropped"] == {"check_face": 1}
    none = Plan({})
    with none.applied():
        assert run(root, "--rerun") == 0
    assert [one for batch in none.made for one in batch] == [(1, 0), (2, 0), (5, 0), (6, 0), (9, 0)]
    fresh = make_input(tmp_path / "fresh")
    with Plan({}).applied():
        assert run(fresh) == 0
    assert state(root) == state(fresh)


def test_a_rerun_that_was_stopped_while_it_judged_judges_no_picture_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send: Callable[[signal.Signals], None]
) -> None:
    root = make_input(tmp_path / "data")
    with Plan({}).applied():
        assert run(root) == 0
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copy2)
    whole = Plan({"face": passing(FIRST)})
    assert run_planted(copy, whole, "--rerun") == 0
    plans = [Plan({"face": passing(FIRST)}) for _ in range(3)]

    class Stopping(Stub):
        def judge(self, prepared: Sequence[tuple[int, int]], asked: Sequence[Asked]) -> list[Verdict]:
            send(signal.SIGTERM)
            return super().judge(prepared, asked)

    monkeypatch.setattr("curation.generate.rounds._JUDGED_AT_ONCE", 4)
    with plans[0].applied(), pytest.MonkeyPatch.context() as patch:
        plans[0].stubs["face"] = Stopping("face", passing(FIRST))
        patch.setattr("curation.backends.check.load_checks", lambda *_: [plans[0].stubs["face"]])
        assert run(root, "--check", "face", "--rerun") == 75
    assert len(plans[0].stubs["face"].judged) < 10, "it stops after the first few"
    assert run_planted(root, plans[1], "--rerun", act=lambda batch: send(signal.SIGTERM) if batch == 1 else None) == 75
    assert run_planted(root, plans[2], "--rerun") == 0
    judged = [one for plan in plans for one in plan.stubs["face"].judged]
    assert len(judged) == len(set(judged)) == 21
    assert state(root) == state(copy)


def test_a_picture_that_was_spoilt_with_its_digest_is_made_again(tmp_path: Path) -> None:
    """Nobody can judge it, and the shard does not fail for it."""
    root = make_input(tmp_path / "data", 4)
    with Plan({}).applied():
        assert run(root) == 0
    members = read_tar(root)
    name = next(iter(members)).partition(".")[0]
    members[f"{name}.jpg"] = b"\xff\xd8 no picture"
    metadata = json.loads(members[f"{name}.json"])
    metadata["sha256"] = hashlib.sha256(members[f"{name}.jpg"]).hexdigest()
    members[f"{name}.json"] = json.dumps(metadata).encode()
    write_edits(root, members)
    plan = Plan({"face": passing(dict.fromkeys(range(4), 0))})
    assert run_planted(root, plan, "--rerun") == 0
    assert plan.made == [[(0, 0)]]
    assert [said["check"] for said in curation_of(root)] == ["passed"] * 4


@pytest.mark.parametrize("what", ["best", "reject"])
def test_what_is_told_of_other_tries_never_takes_the_place_of_the_picture_that_is_there(
    what: str, tmp_path: Path
) -> None:
    root = make_input(tmp_path / "data")
    assert run_planted(root, Plan({"face": passing(FIRST)})) == 0
    path = root / f"edits/_provenance/{NAME}/{SHARD}.jsonl"
    path.write_text(path.read_text().replace('"passed":false', '"passed":null'))
    before = read_tar(root)
    assert run_planted(root, Plan({"face": passing(FIRST)}), "--rerun", "--on_check_failure", what) == 0
    after = read_tar(root)
    if what == "reject":
        assert receipt(root)["counts"]["dropped"] == {"check_face": 1} and len(after) == len(before) - 3
    assert after == {name: data for name, data in before.items() if name in after}


# ---- verify


def found_by_verify(root: Path) -> list[str]:
    """What ``verify`` says of the tries of one shard."""
    findings = Findings()
    record = read_stage(root / "edits", NAME, SHARD, findings)
    assert record is not None
    marks = {line["key"]: Mark.of(line) for line in provenance_lines(record, SHARD)}
    check_tries(record, marks, findings)
    for name, data in read_tar(root).items():
        if name.endswith(".json"):
            check_mark(name.removesuffix(".json"), data, marks, findings)
    return [finding.detail for finding in findings.kept]


@pytest.mark.parametrize(("what", "blank"), [("best", False), ("reject", False), ("reject", True)])
def test_verify_finds_what_does_not_add_up(what: str, blank: bool, tmp_path: Path) -> None:
    root = make_input(tmp_path / "data")
    plan = Plan({"face": passing(FIRST)}, blank={(7, r) for r in range(4)} if blank else set())
    assert run_planted(root, plan, "--on_check_failure", what) == 0
    assert found_by_verify(root) == []
    path = root / f"edits/_receipts/{NAME}/00000/{SHARD}.json"
    whole = path.read_bytes()
    changes: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
        ("are not", lambda note: note.update(tries=note["tries"] + 1)),
        ("over all groups", lambda note: note.update(kept=note["kept"] + 1, tries=note["tries"] + 1)),
        ("counted", lambda note: note["groups"].update({"x": note["groups"].pop("")})),
        ("but the checks failed", lambda note: note["by_check"].clear()),
        ("tries that failed face", lambda note: [row["by_check"].update(face=5) for row in (note, note["groups"][""])]),
        ("no valid note", lambda note: note.pop("groups")),
    ]
    for message, edit in changes:
        change(path, lambda told, edit=edit: edit(told["notes"]["checks"]))
        assert any(message in line for line in found_by_verify(root)), message
        path.write_bytes(whole)
    change(path, lambda told: told["notes"].pop("checks"))
    assert any("the receipt does not" in line for line in found_by_verify(root))
    path.write_bytes(whole)
    lines = root / f"edits/_provenance/{NAME}/{SHARD}.jsonl"
    told = lines.read_bytes()
    lines.write_text("".join(json.dumps(line | {"failed_tries": []}) + "\n" for line in read_jsonl(lines)))
    assert any("a sample of 2 tries lists 0 failed ones" in line for line in found_by_verify(root))
    lines.write_bytes(told)
    change_edits(root, lambda curation: curation.update(tries=9))
    assert sum("its json says" in line for line in found_by_verify(root)) == 5
    if what == "reject":
        rejected = root / f"edits/_rejects/{NAME}/{SHARD}.jsonl"
        rejected.write_text("".join(json.dumps(line) + "\n" for line in read_jsonl(rejected) if "tries" not in line))
        assert any("lines in its rejects: 1, counted 0" in line for line in found_by_verify(root))


# ---- options


def test_a_new_folder_checks_for_faces_and_noise_is_not_checked() -> None:
    words = ["--input", "p", "--output", "e"]

    def names(*more: str) -> tuple[str, ...]:
        options = stage.parse_options(stage.Options, [*words, *more])
        options.check()
        return tuple(stage.GenerateImages.settled(options).checking.names)

    assert names() == ("face",)
    assert names("--embedded") == ()
    assert names("--embedded", "--check", "safety,face") == ("face", "safety")
    assert names("--check", "none") == ()
    options = stage.parse_options(stage.Options, [*words, "--check", "face,", "prompt", "--tries", "2"])
    assert (options.checking.names, options.checking.tries) == (("face", "prompt"), 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--check", "faces"], "--check faces: there are face, prompt, group, safety, and none alone"),
        (["--check", "none,face"], "--check none: there are face, prompt, group, safety, and none alone"),
        (["--tries", "2"], "--tries: nothing is checked here (--check none)"),
        (["--on_check_failure", "reject"], "--on_check_failure: nothing is checked here (--check none)"),
        (["--min_faces", "2"], "--min_faces: is for --check face, and here is --check none; leave it out"),
        (["--check", "face", "--max_nsfw", "0.2"], "--max_nsfw: is for --check safety, and here is --check face"),
        (["--check", "face", "--tries", "0"], "--tries must be at least 1"),
        (["--check", "face", "--min_face", "2"], "--min_face must be between 0 and 1"),
        (["--check", "group"], "--check group: decides between two groups or more, and stage 02 has recorded none"),
        (["--check", "face", "--face_detector", "yunet"], "it takes centerface or scrfd"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_input(tmp_path / "data")
    assert run(root, *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_options_and_recipe_hold_what_was_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, plan = make_input(tmp_path / "data"), Plan({"face": passing(FIRST)})
    assert run_planted(root, plan, "--tries", "2") == 0
    options = json.loads((root / f"edits/_receipts/{NAME}/_epoch.1.json").read_bytes())["options"]
    assert options["checks"] == {"face": {"model": "stub-face", "revision": "1", "threshold": 0.5}}
    assert (options["tries"], options["on_check_failure"]) == (2, "best")
    for plan, flags in (
        (Plan({"face": passing(FIRST)}), ["--tries", "3"]),
        (Plan({"face": passing(FIRST)}, threshold=0.6), ["--tries", "2"]),
        (Plan({"face": passing(FIRST)}), ["--tries", "2", "--on_check_failure", "reject"]),
    ):
        assert run_planted(root, plan, *flags) == 2
        assert "with other options" in capsys.readouterr().err


def test_a_folder_of_an_older_version_goes_on_without_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model that is no stand-in, whose new folders are checked for faces."""
    root, model = tmp_path / "data", tmp_path / "my-model"
    for shard in (SHARD, "00000004"):
        make_input(root, 2, shard)
    save_tiny_sd(model)
    loud = ["--model", str(model), "--steps", "1", "--guidance", "0", "--height", "64", "--width", "64"]
    loud += ["--dtype", "float32", "--batch_size", "4"]
    assert run(root, "--check", "none", "--shards", SHARD, small=loud) == 0
    path = root / f"edits/_receipts/{NAME}/_epoch.1.json"
    change(path, lambda record: [record["options"].pop(name) for name in ("checks", "tries", "on_check_failure")])
    capsys.readouterr()
    assert run(root, small=loud) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "--checks none: an older version" in line]
    assert len(told) == 1 and told[0].endswith("new folders and --rerun use face")
    assert "check" not in curation_of(root, "00000004")[0] and metadata_of(root, "00000004")
    assert len(list(path.parent.glob("_epoch.*.json"))) == 1
    assert run(root, "--min_faces", "2", small=loud) == 2
    assert "--min_faces: is for --check face" in capsys.readouterr().err
    assert run(root, "--check", "face", small=loud) == 2
    assert 'with other options (checks: "none" → {"face":' in capsys.readouterr().err
    assert run(root, "--rerun", "--tries", "2", small=loud) == 0
    assert [said["check"] for said in curation_of(root)] == ["failed"] * 2, "noise shows no faces"
    assert (
        "8 tries: 4 kept, 4 of them though they failed; 4 failed and not kept (failed checks: 8 face)"
        in capsys.readouterr().err
    )


def test_a_missing_model_is_told_before_the_image_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    root = make_input(tmp_path / "data")
    monkeypatch.setattr("curation.backends.generate.diffusers.load_pipeline", None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for check in ("prompt", "face --face_detector scrfd"):
        for more in ((), ("--dry_run",)):
            assert run(root, "--check", *check.split(), *more) == 2
            assert "models fetch 03 --check" in capsys.readouterr().err
    assert not (root / f"edits/_receipts/{NAME}/_epoch.1.json").exists()


def test_the_groups_to_decide_between_are_those_that_stage_02_recorded(tmp_path: Path) -> None:
    root = make_input(tmp_path / "data", 2)
    record = {"epoch": 1, "version": 1, "options": {"groups": ["asian female", "black male"]}, "shards": None}
    path = root / "prompts/_receipts/02_captions_processor/_epoch.1.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    (tmp_path / "groups.yml").write_text("[young, old]")

    def groups(*more: str) -> tuple[str, ...]:
        options = stage.parse_options(stage.Options, ["-i", f"{root}/prompts", "-o", f"{root}/edits", *more])
        found = stage.groups_of(options, stage.discover(options.input, ".json"))
        assert options.checking.settings(found).groups == found
        return tuple(found)

    assert groups("--check", "group") == ("asian female", "black male")
    assert groups("--check", "group", "--groups", str(tmp_path / "groups.yml")) == ("young", "old")
    assert groups("--check", "face") == ()
    with pytest.raises(UsageError, match="recorded none beside the prompts; name them with --groups"):
        groups("--check", "group", "--groups", "none")


def test_a_sample_of_an_unknown_group_fails_its_shard_before_a_picture_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_input(tmp_path / "data", 2)
    [first, _] = (name[:-5] for name in json.loads((root / f"prompts/{SHARD}.json").read_bytes()))
    path = root / f"prompts/_provenance/02_captions_processor/{SHARD}.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"key": first, "group": "martian"}) + "\n")
    (tmp_path / "groups.yml").write_text("[young, old]")
    plan = Plan({"group": {(n, 0): 1.0 for n in range(2)}})
    flags = ("--groups", str(tmp_path / "groups.yml"))
    assert run_planted(root, plan, *flags, check="group") == 1
    assert plan.made == []
    said = capsys.readouterr().err
    assert f"{first} is of the group 'martian', and --check group decides between the groups that stage 02" in said
    (tmp_path / "groups.yml").write_text("[young, old, martian]")
    assert run_planted(root, plan, *flags, "--rerun", check="group") == 0


def test_samples_without_a_group_are_told_and_a_shard_of_them_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the check has nothing to judge, its pictures do not pass silently."""
    root = make_input(tmp_path / "data", 4)
    flags = write_groups(root, {})
    plan = Plan({"group": passing(dict.fromkeys(range(4), 0))})
    assert run_planted(root, plan, *flags, check="group") == 1 and plan.made == []
    assert "no sample has a group, so that --check group has nothing to judge" in capsys.readouterr().err
    write_groups(root, {1: "young"})
    loud = [flag for flag in SMALL if flag != "--quiet"]
    assert run_planted(root, Plan(plan.scores), *flags, "--retry_failed", check="group", small=loud) == 0
    assert "; 3 samples without a group, which --check group did not judge" in capsys.readouterr().err
    assert receipt(root)["notes"]["without_group"] == 3


def test_a_run_that_follows_stage_02_waits_for_its_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, looks = make_input(tmp_path / "data", 2), []
    options = stage.parse_options(
        stage.Options,
        ["-i", f"{root}/prompts", "-o", f"{root}/edits", "--check", "group", "--follow", "--follow_idle_s", "600"],
    )
    record = {"epoch": 1, "version": 1, "options": {"groups": ["asian female", "black male"]}, "shards": None}
    path = root / "prompts/_receipts/02_captions_processor/_epoch.1.json"

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(record))

    monkeypatch.setattr(stage.time, "sleep", sleep)
    assert stage.groups_of(options, [], root / "prompts") == ("asian female", "black male")
    assert len(looks) == 3
    shutil.rmtree(root / "prompts/_receipts")
    with pytest.raises(UsageError, match="recorded none beside the prompts"):
        stage.groups_of(replace(options, dry_run=True), [], root / "prompts")
    assert len(looks) == 3


def test_nothing_pending_loads_no_check(tmp_path: Path) -> None:
    root, plan = make_input(tmp_path / "data"), Plan({"face": passing(FIRST)})
    assert run_planted(root, plan) == 0
    again = Plan({"face": passing(FIRST)})
    with on_batch(pytest.MonkeyPatch()):
        assert run_planted(root, again) == 0
    assert not again.stubs
