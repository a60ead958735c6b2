"""The example runs, and what it prints is about training."""

import re
import runpy

import torch
import torch.nn.functional as F

from tests.support import ROOT


def test_the_image_tokeniser_trains(monkeypatch, capsys):
    randint = torch.randint

    def few_steps(*arguments, **options):
        drawn = randint(*arguments, **options)
        return drawn[:3] if drawn.dim() == 5 else drawn

    monkeypatch.setattr(torch, "randint", few_steps)
    monkeypatch.setattr(F, "gumbel_softmax", F.gumbel_softmax)  # put back what the example replaces
    runpy.run_path(str(ROOT / "examples" / "dvae.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0].split(".")[0] for line in lines] == ["torch", "grade_kernels"]
    for line in lines:
        first, last = map(float, re.search(r"loss (\S+) to (\S+),", line).groups())
        assert last < first
