"""Names and IDs in paths: found as people write them, and nothing else is."""

import re
from unicodedata import normalize

import pytest
from conftest import make_series
from test_prepare import run

from datasets.privacy import pseudonymizer
from datasets.series import Slice


def hide(text, *names):
    return pseudonymizer([Slice("x", patient="P", names=names)], keep=False)(text)


@pytest.mark.parametrize("names, written", [
    (("IPEK", "ALI"), "İPEK_ALİ"), (("İPEK", "ALİ"), "ipek ali"), (("Işık",), "ISIK"), (("ΓΕΩΡΓΙΟΣ",), "Γεωργιος"),
    (("ΓΕΩΡΓΙΟΣ",), "Γεωργιοσ"), (("NOVÁKOVÁ",), normalize("NFD", "Nováková")), (("NOVÁKOVÁ",), "Novakova"),
    (("Łukasz",), "LUKASZ"), (("Groß",), "GROSS"), (("MUELLER",), "Müller"),
    (("Jörg",), "JOERG"), (("Smith", "John"), "JohnSmith"), (("Smith", "John"), "smithjohn0"),
    (("Smith", "John"), "JSmith"), (("Smith", "John"), "SmithJ"), (("Smith", "John"), "CTSmith"),
    (("McDonald",), "MCDONALD"), (("O'Brien",), "obrien"), (("Jean-Pierre",), "PIERRE"), (("Smith,",), "smith"),
    (("王", "小東"), "王小東"), (("王", "小東"), "患者王"), (("Иванов",), "ИВАНОВ"),
    (("김", "철수"), normalize("NFD", "김철수")),
    (("ﬁsher",), "Fisher"), (("Ｙａｍａｄａ",), "yamada"), (("0012345",), "12345"), (("12345",), "0012345_7"),
    (("AB-12-77",), "ab1277"), (("AB_12_77",), "AB-12-77")])
def test_a_name_is_found_in_every_form(names, written):
    hidden = hide(f"in/{written}/1.dcm", *names)
    assert hidden.startswith("in/") and hidden.endswith("/1.dcm") and "patient-" in hidden
    rest = re.sub(r"patient-[0-9a-f]{10}", "", hidden[3:-6])
    assert re.sub(r"[\W\d_]|CT|患者", "", rest) == ""


@pytest.mark.parametrize("names, text", [
    (("Jane", "Doe"), "Doering/Janet/1.dcm"), (("12345",), "x/512345/1.dcm"), (("12345",), "x/123456.dcm"),
    (("7",), "in/7.dcm"), (("0042",), "in/42.dcm"), (("X",), "in/X.dcm")])
def test_nothing_else_is_hidden(names, text):
    assert hide(text, *names) == text


def test_no_form_of_a_name_crashes_or_stays(tmp_path):
    names = ["İPEK^ALİ", "ΓΕΩΡΓΙΟΣ^ΝΙΚΟΣ", "Müller-Lüdenscheid^Jörg", "王^小東", "Иванов^Пётр", "ſmith^Kurt", "ß^ß",
             "^^", ""]
    for index, name in enumerate(names):
        for form in ("NFC", "NFD"):
            folder = normalize(form, name.replace("^", " ")) + f" {form}"
            make_series(tmp_path / "in" / str(index) / folder, 1, PatientID=f"00{index}7531", PatientName=name,
                        SpecificCharacterSet="ISO_IR 192", SeriesInstanceUID=f"1.{index}{len(form)}{form == 'NFC':d}",
                        ImagePositionPatient=[0, 0, int(form == "NFC")])
    status, _, rows = run(tmp_path)
    assert status == 0 and len(rows) == 2 * len(names)
    text = normalize("NFC", "".join(row["source"] for row in rows))
    for name in names:
        assert not [word for word in name.split("^") if len(word) > 1 and word in text]
