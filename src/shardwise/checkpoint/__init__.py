"""Checkpoints: tensors at rest, known by name and slice, so that any layout reads what any other wrote.

    slices      regions of tensors and what covers what          (no torch)
    manifest    what a checkpoint says about itself, as JSON     (no torch)
    storage     folders that appear whole or not at all          (no torch)
    source      a checkpoint or a plain safetensors folder, opened for reading (no torch)
    save        one rank's tensors into one file
    load        slices out of a source, reading only their bytes
    export      a checkpoint as a plain safetensors model

Nothing here knows layouts, meshes or process groups, and nothing is ever unpickled. The package itself
imports nothing: take the names from the modules above.
"""
