"""A convolutional denoising autoencoder: stage 1 of G-SimCLR (Chakraborty et al., ICDM 2020 workshop, arXiv 2009.12007, section III.A).

Gaussian noise on the pixels, the clean image as the target. The mean of its latent map over the positions is what k-means clusters. For
records that are vectors there is `maskae.systems.autoencoder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.keys import purpose_key
from maskae.losses.denoising import standard_noise
from maskae.nn.batch_norm import STATISTICS
from maskae.nn.conv_autoencoder import DoublingDecoder, HalvingEncoder, autoencoder_flops
from maskae.nn.layers import DTYPES
from maskae.systems.contract import Batch, Outputs, Params, State, Variables


@dataclass(frozen=True)
class DenoisingAutoencoder:
    """Arguments with the values for CIFAR-10. Images arrive in units 0..1 (`data.statistics = "unit"`), and so do the outputs.

    Args:
        image_size: pixels of the square image; every block of the encoder halves it.
        channels: of the images.
        widths: of the encoder's blocks; the decoder has them in reverse.
        window: taps of every convolution per axis.
        noise: standard deviation of the Gaussian noise on the input, in training only; 0 is a plain autoencoder.
        dtype: of the computation; parameters, norms and loss are float32.

    Raises:
        UserError: where a number is out of its range, or the image does not divide.
    """

    image_size: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128)
    window: int = 3
    noise: float = 0.01
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        # A config's tuple may come back from JSON as a list, which cannot be hashed.
        object.__setattr__(self, "widths", tuple(self.widths))
        check_choice("dtype", self.dtype, DTYPES)
        if not self.widths or min(self.widths) < 1 or self.window < 1 or self.window % 2 == 0:
            raise UserError(f"widths={self.widths}, window={self.window}: widths must be at least 1, and the window odd")
        if self.image_size % 2 ** len(self.widths):
            raise UserError(f"image_size={self.image_size} cannot be halved {len(self.widths)} times")
        if self.noise < 0:
            raise UserError(f"noise={self.noise}: it must not be negative")

    @property
    def encoder(self) -> HalvingEncoder:
        """The part that clustering keeps."""
        return HalvingEncoder(self.widths, self.window, jnp.dtype(self.dtype))

    @property
    def decoder(self) -> DoublingDecoder:
        """The way back."""
        return DoublingDecoder(self.widths[::-1], self.channels, self.window, jnp.dtype(self.dtype))

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Both halves from Keras' default start; the batch is not read."""
        side = self.image_size // 2 ** len(self.widths)
        encoder_key, decoder_key = jax.random.split(rng)
        blank = jnp.zeros((1, self.image_size, self.image_size, self.channels))
        made = {
            "encoder": self.encoder.init(encoder_key, blank, train=False),
            "decoder": self.decoder.init(decoder_key, jnp.zeros((1, side, side, self.widths[-1])), train=False),
        }
        return Variables(*({name: part[kind] for name, part in made.items()} for kind in ("params", STATISTICS)))

    def run(self, params: Params, state: State, images: jax.Array) -> tuple[jax.Array, State]:
        """In training: images [B, H, W, C] -> pixels float32 [B, H, W, C] in (0, 1), and the moved statistics."""
        x, moved = images, {}
        for name, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            apply: Any = module.apply
            x, changed = apply({"params": params[name], STATISTICS: state[name]}, x, train=True, mutable=[STATISTICS])
            moved[name] = changed[STATISTICS]
        return x, moved

    def encode(self, params: Params, state: State, images: jax.Array) -> jax.Array:
        """With running statistics: [B, H, W, C] -> the latent map [B, h, w, D]."""
        found: Any = self.encoder.apply({"params": params["encoder"], STATISTICS: state["encoder"]}, images, train=False)
        return found

    def noisy(self, batch: Batch, rng: jax.Array) -> jax.Array:
        """The images with noise on them, not clipped."""
        images = batch["image"].astype(jnp.float32)
        if not self.noise:
            return images
        return images + self.noise * standard_noise(purpose_key(rng, "noise"), batch["example"], images.shape[1:])

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Mean squared error over the pixels, against the clean images."""
        pixels, moved = self.run(params, state, self.noisy(batch, rng))
        return jnp.square(pixels - batch["image"]).mean(), Outputs({}, moved)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Of the latent map: `pooled` [B, D], its mean over positions, and `tokens` [B, h * w, D]; float32."""
        latent = self.encode(params, state, batch["image"]).astype(jnp.float32)
        return {"pooled": latent.mean((1, 2)), "tokens": latent.reshape(latent.shape[0], -1, latent.shape[-1])}

    def reconstruct(self, params: Params, state: State, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
        """Panels [B, H, W, C] in 0..1, with running statistics."""
        noisy = self.noisy(batch, rng)
        variables = {"params": params["decoder"], STATISTICS: state["decoder"]}
        pixels: Any = self.decoder.apply(variables, self.encode(params, state, noisy), train=False)
        return {"original": batch["image"].astype(jnp.float32), "masked": noisy, "prediction": pixels}

    @property
    def panel_labels(self) -> dict[str, str]:
        """What each panel of `reconstruct` truthfully is."""
        return {"original": "original", "masked": f"with noise of {self.noise:g}", "prediction": "reconstruction"}

    def forward_flops(self, batch: Batch) -> float:
        """All convolutions, per image."""
        return autoencoder_flops((self.image_size, self.image_size), self.channels, self.widths, self.window)
