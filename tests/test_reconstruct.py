"""reconstruct.py: series in, series out; place, identity, resuming, failures, and what bad input gets."""

import json
import subprocess
import sys
from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import ROOT, body, make_dicom, set_raw
from test_scanner import FAN, line_integrals

import reconstruct
from datasets import prepare, write_volume
from datasets.dicom import standard_axial
from datasets.write_volume import centred
from models.checkpoint import save_checkpoint
from models.scanner import make_scanner
from models.unet import UNet, UNetConfig
from reconstruct import main

SECRETS = (b"SECRET", b"Topsecret", b"Jane", b"19700102", b"Hospital", b"ACC1", b"1.2.77")


def series(folder, count=3, side=32, **tags):
    """A series whose pixels are `body`; returns HU (count, side, side)."""
    volume = np.array([body(side, i) for i in range(count)])
    for i in range(count):
        values = {"ImagePositionPatient": [-11.5, -7.25, 2.5 * i], "InstanceNumber": i, "StudyInstanceUID": "1.2.77",
                  "FrameOfReferenceUID": "1.2.77.1", "PatientBirthDate": "19700102", "StudyDate": "20200202",
                  "InstitutionName": "Hospital", "AccessionNumber": "ACC1", "SliceThickness": 2.5, "KVP": 120,
                  "BodyPartExamined": "CHEST", "SeriesNumber": 4, "PatientPosition": "HFS"}
        make_dicom(folder / f"{count - i}.dcm", pixels=(volume[i] + 1024).astype(np.uint16), **values | tags)
    return volume


def fbp(tmp_path, *options, source="in", out="out", views=90, expect=0):
    """Run main by FBP; the output folder."""
    assert main([str(tmp_path / source), "--out", str(tmp_path / out), "--method", "fbp", "--views", str(views),
                 *map(str, options)]) == expect
    return tmp_path / out


def read(folder):
    files = [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]
    return files, np.array([file.pixel_array * file.RescaleSlope + file.RescaleIntercept for file in files])


def test_a_dicom_series_comes_back_beside_the_original(tmp_path):
    volume = series(tmp_path / "in")
    files, hu = read(fbp(tmp_path))
    array = np.load(fbp(tmp_path, "--format", "npy", out="npy") / "volume.npy")
    np.testing.assert_array_equal(hu, array)
    assert array.dtype == np.int16 and np.sqrt(((hu - volume) ** 2.0).mean()) < 110  # edges of 32 pixels are blurred
    original = pydicom.dcmread(tmp_path / "in/1.dcm")
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "PatientBirthDate", "KVP",
                 "SliceThickness", "PixelSpacing", "ImageOrientationPatient"):
        assert all(file[name].value == original[name].value for file in files), name
    assert [list(file.ImagePositionPatient) for file in files] == [[-11.5, -7.25, 2.5 * i] for i in range(3)]
    assert [file.InstanceNumber for file in files] == [1, 2, 3]
    uids = {file.SOPInstanceUID for file in files} | {file.SeriesInstanceUID for file in files}
    assert len(uids) == 4 and original.SeriesInstanceUID not in uids
    assert files[0].ImageType == ["DERIVED", "SECONDARY", "AXIAL"] and "fbp, 90 views" in files[0].SeriesDescription
    assert "simulated" in files[0].DerivationDescription


@pytest.mark.parametrize("orientation", [(-1, 0, 0, 0, -1, 0), (0, -1, 0, 1, 0, 0), (0, 1, 0, 1, 0, 0)])
def test_every_pixel_stays_where_it_was_in_the_patient(tmp_path, orientation):
    series(tmp_path / "in", 1, ImageOrientationPatient=list(orientation))
    (file,), _ = read(fbp(tmp_path))
    row, column = np.mgrid[:32, :32]

    def places(dataset):
        step = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3) * float(dataset.PixelSpacing[0])
        corner = np.array(dataset.ImagePositionPatient, float)
        return corner + column[..., None] * step[0] + row[..., None] * step[1]

    before = places(pydicom.dcmread(tmp_path / "in/1.dcm"))
    want = np.stack([standard_axial(before[..., axis], orientation) for axis in range(3)], axis=-1)
    np.testing.assert_allclose(places(file), want, atol=1e-6)


