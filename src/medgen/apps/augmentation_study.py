"""What synthetic images are worth to a classifier: arms and seeds of one training, judged by the same real images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.apps.augmentation_report import (
    REFERENCE,
    Arm,
    AugmentationReport,
    Predictions,
    check_same_images,
    read_predictions,
)
from medgen.apps.runs import Run, Step, _config_files, check_steps, end_study, run_all
from medgen.data.augmentation import (
    AUGMENTATION_ARMS,
    augmentation_arm,
    load_synthetic,
    mix_synthetic,
    synthetic_mismatch,
)
from medgen.data.classes import class_names
from medgen.data.datalist import load_classes, validate_datalist
from medgen.data.provenance import check_synthetic
from medgen.data.shard import parse_shard
from medgen.errors import UserError
from medgen.metrics.arm_comparison import SHUFFLES
from medgen.metrics.classification import pick_threshold
from medgen.metrics.intervals import CHEAP_RESAMPLES, FEWEST_FOR_PERCENTILES, check_level

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["AugmentationStudy"]

# what an arm, a seed and the study itself decide
OF_THE_STUDY = frozenset(
    {
        *("arm", "augment", "synthetic_ratio", "synthetic_only", "balance", "synthetic", "allow_unknown"),
        *("seed", "resume", "resume_from", "output_dir", "model_path"),
    }
)
SHUFFLES_PER_ARM = 20  # with fewer, the smallest p-value is above 0.05 after Holm's correction


class AugmentationStudy:
    """Trains and evaluates a classifier in each arm with each seed, and tells what the arms are worth.

    ``runs/ARM/seedN`` below ``output_dir`` is what ``train.json`` and ``evaluate.json`` of the bundle make of a run;
    one whose ``metrics.json`` is there is done. All trainings take the same number of steps, so that more images are
    not more training, and all runs of a seed begin with the same weights and choose the same synthetic images.

    Written are ``study.md``, ``study.csv``, ``study.json`` and ``study.png``: see
    :class:`medgen.apps.augmentation_report.AugmentationReport` and, for what intervals and tests cover,
    :func:`medgen.metrics.compare_arms`.

    Args:
        bundle_root: folder of a bundle whose configs take ``arm``, ``synthetic``, ``seed`` and ``resume``.
        output_dir: folder of the results.
        training: id -> value of every training, among them ``datalist`` and ``num_classes``; None keeps the config's.
            The evaluation gets those that it has as well.
        arms: names of ``AUGMENTATION_ARMS`` with ``real``; None for all that the images allow.
        seeds: as :func:`medgen.inferers.parse_numbers` takes them.
        synthetic: datalist of synthetic images, or several; None for none.
        allow_unknown: go on where it is not known whose images a generator saw.
        overlays: configs laid over both ``train.json`` and ``evaluate.json``, such as another network.
        threshold: of p1 in the report; None for the one of each run's validation images.
        resamples: of the intervals.
        shuffles: of the tests.
        level: of confidence.
        seed: of both.

    Raises:
        UserError: an arm that is unknown, stands twice or that the images do not allow, no arm ``real``, synthetic
            images of a generator that saw patients of the test, a setting of the training that does not exist or that
            the arms and seeds decide, statistics out of range, or too few shuffles for that many arms.
    """

    def __init__(
        self,
        bundle_root: str | os.PathLike[str],
        output_dir: str | os.PathLike[str],
        training: Mapping[str, Any],
        arms: str | Sequence[str] | None = None,
        seeds: int | str | Sequence[int] = "0-2",
        synthetic: str | Sequence[str] | None = None,
        allow_unknown: bool = False,
        overlays: str | Sequence[str] = (),
        threshold: float | None = None,
        resamples: int = CHEAP_RESAMPLES,
        shuffles: int = SHUFFLES,
        level: float = 0.95,
        seed: int = 0,
    ) -> None:
        from monai.bundle import ConfigParser

        from medgen.inferers import parse_numbers
        from medgen.settings import check_between, check_whole, optional

        self.bundle_root, self.output_dir = Path(bundle_root).resolve(), Path(output_dir)
        self.training = {name: value for name, value in training.items() if optional(value) is not None}
        self.overlays = [overlays] if isinstance(overlays, str) else list(overlays)
        overlaid = ConfigParser.load_config_files(self._files("train.json")[1:]) if self.overlays else {}
        given = {*map(_top, self.training), *overlaid}
        if own := sorted(given & OF_THE_STUDY):
            raise UserError(
                f"training and overlays must leave to the study what tells its runs apart, got {', '.join(own)}; leave "
                "it out, and choose with --arms, --seeds, --synthetic and --output_dir"
            )
        check_steps([Step(["train.json", *self.overlays], self.training)], self.bundle_root)
        self.seeds = list(dict.fromkeys(parse_numbers(seeds, "seeds")))
        synthetic = optional(synthetic)
        self.synthetic = [synthetic] if isinstance(synthetic, str) else [str(path) for path in synthetic or ()]
        self.allow_unknown, self.threshold = allow_unknown, optional(threshold)
        check_level(level)
        check_whole(FEWEST_FOR_PERCENTILES, resamples=resamples)
        check_whole(shuffles=shuffles)
        self.statistics = {"resamples": resamples, "shuffles": shuffles, "level": level, "seed": seed}
        datalist, self.num_classes = self.training["datalist"], int(self.training["num_classes"])
        if self.threshold is not None:
            check_between(0, 1, threshold=self.threshold)
            if self.num_classes > 2:
                raise UserError(f"a threshold takes two classes, got {self.num_classes}; set --threshold null")
        self.class_names = class_names(datalist, self.num_classes)
        self.beyond = check_synthetic(self.synthetic, datalist, allow_unknown=allow_unknown)
        self.real = load_classes(datalist, "training", self.training.get("dataset_dir"), self.num_classes)
        names = class_names(datalist, self.num_classes, numbered=False)
        self.pool = load_synthetic(self.synthetic, self.num_classes, names)
        self.arms, self.left_out = self._possible(optional(arms))
        if shuffles < SHUFFLES_PER_ARM * (len(self.arms) - 1):
            raise UserError(
                f"shuffles must be at least {SHUFFLES_PER_ARM * (len(self.arms) - 1)} for {len(self.arms) - 1} arms "
                f"beside {REFERENCE}, so that one of them can have a Holm's p of 0.05, got {shuffles}; set --shuffles "
                f"{SHUFFLES}"
            )

    def _files(self, name: str) -> list[str]:
        """A config of the bundle and the overlays."""
        return _config_files([name, *self.overlays], self.bundle_root)

    def _possible(self, arms: str | Sequence[str] | None) -> tuple[dict[str, Arm], list[Arm]]:
        """Arms to be run, with their numbers of training images, and those left out."""
        given = [name.strip() for name in arms.split(",")] if isinstance(arms, str) else arms
        names = list(AUGMENTATION_ARMS) if given is None else list(given)
        if REFERENCE not in names or len(set(names)) < len(names):
            raise UserError(
                f"arms must be different names with {REFERENCE} among them, which the others are held against, got "
                f"{', '.join(names) or 'none'}; set --arms"
            )
        possible, left_out, before = {}, [], {}
        for name in sorted(names, key=lambda name: name != REFERENCE):
            row = {key: augmentation_arm(name, key) for key in ("ratio", "only", "balance")}
            try:
                items = mix_synthetic(self.real, self.pool, **row, seed=self.seeds[0])
            except UserError as error:
                if given is not None:
                    raise UserError(f"arm {name}: {error}") from error
                left_out.append(Arm(name, left_out=str(error)))
                continue
            made_of = (augmentation_arm(name, "augment"), tuple((item["image"], item["synthetic"]) for item in items))
            same = before.setdefault(made_of, name)
            if same != name:
                left_out.append(Arm(name, left_out=f"the same images as {same}, used in the same way"))
                continue
            counts = Counter((item["label"], item["synthetic"]) for item in items)
            real, synthetic = ([counts[k, which] for k in range(self.num_classes)] for which in (False, True))
            possible[name] = Arm(name, real, synthetic)
        return possible, left_out

    # ------------------------------------------------------------------ what is run

    @cached_property
    def _of_evaluation(self) -> set[str]:
        """Settings that the evaluation has."""
        from monai.bundle import ConfigParser

        return set(ConfigParser.load_config_files(self._files("evaluate.json")))

    def _folder(self, arm: str, seed: int) -> Path:
        return self.output_dir / "runs" / arm / f"seed{seed}"

    def _run(self, arm: str, seed: int) -> Run:
        folder = self._folder(arm, seed)
        own = {"seed": seed, "output_dir": str(folder), "model_path": str(folder / "model.pt")}
        training = {**self.training, **own, "arm": arm, "resume": True, "allow_unknown": self.allow_unknown}
        if any(self.arms[arm].synthetic):
            training["synthetic"] = self.synthetic
        evaluation = {name: value for name, value in training.items() if _top(name) in self._of_evaluation} | own
        steps = [
            Step(["train.json", *self.overlays], training),
            Step(["evaluate.json", *self.overlays], evaluation),
        ]
        return Run(f"{arm}, seed {seed}", steps, folder / "metrics.json")

    def runs(self) -> dict[tuple[str, int], Run]:
        """All runs by arm and seed: a seed of every arm before the next, so that an early look compares arms."""
        return {(arm, seed): self._run(arm, seed) for seed in self.seeds for arm in self.arms}

    def run(self, shard: str | None = None) -> None:
        """Do what is missing, and write the report.

        Args:
            shard: "i/n" does the runs of one of n shares and writes no report; None does all that is left.

        Raises:
            UserError: results of other settings are there, or every run has failed.
            SystemExit: some runs have failed.
        """
        runs = self.runs()
        failed = run_all(list(runs.values()), self.bundle_root, shard)
        if parse_shard(shard) is None and len(failed) < len(runs):
            self.report({key: failed[run.name] for key, run in runs.items() if run.name in failed}).write(
                self.output_dir
            )
        end_study(failed, len(runs), shard)

    # ------------------------------------------------------------------ what is told

    def report(self, failed: Mapping[tuple[str, int], str]) -> AugmentationReport:
        """The report of the runs that are done.

        Args:
            failed: (arm, seed) -> why it has no predictions.

        Raises:
            UserError: predictions are missing, broken, or of other images.
        """
        arms, first = [], None
        for name, arm in self.arms.items():
            done = {}
            for seed in self.seeds:
                if (name, seed) in failed:
                    continue
                folder = self._folder(name, seed)
                validation = read_predictions(folder / "validation_predictions.csv", self.num_classes)
                first = first or (f"{name}, seed {seed}", validation)
                check_same_images(first[1], validation, (first[0], f"{name}, seed {seed}"))
                done[seed] = (
                    read_predictions(folder / "predictions.csv", self.num_classes),
                    self._threshold(validation),
                )
            why = {seed: failed[name, seed] for seed in self.seeds if (name, seed) in failed}
            arms.append(Arm(name, arm.real, arm.synthetic, done, why))
        steps, about = self._about(first[1])
        return AugmentationReport([*arms, *self.left_out], self.class_names, about, steps, **self.statistics)

    def _threshold(self, validation: Predictions) -> float | None:
        if self.threshold is not None:
            return self.threshold
        return pick_threshold(validation.probabilities, validation.labels)

    def _about(self, validation: Predictions) -> tuple[int, dict[str, str]]:
        """Steps of every training, and the head of the report."""
        from monai.bundle import ConfigParser

        parser = ConfigParser(ConfigParser.load_config_files(self._files("train.json")))
        parser.update(pairs={"bundle_root": str(self.bundle_root), **self.training})
        steps = int(parser.get_parsed_content("max_steps"))
        content = validate_datalist(self.training["datalist"])
        counts = Counter(item["label"] for item in self.real)
        rarest = min(range(self.num_classes), key=lambda k: counts[k])
        of_class = ", ".join(f"{name} {counts[k]:,}" for k, name in enumerate(self.class_names))
        patients = len({item["patient"] for item in self.real})
        about = {
            "dataset": f"{content.get('name') or 'without a name'}, modality {content.get('modality') or 'unknown'}",
            "real training images": f"{len(self.real):,} of {patients:,} patients ({of_class}); the rarest class is "
            f"{self.class_names[rarest]}",
            "to be found": self.class_names[1] if self.num_classes == 2 else "",
            "training": f"{_network(parser)}, {steps:,} steps of "
            f"{parser.get_parsed_content('batch_size')} images at "
            f"{parser.get_parsed_content('image_size')} pixels in every arm; the best weights by AUROC of the real "
            f"validation images; seeds {', '.join(map(str, self.seeds))}",
            "threshold": self._about_threshold(validation),
            "synthetic images": self._about_synthetic(),
            "caution": (synthetic_mismatch(self.real, self.pool) if self.pool else None) or "",
        }
        return steps, about

    def _about_threshold(self, validation: Predictions) -> str:
        if self.num_classes > 2:
            return "none: the likeliest class is decided for"
        if self.threshold is not None:
            return f"{self.threshold:g}, given"
        of_class = ", ".join(
            f"{name} {int((validation.labels == k).sum()):,}" for k, name in enumerate(self.class_names)
        )
        return (
            f"of each run the one with the largest Youden's J on the validation images ({of_class}), 0.5 where a class "
            "has fewer than 10"
        )

    def _about_synthetic(self) -> str:
        """Where they come from and whom their generators saw."""
        told = []
        for path in self.synthetic:
            content = validate_datalist(path)
            items = content.get("training") or [{}]
            model = items[0].get("model") or f"weights {str(items[0].get('model_sha256', 'unknown'))[:12]}"
            record = content.get("trained_on")
            saw = "of unknown patients"
            if record:
                images = record.get("images") or {}
                patients = sum(len(of_split) for of_split in record["patients"].values())
                saw = f"that saw {patients:,} patients of {record.get('dataset') or 'a data set'}" + (
                    f" ({', '.join(f'{count:,} {split} images' for split, count in images.items())})" if images else ""
                )
            told.append(f"{len(items):,} of a generator ({model}) {saw}")
        if not told:
            return "none"
        known = "; unknown patients were allowed" if self.allow_unknown else ""
        advantage = ": the arms with synthetic images have the advantage of them" if self.beyond else ""
        return (
            f"{'; '.join(told)}{known}; of those known none is in the test, and {self.beyond:,} are in no training or "
            f"validation split of the real images{advantage}"
        )


def _top(name: str) -> str:
    """The id at the head of a config that a setting such as ``network_def#init_features`` is part of."""
    return name.split("#")[0].split("::")[0]


def _network(parser: ConfigParser) -> str:
    definition = parser.get("network_def")
    return str(definition.get("model_name") or definition["_target_"]).rsplit(".", 1)[-1]
