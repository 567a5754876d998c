"""Content of a data set, errors and doubtful values: for `pamm data`, and for the notes before training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pamm.data.listing import preview
from pamm.data.sample import DataError, Dataset, dataset_class
from pamm.files import escaped
from pamm.images import ImageError, image_size
from pamm.tasks import LabelStatistics, Task, create_task

if TYPE_CHECKING:
    from pamm.config.experiment import DataConfig

SAMPLED = 50
"""Largest number of labels of each task and split that are read before training."""

RARE = 10
"""Factor by which this number grows while a class is in none of the labels."""


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
    """Notes that are no mistakes, e.g. fewer images than published, a class that no label holds."""
    contents: dict[str, str] = field(default_factory=dict)
    """Task → content of its labels, in words, if they were read."""


def inspect_dataset(
    config: DataConfig,
    splits: Iterable[str] = ("train", "val"),
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    deep: bool = False,
    workers: int = 0,
    progress: bool = False,
) -> list[SplitReport]:
    """One report per split; problems are collected, not raised.

    options: task → what an experiment sets of it, which comes before what the data set says (see `pamm.build.label_options`).

    Without `deep`, files are listed and the headers of images read. With `deep`, every image and label is read, by as many
    processes as `workers` (0: this one). Of synthetic data only what was made counts; nothing is made here (see
    `SyntheticDataset.prepare`). progress: show a bar.
    """
    reports = [SplitReport(split) for split in splits]
    for report in reports:
        try:
            tasks = _readers(config, options or {})
            dataset = dataset_class(config).open(config, report.split, tasks)
        except DataError as error:
            report.problems.append(str(error))
            report.problems += _further_problems(config, options or {}, report.split, str(error))
            continue
        absent = set(dataset.absent())
        present = [index for index in range(len(dataset)) if index not in absent]
        report.images = len(present)
        report.labels, report.notes = dataset.labelled(), [*dataset.notes(), *_unmeasured(dataset)]
        if deep:
            sizes = _read_all(dataset, present, report, workers, progress)
        else:
            report.problems += dataset.problems()
            sizes = list(_read_headers(dataset, present, report))
        report.smallest = min(sizes, key=_area, default=None)
        report.largest = max(sizes, key=_area, default=None)
    return reports


def _readers(config: DataConfig, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Task]:
    """Every task of the data set, as its labels are read."""
    described = dataset_class(config).options(config)
    return {name: create_task(name, **{**values, **options.get(name, {})}) for name, values in described.items()}


def _further_problems(
    config: DataConfig, options: Mapping[str, Mapping[str, Any]], split: str, first: str
) -> list[str]:
    """Errors in the labels of every task, if opening all of them ended with the first error."""
    kind, found = dataset_class(config), [first]
    try:
        tasks = _readers(config, options)
    except DataError:
        return []
    for name, task in tasks.items():
        try:
            kind.open(config, split, {name: task})
        except DataError as error:
            if not any(_mistake(other) == _mistake(error) for other in found):
                found.append(str(error))
    return found[1:]


def _mistake(message: object) -> str:
    """The error in a message, without the remedy, which may name the requested tasks."""
    return str(message).partition(": ")[0]


def _unmeasured(dataset: Dataset) -> list[str]:
    """A note on the tasks that a split other than train has no label of."""
    counts = dataset.labelled()
    without = [name for name, count in counts.items() if not count]
    if not without or dataset.split == "train" or dataset.absent():
        return []
    if len(without) < len(counts):
        return [f"no image has a label of {', '.join(without)}, which is not measured on this split"]
    return [
        "no image has a label: nothing can be measured on this split, and if it is training's validation split, best/ will "
        "hold the latest weights. Put labels beside images/"
    ]


def format_inspection(reports: Iterable[SplitReport], *, most: int = 20) -> str:
    """The reports as text, with at most `most` problems per split."""
    lines = []
    for report in reports:
        sizes = (
            f", {_by(report.smallest)} to {_by(report.largest)} pixels" if report.smallest and report.largest else ""
        )
        lines.append(f"{report.split}: {report.images} images{sizes}")
        for name, count in report.labels.items():
            content = f": {report.contents[name]}" if name in report.contents else ""
            lines.append(f"  {name}: {count} labels{content}")
        lines += [f"  note: {note}" for note in report.notes]
        lines += [f"  problem: {problem}" for problem in report.problems[:most]]
        if len(report.problems) > most:
            lines.append(f"  and {len(report.problems) - most} more problems")
    return "\n".join(map(escaped, lines))


def notes_before_training(datasets: Sequence[Dataset], *, most: int = SAMPLED) -> list[str]:
    """Notes on the splits before the first step; empty if all is well.

    Read are at most `most` labels of each task and split, evenly spread over those there are (`RARE` times as many while a
    class occurs in none), and the headers of their images. Data that is made here is not looked at. Raises DataError for a
    file that cannot be read.
    """
    notes = []
    for dataset in datasets:
        found = dataset.notes()
        if len(dataset) and dataset.image_path(0) is not None:
            found += _look_at_some(dataset, most)
        notes += [escaped(f"{dataset.split}: {note}") for note in found]
    return notes


def _look_at_some(dataset: Dataset, most: int) -> list[str]:
    contents, looked_at = Contents(dataset.tasks), set[int]()
    for name, task in dataset.tasks.items():
        labelled = dataset.with_label(name)
        chosen = spread(labelled, most)
        looked_at.update(chosen)
        for index in chosen:
            contents.add(dataset.ids[index], {name: task.statistics(dataset.label(index, name))})
        read = set(chosen)
        for index in spread(labelled, most * RARE):  # a rare class is no absent one
            if index not in read and 0 in contents.found[name].classes.values():
                contents.add(dataset.ids[index], {name: task.statistics(dataset.label(index, name))})
    for index in sorted(looked_at):
        contents.add_image(dataset.ids[index], turned=dataset.turned_unseen(index))
    return contents.notes(dataset.labelled())


def spread(indices: Sequence[int], most: int) -> Sequence[int]:
    """At most `most` of the indices, evenly spread."""
    return indices if len(indices) <= most else [indices[i * len(indices) // most] for i in range(most)]


class Contents:
    """Counts of the labels that were read, summed over a split."""

    def __init__(self, tasks: Mapping[str, Task]):
        self.tasks = tasks
        self.found = {name: LabelStatistics() for name in tasks}
        self.empty: dict[str, list[str]] = {name: [] for name in tasks}
        """Task → ids of the images whose label is ignored everywhere."""
        self.images, self.turned = 0, list[str]()

    def add(self, image_id: str, statistics: Mapping[str, LabelStatistics]) -> None:
        """The statistics of an image's labels."""
        for name, found in statistics.items():
            self.found[name] += found
            if found.empty:
                self.empty[name].append(image_id)

    def add_image(self, image_id: str, *, turned: bool) -> None:
        """A labelled image. turned: see `Dataset.turned_unseen`."""
        self.images += 1
        if turned:
            self.turned.append(image_id)

    def described(self) -> dict[str, str]:
        """Task → content of its labels, in words."""
        return {name: task.describe(self.found[name]) for name, task in self.tasks.items() if self.found[name].labels}

    def notes(self, labelled: Mapping[str, int]) -> list[str]:
        """Doubtful values. labelled: task → number of labels; those that were added may be a part of them."""
        notes = []
        for name, task in self.tasks.items():
            read, empty = self.found[name].labels, self.empty[name]
            part = f" (seen in {read} of {labelled[name]} labels; `pamm data --deep` reads all)"
            own = task.remarks(self.found[name])
            if empty:
                own.append(f"{len(empty)} of {read} labels are ignored everywhere and teach nothing: {preview(empty)}")
            notes += [f"{name}: {remark}{part if read < labelled[name] else ''}" for remark in own]
        if self.turned:
            notes.append(
                f"{len(self.turned)} of {self.images} labelled images are shown turned by their EXIF orientation at the size "
                f"they are stored at, so the size does not show which of the two a label was drawn on: {preview(self.turned)}. "
                "Labels are taken to fit the image as shown. If they were drawn on the stored pixels, remove the tag from the "
                "images (exiftool -Orientation= FILES)"
            )
        return notes


