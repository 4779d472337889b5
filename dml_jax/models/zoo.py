"""Well-known pretrained weights that fit the backbones, by name of the backbone."""

WEIGHTS = (
    ("resnet18", "hf:timm/resnet18.tv_in1k"),
    ("resnet50", "hf:timm/resnet50.tv_in1k"),
    ("resnet50", "hf:timm/resnet50.a1_in1k"),
    ("vit_small_patch16", "hf:timm/deit_small_patch16_224.fb_in1k"),
    ("vit_small_patch16", "hf:timm/vit_small_patch16_224.augreg_in21k"),
    ("vit_small_patch16", "hf:timm/vit_small_patch16_224.dino"),
    ("vit_base_patch16", "hf:timm/vit_base_patch16_224.dino"),
    ("vit_base_patch32_clip_quickgelu", "hf:timm/vit_base_patch32_clip_224.openai"),
    ("vit_base_patch16_clip_quickgelu", "hf:timm/vit_base_patch16_clip_224.openai"),
    ("vit_small_patch14_dinov2", "hf:timm/vit_small_patch14_dinov2.lvd142m"),
    ("vit_base_patch14_dinov2", "hf:timm/vit_base_patch14_dinov2.lvd142m"),
)
"""Backbone and location of weights, from small to large."""
