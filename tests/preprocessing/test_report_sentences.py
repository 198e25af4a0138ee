"""Sentences of radiological prose: cut where a reader would, with no word lost; and what is said of labels."""

from __future__ import annotations

import pickle
import random
import sys
from types import SimpleNamespace

import pytest

from medgen.errors import UserError
from preprocessing._report_sentences import (
    LABELS,
    RuleSplitter,
    label_sentences,
    make_splitter,
    report_sentences,
    strip_numbering,
)

split = RuleSplitter()

# id, sentences; the text is what they make when joined by a blank
TEXTS = [
    ("one", ["No pneumonia."]),
    ("no_stop_at_the_end", ["Lungs are clear.", "Normal heart"]),
    ("doctor", ["Dr. ___ was notified at ___.", "He agreed."]),
    ("two_doctors", ["Told to Drs. ___ and ___ by Dr. Smith.", "No answer."]),
    ("prof", ["Prof. Smith and Mrs. Jones agree.", "Mr. Lee does not."]),
    ("blank_ends_and_begins", ["Compared with ___.", "___ catheter is unchanged.", "Told at ___.", "___ year old."]),
    ("blanks_within", ["The ___ tube ends ___ cm above the ___ and ___."]),
    ("saint", ["St. Jude valve at St. Mary.", "Old wires."]),
    ("versus", ["Atelectasis vs. Pneumonia.", "Opacity may be edema vs. infection."]),
    ("for_example", ["Chronic changes, e.g. Emphysema, i.e. COPD.", "Nothing else (e.g. edema)."]),
    ("number_of_a_rib", ["Fracture of rib no. 3 and No. 4.", "No. 5 is intact."]),
    ("answer_no", ["Is there a pneumothorax?", "No.", "The lungs are clear."]),
    ("approximately", ["The tip is approx. 3 cm above the carina.", "It was approx. 4 cm."]),
    ("figure_and_phone", ["See fig. 2 and call ext. 5555 or tel. ___.", "Thanks."]),
    ("decimals", ["The nodule measures 3.5 cm.", "It was 2.75 cm.", "0.5 mm."]),
    ("measurements", ["A mass of 2.1 x 3.4 x 10.25 cm.", "No other."]),
    ("unit_within", ["The tube ends 4 cm. above the carina and 3 mm. too low.", "The rest is fine."]),
    ("unit_at_the_end", ["It measures 4 mm.", "Stable."]),
    ("morning", ["Told to ___ at 10:45 a.m. by phone.", "It was read at 3 p.m.", "The tube was moved."]),
    ("morning_and_date", ["Told at 10:45 a.m. ___ by phone."]),
    ("morning_without_dots", ["Seen at 10:45 am.", "Told at 11 PM.", "Read."]),
    ("time_at_the_end", ["Told at 10:45.", "No change since 9:30.", "Stable."]),
    ("year_at_the_end", ["Unchanged since 2012.", "Fracture of rib 9.", "There is one of T12.", "Old."]),
    ("initials", ["Discussed with J. R. Smith by A. Jones.", "Signed by Dr. B. Lee."]),
    ("initial_at_the_start", ["J. Smith was told."]),
    ("letter_at_the_end", ["Known hepatitis C.", "There is ascites."]),
    ("degrees", ["Read by J. Smith, M.D., and A. Jones, Ph.D.", "Fine."]),
    ("ellipsis_within", ["The heart ... is large.", "Wait... there is more."]),
    ("ellipsis_at_the_end", ["The heart is large...", "Lungs are clear…", "Done."]),
    ("question_within", ["Opacity ?pneumonia in the left base.", "Opacity ? edema.", "Done."]),
    ("exclamation", ["Urgent!", "Call ___!", "___ was called."]),
    ("brackets", ["Small effusion (unchanged).", "(See above.)", "The rest is clear."]),
    ("quotation", ['The "shadow."', '"Stable."', "Fine."]),
    ("capitals", ["LUNGS ARE CLEAR.", "NO EFFUSION."]),
    ("lower_case", ["lungs are clear.", "no effusion is seen.", "heart is normal."]),
    ("shortened_word", ["Small bilat. effusions and subseg. atelectasis with lat. scarring.", "Done."]),
    ("starts_with_a_number", ["Normal heart.", "2 mm nodule in the left lobe.", "3.5 cm mass."]),
    ("list", ["1. No pneumonia.", "2. Small effusion.", "3. Cardiomegaly."]),
    ("list_without_stops", ["1. No pneumonia", "2. Small effusion", "3. ___ catheter"]),
    ("list_to_twelve", [f"{n}. Item of {n}.5 cm." for n in range(1, 13)]),
    ("list_with_brackets", ["1) No pneumonia", "2) small effusion", "3) Cardiomegaly."]),
    ("list_that_begins_late", ["3. No pneumonia.", "5. Small effusion."]),
    ("list_in_a_sentence", ["The lungs show: 1) edema, 2) effusion.", "Heart: 1. large, 2. round."]),
    ("brackets_are_no_list", ["Seen in segments (1 and 2) today.", "Images (1) and (2) are old."]),
    ("level_is_no_list", ["Fracture of T1.", "Level 2 is fine."]),
    ("torn_decimal", ["A nodule of 3. 5 cm."]),
]


