"""Tokens a second of `shardwise generate` on layouts, beside transformers' own `generate` on one process."""
