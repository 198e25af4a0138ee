"""Sentences of a report's findings and impression, and template sentences from its CheXpert labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, Protocol

from medgen.errors import UserError
from preprocessing._report_sections import flatten

__all__ = [
    "LABELS",
    "RuleSplitter",
    "SpacySplitter",
    "Splitter",
    "label_sentences",
    "make_splitter",
    "report_sentences",
    "strip_numbering",
]

MIN_LENGTH = 3  # characters; what is shorter is a stray mark
SPACY_MODEL = "en_core_web_sm"


class Splitter(Protocol):
    """Cuts a text on one line into sentences; ``name`` says which one did it."""

    name: str

    def __call__(self, text: str) -> list[str]: ...


# ---------------------------------------------------------------------------------------------------------------------
# sentences by rules

_LIST_NUMBER = re.compile(r"(?:(?<!\S)|(?<=[a-z_)][.?!]))(?P<value>[0-9]{1,2})(?P<mark>[.)])(?=\s?(?P<next>[^\s.,]))")
_STOP = re.compile(r"(?P<stop>[.?!]++|…)[\"')\]]*+")
_ABBREVIATIONS = frozenset(  # never the end of a sentence
    "dr drs mr mrs ms prof st vs cf viz approx ca fig figs ext tel e.g i.e".split()
)
_SHORTENED = frozenset(  # not the end before a lower-case word, unlike other words as long
    "bilat subseg incl poss prob resp hosp dept post".split()
)
_TIMES = frozenset(("a.m", "p.m", "am", "pm"))
_UNITS = frozenset(("cm", "mm", "ml", "cc"))
_BEFORE_NAME = frozenset("dr drs mr mrs ms prof by with to from and".split())  # "by J. Smith"
_CONTEXT = 40  # characters looked at on either side of a full stop


class RuleSplitter:
    """Sentences of radiological prose by rules: abbreviations, decimals, times, lists, de-identification blanks."""

    name = "rules"

    def __call__(self, text: str) -> list[str]:
        """Cut a text into sentences.

        Args:
            text: any text; line breaks count as blanks.

        Returns:
            The sentences, all words of the text in their order.
        """
        text = flatten(text)
        numbers = list(_list_numbers(text))
        in_number = {number.end() - 1 for number in numbers}
        cuts = {0, len(text)} | {number.start() for number in numbers if not _in_sentence(text, number.start())}
        cuts |= {stop.end() for stop in _STOP.finditer(text) if stop.start() not in in_number and _ends(text, stop)}
        places = sorted(cuts)
        return [sentence for start, end in pairwise(places) if (sentence := text[start:end].strip())]


def _list_numbers(text: str) -> Iterator[re.Match[str]]:
    """The numbers "1." or "1)" of a list's items, on one line.

    At the start of a sentence any number is one, unless a digit follows it ("3. 5 cm" is a torn decimal). Elsewhere
    only the next of the list is; "1." must then stand before a capital or behind a comma. Items often lack their full
    stop.
    """
    last = 0
    for match in _LIST_NUMBER.finditer(text):
        value, following = int(match["value"]), match["next"]
        before = text[max(0, match.start() - _CONTEXT) : match.start()].rstrip()
        is_next = value == last + 1
        if not before or (before[-1] in ".?!:;" and _word(before[:-1]) not in _ABBREVIATIONS | {"no"}):
            found = is_next or not following.isdigit()
        elif match["mark"] == ")":
            found = is_next and last > 0 and before.rfind("(") <= before.rfind(")")  # not of "(segments 1 and 2)"
        else:
            found = is_next and last > 0 and (following.isupper() or following == "_" or before[-1] == ",")
        if found:
            last = value
            yield match


def _in_sentence(text: str, start: int) -> bool:
    """Whether a list's number does not begin a sentence: "The lungs show: 1) edema, 2) effusion"."""
    return text[max(0, start - 2) : start].strip().endswith((",", ":"))


def _word(before: str) -> str:
    """The word that ends there, in lower case."""
    return before.split()[-1].strip("(['\"").lower() if before and not before[-1].isspace() else ""


