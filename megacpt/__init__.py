"""megacpt: continual pre-training of language models on megatron-core."""

__version__ = "0.1.0"
