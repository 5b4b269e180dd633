"""Tensor parallelism beside other implementations: same model, same weights, same ranks, steps taken in turn."""
