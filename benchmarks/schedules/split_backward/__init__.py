"""Backward split in two, and whole: seconds and memory of shardwise's way and of torch's."""
