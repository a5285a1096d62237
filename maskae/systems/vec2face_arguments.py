"""What Vec2Face and its identity network are built from; the checks that need no data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice, check_heads
from maskae.losses.adversarial import DISCRIMINATOR_LOSSES
from maskae.losses.perceptual import WIDTHS, Vgg
from maskae.nn.conv_decoder import ConvDecoder
from maskae.nn.face_network import FaceNetwork
from maskae.nn.layers import DTYPES
from maskae.nn.patch_discriminator import PatchDiscriminator
from maskae.nn.row_mask import MaskRate
from maskae.nn.vector_autoencoder import VectorAutoencoder
from maskae.vectors import at_least_float32

PERCEPTUAL = ("vgg", "identity", "none")


def signed(images: jax.Array) -> jax.Array:
    """Images of a batch, 0..1, as the networks see them, at least float32 in -1..1."""
    return 2 * at_least_float32(images) - 1


def in_units(images: jax.Array) -> jax.Array:
    """-1..1 -> 0..1, as batches hold images; the inverse of `signed`."""
    return (images + 1) / 2


@dataclass(frozen=True)
class FaceArguments:
    """The network that knows identities; ResNet-100's sizes where none are given.

    Args:
        image_size, channels: of the images.
        layers, widths: of its stages, each of which halves the resolution.
        features: length of an identity vector.
        dtype: of convolutions; norms, vectors and transformer blocks are float32. "float64", of all of them, is for comparisons with
            recorded references, under `jax.enable_x64`: rectifiers turn a rounding error next to 0 into a different gradient.

    Raises:
        UserError: where the sizes do not fit together.
    """

    image_size: int = 112
    channels: int = 3
    layers: tuple[int, ...] = (3, 13, 30, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    features_width: int = 512
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        check_choice("dtype", self.dtype, (*DTYPES, "float64"))
        if len(self.layers) != len(self.widths):
            raise UserError(f"layers={self.layers} and widths={self.widths} must have one number per stage each")

    def face(self, *, train: bool = False) -> FaceNetwork:
        """The identity network."""
        return FaceNetwork(self.layers, self.widths, self.features_width, train, jnp.dtype(self.dtype))


@dataclass(frozen=True)
class Vec2FaceArguments(FaceArguments):
    """Arguments with the values of the released base model.

    Args:
        face_weights: "stage:NAME", an earlier `identity_encoder`; a safetensors file under the names of ArcFace's code; or "random", for
            tests. Read when a run starts.
        grid: rows and columns of the feature map; image_size is its side times 2^(levels - 1).
        width, depth, heads, decoder_depth, decoder_heads, mlp_ratio: of the autoencoder of rows.
        dropout: in every block and on the embedded rows.
        mask_rate: (mean, std, low, high) of the truncated normal rate in training; `generation_rate` where images are generated.
        map_channels, paint_width, multipliers, paint_blocks, groups: of the image decoder, see `ConvDecoder`.
        critic_widths, critic_groups, critic_window: of the discriminator, see `PatchDiscriminator`.
        perceptual: "vgg", LPIPS on VGG-16; "identity", the same distance on the maps of the identity network, the stand-in where no VGG
            weights are at hand; "none".
        perceptual_weights: safetensors file under LPIPS' names, or "random", for tests.
        vgg_widths: of VGG's stages.
        perceptual_weight, structural_weight: of those terms; all others have weight 1.
        adversarial_start: step from which the discriminator counts; the released code's epoch 80 of 100.
        discriminator_loss: "mse", "hinge" or "vanilla".
        stop_at_discriminator: False lets the generator's loss add to the discriminator's gradients, as the released code does.
        variations: deviations of the noise by which vectors vary, for the evaluation.
        remat: compute every block anew in the backward pass.
    """

    face_weights: str = ""
    grid: tuple[int, int] = (7, 7)
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    mask_rate: tuple[float, ...] = (0.75, 0.25, 0.5, 1.0)
    generation_rate: tuple[float, ...] = (0.15, 0.25, 0.1, 1.0)
    map_channels: int = 256
    paint_width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    paint_blocks: int = 2
    groups: int = 32
    critic_widths: tuple[int, ...] = (64, 128, 256, 512)
    critic_groups: int = 8
    critic_window: int = 4
    perceptual: str = "vgg"
    perceptual_weights: str = ""
    vgg_widths: tuple[int, ...] = WIDTHS
    perceptual_weight: float = 0.2
    structural_weight: float = 0.1
    adversarial_start: int = 0
    discriminator_loss: str = "mse"
    stop_at_discriminator: bool = True
    variations: tuple[float, ...] = (0.3, 0.5, 0.7)
    remat: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_heads("width", self.width, self.heads)
        check_heads("width", self.width, self.decoder_heads)
        check_choice("perceptual", self.perceptual, PERCEPTUAL)
        check_choice("discriminator_loss", self.discriminator_loss, DISCRIMINATOR_LOSSES)
        for law in (self.training_law, self.generation_law):
            law.check()
        painted = self.grid[0] * 2 ** (len(self.multipliers) - 1)
        if self.grid[0] != self.grid[1] or painted != self.image_size:
            raise UserError(f"a {self.grid} grid with {len(self.multipliers)} levels paints {painted} pixels; image_size={self.image_size}")
        for factor in self.multipliers:
            if (self.paint_width * factor) % self.groups:
                raise UserError(f"groups={self.groups} do not divide {self.paint_width * factor} channels of the image decoder")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: a share below 1")
        side = self.image_size // 2 ** (len(self.critic_widths) - 1)
        if side < self.critic_window:
            raise UserError(f"critic_widths={self.critic_widths} leave {side} pixels, fewer than critic_window={self.critic_window}")

    @property
    def training_law(self) -> MaskRate:
        """Of the mask rate in training."""
        return MaskRate(*self.mask_rate)

    @property
    def generation_law(self) -> MaskRate:
        """Of the mask rate where images are generated."""
        return MaskRate(*self.generation_rate)

    @property
    def row_count(self) -> int:
        """Rows of the feature map."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def generator(self) -> VectorAutoencoder:
        """Vector to image."""
        return VectorAutoencoder(
            self.grid,
            self.width,
            self.depth,
            self.heads,
            self.decoder_depth,
            self.decoder_heads,
            self.mlp_ratio,
            self.map_channels,
            ConvDecoder(
                self.paint_width, self.multipliers, self.paint_blocks, self.channels, self.groups, self.remat, jnp.dtype(self.dtype)
            ),
            self.remat,
            jnp.promote_types(self.dtype, jnp.float32),
        )

    @cached_property
    def discriminator(self) -> PatchDiscriminator:
        """Image to a map of logits."""
        return PatchDiscriminator(self.critic_widths, self.critic_groups, self.critic_window, jnp.dtype(self.dtype))

    @cached_property
    def vgg(self) -> Vgg:
        """The network of LPIPS."""
        return Vgg(self.vgg_widths, jnp.dtype(self.dtype))
