"""Stage 2: a plan (pure), a folder that only ever grows, workers that make batches, and the launcher between them."""
