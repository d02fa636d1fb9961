"""Draw the card that other sites show with a link to the book, and the icon of its pages.

    python tools/draw_card.py
"""
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"
ICON = ("#.#", ".#.", "#.o")  # weights that stay, weights that went, and a shared value
INK, PAPER, LINE = "#16202b", "#ffffff", "#2a3947"


def grid(ax, colours, left, size=26, gap=7):
    "A square of small squares, one per weight; None leaves only an outline."
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            place = (left + column * (size + gap), 470 - row * (size + gap))
            ax.add_patch(plt.Rectangle(place, size, -size, facecolor=colour or INK, edgecolor=colour or LINE, linewidth=1))


def stages(n=9, seed=4):
    "One toy weight matrix: dense, then pruned, then with three shared values."
    weights = np.random.default_rng(seed).normal(size=(n, n))
    dense = [[plt.cm.RdBu((w + 2.2) / 4.4) for w in row] for row in weights]
    keep = np.abs(weights) > 0.85
    pruned = [[c if k else None for c, k in zip(*pair)] for pair in zip(dense, keep)]
    shared = [["#56B4E9" if w > 0 else "#D55E00" if w > -1.4 else "#B37400" for w in row] for row in weights]
    return dense, pruned, [[c if k else None for c, k in zip(*pair)] for pair in zip(shared, keep)]


def icon():
    "A square of nine weights as SVG: four of one value, one of another, and what was pruned left faint."
    paint = {"#": 'fill="#56b4e9"', "o": 'fill="#d55e00"', ".": 'fill="#ffffff" fill-opacity=".14"'}
    squares = [f'  <rect x="{5 + 8 * x}" y="{5 + 8 * y}" width="6" height="6" rx="1" {paint[mark]}/>'
               for y, line in enumerate(ICON) for x, mark in enumerate(line)]
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">\n  <rect width="32" height="32" rx="6" fill="{INK}"/>'
    return "\n".join([frame, *squares, "</svg>\n"])


def main():
    (IMAGES / "favicon.svg").write_text(icon(), encoding="utf-8")
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=INK)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, 1200), ylim=(0, 630))
    ax.axis("off")
    ax.text(80, 540, "nncomp", color=PAPER, fontsize=44, weight="bold", va="center")
    for left, colours, word in zip((80, 455, 830), stages(), ("dense", "prune", "share")):
        grid(ax, colours, left)
        ax.text(left, 150, word, color="#9fb0c0", fontsize=19, va="center")
    ax.text(80, 75, "Neural network compression: a book that runs, a package that is tested", color=PAPER, fontsize=20, va="center")
    fig.savefig(IMAGES / "card.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
