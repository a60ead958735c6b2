"""Two gloo processes: `python -m torch.distributed.run --nproc-per-node 2 distributed_training.py MODE PATH`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from grade_kernels import GumbelNoise
from grade_kernels.training import grade_loss
from tests.training_models import BagReward, policy, prompts, worst_difference

SETTINGS = {"eps": 0.0, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5}


def trainer_run(path: Path) -> None:
    """Train under DDP, each process with half of the batch; the first one saves the weights and what was logged."""
    from tests.test_grade_trainer import build, weights

    trainer = build(path, per_device_train_batch_size=2, **SETTINGS)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"weights": weights(trainer), "log": trainer.state.log_history[0]}, path / "result.pt")


def fsdp_step(path: Path) -> None:
    """A loss and its gradient under FSDP2, against the same in one process."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    for family in ("gpt2", "llama"):
        model, plain, reference = (policy(family, seed=seed) for seed in (0, 0, 1))
        layers = model.transformer.h if family == "gpt2" else model.model.layers
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        ids, mask = prompts((4, 2))
        options = {"max_new_tokens": 5, "eps": 0.0, "beta": 0.1, "ref_model": reference, "feedback_hops": "exact"}
        # Every process has the same batch, so the mean over them is the gradient of one.
        for target in (model, plain):
            grade_loss(target, BagReward(), ids, mask, noise=GumbelNoise(3), **options).loss.backward()
        truth = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        ours = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        difference = worst_difference(ours, truth)
        assert difference < (1e-10 if family == "gpt2" else 1e-6), (family, difference)
    if dist.get_rank() == 0:
        (path / "passed").write_text("yes")
    dist.barrier()  # whoever leaves first closes connections that the other may still be reading
    dist.destroy_process_group()


if __name__ == "__main__":
    {"ddp": trainer_run, "fsdp": fsdp_step}[sys.argv[1]](Path(sys.argv[2]))
