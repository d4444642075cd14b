#!/usr/bin/env python3
"""Stage 01: keep the samples whose image shows a face, and write their captions and metadata."""

import curation  # noqa: F401 - first: it refuses an old Python, and names packages that are missing

# isort: split

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import xxhash

from curation import backends
from curation.backends.faces import defaults_of_all, detector_class, detector_named, here, known_models
from curation.cluster import Allocation, do_without_gpus
from curation.errors import InfrastructureError, SampleError, ShardError, UsageError, require
from curation.faces import (
    RECORDED_FIELD,
    Agreement,
    DetectorSettings,
    FaceDetector,
    FittedImage,
    recorded_boxes,
    without_area,
)
from curation.images import decode_rgb, image_size
from curation.jsonio import KEY_SUFFIX, dump_json, parse_json, write_dictionary
from curation.libraries import np
from curation.models.known import find
from curation.models.listing import asks_for_models, list_models
from curation.models.needs import NothingToFetch, WeightsNeed
from curation.models.onnx import read_weights
from curation.options import (
    Explained,
    FolderName,
    Sources,
    also,
    at_least,
    between,
    less_than,
    logger,
    more_than,
    parse_options,
)
from curation.publish.running import published
from curation.run import RunOptions, ShardContext, Stage, run_stage, stage_main
from curation.run.checkpoints import Checkpoints
from curation.run.inputs import check_made_by
from curation.run.work import LATER_PARTS, Later
from curation.shards import Shard, discover, local_folders, select
from curation.tar.samples import Sample, caption_of, check_loose_name, image_of, metadata_of, read_samples
from curation.tar.scan import IMAGE_SUFFIXES
from curation.threads import prefetch

if TYPE_CHECKING:
    from numpy.typing import NDArray

EDITS_STAGE = "03_generate_images"  # it writes into --edits too
NO_DETECTORS = ("auto", "recorded")
DETECTORS = (*NO_DETECTORS, *backends.names("faces"))
MORE_MODELS = "--detector recorded uses the boxes in the metadata, and no model; --model names another ONNX file."
DEFAULT_DETECTOR, EMBEDDED_DETECTOR = "scrfd", "centerface"  # if ``auto`` must detect faces
CHECKPOINT = 64  # detected samples that go into the partial log together
MOST_IN_GROUP = 4096  # samples that wait for a batch of the detector
MAX_BYTES_AHEAD = 256 << 20  # limit for images that are read ahead of the detector
DET_SIZE_HELP = (
    "Size in pixels of the longest side of the detector's input.  Default: the detector's own, "
    f"{defaults_of_all('default_det_size')}."
)
THRESHOLD_HELP = (
    "Lowest score at which a detection counts as a face.  Default: the detector's own, "
    f"{defaults_of_all('default_threshold')}."
)
LOOKED_AT = 1000  # samples of a shard in a dry run
LARGE_PIXELS = 16_000_000  # such images are decoded one at a time: up to 700 MB each while Pillow works on them

BLURRED = (
    "DataComp's published faces are often blurred, and a detector misses those: --detector recorded trusts the boxes "
    "that were made before the blurring"
)

