"""The tables that `pamm ablate` makes, as data: rows, what each changes in the table's recipe, and the row that Δ is over.

The figures that the papers print stand in papers.yaml. This file imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from pamm.config.strict import ConfigError


@dataclass(frozen=True)
class AblationRow:
    """One row: a network, trained once per seed."""

    label: str
    recipe: str = ""
    """The variants of the table's recipe, as "+no-experts", none for the recipe itself; or another recipe's name."""
    printed: int | None = None
    """Place of the row in the paper's table, from 0; None where the paper's table does not have it."""
    per_task: bool = False
    """One network for every task on its own; the row holds the score that each has at its task."""

    def recipe_on(self, base: str) -> str:
        """The recipe's full name where `base` is the table's recipe."""
        return self.recipe if self.recipe and not self.recipe.startswith("+") else base + self.recipe


@dataclass(frozen=True)
class AblationTable:
    """One table."""

    name: str
    title: str
    base: str
    """The recipe that the rows derive from; the paper's own."""
    rows: tuple[AblationRow, ...]
    baseline: str | None = None
    """Label of the row that Δ compares with; None: the table has no Δ."""
    paper: tuple[str, str] | None = None
    """Paper and number of the printed table among `pamm.evaluation.gain.paper_tables()`."""
    cost: bool = False
    """Whether the table has the columns of parameters and FLOP."""
    curve: bool = False
    """The scores at every evaluation of the one row's training, in place of its last."""
    fixed: bool = False
    """The rows name their recipes; there is no other base."""
    dataset: str | None = None
    """Data set of the printed table, where the paper has one of each."""
    others: bool = False
    """Whether the printed rows of other methods are shown too."""


SINGLE = AblationRow("Single-task: 2·Swin", "+swin-blocks", 0, per_task=True)
REFERENCE = AblationRow("Single-task: 2·Swin (not in the paper's table)", "+swin-blocks", per_task=True)
TOP_K = (1, 3, 5, 7, 9, 11, 13, 15)

