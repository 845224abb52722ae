"""Training losses: pure functions of logits and targets first, the module that a training step calls second."""
