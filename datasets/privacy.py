"""Pseudonyms in place of patients' names and IDs: in file names, in tables and where a path repeats them."""

import hashlib
import re
from functools import lru_cache, partial
from unicodedata import combining, normalize

from datasets.series import Slice

UMLAUTS = str.maketrans({letter: base + "e" for letter, base in zip("äöüøÄÖÜØ", "aouoAOUO", strict=True)})
PLAIN = str.maketrans("ıłøđħ", "ilodh")  # letters that are not written by an accent in Unicode


def pseudonym(text: str, kind: str, keep: bool) -> str:
    """A name safe for files: `kind`-hash, or with `keep` the text itself, made unique where it had to be cleaned."""
    code = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    if not keep:
        return f"{kind}-{code[:10]}"
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")[:64]
    return clean if clean == text else f"{clean or kind}-{code[:6]}"


def pseudonymizer(slices: list[Slice], keep: bool):
    """A function of a path that puts pseudonyms in place of the patients' names and IDs, unless `keep`.

    A name is found in whatever case, accents, umlauts and Unicode form, joined with others of its patient or with an
    initial; an ID with other separators and without its leading zeros. Letters are hidden from two on (one where a
    script has no case), numbers from four digits: shorter ones are in every file name.
    """
    owners, words, codes = {}, set(), set()
    for patient, names in sorted({(one.patient, one.names) for one in slices if not keep}):
        forms = {form for name in names for form in (name, normalize("NFC", name).translate(UMLAUTS),
                                                     re.sub("([aou])e", r"\1", name, flags=re.I))}
        phrases = [re.findall(r"[^\W_]+", _fold(form).replace("\0", "")) for form in sorted(forms)]
        letters = [word for phrase in phrases if "".join(phrase).isalpha() for word in phrase]
        initials = {form for a in letters for b in letters if a != b and len(a) > 1 and a.upper() != a
                    for form in (a + b[0], b[0] + a)}
        for word in {*letters, *initials}:
            if len(word) > 1 or word.upper() == word.lower():
                words.add(word)
                owners[word] = patient
        for phrase in phrases:
            whole = "".join(phrase)
            if len(whole) >= 4 and not whole.isalpha():
                first = phrase[0].lstrip("0") if len(whole.lstrip("0")) >= 4 else phrase[0]
                codes.add(r"[\W_]*".join(map(_spaced, filter(None, [first, *phrase[1:]]))))
                owners["".join([first, *phrase[1:]])] = patient
    if not owners:
        return str
    letter, longest = r"[^\W\d_]", partial(sorted, key=lambda word: (-len(word), word))
    free = [word for word in longest(words) if word.upper() == word.lower()]  # such scripts have no spaces either
    whole = "|".join(map(_spaced, longest(words - set(free)))) or r"(?!)"
    numbers = "|".join(code for code in longest(codes) if code[0].isdigit()) or r"(?!)"
    mixed = "|".join(code for code in longest(codes) if not code[0].isdigit()) or r"(?!)"
    pattern = re.compile(rf"(?<!\d)0*({numbers})(?!\d)|(?<!{letter})({mixed})(?!\d)|"
                         rf"(?<!{letter})(?:\0?({whole}))+(?!{letter})|({'|'.join(map(_spaced, free)) or '(?!)'})")

    @lru_cache
    def hide(text):
        folded, places = _fold(text, True)
        done, end = [], 0
        for match in pattern.finditer(folded):
            found = re.sub(r"[\W_]", "", match[match.lastindex])
            done += [text[end:places[match.start()]], pseudonym(owners[found], "patient", keep=False)]
            end = places[match.end()]
        return "".join(done) + text[end:]

    return lambda path: "/".join(map(hide, path.split("/")))


def _spaced(word):
    # A pattern of the word in folded text, where a NUL may stand before a capital.
    return r"\0?".join(map(re.escape, word))


def _fold(text, with_places=False):
    # Its letters without case, accents and forms, which people write in many ways; a NUL before a capital that begins
    # a word (JohnSmith). With where each comes from, too.
    letters, places = [], []
    for i, char in enumerate(text):
        near = text[i - 1 : i + 2] if i else ""
        parts = normalize("NFKD", normalize("NFKD", char).casefold()).translate(PLAIN)
        starts = near[1:2].isupper() and (near[0].islower() or near[0].isalpha() and near[2:].islower())
        for part in "\0" * starts + "".join(part for part in parts if not combining(part)):
            letters.append(part)
            places.append(i)
    return ("".join(letters), [*places, len(text)]) if with_places else "".join(letters)