def test_another_size_keeps_the_field_of_view(tmp_path):
    series(tmp_path / "in", 2)
    (file, _), hu = read(fbp(tmp_path, "--size", 16))
    assert hu.shape == (2, 16, 16) and list(file.PixelSpacing) == [1.4, 1.4]
    np.testing.assert_allclose(file.ImagePositionPatient, [-11.5 + 0.35, -7.25 + 0.35, 0], atol=1e-6)


def test_deidentified_output_holds_nothing_of_the_patient(tmp_path, capfd):
    series(tmp_path / "in")
    out = fbp(tmp_path, "--deidentify")
    written = b"".join(path.read_bytes() + path.name.encode() for path in out.iterdir())
    written += "".join(capfd.readouterr()).encode()
    assert not [secret for secret in SECRETS if secret in written]
    files, _ = read(out)
    assert files[0].PatientIdentityRemoved == "YES" and len({file.StudyInstanceUID for file in files}) == 1
    named = fbp(tmp_path, out="named")  # the test can see them where they are
    assert b"Topsecret" in (named / "slice_0001.dcm").read_bytes()
    assert not [secret for secret in SECRETS if secret in "".join(capfd.readouterr()).encode()]


@pytest.mark.parametrize("burned_in", ["NO", "YES"])
def test_deidentification_keeps_what_is_listed_and_nothing_else(tmp_path, capsys, burned_in):
    def text(dataset):
        return {f"{element.keyword} {element.value}" for element in dataset}

    series(tmp_path / "in", 1, PatientAge="055Y", PatientSex="F", BodyPartExamined="KNEE of Jane", StudyID="77",
           PositionReferenceIndicator="Jane", BurnedInAnnotation=burned_in, RecognizableVisualFeatures="YES",
           PatientPosition="FFS", AcquisitionNumber=3)
    (first,), _ = read(fbp(tmp_path, "--deidentify"))
    said = capsys.readouterr().err
    assert first.PatientIdentityRemoved == ("YES" if burned_in == "NO" else "NO")
    assert ("text burned into its pixels" in said) == (burned_in == "YES")
    code = first.DeidentificationMethodCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("113100", "DCM") and first.DeidentificationMethod
    assert first.LongitudinalTemporalInformationModified == "REMOVED" and "BodyPartExamined" not in first
    assert (first.BurnedInAnnotation, first.RecognizableVisualFeatures, first.KVP) == (burned_in, "YES", 120)
    assert (first.PatientPosition, first.AcquisitionNumber, first.PatientSex) == ("FFS", 3, "")
    assert "PatientAge" not in first and not first.StudyID and not first.PositionReferenceIndicator
    (again,), _ = read(fbp(tmp_path, "--deidentify"))  # nothing to do
    assert text(again) == text(first)
    (other,), _ = read(fbp(tmp_path, "--deidentify", out="other"))
    changed = {line.split()[0] for line in text(first) ^ text(other)}
    assert changed == {"StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "PatientID",
                       "PatientName"}  # random: nobody finds the patient by trying IDs


