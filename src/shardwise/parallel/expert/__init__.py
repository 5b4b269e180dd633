"""Experts divided among ranks that each have their own tokens: found by structure, proven, dispatched by all-to-all."""
