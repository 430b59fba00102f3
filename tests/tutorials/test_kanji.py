"""The kanji recipe on typefaces made here: a bare machine has none with kanji."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont

from captum_classfilters.assets import load_images, load_network

RECIPES = Path(__file__).parents[2] / "tutorials" / "recipes"
CHARACTERS = "ABCDEFGHIJKLMNOP"


@pytest.fixture
def fonts(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    import kanji_fonts

    return kanji_fonts


@pytest.fixture
def kanji(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    import kanji

    return kanji


def boxes(rectangles):
    pen = TTGlyphPen(None)
    for left, bottom, right, top in rectangles:
        pen.moveTo((left, bottom))
        for point in ((left, top), (right, top), (right, bottom)):
            pen.lineTo(point)
        pen.closePath()
    return pen.glyph()


def make_font(
    path,
    family,
    *,
    vendor="NONE",
    drawing=0,
    jitter=60,
    blank="",
    boxed="",
    twins="",
    lacking="",
    void="",
    style="Regular",
):
    """A typeface of five strokes for each letter: the letter's own, moved about by the typeface's ``drawing``."""
    notdef = [(100, 0, 200, 800), (700, 0, 800, 800)]
    shapes = {".notdef": boxes(notdef)}
    for character in CHARACTERS:
        drawn = "A" if character in twins else character
        letter, typeface = np.random.default_rng(ord(drawn)), np.random.default_rng([drawing, ord(drawn)])
        corners = letter.integers(60, 540, (5, 2)) + typeface.integers(-jitter, jitter + 1, (5, 2))
        long = letter.integers(0, 2, 5)
        strokes = [
            (x, y, x + (400 if s else 80), y + (80 if s else 400))
            for (x, y), s in zip(corners.tolist(), long, strict=True)
        ]
        shapes[character] = boxes([] if character in blank else notdef if character in boxed else strokes)
    names = [name for name in shapes if name not in lacking]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(name): ".notdef" if name in void else name for name in names if len(name) == 1})
    builder.setupGlyf({name: shapes[name] for name in names})
    # the left bearing is what moves a glyph: without it all would start at the left
    builder.setupHorizontalMetrics({name: (1000, getattr(shapes[name], "xMin", 0)) for name in names})
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": style, "licenseDescription": "SIL Open Font License"})
    builder.setupOS2(achVendID=vendor)
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def folder(tmp_path):
    """Eight foundries of one typeface each."""
    for index, name in enumerate(("ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple")):
        make_font(tmp_path / f"{name}.ttf", name.title(), drawing=index)
    return tmp_path


def test_a_face_says_who_made_it_and_what_it_has(fonts, tmp_path):
    make_font(tmp_path / "a.ttf", "Ash", vendor="TREE", lacking="B", void="C")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    (face,) = fonts.find_faces([tmp_path])
    assert (face.family, face.style, face.vendors, face.index) == ("Ash", "Regular", ("tree",), 0)
    assert face.licence == "SIL Open Font License"
    assert {chr(code) for code in face.characters} == set(CHARACTERS) - {"B", "C"}


def test_every_face_of_a_collection_is_found_and_drawn_as_itself(fonts, tmp_path):
    for index in range(2):
        make_font(tmp_path / f"{index}.ttf", f"Tree {index}", drawing=index)
    collection = TTCollection()
    collection.fonts = [TTFont(tmp_path / f"{index}.ttf") for index in range(2)]
    collection.save(tmp_path / "both.ttc")
    single, both = fonts.find_faces([tmp_path])[:2], fonts.find_faces([tmp_path])[2:]
    assert [face.index for face in both] == [0, 1]
    for one, other in zip(single, both, strict=True):
        assert np.array_equal(fonts.draw_whole(one, "ABC"), fonts.draw_whole(other, "ABC"))


@pytest.mark.parametrize(("lost", "what"), [({"blank": "C"}, "C"), ({"boxed": "D"}, "D"), ({"twins": "EF"}, "AEF")])
def test_faces_with_empty_or_missing_glyphs_are_left_out(fonts, tmp_path, capsys, lost, what):
    make_font(tmp_path / "whole.ttf", "Ash")
    make_font(tmp_path / "holes.ttf", "Birch", **lost)
    kept, images = fonts.draw_all(fonts.find_faces([tmp_path]), CHARACTERS, workers=1)
    assert [face.family for face in kept] == ["Ash"]
    assert images.shape == (1, len(CHARACTERS), 32, 32)
    assert f"{len(what)} glyphs are empty, boxed or doubled, such as {what}" in capsys.readouterr().out


def test_glyphs_are_white_on_black_and_centred_as_they_are_set(fonts, folder):
    face = fonts.find_faces([folder])[0]
    images, size = fonts.draw_whole(face, CHARACTERS), fonts.size_for(face, CHARACTERS)
    glyphs = TTFont(face.path)["glyf"]
    for character, image in zip(CHARACTERS, images, strict=True):
        rows, columns = (np.flatnonzero(image.max(axis)) for axis in (1, 0))
        # down: from the ink's top to the baseline; nothing here goes below it
        assert rows[0] == pytest.approx(15.5 - glyphs[character].yMax / 1000 * size / 4, abs=1)
        middle = (glyphs[character].xMin + glyphs[character].xMax) / 2 - 500
        assert (columns[0] + columns[-1]) / 2 == pytest.approx(15.5 + middle / 1000 * size / 2, abs=1)
        assert image.max() == 255
    # the widest fill 28 of the 32 pixels
    assert np.max([np.ptp(np.flatnonzero(image.max(0))) + 1 for image in images]) in range(24, 33)


def test_two_processes_draw_what_one_does(fonts, folder):
    faces = fonts.find_faces([folder])[:3]
    one, two = (fonts.draw_all(faces, CHARACTERS, workers)[1] for workers in (1, 2))
    assert np.array_equal(one, two)


def test_shared_vendor_family_or_outlines_make_one_group(fonts, tmp_path):
    make_font(tmp_path / "0.ttf", "Ash", drawing=0, vendor="TREE")
    make_font(tmp_path / "1.ttf", "Beech", drawing=1, vendor="TREE")  # its vendor's
    make_font(tmp_path / "2.ttf", "Ashen", drawing=2)  # its family's
    make_font(tmp_path / "3.ttf", "Cedar", drawing=2, jitter=61)  # its outlines, next to
    make_font(tmp_path / "4.ttf", "Elm", drawing=4)  # nobody's
    make_font(tmp_path / "5.ttf", "Fir", drawing=5)  # nobody's, though both have the same empty vendor
    faces, images = fonts.draw_all(fonts.find_faces([tmp_path]), CHARACTERS, workers=1)
    groups = fonts.groups_of(faces, images).tolist()
    assert len(set(groups[:4])) == 1
    assert len(set(groups)) == 3


def test_the_same_drawing_under_another_name_counts_once(fonts, tmp_path):
    make_font(tmp_path / "0.ttf", "Ash", drawing=0)
    make_font(tmp_path / "1.ttf", "Birch", drawing=0)
    make_font(tmp_path / "2.ttf", "Cedar", drawing=1)
    _, images = fonts.draw_all(fonts.find_faces([tmp_path]), CHARACTERS, workers=1)
    assert fonts.distinct(images) == [0, 2]


def test_a_script_of_its_own_is_left_out_by_name(fonts, folder, capsys):
    make_font(folder / "zzz.ttf", "Scrawl", drawing=99, jitter=700)
    faces, images = fonts.draw_all(fonts.find_faces([folder]), CHARACTERS, workers=1)
    assert fonts.printed(faces, images) == list(range(8))
    assert "left out Scrawl Regular (zzz.ttf:0)" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_split_and_big_ones_stay_for_training(fonts, seed):
    groups = np.array([0] * 40 + [1] * 3 + [2] * 2 + list(range(3, 30)))
    held = fonts.split_groups(groups, 0.2, seed)
    assert not set(groups[held]) & set(groups[~held])
    assert not held[:40].any()
    assert 0.2 * len(groups) - 1 <= held.sum() <= 0.2 * len(groups) + 3
    assert np.array_equal(held, fonts.split_groups(groups, 0.2, seed))
    assert not np.array_equal(held, fonts.split_groups(groups, 0.2, seed + 1))


def test_one_group_cannot_be_split(fonts):
    with pytest.raises(SystemExit, match="1 groups of 5 faces cannot be split; install more fonts"):
        fonts.split_groups(np.zeros(5, int), 0.2, 0)


def test_classes_hold_natural_confusions_then_look_alikes_then_any(kanji):
    pool = [*"亜一右永王士哀愛挨土"]
    images = np.random.default_rng(0).integers(0, 255, (len(pool), 32, 32)).astype(np.uint8)
    images[8] = images[3]
    choices = [kanji.choose_classes(pool, images, 8, seed) for seed in range(8)]
    for chosen in choices:
        assert {"土", "士", "永", "挨"} <= set(chosen)
        assert chosen == [character for character in pool if character in chosen]
    assert len({*map("".join, choices)}) > 1
    assert kanji.choose_classes(pool, images, 8, 0) == choices[0]
    with pytest.raises(SystemExit, match="share 10 characters, 11 were asked for"):
        kanji.choose_classes(pool, images, 11, 0)


def test_jis_level_1_has_2965_kanji(kanji):
    found = kanji.jis_level_1()
    assert len(set(found)) == 2965
    assert (found[0], found[-1]) == ("亜", "腕")


def test_faces_of_another_script_do_not_shrink_the_choice(kanji, fonts, tmp_path):
    make_font(tmp_path / "0.ttf", "Ash", lacking="A")
    make_font(tmp_path / "1.ttf", "Birch", lacking="B")
    make_font(tmp_path / "2.ttf", "Cedar", lacking="DEFGHI")
    faces, shared = kanji.usable(fonts.find_faces([tmp_path]), list(CHARACTERS))
    assert [face.family for face in faces] == ["Ash", "Birch"]
    assert shared == list(CHARACTERS[2:])


@pytest.fixture(scope="module")
def images():
    return torch.nn.functional.pad(load_images("test").images[:64], (2, 2, 2, 2))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_degradation_follows_its_seed_and_grows_with_strength(kanji, images):
    assert torch.equal(kanji.degrade(images, seeded(1)), kanji.degrade(images, seeded(1)))
    assert not torch.equal(kanji.degrade(images, seeded(1)), kanji.degrade(images, seeded(2)))
    assert torch.equal(kanji.degrade(images, seeded(1), 0.0), images)
    changes = [(kanji.degrade(images, seeded(1), s).float() - images).abs().mean() for s in (0.25, 0.5, 1.0)]
    assert changes == sorted(changes)


def test_each_image_is_degraded_in_its_own_way(kanji, images):
    found = kanji.degrade(images[:1].expand(64, -1, -1, -1), seeded(0)).flatten(1)
    assert len(found.unique(dim=0)) == 64
    assert (found.dtype, found.shape) == (torch.uint8, (64, 1024))


@pytest.fixture
def drawn(kanji, folder, tmp_path):
    """The recipe's data file, from eight faces and eight classes."""
    options = ["--fonts", folder, "--characters", CHARACTERS, "--classes", 8, "--workers", 1, "--draw-only"]
    arguments = kanji.arguments([*map(str, options), "--out", str(tmp_path / "run")])
    kanji.draw_data(arguments, tmp_path / "data.safetensors")
    return kanji.load_drawn(tmp_path / "data.safetensors")


