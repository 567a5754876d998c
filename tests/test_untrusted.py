"""Files made to harm: each is refused with a remedy, at once, and without the memory it asks for."""

from __future__ import annotations

import json
import resource
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from scipy.io import savemat

from fuzz.guard import guarded
from fuzz.parsers import model_files, published
from pamm import official
from pamm.cli import main
from pamm.config.experiment import check, load
from pamm.config.strict import ConfigError, load_json, to_dict
from pamm.config.strict_yaml import load_yaml, read_yaml
from pamm.data import DataError
from pamm.data.pascal import read_label_map, read_objects
from pamm.evaluation.gain import GainError, baseline_scores
from pamm.models.registry import rebuild_model
from pamm.models.saved import CheckpointError, load_model
from pamm.official import OfficialError
from pamm.tasks import LabelError, create_task
from tiny import experiment

GIGABYTE = 2**30


@pytest.fixture(autouse=True)
def cheap(tmp_path) -> Iterator[None]:
    """The test takes neither a gigabyte nor ten seconds, and writes and runs nothing outside its folder."""
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with guarded(tmp_path):
        yield
    assert 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIGABYTE


# -- YAML ------------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, r"line 2, column 8: an alias, \*a, is not read: write its value out here"),
        ("a: &a [*a]", r"an alias, \*a"),
        ("a: {<<: {b: 1}}", r"a merged mapping, <<, is not read"),
        ("a: !!python/object/apply:os.system [ls]", r"the tag !!python/object/apply:os\.system is not read"),
        ("a: !!set {b}", r"the tag !!set is not read"),
        ("a: !own 3", r"the tag !own is not read"),
        ("[" * 100_000, r"more than 32 lists or mappings inside each other"),
        ("{a: " * 100_000, r"more than 32 lists or mappings inside each other"),
        ("- " * 100_000, r"more than 32"),
        ("? [a]\n: 1", r"a list or mapping stands for a key"),
        (f"a: {'9' * 500_000}", r"the number 9+…9+ is too large"),
        ("a: 0x" + "f" * 100_000, r"is too large"),
        ("a: 9223372036854775808", r"is too large"),
        ('a: "\\ud800"', r"half a character"),
        ("a: 1\0", r"special characters are not allowed"),
        ("a: 1\na: 2", r"the key 'a' stands in line 1 and again in line 2"),
        ("a: [1, 2", r"line 1, column 9"),
        ("x" * 2_000_000, r"expected at most 1048576"),
        ("a: 1\n---\na: 2", r"expected a single document"),
    ],
)
def test_yaml_that_is_no_settings_is_told_in_one_line(text, told):
    with pytest.raises(yaml.YAMLError, match=told) as found:
        load_yaml(text)
    assert len(str(found.value)) < 300 and str(found.value).isprintable()


