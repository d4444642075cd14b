"""What checks are constructed with: their models, their thresholds, and where they compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSettings:
    """How the checks of one run judge; every check reads its own part.

    Attributes:
        min_faces: Faces that a picture has to show, as stage 01 counts them.
        min_face: The shorter side of a face's box, as a share of the picture's shorter side: smaller ones do not count.
        face_detector: A name of ``curation/backends/faces``.
        min_prompt_score: The lowest cosine of picture and prompt that passes.  None: the model's own, which is known of
            OpenAI's two CLIPs; every other model has a scale of its own, so that a number has to be given.
        prompt_model: A directive of stage 06 that gives a score: ``oai-clip-vit-l14``, ``clip:…``, ``openclip:…``,
            ``siglip:…``.
        groups: All groups that the run asks for.
        group_model: A directive of stage 06 as ``prompt_model``.  The same one is loaded and computed once for both.
        max_nsfw: The highest probability of a picture that is not safe for work that passes.
        nsfw_model: ``open-nsfw``, or ``nsfw-image-oai-clip-vit-l-14``, the head on ``oai-clip-vit-l14``.
        device: torch's name of the device.
        threads: CPU threads of one computation.
        cache: The folder that downloads of weights from URLs stay in.
    """

    min_faces: int = 1
    min_face: float = 0.05
    face_detector: str = "centerface"
    min_prompt_score: float | None = None
    prompt_model: str = "oai-clip-vit-l14"
    groups: tuple[str, ...] = ()
    group_model: str = "oai-clip-vit-l14"
    max_nsfw: float = 0.5
    nsfw_model: str = "open-nsfw"
    device: str = "cpu"
    threads: int = 1
    cache: Path = Path("~/.cache/curation/weights")
