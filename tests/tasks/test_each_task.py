"""Each task against an independent computation, and the rules that are its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from task_cases import random_label, random_logits
from torch.nn import functional as F

from pamm.tasks import LabelError, Task, create_task


def computed(task: Task, logits: torch.Tensor, label: torch.Tensor, *, quick: bool = False) -> dict[str, float]:
    metric = task.quick_metric() if quick else task.metric()
    metric.update(logits, label)
    return {name: float(value) for name, value in metric.compute().items()}


def case(name: str, **options) -> tuple[Task, torch.Tensor, torch.Tensor]:
    task = create_task(name, **options)
    label = random_label(task)
    return task, random_logits(task, label), label


def write(path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


class TestClassMaps:
    @pytest.mark.parametrize("name", ["semseg", "human_parts"])
    def test_scores_equal_a_count_by_hand(self, name: str) -> None:
        task, logits, label = case(name)
        label[label == 2] = 3
        valid = label[:, 0].numpy() != 255
        truth, guess = label[:, 0].numpy()[valid], logits.argmax(1).numpy()[valid]
        iou = [
            (c, np.sum((truth == c) & (guess == c)), np.sum((truth == c) | (guess == c))) for c in range(task.channels)
        ]
        found = computed(task, logits, label)
        assert found["mIoU"] == pytest.approx(100 * np.mean([hits / union for _, hits, union in iou]), rel=1e-12)
        assert found["pixel_accuracy"] == pytest.approx(100 * np.mean(truth == guess), rel=1e-12)
        for c, hits, union in iou:
            assert found[f"IoU/{task.classes[c]}"] == pytest.approx(100 * hits / union, rel=1e-12)

    def test_miou_equals_torchmetrics_jaccard(self) -> None:
        from torchmetrics.functional.classification import multiclass_jaccard_index

        task, logits, label = case("semseg")
        expected = multiclass_jaccard_index(
            logits.argmax(1), label[:, 0].long(), task.channels, average="macro", ignore_index=255
        )
        assert computed(task, logits, label)["mIoU"] == pytest.approx(100 * float(expected), rel=1e-6)

    def test_an_absent_class_counts_as_zero(self) -> None:
        task = create_task("semseg", classes=["a", "b", "c", "d"])
        label = torch.tensor([[[[0, 1], [1, 255]]]], dtype=torch.uint8)
        logits = F.one_hot(torch.tensor([[[0, 1], [1, 3]]]), 4).movedim(-1, 1).float()
        found = computed(task, logits, label)
        assert found["mIoU"] == 50
        assert found["IoU/c"] == found["IoU/d"] == 0

    def test_loss_equals_torch_mean_cross_entropy(self) -> None:
        task, logits, label = case("human_parts")
        logits.requires_grad_()
        ours = task.loss(logits, label)
        theirs = F.cross_entropy(logits, label[:, 0].long(), ignore_index=255)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))

    def test_pictures_have_the_colours_of_pascal_voc(self) -> None:
        picture = create_task("semseg").draw(np.array([[0, 1, 2], [15, 20, 255]], np.uint8))
        voc = [[[0, 0, 0], [128, 0, 0], [0, 128, 0]], [[192, 128, 128], [0, 64, 128], [128, 128, 128]]]
        assert picture.tolist() == voc
        everything = create_task("semseg").draw(np.arange(255, dtype=np.uint8)[None])
        assert len(np.unique(everything[0], axis=0)) == 255
        assert [128, 128, 128] not in everything[0].tolist()

    def test_a_palette_png_gives_its_indices(self, tmp_path) -> None:
        index = np.array([[0, 1, 20], [255, 5, 0]], np.uint8)
        image = Image.fromarray(index)
        image.putpalette(np.random.default_rng(0).integers(0, 255, 768).tolist())
        image.save(tmp_path / "a.png")
        assert create_task("semseg").read(tmp_path / "a.png")[0].tolist() == index.tolist()

    def test_an_index_out_of_range_is_named(self, tmp_path) -> None:
        index = np.zeros((4, 6), np.uint8)
        index[2, 5] = 21
        write(tmp_path / "a.png", index)
        with pytest.raises(LabelError, match=r"class index 21 at row 2, column 5.*21 classes \(0 to 20"):
            create_task("semseg").read(tmp_path / "a.png")
        assert create_task("semseg", classes=[f"c{i}" for i in range(22)]).read(tmp_path / "a.png").max() == 21

    def test_a_label_beyond_the_classes_is_refused_by_the_metric(self) -> None:
        task = create_task("human_parts")
        with pytest.raises(LabelError, match="class index 9, but there are 7 classes"):
            task.metric().update(torch.zeros(1, 7, 2, 2), torch.full((1, 1, 2, 2), 9, dtype=torch.uint8))

    @pytest.mark.parametrize("mode", ["RGB", "I;16", "LA"])
    def test_other_modes_are_refused(self, mode: str, tmp_path) -> None:
        Image.new(mode, (5, 4)).save(tmp_path / "a.png")
        with pytest.raises(LabelError, match="expected an 8-bit grey or palette PNG"):
            create_task("semseg").read(tmp_path / "a.png")

    @pytest.mark.parametrize("classes", [[], ["one"], ["a", "a"], ["a", ""], [str(i) for i in range(256)]])
    def test_impossible_classes_are_refused(self, classes: list[str]) -> None:
        with pytest.raises(ValueError, match="task 'semseg'"):
            create_task("semseg", classes=classes)

    @pytest.mark.parametrize("classes", ["background", b"ab", 3, {"a": 1, "b": 2}])
    def test_classes_are_a_list(self, classes) -> None:
        with pytest.raises(ValueError, match=r"task 'semseg': classes is .*expected a list of names"):
            create_task("semseg", classes=classes)

    def test_names_that_yaml_takes_for_something_else_are_to_be_quoted(self) -> None:
        with pytest.raises(ValueError, match=r"\[False, 3\].*quotes"):
            create_task("semseg", classes=["yes", False, 3])

    def test_a_label_without_any_person_is_ignored(self) -> None:
        task = create_task("human_parts")
        nobody = torch.tensor([[[0, 255], [0, 0]]], dtype=torch.uint8)
        somebody = torch.tensor([[[0, 255], [4, 0]]], dtype=torch.uint8)
        assert (task.finish(nobody) == 255).all()
        assert torch.equal(task.finish(somebody), somebody)
        assert torch.equal(create_task("semseg").finish(nobody), nobody)


def f_measures(probability: np.ndarray, positive: np.ndarray, thresholds: np.ndarray, beta2: float) -> list[float]:
    """F per threshold, one threshold after the other."""
    found = []
    for threshold in thresholds:
        at = probability >= threshold
        hits = np.sum(at & positive)
        precision, recall = hits / max(at.sum(), 1), hits / positive.sum()
        found.append((1 + beta2) * precision * recall / (beta2 * precision + recall) if hits else 0.0)
    return found

    def test_the_score_of_one_image_is_of_the_classes_in_it(self) -> None:
        task = create_task("semseg", classes=["a", "b", "c", "d"])
        label = torch.tensor([[[[0, 0, 0, 255], [1, 1, 0, 0]]]])
        prediction = torch.tensor([[[0, 0, 2, 3], [1, 0, 0, 0]]])
        logits = torch.nn.functional.one_hot(prediction, 4).movedim(-1, 1).float()
        assert task.score_image(logits, label) == pytest.approx(100 * np.mean([4 / 6, 1 / 2, 0]))  # "d" is ignored


class TestSaliency:
    def test_an_image_without_an_object_has_no_score_of_its_own(self) -> None:
        task, logits, label = case("sal")
        assert np.isnan(task.score_image(logits[:1], torch.zeros_like(label[:1])))

    def test_scores_equal_a_count_by_hand(self) -> None:
        task, logits, label = case("sal")
        valid = label[:, 0].numpy() != 255
        positive = label[:, 0].numpy()[valid] == 1
        probability = logits.softmax(1)[:, 1].numpy()[valid]
        thresholds = np.arange(1, 20, dtype=np.float32) * np.float32(0.05)
        found = computed(task, logits, label)
        assert found["maxF"] == pytest.approx(100 * max(f_measures(probability, positive, thresholds, 0.3)), rel=1e-6)
        squashed = 1 / (1 + np.exp(-probability))
        expected = 100 * max(f_measures(squashed, positive, thresholds, 0.3))
        assert found["maxF_released"] == pytest.approx(expected, rel=1e-6)

    def test_the_released_score_has_five_effective_thresholds(self) -> None:
        """Probabilities between two of the five cuts score alike in the released metric, not in the true one."""
        task = create_task("sal")
        label = torch.tensor([[[[1, 0, 0, 0]]]], dtype=torch.uint8)

        def score(first: float, others: float) -> dict[str, float]:
            probability = torch.tensor([first, others, others, others])
            logits = torch.stack([torch.zeros(4), torch.logit(probability)])[None, :, None]
            return computed(task, logits, label)

        apart, cut = score(0.58, 0.43), score(0.65, 0.43)
        assert apart["maxF"] == cut["maxF"] == pytest.approx(100)
        assert cut["maxF_released"] == pytest.approx(100)
        assert apart["maxF_released"] == pytest.approx(100 * 1.3 * 0.25 / (0.3 * 0.25 + 1))

    def test_loss_equals_weighted_log_probabilities(self) -> None:
        task, logits, label = case("sal")
        valid, positive = label[:, 0] != 255, label[:, 0] == 1
        weight = 1 - positive.sum() / valid.sum()
        log = logits.double().log_softmax(1)
        expected = (
            -(weight * log[:, 1][positive].sum() + (1 - weight) * log[:, 0][valid & ~positive].sum()) / valid.sum()
        )
        torch.testing.assert_close(task.loss(logits, label).double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("only", [0, 1])
    def test_one_class_alone_has_no_weight(self, only: int) -> None:
        label = torch.full((1, 1, 4, 4), only, dtype=torch.uint8)
        task = create_task("sal")
        assert task.loss(torch.randn(1, 2, 4, 4), label).item() == 0
        assert np.isfinite(computed(task, torch.randn(1, 2, 4, 4), label)["maxF"])


class TestMasks:
    @pytest.mark.parametrize("name", ["sal", "edge"])
    def test_more_than_half_is_a_yes_where_masks_are_said_to_be_soft(self, name: str, tmp_path) -> None:
        write(tmp_path / "a.png", np.array([[0, 1, 127], [128, 200, 255]], np.uint8))
        assert create_task(name, soft=True).read(tmp_path / "a.png")[0].tolist() == [[0, 0, 0], [1, 1, 1]]
        with pytest.raises(LabelError, match=r"holds the values 0, 1, 127, 128, 200, 255, expected .*soft: true"):
            create_task(name).read(tmp_path / "a.png")
        assert create_task(name, **create_task(name, soft=True).options()).soft

    @pytest.mark.parametrize("name", ["sal", "edge"])
    def test_one_bit_masks_are_read_and_index_masks_refused(self, name: str, tmp_path) -> None:
        mask = np.array([[True, False], [False, True]])
        write(tmp_path / "bits.png", mask)
        assert create_task(name).read(tmp_path / "bits.png")[0].tolist() == [[1, 0], [0, 1]]
        write(tmp_path / "index.png", mask.astype(np.uint8))
        with pytest.raises(LabelError, match="multiply it by 255"):
            create_task(name).read(tmp_path / "index.png")
        write(tmp_path / "none.png", np.zeros((2, 2), np.uint8))
        assert not create_task(name).read(tmp_path / "none.png").any()


class TestBoundary:
    def test_loss_equals_torch_binary_cross_entropy(self) -> None:
        task, logits, label = case("edge", positive_weight=0.8)
        logits.requires_grad_()
        valid = label != 255
        theirs = 0.2 * F.binary_cross_entropy_with_logits(
            logits[valid], (label[valid] == 1).float(), pos_weight=torch.tensor(4.0)
        )
        ours = task.loss(logits, label)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))

    def test_quick_score_equals_a_count_by_hand(self) -> None:
        task, logits, label = case("edge")
        valid = label.numpy() != 255
        thresholds = np.arange(1, 100, dtype=np.float32) / 100
        expected = f_measures(logits.sigmoid().numpy()[valid], label.numpy()[valid] == 1, thresholds, 1.0)
        assert computed(task, logits, label, quick=True)["maxF_pixel"] == pytest.approx(100 * max(expected), rel=1e-9)

    def test_a_probability_equal_to_a_threshold_reaches_it(self) -> None:
        logits = torch.tensor([[[[0.0, -0.01]]]])
        label = torch.tensor([[[[1, 0]]]], dtype=torch.uint8)
        assert computed(create_task("edge"), logits, label, quick=True)["maxF_pixel"] == 100

    def test_extreme_logits_stay_finite(self) -> None:
        task = create_task("edge")
        logits = torch.tensor([[[[1e4, -1e4]]]], requires_grad=True)
        loss = task.loss(logits, torch.tensor([[[[0, 1]]]], dtype=torch.uint8))
        loss.backward()
        assert loss.item() == pytest.approx((0.05 + 0.95) * 1e4 / 2)
        assert logits.grad.flatten().tolist() == pytest.approx([0.05 / 2, -0.95 / 2])

    @pytest.mark.parametrize("weight", [0, 1, -0.2, 95])
    def test_impossible_weights_are_refused(self, weight: float) -> None:
        with pytest.raises(ValueError, match="positive_weight"):
            create_task("edge", positive_weight=weight)


class TestDepth:
    def test_scores_equal_their_formulas(self) -> None:
        task, logits, label = case("depth")
        valid = label.numpy() > 0
        truth, guess = label.numpy()[valid].astype(float), logits.numpy()[valid].astype(float)
        assert (guess < 0).any()
        guess = np.where(guess <= 0, 1e-9, guess)
        ratio = np.maximum(truth / guess, guess / truth)
        expected = {
            "RMSE": np.sqrt(np.mean((guess - truth) ** 2)),
            "log_RMSE": np.sqrt(np.mean((np.log(guess) - np.log(truth)) ** 2)),
            "abs_rel": np.mean(np.abs(guess - truth) / truth),
            "sq_rel": np.mean((guess - truth) ** 2 / truth),
            "delta_1.25": 100 * np.mean(ratio < 1.25),
            "delta_1.25^2": 100 * np.mean(ratio < 1.25**2),
            "delta_1.25^3": 100 * np.mean(ratio < 1.25**3),
        }
        assert computed(task, logits, label) == pytest.approx(expected, rel=1e-9)

    def test_loss_equals_torch_l1(self) -> None:
        task, logits, label = case("depth")
        valid = label > 0
        torch.testing.assert_close(task.loss(logits, label), F.l1_loss(logits[valid], label[valid]))

    def test_zooming_in_brings_the_scene_nearer(self) -> None:
        label = torch.tensor([[[3.0, 0.0]]])
        assert create_task("depth").rescale(label, 2.0).tolist() == [[[1.5, 0.0]]]

    def test_units_of_the_png(self, tmp_path) -> None:
        write(tmp_path / "a.png", np.array([[0, 1500], [7, 65535]], np.uint16))
        millimetres = create_task("depth", unit="millimetre").read(tmp_path / "a.png")[0]
        metres = create_task("depth", unit="metre").read(tmp_path / "a.png")[0]
        assert millimetres.flatten().tolist() == pytest.approx([0, 1.5, 0.007, 65.535])
        assert metres.flatten().tolist() == [0, 1500, 7, 65535]
        with pytest.raises(ValueError, match="'millimetre', 'metre', the steps of a metre"):
            create_task("depth", unit="inch")

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
    def test_arrays_in_metres(self, dtype, shape: tuple[int, ...], tmp_path) -> None:
        values = np.array([1.5, np.nan, -1, np.inf, 0, 2.25], dtype).reshape(shape)
        np.save(tmp_path / "a.npy", values)
        label = create_task("depth").read(tmp_path / "a.npy")
        assert label.dtype == torch.float32
        assert label.tolist() == [[[1.5, 0, 0], [0, 0, 2.25]]]

    def test_bad_arrays(self, tmp_path) -> None:
        path = tmp_path / "a.npy"
        task = create_task("depth")
        with pytest.raises(LabelError, match="no label file"):
            task.read(path)
        for wrong in (np.ones((2, 3), int), np.ones((2, 3, 3)), np.ones(4), np.ones((0, 4))):
            np.save(path, wrong)
            with pytest.raises(LabelError, match=r"expected a \.npy array"):
                task.read(path)
        np.save(path, np.array([[{}]], object), allow_pickle=True)
        with pytest.raises(LabelError, match=r"is not a whole \.npy file"):
            task.read(path)
        np.save(path, np.ones((64, 64)))
        np.savez(tmp_path / "archive.npz", np.ones((64, 64)))
        archive = (tmp_path / "archive.npz").read_bytes()
        for content in (path.read_bytes()[:1000], b"", b"text", archive, archive[:1000]):
            path.write_bytes(content)
            with pytest.raises(LabelError, match=r"is not a whole \.npy file .*; write it again"):
                task.read(path)

    def test_upper_case_suffixes(self, tmp_path) -> None:
        with open(tmp_path / "a.NPY", "wb") as file:
            np.save(file, np.full((2, 3), 1.5, np.float32))
        assert create_task("depth").read(tmp_path / "a.NPY").tolist() == [[[1.5] * 3] * 2]

    def test_eight_bits_are_refused(self, tmp_path) -> None:
        write(tmp_path / "a.png", np.ones((2, 2), np.uint8))
        with pytest.raises(LabelError, match="expected a 16-bit grey PNG"):
            create_task("depth").read(tmp_path / "a.png")

    def test_the_reference_sets_the_colours(self) -> None:
        task = create_task("depth")
        reference = np.array([[0.0, 2.0, 10.0]])
        picture = task.draw(np.array([[2.0, 10.0, 6.0]]), reference=reference)
        assert picture[0, 0].tolist() == [253, 231, 37]
        assert picture[0, 1].tolist() == [68, 1, 84]
        same = task.draw(np.array([[2.0, 1.0, 99.0]]), reference=reference)
        assert same[0, 0].tolist() == picture[0, 0].tolist() == same[0, 1].tolist()
        assert task.draw(np.zeros((2, 2))).shape == (2, 2, 3)

    def test_a_negative_output_is_no_depth(self) -> None:
        assert create_task("depth").decode(torch.tensor([[[[-2.0, 3.0]]]])).tolist() == [[[0.0, 3.0]]]


class TestNormals:
    def test_scores_equal_arc_cosines(self) -> None:
        task, logits, label = case("normals")
        valid = (label != 255).all(1).numpy()
        truth = label.double().movedim(1, -1).numpy()[valid]
        guess = logits.double().movedim(1, -1).numpy()[valid]
        cosine = (truth * guess).sum(-1) / np.linalg.norm(truth, axis=-1) / np.linalg.norm(guess, axis=-1)
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        found = computed(task, logits, label)
        assert found["mErr"] == pytest.approx(angle.mean(), rel=1e-9)
        assert found["RMSE"] == pytest.approx(np.sqrt(np.mean(angle**2)), rel=1e-9)
        assert found["median"] == pytest.approx(np.median(angle), abs=0.05)
        for bound in (11.25, 22.5, 30):
            assert found[f"within_{bound:g}"] == pytest.approx(100 * np.mean(angle < bound), rel=1e-9)

    def test_the_median_is_within_a_bin_of_the_exact_one(self) -> None:
        angle = torch.linspace(3, 43, 4001)
        logits = torch.stack([angle.deg2rad().sin(), torch.zeros(4001), angle.deg2rad().cos()])[None, :, None]
        label = torch.tensor([0.0, 0, 1])[None, :, None, None].expand(1, 3, 1, 4001)
        found = computed(create_task("normals"), logits, label)
        assert found["median"] == pytest.approx(23, abs=0.011)
        assert found["mErr"] == pytest.approx(23, abs=1e-3)

    def test_opposite_vectors_are_180_degrees_apart(self) -> None:
        label = torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1)
        found = computed(create_task("normals"), -label, label)
        assert found["mErr"] == pytest.approx(180)
        assert found["median"] == pytest.approx(180, abs=0.01)

    def test_loss_equals_its_formula(self) -> None:
        task, logits, label = case("normals")
        valid = (label != 255).all(1)
        unit = logits / logits.norm(dim=1, keepdim=True)
        expected = (unit - label).abs().sum(1)[valid].mean()
        torch.testing.assert_close(task.loss(logits, label), expected)

    def test_flip_negates_x_of_known_normals(self) -> None:
        label = torch.tensor([[[0.6, 255]], [[0.0, 255]], [[0.8, 255]]])
        flipped = create_task("normals").flip(label)
        torch.testing.assert_close(flipped, torch.tensor([[[255, -0.6]], [[255, 0.0]], [[255, 0.8]]]))

    def test_black_is_unknown(self, tmp_path) -> None:
        write(tmp_path / "a.png", np.array([[[0, 0, 0], [0, 128, 128], [128, 128, 255]]], np.uint8))
        label = create_task("normals").read(tmp_path / "a.png")
        assert label[:, 0, 0].tolist() == [255, 255, 255]
        assert label[:, 0, 1].tolist() == pytest.approx([-1, 0.5 / 127.5, 0.5 / 127.5], abs=1e-6)
        assert label[:, 0, 2].tolist() == pytest.approx([1 / 255, 1 / 255, 1], abs=1e-6)

    def test_zero_vectors_become_ignored(self) -> None:
        label = torch.tensor([[[0.0, 0.6]], [[0.0, 0.0]], [[0.0, 0.8]]])
        finished = create_task("normals").finish(label)
        assert finished[:, 0, 0].tolist() == [255, 255, 255]
        assert torch.equal(finished[..., 1:], label[..., 1:])

    def test_grey_is_refused(self, tmp_path) -> None:
        write(tmp_path / "a.png", np.ones((2, 2), np.uint8))
        with pytest.raises(LabelError, match="expected an 8-bit RGB PNG"):
            create_task("normals").read(tmp_path / "a.png")

    def test_a_zero_output_has_a_bounded_gradient(self) -> None:
        logits = torch.zeros(1, 3, 1, 1, requires_grad=True)
        create_task("normals").loss(logits, torch.tensor([0.6, 0, 0.8]).view(1, 3, 1, 1)).backward()
        assert torch.isfinite(logits.grad).all()
