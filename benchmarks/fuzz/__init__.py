"""Files that shardwise reads, damaged and forged on purpose: `python -m benchmarks.fuzz`."""
