"""Prompts on their way to the policy: ends and beginnings, chat templates, images, lengths, names of columns."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

import datasets
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from grade_kernels import GumbelNoise
from grade_kernels.training import GRADEConfig, GRADETrainer, SequenceClassificationReward, command, grade_loss
from grade_kernels.training.positions import Room, frequency_limits, position_limit, position_table_limit
from grade_kernels.training.prompt_tokens import PromptTokenizer, tokenizer_of
from grade_kernels.training.prompts import PromptCollator
from tests.support.trainers import PROMPTS, build, config
from tests.support.training_models import SIZES, VOCAB, BagReward, classifier, policy, prompts, word_tokenizer

CHAT = (
    "<bos> {% if enable_thinking is defined and not enable_thinking %}w50 {% endif %}"
    "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}"
    "{% for document in documents or [] %}{{ document['text'] }} {% endfor %}"
    "{% for m in messages %}{{ 'w40' if m['role'] == 'user' else 'w41' }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w41{% endif %}"
)
PARTS = (
    "{% for m in messages %}w40 {% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}w41{% endif %}"
)


def tokenizer(single="<bos> $A", template=None, **names):
    """The tests' words, with another post-processor and perhaps a chat template."""
    made = word_tokenizer()
    tokens = [(word, made.convert_tokens_to_ids(word)) for word in ("<pad>", "<bos>", "<eos>", "w58", "w59", "w60")]
    made._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    made.chat_template = template
    for name, token in names.items():
        setattr(made, name, token)
    return made


def user(*contents):
    return [{"role": "user", "content": content} for content in contents]


def image_processor():
    return tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def llava_processor(made=None, template=PARTS):
    made = made or tokenizer()
    return tf.LlavaProcessor(image_processor(), made, patch_size=4, image_token="w57", chat_template=template)


def multimodal(family):
    """A tiny policy with a tower of vision, whose placeholder of an image is the token 57."""
    torch.manual_seed(0)
    sight = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 8, "patch_size": 4}
    if family == "llava":
        return tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.LlamaConfig(**SIZES), vision_config=tf.CLIPVisionConfig(**sight), image_token_index=57
            )
        )
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config=tf.Gemma3TextConfig(**SIZES), vision_config=tf.SiglipVisionConfig(**sight), mm_tokens_per_image=4,
            image_token_index=57, boi_token_index=55, eoi_token_index=56,
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ ends and beginnings


@pytest.mark.parametrize(
    ("single", "text", "ids"),
    [
        ("<bos> $A <eos>", "w3 w4", [1, 3, 4]),  # as Llama with add_eos_token
        ("$A <eos>", "w3 w4", [3, 4]),  # as T5
        ("w58 $A w59", "w3 w4", [58, 3, 4]),  # as BERT: w59 separates
        ("$A w59 w58", "w3 w4", [3, 4]),  # as XLNet
        ("w58 <bos> $A", "w3 w4", [58, 1, 3, 4]),
        ("<bos> $A w60", "w3 w4", [1, 3, 4, 60]),  # what is no end stays
        ("<bos> $A w60 <eos>", "w3 w4", [1, 3, 4, 60]),
        ("<bos> $A <eos> w60", "w3 w4", [1, 3, 4]),
        ("$A", "<bos> w3 <eos>", [1, 3, 2]),
        ("<bos> $A <eos>", "<bos> w3", [1, 3]),
        ("<bos> $A <eos>", "<bos> <bos> w3", [1, 1, 3]),  # the user's own two
        ("w58 $A w59", "w58 w3", [58, 3]),
        ("w58 <bos> $A", "<bos> w3", [58, 1, 3]),
        ("<bos> w58 $A", "<bos> w3", [1, 58, 3]),
        ("<bos> w58 $A", "<bos> w58 w3", [1, 58, 3]),
        ("<bos> $A <eos>", "w3 <eos> w4", [1, 3, 2, 4]),
        ("<bos> $A <eos>", "w3 <eos>", [1, 3, 2]),  # the user's own end
        ("$A <eos>", "<eos>", [2]),
        ("$A <eos>", "<eos> <eos>", [2, 2]),
        ("<bos> $A <eos>", "", [1]),
        ("<bos> $A <eos>", "<bos>", [1]),
    ],
)
def test_only_what_the_tokenizer_added_behind_is_cut_and_no_beginning_is_doubled(single, text, ids):
    assert PromptTokenizer(tokenizer(single, sep_token="w59"))({"prompt": text}) == ids


def test_a_beginning_that_is_an_end_too_stays():
    both = tokenizer("<eos> $A <eos>", bos_token="<eos>")
    assert PromptTokenizer(both)({"prompt": "w3"}) == [2, 3]
    assert PromptTokenizer(both)({"prompt": "<eos> w3"}) == [2, 3]
    assert PromptTokenizer(both)({"prompt": ""}) == [2]
    assert PromptTokenizer(tokenizer("<eos> $A", bos_token="<eos>"))({"prompt": "<eos>"}) == [2]


