"""DICOM that is written: values, geometry and references as the source's, for sources of every kind."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medgen.data import read_frames, read_source, write_parametric_map, write_secondary_capture
from medgen.data.phantom import PhantomSpec, write_phantom
from medgen.data.reader import UnreadableImageError
from medgen.errors import UserError

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
CR, DX = "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "dicom_real.zip"
SHAPE = (6, 9)
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def source(sop_class: str = CR, **elements: object) -> Dataset:
    """An image of 6 rows and 9 columns with all that the standard asks for, or more, or less (None)."""
    ds = Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, "1.2.3.4"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.1"
    ds.PatientID, ds.PatientName, ds.PatientSex, ds.PatientBirthDate = "17", "Doe^Jane", "F", "19700203"
    ds.StudyDate, ds.StudyTime, ds.InstanceNumber = "20200101", "101500", 5
    ds.Rows, ds.Columns = SHAPE
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.PixelData = bytes(SHAPE[0] * SHAPE[1])
    for keyword, value in elements.items():
        if value is None:
            ds.pop(keyword, None)
        else:
            setattr(ds, keyword, value)
    return ds


def slice_of_ct(**elements: object) -> Dataset:
    return source(
        CT,
        **{
            "FrameOfReferenceUID": "1.2.9",
            "ImagePositionPatient": [-10, -20, 30],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.5, 0.7],
            "SliceThickness": 3,
            **elements,
        },
    )


def map_of(ds: Dataset, folder: Path, values: np.ndarray = VALUES, **settings: object) -> Dataset:
    write_parametric_map(folder / "map.dcm", values, ds, name="anomaly MSE", **settings)
    return pydicom.dcmread(folder / "map.dcm")


def measures(image: Dataset) -> Dataset:
    return image.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def test_values_of_a_map_come_back_exactly(tmp_path):
    values = VALUES.copy()
    values.flat[:3] = (0, np.finfo(np.float32).tiny, -3e38)

    image = map_of(source(), tmp_path, values)

    assert image.SOPClassUID.name == "Parametric Map Storage"
    assert image.pixel_array.dtype == np.float32
    np.testing.assert_array_equal(image.pixel_array, values)


def test_real_world_value_mapping_is_the_identity_in_units_of_one(tmp_path):
    image = map_of(source(), tmp_path, explanation="mean squared difference of grey levels")

    mapping = image.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    unit = mapping.MeasurementUnitsCodeSequence[0]
    assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("1", "UCUM")
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    assert mapping.DoubleFloatRealWorldValueFirstValueMapped == VALUES.min()
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == VALUES.max()
    assert mapping.LUTExplanation == "mean squared difference of grey levels"


def test_window_is_for_display_alone(tmp_path):
    image = map_of(source(), tmp_path, window=(0.25, 0.5))

    voi = image.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    assert (voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction) == (0.25, 0.5, "LINEAR_EXACT")
    np.testing.assert_array_equal(image.pixel_array, VALUES)


def test_a_constant_map_can_be_written(tmp_path):
    image = map_of(source(), tmp_path, np.zeros(SHAPE, np.float32))

    assert image.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0].WindowWidth > 0
    assert not image.pixel_array.any()


@pytest.mark.parametrize("ds", [source(CR), source(DX), slice_of_ct()], ids=["CR", "DX", "CT"])
def test_map_refers_to_its_source_wherever_a_viewer_looks(ds, tmp_path):
    image = map_of(ds, tmp_path)

    series = image.ReferencedSeriesSequence[0]
    derivation = image.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
    items = [image.SourceImageSequence[0], derivation.SourceImageSequence[0], series.ReferencedInstanceSequence[0]]
    for item in items:
        assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (ds.SOPClassUID, ds.SOPInstanceUID)
        assert "ReferencedFrameNumber" not in item
    assert [item.SpatialLocationsPreserved for item in items[:2]] == ["YES", "YES"]
    assert series.SeriesInstanceUID == ds.SeriesInstanceUID
    assert image.StudyInstanceUID == ds.StudyInstanceUID
    assert image.SeriesInstanceUID != ds.SeriesInstanceUID
    assert (image.PatientID, image.PatientName, image.PatientSex) == ("17", "Doe^Jane", "F")
    assert (image.Rows, image.Columns) == SHAPE


def test_map_of_a_slice_lies_where_the_slice_lies(tmp_path):
    ds = slice_of_ct()

    map_of(ds, tmp_path)

    image = highdicom.imread(tmp_path / "map.dcm")
    geometry = image.get_volume().get_geometry()
    assert image.FrameOfReferenceUID == ds.FrameOfReferenceUID
    np.testing.assert_allclose(geometry.position, ds.ImagePositionPatient)
    np.testing.assert_allclose(geometry.pixel_spacing, ds.PixelSpacing)
    np.testing.assert_allclose(image.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0][0x200037].value,
                               ds.ImageOrientationPatient)  # fmt: skip
    assert measures(image).SliceThickness == 3
    assert "SpacingBetweenSlices" not in measures(image)


def test_slices_without_a_frame_of_reference_share_one(tmp_path):
    slices = [slice_of_ct(FrameOfReferenceUID=None, SOPInstanceUID=f"1.2.3.4.{n}") for n in range(2)]

    first, second = (map_of(ds, tmp_path).FrameOfReferenceUID for ds in slices)

    assert first == second


def test_a_radiograph_has_no_place_in_the_patient_and_nor_has_its_map(tmp_path):
    image = map_of(source(DX, ImagerPixelSpacing=[0.2, 0.3]), tmp_path)

    assert "PlanePositionSequence" not in image.PerFrameFunctionalGroupsSequence[0]
    assert "PlaneOrientationSequence" not in image.SharedFunctionalGroupsSequence[0]
    assert list(measures(image).PixelSpacing) == [0.2, 0.3]
    # the standard wants a frame of reference of every map: no two radiographs share one
    other = map_of(source(DX, SOPInstanceUID="1.2.3.5"), tmp_path)
    assert image.FrameOfReferenceUID != other.FrameOfReferenceUID
    assert highdicom.imread(tmp_path / "map.dcm").number_of_frames == 1


@pytest.mark.parametrize(
    ("elements", "spacing"),
    [
        ({"PixelSpacing": [0.1, 0.2], "ImagerPixelSpacing": [0.3, 0.3]}, [0.1, 0.2]),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.3, 0.3]}, [0.3, 0.3]),
        ({"PixelSpacing": [0, 0]}, None),
        ({}, None),
    ],
)
def test_pixel_spacing_is_the_calibrated_one_or_the_detectors(elements, spacing, tmp_path):
    ds = source(DX, **elements)

    image = map_of(ds, tmp_path)
    write_secondary_capture(tmp_path / "picture.dcm", np.zeros(SHAPE, np.uint8), ds, description="x")

    picture = pydicom.dcmread(tmp_path / "picture.dcm")
    shared = image.SharedFunctionalGroupsSequence[0]
    assert len(shared.PixelMeasuresSequence) == 1  # type 1, also where there is nothing to put into it
    if spacing is None:
        assert "PixelSpacing" not in measures(image)
        assert "PixelSpacing" not in picture
    else:
        assert list(measures(image).PixelSpacing) == list(picture.PixelSpacing) == spacing


def enhanced() -> Dataset:
    """Three frames, the third of them turned and placed elsewhere."""
    ds = source(ENHANCED_CT, NumberOfFrames=3, FrameOfReferenceUID="1.2.9", PixelData=bytes(3 * 54))
    ds.PerFrameFunctionalGroupsSequence = []
    for number in range(3):
        groups, plane, place, pixel = Dataset(), Dataset(), Dataset(), Dataset()
        plane.ImageOrientationPatient = [0, 1, 0, 0, 0, -1] if number == 2 else [1, 0, 0, 0, 1, 0]
        place.ImagePositionPatient = [1, 2, 3 * number]
        pixel.PixelSpacing = [0.5 + number, 0.5]
        groups.PlaneOrientationSequence, groups.PlanePositionSequence = [plane], [place]
        groups.PixelMeasuresSequence = [pixel]
        ds.PerFrameFunctionalGroupsSequence.append(groups)
    return ds


def test_map_of_a_frame_refers_to_the_frame_and_lies_where_it_lies(tmp_path):
    image = map_of(enhanced(), tmp_path, frame=2)

    of_frame = image.PerFrameFunctionalGroupsSequence[0]
    assert image.SourceImageSequence[0].ReferencedFrameNumber == 3
    assert of_frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber == 3
    assert of_frame.PlanePositionSequence[0].ImagePositionPatient == [1, 2, 6]
    assert image.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient == [
        0, 1, 0, 0, 0, -1,
    ]  # fmt: skip
    assert measures(image).PixelSpacing == [2.5, 0.5]
    assert image.InstanceNumber == 3


def test_frames_of_one_file_become_different_objects_of_one_series(tmp_path):
    maps = [map_of(enhanced(), tmp_path, frame=number) for number in (0, 1)]

    assert maps[0].SeriesInstanceUID == maps[1].SeriesInstanceUID
    assert maps[0].SOPInstanceUID != maps[1].SOPInstanceUID


def test_picture_of_a_negative_is_stored_as_it_was_given(tmp_path):
    ds = source(PhotometricInterpretation="MONOCHROME1")
    pixels = np.arange(54, dtype=np.uint8).reshape(SHAPE)

    write_secondary_capture(tmp_path / "x.dcm", pixels, ds, description="overlay")

    picture = pydicom.dcmread(tmp_path / "x.dcm")
    assert picture.PhotometricInterpretation == "MONOCHROME2"
    np.testing.assert_array_equal(picture.pixel_array, pixels)
    np.testing.assert_array_equal(read_frames(tmp_path / "x.dcm")[0].pixels.argsort(), pixels.argsort())
    assert map_of(ds, tmp_path).PhotometricInterpretation == "MONOCHROME2"


def test_picture_joins_the_study_of_its_source(tmp_path):
    ds = source(PatientOrientation=["L", "F"], BodyPartExamined="CHEST", ViewPosition="PA", PixelSpacing=[0.1, 0.2])
    pixels = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype(np.uint8)

    write_secondary_capture(
        tmp_path / "x.dcm", pixels, ds, description="anomaly overlay", derivation="MSE over the image"
    )

    picture = pydicom.dcmread(tmp_path / "x.dcm")
    np.testing.assert_array_equal(picture.pixel_array, pixels)
    assert (picture.PatientID, picture.StudyInstanceUID) == (ds.PatientID, ds.StudyInstanceUID)
    assert (picture.SeriesDescription, picture.DerivationDescription) == ("anomaly overlay", "MSE over the image")
    assert list(picture.ImageType[:2]) == ["DERIVED", "SECONDARY"]
    assert (picture.ConversionType, picture.SyntheticData) == ("WSD", "NO")
    assert (picture.BodyPartExamined, picture.ViewPosition) == ("CHEST", "PA")
    assert list(picture.PatientOrientation) == ["L", "F"]
    item = picture.SourceImageSequence[0]
    assert (item.ReferencedSOPInstanceUID, item.SpatialLocationsPreserved) == (ds.SOPInstanceUID, "YES")


def test_picture_of_another_size_claims_no_geometry(tmp_path):
    ds = source(PixelSpacing=[0.1, 0.2], PatientOrientation=["L", "F"])

    write_secondary_capture(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), ds, description="reconstruction")

    picture = pydicom.dcmread(tmp_path / "x.dcm")
    assert "PixelSpacing" not in picture
    assert not picture.PatientOrientation
    assert picture.SourceImageSequence[0].SpatialLocationsPreserved == "NO"


def test_generated_picture_says_so_and_names_nobody(tmp_path):
    write_secondary_capture(
        tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), description="synthetic", synthetic=True, patient="synthetic-7"
    )

    picture = pydicom.dcmread(tmp_path / "x.dcm")
    assert (picture.SyntheticData, picture.ConversionType, picture.BurnedInAnnotation) == ("YES", "SYN", "NO")
    assert list(picture.ImageType) == ["DERIVED", "SECONDARY", "SYNTHETIC"]
    assert (picture.PatientName, picture.PatientID) == ("SYNTHETIC", "synthetic-7")
    assert picture.PatientIdentityRemoved == "YES"
    assert "SourceImageSequence" not in picture


@pytest.mark.parametrize("said", ["YES", "NO", None])
def test_picture_shows_what_its_source_says_that_it_shows(said, tmp_path):
    ds = source(BurnedInAnnotation=said, RecognizableVisualFeatures=said)

    write_secondary_capture(tmp_path / "x.dcm", np.zeros(SHAPE, np.uint8), ds, description="overlay")

    picture = pydicom.dcmread(tmp_path / "x.dcm")
    assert (picture.get("BurnedInAnnotation"), picture.get("RecognizableVisualFeatures")) == (said, said)
    # a map must say NO to letters (PS3.3 C.8.32.2) and either word to features
    image = map_of(ds, tmp_path)
    assert (image.BurnedInAnnotation, image.RecognizableVisualFeatures) == ("NO", "YES" if said == "YES" else "NO")


def test_picture_of_a_file_without_attributes_claims_nothing_about_its_patient(tmp_path):
    write_secondary_capture(tmp_path / "x.dcm", np.zeros(SHAPE, np.uint8), description="x", patient="MRN-4711")

    picture = pydicom.dcmread(tmp_path / "x.dcm")
    assert (picture.PatientID, picture.PatientName) == ("MRN-4711", "")
    for keyword in ("PatientIdentityRemoved", "DeidentificationMethod", "BurnedInAnnotation"):
        assert keyword not in picture


def test_how_the_identity_was_removed_comes_along(tmp_path):
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "113100", "DCM", "Basic Profile"
    ds = source(
        PatientIdentityRemoved="YES",
        DeidentificationMethod=["CTP", "by hand"],
        DeidentificationMethodCodeSequence=[code],
    )

    image = map_of(ds, tmp_path)
    write_secondary_capture(tmp_path / "x.dcm", np.zeros(SHAPE, np.uint8), ds, description="x")

    for written in (image, pydicom.dcmread(tmp_path / "x.dcm")):
        assert written.PatientIdentityRemoved == "YES"
        assert list(written.DeidentificationMethod) == ["CTP", "by hand"]
        assert written.DeidentificationMethodCodeSequence[0].CodeValue == "113100"


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    def both(folder: Path) -> list[bytes]:
        write_secondary_capture(folder / "a.dcm", np.zeros(SHAPE, np.uint8), source(), description="x", origin="m")
        write_secondary_capture(folder / "b.dcm", np.zeros(SHAPE, np.uint8), description="x", patient="p")
        write_parametric_map(folder / "c.dcm", VALUES, source(), name="x")
        write_parametric_map(folder / "d.dcm", VALUES, slice_of_ct(), name="x")
        return [(folder / f"{name}.dcm").read_bytes() for name in "abcd"]

    assert both(tmp_path / "1") == both(tmp_path / "2")


def test_pictures_of_another_origin_are_another_series(tmp_path):
    uids = set()
    for origin in ("one model", "another"):
        write_secondary_capture(tmp_path / "x.dcm", np.zeros(SHAPE, np.uint8), source(), description="x", origin=origin)
        uids.add(pydicom.dcmread(tmp_path / "x.dcm").SeriesInstanceUID)

    assert len(uids) == 2


def test_nothing_is_dated_by_the_clock(tmp_path):
    dated = map_of(source(ContentDate="20190304", ContentTime="050607"), tmp_path)
    undated = map_of(source(StudyDate=None, StudyTime=None), tmp_path)

    assert (dated.ContentDate, dated.ContentTime) == ("20190304", "050607")
    assert undated.ContentDate == "19700101"
    assert "InstanceCreationDate" not in dated


BARE = dict.fromkeys(
    ("PatientID", "PatientName", "PatientSex", "PatientBirthDate", "StudyDate", "StudyTime", "InstanceNumber"), None
)


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.filterwarnings("ignore:The value length")
@pytest.mark.filterwarnings("ignore:A value of type")
@pytest.mark.parametrize(
    "elements",
    [
        BARE,
        {"StudyInstanceUID": None, "SeriesInstanceUID": None, "SOPInstanceUID": None, "SOPClassUID": None},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6", "SOPInstanceUID": "1.2.OLD.0001"},  # retired; no valid UID
        {"SOPClassUID": "1.3.999.1"},  # private
        {"PatientSex": "female", "PatientBirthDate": "3 February", "StudyDate": "2020.01.01", "StudyTime": "noon"},
        {"PatientName": "Müller^Jürgen=山田^太郎", "PatientID": "x" * 80, "StudyDescription": "a\\b"},
        {"InstanceNumber": -3, "PixelSpacing": [-1, 2], "ImagePositionPatient": [0, 0, 0]},
        {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 1, 0, 0], "PixelSpacing": [1, 1]},
        {"FrameOfReferenceUID": "", "PatientOrientation": ["L"], "LossyImageCompression": "01"},
    ],
    ids=["bare", "no UIDs", "retired class", "private class", "free text", "foreign", "senseless", "flat", "empty"],
)
def test_what_a_source_lacks_or_gets_wrong_stops_nothing(elements, tmp_path):
    ds = source(**elements)

    image = map_of(ds, tmp_path)
    write_secondary_capture(tmp_path / "x.dcm", np.zeros(SHAPE, np.uint8), ds, description="overlay")

    np.testing.assert_array_equal(image.pixel_array, VALUES)
    picture = pydicom.dcmread(tmp_path / "x.dcm")
    for written in (image, picture):
        assert written.StudyInstanceUID.is_valid
        assert written.SeriesInstanceUID.is_valid
        for keyword in ("PatientID", "PatientName", "PatientSex", "PatientBirthDate", "StudyID", "AccessionNumber"):
            assert keyword in written  # type 2: there, if empty
        assert str(written.get("PatientName")) in ("", "Doe^Jane", "Müller^Jürgen=山田^太郎")
        assert written.get("StudyDescription", "") == ""
    if "SOPInstanceUID" in ds:
        assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == ds.SOPInstanceUID
    assert read_frames(tmp_path / "x.dcm")[0].pixels.shape == SHAPE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((9, 6), np.float32), r"rows and columns \(6, 9\), got shape \(9, 6\)"),
        (np.full(SHAPE, np.nan), "not finite"),
        (np.full(SHAPE, 1e300), "not finite"),
    ],
)
def test_a_map_that_fits_no_pixel_is_refused(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        map_of(source(), tmp_path, values)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="frame must be from 0 to 0 for this source, got 1"):
        map_of(source(), tmp_path, frame=1)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8)])
def test_what_is_no_picture_is_refused(pixels, tmp_path):
    with pytest.raises(UserError, match="expected a picture"):
        write_secondary_capture(tmp_path / "x.dcm", pixels, description="x")


@pytest.mark.parametrize("width", [0, -1, float("nan")])
def test_a_window_without_width_is_refused(width, tmp_path):
    with pytest.raises(UserError, match="window must be a centre and a positive width"):
        map_of(source(), tmp_path, window=(0, width))


def test_threads_leave_pydicoms_switches_as_they_were(tmp_path):
    before = pydicom.config.settings.reading_validation_mode, pydicom.config.settings.writing_validation_mode

    def write(number: int) -> None:
        write_secondary_capture(tmp_path / f"{number}.dcm", np.zeros(SHAPE, np.uint8), source(), description="x")

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    after = pydicom.config.settings.reading_validation_mode, pydicom.config.settings.writing_validation_mode
    assert after == before
    assert len(list(tmp_path.glob("*.dcm"))) == 8


def test_radiographs_of_the_phantom_get_their_maps(tmp_path):
    write_phantom("chest", tmp_path / "study", PhantomSpec(patients=2, size=48))
    files = sorted((tmp_path / "study").rglob("*.dcm"))
    assert files

    for file in files:
        ds, frame = read_source(file), read_frames(file)[0]
        values = frame.pixels**2
        write_parametric_map(tmp_path / "map.dcm", values, ds, name="anomaly MSE")
        image = pydicom.dcmread(tmp_path / "map.dcm")
        np.testing.assert_array_equal(image.pixel_array, values)
        assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == ds.SOPInstanceUID


def test_a_file_of_another_format_is_no_source(tmp_path):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))

    assert read_source(tmp_path / "x.png") is None
    assert read_source(tmp_path / "missing.dcm") is None


def readable(files: Iterable[Path]) -> Iterator[tuple[Path, list]]:
    for file in sorted(files):
        try:
            yield file, read_frames(file)
        except UnreadableImageError:
            continue


@pytest.fixture(params=["pydicom's", "shared"])
def real(request, tmp_path):
    """Real files of many makers: those that pydicom brings along, and those beside the repository."""
    if request.param == "shared":
        if not SHARED.exists():
            pytest.skip("needs the real images beside the repository, ../shared/data")
        shutil.unpack_archive(SHARED, tmp_path / "real")
        return [path for path in (tmp_path / "real").rglob("*") if path.is_file()]
    return (Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")


@pytest.mark.filterwarnings("ignore")
def test_every_real_file_that_can_be_read_gets_its_map(real, tmp_path):
    count = 0
    for file, frames in readable(real):
        ds, last = read_source(file), len(frames) - 1
        values = np.random.default_rng(0).normal(size=frames[last].pixels.shape[:2]).astype(np.float32)
        pixels = np.uint8(frames[last].pixels * 255)

        image = map_of(ds, tmp_path, values, frame=last)
        write_secondary_capture(tmp_path / "x.dcm", pixels, ds, description="x", frame=last)

        np.testing.assert_array_equal(image.pixel_array, values, file.name)
        reference = image.SourceImageSequence[0]
        assert reference.ReferencedSOPInstanceUID == ds.SOPInstanceUID, file.name
        assert reference.get("ReferencedFrameNumber") == (last + 1 if last else None), file.name
        np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "x.dcm").pixel_array, pixels, file.name)
        count += 1
    assert count > 10
