"""HU of DICOM files that are not as the standard says: padding, lost signs, outgrown bits, spellings, groups."""

import numpy as np
import pydicom
import pytest
from conftest import body, make_dicom, set_raw
from test_prepare import reasons, run

from datasets import dicom
from datasets.series import LeftOut, Refused

HU = body(32, 0).astype(int)
RING = np.hypot(*np.mgrid[-15.5:16, -15.5:16]) > 15.5  # outside the scan circle


def read(path, words, raw=(), **tags):
    """HU of a file with these 16-bit words."""
    make_dicom(path, pixels=words.astype(np.uint16), **tags)
    set_raw(path, **dict(raw))
    return dicom.read_hu(str(path))[0]


def pad(value):
    return (value & 0xFFFF).to_bytes(2, "little")


def bits(count, signed=0, **more):
    return {"BitsStored": count, "HighBit": count - 1, "PixelRepresentation": signed, **more}


@pytest.mark.parametrize("padding, words, tags", [
    (-2000, -2000 & 0xFFFF, bits(16)),           # signed padding in unsigned pixels
    (63536, -2000 & 0xFFFF, bits(16)),
    (None, -2000 & 0xFFFF, bits(16)),            # the scanner does not name it
    (None, -2000 & 0xFFFF, bits(12)),            # its sign lies above BitsStored
    (-2000, -2000 & 0x0FFF, bits(12)),           # its sign was cut off: 2096, bone
    (63536, -2000 & 0xFFFF, bits(16, signed=1)),
    (-32768, -32768 & 0xFFFF, bits(12)),
    (None, -2000 & 0xFFFF, {"remove": ("PixelRepresentation",)}),
])
def test_what_lies_outside_the_scan_circle_is_air(tmp_path, padding, words, tags):
    raw = {} if padding is None else {"PixelPaddingValue": ("SS" if padding < 0 else "US", pad(padding))}
    hu = read(tmp_path / "a.dcm", np.where(RING, words, HU + 1024), raw, **tags)
    np.testing.assert_array_equal(hu, np.where(RING, -1024, HU))


def test_bone_with_the_number_of_cut_off_padding_stays_bone(tmp_path):
    bone = np.where(HU == 700, 2096 - 1024, HU)
    hu = read(tmp_path / "a.dcm", bone + 1024, {"PixelPaddingValue": ("SS", pad(-2000))}, **bits(12))
    np.testing.assert_array_equal(hu, bone)


@pytest.mark.parametrize("count", [12, 13, 16])
def test_negative_values_called_unsigned_are_negative(tmp_path, count):
    (tmp_path / "in").mkdir()
    hu = read(tmp_path / "in/a.dcm", HU & (2**count - 1), **bits(count), RescaleIntercept=0)
    np.testing.assert_array_equal(hu, HU)
    fat = np.full((32, 32), -100)  # no air at all
    hu = read(tmp_path / "b.dcm", fat & (2**count - 1), **bits(count), RescaleIntercept=0)
    np.testing.assert_array_equal(hu, fat)
    assert "none is air" in reasons(run(tmp_path)[1], "warning")["a.dcm"]


def test_positive_values_called_unsigned_stay(tmp_path):
    teeth = np.full((32, 32), 40)
    teeth[3:5, 3] = 2500
    np.testing.assert_array_equal(read(tmp_path / "a.dcm", teeth, **bits(12), RescaleIntercept=0), teeth)
    np.testing.assert_array_equal(read(tmp_path / "b.dcm", teeth + 1024, **bits(12)), teeth)
    bright = np.where(HU == 700, 40000, HU + 8192)  # an extended scale: 31808 HU
    hu = read(tmp_path / "c.dcm", bright, **bits(16), RescaleIntercept=-8192)
    np.testing.assert_array_equal(hu, np.where(HU == 700, 3071, HU))


@pytest.mark.parametrize("signed", [0, 1])
def test_values_that_outgrow_their_bits_are_kept(tmp_path, signed):
    offset = 0 if signed else 1024
    for name, odd in {"metal": 5000, "bone": 3000, "ring": -3024}.items():
        want = np.where(RING & (np.arange(32) < 8), odd, HU)
        words = (want + offset) & 0xFFFF
        hu = read(tmp_path / f"{name}.dcm", words, **bits(12, signed), RescaleIntercept=-offset)
        np.testing.assert_array_equal(hu, want.clip(-1024, 3071), err_msg=name)
    overlay = (HU + offset & 0xFFF) | np.where(RING, 0x1000, 0)
    make_dicom(tmp_path / "o.dcm", pixels=overlay.astype(np.uint16), **bits(12, signed), RescaleIntercept=-offset)
    dataset = pydicom.dcmread(tmp_path / "o.dcm")
    dataset.add_new(0x60020102, "US", 12)
    dataset.save_as(tmp_path / "o.dcm")
    np.testing.assert_array_equal(dicom.read_hu(str(tmp_path / "o.dcm"))[0], HU)


