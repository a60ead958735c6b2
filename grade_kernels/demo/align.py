"""GRADE-STE, plainly: sample a review with a graph, let the reward model read it, and backpropagate.

Every new token is `one_hot(argmax(logits + Gumbel noise))`, and its embedding, for the policy's next step and for the
reward model alike, carries the straight-through gradient of `softmax((logits + noise) / tau)`. So the gradient of the
reward reaches the policy along two ways: through the token the reward model reads, and through everything the policy
wrote after it. There is no advantage, no baseline and no log-probability in this file.

Nothing here draws from a global random generator. The prompts of a step and the noise of a token are pure functions of
(seed, step, row, position), so the state of a run is its weights, its optimizer and its step, and a resumed run is
bitwise the uninterrupted one.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GPT2LMHeadModel

import grade_kernels as gk
from grade_kernels.demo.cache import replace_file
from grade_kernels.demo.config import AlignConfig
from grade_kernels.demo.models import RewardModel, position_ids

__all__ = ["DemoInterrupted", "Record", "Rollout", "align", "kl_to", "prompt_rows", "rollout", "trim"]


class DemoInterrupted(KeyboardInterrupt):
    """A signal stopped the alignment after a whole step, and a checkpoint of that step is on disk."""

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"Stopped by {signal.Signals(signum).name} after step {step}, checkpoint in {checkpoint}")
        self.signum, self.step, self.checkpoint = signum, step, checkpoint


@dataclass(frozen=True)
class Record:
    """What one step of alignment looked like. `kl` is in nats per completion, `tokens` the mean completion length."""

    step: int
    reward: float
    kl: float
    grad_norm: float
    tokens: float


# ---------------------------------------------------------------------------------------------------------- one sample


@dataclass(frozen=True)
class Rollout:
    """Sampled completions, `[rows, time]` each.

    Attributes:
        ids: token ids; what follows an end of sequence is noise that `mask` hides.
        mask: 1 up to and including the end of sequence.
        logits: the policy's logits that each token was drawn from, `[rows, time, vocabulary]`.
        reward_embeds: the straight-through embeddings of the tokens for the reward model, `[rows, time, width]`.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor
    reward_embeds: torch.Tensor


