"""A network with one logit and two folders of images, from the command line."""

import csv
import json

import torch
from cli_examples import draw_images

NETWORK = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    trunk = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*trunk, nn.Linear(8, 1))
    return model
"""


def test_two_folders_are_the_two_classes(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one_logit_network.py").write_text(NETWORK)
    images = draw_images(tmp_path / "pets", 0)
    for folder in sorted(images.iterdir())[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    words = ["one_logit_network:make", images, "--image-size", 16, "--resize", 16]
    ran = run("attribute", *words, "--selector", "contribution", "--k", 2, "--out", "out", "--json")
    assert ran.status == 0, ran.err
    facts = json.loads(ran.out)
    assert len(facts["classes"]) == 2
    rows = list(csv.DictReader((tmp_path / "out" / "top.csv").read_text().splitlines()))
    assert {row["class"] for row in rows} == set(facts["classes"])
    assert 0 <= facts["accuracy_on_images_read"] <= 1
    ran = run("decompose", *words, "--k", 2, "--out", "small", "--json")
    assert ran.status == 0, ran.err
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "small" / "small.safetensors")
    assert weights["4.weight"].shape == (1, 8)
    assert 2 <= int(torch.count_nonzero(weights["4.weight"])) <= 4
