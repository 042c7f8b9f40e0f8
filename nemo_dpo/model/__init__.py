"""model_config.yaml → megatron-core GPTModel."""
