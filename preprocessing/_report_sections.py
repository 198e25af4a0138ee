"""Sections of a MIMIC-CXR report: where they begin, what they are called, and which of them becomes the caption.

The grammar is that of MIT-LCP's mimic-cxr/txt scripts (Johnson et al. 2019, Scientific Data 6:317) as
Warvito/generative_chestxray runs them. Where this one differs, it is because something was lost or misnamed there:

===================================== ====================================== ===========================================
in the report                         there                                  here
===================================== ====================================== ===========================================
``NDICATION:``                        impression                             indication
line breaks in a section              deleted, which fuses two words         one blank
two headers on a line                 the second is text                     a header, if known and in capitals
``FINDINGS:``, next line a header     the second is text                     both are headers
header in the first line, or          text                                   a header
indented by other than one blank
``Findings:`` at the start of a line  text                                   a header, if its name is known
``IMPRESSION:No``, blank missing      text                                   a header, if its name is known
line ``FINAL REPORT``, rule above it  text of the section before             of no section; ends the one before
line ``FINAL ADDENDUM``, ``ADDENDUM`` text of the section before             begins a section addendum
``ADDENDUM TO IMPRESSION:``           impression                             addendum: it overrides nothing
last_paragraph                        of the last section, cut at the first  of the last but addenda, cut at the first
                                      "\\n \\n"                              blank line of any kind
comparison without text               an empty caption                       the one before it, or none
study with an override                an empty caption                       what the override says
===================================== ====================================== ===========================================

Everything else is kept, the odd too: unknown names in capitals are sections (``LUNGS:`` takes its text away from
findings), ``PFI`` is history, and a report of one paragraph without a header has no caption. De-identification blanks
(``___``) stay as they are.

MIT-LCP's overrides, 23 studies by section and 31 by range, are in their repository (mimic-cxr/txt/section_parser.py);
:func:`read_overrides` reads such tables from a file.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from medgen.errors import UserError

__all__ = [
    "Override",
    "Section",
    "Sectioned",
    "canonical_name",
    "flatten",
    "read_overrides",
    "read_report",
    "section_report",
    "split_sections",
]

# fmt: off
ALIASES: dict[str, tuple[str, ...]] = {
    "impression": (
        "conclusion", "findings and impression", "findings/impression", "impresson", "imprression", "imoression",
        "impressoin", "imprssion", "impresion", "imperssion", "mpression", "impession",
    ),
    "findings": (
        "finding", "chest, two views", "reference findings", "findins", "findindgs", "findgings", "findngs",
        "findnings", "finidngs",
    ),
    "comparison": (
        "comparisons", "comparison exam", "comparison film", "reference exam", "comparision", "comparisions",
        "comparsion", "comparrison",
    ),
    "indication": ("reason for exam", "reason for examination", "clinical indication", "idication", "ndication"),
    "history": ("clinical history", "clinical information", "patient history", "pfi"),
    "examination": ("exam", "type of examination"),
    "recommendations": ("recommendation", "recommendation(s)"),
    "wet read": ("wetread",),
    "technique": (), "notification": (), "addendum": (), "date": (), "comment": (),
}
CONTAINED = ("addendum", "impression", "findings", "history", "comparison")  # the first that a name contains is it
VIEWS = (  # names of an examination: what follows is what was seen
    "chest", "portable", "pa and lateral", "lateral and pa", "ap and lateral", "lateral and ap", "frontal and",
    "two views", "frontal view", "pa view", "ap view", "one view", "lateral view", "bone window", "frontal upright",
    "frontal semi-upright", "ribs", "pa and lat",
)
# fmt: on
PREAMBLE, WHOLE = "preamble", "full report"  # text before the first header; text without any

_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases)}
_BLANK_LINE = re.compile(r"\n[ \t\r]*+\n")


def _names_pattern() -> str:
    names = sorted((name.upper() for name in _CANONICAL), key=len, reverse=True)  # the longest first
    return "|".join(re.escape(name).replace(r"\ ", "[ ]{1,4}").replace("/", "[ ]{0,2}/[ ]{0,2}") for name in names)


# Every quantifier is bounded or possessive and no loop stands within another, so that the work grows with the length
# of the report whatever stands in it.
_HEADER = re.compile(
    rf"""
      ^ (?: [ \t]*+ _{{5,}}+ [ \t\r]*+ \n \s*+ )?+
        [ \t]*+ (?P<title> (?:FINAL|PRELIMINARY)[ ]REPORT | (?:FINAL[ ])?ADDENDUM ) [ \t\r]*+ $
    | ^ [\t ()/,-]*+ (?P<capitals> [A-Z][A-Z ()/,-]*+ ) : (?=\s|\Z)
    | ^ [ \t]*+ (?P<line> (?i:{_names_pattern()}) ) [ \t]*+ :
    | (?<![^\s.;:,]) (?P<inline> {_names_pattern()} ) [ \t]*+ :
    """,
    re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        name: canonical name, or the report's own in lower case; :data:`PREAMBLE` and :data:`WHOLE` have no header.
        text: what stands below the header, line breaks and all, without blanks around it.
        start: where ``text`` begins: ``report[start : start + len(text)] == text``.
    """

    name: str
    text: str
    start: int


