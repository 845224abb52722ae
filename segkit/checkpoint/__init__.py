"""Weight files, model cards, resume states, and loading of weights from other sources.

A run folder holds `model.safetensors` (best weights), `model.json` (the card) and `last.ckpt` with `previous.ckpt`
(the exact resume state). Nothing is ever executed from a weight file.
"""
