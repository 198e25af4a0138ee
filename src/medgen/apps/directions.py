"""Directions of a latent space: where they come from, the file they are kept in, and how to move along them."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text, plain_json

if TYPE_CHECKING:
    import torch

    from medgen.networks import LatentGenerator

__all__ = ["Directions", "ganspace", "move", "orthogonalise", "sefa", "spread_along", "unit"]

FILE, RECORD = "directions.safetensors", "directions.json"
SMALLEST_REST = 1e-3  # share of a direction that must be left once others are held
GANSPACE_BATCH, GANSPACE_SIDE = 500, 16
SIGNIFICANT = 0.05

Array = NDArray[np.float64]


@dataclass
class Directions:
    """Named directions in the latent space of one generator.

    A direction's length is the standard deviation of the embedding's latents along it: adding it once moves an image
    by one standard deviation. A probe's direction is the normal of the probe, along which its score rises fastest.

    Args:
        space: "z", "w" or "w+".
        generator_sha256: of the file of the generator's weights.
        vectors: name -> (L, D) float32, in units of the latents.
        records: name -> plain values: ``kind`` ("label", "sex", "age", "ganspace", "sefa"), ``spread`` (the length),
            and what is known of it, such as ``auroc`` and ``p_adjusted``; a probe has ``score_per_strength`` and
            ``bias`` as well, from which :meth:`probe` makes it again.
    """

    space: str
    generator_sha256: str
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, vector: Array, latents: Array, **record: Any) -> None:
        """Add a direction, scaled to the spread of the latents along it.

        Args:
            name: not yet there.
            vector: (L, D) of any length.
            latents: (N, L, D) of the embedding.
            **record: what is known of it.

        Raises:
            UserError: it is there already.
        """
        if name in self.vectors:
            raise UserError(f"names of directions must differ, got {name} twice; rename the label")
        direction = unit(vector)
        spread = spread_along(direction, latents)
        self.vectors[name] = (direction * spread).astype(np.float32)
        self.records[name] = {"spread": spread, **record}

    def add_probe(self, name: str, weight: Array, bias: float, latents: Array, **record: Any) -> None:
        """Add the normal of a probe ``score = Σ latent · weight + bias``.

        Args:
            name: of its factor.
            weight: (L, D).
            bias: of the probe.
            latents: (N, L, D) of the embedding.
            **record: what is known of it.
        """
        self.add(name, weight, latents, **record)
        per_strength = float(np.linalg.norm(weight) * self.records[name]["spread"])
        self.records[name] |= {"score_per_strength": per_strength, "bias": bias}

    @property
    def probes(self) -> list[str]:
        """Names of the directions that are probes."""
        return [name for name, record in self.records.items() if "score_per_strength" in record]

    def is_chance(self, name: str) -> bool:
        """Whether a direction is a probe that reads no more than chance does; False where that was not measured."""
        p_value = self.records[name].get("p_adjusted")
        return p_value is not None and p_value >= SIGNIFICANT

    def vector(self, name: str) -> Array:
        """(L, D) of a direction.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.vectors:
            near = difflib.get_close_matches(name, self.vectors, n=3, cutoff=0.4) or list(self.vectors)
            raise UserError(
                f"no direction {name!r} among the {len(self.vectors)} directions; did you mean {', '.join(near)}?"
            )
        return self.vectors[name].astype(np.float64)

    def probe(self, name: str) -> tuple[Array, float]:
        """Weight (L, D) and bias of the probe of a factor.

        Raises:
            UserError: no such direction, or one without a probe.
        """
        vector = self.vector(name)
        record = self.records[name]
        if name not in self.probes:
            raise UserError(
                f"{name} is no probe but a direction of {record.get('kind')}; choose among {', '.join(self.probes)}"
            )
        return vector * record["score_per_strength"] / np.square(vector).sum(), float(record["bias"])

    def write(self, folder: str | Path) -> None:
        """Write ``directions.safetensors``, and ``directions.json`` for a person to read."""
        from safetensors.numpy import save

        records = plain_json(self.records)
        metadata = {"generator_sha256": self.generator_sha256, "space": self.space, "records": json.dumps(records)}
        with atomic_file(Path(folder) / FILE) as file:
            file.write(save(self.vectors, metadata))
        shape = list(next(iter(self.vectors.values())).shape)
        listing = {
            "generator_sha256": self.generator_sha256,
            "space": self.space,
            "shape": shape,
            "directions": records,
        }
        atomic_write_text(Path(folder) / RECORD, json.dumps(listing, indent=4, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path, generator: LatentGenerator | None = None) -> Directions:
        """Read what :meth:`write` wrote.

        Args:
            path: the safetensors file, or its folder.
            generator: whose directions they must be; None for any.

        Raises:
            UserError: no such file, or not such a file, or directions of another generator or space.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise UserError(
                f"no directions at {path}; run disentangle.json, or name its output folder with --directions"
            )
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                vectors = {name: file.get_tensor(name) for name in file.keys()}
            records = json.loads(metadata["records"])
            found = cls(metadata["space"], metadata["generator_sha256"], {}, records)
            found.vectors = {name: vectors[name] for name in records}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} holds no directions ({type(error).__name__}); run disentangle.json again"
            ) from error
        if generator is not None:
            found._check(path, generator)
        return found

    def _check(self, path: Path, generator: LatentGenerator) -> None:
        if self.generator_sha256 != generator.sha256:
            raise UserError(
                f"{path} holds directions of the generator {self.generator_sha256:.12}, this one is "
                f"{generator.sha256:.12}; name that generator with --generator, or run disentangle.json again"
            )
        shapes = {tuple(vector.shape) for vector in self.vectors.values()}
        if self.space != generator.space or shapes != {tuple(generator.latent_shape)}:
            raise UserError(
                f"{path} holds directions in {self.space} of shape {', '.join(map(str, shapes))}, the generator is "
                f"used in {generator.space} of shape {generator.latent_shape}; set --space {self.space}"
            )


def unit(vector: Array) -> Array:
    """The vector divided by its length.

    Raises:
        UserError: it has none.
    """
    length = np.linalg.norm(vector)
    if not length > 0 or not math.isfinite(length):
        raise UserError(f"a direction must have a finite length above 0, got {length}; leave it out")
    return np.asarray(vector, dtype=np.float64) / length


def spread_along(direction: Array, latents: Array) -> float:
    """Standard deviation of the latents' projections on a direction.

    Args:
        direction: (L, D) of length 1.
        latents: (N, L, D), N at least 2.

    Raises:
        UserError: fewer than two latents, or none that differ along it.
    """
    spread = 0.0
    if len(latents) > 1:
        # in parts: numpy would make a copy of all of them in the direction's precision
        parts = np.array_split(latents.reshape(len(latents), -1), math.ceil(len(latents) / 1000))
        spread = float(np.concatenate([part @ direction.reshape(-1) for part in parts]).std(ddof=1))
    if not spread > 0:
        raise UserError(
            f"the spread along a direction takes latents that differ, got {len(latents)}; embed more images"
        )
    return spread


def orthogonalise(direction: Array, held: Sequence[Array]) -> Array:
    """The part of a direction along which the scores of other probes stay.

    A probe's score is ``a · x + b`` and changes by ``a · d`` along d. With the held probes' weights as the columns of
    A, the nearest direction to d with ``Aᵀd' = 0`` is what least squares leaves of it,
    ``d' = d - A (AᵀA)⁻¹ Aᵀ d``: Gram-Schmidt against all of them at once.

    Args:
        direction: (L, D).
        held: weights (L, D) of probes; none returns the direction itself.

    Returns:
        (L, D), not longer than ``direction``.

    Raises:
        UserError: nothing is left of it.
    """
    if not held:
        return direction
    # by SVD, which tells weights of one direction from two: probes of one label and its opposite may both be held
    basis = _basis(held)
    flat = direction.reshape(-1)
    rest = flat - basis @ (basis.T @ flat)
    rest -= basis @ (basis.T @ rest)  # once more, for what rounding left
    if np.linalg.norm(rest) < SMALLEST_REST * np.linalg.norm(flat):
        raise UserError("nothing is left of the direction once the others are held; take some out of --hold")
    return rest.reshape(direction.shape)


def _basis(vectors: Sequence[Array]) -> Array:
    """(L · D, R) orthonormal columns that span the vectors (L, D)."""
    matrix = np.stack([unit(vector).reshape(-1) for vector in vectors], 1)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, values > 1e-6 * values[0]]


def move(
    latents: Array, direction: Array, strengths: Sequence[float], held: Sequence[Array] = (), is_spherical: bool = False
) -> Array:
    """Latents moved along a direction.

    In a flat space ``x + s · d``. On the sphere a straight line would leave the latents that the generator knows. With
    p the part of x that the held weights span and q the rest, ``x = p + q``, x moves on the circle
    ``x' = p + cos(θ) q + sin(θ) |q| t`` about p, where t is the direction's tangent to it and ``θ = s |d| / |q|``
    makes the length of the arc that of the straight way: |x'| = |x|, and no held score changes. Without held weights
    it is the great circle.

    Args:
        latents: (N, L, D).
        direction: (L, D), of the length of strength 1, and orthogonal to the held weights.
        strengths: S of them; 0 gives the latent itself.
        held: weights (L, D).
        is_spherical: whether latents are points of a sphere about 0.

    Returns:
        (N, S, L, D).

    Raises:
        UserError: a latent that cannot be moved, as it lies along the direction itself, or more than a quarter of the
            circle.
    """
    x = np.asarray(latents, dtype=np.float64).reshape(len(latents), 1, -1)
    d, steps = direction.reshape(-1), np.asarray(strengths, dtype=np.float64)[None, :, None]
    if not is_spherical:
        moved = x + steps * d
    else:
        free = x
        if held:
            basis = _basis(held)
            free = x - (x @ basis) @ basis.T
        radius = np.linalg.norm(free, axis=-1, keepdims=True)
        tangent = d - (free @ d)[..., None] / np.maximum(radius, 1e-12) ** 2 * free
        length = np.linalg.norm(tangent, axis=-1, keepdims=True)
        if (length < SMALLEST_REST * np.linalg.norm(d)).any():
            raise UserError("a latent lies along the direction itself and has nowhere to go; take other --images")
        angle = steps * np.linalg.norm(d) / radius
        if np.abs(angle).max() > math.pi / 2:
            most = np.abs(steps).max() * (math.pi / 2) / np.abs(angle).max()
            raise UserError(
                f"strengths must be at most {most:.2g} here, from where the circle leads back, got "
                f"{np.abs(steps).max():g}; set --strengths"
            )
        # so written, angle 0 gives x to the last bit
        moved = x + (np.cos(angle) - 1) * free + np.sin(angle) * radius * (tangent / length)
    return moved.reshape(len(latents), len(strengths), *direction.shape)


def sefa(generator: LatentGenerator, count: int, layers: Sequence[int] | None = None) -> list[tuple[Array, float]]:
    """Directions that change a generator's first linear step most (Shen and Zhou 2021, SeFa, equation 6).

    The step takes the latent to ``A x + b``; over unit vectors n ``|A n|²`` is largest at the eigenvectors of ``AᵀA``
    of the largest eigenvalues. A is the dense layer of a progressive GAN. Of StyleGAN2 it is the affine layers of the
    chosen styles on top of each other: of each style that of its convolution, of the last that of the image.

    Args:
        generator: the generator.
        count: directions wanted.
        layers: styles, for W and W+; in W+ the direction is 0 at the others. None for all.

    Returns:
        (L, D) of length 1, and its eigenvalue; in descending order.

    Raises:
        UserError: layers that are not there, or more directions than the layers have.
    """
    network = generator.network
    if generator.space == "z":
        if layers is not None:
            raise UserError("sefa_layers must be null in the space z, whose latent enters one layer; leave it out")
        matrices, layers = [_matrix(network.blocks[0].dense)[:, : generator.z_dim]], [0]
    else:
        affines = [layer.affine for block in network.synthesis.blocks for layer in block.convolutions()]
        affines.append(network.synthesis.blocks[-1].to_image.affine)
        layers = range(len(affines)) if layers is None else layers
        if not all(0 <= layer < len(affines) for layer in layers):
            raise UserError(f"sefa_layers must be from 0 to {len(affines) - 1}, got {list(layers)}; set --sefa_layers")
        matrices = [_matrix(affines[layer]) for layer in layers]
    matrix = np.concatenate(matrices)
    if not 1 <= count <= min(matrix.shape):
        raise UserError(f"sefa_components must be from 1 to {min(matrix.shape)}, got {count}; set --sefa_components")
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    rows = list(layers) if generator.space == "w+" else [0]
    found = []
    for place in np.argsort(values)[::-1][:count]:
        direction = np.zeros(generator.latent_shape)
        direction[rows, : matrix.shape[1]] = _signed(vectors[:, place])
        found.append((unit(direction), float(values[place])))
    return found


def _matrix(layer: Any) -> Array:
    return (layer.weight.detach() * layer.weight_gain).double().cpu().numpy()


def _signed(vector: Array) -> Array:
    """Of the two unit vectors of one axis that whose largest number is positive: a run gives what the last gave."""
    return vector * np.sign(vector[np.argmax(np.abs(vector))])


def ganspace(
    generator: LatentGenerator, count: int, samples: int = 10_000, seed: int = 0, resolution: int | None = None
) -> list[tuple[Array, float]]:
    """Directions along which random images vary most (Härkönen et al. 2020, GANSpace, section 2).

    In W and W+ principal components of random w, the same for every style. In z, whose distribution has none,
    components of the features that a block makes of random z, and the regression that leads from them back to z. The
    first block is little more than the dense layer, whose directions SeFa gives already; those of later blocks may
    still lie mostly in SeFa's span. All features are held in memory, ``4 · samples · C · side²`` bytes.

    Args:
        generator: the generator.
        count: directions wanted.
        samples: random latents.
        seed: of the draws.
        resolution: side of the features, for z; None for 16, or the last of a smaller network.

    Returns:
        (L, D) of length 1, and the share of the variance that its component explains; in descending order.

    Raises:
        UserError: fewer samples than directions, more directions than numbers in a latent, or a resolution that the
            network has not.
    """
    import torch
    from sklearn.decomposition import PCA

    is_z = generator.space == "z"
    most = min(samples - 1, generator.z_dim if is_z else generator.latent_shape[1])
    if not 1 <= count <= most:
        raise UserError(f"ganspace_components must be from 1 to {most}, got {count}; set --ganspace_components")
    if resolution is not None and not is_z:
        raise UserError(f"ganspace_resolution must be null in the space {generator.space}; leave it out")
    draws = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, generator.z_dim, generator=draws)
    classes = torch.randint(generator.num_classes, (samples,), generator=draws) if generator.num_classes else None
    device, latents = generator.mean.device, []
    with torch.no_grad():
        for rows in torch.arange(samples).split(GANSPACE_BATCH):
            labels = None if classes is None else classes[rows].to(device)
            latents.append(generator.from_z(z[rows].to(device), labels)[:, 0])
    x = torch.cat(latents).double().cpu().numpy()
    if is_z:
        features = _features(generator, resolution)
        pca = PCA(count, copy=False, svd_solver="randomized", random_state=seed)
        coordinates = pca.fit_transform(np.concatenate([features(part) for part in latents])).astype(np.float64)
        vectors = np.linalg.lstsq(coordinates, x - x.mean(0), rcond=None)[0]
        vectors[:, generator.z_dim :] = 0  # the class is no direction
    else:
        pca = PCA(count, svd_solver="full")
        vectors = pca.fit(x).components_
    return [
        (unit(np.broadcast_to(_signed(vector), generator.latent_shape)), float(share))
        for vector, share in zip(vectors, pca.explained_variance_ratio_, strict=True)
    ]


def _features(generator: LatentGenerator, resolution: int | None) -> Callable[[torch.Tensor], NDArray[np.float32]]:
    """The function from z (B, Z + K) to the features (B, C · side²) of one block."""
    import torch

    network = generator.network
    sides = [side for side in network.resolutions if side <= network.resolution]
    side = min(GANSPACE_SIDE, sides[-1]) if resolution is None else resolution
    if side not in sides:
        raise UserError(
            f"ganspace_resolution must be one of {', '.join(map(str, sides))}, got {side}; set --ganspace_resolution"
        )

    def features(z: torch.Tensor) -> NDArray[np.float32]:
        with torch.no_grad():
            for block in network.blocks[: sides.index(side) + 1]:
                z = block(z)
        return z.flatten(1).float().cpu().numpy()

    return features
