"""Every parser of segkit that reads what others made, by its name, in the rooms of what they read."""

from __future__ import annotations

from fuzzing.parser import Parser
from fuzzing.parsers import archives, cards, data_sets, dicom, graphs, results, settings, volumes, weights

PARSERS: dict[str, Parser] = {
    parser.name: parser
    for room in (volumes, dicom, settings, data_sets, archives, weights, cards, results, graphs)
    for parser in room.PARSERS
}
