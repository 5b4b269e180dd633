"""The planner beside published measurements: rows of tables as layouts, their price, and how far off it is."""
