"""Folders of pictures beside torchvision's ImageFolder, corrupt files, and what becomes of unusual pictures."""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_pictures import write_folder
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.vision import scan
from data.vision.decode import EXTENSIONS, decode
from data.vision.pictures import missing, read
from fabric_trainer.errors import InputError


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def silent(_: str) -> None: ...


# ---- layouts ----------------------------------------------------------------------------------------------------


def test_a_folder_is_imagefolders(tmp_path: Path) -> None:
    write_folder(tmp_path, ["b", "a", "10", "2"], per_class=4, size=10, splits=("train", "val", "test"))
    for name in (
        "train/a/deep/x.PNG",
        "train/a/deep/deeper/y.Jpeg",
        "train/a/dee/z.bmp",
        "train/a/A.tiff",
        "val/b/w.PPM",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), "red").save(path)
    (tmp_path / "train/a/notes.txt").write_text("no picture")
    (tmp_path / "readme.md").write_text("no folder")
    ours = read("folder", tmp_path, tell=silent)
    for name in ("train", "val", "test"):
        part, theirs = getattr(ours, name), ImageFolder(tmp_path / name)
        assert ours.classes == theirs.classes
        assert [str(tmp_path / each) for each in part.names] == [path for path, _ in theirs.samples]
        assert part.labels.tolist() == theirs.targets and part.labels.dtype == np.int64 and part.pixels is None
        for i in range(len(part)):
            np.testing.assert_array_equal(part.picture(i), theirs[i][0])
    assert EXTENSIONS == IMG_EXTENSIONS


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], 2)
    names = read("folder", tmp_path, tell=silent).train.names
    for name in ("train/.git/x.png", "train/a/._000.jpg", "train/a/.thumbs/x.png", ".hidden/x.png", "val/.x/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hidden")
    assert read("folder", tmp_path, tell=silent).train.names == names


def test_one_folder_split_by_a_seed(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], 10, size=8, splits=())
    with pytest.raises(InputError, match=r"data\.val_split: .* is one folder of classes; say what share .* as 0\.1"):
        read("folder", tmp_path)
    assert missing("folder", tmp_path)[0].startswith("data.val_split:") and not missing(
        "folder", tmp_path, val_split=0.2
    )
    sets = read("folder", tmp_path, val_split=0.2, tell=silent)
    assert sets.test is None and sorted([*sets.train.names, *sets.val.names]) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")
    )
    assert sets.val.labels.tolist() == [0, 0, 1, 1] and sets.val.names[0].startswith("a/")
    assert sets.val.names == read("folder", tmp_path, val_split=0.2).val.names
    assert sets.val.names != read("folder", tmp_path, val_split=0.2, split_seed=1).val.names


def test_val_from_train_beside_a_test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], 10, size=8, splits=("train", "test"))
    sets = read("folder", tmp_path, val_split=0.3, tell=silent)
    assert (len(sets.train), len(sets.val), len(sets.test)) == (14, 6, 20)
    assert {name.split("/")[0] for name in sets.val.names} == {"train"}


def remove(path: Path) -> None:
    for each in path.iterdir():
        each.unlink()
    path.rmdir()