def test_an_end_that_only_the_model_knows_is_cut():
    unknowing = tokenizer("$A w60")
    assert PromptTokenizer(unknowing)({"prompt": "w3"}) == [3, 60]
    assert PromptTokenizer(unknowing, end_ids=(2, 60))({"prompt": "w3"}) == [3]


def test_byte_level_tokenizers_and_functions():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["the film was good"], specials)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    made = tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokens = PromptTokenizer(made)
    for text, decoded in (("the film ", "<s>the film "), ("<s>ein Bär", "<s>ein Bär"), ("a</s>", "<s>a</s>")):
        assert made.decode(tokens({"prompt": text}), clean_up_tokenization_spaces=False) == decoded
    assert PromptTokenizer(lambda text: {"input_ids": [7, 2]})({"prompt": "any"}) == [7, 2]


def test_tokenizers_of_python_add_and_end_alike():
    class Characters(tf.PreTrainedTokenizer):
        vocab_size = 40

        def get_vocab(self):
            return {"<bos>": 1, "<eos>": 2} | {chr(97 + i): 3 + i for i in range(26)}

        def _tokenize(self, text, **kwargs):
            return list(text.replace(" ", ""))

        def _convert_token_to_id(self, token):
            return self.get_vocab().get(token, 3)

        def _convert_id_to_token(self, index):
            return {i: token for token, i in self.get_vocab().items()}.get(index)

        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return [1, *token_ids_0, 2]

    tokens = PromptTokenizer(Characters(bos_token="<bos>", eos_token="<eos>"))
    assert [tokens({"prompt": text}) for text in ("ab", "<bos>ab", "ab<eos>")] == [[1, 3, 4], [1, 3, 4], [1, 3, 4, 2]]


def test_ends_and_beginnings_are_said_once(tmp_path, caplog):
    trainer = build(
        tmp_path, processing_class=tokenizer("<bos> $A <eos>"), max_steps=3,
        dataset=Dataset.from_dict({"prompt": ["<bos> w3", "w4 w5", "<bos> w6 w7", "w8"]}),
        eval_dataset=Dataset.from_dict({"prompt": ["<bos> w9"]}),
    )  # fmt: skip
    for batch in (*trainer.get_train_dataloader(), *trainer.get_eval_dataloader()):
        assert not (batch["input_ids"] == 2).any()
        assert ((batch["input_ids"] == 1).sum(dim=1) == 1).all()
    trainer.train()
    trainer.evaluate()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("which is cut off prompts" in message for message in said) == 1
    assert sum("are left with one" in message for message in said) == 1


# ------------------------------------------------------------------------------------------------------ chat templates


def test_what_a_template_writes_stays_as_it_is():
    chat = PromptTokenizer(tokenizer("<bos> $A <eos>", CHAT))
    assert chat({"prompt": user("w3")}) == [1, 40, 3, 2, 41]
    assert chat({"prompt": user("<eos>")}) == [1, 40, 2, 2, 41]
    assert chat({"prompt": [*user("w3"), {"role": "assistant", "content": "w4"}]}) == [1, 40, 3, 2, 41, 4]
    closed = PromptTokenizer(tokenizer("<bos> $A <eos>", CHAT.replace("w41{% endif %}", "{% endif %}")))
    assert closed({"prompt": user("w3")}) == [1, 40, 3, 2], "the end of a turn is the template's"
    bare = PromptTokenizer(tokenizer("<bos> $A <eos>", CHAT.replace("<bos> ", "")))
    assert bare({"prompt": user("w3")}) == [40, 3, 2, 41], "transformers adds nothing to a template's text"


def test_arguments_of_the_template_come_from_settings_and_examples():
    tool = {"type": "function", "function": {"name": "w44"}}
    chat = PromptTokenizer(tokenizer(template=CHAT), template_arguments={"enable_thinking": False})
    thinking = PromptTokenizer(tokenizer(template=CHAT))
    assert chat({"prompt": user("w3")}) == [1, 50, 40, 3, 2, 41]
    assert chat({"prompt": user("w3"), "chat_template_kwargs": {"enable_thinking": True}}) == [1, 40, 3, 2, 41]
    for given in ({"enable_thinking": False}, '{"enable_thinking": false}', {"enable_thinking": False, "other": None}):
        assert thinking({"prompt": user("w3"), "chat_template_kwargs": given}) == [1, 50, 40, 3, 2, 41]
    for tools in ([tool], json.dumps([tool])):
        assert thinking({"prompt": user("w3"), "tools": tools}) == [1, 44, 40, 3, 2, 41]
    assert thinking({"prompt": user("w3"), "tools": []}) == [1, 40, 3, 2, 41]
    assert thinking({"prompt": user("w3"), "documents": [{"text": "w45"}]}) == [1, 45, 40, 3, 2, 41]
    for name, value in (("tools", 3), ("chat_template_kwargs", [1]), ("documents", "{}")):
        with pytest.raises(TypeError, match=f"column {name} must be a"):
            thinking({"prompt": user("w3"), name: value})
    with pytest.raises(ValueError, match="column tools must be a list or JSON of one"):
        thinking({"prompt": user("w3"), "tools": "search"})
    with pytest.raises(ValueError, match=r"must hold arguments of the chat template, got \['tokenize'\]"):
        thinking({"prompt": user("w3"), "chat_template_kwargs": {"tokenize": False}})


