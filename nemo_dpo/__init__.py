"""nemo_dpo: preference optimisation of language models on megatron-core, from a laptop to a cluster."""

__version__ = "0.1.0"
