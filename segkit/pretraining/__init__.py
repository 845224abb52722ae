"""Self-supervised pre-training: encoders that have seen many unlabelled images before the first mask."""