def test_columns_of_the_template_reach_it_in_training_and_evaluation_and_reach_rewards(tmp_path):
    seen = []

    def text(prompts, completions, **columns):
        seen.append(columns)
        return [0.0] * len(prompts)

    rows = {
        "prompt": [user(prompt) for prompt in PROMPTS],
        "tools": [json.dumps([{"type": "function", "function": {"name": "w44"}}])] * len(PROMPTS),
        "chat_template_kwargs": [{"enable_thinking": False}] * len(PROMPTS),
        "documents": [[{"text": "w45"}]] * len(PROMPTS),
    }
    dataset = Dataset.from_dict(rows)
    trainer = build(
        tmp_path, reward=[BagReward(dtype=torch.float32), text], processing_class=tokenizer(template=CHAT),
        dataset=dataset, eval_dataset=dataset, max_steps=1,
    )  # fmt: skip
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        for ids, mask in zip(*[next(iter(loader))[name] for name in ("input_ids", "attention_mask")], strict=True):
            assert ids[mask.bool()][:5].tolist() == [1, 50, 44, 45, 40]
    trainer.train()
    assert seen[0].keys() - {"completion_ids"} == {"tools", "chat_template_kwargs", "documents"}
    alone = build(tmp_path, processing_class=tokenizer(template=CHAT), dataset=dataset, remove_unused_columns=True)
    batch = next(iter(alone.get_train_dataloader()))
    assert batch["columns"] == {}
    assert (batch["input_ids"] == 44).any(dim=1).all()


def test_the_setting_reaches_the_template_from_the_command_line(tmp_path):
    needed = ["--model", "m", "--dataset", "d", "--reward", "r", "--output_dir", str(tmp_path)]
    _, args = command.parse([*needed, "--chat_template_kwargs", '{"enable_thinking": false}', "--use_cpu"])
    assert args.chat_template_kwargs == {"enable_thinking": False}
    (tmp_path / "run.yaml").write_text("chat_template_kwargs: {enable_thinking: false}\nmax_prompt_length: 7\n")
    _, args = command.parse([*needed, "--config", str(tmp_path / "run.yaml"), "--long_prompts", "skip"])
    assert (args.chat_template_kwargs, args.max_prompt_length, args.long_prompts) == (
        {"enable_thinking": False},
        7,
        "skip",
    )
    dataset = Dataset.from_dict({"prompt": [user(prompt) for prompt in PROMPTS]})
    trainer = build(
        tmp_path, processing_class=tokenizer(template=CHAT), dataset=dataset, eval_dataset=dataset,
        chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert (next(iter(loader))["input_ids"] == 50).any(dim=1).all()


def test_what_a_template_does_not_read_is_said(caplog):
    plain = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokens = PromptTokenizer(tokenizer(template=plain), template_arguments={"enable_thinking": False})
    for _ in range(2):
        tokens({"prompt": user("w3"), "tools": [{"type": "function", "function": {"name": "w44"}}]})
        tokens({"prompt": "w3"})
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the chat template does not mention tools, enable_thinking, so they have no effect",
        "chat_template_kwargs: without effect on prompts that are strings, which no chat template reads",
    ]


def test_messages_without_a_template_are_refused_at_construction(tmp_path):
    # Behind the first two prompts, which are tried out anyway.
    mixed = [*({"prompt": "w3"} for _ in range(4)), {"prompt": user("w4")}]
    with pytest.raises(ValueError, match=r"train_dataset\[4\]: .* need a chat template.* begins 'user: w4'"):
        build(tmp_path, dataset=mixed)
    with pytest.raises(ValueError, match=r"eval_dataset\['held out'\]\[4\]: .* need a chat template"):
        build(tmp_path, eval_dataset={"held out": mixed})
    broken = tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match=r"the chat template fails: TemplateError: roles must alternate; .* 'user: w4'"
    ):
        build(tmp_path, dataset=[{"prompt": user("w4")}], processing_class=broken)


@pytest.mark.parametrize("template", [CHAT, PARTS])
def test_content_may_be_a_string_or_parts_of_text_whatever_the_template_reads(template):
    tokens = PromptTokenizer(tokenizer(template=template))
    expected = tokens({"prompt": user("w3 w4")})
    assert expected[-1] == 41
    assert {3, 4} < set(expected)
    parts = [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}]
    for content in (parts, [{**part, "image": None} for part in parts], ["w3 ", "w4"]):
        assert tokens({"prompt": user(content)}) == expected
    begun = [*user("w3"), {"role": "assistant", "content": [{"type": "text", "text": "w4"}]}]
    assert tokens({"prompt": begun})[-1] == 4


# -------------------------------------------------------------------------------------------- images and their like


