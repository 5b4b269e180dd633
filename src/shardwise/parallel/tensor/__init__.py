"""Tensor parallelism inside units: proposed from gradients, proven on threads, installed as plain local tensors."""
