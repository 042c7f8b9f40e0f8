"""What a run reports: sums that add up over micro-batches and ranks, and the figures made from them."""