@pytest.mark.parametrize(
    "column",
    ["image", "images", "video", "videos", "audio", "audios", "image_url", "video_urls", "pixel_values_videos"],
)
def test_columns_of_images_and_their_like_are_refused_by_name(tmp_path, column):
    table = Dataset.from_dict({"prompt": PROMPTS, column: PROMPTS})
    for data in ({"dataset": table}, {"eval_dataset": table}, {"dataset": table.to_iterable_dataset()}):
        with pytest.raises(ValueError, match=rf"_dataset has columns \['{column}'\], but prompts must be text alone"):
            build(tmp_path, model=multimodal("llava"), **data)
    with pytest.raises(ValueError, match=rf"columns \['{column}'\]"):
        build(tmp_path, dataset=[*({"prompt": "w3"} for _ in range(4)), {"prompt": "w4", column: "x"}])


@pytest.mark.parametrize("kind", ["Image", "Audio", "Video"])
@pytest.mark.parametrize(
    "shape", [lambda one: one, lambda one: [one], lambda one: {"front": one}], ids=["one", "list", "dict"]
)
def test_columns_of_images_and_their_like_are_refused_by_type(tmp_path, kind, shape):
    def types(made):
        return datasets.Features({"prompt": datasets.Value("string"), "pic": shape(made)})

    table = Dataset.from_dict({"prompt": ["w3"], "pic": [shape("x")]}, features=types(datasets.Image(decode=False)))
    table = table.cast(types(getattr(datasets, kind)(decode=False)))  # which encodes nothing
    for data in ({"dataset": table}, {"eval_dataset": {"a": table}}, {"dataset": table.to_iterable_dataset()}):
        with pytest.raises(ValueError, match=r"has columns \['pic'\], but prompts must be text alone"):
            build(tmp_path, **data)


@pytest.mark.parametrize("nothing", [None, []])
def test_columns_that_hold_no_image_are_fine(tmp_path, nothing):
    types = datasets.Features({"prompt": datasets.Value("string"), "images": [datasets.Image()]})
    columns = {"prompt": PROMPTS, "images": [nothing] * len(PROMPTS)}
    for data in (
        Dataset.from_dict(columns), Dataset.from_dict(columns, features=types), Dataset.from_dict(columns).to_list(),
    ):  # fmt: skip
        build(tmp_path, dataset=data, max_steps=1).train()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"}, {"type": "image", "image": "x"}, {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "video"}, {"type": "audio", "audio": "x"}, {"type": "input_audio"},
        {"type": "text", "text": "w3", "image": "x"},
    ],
)  # fmt: skip
def test_parts_of_messages_that_are_no_text_are_refused(tmp_path, part):
    prompt = user([part, {"type": "text", "text": "w3"}])
    data = [*({"prompt": "w3"} for _ in range(4)), {"prompt": prompt}]
    with pytest.raises(ValueError, match=r"train_dataset\[4\]: a prompt must be text alone, but a message has a part"):
        build(tmp_path, dataset=data, processing_class=tokenizer(template=CHAT))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    trainer = build(tmp_path, dataset=Stream(), processing_class=tokenizer(template=CHAT))
    with pytest.raises(ValueError, match="a prompt must be text alone"):
        trainer.train()


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_multimodal_policies_train_on_text_and_placeholders_are_refused(tmp_path, family):
    trainer = build(tmp_path, model=multimodal(family), max_steps=1, eval_dataset=[{"prompt": "w3"}])
    trainer.train()
    assert "eval_reward" in trainer.evaluate()
    with pytest.raises(ValueError, match=r"holds the model's image_token_\w+ \(57\).* begins 'w3 w57'"):
        build(tmp_path, model=multimodal(family), dataset=[{"prompt": "w3 w57"}])
    with pytest.raises(ValueError, match="leaves no room for a prompt in the model's 64 positions"):
        build(tmp_path, model=multimodal(family), max_completion_length=64)


