"""Stage 1: class tokens and a U-Net LoRA from a small labelled image set."""
