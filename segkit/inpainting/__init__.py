"""Inpainting: missing regions of an image are filled, smoothly or by a trained network."""
