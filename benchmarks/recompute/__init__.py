"""What recompute and offload free on a rank, and what they cost."""
