"""The two models of the demo, trained once: the policy that writes reviews and the classifier that judges them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grade_kernels.demo.cache import read_sealed, replace_directory
from grade_kernels.demo.config import PolicyConfig, RewardConfig, settings_hash
from grade_kernels.demo.corpus import Corpus, Review
from grade_kernels.demo.tokenizer import encode_reviews
from grade_kernels.training.model import position_ids

__all__ = [
    "MAX_POSITIONS",
    "Reviews",
    "RewardModel",
    "completion_loss",
    "fit_policy",
    "fit_reward",
    "new_policy",
    "train_or_load_policy",
    "train_or_load_reward",
]

MAX_POSITIONS = 64
_WEIGHTS = "model.safetensors"


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
                initializer_range=config.initializer_range,
                activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new as one operation instead of eight
                attn_implementation="eager",  # type: ignore[call-arg]  # at these sizes the quickest, and its gradient is plain
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def completion_loss(
    policy: GPT2LMHeadModel, ids: torch.Tensor, mask: torch.Tensor, prompt_lengths: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the tokens behind the prompts, 0-d; the prompts are given and need not be learned.

    Args:
        policy: a causal language model.
        ids: prompt and completion, padded on the right, `[rows, time]`.
        mask: 1 at real tokens.
        prompt_lengths: `[rows]`.
    """
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    is_completion = (torch.arange(ids.shape[1]) >= prompt_lengths[:, None]) & mask.bool()
    targets = ids.masked_fill(~is_completion, -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def train_or_load_policy(
    directory: Path, config: PolicyConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, console: Console
) -> tuple[GPT2LMHeadModel, dict[str, float]]:
    """`fit_policy` on the corpus's reviews, under a name in `directory` that stands for all settings."""
    directory = directory / f"policy-{settings_hash('policy 1', config, corpus.fingerprint())}"

    def reviews() -> tuple[Reviews, Reviews]:
        return _encode(corpus.policy_reviews, tokenizer), _encode(corpus.heldout_reviews, tokenizer)

    return fit_policy(directory, config, reviews, tokenizer, console)


def fit_policy(
    directory: Path,
    config: PolicyConfig,
    reviews: Callable[[], tuple[Reviews, Reviews]],
    tokenizer: PreTrainedTokenizerFast,
    console: Console,
) -> tuple[GPT2LMHeadModel, dict[str, float]]:
    """The supervised policy, from `directory` where a run left it, else trained now.

    Args:
        directory: its name must stand for everything the policy depends on.
        config: size and training.
        reviews: gives texts to learn from and texts to measure on; called only to train.
        tokenizer: saved beside the policy.
        console: where progress is shown.

    Returns:
        The policy in eval mode, and `{"perplexity": ...}` on the texts to measure on.
    """
    policy = new_policy(config, tokenizer)
    note = _load(directory, policy, "policy", console)
    if note is None:
        train, heldout = reviews()
        batches = _batches(train, config.steps, config.batch_size, config.seed)
        with _progress(console) as progress:
            bar = progress.add_task("Training the policy", total=config.steps)
            losses = (completion_loss(policy, batch.ids, batch.mask, batch.prompt_lengths) for batch in batches)
            for loss in _train(policy, config.learning_rate, config.steps, losses):
                progress.update(bar, advance=1, description=f"Training the policy, perplexity {math.exp(loss):5.2f}")
        policy.eval()
        with torch.no_grad():
            heldout_loss = completion_loss(policy, heldout.ids, heldout.mask, heldout.prompt_lengths)
            note = {"perplexity": math.exp(heldout_loss.item())}

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
    """`fit_reward` on the corpus's labelled reviews, under a name in `directory` that stands for all settings."""
    directory = directory / f"reward-{settings_hash('reward 1', config, corpus.fingerprint())}"

    def reviews() -> tuple[Reviews, Reviews]:
        return _encode(corpus.reward_reviews, tokenizer), _encode(corpus.heldout_reviews, tokenizer)

    return fit_reward(directory, config, reviews, len(tokenizer), console)


def fit_reward(
    directory: Path,
    config: RewardConfig,
    reviews: Callable[[], tuple[Reviews, Reviews]],
    vocab_size: int,
    console: Console,
) -> tuple[RewardModel, dict[str, float]]:
    """The reward model, from `directory` where a run left it, else trained now; arguments as `fit_policy`'s.

    Returns:
        The frozen model in eval mode, and `{"accuracy": ...}` on the texts to measure on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RewardModel(vocab_size, config)
    note = _load(directory, model, "reward model", console)
    if note is None:

        def loss_of(batch: Reviews) -> torch.Tensor:
            # Each review is blended with its neighbour in the batch, word by word, and so are their labels (mixup).
            # The policy asks this model what a slightly different embedding would be worth. A plain classifier has
            # no answer, for its P is flat wherever it is sure; this one rises evenly on the way from bad to good.
            # Under one setting the reward rose from 0.48 to 0.61 in 100 steps without mixup, to 0.81 in 60 with it.
            weight = torch.rand(len(batch.ids), generator=generator)
            embeds = model.embedding(batch.ids)
            embeds = torch.lerp(embeds.roll(1, dims=0), embeds, weight[:, None, None])
            target = torch.lerp(batch.sentiments.roll(1), batch.sentiments, weight)
            return F.binary_cross_entropy_with_logits(model.logits(embeds, batch.mask), target)

        generator = torch.Generator().manual_seed(config.seed)
        train, heldout = reviews()
        batches = _batches(train, config.steps, config.batch_size, config.seed)
        with _progress(console) as progress:
            bar = progress.add_task("Training the reward model", total=config.steps)
            for loss in _train(model, config.learning_rate, config.steps, (loss_of(batch) for batch in batches)):
                progress.update(bar, advance=1, description=f"Training the reward model, loss {loss:5.3f}")
        with torch.no_grad():
            right = (model(model.embedding(heldout.ids), heldout.mask) > 0.5) == heldout.sentiments.bool()
        note = {"accuracy": right.float().mean().item()}
        replace_directory(directory, lambda path: save_file(model.state_dict(), path / _WEIGHTS), note)
    return model.eval().requires_grad_(False), note


# ---------------------------------------------------------------------------------------------------------------- both


class Reviews(NamedTuple):
    """Encoded texts: `<bos> prompt completion <eos>` padded on the right, `prompt_lengths` counting `<bos>`."""

    ids: torch.Tensor
    mask: torch.Tensor
    prompt_lengths: torch.Tensor
    sentiments: torch.Tensor


def _encode(reviews: tuple[Review, ...], tokenizer: PreTrainedTokenizerFast) -> Reviews:
    ids, mask = encode_reviews(tokenizer, [review.text for review in reviews])
    return Reviews(
        ids,
        mask,
        prompt_lengths=torch.tensor([1 + len(review.prompt.split()) for review in reviews]),
        sentiments=torch.tensor([float(review.sentiment) for review in reviews]),
    )


def _batches(reviews: Reviews, steps: int, batch_size: int, seed: int) -> Iterator[Reviews]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(reviews.ids), (batch_size,), generator=generator)
        length = int(reviews.mask[rows].sum(dim=1).max())
        yield Reviews(
            reviews.ids[rows, :length],
            reviews.mask[rows, :length],
            reviews.prompt_lengths[rows],
            reviews.sentiments[rows],
        )


def _train(model: nn.Module, learning_rate: float, steps: int, losses: Iterator[torch.Tensor]) -> Iterator[float]:
    """Minimise each loss in turn: AdamW, ten steps of warm-up, cosine to zero. Yields the losses as numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
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
    return Progress(console=console, transient=True)
