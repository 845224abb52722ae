"""Arguments that make each family of networks small."""

SMALLEST: dict[str, dict[str, object]] = {
    "revmbunet": {"size": "tiny", "widths": (8, 12, 16)},
    "r2unet": {"size": "tiny", "widths": (8, 12, 16)},
    "runet": {"size": "tiny", "widths": (8, 12, 16)},
    "plainunet": {"size": "tiny", "widths": (8, 12, 16)},
    "resencunet": {"size": "tiny", "widths": (8, 12, 16)},
    "stunet": {"size": "S", "width": 8},
    "smp": {"size": "unet-small", "encoder_depth": 3, "decoder_channels": (32, 16, 16)},
    "monai": {"network_def": {"_target_": "SegResNet", "blocks_down": [1, 1], "blocks_up": [1]}},
    "inpainter": {"size": "tiny", "widths": (8, 12, 16)},
    "generator": {"size": "tiny", "width": 8},
    "vit": {
        "size": "tiny",
        "width": 24,
        "depth": 2,
        "heads": 2,
        "window": 2,
        "global_blocks": (1,),
        "image_size": 64,
        "neck": 16,
        "decoder_widths": (16, 16, 16, 16),
    },
}
