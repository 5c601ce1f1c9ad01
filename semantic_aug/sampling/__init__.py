"""Stage 2. A request passes one way: settings, solver, config, identity, subset, claim, run.

The plan is pure, the folder only ever grows, workers make batches, and the launcher hands batches to them.
"""
