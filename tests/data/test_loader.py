"""The order of samples is a function of the step; errors in workers arrive clean."""

import tempfile
from dataclasses import replace

import pytest
import torch

from pamm.config.experiment import DataConfig, TrainConfig
from pamm.config.strict import ConfigError
from pamm.data import DataError, Dataset, Sample
from pamm.data.loader import eval_loader, train_loader
from pamm.data.transforms import EvalTransform, TrainTransform
from pamm.tasks import create_task

DATA = DataConfig(size=(16, 16))
TRAIN = TrainConfig(steps=6, batch=4, workers=0, seed=3, device="cpu")


class Numbers(Dataset):
    """Ten random images; every other one has a label; one may be unreadable."""

    def __init__(self, length=10, broken=None):
        self.ids = [str(index) for index in range(length)]
        self.tasks = {"sal": create_task("sal")}
        self.split = "train"
        self.broken = broken

    @classmethod
    def options(cls, config):
        return {"sal": {}}

    @classmethod
    def open(cls, config, split, tasks):
        return cls()

    def __getitem__(self, index):
        if index == self.broken:
            raise DataError(f"file of {index} is damaged. Copy it again.")
        image = torch.full((3, 20, 24), index, dtype=torch.uint8)
        labels = {"sal": torch.ones(1, 20, 24, dtype=torch.uint8)} if index % 2 else {}
        return Sample(self.ids[index], image, labels, (20, 24))


def run(config, dataset=None, **place):
    dataset = Numbers() if dataset is None else dataset
    return list(train_loader(dataset, TrainTransform(dataset.tasks, DATA, config.seed), config, **place))


def ids(steps):
    return [[image_id for batch in parts for image_id in batch.ids] for parts in steps]


def assert_equal(a, b):
    assert ids(a) == ids(b)
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left, right, strict=True):
            assert torch.equal(x.image, y.image) and torch.equal(x.labels["sal"], y.labels["sal"])


def test_epochs_follow_each_other_without_a_gap_each_in_its_own_order():
    stream = [image_id for step in ids(run(replace(TRAIN, steps=5))) for image_id in step]
    assert len(stream) == 20
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == sorted(Numbers().ids)
    assert first != second and first != Numbers().ids
    assert ids(run(replace(TRAIN, seed=4))) != ids(run(TRAIN))


def test_resuming_and_workers_change_no_bit():
    whole = run(TRAIN)
    assert_equal(run(replace(TRAIN, workers=2)), whole)
    assert_equal(run(TRAIN, start_step=4), whole[4:])
    assert_equal(run(replace(TRAIN, workers=1), start_step=3), whole[3:])


def test_processes_and_parts_share_the_global_batch():
    whole = ids(run(TRAIN))
    shares = [ids(run(TRAIN, rank=rank, world=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    parts = run(replace(TRAIN, accumulate=2))
    assert all(len(step) == 2 and all(len(batch.ids) == 2 for batch in step) for step in parts)
    assert ids(parts) == whole


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run(TRAIN)
    assert torch.equal(torch.rand(3), expected)


def test_length_is_the_number_of_steps_left():
    dataset = Numbers()
    loader = train_loader(dataset, TrainTransform(dataset.tasks, DATA), replace(TRAIN, accumulate=2), start_step=2)
    assert len(loader) == 4 == len(list(loader))


def test_missing_labels_are_ignored_ones():
    batch = next(iter(run(replace(TRAIN, batch=10))))[0]
    for image_id, label in zip(batch.ids, batch.labels["sal"], strict=True):
        assert bool((label == 255).all()) == (int(image_id) % 2 == 0)


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(4, 3, 1), (4, 1, 3), (6, 2, 2), (4, 0, 1)])
def test_batch_that_cannot_be_shared_is_a_config_error(batch, accumulate, world):
    with pytest.raises(ConfigError, match=r"train\.batch = \d+ .*accumulate"):
        run(replace(TRAIN, batch=batch, accumulate=accumulate), world=world)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_data_is_a_clean_error_also_from_a_worker(workers):
    dataset = Numbers(broken=3)
    with pytest.raises(DataError, match=r"^file of 3 is damaged\. Copy it again\.$"):
        run(replace(TRAIN, workers=workers), dataset)
    with pytest.raises(DataError, match=r"^file of 3 is damaged\. Copy it again\.$"):
        list(eval_loader(dataset, EvalTransform(dataset.tasks, replace(DATA, size=(32, 32))), workers=workers))


def test_empty_split_is_a_data_error():
    with pytest.raises(DataError, match="no image"):
        run(TRAIN, Numbers(length=0))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_evaluation_takes_every_sample_once(world, workers):
    dataset, transform = Numbers(), EvalTransform(Numbers().tasks, replace(DATA, size=(32, 32)))
    seen = []
    for rank in range(world):
        loader = eval_loader(dataset, transform, rank=rank, world=world, batch_size=4, workers=workers)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert [image_id for batch in batches for image_id in batch.ids] == dataset.ids[rank::world]
        assert all(batch.image.shape[1:] == (3, 32, 32) and batch.sizes[0] == (20, 24) for batch in batches)
        seen += [image_id for batch in batches for image_id in batch.ids]
    assert sorted(seen) == sorted(dataset.ids)


def test_a_long_name_of_the_temporary_folder_is_told_where_processes_load(monkeypatch, tmp_path):
    """A socket's address is short: torch's workers would wait for ever."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("a" * 100)))
    with pytest.raises(DataError, match=r"allow 70\. Set TMPDIR to a shorter one, or .*--train.workers 0"):
        run(replace(TRAIN, workers=1))
    assert len(run(TRAIN)) == 6
