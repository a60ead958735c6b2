"""A step of GRADE by replay, against a step-by-step decode with a graph: time and peak memory, each in its own process.

`python -m benchmarks.training` prints a table; `python -m benchmarks.training --case qwen` the Qwen3-0.6B-shaped step.
`--device cuda` does it on a GPU. Before anything is measured, the gradients of a small step are
compared with those by the reference.
Peak memory is what the process held at most during the first step (VmHWM, Linux; on a GPU, what its allocator gave out), and
beside it what it held before.
CPU time stands beside wall time, since on a machine that does other work it is the one that repeats (on one thread).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import grade_kernels as gk
from benchmarks import memory
from benchmarks.harness import machine, synchronize
from grade_kernels.training import grade_loss
from grade_kernels.training.model import cache_arguments, cache_of

BETA, TAU, PROMPT = 0.05, 0.5, 16
TOLERANCE = 1e-4  # relative, of a gradient in float32


class Reward(nn.Module):
    """One attention-free layer over embeddings: cheap, so that the policy's step is what is measured."""

    def __init__(self, vocab: int, dtype: torch.dtype, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width, dtype=dtype)
        self.score = nn.Linear(width, 1, dtype=dtype)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        real = attention_mask[..., None].to(inputs_embeds.dtype)
        return self.score(torch.tanh((inputs_embeds * real).sum(1) / 8))[:, 0].sigmoid().float()


def sharpened(model: Any, nats: float) -> Any:
    """A random model made as sure of its next token as language models are, by the gain of its last norm.

    As it comes from its initialisation it has no preferences at all: 11.9 nats over 151,936 tokens.
    """
    with torch.no_grad():
        ids = torch.randint(0, model.config.vocab_size, (4, PROMPT), device=model.device)
        logits = model(ids).logits[:, -8:].flatten(0, 1)
        low, high = 0.0, 1000.0
        for _ in range(30):
            gain = (low + high) / 2
            logp = (logits * gain).log_softmax(-1)
            low, high = (gain, high) if -(logp.exp() * logp).sum(-1).mean() > nats else (low, gain)
        model.model.norm.weight.mul_(gain)
    return model


def models(case: str, vocab: int = 151936, nats: float = 3.5, device: str = "cpu") -> tuple[Any, Any, Reward]:
    """Policy, reference (None for the large one) and reward."""
    torch.manual_seed(0)
    if case == "qwen":
        settings = tf.Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=2048,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        policy = tf.Qwen3ForCausalLM(settings)
        torch.set_default_dtype(torch.float32)
        return policy.to(device), None, Reward(151936, torch.bfloat16).to(device)
    settings = tf.LlamaConfig(
        vocab_size=vocab, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024,
        tie_word_embeddings=False,  # a sharpened random model with one table for both repeats its last token for ever
    )  # fmt: skip
    policy, reference = (sharpened(tf.LlamaForCausalLM(settings).to(device), nats) for _ in range(2))
    return policy, reference, Reward(vocab, torch.float32).to(device)


def replay_step(
    policy: Any, reference: Any, reward: Reward, ids: torch.Tensor, time_steps: int, hops: Any, **options: float
) -> torch.Tensor:
    """What the trainer does; returns the loss."""
    out = grade_loss(
        policy, reward, ids, torch.ones_like(ids), max_new_tokens=time_steps, noise=gk.GumbelNoise(1), tau=TAU,
        feedback_hops=hops, ref_model=reference, beta=0.0 if reference is None else BETA, **options,
    )  # fmt: skip
    out.loss.backward()
    return out.loss.detach()


def sequential_step(policy: Any, reference: Any, reward: Reward, ids: torch.Tensor, time_steps: int) -> None:
    """What plain PyTorch does: gumbel_softmax at every step of a cached decode that is one graph."""
    table, reward_table = policy.get_input_embeddings().weight, reward.embedding.weight.detach()
    inputs, cache, logits, embeds, tokens = table[ids], None, [], [], []
    for _ in range(time_steps):
        out = policy(inputs_embeds=inputs, logits_to_keep=1, **cache_arguments(policy, cache))
        cache = cache_of(out)
        logits.append(out.logits[:, -1])
        y = F.gumbel_softmax(logits[-1], TAU, hard=True)
        tokens.append(y.argmax(-1))
        embeds.append(y @ reward_table)
        inputs = (y @ table)[:, None]
    full = torch.cat([reward_table[ids], torch.stack(embeds, 1)], 1)
    loss = -reward(full, torch.ones(full.shape[:2], dtype=torch.int64, device=ids.device)).mean()
    if reference is not None:
        everything = torch.cat([ids, torch.stack(tokens, 1)], 1)[:, :-1]
        with torch.no_grad():
            ref = reference(everything, use_cache=False).logits[:, ids.shape[1] - 1 :].log_softmax(-1)
        logp = torch.stack(logits, 1).log_softmax(-1)
        loss = loss + BETA * (logp.exp() * (logp - ref)).sum(-1).sum(1).mean()
    loss.backward()


