"""The args files: every setting exists, every expression can be evaluated, stages name what earlier ones write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
KUBERNETES = REPOSITORY / "cluster" / "kubernetes"
STAGES = {path.stem: json.loads(path.read_text()) for path in sorted((REPOSITORY / "cluster" / "args").glob("*.json"))}
# what other stages read of a stage's folder; "": the folder itself
WRITES = {
    "augmentation_classifier.train": {"model.pt"},
    "cxr_autoencoder_kl.train": {"model.pt"},
    "cxr_inversion_encoder.train": {"model.pt"},
    "cxr_inversion_encoder.train_bootstrap": {"model.pt"},
    "cxr_latent_diffusion.encode": {""},
    "cxr_latent_diffusion.sample": {""},
    "cxr_latent_diffusion.train": {"model.pt"},
    "cxr_pggan.train": {"model.pt"},
    "lung_segmentation.train": {"model.pt"},
    "skin_sngan.generate": {"datalist.json"},
    "skin_sngan.train": {"model.pt"},
    "stylegan2_anomaly.project": {"projections", "reconstructions", "w_statistics"},
    "stylegan2_anomaly.train": {"model.pt"},
}


def bundle(stage: str) -> Path:
    return REPOSITORY / "bundles" / stage.split(".")[0]


@pytest.fixture(scope="module")
def evaluated():
    """Stage -> its settings as the run will see them, with one process, /data and /outputs."""
    from monai.bundle import ConfigParser

    from medgen.settings import check_names

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", "/data")
        patch.setenv("OUTPUT_DIR", "/outputs")
        patch.setenv("WORLD_SIZE", "1")
        settings = {}
        for stage, args in STAGES.items():
            patch.chdir(bundle(stage))
            check_names(["monai.bundle", "--args_file", str(REPOSITORY / "cluster" / "args" / f"{stage}.json")])
            given = {name: value for name, value in args.items() if name not in ("config_file", "tracking")}
            parser = ConfigParser()
            parser.read_config(args["config_file"])
            parser.update(given)
            settings[stage] = {name: parser.get_parsed_content(name) for name in given}
        return settings


def test_every_setting_exists_and_every_expression_is_one(evaluated):
    assert evaluated["cxr_autoencoder_kl.train"]["batch_size"] == 96
    assert evaluated["cxr_latent_diffusion.train"]["batch_size"] == 256
    for stage, settings in evaluated.items():
        for value in settings.values():
            assert not isinstance(value, str) or value.startswith(("/data", "/outputs/")) or "/" not in value, stage


def test_each_stage_has_a_folder_of_its_own(evaluated):
    folders = {stage: s.get("output_dir", s.get("latents_dir")) for stage, s in evaluated.items()}
    assert folders == {stage: f"/outputs/{stage.replace('.', '/')}" for stage in STAGES}
    for stage, settings in evaluated.items():
        if ".train" in stage:
            assert settings["model_path"] == f"{folders[stage]}/model.pt"


def test_what_a_stage_reads_of_outputs_another_stage_writes(evaluated):
    folders = {stage: f"/outputs/{stage.replace('.', '/')}" for stage in STAGES}
    written = {f"{folders[stage]}/{name}".rstrip("/") for stage, names in WRITES.items() for name in names}
    for stage, settings in evaluated.items():
        for name, value in settings.items():
            own = {folders[stage]} | ({f"{folders[stage]}/model.pt"} if ".train" in stage else set())
            if isinstance(value, str) and value.startswith("/outputs/") and value not in own:
                assert value in written, f"{stage}: {name}"


def test_a_stage_writes_what_others_read_of_it(evaluated):
    for stage, names in WRITES.items():
        if ".train" in stage:
            assert {evaluated[stage]["model_path"]} == {f"{evaluated[stage]['output_dir']}/{name}" for name in names}
            continue
        text = (bundle(stage) / STAGES[stage]["config_file"]).read_text() if names != {""} else ""
        for name in names - {""}:
            # the datalist of generated images is written beside them
            found = "medgen.data.SyntheticSet" if name == "datalist.json" else f"@output_dir + '/{name}'"
            assert found in text, f"{stage}: {name}"


def test_a_stage_in_shards_goes_on_where_it_was():
    """Also its merge, which would do all of it again or refuse what is there; a study always goes on."""
    merged = {path.name.removesuffix(".merge") for path in KUBERNETES.glob("overlays/*.merge")} & set(STAGES)
    studies = {stage for stage in merged if stage.endswith(".study")}
    assert (len(merged), len(studies)) == (12, 2)
    assert {stage for stage in merged if STAGES[stage].get("resume") is True} == merged - studies


def test_a_training_goes_on_on_any_number_of_gpus_and_is_tracked():
    for stage, args in STAGES.items():
        if ".train" in stage:
            assert args["resume"] is True
            assert args["config_file"][-1] == "configs/multi_gpu_train.json"
            assert args["tracking"] == "configs/tracking.json"
            # not a number: that would be each process's own, and grow with the GPUs
            assert "batch_per_process" in str(args.get("batch_size", "batch_per_process")), stage


def test_a_stage_in_shards_tracks_nothing():
    """Each of its pods would be a run of its own."""
    for stage, args in STAGES.items():
        assert (".train" in stage or ".evaluate" in stage) == ("tracking" in args)


def test_no_host_and_no_folder_of_one_site_is_named():
    for stage, args in STAGES.items():
        for value in args.values():
            for text in value if isinstance(value, list) else [value]:
                assert not str(text).startswith("/"), stage
                assert "://" not in str(text), stage
