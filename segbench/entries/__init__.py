"""Entries: the result of one model under one protocol, every number computed from its evidence."""

from segbench.entries.document import addition_paths, build, entries_of, entry_paths, read_entry
from segbench.entries.placement import FINGERPRINTS, card_placement, card_problems
from segbench.entries.recomputation import against_evidence, evidence_of, identity_problems
from segbench.entries.scores import deviations, flag, merge_groups, recompute, reliability
from segbench.entries.validation import validate_addition, validate_entry

__all__ = [
    "FINGERPRINTS",
    "addition_paths",
    "against_evidence",
    "build",
    "card_placement",
    "card_problems",
    "deviations",
    "entries_of",
    "entry_paths",
    "evidence_of",
    "flag",
    "identity_problems",
    "merge_groups",
    "read_entry",
    "recompute",
    "reliability",
    "validate_addition",
    "validate_entry",
]
