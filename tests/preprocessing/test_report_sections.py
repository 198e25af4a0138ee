"""Reports in all the forms that radiologists give them: nothing is lost, and the caption is the right one."""

from __future__ import annotations

import json
import random

import pytest

from medgen.errors import UserError
from preprocessing._report_sections import (
    ALIASES,
    CONTAINED,
    VIEWS,
    Section,
    canonical_name,
    flatten,
    read_overrides,
    read_report,
    section_report,
    split_sections,
)

RULE = "_" * 78

# id, report, its sections, its caption
FORMS = [
    # --- the usual
    (
        "usual",
        " FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___ year old with cough  // fever?\n \n"
        " TECHNIQUE:  Chest PA and lateral\n \n COMPARISON:  ___.\n \n FINDINGS: \n \n Lungs are clear.  Heart is\n"
        " normal.\n \n IMPRESSION: \n \n No pneumonia.\n",
        [
            ("examination", "CHEST (PA AND LAT)"),
            ("indication", "___ year old with cough  // fever?"),
            ("technique", "Chest PA and lateral"),
            ("comparison", "___."),
            ("findings", "Lungs are clear.  Heart is\n normal."),
            ("impression", "No pneumonia."),
        ],
        "No pneumonia.",
    ),
    ("impression_only", "\n IMPRESSION:  No edema.\n", [("impression", "No edema.")], "No edema."),
    ("findings_only", "\n FINDINGS:  No edema.\n", [("findings", "No edema.")], "No edema."),
    (
        "findings_after_impression",
        " IMPRESSION:  Edema.\n FINDINGS:  Hazy lungs.\n",
        [("impression", "Edema."), ("findings", "Hazy lungs.")],
        "Edema.",
    ),
    (
        "line_breaks_become_blanks",
        " IMPRESSION:  Small left\n pleural\n\n\n   effusion.\n",
        [("impression", "Small left\n pleural\n\n\n   effusion.")],
        "Small left pleural effusion.",
    ),
    ("tabs", "\tIMPRESSION:\tEdema\tand effusion.\n", [("impression", "Edema\tand effusion.")], "Edema and effusion."),
    (
        "crlf",
        " FINDINGS:\r\n Clear\r\n lungs.\r\n\r\n IMPRESSION:\r\n Normal\r\n chest.\r\n",
        [("findings", "Clear\r\n lungs."), ("impression", "Normal\r\n chest.")],
        "Normal chest.",
    ),
    ("no_end_of_line", " IMPRESSION: Normal.", [("impression", "Normal.")], "Normal."),
    ("header_in_the_first_line", "IMPRESSION: Normal.\n", [("impression", "Normal.")], "Normal."),
    ("deep_indentation", "          IMPRESSION:   Normal.\n", [("impression", "Normal.")], "Normal."),
    ("blank_before_the_colon", " IMPRESSION :  Normal.\n", [("impression", "Normal.")], "Normal."),
    ("no_blank_after_the_colon", " IMPRESSION:Normal.\n", [("impression", "Normal.")], "Normal."),
    ("two_blanks_in_a_name", " FINDINGS  AND  IMPRESSION: Normal.\n", [("impression", "Normal.")], "Normal."),
    # --- names
    ("findings_and_impression", " FINDINGS AND IMPRESSION: Normal.\n", [("impression", "Normal.")], "Normal."),
    ("findings_slash_impression", " FINDINGS/IMPRESSION:  Normal.\n", [("impression", "Normal.")], "Normal."),
    ("findings_slash_blank", " FINDINGS/ IMPRESSION:  Normal.\n", [("impression", "Normal.")], "Normal."),
    ("findings_blank_slash_blank", " FINDINGS / IMPRESSION:  Normal.\n", [("impression", "Normal.")], "Normal."),
    (
        "conclusion",
        " FINDINGS: Hazy.\n CONCLUSION: Edema.\n",
        [("findings", "Hazy."), ("impression", "Edema.")],
        "Edema.",
    ),
    ("misspelt_impression", " IMPRESSON:  Normal.\n", [("impression", "Normal.")], "Normal."),
    ("misspelt_findings", " FINDINDGS:  Normal.\n", [("findings", "Normal.")], "Normal."),
    (
        "ndication_is_indication",
        " IMPRESSION: Normal.\n NDICATION: Chest pain.\n",
        [("impression", "Normal."), ("indication", "Chest pain.")],
        "Normal.",
    ),
    (
        "reason_for_exam",
        " REASON FOR EXAM: Fall.\n WETREAD: Fracture.\n FINDING: Fractured rib.\n",
        [("indication", "Fall."), ("wet read", "Fracture."), ("findings", "Fractured rib.")],
        "Fractured rib.",
    ),
    ("contains_impression", " PRELIMINARY IMPRESSION: Edema.\n", [("impression", "Edema.")], "Edema."),
    ("contains_findings", " CHEST CT FINDINGS: Edema.\n", [("findings", "Edema.")], "Edema."),
    ("contains_history", " PAST HISTORY OF CHEST PAIN: None.\n", [("history", "None.")], None),
    ("contains_comparison", " COMPARISON STUDY: ___.\n", [("comparison", "___.")], "___."),
    (
        "impression_before_history",
        " HISTORY AND IMPRESSION: Cough, normal.\n",
        [("impression", "Cough, normal.")],
        "Cough, normal.",
    ),
    ("name_of_the_examination", " PORTABLE AP CHEST RADIOGRAPH: Hazy.\n", [("findings", "Hazy.")], "Hazy."),
    ("chest_two_views", " CHEST, TWO VIEWS:  Clear.\n", [("findings", "Clear.")], "Clear."),
    ("semi_upright", " FRONTAL SEMI-UPRIGHT PORTABLE VIEW: Clear.\n", [("findings", "Clear.")], "Clear."),
    ("ribs", " LEFT RIBS, THREE VIEWS: No fracture.\n", [("findings", "No fracture.")], "No fracture."),
    (
        "parentheses",
        " RECOMMENDATION(S): CT.\n EXAM: Portable.\n",
        [("recommendations", "CT."), ("examination", "Portable.")],
        None,
    ),
    ("bullet_before_the_name", " - FINDINGS: Clear.\n", [("findings", "Clear.")], "Clear."),
    (
        "unknown_name_in_capitals",
        " FINDINGS:\n LUNGS: Clear.\n HEART: Large.\n IMPRESSION: Cardiomegaly.\n",
        [("findings", ""), ("lungs", "Clear."), ("heart", "Large."), ("impression", "Cardiomegaly.")],
        "Cardiomegaly.",
    ),
    ("pfi", " PFI: Clear.\n TYPE OF EXAMINATION: CT.\n", [("history", "Clear."), ("examination", "CT.")], None),
    # --- lower case
    (
        "capitalised_names",
        "Indication: Cough.\nFindings: Clear.\nImpression: Normal.\n",
        [("indication", "Cough."), ("findings", "Clear."), ("impression", "Normal.")],
        "Normal.",
    ),
    (
        "lower_case_names",
        " findings: clear.\n findings and impression: normal.\n",
        [("findings", "clear."), ("impression", "normal.")],
        "normal.",
    ),
    ("mixed_case_misspelt", " Imoression:normal.\n", [("impression", "normal.")], "normal."),
    (
        "lower_case_unknown_is_text",
        " FINDINGS: Compared with the old film:\n lungs: clear.\n Heart: large.\n",
        [("findings", "Compared with the old film:\n lungs: clear.\n Heart: large.")],
        "Compared with the old film: lungs: clear. Heart: large.",
    ),
    (
        "lower_case_within_a_line_is_text",
        " INDICATION:  History: ___F with cough.  Impression: none given.\n",
        [("indication", "History: ___F with cough.  Impression: none given.")],
        None,
    ),
    (
        "lower_case_containing_a_name_is_text",
        " FINDINGS: Old.\n Other findings: clear.\n",
        [("findings", "Old.\n Other findings: clear.")],
        "Old. Other findings: clear.",
    ),
    # --- several on a line
    (
        "two_on_a_line",
        "FINDINGS: Lungs are clear. IMPRESSION: Normal chest.\n",
        [("findings", "Lungs are clear."), ("impression", "Normal chest.")],
        "Normal chest.",
    ),
    (
        "five_on_a_line",
        " EXAM: CXR DATE: ___ HISTORY: Fall. COMPARISON: None. FINDINGS: Clear.\n",
        [
            ("examination", "CXR"),
            ("date", "___"),
            ("history", "Fall."),
            ("comparison", "None."),
            ("findings", "Clear."),
        ],
        "Clear.",
    ),
    (
        "two_on_a_line_without_blanks",
        " FINDINGS:Clear.IMPRESSION:Normal.\n",
        [("findings", "Clear."), ("impression", "Normal.")],
        "Normal.",
    ),
    (
        "two_on_a_line_the_first_empty",
        " FINDINGS: IMPRESSION: Normal.\n",
        [("findings", ""), ("impression", "Normal.")],
        "Normal.",
    ),
    (
        "one_right_below_the_other",
        " FINDINGS:\n IMPRESSION:\n Normal.\n",
        [("findings", ""), ("impression", "Normal.")],
        "Normal.",
    ),
    (
        "unknown_within_a_line_is_text",
        " FINDINGS: Clear. LUNGS: Clear. (IMPRESSION: none)\n",
        [("findings", "Clear. LUNGS: Clear. (IMPRESSION: none)")],
        "Clear. LUNGS: Clear. (IMPRESSION: none)",
    ),
    (
        "report_in_capitals",
        " FINDINGS: NO EFFUSION AT 10:30. HEART IS LARGE. IMPRESSION: CARDIOMEGALY. NO\n EDEMA: SEE ABOVE.\n",
        [
            ("findings", "NO EFFUSION AT 10:30. HEART IS LARGE."),
            ("impression", "CARDIOMEGALY. NO"),
            ("edema", "SEE ABOVE."),
        ],
        "CARDIOMEGALY. NO",
    ),
    (
        "word_that_ends_like_a_name",
        " FINDINGS: UPDATE: none. REEXAM: none.\n",
        [("findings", "UPDATE: none. REEXAM: none.")],
        "UPDATE: none. REEXAM: none.",
    ),
    # --- empty ones
    (
        "empty_impression",
        " FINDINGS: Clear.\n IMPRESSION:\n",
        [("findings", "Clear."), ("impression", "")],
        "Clear.",
    ),
    (
        "empty_impression_after_a_full_one",
        " IMPRESSION: Edema.\n IMPRESSION:  \n \n",
        [("impression", "Edema."), ("impression", "")],
        "Edema.",
    ),
    (
        "empty_impression_and_findings",
        " COMPARISON: ___.\n FINDINGS:\n IMPRESSION:\n",
        [("comparison", "___."), ("findings", ""), ("impression", "")],
        "___.",
    ),
    (
        "all_empty",
        " COMPARISON:\n FINDINGS:\n IMPRESSION:",
        [("comparison", ""), ("findings", ""), ("impression", "")],
        None,
    ),
    ("empty", "", [], None),
    ("blanks", " \n\t\r\n  ", [], None),
    # --- the last one counts
    (
        "two_impressions",
        " IMPRESSION: Edema.\n FINDINGS: Hazy.\n IMPRESSION: Edema has resolved.\n",
        [("impression", "Edema."), ("findings", "Hazy."), ("impression", "Edema has resolved.")],
        "Edema has resolved.",
    ),
    (
        "impression_of_two_spellings",
        " IMPRESSION: Edema.\n CONCLUSION: No edema.\n",
        [("impression", "Edema."), ("impression", "No edema.")],
        "No edema.",
    ),
    ("two_findings", " FINDINGS: A.\n PA AND LATERAL: B.\n", [("findings", "A."), ("findings", "B.")], "B."),
    # --- no header, and what stands above the first
    ("no_header", "Portable chest.\nClear.\n", [("full report", "Portable chest.\nClear.")], None),
    (
        "no_header_two_paragraphs",
        " Portable chest, ___.\n \n Clear lungs,\n normal heart.\n",
        [("full report", "Portable chest, ___.\n \n Clear lungs,\n normal heart.")],
        "Clear lungs, normal heart.",
    ),
    (
        "no_header_three_paragraphs",
        " Portable chest.\n \n Clear lungs.\n \n Dr. ___ was told.\n",
        [("full report", "Portable chest.\n \n Clear lungs.\n \n Dr. ___ was told.")],
        "Clear lungs. Dr. ___ was told.",
    ),
    (
        "no_header_below_the_title",
        "                                 FINAL REPORT\n \n Clear lungs,\n normal heart.\n",
        [("full report", "Clear lungs,\n normal heart.")],
        "Clear lungs, normal heart.",
    ),
    (
        "no_header_right_below_the_title",
        " FINAL REPORT\n Portable chest.\n \n Clear lungs.\n",
        [("full report", "Portable chest.\n \n Clear lungs.")],
        "Clear lungs.",
    ),
    ("title_alone", " FINAL REPORT\n", [], None),
    (
        "preamble",
        " Portable chest.\n \n FINDINGS: Clear.\n",
        [("preamble", "Portable chest."), ("findings", "Clear.")],
        "Clear.",
    ),
    (
        "preamble_around_the_title",
        " Unsigned.\n FINAL REPORT\n Portable chest.\n HISTORY: None.\n",
        [("preamble", "Unsigned."), ("preamble", "Portable chest."), ("history", "None.")],
        None,
    ),
    (
        "name_without_colon_is_text",
        " FINDINGS\n Clear.\n IMPRESSION\n Normal.\n",
        [("full report", "FINDINGS\n Clear.\n IMPRESSION\n Normal.")],
        None,
    ),
    # --- last paragraph
    (
        "last_paragraph",
        " HISTORY: Cough.\n COMPARISON: ___.\n \n Clear lungs.\n Normal heart.\n",
        [("history", "Cough."), ("comparison", "___.\n \n Clear lungs.\n Normal heart.")],
        "Clear lungs. Normal heart.",
    ),
    (
        "last_paragraph_crlf_and_no_blank",
        " HISTORY: Cough.\r\n\r\nClear lungs.\r\n",
        [("history", "Cough.\r\n\r\nClear lungs.")],
        "Clear lungs.",
    ),
    (
        "no_last_paragraph_beside_findings",
        " FINDINGS: Clear.\n NOTIFICATION: Dr. ___.\n \n By phone.\n",
        [("findings", "Clear."), ("notification", "Dr. ___.\n \n By phone.")],
        "Clear.",
    ),
    (
        "last_paragraph_only_of_the_last",
        " HISTORY: Cough.\n \n Clear lungs.\n COMPARISON: None.\n",
        [("history", "Cough.\n \n Clear lungs."), ("comparison", "None.")],
        "None.",
    ),
    (
        "blank_line_below_the_header",
        " COMPARISON:  \n \n None.\n",
        [("comparison", "None.")],
        "None.",
    ),
    # --- addenda and wet reads
    (
        "addendum_below",
        " IMPRESSION: Edema.\n \n ADDENDUM: No fracture either.\n",
        [("impression", "Edema."), ("addendum", "No fracture either.")],
        "Edema.",
    ),
    (
        "addendum_above",
        f" ADDENDUM  \n The tube was moved.\n{RULE}\n          FINAL REPORT\n FINDINGS: Tube in place.\n",
        [("addendum", "The tube was moved."), ("findings", "Tube in place.")],
        "Tube in place.",
    ),
    (
        "final_addendum",
        f" IMPRESSION: Edema.\n {RULE}\n \n           FINAL ADDENDUM\n ADDENDUM:  Dr. ___ was told.\n",
        [("impression", "Edema."), ("addendum", "Dr. ___ was told.")],
        "Edema.",
    ),
    (
        "addendum_that_names_the_impression",
        " IMPRESSION: Edema.\n ADDENDUM TO IMPRESSION: Typing error.\n",
        [("impression", "Edema."), ("addendum", "Typing error.")],
        "Edema.",
    ),
    (
        "two_addenda",
        " FINDINGS: Edema.\n ADDENDUM: One.\n SECOND ADDENDUM: Two.\n",
        [("findings", "Edema."), ("addendum", "One."), ("addendum", "Two.")],
        "Edema.",
    ),
    (
        "addendum_is_no_last_paragraph",
        " Portable.\n \n Clear lungs.\n FINAL ADDENDUM\n Signed.\n \n Twice.\n",
        [("preamble", "Portable.\n \n Clear lungs."), ("addendum", "Signed.\n \n Twice.")],
        "Clear lungs.",
    ),
    ("addendum_alone", " ADDENDUM: Signed.\n \n Twice.\n", [("addendum", "Signed.\n \n Twice.")], None),
    (
        "wet_read",
        f" WET READ: ___ ___ ___ 11:15 PM\n  No edema. \n {RULE}\n        FINAL REPORT\n Portable.\n \n Mild edema.\n",
        [("wet read", "___ ___ ___ 11:15 PM\n  No edema."), ("preamble", "Portable.\n \n Mild edema.")],
        "Mild edema.",
    ),
    # --- what must survive
    (
        "deidentification_blanks",
        " IMPRESSION: ___ catheter ends ___ cm above the ___. Dr. ___ was told at ___.\n",
        [("impression", "___ catheter ends ___ cm above the ___. Dr. ___ was told at ___.")],
        "___ catheter ends ___ cm above the ___. Dr. ___ was told at ___.",
    ),
    ("blank_is_the_text", " IMPRESSION: ___\n", [("impression", "___")], "___"),
    ("rule_in_the_text", f" IMPRESSION: A.\n {RULE}\n B.\n", [("impression", f"A.\n {RULE}\n B.")], f"A. {RULE} B."),
    (
        "time_is_no_header",
        " FINDINGS: Told at\n 10: 30 AM.\n",
        [("findings", "Told at\n 10: 30 AM.")],
        "Told at 10: 30 AM.",
    ),
    (
        "blank_is_no_header",
        " FINDINGS: Told\n DR. ___: yes.\n",
        [("findings", "Told\n DR. ___: yes.")],
        "Told DR. ___: yes.",
    ),
    ("dashes_are_no_header", " FINDINGS: A\n ---: B.\n", [("findings", "A\n ---: B.")], "A ---: B."),
    (
        "umlauts",
        " IMPRESSION: Röntgen-Gerät, 37 °C.\n",
        [("impression", "Röntgen-Gerät, 37 °C.")],
        "Röntgen-Gerät, 37 °C.",
    ),
]


