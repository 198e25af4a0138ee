"""What applications share: latents that fit their generator, their images, and how images of patients are marked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgen import lineage
from medgen.data.synthetic_set import provenance_line
from medgen.errors import UserError

if TYPE_CHECKING:
    import torch

    from medgen.data.embedding import Embedding
    from medgen.networks import LatentGenerator

__all__ = ["SUFFIXES", "check_space", "derived_item", "derived_record", "render", "save_derived"]

# Nothing here imports torch or MONAI before it must: processes that compress images do without both.

SUFFIXES = {"png": ".png", "dicom": ".dcm"}
UNTOLD = ("image", "patient", "synthetic", "derived_from_patients")  # of an item in its file; the last for privacy

Item = Mapping[str, Any]


def check_space(embedding: Embedding, generator: LatentGenerator) -> None:
    """See that latents are points of a generator's space.

    Raises:
        UserError: there are none, or they are of another generator, space or shape.
    """
    if not len(embedding):
        raise UserError("an embedding must hold at least one latent, got none; make it anew with inference.json")
    if embedding.space != generator.space:
        raise UserError(
            f"latents are of the space {embedding.space}, the generator was loaded for {generator.space}; set --space "
            f"{embedding.space}"
        )
    if generator.sha256 and embedding.generator_sha256 != generator.sha256:
        raise UserError(
            f"latents belong to the generator {embedding.generator_sha256[:12]}, this one is {generator.sha256[:12]}; "
            "name theirs with --generator and --generator_weights"
        )
    if tuple(embedding.latents.shape[1:]) != generator.latent_shape:
        raise UserError(
            f"latents of this generator have the shape {generator.latent_shape}, those of the embedding "
            f"{tuple(embedding.latents.shape[1:])}; make the embedding anew with inference.json"
        )


def render(generator: LatentGenerator, latents: NDArray, batch_size: int) -> NDArray[np.float32]:
    """Images (N, C, H, W) in [0, 1] of latents (N, L, D)."""
    import torch

    images = []
    with torch.no_grad():
        for part in torch.from_numpy(np.asarray(latents, dtype=np.float32)).split(batch_size):
            images.append(generator(part.to(generator.mean.device)).clamp(0, 1).cpu())
    return torch.cat(images).numpy()


def derived_record(
    embedding: Embedding,
    generator: LatentGenerator,
    mode: str,
    images: Sequence[int],
    latents: NDArray,
    **settings: Any,
) -> dict[str, Any]:
    """All that decides the pixels of images made from an embedding's latents, as ``generation.json`` holds it.

    Args:
        embedding: the latents.
        generator: theirs.
        mode: how images are made.
        images: indices of those that they are made from.
        latents: numbers that decide the images, beside the settings.
        **settings: plain values.
    """
    return {
        "generator_sha256": generator.sha256,
        "mode": mode,
        "images": [embedding.items[i]["image"] for i in images],
        **settings,
        "space": embedding.space,
        "stage": embedding.stage,
        "latents_sha256": hashlib.sha256(np.ascontiguousarray(latents).tobytes()).hexdigest(),
    }


def derived_item(image: str, sources: Sequence[Item], among: Sequence[Item], sha256: str, **how: Any) -> dict[str, Any]:
    """The datalist's item of an image made from those of patients.

    Its synthetic patient is a code of the patients it comes from, which names nobody. It depends on nothing else, so
    that sets of several modes that are put into one datalist are divided as one: same patients, same synthetic patient.

    Args:
        image: path below the output folder.
        sources: items of the images it was made from. The name of an image stands for a patient that is unknown.
        among: items whose patients the synthetic patient stands for: the sources, or all that images between which no
            split may fall were made from.
        sha256: of the generator's weights.
        **how: how it was made.
    """
    code = hashlib.sha256("\n".join(sorted(_patients(among))).encode()).hexdigest()
    return {
        "image": image,
        "patient": f"synthetic-{code[:12]}",
        "synthetic": True,
        "derived_from": list(dict.fromkeys(source["image"] for source in sources)),
        "derived_from_patients": _patients(sources),
        **how,
        **({"generator": uri} if (uri := lineage.uri_of(sha256)) else {}),
        "generator_sha256": sha256,
    }


def _patients(items: Sequence[Item]) -> list[str]:
    return list(dict.fromkeys(str(item.get("patient") or item["image"]) for item in items))


def save_derived(
    output_dir: str | os.PathLike[str],
    item: Item,
    record: Item,
    file_format: str,
    image: NDArray | torch.Tensor,
) -> None:
    """Write an image (C, H, W) in [0, 1] made from those of patients; the file says so, and how.

    A PNG says it in its texts ``Description`` and ``Source``, a DICOM file in its attributes.

    Args:
        output_dir: that the item's path is below.
        item: of :func:`derived_item`.
        record: of :func:`derived_record`.
        file_format: "png" or "dicom".
        image: the pixels.
    """
    from medgen.transforms import SaveDICOM, SavePNG

    path = Path(output_dir) / item["image"]
    own = {name: item[name] for name in item if name not in UNTOLD}
    # what it was made from before what it was made with: a text that is too long is cut at its end
    origin = provenance_line({"generator_sha256": item["generator_sha256"], **own, **record})
    meta = {"filename_or_obj": path.name, "patient": item["patient"]}
    if file_format == "png":
        text = {"Description": "synthetic image, made from images of patients", "Source": origin}
        SavePNG(path.parent, text=text).save(image, meta)
    else:
        note = {"description": "synthetic images", "derivation": f"from latents of images of patients: {origin}"}
        SaveDICOM(path.parent, synthetic=True, origin=provenance_line(record), **note).save(image, meta)
