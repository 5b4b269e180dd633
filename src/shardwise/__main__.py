"""`python -m shardwise`: the command line, and what torchrun starts (`torchrun … -m shardwise train run.toml`)."""

from __future__ import annotations

from shardwise.cli import main

if __name__ == "__main__":
    main()
