"""Generative data augmentation for image classification: Diff-Mix and its relatives.

Importing the package loads no weights, parses no arguments, reads no network and changes no global state.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["SoftLabelDataset"]


def __getattr__(name: str):
    """``SoftLabelDataset``, imported when it is asked for: it needs torch, which importing the package does not."""
    if name in __all__:
        return getattr(importlib.import_module("semantic_aug.classify.loader"), name)
    raise AttributeError(f"module 'semantic_aug' has no attribute '{name}'")