def test_a_processors_tokenizer_is_taken_and_the_processor_saved(tmp_path):
    processor, seen = llava_processor(), []

    def text(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(prompts)

    dataset = Dataset.from_dict({"prompt": [user(prompt) for prompt in PROMPTS]})
    trainer = build(
        tmp_path, model=multimodal("llava"), reward=[BagReward(dtype=torch.float32), text], processing_class=processor,
        dataset=dataset, eval_dataset=dataset, max_steps=1, log_completions=True, reward_processing_classes=[processor, None],
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    own = processor.apply_chat_template(
        user([{"type": "text", "text": batch["prompts"][0][0]["content"]}]), tokenize=True, add_generation_prompt=True,
        return_dict=True,
    )  # fmt: skip
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == list(own["input_ids"][0])
    assert trainer.processing_class is processor
    trainer.train()
    trainer.evaluate()
    assert all(message[0]["content"].startswith("w") or not message[0]["content"] for message in seen)
    trainer.save_model(str(tmp_path / "saved"))
    saved = tf.AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(saved, tf.LlavaProcessor)
    assert saved.chat_template == PARTS
    with pytest.raises(TypeError, match="must be a tokenizer or a processor that has one, got CLIPImageProcessor"):
        tokenizer_of(image_processor())


@pytest.mark.parametrize("template", ["<bos> " + PARTS, PARTS])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_processors_beginning_is_not_doubled(tmp_path, family, template):
    if family == "llava":
        processor = llava_processor(tokenizer("<bos> $A <eos>"), template)
    else:
        placeholders = {"image_token": "w57", "boi_token": "w55", "eoi_token": "w56"}
        made = tf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer("<bos> $A <eos>")._tokenizer, pad_token="<pad>", bos_token="<bos>",
            eos_token="<eos>", extra_special_tokens=placeholders,
        )  # fmt: skip
        processor = tf.Gemma3Processor(tf.Gemma3ImageProcessor(), made, chat_template=template, image_seq_length=4)
    trainer = build(
        tmp_path,
        model=multimodal(family),
        processing_class=processor,
        dataset=[{"prompt": user("w3")}, {"prompt": "w3 w4"}],
    )
    assert trainer._collator.tokens({"prompt": user("w3")}) == [1, 40, 3, 41]
    assert trainer._collator.tokens({"prompt": "w3"}) == [1, 3]
    trainer.save_model()
    assert type(tf.AutoProcessor.from_pretrained(tmp_path)) is type(processor)


# -------------------------------------------------------------------------------------------------------------- lengths


def test_prompts_that_are_too_long_are_refused_before_the_first_step(tmp_path):
    data = [*({"prompt": "w3"} for _ in range(4)), {"prompt": "w7 " + "w8 " * 60}]
    says = (
        r"\[4\]: max_completion_length = 6 after a prompt of 62 tokens is more than the model's 64 positions; the prompt "
        "begins 'w7 w8 w8"
    )
    for family in ("gpt2", "llama"):
        model = policy(family, dtype=torch.float32)
        with pytest.raises(ValueError, match="test_dataset has columns"):
            build(tmp_path, model=model).predict(Dataset.from_dict({"prompt": PROMPTS, "self": PROMPTS}))
        with pytest.raises(ValueError, match="train_dataset" + says):
            build(tmp_path, model=model, dataset=data)
        with pytest.raises(ValueError, match="eval_dataset" + says):
            build(tmp_path, model=model, eval_dataset=Dataset.from_list(data))
        trainer = build(tmp_path, model=model)
        with pytest.raises(ValueError, match="eval_dataset" + says):
            trainer.evaluate(data)
        with pytest.raises(ValueError, match="test_dataset" + says):
            trainer.predict(data)
        stream = Dataset.from_list(data).to_iterable_dataset()
        for run in (lambda t: t.train(), lambda t: t.evaluate()):
            trainer = build(tmp_path, model=model, dataset=stream, eval_dataset=stream, max_steps=4)
            with pytest.raises(ValueError, match=says.split(": ", 1)[1]):
                run(trainer)
    exact = [{"prompt": " ".join(["w8"] * 57)}]  # with the beginning and the completion all 64
    build(tmp_path, dataset=exact, max_steps=1).train()


@pytest.mark.parametrize("kind", ["table", "list", "map"])
def test_long_prompts_are_cut_or_skipped_as_chosen_and_counted(tmp_path, caplog, kind):
    texts = ["w3", "w4 w5 w6 w7", "w8 w9", "w10 w11 w12 w13 w14", "w15"]

    class Map(torch.utils.data.Dataset):
        def __len__(self):
            return len(texts)

        def __getitem__(self, index):
            return {"prompt": texts[index]}

    data = {"table": Dataset.from_dict({"prompt": texts}), "list": [{"prompt": t} for t in texts], "map": Map()}[kind]
    options = {
        "dataset": data,
        "eval_dataset": {"held": data},
        "max_prompt_length": 3,
        "per_device_train_batch_size": 1,
    }
    with pytest.raises(
        ValueError, match=r"train_dataset\[1\]: a prompt of 5 tokens is longer than max_prompt_length = 3"
    ):
        build(tmp_path, **options)
    cut = build(tmp_path, long_prompts="truncate", train_sampling_strategy="sequential", **options)
    rows = [batch["input_ids"][0].tolist() for batch in cut.get_train_dataloader()]
    assert rows == [[1, 3], [5, 6, 7], [1, 8, 9], [12, 13, 14], [1, 15]]
    assert (
        "2 of 5 prompts of train_dataset are too long and are cut on the left to at most 3 tokens; the first is "
        "train_dataset[1]: a prompt of 5 tokens is longer than max_prompt_length = 3; the prompt begins 'w4 w5 w6 w7'"
    ) in caplog.text
    skipped = build(tmp_path, long_prompts="skip", train_sampling_strategy="sequential", **options)
    rows = [batch["input_ids"][0].tolist() for batch in skipped.get_train_dataloader()]
    assert rows == [[1, 3], [1, 8, 9], [1, 15]]
    assert "2 of 5 prompts of train_dataset are too long and are skipped" in caplog.text
    assert "2 of 5 prompts of eval_dataset['held'] are too long and are skipped" in caplog.text
    assert skipped.evaluate()["eval_held_samples_per_second"] > 0
    assert len(skipped.eval_dataset["held"]) == 3
    with pytest.raises(ValueError, match="train_dataset has no prompt left: all 2 are too long"):
        build(tmp_path, dataset=[{"prompt": "w3"}] * 2, max_prompt_length=1, long_prompts="skip")


def test_long_prompts_of_a_stream_are_cut_or_skipped_as_they_come(tmp_path, caplog):
    texts = ["w3", "w4 w5 w6 w7", "w8 w9", "w15"]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{"prompt": text} for text in texts])

    for data in (Dataset.from_dict({"prompt": texts}).to_iterable_dataset(), Stream()):
        rows = {}
        for choice in ("truncate", "skip"):
            trainer = build(
                tmp_path, dataset=data, max_prompt_length=3, long_prompts=choice, per_device_train_batch_size=1
            )
            rows[choice] = [batch["input_ids"][0].tolist() for batch in trainer.get_train_dataloader()]
        assert rows == {"truncate": [[1, 3], [5, 6, 7], [1, 8, 9], [1, 15]], "skip": [[1, 3], [1, 8, 9], [1, 15]]}
    for what in ("skipped", "cut on the left"):
        assert f"prompts {what} so far because they are too long: 1; this one: a prompt of 5 tokens" in caplog.text


