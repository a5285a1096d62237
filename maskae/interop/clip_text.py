"""CLIP's text transformer and its projections from a file in Hugging Face's layout of CLIPModel.

The numbers of words are those of CLIP's byte-pair vocabulary of 49,408 (github.com/openai/CLIP, bpe_simple_vocab_16e6.txt.gz).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.layout import LINEAR, VALUE, Flat, Geometry, Layout, Rule, from_foreign
from maskae.interop.vit import clip_block, norm
from maskae.interop.weights import read_tensors
from maskae.paths import flatten_paths, unflatten_paths

TEXT = Layout(
    (
        Rule("word_position", ("text_model.embeddings.position_embedding.weight",), VALUE),
        *clip_block("block_{i}", "text_model.encoder.layers.{i}"),
        *norm("norm", "text_model.final_layer_norm"),
        Rule("projection/kernel", ("text_projection.weight",), LINEAR),
        Rule("image_projection/kernel", ("visual_projection.weight",), LINEAR),
    ),
    prefixes=("module.", "_orig_mod.", "clip_model."),
)
EMBEDDING = "text_model.embeddings.token_embedding.weight"

# "<start> a | face showing forg ery clues <end>": "A [domain] [class] face showing forgery clues" without what is learned.
GM_DF_WORDS = (49406, 320, 1710, 3649, 645, 32845, 23764, 49407)


def read_text_tower(path: str | Path, tower: dict[str, Any], image_projection: Any, words: tuple[int, ...]) -> tuple[dict[str, Any], Any]:
    """A text tower with the values of a file, and the projection of the image tower beside it.

    Args:
        path: a safetensors file.
        tower: parameters of `maskae.nn.prompts.TextTower` and `words` [L, D], whose shapes are kept.
        image_projection: [width of the image tower, outputs].
        words: numbers in the vocabulary, whose embeddings become `words`.

    Returns:
        The tower with its words, and the image projection, as numpy arrays.

    Raises:
        UserError: the file lacks one of them or has another shape.
    """
    tensors, _ = read_tensors(path)
    own: Flat = flatten_paths({name: value for name, value in tower.items() if name != "words"})
    own["image_projection/kernel"] = image_projection
    loaded, report = from_foreign(tensors, own, TEXT, Geometry(1, (1, 1)), None)
    wrong = report.mismatched + [f"{name} is not in it" for name in report.missing]
    table = next((tensor for name, tensor in tensors.items() if name.endswith(EMBEDDING)), None)
    if table is None or table.shape[1] != tower["words"].shape[1] or len(table) <= max(words):
        wrong.append(f"{EMBEDDING} is {'missing' if table is None else list(table.shape)}")
    if wrong:
        raise UserError(f"{path} is no text tower of these sizes, {len(wrong)} leaves differ: {'; '.join(wrong[:3])}")
    found = unflatten_paths({name: np.asarray(value, jnp.float32) for name, value in loaded.items()})
    projection = found.pop("image_projection")["kernel"]
    assert table is not None
    return {**found, "words": np.asarray(table, np.float32)[list(words)]}, projection