@dataclass(frozen=True)
class Sectioned:
    """The sections of a report and those that can describe the image, each on one line; None: not there, or empty.

    Attributes:
        impression: the last section of that name that has text; with an override, what it names.
        findings: the same; None with an override.
        last_paragraph: without these two, what follows the first blank line of the last section.
        comparison: the last that has text; None with an override.
        sections: all, in the order of the report.
        overridden: whether an override was applied. Without a caption then, it is meant to have none.
    """

    impression: str | None
    findings: str | None
    last_paragraph: str | None
    comparison: str | None
    sections: tuple[Section, ...]
    overridden: bool = False

    @property
    def caption(self) -> str | None:
        """The first of impression, findings, last_paragraph and comparison that there is."""
        return self.impression or self.findings or self.last_paragraph or self.comparison


Override = str | tuple[int, int]
"""Name of the section to take, or the first character and the one after the last; an empty range takes nothing."""


def flatten(text: str) -> str:
    """The text on one line: line breaks and runs of blanks become one blank."""
    return " ".join(text.split())


def canonical_name(header: str) -> str:
    """Name of a section by its header, colon left out.

    Args:
        header: as it stands in the report.

    Returns:
        A name of the table, ``findings`` for the name of a chest examination, else the header in lower case.
    """
    name = re.sub(r" ?/ ?", "/", flatten(header.lower())).strip(" ,/-")
    if name in _CANONICAL:
        return _CANONICAL[name]
    contained = next((part for part in CONTAINED if part in name), None)
    if contained is None and any(view in name for view in VIEWS):
        return "findings"
    return contained or name


def split_sections(text: str) -> list[Section]:
    """Cut a report at its headers.

    Args:
        text: the report.

    Returns:
        The sections in the order of the report; outside of headers and of the lines ``FINAL REPORT``, every character
        but blanks lands in exactly one. Sections without text are among them.
    """
    marks = []
    for header in _HEADER.finditer(text):
        title = header["title"]
        name = canonical_name(title or header["capitals"] or header["line"] or header["inline"])
        marks.append((header.start(), header.end(), None if title and name != "addendum" else name, bool(title)))
    # a line FINAL REPORT has no name of its own: below it stands what would stand above the first header
    nameless = WHOLE if all(name is None for _, _, name, _ in marks) else PREAMBLE
    sections = []
    spans = [(0, 0, PREAMBLE if marks else WHOLE, True), *marks, (len(text), len(text), None, True)]
    for (_, start, name, may_lack), (end, *_) in pairwise(spans):
        body = text[start:end]
        stripped = body.strip()
        if stripped or not may_lack:
            sections.append(Section(name or nameless, stripped, start + len(body) - len(body.lstrip())))
    return sections


def section_report(text: str, study: str = "", overrides: Mapping[str, Override] | None = None) -> Sectioned:
    """Find the parts of a report that can describe the image.

    Args:
        text: the report.
        study: its id, ``s50414267`` or ``50414267``; needed for overrides only.
        overrides: of :func:`read_overrides`. The text that one names becomes the impression, and the only text: the
            sentences and the caption of the study are then made of nothing else.

    Returns:
        The sections.

    Raises:
        UserError: if the study's override names a section or characters that the report does not have.
    """
    sections = split_sections(text)
    override = (overrides or {}).get(_study_id(study))
    if override is not None:
        taken = flatten(_overridden(text, study, override, sections))
        return Sectioned(taken or None, None, None, None, tuple(sections), overridden=True)
    last = {section.name: flatten(section.text) for section in sections if section.text}
    impression, findings = last.get("impression"), last.get("findings")
    paragraph = None if impression or findings else _last_paragraph(text, sections)
    return Sectioned(impression, findings, paragraph, last.get("comparison"), tuple(sections))


