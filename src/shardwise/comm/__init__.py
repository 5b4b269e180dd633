"""The only place where bytes leave a rank: point-to-point transfers, reductions, and the groups they run in."""
