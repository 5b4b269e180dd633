"""What a layout does to a model on one rank: one technique a file."""
