"""Artifacts that are not what was registered, and bundles with code in their weights: refused, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn
from vector_bundles import Evil, file_digest, files_of, make_vector_bundle, stored_bundle

from medgen.errors import UserError
from medgen.registry import fetch, fetch_model, pull, register_bundle


class Stored:
    """A registered bundle in its artifact store, to be changed; ``marker`` appears where code in it runs."""

    def __init__(self, uri: str, marker: Path) -> None:
        self.uri, self.marker, self.folder = uri, marker, stored_bundle(uri, "vectors", 1)

    def poison(self, name: str) -> None:
        (self.folder / name).write_bytes(pickle.dumps(Evil(self.marker), protocol=2))

    def make_list_fit(self) -> None:
        sums = {name: file_digest(self.folder / name) for name in files_of(self.folder) - {"checksums.json"}}
        (self.folder / "checksums.json").write_text(json.dumps(sums))

    def make_all_fit(self) -> None:
        """As who can write to the artifacts and to the database."""
        self.make_list_fit()
        self.set_digest()

    def set_digest(self) -> None:
        digest = file_digest(self.folder / "checksums.json")
        MlflowClient(self.uri).set_model_version_tag("vectors", "1", "bundle_sha256", digest)


@pytest.fixture(scope="module")
def vector_store(tmp_path_factory, empty_database) -> str:
    folder = tmp_path_factory.mktemp("tampered")
    uri = f"sqlite:///{shutil.copy(empty_database, folder)}"
    bundle = make_vector_bundle(folder / "vectors")
    torch.save(nn.Linear(1, 1).state_dict(), bundle / "models" / "autoencoder.pt")
    register_bundle(bundle, "vectors", uri)
    return uri


@pytest.fixture
def stored(vector_store, tmp_path_factory) -> Iterator[Stored]:
    made = Stored(vector_store, tmp_path_factory.mktemp("marker") / "executed")
    model, before = made.folder.parents[1], tmp_path_factory.mktemp("before") / "model"
    shutil.copytree(model, before)
    digest = file_digest(made.folder / "checksums.json")
    yield made
    shutil.rmtree(model)
    shutil.copytree(before, model)
    MlflowClient(vector_store).set_model_version_tag("vectors", "1", "bundle_sha256", digest)


def change_weights(stored: Stored) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), stored.folder / "models" / "model.pt")


def change_weights_and_list(stored: Stored) -> None:
    change_weights(stored)
    stored.make_list_fit()


def add_file(stored: Stored) -> None:
    (stored.folder / "configs" / "logging.conf").write_text("")


def remove_file(stored: Stored) -> None:
    (stored.folder / "LICENSE").unlink()


def put_code_into_weights(stored: Stored) -> None:
    stored.poison("models/model.pt")


def put_code_into_weights_and_make_all_fit(stored: Stored) -> None:
    stored.poison("models/model.pt")
    stored.make_all_fit()


def put_code_into_companion_and_make_all_fit(stored: Stored) -> None:
    stored.poison("models/autoencoder.pt")
    stored.make_all_fit()


def add_poisoned_checkpoint_and_make_all_fit(stored: Stored) -> None:
    stored.poison("configs/best.CKPT")
    stored.make_all_fit()


def put_in_another_architecture_and_make_all_fit(stored: Stored) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), stored.folder / "models" / "model.pt")
    stored.make_all_fit()


def put_in_another_type_and_make_all_fit(stored: Stored) -> None:
    torch.save(nn.Linear(4, 2).double().state_dict(), stored.folder / "models" / "model.pt")
    stored.make_all_fit()


TAMPERED = [
    (change_weights, "models/model.pt of .* was changed"),
    (change_weights_and_list, "checksums.json of .* was changed"),
    (add_file, "configs/logging.conf of .* was changed"),
    (remove_file, "lacks LICENSE"),
    (put_code_into_weights, "models/model.pt of .* was changed"),
    (put_code_into_weights_and_make_all_fit, "models/model.pt of models:/vectors/1 is not a file of plain weights"),
    (put_code_into_companion_and_make_all_fit, "models/autoencoder.pt of .* is not a file of plain weights"),
    (add_poisoned_checkpoint_and_make_all_fit, "configs/best.CKPT of .* is not a file of plain weights"),
    (put_in_another_architecture_and_make_all_fit, "models/model.pt of .* has other tensors than were registered"),
    (put_in_another_type_and_make_all_fit, "models/model.pt of .* has other tensors than were registered"),
]


@pytest.mark.parametrize(("tamper", "message"), TAMPERED, ids=[tamper.__name__ for tamper, _ in TAMPERED])
def test_files_that_are_not_the_registered_ones_are_refused(stored, tmp_path, tamper, message):
    tamper(stored)

    for get, target in ((pull, tmp_path / "out"), (fetch, tmp_path)):
        with pytest.raises(UserError, match=message) as caught:
            get("models:/vectors/1", target, stored.uri)
        assert "\n" not in str(caught.value)

    assert not list(tmp_path.iterdir())  # neither the target nor what was downloaded for it
    assert not stored.marker.exists()


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "configs/../../outside.txt", "..\\outside.txt"])
def test_path_that_leaves_the_target_is_refused_even_with_a_matching_digest(stored, tmp_path, name):
    sums = stored.folder / "checksums.json"
    sums.write_text(json.dumps({**json.loads(sums.read_text()), name: "0" * 64}))
    stored.set_digest()

    with pytest.raises(UserError, match="names a file outside the bundle"):
        pull("models:/vectors/1", tmp_path / "out", stored.uri)

    assert not list(tmp_path.iterdir())


def test_symbolic_link_in_the_store_does_not_reach_the_target(stored, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (stored.folder / "configs" / "link.json").symlink_to(secret)

    with pytest.raises(UserError, match=r"link\.json"):
        pull("models:/vectors/1", tmp_path / "out", stored.uri)

    assert files_of(tmp_path) == {"secret.txt"}


@pytest.mark.parametrize("name", ["bundle_pyfunc.py", "code/medgen/errors.py", "MLmodel", "artifacts/bundle/LICENSE"])
def test_model_whose_code_was_changed_is_not_served(stored, tmp_path, name):
    with open(stored.folder.parents[1] / name, "a") as file:
        file.write("\n# changed\n")

    with pytest.raises(UserError, match=f"{name} of models:/vectors/1 was changed"):
        fetch_model("models:/vectors/1", tmp_path, stored.uri)

    assert not list(tmp_path.iterdir())


def test_changed_copy_in_the_cache_is_told_and_kept_from_use(stored, tmp_path):
    folder = fetch_model("models:/vectors/1", tmp_path, stored.uri)
    assert fetch_model("models:/vectors/1", tmp_path, stored.uri) == folder

    (folder / "code" / "medgen" / "errors.py").write_text("")

    with pytest.raises(UserError, match=r"code/medgen/errors\.py of .* delete that folder to fetch it again"):
        fetch_model("models:/vectors/1", tmp_path, stored.uri)


# ---- a bundle from elsewhere, to be registered


@pytest.mark.parametrize("name", ["models/model.pt", "models/autoencoder.pt", "configs/other.pth"])
def test_bundle_with_code_in_its_weights_is_not_registered(vector_bundle, tmp_path, name):
    marker = tmp_path / "executed"
    (vector_bundle / name).write_bytes(pickle.dumps(Evil(marker), protocol=2))

    with pytest.raises(UserError, match=f"{name} is not a file of plain weights") as caught:
        register_bundle(vector_bundle, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}")

    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["configs/link.json", "docs", "models/model.pt"])
def test_bundle_with_a_symbolic_link_is_not_registered(vector_bundle, tmp_path, name):
    outside = tmp_path / "outside"
    (outside / "docs").mkdir(parents=True)
    (outside / "key.json").write_text('{"secret": 1}')
    (vector_bundle / name).unlink(missing_ok=True)
    (vector_bundle / name).symlink_to(outside / ("docs" if name == "docs" else "key.json"))

    with pytest.raises(UserError, match=f"{name} in .* is a symbolic link, which is not registered"):
        register_bundle(vector_bundle, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}")

    assert not (tmp_path / "mlflow.db").exists()


def test_link_to_weights_is_no_matter_where_others_are_named(vector_bundle, store):
    weights = vector_bundle / "models" / "model.pt"
    os.replace(weights, vector_bundle / "trained.pt")
    weights.symlink_to(vector_bundle / "trained.pt")

    assert register_bundle(vector_bundle, "vectors", store, weights=vector_bundle / "trained.pt") == 1


def test_record_beside_the_weights_sets_no_tag_but_lineage(vector_bundle, store, tmp_path):
    forged = {"model": "a" * 64, "tensors": "a" * 64, "served_sha256": "a" * 64, "bundle": "models:/x/1"}
    forged |= {"gate_champion": "models:/x/1", "promoted_champion": "a" * 64, "training_run_id": "models:/x/1"}
    forged |= {"mlflow.user": "models:/x/1", "autoencoder": "models:/ auroc>=0.99 (1)", "generator": "b" * 64}
    (vector_bundle / "models" / "trained_as.json").write_text(json.dumps(forged))

    register_bundle(vector_bundle, "vectors", store)

    client = MlflowClient(store)
    version = client.get_model_version("vectors", "1")
    assert version.tags["model_sha256"] == file_digest(vector_bundle / "models" / "model.pt")
    assert (version.tags["bundle"], version.tags["lineage"]) == ("vectors", "generator_sha256")
    values = [*version.tags.values(), *client.get_run(version.run_id).data.tags.values()]
    assert [value for value in values if value == "a" * 64 or value.startswith("models:/")] == []
    assert (pull("models:/vectors/1", tmp_path / "pulled", store) / "LICENSE").is_file()


@pytest.mark.parametrize("member", ["vectors/../../x", "../../x", "/x", "link"])
def test_archive_with_a_path_that_leaves_it_is_not_registered(vector_bundle, tmp_path, member):
    archive = tmp_path / "vectors.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in files_of(vector_bundle):
            file.write(vector_bundle / name, f"vectors/{name}")
        if member == "link":
            link = zipfile.ZipInfo("vectors/configs/link.json")
            link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            file.writestr(link, "/etc/passwd")
        else:
            file.writestr(member, "x")

    with pytest.raises(UserError, match=r"vectors\.zip") as caught:
        register_bundle(archive, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}")

    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"vectors.zip", "vectors"}
