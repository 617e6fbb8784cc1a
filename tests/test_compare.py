"""`segbench attack compare`: what evaluate finds, more attacks later, restarts, ensembles, and significance."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
import torch

import segbench
from segbench import evidence
from segbench.attacks.catalogue import get_attack, perform
from segbench.cli import attack
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.store import Store
from segbench.engine.studies.compare import BASELINES, compare
from segbench.errors import ModelError, RunError, ShardDoneError, UsageError
from segbench.protocol import SEA_V1, comparison
from tests.masked import Quantised
from tests.runs import MODEL, run

OTHER = "at_convnext_mini_shapes"
QUIET = RunOptions(progress=False)
SHORT = {"eps": [4, 8], "limit": 5, "iterations": 4}


def found_by(out, attacks=SEA_V1.losses, options=QUIET, **changes):
    return compare(MODEL, attacks, out=out, options=options, **(SHORT | changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SEA's losses, a baseline, a search and restarts."""
    return found_by(tmp_path_factory.mktemp("compare") / "run", [*SEA_V1.losses, "segpgd", "square", "js_3x100"])


def rows_of(result, eps):
    return {row["attack"]: row for row in result.rows if row["eps_255"] == eps}


def groups_of(result):
    return evidence.from_bytes((result.path / "comparison.parquet").read_bytes(), source="comparison").groups


@pytest.mark.slow
def test_the_losses_of_sea_are_those_of_an_evaluation(small, reference):
    entry, theirs = reference.entry(), evidence.from_bytes(reference.evidence_path.read_bytes(), source="entry").groups
    for eps in (4, 8):
        for loss in SEA_V1.losses:
            ours = groups_of(small)[eps, loss].counts
            assert all((a == b).all() for a, b in zip(ours, theirs[eps, loss].counts, strict=True))
        (result,) = (row for row in entry["results"] if row["strength"] == eps)
        sea = rows_of(small, eps)["SEA"]
        assert (sea["aacc"], sea["miou"]) == (result["aacc"], result["miou"])
        assert sea["aacc_95"] == pytest.approx(result["interval"]["aacc"])
    assert rows_of(small, 0)["clean"]["aacc"] == entry["clean"]["aacc"]


def test_an_ensemble_is_no_weaker_than_its_members(small):
    for eps in (4, 8):
        rows = rows_of(small, eps)
        assert list(rows) == [*SEA_V1.losses, "segpgd", "square", "js_3x100", "SEA", "all"]
        for metric in ("aacc", "miou"):
            strongest = min(rows[loss][metric] for loss in SEA_V1.losses)
            assert rows["SEA"][metric] <= strongest
            assert rows["SEA"]["gain"][metric] == strongest - rows["SEA"][metric]
            assert rows["mce"]["gain"][metric] is None
            assert rows["all"][metric] <= rows["SEA"][metric]


def test_restarts_are_the_best_of_each_image(small):
    groups = groups_of(small)
    parts = [groups[8, f"js_3x100_{number}"].counts for number in (1, 2, 3)]
    best = np.min([each.correct for each in parts], axis=0)
    assert rows_of(small, 8)["js_3x100"]["aacc"] == pytest.approx(best.sum() / parts[0].target.sum())
    assert len({tuple(each.correct) for each in parts}) == 3  # each has a start of its own


@pytest.mark.slow
def test_the_strongest_is_no_weaker_than_itself_and_a_search_of_few_queries_is(small, tmp_path):
    rows = rows_of(found_by(tmp_path / "run", [*SEA_V1.losses, "square"], eps=8, limit=6), 8)
    for metric in ("aacc", "miou"):
        single = {name: row for name, row in rows.items() if name not in ("SEA", "all")}
        assert not min(single.values(), key=lambda row: row[metric])["weaker"][metric]
        assert single["square"]["weaker"][metric]
        assert rows["SEA"]["weaker"][metric] is None
        assert all(row["weaker"][metric] is None for row in small.rows)  # of five images


def test_costs_are_those_of_the_units(small):
    rows, stats = rows_of(small, 8), Store.open(small.path)
    for name, parts in (("segpgd", ["segpgd"]), ("js_3x100", ["js_3x100_1", "js_3x100_2", "js_3x100_3"])):
        units = [unit for unit in stats.units([8.0]) if unit.loss in parts]
        assert rows[name]["forwards"] == sum(sum(stats.read(unit)[1]["forwards"]) for unit in units)
        assert rows[name]["seconds"] > 0
    assert (rows["square"]["forwards"], rows["square"]["backwards"]) == (5 * 12, 0)
    assert rows["segpgd"]["backwards"] == 5 * 4


@pytest.mark.slow
def test_no_second_is_charged_twice(tmp_path):
    started = time.monotonic()
    found = found_by(tmp_path / "run", ["mce", "square", "js"], eps=8, iterations=20)
    passed = time.monotonic() - started
    assert sum(cost["seconds"] for cost in Store.open(found.path).costs().values()) <= passed


