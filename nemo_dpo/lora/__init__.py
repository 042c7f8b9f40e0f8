"""LoRA: a low-rank update beside a frozen linear layer, y = W x + (alpha / rank) · B A x (arXiv:2106.09685)."""