@dataclass(frozen=True)
class _Look:
    """One sample as read: size of the image, contents of its labels, see `Dataset.turned_unseen`."""

    id: str
    size: tuple[int, int]
    statistics: dict[str, LabelStatistics]
    turned: bool


class _Looks(torch.utils.data.Dataset):
    """Index of a sample → its content, or the message of the error."""

    def __init__(self, dataset: Dataset, present: Sequence[int]):
        self.dataset, self.present = dataset, present

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, number: int) -> _Look | str:
        index = self.present[number]
        try:
            sample = self.dataset[index]
            turned = bool(sample.labels) and self.dataset.turned_unseen(index)
        except DataError as error:
            return str(error)
        tasks = self.dataset.tasks
        statistics = {name: tasks[name].statistics(label) for name, label in sample.labels.items()}
        return _Look(sample.id, sample.size, statistics, turned)


def _read_all(
    dataset: Dataset, present: Sequence[int], report: SplitReport, workers: int, progress: bool
) -> list[tuple[int, int]]:
    """Read every sample, fill the report, return the images' sizes."""
    contents, sizes = Contents(dataset.tasks), []
    loader = torch.utils.data.DataLoader(_Looks(dataset, present), batch_size=None, num_workers=workers)
    try:
        for look in tqdm(loader, f"read {report.split}", len(present), unit="image", leave=False, disable=not progress):
            if isinstance(look, str):
                report.problems.append(look)
                continue
            sizes.append(look.size)
            contents.add(look.id, look.statistics)
            if look.statistics:
                contents.add_image(look.id, turned=look.turned)
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images was ended from outside, mostly for lack of memory ({str(error).splitlines()[0]}). "
            "Free memory and try again."
        ) from None
    report.contents = contents.described()
    if present and dataset.image_path(present[0]) is not None:  # what is made here is not doubted
        report.notes += contents.notes(dict.fromkeys(dataset.tasks, 0))
    return sizes


def _read_headers(dataset: Dataset, present: Iterable[int], report: SplitReport) -> Iterator[tuple[int, int]]:
    for index in present:
        path = dataset.image_path(index)
        if path is None:
            return
        try:
            yield image_size(path)
        except ImageError as error:
            report.problems.append(str(error))


def reading_workers() -> int:
    """Processes that read a data set: one for each processor that this process may use, 8 at most."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, 8) if count > 1 else 0


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
