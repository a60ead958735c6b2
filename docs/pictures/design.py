"""Draws `docs/pictures/design.png`, the figure of `docs/design.md`: `python docs/pictures/design.py`.

The files that each box names are read from the table "Where each box lives" of `docs/design.md`, so that page and picture
cannot disagree. Needs matplotlib.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "design.md"
PICTURE = Path(__file__).resolve().with_suffix(".png")
PAPER, INK, MUTED = "#ffffff", "#1b1f24", "#57606a"  # the paper is opaque, so that the picture reads in dark mode, too
INPUT, FORWARD, KEPT, BACKWARD, RARE = "#eef1f4", "#dcebfb", "#fdf0cf", "#dff3e2", "#f7dede"


class Box(NamedTuple):
    """A box: centre, size, colour, and what it says under its title."""

    x: float
    y: float
    width: float
    height: float
    color: str
    text: str


BOXES = {
    "hidden": Box(1.6, 5.75, 2.8, 1.5, INPUT, "h [N, H], and the head W [V, H]"),
    "noise": Box(1.6, 3.6, 2.8, 1.7, INPUT, "g of (seed, row, token),\ncomputed wherever it is read"),
    "tile": Box(4.95, 4.7, 2.6, 1.9, FORWARD, "logits l = h W[tile]ᵀ of some\ntokens, then overwritten"),
    "sample": Box(8.3, 6.4, 2.8, 1.25, FORWARD, "running argmax of l + g"),
    "normaliser": Box(8.3, 4.7, 2.8, 1.35, FORWARD, "running log-sum-exp\nof z = (l + g) / τ"),
    "candidates": Box(8.3, 3.0, 2.8, 1.6, FORWARD, "tokens that the normaliser\nso far does not rule out"),
    "lookup": Box(12.0, 6.4, 2.9, 1.25, FORWARD, "E[ids]: the embedding returned"),
    "support": Box(12.0, 3.85, 2.9, 1.35, KEPT, "tokens v and their p_v, at most\n1/ε a row on average; saved"),
    "dense": Box(
        4.3, 0.75, 3.9, 1.4, RARE, "for rows whose candidates did not fit,\nor ε = 0: all tokens again, tile by tile"
    ),
    "rule": Box(8.3, 0.75, 2.8, 1.4, BACKWARD, "dl_v from p_v and dY_v;\nthe mean of dY leaves v out"),
    "gathers": Box(12.0, 0.75, 2.9, 1.4, BACKWARD, "dY_v = de · E[v], then\ndh = Σ dl_v W[v], dW[v] += dl_v h"),
}


class Arrow(NamedTuple):
    """An arrow along points, and what is written beside its label's place."""

    points: tuple[tuple[float, float], ...]
    label: str = ""
    place: tuple[float, float] = (0.0, 0.0)


ARROWS = (
    Arrow(((3.0, 5.6), (3.65, 5.1))),
    Arrow(((3.0, 3.8), (3.65, 4.3))),
    Arrow(((6.25, 5.1), (6.9, 6.2))),
    Arrow(((6.25, 4.7), (6.9, 4.7))),
    Arrow(((6.25, 4.3), (6.9, 3.2))),
    Arrow(((9.7, 6.4), (10.55, 6.4)), "ids", (10.12, 6.5)),
    Arrow(((9.7, 4.6), (10.55, 4.15)), "filter", (10.3, 4.48)),
    Arrow(((9.7, 3.1), (10.55, 3.55))),
    Arrow(((12.0, 3.17), (12.0, 1.45))),
    Arrow(((7.2, 2.2), (5.8, 1.45)), "overflow", (6.0, 1.78)),
    Arrow(((10.55, 0.95), (9.7, 0.95)), "dY_v", (10.12, 1.04)),
    Arrow(((9.7, 0.5), (10.55, 0.5)), "dl_v", (10.12, 0.24)),
)


def rooms(page: str) -> dict[str, list[str]]:
    """The files of each box, from the table of the page."""
    table = page.split("## Where each box lives", 1)[1].split("\n## ", 1)[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    found = {name: re.findall(r"`([^`]+)`", row[-1]) for name, *row in cells[2:]}
    if missing := BOXES.keys() - found.keys():
        raise ValueError(f"{PAGE.name} has no row for the boxes {', '.join(sorted(missing))}")
    return found


def described(found: dict[str, list[str]]) -> str:
    """What the picture's own description says, by which a test knows that it was drawn from the table as it is."""
    return "; ".join(f"{name}: {', '.join(found[name])}" for name in BOXES)


def draw(found: dict[str, list[str]]) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    plt.rcParams["font.family"] = "DejaVu Sans"  # comes with matplotlib, so the picture is the same everywhere
    figure, axis = plt.subplots(figsize=(12.4, 7.1), facecolor=PAPER)
    figure.subplots_adjust(0, 0, 1, 1)
    axis.set(xlim=(0, 13.6), ylim=(-0.1, 7.55))
    axis.axis("off")
    for y, text in ((7.2, "forward: one pass over the vocabulary"), (1.72, "backward")):
        axis.text(0.2, y, text, color=MUTED, fontsize=11, style="italic")
    axis.plot([0.2, 13.45], [2.05, 2.05], color="#d0d7de", linewidth=1, zorder=0)
    for name, box in BOXES.items():
        corner = box.x - box.width / 2, box.y - box.height / 2
        style = "round,pad=0,rounding_size=0.12"
        axis.add_patch(
            FancyBboxPatch(corner, box.width, box.height, boxstyle=style, facecolor=box.color, edgecolor=INK)
        )
        top = box.y + box.height / 2
        axis.text(box.x, top - 0.14, name, color=INK, fontsize=11.5, weight="bold", ha="center", va="top")
        axis.text(box.x, top - 0.46, box.text, color=INK, fontsize=9.2, ha="center", va="top", linespacing=1.25)
        files = "\n".join(path.removeprefix("grade_kernels/") for path in found[name])
        axis.text(
            box.x, box.y - box.height / 2 + 0.09, files, color=MUTED, fontsize=7.8, family="DejaVu Sans Mono",
            ha="center", va="bottom", linespacing=1.25,
        )  # fmt: skip
    for arrow in ARROWS:
        for start, end in zip(arrow.points, arrow.points[1:], strict=False):
            axis.add_patch(
                FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=INK, shrinkA=0, shrinkB=0)
            )
        if arrow.label:
            axis.text(*arrow.place, arrow.label, color=MUTED, fontsize=9.2, ha="center")
    figure.savefig(PICTURE, dpi=130, facecolor=PAPER, metadata={"Software": None, "Description": described(found)})
    plt.close(figure)


if __name__ == "__main__":
    draw(rooms(PAGE.read_text(encoding="utf-8")))
