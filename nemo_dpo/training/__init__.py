"""The training loop: Lightning drives, megatron-core computes."""