def test_plain_yaml_is_read_as_it_is_written():
    text = "date: 2020-01-02\nnone: null\nsign: =\nyes: [1, -2, 1.5, true, '0x10', 0x10]\nempty:\nanchor: &a text"
    found = {
        "date": "2020-01-02",
        "none": None,
        "sign": "=",
        True: [1, -2, 1.5, True, "0x10", 16],
        "empty": None,
        "anchor": "text",
    }
    assert load_yaml(text) == found


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: 1".encode("utf-16"), r"UTF-16.*; save it as UTF-8"),
        (b"a: \xff", r"byte 3 is no text in UTF-8"),
        (b" " * 100_000_000, "more than 1048576 bytes"),
    ],
)
def test_a_yaml_file_of_another_encoding_or_size_is_told(content, told, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(yaml.YAMLError, match=told):
        read_yaml(tmp_path / "a.yaml")


def test_a_byte_order_mark_is_no_part_of_a_yaml_file(tmp_path):
    (tmp_path / "a.yaml").write_bytes("a: é".encode("utf-8-sig"))
    assert read_yaml(tmp_path / "a.yaml") == {"a": "é"}


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[1e999]", "[9223372036854775808]", "[" * 100_000, "9" * 5000]
)
def test_json_that_readers_understand_differently_is_refused(text):
    with pytest.raises(ValueError):
        load_json(text)


# -- experiments ---------------------------------------------------------------------------------------------------------------

CHANGES = [
    ("name", "../../x"),
    ("name", "/etc/x"),
    ("name", ".."),
    ("name", ""),
    ("name", "a\x1b[31m"),
    ("name", "x" * 300),
    ("name", "a\\..\\b"),
    *(
        ("model.backbone." + leaf, value)
        for leaf in ("embed_dim", "depth", "num_heads", "patch_size")
        for value in (0, -1, 10**9)
    ),
    *(("model.decoder." + leaf, value) for leaf in ("width", "state_size", "orders") for value in (0, -1, 10**9)),
    *(("model.decoder.experts." + leaf, value) for leaf in ("count", "rank", "top_k") for value in (0, -1, 10**9)),
    ("model.backbone.out_indices", list(range(1, 1000))),
    ("model.backbone.out_indices", [-1, 1]),
    ("model.backbone.mlp_ratio", 1e9),
    ("model.backbone.drop_path_rate", 1.0),
    ("data.size", [10**9, 1]),
    ("data.size", [0, 32]),
    ("data.scale", [0.0, 2.0]),
    ("data.scale", [float("nan"), 2.0]),
    ("data.images", [-1, 3]),
    ("data.images", [10**12, 3]),
    ("train.lr", float("inf")),
    ("train.lr", float("nan")),
    ("train.batch", 10**12),
    ("train.workers", 10**6),
    ("train.devices", 10**6),
    ("tasks.depth.weight", float("inf")),
    ("tasks.depth.weight", -1.0),
]


def changed(tree: dict, leaf: str, value: object) -> dict:
    first, _, rest = leaf.partition(".")
    return tree | {first: changed(tree[first], rest, value) if rest else value}


@pytest.mark.parametrize(("leaf", "value"), CHANGES)
def test_every_size_and_name_of_an_experiment_has_bounds(leaf, value, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(changed(to_dict(experiment()), leaf, value)))
    with pytest.raises(ConfigError, match=leaf.split(".")[-1]) as found:
        check(load(path))
    assert len(str(found.value)) < 1000 and str(found.value).isprintable()


def test_an_experiment_does_not_choose_a_run_folder_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(yaml.safe_dump(to_dict(experiment()) | {"name": "../../x"}))
    assert main(["train", "a.yaml"]) == 1
    assert "a.yaml: name: found '../../x', expected the name of a folder under runs/" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml"]


# -- saved models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path) -> Path:
    for name, content in model_files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("leaf", "value", "told"),
    [
        ("model.decoder.width", 65536, "belongs to another architecture|take .* GB"),
        ("model.decoder.width", -64, "decoder.width: found -64"),
        ("model.decoder.width", 10**30, "too large"),
        ("model.decoder.state_size", 4096, "belongs to another architecture"),
        ("model.decoder.experts.count", 4096, "belongs to another architecture"),
        ("model.backbone.embed_dim", 65536, "belongs to another architecture|take .* GB"),
        ("model.backbone.depth", 128, "belongs to another architecture"),
        ("model.backbone.depth", 10**6, "backbone.depth: found 1000000, expected a number from 1 to 128"),
        ("model.backbone.mlp_ratio", 64.0, "belongs to another architecture"),
        ("model.backbone.patch_size", 1, "belongs to another architecture"),
        ("image_size", [16384, 16384], "belongs to another architecture"),
        ("image_size", [10**9, 16], "image_size: found 1000000000"),
        ("image_size", [16.0, 16], "expected whole numbers of pixels"),
        ("image_size", [[[[16]]], 16], "expected whole numbers of pixels"),
        ("tasks.semseg.classes", [f"c{i}" for i in range(200)], "belongs to another architecture"),
        ("tasks.semseg.classes", [f"c{i}" for i in range(100_000)], "100000 classes, expected 2 to 255"),
        ("tasks.semseg.classes", [[[["a"]]]], "classes"),
        ("tasks", {"../x": {}}, "unknown task"),
        ("tasks", [1], "not a pamm model configuration"),
        ("model", [], "not a pamm model configuration|expected a mapping"),
    ],
)
def test_a_config_is_compared_with_its_weights_before_memory_is_taken(leaf, value, told, model_folder):
    settings_ = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(changed(settings_, leaf, value)))
    with pytest.raises(CheckpointError, match=told):
        load_model(model_folder)


