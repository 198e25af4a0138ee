"""A folder of generated images: what is to do, what is recorded, and what is refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from medgen import lineage
from medgen.data import SyntheticSet, begin_generation, load_classes, load_datalist, provenance_line
from medgen.errors import UserError


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weights")
    return tmp_path / "model.pt"


@pytest.fixture
def make(tmp_path, weights):
    def synthetic_set(seeds=range(5), settings=None, **changes) -> SyntheticSet:
        return SyntheticSet(tmp_path / "out", seeds, weights, settings or {"truncation_psi": 1.0}, **changes)

    return synthetic_set


def write(samples: SyntheticSet, items=None) -> None:
    samples.folder.mkdir(parents=True, exist_ok=True)
    for item in samples.todo if items is None else items:
        grey = np.full((4, 6), item["seed"], np.uint8)
        Image.fromarray(grey).save(samples.folder / f"{item['name']}.png")


def test_datalist_says_where_each_image_comes_from(make, tmp_path):
    samples = make([3, 1, 3], modality="X-ray")
    samples.begin()
    write(samples)
    samples.finish()

    sha = hashlib.sha256(b"weights").hexdigest()
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert content["training"] == [
        {
            "image": f"samples/seed{seed:06d}.png",
            "patient": f"synthetic-{seed}",
            "synthetic": True,
            "seed": seed,
            "model_sha256": sha,
        }
        for seed in (3, 1)
    ]
    assert content["modality"] == "X-ray"
    assert content["generation"] == {
        "truncation_psi": 1.0, "class_index": None, "file_format": "png", "model_sha256": sha,
    }  # fmt: skip
    assert len(load_datalist(tmp_path / "out" / "datalist.json", "training")) == 2


def test_datalist_says_whose_images_the_generator_saw_where_that_is_known(make, tmp_path):
    about = {"dataset": "lesions", "patients": {"training": ["0123456789abcdef"], "validation": []}}
    samples = make([1])
    (tmp_path / "trained_on.json").write_text(json.dumps({"weights_sha256": [samples.model_sha256], **about}))
    samples.begin()
    write(samples)
    samples.finish()

    assert json.loads((tmp_path / "out" / "datalist.json").read_text())["trained_on"] == about
    assert "trained_on" not in json.loads((tmp_path / "out" / "generation.json").read_text())

    (tmp_path / "trained_on.json").write_text('{"patients": null}')
    with pytest.raises(UserError, match=r"trained_on\.json must hold lists of patients"):
        make([2], resume=True).begin()  # before any image is made


def test_images_of_a_registered_generator_name_it_but_are_the_same_set(make, tmp_path):
    samples = make([1, 2])
    samples.begin()
    write(samples)
    lineage.note("model", "models:/g@champion", samples.model_path, "models:/g/7", "m-1")
    try:
        resumed = make([1, 2], resume=True)
        resumed.begin()
        resumed.finish()
        assert resumed.provenance.startswith(f"model_sha256 {resumed.model_sha256}, model models:/g/7, ")
    finally:
        lineage.forget()
    items = json.loads((tmp_path / "out" / "datalist.json").read_text())["training"]
    assert {item["model"] for item in items} == {"models:/g/7"}
    assert "model" not in samples.provenance.split(", ")[1]


def test_classes_take_turns_by_the_seed(make):
    assert [item["label"] for item in make([0, 1, 2, 7], num_classes=3).items] == [0, 1, 2, 1]
    assert [item["label"] for item in make([0, 1], num_classes=3, class_index=2).items] == [2, 2]
    assert "label" not in make([0]).items[0]


def test_grid_shows_the_samples_on_the_disk(make, tmp_path):
    samples = make([10, 20, 30, 40, 50])
    samples.begin()
    write(samples)
    samples.finish()

    grid = np.asarray(Image.open(tmp_path / "out" / "images" / "grid.png"))
    assert grid.shape == (2 * 4 + 2, 3 * 6 + 4)
    np.testing.assert_array_equal(grid[0, [0, 8, 16]], [10, 20, 30])
    np.testing.assert_array_equal(grid[9, [0, 8, 16]], [40, 50, 255])
    assert (grid[4:6] == 255).all()


def test_resume_does_what_is_missing_in_the_same_batches(make):
    first = make(range(10), batch_size=4)
    first.begin()
    write(first, first.items[:6])

    second = make(range(10), batch_size=4, resume=True)

    second.begin()
    assert [item["seed"] for item in second.todo] == [4, 5, 6, 7, 8, 9]
    write(second)
    assert make(range(10), resume=True).todo == []
    assert [item["seed"] for item in make(range(12), resume=True).todo] == [10, 11]


def test_later_seeds_join_the_earlier_ones(make, tmp_path):
    for seeds in ([0, 1, 2, 3], [4, 5], [5, 6]):
        samples = make(seeds, resume=True, num_classes=3)
        samples.begin()
        write(samples)
        samples.finish()

    items = json.loads((tmp_path / "out" / "datalist.json").read_text())["training"]
    assert [item["seed"] for item in items] == [0, 1, 2, 3, 4, 5, 6]
    assert [item["label"] for item in items] == [0, 1, 2, 0, 1, 2, 0]
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["seeds"] == [0, 1, 2, 3, 4, 5, 6]
    assert np.asarray(Image.open(tmp_path / "out" / "images" / "grid.png")).shape == (3 * 4 + 4, 3 * 6 + 4)


def test_seeds_that_an_interrupted_run_did_not_make_are_not_listed(make, tmp_path):
    killed = make([0, 1, 2])
    killed.begin()
    write(killed, killed.items[:1])
    samples = make([7], resume=True)
    samples.begin()
    write(samples)
    samples.finish()

    items = json.loads((tmp_path / "out" / "datalist.json").read_text())["training"]
    assert [item["seed"] for item in items] == [0, 7]


@pytest.mark.parametrize("content", ["[]", '"text"'])
def test_a_foreign_record_of_generation_is_no_record(make, tmp_path, content):
    samples = make()
    samples.begin()
    write(samples)
    (tmp_path / "out" / "generation.json").write_text(content)

    with pytest.raises(UserError, match="were made with truncation_psi None"):
        make(resume=True).begin()


def test_a_folder_with_samples_is_refused_without_resume(make):
    samples = make()
    samples.begin()
    write(samples)

    with pytest.raises(UserError, match="holds 5 samples already; make the rest with --resume true"):
        make([100])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"truncation_psi": 0.7}}, "truncation_psi 1.0, this run has 0.7"),
        ({"file_format": "dicom"}, "file_format png, this run has dicom"),
        ({"class_index": 1, "num_classes": 2}, "class_index None, this run has 1"),
    ],
)
def test_samples_of_other_settings_are_not_resumed(make, changes, message):
    samples = make()
    samples.begin()
    write(samples)

    with pytest.raises(UserError, match=message):
        make(resume=True, **changes).begin()


def test_samples_of_other_weights_are_not_resumed(make, weights):
    samples = make()
    samples.begin()
    write(samples)
    weights.write_bytes(b"other weights")

    with pytest.raises(UserError, match="were made with model_sha256"):
        make(resume=True).begin()


def test_samples_without_a_record_are_not_resumed(make, tmp_path):
    samples = make()
    samples.begin()
    write(samples)
    (tmp_path / "out" / "generation.json").write_text("{")

    with pytest.raises(UserError, match="were made with truncation_psi None"):
        make(resume=True).begin()


def test_an_unknown_format_is_refused(make):
    with pytest.raises(UserError, match="file_format must be png or dicom, got 'jpeg'"):
        make(file_format="jpeg")


def test_missing_weights_are_named(make, weights):
    weights.unlink()

    with pytest.raises(UserError, match=r"no weights at .*model\.pt; train the bundle first"):
        make().begin()


def test_each_prompt_is_made_with_each_seed(make, tmp_path):
    samples = make([7, 3], prompts=["Clear lungs.", "Grosse Herzschatten, Pleuraerguß."], num_classes=2)
    samples.begin()
    write(samples)
    samples.finish()

    assert [(item["name"], item["patient"], item["text"], item["label"]) for item in samples.items] == [
        ("prompt0000_seed000007", "synthetic-0-7", "Clear lungs.", 1),
        ("prompt0000_seed000003", "synthetic-0-3", "Clear lungs.", 1),
        ("prompt0001_seed000007", "synthetic-1-7", "Grosse Herzschatten, Pleuraerguß.", 1),
        ("prompt0001_seed000003", "synthetic-1-3", "Grosse Herzschatten, Pleuraerguß.", 1),
    ]
    items = load_datalist(tmp_path / "out" / "datalist.json", "training")
    assert [item["text"] for item in items] == [item["text"] for item in samples.items]
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["prompts"] == samples.prompts
    assert f"model_sha256 {samples.model_sha256}, prompts 2, truncation_psi 1.0" in samples.provenance


def test_a_single_prompt_leaves_the_names_as_they_are(make):
    samples = make([42], prompts=["Small left effusion."])

    assert samples.items == [
        {"seed": 42, "name": "seed000042", "patient": "synthetic-42", "text": "Small left effusion."}
    ]
    assert samples.provenance.startswith(f"model_sha256 {samples.model_sha256}, prompts 'Small left effusion.', ")
    assert "text" not in make([42]).items[0]


@pytest.mark.parametrize(("before", "after"), [(["a"], ["b"]), (["a"], []), ([], ["a"]), (["a"], ["a", "b"])])
def test_samples_of_other_prompts_are_not_resumed(make, before, after):
    samples = make([1], prompts=before)
    samples.begin()
    write(samples)

    with pytest.raises(UserError, match="were made with prompts"):
        make([2], prompts=after, resume=True).begin()
    make([2], prompts=before, resume=True).begin()


def test_summary_says_how_many_where_and_how_fast(make, tmp_path):
    samples = make([1, 2, 3])
    samples.begin()
    write(samples)
    samples.finish()

    assert f"3 images in {tmp_path / 'out' / 'samples'}, 3 of them new (" in samples.summary
    assert " a second); datalist.json" in samples.summary
    again = make([1, 2, 3], resume=True)
    again.begin()
    again.finish()
    assert "0 of them new; datalist.json" in again.summary


def test_sixteen_bits_are_for_callers_that_write_them(make):
    samples = make([1], file_format="png16", formats=("png", "png16", "dicom"))

    assert samples.suffix == ".png"
    assert samples.record["file_format"] == "png16"
    with pytest.raises(UserError, match="file_format must be png or dicom, got 'png16'"):
        make([1], file_format="png16")


def test_provenance_names_the_weights_first_and_cuts_every_value(make):
    samples = make([1], {"negative_prompt": "n" * 5000}, prompts=["p" * 5000])

    assert samples.provenance.startswith(f"model_sha256 {samples.model_sha256}, prompts 'ppp")
    assert len(samples.provenance) < 1024
    assert provenance_line({"seed": 1, "model_sha256": "ab"}) == "model_sha256 ab, seed 1"
    assert provenance_line({"seed": 1}) == "seed 1"


def test_images_of_other_settings_are_not_joined(tmp_path):
    folder, record = tmp_path / "edited", {"strength": 0.5, "channels": (1, 2)}
    begin_generation(tmp_path, folder, {"strength": 0.1}, resume=False)
    begin_generation(tmp_path, folder, record, resume=False)  # nothing was made with the first
    folder.mkdir()
    (folder / "a.png").touch()

    with pytest.raises(UserError, match=r"edited holds images already; make the rest with --resume true"):
        begin_generation(tmp_path, folder, record, resume=False)
    with pytest.raises(UserError, match=r"were made with strength 0\.5, this run has 0\.7"):
        begin_generation(tmp_path, folder, {**record, "strength": 0.7}, resume=True)
    assert json.loads((tmp_path / "generation.json").read_text()) == {"strength": 0.5, "channels": [1, 2]}
    begin_generation(tmp_path, folder, record, resume=True)


@pytest.mark.parametrize(("label", "names"), [(0, None), (1, None), (1, ["a", "b"]), ("b", ["a", "b"])])
def test_images_of_a_generator_of_one_class_get_its_label(make, tmp_path, label, names):
    samples = make([0, 1], label=label, label_names=names)
    assert all("label" not in item for item in samples.todo)  # the generator takes none
    samples.begin()
    write(samples)
    samples.finish()

    items = load_datalist(tmp_path / "out" / "datalist.json", "training")
    assert [item["label"] for item in items] == [label, label]
    assert f"label {label}" in samples.provenance
    # a training that reads classes takes it as it is
    classes = load_classes(tmp_path / "out" / "datalist.json", "training", num_classes=2)
    assert [item["label"] for item in classes] == [1 if label == "b" else label] * 2


@pytest.mark.parametrize(("before", "after"), [(0, 1), (None, 0), (0, None)])
def test_samples_of_another_label_are_not_resumed(make, before, after):
    samples = make([1], label=before)
    samples.begin()
    write(samples)

    with pytest.raises(UserError, match=f"were made with label {before}, this run has {after}"):
        make([2], label=after, resume=True).begin()
    make([2], label=before, resume=True).begin()


def test_a_label_that_is_none_is_refused(make):
    with pytest.raises(UserError, match=r"label must be null for a network with 2 classes.*got 1; set --class_index"):
        make(label=1, num_classes=2)
    for wrong in (1.5, True, "", [0]):
        with pytest.raises(UserError, match="label must be a whole number or a name, or null"):
            make(label=wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "abnormal"}, r"label must be a number, or one of label_names \(none given\), got 'abnormal'"),
        ({"label": "c", "label_names": ["a", "b"]}, r"one of label_names \(a, b\), got 'c'"),
        ({"label": 2, "label_names": ["a", "b"]}, "label_names must name the classes 0 to 2, got a, b"),
        ({"num_classes": 3, "label_names": ["a", "b"]}, "label_names must name the classes 0 to 2, got a, b"),
        ({"label_names": "ab"}, "label_names must be a list of names, or null, got 'ab'"),
        ({"label_names": []}, r"label_names must be a list of names, or null, got \[\]"),
        ({"label_names": ["a", 1]}, "label_names must be a list of names"),
    ],
)
def test_a_name_that_no_training_would_know_is_refused(make, settings, message):
    with pytest.raises(UserError, match=message) as error:
        make(**settings)
    assert "\n" not in str(error.value)


def test_shards_that_begin_at_the_same_time_have_one_setting(make, tmp_path, weights):
    other = tmp_path / "newer.pt"
    other.write_bytes(b"other weights")  # the training has written model.pt anew meanwhile
    first = make(range(8), batch_size=2, shard="0/2")
    late = SyntheticSet(tmp_path / "out", range(8), other, {"truncation_psi": 1.0}, batch_size=2, shard="1/2")
    twin = make(range(8), batch_size=2, shard="1/2")
    first.begin()  # has made no image yet
    with pytest.raises(UserError, match=r"with model_sha256 .* delete generation\.json\), or choose another"):
        late.begin()
    record = (tmp_path / "out" / "generation.json").read_bytes()
    twin.begin()
    assert (tmp_path / "out" / "generation.json").read_bytes() == record

    begin_generation(tmp_path, tmp_path / "edited", {"model_sha256": "a"}, resume=True)
    with pytest.raises(UserError, match="were made with model_sha256 a, this run has b"):
        begin_generation(tmp_path, tmp_path / "edited", {"model_sha256": "b"}, resume=True)


def test_images_of_another_batch_size_are_not_joined_and_older_records_do_not_say_it(make, tmp_path):
    first = make(range(8), batch_size=2, shard="0/2")
    first.begin()
    write(first)
    with pytest.raises(UserError, match="made with batch_size 2, this run has 4"):
        make(range(8), batch_size=4, shard="1/2").begin()
    path = tmp_path / "out" / "generation.json"
    record = json.loads(path.read_text())
    del record["batch_size"]
    path.write_text(json.dumps(record))
    make(range(8), batch_size=4, shard="1/2").begin()


def test_a_merge_says_that_shards_have_left_something(make, caplog):
    first = make(range(8), batch_size=2, shard="0/2")
    first.begin()
    write(first, first.items[:2])
    write(make(range(8), batch_size=2, shard="0/2"))  # goes on with its own
    assert "missing" not in caplog.text
    make(range(8), batch_size=2, resume=True)
    assert "4 of 8 items are missing; this process does them now" in caplog.text