@pytest.mark.slow
def test_more_attacks_and_radii_are_added_and_nothing_is_done_twice(tmp_path):
    first = found_by(tmp_path / "run", ["mce"], eps=8, limit=2)
    lines = (first.path / "log.jsonl").read_text().splitlines()
    more = found_by(first.path, ["mce", "pgd"], eps=[8, 12], limit=2)
    again = (first.path / "log.jsonl").read_text().splitlines()
    assert again[: len(lines)] == lines
    assert len({json.loads(line)["unit"] for line in again}) == len(again) == 1 + 4
    assert rows_of(more, 8)["mce"] == rows_of(first, 8)["mce"] | {"weaker": rows_of(more, 8)["mce"]["weaker"]}
    assert "all" not in rows_of(first, 8)
    assert "SEA" not in rows_of(more, 8)


@pytest.mark.slow
def test_shards_give_the_same_bytes(small, tmp_path):
    attacks = [*SEA_V1.losses, "segpgd", "square", "js_3x100"]
    with pytest.raises(ShardDoneError, match=r"^Shard 2/2 is done\. .* or: the same command without --shard"):
        found_by(tmp_path / "run", attacks, options=RunOptions(progress=False, shard="2/2"))
    result = found_by(tmp_path / "run", attacks, options=RunOptions(progress=False, shard="1/2"))
    ours, theirs = ((each.path / "comparison.parquet").read_bytes() for each in (result, small))
    assert ours == theirs


@pytest.mark.slow
def test_what_faces_this_model_is_what_was_found_on_the_other(small, tmp_path):
    """The adversarial images are those of the other model's own evaluation, counted on this one."""
    result = found_by(tmp_path / "run", [*SEA_V1.losses, "tsallis", "square"], eps=8, limit=2, sources=[OTHER])
    source, target = (segbench.load_model(each) for each in (OTHER, MODEL))
    data = segbench.load_dataset("shapes").first(2)
    images, labels = (torch.stack([getattr(each, name) for each in data]) for name in ("image", "label"))
    seeds = [[SEA_V1.start_seed(each, "mce", 8.0)] for each in data.image_ids]
    adversarial = perform(get_attack("mce", 4), source, images, labels, eps_255=8, seeds=seeds).adversarial
    with torch.no_grad():
        right = ((target(adversarial).argmax(1) == labels) & (labels != 255)).sum() / (labels != 255).sum()
    rows = rows_of(result, 8)
    assert rows[f"mce from {OTHER}"]["aacc"] == pytest.approx(float(right), abs=0.01)
    assert rows[f"mce from {OTHER}"]["aacc"] > rows["mce"]["aacc"]  # the other model's weakness is not this one's
    assert list(rows)[-3:] == ["SEA", f"SEA from {OTHER}", "SEA+"]
    transferred = [rows[f"{loss} from {OTHER}"]["aacc"] for loss in SEA_V1.losses]
    assert rows[f"SEA from {OTHER}"]["aacc"] <= min(transferred)
    assert rows["SEA+"]["aacc"] <= min(rows["SEA"]["aacc"], *transferred)
    assert result.flags == result.document()["flags"] == []


@pytest.mark.slow
def test_transfer_is_the_same_in_any_batch_and_shard(tmp_path):
    options = {"attacks": ["mce"], "eps": 8, "limit": 3, "sources": [OTHER]}
    whole = found_by(tmp_path / "whole", **options)
    with pytest.raises(ShardDoneError):
        found_by(tmp_path / "run", options=RunOptions(progress=False, shard="2/2", batch_size=1), **options)
    parts = found_by(tmp_path / "run", options=RunOptions(progress=False, shard="1/2", batch_size=2), **options)
    ours, theirs = ((each.path / "comparison.parquet").read_bytes() for each in (whole, parts))
    assert ours == theirs


def test_a_model_does_not_transfer_to_itself(tmp_path):
    with pytest.raises(UsageError, match=f"{MODEL} is the model that is attacked"):
        found_by(tmp_path / "run", sources=[MODEL])


def test_attacks_that_need_more_than_a_name_are_told_how(tmp_path):
    with pytest.raises(UsageError, match=r"made on another model: name the model, with --from"):
        found_by(tmp_path / "run", ["mce_from_0123abcd"])
    with pytest.raises(UsageError, match="segbench attack targeted --target 99"):
        found_by(tmp_path / "run", ["js_target_99"])
    assert not (tmp_path / "run").exists()


class Levels(Quantised):
    """Rounds to a number of levels that neither its weights nor its printed form tell; the gradient goes through."""

    def __init__(self, model, levels):
        super().__init__(model)
        self.levels = levels

    def forward(self, x):
        return self.model(x + (torch.round(x * self.levels) / self.levels - x).detach())


class Shut(Quantised):
    """No gradient with respect to the images."""

    def forward(self, x):
        with torch.no_grad():
            return self.model(x)