def test_a_config_of_large_windows_is_refused():
    """Tables of positions inside windows are in no file of weights: they have a bound of their own."""
    backbone = {
        "name": "swin_tiny_patch4_window7_224",
        "window_size": 256,
        "out_indices": [0, 1],
        "depths": [2, 2],
        "embed_dim": 8,
    }
    backbone |= {"pretrained": False, "num_heads": [1, 1]}
    settings_ = {
        "model": {"backbone": backbone, "decoder": {"system": "mtmamba"}},
        "tasks": {"depth": {}},
        "image_size": [2048, 2048],
    }
    with pytest.raises(ConfigError, match=r"backbone\.window_size: the tables of positions inside windows take"):
        rebuild_model(settings_)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int64, torch.bool])
def test_weights_of_another_kind_are_refused(kind, model_folder):
    weights = {k: v for k, v in load_model(model_folder).state_dict().items()}
    save_file(
        {k: v.contiguous().to(kind if v.is_floating_point() else v.dtype) for k, v in weights.items()},
        model_folder / "m",
    )
    (model_folder / "m").replace(model_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"of another kind, e\.g\. .* torch\."):
        load_model(model_folder)


@pytest.mark.parametrize("header", [2**63, 10**9, 2**23 + 1, 0])
def test_a_safetensors_header_of_absurd_length_is_refused(header, model_folder):
    path = model_folder / "model.safetensors"
    path.write_bytes(header.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_model(model_folder)


def test_a_loaded_model_has_the_bits_of_the_saved_one(model_folder):
    from safetensors.torch import load

    saved = load(model_files()["model.safetensors"])
    model = load_model(model_folder)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


# -- published checkpoints ---------------------------------------------------------------------------------------------------


def save_with(path: Path, **others: object) -> None:
    torch.save({"model": published() | others}, path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda: torch.zeros(1).expand(10**6, 10**6), r"repeats 4 bytes as 4000000000000"),
        (lambda: torch.zeros(100).as_strided((90, 10), (1, 1)), r"repeats 400 bytes as 3600"),
        (lambda: torch.zeros(3, dtype=torch.bool), r"torch\.bool of layout"),
        (lambda: torch.zeros(3, dtype=torch.float8_e4m3fn), r"torch\.float8_e4m3fn of layout"),
        (lambda: torch.eye(3).to_sparse(), r"layout torch\.sparse_coo"),
        (lambda: torch.zeros(10**9, device="meta"), r"has a shape and no numbers"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"torch\.qint8 of layout"),
        (lambda: "text", r"the entry 'heads\.depth\.linear_pred\.bias' is a str"),
    ],
    ids=["expanded", "overlapping", "bool", "float8", "sparse", "meta", "quantized", "text"],
)
def test_a_published_tensor_that_claims_what_it_has_not_is_refused(value, told, tmp_path):
    with warnings.catch_warnings():  # torch's, of kinds that it means to drop
        warnings.simplefilter("ignore")
        save_with(tmp_path / "a.pth", **{"heads.depth.linear_pred.bias": value()})
    with pytest.raises(OfficialError, match=told):
        official.load(tmp_path / "a.pth")


def test_many_names_of_one_storage_are_refused(tmp_path):
    shared = torch.zeros(500, 1000)
    save_with(tmp_path / "a.pth", **{f"extra.{number}": shared for number in range(5000)})
    with pytest.raises(OfficialError, match=r"its tensors claim .* bytes of .* that are there"):
        official.load(tmp_path / "a.pth")


def test_tensors_that_are_views_of_others_are_read_right(tmp_path):
    flat = torch.cat([value.flatten().float() for value in published().values()])
    parts = flat.split([value.numel() for value in published().values()])
    state = {key: part.view(value.shape) for (key, value), part in zip(published().items(), parts, strict=True)}
    torch.save(state, tmp_path / "a.pth")
    model = official.load(tmp_path / "a.pth", num_heads=2)
    torch.save(published(), tmp_path / "b.pth")
    expected = official.load(tmp_path / "b.pth", num_heads=2).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def rewrite(path: Path, kind: int, change: Callable[[str, bytes], bytes] = lambda name, record: record) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, record in records.items():
            archive.writestr(name, change(name, record))


