"""The sets in arrays: CIFAR and MNIST, beside torchvision's own readers; validation splits; downloads."""

from __future__ import annotations

import gzip
import io
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from small_pictures import write_cifar10, write_cifar100, write_fashionmnist, write_folder, write_mnist

from data.vision import mnist, split
from data.vision.pictures import DATASETS, Pictures, missing, read
from fabric_trainer.errors import InputError

WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "mnist": write_mnist,
    "fashionmnist": write_fashionmnist,
    "folder": write_folder,
}
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def same(ours: Pictures, pixels: np.ndarray, labels: object) -> None:
    np.testing.assert_array_equal(ours.pixels, pixels)
    np.testing.assert_array_equal(ours.labels, labels)
    assert ours.pixels is not None and ours.pixels.dtype == np.uint8 and ours.labels.dtype == np.int64
    for i in (0, len(ours) - 1):
        picture = ours.picture(i)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), pixels[i])


# ---- beside torchvision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    reference = getattr(torchvision.datasets, name)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)  # it wants the published md5
    if name == "CIFAR10":
        write_cifar10(tmp_path, train=70, test=20, batches=3)
        monkeypatch.setattr(reference, "train_list", reference.train_list[:3])
    else:
        write_cifar100(tmp_path, train=70, test=20)
    ours = read(name.lower(), tmp_path)
    assert ours.val is None and ours.test is not None and (len(ours.train), len(ours.test)) == (70, 20)
    for part, train in ((ours.train, True), (ours.test, False)):
        theirs = reference(tmp_path, train=train)
        same(part, theirs.data, theirs.targets)
        assert ours.classes == theirs.classes
    assert ours.train.names[7] == "train/00007" and ours.test.names[-1] == "test/00019"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_is_torchvisions(tmp_path: Path, name: str, zipped: bool) -> None:
    WRITERS[name.lower()](tmp_path, train=30, test=20)
    theirs = [getattr(torchvision.datasets, name)(tmp_path, train=train) for train in (True, False)]
    if zipped:
        for path in (tmp_path / name / "raw").iterdir():
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    ours = read(name.lower(), tmp_path)
    for part, reference in zip((ours.train, ours.test), theirs):
        same(part, reference.data[..., None].expand(-1, -1, -1, 3).numpy(), reference.targets)
    assert mnist.CLASSES["FashionMNIST"] == torchvision.datasets.FashionMNIST.classes


def test_real_cifar10(test_data: Path) -> None:
    root = test_data / "data/images/cifar10"
    ours = read("cifar10", root, val_split=0.1)
    assert ours.classes == CIFAR10_CLASSES
    assert (len(ours.train), len(ours.val), len(ours.test)) == (5400, 600, 2000)
    counts = np.bincount(np.concatenate((ours.train.labels, ours.val.labels)))
    np.testing.assert_allclose(np.bincount(ours.val.labels), counts / 10, atol=0.5)
    with (root / "cifar-10-batches-py/data_batch_2").open("rb") as file:
        batch = pickle.load(file, encoding="latin1")
    whole = read("cifar10", root).train
    same(whole.take(np.arange(2000, 4000)), batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), batch["labels"])


# ---- CIFAR's pickles --------------------------------------------------------------------------------------------


def rewrite(path: Path, protocol: int = 2, **changes: object) -> None:
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, **changes}, protocol=protocol))


def as_bytes(value: object) -> object:
    if isinstance(value, str):
        return value.encode()
    return [as_bytes(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_bytes_keys_arrays_of_labels_and_any_protocol(tmp_path: Path, protocol: int) -> None:
    plain = read("cifar10", write_cifar10(tmp_path, train=20, test=10, batches=1))
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        content = {key.encode(): as_bytes(value) for key, value in pickle.loads(path.read_bytes()).items()}
        if b"labels" in content:
            content[b"labels"] = [np.int64(label) for label in content[b"labels"]]
            content[b"data"] = np.asfortranarray(content[b"data"])
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    ours = read("cifar10", tmp_path)
    assert ours.classes == plain.classes
    same(ours.train, plain.train.pixels, plain.train.labels)


def test_batches_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_cifar10(tmp_path, train=110, batches=11)
    for number in range(1, 12):
        rewrite(tmp_path / f"cifar-10-batches-py/data_batch_{number}", labels=[number % 10] * 10)
    assert read("cifar10", tmp_path).train.labels[::10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    rewrite(tmp_path / "cifar-10-batches-py/test_batch", extra=Code(tmp_path / "made"))
    with pytest.raises(InputError, match=r"test_batch: .*asks for posix\.mkdir; only arrays and plain containers"):
        read("cifar10", tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((40, 3072), np.float32)}, r"expected data uint8 \(pictures, 3072\), found float32"),
        ({"data": np.zeros((40, 1024), np.uint8)}, r"expected data uint8 \(pictures, 3072\), found uint8 \(40, 1024\)"),
        ({"data": [[1], [1, 2]]}, "not in CIFAR's layout"),
        ({"labels": [0] * 39}, r"expected labels, an integer for each.*found int64 \(39,\) for 40 pictures"),
        ({"labels": ["cat"] * 40}, "expected labels, an integer"),
        ({"labels": [10] * 40}, r"labels lie in 10\.\.10, not in 0\.\.9"),
        ({"labels": [-1] * 40}, r"labels lie in -1\.\.-1"),
    ],
)
def test_wrong_contents(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_cifar10(tmp_path)
    rewrite(tmp_path / "cifar-10-batches-py/test_batch", **changes)
    with pytest.raises(InputError, match=f"test_batch: {message}"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1]), pickle.dumps({"fine_labels": []})])
