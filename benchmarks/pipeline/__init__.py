"""The executor beside other pipelines: same model, same weights, same ranks, steps taken in turn."""