def test_nifti_lies_where_the_dicom_series_lies(tmp_path):
    series(tmp_path / "in", ImageOrientationPatient=[-1, 0, 0, 0, 1, 0])
    hu = np.load(fbp(tmp_path, "--format", "npy", out="npy") / "volume.npy")
    image = nibabel.load(fbp(tmp_path, "--format", "nifti") / "volume.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), hu.transpose(2, 1, 0))
    left = -11.5 - 31 * 0.7  # the last stored column is the first of the standard orientation
    np.testing.assert_allclose(image.affine, [[-0.7, 0, 0, -left], [0, -0.7, 0, 7.25], [0, 0, 2.5, 0], [0, 0, 0, 1]],
                               atol=1e-5)
    files, again = read(fbp(tmp_path, source="out/volume.nii.gz", out="again", views=400))
    np.testing.assert_allclose(files[1].ImagePositionPatient, [left, -7.25, 2.5], atol=1e-4)
    assert np.sqrt(((again - hu) ** 2.0).mean()) < 110 and files[0].PatientID.startswith("patient-")


def test_fields_that_cannot_be_copied_are_left_out_and_named(tmp_path, capsys):
    series(tmp_path / "in")
    odd = {"SliceThickness": ("DS", b"1,25"), "KVP": ("DS", b"120 kV"), "AcquisitionNumber": ("IS", b"1A"),
           "SeriesNumber": ("IS", b"4B"), "PatientAge": ("US", b"\1")}
    for path in (tmp_path / "in").iterdir():
        set_raw(path, **odd)
    out = fbp(tmp_path)
    files, _ = read(out)
    assert len(files) == 3 and files[0].SliceThickness is None and files[0].PatientID == "SECRET-ID"
    for said in (capsys.readouterr().err, (out / "report.csv").read_text()):
        assert all(name in said for name in odd)
    assert len((out / "report.csv").read_text().splitlines()) == 2
    before = (out / "report.csv").read_text()
    assert (fbp(tmp_path) / "report.csv").read_text() == before  # told again by a run that has nothing to do


@pytest.mark.parametrize("vr", ["UN", "DS", "IS", "LO", "SQ", "US", "FD"])
def test_no_bytes_of_an_attribute_stop_the_writer(tmp_path, vr):
    names = (*write_volume.PATIENT, *write_volume.STUDY, *write_volume.SCAN, *write_volume.UIDS, "SeriesNumber")
    for content in (b"", b"\xff\xfe", b"1\\2", b"x" * 70, b"\x1b$B\x00", b"99999999999999999999"):
        make_dicom(tmp_path / "a.dcm")
        set_raw(tmp_path / "a.dcm", **{name: (vr, content) for name in names})
        original = write_volume.read_original(str(tmp_path / "a.dcm"))
        header, _ = write_volume.series_header("about", "1.2.3", original, "p", deidentify=content == b"")
        write_volume.write_dicom(tmp_path / "b.dcm", header, np.zeros((8, 8), np.int16), centred(1, 8, 0), 0)
        with pydicom.config.disable_value_validation():
            assert pydicom.dcmread(tmp_path / "b.dcm").StudyInstanceUID


@pytest.mark.parametrize("number, new", [(4, 1004), (-3, 997), (2**31 - 1, 1000), (None, 1000)])
def test_the_series_number_stays_a_dicom_integer(number, new):
    original = pydicom.Dataset()
    original.SeriesNumber = number
    assert write_volume.series_header("about", "1.2.3", original, "p", deidentify=False)[0].SeriesNumber == new


def test_uneven_slices_are_told_written_truly_and_refused_as_nifti(tmp_path, capsys, stops):
    heights = [0, 3, 6, 13, 20]
    for i, z in enumerate(heights):
        make_dicom(tmp_path / f"in/{i}.dcm", pixels=(body(32, i) + 1024).astype(np.uint16),
                   ImagePositionPatient=[0, 0, z])
    files, _ = read(fbp(tmp_path))
    assert [file.ImagePositionPatient[2] for file in files] == heights
    assert "Warning: 2.dcm lies 4 mm from where even steps of 5 mm" in capsys.readouterr().err
    with stops("Slice 3 lies 4 mm .* choose --format dicom"):
        fbp(tmp_path, "--format", "nifti", out="nifti")
    assert not (tmp_path / "nifti").exists()


@pytest.mark.parametrize("tilt, code", [(0, 1), (5, 0)])
def test_a_tilted_gantry_gets_no_qform(tmp_path, tilt, code):
    cosine, sine = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    for i in range(5):
        make_dicom(tmp_path / f"in/{i}.dcm", side=32, ImagePositionPatient=[0, 0, 5 * i],
                   ImageOrientationPatient=[1, 0, 0, 0, round(cosine, 6), round(-sine, 6)])
    image = nibabel.load(fbp(tmp_path, "--format", "nifti") / "volume.nii.gz")
    assert image.header["qform_code"] == code and image.header["sform_code"] == 1
    np.testing.assert_allclose(image.affine[:3, 2], [0, 0, 5], atol=1e-5)
    np.testing.assert_allclose(image.affine[:3, 1], [0, -0.7 * cosine, -0.7 * sine], atol=1e-5)


def test_two_reconstructions_under_one_uid_are_listed(tmp_path, stops):
    for i in range(8):
        make_dicom(tmp_path / f"in/{i}.dcm", side=32, ConvolutionKernel=("B30f", "B70f")[i % 2],
                   ImagePositionPatient=[0, 0, i])
    with stops("1: 4 slices .kernel B30f.* 0 to 6 mm., 2: 4 slices .kernel B70f.* 1 to 7 mm.*; choose one"):
        fbp(tmp_path)
    files, _ = read(fbp(tmp_path, "--series", 2))
    assert [file.ImagePositionPatient[2] for file in files] == [1, 3, 5, 7]


def test_own_output_is_read_on_request(tmp_path, stops):
    volume = series(tmp_path / "in")
    (tmp_path / "own").mkdir()
    for path in fbp(tmp_path, views=400).glob("*.dcm"):
        path.rename(tmp_path / "own" / path.name)
    with stops("--derived takes these too"):
        fbp(tmp_path, source="own", out="again")
    _, hu = read(fbp(tmp_path, "--derived", source="own", out="again", views=400))
    assert hu.shape == volume.shape


def test_prepared_slices_return_to_the_place_of_their_original(tmp_path, stops):
    series(tmp_path / "in", 3)
    assert prepare.main([str(tmp_path / "in"), "--out", str(tmp_path / "data"), "--size", "16", "--split", "0", "0",
                         "1", "--workers", "1"]) == 0
    direct, want = read(fbp(tmp_path, "--size", 16))
    files, hu = read(fbp(tmp_path, "--original", tmp_path / "in", source="data/test_img", out="back"))
    np.testing.assert_array_equal(hu, want)
    for name in ("ImagePositionPatient", "PixelSpacing", "StudyInstanceUID", "PatientID", "FrameOfReferenceUID"):
        assert [file[name].value for file in files] == [file[name].value for file in direct], name
    alone, _ = read(fbp(tmp_path, source="data/test_img", out="alone"))  # the manifest knows spacing and height
    assert [file.ImagePositionPatient[2] for file in alone] == [0, 2.5, 5] and alone[0].PixelSpacing[0] == 1.4
    series(tmp_path / "two", 2)
    with stops("holds 2 slices"):
        fbp(tmp_path, "--original", tmp_path / "two", source="data/test_img", out="x")


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, stops):
    series(tmp_path / "in", 5)
    whole = {path.name: path.read_bytes() for path in
             fbp(tmp_path, "--format", "npy", "--batch", 1, out="whole").glob("*.npy")}
    original, calls = reconstruct.simulated, []

    def stopping(*args):
        job = original(*args)

        def measure(reconstructor, hu):
            calls.append(len(hu))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return job.measure(reconstructor, hu)

        return replace(job, measure=measure)

    monkeypatch.setattr(reconstruct, "simulated", stopping)
    with stops("Stopped"):
        fbp(tmp_path, "--format", "npy", "--batch", 1)
    assert not (tmp_path / "out/volume.npy").exists()
    half = np.load(tmp_path / "out/.slices.npy", mmap_mode="r+")
    half[0, 1, 5:] = reconstruct.MISSING  # killed in the middle of a slice
    del half
    fbp(tmp_path, "--format", "npy", "--batch", 1)
    assert len(calls) == 3 + 4 and (tmp_path / "out/volume.npy").read_bytes() == whole["volume.npy"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"volume.npy", "run.json", "report.csv",
                                                                    "preview.png"}
    fbp(tmp_path, "--format", "npy", "--batch", 1)
    assert len(calls) == 7


