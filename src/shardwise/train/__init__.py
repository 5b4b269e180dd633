"""Training: from a run file to a trained model, on any layout, with progress, checkpoints and events.

The names live in the modules: `run_file` (what a run is), `run` (`train`), `build`, `loop`, `state`, `progress`.
"""
