"""The catalogue of attacks: names, budgets, step sizes, restarts, and the best by accuracy or by loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segbench.attacks import losses, random_start
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.catalogue import ATTACKS, STEP_SIZES, get_attack, perform, schedules, step_size
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.losses import LOSSES, TARGETED
from segbench.attacks.problem import frozen
from segbench.attacks.stages import Stage
from segbench.errors import UsageError

EPS_255 = 6.0


@pytest.fixture
def problem():
    """A small network in float64, four images and labels with ignored pixels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)).double().eval()
    images = torch.rand(4, 3, 9, 11, dtype=torch.float64)
    labels = network(images).argmax(1)
    labels[:, :2] = 255
    return network, images, labels


def seeds(number, restarts=1):
    return [[1000 * image + restart for restart in range(restarts)] for image in range(number)]


def attacked(problem, name, iterations=12, **changes):
    model, images, labels = problem
    attack = get_attack(name, iterations)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    options = {"eps_255": EPS_255, "seeds": seeds(len(images), attack.restarts), "class_weights": weights} | changes
    return perform(attack, model, images, labels, **options)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_stays_within_its_budget(problem, name):
    model, images, labels = problem
    found, attack = attacked(problem, name), get_attack(name, 12)
    assert float((found.adversarial - images).abs().max()) <= EPS_255 / 255 + 1e-12
    assert 0 <= found.adversarial.min() <= found.adversarial.max() <= 1
    assert 1 < int(found.forwards.max()) <= attack.passes
    assert int(found.backwards.max()) <= (0 if name == "square" else 12)
    with torch.no_grad():
        predictions = model(found.adversarial).argmax(1)
    valid = labels != 255
    right = ((predictions == labels) & valid).flatten(1).sum(1).double() / valid.flatten(1).sum(1)
    assert torch.equal(found.accuracy, right)
    assert float(found.accuracy.mean()) < 1
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_every_loss_has_its_attacks():
    for loss in LOSSES.keys() - TARGETED:
        red, const, restarts = (ATTACKS[f"{loss}_{schedule}"] for schedule in ("red", "const", "3x100"))
        assert {each.loss for each in (red, const, restarts)} == {loss}
        assert [stage.iterations for stage in red.stages(8)] == [90, 90, 120]
        assert const.stages(8) == (Stage(1.0, 300),)
        assert restarts.stages(8) == (Stage(1.0, 100),)
        assert restarts.restarts == 3
    assert all(attack.name == name for name, attack in ATTACKS.items())
    for loss in ("mce_bal", "mce", "js", "tsallis"):
        assert ATTACKS[loss].stages(8) == ATTACKS[f"{loss}_red"].stages(8)


def test_a_targeted_attack_draws_pixels_to_its_class_whatever_their_labels(problem):
    model, images, labels = problem
    valid = labels != 255
    with torch.no_grad():
        before = ((model(images).argmax(1) == 0) & valid).sum() / valid.sum()
    found = attacked(problem, "js_target_0", 30, eps_255=24)
    with torch.no_grad():
        reached = (model(found.adversarial).argmax(1) == 0) & valid
    share = reached.flatten(1).sum(1).double() / valid.flatten(1).sum(1)
    assert torch.allclose(found.accuracy, 1 - share)
    assert float(share.mean()) > float(before) + 0.05
    others = torch.where(valid, (labels + 1) % 4, 255)
    assert torch.equal(attacked((model, images, others), "js_target_0", 30, eps_255=24).adversarial, found.adversarial)


@pytest.mark.parametrize("iterations", [0, -3])
def test_a_targeted_attack_of_no_iterations_is_refused(iterations):
    with pytest.raises(UsageError, match="needs at least 1 iteration"):
        get_attack("js_target_0", iterations)


