"""Which tensor of a file is which tensor of a network, when the file holds more, less, or other beginnings."""

from __future__ import annotations

from collections.abc import Collection

_BEGINNINGS = ("", "image_encoder.", "encoder.", "backbone.")
"""What stands before an encoder's names in files that hold an encoder, or a network around another kind of decoder."""

_OTHER_PARTS = {
    "fc.": "the classifier that it was trained with",
    "head.": "the classifier that it was trained with",
    "prompt_encoder.": "SAM's prompt encoder",
    "mask_decoder.": "SAM's mask decoder",
    "pos_embed": "a table of positions, which the encoder here does without",
}
"""Beginnings of names that lie beside the encoder in encoder files, and what they are."""


def match_names(file: Collection[str], network: Collection[str], encoder_prefix: str) -> dict[str, str]:
    """Name in the file to name in the network: as it is or, for encoder files, below `encoder_prefix`.

    The reading under which most names meet is taken; names that meet none stay as they are.
    """
    known = set(network)
    readings: list[dict[str, str]] = [{name: name for name in file}]
    for beginning in _BEGINNINGS if encoder_prefix else ():
        below = {name: encoder_prefix + name.removeprefix(beginning) for name in file if name.startswith(beginning)}
        readings.append({name: below[name] if below.get(name) in known else name for name in file})
    return max(readings, key=lambda reading: sum(name in known for name in reading.values()))


def other_part(name: str) -> str | None:
    """What a tensor beside the encoder is part of, as a sentence; None where that is not known."""
    plain = min((name.removeprefix(beginning) for beginning in _BEGINNINGS), key=len)
    known = (f"{part.rstrip('.')} is {what}" for part, what in _OTHER_PARTS.items() if plain.startswith(part))
    return next(known, None)
