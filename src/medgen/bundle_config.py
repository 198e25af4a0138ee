"""Networks as a bundle's configs describe them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from medgen.errors import UserError

__all__ = ["build_network"]


def build_network(
    bundle: str | Path,
    name: str = "network_def",
    config: str = "inference.json",
    overlays: Sequence[str | Path] = (),
) -> nn.Module:
    """The network in ``network_def`` of a bundle's ``configs/inference.json``, on the CPU and without weights.

    A config is code: its expressions run.

    Args:
        bundle: folder of the bundle.
        name: id of the network.
        config: file in ``configs`` that has it.
        overlays: JSON files that are laid over it, as ``monai.bundle run`` does with several config files. What they
            set within ids that the config lacks, as those for a training may, is left out.

    Raises:
        UserError: there is no network, or it cannot be built.
    """
    # here, because MONAI takes ten seconds that a wrong option should not have to wait for
    from monai.bundle import ConfigParser
    from monai.bundle.utils import merge_kv

    path = Path(bundle) / "configs" / config
    shown = " with ".join(map(str, [path.relative_to(Path(bundle).parent), *overlays]))
    try:
        parser = ConfigParser(json.loads(path.read_text(encoding="utf-8")))
        for overlay in overlays:
            for key, value in json.loads(Path(overlay).read_text(encoding="utf-8")).items():
                top, *within = re.split("#|::", key.removeprefix("+"))
                if not within or top in parser:
                    merge_kv(parser, key, value)
        parser["bundle_root"] = str(bundle)
        network = parser.get_parsed_content(name)
    # whatever a config's code raises
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [""]
        raise UserError(
            f"{name} in {shown} cannot be built ({type(error).__name__}: {reason[0]}); see that "
            "`python -m monai.bundle run` works with it"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} in {shown} must be a torch.nn.Module, got {type(network).__name__}")
    return network
