"""``decompose``: a small head, its file, how to load it again, and what it is worth."""

import json

import pandas as pd
import pytest
import torch
from cli_examples import append, draw_images, small_resnet
from safetensors.torch import load_file

from captum_classfilters import ClassFilters, HeadMoments, HeadPass, decompose, metrics
from captum_classfilters.cli.data import Loader, Preprocessing, open_source

SMALL = ("--image-size", "32", "--quiet", "--json")
HOW = Preprocessing(3, 36, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def loaded(lines):
    """The network that the printed lines make."""
    names = {}
    exec("\n".join(lines), names)
    return names.get("small", names.get("model"))


def batches(folder):
    return list(Loader(open_source(str(folder), None), HOW, 64, 0, True))


def assert_same_network(found, expected):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found(images), expected.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("refit", "backend"),
    [
        ("none", "auto"),
        ("none", "csr"),
        ("least_squares", "dense"),
        ("least_squares", "bag"),
        ("omp", "auto"),
        ("omp", "csr"),
        ("omp", "gather"),
        ("logistic", "auto"),
        ("logistic", "csr"),
        ("discriminant", "csr"),
    ],
)
def test_the_printed_lines_load_the_small_network(run, shared_images, checkpoint, tmp_path, refit, backend):
    data = shared_images / "train"
    found = run(
        "decompose", "resnet18", data, "--weights", checkpoint, "--out", tmp_path, "--k", "3", "--refit", refit,
        "--backend", backend, *SMALL,
    )  # fmt: skip
    assert found.status == 0, found.err
    told = json.loads(found.out)
    assert told == json.loads((tmp_path / "decompose.json").read_text()) | {
        "files": told["files"], "skipped": [], "left_out": [],
        "accuracy_on_images_read": told["accuracy_on_images_read"],
    }  # fmt: skip
    assert (told["kept_weights"], told["total_weights"]) == (9, 1536)
    assert told["backend"] == ("dense" if backend == "auto" else backend)

    labels = refit in ("logistic", "discriminant")
    model, moments = small_resnet(), HeadMoments.collect(small_resnet(), batches(data), by_class=labels)
    moments = HeadPass(model, batches(data)) if refit == "logistic" else moments
    filters = None if refit == "omp" or labels else ClassFilters.load(tmp_path / "filters.safetensors")
    extra = {} if refit == "none" else {"refit": refit, "moments": moments}
    small = loaded(told["load"])
    assert type(small.fc) is type(decompose(model, filters, 3, backend=told["backend"], **extra).fc)
    if refit == "logistic":
        # of few images L-BFGS ends where rounding lets it: the file is what counts
        saved = load_file(tmp_path / "small.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in small.state_dict().items())
    else:
        assert_same_network(small, decompose(model, filters, 3, **extra))
    assert not small.training


def test_a_head_of_another_kind_is_loaded_by_the_call_that_made_it(run, shared_images, module, tmp_path):
    append(
        tmp_path / f"{module}.py",
        "\nimport torch\nclass Conv(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.body = nn.Conv2d(3, 8, 3)\n        self.head = nn.Conv2d(8, 3, 1, bias=False)\n\n"
        "    def forward(self, images):\n        return self.head(self.body(images).relu()).mean((2, 3))\n",
    )
    for refit in ("none", "least_squares"):
        found = run(
            "decompose", f"{module}:Conv", shared_images / "train", "--out", tmp_path / refit, "--k", "2",
            "--refit", refit, *SMALL,
        )  # fmt: skip
        assert found.status == 0, found.err
        told = json.loads(found.out)
        small = loaded(told["load"])
        state = load_file(tmp_path / refit / "small.safetensors")
        assert small.state_dict().keys() == state.keys()
        assert told["kept_weights"] == 6 == int(torch.count_nonzero(state["head.linear.weight"]))
        assert ("head.linear.bias" in state) is (refit == "least_squares")


def test_filters_of_a_file_judged_on_other_images(run, shared_images, checkpoint, tmp_path):
    data, judge = shared_images / "train", shared_images / "val"
    words = ("resnet18", data, "--weights", checkpoint)
    saved = tmp_path / "found"
    assert run("attribute", *words, "--out", saved, "--selector", "contribution", *SMALL).status == 0
    out = tmp_path / """it's "small\""""
    found = run(
        "decompose", *words, "--filters", saved / "filters.safetensors", "--out", out, "--judge", judge,
        "--image-size", "32",
    )  # fmt: skip
    assert found.status == 0, found.err
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.csv", "decompose.json", "small.safetensors"]
    table = ClassFilters.load(saved / "filters.safetensors")
    expected = metrics.accuracy_curve(small_resnet(), table, batches(judge), [5])
    curve = pd.read_csv(out / "accuracy.csv")
    pd.testing.assert_frame_equal(curve, expected, check_dtype=False)
    overall = expected[expected.class_name == "all"].set_index("filters")
    for name in ("dense", "contribution", "random"):
        row = overall.loc[name]
        assert f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]" in found.out
    assert "The head keeps 15 of 1536 weights" in found.out
    small = loaded([line.strip() for line in found.out.split("To load it again:\n")[1].split("\n\n")[0].splitlines()])
    right = sum(int((small(images).argmax(1) == labels).sum()) for images, labels in batches(judge))
    assert right / 18 == pytest.approx(overall.loc["contribution"].accuracy)


