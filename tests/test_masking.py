"""A model that masks its gradients is caught: by the flags of an evaluation, and by the attack that needs none."""

from __future__ import annotations

import pytest

import segbench
from segbench.engine.compute import worker
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir import plan
from segbench.engine.studies.compare import compare
from segbench.leaderboard.verdict import why_unranked
from segbench.protocol import SEA_V1
from tests.masked import MASKED, Randomised, Saturated

OPTIONS = {"dataset": "shapes", "eps": 8, "limit": 6, "iterations": 20}
ROBUST = "at_convnext_mini_shapes"

pytestmark = [pytest.mark.usefixtures("whole_check"), pytest.mark.slow]


@pytest.fixture(scope="module")
def clean():
    return segbench.load_model("clean_convnext_mini_shapes")


def warnings(model, out, protocol="sea-v1"):
    entry = segbench.evaluate(model, out=out, progress=False, protocol=protocol, **OPTIONS).entry()
    return {flag["name"] for flag in entry["flags"] if flag["level"] == "warning"}


def flagged(model, out):
    attacks = [*SEA_V1.losses, "square"]
    return compare(model, attacks, out=out, options=RunOptions(progress=False), **OPTIONS).document()["flags"]


@pytest.mark.parametrize("masking", MASKED)
def test_a_masked_gradient_is_caught_by_the_flags_and_by_the_search(clean, masking, tmp_path):
    found = warnings(masking(clean), tmp_path / "evaluation")
    assert {"zero_gradients", "falls_to_zero"} <= found
    assert ("deterministic" in found) == (masking is Randomised)
    flags = flagged(masking(clean), tmp_path / "comparison")
    assert [(flag["attack"], flag["eps_255"], flag["metric"]) for flag in flags] == [
        ("square", 8.0, "aacc"), ("square", 8.0, "miou"),
    ]  # fmt: skip
    assert all(flag["below"] > 0.03 for flag in flags)


def test_an_adversarially_trained_model_is_not_flagged(tmp_path):
    assert flagged(ROBUST, tmp_path / "comparison") == []
    assert not {"zero_gradients", "falls_to_zero"} & warnings(ROBUST, tmp_path / "evaluation")


@pytest.mark.parametrize("masking", MASKED)
def test_a_masked_model_has_no_rank_under_sea_v2(clean, masking, tmp_path):
    """But one whose logits are only very large: standardised, they hide nothing, and its score is that of the model."""
    found = warnings(masking(clean), tmp_path, "sea-v2")
    if masking is Saturated:
        assert found == set()
        return
    assert "search_is_weaker" in found
    assert why_unranked([{"name": name, "level": "warning"} for name in found], "sea-v2")


@pytest.mark.parametrize("name", [ROBUST, "pirat_vit_mini_shapes"])
def test_an_honest_model_keeps_its_rank_under_sea_v2(name, tmp_path):
    found = warnings(name, tmp_path, "sea-v2")
    assert why_unranked([{"name": name, "level": "warning"} for name in found], "sea-v2") is None


def test_the_check_at_a_huge_radius_is_long_enough():
    """50 iterations leave a robust Segmenter, whose gradients are not masked, above the limit (`rundir.plan`)."""
    assert worker.CHECK_ITERATIONS == plan.CHECK_ITERATIONS == 100


def test_a_masked_gradient_is_caught_by_what_was_found_on_the_model_behind_it(clean, tmp_path):
    """Transfer: the attacker who has the model without its mask."""
    masked, attacks = MASKED[0](clean), [*SEA_V1.losses]
    found = compare(
        masked,
        attacks,
        sources=["clean_convnext_mini_shapes"],
        out=tmp_path,
        options=RunOptions(progress=False),
        **OPTIONS,
    )
    assert {flag["attack"] for flag in found.flags} >= {"SEA from clean_convnext_mini_shapes"}
    assert min(flag["below"] for flag in found.flags) > 0.1