def test_the_test_images_are_degraded_glyphs_of_unseen_foundries(kanji, fonts, drawn, folder):
    data = drawn.data
    assert (len(data.train.labels), len(data.test.labels)) == (6 * 8, 2 * 8)
    sides = [{drawn.faces[face]["group"] for face in faces.tolist()} for faces in (drawn.train_faces, drawn.test_faces)]
    assert not sides[0] & sides[1]
    faces = {face.family: face for face in fonts.find_faces([folder])}
    clean = {family: torch.from_numpy(fonts.draw_whole(face, data.class_names)) for family, face in faces.items()}
    for image, label, face in zip(*data.train, drawn.train_faces.tolist(), strict=True):
        assert torch.equal(image[0], clean[drawn.faces[face]["family"]][label])
    families = [drawn.faces[face]["family"] for face in drawn.test_faces.tolist()]
    expected = torch.stack([clean[family][label] for family, label in zip(families, data.test.labels, strict=True)])
    assert torch.equal(data.test.images, kanji.degrade(expected.unsqueeze(1), seeded(0)))
    assert torch.equal(data.test.images, kanji.load_kanji(folder / "data.safetensors").test.images)


def test_calibration_is_balanced_and_from_training_faces(kanji, drawn):
    plain = kanji.calibration(drawn.data, 20, seed=3, strength=0.0)
    assert sorted(plain.labels.bincount(minlength=8).tolist()) == [2] * 4 + [3] * 4
    known = {(bytes(image.numpy()), int(label)) for image, label in zip(*drawn.data.train, strict=True)}
    assert len(known & {(bytes(image.numpy()), int(label)) for image, label in zip(*plain, strict=True)}) == 20
    first, again, other = (kanji.calibration(drawn.data, 20, seed) for seed in (3, 3, 4))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert not torch.equal(first.images, plain.images)


