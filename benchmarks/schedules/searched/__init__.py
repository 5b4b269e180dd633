"""Searched schedules beside the best textbook schedule, on uneven pipelines; by simulation."""
