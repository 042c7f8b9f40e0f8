"""Ranks: groups, the schedule, the optimizer and vocab-parallel log-probs."""
