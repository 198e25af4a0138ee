"""GrowthSchedule: level, alpha and phase are functions of the images shown."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from medgen.data.growth import GrowthSchedule, GrowthStage
from medgen.errors import UserError

# the source's run on RSNA: 600,000 images at 4×4, then 600,000 to fade in and 600,000 to stabilise; 15,000,000 in all
RSNA = GrowthSchedule(
    resolutions=[4, 8, 16, 32, 64, 128, 256, 512],
    batch_sizes=[128, 128, 128, 64, 32, 16, 8, 4],
    lrs=[0.001] * 7 + [0.0015],
    images=[600_000] + [1_200_000] * 6 + [7_200_000],
    fade_images=[0] + [600_000] * 7,
)
SMALL = GrowthSchedule([4, 8, 16], [6, 4, 2], [0.1, 0.2, 0.3], [20, 30, 40], [0, 10, 40])


def official_lod(images: float) -> float:
    """Level of detail, 0 at full size: that of the source, by its training of 600k and transition of 600k images."""
    phase, into = divmod(images, 1_200_000)
    return max(7 - phase - max(into - 600_000, 0) / 600_000, 0.0)


def test_rsna_run_has_the_levels_of_the_source():
    assert RSNA.total_images == 15_000_000
    for images in range(0, 15_000_000, 12_345):
        stage, lod = RSNA.at(images), official_lod(images)
        level = 7 - math.floor(lod)
        assert stage.resolution == 4 * 2**level
        assert stage.alpha == pytest.approx(1 - (lod - math.floor(lod)) if lod % 1 else 1.0, abs=1e-9)
        assert stage.batch_size == {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8, 512: 4}[stage.resolution]
        assert stage.lr == (0.0015 if stage.resolution == 512 else 0.001)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (0, GrowthStage(0, 4, 1.0, 128, 0.001, 0)),
        (599_999, GrowthStage(0, 4, 1.0, 128, 0.001, 0)),
        (600_000, GrowthStage(1, 8, 0.0, 128, 0.001, 1)),
        (900_000, GrowthStage(1, 8, 0.5, 128, 0.001, 1)),
        (1_200_000, GrowthStage(1, 8, 1.0, 128, 0.001, 2)),
        (7_800_000, GrowthStage(7, 512, 0.0, 4, 0.0015, 13)),
        (8_400_000, GrowthStage(7, 512, 1.0, 4, 0.0015, 14)),
        (99_000_000, GrowthStage(7, 512, 1.0, 4, 0.0015, 14)),
    ],
)
def test_stages_of_the_rsna_run(images, expected):
    assert RSNA.at(images) == expected


def test_levels_show_their_images_when_stepped_by_batches():
    short = replace(RSNA, images=[n // 100 for n in RSNA.images], fade_images=[n // 100 for n in RSNA.fade_images])
    shown, images_seen = [0] * 8, 0
    while images_seen < short.total_images:
        stage = short.at(images_seen)
        shown[stage.level] += stage.batch_size
        images_seen += stage.batch_size
    # a level ends with the step that reaches its end: up to a step of it is taken from the next, and never more
    for level, (count, scheduled) in enumerate(zip(shown, short.images, strict=True)):
        before = short.batch_sizes[level - 1] if level else 0
        assert scheduled - before < count < scheduled + short.batch_sizes[level]
    assert short.total_images <= images_seen < short.total_images + 4


@pytest.mark.parametrize("batch_sizes", [[6, 4, 2], [10, 10, 10], [7, 9, 1]])
def test_no_level_and_no_fade_as_long_as_the_batch_before_is_skipped(batch_sizes):
    first, second, _ = batch_sizes
    for images in range(1, 30):
        schedule = replace(
            SMALL, batch_sizes=batch_sizes, images=[images, first + 1, second], fade_images=[0, first, second]
        )
        images_seen, phases = 0, set()
        while images_seen < schedule.total_images:
            stage = schedule.at(images_seen)
            phases.add(stage.phase)
            images_seen += stage.batch_size
        assert {0, 1, 3} <= phases


def test_alpha_rises_evenly_within_a_level_and_phases_never_go_back():
    stages = [SMALL.at(images) for images in range(100)]
    assert [stage.alpha for stage in stages[20:30]] == pytest.approx([i / 10 for i in range(10)])
    assert all(a.phase <= b.phase and a.level <= b.level for a, b in pairwise(stages))
    assert all(a.alpha <= b.alpha for a, b in pairwise(stages) if a.level == b.level)
    assert {stage.phase for stage in stages} == {0, 1, 2, 3, 4}


def test_level_that_fades_to_its_end_is_fully_in_when_the_training_is_over():
    assert SMALL.at(89).alpha == pytest.approx(39 / 40)
    assert SMALL.at(SMALL.total_images) == GrowthStage(2, 16, 1.0, 2, 0.3, 4)


def test_level_without_fading_is_in_at_once():
    at_once = replace(SMALL, fade_images=[0, 0, 0])
    assert [(at_once.at(images).alpha, at_once.at(images).phase) for images in (19, 20, 50)] == [(1, 0), (1, 2), (1, 4)]


def test_starts_of_levels():
    assert [SMALL.level_start(level) for level in range(4)] == [0, 20, 50, 90]
    assert SMALL.total_images == 90


def test_schedule_may_begin_above_the_smallest_level():
    assert GrowthSchedule([32, 64], [4, 2], [1e-3] * 2, [10, 10], [0, 5]).at(12).alpha == pytest.approx(0.4)


def test_schedule_can_be_copied_and_recorded():
    assert pickle.loads(pickle.dumps(SMALL)).at(25) == SMALL.at(25)
    assert GrowthSchedule(**asdict(SMALL)) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolutions": []}, r"resolutions must name at least one level, got none"),
        ({"resolutions": 4}, r"resolutions must be a list with one entry a level, got 4; set --resolutions"),
        ({"resolutions": [4, 8]}, r"batch_sizes must have one entry for each of the 2 resolutions, got 3"),
        ({"resolutions": [4, 8, 32]}, r"powers of two from 4 on, each twice the one before, got \[4, 8, 32\]"),
        ({"resolutions": [16, 8, 4]}, r"powers of two from 4 on, each twice the one before"),
        ({"resolutions": [5, 10, 20]}, r"powers of two from 4 on"),
        ({"resolutions": [2, 4, 8]}, r"resolutions must be whole numbers of at least 4, got 2"),
        ({"batch_sizes": [4, 0, 4]}, r"batch_sizes must be whole numbers of at least 1, got 0; set --batch_sizes"),
        ({"images": [20, 2.5, 40]}, r"images must be whole numbers of at least 1, got 2\.5"),
        ({"images": "20, 30, 40"}, r"images must be a list with one entry a level, got '20, 30, 40'"),
        ({"lrs": [0.1, 0.0, 0.1]}, r"lrs must be numbers above 0, got 0\.0; set --lrs"),
        ({"lrs": [0.1, float("nan"), 0.1]}, r"lrs must be numbers above 0, got nan"),
        ({"fade_images": [5, 10, 10]}, r"fade_images must begin with 0, .*got 5; set --fade_images"),
        ({"fade_images": [0, -1, 10]}, r"fade_images must be whole numbers of at least 0, got -1"),
        ({"images": [20, 5, 40], "fade_images": [0, 0, 40]}, r"images .* batch of the level before, 6, got 5 at 8"),
        ({"fade_images": [0, 5, 40]}, r"fade_images must be at least the batch of the level before, 6, got 5 at 8×8"),
        ({"fade_images": [0, 10, 3]}, r"got 3 at 16×16: .*; raise --fade_images or lower --batch_sizes"),
        ({"fade_images": [0, 31, 10]}, r"fade_images must not exceed images, got 31 of 30 at 8×8; lower --fade_images"),
    ],
)
def test_bad_settings_are_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        replace(SMALL, **change)
    assert "\n" not in str(caught.value)


def test_negative_position_is_an_error():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        SMALL.at(-1)


def test_schedule_is_there_without_torch():
    code = (
        "import sys; from medgen.data import GrowthSchedule; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
