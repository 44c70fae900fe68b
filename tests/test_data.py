"""Proves that data are read once and rightly: pixels, triplets, splits, damaged files, batches that
repeat themselves, and mirrored images whose sides are exchanged.

    python -m pytest tests/test_data.py
"""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import phantom
from cli import InputError
from conftest import ROOT
from formats import Item, Mask, box
from formats.images import decode_rle, read_image, read_mask
from formats.items import settle_splits
from formats.prepare import decode
from text import ANATOMIES, PATHOLOGIES, Triplet, existence_matrix, swap_sides


@pytest.fixture
def copy(phantoms, tmp_path):
    """A copy of the phantoms that a test may damage."""
    return shutil.copytree(phantoms, tmp_path / "copy", ignore=shutil.ignore_patterns("prepared*"))


def load(root, **options):
    return data.load("synthetic", str(root), size=32, workers=0, **options)


# ------------------------------------------------------------------------------------------- pixels

def test_pixels_of_other_kinds_of_files(tmp_path):
    ramp = np.linspace(0, 4000, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "16bit.png")
    pixels = read_image(str(tmp_path / "16bit.png"))
    assert pixels.dtype == np.uint8 and (pixels[0, 0], pixels[-1, -1]) == (0, 255)
    colour = np.zeros((6, 4, 4), np.uint8)
    colour[..., :3], colour[..., 3] = 200, 255
    Image.fromarray(colour).save(tmp_path / "rgba.png")
    assert (read_image(str(tmp_path / "rgba.png"), 8) == 200).all()


def test_inverted_dicom(tmp_path):
    """MONOCHROME1 with 12 bits, rescaled and windowed: bright is dense all the same."""
    import pydicom
    file = pydicom.Dataset()
    pixels = np.array([[0, 525, 1525, 4000]], np.uint16)  # rescaled -100, 950, 2950, 7900
    file.set_pixel_data(pixels, "MONOCHROME1", 12)
    file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.RescaleSlope, file.RescaleIntercept = "2", "-100"
    file.WindowCenter, file.WindowWidth = "1950", "2000"
    file.save_as(tmp_path / "inverted.dcm", enforce_file_format=True)
    bright, second, third, dark = read_image(str(tmp_path / "inverted.dcm"))[0]
    assert bright == 255 >= second > third >= dark == 0


def test_dicom_files_alone_are_equalised_on_request(phantoms, tmp_path):
    """With an even histogram half of the pixels are below the middle of the range."""
    phantom.write("rsna", str(tmp_path), 12, size=64, workers=1)
    plain, even = (data.load("rsna", str(tmp_path), 64, workers=0, equalize=equalize)
                   for equalize in (False, True))
    assert abs(np.mean(even.images < 128) - 0.5) < 0.03 < abs(np.mean(plain.images < 128) - 0.5)
    assert even.equalized and not plain.equalized and not load(phantoms, equalize=True).equalized


def test_kinds_of_masks(tmp_path):
    mask = decode_rle("1 2 1022 2")  # column 0 rows 1, 2; column 1 rows 1, 2
    assert mask.shape == (1024, 1024) and mask.sum() == 4 and mask[1:3, 0:2].all()
    Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8)).save(tmp_path / "bits.png")
    bit = read_mask(str(tmp_path), Mask("nodule", "bit", "bits.png", 1))
    assert bit.tolist() == [[False, False], [True, True]]
    Image.new("RGB", (2, 1), (0, 9, 0)).save(tmp_path / "part.png")
    part = read_mask(str(tmp_path), Mask("lung", "crop", "part.png", (0.5, 0.25, 0.5, 0.25)))
    assert part.shape == (4, 4) and part.sum() == 2 and part[1, 2:].all()


def test_a_thin_box_keeps_a_pixel_and_where_nobody_looked_there_is_no_mask():
    items = [Item("a", "", "p", "test", (1,), masks=(box("Pneumonia", [256, 512, 512, 1]),)),
             Item("b", "", "q", "test", (0,)), Item("c", "", "r", "test", (0,), absent=["Mass"])]
    table = data.Table("rsna", "", items, np.zeros((3, 8, 8), np.uint8), {}, {}, [], False)
    boxed = table.mask(0, "Pneumonia")
    assert boxed.shape == (8, 8) and boxed.sum() == 4 and boxed[4, 2:6].all()
    assert table.mask(0, "Mass") is None and table.mask(1, "Pneumonia") is None
    assert table.located(0) == ["Pneumonia"] and not table.mask(2, "Mass").any()


# ------------------------------------------------------------------------- labels, splits, triplets

