"""What it costs to move and to sum tensors between ranks of one host: shared memory beside gloo."""