def test_a_targeted_attack_on_two_classes_is_the_untargeted_one_on_the_other_label():
    """Of two classes, to reach one is to leave the other; what is raised differs, the first step does not."""
    torch.manual_seed(1)
    model = nn.Conv2d(3, 2, 3, padding=1).double().eval()
    images, labels = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.zeros(3, 8, 8, dtype=torch.long)
    options = {"eps_255": EPS_255, "seeds": seeds(3)}
    left = perform(get_attack("js", 60), model, images, labels, **options)
    reached = perform(get_attack("js_target_1", 60), model, images, labels, **options)
    assert torch.allclose(left.accuracy, reached.accuracy, atol=0.05)
    assert float(reached.accuracy.mean()) < float((model(images).argmax(1) == 0).double().mean())


def test_targeted_and_untargeted_images_share_a_batch(problem):
    """Each image's result is the one that it has by itself."""
    model, images, labels = problem
    stages = get_attack("js", 9).stages(EPS_255)
    jobs = [
        Job(image, torch.where(label == 255, label, 1) if loss == "js_target" else label, loss, EPS_255 / 255, stages)
        for image, label in zip(images, labels, strict=True)
        for loss in ("js_target", "js", "mce")
    ]

    def results(groups):
        for group in groups:
            batch = AttackBatch(Evaluator(model))
            keys, found = batch.add(group), {}
            while len(batch):
                batch.step()
                found |= dict(batch.finished())
            yield from (found[key] for key in keys)

    with frozen(model):
        for one, other in zip(results([jobs]), results([[job] for job in jobs]), strict=True):
            assert one.accuracy == other.accuracy
            assert torch.allclose(one.adversarial, other.adversarial, atol=1e-12)


def test_attacks_on_another_model_are_named_by_it_and_begin_as_on_their_own():
    attack = get_attack("mce_from_0123abcd", 30)
    assert (attack.loss, attack.source, attack.iterations, attack.seed_name, attack.runs_outside_batch) == (
        "mce", "0123abcd", 30, "mce", True,
    )  # fmt: skip
    assert get_attack("js_target_11", 30).target == 11
    assert not get_attack("js_target_11").runs_outside_batch
    for name in ("mce_from_0123", "nothing_from_0123abcd", "js_target_", "js_target_-1"):
        with pytest.raises(UsageError, match="attack"):
            get_attack(name)


def test_the_schedules_of_an_attack():
    assert schedules("js") == schedules("js_const") == ["js_const", "js_3x100", "js"]
    assert schedules("cospgd_red") == ["cospgd_const", "cospgd_3x100", "cospgd_red"]
    assert [schedules(name) for name in ("square", "segpgd", "js_target_1", "js_from_0123abcd")] == [
        ["square"], ["segpgd"], ["js_target_1"], ["js_from_0123abcd"],
    ]  # fmt: skip


def test_passes_are_those_of_an_attack_in_which_no_image_is_finished():
    passes = {name: get_attack(name, 300).passes for name in ("pgd", "js", "js_3x100", "square")}
    assert passes == {"pgd": 301, "js": 303, "js_3x100": 303, "square": 900}
    assert [get_attack(part).passes for part in ATTACKS["js_3x100"].parts()] == [101] * 3


def test_published_step_sizes_are_those_of_the_table():
    assert {eps: step_size(eps) for eps in STEP_SIZES} == STEP_SIZES
    (stage,) = ATTACKS["segpgd"].stages(8)
    assert (stage.radius, stage.iterations, stage.fixed_step) == (1.0, 300, pytest.approx(0.005 * 255 / 8))


@given(st.floats(0.01, 255), st.floats(0.01, 255))
def test_step_sizes_between_and_beyond_grow_with_the_radius(one, other):
    low, high = sorted((one, other))
    assert 0 < step_size(low) <= step_size(high) * (1 + 1e-12)
    if high < 0.25:
        assert step_size(high) / high == pytest.approx(0.0008 / 0.25)
    if low > 12:
        assert step_size(low) / low == pytest.approx(0.006 / 12)


def test_restarts_are_separate_attacks_of_which_the_best_counts(problem):
    together = attacked(problem, "js_3x100", 15)
    rounds = [attacked(problem, "js_const", 5, seeds=[[each[restart]] for each in seeds(4, 3)]) for restart in range(3)]
    accuracy = torch.stack([each.accuracy for each in rounds])
    assert torch.equal(together.accuracy, accuracy.min(dim=0).values)
    for image, choice in enumerate(accuracy.argmin(dim=0).tolist()):
        assert torch.equal(together.adversarial[image], rounds[choice].adversarial[image])
        assert torch.equal(together.predictions[image], rounds[choice].predictions[image])
    assert torch.equal(together.forwards, sum(each.forwards for each in rounds))
    assert len(set(accuracy.flatten().tolist())) > 1