def test_no_pickle_of_cifar(tmp_path: Path, content: bytes) -> None:
    write_cifar100(tmp_path)
    path = tmp_path / "cifar-100-python/train"
    for written in (content, path.read_bytes()[:1000]):
        path.write_bytes(written)
        with pytest.raises(InputError, match=r"train: (no pickle|expected a pickled dict|no data in it)") as caught:
            read("cifar100", tmp_path)
        assert "\n" not in str(caught.value)


# ---- idx files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda data: data[:-1], "78399 values, but its head says 100 x 28 x 28"),
        ("train-images-idx3-ubyte", lambda data: data[:7], "no idx file of unsigned bytes with 3 axes"),
        ("train-labels-idx1-ubyte", lambda data: b"\0\0\x0d\1" + data[4:], "no idx file of unsigned bytes"),
        ("t10k-labels-idx1-ubyte", lambda data: data[:-1] + b"\x0a", "a label of 10; MNIST has 0 to 9"),
        ("t10k-labels-idx1-ubyte", lambda data: data[:4] + b"\0\0\0\1\0", "40 pictures, but 1 labels"),
    ],
)
def test_wrong_idx_files(tmp_path: Path, name: str, change: object, message: str) -> None:
    path = write_mnist(tmp_path) / "MNIST/raw" / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read("mnist", tmp_path)


def test_a_damaged_gz(tmp_path: Path) -> None:
    path = write_mnist(tmp_path, zipped=True) / "MNIST/raw/train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"text", whole[:500] + b"damage" + whole[506:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: can't be read"):
            read("mnist", tmp_path)


# ---- validation splits ------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=6),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 1 << 40),
    data=st.randoms(use_true_random=False),
)
def test_a_split_covers_is_stratified_and_depends_on_seed_and_names_alone(counts, share, seed, data) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"{label}/{i}.jpg" for i, label in enumerate(labels)]
    classes = [str(label) for label in range(len(counts))]
    train, val = split.draw(names, labels, classes, share, seed)
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    for label, count in enumerate(counts):
        assert (labels[val] == label).sum() == min(max(round(share * count), 1), count - 1)
    order = list(range(len(labels)))
    data.shuffle(order)
    _, again = split.draw([names[i] for i in order], labels[order], classes, share, seed)
    assert {names[order[i]] for i in again} == {names[i] for i in val}


def test_the_split_stays_what_it_is() -> None:
    """Of the seed alone, on any machine and with any version of numpy: a figure written down."""
    names, labels = [f"train/{i:05}" for i in range(20)], np.arange(20) % 2
    _, first = split.draw(names, labels, ["a", "b"], 0.3, 0)
    _, second = split.draw(names, labels, ["a", "b"], 0.3, 1)
    assert first.tolist() == [0, 2, 3, 4, 11, 15] and second.tolist() == [2, 4, 7, 8, 15, 17]


def test_a_picture_that_goes_moves_at_most_one_other() -> None:
    names, labels = [f"{i}.jpg" for i in range(200)], np.zeros(200, dtype=np.int64)
    _, val = split.draw(names, labels, ["a"], 0.2, 3)
    for gone in (0, 77, 199):
        kept = np.delete(np.arange(200), gone)
        _, again = split.draw([names[i] for i in kept], labels[kept], ["a"], 0.2, 3)
        assert len(set(val) - set(kept[again]) - {gone}) <= 1


