"""Measures, pictures and comparisons of what the three stages make."""
