"""How the released code of Point-MAE and Point-CMAE names and shapes parameters and running statistics."""

from __future__ import annotations

import numpy as np

from maskae.interop.layout import VALUE, VECTOR, Geometry, Layout, Rule, Shape
from maskae.interop.vit import linear, norm, paper_block
from maskae.nn.batch_norm import STATISTICS

GEOMETRY = Geometry(1, (1, 1))
# A map over single points is stored as a convolution of kernel size 1.
CONVOLUTION = Shape(lambda x, _: (x.transpose(1, 0)[:, :, None],), lambda parts, shape: parts[0][:, :, 0].transpose(1, 0))
# CLS tokens of several views, one tensor each.
VIEWS = Shape(lambda x, _: tuple(x[i : i + 1] for i in range(x.shape[0])), lambda parts, _: np.concatenate(parts))


def _convolution(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/kernel", (f"{theirs}.weight",), CONVOLUTION), Rule(f"{ours}/bias", (f"{theirs}.bias",), VECTOR))


def _statistics(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}/mean", (f"{theirs}.running_mean",), VECTOR), Rule(f"{ours}/variance", (f"{theirs}.running_var",), VECTOR))


def _position(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (*linear(f"{ours}/fc1", f"{theirs}.0"), *linear(f"{ours}/fc2", f"{theirs}.2"))


def _encoder(theirs: str) -> tuple[Rule, ...]:
    """The encoder but for its CLS tokens, with its running statistics; `theirs` ends with a dot or is empty."""
    return (
        *_convolution("encoder/tokenizer/local1", f"{theirs}encoder.first_conv.0"),
        *norm("encoder/tokenizer/local_norm", f"{theirs}encoder.first_conv.1"),
        *_statistics(f"{STATISTICS}/encoder/tokenizer/local_norm", f"{theirs}encoder.first_conv.1"),
        *_convolution("encoder/tokenizer/local2", f"{theirs}encoder.first_conv.3"),
        *_convolution("encoder/tokenizer/group1", f"{theirs}encoder.second_conv.0"),
        *norm("encoder/tokenizer/group_norm", f"{theirs}encoder.second_conv.1"),
        *_statistics(f"{STATISTICS}/encoder/tokenizer/group_norm", f"{theirs}encoder.second_conv.1"),
        *_convolution("encoder/tokenizer/group2", f"{theirs}encoder.second_conv.3"),
        *_position("encoder/position_embed", f"{theirs}pos_embed"),
        *paper_block("encoder/block_{i}", f"{theirs}blocks.blocks.{{i}}"),
        *norm("encoder/norm", f"{theirs}norm"),
    )


def _decoder(ours: str, body: str, head: str, token: str, position: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/mask_token", (token,), VALUE),
        *_position(f"{ours}/position_embed", position),
        *paper_block(f"{ours}/block_{{i}}", f"{body}.blocks.{{i}}"),
        *norm(f"{ours}/norm", f"{body}.norm"),
        *_convolution(f"{ours}/head", f"{head}.0"),
    )


POINT_MAE = Layout((*_encoder("MAE_encoder."), *_decoder("decoder", "MAE_decoder", "increase_dim", "mask_token", "decoder_pos_embed")))
POINT_CMAE = Layout((
    Rule("encoder/cls_token", ("MAE_encoder.cls_token1", "MAE_encoder.cls_token2"), VIEWS),
    Rule("encoder/cls_position", ("MAE_encoder.cls_pos1", "MAE_encoder.cls_pos2"), VIEWS),
    *_encoder("MAE_encoder."),
    *_decoder("decoder", "MAE_decoder", "increase_dim", "mask_token1", "decoder_pos_embed1"),
    *_decoder("decoder_2", "MAE_decoder_", "increase_dim_", "mask_token2", "decoder_pos_embed2"),
))
HEAD = "cls_head_finetune"
CLASSIFIER = Layout((
    Rule("encoder/cls_token", ("cls_token",), VALUE),
    Rule("encoder/cls_position", ("cls_pos",), VALUE),
    *_encoder(""),
    *(rule for i in (1, 2) for rule in linear(f"head/fc{i}", f"{HEAD}.{4 * (i - 1)}")),
    *(rule for i in (1, 2) for rule in norm(f"head/norm{i}", f"{HEAD}.{4 * i - 3}")),
    *(rule for i in (1, 2) for rule in _statistics(f"{STATISTICS}/head/norm{i}", f"{HEAD}.{4 * i - 3}")),
    *linear("head/fc3", f"{HEAD}.8"),
))
LINEAR_CLASSIFIER = Layout((*linear("head/fc3", f"{HEAD}.0"), *CLASSIFIER.rules))

POINT_LAYOUTS: dict[str, Layout] = {
    "point_mae": POINT_MAE,
    "point_cmae": POINT_CMAE,
    "point_classifier": CLASSIFIER,
    "point_linear": LINEAR_CLASSIFIER,
}
