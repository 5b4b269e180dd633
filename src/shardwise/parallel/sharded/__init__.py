"""Replicas that divide the state of training among them: optimizer state, gradients, parameters (ZeRO, FSDP)."""
