"""SCRFD (Guo et al. 2021, arXiv:2105.04714), the field's face detector, through the package ``insightface``.

This project does not ship the weights: insightface's pretrained packs are for non-commercial research only.
``models fetch`` takes the detector out of insightface's pack of models.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from curation import PROGRAM
from curation.backends.faces.fitting import import_cv2
from curation.cluster import torch_devices
from curation.errors import InfrastructureError, SampleError, install, install_alone
from curation.faces import AS_PUBLISHED, Boxes, DetectorSettings, FittedImage, normalised
from curation.images import Pixels
from curation.libraries import np
from curation.models.batch_size import (
    LARGEST_BATCH,
    FittingBatchSize,
    Shortage,
    agreed_batch_size,
    find_batch_size,
    free_memory,
    shortage_of,
    use_device,
)
from curation.models.hub_errors import hub_error_line
from curation.models.needs import WeightsNeed
from curation.models.onnx import open_session, read_weights
from curation.models.onnx_torch import TorchGraph, UnknownGraph
from curation.models.weights import megabytes, open_url, save, sha256_of
from curation.options import logger
from curation.storage.files import storage_errors, whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_MODEL = Path("~/.insightface/models/buffalo_l/det_10g.onnx")


PACK_URL = "https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip"


PACK_URL_VARIABLE = "SCRFD_PACK_URL"  # names a mirror of the release


MAX_PACK_BYTES = 1 << 30  # buffalo_l.zip has 275 MB


MAX_GRAPH_BYTES = 512 << 20  # its detector has 17 MB


_OUTPUTS = (6, 9, 10, 15)  # of an SCRFD graph: with and without keypoints, three or five strides


_BLOCK = 1 << 20


_MOST_AT_ONCE = 128  # pictures: more of them bring nothing, and wait long for the last


_TRIAL_SIDE = 320  # pixels of the noise on which torch and onnxruntime are compared


Answer: TypeAlias = "NDArray[np.float32]"


class Backend:
    """insightface's SCRFD over a session of our own.  ``det_size`` is the side of the square that the network sees."""

    name = "scrfd"
    licence = "non-commercial research only"
    parameters, source = 0.0042, "insightface's pack buffalo_l"  # det_10g.onnx: 17 MB of float32
    default_det_size = 640
    default_threshold = 0.5  # insightface's
    packages = ("onnxruntime", "insightface")

    def __init__(self, settings: DetectorSettings = AS_PUBLISHED) -> None:
        det_size, path = settings.det_size, settings.model or _buffalo_l()
        weights, self.revision = read_weights(path)
        session, self.device = open_session(weights, path, settings.threads, None)
        if len(session.get_outputs()) not in _OUTPUTS or len(session.get_inputs()) != 1:
            raise InfrastructureError(
                f"the model {path} is no SCRFD: it has {len(session.get_inputs())} inputs and "
                f"{len(session.get_outputs())} outputs; expected one and {', '.join(map(str, _OUTPUTS))}"
            )
        self.threshold = settings.threshold or self.default_threshold
        # One session for every size: a second one would be built with settings that we do not control.
        self._scrfd = _scrfd_class()(model_file=str(path), session=session, static_shape_sessions=False)
        fixed = self._scrfd.static_input_size  # (width, height) where the graph allows no other
        wanted = det_size or self.default_det_size
        if fixed is not None and det_size is not None and fixed != (wanted, wanted):
            raise InfrastructureError(f"the model {path} takes {fixed[0]} × {fixed[1]} only, not --det_size {det_size}")
        self._size: tuple[int, int] = fixed or (wanted, wanted)
        self.det_size = self.wants_pixels = max(self._size)
        self._scrfd.prepare(0, input_size=self._size, det_thresh=self.threshold)
        self.batched = self._in_torch(weights, path, settings)
        if self.batched is not None:
            self.device = self.batched.device
        elif settings.gpu is not None:
            self._scrfd.session, self.device = open_session(weights, path, settings.threads, settings.gpu)

    def _in_torch(self, weights: bytes, path: Path, settings: DetectorSettings) -> InTorch | None:
        """The network in torch: on a GPU, or where a batch size is given.

        Returns:
            None where it is not wanted, torch cannot, or it does not answer as onnxruntime does; the log has a line.

        Raises:
            InfrastructureError: A batch size is given, and torch is not installed.
        """
        if settings.gpu is None and settings.batch_size is None:
            return None
        try:
            import onnx
            import torch  # noqa: F401 - whether it is there
        except ImportError as error:
            if settings.batch_size is None:
                return None
            raise InfrastructureError(f"--batch_size needs a package ({error}): {install('torch')}") from None
        if settings.gpu is not None and not torch_devices()[1]:
            return None
        scrfd, strides = self._scrfd, len(_strides(self._scrfd))
        height, width = (
            min(side, _TRIAL_SIDE) if scrfd.static_input_size is None else side for side in reversed(self._size)
        )
        try:
            graph = TorchGraph(onnx.load_model_from_string(weights).graph, [1] * strides + [4] * strides)
            graph.check(lambda pixels: scrfd.session.run(None, {scrfd.input_name: pixels}), height, width)
        except UnknownGraph as error:
            logger.warning(f"faces: onnxruntime computes {path.name}, one picture at a time: torch cannot ({error})")
            return None
        return InTorch(graph, scrfd, self._size, settings, self.revision)

    @staticmethod
    def is_here() -> bool:
        return DEFAULT_MODEL.expanduser().is_file()

    @staticmethod
    def model_file() -> Path:
        return _buffalo_l()

    @staticmethod
    def weights() -> WeightsNeed:
        return Pack(os.environ.get(PACK_URL_VARIABLE) or PACK_URL, DEFAULT_MODEL.expanduser())

    def detect(self, rgb: Pixels) -> Boxes:
        height, width = rgb.shape[:2]
        bgr = _not_too_narrow(np.ascontiguousarray(rgb[:, :, ::-1]), min(self._size))
        found, _ = self._scrfd.detect(bgr)
        return normalised(np.asarray(found, np.float32).reshape(-1, 5), width, height)


