"""Versions side by side: who is better, what differs, and a page that shows it alone."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from typer.testing import CliRunner
from vector_bundles import make_vector_bundle

from medgen import cli
from medgen.errors import UserError
from medgen.registry import compare, register_bundle, write_comparison

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, empty_database) -> str:
    """Two versions that differ in figures, settings and pictures, and a third without any of these."""
    folder = tmp_path_factory.mktemp("compared")
    uri = f"sqlite:///{shutil.copy(empty_database, folder)}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("trainings")
    bundle = make_vector_bundle(folder / "vectors")
    figures = (
        {"dice": 0.9, "dice_low": 0.85, "dice_high": 0.95, "frd": 5.0, "auroc": 0.7, "l1": 0.5, "density": 1.5, "n": 8},
        {
            "dice": 0.8,
            "dice_low": 0.75,
            "dice_high": 0.88,
            "frd": 4.0,
            "auroc": 0.7,
            "psnr": 30.0,
            "density": 1.0,
            "n": 9,
        },
    )
    for number, of in enumerate(figures, start=1):
        (folder / f"{number}.json").write_text(json.dumps({**of, "split": "test"}))
        out = folder / f"out{number}"
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"run_name": f"run-{number}"}))
        run = client.create_run(experiment, run_name=f"run-{number}")
        for key, value in {"seed": 0, "lr": 0.1 * number, "prompt": HOSTILE if number == 1 else "plain"}.items():
            client.log_param(run.info.run_id, key, value)
        Image.new("L", (2000, 20), 40 * number).save(out / "grid.png")
        pictures = [out / "grid.png"]
        register_bundle(bundle, "vectors", uri, None, folder / f"{number}.json", training=out, pictures=pictures)
    register_bundle(bundle, "vectors", uri)
    return uri


def test_better_is_said_where_direction_is_known_and_intervals_do_not_overlap(vectors):
    rows = {row.name: row for row in compare("vectors", [1, 2], vectors).metrics}

    assert list(rows) == ["dice", "frd", "auroc", "l1", "density", "psnr"]  # neither the ends of intervals nor n
    assert (rows["frd"].direction, rows["frd"].best) == ("lower", 1)
    assert (rows["dice"].best, rows["dice"].overlap) == (None, True)
    assert rows["dice"].intervals == ((0.85, 0.95), (0.75, 0.88))
    assert rows["auroc"].best is None  # equal
    assert rows["density"].direction is None
    assert (rows["l1"].values, rows["l1"].best) == ((0.5, None), None)
    assert rows["frd"].differences == (0.0, -1.0)


def test_what_differs_between_versions_is_told(vectors):
    found = compare("vectors", [1, 2, 3], vectors)

    assert found.conditions == {"n": ("8", "9", None)}
    assert found.params == {"lr": ("0.1", "0.2", None), "prompt": (HOSTILE, "plain", None)}
    assert list(found.pictures) == ["grid"]
    assert [uri is None for uri in found.pictures["grid"]] == [False, False, True]


def test_page_stands_alone_and_runs_nothing(vectors, tmp_path):
    page = write_comparison(compare("vectors", [1, 2], vectors), tmp_path / "new" / "compare.html").read_text()

    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|<script", page)
    first, second = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    for encoded, grey in ((first, 40), (second, 80)):
        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert (image.size, image.getpixel((9, 5))) == ((1024, 10), grey)
    assert "Not measured alike: n is 8 in version 1, 9 in version 2." in page


def test_command_prints_the_figures_and_writes_the_page(vectors, tmp_path):
    output = tmp_path / "page.html"

    result = CliRunner().invoke(
        cli.app, ["registry", "compare", "vectors", "1", "2", "--output", str(output), "--tracking_uri", vectors]
    )

    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0] == "METRIC V1 V2 BETTER"
    assert "frd 5 4 (−1) V2" in lines
    assert "dice 0.9 0.8 (−0.1) intervals overlap" in lines
    assert "n differs 8 9 not measured alike" in lines
    assert "trained with lr 0.1 0.2" in lines
    assert lines[-1] == f"page: {output}"
    assert output.is_file()


@pytest.mark.parametrize(
    ("versions", "message"),
    [([1], "two or more different versions"), ([1, 1], "two or more different versions"), ([1, 7], "version=7")],
)
def test_comparison_that_makes_no_sense_is_one_line(vectors, versions, message):
    with pytest.raises(UserError, match=message):
        compare("vectors", versions, vectors)


def test_page_that_cannot_be_written_is_one_line(vectors, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match=r"choose another --output"):
        write_comparison(compare("vectors", [1, 2], vectors), tmp_path / "file" / "page.html")
