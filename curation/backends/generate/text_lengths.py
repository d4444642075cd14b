"""Few lengths of text for compiled transformers whose texts have any length, for each would be compiled on its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

LENGTHS = (128, 256, 512)  # tokens; longer texts are padded to a multiple of the last


def padded_length(tokens: int) -> int:
    """The length to which a text of so many tokens is padded."""
    last = LENGTHS[-1]
    return next((length for length in LENGTHS if tokens <= length), -(-tokens // last) * last)


def pad_texts(transformer: Any) -> bool:
    """Have a transformer pad its texts to ``LENGTHS``.  The padding is masked, so that no picture depends on it.

    Blocks get a mask with every call, because a call with and one without a mask are compiled on their own too.

    Args:
        transformer: A denoiser of diffusers; it is changed in place.

    Returns:
        Whether it is one whose texts have any length.  Others have one length of text, and are left alone.
    """
    if all(hasattr(transformer, name) for name in ("_prepare_sequence", "_build_unified_sequence", "cap_pad_token")):
        _pad_z_image(transformer)
        return True
    if {"encoder_hidden_states", "encoder_hidden_states_mask"} <= {*inspect.signature(transformer.forward).parameters}:
        transformer.register_forward_pre_hook(_pad_masked, with_kwargs=True)
        return True
    return False


def _pad_z_image(transformer: Any) -> None:
    """Z-Image fills up each caption to a multiple of 32 with a token that it was trained with; that stays.  What it
    then pads to the longest caption of the batch, behind its mask, is padded further here."""
    prepare, unify = transformer._prepare_sequence, transformer._build_unified_sequence

    def prepare_sequence(feats: Any, pos_ids: Any, pad_mask: Any, pad_token: Any, *more: Any, **named: Any) -> Any:
        found = prepare(feats, pos_ids, pad_mask, pad_token, *more, **named)
        if pad_token is not transformer.cap_pad_token:
            return found  # the picture's own tokens: their number is fixed
        sequence, freqs, _, lengths, noise = found
        return *_padded(sequence, freqs, lengths, padded_length(max(lengths))), lengths, noise

    def build_unified_sequence(
        x: Any, x_freqs: Any, x_seqlens: Any, x_noise: Any, cap: Any, cap_freqs: Any, cap_seqlens: Any, *more: Any
    ) -> Any:
        found = unify(x, x_freqs, x_seqlens, x_noise, cap, cap_freqs, cap_seqlens, *more)
        sequence, freqs, _, noise = found
        if noise is not None:
            return found  # with pictures among the inputs, whose numbers vary
        lengths = [image + text for image, text in zip(x_seqlens, cap_seqlens, strict=True)]
        return *_padded(sequence, freqs, lengths, max(x_seqlens) + padded_length(max(cap_seqlens))), noise

    transformer._prepare_sequence = prepare_sequence
    transformer._build_unified_sequence = build_unified_sequence


def _padded(sequence: Any, freqs: Any, lengths: Sequence[int], length: int) -> tuple[Any, Any, Any]:
    """A sequence and the angles of its places, padded to ``length``, with the mask that leaves out the padding."""
    import torch

    most = torch.tensor(lengths, device=sequence.device)
    mask = torch.arange(length, device=sequence.device)[None] < most[:, None]
    return _with_zeros(sequence, length), _with_zeros(freqs, length), mask


def _pad_masked(_: Any, arguments: Any, named: Mapping[str, Any]) -> Any:
    """Qwen-Image and its kin take a mask beside their texts, or none where all texts of a batch have one length."""
    texts, mask = named.get("encoder_hidden_states"), named.get("encoder_hidden_states_mask")
    if texts is None:
        return None
    length = padded_length(texts.shape[1])
    mask = texts.new_ones(texts.shape[:2]).bool() if mask is None else mask.bool()
    padded = {"encoder_hidden_states": _with_zeros(texts, length)}
    return arguments, {**named, **padded, "encoder_hidden_states_mask": _with_zeros(mask, length)}


def _with_zeros(tensor: Any, length: int) -> Any:
    """rows × places × … with zeros behind, up to ``length`` places: always a new tensor, because for compiled code one
    with another layout in memory would be another kind."""
    import torch

    missing = length - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)