@pytest.mark.parametrize(
    ("name", "by_loss"), [("pgd", False), ("segpgd", False), ("segpgd", True), ("cospgd", False), ("cospgd", True)]
)
def test_baselines_are_the_plain_loop_of_their_papers(problem, name, by_loss):
    """Signed steps of one size from a random start; the best visited point by accuracy, or by cross-entropy."""
    model, images, labels = problem
    eps, step, n = EPS_255 / 255, step_size(EPS_255), 9
    x = random_start(images, eps=eps, seeds=[each[0] for each in seeds(4)])
    visited, scores = [], []
    for t in range(1, n + 2):
        x.requires_grad_()
        logits = model(x)
        values = {
            "segpgd": lambda logits=logits, t=t: losses.segpgd(logits, labels, step=t, iterations=n),
            "cospgd": lambda logits=logits: losses.cospgd(logits, labels),
            "pgd": lambda logits=logits: losses.ce(logits, labels),
        }[name]()
        right = (logits.argmax(1) == labels).flatten(1).sum(1)
        visited.append(x.detach())
        scores.append(losses.ce(logits, labels).flatten(1).sum(1).detach() if by_loss else -right.double())
        (gradient,) = torch.autograd.grad(values.sum(), x)
        x = (x.detach() + step * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    found = attacked(problem, f"{name}_by_loss" if by_loss else name, n)
    assert int(found.forwards.min()) == n + 1  # no image was finished early
    table = torch.stack(scores)
    for image in range(4):
        best = [number for number in range(n + 1) if table[number, image] == table[:, image].max()]
        expected = visited[best[0] if by_loss else best[-1]][image]
        assert torch.allclose(found.adversarial[image], expected, atol=1e-12)


def test_an_image_without_a_right_pixel_goes_on_when_the_loss_counts():
    images, labels = torch.full((1, 3, 2, 2), 0.5), torch.zeros(1, 2, 2, dtype=torch.int64)

    class Falls(nn.Module):
        def forward(self, x):
            above = x.sum(1, keepdim=True)
            return torch.cat([1.4999 - above, above - 1.5], dim=1)

    passes = []
    for name in ("cospgd", "cospgd_by_loss"):
        found = perform(get_attack(name, 20), Falls(), images, labels, eps_255=8, seeds=[[0]])
        assert float(found.accuracy) == 0
        passes.append(int(found.forwards))
    assert passes[0] < passes[1] == 21


def test_an_image_is_attacked_alone(problem):
    model, images, labels = problem
    whole = attacked(problem, "segpgd", 6)
    for image in range(4):
        part = slice(image, image + 1)
        one = attacked((model, images[part], labels[part]), "segpgd", 6, seeds=seeds(4)[part])
        assert torch.allclose(one.adversarial, whole.adversarial[part], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda problem: get_attack("segpdg"), r"Unknown attack 'segpdg'. Did you mean .*'segpgd'"),
        (lambda problem: get_attack("js_3x100_4"), r"Unknown attack 'js_3x100_4'"),
        (lambda problem: get_attack("js_1"), r"Unknown attack 'js_1'"),
        (lambda problem: get_attack("js_3x100", 2), r"js_3x100 needs at least 3 iterations"),
        (lambda problem: attacked(problem, "js_3x100", seeds=seeds(4)), r"needs 3 seeds for each of 4 images"),
        (lambda problem: attacked(problem, "js", seeds=seeds(3)), r"needs 1 seeds for each of 4 images"),
        (lambda problem: attacked(problem, "js", eps_255=300), r"eps must be in \(0, 1\]"),
        (lambda problem: attacked(problem, "mce_bal", class_weights=None), r"needs class_weights"),
    ],
)
def test_what_cannot_be_is_told(problem, call, text):
    with pytest.raises(UsageError, match=text):
        call(problem)
