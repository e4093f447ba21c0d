"""Accuracies and speeds that others published: printed beside our tables, never used as our baseline."""

from __future__ import annotations

from dataclasses import dataclass

from lra.records.markup import Block, Grid, Heading, Text
from lra.records.stats import mean_sd


@dataclass(frozen=True)
class Publication:
    """Numbers of one source. `caveat` says why they are not comparable with a column of ours."""

    title: str
    citation: str
    caveat: str
    rows: dict[str, tuple[float, ...]]


TASKS = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder")  # order of every row of ACCURACY, percent

ACCURACY = (
    Publication(
        "Long Range Arena",
        "Tay et al. 2020, arXiv:2011.04006",
        "JAX; encoder sizes of its own, mostly larger than the shared block of this suite. The published "
        "Performer configurations use deterministic ReLU features, not random softmax features, on four of "
        "the five tasks, and 2 features on ListOps.",
        {
            "Transformer": (36.37, 64.27, 57.46, 42.44, 71.40),
            "BigBird": (36.05, 64.02, 59.29, 40.83, 74.87),
            "Linear Transformer": (16.13, 65.90, 53.09, 42.34, 75.30),
            "Linformer": (35.70, 53.94, 52.27, 38.56, 76.34),
            "Local attention": (15.82, 52.98, 53.39, 41.46, 66.63),
            "Longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
            "Performer": (18.01, 65.40, 53.82, 42.77, 77.05),
            "Reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
            "Synthesizer": (36.99, 61.68, 54.67, 41.61, 69.45),
        },
    ),
    Publication(
        "PyTorch replication in Nystromformer",
        "Xiong et al. 2021, arXiv:2102.03902",
        "The 2-layer encoder of width 64 that the paper preset here follows; its own data and schedule.",
        {
            "softmax": (37.10, 65.02, 79.35, 38.20, 74.16),
            "Linformer": (37.25, 55.91, 79.37, 37.84, 67.60),
            "Nystromformer": (37.15, 65.52, 79.56, 41.58, 70.94),
            "Performer": (18.80, 63.81, 78.62, 37.07, 69.87),
            "Reformer": (19.05, 64.88, 78.64, 43.29, 69.36),
        },
    ),
    Publication(
        "PyTorch replication in Skyformer",
        "Chen et al. 2021, arXiv:2111.00035",
        "Mean of 3 seeds; ListOps without its brackets, which is another task.",
        {
            "softmax": (38.37, 61.95, 80.69, 40.57, 65.26),
            "Linformer": (37.45, 58.93, 78.19, 37.96, 60.93),
            "Performer": (38.02, 64.19, 80.04, 41.43, 66.30),
            "Reformer": (37.68, 62.93, 78.99, 48.87, 66.49),
        },
    ),
    Publication(
        "State of the art, other protocol",
        "S4: Gu et al. 2021, arXiv:2111.00396; S5: Smith et al. 2022, arXiv:2208.04933; "
        "MEGA: Ma et al. 2022, arXiv:2209.10655",
        "Real-valued pixels, larger models: outside lra-v1, where pixels are 256 symbols and sizes equal.",
        {
            "S4": (59.60, 86.82, 90.90, 88.65, 94.20),
            "S5": (62.15, 89.31, 91.40, 88.00, 95.33),
            "MEGA": (63.14, 90.43, 91.25, 90.44, 96.01),
        },
    ),
)

LENGTHS = ("1K", "2K", "3K", "4K")
SPEED = Publication(
    "Long Range Arena, efficiency",
    "Tay et al. 2020, arXiv:2011.04006",
    "Text, batch 32, on 4 x 4 TPU v3 chips; steps per second at four lengths, then peak memory in GB.",
    {
        "Transformer": (8.1, 4.9, 2.3, 1.4, 0.85, 2.65, 5.51, 9.48),
        "Linear Transformer": (9.1, 9.3, 8.6, 7.8, 0.37, 0.57, 0.80, 1.03),
        "Linformer": (9.3, 9.1, 8.5, 7.7, 0.37, 0.55, 0.99, 0.99),
        "Performer": (9.5, 9.4, 8.7, 8.0, 0.37, 0.59, 0.82, 1.06),
        "Reformer": (4.4, 2.2, 1.5, 1.1, 0.48, 0.99, 1.53, 2.28),
    },
)


def blocks() -> list[Block]:
    """The block "Published, not rerun": one table per source, averages computed here."""
    intro = "Accuracy in percent, from the papers; other data, code and sizes: no row compares with one above."
    tables: list[Block] = [Heading("Published, not rerun"), Text(intro)]
    for source in ACCURACY:
        averaged = {name: (*row, mean_sd(row)[0]) for name, row in source.rows.items()}
        tables += _table(source, (*TASKS, "average"), averaged)
    header = (*(f"{n} steps/s" for n in LENGTHS), *(f"{n} GB" for n in LENGTHS))
    return tables + _table(SPEED, header, SPEED.rows)


def _table(source: Publication, header: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> list[Block]:
    def cell(value, column):
        return f"{value:.1f}" if column.endswith("steps/s") else f"{value:.2f}"

    lines = [(name, *map(cell, row, header)) for name, row in rows.items()]
    return [Text(f"{source.title} ({source.citation}). {source.caveat}"), Grid(("published", *header), tuple(lines))]