Boxes = list[list[float]]  # x0, y0, x1, y1 as shares of width and height; a detector's have their score behind
Begun: TypeAlias = "tuple[Candidate, Future[Boxes | FittedImage] | None]"  # with a future if its pixels are needed


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Keep the samples whose image shows at least one face; write their captions and their metadata."""

    help_groups: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "image_member": "picture and caption",
            "detector": "detector",
            "min_faces": "selection",
            "batch_size": "speed",
            "edits_layout": "output",
        }
    )
    example: ClassVar[str] = "--input shards --output captions --edits edits"

    input: Annotated[Sources, also("-i")]
    """Source shards: a folder, a glob, braces, a list file, one tar, https:// or s3:// URLs, or pipe: commands; also
    several."""
    output: Annotated[FolderName, also("-o")]
    """Folder for the captions, one <shard>.json each."""
    edits: FolderName
    """Folder for the kept samples' metadata, one <shard>.json each; later stages write their edits there too."""
    image_member: str | None = None
    """Which of several pictures of a sample is read: auto (key.jpg, else the first, such as key.0.jpg), plain (key.jpg
    alone), or a name: 0, 0.jpg.  Default: auto; plain in an output folder from an older version."""
    caption_field: str | None = None
    """Field of the json with the caption: auto (caption, or text where that is absent), or a name.  Without it the
    member txt or txt.gz is read.  Default: auto; caption in an output folder from an older version."""
    detector: Annotated[str, Explained(metavar=f"{{{','.join(DETECTORS)}}}")] = "auto"
    """recorded: use face_bboxes in the metadata.  A detector's name: detect faces with it.  auto: recorded if the
    field exists and is not null, otherwise scrfd (with --embedded: centerface)."""
    list_models: bool = False
    """Print the detectors with licence, memory and whether their weights are on this machine, and end."""
    embedded: bool = False
    """If auto must detect faces, use the small detector that comes with this project (CenterFace)."""
    model: str | None = None
    """Another ONNX file for the detector.  Default: the detector's own."""
    det_size: Annotated[int | None, between(32, 4096), Explained(DET_SIZE_HELP)] = None
    """Size in pixels of the longest side of the detector's input; --help lists each detector's default."""
    threshold: Annotated[float | None, more_than(0), less_than(1), Explained(THRESHOLD_HELP)] = None
    """Lowest score at which a detection counts as a face; --help lists each detector's default."""
    min_faces: Annotated[int, at_least(1)] = 1
    """Number of faces that a sample needs."""
    select: Literal["face", "noface"] = "face"
    """Keep samples with faces, or those without."""
    batch_size: Annotated[int | Literal["auto"] | None, also("-b"), at_least(1)] = None
    """Images that SCRFD looks at at once, in torch; auto: found by trials.  Default: auto on a GPU; on the CPU
    onnxruntime looks at one at a time, which is faster there."""
    threads: Annotated[int | None, at_least(1)] = None
    """Number of images that are processed in parallel, one core each.  Default: the cores of this process."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU if onnxruntime has CUDA.  cpu: compute on the CPU, even if there are GPUs."""
    edits_layout: Literal["tar", "files"] = "tar"
    """files: each kept sample's metadata also as a loose <shard>/<key>.json in --edits, as older tools expect."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detector", detector_named(self.detector, NO_DETECTORS))  # in its own spelling

    def check(self) -> None:
        super().check()
        if self.model is not None and find(self.model, known_models()) and not Path(self.model).expanduser().exists():
            raise UsageError(f"--model {self.model}: is for an ONNX file; a detector is named with --detector")
        if Path(self.output).absolute() == Path(self.edits).absolute():
            raise UsageError("--output and --edits must be two folders: both hold <shard>.json")
        if self.batch_size is not None and self.pixel_detector != DEFAULT_DETECTOR:
            raise UsageError(
                f"--batch_size is for --detector {DEFAULT_DETECTOR}: the others look at one image at a time"
            )
        if self.det_size is not None and self.det_size % 32:
            raise UsageError("--det_size must be a multiple of 32")
        if self.embedded and self.detector == DEFAULT_DETECTOR:
            raise UsageError(
                "--embedded is for --detector auto or centerface: SCRFD's weights do not come with the project"
            )
        if self.detector == "recorded" and (self.model or self.det_size or self.threshold):
            raise UsageError("--detector recorded reads no pixels: leave --model, --det_size and --threshold out")

    @property
    def pixel_detector(self) -> str | None:
        """The backend that looks at pixels, if this run may need one."""
        if self.detector == "recorded":
            return None
        if self.detector == "auto":
            return EMBEDDED_DETECTOR if self.embedded else DEFAULT_DETECTOR
        return self.detector

    @property
    def looks_at_every_image(self) -> bool:
        """Whether a detector was named, which then also processes samples with recorded boxes."""
        return self.detector not in ("auto", "recorded")


@dataclass(slots=True)
class Candidate:
    """A sample in progress: its data, then its boxes or its error."""

    key: str
    metadata: dict[str, Any] = field(default_factory=dict)
    txt: bytes | None = None
    image: bytes | None = None  # only while a detector needs it
    digest: str = ""  # of the image
    recorded: Boxes | None = None
    without_area: int = 0  # recorded boxes that are ignored
    detected: Boxes | None = None
    error: SampleError | None = None

    @property
    def faces(self) -> int:
        boxes = self.recorded if self.detected is None else self.detected
        return len(boxes or ())


class FilterFaces(Stage[Options]):
    """One shard: shards/<shard>.tar → captions/<shard>.json and edits/<shard>.json."""

    name = "01_filter_noface"
    opening = "loading the face detector"
    opens_quickly = True
    uses_device = True
    later: ClassVar[Mapping[str, Later]] = LATER_PARTS

    def __init__(self, options: Options) -> None:
        super().__init__(options, options.output)
        self.other_outputs = (Path(options.edits),)
        self._threads = 1
        self._gpu: int | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._one_large_image = threading.Lock()
        self._lock = threading.Lock()
        self._agreement = Agreement()
        self.meets_pixels = options.looks_at_every_image  # whether it is known that a sample needs the detector

    def fingerprint(self) -> dict[str, object]:
        o = self.options
        return {
            "detector": o.detector,
            "pixels": o.pixel_detector,
            "model": read_weights(Path(o.model))[1] if o.model else None,
            "det_size": o.det_size,
            "threshold": o.threshold,
            "min_faces": o.min_faces,
            "select": o.select,
            "edits_layout": o.edits_layout,
            "image_member": o.image_member,
            "caption_field": o.caption_field,
        }

    @classmethod
    def weights(cls, options: Options) -> Sequence[WeightsNeed]:
        if options.pixel_detector is None:
            return [NothingToFetch("--detector recorded reads no pixels: nothing to fetch")]
        if options.model is None:
            return [detector_class(options.pixel_detector).weights()]
        if not Path(options.model).expanduser().is_file():
            raise InfrastructureError(f"--model {options.model}: no such file; your own file is not downloaded")
        return [NothingToFetch(f"{options.model}: your own file, nothing to fetch")]

    @classmethod
    def require(cls, options: Options) -> None:
        if options.looks_at_every_image:
            require(*detector_class(str(options.pixel_detector)).packages)

    def open(self, allocation: Allocation) -> None:
        self._threads = self.options.threads or allocation.threads
        self._gpu = None if self.options.device == "cpu" else allocation.gpu
        if self.meets_pixels:
            _ = self.detector

    @cached_property
    def detector(self) -> FaceDetector:
        """The detector, loaded for the first image that needs it: with recorded boxes, ``auto`` needs none."""
        o = self.options
        if self._gpu is None and o.device != "cpu" and not o.embedded:
            do_without_gpus("no GPU can be seen here", "")  # detectors are fast enough on a CPU partition
        model = Path(o.model) if o.model else None
        # Several runs of the model with one thread each are twice as fast as one run with several threads.
        settings = DetectorSettings(
            model,
            o.det_size,
            o.threshold,
            threads=1 if o.batch_size is None else self._threads,
            gpu=self._gpu,
            batch_size=o.batch_size,
            sizes=self.output / "_batch_sizes" / self.name,
        )
        loaded = detector_class(o.pixel_detector or "")(settings)
        at_once = "" if loaded.batched is None else f", {loaded.batched.batch_size} images at once"
        logger.info(f"faces: {loaded.name} ({loaded.revision}) on {loaded.device}{at_once}, {self._threads} threads")
        self._pool = ThreadPoolExecutor(self._threads, "faces")
        return loaded

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._agreement.total:
            level = logging.WARNING if self._agreement.is_low else logging.INFO
            logger.log(level, f"{self.name}: {self._agreement.describe()}")

    def result(self, counts: Mapping[str, int]) -> str:
        what = "with" if self.options.select == "face" else "without"
        return f"{counts['kept']:,} samples {what} a face found"

    # ---- one shard

    def process(self, work: ShardContext) -> None:
        agreement = Agreement()
        captions: list[tuple[str, str]] = []
        ignored = 0
        edits = Path(self.options.edits)

        def kept() -> Iterator[tuple[str, Any]]:
            nonlocal ignored
            for candidate in self._with_boxes(self._read(work), work):
                ignored += candidate.without_area
                caption = self._decide(candidate, work, agreement)
                if caption is not None:
                    name = candidate.key + KEY_SUFFIX
                    captions.append((name, caption))
                    if self.options.edits_layout == "files":
                        with work.output(edits / work.shard.id / name, checked=False) as file:
                            file.write(dump_json(candidate.metadata))
                    yield name, candidate.metadata

        with work.output(edits / f"{work.shard.id}.json") as file:
            write_dictionary(file, kept())
        with work.output(self.output / f"{work.shard.id}.json") as file:
            write_dictionary(file, captions)
        if ignored:
            work.note("boxes_without_area", ignored)
            work.warn(f"{ignored:,} recorded face boxes have no area in the picture: ignored")
        self._report(agreement, work)

    def _read(self, work: ShardContext) -> Iterator[Candidate]:
        """Every sample of the tar with its metadata, and with its image if a detector needs it."""
        images = () if self.options.detector == "recorded" else IMAGE_SUFFIXES
        for sample in work.samples({"json", "txt", *images}):
            candidate = Candidate(sample.key)
            try:
                sample.check()
                self._fill(candidate, sample)
            except SampleError as error:
                candidate.error = error
            yield candidate

    def _fill(self, candidate: Candidate, sample: Sample) -> None:
        candidate.metadata = metadata_of(sample)
        candidate.txt = sample.members.get("txt")
        detector = self.options.detector
        try:
            candidate.recorded = recorded_boxes(candidate.metadata)
            candidate.without_area = without_area(candidate.metadata)
        except SampleError:
            if detector in ("auto", "recorded"):  # otherwise they are only compared
                raise
        if candidate.recorded is None and detector == "recorded":
            how = "null" if RECORDED_FIELD in candidate.metadata else "absent"
            raise SampleError(f"{how}_{RECORDED_FIELD}", "--detector auto looks at the pixels of such samples")
        if candidate.recorded is None or self.options.looks_at_every_image:
            candidate.image = image_of(sample)
            candidate.digest = xxhash.xxh3_128_hexdigest(candidate.image)

    # ---- looking at pixels

    def _with_boxes(self, candidates: Iterable[Candidate], work: ShardContext) -> Iterator[Candidate]:
        """The candidates in their order, each with its boxes or its error; detected ones are in the partial log."""
        checkpoints = Checkpoints(lambda: work.partial(mark(self.detector)), work.check_stop, CHECKPOINT)

        def begin(candidate: Candidate) -> Future[Boxes | FittedImage] | None:
            if candidate.image is None:
                return None
            found = checkpoints.find(candidate.key, candidate.digest)
            candidate.detected = None if found is None else parse_json(found)
            if candidate.detected is not None or self._pool is None:  # without a detector there is no pool
                return None
            return self._pool.submit(self._look, candidate.image, work)

        def size_of(candidate: Candidate) -> int:
            return len(candidate.image or b"")

        ahead = 4 * self._threads + 2 * self._at_once()
        for group in _groups(prefetch(candidates, begin, size_of, ahead, MAX_BYTES_AHEAD), self._at_once):
            self._finish(group, work)
            for candidate, pending in group:
                if pending is not None and candidate.error is None:
                    checkpoints.add(candidate.key, candidate.digest, dump_json(candidate.detected))
                candidate.image = None
                checkpoints.check_urgent()
                yield candidate
        checkpoints.save()

    def _at_once(self) -> int:
        """How many images the detector looks at at once; 1 as long as there is none."""
        batched = self.detector.batched if self._pool is not None else None
        return 1 if batched is None else batched.batch_size

    def _finish(self, group: Sequence[Begun], work: ShardContext) -> None:
        """Give each candidate whose image was begun its boxes or its error."""
        fitted: list[tuple[Candidate, FittedImage]] = []
        for candidate, pending in group:
            if pending is None:
                continue
            try:
                found = pending.result()
                if isinstance(found, FittedImage):
                    fitted.append((candidate, found))
                else:
                    candidate.detected = found
            except SampleError as error:
                candidate.error = error
        if fitted and self.detector.batched is not None:
            with work.phase("infer"):
                boxes = self.detector.batched.detect_all([image for _, image in fitted])
            for (candidate, _), answer in zip(fitted, boxes, strict=True):
                if isinstance(answer, SampleError):
                    candidate.error = answer
                else:
                    candidate.detected = _rounded(answer)

    def _look(self, image: bytes, work: ShardContext) -> Boxes | FittedImage:
        """In a thread of the pool: the faces of an image, or the image as a detector of many images takes it."""
        width, height = image_size(image)
        with self._one_large_image if width * height > LARGE_PIXELS else nullcontext():
            with work.phase("decode"):
                rgb = decode_rgb(image, at_least=self.detector.wants_pixels)
                if self.detector.batched is not None:
                    return self.detector.batched.fit(rgb)
            with work.phase("infer"):
                return _rounded(self.detector.detect(rgb))

    # ---- what becomes of a sample

    def _decide(self, candidate: Candidate, work: ShardContext, agreement: Agreement) -> str | None:
        """The caption of a sample that is kept; None for one that was dropped or has failed."""
        o = self.options
        key, faces = candidate.key, candidate.faces
        try:
            if candidate.error is not None:
                raise candidate.error
            if candidate.detected is not None and candidate.recorded is not None:
                agreement.add(recorded=bool(candidate.recorded), detected=bool(candidate.detected))
            if (faces >= o.min_faces) != (o.select == "face"):
                work.drop(key, "face" if o.select == "noface" else "too_few_faces" if faces else "no_face")
                return None
            caption = caption_of(work.sample_parts.told(candidate.metadata), candidate.txt)
            if o.edits_layout == "files":
                check_loose_name(key)
        except SampleError as error:
            work.fail(key, error.reason, error.detail)
            return None
        work.keep()
        if candidate.detected is not None:
            by = {"detector": self.detector.name, "revision": self.detector.revision}
            work.provenance({"key": key, "faces": faces, "boxes": candidate.detected, **by})
        return caption

    def _report(self, agreement: Agreement, work: ShardContext) -> None:
        """Report the agreement of the detector with the recorded boxes, for samples that have both."""
        if not agreement.total:
            return
        work.note("agreement", {**asdict(agreement), "kappa": round(agreement.kappa, 4)})
        if agreement.is_low:
            work.warn(f"{agreement.describe()}.  {BLURRED}")
        with self._lock:
            self._agreement += agreement


def lacks_boxes(shards: Sequence[Shard]) -> bool:
    """Whether one of the first samples of the first, the middle or the last shard has no recorded boxes, so that
    ``--detector auto`` needs its detector.  Only files of this machine are looked at."""
    there = [shard for shard in shards if isinstance(shard.path, Path)]
    for shard in [there[n] for n in sorted({0, len(there) // 2, len(there) - 1})] if there else []:
        with suppress(ShardError):
            for sample in islice(read_samples(shard.path, ("json",)), LOOKED_AT):
                with suppress(SampleError):
                    if recorded_boxes(metadata_of(sample)) is None:
                        return True
    return False


def _rounded(boxes: "NDArray[np.float32]") -> Boxes:
    """x0, y0, x1, y1 as shares of width and height, and the score, of each face."""
    return [[round(float(value), 4) for value in box] for box in boxes]


def _groups(begun: Iterable[Begun], at_once: Callable[[], int]) -> Iterator[list[Begun]]:
    """The candidates in their order, so many that were begun together; no more than a few of the others with them."""
    group: list[Begun] = []
    count = 0
    for one in begun:
        group.append(one)
        count += one[1] is not None
        if count in (0, at_once()) or len(group) == MOST_IN_GROUP:
            yield group
            group, count = [], 0
    if group:
        yield group


def mark(detector: FaceDetector) -> str:
    """Part of a checkpoint's name, so that detections of other weights are not reused."""
    return f"{detector.name}-{detector.revision[-8:]}"


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    if asks_for_models(argv):
        print(list_models("01", known_models(), MORE_MODELS, here, "--detector NAME"))
        return 0
    options = parse_options(Options, argv)
    options.check()
    check_made_by("--output", Path(options.output), FilterFaces.name)
    check_made_by("--edits", Path(options.edits), EDITS_STAGE, beside=(FilterFaces.name,))
    options = FilterFaces.settled(options)
    shards = discover(options.input, allow_pipe=options.allow_pipe, begun=(Path(options.output), Path(options.edits)))
    if Path(options.edits).resolve() in local_folders(shards):
        raise UsageError("--edits must not be the folder of the source shards: stage 03 would replace them")
    stage = FilterFaces(options)
    if options.dry_run and options.detector == "auto":
        stage.meets_pixels = lacks_boxes(select(shards, options.shards))
    needed = "stages 02 to 04 read the captions and the edits on this filesystem"
    return published(options, stage, lambda: run_stage(stage, options, shards), needed_by=needed)


if __name__ == "__main__":
    sys.exit(main())
