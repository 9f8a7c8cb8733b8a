"""Pseudonyms in place of patients' names and IDs: in file names, in tables and where a path repeats them."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from functools import cache, lru_cache
from os.path import commonprefix
from unicodedata import category, name, normalize

from datasets.series import Slice

UMLAUTS = str.maketrans({letter: base + "e" for letter, base in zip("äöüøÄÖÜØ", "aouoAOUO", strict=True)})
LETTERS = r"[^\W_]+"
PLAIN = str.maketrans("ıłøđħ", "ilodh")  # letters that are not written by an accent in Unicode


def pseudonym(text: str, kind: str, keep: bool, salt: str = "") -> str:
    """A name safe for files: `kind`-hash, or with `keep` the text itself, made unique where it had to be cleaned.

    salt: a secret without which nobody finds the text by trying names or IDs.
    """
    code = hashlib.sha256((salt + text).encode(errors="backslashreplace")).hexdigest()
    if not keep:
        return f"{kind}-{code[:10]}"
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:64]
    return clean if clean == text else f"{clean or kind}-{code[:6]}"


def ways_to_write(date: str) -> list[str]:
    """How folders may write a DICOM date (YYYYMMDD), such as that of a birth; of any other text nothing."""
    try:
        day = datetime.strptime(date.strip(), "%Y%m%d")
    except ValueError:
        return []
    y, m, d = str(day.year), str(day.month), str(day.day)
    long, mm, dd = day.strftime("%B"), m.zfill(2), d.zfill(2)
    months = [(month, some) for month in (long, long[:3]) for some in (d, dd)]
    months += [(m, d), (mm, dd)]
    forms = [form for month, some in months for form in (f"{y} {month} {some}", f"{some} {month} {y}",
                                                         f"{month} {some} {y}")]
    short = [f"{y[2:]} {mm} {dd}", f"{dd} {mm} {y[2:]}", f"{mm} {dd} {y[2:]}"]
    return sorted({*forms, *(form for form in short if form[:2] != "00")})  # 00 11 12 is 1112 without its zeros


def pseudonymizer(slices: list[Slice], keep: bool, salt: str = ""):
    """A function of a path that puts pseudonyms in place of the patients' names, IDs and birth dates, unless `keep`.

    A name is found in whatever case, accents, umlauts and Unicode form, joined with others of its patient or with an
    initial; an ID with other separators and without its leading zeros. Letters are hidden from two on (one where a
    script has no case), numbers from four digits: shorter ones are in every file name.
    """
    owners, words, codes = {}, set(), set()

    def add(kind, patient, *parts):  # parts of a word or code: something may stand between them
        kind.add(_atoms(*parts))
        owners["".join(parts)] = patient

    for patient, names in sorted({(one.patient, one.names) for one in slices if not keep}):
        forms = {form for name in names for form in (name, normalize("NFC", name).translate(UMLAUTS),
                                                     re.sub("([aou])e", r"\1", name, flags=re.I))}
        folded = [_fold(form) for form in sorted(forms)]
        phrases = [re.findall(LETTERS, form.replace("\0", "")) for form in folded]
        letters = [word for phrase in phrases if "".join(phrase).isalpha() for word in phrase]
        initials = {form for a in letters for b in letters if len(a) > 1 and a.upper() != a
                    for form in (a + b[0], b[0] + a)}
        for word in {*letters, *initials}:
            if word.upper() == word.lower():  # such scripts have no spaces: the family name may stand first or last
                for turn in range(len(word) if len(word) < 5 else 1):
                    add(words, patient, *word[turn:], *word[:turn])
            elif len(word) > 1:
                add(words, patient, word)
        phrases += [re.findall(LETTERS, form.replace("\0", " ")) for form in folded]  # McDonald is Mc Donald, too
        for phrase in phrases:
            whole = "".join(phrase)
            if whole.isalpha() and len(phrase) > 1:
                add(words, patient, *phrase)
            elif len(whole) >= 4 and not whole.isalpha():
                first = phrase[0].lstrip("0") if len(whole.lstrip("0")) >= 4 else phrase[0]
                add(codes, patient, *filter(None, [first, *phrase[1:]]))
    if not owners:
        return str
    letter = r"[^\W\d_]"
    free = {word for word in words if word[0].upper() == word[0].lower()}
    whole, free = _any_of(words - free), _any_of(free)
    numbers, mixed = (_any_of(code for code in codes if code[0].isdigit() == digit) for digit in (True, False))
    begins = "|".join([rf"(?<!{letter})", *(rf"(?<=(?<!{letter}){word})" for word in ("ct", "pt", "patient"))])
    joined = rf"(?:{begins})(?:\0?({whole})){{1,8}}"  # to the end of all letters where that is possible
    pattern = re.compile(rf"(?<!\d)0*({numbers})(?!\d)|(?<!{letter})({mixed})(?!\d)|"
                         rf"{joined}(?!\0?{letter})|{joined}(?!{letter})|({free})")

    @lru_cache
    def hide(text):
        folded, places = _fold(text, True)
        done, end = [], 0
        for match in pattern.finditer(folded):
            found = re.sub(r"[\W_]", "", match[match.lastindex])
            done += [text[end:places[match.start()]], pseudonym(owners[found], "patient", keep=False, salt=salt)]
            end = places[match.end()]
        return "".join(done) + text[end:]

    return lambda path: "/".join(map(hide, path.split("/")))


def _atoms(*words):
    # Patterns of the letters of words in folded text, where a NUL may stand before a capital, one after the other.
    between = {True: r"[\W_]*", False: r"\0?"}
    return tuple(between[i == 0] * (i + k > 0) + re.escape(letter)
                 for k, word in enumerate(words) for i, letter in enumerate(word))


def _any_of(sequences: Iterable[tuple[str, ...]]) -> str:
    # A pattern of the longest that fits of some sequences of atoms. What these begin with in common is tried once:
    # thousands of names cost little more than one.
    sequences = set(sequences)
    shared = len(commonprefix(list(sequences)))
    heads = defaultdict(set)
    for sequence in sequences:
        heads[sequence[shared : shared + 1]].add(sequence[shared:])
    start = "".join(min(sequences)[:shared]) if sequences else r"(?!)"
    more = "|".join(_any_of(rest) if head else "" for head, rest in sorted(heads.items(), reverse=True))
    return start + f"(?:{more})" * (len(heads) > 1)


@cache
def _script(letter):
    return name(letter, "").partition(" ")[0]


@cache
def _plain(letter):
    # Without case, accents and forms; nothing of an accent alone.
    parts = normalize("NFKD", normalize("NFKD", letter).casefold()).translate(PLAIN)
    return "".join(part for part in parts if category(part)[0] != "M")


def _fold(text, with_places=False):
    # Its letters without case, accents and forms, which people write in many ways; a NUL where one word may follow on
    # another (JohnSmith, CTSmith, CTsmith, CTИванов). With where each comes from, too.
    letters, places = [], []
    spots = [i for i, char in enumerate(text) if category(char)[0] != "M"]  # accents of their own are skipped
    bare = "".join(text[i] for i in spots)
    for k, (i, char) in enumerate(zip(spots, bare, strict=True)):
        before, after = bare[max(0, k - 2) : k], bare[k + 1 : k + 2]
        starts = before[-1:].isalpha() and (
            char.isupper() and (before[-1].islower() or after.islower())
            or char.islower() and len(before) == 2 and before.isupper() or _script(char) != _script(before[-1]))
        for part in "\0" * starts + _plain(char):
            letters.append(part)
            places.append(i)
    return ("".join(letters), [*places, len(text)]) if with_places else "".join(letters)
