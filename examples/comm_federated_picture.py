"""Who pays for equal weights: the loss of every client by its speed, as one HTML page.

python examples/comm_federated_picture.py [--quick] [FILE.html]

The clients are those of comm_federated.py: the slowest hold data that nobody else has. An asynchronous server that gives all
results one weight hears the fast ones more often and fits them at the cost of the slow ones; unbiased weights make up for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from comm_federated import clients, network
from torch import nn

from weft.comm.waits import Clock
from weft.federated import Asynchronous, LocalSGD
from weft.pages import document, legend

COLOURS = {"equal": "c3", "unbiased": "c1"}


def picture(seconds: list[float], losses: dict[str, list[float]]) -> str:
    """SVG: loss over the seconds of a job, a line and its points for each kind of weights."""
    top, left, width, height = 1.1 * max(map(max, losses.values())), 70, 720, 320
    x = lambda when: left + (width - left - 20) * when / max(seconds)
    y = lambda loss: height - 40 - (height - 60) * loss / top
    text = lambda at, below, words, anchor: f'<text x="{at:.0f}" y="{below:.0f}" text-anchor="{anchor}">{words}</text>'
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss of each client by its speed">']
    for k in range(5):
        loss = top * k / 4
        parts.append(f'<path d="M{left} {y(loss):.1f}H{width - 20}" style="stroke: var(--line)"/>')
        parts.append(text(left - 8, y(loss) + 4, f"{loss:.2g}", "end"))
    parts += [text(x(when), height - 20, f"{when:g}", "middle") for when in seconds]
    parts.append(text((left + width) / 2, height - 2, "seconds a job takes this client", "middle"))
    for name, values in losses.items():
        points = [(x(when), y(loss)) for when, loss in zip(seconds, values, strict=True)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" style="fill: none; stroke: var(--{COLOURS[name]}); stroke-width: 2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" class="{COLOURS[name]}"/>' for a, b in points]
    return "".join([*parts, "</svg>"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less time")
    parser.add_argument("file", nargs="?", default="slow_clients.html", type=Path)
    options = parser.parse_args()
    people, loss, losses = clients(8), nn.functional.mse_loss, {}
    for weights in COLOURS:
        run = Asynchronous(network(), people, loss, Clock(0.25), weights, LocalSGD(10, 0.01), every=1.0)
        model, _ = run.simulate(10.0 if options.quick else 60.0)
        with torch.no_grad():
            losses[weights] = [loss(model(x), y).item() for x, y in (client.data for client in people)]
        print(f"{weights:10} fastest {losses[weights][0]:.5f}, slowest {losses[weights][-1]:.5f}")
    drawn = picture([client.seconds for client in people], losses)
    words = "Mean squared error of each client after the same time: weights that ignore speed, and unbiased ones."
    page = document(
        "The loss of slow clients",
        [f"<p>{words}</p><section>", legend({f"{n} weights": c for n, c in COLOURS.items()}), drawn, "</section>"],
    )
    options.file.write_text(page)
    print(f"drawn in {options.file}")


if __name__ == "__main__":
    main()
