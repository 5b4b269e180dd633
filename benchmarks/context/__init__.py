"""Sequences divided among ranks: memory of a longer one, and the time that its attention takes."""
