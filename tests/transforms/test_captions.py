"""Captions drawn from reports: how many sentences, in which order, and when none."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
from monai.transforms import Compose
from scipy.stats import binomtest, chisquare

from medgen.errors import UserError
from medgen.transforms import Captiond, RandCaptiond, RandDropLabeld

SENTENCES = [f"s{number}." for number in range(8)]


def draw(transform, item, times, key="caption"):
    return [transform(item)[key] for _ in range(times)]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_every_number_of_sentences_occurs_equally_often(count):
    transform = RandCaptiond(drop_prob=0).set_random_state(seed=count)

    numbers = Counter(len(caption.split()) for caption in draw(transform, {"sentences": SENTENCES[:count]}, 3000))

    assert set(numbers) == set(range(1, min(count, 5) + 1))
    assert chisquare(list(numbers.values())).pvalue > 0.01


def test_every_order_of_every_choice_occurs_equally_often():
    transform = RandCaptiond(drop_prob=0, max_sentences=3).set_random_state(seed=0)

    captions = Counter(draw(transform, {"sentences": SENTENCES[:4]}, 6000))

    for number in (1, 2, 3):
        possible = [" ".join(choice) for choice in permutations(SENTENCES[:4], number)]
        assert chisquare([captions.pop(caption, 0) for caption in possible]).pvalue > 0.01
    assert not captions


def test_a_sentence_stands_in_a_caption_once():
    transform = RandCaptiond(drop_prob=0).set_random_state(seed=0)
    for caption in draw(transform, {"sentences": SENTENCES}, 200):
        assert len(set(caption.split())) == len(caption.split())


def test_captions_are_dropped_as_often_as_asked():
    transform = RandCaptiond(drop_prob=0.1).set_random_state(seed=0)
    dropped = draw(transform, {"sentences": SENTENCES}, 5000).count("")
    assert binomtest(dropped, 5000, 0.1).pvalue > 0.01


@pytest.mark.parametrize(("drop_prob", "expected"), [(0, {"lungs clear."}), (1, {""})])
def test_never_and_always_dropping(drop_prob, expected):
    assert set(draw(RandCaptiond(drop_prob=drop_prob), {"sentences": ["lungs clear."]}, 300)) == expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"sentences": ["One.", "", " Two. "], "text": "unused"}, "One. Two."),
        ({"sentences": ["The only one."]}, "The only one."),
        ({"sentences": "One sentence."}, "One sentence."),
        ({"text": "A whole report. As it stands."}, "A whole report. As it stands."),
        ({"sentences": None, "text": "Report."}, "Report."),
        ({"sentences": [], "text": "Report."}, "Report."),
        ({"sentences": ["", " "], "text": "Report."}, "Report."),
        ({"sentences": [""]}, ""),
        ({"sentences": []}, ""),
        ({"text": None}, ""),
        ({}, ""),
    ],
)
def test_where_sentences_come_from(item, expected):
    before = dict(item)

    assert Captiond()(item) == {**item, "caption": expected}
    random = RandCaptiond(drop_prob=0)(item)["caption"]

    assert bool(random) == bool(expected)
    assert all(word in expected for word in random.split())
    assert item == before


def test_plain_caption_takes_the_first_sentences():
    assert Captiond()({"sentences": SENTENCES})["caption"] == "s0. s1. s2. s3. s4."
    assert Captiond(caption_key="prompt", max_sentences=2)({"sentences": SENTENCES})["prompt"] == "s0. s1."


def test_sentences_of_several_keys_are_joined():
    item = {"impression": ["No pneumonia."], "findings": ["Clear lungs.", "Normal heart."]}
    assert Captiond(["findings", "impression"])(item)["caption"] == "Clear lungs. Normal heart. No pneumonia."


def test_a_composes_seed_repeats_captions_and_labels():
    transform = Compose([RandCaptiond(), RandDropLabeld("label", num_classes=3, drop_prob=0.5)])
    item = {"sentences": SENTENCES, "label": 1}

    def drawn(seed):
        transform.set_random_state(seed=seed)
        return [(out["caption"], out["label"]) for out in (transform(item) for _ in range(30))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_labels_are_dropped_as_often_as_asked():
    transform = RandDropLabeld("label", num_classes=3, drop_prob=0.2).set_random_state(seed=0)
    labels = Counter(draw(transform, {"label": 1}, 5000, "label"))
    assert set(labels) == {1, 3}
    assert binomtest(labels[3], 5000, 0.2).pvalue > 0.01


def test_an_item_without_label_has_none_at_any_probability():
    transform = RandDropLabeld("label", num_classes=3, drop_prob=0)
    assert transform({"label": None}) == {"label": 3}
    assert transform({"label": 0}) == {"label": 0}
    with pytest.raises(KeyError):
        transform({})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandCaptiond(drop_prob=1.5), "drop_prob must be from 0"),
        (lambda: RandDropLabeld("label", 3, drop_prob=-0.1), "drop_prob must be from 0"),
        (lambda: RandCaptiond(max_sentences=0), "max_sentences must be at least 1, got 0"),
        (lambda: Captiond(max_sentences=0), "max_sentences must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
