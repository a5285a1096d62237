"""HiCMAE's fine-tuning: "Hierarchical Contrastive Masked Autoencoder for Audio-Visual Emotion Recognition", Sun et al. 2024.

Information Fusion 2024, arXiv 2401.05698. Each encoder sees everything; the means of all its layers are summed with learnt weights. With
the means of the fused tokens they go through a norm into a linear classifier. One modality alone is classified by its own sum.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.device import flip, mixup_cutmix, random_erasing
from maskae.data.spec import DataSpec
from maskae.errors import UserError, check_choice, check_share
from maskae.keys import purpose_key
from maskae.losses.classification import label_smoothing_cross_entropy, soft_target_cross_entropy
from maskae.nn.audio_visual import LayerSum
from maskae.nn.flops import linear_flops
from maskae.nn.layers import LayerNorm, xavier
from maskae.nn.stack import drop_path_draws
from maskae.nn.transfer import adopt_parameters
from maskae.nn.vit import ViTEncoder
from maskae.systems.contract import Batch, Outputs, Params, State, Variables
from maskae.systems.hicmae import Both, Hicmae
from maskae.systems.hicmae_arguments import MODALITIES


@dataclass(frozen=True)
class HicmaeClassifier(Hicmae):
    """Arguments beside those of `HicmaeArguments`, of which those of masks, decoders and contrast are not read.

    Args:
        num_classes: of the task.
        branches: "both" with the fusion encoder, or "video" or "audio" alone.
        drop_path: of the encoders, at their last block, rising linearly from 0; the fusion blocks have none.
        label_smoothing: of labels, mixed ones too.
        flip: mirror half of the clips.
        erase: probability of erasing a box of a clip, the same in all frames.
        mixup, cutmix: Beta parameters of mixing clips, one of the two at random where both are on; 0 switches it off. As in the released
            code the video and the label are mixed and the sound is not, so without video there is no mixing.

    `init_from` takes the encoders of a run of `hicmae`.

    Raises:
        UserError: where the sizes do not fit together or a name is unknown.
    """

    _: KW_ONLY
    num_classes: int = 6
    branches: str = "both"
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    flip: bool = True
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        super().__post_init__()
        check_choice("branches", self.branches, ("both", *MODALITIES))
        for name, value in (("drop_path", self.drop_path), ("label_smoothing", self.label_smoothing), ("erase", self.erase)):
            check_share(name, value)
        if self.branches == "audio" and (self.flip or self.erase or self.mixes):
            raise UserError("branches=audio: flip, erase, mixup and cutmix change clips, of which there are none; set them to False and 0")

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def used(self) -> tuple[str, ...]:
        """The modalities that are read."""
        return MODALITIES if self.branches == "both" else (self.branches,)

    @property
    def pretrained_parts(self) -> tuple[str, ...]:
        """What `init_from` gives."""
        encoders = tuple(f"{modality}_encoder" for modality in self.used)
        return (*encoders, "fusion") if self.branches == "both" else encoders

    def encoder(self, modality: str) -> ViTEncoder:
        """A modality's encoder, with stochastic depth where draws are given."""
        return super().encoder(modality).clone(drop_path=self.drop_path)

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """A fresh classifier on untrained encoders; the batch is not read."""
        body_key, head_key = jax.random.split(rng)
        fresh = super().init(body_key, batch).params
        params = {name: fresh[name] for name in self.pretrained_parts}
        for modality in self.used:
            layers = jnp.zeros((1, self.sizes(modality)[0], self.width))
            params[f"{modality}_sum"] = LayerSum().init(head_key, layers)["params"]
        width = self.feature_width
        params["fc_norm"] = LayerNorm(self.epsilon).init(head_key, jnp.zeros((1, width)))["params"]
        kernel = xavier(head_key, (width, self.num_classes), jnp.float32)
        return Variables(params | {"head": {"kernel": kernel, "bias": jnp.zeros(self.num_classes)}}, {})

    @property
    def feature_width(self) -> int:
        """4 D of both modalities, D of one."""
        return 4 * self.width if self.branches == "both" else self.width

    def layer_scales(self, decay: float) -> tuple[tuple[str, float], ...]:
        """(pattern, factor) pairs of layer decay, the optimizer's `lr_scales`.

        Layer 0 are the embeddings, i the encoders' layer i, depth + j fusion layer j; everything else is one layer above, factor 1.
        """
        depth, fused = max(self.sizes(modality)[0] for modality in self.used), self.fusion_depth if self.branches == "both" else 0
        top = depth + self.fusion_depth + 1
        encoders = [(rf"_encoder/block_{i}/", decay ** (top - 1 - i)) for i in range(depth)]
        fusion = [(rf"fusion/.*_block_{i}/", decay ** (top - 1 - depth - i)) for i in range(fused)]
        return ((r"_encoder/patch_embed/", decay**top), *encoders, *fusion)

    def with_pretrained(self, fresh: Variables, given: Variables) -> Variables:
        """`fresh` with the encoders of `given`. Raises UserError listing what does not fit."""
        new = tuple(name for name in fresh.params if name not in self.pretrained_parts)
        return Variables(adopt_parameters(fresh.params, given.params, skip=new), fresh.state)

    def classify(self, params: Params, inputs: Both, draws: Both | None = None) -> tuple[jax.Array, jax.Array]:
        """The feature [B, 4D] (of one modality [B, D]) after its norm, and logits [B, K]; float32.

        `draws` by modality, uniform float32 [depth, 2, B], switch stochastic depth on. Raises UserError where a modality is absent.
        """
        if absent := [modality for modality in self.used if modality not in inputs]:
            raise UserError(f"branches={self.branches}: the batch has no {absent[0]}; it has {', '.join(inputs)}")
        encoded = {each: self.encode(params, each, inputs[each], draws=draws[each] if draws else None) for each in self.used}
        parts: list[Any] = []
        for modality, encoding in encoded.items():
            means = jnp.stack([layer.astype(jnp.float32).mean(1) for layer in encoding.layers], 1)  # [B, layers, D]
            parts.append(LayerSum().apply({"params": params[f"{modality}_sum"]}, means))
        if self.branches == "both":
            fused = self.fuse(params, encoded["video"].tokens, encoded["audio"].tokens)
            parts += [stream.astype(jnp.float32).mean(1) for stream in (fused.video, fused.audio)]
        feature: Any = LayerNorm(self.epsilon).apply({"params": params["fc_norm"]}, jnp.concatenate(parts, -1))
        return feature, feature @ params["head"]["kernel"] + params["head"]["bias"]

    def augmented(self, inputs: Both, batch: Batch, rng: jax.Array) -> tuple[Both, jax.Array | None]:
        """Clips mirrored, erased and mixed alike in all their frames, and the soft labels [B, K] where clips were mixed."""
        if "video" not in self.used:
            return inputs, None
        video, example = inputs["video"], batch["example"]
        size, frames, height, width, channels = video.shape
        pictures = video.transpose(0, 2, 3, 1, 4).reshape(size, height, width, frames * channels)  # frames become channels
        if self.flip:
            pictures = flip(pictures, example, purpose_key(rng, "flip"))
        if self.erase:
            pictures = random_erasing(pictures, example, purpose_key(rng, "erase"), self.erase)
        labels = None
        if self.mixes:
            mixing: dict[str, Any] = {"mixup_alpha": self.mixup, "cutmix_alpha": self.cutmix, "num_classes": self.num_classes}
            key = purpose_key(rng, "mix")
            pictures, labels = mixup_cutmix(pictures, batch["label"], key, smoothing=self.label_smoothing, **mixing)
        video = pictures.reshape(size, height, width, frames, channels).transpose(0, 3, 1, 2, 4)  # [B, T, H, W, C]
        return inputs | {"video": video}, labels

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """Cross-entropy with mixed or smoothed labels. `accuracy` counts each example's own label; where clips are mixed it stays low."""
        inputs, soft = self.augmented(self.inputs(batch), batch, rng)
        draws = None
        if self.drop_path:
            shapes = {each: (self.sizes(each)[0], 2) for each in self.used}
            draws = {each: drop_path_draws(purpose_key(rng, each), batch["example"], shape) for each, shape in shapes.items()}
        _, logits = self.classify(params, inputs, draws)
        if soft is not None:
            loss = soft_target_cross_entropy(logits, soft)
        else:
            loss = label_smoothing_cross_entropy(logits, batch["label"], self.label_smoothing)
        accuracy = (logits.argmax(-1) == batch["label"]).astype(jnp.float32).mean()
        return loss, Outputs({"accuracy": accuracy}, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`pooled` [B, 4D] (of one modality [B, D]), what the head sees, and `logits` [B, K]; float32."""
        feature, logits = self.classify(params, self.inputs(batch))
        return {"pooled": feature, "logits": logits}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """No picture: nothing is predicted but a class."""
        return {}

    def forward_flops(self, batch: Batch) -> float:
        """Encoders and fusion on all tokens, and the head."""
        every = {modality: self.tokens(modality) for modality in self.used}
        return self.encoding_flops(every) + linear_flops(1, self.feature_width, self.num_classes)
