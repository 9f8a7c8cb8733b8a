"""Names, IDs and birth dates in paths: found as people write them, and nothing else is."""

import random
import re
from unicodedata import category, normalize

import numpy as np
import pytest
from conftest import body, make_dicom, make_series
from test_prepare import run

from datasets.privacy import _any_of, pseudonymizer, ways_to_write
from datasets.series import Slice
from reconstruct import main as reconstruct


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
    (("AB-12-77",), "ab1277"), (("AB_12_77",), "AB-12-77"), (("Nguyễn", "Phạm"), "NGUYỄNpHẠM"), (("Jo",), "CTJO"),
    (("Иванов", "Пётр"), "CTивановпётр"), (("Müller", "Jörg"), "CTjörgMüller"), (("İbrahim",), "CTİbrahim"),
    (("O'Brien",), "O'Brien"), (("McDonald",), "Mc Donald"), (("王小東",), "小東 王"), (("राम", "शर्मा"), "शर्मा राम"),
    (("ใจดี",), "ใจดี"), (("გიორგი",), "CTᲒᲘᲝᲠᲒᲘ"), (("دعاء",), "CTدعاء")])
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


@pytest.mark.parametrize("written", ["19800102", "1980-01-02", "02.01.1980", "2.1.1980", "01-02-1980", "2 Jan 1980",
                                     "January 2, 1980", "02JAN1980", "1980_1_2", "800102", "020180"])
def test_a_birth_date_is_hidden_however_it_is_written(written):
    hidden = hide(f"in/DOB {written}/1.dcm", *ways_to_write("19800102"))
    assert re.fullmatch(r"in/DOB patient-[0-9a-f]{10}/1.dcm", hidden)
    assert hide(f"in/{written}1/1980.dcm", *ways_to_write("19800102")) == f"in/{written}1/1980.dcm"
    assert ways_to_write("") == ways_to_write("1980") == ways_to_write("19801301") == []


def test_a_pattern_of_many_words_fits_the_longest_of_each():
    words = {"".join(random.Random(i).choices("ab.", k=i % 5 + 1)) for i in range(200)}
    pattern = re.compile(_any_of(tuple(map(re.escape, word)) for word in words))
    for text in words | {"c", "", "bbbbbbb", "a.a.a."}:
        fits = [word for word in words if text.startswith(word)]
        assert (found := pattern.match(text)) is None and not fits or found[0] == max(fits, key=len)
    assert not re.match(_any_of([]), "")


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


PARTS = [parts.split() for parts in (  # family names and given names that may go together, a script each
    "Smith O'Brien McDonald Jean-Pierre Lee Ng Jo Ann Anna Maria Maike Joel Goethe Noel",
    "Müller Jörg Groß Weiß Øyvind Łukasz Đorđe Çelik Zoë Ärztin Ñuñez", "İPEK Ali IŞIK Çiğdem İbrahim Yıldız ILGIN",
    "ΓΕΩΡΓΙΟΣ Νίκος Σπύρος Ευαγγελία", "Иванов Пётр Щербаков Ёлкин Йовович", "王 小東 李明 山田 太郎 김 철수",
    "Nguyễn Trần Đặng Phạm Thị Lê", "محمد علي فاطمة", "דוד כהן", "राम शर्मा प्रिया", "สมชาย ใจดี", "Արամ Սարգսյան",
    "გიორგი ბერიძე")]


def bare(text):
    text = normalize("NFKD", normalize("NFKD", text).casefold()).translate(str.maketrans("ıłøđħ", "ilodh"))
    return "".join(letter for letter in text if category(letter)[0] != "M")