@pytest.mark.parametrize("sentences", [text[1] for text in TEXTS], ids=[text[0] for text in TEXTS])
def test_sentences(sentences):
    assert split(" ".join(sentences)) == sentences
    assert split("\n ".join(sentences)) == sentences  # line ends are blanks
    for sentence in sentences:
        assert split(sentence) == [sentence]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Small effusion.No pneumothorax.Heart is large.", ["Small effusion.", "No pneumothorax.", "Heart is large."]),
        ("NO CHANGE.LINES ARE OLD.", ["NO CHANGE.", "LINES ARE OLD."]),
        ("It is 3.5 cm.No other.Told to ___.He agreed.", ["It is 3.5 cm.", "No other.", "Told to ___.", "He agreed."]),
        ("Clear at 10:45.No edema.", ["Clear at 10:45.", "No edema."]),
        ("By A. Jones, Ph.D., of the U.S. team, Dr.Smith.", ["By A. Jones, Ph.D., of the U.S. team, Dr.Smith."]),
        ("1.No edema\n2.Effusion", ["1.No edema", "2.Effusion"]),
        ("No edema.2. Effusion.", ["No edema.", "2. Effusion."]),
        (" \r\n ", []),
        ("", []),
        ("...", ["..."]),
    ],
)
def test_missing_blanks_and_missing_text(text, sentences):
    assert split(text) == sentences


def test_no_character_is_lost():
    rng = random.Random(0)
    parts = (
        "Dr. ___ 3.5 cm. 1. 2) (see ) a.m. No no. vs. J. ... ? ! effusion. Heart is.Large ; 10:45. ___. e.g.".split()
    )
    for _ in range(3000):
        text = "".join(part + rng.choice(["", " ", " ", "\n"]) for part in rng.choices(parts, k=rng.randint(0, 25)))
        sentences = split(text)
        assert "".join("".join(sentences).split()) == "".join(text.split())
        assert split(" ".join(text.split())) == sentences
        assert all(sentences)


@pytest.mark.parametrize(
    "text",
    [
        "A. " * 200_000,
        "1) " * 200_000,
        "(" * 1_000_000,
        "." * 1_000_000,
        "A" * 1_000_000,
        "a.b." * 200_000,
        "mild left " * 80_000,
    ],
    ids=lambda text: text[:10],
)
def test_long_texts_return(text):
    assert "".join(split(text)).replace(" ", "") == text.replace(" ", "")
    assert label_sentences({"Edema": 1.0}, text) == label_sentences({"Edema": 1.0})


# ---------------------------------------------------------------------------------------------------------------------
# list numbers, and what is kept


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("1. No edema.\n 2. Effusion.", "No edema. Effusion."),
        ("1. No edema\n 2. Effusion\n 3. ___ line", "No edema. Effusion. ___ line"),
        ("1) no edema 2) effusion", "no edema. effusion"),
        ("1.No edema.2.Effusion.", "No edema. Effusion."),
        ("Findings: 1. edema, 2. effusion.", "Findings: edema, effusion."),
        ("1. Nodule of 3.5 cm.\n 2. 4 mm nodule.", "Nodule of 3.5 cm. 4 mm nodule."),
        (
            "Nodule of 3.5 cm since 2012. Told at 10:45. Ribs 3, 4. No.",
            "Nodule of 3.5 cm since 2012. Told at 10:45. Ribs 3, 4. No.",
        ),
        ("Fracture of rib no. 3. Level T7. (1) Old.", "Fracture of rib no. 3. Level T7. (1) Old."),
        ("", ""),
    ],
)
def test_list_numbers_go_and_other_numbers_stay(text, stripped):
    assert strip_numbering(text) == stripped
    assert strip_numbering(stripped) == stripped


def test_findings_come_before_the_impression_which_loses_its_numbers():
    sentences = report_sentences("1. Clear\nlungs. Normal heart", "1. No edema\n2. Effusion of 3.5 cm.", split)
    assert sentences == ["1. Clear lungs.", "Normal heart", "No edema.", "Effusion of 3.5 cm."]


@pytest.mark.parametrize(("findings", "impression"), [(None, None), ("", ""), (" \n", None), ("1. .", "--- ___ ...")])
def test_no_sentences_is_an_empty_list(findings, impression):
    assert report_sentences(findings, impression, split) == []


def test_short_sentences_are_left_out():
    assert report_sentences("OK. No. Is it? A. ___. Dry.", None, split) == ["OK.", "No.", "Is it?", "Dry."]


# ---------------------------------------------------------------------------------------------------------------------
# which splitter


class FakeSpacy:
    """Stands for spaCy: cuts at every semicolon."""

    def __init__(self, installed=True):
        self.installed = installed
        self.loaded = []

    def load(self, name, exclude):
        self.loaded.append(name)
        if not self.installed:
            raise OSError(f"[E050] Can't find model '{name}'.")
        return lambda text: SimpleNamespace(sents=[SimpleNamespace(text=part) for part in text.split(";")])