def test_a_second_run_writes_only_missing_files_and_refuses_other_options(tmp_path, stops):
    series(tmp_path / "in")
    out = fbp(tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.dcm")}
    (out / "slice_0002.dcm").unlink()
    fbp(tmp_path)
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.dcm")}
    assert {name for name in before if before[name] != after[name]} == {"slice_0002.dcm"}
    assert {name: content for name, (content, _) in before.items()} == {n: content for n, (content, _) in after.items()}
    for change, text in ((["--size", 16], "size"), (["--median-z", 3], "median_z"), (["--deidentify"], "deidentify")):
        with stops(f"another {text}"):
            fbp(tmp_path, *change)
    with stops("holds no reconstruction"):
        fbp(tmp_path, out="in", source="in/1.dcm")


def test_a_slice_that_fails_is_named_and_done_once_it_is_whole(tmp_path, capsys, stops):
    series(tmp_path / "in", 4)
    good = (tmp_path / "in/2.dcm").read_bytes()
    make_dicom(tmp_path / "in/2.dcm", side=32, ImagePositionPatient=[-11.5, -7.25, 5], compress=True, damage=True)
    (tmp_path / "in/notes.dcm").write_bytes(b"not an image at all")
    out = fbp(tmp_path, expect=1)
    assert sorted(path.name for path in out.glob("*.dcm")) == [f"slice_000{i}.dcm" for i in (1, 2, 4)]
    assert "2.dcm" in (said := capsys.readouterr().err) and "decoded" in said and "notes.dcm" in said
    assert "2.dcm" in (out / "report.csv").read_text()
    for _ in range(2):  # tried again, told again
        out = fbp(tmp_path, "--format", "npy", out="npy", expect=1)
        assert not (out / "volume.npy").exists() and (out / "preview.png").is_file()  # a hole is no air
        assert "volume.npy is not written, as 1 of 4 slices are missing" in capsys.readouterr().err
    (tmp_path / "in/notes.dcm").unlink()
    (tmp_path / "in/2.dcm").write_bytes(good)
    with stops("another source"):  # other input may be another scan
        fbp(tmp_path)
    np.save(tmp_path / "v.npy", np.array([body(32, 0), np.full((32, 32), np.nan)]))
    capsys.readouterr()
    fbp(tmp_path, source="v.npy", out="v", expect=1)
    assert "v.npy, frame 1 contains NaN" in capsys.readouterr().err
    np.save(tmp_path / "v.npy", np.array([body(32, 0), 1.0 * body(32, 1)]))
    with stops("another source"):  # of the same name and size
        fbp(tmp_path, source="v.npy", out="v")


def test_median_across_slices(tmp_path):
    series(tmp_path / "in", 5)
    plain = np.load(fbp(tmp_path, "--format", "npy", out="plain") / "volume.npy")
    _, hu = read(fbp(tmp_path, "--median-z", 3, out="median"))
    np.testing.assert_array_equal(hu[1:4], [np.median(plain[i - 1:i + 2], axis=0) for i in (1, 2, 3)])
    np.testing.assert_array_equal(hu[0], np.rint(np.median(plain[:2], axis=0)))


def test_the_batch_does_not_matter_and_networks_reconstruct(tmp_path):
    volume = series(tmp_path / "in")
    outs = []
    for batch in (1, 3):
        options = [str(tmp_path / "in"), "--out", str(tmp_path / f"o{batch}"), "--views", "9", "--size", "32",
                   "--format", "npy", "--batch", str(batch), "--dc", "4"]
        assert main(options) == 0
        outs.append(np.load(tmp_path / f"o{batch}/volume.npy").astype(int))
    assert abs(outs[0] - outs[1]).max() <= 1
    plain = np.load(fbp(tmp_path, "--format", "npy", views=9) / "volume.npy")
    error = [np.sqrt(((x.clip(-1024, 3071) - volume) ** 2.0).mean()) for x in (outs[0], plain)]
    assert error[0] < error[1]


def test_a_measured_sinogram_with_a_geometry_in_mm(tmp_path, capsys, stops):
    fields = FAN | {"angles": {"start": 0, "step": 5, "count": 72}, "size": 32, "detector_offset_mm": 2.0}
    lines = line_integrals(make_scanner(fields))
    np.save(tmp_path / "scan.npy", np.stack([lines, 0.5 * lines]))
    (tmp_path / "g.json").write_text(json.dumps(fields))
    geometry = ["--geometry", tmp_path / "g.json"]
    files, hu = read(fbp(tmp_path, *geometry, source="scan.npy", views=36))
    assert hu.shape == (2, 32, 32) and files[0].PixelSpacing[0] == 11.25 and "36 views" in files[0].SeriesDescription
    assert abs(hu[0, 12, 16]) < 90 and abs(hu[1, 12, 16] + 500) < 60 and "measured" in files[0].DerivationDescription
    argv = [str(tmp_path / "scan.npy"), *map(str, geometry), "--out", str(tmp_path / "net"), "--method", "one-step",
            "--dc", "8", "--format", "npy"]
    capsys.readouterr()
    assert main(argv) == 0 and "This scan shows no noise" in capsys.readouterr().out
    assert abs(int(np.load(tmp_path / "net/volume.npy")[0, 12, 16])) < 100
    np.save(tmp_path / "scan.npy", lines[:70])
    with stops("70 views of 500 bins, the geometry 72 of 500"):
        fbp(tmp_path, *geometry, source="scan.npy", views=36, out="x")
    (tmp_path / "g.json").write_text("{}")
    with stops("lacks angles"):
        fbp(tmp_path, *geometry, source="scan.npy", views=36, out="x")
    with stops("holds no slices that can be used"):
        fbp(tmp_path, source="scan.npy", out="x")  # without a geometry it is taken for images


@pytest.mark.parametrize("photons", [{}, {"photons": 1e4}])
def test_what_a_network_does_not_know_of_a_scan_is_said(tmp_path, capsys, photons):
    """This one knows other scanners, and noise if it is told it."""
    fields = FAN | {"angles": {"start": 0, "step": 20, "count": 18}, "size": 32}
    (tmp_path / "g.json").write_text(json.dumps(fields | photons))
    np.save(tmp_path / "scan.npy", line_integrals(make_scanner(fields)))
    config = UNetConfig(width=32, stem=4, told_photons=True)
    save_checkpoint(tmp_path / "net.safetensors", UNet(config).state_dict(), config,
                    {"training": {"preset": {"scanner_share": 0.3}}})
    assert main([str(tmp_path / "scan.npy"), "--geometry", str(tmp_path / "g.json"), "--out", str(tmp_path / "out"),
                 "--checkpoint", str(tmp_path / "net.safetensors"), "--method", "fbp", "one-step"]) == 0
    said = capsys.readouterr().out
    assert "is unknown" not in said and ("This scan shows no noise" in said) == (not photons)
    plain, learned = (json.loads((tmp_path / f"out/{name}/run.json").read_text()) for name in ("fbp", "one-step"))
    assert plain["weights"] is None and plain["levels"] is None and learned["levels"] and learned["weights"]


def test_several_series_are_listed_and_one_is_chosen(tmp_path, stops):
    series(tmp_path / "in/a")
    series(tmp_path / "in/b", 2, SeriesInstanceUID="1.9")
    with stops("2 series .1: 3 slices of a, 2: 2 slices of b.; choose one by --series"):
        fbp(tmp_path)
    assert len(list(fbp(tmp_path, "--series", 2).glob("*.dcm"))) == 2


def test_command_line(tmp_path, capsys, stops):
    series(tmp_path / "in", 1)
    command = [sys.executable, "reconstruct.py", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--views", "9", "--method", "fbp"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "1 of 1 slices" in done.stdout, done.stderr
    for extra, text in {("--median-z", "2"): "odd number", ("--batch", "0"): "at least 1", ("--size", "2"): "8 to 4096",
                        ("--device", "tpu"): "cannot be used"}.items():
        with pytest.raises(SystemExit):
            main([*command[2:], *extra])
        assert text in capsys.readouterr().err
    with stops("how many to simulate"):
        main([*command[2:], "--method", "fbp"])
    with stops("divisible by"):
        main([*command[2:], "--views", "9", "--size", "30"])
    with stops("no such|does not exist"):
        main([*command[2:], "--views", "9", "--checkpoint", str(tmp_path / "none")])