@pytest.mark.parametrize(
    ("change", "val_split", "message"),
    [
        (
            lambda root: (root / "train/c").mkdir(),
            None,
            r"data\.root: no picture of class 'c' in .*train; expected files",
        ),
        (lambda root: (root / "val/c").mkdir(), None, r"data\.root: val has class 'c', which train lacks"),
        (
            lambda root: (root / "test/c").mkdir(parents=True),
            None,
            r"data\.root: test has class 'c', which train lacks",
        ),
        (lambda root: (root / "test/a").mkdir(parents=True), None, r"data\.root: no picture of class 'a' in .*test"),
        (lambda root: (root / "test").mkdir(), None, r"data\.root: test has no picture of class 'a', 'b'"),
        (lambda root: remove(root / "val/b"), None, r"data\.root: val has no picture of class 'b'"),
        (lambda root: remove(root / "train/b"), None, r"data\.root: one class only \('a'\) in .*train"),
        (
            lambda root: (root / "train").rename(root / "training"),
            None,
            r"data\.root: .* has 'val', but no folder train",
        ),
        (
            lambda root: (root / "val").rename(root / "valid"),
            None,
            r"data\.val_split: .* has train but no val; say what",
        ),
        (lambda root: None, 0.1, r"data\.val_split: .* has a folder val: leave 0\.1 out, or move the folder away"),
        (lambda root: (root / "train/a/deep").chmod(0), None, r"deep can't be read \(Permission denied\)"),
    ],
)
def test_classes_that_do_not_fit(tmp_path: Path, change: Callable, val_split: float | None, message: str) -> None:
    write_folder(tmp_path, ["a", "b"], 2, size=8)
    (tmp_path / "train/a/deep").mkdir()
    if "Permission" in message and os.geteuid() == 0:
        pytest.skip("root reads everything")
    change(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read("folder", tmp_path, val_split=val_split, tell=silent)
    assert missing("folder", tmp_path, val_split=val_split) == [str(caught.value)] and "\n" not in str(caught.value)


def test_pictures_without_folders_of_classes(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"data\.root: no folder of a class in .*<class>/<picture>"):
        read("folder", tmp_path, val_split=0.1)


# ---- corrupt files ----------------------------------------------------------------------------------------------


def damage(root: Path) -> dict[str, str]:
    """Damaged files, beside good ones, and what is said of them."""
    jpeg, png = (root / "train/a/000.jpg").read_bytes(), (root / "train/a/001.png").read_bytes()
    (root / "train/a/cut.jpg").write_bytes(jpeg[:-20])
    (root / "train/a/cut.png").write_bytes(png[:-60])
    (root / "train/b/empty.jpg").write_bytes(b"")
    (root / "train/b/text.png").write_text("<html>404</html>")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(root / "val/a/float.tiff")
    (root / "val/b/plot.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )  # never handed to another program
    return {
        "train/a/cut.jpg": "truncated",
        "train/a/cut.png": "truncated|broken",
        "train/b/empty.jpg": "an empty file",
        "train/b/text.png": "no picture",
        "val/a/float.tiff": "32-bit float",
        "val/b/plot.png": "no picture",
    }


def test_corrupt_files_are_named_and_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], 4, size=20)
    whole, lines = read("folder", tmp_path, tell=silent), []
    bad = damage(tmp_path)
    sets = read("folder", tmp_path, corrupt_limit=6, tell=lines.append)
    assert sets.train.names == whole.train.names and sets.val.names == whole.val.names
    assert sets.train.labels.tolist() == whole.train.labels.tolist()
    assert lines[0] == f"decoding 22 pictures of {tmp_path} once, to find corrupt ones"
    assert lines[-1] == "6 of 22 pictures corrupt; task.args.corrupt_limit is 6"

    for line, (name, reason) in zip(lines[1:-1], bad.items(), strict=True):
        assert line.startswith(f"corrupt, left out: {name} (") and re.search(reason, line), line
    with pytest.raises(InputError, match=r"task\.args\.corrupt_limit: 6 of 22 pictures under .* the 5 to leave out"):
        read("folder", tmp_path, corrupt_limit=5, tell=silent)


def test_ten_are_named_and_the_others_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], 2, size=8)
    for i in range(13):
        (tmp_path / f"val/b/x{i:02}.jpg").write_bytes(b"")
    lines: list[str] = []
    read("folder", tmp_path, corrupt_limit=13, tell=lines.append)
    assert [line.split()[3] for line in lines[1:11]] == [f"val/b/x{i:02}.jpg" for i in range(10)]
    assert lines[11:] == ["3 more, 13 of 21 pictures corrupt; task.args.corrupt_limit is 13"]


