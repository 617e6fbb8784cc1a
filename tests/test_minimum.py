"""`segbench attack minimum`: bisection, the closed form, what an evaluation finds, resuming and shards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segbench import evidence
from segbench.data import SegmentationDataset
from segbench.engine.launch.options import RunOptions
from segbench.engine.rundir.trials import Trial, Trials
from segbench.engine.studies.bisection import SmallestRadius, next_step
from segbench.engine.studies.compare import compare
from segbench.engine.studies.minimum import Minimum, grid, minimum
from segbench.errors import ShardDoneError, UsageError
from segbench.evidence import CLEAN
from tests.runs import ENVIRONMENT, MODEL

QUIET = RunOptions(progress=False)
SHORT = {"limit": 3, "iterations": 6, "largest": 48.0, "resolution": 4.0, "share": 0.3}


def found_by(out, attacks=("mce", "js"), options=QUIET, **changes):
    return minimum(MODEL, attacks, out=out, options=options, **(SHORT | changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return found_by(tmp_path_factory.mktemp("minimum") / "run")


@given(st.integers(1, 40), st.data())
def test_bisection_finds_what_trying_every_radius_finds(number, data):
    """For any image that falls from some radius on, by attacks that each do from their own."""
    radii, attacks = [float(place + 1) for place in range(number)], ["a", "b", "c"]
    from_ = {attack: data.draw(st.integers(1, number + 1)) for attack in attacks}
    fallen, tried = {CLEAN: False}, 0
    while not isinstance(then := next_step(fallen, radii, attacks).then, SmallestRadius):
        assert then not in fallen  # nothing is tried twice
        fallen[then] = then[0] >= from_[then[1]]
        tried += 1
    first = min(from_.values())
    assert then.strength == (None if first > number else float(first))
    assert tried <= len(attacks) * number.bit_length()
    assert next_step(fallen, radii, attacks).decided <= number.bit_length()


def test_an_image_that_never_stood_has_zero_and_is_tried_no_more():
    assert next_step({}, [1.0], ["a"]).then == CLEAN
    assert next_step({CLEAN: True}, [1.0], ["a"]).then == SmallestRadius(0.0)


@pytest.mark.slow
@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_what_fell_within_a_radius_falls_within_each_larger_one(first, second, data):
    """Whatever the attacks answer, monotone or not, a second grid finds nothing above what the first one proved."""
    answers = data.draw(st.lists(st.booleans(), min_size=240, max_size=240))
    fallen, found = {CLEAN: False}, []
    for radii in ([float(place + 1) for place in range(first)], [(place + 1) / 2 for place in range(second)]):
        while not isinstance(then := next_step(fallen, radii, ["a"]).then, SmallestRadius):
            assert not any(fell and eps <= then[0] for (eps, attack), fell in fallen.items() if attack == "a")
            fallen[then] = answers[int(2 * then[0])]
        found.append(then.strength)
    if found[0] is not None and found[0] <= second / 2:
        assert found[1] is not None
        assert found[1] <= found[0]
    assert all(eps is None or any(fell and each <= eps for (each, _), fell in fallen.items()) for eps in found)


def test_the_first_attack_that_does_it_is_enough():
    radii = [1.0, 2.0, 3.0]
    assert next_step({CLEAN: False}, radii, ["a", "b"]).then == (2.0, "a")
    assert next_step({CLEAN: False, (2.0, "a"): False}, radii, ["a", "b"]).then == (2.0, "b")
    assert next_step({CLEAN: False, (2.0, "a"): True}, radii, ["a", "b"]).then == (1.0, "a")


@pytest.mark.parametrize("images", [1, 7, 50, 100, 300, 1449])
def test_quantiles_are_counted_in_whole_images(tmp_path, images):
    """The smallest value with at least that share of the images at or below it, in integers."""
    found = Minimum(tmp_path, [str(number) for number in range(images)], list(range(1, images + 1)), {})
    for percent in range(101):
        assert found.quantile(percent / 100) == max(1, -(-percent * images // 100)), percent
    assert found.quantile(np.float64(0.5)) == (images + 1) // 2
    for share in (-0.01, 1.01, float("nan")):
        with pytest.raises(UsageError, match=r"in \[0, 1\], e\.g\. 0\.5"):
            found.quantile(share)


def test_shares_are_counted_at_the_radius_that_is_meant(tmp_path):
    found = Minimum(tmp_path, ["a", "b"], [0.1, 0.3], {})
    assert [found.share_broken(eps) for eps in (1 - 0.9, 0.1 * 3, 0.6 / 2, 0.29)] == [0.5, 1.0, 1.0, 0.5]


def test_the_grid():
    assert grid(32, 0.25)[:2] == [0.25, 0.5]
    assert len(grid(32, 0.25)) == 128
    assert grid(0.3, 0.1) == [0.1, 0.2, 0.3]
    assert grid(1, 1 / 3) == [0.333333333, 0.666666667, 1.0]
    assert grid(32, 5) == [5, 10, 15, 20, 25, 30, 32]  # the largest is tried, whatever the resolution
    assert grid(7, 7) == [7]
    assert grid(1, 0.7) == [0.7, 1.0]
    for hundredths in range(1, 300):  # as fractions, whatever floats make of the quotient
        assert grid(hundredths * 0.3 / 3, 0.01)[-1] == round(hundredths * 0.1, 9)
    for tenths in range(1, 100):
        assert grid(25.5, tenths / 10) == [step * tenths / 10 for step in range(1, 255 // tenths + 1)] + (
            [25.5] if 255 % tenths else []
        )
    for largest, resolution in ((1, 2), (300, 1), (1, 0), (255, 0.001)):
        with pytest.raises(UsageError, match="radii"):
            grid(largest, resolution)


class Brightness(nn.Module):
    """The second class where a pixel is brighter than a half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        above = x.mean(1, keepdim=True) - 0.5
        return torch.cat([-above, above], dim=1)


