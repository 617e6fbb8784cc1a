"""Attacks: pure functions on tensors, which know nothing of files, cards or data sets."""

from segbench.attacks import losses
from segbench.attacks.apgd import apgd, red_eps_apgd
from segbench.attacks.pgd import pgd
from segbench.attacks.problem import AttackResult
from segbench.attacks.start import random_start

__all__ = ["AttackResult", "apgd", "losses", "pgd", "random_start", "red_eps_apgd"]
