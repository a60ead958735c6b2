"""`grade_loss` against a step-by-step graph through the same noise, in float64, for every parameter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from training_models import (
    VOCAB,
    BagReward,
    classifier,
    gradients,
    policy,
    prompts,
    sequential_loss,
    truncated_loss,
    worst_difference,
)

from grade_kernels import GumbelNoise
from grade_kernels.training import SequenceClassificationReward, grade_loss

SEED = 11
EOS = 4
# RMSNorm computes in float32 inside float64 models.
FAMILIES = {"gpt2": 1e-10, "llama": 1e-6, "qwen2": 1e-6, "gemma2": 1e-6}


def ending(model: torch.nn.Module) -> torch.nn.Module:
    """The same policy, with an end of sequence that comes up inside completions."""
    return model


def both(model, reward, *, time=7, tau=0.8, estimator="ste", reference=None, beta=0.0, eos=EOS, hops="exact"):
    ids, mask = prompts()
    out = grade_loss(
        model, reward, ids, mask, max_new_tokens=time, noise=GumbelNoise(SEED), tau=tau, estimator=estimator,
        feedback_hops=hops, eps=0, ref_model=reference, beta=beta, eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    loss, truth = sequential_loss(
        model, reward, ids, mask, time=time, seed=SEED, tau=tau, estimator=estimator, reference=reference, beta=beta,
        eos=eos,
    )  # fmt: skip
    return out, loss, truth


def reward_of(kind: str):
    return BagReward() if kind == "bag" else SequenceClassificationReward(classifier(kind), output="probability")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_exact_hops_equal_the_step_by_step_graph(family, kind):
    model, reference, reward = policy(family), policy(family, seed=1), reward_of(kind)
    out, loss, truth = both(model, reward, reference=reference, beta=0.1)
    assert torch.equal(out.completion_ids, truth["ids"])
    assert torch.equal(out.completion_mask, truth["mask"])
    torch.testing.assert_close(out.rewards, truth["rewards"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out.kl, truth["kl"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out.loss.detach(), loss.detach(), rtol=1e-6, atol=1e-8)
    assert worst_difference(gradients(out.loss, model), gradients(loss, model)) < FAMILIES[family]
