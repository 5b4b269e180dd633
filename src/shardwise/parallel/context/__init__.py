"""Context parallelism: every rank has its own tokens of each sequence, and attention reaches those of all."""