def rollout(
    policy: GPT2LMHeadModel,
    reward_table: torch.Tensor,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    *,
    tau: float,
    max_new_tokens: int,
    seed: int,
    sequence_ids: torch.Tensor,
) -> Rollout:
    """Sample completions step by step with a key-value cache; under grad, the whole decode is one graph.

    Args:
        policy: a causal language model that takes `inputs_embeds`.
        reward_table: the reward model's embeddings, `[vocabulary, width]`.
        prompt_ids: left-padded prompts, `[rows, prompt]`.
        prompt_mask: their mask.
        tau: temperature of the relaxation; the sample itself is always one of the untempered distribution.
        max_new_tokens: cut completions here.
        seed: of the Gumbel noise.
        sequence_ids: int64 `[rows]`, who each row is. Together with the position it identifies the noise of a token, so
            a row's sample does not depend on the batch around it.
    """
    policy_table = policy.get_input_embeddings().weight
    assert isinstance(policy_table, torch.Tensor)
    eos = policy.config.eos_token_id
    rows = prompt_ids.shape[0]
    # A row that ended keeps decoding, unread; the mask only has to be right up to there.
    mask, positions = prompt_mask, position_ids(prompt_mask)
    inputs = policy_table[prompt_ids]
    alive = torch.ones(rows, dtype=torch.bool)
    cache = None
    ids, alives, logits, embeds = [], [], [], []
    for time in range(max_new_tokens):
        out = policy(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
        noise = gk.GumbelNoise(seed, row_ids=sequence_ids * max_new_tokens + time)
        (policy_embed, reward_embed), token, _ = gk.gumbel_ste_embedding(
            logits[-1], (policy_table, reward_table), tau, noise=noise
        )
        ids.append(token)
        embeds.append(reward_embed)
        alives.append(alive)
        alive = alive & (token != eos)
        if not alive.any():
            break
        inputs = policy_embed[:, None]
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        positions = positions[:, -1:] + 1
    return Rollout(torch.stack(ids, 1), torch.stack(alives, 1).long(), torch.stack(logits, 1), torch.stack(embeds, 1))


def reward_of(model: RewardModel, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, sample: Rollout) -> torch.Tensor:
    """P(positive) of prompt and completion, `[rows]`, differentiable with respect to the sample."""
    embeds = torch.cat([model.embedding(prompt_ids), sample.reward_embeds], dim=1)
    return model(embeds, torch.cat([prompt_mask, sample.mask], dim=1))


@torch.no_grad()
def log_probs_under(
    model: GPT2LMHeadModel, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, sample: Rollout
) -> torch.Tensor:
    """Another policy's log-probabilities at each place of the sample, `[rows, time, vocabulary]`, in one pass."""
    ids = torch.cat([prompt_ids, sample.ids], dim=1)
    mask = torch.cat([prompt_mask, sample.mask], dim=1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
    return logits[:, prompt_ids.shape[1] - 1 : -1].log_softmax(dim=-1)


def kl_to(reference_log_probs: torch.Tensor, sample: Rollout) -> torch.Tensor:
    """KL(policy || reference) in nats per completion, `[rows]`.

    Exact in each token's distribution (a sum over the vocabulary, not an estimate from the sampled token) and summed
    over the completion's tokens.
    """
    log_probs = sample.logits.log_softmax(dim=-1)
    per_token = (log_probs.exp() * (log_probs - reference_log_probs)).sum(dim=-1)
    return (per_token * sample.mask).sum(dim=1)


# ------------------------------------------------------------------------------------------------------------ the loop


def align(
    policy: GPT2LMHeadModel,
    reference: GPT2LMHeadModel,
    reward_model: RewardModel,
    prompts: tuple[torch.Tensor, torch.Tensor],
    config: AlignConfig,
    *,
    seed: int,
    checkpoint: Path,
    identity: str,
    console: Console,
    on_step: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Raise the reward of `policy`, in place.

    Continues from `checkpoint` where one with the same `identity` is there, and writes it every few steps, at the end,
    and on SIGINT and SIGTERM.

    Returns:
        A record of every step since the very first.

    Raises:
        DemoInterrupted: a signal came; the step it came in was finished and saved.
        ValueError: the checkpoint is already past `config.steps`.
    """
    policy.eval()  # no dropout: the policy that is improved is the policy that is used
    # The scale of the gradient changes within tens of steps, so its second moment gets a memory of 50, not 1000.
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))
    records = _restore(checkpoint, identity, policy, optimizer, console)
    if len(records) > config.steps:
        raise ValueError(
            f"{checkpoint} holds {len(records)} steps of alignment, more than the {config.steps} asked for; "
            "ask for more steps, or start over with --fresh"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _Signals() as signals, Progress(*columns, console=console) as progress:
        bar = progress.add_task("Aligning", total=config.steps, completed=len(records))
        for step in range(len(records), config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
            record = _align_step(policy, reference, reward_model, prompts, config, optimizer, seed, step)
            records.append(record)
            progress.update(
                bar,
                advance=1,
                description=f"Aligning: reward {record.reward:.3f}, KL {record.kl:5.2f}, "
                f"gradient norm {record.grad_norm:6.3f}",
            )
            if on_step is not None:
                on_step(record)
            if signals.received or (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                _save(checkpoint, identity, policy, optimizer, records)
            if signals.received and step + 1 < config.steps:
                raise DemoInterrupted(signals.received, step + 1, checkpoint)
    return records


def _align_step(
    policy: GPT2LMHeadModel,
    reference: GPT2LMHeadModel,
    reward_model: RewardModel,
    prompts: tuple[torch.Tensor, torch.Tensor],
    config: AlignConfig,
    optimizer: torch.optim.Optimizer,
    seed: int,
    step: int,
) -> Record:
    """Sample, judge, backpropagate, update."""
    sequence_ids = torch.arange(config.batch_size) + step * config.batch_size
    rows = prompt_rows(len(prompts[0]), sequence_ids, seed)
    prompt_ids, prompt_mask = trim(prompts[0][rows], prompts[1][rows])
    sample = rollout(
        policy,
        reward_model.embedding.weight,
        prompt_ids,
        prompt_mask,
        tau=config.tau,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
        sequence_ids=sequence_ids,
    )
    reward = reward_of(reward_model, prompt_ids, prompt_mask, sample).mean()
    kl = kl_to(log_probs_under(reference, prompt_ids, prompt_mask, sample), sample).mean()
    loss = -reward + config.beta * kl
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm, error_if_nonfinite=True)
    optimizer.step()
    return Record(step + 1, reward.item(), kl.item(), grad_norm.item(), sample.mask.sum(1).float().mean().item())


def prompt_rows(count: int, sequence_ids: torch.Tensor, seed: int) -> torch.Tensor:
    """Which prompt each sequence of the run gets: one shuffled pass over all prompts after the other."""
    rows = torch.empty_like(sequence_ids)
    for epoch in (sequence_ids // count).unique().tolist():
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen = sequence_ids // count == epoch
        rows[chosen] = order[sequence_ids[chosen] % count]
    return rows


def trim(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut left padding that no row of the batch needs."""
    start = ids.shape[1] - int(mask.sum(dim=1).max())
    return ids[:, start:], mask[:, start:]


# ---------------------------------------------------------------------------------------- stopping and going on again


class _Signals:
    """Within it, the first SIGINT or SIGTERM only sets `received`, so that a step is never left half done.

    A second one raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, it does
    nothing.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> _Signals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signum


def _save(
    path: Path, identity: str, policy: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, records: list[Record]
) -> None:
    state = {
        "identity": identity,
        "policy": policy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "records": [asdict(record) for record in records],
    }
    replace_file(path, lambda temporary: torch.save(state, temporary))


def _restore(
    path: Path, identity: str, policy: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, console: Console
) -> list[Record]:
    """Load a checkpoint into policy and optimizer and return its records; none where there is nothing to load."""
    if not path.exists():
        return []
    start = copy.deepcopy(policy.state_dict())
    try:
        state = torch.load(path, weights_only=True)
        if state["identity"] != identity:
            raise ValueError("it belongs to other settings")
        records = [Record(**record) for record in state["records"]]
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # a damaged pickle raises nearly anything
        policy.load_state_dict(start)
        optimizer.state.clear()
        console.print(f"[yellow]{path} can not be used ({error}); starting from the first step[/yellow]")
        return []
    return records
