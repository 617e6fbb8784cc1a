"""Attacks against golden vectors, a closed-form oracle, and their invariants."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segbench import attacks
from segbench.attacks.stages import reduced
from segbench.errors import UsageError

RELEASED_NAMES = {"mce": "mask-ce-avg", "mce_bal": "mask-ce-bal", "js": "js-avg"}


@pytest.mark.parametrize("eps", [4, 12])
@pytest.mark.parametrize("loss", RELEASED_NAMES)
@pytest.mark.parametrize(
    ("kind", "attack", "iterations"), [("const", attacks.apgd, 25), ("red", attacks.red_eps_apgd, 30)]
)
def test_golden_trajectories(golden, golden_network, golden_batch, kind, attack, iterations, loss, eps):
    images, labels, weights = golden_batch
    outputs, key = golden("apgd_outputs"), f"{kind}_{RELEASED_NAMES[loss]}_{eps}_"
    result = attack(
        golden_network, images, labels, eps=eps / 255, loss=loss, iterations=iterations, class_weights=weights
    )
    torch.testing.assert_close(
        result.accuracy.float(), torch.from_numpy(outputs[key + "acc"]).float(), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(
        result.adversarial[:4].float(), torch.from_numpy(outputs[key + "xadv"]), rtol=0, atol=1e-6
    )
    assert (result.predictions.numpy() == outputs[key + "pred"]).all()
    if key + "lossbest" in outputs:
        torch.testing.assert_close(result.tracked_loss, torch.from_numpy(outputs[key + "lossbest"]), rtol=0, atol=1e-5)


class PixelLinear(nn.Module):
    """Logits that are linear in each pixel: two classes, so robust accuracy is known in closed form."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [-0.5, 1.0, 1.0]]).view(2, 3, 1, 1))
            self.layer.bias.copy_(torch.tensor([0.2, 0.0]))

    def forward(self, images):
        return self.layer(images)

    def robust(self, images, labels, eps):
        """Pixels whose margin exceeds ε times the l1 norm of the weights' difference: correct for every δ."""
        logits = self(images)
        margin = torch.where(labels == 0, logits[:, 0] - logits[:, 1], logits[:, 1] - logits[:, 0])
        return margin > eps * float((self.layer.weight[0] - self.layer.weight[1]).detach().abs().sum())


@pytest.mark.parametrize("loss", ["ce", "mce", "mce_bal", "js", "segpgd", "cospgd", "tsallis"])
@pytest.mark.parametrize("attack", [attacks.apgd, attacks.red_eps_apgd, attacks.pgd])
def test_linear_oracle_is_reached(attack, loss):
    torch.manual_seed(0)
    model, eps = PixelLinear(), 0.04
    images = 0.3 + 0.4 * torch.rand(3, 3, 8, 9, dtype=torch.float64)  # away from 0 and 1: the clip never acts
    labels = model(images).argmax(dim=1)
    labels[torch.rand(labels.shape) < 0.1] ^= 1
    expected = model.robust(images, labels, eps).double().mean(dim=(1, 2))
    assert 0.2 < expected.mean() < 0.9
    extra = {"step_size": eps / 4} if attack is attacks.pgd else {}
    result = attack(
        model, images, labels, eps=eps, loss=loss, iterations=60, class_weights=torch.tensor([0.3, 0.7]), **extra
    )
    torch.testing.assert_close(result.accuracy, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_ignored_pixels_change_nothing_else(golden_network, golden_batch, share):
    """With void pixels the best point is one of the valid pixels' accuracy, and their logits do not matter."""
    images, labels, weights = (part[:4] if part.ndim > 1 else part for part in golden_batch)
    generator = torch.Generator().manual_seed(1)
    ignored = torch.rand(labels.shape, generator=generator) < share
    void = labels.masked_fill(ignored, 255)
    arguments = {"eps": 8 / 255, "loss": "mce_bal", "iterations": 20, "class_weights": weights}
    result = attacks.red_eps_apgd(golden_network, images, void, **arguments)
    predicted = golden_network(result.adversarial).argmax(dim=1)
    correct = ((predicted == void) & ~ignored).flatten(1).sum(dim=1)
    torch.testing.assert_close(result.accuracy, correct.double() / (~ignored).flatten(1).sum(dim=1).clamp(min=1))
    clean = ((golden_network(images).argmax(dim=1) == labels) & ~ignored).flatten(1).sum(dim=1)
    if share < 1:
        assert (correct < clean).all()  # the released code returned its start here
    else:
        assert result.accuracy.tolist() == [0.0] * 4
        assert result.forwards.tolist() == [6] * 4  # a start and one step in each of three stages


@pytest.mark.slow
def test_every_image_is_attacked_alone(golden_network, golden_batch):
    """Batch size, order and neighbours do not change an image's result."""
    images, labels, weights = golden_batch
    arguments = {"eps": 8 / 255, "loss": "js", "iterations": 20, "class_weights": weights}
    whole = attacks.red_eps_apgd(golden_network, images, labels, **arguments)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for size in (1, 3, 7):
        parts = [
            attacks.red_eps_apgd(golden_network, images[part], labels[part], **arguments) for part in order.split(size)
        ]
        predictions = torch.cat([part.predictions for part in parts])
        assert (predictions == whole.predictions[order]).all()
        for name in ("accuracy", "forwards", "backwards"):
            assert (torch.cat([getattr(part, name) for part in parts]) == getattr(whole, name)[order]).all()


class Counting(nn.Module):
    """Counts the images that pass through a network, and how many at once."""

    def __init__(self, network):
        super().__init__()
        self.network, self.batches = network, []

    def forward(self, images):
        self.batches.append(len(images))
        return self.network(images)


def test_finished_images_leave_the_batch_and_passes_are_counted(golden_network, golden_batch):
    images, labels, _ = golden_batch
    hopeless = labels.clone()
    hopeless[:3] = (golden_network(images[:3]).argmax(dim=1) + 1) % 7  # three images are wrong everywhere at the start
    model = Counting(golden_network)
    result = attacks.red_eps_apgd(model, images, hopeless, eps=0.5 / 255, loss="mce", iterations=30)
    assert result.forwards[:3].tolist() == [6, 6, 6]
    assert (result.forwards[3:] == 33).all()  # iterations + stages
    assert (result.backwards[3:] == 30).all()
    assert sum(model.batches) == int(result.forwards.sum())


def test_the_model_is_left_as_it_was(golden_network, golden_batch):
    images, labels, _ = (part[:2] if part.ndim > 1 else part for part in golden_batch)
    parameters = list(golden_network.parameters())
    parameters[0].requires_grad_(False)
    before = {key: value.clone() for key, value in golden_network.state_dict().items()}
    attacks.apgd(golden_network, images, labels, eps=4 / 255, loss="ce", iterations=3)
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(before[key], value) for key, value in golden_network.state_dict().items())
    parameters[0].requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_and_range_hold_in_any_dtype(golden_network, golden_batch, dtype):
    images, labels, _ = golden_batch
    images = images.to(dtype)
    model = copy.deepcopy(golden_network).to(dtype)
    result = attacks.red_eps_apgd(model, images, labels, eps=8 / 255, loss="mce", iterations=10)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # bfloat16 keeps eight bits
    assert float((result.adversarial.double() - images.double()).abs().max()) <= 8 / 255 + tolerance
    assert 0 <= float(result.adversarial.min()) <= float(result.adversarial.max()) <= 1


