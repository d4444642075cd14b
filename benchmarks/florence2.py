"""Florence-2 with random weights in three sizes, saved as the hub's models are: the models of ``recaption.py``.

``base`` is the real architecture, 0.23 billion parameters, from the published model's configuration; ``small`` is what
two CPU cores can do in a minute; ``tiny`` tells whether the code runs.  Nothing is downloaded; the speed does not
depend on the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measuring  # noqa: F401 - makes the project importable

from curation.backends.extract.tokens import byte_letters
from curation.backends.generate.tiny import fill_with_noise

VOCABULARY = 51_289
SENTENCES = (  # what the tasks ask: each word is one token, as in the real vocabulary
    "What does the image describe?",
    "Describe in detail what is shown in the image.",
    "Describe with a paragraph what is shown in the image.",
)
VISION = {  # width, depth and heads of the four stages; window
    "base": ([128, 256, 512, 1024], [1, 1, 9, 1], [4, 8, 16, 32], 12),
    "small": ([32, 64, 128, 256], [1, 1, 3, 1], [2, 4, 8, 16], 8),
    "tiny": ([8, 16, 32, 32], [1, 1, 1, 1], [2, 2, 2, 2], 4),
}
TEXT = {  # width, layers of encoder and decoder each, heads
    "base": (768, 6, 12),
    "small": (256, 3, 4),
    "tiny": (32, 1, 2),
}


def tokenizer() -> Any:
    """Bytes, the words of the tasks, and words that nobody asks for up to the size of the real vocabulary."""
    from transformers import BartTokenizerFast

    pieces = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_letters()])}
    merges: dict[tuple[str, str], None] = {}
    for sentence in SENTENCES:
        for word in sentence.replace(".", "").replace("?", "").split():
            for start in ("", "Ġ"):
                whole = start + word
                for end in range(2, len(whole) + 1):
                    merges[whole[: end - 1], whole[end - 1]] = None
                    pieces.setdefault(whole[:end], len(pieces))
    while len(pieces) < VOCABULARY - 1:
        pieces[f"Ġw{len(pieces)}"] = len(pieces)
    return BartTokenizerFast(vocab=pieces, merges=list(merges), extra_special_tokens={"image_token": "<image>"})


def save(folder: Path, size: str, side: int, tokens: int) -> None:
    """A model that takes images of ``side``² pixels and says exactly ``tokens`` tokens about each."""
    from transformers import (
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    words = tokenizer()
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        resample=3,
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images.image_seq_length = 1 + (side // 32) ** 2
    width, layers, heads = TEXT[size]
    widths, depths, parts, window = VISION[size]
    config = Florence2Config(
        vision_config={
            "embed_dim": widths, "depths": depths, "num_heads": parts, "num_groups": parts, "window_size": window,
            "projection_dim": width,
        },
        text_config={
            "model_type": "bart", "d_model": width, "vocab_size": len(words), "encoder_layers": layers,
            "decoder_layers": layers, "encoder_attention_heads": heads, "decoder_attention_heads": heads,
            "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width, "max_position_embeddings": 1024,
        },
        image_token_id=words.image_token_id,
    )  # fmt: skip
    model = Florence2ForConditionalGeneration(config)
    fill_with_noise(model, 1)
    model.generation_config.update(
        num_beams=3, no_repeat_ngram_size=3, decoder_start_token_id=2, bos_token_id=0, eos_token_id=2, pad_token_id=1
    )  # as the real ones come
    # Each caption is as long as it may be, and its last token ends it, because a text that was cut is no caption.
    model.generation_config.update(min_new_tokens=tokens - 1, max_new_tokens=tokens)
    model.generation_config.update(exponential_decay_length_penalty=(tokens - 2, 1e4), forced_eos_token_id=None)
    model.save_pretrained(folder, safe_serialization=True)
    Florence2Processor(images, words, post_processor_config={"pure_text": {}}).save_pretrained(folder)
