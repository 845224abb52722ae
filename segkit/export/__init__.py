"""A trained network as a folder that needs no torch: ONNX graphs, checked against it, and the card that tells all."""
