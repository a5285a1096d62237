"""HiCMAE, "Hierarchical Contrastive Masked Autoencoder for Self-Supervised Audio-Visual Emotion Recognition" (Sun et al. 2024).

    python -m maskae.main --config configs/hicmae.py:tiny --workdir runs/hicmae_tiny --config.data.root=shared/data

`:tiny`   720 spoken digits, each with a moving scan of the same digit, 3,000 steps of 32; 300 recordings validate; 10 to 13 minutes on
          one core. Seeds 0 to 2 (`--config.seed=S`), means; each seed's probes lie within 0.05 of them:
            reconstruction     video 0.363 (zero 0.62), sound 0.261 (zero 0.68)
            contrast           3.11, 2.88, 2.80 from the shallowest to the deepest level (chance ln 32 = 3.47)
            matching clip in 32  0.186, 0.194, 0.179 at the deepest level, 0.141, 0.156, 0.168 at the shallowest; chance and untrained 0.03
            logistic probe     both 0.922, video 0.828, sound 0.822; untrained 0.758, 0.583, 0.573
          A match can hardly be found more often than 0.3: a clip shares its digit with its sound, and nothing else.
          With the paper's mask ratios (two of 16 places seen) and scans half as large the contrast stayed at chance for 2,400 steps, also
          with 40 times its weight (one seed each); trained by the contrast alone, all clips' pooled tokens had cosines above 0.99 there.
`:fight`  155 surveillance clips with sound, fight or none, 40 % held out; 300 steps of 31, two minutes on one core. Seeds 0 to 2: the
          contrast falls to 2.05 to 2.20, 1.76 to 2.05 and 1.72 to 2.03 (chance ln 31 = 3.43), and among all 62 held-out clips the matching
          one is found with 0.113, 0.121, 0.169 (untrained 0.024, 0.016, 0.016); reconstruction video 0.63, sound 0.92 to 0.93 (zero: 1.62
          for both together). The two classes are near chance before and after: probe of both 0.548, 0.484, 0.645 (untrained 0.500, 0.516,
          0.613), video 0.532, 0.484, 0.565 (0.532, 0.548, 0.484), sound 0.516, 0.532, 0.548 (0.565 three times).
`:base`   HiCMAE-B on VoxCeleb2's 1.09 million talking faces, 100 epochs: 9.9e18 FLOP, 5 days on 4 V100 in the paper. The clips
          must lie as files of 160 x 160 pixels (rows 0 to 159, columns 32 to 191 of the 224 x 224 ones), their sound as WAV beside them
          or inside of them.
          Not run; it compiles for 16 v5e chips (3.8 GiB on each, 90.8 GFLOP per example, memory binds).
          `:small` HiCMAE-S. The paper, fine-tuned (WAR): CREMA-D 84.89, MAFW 56.17; configs/hicmae_classifier.py fine-tunes.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from maskae.config import default_config, set_duration

VARIANTS = ("tiny", "fight", "base", "small")

SIZES = {
    "base": {"width": 512, "heads": 8, "decoder_width": 384, "decoder_heads": 6},
    "small": {"width": 384, "heads": 6, "decoder_width": 192, "decoder_heads": 3},
}
BRANCHES = ("pooled", "video", "audio")


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one size."""
    config = default_config()
    config.system = "hicmae"
    config.data.channels = 0
    config.data.train_transform = ()
    config.data.val_transform = ()
    config.data.flip = False
    config.optimizer.name = "adamw"
    config.optimizer.arguments = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.05}
    # The released code frees the video's mask token of decay by its name, and not the sound's.
    config.optimizer.no_decay = ("vectors", "video_mask_token")
    if variant in ("tiny", "fight"):
        return tiny(config) if variant == "tiny" else fight(tiny(config))
    config.model = {
        "image_size": 160,
        "frames": 16,
        "channels": 3,
        "patch_size": 16,
        "tubelet": 2,
        "spectrogram_size": (256, 128),
        "audio_patch_size": 16,
        **SIZES[variant],
        "depth": 10,
        "fusion_depth": 2,
        "decoder_depth": 4,
        "levels": (4, 7, 10),
        "mask_ratio": 0.9,
        "audio_mask_ratio": 0.8,
        "contrastive_weight": 0.0025,
        "temperature": 0.07,
        "contrastive_scope": "local",
        "group_size": 40,
        "frame_difference": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "pool": "both",
        "dtype": "bfloat16",
        "scan": False,
        "remat": "dots",
        "attention": "auto",
    }
    config.data.source = "clips:voxceleb2@160,16,4,256,128"
    config.data.fields = {"video": "uint8[16,160,160,3]", "spectrogram": "float32[256,128]"}
    config.data.examples = 1_091_581
    config.data.val_percent = 0.1
    config.train.batch_size = 160
    set_duration(config.train, total_epochs=100.0)
    config.optimizer.schedule = "cosine_twice"
    config.optimizer.base_learning_rate = 3e-4
    config.optimizer.minimum = 6.25e-6
    set_duration(config.optimizer, warmup_epochs=5.0)
    config.log.every_steps = 50
    set_duration(config.checkpoint, every_epochs=5.0)
    set_duration(config.evaluate, every_epochs=50.0)
    config.evaluate.evaluators = {"matched": {"features": ("video_level_10", "audio_level_10"), "batch": 40}}
    return config


def tiny(config: ConfigDict) -> ConfigDict:
    """Grey clips of 8 frames of 32 pixels in 64 tokens, 0.64 seconds of sound in 32, half of them seen.

    A frame has 16 places, not 100: with the paper's shares two would be seen, too few to tell a digit by, and the contrast would stay at
    chance. Its weight is larger for the same reason, 3,000 steps instead of 680,000.
    """
    config.model = {
        "image_size": 32,
        "frames": 8,
        "channels": 1,
        "patch_size": 8,
        "tubelet": 2,
        "spectrogram_size": (64, 32),
        "audio_patch_size": 8,
        "width": 96,
        "depth": 3,
        "heads": 4,
        "fusion_depth": 1,
        "decoder_width": 48,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "levels": (1, 2, 3),
        "mask_ratio": 0.5,
        "audio_mask_ratio": 0.5,
        "contrastive_weight": 0.3,
        "temperature": 0.07,
        "contrastive_scope": "local",
        "group_size": 32,
        "frame_difference": True,
        "mean": (0.1,),
        "std": (0.1,),
        "pool": "both",
        "dtype": "float32",
        "scan": False,
        "remat": "none",
        "attention": "xla",
    }
    config.data.source = "spoken_digits:fsdd@32,8,64,32"
    config.train.batch_size = 32
    set_duration(config.train, total_steps=3000)
    config.optimizer.schedule = "cosine_twice"
    config.optimizer.base_learning_rate = 1.6e-2  # 2e-3 at batch 32
    set_duration(config.optimizer, warmup_percent=10.0)
    config.evaluate.evaluators = {
        "matched": {"features": ("video_level_3", "audio_level_3"), "ks": (1,), "batch": 32},
        "knn": {"features": BRANCHES, "ks": (20,)},
        "logistic": {"features": BRANCHES},
    }
    return config


def fight(config: ConfigDict) -> ConfigDict:
    """Surveillance clips in colour: 8 frames over 1.6 seconds with their sound."""
    config.model.update({"channels": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "spectrogram_size": (160, 32)})
    config.model.group_size = 31
    config.data.source = "clips:fight_surveillance@32,8,3,160,32"
    config.data.val_percent = 40.0
    config.train.batch_size = 31
    set_duration(config.train, total_steps=300)
    return config
