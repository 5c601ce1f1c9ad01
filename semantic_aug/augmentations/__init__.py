"""Augmentation strategies: a table, and the one engine behind its rows."""
