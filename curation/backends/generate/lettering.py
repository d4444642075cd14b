"""A text in readable type over a picture: the stand-in model shows which prompt a picture belongs to.

The type is Pillow's own, which has the letters of English.  Accents are left out, and a character that the type lacks
is drawn as an empty box, so that a prompt in any script can be written.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from curation.jsonio import clean_text
from curation.libraries import np

if TYPE_CHECKING:
    import numpy.typing as npt

MIN_SIZE: Final = 8  # pixels: smaller type cannot be read
LINES: Final = 14  # about how many lines of type are as high as the picture's shorter side
MAX_TEXT: Final = 2_000  # characters that are looked at; several times what fits
ELLIPSIS: Final = "…"
_DASHES: Final = dict.fromkeys(range(0x2010, 0x2016), "-") | {0x2212: "-"}  # the type has none of them


def written_over(pixels: npt.NDArray[np.uint8], title: str, text: str) -> npt.NDArray[np.uint8]:
    """Returns a copy of the picture (height × width × 3) with the title and, below it, as much of the text as fits.

    The result depends on nothing else, and every text gives one.
    """
    from PIL import Image, ImageDraw

    height, width = pixels.shape[:2]
    size, margin = _measures(width, height)
    font, line_height = _font(size), size + size // 4
    dark = pixels.copy()
    lines = [plain(title), *wrapped(text, width, height)]
    for row in range(len(lines)):  # white type can be read on any noise that is made dark
        top = margin + row * line_height
        dark[top : top + line_height] //= 5
    image = Image.fromarray(dark)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        place = (margin, margin + row * line_height)
        draw.text(place, line, font=font, fill=(255, 255, 255) if row else (255, 214, 64))
    return np.asarray(image)


def wrapped(text: str, width: int, height: int) -> list[str]:
    """Returns the lines of a text that fit into a picture below its title; an ellipsis ends a text that is cut.

    Words are kept whole, except for those that are longer than a line.
    """
    size, margin = _measures(width, height)
    font, room = _font(size), width - 2 * margin
    at_most = max(0, (height - margin) // (size + size // 4) - 1)
    words = plain(text[: MAX_TEXT + 1]).split(" ")
    lines: list[str] = []
    line = ""
    while words:
        longer = f"{line} {words[0]}" if line else words[0]
        if font.getlength(longer) <= room:
            line = longer
            words.pop(0)
        elif line:
            lines.append(line)
            line = ""
        else:
            fits = max(1, _fitting(words[0], font, room))
            lines.append(words[0][:fits])
            words[0] = words[0][fits:]
        if len(lines) > at_most:
            break
    lines += [line] if line else []
    if len(lines) <= at_most and len(text) <= MAX_TEXT:
        return lines
    lines = lines[:at_most]
    if lines:
        lines[-1] = lines[-1][: _fitting(lines[-1], font, room - font.getlength(ELLIPSIS))].rstrip() + ELLIPSIS
    return lines


def plain(text: str) -> str:
    """Returns one line without control characters, accents, and marks that join their neighbours."""
    letters = unicodedata.normalize("NFKD", clean_text(text)[:MAX_TEXT])
    letters = "".join(letter for letter in letters if unicodedata.category(letter) not in ("Mn", "Me", "Cf"))
    return clean_text(letters.translate(_DASHES))


def _measures(width: int, height: int) -> tuple[int, int]:
    """Returns the size of the type and the margin, in pixels."""
    size = max(MIN_SIZE, min(width, height) // LINES)
    return size, size // 4


def _fitting(text: str, font: Any, room: float) -> int:
    """Returns how many characters of a text fit into a line; each character has a width of its own."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= room else (low, middle - 1)
    return low


@cache
def _font(size: int) -> Any:
    """Pillow's own type.  The basic layout, because the other one needs a library that not every machine has."""
    from PIL import ImageFont

    font: Any = ImageFont.load_default(size)
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
