"""Generative data augmentation for image classification: Diff-Mix and its relatives.

Importing the package loads no weights, parses no arguments, reads no network and changes no global state.
"""

__version__ = "0.1.0"