def test_a_source_that_cannot_be_attacked_is_told(tmp_path):
    with pytest.raises(ModelError, match=r"The model to transfer from, shut: .*no gradient"):
        found_by(tmp_path / "run", ["mce"], eps=8, limit=2, sources=[Shut(segbench.load_model(OTHER))])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_source_of_the_same_weights_is_not_taken_for_the_first(tmp_path):
    """Two modules that print the same and hold the same weights, and round their input otherwise."""
    coarse, fine = (Levels(segbench.load_model(OTHER), levels) for levels in (4, 250))
    options = {"attacks": ["mce"], "eps": 8, "limit": 2}
    found = found_by(tmp_path / "run", sources=[coarse], **options)
    with pytest.raises(RunError, match=r"attacks on another model of the weights .*another folder with --out"):
        found_by(tmp_path / "run", sources=[fine], **options)
    other = found_by(tmp_path / "other", sources=[fine], **options)
    assert rows_of(found, 8)["SEA from levels"] != rows_of(other, 8)["SEA from levels"]
    assert found_by(tmp_path / "run", sources=[coarse], **options).rows == found.rows


@pytest.mark.slow
def test_one_name_is_no_list_of_letters(tmp_path):
    found = found_by(tmp_path / "run", "mce", eps=8, limit=1, sources=OTHER)
    assert [row["attack"] for row in found.rows][:2] == ["clean", "mce"]
    command = Store.open(found.path).manifest["environment"]["command"]
    assert (
        command == f"segbench attack compare --attacks mce --from {OTHER} --model {MODEL} --dataset shapes --limit 1 "
        "--iterations 4"
    )


def test_pairs_are_ensembles_of_two(small, tmp_path):
    result = found_by(small.path, pairs=True)
    for eps in (4, 8):
        rows = rows_of(result, eps)
        assert [name for name in rows if "+" in name] == ["mce_bal + mce", "mce_bal + js", "mce + js"]
        for metric in ("aacc", "miou"):
            pair = rows["mce + js"][metric]
            assert rows["SEA"][metric] <= pair <= min(rows["mce"][metric], rows["js"][metric])


def test_its_identity_is_its_own_and_leaves_the_attacks_open(small, tmp_path):
    one, other = comparison(["mce"]), comparison(["js", "pgd"])
    assert one.digest() == other.digest() != SEA_V1.digest()
    assert comparison(["mce"], 50).digest() != one.digest()
    assert one.digest() != dataclasses.replace(one, name="sea-v1").digest()
    with pytest.raises(
        RunError, match=r"with other settings: protocol: comparison there, sea-v1 here(; images: .*)?\. N"
    ):
        run(small.path)


def test_it_makes_no_entry(small, cli):
    code, _, err = cli("merge", str(small.path))
    assert code == 1
    assert "compares attacks; it makes no entry. `segbench attack compare` with the same --out" in err
    assert cli("status", str(small.path))[0] == 0
    assert not (small.path / f"{MODEL}.json").exists()


def test_the_command_prints_the_table(cli):
    options = ["--model", MODEL, "--eps", "8", "--limit", "2", "--iterations", "2", "--quiet", "--out", "run"]
    code, out, err = cli("attack", "compare", *options, "--attacks", "mce", "cospgd")
    assert code == 0, err
    assert f"{MODEL} on shapes (2 images), 2 iterations." in out
    assert [line.split()[1] for line in out.splitlines() if "/255" in line] == ["clean", "mce", "cospgd", "all"]
    assert "comparison.json" in err
    code, out, _ = cli("attack", "compare", *options, "--attacks", "mce", "cospgd", "--json")
    document = json.loads(out)
    assert code == 0
    assert [row["attack"] for row in document["rows"]] == ["clean", "mce", "cospgd", "all"]
    assert (document["iterations"], document["seed"]) == (2, 225)
    code, _, err = cli("attack", "compare", *options, "--attacks", "cosgpd")
    assert code == 2
    assert "Did you mean" in err
    assert "'cospgd'" in err


def test_the_command_lists_the_attacks(cli):
    code, out, _ = cli("attack", "list")
    assert code == 0
    assert all(name in out for name in (*BASELINES, *SEA_V1.losses, "js_3x100", "square"))
    assert {each["name"] for each in json.loads(cli("attack", "list", "--json")[1])} >= {*BASELINES}


def test_no_attack_is_told():
    with pytest.raises(UsageError, match=r"Which attacks\? See: segbench attack list"):
        compare(MODEL, [])


def test_attacks_stronger_than_sea_are_named():
    """By metric, only the lowest single attack at this strength, and only if it is below SEA."""
    gain, none = {"aacc": 0.01, "miou": 0.0}, {"aacc": None, "miou": None}
    names = ("attack", "strength", "aacc", "miou", "gain")
    rows = [
        dict(zip(names, row, strict=True))
        for row in (
            ("js", 8.0, 0.51, 0.30, none),
            ("segpgd", 8.0, 0.49, 0.31, none),
            ("tsallis", 8.0, 0.485, 0.31, none),
            ("tsallis", 12.0, 0.1, 0.1, none),
            ("SEA", 8.0, 0.50, 0.30, gain),
            ("all", 8.0, 0.48, 0.29, gain),
        )
    ]
    assert list(attack._stronger_than(rows[4], rows)) == ["At 8/255 tsallis alone is 1.5 points of aAcc below SEA."]
