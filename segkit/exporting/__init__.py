"""Exports of trained networks: ONNX graphs that were compared with the network, and the model card."""
