"""maskae: masked autoencoders and contrastive learners in JAX, pretrained with one command on a CPU, a GPU mesh or a TPU pod."""

__version__ = "0.1.0"
