"""Files of every format to HU slices: arithmetic, order, orientation, and what bad files get."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import body, make_dicom, make_series
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from test_prepare import reasons, run

from datasets import dicom
from datasets.formats import load, resize_hu, scan
from datasets.prepare import Output, convert
from datasets.series import Refused

SHARED = Path(os.environ.get("CVG_SHARED", "/nonexistent"))


def test_hu_is_rescaled_and_clipped_before_the_rounded_2x2_mean():
    hu = dicom.to_hu(np.array([[-2000, 0], [24, 9000]], np.int16), 1.0, -1024.0)
    np.testing.assert_array_equal(hu, [[-1024, -1024], [-1000, 3071]])
    np.testing.assert_array_equal(dicom.to_hu(np.array([[3]]), 0.5, 10.25), [[11.75]])
    stored = np.array([[63536, 1000]], np.uint16)  # padding above the range becomes air, but water stays water
    np.testing.assert_array_equal(dicom.to_hu(stored, 1, -1024, padding=63536), [[-1024, -24]])
    np.testing.assert_array_equal(dicom.to_hu(np.array([[0, 1]]), 1, 0, padding=0), [[0, 1]])
    block = np.array([[-5000, 0], [0, 0]], np.int16)  # the mean of the unclipped values would be -1250
    assert resize_hu(np.kron(np.ones((8, 8), np.int16), block), 8).tolist() == [[-256] * 8] * 8
    hu = np.random.default_rng(0).integers(-1024, 3072, (32, 32))
    want = np.round(hu.reshape(16, 2, 16, 2).sum((1, 3)) / 4)
    assert np.array_equal(resize_hu(hu, 16), want) and resize_hu(hu, 16).dtype == np.int16
    assert np.array_equal(resize_hu(hu, 32), hu)


def test_other_ratios_do_not_alias_and_keep_the_place():
    stripes = np.tile([1000, -1000], (96, 48))  # at the finest frequency: any aliasing shows as structure
    assert np.ptp(resize_hu(stripes, 32)[:, 2:-2]) < 250
    edge = np.full((96, 96), -1000)
    edge[:, 48:] = 1000
    for size in (32, 40, 128):
        resized = resize_hu(edge, size)
        np.testing.assert_allclose(resized + resized[:, ::-1], 0, atol=1)  # the edge stays in the middle
    with pytest.raises(Refused, match="NaN"):
        resize_hu(np.full((4, 4), np.nan), 4)


@pytest.mark.parametrize("left", [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)])
@pytest.mark.parametrize("flip", [1, -1])
def test_every_axial_orientation_becomes_the_standard_one(left, flip):
    columns = np.array(left)
    rows = flip * np.array([-left[1], left[0], 0])
    y, x = np.mgrid[:4, :4]
    place = [100 + x * columns[i] + y * rows[i] for i in range(2)]  # patient x and y of each stored pixel
    left_of, back_of = (dicom.standard_axial(axis, (*columns, *rows)) for axis in place)
    assert (np.diff(left_of, axis=1) == 1).all() and (np.diff(left_of, axis=0) == 0).all()
    assert (np.diff(back_of, axis=0) == 1).all() and (np.diff(back_of, axis=1) == 0).all()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_signedness_bits_and_transfer_syntaxes(tmp_path, syntax):
    signed = np.arange(-2048, 2048, 16, dtype=np.int16).reshape(16, 16)
    make_dicom(tmp_path / "s.dcm", pixels=signed, syntax=syntax, RescaleIntercept=0)
    np.testing.assert_array_equal(dicom.read_hu(str(tmp_path / "s.dcm"))[0], signed.clip(-1024, 3071))
    twelve = (signed & 0x0FFF).astype(np.int16) | 0x4000  # sign not extended, an overlay bit above
    make_dicom(tmp_path / "t.dcm", pixels=twelve, syntax=syntax, RescaleIntercept=0, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(dicom.read_hu(str(tmp_path / "t.dcm"))[0], signed.clip(-1024, 3071))
    make_dicom(tmp_path / "r.dcm", pixels=signed, compress=True, RescaleIntercept=0)
    np.testing.assert_array_equal(dicom.read_hu(str(tmp_path / "r.dcm"))[0], signed.clip(-1024, 3071))


def test_multiframe_enhanced_ct(tmp_path):
    pixels = np.arange(3 * 256, dtype=np.uint16).reshape(3, 16, 16)
    frames = []
    for z in (5, 0, 10):  # not in order
        frame, plane = pydicom.Dataset(), pydicom.Dataset()
        plane.ImagePositionPatient = [0, 0, z]
        frame.PlanePositionSequence = [plane]
        frames.append(frame)
    shared, measures, plane, value = (pydicom.Dataset() for _ in range(4))
    measures.PixelSpacing, plane.ImageOrientationPatient = [0.5, 0.5], [1, 0, 0, 0, 1, 0]
    value.RescaleSlope, value.RescaleIntercept = 2, -1000
    shared.update({"PixelMeasuresSequence": [measures], "PlaneOrientationSequence": [plane],
                   "PixelValueTransformationSequence": [value]})
    tags = {"NumberOfFrames": 3, "PerFrameFunctionalGroupsSequence": frames, "SharedFunctionalGroupsSequence": [shared]}
    remove = ("RescaleSlope", "PixelSpacing", "ImagePositionPatient")
    make_dicom(tmp_path / "in/m.dcm", pixels=pixels, remove=remove, **tags)
    status, report, rows = run(tmp_path, "--volumes")
    assert status == 0 and [float(row["position"]) for row in rows] == [0, 5, 10] and rows[0]["spacing_mm"] == "1.0"
    volume = np.load(tmp_path / "out/train_img" / rows[0]["file"], mmap_mode="r")
    assert volume.shape == (3, 8, 8) and volume.dtype == np.int16
    np.testing.assert_array_equal(volume[0], resize_hu(2.0 * pixels[1] - 1000, 8))
    make_dicom(tmp_path / "n.dcm", pixels=pixels, NumberOfFrames=3)
    with pytest.raises(Refused, match="3 frames but positions for 0"):
        dicom.read_header(str(tmp_path / "n.dcm"))


def test_order_is_by_position_head_last_with_duplicates_and_gaps_told(tmp_path):
    for index, (name, z) in enumerate({"a": 30, "b": 10, "c": 0, "d": 10, "e": 20, "f": 60}.items()):
        make_dicom(tmp_path / f"in/{name}.dcm", ImagePositionPatient=[0, 0, z], InstanceNumber=index)
    make_dicom(tmp_path / "in/small.dcm", side=12, ImagePositionPatient=[0, 0, 70])
    status, report, rows = run(tmp_path)
    assert [Path(row["source"]).stem for row in rows] == ["c", "b", "e", "a", "f"]
    assert [row["file"][-8:] for row in rows] == [f"_{i:03d}.npy" for i in range(5)]
    assert status == 1 and "12 pixels a side" in reasons(report)["small.dcm"]
    assert "repeats position" in reasons(report, "left out")["d.dcm"]
    assert "gap of 30 mm where 10 mm" in reasons(report, "warning")["a.dcm"]


BAD = {
    "rgb": ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "colour"),
    "mr": ({"Modality": "MR"}, "modality MR, expected CT"),
    "encrypted": ({"EncryptedAttributesSequence": [pydicom.Dataset()]}, "encrypted"),
    "slope": ({"RescaleSlope": 1e6}, "slope 1e"),
    "zero": ({"RescaleSlope": 0}, "slope 0"),
    "units": ({"RescaleType": "ED"}, "RescaleType"),
    "spacing": ({"PixelSpacing": ["NaN", "0.7"]}, "PixelSpacing"),
    "oblong": ({"PixelSpacing": [0.7, 1.4]}, "two equal"),
    "huge": ({"Rows": 65535, "Columns": 65535}, "at most 4096"),
    "wide": ({"Rows": 8}, "expected square"),
    "short": ({"PixelData": b"\0\0" * 8}, "truncated"),
    "coronal": ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "coronal"),
    "sagittal": ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "sagittal"),
    "oblique": ({"ImageOrientationPatient": [0.8, 0.6, 0, -0.6, 0.8, 0]}, "oblique"),
    "highbit": ({"BitsStored": 12}, "high bit"),
    "noframe": ({"NumberOfFrames": 2}, "2 frames"),
    **{f"no_{tag}": ({"remove": (tag,)}, text) for tag, text in {
        "PixelSpacing": "no PixelSpacing", "RescaleSlope": "no RescaleSlope", "Rows": "no image",
        "ImageOrientationPatient": "no ImageOrientationPatient", "ImagePositionPatient": "no ImagePositionPatient",
        "SeriesInstanceUID": "no SeriesInstanceUID", "Modality": "no known modality",
        "PixelData": "no pixel data"}.items()},
}


def test_bad_files_are_refused_with_the_reason_and_the_rest_is_written(tmp_path, capsys):
    make_series(tmp_path / "in")
    for name, (tags, _) in BAD.items():
        make_dicom(tmp_path / f"in/{name}.dcm", **{"ImagePositionPatient": [0, 0, 99]} | tags)
    good = (tmp_path / "in/0.dcm").read_bytes()
    others = {"empty.dcm": (b"", "empty"), "notes.txt": (b"not an image", "not an image"),
              "cut.dcm": (good[:150], "image|parsed|modality"), "trunc.dcm": (good[:-1], "truncated"),
              "cms.p7": (b"\x30\x82" + dicom.CMS_ENVELOPE, "encrypted"), "x.npy": (b"\x93NUMPY", "damaged"),
              "x.png": (b"\x89PNG", "damaged")}
    for name, (content, _) in others.items():
        (tmp_path / "in" / name).write_bytes(content)
    os.symlink(tmp_path / "in", tmp_path / "in/loop")
    os.symlink("self", tmp_path / "in/self")
    os.mkfifo(tmp_path / "in/pipe")
    status, report, rows = run(tmp_path)
    found = reasons(report)
    expected = {f"{name}.dcm": text for name, (_, text) in BAD.items()} | {k: v for k, (_, v) in others.items()}
    expected |= {"loop": "leads back", "self": "cannot be read", "pipe": "neither a file nor a folder"}
    assert status == 1 and len(rows) == 4 and found.keys() == expected.keys()
    for name, text in expected.items():
        assert any(part in found[name] for part in text.split("|")), (name, found[name])
    assert f"{len(expected)} refused" in capsys.readouterr().err


def test_localisers_and_derived_images_are_left_out_and_lossy_ones_kept(tmp_path, capsys):
    make_series(tmp_path / "in", LossyImageCompression="01", ImageType=["DERIVED", "PRIMARY", "AXIAL"])
    kinds = {"scout": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "mip": ["DERIVED", "PRIMARY", "MIP"],
             "screen": ["ORIGINAL", "SECONDARY", "AXIAL"]}
    for name, kind in kinds.items():
        make_dicom(tmp_path / f"in/{name}.dcm", ImageType=kind)
    (tmp_path / "in/LICENSE").write_text("of the collection")
    status, report, rows = run(tmp_path)
    assert status == 0 and len(rows) == 4
    assert reasons(report, "left out").keys() == {"scout.dcm", "mip.dcm", "screen.dcm", "LICENSE"}
    assert set(reasons(report, "warning").values()) == {"was compressed with loss; kept"}
    assert run(tmp_path, source="in/mip.dcm", out="none")[0] == 1 and not list(tmp_path.glob("none/*_img"))
    assert "no usable image" in capsys.readouterr().err


def test_nifti_npy_and_png_give_the_same_slices_as_dicom(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is in requirements.txt; without it NIfTI is not read")
    volume = np.random.default_rng(1).integers(-1024, 3072, (3, 16, 16)).astype(np.int16)
    affine = np.diag([-0.7, -0.7, 2.5, 1.0])  # stored left, back, head: as DICOM
    nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine), tmp_path / "nii.nii.gz")
    turned = nibabel.as_closest_canonical(nibabel.load(tmp_path / "nii.nii.gz"))
    nibabel.save(nibabel.Nifti1Image(np.asarray(turned.dataobj), turned.affine), tmp_path / "ras.nii")
    np.save(tmp_path / "npy.npy", volume)
    (tmp_path / "png").mkdir()
    for index, hu in enumerate(volume):
        make_dicom(tmp_path / f"dcm/{9 - index}.dcm", pixels=(hu + 1024).astype(np.uint16),
                   ImagePositionPatient=[0, 0, 2.5 * index])
        Image.fromarray((hu + 1024).astype(np.uint16)).save(tmp_path / f"png/p_{index}.png")
    for source in ("nii.nii.gz", "ras.nii", "npy.npy", "png", "dcm"):
        status, _, rows = run(tmp_path, "--volumes", source=source, out=f"out-{source}")
        assert status == 0 and len(rows) == 3, source
        made = np.load(tmp_path / f"out-{source}/train_img" / rows[0]["file"])
        np.testing.assert_array_equal(made, [resize_hu(hu, 8) for hu in volume], err_msg=source)
        assert rows[0]["spacing_mm"] == ("1.4" if source in ("nii.nii.gz", "ras.nii", "dcm") else "")


@pytest.fixture
def nifti(tmp_path):
    """A function that writes tmp_path/in/NAME, two slices of 0.8 mm with fields of its header set, and scans it."""
    nibabel = pytest.importorskip("nibabel", reason="nibabel is in requirements.txt; without it NIfTI is not read")

    def write(name, scale=1.0, codes=(2, 0), kind=nibabel.Nifti1Image, **fields):
        volume = np.stack([body(16, 1), body(16, 2)]).transpose(2, 1, 0)
        image = kind(volume, None)
        affine = np.diag([-0.8 * scale, -0.8 * scale, 2 * scale, 1])
        image.set_sform(affine, codes[0])
        image.set_qform(affine, codes[1])
        image.header["pixdim"][1:4] = 0.8 * scale, 0.8 * scale, 2 * scale
        content, length = image.to_bytes(), len(image.header.binaryblock)
        header = type(image.header)(content[:length])
        for field, value in fields.items():
            header[field] = value
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(header.binaryblock + content[length:])
        return tmp_path / "in" / name

    return write


def test_nifti_is_told_by_its_bytes(tmp_path, nifti):
    import nibabel

    wrong = [nifti("plain.nii.gz"), nifti("packed.nii"), nifti("second.nii", kind=nibabel.Nifti2Image)]
    wrong[1].write_bytes(gzip.compress(wrong[0].read_bytes()))
    for path in wrong:
        np.testing.assert_array_equal(load(str(path)), [body(16, 1), body(16, 2)])
    (tmp_path / "in/a.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    (tmp_path / "in/b.nii").write_bytes(b"\n<html><body>Too many downloads</body></html>")
    status, report, rows = run(tmp_path)
    assert status == 1 and len(rows) == 6
    assert "Git LFS pointer" in reasons(report)["a.nii.gz"] and "web page" in reasons(report)["b.nii"]


def test_a_gzip_that_is_damaged_is_refused(nifti):
    packed = nifti("a.nii.gz")
    content = gzip.compress(packed.read_bytes(), 0)  # stored: a flipped bit is a changed voxel
    for damaged in (content[:-300] + bytes([content[-300] ^ 1]) + content[-299:], content[:-4], content[:-60]):
        packed.write_bytes(damaged)
        with pytest.raises(Refused, match="gzip check sum is wrong"):
            scan(str(packed))


def test_nifti_that_does_not_say_how_it_lies(nifti):
    assert scan(str(nifti("a.nii", codes=(0, 0))))[0].warning.startswith("does not say how the patient lies")
    assert not scan(str(nifti("b.nii", codes=(0, 1))))[0].warning
    zeros = nifti("c.nii", codes=(1, 1), srow_x=0, srow_y=0, srow_z=0)
    assert (scan(str(zeros))[1].spacing, scan(str(zeros))[1].warning) == (pytest.approx(0.8), "")
    np.testing.assert_array_equal(load(str(zeros)), [body(16, 1), body(16, 2)])
    both = nifti("d.nii", codes=(1, 1), srow_x=[0.8, 0, 0, 0])
    assert scan(str(both))[0].warning.startswith("says two places")


def test_nifti_in_metres_and_microns(nifti):
    for name, scale, code in (("m", 0.001, 1), ("mm", 1, 2), ("um", 1000, 3), ("unknown", 1, 0)):
        first, second = scan(str(nifti(f"{name}.nii", scale, xyzt_units=code)))
        assert first.spacing == pytest.approx(0.8) and second.position - first.position == pytest.approx(2)


def test_nifti_that_says_more_than_it_holds_is_refused_before_memory_is_taken(nifti):
    claims = nifti("a.nii", dim=[3, 4096, 4096, 30000, 1, 1, 1, 1])
    for content in (claims.read_bytes(), gzip.compress(claims.read_bytes())):
        claims.write_bytes(content)
        with pytest.raises(Refused, match="says that it holds 1006632960000 bytes"):
            scan(str(claims))


@pytest.mark.parametrize("name, array, text", [
    ("nan.npy", np.full((16, 16), np.nan), "NaN"), ("wide.npy", np.zeros((16, 8)), "square"),
    ("object.npy", np.array([{}] * 2), "damaged"), ("complex.npy", np.zeros((16, 16), complex), "complex"),
    ("grey8.png", np.zeros((16, 16), np.uint8), "16-bit"), ("rgb.png", np.zeros((16, 16, 3), np.uint8), "16-bit")])
def test_bad_arrays_are_refused(tmp_path, name, array, text):
    (tmp_path / "in").mkdir()
    if name.endswith("npy"):
        np.save(tmp_path / "in" / name, array)
    else:
        Image.fromarray(array).save(tmp_path / "in" / name)
    status, report, rows = run(tmp_path)
    assert status == 1 and not rows and text in reasons(report)[name]


KEYS = ["PatientID", "Modality", "ImageType", "PixelSpacing", "ImagePositionPatient", "RescaleSlope", "InstanceNumber"]


def mutate(content, random):
    """Bytes with a few flips or a truncation."""
    content = bytearray(content)
    if random.random() < 0.2:
        return bytes(content[: random.integers(len(content))])
    limit = len(content) if random.random() < 0.4 else 900  # most of the damage in the header, where it matters
    for place in random.integers(0, min(limit, len(content)), random.integers(0, 8)):
        content[place] = random.integers(256)
    return bytes(content)


def test_mutated_files_never_crash_and_each_bad_one_is_reported(tmp_path):
    count = int(os.environ.get("CVG_MUTATIONS", 200))
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for index in range(count):
        path = tmp_path / f"in/{index}.dcm"
        syntax = ExplicitVRLittleEndian if index % 2 else ImplicitVRLittleEndian
        lost = random.choice(KEYS, int(random.integers(0, 3))).tolist() if index % 5 == 0 else ()
        make_dicom(path, ImagePositionPatient=[0, 0, index], syntax=syntax, compress=index % 4 > 1, remove=lost)
        path.write_bytes(mutate(path.read_bytes(), random))
    status, report, rows = run(tmp_path)
    made = sorted((tmp_path / "out").rglob("*.npy"))
    assert status == 1 and len(made) == len(rows) > count / 20
    assert all(np.load(path).shape == (8, 8) for path in made)
    assert not [path for path in (tmp_path / "out").rglob(".*")]
    accounted = {Path(row["source"]).name for row in rows} | {Path(row["file"]).name for row in report}
    assert accounted == {f"{index}.dcm" for index in range(count)}
    refused = reasons(report)
    assert len(refused) > count / 4 and not {Path(row["source"]).name for row in rows} & refused.keys()
    assert json.loads((tmp_path / "out/prepare.json").read_text())


@pytest.mark.skipif(not (SHARED / "data/dicom").is_dir(), reason="CVG_SHARED names no folder with data/dicom")
def test_original_files_read_as_pydicom_says(tmp_path):
    files = sorted((SHARED / "data/dicom").rglob("*.dcm"))
    for path in files:
        dataset = pydicom.dcmread(path)
        want = (dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)).clip(-1024, 3071)
        if dataset.ImageOrientationPatient[0] < 0:
            want = want[::-1, ::-1]
        np.testing.assert_allclose(dicom.read_hu(str(path))[0], want, atol=1e-3)
        png = SHARED / f"data/ct256/test/LIDC-IDRI-0001_{dataset.InstanceNumber - 1:03d}.png"
        if dataset.PatientID == "LIDC-IDRI-0001":
            convert([Output("", "one.npy", "", scan(str(path)))], tmp_path, 256, False)
            assert abs(np.load(tmp_path / "one.npy") + 1024 - np.asarray(Image.open(png)).astype(int)).max() == 0
            (tmp_path / "one.npy").unlink()
    assert len(files) == 16