def test_val_split_of_a_set(tmp_path: Path) -> None:
    write_cifar10(tmp_path, train=100)
    whole, sets = read("cifar10", tmp_path), read("cifar10", tmp_path, val_split=0.2)
    assert np.bincount(sets.val.labels).tolist() == [2] * 10
    for part in (sets.train, sets.val):
        places = [int(name.removeprefix("train/")) for name in part.names]
        same(part, whole.train.pixels[places], whole.train.labels[places])
    assert sets.val.names == read("cifar10", tmp_path, val_split=0.2).val.names
    assert sets.val.names != read("cifar10", tmp_path, val_split=0.2, split_seed=1).val.names


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10.0, float("nan")])
def test_no_share(tmp_path: Path, share: float) -> None:
    with pytest.raises(InputError, match=r"data\.val_split: .* such as 0\.1"):
        read("cifar10", write_cifar10(tmp_path), val_split=share)


def test_a_class_with_one_picture_or_none(tmp_path: Path) -> None:
    write_cifar10(tmp_path, train=19, batches=1)
    with pytest.raises(InputError, match=r"data\.val_split: class 'truck' has 1 training pictures; it takes 2"):
        read("cifar10", tmp_path, val_split=0.5)
    rewrite(tmp_path / "cifar-10-batches-py/data_batch_1", labels=[0] * 10 + [2] * 9)
    with pytest.raises(InputError, match=r"data\.val_split: class 'automobile' has 0 training pictures; it takes 2"):
        read("cifar10", tmp_path, val_split=0.5)


def test_take_shares_a_stretch(tmp_path: Path) -> None:
    train = read("cifar10", write_cifar10(tmp_path)).train
    stretch, some = train.take(np.arange(5, 15)), train.take(np.array([9, 2, 2]))
    assert np.shares_memory(stretch.pixels, train.pixels)
    assert some.names == ["train/00009", "train/00002", "train/00002"]
    same(some, train.pixels[[9, 2, 2]], train.labels[[9, 2, 2]])
    assert len(train.take(np.array([], dtype=np.int64))) == 0


# ---- what is not there ------------------------------------------------------------------------------------------


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("dataset", DATASETS)
def test_nothing_there_is_one_line_for_both(tmp_path: Path, dataset: str) -> None:
    (line,) = missing(dataset, tmp_path)
    assert "\n" not in line and str(tmp_path) in line
    if dataset != "folder":
        assert "data.download: true" in line and "expected" in line
        assert missing(dataset, tmp_path, download=True) == []
    with pytest.raises(InputError) as caught:
        read(dataset, tmp_path)
    assert str(caught.value) == line
    WRITERS[dataset](tmp_path)
    before = contents(tmp_path)
    assert missing(dataset, tmp_path) == [] and contents(tmp_path) == before


def test_a_part_there_is_named_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/test_batch").unlink()
    for download in (False, True):
        with pytest.raises(InputError, match="cifar-10-batches-py lacks cifar-10-batches-py/test_batch; move the fold"):
            read("cifar10", tmp_path, download=download)
        assert len(missing("cifar10", tmp_path, download=download)) == 1


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "folder"])
def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    cls_name = {"fashionmnist": "FashionMNIST"}.get(dataset, dataset.upper())
    calls = []

    def published(root: str, download: bool) -> None:
        calls.append(download)
        WRITERS[dataset](Path(root))

    monkeypatch.setattr(torchvision.datasets, cls_name, published)
    root = tmp_path / "new/root"
    first, second = (read(dataset, root, download=True) for _ in range(2))
    assert calls == [True] and len(first.train) == len(second.train) > 0
    assert len(list(root.iterdir())) == 1


@pytest.mark.parametrize("error", [URLError("no route to host"), RuntimeError("File not found\nor corrupted.")])
def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def unreachable(root: str, download: bool) -> None:
        (Path(root) / "half").write_text("half")
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", unreachable)
    with pytest.raises(InputError, match=r"data\.download: CIFAR10 could not be fetched into .*put cifar-10") as caught:
        read("cifar10", tmp_path, download=True)
    assert "\n" not in str(caught.value) and contents(tmp_path) == set()


def test_no_such_set_and_no_download_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task\.args\.dataset: no set 'imagenet'; one of cifar10, cifar100, mnist"):
        read("imagenet", tmp_path)
    with pytest.raises(InputError, match=r"data\.download: .*leave it false"):
        read("folder", write_folder(tmp_path), download=True)
    assert missing("folder", tmp_path, download=True)[0].startswith("data.download:")


def test_pictures_go_to_a_loaders_workers(tmp_path: Path) -> None:
    for dataset in ("mnist", "folder"):
        train = read(dataset, WRITERS[dataset](tmp_path / dataset)).train
        file = io.BytesIO(pickle.dumps(train))
        np.testing.assert_array_equal(pickle.load(file).picture(1), train.picture(1))
