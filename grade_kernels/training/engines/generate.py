"""Rollout functions on the policy itself: transformers' `generate`, and its continuous batching."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from grade_kernels.training.model import evaluating, is_sharded
from grade_kernels.training.noise_plan import mixed_seed
from grade_kernels.training.prompt_tokens import Prompt
from grade_kernels.training.records import Prompts
from grade_kernels.training.rollout_func import RolloutRequest

if TYPE_CHECKING:
    from grade_kernels.training.trainer import GRADETrainer

__all__ = ["continuous_batching_rollout", "generate_rollout"]


def generate_rollout(prompts: list[Prompt], trainer: GRADETrainer) -> dict[str, Any]:
    """Completions by `model.generate`, all prompts of a batch at once, padded on the left.

    The random numbers are torch's own, of a seed that is made of the request's. The generators are left as they were.

    Raises:
        ValueError: a model whose layers are spread over processes, which `generate` can not run.
    """
    request = trainer.rollout_request
    _check_whole(request)
    model: Any = request.model
    batch = Prompts.of(request.prompt_ids, request.pad_token_id)
    recorder = _Recorder(request.temperature)
    with _drawing(request) as config:
        sequences = model.generate(
            input_ids=batch.ids.to(model.device),
            attention_mask=batch.mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([recorder]),
        )
    recorder.note(sequences)
    drawn = sequences[:, batch.ids.shape[1] :].tolist()
    # Padding stands behind an end alone. The token of padding may also have been drawn as the last one of a completion.
    lengths = [
        next((time + 1 for time, token in enumerate(row) if token in request.eos_token_id), None) for row in drawn
    ]
    told = torch.stack(recorder.told, dim=1).tolist()
    return {
        "prompt_ids": request.prompt_ids,
        "completion_ids": [row[:length] for row, length in zip(drawn, lengths, strict=True)],
        "logprobs": [row[:length] for row, length in zip(told, lengths, strict=True)],
        "temperature": request.temperature,
    }


def continuous_batching_rollout(prompts: list[Prompt], trainer: GRADETrainer, **options: Any) -> dict[str, Any]:
    """Completions by `model.generate_batch`, which takes a new sequence in as soon as one has ended.

    Its seed is one for the whole batch. Which random number a token gets depends on how the sequences are put together, so
    that a resumed run repeats it only under the same memory and settings.

    Args:
        prompts: of the batch.
        trainer: which asks.
        options: of `ContinuousBatchingConfig`, such as `max_memory_percent`; `functools.partial` gives them.

    Raises:
        ValueError: a model whose layers are spread over processes.
        RuntimeError: the engine could not complete a prompt.
    """
    from transformers import ContinuousBatchingConfig

    request = trainer.rollout_request
    _check_whole(request)
    model: Any = request.model
    # A processor that the engine does not know is an error, and is not left out.
    batching = ContinuousBatchingConfig(
        **({"drop_unsupported_processors": False} | options), return_logprobs=True, seed=_seed_of(request)
    )
    with _drawing(request) as config:
        config.temperature = request.temperature
        found = model.generate_batch(
            inputs=request.prompt_ids, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
    # Requests are named in the order in which they were made, and finish in any other.
    outputs = [found[name] for name in sorted(found, key=_number)]
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"continuous batching could not complete a prompt: {output.error}")
    return {
        "prompt_ids": [list(output.prompt_ids) for output in outputs],
        "completion_ids": [list(output.generated_tokens) for output in outputs],
        "logprobs": [list(output.logprobs) for output in outputs],
        "temperature": request.temperature,
    }


class _Recorder(LogitsProcessor):
    """Divides logits by the temperature, and notes the log-probability of each token that was then drawn.

    It runs behind the processors of suppressed tokens. There are none of sampling, so what it sees is the distribution.
    Asking `generate` for its scores would keep those of the whole vocabulary for every step.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.told: list[torch.Tensor] = []  # [B] for each step
        self._last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.note(input_ids)
        scores = scores / self.temperature
        self._last = scores.float().log_softmax(dim=-1) if scores.dtype != torch.float64 else scores.log_softmax(dim=-1)
        return scores

    def note(self, ids: torch.Tensor) -> None:
        """The last of these tokens were drawn from the last distribution."""
        if self._last is not None:
            self.told.append(self._last.gather(1, ids[:, -1:])[:, 0])
        self._last = None


@contextmanager
def _drawing(request: RolloutRequest) -> Iterator[GenerationConfig]:
    """The settings of `generate` for a request, the policy ready to be asked, and generators left as they were."""
    model: Any = request.model
    always, first = request.suppressed
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        max_new_tokens=request.max_completion_length, eos_token_id=list(request.eos_token_id) or None,
        pad_token_id=request.pad_token_id, suppress_tokens=always or None, begin_suppress_tokens=first or None,
    )  # fmt: skip
    own, devices = model.generation_config, [model.device] if model.device.type == "cuda" else []
    try:
        # `generate` takes what a config leaves open from the model's own, which may cut the distribution off.
        model.generation_config = GenerationConfig()
        with torch.random.fork_rng(devices), evaluating(model), torch.no_grad():
            torch.manual_seed(_seed_of(request))
            yield config
    finally:
        model.generation_config = own


def _seed_of(request: RolloutRequest) -> int:
    """One seed of all seeds of a batch, in [0, 2^31)."""
    return functools.reduce(lambda seed, one: mixed_seed(seed, one) >> 33, request.seeds, request.step)


def _check_whole(request: RolloutRequest) -> None:
    if is_sharded(request.model):
        raise ValueError("generate needs a whole model on each process, but the policy's layers are spread over them")


def _number(name: str) -> int:
    """The number at the end of a request's name."""
    return int(name.rsplit("_", 1)[-1])
