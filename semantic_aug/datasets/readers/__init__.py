"""Readers of the forms in which people keep data sets; each returns ``{split: ImageTable}``."""
