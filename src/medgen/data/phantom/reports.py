"""Report texts of phantom radiographs, in all the forms that the reports of MIMIC-CXR have, with CheXpert's labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["CHEXPERT", "FORMS", "PhantomReport", "write_report"]

# fmt: off
CHEXPERT = (  # columns of mimic-cxr-2.0.0-chexpert.csv, in its order
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)
# fmt: on
POSITIVE, NEGATIVE, UNCERTAIN = 1.0, 0.0, -1.0  # CheXpert's values; a finding that is not mentioned is left blank
DENIED = 0.8  # how often an absent finding is said to be absent
LINE = 78  # characters
CENTRED = " " * 33

_Labels = dict[str, float]


@dataclass(frozen=True)
class _Statement:
    """How a finding is written; ``{side}`` is left, right or nothing.

    Args:
        findings: ways to put it in the section FINDINGS.
        impression: ways to put it in the section IMPRESSION.
        labels: what a reader of FINDINGS knows of CheXpert's columns.
        more: what a reader of IMPRESSION knows besides.
    """

    findings: tuple[str, ...]
    impression: tuple[str, ...]
    labels: _Labels
    more: _Labels = field(default_factory=dict)


PRESENT = {
    "Cardiomegaly": _Statement(
        ("The cardiac silhouette is enlarged.", "The heart is enlarged, wider than half of the chest."),
        ("Cardiomegaly.", "Enlarged heart."),
        {"Cardiomegaly": POSITIVE},
    ),
    "Nodule": _Statement(
        ("A small round nodule projects over the {side} lung.", "There is a well-defined nodule in the {side} lung."),
        ("{side} pulmonary nodule.", "Nodule in the {side} lung."),
        {"Lung Lesion": POSITIVE},
    ),
    "Mass": _Statement(
        ("A large rounded mass lies in the {side} lung.", "There is a lobulated mass in the {side} lung."),
        ("{side} lung mass.", "Mass in the {side} lung; CT is recommended."),
        {"Lung Lesion": POSITIVE},
    ),
    "Consolidation": _Statement(
        ("There is a consolidation in the {side} lung.", "A consolidation with blurred margins is in the {side} lung."),
        ("{side} consolidation, which may represent pneumonia.", "{side} consolidation; possible pneumonia."),
        {"Consolidation": POSITIVE},
        {"Pneumonia": UNCERTAIN},
    ),
    "Effusion": _Statement(
        ("A {side} pleural effusion blunts the costophrenic angle.", "There is a {side} pleural effusion."),
        ("{side} pleural effusion.", "Pleural effusion on the {side} side."),
        {"Pleural Effusion": POSITIVE},
    ),
    "Pneumothorax": _Statement(
        ("A {side} apical pneumothorax is present.", "The pleural line of a {side} pneumothorax is seen."),
        ("{side} pneumothorax.", "Pneumothorax on the {side} side."),
        {"Pneumothorax": POSITIVE},
    ),
    "Support Devices": _Statement(
        ("A support device projects over the chest.", "A support device is in place."),
        ("Support device in place.", "Support device over the chest."),
        {"Support Devices": POSITIVE},
    ),
}
ABSENT = {
    "Cardiomegaly": ("The heart is of normal size.", "The cardiac silhouette is not enlarged."),
    "Consolidation": ("There is no focal consolidation.", "No consolidation is seen."),
    "Effusion": ("There is no pleural effusion.", "No pleural effusion is seen."),
    "Pneumothorax": ("There is no pneumothorax.", "No pneumothorax is seen."),
}
NORMAL = ("No acute cardiopulmonary process.", "Normal chest radiograph.")
COMPLAINTS = ("cough", "fever", "shortness of breath", "chest pain", "weakness")

# What stands in the file, paragraph by paragraph: "#" centres a line, "{numbered}" is the impression as a list. Each is
# a form that the header grammar of MIMIC-CXR's reports must know; the first is what most reports look like.
FORMS: dict[str, str] = {
    "standard": """
