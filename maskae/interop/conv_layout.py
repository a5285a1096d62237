"""The masked-convolution autoencoder and its fine-tuned classifier under the names of ConvMAE's released code."""

from __future__ import annotations

from maskae.interop.cnn import CONV, conv
from maskae.interop.layout import VALUE, Layout, Rule, Shape
from maskae.interop.vit import PAPER_DECODER, linear, norm, paper_block

# A 1 x 1 convolution (outputs, inputs, 1, 1) is a matrix here.
POINTWISE = Shape(
    lambda x, _: (x.transpose(1, 0).reshape(x.shape[1], x.shape[0], 1, 1),),
    lambda parts, shape: parts[0].reshape(parts[0].shape[:2]).transpose(1, 0),
)


def conv_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A masked-convolution block."""
    return (
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *conv(f"{ours}/conv1", f"{theirs}.conv1", POINTWISE),
        *conv(f"{ours}/depthwise", f"{theirs}.attn", CONV),
        *conv(f"{ours}/conv2", f"{theirs}.conv2", POINTWISE),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *conv(f"{ours}/fc1", f"{theirs}.mlp.fc1", POINTWISE),
        *conv(f"{ours}/fc2", f"{theirs}.mlp.fc2", POINTWISE),
    )


MCMAE = Layout(
    (
        *conv("encoder/patch_embed/embed{i}/conv", "patch_embed{i}.proj"),
        *norm("encoder/patch_embed/embed{i}/norm", "patch_embed{i}.norm"),
        *linear("encoder/patch_embed/proj", "patch_embed4"),
        *conv_block("encoder/patch_embed/stage1_block_{i}", "blocks1.{i}"),
        *conv_block("encoder/patch_embed/stage2_block_{i}", "blocks2.{i}"),
        *conv("encoder/fusion{i}/conv", "stage{i}_output_decode"),
        Rule("encoder/position", ("pos_embed",), VALUE),
        *paper_block("encoder/block_{i}", "blocks3.{i}"),
        *norm("encoder/norm", "norm"),
        *norm("fc_norm", "fc_norm"),
        *linear("head", "head"),
        *PAPER_DECODER,
    )
)
