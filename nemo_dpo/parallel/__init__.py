"""Ranks: their groups, megatron-core's engine on them, and what becomes of a run when one of them stops."""


class RankLost(RuntimeError):
    """A collective cannot end because another rank has. An empty text: that has been said elsewhere."""