_ALL = (
    *(
        AblationTable(
            f"pamm-1-{dataset}",
            f"Comparison with other methods, {words}",
            f"{dataset}-pamm-l",
            (
                AblationRow("PAMM, ViT-B", f"{dataset}-pamm-b", first),
                AblationRow("baseline, ViT-L", f"{dataset}-pamm-l+baseline", first + 1),
                AblationRow("PAMM, ViT-L", f"{dataset}-pamm-l", last),
            ),
            "baseline, ViT-L",
            ("PAMM", "I"),
            fixed=True,
            dataset=dataset,
            others=True,
        )
        for dataset, words, first, last in (("pascal", "PASCAL-Context", 5, 11), ("nyud", "NYUD-v2", 6, 12))
    ),
    AblationTable(
        "pamm-2",
        "Task Convolution (TC) and Parameter Aware Mamba Experts (PAME)",
        "pascal-pamm-b",
        (
            AblationRow("without TC and PAME", "+baseline", 0),
            AblationRow("TC", "+task-conv", 1),
            AblationRow("TC and PAME", "", 2),
        ),
        "without TC and PAME",
        ("PAMM", "II"),
    ),
    AblationTable(
        "pamm-3",
        "Parameter Experts",
        "pascal-pamm-b",
        (
            AblationRow("experts on B and C", "", 0),
            AblationRow("experts on C", "+experts-c", 1),
            AblationRow("experts on B", "+experts-b", 2),
            AblationRow("without experts", "+no-experts", 3),
        ),
        "without experts",
        ("PAMM", "III"),
    ),
    AblationTable(
        "pamm-4",
        "Parameter Priors",
        "pascal-pamm-b",
        (
            AblationRow("priors on B and C", "", 0),
            AblationRow("prior on B", "+prior-b", 1),
            AblationRow("prior on C", "+prior-c", 2),
            AblationRow("without priors", "+no-priors", 3),
        ),
        "without priors",
        ("PAMM", "IV"),
    ),
    AblationTable(
        "pamm-5",
        "Number of experts kept",
        "pascal-pamm-b",
        tuple(AblationRow(f"top-{k}", "" if k == 9 else f"+top-{k}", i) for i, k in enumerate(TOP_K)),
        "top-9",
        ("PAMM", "V"),
    ),
    AblationTable(
        "pamm-6",
        "Scan orders",
        "pascal-pamm-b",
        (AblationRow("S-scan", "+s-scan", 0), AblationRow("Z-scan", "+z-scan", 1), AblationRow("H-scan", "", 2)),
        "S-scan",
        ("PAMM", "VI"),
    ),
    AblationTable(
        "pamm-7",
        "Number of stages",
        "pascal-pamm-b",
        (
            AblationRow("1 stage", "+stages-1", 0),
            AblationRow("2 stages", "+stages-2", 1),
            AblationRow("3 stages", "+stages-3", 2),
            AblationRow("4 stages", "", 3),
        ),
        "1 stage",
        ("PAMM", "VII"),
    ),
    AblationTable(
        "pamm-8",
        "Number of scan directions",
        "pascal-pamm-b",
        (
            AblationRow("1 direction", "+orders-1", 0),
            AblationRow("2 directions", "+orders-2", 1),
            AblationRow("4 directions", "", 2),
        ),
        "4 directions",
        ("PAMM", "VIII"),
    ),
    AblationTable(
        "pamm-fig8",
        "Fig. 8: scores during training",
        "pascal-pamm-l",
        (AblationRow("PAMM"),),
        curve=True,
    ),
    *(
        AblationTable(
            f"mtmamba-1-{dataset}",
            f"Comparison with other methods, {words}",
            f"{dataset}-mtmamba",
            (AblationRow("MTMamba, Swin-L", f"{dataset}-mtmamba", 8),),
            None,
            ("MTMamba", "1"),
            fixed=True,
            dataset=dataset,
            others=True,
        )
        for dataset, words in (("nyud", "NYUD-v2"), ("pascal", "PASCAL-Context"))
    ),
    AblationTable(
        "mtmamba-2",
        "STM and CTM blocks",
        "nyud-mtmamba",
        (
            SINGLE,
            AblationRow("Multi-task: 2·Swin", "+swin-blocks", 1),
            AblationRow("1·STM", "+stm-1", 2),
            AblationRow("2·STM", "+stm-2", 3),
            AblationRow("3·STM", "+stm-3", 4),
            AblationRow("2·STM + 1·CTM", "", 5),
        ),
        SINGLE.label,
        ("MTMamba", "2"),
        cost=True,
    ),
    AblationTable(
        "mtmamba-3",
        "The Mamba-based feature extractor (MFE)",
        "nyud-mtmamba",
        (REFERENCE, AblationRow("W-MSA in place of MFE", "+attention", 0), AblationRow("MTMamba", "", 1)),
        REFERENCE.label,
        ("MTMamba", "3"),
        cost=True,
    ),
    AblationTable(
        "mtmamba-4",
        "The linear gate",
        "nyud-mtmamba",
        (
            REFERENCE,
            AblationRow("W-MSA in place of the linear gate", "+attention-gate", 0),
            AblationRow("MTMamba", "", 1),
        ),
        REFERENCE.label,
        ("MTMamba", "4"),
        cost=True,
    ),
    AblationTable(
        "mtmamba-5",
        "The gate g of the CTM block",
        "nyud-mtmamba",
        (
            REFERENCE,
            AblationRow("g = 0", "+gate-0", 0),
            AblationRow("g = 1", "+gate-1", 1),
            AblationRow("adaptive g", "", 2),
        ),
        REFERENCE.label,
        ("MTMamba", "5"),
    ),
    AblationTable(
        "mtmamba-6",
        "Backbones",
        "nyud-mtmamba",
        (
            AblationRow("Swin-Tiny", "+swin-t", 0),
            AblationRow("Swin-Small", "+swin-s", 1),
            AblationRow("Swin-Base", "+swin-b", 2),
            AblationRow("Swin-Large", "", 3),
        ),
        None,
        ("MTMamba", "6"),
    ),
    AblationTable(
        "benchmark",
        "Synthetic rooms: nine networks from random weights",
        "rooms-pamm",
        (
            AblationRow("baseline", "rooms-pamm+baseline"),
            AblationRow("TC", "rooms-pamm+task-conv"),
            AblationRow("PAMM", "rooms-pamm"),
            AblationRow("PAMM without experts", "rooms-pamm+no-experts"),
            AblationRow("PAMM without priors", "rooms-pamm+no-priors"),
            AblationRow("PAMM with S-scan", "rooms-pamm+s-scan"),
            AblationRow("PAMM with Z-scan", "rooms-pamm+z-scan"),
            AblationRow("MTMamba", "rooms-mtmamba"),
            AblationRow("MTMamba++", "rooms-mtmamba-plus"),
        ),
        "baseline",
        cost=True,
        fixed=True,
    ),
)

TABLES: dict[str, AblationTable] = {table.name: table for table in _ALL}
"""Name → table."""


def get_table(name: str) -> AblationTable:
    """A table of the papers, by name.

    Args:
        name: e.g. "pamm-2".

    Returns:
        The table.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one and lists all.
    """
    if name not in TABLES:
        near = get_close_matches(name, TABLES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"unknown table '{name}'.{hint} Known tables: {', '.join(TABLES)}")
    return TABLES[name]
