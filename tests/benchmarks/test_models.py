"""Transformers' Wav2Vec2 and GroupViT and an image tokeniser train with ours as with the function that they have."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers.models.groupvit import modeling_groupvit

import grade_kernels as gk
from benchmarks import models
from tests.support.helpers import injected_noise

DIMS = {"Wav2Vec2": -1, "GroupViT": -2, "image tokeniser": 1}
ITS_OWN = {"GroupViT": modeling_groupvit}  # the others have PyTorch's


def losses(name, gumbel_softmax, steps):
    """Of a few steps on the same batch. The seed decides the noise, since nothing else in these models is random."""
    training = models.Training(name, True, gumbel_softmax)
    torch.manual_seed(3)
    return torch.stack([training.step() for _ in range(steps)])


def with_our_noise(theirs):
    """A program's own function, which gets our noise wherever it draws some."""

    def gumbel_softmax(logits, tau=1.0, hard=False, dim=-1):
        rows = logits.detach().movedim(dim, -1)
        noise = gk.GumbelNoise.from_generator().dense(rows[..., 0].numel(), rows.shape[-1], dtype=torch.float32)
        noise = noise.view(rows.shape).movedim(-1, dim)
        gumbel = mock.patch.object(torch.distributions.Gumbel, "sample", return_value=noise)
        with injected_noise(noise), gumbel:
            return theirs(logits, tau=tau, hard=hard, dim=dim)

    return gumbel_softmax


@pytest.mark.parametrize("name", models.PROGRAMS)
def test_the_same_noise_gives_the_same_training(name):
    models.agree(name, True, gk.gumbel_softmax, with_our_noise(ITS_OWN.get(name, F).gumbel_softmax))


@pytest.mark.parametrize("name", models.PROGRAMS)
def test_the_loss_falls_as_with_eager(name):
    for gumbel_softmax in (gk.gumbel_softmax, None):
        found = losses(name, gumbel_softmax, 20)
        assert found[-5:].mean() < 0.8 * found[0]


@pytest.mark.parametrize("name", models.PROGRAMS)
def test_the_models_sample_by_what_replaces_it(name):
    spy = mock.Mock(side_effect=gk.gumbel_softmax)
    losses(name, spy, 1)
    assert {call.kwargs.get("dim", -1) for call in spy.call_args_list} == {DIMS[name]}
    assert all(call.kwargs["hard"] for call in spy.call_args_list)


@pytest.mark.parametrize("name", models.PROGRAMS)
@pytest.mark.parametrize("fault", [lambda y: y.detach(), lambda y: y.roll(1, -1)], ids=["no gradient", "other samples"])
def test_a_wrong_result_gets_no_number(name, fault, monkeypatch):
    models.check(name, small=True)
    right = gk.gumbel_softmax
    monkeypatch.setattr(gk, "gumbel_softmax", lambda *arguments, **options: fault(right(*arguments, **options)))
    with pytest.raises(AssertionError):
        models.check(name, small=True)
