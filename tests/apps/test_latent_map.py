"""The map of the latents."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
from monai.utils import optional_import

from medgen.apps.latent_map import _colouring, map_latents, write_map_page, write_map_picture
from medgen.apps.probes import Factor
from medgen.errors import UserError

AGES = np.array([30.0, 40, np.nan, 80])


def test_principal_components_keep_the_plane_of_largest_variance():
    random = np.random.default_rng(0)
    latents = random.normal(size=(200, 5)) * [0.1, 5, 0.1, 3, 0.1]

    places, axes = map_latents(latents)

    assert abs(np.corrcoef(places[:, 0], latents[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(places[:, 1], latents[:, 3])[0, 1]) > 0.99
    assert "of the variance" in axes[0]


@pytest.mark.skipif(optional_import("umap")[1], reason="umap-learn is installed")
def test_umap_that_is_not_there_is_named_in_one_line():
    with pytest.raises(UserError, match="pip install umap-learn, or take pca") as error:
        map_latents(np.eye(10), "umap")
    assert "\n" not in str(error.value)


def test_unknown_method_and_too_few_latents_are_refused():
    with pytest.raises(UserError, match="map_method must be pca or umap, got 'tsne'"):
        map_latents(np.eye(10), "tsne")
    with pytest.raises(UserError, match="at least 3 latents, got 2"):
        map_latents(np.eye(2))


@pytest.mark.parametrize(
    "factor",
    [
        Factor("age", "age", AGES),
        Factor("age", "age", np.nan_to_num(AGES, nan=50)),
        Factor("sex", "sex", np.array([0, 1, np.nan, 1]), ("F", "M")),
        Factor("mass", "label", np.array([0.0, 1, 0, 1])),
    ],
    ids=["age, one unknown", "age", "sex, one unknown", "label"],
)
def test_colours_are_those_of_a_scale_that_plotly_takes(factor):
    found = _colouring(factor)

    # plotly ignores a scale that does not go from 0 to 1 in ascending order, in favour of one of its own
    if not isinstance(found["colorscale"], str):
        ends = [at for at, _ in found["colorscale"]]
        assert (ends[0], ends[-1]) == (0, 1)
        assert ends == sorted(ends)
    marker = go.Scatter(x=[0], y=[0], marker=found).marker
    assert marker.cmin <= min(marker.color) <= max(marker.color) <= marker.cmax
    assert np.isfinite(marker.color).all()
    if factor.is_binary:
        assert set(factor.classes) <= set(found["colorbar"]["ticktext"])


def test_page_has_a_button_for_each_factor_and_names_as_text(tmp_path):
    items = [
        {"image": f"{n}.png", "patient": "<i>p</i>", "labels": ["a"], "age": 3, "mse": 0.0123456} for n in range(4)
    ]
    factors = [Factor("mass", "label", np.array([0.0, 1, 0, 1])), Factor("age", "age", AGES)]

    write_map_page(tmp_path / "map.html", np.eye(4)[:, :2], ("x", "y"), items, factors)

    page = (tmp_path / "map.html").read_text()
    assert "<script src=" not in page
    assert "identifiers, ages and sexes of patients: it is not for publication" in page
    assert "patient &lt;i&gt;p&lt;" in page
    assert "mean square error 0.01235" in page
    assert page.count('"method":"restyle"') == 2


def test_picture_is_written_for_unknown_values_too(tmp_path):
    factors = [Factor("sex", "sex", np.array([0, 1, np.nan, 1])), Factor("age", "age", AGES)]

    write_map_picture(tmp_path / "map.png", np.eye(4)[:, :2], ("x", "y"), factors)

    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