def test_compressed_records_are_refused(tmp_path):
    save_with(tmp_path / "a.pth")
    rewrite(tmp_path / "a.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(OfficialError, match=r"is compressed, which torch\.save never does"):
        official.load(tmp_path / "a.pth")


def test_a_bomb_in_the_names_is_refused(tmp_path):
    save_with(tmp_path / "a.pth")
    rewrite(
        tmp_path / "a.pth", zipfile.ZIP_STORED, lambda name, r: r + bytes(2**25) if name.endswith("data.pkl") else r
    )
    with pytest.raises(OfficialError, match=r"names and shapes has \d+ bytes, expected at most"):
        official.load(tmp_path / "a.pth")


def test_shapes_that_do_not_belong_together_take_no_memory(tmp_path):
    """Of two tensors of some kilobytes each a network of terabytes would follow."""
    state = {key: value for key, value in published().items()}
    stage = "backbone.stage_MTLoRA_mamba.0"
    for key in [key for key in state if key.startswith(f"{stage}.first_decode")]:
        state[key] = torch.zeros(65536, *[1] * (state[key].dim() - 1))
    state[f"{stage}.dim_expand_proj_x0.depth.weight"] = torch.zeros(65536, 1, 1, 1)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises((OfficialError, ConfigError), match=r"take .* GB|do not belong together|found shape"):
        official.load(tmp_path / "a.pth")


# -- MATLAB and NumPy --------------------------------------------------------------------------------------------------------


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def array(kind: int, shape: tuple[int, ...], name: bytes, content: bytes) -> bytes:
    flags, sizes = struct.pack("<II", kind, 0), struct.pack(f"<{len(shape)}i", *shape)
    return element(14, element(6, flags) + element(5, sizes) + element(1, name) + content)


def mat(body: bytes) -> bytes:
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + body


def deep_cells(depth: int, name: bytes = b"LabelMap") -> bytes:
    content = array(6, (1, 1), b"", element(9, bytes(8)))
    for _ in range(depth):
        content = array(1, (1, 1), b"", content)
    return array(1, (1, 1), name, content)


def packed(body: bytes) -> bytes:
    content = zlib.compress(body, 9)
    return struct.pack("<II", 15, len(content)) + content


MATS = {
    "nested": (mat(deep_cells(2000)), "arrays, or 16 inside each other"),
    "nested and packed": (mat(packed(deep_cells(2000))), "arrays, or 16 inside each other"),
    "cells of nothing": (mat(array(1, (30000, 30000), b"LabelMap", b"")), "a cell array of shape"),
    "structs of nothing": (
        mat(array(2, (30000, 30000), b"LabelMap", element(5, struct.pack("<i", 8)) + element(1, b""))),
        "an array of structs of shape",
    ),
    "numbers of nothing": (mat(array(6, (30000, 30000), b"LabelMap", element(9, bytes(8)))), "an array of shape"),
    "negative": (mat(array(6, (-1, 1), b"LabelMap", element(9, b""))), "an array of shape"),
    "function": (mat(array(16, (1, 1), b"LabelMap", b"")), "is a function"),
    "object": (mat(array(3, (1, 1), b"LabelMap", b"")), "is an object"),
    "opaque": (
        mat(element(14, element(6, struct.pack("<II", 17, 0)) + element(1, b"LabelMap"))),
        "no .* array 'LabelMap'",
    ),
    "sparse": (mat(array(5, (9, 9), b"LabelMap", b"")), "is a sparse matrix"),
    "bomb": (mat(packed(bytes(270_000_000))), "unpacks to more than"),
    "version 7.3": (
        b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n",
        r"version 7\.3 \(HDF5\); in MATLAB, .* -v7",
    ),
    "version 4": (struct.pack("<5i", 0, 1, 1, 0, 2) + b"a\0" + bytes(200), "no MATLAB file of version 5 to 7"),
    "not finite": (
        mat(array(6, (1, 1), b"LabelMap", element(9, struct.pack("<d", float("nan"))))),
        "no .* array 'LabelMap'",
    ),
}


@pytest.mark.parametrize("name", MATS)
def test_a_matlab_file_that_harms_is_refused(name, tmp_path):
    content, told = MATS[name]
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_label_map(tmp_path / "a.mat")


def test_a_hundred_thousand_nested_cells_are_refused(tmp_path):
    """SciPy's reader ends the process here."""
    inner = array(6, (1, 1), b"", element(9, bytes(8)))
    head = array(1, (1, 1), b"", b"")[8:]
    sizes = [len(inner) + (8 + len(head)) * level for level in range(100_000)]
    opened = b"".join(struct.pack("<II", 14, len(head) + size) + head for size in reversed(sizes))
    name = element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<2i", 1, 1)) + element(1, b"anno")
    body = struct.pack("<II", 14, len(name) + len(opened) + len(inner)) + name + opened + inner
    (tmp_path / "a.mat").write_bytes(mat(packed(body)))
    with pytest.raises(DataError, match="arrays, or 16 inside each other"):
        read_objects(tmp_path / "a.mat")


@pytest.mark.parametrize(
    "anno",
    [
        {"imname": "a", "objects": 3.0},
        {"imname": "a"},
        np.eye(3),
        {"imname": "a", "objects": {"class": "person", "class_ind": float("inf"), "mask": 0, "parts": 0}},
        {
            "imname": "a",
            "objects": {"class": "person", "class_ind": 15, "mask": 0, "parts": {"part_name": "head", "mask": "text"}},
        },
    ],
)
def test_an_annotation_of_another_structure_is_told(anno, tmp_path):
    savemat(tmp_path / "a.mat", {"anno": anno})
    with pytest.raises(DataError, match="has no PASCAL-Part structure 'anno'"):
        read_objects(tmp_path / "a.mat")


@pytest.mark.parametrize(
    ("kind", "shape", "told"),
    [
        ("<f4", (2**31, 2**31), "is not a whole .npy file"),
        ("<f4", (10**30,), "is not a whole .npy file"),
        ("<f4", (-1, 4), "is not a whole .npy file|of shape"),
        ("<f8", (60000, 60000), "is not a whole .npy file"),
        ("|O", (3, 4), "is not a whole .npy file"),
        ([("a", "<f4")], (3, 4), "is not a whole .npy file"),
        ("<U4", (3, 4), "is not a whole .npy file"),
        ("<i4", (3, 4), "holds int32"),
        ("<f4", (0, 4), "holds float32|is not a whole"),
    ],
)
def test_an_array_that_claims_what_it_has_not_is_refused(kind, shape, told, tmp_path):
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(48))
    with pytest.raises(LabelError, match=told):
        create_task("depth").read(tmp_path / "a.npy")


