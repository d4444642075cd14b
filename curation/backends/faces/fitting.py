"""How a picture is made fit for a network that takes any size."""

from __future__ import annotations

from typing import Any

from curation.errors import InfrastructureError
from curation.images import Pixels


def import_cv2() -> Any:
    """OpenCV on one thread: a pool of its own would compete with the threads that call a detector.

    Raises:
        InfrastructureError: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise InfrastructureError(f"cv2 cannot be imported ({error}): pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    return cv2


def fit(cv2: Any, rgb: Pixels, longest: int, multiple: int) -> tuple[Pixels, tuple[int, int]]:
    """Resize a picture at its own aspect ratio and fill it up with black to the right and below.

    Args:
        cv2: OpenCV, as ``import_cv2`` returns it.
        rgb: The picture, height × width × 3.
        longest: What its longest side is brought to, in pixels.
        multiple: What both sides of the result are multiples of.

    Returns:
        The filled picture, and (width, height) in pixels before the filling.
    """
    height, width = rgb.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    below, right = -size[1] % multiple, -size[0] % multiple
    return cv2.copyMakeBorder(rgb, 0, below, 0, right, cv2.BORDER_CONSTANT), size
