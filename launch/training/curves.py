"""The curve of a fit: a picture, and torch's tensorboard writer where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


def draw(file: Path, title: str, curve: Sequence[dict[str, float]]) -> bool:
    """Write a PNG of the loss and of the held-out objective; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot([row["step"] for row in curve], [row["loss"] for row in curve], color="tab:blue", linewidth=0.8, label="loss")
    left.set(xlabel="step", ylabel="loss", title=title)
    right = left.twinx()
    held = [row for row in curve if "held_out_objective" in row]
    right.plot([row["step"] for row in held], [row["held_out_objective"] for row in held], "o-", color="tab:orange", markersize=3)
    right.set_ylabel("held-out objective")
    figure.savefig(file, dpi=120)
    return True


def tensorboard(folder: Path | None) -> Callable[[dict[str, float]], None]:
    """A function that writes a row of the curve. Raises: ImportError where torch has no tensorboard writer."""
    if folder is None:
        return lambda row: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, int(row["step"]))
        writer.flush()

    return write
