"""Stage 3: a classifier trained on real and synthetic images with soft labels."""