def test_auto_takes_spacy_where_it_is_installed(monkeypatch):
    spacy = FakeSpacy()
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    splitter = make_splitter("auto")
    assert splitter.name == "spacy"
    assert spacy.loaded == ["en_core_web_sm"]
    assert splitter(" Clear\nlungs; normal ; ") == ["Clear lungs", "normal"]
    assert report_sentences("A. B;", "1. Clear; x", splitter) == ["A. B", "Clear"]
    copy = pickle.loads(pickle.dumps(splitter))  # as a worker gets it: the model is loaded there
    assert copy("a;b") == ["a", "b"]
    assert len(spacy.loaded) == 2


def test_auto_takes_rules_without_spacy_or_its_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert make_splitter("auto").name == "rules"
    monkeypatch.setitem(sys.modules, "spacy", FakeSpacy(installed=False))
    assert make_splitter().name == "rules"


def test_spacy_asked_for_and_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"spaCy is not installed; pip install spacy, or use .*rules"):
        make_splitter("spacy")
    monkeypatch.setitem(sys.modules, "spacy", FakeSpacy(installed=False))
    with pytest.raises(UserError, match=r"spaCy has no en_core_web_sm; python -m spacy download en_core_web_sm"):
        make_splitter("spacy")


def test_rules_and_unknown_names():
    splitter = make_splitter("rules")
    assert pickle.loads(pickle.dumps(splitter))("A b. C d.") == ["A b.", "C d."]
    with pytest.raises(UserError, match="must be auto, spacy or rules, got 'nltk'"):
        make_splitter("nltk")


# ---------------------------------------------------------------------------------------------------------------------
# labels


def test_present_findings_get_both_forms():
    labels = {"Edema": 1.0, "Pneumonia": "1.0", "Support Devices": 1, "Atelectasis": True}
    assert label_sentences(labels) == [
        "the patient has atelectasis.",
        "there is an atelectasis.",
        "the patient has edema.",
        "there is an edema.",
        "the patient has pneumonia.",
        "there is a pneumonia.",
        "the patient has support devices.",
        "there are support devices.",
    ]


def test_only_one_is_present():
    assert label_sentences({"Edema": -1.0, "Fracture": 0.0, "Pneumonia": "", "Lung Lesion": None, "x": 1.0}) == []
    assert label_sentences({"Edema": float("nan"), "No Finding": 1.0, "Pleural Other": 1.0}) == []


def test_all_labels_say_something_of_their_own():
    sentences = label_sentences(dict.fromkeys(LABELS, 1.0))
    assert len(sentences) == len(set(sentences)) == 2 * 12
    assert all(sentence == sentence.lower() and sentence.endswith(".") for sentence in sentences)
    assert sum(sentence.startswith("there is an ") for sentence in sentences) == 3


@pytest.mark.parametrize(
    ("label", "report", "variants"),
    [
        ("Edema", "There is MILD edema.", ["mild edema"]),
        ("Edema", "Severe pulmonary\n edema.", ["severe edema"]),
        ("Edema", "Mild edema then, moderate edema now.", ["mild edema", "moderate edema"]),
        ("Edema", "Mild-to-moderate interstitial edema.", ["moderate edema"]),
        ("Edema", "No severe edema, without mild edema.", []),
        ("Edema", "Mild cardiomegaly and edema. Moderate. Edema.", []),
        ("Edema", "Mildew edema, severed edema.", []),
        ("Pleural Effusion", "Moderate-sized, right pleural effusions.", ["moderate pleural effusion"]),
        ("Atelectasis", "mild bibasilar atelectatic changes", ["mild atelectasis"]),
        ("Enlarged Cardiomediastinum", "Mildly enlarged cardiomediastinum.", ["mild enlarged cardiomediastinum"]),
        ("Lung Opacity", "Severe left lower lobe opacities.", ["severe lung opacity"]),
        ("Support Devices", "mild support devices", []),
        ("Pleural Other", "mild pleural thickening", None),
        ("Edema", "There is no evidence of severe pulmonary edema.", []),
        ("Edema", "The lungs are free of moderate edema.", []),
        ("Edema", "Negative for mild edema. Resolved severe edema.", []),
        ("Edema", "Atelectasis rather than mild edema.", []),
        ("Edema", "Interval resolution of the moderate edema.", []),
        ("Edema", "Previously severe edema has improved. Mild edema has resolved.", []),
        ("Edema", "No pneumothorax or moderate effusion. Mild edema.", ["mild edema"]),
        ("Edema", "No effusion, but moderate edema.", ["moderate edema"]),
        ("Edema", "Severe edema without effusion.", ["severe edema"]),
        ("Edema", "No significant interval change in moderate edema.", ["moderate edema"]),
    ],
)
def test_degrees_of_the_report(label, report, variants):
    plain = [] if variants is None else label_sentences({label: 1.0})
    expected = [form for name in variants or () for form in (f"the patient has {name}.", f"there is a {name}.")]
    assert label_sentences({label: 1.0}, report) == plain + expected
    assert label_sentences({label: 0.0}, report) == []
