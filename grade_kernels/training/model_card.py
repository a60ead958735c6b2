"""The model card that a run leaves in its output directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["SETTINGS", "write"]

SETTINGS = (
    "tau", "tau_final", "tau_schedule", "estimator", "reward_transform", "eps", "feedback_hops", "beta",
    "max_completion_length", "num_generations", "learning_rate", "per_device_train_batch_size", "seed",
)  # fmt: skip

_TEXT = """---
library_name: transformers
{front}tags:
{tags}
---

# {name}

{origin} aligned with GRADE by [`grade-kernels`](https://pypi.org/project/grade-kernels/): the gradient of the reward
runs through the model's own samples by a straight-through Gumbel relaxation, with no policy-gradient estimate.

Rewards: {rewards}.

| setting | value |
|---|---|
{settings}

Method: GRADE, [arXiv:2601.11574](https://arxiv.org/abs/2601.11574).
"""


def write(
    directory: Path,
    *,
    model_name: str,
    base_model: str | None,
    dataset_name: str | None,
    tags: Sequence[str],
    settings: dict[str, Any],
    rewards: Sequence[str],
) -> None:
    """Write `README.md`.

    Args:
        directory: where.
        model_name: its title.
        base_model: what was aligned, if it has a name.
        dataset_name: of the prompts, if it has one.
        tags: for the hub.
        settings: a row of the table each.
        rewards: their names.
    """
    # A local path says nothing to a reader of the card.
    base = None if base_model is None or Path(base_model).is_absolute() or Path(base_model).exists() else base_model
    front = f"base_model: {base}\n" if base else ""
    front += f"datasets:\n- {dataset_name}\n" if dataset_name else ""
    text = _TEXT.format(
        front=front,
        tags="\n".join(f"- {tag}" for tag in tags),
        name=model_name,
        origin=f"[{base}](https://huggingface.co/{base})" if base else "A causal language model",
        rewards=", ".join(f"`{name}`" for name in rewards),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "README.md").write_text(text, encoding="utf-8")
