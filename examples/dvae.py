"""A DALL-E style image tokeniser, trained with PyTorch's Gumbel-softmax and then with ours: `python examples/dvae.py`."""

import time

import torch
import torch.nn.functional as F
from torch import nn

import grade_kernels as gk


class DVAE(nn.Module):
    """A patch of 8 x 8 pixels becomes one token of the vocabulary, and a token becomes a patch again."""

    def __init__(self, vocab: int = 8192, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.GELU(), nn.Conv2d(width, vocab, 1))
        self.decoder = nn.Sequential(nn.Conv2d(vocab, width, 1), nn.GELU(), nn.ConvTranspose2d(width, 3, 8, stride=8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The images, as their tokens tell them: logits and tokens are `[B, vocab, height / 8, width / 8]`."""
        logits = self.encoder(images)
        return self.decoder(F.gumbel_softmax(logits, tau=1.0, hard=True, dim=1))


if __name__ == "__main__":
    patches = torch.randint(2, (60, 4, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    for gumbel_softmax in (F.gumbel_softmax, gk.gumbel_softmax):
        F.gumbel_softmax = gumbel_softmax  # the second time, this line is the whole replacement
        torch.manual_seed(0)
        model, losses, start = DVAE(), [], time.perf_counter()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for colours in patches:  # each patch has one of eight colours
            images = F.interpolate(colours, scale_factor=8)
            losses.append(F.mse_loss(model(images), images))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        milliseconds = 1e3 * (time.perf_counter() - start) / len(losses)
        print(f"{gumbel_softmax.__module__}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {milliseconds:.0f} ms a step")
