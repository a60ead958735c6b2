"""Tiny random models for the tests of training, and a step-by-step graph to compare the replay with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from torch import nn

from grade_kernels import GumbelNoise

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
# The first releases of transformers 5 know its methods and settings by the old name, the later ones warn of that.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(tf.PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def policy(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny causal language model with random weights."""
    torch.manual_seed(seed)
    gpt = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    # With a padding token their lookup of it would have no gradient, which a product with the table does have.
    shell = SIZES | {"dropout": 0.0, "init_std": 0.3, "pad_token_id": None}
    configs = {
        "gpt2": lambda: tf.GPT2Config(**gpt, **NO_DROPOUT, **changes),
        "gptj": lambda: tf.GPTJConfig(**gpt, rotary_dim=4, **NO_DROPOUT, **changes),
        "llama": lambda: tf.LlamaConfig(**SIZES, **changes),
        "qwen2": lambda: tf.Qwen2Config(**SIZES, **changes),
        "gemma2": lambda: tf.Gemma2Config(
            **SIZES, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=3.0, **changes
        ),
        "phi": lambda: tf.PhiConfig(**SIZES, partial_rotary_factor=0.5, **changes),
        "cohere": lambda: tf.CohereConfig(**SIZES, logit_scale=0.3, **changes),
        "granite": lambda: tf.GraniteConfig(**SIZES, logits_scaling=2.0, embedding_multiplier=3.0, **changes),
        "llama4": lambda: tf.Llama4TextConfig(
            **SIZES, intermediate_size_mlp=24, num_local_experts=2, attention_chunk_size=4, **changes
        ),
        "minimax": lambda: tf.MiniMaxConfig(
            **SIZES, layer_types=["linear_attention", "full_attention"], num_local_experts=2,
            experts_implementation="eager", **changes,
        ),
        "opt": lambda: tf.OPTConfig(
            **(shell | {"ffn_dim": 24, "word_embed_proj_dim": 12}), **changes
        ),
        "bart": lambda: tf.BartConfig(
            **(shell | {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}),
            is_decoder=True, is_encoder_decoder=False, **changes,
        ),
    }  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(configs[family]()).to(dtype)
    with torch.no_grad():  # biases start at zero, where a test of them would see nothing
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model.eval()


def classifier(family: str, seed: int = 7, dtype: torch.dtype = torch.float64, labels: int = 2) -> Any:
    """A tiny sequence classifier with random weights."""
    torch.manual_seed(seed)
    sizes = SIZES | {"hidden_size": 12, "head_dim": 6, "num_labels": labels}
    encoder = {key: sizes[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_labels")} | {
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "initializer_range": 0.3,
    }  # fmt: skip
    configs = {
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=VOCAB, n_embd=12, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, num_labels=labels,
            pad_token_id=0,
        ),
        "llama": lambda: tf.LlamaConfig(**sizes),
        "gemma": lambda: tf.GemmaConfig(**sizes),
        "bert": lambda: tf.BertConfig(**encoder),
        "distilbert": lambda: tf.DistilBertConfig(
            vocab_size=VOCAB, dim=12, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=64,
            initializer_range=0.3, num_labels=labels,
        ),
        "roberta": lambda: tf.RobertaConfig(**(encoder | {"pad_token_id": 1})),
        "deberta": lambda: tf.DebertaV2Config(**encoder),
        "modernbert": lambda: tf.ModernBertConfig(**encoder, classifier_pooling="mean"),
    }  # fmt: skip
    return tf.AutoModelForSequenceClassification.from_config(configs[family]()).to(dtype).eval()


class BagReward(nn.Module):
    """A smooth reward that depends on order: P from a decayed sum of the real tokens' embeddings."""

    def __init__(self, seed: int = 5, dtype: torch.dtype = torch.float64, vocab: int = VOCAB, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab, width, generator=generator, dtype=dtype)
        self.direction = torch.randn(width, generator=generator, dtype=dtype)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **columns: Any) -> torch.Tensor:
        mask = attention_mask.to(inputs_embeds.dtype)
        decay = 0.9 ** (mask.cumsum(1) - 1)
        state = torch.tanh((inputs_embeds * (mask * decay)[..., None]).sum(1))
        return (state @ self.direction).sigmoid()