def check(device: str) -> None:
    """Compare a small step with one of the reference's, in float32: the loss, and the gradient of every parameter.

    The same noise, and a dense backward: then both are the same numbers but for rounding.

    Raises:
        AssertionError: they differ.
    """
    policy, reference, reward = models("llama", vocab=1031, device=device)
    reward.requires_grad_(False)
    ids = torch.randint(0, policy.config.vocab_size, (3, PROMPT), device=device)
    found = []
    for backend in (None, "reference"):
        with gk.use_backend(backend) if backend else contextlib.nullcontext():
            loss = replay_step(policy, reference, reward, ids, 6, 2, eps=0.0)
        found.append([loss, *(parameter.grad.clone() for parameter in policy.parameters())])
        policy.zero_grad(set_to_none=True)
    for i, (mine, truth) in enumerate(zip(*found, strict=True)):
        error = float((mine - truth).norm() / truth.norm())
        assert error <= TOLERANCE, f"relative error of {'the loss' if i == 0 else f'gradient {i - 1}'} is {error:.1e}"


def measure(
    case: str, vocab: int, nats: float, way: str, batch: int, time_steps: int, rounds: int, device: str
) -> dict[str, float]:
    """Median seconds of a step and peak memory of the first, in this process."""
    policy, reference, reward = models(case, vocab, nats, device)
    reward.requires_grad_(False)
    ids = torch.randint(0, policy.config.vocab_size, (batch, PROMPT), device=device)

    def step(length: int) -> None:
        if way == "sequential":
            sequential_step(policy, reference, reward, ids, length)
        else:
            replay_step(policy, reference, reward, ids, length, "exact" if way == "exact" else int(way))
        policy.zero_grad(set_to_none=True)
        synchronize(device)

    step(2)  # libraries load, the probe runs
    gc.collect()
    before = memory.mark(device) / 2**30
    seconds, cpu = [], []
    peak = 0.0
    for i in range(rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        step(time_steps)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        peak = memory.peak(device) / 2**30 if i == 0 else peak
    middle = rounds // 2
    return {"seconds": sorted(seconds)[middle], "cpu": sorted(cpu)[middle], "peak_gib": peak, "before_gib": before}


def main() -> None:
    """Measure every way in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("llama", "qwen"), default="llama")
    parser.add_argument("--ways", default=None, help="comma-separated: 0, 4, ..., exact, sequential")
    parser.add_argument("--vocab", type=int, default=151936, help="of the Llama (default: Qwen 3's, %(default)s)")
    parser.add_argument(
        "--nats", type=float, default=3.5, help="entropy of the Llama's next token (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=None, help="steps to measure (default: 3, of Qwen 1)")
    parser.add_argument("--device", default="cpu", help="where the models are (default: %(default)s)")
    parser.add_argument("--length", type=int, default=None, help="tokens of a completion (default: 128, of Qwen 64)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write what was measured there, too")
    parser.add_argument("--inner", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    large = options.case == "qwen"
    batch, time_steps = (2, options.length or 64) if large else (4, options.length or 128)
    rounds = options.rounds or (1 if large else 3)
    if options.inner:
        sizes = batch, time_steps, rounds
        print(json.dumps(measure(options.case, options.vocab, options.nats, options.inner, *sizes, options.device)))
        return
    check(options.device)
    sure = "" if large else f", {options.nats} nats"
    print(
        f"{options.case}, V = {options.vocab}{sure}: B = {batch}, T = {time_steps}, "
        + (f"{torch.get_num_threads()} threads" if options.device == "cpu" else machine(options.device))
    )
    measured: dict[str, dict[str, float] | None] = {}
    for way in (options.ways or ("4,sequential" if large else "0,4,sequential")).split(","):
        command = [sys.executable, "-m", "benchmarks.training", "--case", options.case, "--inner", way]
        command += ["--vocab", str(options.vocab), "--nats", str(options.nats), "--rounds", str(rounds)]
        command += ["--device", options.device, "--length", str(time_steps)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            print(f"{way:>12}: failed, status {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
            measured[way] = None
            continue
        result = measured[way] = json.loads(run.stdout.strip().splitlines()[-1])
        print(f"{way:>12}: {result['seconds']:8.2f} s, {result['cpu']:8.2f} s of CPU   peak {result['peak_gib']:6.2f} GiB, "
              f"{result['peak_gib'] - result['before_gib']:.2f} of it during the step", flush=True)  # fmt: skip
    if options.json is not None:
        what = {"case": options.case, "vocab": options.vocab, "batch": batch, "length": time_steps}
        options.json.write_text(json.dumps(what | {"ways": measured}, indent=1))


if __name__ == "__main__":
    main()
