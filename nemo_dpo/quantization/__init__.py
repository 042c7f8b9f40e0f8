"""The frozen base weights in four bits (QLoRA, arXiv:2305.14314)."""
