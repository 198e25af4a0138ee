"""LPIPS from a local weights file: nothing is downloaded."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from medgen.errors import UserError

__all__ = ["LocalLPIPS"]

# backbone -> file name in torch's hub cache, and where torchvision takes it from
BACKBONES = {
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", "squeezenet1_1"),
    "alex": ("alexnet-owt-7be5be79.pth", "alexnet"),
    "vgg": ("vgg16-397923af.pth", "vgg16"),
}


class LocalLPIPS(nn.Module):
    """Learned perceptual image patch similarity with a backbone read from a local file.

    Zhang et al. 2018, arXiv 1801.03924. The linear heads come with the ``lpips`` package; the ImageNet backbone is
    torchvision's. MONAI's :class:`~monai.losses.PerceptualLoss` fetches that backbone from the network when it is
    built, with ``pretrained=False`` too: hence this class.

    Args:
        network_type: ``"squeeze"``, ``"alex"`` or ``"vgg"``.
        weights: state dict of torchvision's network of that name. Default: torch's own cache,
            ``$TORCH_HOME/hub/checkpoints``.
        rescale: map [0, 1] to the [-1, 1] that LPIPS was trained on. False feeds [0, 1] as it is, as the latent
            diffusion model for chest radiographs did; its weight of 0.002 belongs to that.

    Raises:
        UserError: unknown network type; weights missing, or of another network.
    """

    def __init__(self, network_type: str = "squeeze", weights: str | Path | None = None, rescale: bool = False) -> None:
        super().__init__()
        if network_type not in BACKBONES:
            raise UserError(f"perceptual network_type must be one of {', '.join(BACKBONES)}, got {network_type!r}")
        # torchvision refuses to load beside a torch of another release: only those who use this loss need it
        import lpips

        file_name, torchvision_name = BACKBONES[network_type]
        path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / file_name
        if not path.is_file():
            raise UserError(
                f"perceptual loss needs the weights of torchvision's {torchvision_name}, no file at {path}; "
                f"copy {file_name} from https://download.pytorch.org/models/{file_name} there, name your copy with "
                "--perceptual_weights FILE, or train without this term with --perceptual_weight 0"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips still calls torchvision's old `pretrained` argument
            self.lpips = lpips.LPIPS(net=network_type, pnet_rand=True, verbose=False)
        self._load_backbone(path, torchvision_name)
        self.rescale = rescale
        self.eval().requires_grad_(False)

    def _load_backbone(self, path: Path, torchvision_name: str) -> None:
        wanted = self.lpips.net.state_dict()  # slice{k}.{i}.{...}, i counting torchvision's `features`
        try:
            given = torch.load(path, map_location="cpu", weights_only=True)
            self.lpips.net.load_state_dict({name: given[f"features.{name.split('.', 1)[1]}"] for name in wanted})
        except Exception as error:
            raise UserError(
                f"{path} does not hold the weights of torchvision's {torchvision_name} "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); name another file with --perceptual_weights"
            ) from error

    def train(self, mode: bool = True) -> LocalLPIPS:
        """Stay in evaluation mode: the heads hold dropout, and this network is a ruler, not a student."""
        return super().train(False)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean distance of two batches of images (B, 1 or 3, H, W) in [0, 1]; one channel stands for all three."""
        if input.shape[1] == 1:
            input, target = input.expand(-1, 3, -1, -1), target.expand(-1, 3, -1, -1)
        return self.lpips(input, target, normalize=self.rescale).mean()
