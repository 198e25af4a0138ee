"""What is written with an image that was made from those of patients."""

from __future__ import annotations

from medgen import lineage
from medgen.apps.derived import derived_item


def test_derived_image_names_the_registered_generator_that_made_it(tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    source = {"image": "a.png", "patient": "p1"}
    try:
        noted = lineage.note("generator", "models:/g@champion", weights, "models:/g/2")
        registered = derived_item("x.png", [source], [source], noted.sha256, mode="mix")
    finally:
        lineage.forget()
    other = derived_item("x.png", [source], [source], noted.sha256, mode="mix")

    assert registered == {**other, "generator": "models:/g/2"}
    assert other["generator_sha256"] == noted.sha256
