"""What runs on this machine, and whether it computes the right thing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from itertools import product

import torch

import grade_kernels as gk
from grade_kernels import _build

__all__ = ["check", "run"]

# Odd on purpose: more than one tile, and nothing that divides.
ROWS, VOCAB, WIDTH, HIDDEN, TAU = 11, 1031, 7, 33, 0.7
TOLERANCE = 1e-4


def run() -> int:
    """Print the report; returns 1 if a self-check failed, else 0."""
    _title("Versions")
    for package in ("grade-kernels", "torch", "triton"):
        _line(package, _version(package))
    _line("python", f"{platform.python_version()} on {platform.platform()}")
    library, info = _build.library_path(), _build.build_info()
    if library is None:
        _line("csrc", _build.missing_reason() or "")
    else:
        _line("csrc", f"{library.name}, built with {info.get('compiler', 'unknown')}, torch {info.get('torch', '?')}")
        _line("", info.get("flags") or "")
    if _build.cuda_library_path() is not None:
        _line("csrc/cuda", f"built with {info.get('cuda_compiler', 'unknown')}")
        _line("", info.get("cuda_flags") or "")

    _title("Devices")
    _line("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            _line(f"{accelerator.type}:{index}", _device_name(accelerator.type, index))
        devices.append(torch.device(accelerator.type, torch.accelerator.current_device_index()))
    else:
        _line("accelerators", "none")

    _title("Backends")
    status = gk.backends.status()
    for name, reason in status.items():
        _line(name, "available" if reason is None else f"not available: {reason}")
    for device in devices:
        try:
            _line(f"chosen for {device}", gk.backends.select(device, torch.float32))
        except ValueError as error:  # GRADE_KERNELS_BACKEND asks for what cannot be had
            _line(f"chosen for {device}", str(error))

    _title("Ways through a head of the triton backend")
    for name, text in _head_ways(devices[-1]) if status["triton"] is None else [("", "Triton cannot run here")]:
        _line(name, text)

    _title(f"Self-check against the reference ({ROWS} rows, {VOCAB} tokens)")
    failures = 0
    available = [name for name, reason in status.items() if reason is None]
    for name, device in product(available, devices):
        try:
            verdict = check(name, device)
        except Exception as error:  # whatever a broken installation raises is the finding
            verdict = f"FAILED: {type(error).__name__}: {error}"
        failures += verdict.startswith("FAILED")
        _line(f"{name} on {device}", verdict)
    return 1 if failures else 0


def _head_ways(device: torch.device) -> list[tuple[str, str]]:
    """Which way is asked for, and which were measured on a device."""
    from grade_kernels.backends.triton import head_choice
    from grade_kernels.backends.triton.sizes import TritonSizes
    from grade_kernels.backends.triton.targets import INTERPRETED

    found = [("GRADE_KERNELS_HEAD", os.environ.get("GRADE_KERNELS_HEAD") or "not set: auto")]
    if INTERPRETED:
        return [*found, ("auto", "tiles: nothing is measured in Triton's interpreter")]
    choices = head_choice.choices()
    found.append(("measured ways", str(choices.path or "not kept: the user has no home")))
    known = choices.known(head_choice.environment(device, TritonSizes().chunk_bytes))
    for shape, (way, seconds) in known.items():
        times = (f"{name} {'fails' if s is None else f'{1e3 * s:.3g} ms'}" for name, s in seconds.items())
        found.append((way, f"{shape} ({', '.join(times)})"))
    return found if known else [*found, ("", "none yet: each class of shapes is measured at its first call")]


def check(backend: str, device: torch.device) -> str:
    """Compare a backend with the reference: samples, values and gradients, of given logits and through a head.

    Returns:
        "ok (...)", "not served: why", or "FAILED: what differs".
    """
    with gk.use_backend(backend):
        try:
            gk.backends.select(device, torch.float32)
        except ValueError as error:
            return f"not served: {error}"
    noise = gk.GumbelNoise(20260101)
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(ROWS, VOCAB, generator=generator)).to(device)
    logits[:, 3] = -torch.inf
    table = torch.randn(VOCAB, WIDTH, generator=generator).to(device)
    weights = torch.randn(ROWS, VOCAB, generator=generator).to(device)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(device)
    heads = [(torch.randn(VOCAB, HIDDEN, generator=generator) / 2).to(device) for _ in range(2)]
    outcomes = []
    for functions in (gk.reference, gk):
        x, e, h, w = (start.clone().requires_grad_() for start in (logits, table, hidden, heads[0]))
        with gk.use_backend(backend):
            ids = functions.gumbel_sample(x, noise=noise)
            soft = functions.gumbel_softmax(x, TAU, noise=noise)
            hard = functions.gumbel_ste(x, TAU, noise=noise)
            embedded, embedded_ids, logprobs = functions.gumbel_ste_embedding(x, e, TAU, noise=noise)
            soft_gradient, hard_gradient = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (soft, hard))
            loss = (embedded * weights[:, :WIDTH]).sum() + logprobs.sum()
            logits_gradient, table_gradient = torch.autograd.grad(loss, (x, e))
            # The reference is exact at every eps.
            looked_up, head_ids, head_logprobs = functions.linear_gumbel_ste(h, w, e, TAU, noise=noise, eps=0.0)
            kl = functions.linear_kl(h, w, hidden, heads[1], eps=0.0)
            loss = (looked_up * weights[:, :WIDTH]).sum() + head_logprobs.sum() + kl.sum()
            hidden_gradient, head_gradient = torch.autograd.grad(loss, (h, w))
        values = {
            "gumbel_sample": ids,
            "gumbel_softmax": soft,
            "gumbel_softmax gradient": soft_gradient,
            "gumbel_ste": hard,
            "gumbel_ste gradient": hard_gradient,
            "gumbel_ste_embedding": embedded,
            "gumbel_ste_embedding ids": embedded_ids,
            "gumbel_ste_embedding logprobs": logprobs,
            "gumbel_ste_embedding gradient of logits": logits_gradient,
            "gumbel_ste_embedding gradient of the table": table_gradient,
            "linear_gumbel_ste": looked_up,
            "linear_gumbel_ste ids": head_ids,
            "linear_gumbel_ste logprobs": head_logprobs,
            "linear_kl": kl,
            "gradient of the hidden states": hidden_gradient,
            "gradient of the head": head_gradient,
        }
        outcomes.append({what: value.detach() for what, value in values.items()})
    worst = 0.0
    for what, expected in outcomes[0].items():
        actual = outcomes[1][what]
        if expected.dtype == torch.int64:
            if not torch.equal(actual, expected):
                return f"FAILED: {what} differs: {actual.tolist()} instead of {expected.tolist()}"
            continue
        deviation = float((actual - expected).abs().max() / expected.abs().max())
        if not deviation <= TOLERANCE:  # not <=, so that NaN fails
            return f"FAILED: {what} deviates by {deviation:.1e}, more than {TOLERANCE:.0e}"
        worst = max(worst, deviation)
    return f"ok (same ids; values and gradients within {worst:.1e})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_name(kind: str, index: int) -> str:
    module = getattr(torch, kind, None)
    if module is None or not hasattr(module, "get_device_name"):
        return kind
    name = str(module.get_device_name(index))
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        name += f", {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}.{properties.minor}"
    return name


def _title(text: str) -> None:
    print(f"\n{text}")


def _line(name: str, text: str) -> None:
    first, *others = text.splitlines() or [""]
    print(f"  {name:<20} {first}", *others, sep="\n" + " " * 23)
