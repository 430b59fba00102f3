"""`watch`: alarms for images unlike those that a network was trained on, from the command line."""

import csv
import json

import pytest
import torch
from cli_examples import small_resnet
from PIL import Image
from torchvision.transforms import v2

from captum_classfilters import FamiliarityDetector, HeadPass
from captum_classfilters.cli.parser import METHODS
from captum_classfilters.detection import familiarity

# of images this small, nothing is left but one position
pytestmark = pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.NoPositionsWarning")


@pytest.fixture
def inbox(tmp_path):
    """Two images of noise below a folder, a broken one, and a text."""
    folder = tmp_path / "inbox" / "deep"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    (folder.parent / "broken.png").write_text("no picture")
    (folder.parent / "notes.txt").write_text("no picture either")
    return folder.parent


@pytest.fixture
def words(shared_images, checkpoint, inbox, tmp_path):
    common = ["resnet18", shared_images / "train", "--weights", checkpoint, "--image-size", 32, "--num-classes", 3]
    return ["watch", *common, "--calibrate", shared_images / "val", "--images", inbox, "--out", tmp_path / "out"]


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_image_has_a_score_a_p_value_and_a_picture(run, words, inbox, tmp_path):
    ran = run(*words, "--alpha", 0.1, "--json")
    assert ran.status == 0, ran.err
    rows = rows_of(tmp_path / "out" / "scores.csv")
    assert [row["image"] for row in rows] == [str(inbox / "deep" / f"{index}.png") for index in range(2)]
    facts = json.loads(ran.out)
    assert facts == json.loads((tmp_path / "out" / "watch.json").read_text()) | {
        name: facts[name] for name in ("files", "skipped", "left_out")
    }
    assert facts["alarms"] == sum(row["alarm"] == "True" for row in rows)
    assert str(inbox / "broken.png") in facts["skipped"]
    assert str(inbox / "notes.txt") in facts["left_out"]
    assert "broken.png" in ran.err
    assert "notes.txt (no image)" in ran.err
    with Image.open(tmp_path / "out" / "alarms.png") as picture:
        assert picture.size[0] > 300


def test_the_scores_are_those_of_the_saved_detector(run, words, tmp_path, checkpoint, inbox):
    pytest.importorskip("skops")
    run(*words, "--method", "class_gaussian", "--alpha", 0.1)
    detector = FamiliarityDetector.load(tmp_path / "out" / "detector.skops")
    rows = rows_of(tmp_path / "out" / "scores.csv")
    network = small_resnet()
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    transform = v2.Compose(
        [
            v2.Resize(36), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )  # fmt: skip
    images = torch.stack([transform(Image.open(row["image"])) for row in rows])
    head_pass = HeadPass(network.eval(), [images])
    assert [float(row["strangeness"]) for row in rows] == pytest.approx(detector.strangeness(head_pass), rel=1e-4)
    assert [float(row["p_value"]) for row in rows] == pytest.approx(detector.p_value(head_pass))


def test_a_method_that_is_no_sum_has_no_picture_and_says_so(run, words, tmp_path):
    ran = run(*words, "--method", "energy", "--alpha", 0.1)
    assert ran.status == 0
    assert "no picture: the score of energy is no sum over channels" in ran.err
    assert not (tmp_path / "out" / "alarms.png").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda words: ["--alpha", 0.01], "needs at least 99 clean images"),
        (lambda words: ["--calibrate", words[2]], "names the images that the detector learns from"),
        (lambda words: ["--images", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_refusals_come_before_the_pass_and_say_what_to_do(run, words, change, said, tmp_path):
    ran = run(*words, *change(words))
    assert ran.status == 1
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_is_refused(run, words, tmp_path):
    (tmp_path / "empty").mkdir()
    ran = run(*words, "--images", tmp_path / "empty")
    assert ran.status == 1
    assert "no image in" in ran.err


def test_the_parser_knows_the_methods():
    assert METHODS == familiarity.METHODS
