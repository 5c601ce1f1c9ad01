"""torchvision's ImageNet weights in timm's models: its first version, and SWAG (Singh et al. 2022) for ViT-B/16."""

from pathlib import Path

import torch
from torch import nn

from semantic_aug.errors import UserError, WouldDownload, downloads_allowed

SWAG_URL = "https://download.pytorch.org/models/vit_b_16_swag-9ac1b537.pth"
"""torchvision's ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1."""


def tagged_name(name: str) -> str:
    """timm's name of torchvision's first ImageNet weights of a network. Raises UserError: no such weights, or a name with
    another tag."""
    import timm

    tagged = f"{name.partition('.')[0]}.tv_in1k"
    if not timm.list_pretrained(tagged) or name not in (tagged, tagged.partition(".")[0]):
        raise UserError(
            f"--weights torchvision: it has none for --model {name}; expected vit_b_16, resnet18, resnet50 or another with "
            "timm's tag tv_in1k, or --weights auto"
        )
    return tagged


def rename_torchvision_vit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of torchvision's ViT to timm's names; both models compute the same function."""
    names = {
        "class_token": "cls_token", "conv_proj.": "patch_embed.proj.", "encoder.pos_embedding": "pos_embed",
        "encoder.layers.encoder_layer_": "blocks.", ".ln_": ".norm", "encoder.ln.": "norm.", "heads.head.": "head.",
        "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj.": "attn.proj.",
        "mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2.", "mlp.linear_1.": "mlp.fc1.", "mlp.linear_2.": "mlp.fc2.",
    }  # fmt: skip
    renamed = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed


def swag_vit(name: str, num_classes: int, options: dict) -> nn.Module:
    """ViT-B/16 with torchvision's weights IMAGENET1K_SWAG_E2E_V1; position embeddings are resized to the images. Raises
    UserError: the weights cannot be downloaded."""
    import timm
    from timm.layers import resample_abs_pos_embed

    file = Path(torch.hub.get_dir()) / "checkpoints" / SWAG_URL.rpartition("/")[2]
    if not downloads_allowed() and not file.is_file():
        raise WouldDownload(f"the weights {SWAG_URL}")
    try:
        state = torch.hub.load_state_dict_from_url(SWAG_URL, map_location="cpu", weights_only=True)
    except Exception as error:  # network and cache raise many kinds
        raise UserError(
            f"--weights torchvision: {SWAG_URL} cannot be loaded ({type(error).__name__}: {str(error)[:160]}): put the file "
            f"at {file}, or give --weights auto"
        ) from error
    model, state = timm.create_model(name, num_classes=num_classes, **options), rename_torchvision_vit(state)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(model.patch_embed.grid_size))
    body = {key: value for key, value in state.items() if not key.startswith("head.")}
    missing, other = model.load_state_dict(body, strict=False)
    if other or any(not key.startswith("head.") for key in missing):
        raise UserError(f"--weights torchvision: {file} is no ViT-B/16 of torchvision: remove it and run again")
    return model
