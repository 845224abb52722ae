"""Scores of folders of masks: pairing with references, protocols, tables, comparison of models."""