def test_validation_holds_out_training_foundries_only(kanji, drawn):
    found = kanji.validation(drawn, seed=0, strength=0.0)
    train, held = ({bytes(image.numpy()) for image in split.images} for split in (found.train, found.test))
    assert held
    assert not train & held
    assert train | held == {bytes(image.numpy()) for image in drawn.data.train.images}


def test_the_recipe_draws_trains_and_saves(kanji, folder, tmp_path):
    common = ["--characters", CHARACTERS, "--classes", 8, "--workers", 1, "--batch-size", 8, "--threads", 1]
    command = [sys.executable, RECIPES / "kanji.py", "--fonts", folder, *common, "--lr", 0.02, "--epochs", 3]
    command += ["--images-per-epoch", 40, "--device", "cpu", "--precision", "float32", "--out", tmp_path / "run"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 classes, 48 training and 16 test images" in done.stdout
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert losses[2] < losses[0]
    model, meta = load_network(tmp_path / "run" / "network.safetensors")
    assert (meta["faces"], meta["test_faces"], meta["groups"], meta["test_images"]) == (8, 2, 8, 16)
    data = kanji.load_kanji(tmp_path / "run" / "data.safetensors")
    right = (model(data.test.images / 255).argmax(1) == data.test.labels).float().mean()
    assert float(right) == pytest.approx(meta["test_accuracy"], abs=1e-6)
    assert tuple(meta["class_names"]) == data.class_names