class InTorch:
    """SCRFD's network in torch, for many pictures at once, between insightface's own first and last steps.

    A batch is filled up to its size, so that the same kernels compute every picture, whichever others are there.
    """

    def __init__(
        self, graph: TorchGraph, scrfd: Any, size: tuple[int, int], settings: DetectorSettings, revision: str
    ) -> None:
        """
        Args:
            graph: The network, on the CPU.
            scrfd: insightface's object for the same file, prepared.
            size: (width, height) of what the network takes.
            settings: See there.
            revision: Of the weights.
        """
        import torch

        self._torch, self._cv2, self._graph, self._scrfd = torch, import_cv2(), graph, scrfd
        self._width, self._height = size
        self.device = "cpu" if settings.gpu is None else f"{torch_devices()[0]}:{settings.gpu}"
        if self.device == "cpu":
            torch.set_num_threads(settings.threads)
        kind = use_device(self.device)
        graph.move(self.device, torch.float32)
        self._centres = [torch.from_numpy(_centres(stride, *size, scrfd._num_anchors)) for stride in _strides(scrfd)]
        self._what = "\0".join(["scrfd", kind, revision, f"{self._width}x{self._height}"])
        self._limits = FittingBatchSize(LARGEST_BATCH, self._what, settings.sizes)
        self.batch_size = self._find_size(settings)
        self._limits.planned = self.batch_size

    def _find_size(self, settings: DetectorSettings) -> int:
        if isinstance(settings.batch_size, int):
            return settings.batch_size
        noise = np.random.default_rng(0).integers(0, 256, (_MOST_AT_ONCE, self._height, self._width, 3), np.uint8)

        def find() -> int:
            return find_batch_size(lambda size: not isinstance(self._infer(noise[:size]), Shortage), _MOST_AT_ONCE)

        return find() if settings.sizes is None else agreed_batch_size(settings.sizes, self._what, find)

    def fit(self, rgb: Pixels) -> FittedImage:
        """As insightface does it: at its own aspect ratio in the upper left corner, black elsewhere."""
        height, width = rgb.shape[:2]
        rgb = _not_too_narrow(rgb, min(self._width, self._height))
        rows, columns = rgb.shape[:2]
        ratio = rows / columns
        if ratio > self._height / self._width:
            new = int(self._height / ratio), self._height
        else:
            new = self._width, int(self._width * ratio)
        pixels = np.zeros((self._height, self._width, 3), np.uint8)
        pixels[: new[1], : new[0]] = self._cv2.resize(rgb, new)
        return FittedImage(pixels, width, height, new[1] / rows)

    def detect_all(self, images: Sequence[FittedImage]) -> list[Boxes | SampleError]:
        """See ``BatchDetector``."""
        size = (self._width, self._height)
        found: list[Boxes | SampleError] = []

        def call(start: int, end: int) -> list[Answer] | Shortage:
            batch = np.zeros((self._limits.limit(*size), self._height, self._width, 3), np.uint8)
            for row, image in enumerate(images[start:end]):
                batch[row] = image.pixels
            return self._infer(batch)

        for start, end, answers in self._limits.split(len(images), size, call, padded=True):
            if isinstance(answers, Shortage):
                where = f"{self._width} × {self._height}, on {self.device}"
                found.append(SampleError("out_of_memory", f"{where}: {answers.text}"))
            else:
                found += [self._boxes(*pair) for pair in zip(images[start:end], answers, strict=False)]
        return found

    def _infer(self, batch: Pixels) -> list[Answer] | Shortage:
        """For each picture its scored boxes in pixels of the network's input, n × 5."""
        torch = self._torch
        try:
            with torch.inference_mode():
                pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
                parts = self._graph(pixels.to(torch.float32).sub(127.5).div(128))  # insightface's mean and deviation
                return self._chosen(parts, len(batch))
        except RuntimeError as error:
            if (shortage := shortage_of(error)) is None:
                raise
        free_memory(self.device)  # outside the handler, whose traceback keeps the tensors alive
        return shortage

    def _chosen(self, parts: Sequence[Any], count: int) -> list[Answer]:
        """Of all places only those above the threshold leave the device."""
        torch, found = self._torch, [list[Answer]() for _ in range(count)]
        strides = _strides(self._scrfd)
        for stride, centres, scores, reach in zip(
            strides, self._centres, parts[: len(strides)], parts[len(strides) :], strict=True
        ):
            pictures, places = (scores[:, :, 0] >= self._scrfd.det_thresh).nonzero(as_tuple=True)
            at = centres.to(self.device)[places]
            steps = reach[pictures, places] * stride
            corners = torch.cat([at - steps[:, :2], at + steps[:, 2:], scores[pictures, places]], 1).cpu().numpy()
            counts = torch.bincount(pictures, minlength=count).cpu().numpy()
            for picture, rows in enumerate(np.split(corners, np.cumsum(counts)[:-1])):
                found[picture].append(rows)
        return [np.concatenate(rows) for rows in found]

    def _boxes(self, image: FittedImage, answer: Answer) -> Boxes:
        boxes = answer.copy()
        boxes[:, :4] /= np.float32(image.scale)
        boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
        return normalised(boxes[self._scrfd.nms(boxes)].reshape(-1, 5), image.width, image.height)


