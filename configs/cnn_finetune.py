"""Fine-tuning of a convolutional encoder, the CT study's protocol (Wolf et al. 2023): configs/spark_medical.py pretrains.

    python -m maskae.main --config configs/cnn_finetune.py:tiny --workdir runs/finetuned --config.init_from=runs/spark \\
        --config.data.root=shared/data --config.data.max_examples=124

The last option keeps a tenth of the labels. Without `init_from` it is training from scratch. The convolutions wait for the first tenth of
the run.

`:tiny`   organs of a CT volume, 32 pixels, 300 steps of 64.   `:natural`  Caltech-101.
`:base`   OrganSMNIST (MedMNIST's organsmnist_224.npz, 13,940 / 2,452 images, 11 classes): Adam 1e-4, coupled weight decay 5e-4, batch 64,
          70 epochs. From scratch MedMNIST's benchmark reports .975 AUC and .785 accuracy at 224 pixels.
`:guided_tiny`  EuroSAT's subset with the network of configs/g_simclr.py:tiny, whose run is `--config.init_from=runs/g_simclr/2_contrast`
          (SimCLR's is in `1_contrast`). G-SimCLR (arXiv 2009.12007) fine-tunes so: 35 epochs of the classifier alone at Adam's 1e-3, then
          35 of all weights at 1e-5, batch norms by their running statistics throughout. 320 of 3,200 labels.
`:guided` the same on CIFAR-10 with 5,000 labels. The paper: G-SimCLR 43.1 %, SimCLR 42.2 %. Not run: the set is not at hand. The released
          code ends both halves by the loss on the TEST images.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from maskae.config import default_config, load_module, set_duration

study = load_module(Path(__file__).with_name("spark_medical.py"))
clustered = load_module(Path(__file__).with_name("g_simclr.py"))
GUIDED = {"guided_tiny": ("tiny", 320), "guided": ("base", 5000)}
VARIANTS = (*study.SMALL, "base", *GUIDED)
CLASSES = {"tiny": 32, "chest": 2, "natural": 101, "published": 32, "base": 11}


def get_config(variant: str = "base") -> ConfigDict:
    """The recipe of one task."""
    if variant in GUIDED:
        return guided(*GUIDED[variant])
    config: ConfigDict = default_config()
    config.system = "cnn_finetune"
    study.data_of(config, variant)
    config.model = study.network_of(config, variant)
    config.model.num_classes = CLASSES[variant]
    config.train.batch_size = 64
    config.optimizer.name = "adam"
    config.optimizer.arguments = {"weight_decay": 5e-4}
    config.optimizer.no_decay = ()
    config.optimizer.schedule = "constant"
    set_duration(config.optimizer, warmup_epochs=0.0)
    config.evaluate.evaluators = {"accuracy": {}}
    waiting = {"schedule": "unfreeze", "warmup_epochs": 10.0}
    if variant in study.SMALL:
        set_duration(config.train, total_steps=300)
        config.optimizer.base_learning_rate = 4e-3  # 1e-3 at batch 64
        waiting = {"schedule": "unfreeze", "warmup_steps": 30.0}
    else:
        config.data.source = "npz:organsmnist_224.npz"
        config.data.examples = 13_940
        config.model.update({"mean": (0.5,), "std": (0.5,)})
        set_duration(config.train, total_epochs=70.0)
        config.optimizer.base_learning_rate = 4e-4  # 1e-4 at batch 64
    config.optimizer.groups = {r"encoder/\S+kernel$": waiting}
    return config


def guided(name: str, labels: int) -> ConfigDict:
    """G-SimCLR's recipe: the classifier alone for half of the run, then all weights with a hundredth of its rate."""
    data, rate = clustered.SETS[name], clustered.rate
    config: ConfigDict = clustered.data_of(default_config(), data)
    config.system = "cnn_finetune"
    network = {key: value for key, value in data.network.items() if key != "views"}
    config.model = {"image_size": data.image_size, "channels": 3, **network, "num_classes": 10, "running_statistics": True}
    config.data.max_examples = labels
    set_duration(config.train, total_epochs=70.0)
    optimizer = config.optimizer
    optimizer.name = "adam"
    optimizer.base_learning_rate = rate(1e-3)
    optimizer.schedule = "step"
    optimizer.schedule_arguments = {"milestones": (35 * labels / clustered.BATCH,), "factor": 0.01}
    set_duration(optimizer, warmup_epochs=0.0)
    optimizer.groups = {"^encoder/": {"schedule": "delayed", "warmup_epochs": 35.0, "base_learning_rate": rate(1e-5)}}
    config.evaluate.evaluators = {"accuracy": {}}
    return config
