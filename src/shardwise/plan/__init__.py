"""Arithmetic on profiles and layouts: who computes what, what crosses, what it costs. Never imports torch."""
