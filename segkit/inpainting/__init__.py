"""Inpainting: what is missing of an image is made up, by simple fills or by a trained network."""
