"""What a policy's generation config says of the tokens to draw: followed, left to the trainer, or refused by name."""

from __future__ import annotations

import inspect
import logging
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import transformers as tf

from grade_kernels.training import GRADETrainer
from grade_kernels.training.allowed_tokens import AllowedTokens
from grade_kernels.training.generation_config import FOLLOWED, IRRELEVANT, SAMPLING, read_generation_config
from tests.support.trainers import build
from tests.support.training_models import VOCAB, BagReward, policy


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [3, 9, 12]},
        {"begin_suppress_tokens": [5, 6, 30]},
        {"suppress_tokens": [3], "begin_suppress_tokens": [5]},
        {"bad_words_ids": [[8], [2], [11]]},
        {"sequence_bias": {(7,): float("-inf"), (9,): float("-inf")}},
        {"sequence_bias": [[[7], float("-inf")]]},
    ],
)
def test_static_masks_are_those_of_generate(settings):
    """At every position the tokens of probability 0 are those of `generate()`."""
    model = policy("gpt2", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    allowed = read_generation_config(model.generation_config, VOCAB)
    ids = torch.tensor([[4, 5, 6]])
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=4, min_new_tokens=0,
        output_scores=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    for place, scores in enumerate(out.scores):
        bias = allowed.bias(model.lm_head.weight, None, first=place == 0)
        ours = torch.zeros(VOCAB, dtype=torch.bool) if bias is None else bias == -torch.inf
        assert torch.equal(ours, scores[0] == -torch.inf)


OVERRIDDEN = {
    "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "top_h": 0.4, "typical_p": 0.9,
    "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "repetition_penalty": 1.1,
}  # fmt: skip
REFUSED = {
    "encoder_repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 2, "min_length": 5,
    "min_new_tokens": 4, "forced_bos_token_id": 1, "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (5, 1.1), "guidance_scale": 1.5, "watermarking_config": {"bias": 2.5},
    "token_healing": True, "stop_strings": ["."], "max_time": 3.0, "num_beams": 4, "num_beam_groups": 2,
    "diversity_penalty": 0.5, "penalty_alpha": 0.6, "dola_layers": "high", "constraints": ["x"], "force_words_ids": [[3]],
}  # fmt: skip
IN_PART = {
    "bad_words_ids": ([[5, 6], [7]], "[[5, 6]]"),
    "sequence_bias": ({(5,): 1.5, (6,): -torch.inf}, "{(5,): 1.5}"),
}


def config_of(**settings):
    config = tf.GenerationConfig(do_sample=True)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_training_chooses_itself_is_named_with_its_value(caplog, name):
    with caplog.at_level(logging.WARNING):
        read_generation_config(config_of(**{name: OVERRIDDEN[name]}), VOCAB)
    (record,) = caplog.records
    assert record.getMessage().endswith(f"ignores of the policy's generation_config: {name}={OVERRIDDEN[name]!r}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_training_can_not_follow_is_refused_by_name(name):
    wanted = re.escape(f"generation_config asks for {name}={REFUSED[name]!r}, which training does not follow")
    with pytest.raises(ValueError, match=wanted + rf".*set model\.generation_config\.{name} = None\)"):
        read_generation_config(config_of(temperature=0.5, **{name: REFUSED[name]}), VOCAB)


@pytest.mark.parametrize("name", IN_PART)
def test_what_is_followed_in_part_is_refused_for_the_rest(name):
    value, said = IN_PART[name]
    with pytest.raises(ValueError, match=re.escape(f"asks for {name}={said}, which training does not follow")):
        read_generation_config(config_of(**{name: value}), VOCAB)


def test_every_setting_of_the_installed_transformers_has_its_place():
    """Each is followed, overridden, without effect, or refused; and a setting that nobody has heard of is refused."""
    fields = {name for name in vars(tf.GenerationConfig()) if not name.startswith("_")}
    places = [*FOLLOWED, *SAMPLING, *IRRELEVANT, *REFUSED]
    assert len(places) == len(set(places))
    assert OVERRIDDEN.keys() == set(SAMPLING)
    assert fields <= set(places), "where does a setting of this release belong?"


def test_a_setting_of_a_later_release_is_refused(monkeypatch):
    init = tf.GenerationConfig.__init__

    def later(self, **kwargs):
        self.avoid_adverbs = kwargs.pop("avoid_adverbs", None)
        init(self, **kwargs)

    monkeypatch.setattr(tf.GenerationConfig, "__init__", later)
    with pytest.raises(ValueError, match="asks for avoid_adverbs=True, which training does not follow"):
        read_generation_config(tf.GenerationConfig(avoid_adverbs=True), VOCAB)


def test_nothing_that_transformers_reads_to_change_tokens_counts_as_irrelevant():
    """By the source of what builds the processors and the criteria of `generate()`."""
    mixin = tf.GenerationMixin
    source = inspect.getsource(mixin._get_logits_processor) + inspect.getsource(mixin._get_stopping_criteria)
    read = set(re.findall(r"generation_config\.([a-z]\w*)", source))
    assert {"temperature", "suppress_tokens", "stop_strings", "min_new_tokens"} <= read, "or the source has moved"
    harmless = {
        "do_sample",  # training always samples
        "max_length",  # it has a limit of its own
        "num_return_sequences", "use_cache", "renormalize_logits", "remove_invalid_values",  # see IRRELEVANT
        "is_assistant", "assistant_confidence_threshold",  # of a helper, whose guesses the model judges
    }  # fmt: skip
    assert not (read & set(IRRELEVANT)) - harmless


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0},
        {"top_k": VOCAB, "num_beams": 1, "guidance_scale": 1, "no_repeat_ngram_size": 0, "min_length": 0},
        {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "bad_words_ids": [], "suppress_tokens": [], "stop_strings": []},
        {"max_new_tokens": 7, "max_length": 20, "num_return_sequences": 3, "renormalize_logits": True},
        {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0, "do_sample": False, "use_cache": False},
        {"chat_format": "chatml", "max_window_size": 6144},
        {"suppress_tokens": [VOCAB, 5000], "token_healing": False, "sequence_bias": {}},
    ],
)
def test_settings_that_change_nothing_are_not_named(caplog, settings):
    with caplog.at_level(logging.WARNING):
        allowed = read_generation_config(config_of(**settings), VOCAB)
    assert caplog.records == []
    assert allowed == AllowedTokens()


