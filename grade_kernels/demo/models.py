"""The two models of the demo, trained once: the policy that writes reviews and the classifier that judges them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from grade_kernels.demo.cache import read_sealed, replace_directory
from grade_kernels.demo.config import PolicyConfig, RewardConfig, settings_hash
from grade_kernels.demo.corpus import Corpus, Review
from grade_kernels.demo.tokenizer import encode_reviews

__all__ = ["RewardModel", "new_policy", "position_ids", "train_or_load_policy", "train_or_load_reward"]

MAX_POSITIONS = 64
_WEIGHTS = "model.safetensors"


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only, so that padding on either side changes nothing."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


# --------------------------------------------------------------------------------------------------------- the policy


def new_policy(config: PolicyConfig, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2 of the configured size; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=MAX_POSITIONS,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def _policy_loss(policy: GPT2LMHeadModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def train_or_load_policy(
    directory: Path, config: PolicyConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, console: Console
) -> tuple[GPT2LMHeadModel, dict[str, float]]:
    """The supervised policy, from `directory` where a run with these very settings left it, else trained now.

    Returns:
        The policy in eval mode, and `{"perplexity": ...}` on reviews of prompts it never saw.
    """
    policy = new_policy(config, tokenizer)
    directory = directory / f"policy-{settings_hash('policy 1', config, corpus.fingerprint())}"
    note = _load(directory, policy, "policy", console)
    if note is None:
        batches = _batches(corpus.policy_reviews, config.steps, config.batch_size, config.seed, tokenizer)
        with _progress(console) as progress:
            bar = progress.add_task("Training the policy", total=config.steps)
            losses = _train(policy, config.learning_rate, config.steps, (_policy_loss(policy, *b[:2]) for b in batches))
            for loss in losses:
                progress.update(bar, advance=1, description=f"Training the policy, perplexity {math.exp(loss):5.2f}")
        policy.eval()
        with torch.no_grad():
            heldout = encode_reviews(tokenizer, [review.text for review in corpus.heldout_reviews])
            note = {"perplexity": math.exp(_policy_loss(policy, *heldout).item())}

        def write(path: Path) -> None:
            policy.save_pretrained(path)
            tokenizer.save_pretrained(path)

        replace_directory(directory, write, note)
    return policy.eval(), note


# --------------------------------------------------------------------------------------------------- the reward model


class RewardModel(nn.Module):
    """P(the review is positive), from the embeddings of its tokens.

    It reads embeddings and never ids, so it does not care whether an embedding was looked up or came out of a
    straight-through sample with a gradient attached. A small bidirectional transformer with a mean over real tokens:
    padding on either side is masked in attention, in the positions and in the mean.
    """

    def __init__(self, vocab_size: int, config: RewardConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.position = nn.Embedding(MAX_POSITIONS, config.width)
        self.blocks = nn.ModuleList(_EncoderBlock(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.score = nn.Linear(config.width, 1)

    def logits(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Log-odds of a positive review, `[rows]`, from embeddings `[rows, time, width]` and a mask `[rows, time]`."""
        real = attention_mask.to(inputs_embeds.dtype)[..., None]
        hidden = inputs_embeds + self.position(position_ids(attention_mask))
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        pooled = (self.norm(hidden) * real).sum(dim=1) / real.sum(dim=1)
        return self.score(pooled)[:, 0]

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The probability of a positive review, `[rows]`: the reward."""
        return self.logits(inputs_embeds, attention_mask).sigmoid()


class _EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def train_or_load_reward(
    directory: Path, config: RewardConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, console: Console
) -> tuple[RewardModel, dict[str, float]]:
    """The reward model, from `directory` where a run with these very settings left it, else trained now.

    Returns:
        The frozen model in eval mode, and `{"accuracy": ...}` on labelled reviews of prompts it never saw.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RewardModel(len(tokenizer), config)
    directory = directory / f"reward-{settings_hash('reward 1', config, corpus.fingerprint())}"
    note = _load(directory, model, "reward model", console)
    if note is None:

        def loss_of(ids: torch.Tensor, mask: torch.Tensor, sentiments: torch.Tensor) -> torch.Tensor:
            smooth = sentiments * (1 - config.label_smoothing) + config.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(model.logits(model.embedding(ids), mask), smooth)

        batches = _batches(corpus.reward_reviews, config.steps, config.batch_size, config.seed, tokenizer)
        with _progress(console) as progress:
            bar = progress.add_task("Training the reward model", total=config.steps)
            for loss in _train(model, config.learning_rate, config.steps, (loss_of(*batch) for batch in batches)):
                progress.update(bar, advance=1, description=f"Training the reward model, loss {loss:5.3f}")
        with torch.no_grad():
            ids, mask = encode_reviews(tokenizer, [review.text for review in corpus.heldout_reviews])
            truth = torch.tensor([review.sentiment for review in corpus.heldout_reviews])
            right = (model(model.embedding(ids), mask) > 0.5) == truth.bool()
        note = {"accuracy": right.float().mean().item()}
        replace_directory(directory, lambda path: save_file(model.state_dict(), path / _WEIGHTS), note)
    return model.eval().requires_grad_(False), note


# --------------------------------------------------------------------------------------------------------- both


def _batches(
    reviews: tuple[Review, ...], steps: int, batch_size: int, seed: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`steps` random batches of `(ids, mask, sentiments)`, all encoded at once beforehand."""
    ids, mask = encode_reviews(tokenizer, [review.text for review in reviews])
    sentiments = torch.tensor([float(review.sentiment) for review in reviews])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(reviews), (batch_size,), generator=generator)
        length = int(mask[rows].sum(dim=1).max())
        yield ids[rows, :length], mask[rows, :length], sentiments[rows]


def _train(model: nn.Module, learning_rate: float, steps: int, losses: Iterator[torch.Tensor]) -> Iterator[float]:
    """Minimise each loss in turn: AdamW, ten steps of warm-up, cosine to zero. Yields the losses as numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    for step, loss in enumerate(losses):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def _load(directory: Path, model: nn.Module, name: str, console: Console) -> dict[str, Any] | None:
    """Fill `model` from `directory` and return its note, or None where there is nothing sound to load."""
    if not directory.exists():
        return None
    try:
        note = read_sealed(directory)
        missing, unexpected = model.load_state_dict(load_file(directory / _WEIGHTS), strict=False)
        # A tied head is stored once, as the embedding table it is tied to.
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"missing weights {missing}, unexpected weights {unexpected}")
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"[yellow]The cached {name} is damaged and will be trained again: {error}[/yellow]")
        return None
    console.print(f"The {name} is cached in {directory}")
    return note


def _progress(console: Console) -> Progress:
    transformers_logging.disable_progress_bar()
    return Progress(console=console, transient=True)