def written_somehow(draw, family, given, code):
    """A folder's name as people make it of a patient."""
    cases = str.upper, str.lower, str.title, str.swapcase, str
    family, given = (draw.choice(cases)(part) for part in (family, given))
    if draw.random() < 0.2:
        family, given = bare(family), bare(given)
    first, second = draw.choice([(family, given), (given, family)])
    name = draw.choice([first + draw.choice("_ -.,^+") + second, first + second, "CT" + first + second, family,
                        family + given[0], f"{given[0]}. {family}", f"CT_{first} {second}_{draw.randint(0, 9)}"])
    code = draw.choice([code, code.lstrip("0"), "00" + code, code.replace("-", ""), code.lower(), "x"])
    return normalize(draw.choice(["NFC", "NFD", "NFKC"]), draw.choice([f"{name}_{code}", f"{code}_{name}", name]))


def test_two_hundred_names_appear_in_no_output(tmp_path, capfd):
    draw, secrets, count = random.Random(0), {}, 200
    for index in range(count):
        family, given = (draw.choice(PARTS[index % len(PARTS)]) for _ in range(2))
        code = draw.choice([f"{draw.randint(10000, 9999999):08d}", f"AB-{draw.randint(10, 99)}-{index + 100}"])
        secrets[index] = [*re.findall(r"[^\W\d_]+", bare(family)), *re.findall(r"[^\W\d_]+", bare(given)), code]
        path = f"{index}q/{written_somehow(draw, family, given, code)}/{written_somehow(draw, family, given, code)}"
        kind = {"Modality": "MR"} if index % 5 == 0 else {"Rows": 7} if index % 5 == 1 else {}  # these are refused
        make_dicom(tmp_path / "in" / path / "0.dcm", PatientID=code, SeriesInstanceUID=f"1.2.{index + 1}",
                   PatientName=f"{draw.choice([str.upper, str])(family)}^{given}", PatientBirthDate="19800102",
                   AccessionNumber=f"A{index + 7000}", ConvolutionKernel=family, SpecificCharacterSet="ISO_IR 192",
                   **kind)
        (tmp_path / "in" / path / f"19800102 a-{index + 7000}.pdf").write_bytes(b"a report")
    status, report, rows = run(tmp_path)
    assert len(rows) == 120 and len(report) == 400 and status == 1
    with pytest.raises(SystemExit):  # which series? All are listed.
        reconstruct([str(tmp_path / "in"), "--out", str(tmp_path / "out2"), "--method", "fbp", "--views", "9"])
    said = capfd.readouterr()
    lines = [f"{row['source']} {row['kernel']}" for row in rows] + [row["file"] for row in report]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    rest = "".join(path.name for path in files) + (tmp_path / "out/prepare.json").read_text() + said.out
    for line in [*lines, *re.findall(r"\d+: 1 slices of ([^,()]*)", said.err)]:
        index = int(re.search(r"(?:^|/)(\d+)q/", line)[1])
        left = bare(re.sub("patient-[0-9a-f]{10}", "|", line))
        for secret in secrets[index]:
            assert len(secret) < 2 or secret not in left, (secret, line)
        digits, code = re.sub(r"[\W_]", "", left), re.sub(r"[\W_]", "", secrets[index][-1].lower()).lstrip("0")
        assert not re.search(rf"19800102|a{index + 7000}|{code}", digits), line
    assert not [secret for found in secrets.values() for secret in found if len(secret) > 3 and secret in bare(rest)]


def test_names_of_files_without_a_header_are_hidden_in_sentences_and_paths(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for index, name in enumerate(("Mustermann-Max", "Smith-John")):
        np.save(tmp_path / f"in/{name}.npy", body(16, index))
    for options in ((), ("--patients-from", "manifest")):
        with pytest.raises(SystemExit):
            run(tmp_path, *options)
    said = capsys.readouterr().err
    assert "each of 2 slices is of a patient of its own (patient-" in said
    assert "No manifest.csv tells the patient of 2 file(s), such as patient-" in said
    status, _, rows = run(tmp_path, "--patients-from", "name")
    assert status == 0 and len(rows) == 2
    for name in ("Mustermann", "Max", "Smith", "John"):
        assert name not in said + capsys.readouterr().out + "".join(row["source"] for row in rows)
