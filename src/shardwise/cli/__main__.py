"""`python -m shardwise.cli`: the command line where no script is installed, and for `torchrun -m`."""

from __future__ import annotations

from shardwise.cli import main

if __name__ == "__main__":
    main()
