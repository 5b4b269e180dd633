"""What several benchmarks need: where a figure was measured, and steps by the clock."""