def _last_paragraph(text: str, sections: list[Section]) -> str | None:
    section = next((section for section in reversed(sections) if section.name != "addendum"), None)
    if section is None:
        return None
    body = section.text
    if section.name in (PREAMBLE, WHOLE):  # the line FINAL REPORT counts as its first paragraph
        body = text[len(text[: section.start].rstrip()) : section.start] + body
    parts = _BLANK_LINE.split(body, maxsplit=1)
    return (flatten(parts[1]) if len(parts) > 1 else "") or None


def _overridden(text: str, study: str, override: Override, sections: list[Section]) -> str:
    if isinstance(override, str):
        name = canonical_name(override)
        texts = [section.text for section in sections if section.name == name]
        if not texts:
            names = ", ".join(dict.fromkeys(section.name for section in sections)) or "none"
            raise UserError(f"the override of {study} names the section {name}, its report has {names}; correct it")
        return texts[-1]
    start, end = override
    if end > len(text):
        raise UserError(f"the override of {study} ends at character {end}, its report has {len(text)}; correct it")
    return text[start:end]


def read_report(source: Path | bytes) -> tuple[str, str]:
    """Read a report, whatever its encoding and line ends.

    Args:
        source: the file, or what is in it.

    Returns:
        The text with ``\\n`` as line end, and the problem: "" if there is none. A report in a wrong encoding has both;
        one that is missing, empty or no text has a problem and the text "".
    """
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        return "", f"cannot be read ({error.strerror or error})"
    problem = ""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "cp1252"
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            text = data.decode(encoding := "latin-1")
        problem = f"not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}), read as {encoding}"
    control = re.search(r"[^\t\n\v\f\r -~\x80-\U0010ffff]", text)
    if control:
        return "", f"not a text (byte 0x{ord(control[0]):02x} at {control.start()})"
    if not text.strip():
        return "", "empty"
    return text.replace("\r\n", "\n").replace("\r", "\n"), problem


def read_overrides(path: Path) -> dict[str, Override]:
    """Read which text to take for single studies.

    Either a JSON object, study to section name or ``[start, end]``::

        {"s10000001": "recommendations", "s10000002": [120, 480], "s10000003": [0, 0]}

    or a CSV table with the columns study, section, start, end, where a row has a section or a range. Characters are
    counted from 0, line ends as one; ``end`` is the one after the last. ``[0, 0]`` means that the study is to have no
    caption.

    Args:
        path: the file, ``.json`` or ``.csv``.

    Returns:
        The override per study, ids with the leading ``s``.

    Raises:
        UserError: if the file cannot be read, or a study is there twice or has anything else.
    """
    path = Path(path)
    try:
        content = path.read_text("utf-8-sig")
        if path.suffix.lower() == ".json":
            rows = json.loads(content, object_pairs_hook=list)
            if not isinstance(rows, list) or not all(isinstance(row, tuple) for row in rows):
                raise UserError(f"{path} must hold a JSON object of studies, got {content[:40].strip()!r}")
        else:
            table = csv.DictReader(io.StringIO(content, newline=""))
            missing = {"study", "section", "start", "end"} - set(table.fieldnames or ())
            if missing:
                raise UserError(f"{path} must have the columns study, section, start, end, lacks {sorted(missing)}")
            rows = [(row["study"] or "", row["section"] or [row["start"], row["end"]]) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table of overrides ({error}); see read_overrides") from error
    overrides: dict[str, Override] = {}
    for study, value in rows:
        name = _study_id(study)
        if not re.fullmatch(r"s[0-9]+", name) or name in overrides:
            raise UserError(f"{path} must hold studies like s50414267, each once, got {study!r}; correct it")
        overrides[name] = _override(path, study, value)
    return overrides


def _override(path: Path, study: str, value: object) -> Override:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(re.fullmatch(r"[0-9]{1,9}", str(number)) for number in value)
    ):
        start, end = (int(number) for number in value)
        if start <= end:
            return start, end
    raise UserError(f"{path}: {study} must have a section's name or [start, end], 0 <= start <= end, got {value!r}")


def _study_id(study: str) -> str:
    return f"s{study.strip().removeprefix('s')}"
