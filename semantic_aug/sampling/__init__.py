"""Stage 2. A request passes one way: settings, solver, config, plan, sources, folder, job, identity, worker, launcher, run.

The plan is pure, the folder only ever grows, workers make batches, and the launcher stands between them.
"""
