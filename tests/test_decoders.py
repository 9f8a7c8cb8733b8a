"""Compressed DICOM: what each transfer syntax that archives use decodes to."""

import struct

import numpy as np
import pydicom
import pytest
from conftest import make_dicom
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1, RLELossless

from datasets.dicom import read_header, read_hu


def segment(marker, content):
    return b"\xff" + struct.pack(">BH", marker, 2 + len(content)) + content


def jpeg(marker, pixels, bits, scan, values, extra=b""):
    """A grey JPEG stream. values: a (category, then how many bits of what) a time; all codes have five bits."""
    code = ""
    for size, value in values:
        more = value if value > 0 else value + 2**size - 1
        code += f"{size:05b}" + f"{more:0{size}b}" * (0 < size < 16)
    packed = int((code + "1" * (-len(code) % 8)), 2).to_bytes((len(code) + 7) // 8, "big").replace(b"\xff", b"\xff\0")
    tables = b"".join(segment(0xC4, bytes([kind, 0, 0, 0, 0, 17]) + bytes(11) + bytes(range(17))) for kind in (0, 16))
    frame = segment(marker, struct.pack(">BHHB", bits, *pixels.shape, 1) + b"\1\x11\0")
    return b"\xff\xd8" + extra + tables + frame + segment(0xDA, b"\1\1\0" + scan) + packed + b"\xff\xd9"


def category(value):
    return abs(int(value)).bit_length(), int(value)


def lossless(pixels):
    """JPEG process 14, each pixel as its difference from its left neighbour (ITU-T T.81, H.1)."""
    before = np.roll(pixels, 1, axis=1)
    before[1:, 0], before[0, 0] = pixels[:-1, 0], 2**15
    return jpeg(0xC3, pixels, 16, b"\1\0\0", [category(value) for value in (pixels - before).ravel()])


def flat_blocks(pixels):
    """JPEG process 4: of 12 bits, 8 x 8 pixels of one value each (T.81, F.1)."""
    levels = (pixels[::8, ::8] - 2048).ravel()
    values = [part for step in np.diff(levels, prepend=0) for part in (category(step), (0, 0))]  # and no more
    return jpeg(0xC1, pixels, 12, b"\0\x3f\0", values, segment(0xDB, b"\0" + bytes([8] * 64)))


def test_jpeg_lossless_decodes_to_the_stored_numbers(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 64))
    for name, syntax in (("sv1", JPEGLosslessSV1), ("process14", JPEGLossless)):
        make_dicom(tmp_path / name, pixels=pixels.astype(np.uint16), syntax=syntax,
                   PixelData=encapsulate([lossless(pixels)]))
        np.testing.assert_array_equal(read_hu(str(tmp_path / name))[0], (pixels - 1024).clip(-1024, 3071))
        assert read_header(str(tmp_path / name))[0].warning == ""


def test_jpeg_extended_of_12_bits_decodes(tmp_path):
    pixels = np.kron(np.random.default_rng(0).integers(0, 4096, (4, 4)), np.ones((8, 8), int))
    make_dicom(tmp_path / "a", pixels=pixels.astype(np.uint16), syntax=JPEGExtended12Bit, BitsStored=12, HighBit=11,
               PixelData=encapsulate([flat_blocks(pixels)]))
    np.testing.assert_allclose(read_hu(str(tmp_path / "a"))[0], pixels - 1024, atol=1)
    assert "compressed with loss" in read_header(str(tmp_path / "a"))[0].warning


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm", "MR_small_RLE.dcm"])
def test_lossless_streams_of_other_encoders_decode(tmp_path, name):
    files = [pydicom.dcmread(get_testdata_file(file, download=False)) for file in (name, "MR_small.dcm")]
    frame = next(generate_frames(files[0].PixelData, number_of_frames=1))
    want = files[1].pixel_array
    make_dicom(tmp_path / "a", pixels=want, syntax=files[0].file_meta.TransferSyntaxUID, RescaleIntercept=0,
               PixelData=encapsulate([frame]))
    np.testing.assert_array_equal(read_hu(str(tmp_path / "a"))[0], want.clip(-1024, 3071))


def test_every_decoder_is_there():
    for syntax in (JPEGLosslessSV1, JPEGLossless, JPEGExtended12Bit, JPEG2000, RLELossless,
                   pydicom.uid.JPEGLSLossless, pydicom.uid.JPEGLSNearLossless, pydicom.uid.HTJ2KLossless):
        assert pydicom.pixels.get_decoder(syntax).is_available, syntax.name
