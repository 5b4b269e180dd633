"""Values that describe a model, its dataflow and its costs. Never imports torch."""