def _ends(text: str, match: re.Match[str]) -> bool:
    """Whether the stop is the end of a sentence; what stands on either side decides."""
    stop = match["stop"]
    before = text[max(0, match.start() - _CONTEXT) : match.start()]
    after = text[match.end() : match.end() + _CONTEXT]
    following = after.lstrip(" \"'([")[:1]
    word = _word(before)
    if not after.strip():
        return True
    if word in _ABBREVIATIONS:
        return False
    if not after[0].isspace():  # "effusion.No pneumothorax", but not "Ph.D" or "3.5"
        plain = len(word) > 2 or word in _UNITS or any(char.isdigit() for char in word)
        return len(stop) == 1 and after[0].isupper() and plain and "." not in word
    if not word:  # "opacity ? pneumonia"
        return False
    if stop[-1] in "?!":
        return following.isupper() or following.isdigit() or following == "_"
    if stop != "." or "." in word or word == "no" or word in _TIMES:  # "a.m. by Dr. ___", "No. 3", "wait ... there"
        return following.isupper()
    if len(word) == 1 and word.isalpha():
        words = before.split()
        previous = words[-2].strip(".,").lower() if len(words) > 1 else ""
        is_initial = not previous or previous in _BEFORE_NAME or (len(previous) == 1 and words[-2].endswith("."))
        return not is_initial and (following.isupper() or following == "_")  # "hepatitis C. There is"
    if following.islower():
        return word.isalpha() and len(word) > 3 and word not in _SHORTENED
    return not (word.isdigit() and following.isdigit())


# ---------------------------------------------------------------------------------------------------------------------
# sentences by spaCy


class SpacySplitter:
    """Sentences by spaCy's small English model, as the source makes them.

    Raises:
        UserError: if spaCy or its model is not installed.
    """

    name = "spacy"

    def __init__(self) -> None:
        try:
            import spacy
        except ImportError as error:
            raise UserError("spaCy is not installed; pip install spacy, or use --splitter rules") from error
        try:
            self._pipeline = spacy.load(SPACY_MODEL, exclude=["tagger", "attribute_ruler", "lemmatizer", "ner"])
        except OSError as error:
            raise UserError(
                f"spaCy has no {SPACY_MODEL}; python -m spacy download {SPACY_MODEL}, or use --splitter rules"
            ) from error

    def __call__(self, text: str) -> list[str]:
        """Cut a text into sentences; see :class:`RuleSplitter`."""
        sentences = (sentence.text.strip() for sentence in self._pipeline(flatten(text)).sents)
        return [sentence for sentence in sentences if sentence]

    def __reduce__(self) -> tuple[type[SpacySplitter], tuple[()]]:
        return SpacySplitter, ()  # a worker loads the model itself


def make_splitter(name: str = "auto") -> Splitter:
    """The splitter of that name; it can be sent to another process.

    Args:
        name: ``spacy``, ``rules``, or ``auto`` for spaCy where it is installed with its model, else rules.

    Returns:
        The splitter; its ``name`` is what was chosen.

    Raises:
        UserError: if there is none of that name, or spaCy was asked for and is not installed.
    """
    if name not in ("auto", "spacy", "rules"):
        raise UserError(f"splitter must be auto, spacy or rules, got {name!r}")
    if name == "rules":
        return RuleSplitter()
    try:
        return SpacySplitter()
    except UserError:
        if name == "spacy":
            raise
        return RuleSplitter()


def strip_numbering(text: str) -> str:
    """Take the numbers of a list's items away; an item without its full stop gets one, so that it ends there.

    Args:
        text: any text; line breaks count as blanks.

    Returns:
        The text on one line.
    """
    text = flatten(text)
    parts, place = [], 0
    for number in _list_numbers(text):
        item = text[place : number.start()].strip()
        parts.append(item + ("." if item and item[-1] not in ".?!:;," else ""))
        place = number.end()
    return " ".join(part for part in (*parts, text[place:].strip()) if part)


def report_sentences(findings: str | None, impression: str | None, splitter: Splitter) -> list[str]:
    """The sentences that captions are drawn from: those of the findings, then those of the impression.

    List numbers are taken from the impression only. The source deletes every ``<digits>.`` there, of "3.5 cm" too, and
    every line break, which fuses words; neither is done here.

    Args:
        findings: of :class:`Sectioned`; None: there are none.
        impression: the same.
        splitter: of :func:`make_splitter`.

    Returns:
        The sentences of three characters or more that have a letter or a digit; [] if there are none, where the source
        has [""].
    """
    texts = (flatten(findings or ""), strip_numbering(impression or ""))
    sentences = [sentence for text in texts if text for sentence in splitter(text)]
    return [text for text in sentences if len(text) >= MIN_LENGTH and any(char.isalnum() for char in text)]