def _strides(scrfd: Any) -> list[int]:
    return list(scrfd._feat_stride_fpn)


def _centres(stride: int, width: int, height: int, anchors: int) -> NDArray[np.float32]:
    """(x, y) of the anchors of a stride, row by row, those of one place side by side."""
    y, x = np.divmod(np.arange((height // stride) * (width // stride) * anchors) // anchors, width // stride)
    return (np.stack([x, y], 1) * stride).astype(np.float32)


def _buffalo_l() -> Path:
    path = DEFAULT_MODEL.expanduser()
    if path.is_file():
        return path
    raise InfrastructureError(
        f"SCRFD's model is not there ({path}).  `{PROGRAM} models fetch 01 --detector scrfd`, where there is internet, "
        "downloads it (for non-commercial research only), and --model names another SCRFD file; or use the small "
        "detector that comes with this project: --detector centerface, or --embedded"
    )


def _scrfd_class() -> Any:
    try:
        from insightface.model_zoo.scrfd import SCRFD
    except ImportError as error:
        module = (error.name or "insightface").partition(".")[0]
        how = install_alone("insightface", beside="scipy") if module == "insightface" else install(module)
        raise InfrastructureError(f"insightface cannot be imported ({error}): {how}") from None
    return SCRFD


def _not_too_narrow(bgr: Pixels, det_size: int) -> Pixels:
    """Fill up an image that is so narrow that insightface would scale its short side to zero pixels."""
    height, width = bgr.shape[:2]
    shortest = -(-max(height, width) // det_size) + 1
    below, right = max(0, shortest - height), max(0, shortest - width)
    return np.pad(bgr, ((0, below), (0, right), (0, 0))) if below or right else bgr


@dataclass(frozen=True, slots=True)
class Pack:
    """insightface's archive ``url``, out of which only the detector is taken, as the file ``model``."""

    url: str
    model: Path

    def fetch(self, *, dry_run: bool) -> None:
        """See ``WeightsNeed``.  No other process ever sees half of the file."""
        print("insightface's pretrained packs are for non-commercial research only; no token is needed")
        url, model = self.url, self.model
        if model.is_file():
            print(f"{model}: is there ({megabytes(model.stat().st_size)}), nothing to fetch")
            return
        with open_url(url, "the pack") as reader:
            size = reader.info.size
            about = "of unknown size" if size is None else megabytes(size)
            if dry_run:
                print(f"{url}: {about}, would be fetched for {model.name} in it, which goes to {model}")
                return
            print(f"{url}: fetching {about}", flush=True)
            with storage_errors(model):
                model.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=model.parent) as archive:
                    save(reader, archive, url, MAX_PACK_BYTES, "the pack")
                    _take_out(archive, model, url)
        print(f"{model}: {megabytes(model.stat().st_size)}, sha256 {sha256_of(model)}")


def _take_out(archive: IO[bytes], model: Path, url: str) -> None:
    """Write the archive's member that has the model's name, whatever folder it is in, and ignore all others."""
    try:
        with zipfile.ZipFile(archive) as pack:
            members = [member for member in pack.infolist() if member.filename.rpartition("/")[2] == model.name]
            if len(members) != 1 or members[0].file_size > MAX_GRAPH_BYTES:
                raise InfrastructureError(f"{url}: holds no {model.name} of a plausible size; that is not the pack")
            with pack.open(members[0]) as source, whole_file(model) as target:
                shutil.copyfileobj(source, target, _BLOCK)  # zipfile checks the size and the checksum
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InfrastructureError(f"{url}: a damaged archive ({hub_error_line(error)}); start again") from error
