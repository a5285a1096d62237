"""Layouts of plain vision transformers and masked autoencoders: the papers' released code, timm, Hugging Face transformers, and ours."""

from __future__ import annotations

from maskae.interop.layout import FIRST, LINEAR, OUT_PROJECTION, PATCH, SPLIT_BIAS, SPLIT_KERNEL, VALUE, VECTOR, Layout, Rule, Shape


def linear(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/kernel", (f"{theirs}.weight",), LINEAR), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/scale", (f"{theirs}.weight",), VECTOR), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def _projection(ours: str, theirs: str, kernel: Shape) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/kernel", (f"{theirs}.weight",), kernel), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def paper_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A block with one fused qkv matrix, as MAE's released code and timm name it; `{i}` in both is the block's number."""
    return (
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *_projection(f"{ours}/attention/qkv", f"{theirs}.attn.qkv", LINEAR),
        *_projection(f"{ours}/attention/out", f"{theirs}.attn.proj", OUT_PROJECTION),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
        Rule(f"{ours}/layer_scale1", (f"{theirs}.ls1.gamma",), VALUE),
        Rule(f"{ours}/layer_scale2", (f"{theirs}.ls2.gamma",), VALUE),
    )


def huggingface_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A block with separate query, key and value maps, as Hugging Face transformers name it."""
    attention = tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
    return (
        *norm(f"{ours}/norm1", f"{theirs}.layernorm_before"),
        Rule(f"{ours}/attention/qkv/kernel", tuple(f"{name}.weight" for name in attention), SPLIT_KERNEL),
        Rule(f"{ours}/attention/qkv/bias", tuple(f"{name}.bias" for name in attention), SPLIT_BIAS),
        *_projection(f"{ours}/attention/out", f"{theirs}.attention.output.dense", OUT_PROJECTION),
        *norm(f"{ours}/norm2", f"{theirs}.layernorm_after"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.intermediate.dense"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.output.dense"),
    )


def clip_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A block of OpenAI's CLIP as Hugging Face transformers name it."""
    attention = tuple(f"{theirs}.self_attn.{part}_proj" for part in ("q", "k", "v"))
    return (
        *norm(f"{ours}/norm1", f"{theirs}.layer_norm1"),
        Rule(f"{ours}/attention/qkv/kernel", tuple(f"{name}.weight" for name in attention), SPLIT_KERNEL),
        Rule(f"{ours}/attention/qkv/bias", tuple(f"{name}.bias" for name in attention), SPLIT_BIAS),
        *_projection(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj", OUT_PROJECTION),
        *norm(f"{ours}/norm2", f"{theirs}.layer_norm2"),
        *linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
    )


TIMM_ENCODER = (
    *_projection("encoder/patch_embed", "patch_embed.proj", PATCH),
    Rule("encoder/cls_token", ("cls_token",), VALUE),
    Rule("encoder/position", ("pos_embed",), VALUE),
    *paper_block("encoder/block_{i}", "blocks.{i}"),
    *norm("encoder/norm", "norm"),
    *norm("fc_norm", "fc_norm"),
    *linear("head", "head"),
)
PAPER_DECODER = (
    *linear("decoder/embed", "decoder_embed"),
    Rule("decoder/mask_token", ("mask_token",), VALUE),
    *paper_block("decoder/block_{i}", "decoder_blocks.{i}"),
    *norm("decoder/norm", "decoder_norm"),
    *linear("decoder/head", "decoder_pred"),
)
HUGGINGFACE = (
    *_projection("encoder/patch_embed", "vit.embeddings.patch_embeddings.projection", PATCH),
    Rule("encoder/cls_token", ("vit.embeddings.cls_token",), VALUE),
    Rule("encoder/position", ("vit.embeddings.position_embeddings",), VALUE),
    *huggingface_block("encoder/block_{i}", "vit.encoder.layer.{i}"),
    *norm("encoder/norm", "vit.layernorm"),
    *linear("head", "classifier"),
    *linear("decoder/embed", "decoder.decoder_embed"),
    Rule("decoder/mask_token", ("decoder.mask_token",), VALUE),
    *huggingface_block("decoder/block_{i}", "decoder.decoder_layers.{i}"),
    *norm("decoder/norm", "decoder.decoder_norm"),
    *linear("decoder/head", "decoder.decoder_pred"),
)
CLIP = (
    # Its patch projection has no bias.
    Rule("encoder/patch_embed/kernel", ("vision_model.embeddings.patch_embedding.weight",), PATCH),
    Rule("encoder/cls_token", ("vision_model.embeddings.class_embedding",), VECTOR),
    Rule("encoder/position", ("vision_model.embeddings.position_embedding.weight",), FIRST),
    *norm("encoder/pre_norm", "vision_model.pre_layrnorm"),
    *clip_block("encoder/block_{i}", "vision_model.encoder.layers.{i}"),
    *norm("encoder/norm", "vision_model.post_layernorm"),
)

LAYOUTS: dict[str, Layout] = {
    # The released MAE code: an encoder named as in timm, and a decoder beside it.
    "paper": Layout(TIMM_ENCODER + PAPER_DECODER, {"pos_embed": "encoder/cls_token", "decoder_pos_embed": "decoder/mask_token"}),
    "timm": Layout(TIMM_ENCODER, {"pos_embed": "encoder/cls_token"}),
    # ViTMAEForPreTraining, ViTForImageClassification, and (without "vit.") ViTModel.
    "huggingface": Layout(
        HUGGINGFACE,
        {"vit.embeddings.position_embeddings": "encoder/cls_token", "decoder.decoder_pos_embed": "decoder/mask_token"},
        ("module.", "_orig_mod.", "vit."),
    ),
    # The image encoder of CLIPModel and CLIPVisionModel.
    "clip": Layout(CLIP, prefixes=("module.", "_orig_mod.", "clip_model.", "vision_model.")),
    "maskae": Layout((Rule("{path}", ("{path}",), VALUE),), prefixes=()),
}
