"""Completions as text, whatever a tokenizer raises."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset

from grade_kernels.training import decoding
from grade_kernels.training.decoding import completion_texts
from tests.support.trainers import build
from tests.support.training_models import BagReward, SlowTokenizer, padded_policy, word_tokenizer


@pytest.fixture(autouse=True)
def unsaid():
    decoding._warned.clear()


def texts(tokenizer, rows):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return completion_texts(tokenizer, ids, mask)


def test_tokens_that_a_slow_tokenizer_lacks_are_replaced(caplog):
    """The others stay; runs become one character; a warning says so once."""
    slow = SlowTokenizer()
    with caplog.at_level(logging.WARNING):
        found = texts(slow, [[5, 6], [5, 4, 6, 7], [12, 13, 5], [4], [3, 2, 15, 2], []])
        texts(slow, [[4, 5]])
    assert found == ["w5 w6", "w5\ufffdw6 w7", "\ufffdw5", "\ufffd", "w3\ufffd", ""]
    (record,) = caplog.records
    assert record.getMessage().startswith("SlowTokenizer can not decode some completions, shown with \ufffd: ")


def test_text_that_can_be_decoded_is_the_tokenizers_own(caplog):
    fast = word_tokenizer()
    rows = [[5, 6, 2], [9, 1, 60]]
    assert texts(fast, rows) == fast.batch_decode(rows, skip_special_tokens=True) == ["w5 w6", "w9 w60"]
    assert caplog.records == []


@pytest.mark.parametrize("error", [TypeError, KeyError, UnicodeDecodeError, RuntimeError, None])
def test_nothing_that_a_tokenizer_does_ends_a_run(error):
    """Errors of any kind, or something that is no text, in rows or in single tokens."""

    class Odd(SlowTokenizer):
        def _convert_id_to_token(self, index):
            if index == 7:
                if error is UnicodeDecodeError:
                    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
                if error is not None:
                    raise error("no")
                return None
            return super()._convert_id_to_token(index)

    assert texts(Odd(), [[5, 7, 6]]) == ["w5\ufffdw6"]

    class Mute:
        def batch_decode(self, rows, skip_special_tokens):
            return [None for _ in rows]

    assert texts(Mute(), [[5], [6, 7]]) == ["\ufffd", "\ufffd"]


class Single:
    def decode(self, row, skip_special_tokens=False):
        return " ".join(f"w{token}" for token in row if not (skip_special_tokens and token < 3))


class Plain:
    def decode(self, row):
        return " ".join(f"w{token}" for token in row)


class PlainBatch:
    def batch_decode(self, rows):
        return [Plain().decode(row) for row in rows]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(Single(), ["w5", "w6 w7"]), (Plain(), ["w5 w2", "w6 w7"]), (PlainBatch(), ["w5 w2", "w6 w7"])],
)
def test_tokenizers_that_have_less_are_asked_for_less(tokenizer, expected, caplog):
    assert texts(tokenizer, [[5, 2], [6, 7]]) == expected
    assert caplog.records == []


def test_training_and_evaluation_go_on(tmp_path, capsys):
    """With a tokenizer that fails at a token of its own: table, text rewards in training and in evaluation."""

    class Failing(SlowTokenizer):
        def convert_tokens_to_string(self, tokens):
            if "w6" in tokens:
                raise KeyError("w6")
            return super().convert_tokens_to_string(tokens)

    seen = []

    def replaced(prompts, completions, **columns):
        seen.extend(completions)
        return [float("\ufffd" in text) for text in completions]

    trainer = build(
        tmp_path,
        padded_policy(),
        [BagReward(dtype=torch.float32, vocab=16), replaced],
        Dataset.from_dict({"prompt": ["w3 w5", "w7", "w9 w3 w6", "w8"]}),
        processing_class=Failing(),
        log_completions=True,
        eval_dataset=Dataset.from_dict({"prompt": ["w3", "w5"]}),
    )
    trainer.train()
    assert any("\ufffd" in text for text in seen)
    assert not any("w6" in text for text in seen)
    assert "\ufffd" in capsys.readouterr().out
    assert 0 <= trainer.evaluate()["eval_rewards/replaced/mean"] <= 1