class Poisoned(nn.Module):
    """Gradients with NaN in one corner."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        logits = self.network(images)
        images.register_hook(
            lambda gradient: gradient.index_fill(3, torch.tensor([0]), torch.nan)
        ) if images.requires_grad else None
        return logits


def test_non_finite_gradients_are_counted_and_do_not_poison_the_image(golden_network, golden_batch):
    images, labels, _ = (part[:2] if part.ndim > 1 else part for part in golden_batch)
    result = attacks.apgd(Poisoned(golden_network), images, labels, eps=4 / 255, loss="ce", iterations=5)
    assert torch.isfinite(result.adversarial).all()
    assert torch.equal(result.adversarial[..., 0], images[..., 0])
    assert (result.nonfinite_gradients == result.backwards).all()


def test_random_start_depends_on_its_seed_alone():
    images = torch.rand(4, 3, 5, 6)
    whole = attacks.random_start(images, eps=0.1, seeds=[1, 2, 3, 2**62])
    one = attacks.random_start(images[3:], eps=0.1, seeds=[2**62])
    assert torch.equal(whole[3:], one)
    assert not torch.equal(whole[0] - images[0], whole[1] - images[1])
    assert float((whole - images).abs().max()) <= 0.1 + 1e-7
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    assert float((whole - images).abs().mean()) == pytest.approx(0.05, rel=0.2)
    with pytest.raises(UsageError, match="4 images, 1 seeds"):
        attacks.random_start(images, eps=0.1, seeds=[1])


def test_stages_of_few_iterations():
    assert [stage.iterations for stage in reduced(300)] == [90, 90, 120]
    assert [stage.iterations for stage in reduced(2)] == [0, 0, 2]
    assert all(sum(stage.iterations for stage in reduced(n)) == n for n in range(1, 60))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps": 0.0}, "eps must be in"),
        ({"eps": 4.0}, "8/255"),
        ({"iterations": 0}, "iterations must be"),
        ({"loss": "nothing"}, "Unknown loss"),
        ({"loss": "mce_bal"}, "needs class_weights"),
        ({"start": torch.zeros(1)}, "shape of images"),
    ],
)
def test_arguments_out_of_range(golden_network, golden_batch, change, text):
    images, labels, _ = golden_batch
    arguments = {"eps": 4 / 255, "loss": "ce", "iterations": 1} | change
    with pytest.raises(UsageError, match=text):
        attacks.apgd(golden_network, images, labels, **arguments)


@pytest.mark.parametrize("attack", [attacks.apgd, attacks.red_eps_apgd])
def test_a_caller_in_inference_mode_gets_the_same(golden_network, golden_batch, attack):
    images, labels, weights = (part[:2] if part.ndim > 1 else part for part in golden_batch)
    arguments = {"eps": 4 / 255, "loss": "mce_bal", "iterations": 5, "class_weights": weights}
    expected = attack(golden_network, images, labels, **arguments)
    with torch.inference_mode():
        found = attack(golden_network, images.clone(), labels.clone(), **arguments | {"class_weights": weights.clone()})
    assert torch.equal(found.adversarial, expected.adversarial)


def test_no_graph_grows_when_the_images_of_a_caller_need_gradients(golden_network, golden_batch):
    images, labels, _ = (part[:1] if part.ndim > 1 else part for part in golden_batch)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            asked = images.clone().requires_grad_()
            found = attacks.apgd(golden_network, asked, labels, eps=4 / 255, loss="ce", iterations=3)
        assert found.adversarial.grad_fn is None
