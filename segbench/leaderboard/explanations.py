"""What the flags mean, for readers of the board. An entry's own messages are a stranger's text; these are ours."""

from __future__ import annotations

OVERESTIMATES = "sea_overestimates"

EXPLANATIONS = {
    "deterministic": (
        "Two passes over the same image must give the same logits. If not, attacks chase a moving target and the model "
        "looks more robust than it is."
    ),
    "output_scale": (
        "The model must return logits. A sigmoid, a softmax or a scaling of each pixel changes no prediction, but "
        "weakens the losses of attacks."
    ),
    "logits": "The model must return logits. Probabilities have vanishing gradients, which weakens every attack.",
    "eval_mode": "The model must be evaluated in eval mode; batch statistics or dropout change the result.",
    "zero_gradients": (
        "Where the input gradient is zero everywhere an attack stands still. Many such images hint at masked gradients."
    ),
    "nonfinite_gradients": "A gradient that is NaN or infinite stops an attack.",
    "nonfinite_logits": "Logits that are NaN or infinite on attacked images make predictions meaningless.",
    "falls_with_eps": "With a larger ε the attacker can do more: a score that does not fall hints at a failing attack.",
    "falls_to_zero": (
        "At a huge ε an attack can paint any image, so that nothing right is left. If much is left, the attack fails "
        "and the scores at smaller ε say little: masked gradients."
    ),
    "search_is_weaker": (
        "An attack that needs no gradients must find less than those that use them. If it finds more, the gradients "
        "mislead the attacks: they are masked."
    ),
    OVERESTIMATES: (
        "Another attack on this model found a lower score than SEA, by more than the tolerance of the protocol. "
        "Read the best known score instead."
    ),
}


def explanation(name: str) -> str:
    """What a flag means; empty for one that this version does not know."""
    return EXPLANATIONS.get(name, "")
