"""DATA: folders of another layout, roots without files, images that cannot be read."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from cli_examples import draw_images
from PIL import Image

from captum_classfilters import ClassFilters
from captum_classfilters.cli.data import Loader, Preprocessing, choose_preprocessing, open_source

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = ("--image-size", "32")


@pytest.fixture
def attribute(run, checkpoint, tmp_path):
    """``attribute`` with the checkpoint for three classes, on other data."""

    def call(data, *words):
        return run("attribute", "resnet18", data, "--weights", checkpoint, "--out", tmp_path / "out", *SMALL, *words)

    return call


@pytest.fixture
def refused(attribute, tmp_path):
    """The words on stderr; nothing was written."""

    def call(data, *words):
        found = attribute(data, *words)
        assert found.status == 1
        assert found.out == ""
        assert "Traceback" not in found.err
        assert not list((tmp_path / "out").glob("*"))
        return found.err

    return call


# -- folders -----------------------------------------------------------------------------------------------------------


def test_no_such_folder(refused, tmp_path):
    said = refused(tmp_path / "nowhere")
    assert f"there is no folder {tmp_path}/nowhere" in said
    assert "fashion_mnist:ROOT" in said


def test_a_file_in_place_of_a_folder(refused, checkpoint):
    assert "is a file; expected a folder" in refused(checkpoint)


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "void").mkdir()
    assert "is empty; expected one folder of images for each class" in refused(tmp_path / "void")


def test_images_directly_in_the_folder(refused, pets):
    said = refused(pets / "cat")
    assert f"images lie directly in {pets}/cat; expected one folder per class, such as {pets}/cat/cat/0.jpg" in said


def test_class_folders_without_images(refused, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "notes.txt").write_text("no image")
    assert "no image in the class folders" in refused(tmp_path / "pets")


def test_splits_in_place_of_classes(refused, shared_images):
    said = refused(shared_images)
    assert "are splits ('train', 'val'), not classes" in said
    assert "--split train" in said


def test_an_unknown_split(refused, shared_images):
    assert "no folder 'test' for that split; there are: 'train', 'val'" in refused(shared_images, "--split", "test")


def test_hidden_folders_and_other_files_are_no_classes(attribute, pets, tmp_path):
    draw_images(pets, 0, classes=(".cache",))
    (pets / "cat" / "._0.jpg").write_bytes(b"left by macOS")
    (pets / "cat" / "readme.txt").write_text("mine")
    (pets / "cat" / "deeper").mkdir()
    (pets / "cat" / "0.jpg").rename(pets / "cat" / "deeper" / "0.JPG")
    assert attribute(pets, "--strict").status == 0
    table = ClassFilters.load(tmp_path / "out" / "filters.safetensors")
    assert table.class_names == ("cat", "dog", "fish")
    assert table.counts.tolist() == [6, 6, 6]


def test_a_class_that_the_metrics_name_themselves(refused, pets):
    (pets / "cat").rename(pets / "all")
    assert "no class may be named 'all'" in refused(pets)


# -- images to judge by ------------------------------------------------------------------------------------------------


def test_judging_on_the_same_images_is_refused(refused, pets):
    assert "judge on others" in refused(pets, "--judge", pets)
    assert "judge on others" in refused(pets, "--judge", f"{pets}/../{pets.name}")


def test_judging_on_other_classes_is_refused(refused, pets, tmp_path):
    draw_images(tmp_path / "other", 0, classes=("cat", "dog"))
    assert "has 2 classes ('cat', 'dog'), DATA has 3" in refused(pets, "--judge", tmp_path / "other")


def test_the_random_control_needs_something_to_control(refused, pets, shared_images):
    words = ("--judge", shared_images / "val", "--selector", "random")
    assert "a random control of its own" in refused(pets, *words)


def test_a_split_of_nothing_to_judge_by(refused, pets):
    assert "pass --judge, too" in refused(pets, "--judge-split", "val")


# -- data sets with a name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("fashion_mnist", "apt install dataset-fashion-mnist"), ("cifar10", "unpack cifar-10-python.tar.gz"),
     ("imagenet", "meta.bin")],
)  # fmt: skip
def test_a_root_without_the_files(refused, tmp_path, name, remedy):
    assert remedy in refused(f"{name}:{tmp_path}/nowhere")
    assert f"{name}:ROOT" in refused(name)
    assert "has the splits train and" in refused(f"{name}:{tmp_path}", "--split", "middle")


def test_archives_of_imagenet_are_not_unpacked(refused, tmp_path):
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")
    (tmp_path / "val").mkdir()
    assert f"pass the folder {tmp_path}/val itself" in refused(f"imagenet:{tmp_path}", "--split", "val")


def test_broken_files_of_fashion_mnist(refused, tmp_path):
    packed = gzip.compress(bytes(16 + 784))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed[:-9])
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8 + 2)))
    assert "is not a whole gzip file" in refused(f"fashion_mnist:{tmp_path}")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    assert "has unequal numbers of images and labels for train" in refused(f"fashion_mnist:{tmp_path}")


def test_a_folder_that_is_called_like_a_data_set(tmp_path, monkeypatch):
    draw_images(tmp_path / "cifar10", 0)
    monkeypatch.chdir(tmp_path)
    assert open_source("cifar10", None).class_names == ("cat", "dog", "fish")


# -- images that cannot be read ----------------------------------------------------------------------------------------


def spoil(pets):
    (pets / "cat" / "1.jpg").write_bytes(b"no image")
    whole = (pets / "dog" / "3.jpg").read_bytes()
    (pets / "dog" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (pets / "fish" / "4.jpg").write_bytes(b"")
    (pets / "fish" / "5.jpg").unlink()
    (pets / "fish" / "5.jpg").symlink_to("nowhere.jpg")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped_counted_and_named(attribute, pets, tmp_path, workers):
    spoil(pets)
    found = attribute(pets, "--json", "--workers", workers, "--batch-size", "1")
    assert found.status == 0, found.err
    assert f"note: 4 images could not be read and were skipped: {pets}/cat/1.jpg, {pets}/dog/3.jpg, " in found.err
    assert json.loads(found.out)["skipped"] == [
        str(pets / name) for name in ("cat/1.jpg", "dog/3.jpg", "fish/4.jpg", "fish/5.jpg")
    ]
    assert ClassFilters.load(tmp_path / "out" / "filters.safetensors").counts.tolist() == [5, 5, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_stops_at_an_unreadable_image(attribute, pets, tmp_path, workers):
    spoil(pets)
    found = attribute(pets, "--strict", "--workers", workers, "--batch-size", "2")
    assert found.status == 1
    assert f"error: {pets}/cat/1.jpg could not be read" in found.err
    assert "leave --strict out" in found.err
    assert not (tmp_path / "out" / "filters.safetensors").exists()


def test_no_image_can_be_read(attribute, pets):
    for path in pets.rglob("*.jpg"):
        path.write_bytes(b"no image")
    found = attribute(pets)
    assert found.status == 1
    assert f"none of the 18 images could be read; the first: {pets}/cat/0.jpg" in found.err


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_image_becomes_what_the_network_takes(pets, mode, channels):
    for path in pets.rglob("*.jpg"):
        with Image.open(path) as image:
            image.convert(mode).save(path.with_suffix(".tiff"))
        path.unlink()
    how = Preprocessing(channels, 20, 16, (0.0,) * channels, (1.0,) * channels)
    loader = Loader(open_source(str(pets), None), how, batch_size=7, workers=0, strict=True)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert batches[0][0].shape == (7, channels, 16, 16)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 6 + [1] * 6 + [2] * 6


# -- preprocessing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resize", "expected"), [(None, None, (232, 224)), (112, None, (116, 112)), (112, 200, (200, 112))]
)
def test_published_preprocessing_keeps_its_proportions(pets, size, resize, expected):
    published = Preprocessing(3, 232, 224, (0.5,) * 3, (0.2,) * 3, "bicubic")
    options = SimpleNamespace(image_size=size, resize=resize, mean=None, std=None, exif=False)
    found = choose_preprocessing(open_source(str(pets), None), published, torch.nn.Conv2d(3, 1, 1), options)
    assert (found.resize, found.crop) == expected
    assert (found.mean, found.std, found.interpolation) == (published.mean, published.std, "bicubic")


def test_a_crop_larger_than_the_image(refused, pets):
    assert "--resize must be at least the image size, 32, got 30" in refused(pets, "--resize", "30")


def test_means_for_other_channels(refused, pets):
    assert "--mean must be 1 or 3 numbers, one for each channel; got 2" in refused(pets, "--mean", "0.1", "0.2")
