"""The service of a bundle, as its ``configs/serve.json`` describes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from medgen.bundle_config import build_network
from medgen.errors import UserError, find_user_error
from medgen.serving.service import Service
from medgen.serving.tensors import TensorFormat, TensorService
from medgen.settings import check_device, keep_freed_memory
from medgen.weights import load_weights

__all__ = ["SERVE", "load_service"]

SERVE = "serve.json"


def load_service(bundle: str | Path, device: str | torch.device | None = None) -> Service | TensorService:
    """Build a bundle's service and load its weights.

    The config's ids ``network`` and ``service`` are what is used of it, and ``initialize``, which is run between them,
    with the weights loaded. A config is code: its expressions run.

    Args:
        bundle: folder of the bundle.
        device: to compute on; None: CUDA where there is one.

    Returns:
        The service; of a bundle without ``configs/serve.json`` one that runs ``network_def`` on tensors.

    Raises:
        UserError: something is missing, or does not fit.
    """
    bundle = Path(bundle)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_device(device)
    if not (bundle / "configs" / SERVE).is_file():
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
        form = TensorFormat.from_metadata(metadata, "inputs")
        network = build_network(bundle)
        _load_weights(network, bundle / "models" / "model.pt")
        return TensorService(network.to(device).eval(), form)
    # here, because MONAI takes ten seconds that a wrong device should not have to wait for
    from monai.bundle import ConfigParser

    try:
        parser = ConfigParser(json.loads((bundle / "configs" / SERVE).read_text(encoding="utf-8")))
        parser["bundle_root"] = str(bundle)
        parser["device"] = str(device)
        network = parser.get_parsed_content("network")
        _load_weights(network, Path(parser.get_parsed_content("model_path")))
        network.eval().requires_grad_(False)
        parser.get_parsed_content("initialize")
        service = parser.get_parsed_content("service")
    # whatever a config's code raises
    except Exception as error:
        said = find_user_error(error)
        if said is None:
            reason = str(error.__cause__ or error).strip().splitlines() or [""]
            said = f"configs/{SERVE} of {bundle.name} cannot be served ({type(error).__name__}: {reason[0]}); mend it"
        raise UserError(said) from error
    if not isinstance(service, Service):
        raise UserError(f"service in configs/{SERVE} must be a medgen.serving.Service, got {type(service).__name__}")
    keep_freed_memory(device)
    return service


def _load_weights(network: torch.nn.Module, path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no weights at {path}; train the bundle first")
    load_weights(network, path, f"models/{path.name}")