def test_splits_are_by_patient_and_depend_on_nothing_else():
    items = [Item(f"{k}", "", f"p{k // 3}", "", ()) for k in range(3000)]
    splits, _ = settle_splits(items, (0.7, 0.1))
    shares = [np.mean(splits == name) for name in ("train", "validate", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    assert len({(i.patient, s) for i, s in zip(items, splits)}) == 1000
    assert settle_splits(items[999:], (0.7, 0.1))[0].tolist() == splits[999:].tolist()
    official = [i._replace(split="test" if int(i.id) < 900 else "train") for i in items]
    splits, _ = settle_splits(official, (0.7, 0.1))
    assert (splits[:900] == "test").all() and 0.08 < np.mean(splits[900:] == "validate") < 0.17


def test_what_was_drawn(phantoms):
    table = load(phantoms)
    rows = table.rows("test")
    truth = table.truth(rows, PATHOLOGIES, ANATOMIES)                           # [N,n,m]
    assert (truth == 1).sum() == sum(len(table.items[i].truth) for i in rows)
    shown = (truth[:, :, [PATHOLOGIES.index(name) for name in table.label_names]] == 1).any(1)
    assert (table.labels[rows] == shown).all()  # by the film, whatever the report says
    assert (truth[:, :, PATHOLOGIES.index("normal")] == -1).all()  # never drawn, so nobody knows
    assert (truth[:, ANATOMIES.index("heart_size"), PATHOLOGIES.index("effusion")] == 0).all()


def test_reports_are_read_once_and_again_when_some_were_added(copy, monkeypatch):
    gone, blank = sorted(copy.glob("files/*/*/*.txt"))[:2]
    text = gone.read_text()
    gone.unlink()
    blank.write_text(" \n")
    table = load(copy)
    assert table.reports.count(None) == 2
    monkeypatch.setattr("formats.triplets.extract_triplets", lambda text, buckets: [])
    again = load(copy)
    assert all(again.triplets(i) == table.triplets(i) for i in range(160))
    gone.write_text(text)
    blank.write_text(text)
    assert load(copy).reports.count([]) == again.reports.count([]) + 2  # these alone were read


def test_triplets_from_radgraph_and_from_the_published_matrix(copy, tmp_path):
    items = sorted(copy.glob("files/*/*/*.txt"))
    word = {"label": "OBS-DP", "start_ix": 0, "end_ix": 0, "relations": []}
    graphs = {f"p10/p1/{path.name}": {"text": "Effusion .", "entities": {
        "1": word | {"tokens": "Effusion"}}} for path in items[:3]}
    (tmp_path / "graphs.json").write_text(json.dumps(graphs))
    table = load(copy, triplets=str(tmp_path / "graphs.json"))
    assert table.has_report.sum() == 3
    assert table.triplets(table.has_report.argmax()) == [Triplet("effusion", "unspecified", 1)]

    matrix = np.full((2, 51, 75), -1.0)
    matrix[1, 5, 8], matrix[1, 7, 0] = 1, 0
    folder = tmp_path / "published"
    folder.mkdir()
    np.save(folder / "landmark_observation_adj_mtx.npy", matrix)
    image = next(copy.glob("files/*/*/*/*.jpg")).stem
    (folder / "train.json").write_text(json.dumps({f"/far/{image}.jpg": {"labels_id": 1}}))
    table = load(copy, triplets=str(folder))
    assert table.triplets(np.flatnonzero(table.ids == image)[0]) == [
        Triplet("effusion", "right_pleural", 1), Triplet("normal", "heart_size", 0)]


# ------------------------------------------------------------------------------------------- damage

def test_damaged_images_are_counted_and_tried_again(copy):
    images = sorted(copy.glob("files/*/*/*/*.jpg"))
    whole = [path.read_bytes() for path in images[:4]]
    images[0].unlink()
    images[1].write_bytes(b"")
    images[2].write_bytes(whole[2][:len(whole[2]) // 3])
    images[3].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    table = load(copy)
    assert sorted(kind for kind, _ in table.problems) == [
        "corrupt", "empty", "git-lfs pointer", "missing"]
    assert len(table.rows()) == len(images) - 4 and (table.splits == "skipped").sum() == 4
    for path, content in zip(images, whole):
        path.write_bytes(content)
    assert len(load(copy).rows()) == len(images)


def test_a_prepared_folder_that_was_cut_off(copy):
    load(copy)
    for name in ("images.npy", "state.npy", "triplets-*.json"):
        path = next(copy.glob(f"prepared-*/{name}"))
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        with pytest.raises(InputError, match="delete it"):
            load(copy)
        path.write_bytes(whole)
    assert len(load(copy).rows()) == 160


def test_a_preparation_that_was_killed_goes_on(copy, monkeypatch):
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 70:
            raise KeyboardInterrupt
        return decode(*args)
    monkeypatch.setattr("formats.prepare.decode", killed)
    with pytest.raises(KeyboardInterrupt):
        load(copy)
    table = load(copy)
    assert 160 < len(calls) < 200  # not all 160 again
    assert all(table.images[i].any() for i in table.rows())


def test_two_first_runs_side_by_side(tmp_path):
    code = ("import data, phantom; data.draw_synthetic.__defaults__ = (60,); "
            f"print(len(data.load('synthetic', {str(tmp_path / 'new')!r}, 64).rows()))")
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [run.communicate() for run in runs]
    assert [out.split() for out, _ in results] == [["60"], ["60"]], results
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_paths_that_leave_the_root_and_rows_twice(copy):
    import gzip
    path = copy / "mimic-cxr-2.0.0-split.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    lines += [lines[1], lines[2].replace(lines[2].split(",")[1], "../../../etc")]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    kinds = sorted(kind for kind, _ in load(copy).problems)
    assert "duplicate row" in kinds and len(kinds) == 2


@pytest.mark.parametrize("spoil", [
    shutil.rmtree, lambda root: shutil.rmtree(root / "files"),
    lambda root: (root / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"no gzip"),
    lambda root: (root / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()])
def test_data_that_cannot_be_used_is_one_line(copy, spoil):
    spoil(copy)
    with pytest.raises(InputError) as caught:
        data.load("mimic", str(copy), size=32, workers=0)
    assert "\n" not in str(caught.value)


def test_check_lists_every_problem(copy, capsys):
    images = sorted(copy.glob("files/*/*/*/*.jpg"))
    shutil.copy(images[0], images[1])
    images[2].write_bytes(b"")
    args = data.parse_args(["--root", str(copy), "--check", "--workers", "0"])
    with pytest.raises(SystemExit) as caught:
        data.main(args)
    out = capsys.readouterr().out
    assert caught.value.code == 1 and "same image: " in out and "empty: " in out


# ------------------------------------------------------------------------------------------ batches

def batches(table, **options):
    settings = dict(batch_size=8, seed=0, pathologies=PATHOLOGIES, anatomies=ANATOMIES, size=24)
    return data.Batches(table, table.rows("train"), **settings | options)


def test_batches_repeat_and_share_out(phantoms):
    table = load(phantoms)
    whole, again, other = batches(table)[5], batches(table)[5], batches(table, seed=1)[5]
    parts = [batches(table, rank=rank, world=2)[5] for rank in (0, 1)]
    for key in ("images", "existence"):
        assert torch.equal(whole[key], again[key])
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))
    assert whole["images"].shape == (8, 24, 24) and whole["existence"].shape == (8, 51, 75)
    assert not torch.equal(whole["images"], other["images"])


def test_mirrored_images_have_their_sides_exchanged(phantoms):
    """With the whole image as crop an augmented image is the stored one or its mirror image."""
    table, whole = load(phantoms), {"size": 32, "crop": 1.0, "operations": 0}
    swap, naive = batches(table, **whole), batches(table, **whole, flip="naive")
    exchanged = [ANATOMIES.index(swap_sides(name)) if swap_sides(name) in ANATOMIES else i
                 for i, name in enumerate(ANATOMIES)]
    mirrored = 0
    for row in swap.rows[:40]:
        image, existence = swap.augmented(0, int(row)).values()
        plain = existence_matrix(table.triplets(row), PATHOLOGIES, ANATOMIES)
        turned = (image == table.images[row][:, ::-1]).all()
        assert (existence == (plain[exchanged] if turned else plain)).all()
        assert (naive.augmented(0, int(row))["existence"] == plain).all()
        mirrored += turned
    assert 8 < mirrored < 32


def test_no_partner_no_mirror():
    assert data.can_mirror([Triplet("effusion", "left_pleural", 1)], ANATOMIES)
    assert data.can_mirror([Triplet("enlarge", "heart_size", 0)], ANATOMIES)
    assert not data.can_mirror([Triplet("enlarge", "right_atrium", 1)], ANATOMIES)
    assert not data.can_mirror([Triplet("mass", "left_hilar", 1)], ["left_hilar", "rib"])


def test_released_operations():
    """Half of the time nothing is done; else one of ten, the same for the same random state."""
    image = Image.fromarray((np.indices((64, 64)).sum(0) * 2).astype(np.uint8))
    torch.manual_seed(0)
    results = [data.released_operation(image) for _ in range(600)]
    same = np.mean([np.array_equal(result, image) for result in results])
    assert 0.5 < same < 0.62  # 1/2, 1/20 for the identity, some for an even contrast
    kinds = {result.tobytes() for result in results}
    assert 12 <= len(kinds) <= 15  # both signs of shear, shift and rotation
    assert any(np.asarray(result)[0, 0] == 128 for result in results)  # grey comes in


def test_to_input():
    x = data.to_input(torch.full((2, 8, 8), 255, dtype=torch.uint8), 4)
    assert x.shape == (2, 3, 4, 4)
    expected = [(1 - m) / s for m, s in zip(data.MEAN, data.STD)]
    assert x[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