#FINAL REPORT
EXAMINATION:  {examination}

INDICATION:  ___{sex} with {complaint}  // evaluate for acute process

TECHNIQUE:  {technique}

COMPARISON:  {comparison}

FINDINGS:

{findings}

IMPRESSION:

{impression}
""",
    "numbered": """
#FINAL REPORT
HISTORY:  {complaint}.

FINDINGS:  {findings}

IMPRESSION:
{numbered}
""",
    "two headers on a line": """
#FINAL REPORT
INDICATION:  ___{sex} with {complaint}.  TECHNIQUE:  {technique}.

COMPARISON:  {comparison}  FINDINGS:  {findings}

IMPRESSION:  {impression}
""",
    "no header": """
#FINAL REPORT
{examination} of ___

{findings} {impression}
""",
    "addendum": """
#FINAL REPORT
EXAMINATION:  {examination}

FINDINGS:  {findings}

IMPRESSION:  {impression}
#FINAL ADDENDUM
ADDENDUM:  The wrong date was dictated; the radiograph is of ___.
""",
    "lower-case headers": """
#FINAL REPORT
Indication: ___{sex} with {complaint}

Findings: {findings}

Impression: {impression}
""",
    "findings and impression": """
#FINAL REPORT
INDICATION:  {complaint}.

COMPARISON:  {comparison}

FINDINGS AND IMPRESSION:  {findings} {impression}
""",
    "empty impression": """
#FINAL REPORT
INDICATION:  {complaint}.

FINDINGS:  {findings}

IMPRESSION:
""",
    "blanks": """
#FINAL REPORT
INDICATION:  ___ year old {person} with ___ and {complaint}

COMPARISON:  ___ at ___:___.

FINDINGS:  {findings}

IMPRESSION:  {impression} Dr. ___ was told of this at ___ on ___.

RECOMMENDATION(S):  None.
""",
    "misspelt headers": """
#FINAL REPORT
REASON FOR EXAMINATION:  {complaint}.

COMPARISION:  {comparison}

FINDNGS:  {findings}

IMPRESSON:  {impression}
""",
    "portable header": """
#FINAL REPORT
REASON FOR EXAM:  {complaint}.

PORTABLE CHEST, ONE VIEW:  {findings}

CONCLUSION:  {impression}
""",
    "wet read": """
WET READ: ___ ___ ___ 9:12 PM
 Preliminary reading, awaiting review.
______________________________________________________________________________
#FINAL REPORT
CLINICAL HISTORY:  {complaint}.

FINDINGS:  {findings}

IMPRESSION:  {impression}
""",
    "two impressions": """
#FINAL REPORT
FINDINGS:  {findings}

IMPRESSION:  Pending review.

NOTIFICATION:  None.

IMPRESSION:  {impression}
""",
    "findings alone": """
#FINAL REPORT
CHEST, TWO VIEWS:  {findings}
""",
    "impression alone": """
#FINAL REPORT
HISTORY:  {complaint}.

IMPRESSION:  {impression}
""",
    "Windows line ends": """
#FINAL REPORT
FINDINGS:  {findings}

IMPRESSION:  {impression}
""",
    "not UTF-8": """
#FINAL REPORT
FINDINGS:  {findings} The patient is rotated by 5° ± 2°.