def test_a_model_without_a_generation_config_masks_nothing():
    assert read_generation_config(None, VOCAB) == AllowedTokens()


def test_the_trainer_follows_the_generation_config_and_says_so_once(tmp_path, caplog, monkeypatch):
    """Suppressed tokens are never drawn, begin-suppressed ones not first; temperature and the like are named once."""
    seen = []
    note = GRADETrainer._note_training
    monkeypatch.setattr(
        GRADETrainer, "_note_training", lambda self, inputs, out: seen.append(out) or note(self, inputs, out)
    )
    model = policy("gpt2", dtype=torch.float32)
    config = model.generation_config
    config.suppress_tokens, config.begin_suppress_tokens, config.bad_words_ids = [3, 4, 5], [7, 8, 9], [[10]]
    config.temperature, config.top_p, config.do_sample = 0.6, 0.9, True
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, model=model, reward=BagReward(dtype=torch.float32), max_steps=12)
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name.endswith("generation_config")]
    assert said == [
        "By the policy's generation_config, the tokens 3 to 5, 10 are never sampled",
        "By the policy's generation_config, the tokens 7 to 9 are never sampled at the beginning of a completion",
        "Training samples from the model's own distribution, and ignores of the policy's generation_config: "
        "temperature=0.6, top_p=0.9",
    ]
    ids = torch.cat([out.completion_ids[out.completion_mask.bool()] for out in seen])
    assert not torch.isin(ids, torch.tensor([3, 4, 5, 10])).any()
    first = torch.cat([out.completion_ids[:, 0] for out in seen])
    assert not torch.isin(first, torch.tensor([3, 4, 5, 7, 8, 9, 10])).any()
    assert torch.isin(ids, torch.tensor([7, 8, 9])).any()


def test_the_trainer_refuses_what_it_can_not_follow(tmp_path):
    model = policy("gpt2", dtype=torch.float32)
    model.generation_config.min_new_tokens = 4
    with pytest.raises(ValueError, match="asks for min_new_tokens=4, which training does not follow"):
        build(tmp_path, model=model)
