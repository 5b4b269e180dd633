"""Data parallelism, plain and divided, beside other programs': same model, same weights, same ranks, steps in turn."""
