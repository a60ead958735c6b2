"""Two gloo processes: `python -m tests.support.distributed_training MODE PATH`.

They are forked, with the environment that torchrun would give them, from one process that has imported everything,
which takes longer than all they do.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.accelerator
import torch
import torch.distributed as dist

from grade_kernels import GumbelNoise
from grade_kernels.training import grade_loss
from tests.support.trainers import PROMPTS, build, stream, weights
from tests.support.training_models import BagReward, policy, prompts, worst_difference

SETTINGS = {"eps": 0.05, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5}


def trainer_run(path: Path, streaming: bool = False) -> None:
    """Train under DDP, each process with half of the batch; the first one saves the weights and what was logged."""
    dataset = stream() if streaming else None
    trainer = build(path, per_device_train_batch_size=2, dataset=dataset, **SETTINGS)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"weights": weights(trainer), "log": trainer.state.log_history[0]}, path / "result.pt")


def sharded_trainer_run(path: Path) -> None:
    """The same under FSDP2 as accelerate sets it up, with an evaluation."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from datasets import Dataset

    class Sharding(AcceleratorState):
        """Accelerate shards on accelerators only; as far as it asks, these two processes are such."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            if kwargs.get("fsdp_plugin") is not None:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            super().__init__(*args, **kwargs)

    accelerate.accelerator.AcceleratorState = Sharding
    wrapping = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    trainer = build(
        path, model=policy("llama", dtype=torch.float32), per_device_train_batch_size=2, fsdp=True, fsdp_config=wrapping,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}), **SETTINGS,
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.model, torch.distributed.fsdp.FSDPModule)
    result = {"weights": {name: p.full_tensor() for name, p in trainer.model.state_dict().items()}}
    result |= {"log": trainer.state.log_history[1], "metrics": trainer.evaluate()}
    if trainer.is_world_process_zero():
        torch.save(result, path / "result.pt")


def fsdp_step(path: Path) -> None:
    """A loss and its gradient under FSDP2, where completions end at different times, against the same in one process."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    for family in ("gpt2", "llama"):
        model, plain, reference = (policy(family, seed=seed) for seed in (0, 0, 1))
        layers = model.transformer.h if family == "gpt2" else model.model.layers
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        ids, mask = prompts((4, 2, 3, 5))
        options = {"max_new_tokens": 12, "eps": 0.0, "beta": 0.1, "ref_model": reference, "feedback_hops": "exact"}
        options |= {"eos_token_id": list(range(2, 9))}
        whole = grade_loss(plain, BagReward(), ids, mask, noise=GumbelNoise(4), **options)
        whole.loss.backward()
        lengths = whole.completion_mask.sum(1).view(2, 2).amax(1)
        assert lengths[0] != lengths[1], "the processes end at one time, so the test shows nothing about it"
        mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        noise = GumbelNoise(4, torch.arange(4)[mine])
        grade_loss(model, BagReward(), ids[mine], mask[mine], noise=noise, **options).loss.backward()
        truth = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        ours = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        difference = worst_difference(ours, truth)
        assert difference < (1e-10 if family == "gpt2" else 1e-6), (family, difference)
    if dist.get_rank() == 0:
        (path / "passed").write_text("yes")


def adapted(seed: int = 2) -> Any:
    """A policy with a LoRA adapter that has been trained, and a trained copy of its head."""
    import peft

    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(seed)
    return peft.get_peft_model(policy("llama"), config)


def moved(model: torch.nn.Module) -> None:
    """A step on everything that is trained, of whole models and shards alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2)


def fsdp_reference(path: Path) -> None:
    """A policy under FSDP2 against its own adapter as it came, copied before sharding or after, and in one process."""
    from torch.distributed.fsdp import fully_shard

    from grade_kernels.training import FrozenCopy, WithoutAdapter
    from grade_kernels.training.reference import changes_nothing

    dist.init_process_group("gloo")
    ids, mask = prompts((4, 2, 3, 5))
    options = {"max_new_tokens": 6, "eps": 0.0, "beta": 0.1, "feedback_hops": "exact"}
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for kind in ("before", "after", "without"):
        model, plain = adapted(), adapted()
        whole = FrozenCopy(plain) if kind != "without" else WithoutAdapter()
        reference = FrozenCopy(model) if kind == "before" else None
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if reference is None:
            reference = FrozenCopy(model) if kind == "after" else WithoutAdapter()
        for _ in range(2):
            for each in (model, plain):
                each.zero_grad()
            expected = grade_loss(plain, BagReward(), ids, mask, noise=GumbelNoise(4), ref_model=whole, **options)
            noise = GumbelNoise(4, torch.arange(4)[mine])
            ours = grade_loss(model, BagReward(), ids[mine], mask[mine], noise=noise, ref_model=reference, **options)
            torch.testing.assert_close(ours.kl, expected.kl[mine], rtol=1e-6, atol=1e-9)
            expected.loss.backward()
            ours.loss.backward()
            truth = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
            found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
            assert worst_difference(found, truth) < 1e-6, kind
            moved(model)
            moved(plain)
        assert expected.kl.min() > 1e-3
        assert not changes_nothing(model)
        if kind != "without":
            state = reference.state()
            assert all(torch.equal(value, whole.state()[name]) for name, value in state.items())
            if dist.get_rank() == 0:
                reference.save(path / kind, state)
            dist.barrier()
            reference.load(path / kind)
            with torch.no_grad():
                again = grade_loss(
                    model, BagReward(), ids[mine], mask[mine], noise=noise, ref_model=reference, **options
                )
                moved_on = grade_loss(plain, BagReward(), ids, mask, noise=GumbelNoise(4), ref_model=whole, **options)
            torch.testing.assert_close(again.kl, moved_on.kl[mine], rtol=1e-6, atol=1e-9)
    if dist.get_rank() == 0:
        (path / "passed").write_text("yes")


def adapter_run(path: Path) -> None:
    """Train an adapter that came trained under DDP, with a checkpoint, and go on from it."""
    from tests.support.trainers import build, weights

    options = SETTINGS | {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    build(path, model=adapted().float(), **options).train()
    trainer = build(path, model=adapted().float(), **options)
    trainer.train(resume_from_checkpoint=str(path / "checkpoint-1"))
    if trainer.is_world_process_zero():
        kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        torch.save({"weights": weights(trainer), "kls": kls}, path / "result.pt")


MODES: dict[str, Callable[[Path], None]] = {
    "ddp": trainer_run,
    "ddp-stream": partial(trainer_run, streaming=True),
    "fsdp": fsdp_step,
    "fsdp-reference": fsdp_reference,
    "adapter": adapter_run,
    "fsdp-trainer": sharded_trainer_run,
}


def run(mode: str, path: Path, rank: int) -> None:
    """What one of the processes does; it does not return."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    status = 1
    try:
        MODES[mode](path)
        dist.barrier()  # whoever leaves first closes connections that the other may still be reading
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread of gloo may still hold a tensor of the last collective; letting go of it while Python ends aborts.
        os._exit(status)


def main(mode: str, path: Path) -> int:
    """Run both; the first that fails ends the other, which would wait for it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    running = set()
    gc.freeze()  # accelerate collects garbage, for which either process would look at, and copy, all of this one's objects
    for rank in range(2):
        child = os.fork()
        if child == 0:
            run(mode, path, rank)
        running.add(child)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
