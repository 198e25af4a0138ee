"""A table of a generator's presets, each trained and measured alike, beside figures that were published for them."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from medgen.apps.runs import OF_THE_MACHINE, Run, Step, check_steps, end_study, run_all
from medgen.data.datalist import evenly
from medgen.data.shard import parse_shard
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text, git_revision, plain_json

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["GeneratorStudy"]

logger = logging.getLogger(__name__)

UNTRAINED, REAL = "untrained", "real images"  # rows that are no preset's
SHOWN = 8  # images of a row of the picture
CELL, GAP, LABEL, FONT = 96, 3, 170, 15  # pixels of the picture
# of a generator, that its training, sampling and evaluation must agree on
OF_NETWORK = ("preset", "image_size", "latent_dim", "g_channels", "in_channels", "num_classes")
OF_UNTRAINED = ("image_size", "latent_dim", "g_channels")  # what an untrained generator is told apart by
OF_THE_STUDY = ("preset", "output_dir", "model_path", "resume")  # settings of a training that it chooses itself
OF_THE_DATA = ("datalist", "label", "seed")  # told above the tables
# columns: setting -> head; what else is given for the trainings follows under its own name
SETTINGS = {
    "image_size": "side",
    "batch_size": "batch",
    "latent_dim": "latent size",
    "g_channels": "width of G",
    "d_channels": "width of D",
    "loss": "loss",
    "real_label": "label of real",
    "fake_label": "label of fake",
    "spectral_norm": "spectral norm",
    "d_batch_norm": "batch norm of D",
    "g_lr": "rate of G",
    "d_lr": "rate of D",
    "ema_decay": "EMA",
    "epochs": "epochs",
}
# distance -> head; each with its baseline <name>_real
DISTANCES = {"kid_equal_n": "KID", "frd_equal_n": "FRD", "swd_equal_n": "SWD"}
BASELINES = {"kid_equal_n": "kid_real", "frd_equal_n": "frd_real", "swd_equal_n": "swd_real"}
# figures of unpaired images -> head
UNPAIRED = {"psnr": "PSNR ↑", "ssim": "SSIM ↑", "ms_gmsd": "MS-GMSD ↓", "mdsi": "MDSI ↓", "haarpsi": "HaarPSI ↑"}

FEW = 30  # test images: halves of 15
_FEW_IMAGES = " So few images scatter widely: the distances below, of halves of them, tell large differences alone."
_ABOUT_ROWS = (
    "The measured weights are the best of each training by its validation; *images shown* is how many images the "
    "discriminator had seen by then. *untrained* is a generator of the first preset's size before its first step, "
    "*real images* are compared with other real images: a figure tells as much as lies between these two rows."
)
_ABOUT_DISTANCES = (
    "Lower is nearer. KID, FRD and SWD are of half of the real images and as many samples; KID and FRD of radiomic "
    "features. In brackets: how far halves of the real images are from each other, which a perfect generator comes to. "
    "MS-SSIM is the likeness of pairs of samples, in brackets that of real images: far above it, samples are too much "
    "alike."
)
_ABOUT_UNPAIRED = (
    "Sample i against real image i, each stretched to its own range. The two have nothing to do with each other: PSNR "
    "and the rest of unpaired images say nothing about quality, as the row of real images shows, and are here to "
    "stand beside those that were published, in brackets. MS-GMSD and MDSI are deviations: 0 is best."
)


class GeneratorStudy:
    """Trains each preset of a bundle, samples and measures it, and tells all in one table.

    Each preset has a folder of its own below ``output_dir``, which is what ``train.json``, ``inference.json`` and
    ``evaluate.json`` of the bundle make of it; a preset whose ``metrics.json`` is there is done. An
    untrained generator of the first preset's size is measured with them: what a figure is worth shows between that row
    and the one of real images, whose figures are those of real images against others.

    Written are ``study.md``, ``study.csv``, ``study.json`` and ``study.png``.

    Args:
        bundle_root: folder of a bundle whose configs take ``preset``, ``resume`` and ``source_metrics``.
        output_dir: folder of the results.
        presets: names, one row each, in this order.
        training: id -> value of every training, beside its preset; what is None keeps the preset's.
        evaluation: id -> value of every evaluation; None likewise.
        epoch_share: of each preset's ``epochs``; 1 for the preset's own.
        published: preset -> figure -> value, for the columns beside ours: psnr, ssim, ms_gmsd, mdsi, haarpsi.
        published_by: sentences on where these figures are from, for their table.

    Raises:
        UserError: no preset, one that stands twice or is unknown, or a setting that cannot be or that there is not.
    """

    def __init__(
        self,
        bundle_root: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        presets: Sequence[str],
        training: Mapping[str, Any],
        evaluation: Mapping[str, Any],
        epoch_share: float = 1.0,
        published: Mapping[str, Mapping[str, float]] | None = None,
        published_by: str = "",
    ) -> None:
        from medgen.settings import optional

        presets = [presets] if isinstance(presets, str) else list(presets)
        if not presets or len(set(presets)) < len(presets):
            raise UserError(f"presets must be different names, got {', '.join(presets) or 'none'}; set --presets")
        is_number = isinstance(epoch_share, int | float) and not isinstance(epoch_share, bool)
        if not is_number or not 0 < epoch_share < math.inf:
            raise UserError(f"epoch_share must be a number above 0, got {epoch_share!r}; set --epoch_share 1")
        self.bundle_root, self.output_dir = Path(bundle_root).resolve(), Path(output_dir)
        self.training = {name: value for name, value in training.items() if optional(value) is not None}
        self.evaluation = {name: value for name, value in evaluation.items() if optional(value) is not None}
        for name in OF_THE_STUDY:
            if name in self.training:
                raise UserError(f"training must not have {name}, which the study sets for each preset; leave it out")
        self.presets, self.epoch_share = presets, epoch_share
        self.published, self.published_by = dict(published or {}), published_by
        check_steps([Step("train.json", self.training), Step("evaluate.json", self.evaluation)], self.bundle_root)
        further = {name: name for name in self.training if name not in {*OF_THE_MACHINE, *OF_THE_DATA}}
        self.columns = {**SETTINGS, **{name: head for name, head in further.items() if name not in SETTINGS}}
        if "max_images" in self.training:  # which says how long they last in the place of the epochs
            del self.columns["epochs"]
        self.settings = {preset: self._settings(preset) for preset in presets}  # asks for each before any is trained

    # ------------------------------------------------------------------ what is run

    def _config(self, name: str, overrides: Mapping[str, Any]) -> ConfigParser:
        from monai.bundle import ConfigParser

        parser = ConfigParser(ConfigParser.load_config_file(str(self.bundle_root / "configs" / name)))
        parser["bundle_root"] = str(self.bundle_root)
        parser.update(pairs=dict(overrides))
        return parser

    def _settings(self, preset: str) -> dict[str, Any]:
        """What a preset trains with, once all that is given is laid over it."""
        parser = self._config("train.json", self._training(preset))
        return {name: parser.get_parsed_content(name) for name in self.columns}

    def _training(self, preset: str) -> dict[str, Any]:
        given = {"preset": preset, **self.training}
        if self.epoch_share != 1 and "epochs" not in given:
            epochs = self._config("train.json", given).get_parsed_content("epochs")
            given["epochs"] = max(1, round(self.epoch_share * epochs))
        return given

    def _network(self, preset: str) -> dict[str, Any]:
        given = self._training(preset)
        return {name: given[name] for name in OF_NETWORK if name in given}

    def _untrained(self) -> dict[str, Any]:
        """Settings of the untrained generator, without a preset's name: all presets of its size share it."""
        first = self.settings[self.presets[0]]
        network = self._network(self.presets[0]) | {name: first[name] for name in OF_UNTRAINED}
        return {name: value for name, value in network.items() if name != "preset"}

    def _folder(self, name: str) -> Path:
        if name == UNTRAINED:
            name = "_".join([UNTRAINED, *(str(self._untrained()[key]) for key in OF_UNTRAINED)])
        return self.output_dir / name

    def _run(self, name: str) -> Run:
        folder = self._folder(name)
        files = {"output_dir": str(folder), "model_path": str(folder / "model.pt")}
        network = self._untrained() if name == UNTRAINED else self._network(name)
        of_machine = {key: value for key, value in self.training.items() if key in ("device", "num_workers")}
        steps = [
            Step("inference.json", {**network, **of_machine, **files, "seeds": f"0-{SHOWN - 1}", "resume": True}),
            Step("evaluate.json", {**network, **of_machine, **self.evaluation, **files}),
        ]
        if name != UNTRAINED:
            steps.insert(0, Step("train.json", {**self._training(name), **files, "resume": True}))
        return Run(name, steps, folder / "metrics.json")

    def runs(self) -> list[Run]:
        """All runs: the untrained generator's, then each preset's."""
        return [self._run(name) for name in (UNTRAINED, *self.presets)]

    def check_images(self) -> None:
        """See that there are training images as the settings want them, before anything is written.

        Raises:
            UserError: a datalist that is missing or broken, or a label that none of its items has.
        """
        self._items()

    def _items(self) -> list[dict[str, Any]]:
        return self._config("train.json", self._training(self.presets[0])).get_parsed_content("train#items")

    def run(self, shard: str | None = None) -> None:
        """Do what is missing, and write the table and the picture.

        Args:
            shard: "i/n" does the runs of one of n shares and writes no table; None does all that is left.

        Raises:
            UserError: results of other settings are there, or every preset has failed.
            SystemExit: some runs have failed.
        """
        runs = self.runs()
        if not runs[0].done.is_file():
            self._make_untrained()
        failed = run_all(runs, self.bundle_root, shard)
        if parse_shard(shard) is None:
            self.write(failed)
        count = len(runs)
        if failed.keys() >= set(self.presets):
            count = len(failed)  # an untrained generator alone is no study
        end_study(failed, count, shard)

    def _make_untrained(self) -> None:
        """Weights like those that a training begins with, with statistics as it measures them before a validation."""
        import torch

        from medgen.engines import standing_statistics

        path = self._folder(UNTRAINED) / "model.pt"
        seed = self.training.get("seed", 0)
        torch.manual_seed(seed)
        network = self._config("inference.json", self._untrained()).get_parsed_content("network_def")
        standing_statistics(network, seed)
        with atomic_file(path) as file:
            torch.save(network.state_dict(), file)

    # ------------------------------------------------------------------ what is told

    def write(self, failed: Mapping[str, str]) -> None:
        """Write ``study.md``, ``study.csv``, ``study.json`` and ``study.png``.

        Args:
            failed: run -> why it has no figures.
        """
        rows = self._rows(failed)
        about = self._about(rows)
        atomic_write_text(self.output_dir / "study.md", self._markdown(rows, about, failed))
        record = {"about": about, "rows": rows, "git": git_revision()}
        atomic_write_text(self.output_dir / "study.json", json.dumps(plain_json(record), indent=4) + "\n")
        columns = list(dict.fromkeys(["name", *self.columns, *(name for row in rows for name in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(self.output_dir / "study.csv", text.getvalue())
        self._draw(failed)
        logger.info(f"study.md, study.csv, study.json and study.png in {self.output_dir}")

    def _rows(self, failed: Mapping[str, str]) -> list[dict[str, Any]]:
        """One a run, with settings, figures and what was published; then what real images have, of each size."""
        rows: list[dict[str, Any]] = []
        real: dict[int, dict[str, Any]] = {}
        for name in (UNTRAINED, *self.presets):
            row = {"name": name, **(self.settings[name] if name in self.settings else {})}
            row |= {f"published_{key}": value for key, value in self.published.get(name, {}).items()}
            if name in failed:
                rows.append(row | {"failed": failed[name]})
                continue
            metrics = _read_json(self._folder(name) / "metrics.json")
            best = _read_json(self._folder(name) / "best.json") if name != UNTRAINED else {"images_seen": 0}
            rows.append(row | {"images_seen": best["images_seen"]} | _figures(metrics))
            of_size = real.setdefault(int(metrics["resolution"]), {})
            # a figure of real images may fail in one run and be there in the next
            of_size |= {key: value for key, value in _of_real(metrics).items() if of_size.get(key) is None}
        return rows + [{"name": f"{REAL}, {side} px", **figures} for side, figures in sorted(real.items())]

    def _about(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        try:
            dataset = _read_json(Path(self.training["datalist"])).get("name", "")
        except OSError:  # moved since
            dataset = ""
        return {
            "dataset": dataset,
            "label": self.training.get("label"),
            "n_training": len(self._items()),
            "n_test": max((int(row["n_test"]) for row in rows if row.get("n_test")), default=0),
            "split": self.evaluation.get("split", "test"),
            "seed": self.training.get("seed", 0),
        }

    def _markdown(self, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], failed: Mapping[str, str]) -> str:
        first = self.settings[self.presets[0]]
        differing = [name for name in self.columns if any(of[name] != first[name] for of in self.settings.values())]
        of_label = "" if about["label"] is None else f" of label {about['label']}"
        lines = [
            "# Presets, trained and measured alike",
            "",
            f"Dataset {about['dataset'] or 'without a name'}: {about['n_training']:,} training images{of_label}. "
            f"Measured: {about['n_test']:,} samples against as many images of the {about['split']} split; seed "
            f"{about['seed']}.{_FEW_IMAGES if about['n_test'] < FEW else ''}",
            "",
            _ABOUT_ROWS,
            "",
            *_table(
                ["preset", *(self.columns[name] for name in differing), "images shown"],
                [
                    [row["name"], *(_shown(row.get(name)) for name in (*differing, "images_seen"))]
                    for row in rows
                    if row["name"] in self.settings
                ],
            ),
            "",
            "All: "
            + ", ".join(f"{head} {_shown(first[name])}" for name, head in self.columns.items() if name not in differing)
            + ".",
            "",
            "## Distances from real images",
            "",
            _ABOUT_DISTANCES,
            "",
            *_table(
                ["", *DISTANCES.values(), "MS-SSIM"],
                [
                    [
                        row["name"],
                        *(_beside(row.get(name), row.get(BASELINES[name])) for name in DISTANCES),
                        _beside(row.get("ms_ssim_samples"), row.get("ms_ssim_test")),
                    ]
                    for row in rows
                    if "failed" not in row
                ],
            ),
            "",
            "## Figures of unpaired images",
            "",
            f"{_ABOUT_UNPAIRED} {self.published_by}".rstrip(),
            "",
            *_table(
                ["", *UNPAIRED.values()],
                [
                    [
                        row["name"],
                        *(_beside(row.get(f"unpaired_{name}"), row.get(f"published_{name}")) for name in UNPAIRED),
                    ]
                    for row in rows
                ],
            ),
        ]
        if failed:
            lines += ["", "## Failed", "", *(f"- {name}: {reason}" for name, reason in failed.items())]
        return "\n".join(lines) + "\n"

    def _draw(self, failed: Mapping[str, str]) -> None:
        """The picture: a row of real images, and one of each run's samples."""
        rows: dict[str, list[Image.Image]] = {REAL: self._real_pictures()}
        for name in (UNTRAINED, *self.presets):
            files = [self._folder(name) / "samples" / f"seed{seed:06d}.png" for seed in range(SHOWN)]
            rows[name] = [] if name in failed else [Image.open(file) for file in files if file.is_file()]
        sheet = Image.new("RGB", (LABEL + SHOWN * (CELL + GAP), len(rows) * (CELL + GAP)), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
        for row, (name, pictures) in enumerate(rows.items()):
            top = row * (CELL + GAP)
            text = f"{name}\n(failed)" if name in failed else name
            draw.multiline_text((GAP, top + CELL // 2), text, fill="black", font=font, anchor="lm")
            for column, picture in enumerate(pictures):
                # small images enlarged by whole pixels, large ones averaged
                method = Image.Resampling.NEAREST if picture.width <= CELL else Image.Resampling.LANCZOS
                cell = picture.convert("RGB").resize((CELL, CELL), method)
                sheet.paste(cell, (LABEL + column * (CELL + GAP), top))
        with atomic_file(self.output_dir / "study.png") as file:
            sheet.save(file, format="PNG")

    def _real_pictures(self) -> list[Image.Image]:
        import numpy as np

        overrides = {**self._network(self.presets[0]), **self.evaluation}
        dataset = self._config("evaluate.json", overrides).get_parsed_content("dataset")
        pictures = []
        for index in evenly(range(len(dataset)), SHOWN):
            image = np.asarray(dataset[index]["image"])
            pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
            pictures.append(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy()))
        return pictures


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row: numbers of ``metrics.json`` that are not settings."""
    wanted = ("n_", "ms_ssim", "frd", "swd", "kid", "unpaired_", "resolution")
    return {name: value for name, value in metrics.items() if name.startswith(wanted)}


def _of_real(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What real images have in the place of samples."""
    found = {name: metrics.get(baseline) for name, baseline in BASELINES.items()}
    found |= {f"unpaired_{name}": metrics.get(f"unpaired_{name}_real") for name in UNPAIRED}
    return found | {"ms_ssim_samples": metrics.get("ms_ssim_test"), "n_test": metrics.get("n_test")}


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _beside(value: Any, reference: Any) -> str:
    """A figure with another in brackets, where there is one."""
    return _shown(value) + ("" if reference is None else f" ({_shown(reference)})")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
