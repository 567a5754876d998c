"""What a data set holds, and what is wrong with it: the content of `pamm data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pamm.data.sample import DATASETS, DataError, Dataset
from pamm.images import ImageError, image_size
from pamm.tasks import create_task

if TYPE_CHECKING:
    from pamm.experiment import DataConfig


@dataclass
class SplitReport:
    """One split: numbers of images and labels, (H, W) of the smallest and largest image by area, problems found."""

    split: str
    images: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and no mistake, e.g. fewer images than published."""


def inspect_dataset(
    config: DataConfig, splits: Iterable[str] = ("train", "val"), *, deep: bool = False
) -> list[SplitReport]:
    """One report per split; problems are collected, not raised.

    Without `deep`, files are listed and the headers of images read. With `deep`, every image and label is read. Of
    synthetic data only what was made counts; nothing is made here (see `SyntheticDataset.prepare`).
    """
    reports = [SplitReport(split) for split in splits]
    for report in reports:
        try:
            options = DATASETS[config.name].options(config)
            tasks = {name: create_task(name, **values) for name, values in options.items()}
            dataset = DATASETS[config.name].open(config, report.split, tasks)
        except DataError as error:
            report.problems.append(str(error))
            continue
        absent = set(dataset.absent())
        present = [index for index in range(len(dataset)) if index not in absent]
        report.images = len(present)
        report.labels, report.notes = dataset.labelled(), dataset.notes()
        if not deep:
            report.problems += dataset.problems()
        sizes = list((_read_all if deep else _read_headers)(dataset, present, report))
        report.smallest = min(sizes, key=_area, default=None)
        report.largest = max(sizes, key=_area, default=None)
    return reports


def format_inspection(reports: Iterable[SplitReport], *, most: int = 20) -> str:
    """The reports as text, with at most `most` problems per split."""
    lines = []
    for report in reports:
        sizes = (
            f", {_by(report.smallest)} to {_by(report.largest)} pixels" if report.smallest and report.largest else ""
        )
        lines.append(f"{report.split}: {report.images} images{sizes}")
        lines += [f"  {name}: {count} labels" for name, count in report.labels.items()]
        lines += [f"  note: {note}" for note in report.notes]
        lines += [f"  problem: {problem}" for problem in report.problems[:most]]
        if len(report.problems) > most:
            lines.append(f"  and {len(report.problems) - most} more problems")
    return "\n".join(lines)


def _read_all(dataset: Dataset, present: Iterable[int], report: SplitReport) -> Iterator[tuple[int, int]]:
    for index in present:
        try:
            yield dataset[index].size
        except DataError as error:
            report.problems.append(str(error))


def _read_headers(dataset: Dataset, present: Iterable[int], report: SplitReport) -> Iterator[tuple[int, int]]:
    for index in present:
        path = dataset.image_path(index)
        if path is None:
            return
        try:
            yield image_size(path)
        except ImageError as error:
            report.problems.append(str(error))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
