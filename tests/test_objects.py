"""Where objects lie in a folder: boxes and masks follow each image to its square, and bad ones are named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plans import CLAIM

from sdecor.__main__ import app
from sdecor.data import load
from sdecor.evaluation import exhibit, measure
from sdecor.images import ImageData, ImageStream
from sdecor.models import build
from sdecor.objects import Objects
from sdecor.plan import Plan
from sdecor.rehearsal import check
from sdecor.store import Store

MORE = ("box_overlap", "object_only_gini", "background_only_relevance_mass", "tuned_relevance_mass")
WIDE = (24, 16)  # width and height of the images


def made(root: Path, count: int = 4, size: tuple[int, int] = WIDE, mode: str = "L") -> Path:
    """A folder of noise, `count` images in each of two classes of each split."""
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draws.integers(0, 256, (size[1], size[0]), np.uint8)).save(folder / f"{i}.png")
    return root


def boxes(root: Path, *rows: str) -> Path:
    (root / "boxes.csv").write_text("\n".join(["file,x0,y0,x1,y1", *rows, ""]))
    return root


def mask(root: Path, file: str, values: np.ndarray) -> Path:
    path = root / "masks" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def test_boxes_reach_every_measure_of_localization(tmp_path: Path) -> None:
    root = boxes(made(tmp_path), *[f"test/{c}/{i}.png,4,0,11,7" for c in "ab" for i in range(4)])
    data = load(str(root), split="test", image_size=16)
    assert isinstance(data, ImageData) and data.has_masks and data.masks is not None
    assert torch.equal(data.masks[3].nonzero().amin(0), torch.tensor([0, 0]))  # 4 columns are cropped on each side
    assert data.masks.sum((1, 2)).tolist() == [8 * 8] * 8
    found, _ = measure(build("lenet", 3, 2, 16), data, thorough=False)
    assert found["object_area"] == 0.25
    assert {"relevance_mass", "relevance_rank", "pointing_game", "auroc", "average_precision", "best_iou"} <= set(found)


def test_several_boxes_are_one_mask_and_files_without_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = boxes(made(tmp_path), "test/a/0.png,4,0,4,0", "test/a/0.png,19,15,19,15", r".\test\b\1.png,0,0,23,15")
    data = load(str(root), split="test", image_size=16)
    assert isinstance(data, ImageData) and data.masks is not None
    assert data.masks[0].nonzero().tolist() == [[0, 0], [15, 15]]
    assert data.masks[5].all() and not data.masks[[1, 2, 3, 4, 6, 7]].any()
    [said] = caplog.messages
    where = "6 of 8 test images, such as test/a/1.png"
    assert said == f"nothing says where the object is of {where}; measures of localization leave them out"
    found, _ = measure(build("lenet", 3, 2, 16), data, thorough=False)
    assert found["object_area"] == pytest.approx((2 / 256 + 1) / 2)  # of the two that are known


@given(
    width=st.integers(3, 40),
    height=st.integers(3, 40),
    side=st.integers(2, 24),
    box=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 4),
)
@settings(max_examples=100, deadline=None)
def test_boxes_go_where_their_pixels_go(width: int, height: int, side: int, box: tuple[float, ...]) -> None:
    from torchvision.transforms import functional as pil  # after sdecor, which mends its import

    (x0, x1), (y0, y1) = (sorted(int(n * v) for v in pair) for n, pair in ((width, box[:2]), (height, box[2:])))
    found = Objects("/r", boxes=(("f.png", 2, (x0, y0, x1, y1)),))("/r/f.png", width, height, side)
    drawn = np.zeros((height, width), np.uint8)
    drawn[y0 : y1 + 1, x0 : x1 + 1] = 255
    square = np.asarray(pil.center_crop(pil.resize(Image.fromarray(drawn), side), [side, side]))
    assert found.shape == (side, side)
    assert found[square == 255].all() and not found[square == 0].any()  # at an edge resizing gives values between


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_the_masks_of_memory(tmp_path: Path, workers: int) -> None:
    root = boxes(made(tmp_path), *[f"test/{c}/{i}.png,{i},2,{i + 9},12" for c in "ab" for i in range(4)])
    held = load(str(root), split="test", image_size=16)
    streamed = load(str(root), split="test", image_size=16, memory_limit=0, workers=workers)
    assert isinstance(held, ImageData) and isinstance(streamed, ImageStream) and streamed.has_masks
    how: dict[str, Any] = {"shuffle": True, "augment": ("crop", "flip", "cutout")}
    both = [[*d.batches_with_masks(3, generator=torch.Generator().manual_seed(5), **how)] for d in (held, streamed)]
    for (x, y, m), (u, v, w) in zip(*both, strict=True):
        assert m is not None and w is not None and m.any()
        assert torch.equal(x, u) and torch.equal(y, v) and torch.equal(m, w)
    boxes(root, "test/a/0.png,0,2,9,12")
    assert held.digest != load(str(root), split="test", image_size=16).digest
    assert streamed.digest != load(str(root), split="test", image_size=16, memory_limit=0).digest
    assert exhibit(build("lenet", 3, 2, 16), streamed, images=2)["saliency"].shape == (2, 16, 16)


def test_masks_follow_flips_and_crops() -> None:
    images = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8)
    masks = images[:, 0] > 100
    data = ImageData.from_tensors(images, torch.zeros(64, dtype=torch.int64), masks=masks)
    draws = torch.Generator().manual_seed(0)
    [(x, _, found)] = data.batches_with_masks(64, augment=("flip", "crop", "cutout"), generator=draws)
    assert found is not None and found.dtype == torch.bool and not torch.equal(found, masks)
    pixels = data.denormalize(x).mul(255).round()[:, 0]
    assert torch.equal(found, pixels > 100)  # what moved in at the border, and what was cut out, is black
    [(again, _)] = data.batches(64, augment=("flip", "crop", "cutout"), generator=draws.manual_seed(0))
    assert torch.equal(again, x)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("test/a/0.png,0,0,24,3", "line 3: box 0, 0, 24, 3 lies outside of test/a/0.png, which has 24 x 16 pixels"),
        ("test/a/0.png,0,0,3,16", "line 3: box 0, 0, 3, 16 lies outside of test/a/0.png, which has 24 x 16 pixels"),
        ("test/a/0.png,-1,0,3,3", "line 3: box -1, 0, 3, 3 lies outside of test/a/0.png; pixels count from 0"),
        ("test/a/0.png,5,0,4,3", "line 3: box 5, 0, 4, 3 is empty; it needs x0 <= x1 and y0 <= y1"),
        ("test/a/9.png,0,0,3,3", "line 3: there is no image 'test/a/9.png' in the folder"),
        ("a/0.png,0,0,3,3", "line 3: there is no image 'a/0.png' in the folder"),
        ("test/a/0.png,0,0,3", "line 3: it has 4 values, not 5: file, x0, y0, x1, y1"),
        ("test/a/0.png,0,0,3.5,4", "line 3: 0, 0, 3.5, 4 are not four whole numbers of pixels"),
        ("test/a/0.png,,,,", "line 3: , , ,  are not four whole numbers of pixels"),
        ('test/a/0.png,0,0,3,"3', "is no text of comma separated values"),
    ],
)
def test_bad_boxes_are_named(tmp_path: Path, row: str, said: str) -> None:
    root = boxes(made(tmp_path), "test/a/0.png,0,0,3,3", row)
    for how in ({}, {"memory_limit": 0, "workers": 0}):
        with pytest.raises(ValueError, match=f"^{re.escape(str(root))}/boxes.csv.*{re.escape(said)}"):
            next(load(str(root), split="test", **how).batches_with_masks(9))


@pytest.mark.parametrize("head", ["", "file,x0,y0,w,h", "file,x0,y0,x1,y1,label", "test/a/0.png,0,0,3,3"])
def test_boxes_need_their_columns(tmp_path: Path, head: str) -> None:
    (made(tmp_path) / "boxes.csv").write_text(f"{head}\n")
    with pytest.raises(ValueError, match=r"boxes.csv, line 1: the columns must be file, x0, y0, x1, y1$"):
        load(str(tmp_path))
    (tmp_path / "boxes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"boxes.csv is no text of comma separated values"):
        load(str(tmp_path))


def test_masks_mirror_the_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = made(tmp_path)
    for value, name in ((255, "test/a/0.png"), (1, "test/b/3.bmp")):
        drawn = np.zeros((16, 24), np.uint8)
        drawn[2:6, 4:12] = value
        mask(root, name, drawn)
    mask(root, "test/a/1.png", np.full((16, 24), 7, np.uint8))  # the object fills the image
    data = load(str(root), split="test", image_size=16)
    assert isinstance(data, ImageData) and data.masks is not None
    wanted = torch.zeros(16, 16, dtype=torch.bool)
    wanted[2:6, :8] = True
    assert torch.equal(data.masks[0], wanted) and torch.equal(data.masks[7], wanted) and data.masks[1].all()
    assert not data.masks[2:7].any() and "5 of 8 test images, such as test/a/2.png;" in caplog.text


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("test/a/0.png", np.zeros((16, 24), np.uint8), "has no object; it must hold 0"),
        ("test/a/0.png", np.arange(384, dtype=np.uint8).reshape(16, 24), "has 255 values other than 0"),
        ("test/a/0.png", np.ones((24, 16), np.uint8), "has 16 x 24 pixels, its image test/a/0.png has 24 x 16"),
        ("test/a/0.png", np.ones((16, 24, 3), np.uint8), "has 3 channels; save it as grey"),
        ("test/a/7.png", np.ones((16, 24), np.uint8), "mirrors no image: there is no test/a/7.* in"),
        ("test/a.png", np.ones((16, 24), np.uint8), "mirrors no image: there is no test/a.* in"),
    ],
)
def test_bad_masks_are_named(tmp_path: Path, name: str, values: np.ndarray, said: str) -> None:
    path = mask(made(tmp_path), name, values)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {re.escape(said)}"):
        load(str(tmp_path), split="test")


@pytest.mark.parametrize("limit", [0, 10**9])
def test_every_box_and_mask_is_held_against_its_image_when_a_folder_is_opened(tmp_path: Path, limit: int) -> None:
    """Else a bad row of the test images would be found after all training, and its correction would void that."""
    root = boxes(made(tmp_path), "train/a/0.png,0,0,3,3", "test/b/1.png,0,0,24,3")
    with pytest.raises(ValueError, match=r"boxes.csv, line 3: box 0, 0, 24, 3 lies outside of test/b/1.png"):
        load(str(root), split="train", memory_limit=limit)
    (root / "boxes.csv").unlink()
    mask(root, "test/a/0.png", np.ones((24, 16), np.uint8))
    with pytest.raises(ValueError, match=r"has 16 x 24 pixels, its image test/a/0.png has 24 x 16"):
        load(str(root), split="train", memory_limit=limit)


def test_an_orientation_behind_the_pixels_is_seen_before_a_box_is_refused(tmp_path: Path) -> None:
    root = made(tmp_path)
    path = root / "train" / "a" / "0.png"
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn: upright it has 16 x 24 pixels
    Image.open(path).save(path, exif=turned)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    for moved in (content, content[:start] + content[end:last] + content[start:end] + content[last:]):
        path.write_bytes(moved)
        boxes(root, "train/a/0.png,0,20,15,23")
        load(str(root))
        boxes(root, "train/a/0.png,20,0,23,15")
        with pytest.raises(ValueError, match="lies outside of train/a/0.png, which has 16 x 24 pixels"):
            load(str(root))


def test_objects_that_are_cropped_away_or_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = boxes(made(tmp_path), "train/a/0.png,0,0,2,15", "train/a/1.png,0,0,9,9", "train/a/2.png,13,8,13,8")
    data = load(str(root), image_size=8)
    said = (
        "the objects of 2 of 7 train images, such as train/a/0.png are cut off, or too small; measures of localization"
    )
    assert said in caplog.text and len(data.with_objects) == 1
    assert load(str(root), memory_limit=0).with_objects.paths == ("train/a/0.png", "train/a/2.png", "train/a/1.png")
    boxes(root)
    with pytest.raises(ValueError, match=r"boxes.csv has no boxes$"):
        load(str(root))
    (root / "boxes.csv").rename(root / "Boxes.csv")
    caplog.clear()
    assert (
        not load(str(root)).has_masks
        and "Boxes.csv is not read: boxes have to be in a file of the name boxes.csv" in caplog.text
    )
    (root / "masks").mkdir()
    with pytest.raises(ValueError, match=r"masks holds no masks$"):
        load(str(root))


def test_other_things_about_masks(tmp_path: Path) -> None:
    root = made(tmp_path)
    path = mask(root, "test/a/0.png", np.ones((16, 24), np.uint8))
    path.with_suffix(".gif").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"a/0.(png|gif) is one of two masks of .*test/a/0.png$"):
        load(str(root))
    path.with_suffix(".gif").unlink()
    path.with_suffix(".txt").write_text("?")
    with pytest.raises(ValueError, match=r"a/0.txt is no mask; masks holds image files alone$"):
        load(str(root))
    path.with_suffix(".txt").unlink()
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match=rf"^cannot read mask {path} \(.*\); remove or replace it$"):
        load(str(root), split="test")
    boxes(root)
    with pytest.raises(ValueError, match=rf"^{root} has both boxes.csv and masks; keep the one that is to count$"):
        load(str(root))


def test_real_boxes(real_data: Path) -> None:
    if not (real_data / "imagenet10").is_dir():
        pytest.skip("no imagenet10 there")
    data = load("imagenet10", real_data, "test")
    assert isinstance(data, ImageData) and data.masks is not None and data.masks.any(2).any(1).all()
    assert float(data.masks.float().mean()) == pytest.approx(0.53, abs=0.005)
    where = data.masks[data.paths.index("test/goldfish/0000.jpg")].nonzero()
    rows = (real_data / "imagenet10" / "boxes.csv").read_text().splitlines()
    [row] = [row for row in rows if row.startswith("test/goldfish/0000.jpg,")]
    x0, y0, x1, y1 = map(int, row.split(",")[1:])
    assert where.amin(0).tolist() == [y0, x0] and where.amax(0).tolist() == [y1, x1]


def test_they_reach_command_line_and_plan(tmp_path: Path) -> None:
    root = boxes(
        made(tmp_path / "images"),
        *[f"{s}/{c}/{i}.png,4,0,11,7" for s in ("train", "test") for c in "ab" for i in range(4)],
    )
    how = "--model cnn_small --epochs 1 --batch-size 4 --tuning-epochs 1 --store".split()
    said = CliRunner().invoke(app, ["train", "--data", f"folder:{root}", *how, str(tmp_path / "store")])
    assert said.exit_code == 0, said.output
    for name in (
        "relevance_mass",
        "pointing_game",
        "box_accuracy",
        "background_only_accuracy",
        "fair_deletion_area",
        *MORE,
    ):
        assert f"\n  {name} " in said.stdout
    claim = {**CLAIM, "measure": "box_accuracy", "arm": "decorrelation"}
    plan: dict[str, Any] = {
        "shared": {"data": f"folder:{root}", "model": "cnn_small", "epochs": 1, "batch_size": 4},
        "arms": {"standard": {}, "decorrelation": {}},
        "presets": {"one": {"seeds": 1}},
    }
    check(Plan.of("p", {**plan, "claims": [claim]}).at("one"), Store(tmp_path / "other"))
    with pytest.raises(ValueError, match="fair_deletion_area needs tuning_epochs, and there are none$"):
        check(Plan.of("p", {**plan, "claims": [{**claim, "measure": "fair_deletion_area"}]}).at("one"), Store(tmp_path))
    (root / "boxes.csv").unlink()
    with pytest.raises(ValueError, match="box_accuracy needs masks of objects, and 'folder:.*' has none$"):
        check(Plan.of("p", {**plan, "claims": [claim]}).at("one"), Store(tmp_path / "other"))
