"""Registered data sets: each module here declares one ``SPEC`` and is found by its name."""

import pkgutil

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""Names of all modules in this folder, values of ``--dataset``."""