# ---------------------------------------------------------------------------------------------------------------------
# sentences from labels

# CheXpert's columns but No Finding, and Pleural Other, which says nothing that can be seen: how the finding is called
# in a sentence, with its article, and in a report behind mild, moderate or severe (None: it has no degrees)
LABELS: dict[str, tuple[str, str, str | None]] = {
    "Atelectasis": ("an", "atelectasis", "atelectasis|atelectases|atelectatic changes?"),
    "Cardiomegaly": ("a", "cardiomegaly", "cardiomegaly"),
    "Consolidation": ("a", "consolidation", "consolidations?"),
    "Edema": ("an", "edema", "o?edema"),
    "Enlarged Cardiomediastinum": ("an", "enlarged cardiomediastinum", "enlarged cardiomediastinum"),
    "Fracture": ("a", "fracture", "fractures?"),
    "Lung Lesion": ("a", "lung lesion", "lesions?"),
    "Lung Opacity": ("a", "lung opacity", "opacity|opacities|opacification"),
    "Pleural Effusion": ("a", "pleural effusion", "effusions?"),
    "Pneumonia": ("a", "pneumonia", "pneumonia"),
    "Pneumothorax": ("a", "pneumothorax", "pneumothorax|pneumothoraces"),
    "Support Devices": ("", "support devices", None),
}
DEGREES = ("mild", "moderate", "severe")
# words that may stand between the degree and the finding; any other may be a finding of its own
_PLACES = (
    "(?:(?:right|left|bilateral|bibasilar|basilar|basal|biapical|apical|upper|lower|middle|mid|lobe|lobar|lung|pulmonary|"
    "interstitial|alveolar|pleural|retrocardiac|perihilar|diffuse|patchy|focal|linear|sided|sized)[ ,-]+){0,4}"
)


# ends a clause: what is denied before does not concern what follows
_CONTRAST = re.compile(r";|\b(?:but|however|although|though|now)\b")
# denies what follows it in its clause; "no interval change in" and "not significantly changed" deny nothing
_DENIAL = re.compile(
    r"\b(?:(?:no|not|without)(?!(?: [a-z]+){0,2} chang(?:e|es|ed)\b)|nor|neither|never|cannot|den(?:ies|ied)|"
    r"negative for|(?:free|clear|clearing|absence|instead) of|rather than|rules? out|ruled out|"
    r"exclud(?:e|es|ed|ing))\b"
)
# what the whole clause speaks of is over
_RESOLVED = re.compile(r"\b(?:resol(?:ved|ution)|cleared|no longer|previously|formerly)\b")


def _affirmed(report: str) -> Iterator[str]:
    """The parts of a report that say what is there, in lower case: each clause until it denies something."""
    for sentence in RuleSplitter()(report):
        for clause in _CONTRAST.split(sentence.lower()):
            if not _RESOLVED.search(clause):
                yield _DENIAL.split(clause, maxsplit=1)[0]


def label_sentences(labels: Mapping[str, Any], report: str = "") -> list[str]:
    """Template sentences for the findings that a CheXpert table marks as present.

    Args:
        labels: value per column of ``mimic-cxr-2.0.0-chexpert.csv``: 1.0 present, 0.0 absent, -1.0 uncertain, empty
            not mentioned. Other columns are left alone.
        report: findings and impression; a degree that stands before a finding there, in whatever case, adds sentences
            with it, unless its clause denies or resolves it.

    Returns:
        Two lower-case sentences per finding that is 1.0 and per its degrees, in the order of :data:`LABELS`.
    """
    said = list(_affirmed(report))
    sentences = []
    for label, (article, finding, pattern) in LABELS.items():
        if not _is_present(labels.get(label)):
            continue
        sentences += _both_forms(finding, article)
        for degree in DEGREES if pattern else ():
            present = re.compile(rf"\b{degree}(?:ly)?[ -]+{_PLACES}(?:{pattern})\b")
            if any(present.search(clause) for clause in said):
                sentences += _both_forms(f"{degree} {finding}", "a")
    return sentences


def _is_present(value: Any) -> bool:
    try:
        return float(value) == 1.0
    except (TypeError, ValueError):  # None, or the empty cell of a CSV table
        return False


def _both_forms(finding: str, article: str) -> list[str]:
    existential = f"there is {article} {finding}." if article else f"there are {finding}."
    return [f"the patient has {finding}.", existential]
