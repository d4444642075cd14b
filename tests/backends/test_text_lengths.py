"""Transformers whose texts have any length: padded to few, they are compiled few times and paint the same pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.backends.generate.diffusers import Backend, Request
from curation.backends.generate.presets import preset_for
from curation.backends.generate.text_lengths import LENGTHS, pad_texts, padded_length
from curation.models.hub_cache import resolve
from tests.backends.tiny_pipelines import save_tiny_z_image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

SIDE = 64
LONGEST = (20, 45, 60, 100, 130, 160)  # bytes of a batch's longest prompt


def test_the_lengths_are_few() -> None:
    assert [padded_length(tokens) for tokens in (1, 128, 129, 512, 513, 1025)] == [128, 128, 256, 512, 1024, 1536]
    assert {padded_length(tokens) for tokens in range(1, 513)} == {*LENGTHS}


def open_z_image(folder: Path) -> Backend:
    preset = preset_for("Tongyi-MAI/Z-Image-Turbo")[1]
    return Backend(
        resolve(str(folder)),
        replace(preset, steps=2, height=SIDE, width=SIDE, dtype="float32", batch_size=2),
        threads=1,
    )


def wanted(longest: int) -> list[Request]:
    return [Request("a" * longest, 1), Request("b" * (longest - 15), 2)]


def test_z_image_paints_the_same_with_longer_texts(tmp_path: Path) -> None:
    save_tiny_z_image(tmp_path)
    plain, padded = open_z_image(tmp_path), open_z_image(tmp_path)
    transformer = padded.pipeline.transformer
    assert pad_texts(transformer)
    seen: set[Any] = set()

    def look(_: Any, given: Any) -> None:
        seen.add(tuple((one.shape, one.stride()) for one in given[:3] if one is not None))

    for block in (*transformer.layers, *transformer.context_refiner, *transformer.noise_refiner):
        block.register_forward_pre_hook(look)
    for longest in LONGEST:
        made = [backend.generate(wanted(longest), SIDE, SIDE) for backend in (plain, padded)]
        pixels = [np.stack([images.image(n) for n in range(2)]).astype(int) for images in made]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1, longest
    # The picture's own blocks see one kind of input, and those of the text and of both one for each of two lengths.
    assert len(seen) == 1 + 2 * 2


@pytest.mark.soak
def test_z_image_is_compiled_once_for_each_length(tmp_path: Path) -> None:
    """Graphs are traced as they are for ``--compile blocks``; what would then be compiled runs as it is."""
    from torch import _dynamo

    save_tiny_z_image(tmp_path)
    backend = open_z_image(tmp_path)
    transformer = backend.pipeline.transformer
    pad_texts(transformer)
    _dynamo.reset()
    counted = _dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    transformer.compile_repeated_blocks(dynamic=False, backend="eager")
    for longest in LONGEST:
        backend.generate(wanted(longest), SIDE, SIDE)
    assert counted["unique_graphs"] - before == 1 + 2 * 2


def test_qwen_image_paints_the_same_with_longer_texts() -> None:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    pictures = torch.randn(2, 16, 16)
    seen: set[tuple[int, bool]] = set()

    def look(_: Any, arguments: Any, named: Any) -> None:
        seen.add((named["encoder_hidden_states"].shape[1], named["encoder_hidden_states_mask"] is None))

    def made(texts: Any, mask: Any) -> Any:
        with torch.no_grad():
            return model(
                hidden_states=pictures, encoder_hidden_states=texts, encoder_hidden_states_mask=mask,
                timestep=torch.tensor([0.5, 0.5]), img_shapes=[[(1, 4, 4)]] * 2, return_dict=False,
            )[0]  # fmt: skip

    cases = []
    for length in (7, 30, 90):
        texts = torch.randn(2, length, 24)
        cases += [(texts, None), (texts, torch.arange(length)[None] < torch.tensor([[length], [length - 3]]))]
    expected = [made(*case) for case in cases]
    assert pad_texts(model)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(look, with_kwargs=True)
    for case, before in zip(cases, expected, strict=True):
        assert torch.allclose(made(*case), before, atol=1e-5)
    assert seen == {(128, False)}


def test_transformers_with_one_length_of_text_are_left_alone() -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), in_channels=16,
    )  # fmt: skip
    assert not pad_texts(model) and not model._forward_pre_hooks
