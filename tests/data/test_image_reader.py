"""MedicalImageReader: what MONAI's LoadImage gets."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, LoadImage, LoadImaged
from PIL import Image
from pydicom.dataset import Dataset as DicomDataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, SegmentationStorage

from medgen.data import MedicalImageReader
from medgen.errors import UserError, find_user_error
from medgen.transforms import SavePNGd

# 40 high and 24 wide, four different corners: no flip, turn or transposition maps it onto itself
PICTURE = np.full((40, 24), 128, np.uint8)
PICTURE[:8, :8], PICTURE[:8, -8:], PICTURE[-8:, :8], PICTURE[-8:, -8:] = 0, 60, 190, 255
PIXELS = torch.from_numpy(PICTURE / np.float32(255))


def write_dicom(path, stored=PICTURE, photometric="MONOCHROME2", syntax=None, sop_class=SecondaryCaptureImageStorage):
    ds = DicomDataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, "1.2.3.4.5"
    ds.Modality, ds.PatientID, ds.SamplesPerPixel, ds.PhotometricInterpretation = "CR", "P1", 1, photometric
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = stored.tobytes()
    if syntax:
        ds.compress(syntax)
    ds.save_as(path, enforce_file_format=True)


WRITERS = {
    "x.png": lambda path: Image.fromarray(PICTURE).save(path),
    "x16.png": lambda path: Image.fromarray(PICTURE.astype(np.uint16) * 257).save(path),
    "x.jpg": lambda path: Image.fromarray(PICTURE).save(path, quality=95),
    "x.dcm": write_dicom,
    "inverted.dcm": lambda path: write_dicom(path, 255 - PICTURE, "MONOCHROME1"),
    "rle.dcm": lambda path: write_dicom(path, syntax=RLELossless),
    "inverted_rle.dcm": lambda path: write_dicom(path, 255 - PICTURE, "MONOCHROME1", RLELossless),
    "x.nii": lambda path: nib.Nifti1Image(PICTURE.T[..., None], np.diag([-1.0, -1, 1, 1])).to_filename(path),
    "x.nii.gz": lambda path: nib.Nifti1Image(PICTURE.T[..., None], np.diag([-1.0, -1, 1, 1])).to_filename(path),
}


def loader(**kwargs) -> LoadImaged:
    return LoadImaged(keys="image", reader=MedicalImageReader(**kwargs), ensure_channel_first=True)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_loaded_upright_and_saved_upright(tmp_path, name):
    WRITERS[name](tmp_path / name)
    chain = Compose([loader(), SavePNGd(keys="image", output_dir=tmp_path / "out")])

    item = chain({"image": str(tmp_path / name)})

    tolerance = 0.04 if name.endswith(".jpg") else 1e-6
    torch.testing.assert_close(item["image"].as_tensor(), PIXELS[None], atol=tolerance, rtol=0)
    with Image.open(item["image_path"]) as saved:
        assert np.abs(np.asarray(saved).astype(int) - PICTURE).max() <= 255 * tolerance


def test_tensor_and_metadata_are_what_monai_expects(tmp_path):
    write_dicom(tmp_path / "x.dcm")

    image = loader()({"image": str(tmp_path / "x.dcm")})["image"]

    assert isinstance(image, MetaTensor)
    assert image.dtype == torch.float32
    assert image.shape == (1, 40, 24)
    assert torch.equal(image.affine, torch.eye(4, dtype=image.affine.dtype))
    assert image.meta["filename_or_obj"] == str(tmp_path / "x.dcm")
    assert tuple(image.meta["spatial_shape"]) == (40, 24)
    assert (image.meta["modality"], image.meta["patient"], image.meta["frame"]) == ("CR", "P1", 0)


def test_colour_gets_its_channels_first(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "x.png")

    image = loader()({"image": tmp_path / "x.png"})["image"]

    np.testing.assert_allclose(image.numpy(), colour.transpose(2, 0, 1) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    "reader",
    [
        "$medgen.data.MedicalImageReader",
        "medgen.data.MedicalImageReader",
        {"_target_": "medgen.data.MedicalImageReader"},
    ],
)
def test_reader_is_named_in_a_bundle_config(tmp_path, reader):
    write_dicom(tmp_path / "x.dcm", 255 - PICTURE, "MONOCHROME1")
    parser = ConfigParser(
        {
            "imports": ["$import medgen"],
            "load": {"_target_": "LoadImaged", "keys": "image", "reader": reader, "ensure_channel_first": True},
        }
    )

    image = parser.get_parsed_content("load")({"image": str(tmp_path / "x.dcm")})["image"]

    torch.testing.assert_close(image.as_tensor(), PIXELS[None], atol=1e-6, rtol=0)


def test_window_and_frame_are_chosen(tmp_path):
    write_dicom(tmp_path / "x.dcm", np.array([[[0, 50, 200]], [[0, 100, 200]]], np.uint8))

    image = loader(window=[50, 100], frame=1)({"image": tmp_path / "x.dcm"})["image"]

    assert image.tolist() == [[[0, 1, 1]]]
    assert image.meta["frame"] == 1


def test_several_files_become_channels(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    Image.fromarray(255 - PICTURE).save(tmp_path / "b.png")
    Image.fromarray(PICTURE.T.copy()).save(tmp_path / "c.png")
    load = LoadImage(reader=MedicalImageReader, ensure_channel_first=True)

    image = load([tmp_path / "a.png", tmp_path / "b.png"])

    torch.testing.assert_close(image.as_tensor(), torch.stack([PIXELS, 1 - PIXELS]))
    with pytest.raises(UserError, match="one size"):
        load([tmp_path / "a.png", tmp_path / "c.png"])


def test_items_of_different_formats_collate(tmp_path):
    write_dicom(tmp_path / "x.dcm")
    Image.fromarray(PICTURE).save(tmp_path / "x.png")
    items = [{"image": str(tmp_path / "x.dcm")}, {"image": str(tmp_path / "x.png")}]

    (batch,) = DataLoader(Dataset(items, loader()), batch_size=2)

    assert batch["image"].shape == (2, 1, 40, 24)
    assert batch["image"].meta["modality"] == ["CR", ""]


def test_refused_file_is_not_handed_to_another_reader(tmp_path):
    """PydicomReader would load the segmentation and PILReader would open the cut PNG."""
    write_dicom(tmp_path / "seg.dcm", sop_class=SegmentationStorage)
    Image.fromarray(PICTURE).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-40])

    for name, reason in (("seg.dcm", "segmentation"), ("cut.png", "truncated")):
        with pytest.raises(RuntimeError) as caught:
            Compose([loader()])({"image": str(tmp_path / name)})
        message = find_user_error(caught.value)
        assert message.startswith(f"{tmp_path / name}: ")
        assert reason in message


def test_reason_survives_a_worker_process(tmp_path):
    (tmp_path / "empty.png").touch()
    batches = DataLoader(Dataset([{"image": str(tmp_path / "empty.png")}], loader()), num_workers=1)

    with pytest.raises(RuntimeError) as caught:
        list(batches)

    assert find_user_error(caught.value) == f"{tmp_path / 'empty.png'}: empty file (0 bytes)"


def test_wrong_arguments_fail_at_construction(tmp_path):
    with pytest.raises(UserError, match="frame must be 0 or more"):
        MedicalImageReader(frame=-1)
    with pytest.raises(UserError, match="centre and positive width"):
        MedicalImageReader(window=(40, 0))


def test_frame_beyond_the_last_is_a_user_error(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "x.png")
    reader = MedicalImageReader(frame=3)

    with pytest.raises(UserError, match=r"x\.png: frame 3 was asked for, the file has 1"):
        reader.get_data(reader.read(tmp_path / "x.png"))


def test_verify_suffix_goes_by_suffix_or_content(tmp_path):
    write_dicom(tmp_path / "IM0001")
    (tmp_path / "notes.txt").write_text("no image")
    reader = MedicalImageReader()

    assert reader.verify_suffix(["a.PNG", "b.nii.gz", tmp_path / "IM0001"])
    assert not reader.verify_suffix(tmp_path / "notes.txt")
    assert not reader.verify_suffix(["a.png", "b.mha"])
