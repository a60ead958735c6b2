"""What a policy's `generation_config` says of the tokens to draw: followed, left to the trainer, or refused by name.

Whatever would change the tokens that `generate()` draws falls into one of three groups:

* **Masks that are the same at every position** are followed, see `read_generation_config`.
* **Settings of sampling** (`temperature`, `top_p`, a repetition penalty and their like) are the trainer's to choose. In
  TRL, too, the trainer's settings override the model's. Many published models ship such settings for chatting. They are
  not followed, and one warning names them with their values.
* **Everything else**, such as forced tokens or a minimum length, says which completions are wanted at all. It is refused.

The second group is listed, and so are the settings that change no token. All others of the installed `GenerationConfig`
are in the third group. So a setting that a later release of transformers adds is refused too, never ignored in silence.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch
from transformers import GenerationConfig

from grade_kernels.training.allowed_tokens import AllowedTokens, TokenIds, listed

__all__ = ["FOLLOWED", "IRRELEVANT", "SAMPLING", "read_generation_config"]

logger = logging.getLogger(__name__)

FOLLOWED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
"""Settings that are followed as far as they forbid single tokens; the rest of what they say is refused."""

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
)  # fmt: skip
"""Settings that reshape a token's distribution, where training has its own: the model's distribution as it is."""

IRRELEVANT = (
    # The trainer has its own lengths, and asks for one completion at a time.
    "max_length", "max_new_tokens", "num_return_sequences",
    # It always samples. What only beams read means nothing without them, and `num_beams` itself is refused.
    "do_sample", "early_stopping", "length_penalty",
    # Ends and padding are read elsewhere, with the tokenizer's.
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    # Guesses of a helper change the speed, since the model itself accepts or rejects them.
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    # How it is computed, and what is returned beside the tokens.
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate",
    # A shift of all logits of a row, and the removal of NaN, which would end a run here.
    "renormalize_logits", "remove_invalid_values",
    "transformers_version",
)  # fmt: skip
"""Settings that change no token that is drawn."""

# Values that change nothing, beside None, the default of the class, and what is empty.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "token_healing": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
}


def read_generation_config(
    config: GenerationConfig | None, vocab_size: int, without_token: Sequence[int] = ()
) -> AllowedTokens:
    """What a policy may sample by its generation config and its tokenizer; says once what is masked and what is ignored.

    Masks that are the same at every position are followed: `suppress_tokens`, `bad_words_ids` and `sequence_bias` of -inf
    as far as they are about single tokens, and `begin_suppress_tokens`.

    Args:
        config: the policy's `generation_config`.
        vocab_size: how many tokens its head scores.
        without_token: ids that no token of its tokenizer has.

    Raises:
        ValueError: no token is left, or the config asks for something that training can not follow; the message names it.
    """
    suppressed = _in_range(getattr(config, "suppress_tokens", None), vocab_size)
    begin = _in_range(getattr(config, "begin_suppress_tokens", None), vocab_size)
    words, longer = _single_tokens(config)
    suppressed += _in_range(words, vocab_size)
    changing = _changing(config, vocab_size)
    refused = longer | {name: value for name, value in changing.items() if name not in SAMPLING}
    if refused:
        name = next(iter(refused))
        raise ValueError(
            f"the policy's generation_config asks for {_shown(refused)}, which training does not follow: completions are "
            f"drawn token by token from the model's own distribution, up to an end of sequence (to train without, set "
            f"model.generation_config.{name} = None)"
        )
    if without_token:
        logger.warning(
            "The policy's head scores %d tokens, of which its tokenizer has %d: the rows %s are never sampled",
            vocab_size, vocab_size - len(without_token), listed(without_token),
        )  # fmt: skip
    for ids, where in ((suppressed, ""), (begin, " at the beginning of a completion")):
        if ids:
            logger.warning("By the policy's generation_config, the tokens %s are never sampled%s", listed(ids), where)
    if changing:
        logger.warning(
            "Training samples from the model's own distribution, and ignores of the policy's generation_config: %s",
            _shown(changing),
        )
    return AllowedTokens.without(vocab_size, [*without_token, *suppressed] or None, begin or None)


def _changing(config: GenerationConfig | None, vocab_size: int) -> dict[str, object]:
    """The settings that change what `generate()` draws, without those that are followed."""
    # Early releases of transformers 5 have a top_k by default, which nobody asked for. So defaults are not named.
    defaults = vars(GenerationConfig())
    found = {}
    for name, default in defaults.items():
        value = getattr(config, name, None)
        if name.startswith("_") or name in IRRELEVANT or name in FOLLOWED or value is None or value == default:
            continue
        if not _changes_nothing(name, value, vocab_size):
            found[name] = value
    return found


def _changes_nothing(name: str, value: object, vocab_size: int) -> bool:
    if isinstance(value, Sized) and len(value) == 0:
        return True
    if name == "top_k":
        return isinstance(value, int) and not 0 < value < vocab_size
    return value in _NEUTRAL.get(name, ())


def _single_tokens(config: GenerationConfig | None) -> tuple[list[int], dict[str, object]]:
    """Tokens that `bad_words_ids` and `sequence_bias` forbid by themselves, and what else these say, by name."""
    ends = getattr(config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    more: dict[str, object] = {}
    words = [list(word) for word in getattr(config, "bad_words_ids", None) or []]
    longer = [word for word in words if len(word) > 1]
    if longer:
        more["bad_words_ids"] = longer
    # `generate()` lets an end of sequence through that is named as a bad word.
    single = [word[0] for word in words if len(word) == 1 and word[0] not in ends]
    biases: Any = getattr(config, "sequence_bias", None) or []
    pairs = [(tuple(ids), bias) for ids, bias in (biases.items() if isinstance(biases, Mapping) else biases)]
    others = [(ids, bias) for ids, bias in pairs if len(ids) != 1 or bias != -torch.inf]
    if others:
        more["sequence_bias"] = dict(others)
    return single + [ids[0] for ids, bias in pairs if len(ids) == 1 and bias == -torch.inf], more


def _in_range(ids: TokenIds | None, vocab_size: int) -> list[int]:
    """The ids that the head scores; a configuration's others, as `generate()` has it, mean nothing."""
    if ids is None:
        return []
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else [ids] if isinstance(ids, int) else ids
    return sorted({int(id) for id in ids if 0 <= id < vocab_size})


def _shown(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={_brief.repr(value)}" for name, value in settings.items())


_brief = reprlib.Repr()
_brief.maxlist = _brief.maxdict = _brief.maxtuple = 8
_brief.maxstring = _brief.maxother = 80
