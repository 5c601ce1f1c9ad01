"""Stable Diffusion in parts: base model, class tokens, LoRA, schedulers, the batched denoising loop, training losses."""
