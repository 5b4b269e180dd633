"""What it takes to go over to another layout in memory, beside a checkpoint on disk."""
