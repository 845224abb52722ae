"""Weights and the card that describes them, the resume state, and weights from elsewhere.

A run folder holds `model.safetensors` (best weights), `model.json` (the card) and `last.ckpt` with `previous.ckpt`
(the exact resume state). Nothing is ever executed from a weight file.
"""
