"""Updates of workers that meet every so many steps: one rule a file, and what their exchanges share."""