def test_without_a_longest_prompt_what_leaves_no_room_is_cut_or_skipped(tmp_path):
    data = [{"prompt": "w3"}, {"prompt": "w7 " + "w8 " * 60}]
    cut = build(tmp_path, dataset=data, long_prompts="truncate", max_steps=1)
    assert next(iter(cut.get_train_dataloader()))["input_ids"].shape[1] == 58
    cut.train()
    assert len(build(tmp_path, dataset=data, long_prompts="skip").train_dataset) == 1


def test_the_positions_of_classifiers_count_as_well(tmp_path):
    sizes = {"vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1}
    short = sizes | {"num_attention_heads": 2, "max_position_embeddings": 10}
    bert = tf.BertForSequenceClassification(tf.BertConfig(**short))
    data = [*({"prompt": "w3"} for _ in range(4)), {"prompt": "w4 w5 w6 w7"}]
    with pytest.raises(
        ValueError, match=r"\[4\]: max_completion_length = 6 after a prompt of 5 .*BertFor\w+'s 10 positions"
    ):
        build(tmp_path, reward=bert, dataset=data)
    with pytest.raises(ValueError, match=r"max_completion_length = 10 leaves no room for a prompt in BertFor\w+'s 10"):
        build(tmp_path, reward=bert, dataset=data, max_completion_length=10)
    build(tmp_path, reward=bert, dataset=data, max_completion_length=5)
    # As many tokens as the table takes, and not one more.
    for family in ("bert", "roberta", "gpt2", "distilbert"):
        model = classifier(family, dtype=torch.float32)
        limit = position_table_limit(model)
        reward = SequenceClassificationReward(model)
        for length in (limit, limit + 1):
            ids = torch.full((1, length), 9)
            try:
                reward(reward.embedding[ids], torch.ones_like(ids))
                assert length == limit, family
            except (IndexError, RuntimeError):
                assert length == limit + 1, family
    for family in ("llama", "gemma", "modernbert"):
        assert position_table_limit(classifier(family)) is None


def test_limits_of_positions_by_family():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope = {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4} | factors}
    longrope["original_max_position_embeddings"] = 16
    for wanted, made in (
        (64, tf.GPT2Config(n_positions=64)),
        (64, tf.LlamaConfig(**SIZES)),
        (64, tf.MistralConfig(**SIZES, sliding_window=4)),
        (64, tf.Gemma2Config(**SIZES, sliding_window=4)),
        (64, tf.OPTConfig(max_position_embeddings=64)),
        (64, tf.MptConfig(max_seq_len=64)),
        (None, tf.BloomConfig()),
        (None, tf.FalconConfig(alibi=True)),
        (2048, tf.FalconConfig(alibi=False)),
        (64, multimodal("llava").config),
        (64, multimodal("gemma3").config),
        (256, tf.Qwen2Config(**SIZES, rope_parameters=yarn)),
        (64, tf.LlamaConfig(**SIZES, rope_parameters=llama3 | {"original_max_position_embeddings": 8})),
        (64, tf.LlamaConfig(**SIZES, rope_parameters=dynamic)),
        (64, tf.Phi3Config(**SIZES, **longrope)),
    ):
        assert position_limit(made) == wanted, made.model_type
    assert frequency_limits(tf.Phi3Config(**SIZES, **longrope)) == [16]
    room = Room(6, positions={"the model": 64}, frequencies=(16,))
    assert [length for length in range(1, 70) if room.excess(length)] == [*range(12, 17), *range(59, 70)]
    assert (room.cut(13), room.cut(70), room.unquestioned) == (11, 58, 11)
    collator = PromptCollator(PromptTokenizer(tokenizer()), 0, room)
    with pytest.raises(
        ValueError, match=r"max_completion_length = 6 after prompts of 2 to 31 tokens passes position 16"
    ):
        collator([{"prompt": "w3"}, {"prompt": "w3 " * 30}])


def test_prompts_that_fit_by_their_bytes_are_not_tokenized(monkeypatch):
    calls = []
    tokens = PromptTokenizer(tokenizer(template=CHAT))
    monkeypatch.setattr(PromptTokenizer, "__call__", lambda self, example: calls.append(example) or [1] * 99)
    collator = PromptCollator(tokens, 0, Room(6, positions={"the model": 2000}))
    data = [{"prompt": "w3 " * 100}, {"prompt": user("w3")}, {"prompt": "ä" * 1000}, {"prompt": user("w3 " * 400)}]
    assert collator.fitting("data", [*data, {"prompt": user("w4")}])[:4] == data
    assert calls == data[1:]  # of conversations by one structure the first is, for its template may not take it


