"""The peer: ViTMAEForPreTraining of Hugging Face transformers with PyTorch's AdamW. Needs torch and transformers, not jax."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.peers.turns import serve


def huggingface_config(model: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `ViTMAEConfig` for those of `maskae.systems.mae.Mae`."""
    return {
        "image_size": model["image_size"],
        "patch_size": model["patch_size"],
        "hidden_size": model["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": model["heads"],
        "intermediate_size": 4 * model["width"],
        "decoder_hidden_size": model["decoder_width"],
        "decoder_num_hidden_layers": model["decoder_depth"],
        "decoder_num_attention_heads": model["decoder_heads"],
        "decoder_intermediate_size": 4 * model["decoder_width"],
        "mask_ratio": model["mask_ratio"],
        "norm_pix_loss": True,
        "layer_norm_eps": 1e-6,
    }


def make_side(work: dict[str, Any]) -> Any:
    """Loads the weights, and compiles where `work["variant"]` is "compiled"."""
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(work["threads"])
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as jax does by default; nothing on a CPU
    transformers.logging.set_verbosity_error()

    class Torch:
        def __init__(self) -> None:
            folder = Path(work["folder"])
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
            config = transformers.ViTMAEConfig(**huggingface_config(work["model"]))
            # Through a folder, because that is where transformers knows the older names of the weights.
            model, report = transformers.ViTMAEForPreTraining.from_pretrained(
                folder, config=config, output_loading_info=True, dtype=torch.float32
            )
            if report["missing_keys"] or report["unexpected_keys"]:
                raise ValueError(f"weights do not fit transformers {transformers.__version__}: {report}")
            model = model.train().to(self.device)
            self.attention = config._attn_implementation
            self.image = torch.from_numpy(np.load(folder / "image.npy")).permute(0, 3, 1, 2).contiguous().to(self.device)
            self.noise = torch.from_numpy(np.load(folder / "noise.npy")).to(self.device)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            adamw = work["optimizer"]
            groups = [
                {"params": [each for each in trained if each.ndim > 1], "weight_decay": adamw["weight_decay"]},
                {"params": [each for each in trained if each.ndim <= 1], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=adamw["learning_rate"], betas=tuple(adamw["betas"]), fused=True)
            self.model: Any = torch.compile(model) if work["variant"] == "compiled" else model

        def describe(self) -> dict[str, Any]:
            versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
            device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
            return {"versions": versions, "threads": torch.get_num_threads(), "device": device, "attention": self.attention}

        def step(self) -> Callable[[], float]:
            half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(work["dtype"])
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, half) if half else nullcontext():
                loss = self.model(pixel_values=self.image, noise=self.noise).loss
            loss.backward()
            self.optimizer.step()

            def wait() -> float:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                return float(loss.detach())

            return wait

    return Torch()


if __name__ == "__main__":
    serve(make_side)