def test_a_sparse_file_of_an_endless_array_is_refused(tmp_path):
    """The file has the size that its header claims and takes no place on the disk; reading it would take a terabyte."""
    header = repr({"descr": "<f4", "fortran_order": False, "shape": (500_000, 500_000)}).encode() + b"\n"
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        file.truncate(10**12 + 1000)
    with pytest.raises(LabelError, match="expected at most 250,000,000"):
        create_task("depth").read(tmp_path / "a.npy")


def test_arrays_in_fortran_order_and_of_big_endian_numbers_are_read_right(tmp_path):
    values = np.arange(1.0, 13).reshape(3, 4)
    for number, stored in enumerate((np.asfortranarray(values), values.astype(">f8"), values.astype("<f2"))):
        np.save(tmp_path / f"{number}.npy", stored)
        assert torch.equal(create_task("depth").read(tmp_path / f"{number}.npy")[0], torch.from_numpy(values).float())


# -- results ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"results": {"depth": {"RMSE": "1"}}}',
        '{"results": [1]}',
        '{"results": {"depth": 3}}',
        '{"results": {"../x": {"RMSE": 1}}}',
        "[]",
        "\udcff",
    ],
)
def test_a_foreign_file_of_results_is_told(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(GainError, match="is not a results file") as found:
        baseline_scores(str(path))
    assert str(found.value).isprintable()
