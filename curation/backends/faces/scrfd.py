"""SCRFD (Guo et al. 2021, arXiv:2105.04714), the field's face detector, through the package ``insightface``.

This project does not ship the weights: insightface's pretrained packs are for non-commercial research only.
``models fetch`` takes the detector out of insightface's pack of models.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from curation import PROGRAM
from curation.errors import InfrastructureError, install, install_alone
from curation.faces import AS_PUBLISHED, Boxes, DetectorSettings, normalised
from curation.images import Pixels
from curation.models.hub_errors import hub_error_line
from curation.models.needs import WeightsNeed
from curation.models.onnx import open_session, read_weights
from curation.models.weights import megabytes, open_url, save, sha256_of
from curation.storage.files import storage_errors, whole_file

DEFAULT_MODEL = Path("~/.insightface/models/buffalo_l/det_10g.onnx")


PACK_URL = "https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip"


PACK_URL_VARIABLE = "SCRFD_PACK_URL"  # names a mirror of the release


MAX_PACK_BYTES = 1 << 30  # buffalo_l.zip has 275 MB


MAX_GRAPH_BYTES = 512 << 20  # its detector has 17 MB


_OUTPUTS = (6, 9, 10, 15)  # of an SCRFD graph: with and without keypoints, three or five strides


_BLOCK = 1 << 20


class Backend:
    """insightface's SCRFD over a session of our own.  ``det_size`` is the side of the square that the network sees."""

    name = "scrfd"
    licence = "non-commercial research only"
    parameters, source = 0.0042, "insightface's pack buffalo_l"  # det_10g.onnx: 17 MB of float32
    default_det_size = 640
    default_threshold = 0.5  # insightface's

    def __init__(self, settings: DetectorSettings = AS_PUBLISHED) -> None:
        det_size, path = settings.det_size, settings.model or _buffalo_l()
        weights, self.revision = read_weights(path)
        session, self.device = open_session(weights, path, settings.threads, settings.gpu)
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

    @staticmethod
    def is_here() -> bool:
        return DEFAULT_MODEL.expanduser().is_file()

    @staticmethod
    def weights() -> WeightsNeed:
        return Pack(os.environ.get(PACK_URL_VARIABLE) or PACK_URL, DEFAULT_MODEL.expanduser())

    def detect(self, rgb: Pixels) -> Boxes:
        height, width = rgb.shape[:2]
        bgr = _not_too_narrow(np.ascontiguousarray(rgb[:, :, ::-1]), min(self._size))
        found, _ = self._scrfd.detect(bgr)
        return normalised(np.asarray(found, np.float32).reshape(-1, 5), width, height)


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
