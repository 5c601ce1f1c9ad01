"""Training of a small Stable Diffusion from unlabelled images: ``scripts/build_base.py`` runs its stages."""
