"""Rollout functions: engines that draw the completions of `GRADETrainer`, with TRL's signature and names.

`rollout_func(prompts, trainer)` gets the prompts of a batch, one for each completion that is wanted, and returns a dict:

| key | what it holds |
|---|---|
| `prompt_ids` | for each completion the tokens of its prompt |
| `completion_ids` | its own tokens |
| `logprobs` | the log-probability of each, in the distribution that it was drawn from; None where nothing is corrected |
| `logprob_token_ids` | optional: where `logprobs` has several numbers for each token, the tokens that they are of |
| `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` | optional: what the engine drew with |
| any other | a list with one value for each completion, or one value for all: a column of the rewards |

What the trainer wants of it stands in `trainer.rollout_request`. Whatever comes back is checked before it is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from grade_kernels.training.completions import Completions, in_lists, row_of
from grade_kernels.training.library_arguments import check_rollout_signature
from grade_kernels.training.noise_plan import mixed_seed
from grade_kernels.training.prompt_tokens import Prompt
from grade_kernels.training.records import Ending, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grade_kernels.noise import GumbelNoise
    from grade_kernels.training.allowed_tokens import AllowedTokens
    from grade_kernels.training.trainer import GRADETrainer

__all__ = ["Answer", "RolloutFunc", "RolloutRequest", "check_rollout_func", "read_answer"]

RolloutFunc: TypeAlias = "Callable[[list[Prompt], GRADETrainer], Mapping[str, Any]]"
"""Draws a completion for each prompt."""

_REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
# How an engine drew, and the values with which it draws from the model's own distribution; the temperature is compared
# with the setting.
_UNTRUNCATED: dict[str, tuple[object, ...]] = {
    "top_k": (None, 0, -1),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "repetition_penalty": (None, 1.0),
}


@dataclass(frozen=True)
class RolloutRequest:
    """What the trainer wants a rollout function to draw.

    Attributes:
        prompt_ids: the tokens of each prompt, as they will be trained on: after the chat template, and cut where they were
            too long.
        seeds: one in [0, 2^31) for each completion. They depend on the run's seed, the step and the place of the completion
            alone, so that a resumed run asks for the same again.
        max_completion_length: completions have at most so many tokens.
        eos_token_id: tokens that end a completion, of which such a token is the last.
        pad_token_id: what may stand behind an end.
        temperature: what logits are divided by.
        allowed: tokens that may be drawn.
        step: optimizer steps so far.
        training: False in evaluation.
        model: the policy as it is now, out of the wrappers of distributed training.
    """

    prompt_ids: list[list[int]]
    seeds: list[int]
    max_completion_length: int
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    temperature: float
    allowed: AllowedTokens
    step: int
    training: bool
    model: PreTrainedModel

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        noise: GumbelNoise,
        ending: Ending,
        *,
        temperature: float,
        allowed: AllowedTokens,
        step: int,
        training: bool,
        model: PreTrainedModel,
    ) -> RolloutRequest:
        """The request for a batch, whose completions are told apart as their noise is."""
        rows = range(len(prompts)) if noise.row_ids is None else noise.row_ids.tolist()
        tokens, real = prompts.ids.cpu(), prompts.mask.cpu().bool()
        return cls(
            prompt_ids=[row[kept].tolist() for row, kept in zip(tokens, real, strict=True)],
            seeds=[mixed_seed(int(noise.seed), row) >> 33 for row in rows],
            max_completion_length=ending.max_new_tokens,
            eos_token_id=ending.eos,
            pad_token_id=ending.pad,
            temperature=temperature,
            allowed=allowed,
            step=step,
            training=training,
            model=model,
        )

    @property
    def ending(self) -> Ending:
        """How completions end."""
        return Ending(self.eos_token_id, self.pad_token_id, self.max_completion_length)

    @property
    def suppressed(self) -> tuple[list[int], list[int]]:
        """Tokens that are never drawn, and those that are not drawn as the first of a completion."""
        masks = (self.allowed.suppressed, self.allowed.begin_suppressed)
        always, first = ([] if mask is None else mask.nonzero()[:, 0].tolist() for mask in masks)
        return always, first


class Answer(NamedTuple):
    """What a rollout function drew, and the columns that it has for the rewards."""

    completions: Completions
    columns: dict[str, list[object]]


def check_rollout_func(
    rollout_func: object, estimator: str, temperature: float, corrects: bool, given: Sequence[str]
) -> None:
    """A function that can be asked, with settings that fit; TypeError or ValueError otherwise.

    Args:
        rollout_func: the function, or None for the trainer's own rollout.
        estimator: of the gradient.
        temperature: that completions are drawn at.
        corrects: whether completions are weighed by importance.
        given: settings of the correction that are not at their defaults.
    """
    if rollout_func is None:
        if temperature != 1.0:
            raise ValueError(
                f"temperature must be 1 without rollout_func, got {temperature}: the trainer draws completions from the "
                "model's own distribution, which is the one that is differentiated; tau is the temperature of its relaxation"
            )
        if given:
            raise ValueError(
                f"{given[0]} is for completions of a rollout_func, which was not given: the trainer's own need no correction"
            )
        return
    check_rollout_signature(rollout_func)
    if estimator == "soft":
        raise ValueError(
            "estimator must be ste, st or reinmax with rollout_func, got 'soft': the model reads mixtures of embeddings "
            "there, which no token of an engine stands for"
        )
    if temperature != 1.0 and not corrects:
        raise ValueError(
            f"temperature = {temperature} needs vllm_importance_sampling_correction: the policy that is trained has "
            "temperature 1"
        )


def read_answer(
    answer: object,
    request: RolloutRequest,
    vocab_size: int,
    *,
    needs_logprobs: bool,
    taken: Sequence[str],
) -> Answer:
    """What a rollout function returned, checked against what it was asked.

    Args:
        answer: its result.
        request: what it was asked.
        vocab_size: tokens that the policy has.
        needs_logprobs: whether completions are weighed by importance.
        taken: columns that rewards get already.

    Raises:
        TypeError: no dict, or values of a wrong type.
        ValueError: a key that is missing or taken, another number of completions, another prompt, tokens that the policy can
            not have drawn, log-probabilities that are none, or a distribution that was cut off.
    """
    if not isinstance(answer, Mapping):
        raise TypeError(f"rollout_func must return a dict, got {type(answer).__name__}")
    if missing := [key for key in _REQUIRED if key not in answer]:
        raise ValueError(f"rollout_func must return {', '.join(_REQUIRED)}, but {', '.join(missing)} is missing")
    own = {*_REQUIRED, "logprob_token_ids", "env_mask", "temperature", *_UNTRUNCATED}
    extra = {key: value for key, value in answer.items() if key not in own}
    _check_sampling(answer, request)
    _check_prompts(answer["prompt_ids"], request.prompt_ids)
    name = "completion_ids of rollout_func"
    logprobs = answer["logprobs"]
    if logprobs is None and needs_logprobs:
        raise ValueError(
            "rollout_func must return logprobs, got None (vllm_importance_sampling_correction = False trains without them)"
        )
    if logprobs is not None:
        logprobs = _of_sampled(logprobs, answer.get("logprob_token_ids"), answer["completion_ids"])
    completions = Completions.of(answer["completion_ids"], request.ending, logprobs, name=name)
    completions.check(len(request.prompt_ids), vocab_size, request.allowed, name)
    mask = answer.get("env_mask")
    rows = [] if mask is None else row_of("env_mask of rollout_func", mask, "masks")
    if not all(all(row_of(f"env_mask[{place}] of rollout_func", row, "0 and 1")) for place, row in enumerate(rows)):
        raise ValueError("env_mask of rollout_func must be all 1: a token that the model did not draw has no gradient")
    columns: dict[str, list[object]] = {}
    for key, value in extra.items():
        if key in taken:
            raise ValueError(f"rollout_func must not return {key!r}: rewards get something else by this name")
        listed = in_lists(value) if isinstance(value, (torch.Tensor, np.ndarray)) else value
        values = list(listed) if isinstance(listed, (list, tuple)) else [listed] * len(completions)
        if len(values) != len(completions):
            raise ValueError(
                f"{key!r} of rollout_func must have a value for each of {len(completions)} completions, got {len(values)}"
            )
        columns[str(key)] = values
    return Answer(completions, columns)


def _check_sampling(answer: Mapping[str, Any], request: RolloutRequest) -> None:
    """The engine drew from the distribution that it was asked for, as far as it says so."""
    told = in_lists(answer.get("temperature", request.temperature))
    if any(value != request.temperature for value in (told if isinstance(told, (list, tuple)) else [told])):
        raise ValueError(
            f"rollout_func drew at temperature {told}, but GRADEConfig(temperature={request.temperature}) was asked for"
        )
    for key, neutral in _UNTRUNCATED.items():
        told = in_lists(answer.get(key))
        for value in told if isinstance(told, (list, tuple)) else [told]:
            if value not in neutral:
                raise ValueError(
                    f"rollout_func drew with {key} = {value}, which must be {neutral[-1]}: what it cuts off or favours, no "
                    "weight gives back"
                )


def _check_prompts(given: Any, wanted: list[list[int]]) -> None:
    """The completions are those of the prompts that were asked for."""
    rows = given.tolist() if isinstance(given, torch.Tensor) else given
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(f"prompt_ids of rollout_func must be a list of token ids for each, got {type(given).__name__}")
    if len(rows) != len(wanted):
        raise ValueError(
            f"rollout_func must return one completion for each of {len(wanted)} prompts, got {len(rows)} (a prompt comes "
            "num_generations times)"
        )
    for place, (row, own) in enumerate(zip(rows, wanted, strict=True)):
        listed = row_of(f"prompt_ids[{place}] of rollout_func", row, "token ids")
        if listed != own:
            at = next(
                (i for i, (a, b) in enumerate(zip(listed, own, strict=False)) if a != b), min(len(listed), len(own))
            )
            raise ValueError(
                f"prompt_ids[{place}] of rollout_func must be the prompt that was asked for, of {len(own)} tokens, but has "
                f"{len(listed)}, and differs from token {at} on: {listed[at : at + 4]}, not {own[at : at + 4]} (its tokens "
                "are in trainer.rollout_request.prompt_ids)"
            )


def _of_sampled(logprobs: Any, token_ids: Any, completion_ids: Any) -> Any:
    """Log-probabilities of the drawn tokens alone, where the engine tells those of several tokens at each place."""
    if isinstance(logprobs, torch.Tensor) and logprobs.dim() == 3:
        logprobs = logprobs.tolist()
    if isinstance(logprobs, torch.Tensor) or not isinstance(logprobs, Sequence) or isinstance(logprobs, str):
        return logprobs
    found = []
    for place, row in enumerate(logprobs):
        values = row_of(f"logprobs[{place}] of rollout_func", row, "numbers")
        if not any(isinstance(value, (list, tuple)) for value in values):
            found.append(values)
            continue
        picked = []
        for time, several in enumerate(values):
            if not isinstance(several, (list, tuple)):
                raise TypeError(
                    f"logprobs[{place}][{time}] of rollout_func must be a list as the others, got {several!r}"
                )
            if len(several) == 1:
                picked.append(several[0])
                continue
            if token_ids is None:
                raise ValueError(
                    f"logprobs[{place}][{time}] of rollout_func has {len(several)} numbers: logprob_token_ids must say of "
                    "which tokens"
                )
            try:
                drawn, named = int(completion_ids[place][time]), list(token_ids[place][time])
            except (IndexError, TypeError) as error:
                raise ValueError(
                    f"completion_ids and logprob_token_ids of rollout_func must have tokens at [{place}][{time}], where "
                    "logprobs have numbers"
                ) from error
            if len(named) != len(several) or drawn not in named:
                raise ValueError(
                    f"logprob_token_ids[{place}][{time}] of rollout_func must name {len(several)} tokens, the drawn one "
                    f"({drawn}) among them, got {named}"
                )
            picked.append(several[named.index(drawn)])
        found.append(picked)
    return found
