"""Every setting of the demo, with the reason for its default."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["AlignConfig", "CorpusConfig", "DemoConfig", "PolicyConfig", "RewardConfig", "SpeedConfig", "settings_hash"]


@dataclass(frozen=True)
class CorpusConfig:
    """How many prompts each split has. With 6 reviews per prompt the policy reads 18,000 reviews."""

    seed: int = 2025
    policy_prompts: int = 3000
    reward_prompts: int = 1500
    validation_prompts: int = 256
    test_prompts: int = 256
    reviews_per_prompt: int = 6


@dataclass(frozen=True)
class PolicyConfig:
    """The GPT-2-architecture policy and its supervised training."""

    width: int = 96
    layers: int = 2
    heads: int = 4
    # GPT-2's own 0.02 is meant for width 768; a narrow model learns markedly faster from a wider start.
    initializer_range: float = 0.08
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class RewardConfig:
    """The reward classifier and its supervised training."""

    width: int = 64
    layers: int = 1
    heads: int = 4
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 1


@dataclass(frozen=True)
class AlignConfig:
    """The GRADE-STE loop. The numbers below were measured on the validation prompts, after 120 to 150 steps."""

    steps: int = 150
    batch_size: int = 48
    max_new_tokens: int = 28  # the longest completion of the corpus and its end of sequence fit
    # The relaxation at 0.5 is closer to the hard sample than at 1: at the same reward 85% of the completions stay well
    # formed instead of 71% (92% before alignment). At 0.3 it is 90%, at a higher KL.
    tau: float = 0.5
    learning_rate: float = 5e-4
    # 0.02 stops at a reward of 0.86 and KL 1.5 nats; 0.01 reaches 0.94 at 2.6. (Praising always where the start policy
    # praises half the time costs ln 2 = 0.7 nats at least.)
    beta: float = 0.01
    max_grad_norm: float = 1.0  # ten times the usual norm: only against a rare outlier
    warmup_steps: int = 10
    checkpoint_every: int = 25


@dataclass(frozen=True)
class SpeedConfig:
    """Shapes `(rows, vocabulary, width)` of the sampling layer that is timed against plain PyTorch."""

    # GPT-2's and Qwen3-0.6B's vocabulary and width.
    shapes: tuple[tuple[int, int, int], ...] = ((64, 50257, 768), (64, 151936, 1024))
    repeats: int = 5


@dataclass(frozen=True)
class DemoConfig:
    """The whole demo."""

    output_dir: Path = Path("demo-output")
    seed: int = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    samples: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # what NumPy's generator takes
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}")

    @classmethod
    def tiny(cls, **changes: Any) -> DemoConfig:
        """A configuration of seconds, for tests: the same code, and a reward that visibly rises."""
        tiny = cls(
            corpus=CorpusConfig(policy_prompts=200, reward_prompts=200, validation_prompts=32, test_prompts=32),
            policy=PolicyConfig(width=48, layers=1, heads=2, steps=150, batch_size=32, learning_rate=6e-3),
            reward=RewardConfig(width=32, layers=1, heads=2, steps=100, batch_size=48, learning_rate=6e-3),
            align=AlignConfig(
                steps=12, batch_size=16, max_new_tokens=16, learning_rate=2e-3, warmup_steps=2, checkpoint_every=4
            ),
            speed=SpeedConfig(shapes=((8, 1000, 16),), repeats=3),
            samples=3,
        )
        return dataclasses.replace(tiny, **changes)


def settings_hash(*settings: object) -> str:
    """A short name for settings (dataclasses, numbers, strings): equal settings, equal name."""
    plain = [dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item for item in settings]  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