IMPRESSION:  {impression}
""",
    "empty": "",
    "missing": "",
}


@dataclass(frozen=True)
class PhantomReport:
    """A report and what is true of it.

    Args:
        form: one of :data:`FORMS`.
        data: the file's bytes; None where there shall be no file.
        findings: what the text says in detail, without line breaks; empty where the form leaves it out.
        impression: what it says in short, likewise.
        labels: 1.0, 0.0 or -1.0 for the columns of :data:`CHEXPERT` that the text mentions; None where there is no text
            that a labeller could have read.
    """

    form: str
    data: bytes | None
    findings: str
    impression: str
    labels: dict[str, float] | None


def write_report(
    form: str, findings: Sequence[tuple[str, str]], view: str, sex: str, follow_up: bool, rng: np.random.Generator
) -> PhantomReport:
    """Report what a phantom shows.

    Args:
        form: one of :data:`FORMS`.
        findings: label of :data:`medgen.data.phantom.FINDINGS` and the patient's side, ``left``, ``right`` or "".
        view: PA or AP.
        sex: F or M.
        follow_up: whether there is an earlier radiograph.
        rng: of the wording.

    Returns:
        The report.
    """
    template = FORMS[form].strip("\n")
    detailed, short, labels, more = _state(findings, rng)
    complaint = str(rng.choice(COMPLAINTS))
    if not template:
        return PhantomReport(form, None if form == "missing" else b"", "", "", None)
    detailed_text, short_text = " ".join(detailed), " ".join(short)
    erect = view == "PA"
    text = _page(
        template,
        examination="CHEST (PA AND LAT)" if erect else "CHEST (PORTABLE AP)",
        technique="PA view, erect" if erect else "Portable AP view",
        comparison="Radiograph of ___." if follow_up else "None.",
        complaint=complaint.capitalize() if ":  {complaint}" in template else complaint,
        sex=sex,
        person="woman" if sex == "F" else "man",
        findings=detailed_text,
        impression=short_text,
        numbered="\n".join(f"{number}. {sentence}" for number, sentence in enumerate(short, 1)),
    )
    told = labels if "{findings}" in template else {}
    if "{impression}" in template or "{numbered}" in template:
        told = {**told, **more}
    if not any(value != NEGATIVE for label, value in told.items() if label != "Support Devices"):
        told = {**told, "No Finding": POSITIVE}
    if form == "Windows line ends":
        text = text.replace("\n", "\r\n")
    return PhantomReport(
        form,
        text.encode("latin-1" if form == "not UTF-8" else "utf-8"),
        _said(template, "{findings}", detailed_text),
        _said(template, "{impression}", short_text) or _said(template, "{numbered}", short_text),
        told,
    )


def _said(template: str, field_name: str, text: str) -> str:
    return text if field_name in template else ""


def _state(
    findings: Sequence[tuple[str, str]], rng: np.random.Generator
) -> tuple[list[str], list[str], _Labels, _Labels]:
    """Sentences for the sections FINDINGS and IMPRESSION, and the labels that a reader of each knows."""
    detailed, short = [], []
    labels: _Labels = {}
    more: _Labels = {}
    for label, side in findings:
        statement = PRESENT[label]
        detailed.append(_sentence(str(rng.choice(statement.findings)), side))
        short.append(_sentence(str(rng.choice(statement.impression)), side))
        labels |= statement.labels
        more |= statement.labels | statement.more
    shown = {label for label, _ in findings}
    for label, ways in ABSENT.items():
        if label not in shown and rng.random() < DENIED:
            detailed.append(str(rng.choice(ways)))
            labels |= dict.fromkeys(PRESENT[label].labels, NEGATIVE)
    if not shown - {"Support Devices"}:
        short.append(str(rng.choice(NORMAL)))
    return detailed or ["The lungs are clear."], short, labels, more


def _sentence(text: str, side: str) -> str:
    text = " ".join(text.format(side=side).replace("on the  side", "").split()).replace(" .", ".")
    return text[0].upper() + text[1:]


def _page(template: str, **fields: str) -> str:
    """Lines as MIMIC-CXR's reports have them: a space before each, a line with a space alone between paragraphs."""
    lines = []
    for line in template.split("\n"):
        if line.startswith("#"):
            lines.append(CENTRED + line[1:])
            continue
        # not only where sentences end: most line breaks of the real reports stand within one
        for part in line.format(**fields).split("\n"):
            lines += [f" {wrapped}" for wrapped in textwrap.wrap(part, LINE, drop_whitespace=True)] or [" "]
    return "\n".join(lines) + "\n"
