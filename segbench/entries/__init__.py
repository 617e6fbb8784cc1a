"""Entries: the result of one model under one protocol, every number computed from its evidence."""

from segbench.entries.document import build, entries_of, entry_paths, read_entry
from segbench.entries.scores import deviations, flag, merge_groups, recompute, reliability
from segbench.entries.validation import FINGERPRINTS, validate_entry

__all__ = [
    "FINGERPRINTS",
    "build",
    "deviations",
    "entries_of",
    "entry_paths",
    "flag",
    "merge_groups",
    "read_entry",
    "recompute",
    "reliability",
    "validate_entry",
]