@pytest.mark.parametrize("tags, refusal", [
    ({"RescaleType": "hu"}, None), ({"RescaleType": "Hounsfield Units"}, None), ({"RescaleType": " HU "}, None),
    ({"RescaleType": "Z_EFF"}, Refused), ({"Modality": "ct"}, None),
    ({"PhotometricInterpretation": "monochrome2"}, None),
    ({"ImageType": ["ORIGINAL ", "PRIMARY ", "LOCALIZER ", "X"]}, LeftOut),
    ({"ImageType": "derived \\secondary "}, LeftOut),
    ({"ImageType": ["ORIGINAL ", " PRIMARY", "AXIAL "]}, None), ({"remove": ("ImageType",)}, None)])
def test_words_are_read_whatever_their_case_and_spaces(tmp_path, tags, refusal):
    make_dicom(tmp_path / "a.dcm", **tags)
    if refusal is None:
        assert len(dicom.read_header(str(tmp_path / "a.dcm"))) == 1
    else:
        with pytest.raises(Refused) as error:
            dicom.read_header(str(tmp_path / "a.dcm"))
        assert error.type is refusal


@pytest.mark.parametrize("shared", [True, False])
def test_groups_of_an_enhanced_file_tell_units_and_kind(tmp_path, shared):
    def read_group(group, **values):
        tags = {key: [pydicom.Dataset() for _ in range(1 if key.startswith("Shared") else 2)]
                for key in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")}
        item = pydicom.Dataset()
        item.update(values)
        for place in tags["SharedFunctionalGroupsSequence" if shared else "PerFrameFunctionalGroupsSequence"]:
            setattr(place, group, [item])
        make_dicom(tmp_path / "a.dcm", pixels=np.zeros((2, 16, 16), np.uint16), NumberOfFrames=2, **tags)
        return dicom.read_header(str(tmp_path / "a.dcm"))

    transform = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    assert len(read_group("PixelValueTransformationSequence", **transform, RescaleType="HU")) == 2
    with pytest.raises(Refused, match="RescaleType other than HU"):
        read_group("PixelValueTransformationSequence", **transform, RescaleType="Z_EFF")
    with pytest.raises(LeftOut, match="derived"):
        read_group("CTImageFrameTypeSequence", FrameType=["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"])
    with pytest.raises(LeftOut, match="localiser"):
        read_group("CTImageFrameTypeSequence", FrameType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])


def test_numbers_with_a_decimal_comma_are_read_and_other_text_is_named(tmp_path):
    make_dicom(tmp_path / "a.dcm")
    set_raw(tmp_path / "a.dcm", PixelSpacing=("DS", b"0,8\\0,8 "), RescaleSlope=("DS", b"1,0 "),
            ImagePositionPatient=("DS", b"-1,5\\0\\2,25"))
    (one,) = dicom.read_header(str(tmp_path / "a.dcm"))
    assert (one.spacing, one.slope, one.corner) == (0.8, 1.0, (-1.5, 0.0, 2.25))
    make_dicom(tmp_path / "b.dcm")
    set_raw(tmp_path / "b.dcm", RescaleSlope=("DS", b"one "))
    with pytest.raises(Refused, match="has a RescaleSlope that is not a number"):
        dicom.read_header(str(tmp_path / "b.dcm"))


def test_fields_that_no_slice_needs_do_not_refuse_it(tmp_path):
    odd = {"InstanceNumber": ("IS", b"1A"), "AcquisitionNumber": ("IS", b"1.5 "), "SliceThickness": ("DS", b"1,25"),
           "KVP": ("DS", b"120 kV"), "ConvolutionKernel": ("SH", b"B30f\\3"), "PixelPaddingValue": ("US", b"\1"),
           "LossyImageCompression": ("CS", b"no"), "PatientName": ("US", b"\1"), "ImageType": ("FD", b"\1")}
    for name, value in odd.items():
        path = tmp_path / f"{name}.dcm"
        make_dicom(path)
        set_raw(path, **{name: value})
        assert len(dicom.read_header(str(path))) == len(dicom.read_hu(str(path))) == 1
    make_dicom(tmp_path / "n.dcm", NumberOfFrames=-1)
    with pytest.raises(Refused, match="-1 frames"):
        dicom.read_header(str(tmp_path / "n.dcm"))


def test_derived_series_are_taken_on_request(tmp_path):
    for index, kind in enumerate((["DERIVED", "SECONDARY"], ["DERIVED", "PRIMARY", "AXIAL", "MPR"],
                                  ["ORIGINAL", "PRIMARY", "LOCALIZER"])):
        make_dicom(tmp_path / f"in/{index}.dcm", ImageType=kind, ImagePositionPatient=[0, 0, 2 * index])
    status, report, rows = run(tmp_path)
    assert status == 1 and not rows and "--derived takes these too" in reasons(report, "left out")["0.dcm"]
    status, report, rows = run(tmp_path, "--derived", out="derived")
    assert status == 0 and len(rows) == 2 and reasons(report, "left out") == {"2.dcm": "is a localiser"}