def byte_level(pairs=()):
    """A tokenizer of single bytes, and of what is given."""
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens({"additional_special_tokens": list(pairs)})
    return made


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}w40 {% endfor %}"
)
LACKING = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # drops what it does not know


@pytest.mark.parametrize(
    ("made", "bad", "options", "message"),
    [
        (tokenizer(), "w3 more", {}, r"input_ids must lie in \[0, 61\), got values in \[1, 61\]; .* begins 'w3 more'"),
        (tokenizer("$A"), " \t", {}, "has no token"),
        (tokenizer("$A"), "", {}, "has no token"),
        (tf.PreTrainedTokenizerFast(tokenizer_object=LACKING), "cde", {}, "has no token"),
        (tokenizer(), "w3 w57", {"family": "llava"}, r"holds the model's image_token_\w+ \(57\).* begins 'w3 w57'"),
        (byte_level(["<Image>"]), "x<Image>", {"image": 256}, r"holds the model's image_token_id \(256\)"),
        (tokenizer(template=CHAT), user("w3", "w57"), {"family": "llava"}, "holds the model's image_token"),
        (tokenizer(template="{{ messages[0]['content'] }}"), user(" "), {}, "has no token"),
        (tokenizer(template=STRICT), [{"role": "system", "content": "w3"}], {}, "template fails: .*no system"),
        (tokenizer(), "w3 w50", {"reward": 45}, r"BagReward must have a row for .* has 45, but a prompt has token 50"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("room", [Room(6, positions={"the model": 64}), Room(6)], ids=["limited", "endless"])
def test_prompts_that_fit_but_can_not_be_used_are_named_before_the_first_step(made, bad, options, message, room):
    good = user("w3") if isinstance(bad, list) else "a"
    if made.get_vocab().get("w60") == 60:
        good = user("w3") if isinstance(bad, list) else "w3"
        if isinstance(bad, str) and "more" in bad:
            made.add_tokens(["more"])
    shape = multimodal(options["family"]).config if "family" in options else None
    if "image" in options:
        shape = tf.Qwen2VLConfig(image_token_id=options["image"])
    size = max(VOCAB, 300 if "image" in options else 0)
    tables = {"BagReward": options["reward"]} if "reward" in options else {}
    collator = PromptCollator(PromptTokenizer(made, config=shape), 0, room, vocab_size=size, tables=tables)
    data = [*({"prompt": good} for _ in range(3)), {"prompt": bad}]
    with pytest.raises(ValueError, match=rf"data\[3\]: .*{message}"):
        collator.fitting("data", data)
    assert collator.fitting("data", data[:3]) == data[:3]


def test_data_sets_that_are_evaluated_by_name_are_checked_by_name(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    good = [{"prompt": "w3"}]
    assert {"eval_a_reward", "eval_b_reward"} <= trainer.evaluate({"a": good, "b": good}).keys()
    for bad, message in (
        ([{"prompt": 5}], r"eval_dataset\['b'\]\[0\]: a prompt must be a string"),
        ([], r"eval_dataset\['b'\] must hold at least one prompt"),
        (Dataset.from_dict({"x": [1]}), r"eval_dataset\['b'\] must have a column 'prompt'"),
        ("foo", r"eval_dataset\['b'\] must be a data set"),
    ):
        logged = len(trainer.state.log_history)
        with pytest.raises((TypeError, ValueError), match=message):
            trainer.evaluate({"a": good, "b": bad})
        assert len(trainer.state.log_history) == logged, "nothing was evaluated"


def test_the_trainer_looks_at_the_tables_of_rewards_and_reference(tmp_path):
    reward = BagReward(dtype=torch.float32, vocab=VOCAB - 5)
    model = policy("gpt2", dtype=torch.float32)
    model.generation_config.suppress_tokens = list(range(VOCAB - 5, VOCAB))
    data = [*({"prompt": "w3"} for _ in range(3)), {"prompt": "w58"}]
    with pytest.raises(ValueError, match=r"train_dataset\[3\]: BagReward must have a row .* has 56.* token 58"):
        build(tmp_path, model=model, reward=reward, dataset=data)


def test_the_reference_of_a_loop_of_ones_own_has_room_too():
    ids, mask = prompts((3, 5))
    torch.manual_seed(1)
    short = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=8)).double()
    with pytest.raises(
        ValueError, match="ref_model has 8 positions, but a prompt and its completion may have 11 tokens together"
    ):
        grade_loss(
            policy("llama"), BagReward(), ids, mask, max_new_tokens=6, noise=GumbelNoise(0), beta=0.1, ref_model=short
        )


# ------------------------------------------------------------------------------------------ names of columns, numbers


@pytest.mark.parametrize(
    "column", ["self", "inputs_embeds", "attention_mask", "prompts", "completions", "completion_ids"]
)
def test_columns_that_rewards_can_not_get_by_their_names_are_refused(tmp_path, column):
    table = Dataset.from_dict({"prompt": PROMPTS, column: PROMPTS})
    for data in ({"dataset": table}, {"eval_dataset": {"held": table}}, {"dataset": table.to_iterable_dataset()}):
        with pytest.raises(ValueError, match=rf"has columns \['{column}'\], which rewards can not get by these names"):
            build(tmp_path, **data)
    rows = [*({"prompt": "w3"} for _ in range(4)), {"prompt": "w4", column: 1}]
    with pytest.raises(ValueError, match=rf"train_dataset\[4\]: an example has columns \['{column}'\]"):
        build(tmp_path, dataset=rows)
    build(tmp_path, dataset=table, remove_unused_columns=True, max_steps=1).train()


def test_other_columns_reach_rewards_by_any_name(tmp_path):
    seen = {}

    def text(prompts, completions, completion_ids, **columns):
        seen.update(columns)
        return [0.0] * len(prompts)

    names = ("input_ids", "completion", "topic", "a name of words", "cls", "model")
    dataset = Dataset.from_dict({"prompt": PROMPTS, **dict.fromkeys(names, PROMPTS)})
    build(tmp_path, reward=[BagReward(dtype=torch.float32), text], dataset=dataset, max_steps=1).train()
    assert seen.keys() == set(names)


def test_numbers_of_numpy_are_numbers(tmp_path):
    args = config(
        tmp_path, num_generations=np.int64(2), tau=np.float32(0.5), beta=np.float64(0.25), eps=np.float16(0.125),
        max_completion_length=np.int32(6), feedback_hops=np.uint8(2), reward_weights=np.array([1, 2]),
        max_steps=np.int64(1), per_device_train_batch_size=np.int64(4), learning_rate=np.float32(0.5), seed=np.int16(3),
        max_prompt_length=np.int64(9), disable_dropout=np.bool_(True), num_completions_to_print=np.int64(1),
        chat_template_kwargs={"budget": np.int64(4)}, tau_schedule="linear", tau_final=np.float32(0.25),
    )  # fmt: skip
    plain = {
        "num_generations": 2,
        "tau": 0.5,
        "tau_final": 0.25,
        "beta": 0.25,
        "eps": 0.125,
        "max_completion_length": 6,
    }
    plain |= {"feedback_hops": 2, "reward_weights": [1, 2], "learning_rate": 0.5, "seed": 3, "max_prompt_length": 9}
    plain |= {"disable_dropout": True, "chat_template_kwargs": {"budget": 4}, "num_completions_to_print": 1}
    for name, value in plain.items():
        assert type(getattr(args, name)) is type(value)
        assert getattr(args, name) == value
    json.loads(args.to_json_string())
    trainer = GRADETrainer(
        policy("gpt2", dtype=torch.float32), [BagReward(dtype=torch.float32), BagReward(dtype=torch.float32)], args,
        Dataset.from_dict({"prompt": PROMPTS}), processing_class=word_tokenizer(),
    )  # fmt: skip
    trainer.train()
    for changes, name in (
        ({"num_generations": np.bool_(True)}, "num_generations must be an int, got True"),
        ({"tau": np.bool_(True)}, "tau must be a number, got True"),
        ({"max_completion_length": np.float32(6)}, "max_completion_length must be an int, got 6.0"),
        ({"max_prompt_length": True}, "max_prompt_length must be an int, got True"),
    ):
        with pytest.raises(TypeError, match=name):
            config(tmp_path, **changes)


def test_grade_loss_takes_numbers_of_numpy():
    ids, mask = prompts()
    numbers = {"max_new_tokens": 4, "tau": 0.5, "feedback_hops": 2, "eps": 0.0, "beta": 0.25, "eos_token_id": 2}
    kinds = {int: np.int64, float: np.float64}
    results = []
    for kind in (lambda value: value, lambda value: kinds[type(value)](value)):
        given = {name: kind(value) for name, value in numbers.items()}
        reference = policy("gpt2", seed=1)
        results.append(
            grade_loss(policy("gpt2"), BagReward(), ids, mask, noise=GumbelNoise(0), ref_model=reference, **given).loss
        )
    assert torch.equal(*results)
    with pytest.raises(TypeError, match="max_new_tokens must be an int, got bool"):
        grade_loss(policy("gpt2"), BagReward(), ids, mask, noise=GumbelNoise(0), max_new_tokens=np.bool_(True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_prompt_length": 0}, ValueError, "max_prompt_length must be at least 1, got 0"),
        ({"long_prompts": "left"}, ValueError, "long_prompts must be one of"),
        ({"chat_template_kwargs": "enable_thinking"}, ValueError, "chat_template_kwargs must be JSON"),
        ({"chat_template_kwargs": [1]}, TypeError, "chat_template_kwargs must be a dict or None"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, ValueError, r"got \['add_generation_prompt'\]"),
    ],
)
def test_settings_of_prompts_that_can_not_work_are_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        config(tmp_path, **changes)


def test_completions_are_as_long_as_the_fields():
    assert GRADEConfig.max_completion_length == 512
