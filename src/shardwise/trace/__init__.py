"""From a module and a sample to its dataflow and its costs; from a factory to a module without values."""