def test_a_class_of_corrupt_files_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], 2, size=8)
    for path in (tmp_path / "val/b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"data\.root: val has no picture of class 'b'"):
        read("folder", tmp_path, tell=silent)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_found(tmp_path: Path, progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.jpg", progressive=progressive)
    data = (tmp_path / "whole.jpg").read_bytes()
    names = []
    for end in [*range(0, len(data) - 20, 61), *range(len(data) - 20, len(data))]:
        names.append(f"{end}.jpg")
        (tmp_path / names[-1]).write_bytes(data[:end])
    assert list(scan.corrupt(tmp_path, [*names, "whole.jpg"], silent)) == names


def test_the_outcome_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, ["a", "b"], 4, size=20)
    damage(tmp_path)
    first = read("folder", tmp_path, tell=silent)
    decoded = []
    monkeypatch.setattr(scan, "decode", lambda path, least: decoded.append(path) or decode(path, least))
    lines: list[str] = []
    assert read("folder", tmp_path, tell=lines.append).train.names == first.train.names
    assert decoded == [] and len(lines) == 7 and "once" not in lines[0]
    Image.new("RGB", (9, 9)).save(tmp_path / "train/b/empty.jpg")
    assert read("folder", tmp_path, tell=silent).train.names != first.train.names and len(decoded) == 22
    for kept in Path("~/.cache/fabric_trainer/scans").expanduser().iterdir():
        kept.write_text("{")  # not as we write it
    read("folder", tmp_path, tell=silent)
    assert len(decoded) == 44


def test_a_cache_that_can_not_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    lines: list[str] = []
    assert len(read("folder", write_folder(tmp_path / "set"), tell=lines.append).train) == 24
    assert len(lines) == 2 and lines[1].startswith("what was found is not kept for the next run:")


def test_a_file_that_can_not_be_read_is_not_corrupt(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a", "b"], 2)
    (tmp_path / "train/a/link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(InputError, match=r"link\.jpg: can't be read \(No such file"):
        read("folder", tmp_path, tell=silent)


def test_a_picture_damaged_later_is_named(tmp_path: Path) -> None:
    train = read("folder", write_folder(tmp_path), tell=silent).train
    (tmp_path / train.names[1]).write_bytes(b"")
    with pytest.raises(InputError, match=rf"{train.names[1]}: can't be decoded any more"):
        train.picture(1)


# ---- unusual pictures -------------------------------------------------------------------------------------------

GRAY16 = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
RGB = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 9, 9], [200, 100, 50], [255, 255, 255]]], np.uint8)


def palette(transparent: int | bytes) -> tuple[Image.Image, dict[str, object]]:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image, {"transparency": transparent}


def rgba(alpha: int) -> Image.Image:
    return Image.fromarray(np.dstack((RGB, np.full(RGB.shape[:2], alpha, np.uint8))))


WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("gray.png", Image.fromarray(RGB[..., 0]), np.repeat(RGB[..., :1], 3, 2)),
        ("gray.jpg", Image.new("L", (3, 2), 77), np.full((2, 3, 3), 77)),
        ("black_and_white.png", Image.fromarray(RGB[..., 0] > 100), np.repeat(255 * (RGB[..., :1] > 100), 3, 2)),
        ("gray16.png", Image.fromarray(GRAY16), np.repeat(np.uint8(GRAY16 >> 8)[..., None], 3, 2)),
        ("gray16.tif", Image.fromarray(GRAY16), np.repeat(np.uint8(GRAY16 >> 8)[..., None], 3, 2)),
        ("gray16.pgm", Image.fromarray(GRAY16), np.repeat(np.uint8(GRAY16 >> 8)[..., None], 3, 2)),
        ("rgba.png", rgba(255), RGB),
        ("invisible.png", rgba(0), np.full((2, 3, 3), 255)),
        ("half.webp", Image.new("RGBA", (3, 2), (0, 0, 0, 128)), np.full((2, 3, 3), 127)),
        ("gray_alpha.png", Image.new("LA", (3, 2), (0, 0)), np.full((2, 3, 3), 255)),
        ("palette_index.png", palette(1), [[[255, 0, 0], WHITE, [0, 0, 255]]]),
        ("palette_bytes.png", palette(b"\0\xff\xff"), [[WHITE, [0, 255, 0], [0, 0, 255]]]),
        ("cmyk.jpg", Image.new("CMYK", (3, 2), (0, 255, 255, 0)), np.full((2, 3, 3), [255, 0, 0])),
        ("cmyk.tif", Image.fromarray(RGB).convert("CMYK"), RGB),
        ("lab.tif", Image.new("LAB", (3, 2), (255, 128, 128)), np.full((2, 3, 3), 255)),
        ("a_gif.jpg", Image.fromarray(RGB).quantize(8), RGB),
    ],
)
def test_modes(tmp_path: Path, name: str, image: object, expected: object) -> None:
    image, options = image if isinstance(image, tuple) else (image, {})
    image.save(tmp_path / name, format="GIF" if name == "a_gif.jpg" else None, **options)
    for least in (None, 1):
        got = decode(tmp_path / name, least)
        assert got.mode == "RGB"
    np.testing.assert_allclose(np.asarray(decode(tmp_path / name), int), expected, atol=2 if "jp" in name else 1)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    """Where row 0 and column 0 of the file belong, by the table of the EXIF standard (Orientation, 274)."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24] = 255  # bright at row 0, column 0
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / f"x.{kind}", exif=exif, quality=95)
    turned = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
        7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda x: x.transpose(1, 0, 2)[::-1],
    }.get(orientation, lambda x: x)  # 0 and 9 mean nothing
    np.testing.assert_allclose(decode(tmp_path / f"x.{kind}"), turned(pixels), atol=2)
    small = np.asarray(decode(tmp_path / f"x.{kind}", least=8))
    assert small.shape[:2] == (turned(pixels[::4, ::4]) if kind == "jpg" else turned(pixels)).shape[:2]


@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\0\0\0\x08\0\x05garbage", b"II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_is_no_damaged_picture(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "x.jpg", exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings(action="ignore"):
        assert decode(tmp_path / "x.jpg").size == (48, 32)


@pytest.mark.parametrize(
    ("least", "shorter"), [(None, 200), (200, 200), (101, 200), (100, 100), (26, 50), (25, 25), (1, 25)]
)
def test_least(tmp_path: Path, least: int | None, shorter: int) -> None:
    pixels = np.linspace(0, 255, 240).astype(np.uint8)[None].repeat(200, 0)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "x.jpg", quality=95)
    got = decode(tmp_path / "x.jpg", least)
    assert got.size == (shorter * 6 // 5, shorter)
    blocks = pixels.reshape(shorter, 200 // shorter, -1, 200 // shorter).mean((1, 3))  # what a smaller decode averages
    np.testing.assert_allclose(np.asarray(got)[..., 0], blocks, atol=3)


def test_sixteen_bit_rgb_keeps_its_high_byte_too(tmp_path: Path) -> None:
    """Written by hand: Pillow has no such mode."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = np.array([[0x12FF, 0xFF00, 0x80FF]], ">u2")
    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + values.tobytes())) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert np.asarray(decode(tmp_path / "x.png")).tolist() == [[[0x12, 0xFF, 0x80]]]


def test_real_sign_digits(test_data: Path) -> None:
    root = test_data / "data/images/sign_digits"
    sets = read("folder", root, tell=silent)
    assert (len(sets.train), len(sets.val), sets.test) == (500, 140, None) and sets.classes == list("0123456789")
    assert sets.train.labels.tolist() == ImageFolder(root / "train").targets
    largest = max(range(500), key=lambda i: (root / sets.train.names[i]).stat().st_size)
    assert sets.train.picture(largest).size == (3024, 3024)
    assert sets.train.picture(largest, least=64).size == (378, 378)  # an eighth
