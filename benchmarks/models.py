"""A training step of models that sample by Gumbel-softmax: as they are, and with ours in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from transformers.models.groupvit import modeling_groupvit

import grade_kernels as gk
from benchmarks.harness import OURS, Contestants
from benchmarks.rows import SEED
from examples.dvae import DVAE

Start = tuple[nn.Module, Callable[[], torch.Tensor]]  # a model, and its loss on a fixed batch
GumbelSoftmax = Callable[..., torch.Tensor]
CHECKED = 3  # steps


@contextmanager
def replaced(gumbel_softmax: GumbelSoftmax | None) -> Iterator[None]:
    """Let the models sample by this function; None leaves them as they are.

    Wav2Vec2 and the image tokeniser call PyTorch's function. GroupViT's file has a function of its own.
    """
    if gumbel_softmax is None:
        yield
        return
    with (
        mock.patch.object(F, "gumbel_softmax", gumbel_softmax),
        mock.patch.object(modeling_groupvit, "gumbel_softmax", gumbel_softmax),
    ):
        yield


def wav2vec2(small: bool) -> Start:
    """Pretraining on synthetic audio: two codebooks, of 320 codewords as published. Nothing else in it is random."""
    layers, width, seconds, codewords = (1, 16, 0.1, 8) if small else (4, 128, 1.0, 320)
    config = tf.Wav2Vec2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=4 * width,
        conv_dim=[width] * 7, num_conv_pos_embeddings=16, num_codevectors_per_group=codewords, codevector_dim=width,
        proj_codevector_dim=width, num_negatives=4, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, feat_quantizer_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        do_stable_layer_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    model = tf.Wav2Vec2ForPreTraining(config)
    time = torch.arange(int(16_000 * seconds)) / 16_000
    pitches = torch.rand(4, 8, 1) * 2000
    audio = (2 * torch.pi * pitches * time).sin().sum(1) + 0.1 * torch.randn(4, len(time))
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(len(time))))
    masked = torch.rand(4, frames) < 0.5
    # A frame's negatives are other frames of the same clip.
    negatives = (torch.arange(frames)[:, None] + torch.randint(1, frames, (4, frames, 4))) % frames
    negatives += frames * torch.arange(4)[:, None, None]
    return model, lambda: model(audio, mask_time_indices=masked, sampled_negative_indices=negatives).loss


def groupvit(small: bool) -> Start:
    """Pairs of images and texts. Its patches choose their group: a softmax over the last but one dimension."""
    width, image, groups, layers = (16, 32, 4, 3) if small else (128, 224, 64, 3)
    text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "vocab_size": 100}
    vision = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "depths": [1, 1, 1],
        "num_group_tokens": [groups, groups // 2, 0], "num_output_groups": [groups, groups // 2, groups // 2],
        "num_attention_heads": 4, "image_size": image, "patch_size": 8 if small else 16,
    }  # fmt: skip
    text |= {"num_attention_heads": 4, "max_position_embeddings": 8, "bos_token_id": 98, "eos_token_id": 99}
    config = tf.GroupViTConfig(
        text_config=text, vision_config=vision, projection_dim=width, projection_intermediate_dim=2 * width
    )
    model = tf.GroupViTModel(config)
    images, texts = torch.randn(8, 3, image, image), torch.randint(2, 98, (8, 8))
    texts[:, -1] = 99
    return model, lambda: model(input_ids=texts, pixel_values=images, return_loss=True).loss


def dvae(small: bool) -> Start:
    """The image tokeniser of `examples/dvae.py`, with DALL-E's vocabulary."""
    model, patches = (DVAE(64, 16), 4) if small else (DVAE(), 16)
    images = F.interpolate(torch.randint(2, (4, 3, patches, patches)).float(), scale_factor=8)
    return model, lambda: F.mse_loss(model(images), images)


class Program(NamedTuple):
    start: Callable[[bool], Start]
    rows: int  # of logits, the first time that a full-sized step samples
    vocab: int
    learning_rate: float


PROGRAMS = {
    "Wav2Vec2": Program(wav2vec2, rows=4 * 49 * 2, vocab=320, learning_rate=1e-3),
    "GroupViT": Program(groupvit, rows=8 * 196, vocab=64, learning_rate=1e-3),
    "image tokeniser": Program(dvae, rows=4 * 16 * 16, vocab=8192, learning_rate=1e-2),
}


class Training:
    """Training of a program from the same start as all others of it, on the same batch."""

    def __init__(self, name: str, small: bool, gumbel_softmax: GumbelSoftmax | None) -> None:
        torch.manual_seed(SEED)
        self.model, self._loss = PROGRAMS[name].start(small)
        self._gumbel_softmax = gumbel_softmax
        self._optimizer = torch.optim.Adam(self.model.train().parameters(), PROGRAMS[name].learning_rate)

    def step(self) -> torch.Tensor:
        """Train on the batch once and return its loss."""
        self._optimizer.zero_grad()
        with replaced(self._gumbel_softmax):
            loss = self._loss()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def gradients(self) -> list[torch.Tensor]:
        """Of all parameters that the last step reached."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def build(name: str) -> Contestants:
    """A step with ours, and a step of the model as it is."""
    return {OURS: Training(name, False, gk.gumbel_softmax).step, "eager": Training(name, False, None).step}


def agree(name: str, small: bool, one: GumbelSoftmax, other: GumbelSoftmax) -> None:
    """Train a few steps with each and the same seeds, and compare the losses, and the gradients of the last step.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    losses, gradients = [], []
    for gumbel_softmax in (one, other):
        training = Training(name, small, gumbel_softmax)
        torch.manual_seed(SEED)  # of the noise: nothing else in a step is random
        losses.append(torch.stack([training.step() for _ in range(CHECKED)]))
        gradients.append(training.gradients())
    assert torch.allclose(*losses, rtol=1e-4), f"{name}: losses {losses[0]} and {losses[1]}"
    largest = max(gradient.norm() for gradient in gradients[1])
    for i, (mine, truth) in enumerate(zip(*gradients, strict=True)):
        # Some gradients are zero but for rounding, such as that of the bias of an attention's keys.
        error = (mine - truth).norm() / (truth.norm() + 1e-4 * largest)
        assert error <= 1e-3, f"{name}: gradients of parameter {i} differ by {error:.1e}"


def check(name: str, small: bool = False) -> None:
    """Compare training with ours and with the reference in float64, whose noise is a function of the seed as ours is.

    Raises:
        AssertionError: losses or gradients differ.
    """

    def in_float64(logits: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return gk.reference.gumbel_softmax(logits.double(), *arguments, **options).to(logits.dtype)

    agree(name, small, gk.gumbel_softmax, in_float64)