def prompts(lengths: tuple[int, ...] = (3, 5, 1), seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    return ids * mask, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def relaxed(logits: torch.Tensor, noise: torch.Tensor, tau: float, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and (straight-through) sample of dense logits, written out from the definitions."""
    token = (logits + noise).argmax(-1)
    hard = nn.functional.one_hot(token, logits.shape[-1]).to(logits.dtype)
    if estimator == "soft":
        return token, ((logits + noise) / tau).softmax(-1)
    if estimator == "ste":
        soft = ((logits + noise) / tau).softmax(-1)
        return token, hard + soft - soft.detach()
    if estimator == "st":
        soft = (logits / tau).softmax(-1)
        return token, hard + soft - soft.detach()
    assert estimator == "reinmax"
    p0 = logits.softmax(-1).detach()
    p1 = ((hard + (logits / tau).softmax(-1)) / 2).detach()
    step = torch.where(logits == -torch.inf, 0.0, logits - logits.detach())
    double = p1 * (step - (p1 * step).sum(-1, keepdim=True)) * 2
    return token, hard + double - p0 * (step - (p0 * step).sum(-1, keepdim=True)) / 2


def sequential_batch(
    model: Any, reward: Any, ids: torch.Tensor, mask: torch.Tensor, *, time: int, seed: int, tau: float, estimator: str,
    sequences: torch.Tensor, reference: Any = None, beta: float = 0.0, eos: int | None = None, pad: int = 0,
    suppressed: Sequence[int] = (), begin_suppressed: Sequence[int] = (),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """The whole decode as one graph: every sample is fed back, every step runs the model over all that came before.

    Some tokens may be suppressed throughout, others for the first step: by policy and reference.
    """
    table, scale = model.get_input_embeddings().weight, getattr(model.get_input_embeddings(), "embed_scale", 1.0)
    fed, full = [model.get_input_embeddings()(ids)], mask
    ref_fed = [] if reference is None else [reference.get_input_embeddings()(ids)]
    batch = len(ids)
    alive = torch.ones(batch, dtype=torch.bool)
    tokens, alives, samples, logits_of, ref_logits = [], [], [], [], []
    for t in range(time):
        masked = torch.zeros(VOCAB, dtype=torch.bool)
        masked[[*suppressed, *(begin_suppressed if t == 0 else ())]] = True
        arguments = {"attention_mask": full, "position_ids": positions(full), "use_cache": False}
        logits = model(inputs_embeds=torch.cat(fed, 1), **arguments).logits[:, -1].masked_fill(masked, -torch.inf)
        if reference is not None:
            with torch.no_grad():
                ref = reference(inputs_embeds=torch.cat(ref_fed, 1), **arguments).logits[:, -1]
                ref_logits.append(ref.masked_fill(masked, -torch.inf))
        rows = (sequences << 32) + t
        noise = GumbelNoise(seed, rows).dense(batch, VOCAB, dtype=logits.dtype)
        token, y = relaxed(logits, noise, tau, estimator)
        token = torch.where(alive, token, pad)
        tokens.append(token)
        alives.append(alive)
        samples.append(y)
        logits_of.append(logits)
        full = torch.cat([full, alive[:, None].long()], 1)
        fed.append((y @ table)[:, None] * scale)
        if reference is not None:
            ref_fed.append((y.detach() @ reference.get_input_embeddings().weight)[:, None] * scale)
        if eos is not None:
            alive = alive & (token != eos)
            if not alive.any():
                break
    y, completion_mask = torch.stack(samples, 1), torch.stack(alives, 1).long()
    embeds = torch.cat([reward.embedding[ids], y @ reward.embedding], 1)
    rewards = reward(embeds, torch.cat([mask, completion_mask], 1))
    kl = torch.zeros(batch, dtype=rewards.dtype)
    if reference is not None:
        logp, logq = torch.stack(logits_of, 1).log_softmax(-1), torch.stack(ref_logits, 1).log_softmax(-1)
        difference = torch.where(logp == -torch.inf, 0.0, logp - logq)
        kl = ((logp.exp() * difference).sum(-1) * completion_mask).sum(1)
    loss = -rewards.mean() + beta * kl.mean()
    return loss, {
        "ids": torch.stack(tokens, 1),
        "mask": completion_mask,
        "rewards": rewards.detach(),
        "kl": kl.detach(),
    }


def sequential_loss(
    model: Any, reward: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`sequential_batch`, row by row where the model itself can not read padded rows.

    Eager attention can not in float64, Bart counts positions from the row's start, and MiniMax's state counts padding.
    """
    batch = len(ids)
    if model.config._attn_implementation != "eager" and model.config.model_type not in ("bart", "minimax"):
        return sequential_batch(model, reward, ids, mask, sequences=torch.arange(batch), **options)
    rows = []
    for row in range(batch):
        prompt = ids[row : row + 1, mask.shape[1] - int(mask[row].sum()) :]
        own = torch.tensor([row])
        rows.append(sequential_batch(model, reward, prompt, torch.ones_like(prompt), sequences=own, **options))
    longest = max(truth["ids"].shape[1] for _, truth in rows)

    def stacked(name: str) -> torch.Tensor:
        parts = [truth[name] for _, truth in rows]
        if name in ("ids", "mask"):
            parts = [nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts]
        return torch.cat(parts)

    loss = torch.stack([loss for loss, _ in rows]).mean()
    return loss, {name: stacked(name) for name in ("ids", "mask", "rewards", "kl")}


def truncated_loss(
    model: Any, reward: Any, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor, completion_mask: torch.Tensor,
    *, hops: int, seed: int, tau: float, estimator: str, reference: Any = None, beta: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """The Neumann sum up to `hops`, unrolled: each level feeds back the relaxed samples of the level below."""
    embedding = model.get_input_embeddings()
    table, scale = embedding.weight.detach(), getattr(embedding, "embed_scale", 1.0)
    time = tokens.shape[1]
    noise = torch.stack(
        [GumbelNoise(seed, (torch.arange(len(ids)) << 32) + t).dense(len(ids), VOCAB, dtype=table.dtype)
         for t in range(time)], 1
    )  # fmt: skip
    full = torch.cat([mask, completion_mask[:, :-1]], 1)
    all_ids = torch.cat([ids, tokens[:, :-1]], 1)
    arguments = {"attention_mask": full, "position_ids": positions(full), "use_cache": False}
    fed_back = 0.0
    for level in range(hops + 1):
        embeds = embedding(all_ids)
        if level:
            embeds = embeds + torch.cat([torch.zeros_like(embeds[:, : ids.shape[1]]), fed_back], 1)
        logits = model(inputs_embeds=embeds, **arguments).logits[:, ids.shape[1] - 1 :]
        # The sample's value is the given token's; only its derivative is wanted here.
        y = relaxed(logits, noise, tau, estimator)[1]
        zero = y - y.detach()
        fed_back = (zero @ table)[:, :-1] * scale
    hard = nn.functional.one_hot(tokens, VOCAB).to(zero.dtype)
    embeds = torch.cat([reward.embedding[ids], (hard + zero) @ reward.embedding], 1)
    loss = -reward(embeds, torch.cat([mask, completion_mask], 1)).mean()
    if reference is not None:
        with torch.no_grad():
            ref = reference(input_ids=all_ids, **arguments).logits[:, ids.shape[1] - 1 :].log_softmax(-1)
        logp = logits.log_softmax(-1)
        loss = loss + beta * ((logp.exp() * (logp - ref)).sum(-1) * completion_mask).sum(1).mean()
    return loss


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that has one, after clearing."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_difference(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest relative error over the parameters, each in its own norm."""
    assert ours.keys() == truth.keys()
    floor = 1e-8 * max(float(g.norm()) for g in truth.values())
    return max(float((ours[name] - truth[name]).norm() / truth[name].norm().clamp_min(floor)) for name in truth)


def word_tokenizer() -> Any:
    """A tokenizer of `VOCAB` whole words: `<pad> <bos> <eos> w3 ... w60`, which begins every text with `<bos>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


class SlowTokenizer(tf.PreTrainedTokenizer):
    """A Python tokenizer of nine words, with a hole at 4: `<pad> <bos> <eos> w3`, and `w5` to `w9`."""

    def __init__(self, **options: Any) -> None:
        self.words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 10))])}
        del self.words["w4"]
        self.texts = {id: word for word, id in self.words.items()}
        super().__init__(**({"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | options))

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.words)

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, 3)

    def _convert_id_to_token(self, index: int) -> Any:
        return self.texts.get(index)


def padded_policy(seed: int = 0, **changes: Any) -> Any:
    """A policy of 16 rows for the slow tokenizer's nine tokens."""
    torch.manual_seed(seed)
    size = {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**size, tie_word_embeddings=False, **changes)).eval()
