"""SaveDICOM: pictures that join the study of the file they come from, or begin one of their own."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImaged
from PIL import Image

from medgen.data import MedicalImageReader
from medgen.data.phantom import PhantomSpec, write_phantom
from medgen.errors import UserError
from medgen.transforms import SaveDICOM, SaveDICOMd

PICTURE = np.arange(256, dtype=np.uint8).reshape(8, 32)  # every grey level, no symmetry


def tensor(values: np.ndarray, name: str = "x.png", **meta: object) -> MetaTensor:
    return MetaTensor(torch.as_tensor(values), meta={"filename_or_obj": name, **meta})


@pytest.fixture(scope="module")
def radiograph(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom("chest", folder / "study", PhantomSpec(patients=1, size=48))
    return next((folder / "study").rglob("*.dcm"))


def test_every_grey_level_comes_back_upright(tmp_path):
    image = tensor(PICTURE[None] / np.float32(255), "scan.png")

    out = SaveDICOM(tmp_path)(image)

    assert out is image
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "scan.dcm").pixel_array, PICTURE)


def test_colour_and_values_outside_are_as_in_a_png(tmp_path):
    colour = np.random.default_rng(0).uniform(-0.2, 1.2, (3, 5, 7)).astype(np.float32)

    SaveDICOM(tmp_path)(tensor(colour))

    expected = np.rint(np.clip(colour.astype(np.float64), 0, 1) * 255).transpose(1, 2, 0)
    picture = pydicom.dcmread(tmp_path / "x.dcm")
    assert picture.PhotometricInterpretation == "RGB"
    np.testing.assert_array_equal(picture.pixel_array, expected)


def test_picture_of_a_dicom_file_joins_its_study(radiograph, tmp_path):
    item = LoadImaged("image", reader=MedicalImageReader, ensure_channel_first=True)({"image": str(radiograph)})
    item["overlay"] = item["image"].repeat(3, 1, 1)

    got = SaveDICOMd("overlay", tmp_path, name_key="image", description="anomaly overlay")(item)

    source, picture = pydicom.dcmread(radiograph), pydicom.dcmread(got["overlay_path"])
    assert got["overlay_path"] == str(tmp_path / f"{radiograph.stem}.dcm")
    assert (picture.StudyInstanceUID, picture.PatientID) == (source.StudyInstanceUID, source.PatientID)
    reference = picture.SourceImageSequence[0]
    assert (reference.ReferencedSOPInstanceUID, reference.SpatialLocationsPreserved) == (source.SOPInstanceUID, "YES")
    assert picture.SeriesDescription == "anomaly overlay"


def test_picture_of_a_frame_refers_to_the_frame(radiograph, tmp_path):
    source = pydicom.dcmread(radiograph)
    source.NumberOfFrames, source.PixelData = 5, 5 * source.PixelData
    source.save_as(tmp_path / "cine.dcm")

    SaveDICOM(tmp_path / "out")(tensor(np.zeros((1, 4, 4), np.float32), str(tmp_path / "cine.dcm"), frame=3))

    picture = pydicom.dcmread(tmp_path / "out" / "cine.dcm")
    assert picture.SourceImageSequence[0].ReferencedFrameNumber == 4


def test_generated_picture_is_its_own_patient(tmp_path):
    saver = SaveDICOMd("pred", tmp_path, name_key="name", patient_key="patient", synthetic=True, origin="sha")

    got = saver({"pred": torch.rand(1, 4, 4), "name": "seed000007", "patient": "synthetic-7"})

    picture = pydicom.dcmread(tmp_path / "seed000007.dcm")
    assert got["pred_path"] == str(tmp_path / "seed000007.dcm")
    assert (picture.PatientID, picture.PatientName, picture.SyntheticData) == ("synthetic-7", "SYNTHETIC", "YES")


def test_picture_of_a_file_without_a_patient_is_named_after_the_file(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "scan.png")

    SaveDICOM(tmp_path / "out")(tensor(PICTURE[None] / np.float32(255), str(tmp_path / "scan.png")))

    picture = pydicom.dcmread(tmp_path / "out" / "scan.dcm")
    assert (picture.PatientID, picture.PatientName, picture.SyntheticData) == ("scan.png", "", "NO")


def test_two_keys_have_two_files(tmp_path):
    item = {"a": tensor(np.zeros((1, 4, 4))), "b": tensor(np.ones((1, 4, 4)))}

    got = SaveDICOMd(["a", "b"], tmp_path)(item)

    assert [got["a_path"], got["b_path"]] == [str(tmp_path / "x_a.dcm"), str(tmp_path / "x_b.dcm")]


def test_the_source_itself_is_not_overwritten(radiograph):
    image = tensor(np.zeros((1, 4, 4), np.float32), str(radiograph))

    with pytest.raises(UserError, match="would overwrite its own input"):
        SaveDICOM(radiograph.parent)(image)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 4, 4)), "expected a .C, H, W. image with 1 or 3 channels"),
        (np.full((1, 4, 4), np.nan), "not finite"),
    ],
)
def test_what_is_no_picture_is_refused_under_its_name(values, message, tmp_path):
    with pytest.raises(UserError, match=f"x.png: .*{message}"):
        SaveDICOM(tmp_path)(tensor(values))
    assert list(tmp_path.iterdir()) == []


def test_a_series_needs_a_description(tmp_path):
    with pytest.raises(UserError, match="description must say what the series shows"):
        SaveDICOM(tmp_path, description="")