def test_the_closed_form_of_a_threshold_is_found(tmp_path):
    """Grey images, all labelled bright: of value v one falls at v - 127.5, over 255. In the last no pixel counts."""
    values = {"a": 129, "b": 131, "c": 134, "d": 140, "e": 120, "void": 200}
    data = SegmentationDataset(
        "grey", "val", ("dark", "bright"), tuple(values),
        read=lambda image_id: (
            np.full((8, 8, 3), values[image_id], np.uint8),
            np.full((8, 8), 255 if image_id == "void" else 1, np.uint8),
        ),
        count_weights=lambda: (np.full(2, 0.5), "evaluated images"),
    )  # fmt: skip
    options = {"iterations": 8, "largest": 8, "resolution": 1, "out": tmp_path / "run", "options": QUIET}
    found = minimum(Brightness(), ["ce_const"], data, **options)
    assert found.eps_255 == [2, 4, 7, None, 0, 0]
    assert [found.share_broken(eps) for eps in (0, 1, 2, 8)] == [2 / 6, 2 / 6, 3 / 6, 5 / 6]
    assert [found.quantile(share) for share in (0.3, 0.4, 0.5, 0.6, 0.8, 1)] == [0, 2, 2, 4, 7, None]
    assert found.unbroken == 1


class Halves(nn.Module):
    """Logits that no image changes: the first 29 of 100 columns are of the second class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        second = (torch.arange(x.shape[-1], device=x.device) < 29).to(x.dtype) + 0 * x[:, :1]
        return torch.cat([1 - second, second], dim=1)


@pytest.mark.parametrize(("share", "eps"), [(0.29, 0.0), (0.28, None)])
def test_a_share_is_the_number_that_was_written(tmp_path, share, eps):
    """0.29 * 100 is 28.999999999999996 in floating point, and 29 of 100 pixels are right."""
    data = SegmentationDataset(
        "grey", "val", ("first", "second"), ("a",),
        read=lambda _: (np.full((1, 100, 3), 99, np.uint8), np.ones((1, 100), np.uint8)),
        count_weights=lambda: (np.full(2, 0.5), "evaluated images"),
    )  # fmt: skip
    options = {"iterations": 1, "largest": 1, "resolution": 1, "out": tmp_path / "run", "options": QUIET}
    assert minimum(Halves(), ["ce_const"], data, share=share, **options).eps_255 == [eps]


@pytest.mark.slow
def test_it_is_the_smallest_radius_of_a_comparison_at_all_of_them(small, tmp_path):
    radii = grid(SHORT["largest"], SHORT["resolution"])
    result = compare(MODEL, ["mce", "js"], eps=radii, limit=3, iterations=6, out=tmp_path / "run", options=QUIET)
    groups = evidence.from_bytes((result.path / "comparison.parquet").read_bytes(), source="").groups
    for row, (image_id, eps) in enumerate(zip(small.image_ids, small.eps_255, strict=True)):
        share = {
            radius: min(
                groups[radius, attack].counts.correct[row] / groups[radius, attack].counts.target[row].sum()
                for attack in ("mce", "js")
            )
            for radius in radii
        }
        falls = [radius for radius in radii if share[radius] <= SHORT["share"]]
        assert falls == [radius for radius in radii if radius >= falls[0]], f"{image_id}: not monotone, choose another"
        assert eps == falls[0]
    trials = Trials(small.path).read()
    for image_id, tried in trials.items():
        row = small.image_ids.index(image_id)
        for key, trial in tried.items():
            assert trial.right == groups[key].counts.correct[row]  # each trial is what an evaluation finds


@pytest.mark.slow
def test_it_goes_on_from_what_was_tried_and_tries_nothing_twice(small, tmp_path):
    lines = [line for line in (small.path / "tried.jsonl").read_text().splitlines() if line]
    again = found_by(small.path)
    assert [line for line in (small.path / "tried.jsonl").read_text().splitlines() if line] == lines
    assert again.document() == small.document()
    half = tmp_path / "run"
    found_by(half, largest=4.0)  # other radii of the same run
    (half / "tried.jsonl").write_text("\n".join([*lines[: len(lines) // 2], lines[-1][:30]]))
    assert found_by(half).eps_255 == small.eps_255
    parsed = [json.loads(line) for line in (half / "tried.jsonl").read_text().splitlines() if line.endswith("}")]
    keys = [(record["image_id"], record["strength"], record["attack"]) for record in parsed]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {(r["image_id"], r["strength"], r["attack"]) for r in map(json.loads, lines)}


@pytest.mark.slow
def test_batch_size_and_shards_change_nothing(small, tmp_path):
    assert found_by(tmp_path / "one", options=RunOptions(progress=False, batch_size=1)).eps_255 == small.eps_255
    with pytest.raises(ShardDoneError, match=r"Shard 2/2 is done\. 2 of 3 images are missing\."):
        found_by(tmp_path / "run", options=RunOptions(progress=False, shard="2/2"))
    assert not (tmp_path / "run" / "minimum.json").exists()
    found = found_by(tmp_path / "run", options=RunOptions(progress=False, shard="1/2"))
    assert found.eps_255 == small.eps_255
    assert {file.name for file in (tmp_path / "run").glob("tried*")} == {"tried-1-of-2.jsonl", "tried-2-of-2.jsonl"}


@pytest.mark.slow
def test_a_kill_and_a_sigterm_lose_no_trial_and_nothing_is_tried_twice(tmp_path):
    out, longer = tmp_path / "run", {"iterations": 20}
    what = ["--model", MODEL, "--attacks", "mce", "js", "--out", str(out), "--quiet"]
    options = ["--limit", "3", "--iterations", "20", "--largest", "48", "--resolution", "4", "--share", "0.3"]
    before: set[str] = set()
    for stop, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 3)):
        process = subprocess.Popen(
            [sys.executable, "-m", "segbench", "attack", "minimum", *what, *options],
            env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while len(attacked(out) - before) < 1 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        assert attacked(out) > before
        before = attacked(out)
    assert "of 3 images are left" in errors
    assert not (out / "minimum.json").exists()
    assert found_by(out, **longer).eps_255 == found_by(tmp_path / "once", **longer).eps_255
    assert before < attacked(out) == attacked(tmp_path / "once")
    assert len(attacked(out)) == sum('"attack": "clean"' not in line for line in whole_lines(out))


def attacked(out):
    """The trials of attacks that are written."""
    return {line for line in whole_lines(out) if '"attack": "clean"' not in line}


def whole_lines(out):
    file = out / "tried.jsonl"
    return [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def test_damaged_lines_are_passed_over(tmp_path):
    whole = Trial("a", 4.0, "mce", 3, 10)
    trials = Trials(tmp_path)
    trials.add(whole)
    bad = [{"right": 11}, {"right": "3"}, {"image_id": 5}, {"more": 1}]
    lines = [json.dumps(whole._asdict() | each) for each in bad]
    with (tmp_path / "tried.jsonl").open("a") as stream:
        stream.write("\n".join([*lines, "[]", "7", json.dumps(whole._asdict())[:20]]))
    other = Trial("a", 8.0, "mce", 0, 10)
    trials.add(other)
    assert trials.read() == {"a": {(4.0, "mce"): whole, (8.0, "mce"): other}}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attacks": []}, "Which attacks"),
        ({"attacks": ["js_3x100"]}, "js_3x100 cannot be tried at many radii"),
        ({"attacks": ["js_target_0"]}, "js_target_0 cannot"),
        ({"share": 1.0}, r"share must be in \[0, 1\)"),
        ({"resolution": 64.0}, "resolution to"),
        ({"options": RunOptions(progress=False, engine="ray")}, "--shard 1/4"),
    ],
)
def test_arguments_out_of_range_are_told(tmp_path, changes, text):
    with pytest.raises(UsageError, match=text):
        found_by(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_prints_a_table_and_status_and_merge_know_what_it_is(cli):
    options = ["--model", MODEL, "--limit", "2", "--iterations", "3", "--largest", "4", "--resolution", "1", "--quiet"]
    code, out, err = cli("attack", "minimum", *options, "--out", "run", "--attacks", "mce")
    assert code == 0, err
    assert "(2 images), 99% of the pixels wrong" in out
    assert "median above 4/255" in out
    assert "2 of 2 images are not broken at 4/255." in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith("% ") or line.rstrip().endswith("%")] == [
        f"{radius}/255" for radius in (0, 1, 2, 4)
    ]
    assert "minimum.json" in err
    code, out, _ = cli("attack", "minimum", *options, "--out", "run", "--attacks", "mce", "--json")
    document = json.loads(out)
    assert (document["eps_255"], document["share_right"], document["attacks"]) == ([None, None], 0.01, ["mce"])
    code, out, _ = cli("status", "run")
    assert code == 0
    assert "trials on 2 images so far; minimum.json is there." in out
    code, _, err = cli("merge", "run")
    assert code == 1
    assert "looks for the smallest ε of each image; it makes no entry" in err


def test_status_says_that_a_search_is_not_finished(cli):
    options = ["--model", MODEL, "--limit", "2", "--iterations", "1", "--largest", "1", "--resolution", "1", "--quiet"]
    code, _, err = cli("attack", "minimum", *options, "--out", "run", "--attacks", "mce", "--shard", "1/2")
    assert (code, "Shard 1/2 is done. 1 of 2 images are missing." in err) == (3, True)
    code, out, err = cli("status", "run")
    assert code == 3
    assert "minimum.json is not there yet." in out
    assert "run the same `segbench attack minimum` again" in err
