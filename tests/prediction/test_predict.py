"""Any image in, maps at its size out; files that read back; batches that survive their bad files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data.packages import as_user
from pamm.drawing.sheet import contact_sheet, save_sheet
from pamm.images import ImageError
from pamm.models.registry import build_model
from pamm.prediction import Maps, PredictError, Predictor, expand_inputs, file_names, predict_files
from pamm.prediction import maps as strips_of_maps
from pamm.prediction import predictor as strips_of_logits
from pamm.tasks import create_task
from tiny import MODEL, TASKS

PATCH = MODEL.backbone.patch_size
DTYPES = {"semseg": "uint8", "human_parts": "uint8"}


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    tasks = {name: create_task(name, **config.options) for name, config in TASKS.items()}
    return Predictor(build_model(MODEL, tasks, (48, 64)))


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def same(a: Maps, b: Maps) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[task], b[task]) for task in a)


@torch.no_grad()
def by_hand(model, image: np.ndarray) -> dict[str, torch.Tensor]:
    """Logits of an image that is not shrunk: normalise, put into the centre of the padded frame, run, cut out."""
    height, width = image.shape[:2]
    rows, columns = (-(-side // PATCH) * PATCH for side in (height, width))
    frame = torch.zeros(1, 3, rows, columns)
    top, left = (rows - height) // 2, (columns - width) // 2
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (torch.from_numpy(image.copy()) / 255 - mean) / std
    frame[0, :, top : top + height, left : left + width] = normal.permute(2, 0, 1)
    logits = model.eval()(frame)
    return {task: x[..., top : top + height, left : left + width] for task, x in logits.items()}


def assert_decodes(maps: Maps, logits: dict[str, torch.Tensor]) -> None:
    for name, task in maps.tasks.items():
        expected = task.decode(logits[name])[0].numpy()
        if expected.dtype == np.uint8:  # a tie may fall either way, by rounding
            assert (maps[name] == expected).mean() > 0.999
        else:
            np.testing.assert_allclose(maps[name], expected, atol=2e-4)


# -- one image -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 5000), (700, 2), (48, 64), (33, 70), (150, 101)], ids=str)
def test_maps_have_the_size_of_the_image_and_the_units_of_their_task(predictor, size):
    maps = predictor(photo(*size))
    assert list(maps) == list(TASKS)
    for name, values in maps.items():
        assert values.shape == (*size, 3) if name == "normals" else values.shape == size
        assert values.dtype == DTYPES.get(name, "float32")
        assert maps.draw(name).shape == (*size, 3) and maps.draw(name).dtype == np.uint8
    assert maps["semseg"].max() < 21 and maps["depth"].min() >= 0
    for name in ("sal", "edge"):
        assert maps[name].min() >= 0 and maps[name].max() <= 1
    np.testing.assert_allclose(np.linalg.norm(maps["normals"], axis=-1), 1, atol=1e-4)


def test_an_image_of_the_networks_scale_is_padded_run_and_cut_out(predictor):
    image = photo(33, 61)
    assert_decodes(predictor(image), by_hand(predictor.model, image))


def test_a_larger_image_is_shrunk_and_its_logits_are_resized_back(predictor):
    image = photo(101, 160)
    small = np.asarray(Image.fromarray(image).resize((64, 40), Image.Resampling.BILINEAR))
    logits = by_hand(predictor.model, small)
    resized = {name: F.interpolate(x, size=(101, 160), mode="bilinear") for name, x in logits.items()}
    assert_decodes(predictor(image), resized)


def test_longest_side_sets_the_scale_and_nothing_is_enlarged(predictor):
    image = photo(90, 120)
    assert_decodes(Predictor(predictor.model, longest_side=4000)(image), by_hand(predictor.model, image))


def test_strips_give_what_the_whole_does(predictor, monkeypatch):
    image = photo(200, 90)
    whole = predictor(image)
    pictures = {name: task.draw(whole[name]) for name, task in whole.tasks.items()}
    for module in (strips_of_maps, strips_of_logits):
        monkeypatch.setattr(module, "STRIP_VALUES", 21 * 90 * 7)
    strips = predictor(image)
    for task, values in whole.items():
        if values.dtype == np.uint8:
            assert (strips[task] == values).mean() > 0.999
        else:
            np.testing.assert_allclose(strips[task], values, atol=1e-5)
        assert np.array_equal(whole.draw(task), pictures[task])


def test_prediction_is_the_same_every_time_and_leaves_a_training_model_training(predictor):
    image = photo(40, 50)
    first = predictor(image)
    predictor.model.train()
    try:
        assert same(predictor(image), first)
        assert predictor.model.training
    finally:
        predictor.model.eval()


def test_a_model_trains_after_it_predicted(predictor):
    """Nothing that is kept between calls, at a size not seen before, may come from a mode that autograd refuses."""
    predictor(photo(56, 24))
    logits = predictor.model(torch.zeros(1, 3, 56, 24))
    sum(x.sum() for x in logits.values()).backward()
    gradients = [parameter.grad for parameter in predictor.model.heads.parameters()]
    predictor.model.zero_grad()
    assert all(gradient is not None for gradient in gradients)


def test_a_saved_model_predicts_what_the_model_did(predictor, tmp_path):
    predictor.model.save_pretrained(tmp_path / "model")
    assert same(Predictor(tmp_path / "model", device="cpu")(photo(30, 40)), predictor(photo(30, 40)))


def test_many_reads_an_image_when_its_maps_are_asked_for(predictor):
    read = []

    def images():
        for seed in range(3):
            read.append(seed)
            yield photo(20, 30, seed)

    results = predictor.many(images())
    first = next(results)
    assert read == [0]
    assert same(first, predictor(photo(20, 30, 0)))
    assert len(list(results)) == 2


# -- forms of images -------------------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied_to_files_and_pil_images(predictor, tmp_path):
    path, image = tmp_path / "turned.jpg", Image.fromarray(photo(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned by 90° clockwise
    image.save(path, exif=exif, quality=95)
    with Image.open(path) as stored:
        upright = np.rot90(np.asarray(stored), -1)
        turned = predictor(stored)
    maps = predictor(str(path))
    assert maps.image.shape == (60, 40, 3) and maps["depth"].shape == (60, 40)
    assert same(maps, predictor(np.ascontiguousarray(upright))) and same(maps, turned)
    assert maps.name == "turned" and turned.name == "image"


def test_grey_16_bit_tensor_and_open_file_mean_the_same_picture(predictor, tmp_path):
    grey = photo(40, 56)[..., 0]
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    wide = grey.astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    buffer = io.BytesIO((tmp_path / "grey.png").read_bytes())
    expected = predictor(rgb)
    for form in [grey, wide, np.repeat(wide[..., None], 3, -1), Image.fromarray(grey), Image.fromarray(wide), buffer]:
        assert same(predictor(form), expected)
    for form in [torch.from_numpy(rgb).permute(2, 0, 1), torch.from_numpy(grey)[None], tmp_path / "wide.png"]:
        assert same(predictor(form), expected)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 4), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        Image.new("RGB", (0, 0)),
        Image.new("L", (0, 7)),
        torch.zeros(3, 0, 0, dtype=torch.uint8),
        np.zeros(5, np.uint8),
        torch.zeros(3, 4, 5),
        torch.zeros(3, 4, 5, dtype=torch.bfloat16),
        torch.zeros(4, 5, 3, dtype=torch.uint8),
        [[1, 2], [3, 4]],
        None,
    ],
    ids=lambda x: f"{type(x).__name__}{getattr(x, 'dtype', '')}{tuple(getattr(x, 'shape', ()))}",
)
def test_other_forms_are_refused_with_what_is_expected(predictor, image):
    with pytest.raises(PredictError, match="expected"):
        predictor(image)


def test_damaged_files_are_image_errors(predictor, tmp_path):
    whole = io.BytesIO()
    Image.fromarray(photo(60, 60)).save(whole, format="JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-400])
    (tmp_path / "empty.png").touch()
    for path in (tmp_path / "cut.jpg", tmp_path / "empty.png", tmp_path / "absent.jpg"):
        with pytest.raises(ImageError, match=path.name):
            predictor(path)
    with Image.open(tmp_path / "cut.jpg") as picture, pytest.raises(ImageError, match="damaged"):
        predictor(picture)


@pytest.mark.parametrize("arguments", [{"longest_side": 0}, {"device": "cuda:99"}, {"device": "abacus"}], ids=str)
def test_senseless_arguments_are_refused(predictor, arguments):
    with pytest.raises(PredictError, match=r"longest_side is 0|cannot be used here"):
        Predictor(predictor.model, **arguments)


# -- files -------------------------------------------------------------------------------------------------------------------


def test_saved_maps_read_back(predictor, tmp_path):
    maps = predictor(photo(50, 70))
    files = maps.save(tmp_path, stem="a", formats=["png", "npy", "picture"])
    assert len(maps.save(tmp_path / "usual")) == 12 and not (tmp_path / "usual" / "arrays").exists()
    assert len(files) == 18 and all(path.is_file() for path in files)
    read = {name: task.read(tmp_path / name / "a.png") for name, task in maps.tasks.items()}
    for name in ("semseg", "human_parts"):
        assert np.array_equal(read[name][0], maps[name])
    for name in ("sal", "edge"):
        assert np.array_equal(read[name][0], maps[name] >= 0.5)
    np.testing.assert_allclose(read["depth"][0], maps["depth"], atol=0.00051)
    np.testing.assert_allclose(read["normals"].movedim(0, -1), maps["normals"], atol=0.0041)
    for name in maps:
        assert np.array_equal(np.load(tmp_path / "arrays" / name / "a.npy"), maps[name])
        with Image.open(tmp_path / "pictures" / name / "a.png") as picture:
            assert np.array_equal(np.asarray(picture), maps.draw(name))


def test_unknown_maps_formats_and_names_are_refused(predictor, tmp_path):
    maps = predictor(photo(10, 10))
    with pytest.raises(KeyError, match="semseg"):
        maps["optical_flow"]
    for formats in (["tiff"], "png"):
        with pytest.raises(PredictError, match="png, npy, picture"):
            maps.save(tmp_path, formats=formats)
    for stem in ("../up", "", ".."):
        with pytest.raises(PredictError, match="stem"):
            maps.save(tmp_path, stem=stem)
    (tmp_path / "file").touch()
    with pytest.raises(PredictError, match="file is a file; give a folder"):
        maps.save(tmp_path / "file")
    with pytest.raises(PredictError, match="cannot be written"):
        maps.save(tmp_path / "file" / "inside")
    for formats in ((), []):
        with pytest.raises(PredictError, match=r"no format is given.*png, npy, picture"):
            maps.save(tmp_path, formats=formats)
        with pytest.raises(PredictError, match="no format is given"):
            predict_files(predictor, [], tmp_path, formats=formats)


def test_saving_never_replaces_the_image_or_its_labels(predictor, tmp_path):
    (tmp_path / "depth").mkdir()
    (tmp_path / "val" / "images").mkdir(parents=True)
    inside, sample = tmp_path / "depth" / "x.png", tmp_path / "val" / "images" / "y.png"
    for path in (inside, sample):
        Image.fromarray(photo(10, 12)).save(path)
    before = inside.read_bytes()
    with pytest.raises(PredictError, match="replace the image"):
        predictor(inside).save(tmp_path)
    assert inside.read_bytes() == before
    for image in (sample, photo(10, 12), Image.fromarray(photo(10, 12)), inside):
        with pytest.raises(PredictError, match=r"val holds images/ .*replace its labels; choose another folder"):
            predictor(image).save(tmp_path / "val", stem="y")
    with pytest.raises(PredictError, match="replace its labels"):
        predict_files(predictor, [inside], tmp_path / "val")
    assert [path.name for path in (tmp_path / "val").iterdir()] == ["images"]
    predictor(sample).save(tmp_path / "val", formats=["npy"])
    assert not (tmp_path / "val" / "depth").exists()


def test_the_contact_sheet_comes_not_among_the_images(predictor, tmp_path):
    images = [tmp_path / "contact_sheet.jpg", tmp_path / "a.png"]
    for path in images:
        Image.fromarray(photo(10, 12)).save(path)
    before = images[0].read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(PredictError, match=r"contact_sheet\.jpg.*choose another folder.*--no-sheet"):
            predict_files(predictor, images, out)
    assert images[0].read_bytes() == before and not (tmp_path / "depth").exists()
    assert predict_files(predictor, images, tmp_path, sheet=False).done == images
    assert images[0].read_bytes() == before


def test_a_contact_sheet_that_cannot_be_written_is_told(predictor, tmp_path):
    Image.fromarray(photo(10, 12)).save(tmp_path / "a.png")
    (tmp_path / "out" / "contact_sheet.jpg").mkdir(parents=True)
    summary = predict_files(predictor, [tmp_path / "a.png"], tmp_path / "out")
    assert summary.done == [tmp_path / "a.png"] and summary.sheet is None
    (path, reason) = summary.failed[0]
    assert path == tmp_path / "out" / "contact_sheet.jpg" and "cannot be written (Is a directory)" in reason


class Greedy(Predictor):
    """Wants more memory than there is for images of one size, and fails otherwise for others."""

    def __call__(self, image):
        maps = super().__call__(image)
        if maps.image.shape[0] == 11:
            torch.empty(1 << 50)
        if maps.image.shape[0] == 12:
            raise RuntimeError("a mistake in\nthe code")
        if maps.image.shape[0] == 13:
            raise MemoryError
        return maps


def test_no_failure_of_an_image_ends_the_batch(predictor, tmp_path):
    paths = [tmp_path / f"{height}.png" for height in (11, 12, 13, 10)]
    for path in paths:
        Image.fromarray(photo(int(path.stem), 12)).save(path)
    summary = predict_files(Greedy(predictor.model), paths, tmp_path / "out")
    assert summary.done == [tmp_path / "10.png"] and summary.stopped is None
    (memory, mistake, more) = summary.failed
    assert memory[0].name == "11.png" and "out of memory" in memory[1] and "out of memory" in more[1]
    assert mistake[1] == r"RuntimeError: a mistake in\nthe code"


def test_inputs_are_files_folders_and_globs(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "deep/c.png", "deep/er/d.webp", "none/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def names(*patterns):
        return [str(path) for path in expand_inputs(patterns)]

    assert names(tmp_path) == [str(tmp_path / "a.PNG"), str(tmp_path / "b.jpg")]
    assert names("**/*") == ["a.PNG", "b.jpg", "deep/c.png", "deep/er/d.webp"]
    assert names("b.jpg", ".", tmp_path / "b.jpg", "notes.txt") == ["b.jpg", "a.PNG", "notes.txt"]
    for pattern in ("none", "absent.jpg", "*.tiff"):
        with pytest.raises(PredictError, match=pattern.replace("*", r"\*")):
            expand_inputs([pattern])


@pytest.mark.parametrize("pattern", ["{}", "{}/a.png", "{}/*.png", "{}/deep", "{}/deep/a.png"])
def test_inputs_that_may_not_be_read_are_told(tmp_path, pattern):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for path in (folder, folder / "deep"):
        Image.fromarray(photo(10, 12)).save(path / "a.png")
    with as_user(folder):
        folder.chmod(0)
        try:
            with pytest.raises(PredictError, match=r"may not be read: change its permissions"):
                expand_inputs([pattern.format(folder)])
        finally:
            folder.chmod(0o700)


def test_input_paths_that_cannot_be_are_told(tmp_path):
    (tmp_path / "link.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for pattern, message in (
        ("x" * 5000, r"File name too long.*give the path"),
        ("x" * 5000 + "*", r"no image .*matches"),
        (tmp_path / "loop.png", "Too many levels of symbolic links"),
        ("nul\0", "no file, folder or glob"),
    ):
        with pytest.raises(PredictError, match=message):
            expand_inputs([pattern])
    found = expand_inputs([tmp_path])
    assert [path.name for path in found] == ["link.png", "loop.png"]  # told when they are read


def test_a_batch_goes_on_after_bad_files_and_keeps_equal_stems_apart(predictor, tmp_path):
    paths = [tmp_path / name for name in ("a/x.png", "b/x.png", "b/x.jpg", "b/y.png", "b/Y.png", "b/bad.png")]
    for seed, path in enumerate(paths[:-1]):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo(20, 24, seed)).save(path)
    paths[-1].write_bytes(b"not a picture")
    absent = tmp_path / "gone.png"
    summary = predict_files(predictor, [paths[-1], *paths[:-1], absent], tmp_path / "out", formats=("npy", "picture"))
    assert summary.done == paths[:-1]
    assert [path for path, _ in summary.failed] == [paths[-1], absent]
    assert all(path.name in reason for path, reason in summary.failed)
    files = sorted((tmp_path / "out" / "arrays" / "depth").iterdir())
    assert len(files) == 5 and len({path.name.casefold() for path in files}) == 5
    expected = [predictor(path)["depth"] for path in paths[:-1]]
    for values in expected:
        assert sum(np.array_equal(values, np.load(path)) for path in files) == 1
    assert summary.sheet == tmp_path / "out" / "contact_sheet.jpg"
    assert summary.sheet.stat().st_size <= 300_000
    with pytest.raises(PredictError, match="is a file"):
        predict_files(predictor, paths, paths[0])


def test_names_tell_equal_stems_apart(tmp_path):
    paths = [tmp_path / name for name in ("1/l/x.png", "1/r/x.png", "2/l/x.png", "z.png")]
    names = file_names(paths)
    assert names == ["1_l_x", "r_x", "2_l_x", "z"]
    assert file_names([tmp_path / "x.png", tmp_path / "x.png"]) == ["x", "x_2"]
    assert file_names([tmp_path / "y.png", tmp_path / "Y.png"]) == ["y_png", "Y_png_2"]


# -- contact sheet -----------------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_image_and_pictures_with_the_colours_of_the_classes():
    task = create_task("semseg")
    index = np.zeros((60, 90), np.uint8)
    index[:, 45:] = 15
    blue = np.full((60, 90, 3), (10, 20, 200), np.uint8)
    maps = Maps(
        blue, {"semseg": index, "sal": np.ones((60, 90), np.float32)}, {"semseg": task, "sal": create_task("sal")}
    )
    sheet = contact_sheet([("straße 路.jpg", maps), ("second", maps)], tile=90)
    pixels = np.asarray(sheet).reshape(-1, 3)
    person = tuple(task.draw(np.array([[15]], np.uint8))[0, 0])
    shown = {colour: (pixels == colour).all(-1).sum() for colour in ((10, 20, 200), person)}
    assert shown[10, 20, 200] == 2 * 60 * 90
    assert shown[person] > 2 * 60 * 45  # two tiles and the legend's square
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_sheet_files_keep_to_their_limit(tmp_path, suffix):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8))
    path = save_sheet(noise, tmp_path / f"sheet{suffix}", max_bytes=60_000)
    assert path.stat().st_size <= 60_000
    with Image.open(path) as read:
        assert read.format == ("PNG" if suffix == ".png" else "JPEG") and read.width > 100