@pytest.mark.parametrize(("text", "sections", "caption"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_form(text, sections, caption):
    result = section_report(text)
    assert [(section.name, section.text) for section in result.sections] == sections
    assert result.caption == caption
    for section in result.sections:
        assert text[section.start : section.start + len(section.text)] == section.text


def test_fields_of_a_report_with_all():
    result = section_report(" COMPARISON: ___.\n FINDINGS: Hazy\n lungs.\n IMPRESSION: Edema.\n")
    assert (result.comparison, result.findings, result.impression) == ("___.", "Hazy lungs.", "Edema.")
    assert result.last_paragraph is None
    assert not result.overridden


# ---------------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize("alias", [(alias, name) for name, aliases in ALIASES.items() for alias in (name, *aliases)])
def test_every_alias_in_every_place(alias):
    header, name = alias
    assert canonical_name(header.upper()) == name
    for text in (
        f" {header.upper()}: Text.",
        f"{header.title()}: Text.",
        f"{header}:Text.",
        f" A. {header.upper()}: Text.",
    ):
        assert split_sections(text)[-1] == Section(name, "Text.", len(text) - 5)


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_findings_unless_the_name_says_otherwise(view):
    assert canonical_name(f"UPRIGHT {view.upper()}") == "findings"
    for part in CONTAINED:
        assert canonical_name(f"{view.upper()} {part.upper()}") == part


def test_unknown_name_is_kept():
    assert canonical_name(" MEDICAL  RECORD / NUMBER ") == "medical record/number"


# ---------------------------------------------------------------------------------------------------------------------
# properties

WORDS = (
    "lungs are clear, effusion 3.5 cm left ___ Dr. of heart? large (mild) edema; at 10:45 a.m. NO; pneumonia".split()
)
HEADERS = (
    "FINDINGS",
    "IMPRESSION",
    "COMPARISON",
    "WET READ",
    "NDICATION",
    "ADDENDUM",
    "PORTABLE CHEST",
    "LUNGS",
    "Impression",
)


def random_report(rng):
    """A report of parts, and the names and words that each part has."""
    parts, text = [], ""
    if rng.random() < 0.5:
        words = rng.choices(WORDS, k=rng.randint(1, 20))
        text, parts = join(rng, words), [("preamble", words)]
    for _ in range(rng.randint(1, 8)):
        header = rng.choice(HEADERS)
        known = canonical_name(header) in ALIASES and header != "PORTABLE CHEST" and header.isupper()
        words = rng.choices(WORDS, k=rng.randint(0, 20))
        # on the line of the section before only where the grammar says so
        lead = rng.choice(["  ", "\n", "\n ", "\r\n\t", "\n \n    "]) if known else rng.choice(["\n", "\n  ", "\r\n "])
        gap = rng.choice([" ", "  ", "\n ", "\r\n", "\t", " \n \n "])
        text += (lead if text else "") + header + rng.choice(["", " "]) + ":" + gap + join(rng, words)
        parts.append((canonical_name(header), words))
    return text, parts


def join(rng, words):
    return "".join(word + rng.choice([" ", " ", "  ", "\n ", "\r\n", "\t", "\n \n"]) for word in words)


def test_random_reports_come_apart_where_they_were_put_together():
    rng = random.Random(0)
    for _ in range(2000):
        text, parts = random_report(rng)
        sections = split_sections(text)
        assert [(section.name, section.text.split()) for section in sections] == parts, text
        ends = [0] + [section.start + len(section.text) for section in sections]
        for section, end in zip(sections, ends, strict=False):
            assert section.start >= end  # in order, none within another
            assert text[section.start :].startswith(section.text)


def test_sections_written_down_and_read_again_are_the_same():
    rng = random.Random(1)
    for _ in range(500):
        text, _ = random_report(rng)
        once = [(section.name, flatten(section.text)) for section in split_sections(text)]
        again = "\n".join(body if name == "preamble" else f" {name.upper()}: {body}" for name, body in once)
        assert [(section.name, section.text) for section in split_sections(again)] == once


def test_line_ends_do_not_matter():
    rng = random.Random(2)
    for _ in range(300):
        text, _ = random_report(rng)
        unix, problem = read_report(text.encode())
        assert not problem
        assert section_report(unix).caption == section_report(text).caption


def test_flatten_is_idempotent():
    assert flatten(" a\r\n \n b\t c ") == "a b c" == flatten("a b c")


@pytest.mark.parametrize(
    "text",
    [
        "A" * 1_000_000,
        "A ,-/()" * 150_000,
        " " * 1_000_000,
        "_" * 1_000_000,
        "FINDINGS AND " * 80_000,
        "IMPRESSION" + " " * 1_000_000,
        "NO EFFUSION SEEN\n" * 100_000,
        f"{RULE}\n" * 13_000,
        ("_____\n" + "\n" * 20) * 40_000,
        "\n \t" * 300_000,
        " FINAL REPORT x\n" * 60_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_hostile_reports_without_header_return(text):
    sections = split_sections(text)
    assert "".join(section.text for section in sections) == text.strip()


def test_a_hundred_thousand_headers():
    assert len(split_sections(" IMPRESSION: a\n" * 100_000)) == 100_000


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_report_from_a_file(tmp_path):
    path = tmp_path / "s50000000.txt"
    path.write_bytes("\ufeff IMPRESSION: 37 °C.\r\n Normal.\r".encode())
    assert read_report(path) == (" IMPRESSION: 37 °C.\n Normal.\n", "")


@pytest.mark.parametrize(
    ("data", "text", "problem"),
    [
        (b"37 \xb0C \x93new\x94", "37 °C “new”", "not UTF-8 (byte 0xb0 at 3), read as cp1252"),
        (b"37 \xb0C \x81", "37 °C \x81", "not UTF-8 (byte 0xb0 at 3), read as latin-1"),
        (b"IMPRESSION\0: none", "", "not a text (byte 0x00 at 10)"),
        ("IMPRESSION: none".encode("utf-16-le"), "", "not a text (byte 0x00 at 1)"),
        (b"\x1f\x8b\x08 gzip", "", "not a text (byte 0x1f at 0)"),
        (b"", "", "empty"),
        (b"\xef\xbb\xbf \r\n\t", "", "empty"),
    ],
)
def test_report_in_a_wrong_encoding(data, text, problem):
    assert read_report(data) == (text, problem)


def test_missing_report_is_a_problem(tmp_path):
    assert read_report(tmp_path / "s1.txt") == ("", "cannot be read (No such file or directory)")
    assert read_report(tmp_path)[1].startswith("cannot be read")


# ---------------------------------------------------------------------------------------------------------------------
# overrides

REPORT = " COMPARISON: None. Large\n heart.\n IMPRESSION: See above.\n FINDINGS: Wrong patient.\n"


def test_override_by_section():
    result = section_report(REPORT, "s1", {"s1": "COMPARISON"})
    assert (result.impression, result.findings, result.comparison) == ("None. Large heart.", None, None)
    assert result.caption == "None. Large heart."
    assert result.overridden
    assert [section.name for section in result.sections] == ["comparison", "impression", "findings"]


def test_override_by_range():
    start = REPORT.index("Large")
    result = section_report(REPORT, "1", {"s1": (start, start + 13)})
    assert result.caption == result.impression == "Large heart."


def test_empty_range_is_meant_to_have_no_caption():
    result = section_report(REPORT, "s1", {"s1": (0, 0)})
    assert result.caption is None
    assert result.overridden


def test_override_of_another_study_does_nothing():
    assert section_report(REPORT, "s2", {"s1": (0, 0)}) == section_report(REPORT)


@pytest.mark.parametrize(
    ("override", "message"),
    [("history", "names the section history, its report has comparison, impression, findings"), ((5, 999), "has 83")],
)
def test_override_that_does_not_fit_the_report(override, message):
    with pytest.raises(UserError, match=message):
        section_report(REPORT, "s1", {"s1": override})


def test_overrides_from_json_and_csv(tmp_path):
    expected = {"s11": "wet read", "s12": (3, 50), "s13": (0, 0)}
    (tmp_path / "o.json").write_text(json.dumps({"s11": "wet read", "12": [3, 50], "s13": [0, 0]}))
    (tmp_path / "o.csv").write_text("study,section,start,end\ns11,wet read,,\n12,,3,50\ns13,,0,0\n")
    assert read_overrides(tmp_path / "o.json") == expected
    assert read_overrides(tmp_path / "o.csv") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("o.json", "{", "cannot be read"),
        ("o.json", '["s11"]', "must hold a JSON object"),
        ("o.json", '{"s11": [0, 0], "11": "findings"}', "each once"),
        ("o.json", '{"../x": [0, 0]}', "studies like s50414267"),
        ("o.json", '{"s11": [5, 4]}', r"s11 must have a section's name or \[start, end\]"),
        ("o.json", '{"s11": [-1, 4]}', "s11 must have"),
        ("o.json", '{"s11": [1, 2, 3]}', "s11 must have"),
        ("o.json", '{"s11": null}', "s11 must have"),
        ("o.csv", "study,start,end\ns11,0,0\n", "lacks"),
        ("o.csv", "study,section,start,end\ns11,,0,\n", "s11 must have"),
        ("o.csv", "study,section,start,end\ns11\n", "s11 must have"),
        ("o.csv", "study,section,start,end\n\xe9,,0,0\n", "cannot be read"),
    ],
)
def test_overrides_with_a_mistake(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_overrides(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_overrides(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_overrides(tmp_path / "none.csv")