def test_classes_without_images(run, pets, checkpoint, tmp_path):
    for path in (pets / "dog").iterdir():
        path.unlink()
    words = ("decompose", "resnet18", pets, "--weights", checkpoint, "--out", tmp_path / "out", *SMALL)
    found = run(*words)
    assert found.status == 1
    assert "no image of class 'dog'" in found.err
    assert "--unseen dense" in found.err
    found = run(*words, "--unseen", "dense")
    assert found.status == 0
    assert json.loads(found.out)["kept_weights"] == 5 + 512 + 5


def test_what_does_not_fit_is_refused(run, shared_images, checkpoint, tmp_path):
    words = ("decompose", "resnet18", shared_images / "train", "--weights", checkpoint, "--out", tmp_path / "out")

    def refused(*more):
        found = run(*words, *more, *SMALL)
        assert found.status == 1
        assert found.out == ""
        assert not (tmp_path / "out" / "small.safetensors").exists()
        return found.err

    scores = torch.ones(3, 512, dtype=torch.float64)
    table = ClassFilters(scores, scores, torch.ones(3, dtype=torch.int64), "votes", "fc", ("a", "b", "c"))
    table.save(tmp_path / "other.safetensors")
    assert "is of the classes a, b, c" in refused("--filters", tmp_path / "other.safetensors")
    wide = torch.ones(3, 64, dtype=torch.float64)
    ClassFilters(wide, wide, torch.ones(3, dtype=torch.int64), "votes", "fc", ("cat", "dog", "fish")).save(
        tmp_path / "wide.safetensors"
    )
    said = refused("--filters", tmp_path / "wide.safetensors", "--refit", "least_squares")
    assert "the table is 3 classes x 64 channels" in said
    assert not (tmp_path / "out" / "moments.safetensors").exists()
    assert "no file at" in refused("--filters", tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    assert "not a whole safetensors file" in refused("--filters", tmp_path / "broken.safetensors")
    assert "leave --filters out" in refused("--filters", tmp_path / "other.safetensors", "--refit", "omp")
    assert "--k must be an integer in [1, 512]" in refused("--k", "513")
    judged = ("--judge", shared_images / "val")
    assert "a random control of its own" in refused("--selector", "random", *judged)


@pytest.mark.filterwarnings("error")
def test_features_that_follow_from_one_another_are_a_note(run, shared_images, module, tmp_path):
    append(
        tmp_path / f"{module}.py",
        "\nimport torch\nclass Twice(Net):\n    def forward(self, images):\n"
        "        half = self.conv(images).relu().mean((2, 3))[:, :4]\n"
        "        return self.fc(torch.cat([half, half], 1))\n",
    )
    found = run(
        "decompose", f"{module}:Twice", shared_images / "train", "--out", tmp_path / "out", "--k", "8",
        "--refit", "least_squares", *SMALL,
    )  # fmt: skip
    assert found.status == 0, found.err
    assert "note: for 3 of 3 classes the kept features follow from one another" in found.err


def test_it_judges_all_that_attribute_judges(run, pets, checkpoint, tmp_path):
    draw_images(tmp_path / "new", 5)
    found = run(
        "decompose", "resnet18", pets, "--weights", checkpoint, "--out", tmp_path / "out", "--refit", "omp",
        "--judge", tmp_path / "new", *SMALL,
    )  # fmt: skip
    assert found.status == 0, found.err
    judged = pd.DataFrame(json.loads(found.out)["judged"])
    assert judged.filters.tolist() == ["dense", "omp", "random"]
    assert set(pd.read_csv(tmp_path / "out" / "accuracy.csv").class_name) == {"all", "cat", "dog", "fish"}
