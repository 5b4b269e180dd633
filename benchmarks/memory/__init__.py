"""What a training step of a large model takes on every rank, beside what its stage must hold."""
