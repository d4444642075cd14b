"""``pp-ocr`` and ``pp-ocr-boxes``: where text stands in a picture, how much of it that covers, and what it says.

PP-OCR (PaddleOCR, Apache-2.0): a detector of lines (differentiable binarization, Liao et al. 2020, arXiv:1911.08947), a
classifier of lines that stand on their head, and a reader (CTC).  The three ONNX files lie inside the package
``rapidocr``, of which nothing else is used or imported; what is done around the networks is what that package does.

Lines have any size, so that pictures make no batches: each is read in the process that decoded it, on the CPU.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from curation.errors import InfrastructureError, UsageError, install_alone, require
from curation.extract.api import Batch, Column, Directive, Extractor, Preparation
from curation.extract.settings import ModelSettings, WeightSource
from curation.images import Pixels
from curation.jsonio import clean_text
from curation.libraries import np
from curation.models.onnx import open_session, packaged_file, read_weights
from curation.models.weights import fetch_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PACKAGES = ("cv2", "onnxruntime")

PACKAGE, PACKAGED = "rapidocr", "models/PP-OCRv6_det_small.onnx"

MAX_TEXT_CHARACTERS = 4_000  # of what is read in one picture

MAX_LINES = 300  # that are read in one picture

# A picture that is longer has no text that could be read, and would become very large on the way.
MAX_SHAPE = 64  # times as long as wide

MAX_DETECTOR_PIXELS = 736 * 6144  # what a picture of 2,000 × 240 becomes; a tall strip would become ten times as many

MAX_LINE_SHAPE = 100  # times as long as high: a longer line is squeezed

AREA_SIDE = 1000  # of the grid on which the covered part is counted

_LONGEST, _SHORTEST, _DETECTOR_SIDE, _LINE_HEIGHT, _AT_ONCE = 2000, 30, 736, 48, 6

_LEAST_PIXEL, _LEAST_BOX, _LEAST_TEXT, _UPSIDE_DOWN = 0.3, 0.5, 0.5, 0.9

_MAX_CONTOURS, _LEAST_SIDE, _GROWTH, _SAME_ROW = 1000, 3, 1.6, 10

_ARC = 0.25  # pixels between a rounded corner and its arc

Quads: TypeAlias = "NDArray[np.float32]"  # n × 4 × 2: the corners from the upper left one clockwise, x and y in pixels


class Backend(Extractor):
    """What the preparation found, as columns."""

    directives = (
        Directive(
            "pp-ocr-boxes",
            ("text-boxes", "text-area"),
            (),
            f"package {PACKAGE}",
            "Apache-2.0",
            0.0025,
            packages=_PACKAGES,
        ),
        Directive(
            "pp-ocr",
            ("text-boxes", "text-area", "image-text"),
            (),
            f"package {PACKAGE}",
            "Apache-2.0",
            0.0079,
            packages=_PACKAGES,
        ),
    )

    def __init__(self, directive: str, settings: ModelSettings) -> None:
        sources = self.sources(directive, settings)
        paths = [fetch_weights(s.source, s.sha256, settings.cache, name=directive) for s in sources]
        self.revision = " ".join(read_weights(path)[1] for path in paths)
        self.name = directive
        self._found = TextInPicture(tuple(map(str, paths)))
        self._found(np.zeros((32, 32, 3), np.uint8))  # a wrong file is told now
        self.preparations: tuple[Preparation, ...] = (self._found,)
        self.columns = (Column("text-boxes", "boxes"), Column("text-area", "float32"))
        if directive == "pp-ocr":
            self.columns += (Column("image-text", "string"),)

    @staticmethod
    def sources(directive: str, settings: ModelSettings) -> list[WeightSource]:
        """The package's files, or those of the user's folder."""
        own = packaged_file(PACKAGE, PACKAGED)
        found = settings.source(None if own is None else WeightSource(str(own.parent)))
        if found is None:
            how = f"{install_alone(PACKAGE, beside='onnxruntime')}, or name a folder with its files in `weights`"
            raise InfrastructureError(f"{directive}: the models of PP-OCR are not here: {how}")
        folder = Path(found.source).expanduser()
        if not folder.is_dir():
            raise UsageError(
                f"{directive} {found.source}: is no folder on this machine; its ONNX files have to be in one"
            )
        parts = ("det", "cls", "rec") if directive == "pp-ocr" else ("det",)
        return [WeightSource(str(_file_of(folder, part, directive))) for part in parts]

    def compute(self, batch: Batch) -> Mapping[str, Any]:
        found = batch.prepared(self._found)
        return {column.name: [row.get(column.name) for row in found] for column in self.columns}

    def close(self) -> None:
        _networks.cache_clear()


def _file_of(folder: Path, part: str, directive: str) -> Path:
    """The folder's ONNX file of that part by its name, such as ``PP-OCRv6_det_small.onnx``."""
    found = [path for path in sorted(folder.glob("*.onnx")) if re.search(rf"(^|[_.-]){part}([_.-])", path.name)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InfrastructureError(
            f"{directive} {folder}: one file *_{part}_*.onnx has to be there, and there is: {names}"
        )
    return found[0]


@dataclass(frozen=True, slots=True)
class TextInPicture:
    """A picture → ``text-boxes`` ([x0, y0, x1, y1] as shares of its width and height, line by line from the top),
    ``text-area`` (the share of it that lines cover) and, where all three files are given, ``image-text``.

    files: the detector's, or the detector's, the classifier's and the reader's.  With a reader, what it is not sure of
    is no line.
    """

    takes: ClassVar[Literal["image"]] = "image"
    at_once: ClassVar[int] = 2  # a large picture full of text takes many seconds
    files: tuple[str, ...]

    def __call__(self, pixels: Pixels) -> dict[str, Any]:
        return _networks(self.files).find(pixels)


@functools.lru_cache(maxsize=2)
def _networks(files: tuple[str, ...]) -> PpOcr:
    return PpOcr([Path(file) for file in files])


class PpOcr:
    """The networks, and what is done around them."""

    def __init__(self, files: Sequence[Path]) -> None:
        require("cv2")
        import cv2

        cv2.setNumThreads(1)  # every CPU has a process of its own
        self._cv2: Any = cv2
        self._detector, *others = [_Network(file) for file in files]
        self._classifier = self._reader = None
        if others:
            self._classifier, self._reader = others
            self._letters = self._reader.letters()

    def find(self, rgb: Pixels) -> dict[str, Any]:
        """See ``TextInPicture``."""
        height, width = rgb.shape[:2]
        quads, texts = self._lines(rgb)
        shares = quads / np.array([width, height], np.float32)
        boxes = np.concatenate([shares.min(1), shares.max(1)], 1).clip(0, 1)
        found = {
            "text-boxes": [[float(v) for v in box] for box in boxes],
            "text-area": self._area(quads, width, height),
        }
        if self._reader is not None:
            found["image-text"] = "\n".join(texts)[:MAX_TEXT_CHARACTERS].rstrip("\n")
        return found

    def _lines(self, rgb: Pixels) -> tuple[Quads, list[str]]:
        """The lines of a picture in its own pixels, and what they say if there is a reader."""
        none = np.zeros((0, 4, 2), np.float32), list[str]()
        height, width = rgb.shape[:2]
        if max(height, width) > MAX_SHAPE * min(height, width):
            return none
        image = np.ascontiguousarray(rgb[:, :, ::-1])
        image = self._between(image)
        scale = np.array([width / image.shape[1], height / image.shape[0]], np.float32)
        image, above = self._padded(image)
        quads = self._detect(image)
        if not len(quads):
            return none
        texts: list[str] = []
        if self._reader is not None:
            quads = quads[:MAX_LINES]
            read = self._read(self._upright([self._cut(image, quad) for quad in quads]))
            kept = [i for i, (text, sure) in enumerate(read) if text.strip() and sure >= _LEAST_TEXT]
            quads, texts = quads[kept], [clean_text(read[i][0]) for i in kept]
        quads[:, :, 1] -= above
        return (quads * scale).clip(0, [width, height]).astype(np.float32), texts

    def _area(self, quads: Quads, width: int, height: int) -> float:
        longest = max(width, height)
        columns, rows = (max(1, round(AREA_SIDE * side / longest)) for side in (width, height))
        mask = np.zeros((rows, columns), np.uint8)
        for quad in quads:
            corners = np.rint(quad * [columns / width, rows / height]).astype(np.int32)
            self._cv2.fillConvexPoly(mask, corners, 1)
        return float(np.float32(mask.mean()))

    # ---- sizes

    def _between(self, image: Pixels) -> Pixels:
        """With sides of 30 to 2,000 pixels, multiples of 32 where it has to be resized."""
        for longest in (True, False):
            height, width = image.shape[:2]
            side, wanted = (max(height, width), _LONGEST) if longest else (min(height, width), _SHORTEST)
            if (side > wanted) if longest else (side < wanted):
                image = self._resized(image, wanted / side)
        return image

    def _resized(self, image: Pixels, ratio: float) -> Pixels:
        sides = [max(32, round(int(side * ratio) / 32) * 32) for side in image.shape[:2]]
        resized: Pixels = self._cv2.resize(image, (sides[1], sides[0]))
        return resized

    def _padded(self, image: Pixels) -> tuple[Pixels, int]:
        """A wide or low picture between two black bars, and how high one of these is."""
        height, width = image.shape[:2]
        if height > _SHORTEST and width / height <= 8:
            return image, 0
        bar = int(abs(max(int(width / 8), _SHORTEST) * 2 - height) / 2)
        return np.pad(image, ((bar, bar), (0, 0), (0, 0))), bar

    # ---- the detector

    def _detect(self, image: Pixels) -> Quads:
        """The lines of a BGR picture, row by row."""
        height, width = image.shape[:2]
        ratio = max(1.0, _DETECTOR_SIDE / min(height, width))
        ratio = min(ratio, math.sqrt(MAX_DETECTOR_PIXELS / (height * width)))
        resized = self._resized(image, ratio)
        numbers = (resized.astype(np.float32) * (1 / 255.0) - 0.5) / 0.5
        heat = self._detector(numbers.transpose(2, 0, 1)[None])[0, 0]
        mask = self._cv2.dilate((heat > _LEAST_PIXEL).astype(np.uint8), np.ones((2, 2), np.uint8))
        contours = self._cv2.findContours(mask * 255, self._cv2.RETR_LIST, self._cv2.CHAIN_APPROX_SIMPLE)[-2]
        seen, own = np.array(heat.shape[::-1], np.float32), np.array([width, height], np.float32)
        found = []
        for contour in contours[:_MAX_CONTOURS]:
            quad = self._quad(heat, contour)
            if quad is None:
                continue
            corners = np.round(quad / seen * own).clip(0, own).astype(np.int32)
            ordered = _clockwise(corners).clip(0, [width - 1, height - 1]).astype(np.float32)
            sides = (np.linalg.norm(ordered[0] - ordered[1]), np.linalg.norm(ordered[0] - ordered[3]))
            if min(map(int, sides)) > _LEAST_SIDE:
                found.append(ordered)
        return _by_rows(np.array(found, np.float32).reshape(-1, 4, 2))

    def _quad(self, heat: NDArray[np.float32], contour: Any) -> NDArray[np.float32] | None:
        """The rectangle around a contour, grown to the line's whole height; None where it is no line."""
        quad, least = self._rectangle(contour)
        if least < _LEAST_SIDE or self._mean(heat, quad) < _LEAST_BOX:
            return None
        x, y = quad.astype(np.float64).T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        around = np.hypot(x - np.roll(x, 1), y - np.roll(y, 1)).sum()
        grown = grow(quad, float(area * _GROWTH / around))
        quad, least = self._rectangle(np.array(grown, np.int32)[:, None])
        return None if least < _LEAST_SIDE + 2 else quad

    def _rectangle(self, points: Any) -> tuple[NDArray[np.float32], float]:
        """The smallest rectangle around points: its corners from the upper left one clockwise, and its shorter side."""
        found = self._cv2.minAreaRect(points)
        a, b, c, d = sorted(self._cv2.boxPoints(found), key=lambda corner: corner[0])
        upper_left, lower_left = (a, b) if b[1] > a[1] else (b, a)
        upper_right, lower_right = (c, d) if d[1] > c[1] else (d, c)
        return np.array([upper_left, upper_right, lower_right, lower_left]), min(found[1])

    def _mean(self, heat: NDArray[np.float32], quad: NDArray[np.float32]) -> float:
        """Of the heat inside a quadrilateral."""
        height, width = heat.shape
        (left, top), (right, bottom) = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
        left, right = (min(max(int(x), 0), width - 1) for x in (left, right))
        top, bottom = (min(max(int(y), 0), height - 1) for y in (top, bottom))
        mask = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
        self._cv2.fillPoly(mask, (quad - np.array([left, top], np.float32))[None].astype(np.int32), 1)
        return float(self._cv2.mean(heat[top : bottom + 1, left : right + 1], mask)[0])

    # ---- the classifier and the reader

    def _cut(self, image: Pixels, quad: NDArray[np.float32]) -> Pixels:
        """A line as an upright picture; one that runs downwards is turned."""
        width = int(max(np.linalg.norm(quad[0] - quad[1]), np.linalg.norm(quad[2] - quad[3])))
        height = int(max(np.linalg.norm(quad[0] - quad[3]), np.linalg.norm(quad[1] - quad[2])))
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
        cv2 = self._cv2
        transform = cv2.getPerspectiveTransform(quad, corners)
        line: Pixels = cv2.warpPerspective(
            image, transform, (width, height), borderMode=cv2.BORDER_REPLICATE, flags=cv2.INTER_CUBIC
        )
        return np.rot90(line) if height / width >= 1.5 else line

    def _upright(self, lines: list[Pixels]) -> list[Pixels]:
        assert self._classifier is not None
        turned = list(lines)
        for group in _by_shape(lines):
            numbers = np.stack([self._line(lines[i], 4 * _LINE_HEIGHT) for i in group])
            for i, answer in zip(group, self._classifier(numbers), strict=True):
                if answer.argmax() == 1 and answer[1] > _UPSIDE_DOWN:
                    turned[i] = np.ascontiguousarray(lines[i][::-1, ::-1])
        return turned

    def _read(self, lines: list[Pixels]) -> list[tuple[str, float]]:
        """What each line says, and how sure the reader is."""
        assert self._reader is not None
        found = [("", 0.0)] * len(lines)
        for group in _by_shape(lines):
            longest = max(320 / _LINE_HEIGHT, *(lines[i].shape[1] / lines[i].shape[0] for i in group))
            width = int(_LINE_HEIGHT * min(longest, MAX_LINE_SHAPE))
            answers = self._reader(np.stack([self._line(lines[i], width) for i in group]))
            for i, best, sure in zip(group, answers.argmax(2), answers.max(2), strict=True):
                # CTC: what follows itself is one letter, and 0 is none.
                new = (best != 0) & np.concatenate([[True], best[1:] != best[:-1]])
                text = "".join(self._letters[letter] for letter in best[new])
                rounded = [round(float(value), 5) for value in sure[new]] or [0]
                found[i] = text, float(np.mean(rounded).round(5))
        return found

    def _line(self, line: Pixels, width: int) -> NDArray[np.float32]:
        """A line at a height of 48 pixels, −1 to 1, with zeros behind it."""
        own = min(width, math.ceil(_LINE_HEIGHT * (line.shape[1] / line.shape[0])))
        resized = self._cv2.resize(line, (own, _LINE_HEIGHT)).astype(np.float32).transpose(2, 0, 1) / 255
        padded = np.zeros((3, _LINE_HEIGHT, width), np.float32)
        padded[:, :, :own] = (resized - 0.5) / 0.5
        return padded


class _Network:
    """One ONNX file with one input and one output, on one thread of the CPU."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Pictures have every size: memory that is kept for the largest one would add up in a process for each CPU.
        self._session = open_session(read_weights(path)[0], path, 1, None, keep_memory=False)[0]
        if len(self._session.get_inputs()) != 1 or len(self._session.get_outputs()) != 1:
            raise InfrastructureError(f"{path}: a network of PP-OCR has one input and one output, this one has others")
        self._input = self._session.get_inputs()[0].name

    def __call__(self, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._session.run(None, {self._input: numbers})[0]
        return found

    def letters(self) -> list[str]:
        """What each output of a reader stands for: none, those that the file names, and a space."""
        told = self._session.get_modelmeta().custom_metadata_map.get("character")
        letters = ["", *(told or "").splitlines(), " "]
        outputs = self._session.get_outputs()[0].shape[-1]
        if not told or (isinstance(outputs, int) and outputs != len(letters)):
            raise InfrastructureError(
                f"{self._path}: names {len(letters) - 2} letters for {outputs} outputs; rapidocr's files name them all"
            )
        return letters


def grow(quad: NDArray[np.float32], distance: float) -> list[tuple[int, int]]:
    """The points of a convex polygon that is ``distance`` larger on every side, with rounded corners.

    On whole numbers, as the library Clipper does it, which PaddleOCR grows its boxes with (A. Johnson's ClipperOffset,
    round joins): the corners lose what is behind the point, and each corner becomes an arc of points.
    """
    points = list(dict.fromkeys((int(x), int(y)) for x, y in quad))
    following = [*points[1:], points[0]]
    if sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, following, strict=True)) < 0:
        points.reverse()
        following = [*points[1:], points[0]]
    outwards = []
    for (x, y), (next_x, next_y) in zip(points, following, strict=True):
        length = math.hypot(next_x - x, next_y - y)
        outwards.append(((next_y - y) / length, (x - next_x) / length))
    steps = math.pi / math.acos(1 - min(_ARC, distance * _ARC) / distance)  # in a whole circle
    steps = min(steps, math.pi * distance)
    sine, cosine = math.sin(2 * math.pi / steps), math.cos(2 * math.pi / steps)
    grown = []
    for number, (x, y) in enumerate(points):
        (ax, ay), (bx, by) = outwards[number - 1], outwards[number]
        angle = math.atan2(ax * by - bx * ay, ax * bx + ay * by)
        dx, dy = ax, ay
        for _ in range(max(1, _rounded(steps * abs(angle) / (2 * math.pi)))):
            grown.append((_rounded(x + dx * distance), _rounded(y + dy * distance)))
            dx, dy = dx * cosine - dy * sine, dx * sine + dy * cosine
        grown.append((_rounded(x + bx * distance), _rounded(y + by * distance)))
    return grown


def _rounded(number: float) -> int:
    """Half away from zero."""
    return int(number + math.copysign(0.5, number))


def _clockwise(corners: NDArray[np.int32]) -> NDArray[np.int32]:
    """Four corners from the upper left one."""
    by_x = corners[np.argsort(corners[:, 0])]
    (a, b), (c, d) = (pair[np.argsort(pair[:, 1])] for pair in (by_x[:2], by_x[2:]))
    return np.array([a, c, d, b])


def _by_rows(quads: Quads) -> Quads:
    """From the top, and in a row from the left; in a row are those that begin less than 10 pixels apart."""
    quads = quads[np.argsort(quads[:, 0, 1], kind="stable")]
    rows = np.cumsum(np.diff(quads[:, 0, 1], prepend=quads[:1, 0, 1]) >= _SAME_ROW)
    return quads[np.lexsort((quads[:, 0, 0], rows))]


def _by_shape(lines: Sequence[Pixels]) -> list[list[int]]:
    """Numbers of lines in groups of six, the shortest first, so that little is padded."""
    order = np.argsort([line.shape[1] / line.shape[0] for line in lines]).tolist()
    return [order[first : first + _AT_ONCE] for first in range(0, len(order), _AT_ONCE)]
