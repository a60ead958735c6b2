"""Small forward passes that tell whether the parts of a model are what they seem."""

from __future__ import annotations

from typing import Any

import torch

from grade_kernels.training.model.capture import Capture
from grade_kernels.training.model.forward import (
    cache_arguments,
    cache_of,
    evaluating,
    last_hidden_state,
    position_arguments,
    position_ids,
)
from grade_kernels.training.model.parts import LanguageModel

__all__ = ["check_training_mode", "probe"]

_ROUNDING = 0.05  # a relative difference; that of two orders of summation in bfloat16 stays far below


@torch.no_grad()
def probe(parts: LanguageModel, name: str) -> bool:
    """Compare the model's own logits with those of its parts on a few tokens; ValueError where they differ.

    Returns:
        Whether the model reads rows that are padded on the left.
    """
    table = parts.table
    if _is_abstract(table):
        return True  # there is nothing to run; a model that is sharded was checked before
    if table.shape[0] != parts.vocab_size:
        raise ValueError(
            f"{name}: the input embedding has {table.shape[0]} tokens, but the LM head {parts.vocab_size}; "
            "a sample of the head must be an input"
        )
    ids = _some_ids(parts)
    with evaluating(parts.model), torch.random.fork_rng(devices=[]):
        embedded = parts.embedding(ids)
        scaled = table[ids] * parts.embed_scale
        if not torch.allclose(embedded, scaled, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"{name}: its input embedding of a token is not a multiple of the table's row that this package can "
                "read, so a relaxed sample `y @ table` would not be an input of the model"
            )
        with Capture(parts, lambda embedded: embedded) as seen:
            from_ids = _run(name, parts.model, input_ids=ids, use_cache=False)
        logits = getattr(from_ids, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.shape != (1, 4, parts.vocab_size):
            raise ValueError(f"{name}: its forward must return one tensor of logits [batch, time, vocabulary]")
        if not hasattr(seen, "embedded") or not hasattr(seen, "hidden"):
            raise ValueError(
                f"{name}: its forward does not run its input embedding and its {type(parts.backbone).__name__}, so "
                "their samples can not be replayed"
            )
        # Gemma 4 looks a token up a second time, by finding the row of the table that its embedding equals. A mixture
        # of embeddings equals no row.
        _run(name, parts.model, inputs_embeds=(embedded + embedded.roll(1, dims=1)) / 2, use_cache=False)
        from_embeds = _run(name, parts.model, inputs_embeds=embedded, use_cache=False).logits
        _close(
            from_embeds, logits, f"{name}: it computes other logits from embeddings than from ids, so the embedding of "
            "a relaxed sample does not carry all of the token's influence"
        )  # fmt: skip
        states = last_hidden_state(_run(name, parts.backbone, input_ids=ids, use_cache=False))
        head = parts.unmasked_head(states)
        if head.hidden.shape[-1] != head.weight.shape[1]:
            raise ValueError(
                f"{name}: its LM head reads {head.weight.shape[1]} features, but its {type(parts.backbone).__name__} "
                f"returns {head.hidden.shape[-1]}"
            )
        ours = head.hidden @ head.weight.T
        ours = ours if head.bias is None else ours + head.bias
        ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)
        _close(ours, logits, f"{name}: its logits are not `softcap(scale * hidden @ weight.T + bias)` of its LM head")
        last = states[:, -1:]
        if _difference(_decoded(parts, name, ids, padding=2), last) < _ROUNDING:
            return True
        # Mamba takes the mask of all tokens for that of the one token which is new.
        _close(
            _decoded(parts, name, ids, padding=0), last, f"{name}: its {type(parts.backbone).__name__} returns other "
            "hidden states step by step than of all tokens at once, so what a rollout reads is not what is replayed"
        )  # fmt: skip
        return False


def check_training_mode(parts: LanguageModel) -> None:
    """The same hidden states in training mode as in the eval mode of the rollout, or ValueError."""
    expected, *trained = (_some_states(parts, training) for training in (False, True, True))
    if expected is None:
        return
    difference = max(_difference(states, expected) for states in trained if states is not None)
    if not difference < _ROUNDING:
        raise ValueError(
            f"model ({type(parts.model).__name__}) computes something else in training than when it completes prompts, "
            f"although dropout is off in its modules (relative difference {difference:.3g}): its config has rates to set "
            "to 0, or it is random by design"
        )


@torch.no_grad()
def _some_states(parts: LanguageModel, training: bool = False) -> torch.Tensor | None:
    """Hidden states of a few tokens in eval or training mode; None where the weights are not here."""
    if _is_abstract(parts.table):
        return None
    with evaluating(parts.model), torch.random.fork_rng(devices=[]):
        parts.model.train(training)
        return last_hidden_state(parts.backbone(input_ids=_some_ids(parts), use_cache=False))


def _decoded(parts: LanguageModel, name: str, ids: torch.Tensor, padding: int) -> torch.Tensor:
    """Hidden states `[1, 1, H]` of the last token as a rollout reads it: behind padding and a key-value cache."""
    # Two steps follow the prompt. The first one may be right and leave a cache that is wrong.
    padded = torch.cat([ids[:, :padding], ids], dim=1)
    mask = (torch.arange(padded.shape[1], device=ids.device) >= padding).long()[None]
    positions, cache, start = position_ids(mask), None, 0
    for end in range(padded.shape[1] - 2, padded.shape[1] + 1):
        output = _run(
            name, parts.backbone, input_ids=padded[:, start:end], attention_mask=mask[:, :end],
            **cache_arguments(parts.backbone, cache), **position_arguments(parts.backbone, positions[:, start:end]),
        )  # fmt: skip
        cache, start = cache_of(output), end
        if cache is None:
            raise ValueError(f"{name} decodes without a key-value cache, which the rollout needs")
    return last_hidden_state(output)[:, -1:]


def _is_abstract(table: torch.Tensor) -> bool:
    """Whether a table's values are not here: on no device, or in parts on several."""
    return table.device.type == "meta" or type(table.data).__name__ == "DTensor"


def _some_ids(parts: LanguageModel) -> torch.Tensor:
    """Four tokens `[1, 4]`: a stride through the vocabulary, for neighbours at its start are often special tokens."""
    return (torch.arange(1, 5, device=parts.table.device) * (parts.vocab_size // 5))[None]


def _run(name: str, module: Any, **arguments: Any) -> Any:
    """A forward pass whose failure names the model and what it was run on."""
    try:
        return module(**arguments)
    except Exception as error:
        given = " and ".join(key for key, value in arguments.items() if not isinstance(value, bool | None))
        raise ValueError(f"{name} can not be run from {given}: {type(error).__name__}: {error}") from error


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.float(), theirs.float()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()


def _close(ours: torch.Tensor, theirs: torch.Tensor, message: str) -> None:
    difference = _difference(ours, theirs)
    if not difference < _ROUNDING:  # NaN is refused as well
        raise ValueError(f"{message} (relative difference {difference:.3g})")
