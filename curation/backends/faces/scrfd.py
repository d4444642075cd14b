"""SCRFD (Guo et al. 2021, arXiv:2105.04714), the field's face detector, through the package ``insightface``.

The weights are not ours to ship: insightface's pretrained packs are for non-commercial research only.

insightface's pack of models, out of which the detector SCRFD is taken.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from curation.errors import InfrastructureError
from curation.faces import Boxes, normalised
from curation.images import Pixels
from curation.models.onnx import open_session, read_weights
from curation.models.weights import hub_error_line, megabytes, open_url, save, sha256_of
from curation.storage.files import storage_errors, whole_file

DEFAULT_DET_SIZE = 640


DEFAULT_THRESHOLD = 0.5  # insightface's


DEFAULT_MODEL = Path("~/.insightface/models/buffalo_l/det_10g.onnx")


PACK_URL = "https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip"

_OUTPUTS = (6, 9, 10, 15)  # of an SCRFD graph: with and without keypoints, three or five strides


class Backend:
    """insightface's SCRFD over a session of our own.  ``detect`` may be called from several threads at once."""

    name = "scrfd"

    def __init__(
        self,
        model: Path | None = None,
        det_size: int | None = None,
        threshold: float | None = None,
        threads: int = 1,
        gpu: int | None = None,
    ) -> None:
        """model: any SCRFD ONNX file, buffalo_l's by default.  det_size: the side of the square that the network sees.

        threads: CPU threads of one ``detect``; several calls side by side with one thread each are faster.
        """
        path = model or _buffalo_l()
        weights, self.revision = read_weights(path)
        session, self.device = open_session(weights, path, threads, gpu)
        if len(session.get_outputs()) not in _OUTPUTS or len(session.get_inputs()) != 1:
            raise InfrastructureError(
                f"the model {path} is no SCRFD: it has {len(session.get_inputs())} inputs and "
                f"{len(session.get_outputs())} outputs; expected one and {', '.join(map(str, _OUTPUTS))}"
            )
        self.threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        # One session for every size: a second one would be built with settings that we do not control.
        self._scrfd = _scrfd_class()(model_file=str(path), session=session, static_shape_sessions=False)
        fixed = self._scrfd.static_input_size  # (width, height) where the graph allows no other
        wanted = DEFAULT_DET_SIZE if det_size is None else det_size
        if fixed is not None and det_size is not None and fixed != (wanted, wanted):
            raise InfrastructureError(f"the model {path} takes {fixed[0]} × {fixed[1]} only, not --det_size {det_size}")
        self._size: tuple[int, int] = fixed or (wanted, wanted)
        self.det_size = self.wants_pixels = max(self._size)
        self._scrfd.prepare(0, input_size=self._size, det_thresh=self.threshold)

    def detect(self, rgb: Pixels) -> Boxes:
        """The faces of a height × width × 3 image: n × 5, corners x0, y0, x1, y1 in [0, 1] and score, best first."""
        height, width = rgb.shape[:2]
        bgr = _not_too_narrow(np.ascontiguousarray(rgb[:, :, ::-1]), min(self._size))
        found, _ = self._scrfd.detect(bgr)
        return normalised(np.asarray(found, np.float32).reshape(-1, 5), width, height)


def _buffalo_l() -> Path:
    path = DEFAULT_MODEL.expanduser()
    if path.is_file():
        return path
    raise InfrastructureError(
        f"SCRFD's model is not there ({path}).  Get {PACK_URL} and unzip it into that folder (the pretrained packs are "
        "for non-commercial research only), or name an SCRFD file with --model; or use the small detector that comes "
        "with this project: --detector centerface, or --embedded"
    )


def _scrfd_class() -> Any:
    try:
        from insightface.model_zoo.scrfd import SCRFD
    except ImportError as error:
        raise InfrastructureError(
            f"insightface cannot be imported ({error}): pip install 'curation[faces]' and "
            "pip install --no-deps insightface"
        ) from None
    return SCRFD


def _not_too_narrow(bgr: Pixels, det_size: int) -> Pixels:
    """Fill up an image of an extreme shape, whose short side insightface would scale to zero pixels."""
    height, width = bgr.shape[:2]
    shortest = -(-max(height, width) // det_size) + 1
    below, right = max(0, shortest - height), max(0, shortest - width)
    return np.pad(bgr, ((0, below), (0, right), (0, 0))) if below or right else bgr


MAX_PACK_BYTES = 1 << 30  # buffalo_l.zip has 275 MB


MAX_GRAPH_BYTES = 512 << 20  # its detector has 17 MB


_BLOCK = 1 << 20


def fetch_scrfd(url: str, model: Path, *, dry_run: bool = False) -> None:
    """The detector out of insightface's pack ``url``, as the file ``model``; needs no token.

    Only that file is taken out of the archive, whatever else is in it; nobody sees half of it.
    """
    print("insightface's pretrained packs are for non-commercial research only; no token is needed")
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
    """The member with the model's name, in whatever folder of the archive it is."""
    try:
        with zipfile.ZipFile(archive) as pack:
            members = [member for member in pack.infolist() if member.filename.rpartition("/")[2] == model.name]
            if len(members) != 1 or members[0].file_size > MAX_GRAPH_BYTES:
                raise InfrastructureError(f"{url}: holds no {model.name} of a plausible size; that is not the pack")
            with pack.open(members[0]) as source, whole_file(model) as target:
                shutil.copyfileobj(source, target, _BLOCK)  # zipfile checks the size and the checksum
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InfrastructureError(f"{url}: a damaged archive ({hub_error_line(error)}); start again") from error
