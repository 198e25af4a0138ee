"""Autoencoders and diffusion networks of monai-generative, and of MONAI, under the names of MONAI core.

The two packages hold the same numbers under other names, with one trap: the attention blocks of monai-generative have a
``proj_attn`` that their ``forward`` never uses, and MONAI's ``load_old_state_dict`` puts it to use
(GenerativeModels#503). It is dropped here, and the network built without that layer (``include_fc=False``). What
neither the shapes nor the file tell, the width of the attention heads and the groups of the normalisations, is taken as
known for the networks of Pinaya et al.'s chest radiographs and has to be named for all others: a wrong guess would load
without a word and give other images.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.networks.nets import DiffusionModelUNet

from medgen.convert.restricted import OneLineErrors, Record, StoredTensor, module_state_dict, read_records
from medgen.errors import UserError
from medgen.networks import KLAutoencoder
from medgen.weights import check_same_shapes

__all__ = [
    "ConvertedNetwork",
    "convert_latent_diffusion",
    "convert_state_dict",
    "drop_rearrangements",
    "is_converted_autoencoder",
    "is_latent_diffusion",
    "names_of",
]

# What a pickled module or a checkpoint names beside tensors; all of it becomes inert records, nothing is imported.
PACKAGES = ("generative", "monai", "torch", "numpy", "_codecs", "einops")
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DataParallel, of torch.compile and of modules around a network
SCALE_FACTOR = "scale_factor"  # the latents' factor, where a checkpoint has it
MLFLOW_WEIGHTS = Path("data") / "model.pth"

_ATTENTION = r"(?:down|up)_blocks\.\d+\.attentions\.\d+|middle_block\.attention|(?:en|de)coder\.blocks\.\d+"
_RENAMED = (
    (re.compile(rf"^({_ATTENTION})\.to_([qkv])\."), r"\1.attn.to_\2."),
    (re.compile(r"^(.+\.transformer_blocks\.\d+\.attn[12])\.to_out\.0\."), r"\1.out_proj."),
    (re.compile(r"^(up_blocks\.\d+\.upsampler|decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
)
_UNUSED = re.compile(rf"^(?:{_ATTENTION})\.proj_attn\.(?:weight|bias)$")

# The networks whose head width and groups are known: those of the source, and of the model zoo's bundle with them.
SOURCE_AUTOENCODER = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_res_blocks": [2, 2, 2, 2],
    "channels": [64, 128, 128, 128],
    "attention_levels": [False] * 4,
    "latent_channels": 3,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
SOURCE_DIFFUSION = {
    "spatial_dims": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": [2, 2, 2],
    "channels": [256, 512, 768],
    "attention_levels": [False, True, True],
    "resblock_updown": False,
    "with_conditioning": True,
    "cross_attention_dim": 1024,
    "transformer_num_layers": 1,
    "num_class_embeds": None,
}
SOURCE_HEADS = [0, 512, 768]
SOURCE_GROUPS = 32
SOURCE_SCALE = 0.3  # of the latents, 1 / standard deviation
SOURCE_TRAINING = {
    "null_caption": "eos",  # the end token in all 76 places after the first, where the tokenizer would pad with 0
    "noise_scheduler": "DDPMScheduler",
    "prediction_type": "v_prediction",
    "beta_start": 0.0015,
    "beta_end": 0.0205,
    "num_train_timesteps": 1000,
}


class ConvertedNetwork(NamedTuple):
    """A network out of a foreign file.

    Attributes:
        network: ``KLAutoencoder`` or ``DiffusionModelUNet``.
        settings: keyword arguments to build it with.
        overlay: the same as ids of the bundle ``cxr_latent_diffusion``, those that differ from its definitions alone.
        state: its state dict, float32, under the names of MONAI core.
        scale_factor: what the checkpoint says that latents were multiplied by; None: it says nothing.
    """

    network: type[KLAutoencoder | DiffusionModelUNet]
    settings: dict[str, Any]
    overlay: dict[str, Any]
    state: dict[str, torch.Tensor]
    scale_factor: float | None = None

    @property
    def is_source(self) -> bool:
        """Whether it is built like the source's own network, and so taken to be trained like it."""
        return _is_source(self.settings)

    @property
    def trained_as(self) -> dict[str, Any]:
        """What is known of a diffusion network's training, as :func:`medgen.handlers.check_trained_as` compares it."""
        classes = self.settings["num_class_embeds"]
        known = {
            "conditioning": self.overlay["conditioning"],
            "num_classes": classes - 1 if classes else 0,
            "num_head_channels": self.settings["num_head_channels"],
            "norm_num_groups": self.settings["norm_num_groups"],
        }
        return known | (SOURCE_TRAINING if self.is_source else {})

    @property
    def is_autoencoder(self) -> bool:
        return self.network is KLAutoencoder


class _Told(NamedTuple):
    """What a file tells beside its weights: a module saved whole its attributes, a state dict nothing."""

    heads: list[int] | None = None
    groups: int | None = None
    eps: float = 1e-6  # the default of both packages, which their networks hardly ever change


# ---------------------------------------------------------------------------------------------------------------------
# finding the network in the file


def _file_of(source: str | os.PathLike[str]) -> Path:
    """The torch file of what may be a folder that MLflow logged."""
    path = Path(source)
    if not path.is_dir():
        return path
    if not (path / MLFLOW_WEIGHTS).is_file():
        raise UserError(
            f"a folder must be a model that MLflow logged, with {MLFLOW_WEIGHTS} in it, got {path}; name the folder "
            "final_model of a run's artifacts, or a .pth file"
        )
    return path / MLFLOW_WEIGHTS


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def drop_rearrangements(content: Any) -> None:
    """Take einops's layers out of modules: they have no weights, and no tables that say so, as other layers do."""
    pending = [content, *(content.values() if isinstance(content, Mapping) else ())]
    seen: set[int] = set()
    while pending:
        module = pending.pop()
        state = module.state if isinstance(module, Record) else None
        children = state.get("_modules") if isinstance(state, dict) else None
        if id(module) in seen or not isinstance(children, dict):
            continue
        seen.add(id(module))
        for name, child in list(children.items()):
            if isinstance(child, Record) and child.type_name.startswith("einops.layers."):
                del children[name]
        pending += children.values()


def _scale_factor(path: Path, *parts: Any) -> float | None:
    """The factor of the latents that stands in a checkpoint or beside the weights."""
    for part in parts:
        found = part.get(SCALE_FACTOR) if isinstance(part, Mapping) else None
        if found is None:
            continue
        if isinstance(found, StoredTensor):
            found = found.read()
            found = found.item() if found.numel() == 1 else math.nan
        if type(found) not in (int, float) or not (found > 0 and math.isfinite(found)):
            raise UserError(f"{SCALE_FACTOR} in {path} must be one number above 0, got something else; remove it")
        return float(found)
    return None


def _kind(names: Iterator[str]) -> type[KLAutoencoder | DiffusionModelUNet] | None:
    """Class of the network that has parameters of these names."""
    found = set(names)
    if "quant_conv_mu.conv.weight" in found:
        return KLAutoencoder
    return DiffusionModelUNet if {"conv_in.conv.weight", "time_embed.0.weight"} <= found else None


def names_of(content: Any) -> list[str]:
    """Names of the tensors of a state dict, or of a module's own and its children's; none for anything else."""
    if isinstance(content, Record):
        is_module = isinstance(content.state, dict) and "_modules" in content.state
        return list(module_state_dict(content)) if is_module else []
    if isinstance(content, Mapping) and content and all(isinstance(value, StoredTensor) for value in content.values()):
        return [str(name) for name in content]
    return []


def _network_of(path: Path, content: Any, key: str | None) -> Any:
    """The state dict or the module of the one network that a file holds."""
    parts = {"": content} if names_of(content) else dict(content) if isinstance(content, Mapping) else {}
    networks = {str(name): part for name, part in parts.items() if _kind(map(_unwrapped, names_of(part)))}
    if key is not None:
        if key not in networks:
            raise UserError(f"expected a network {key} in {path}, got {', '.join(networks) or 'none'}; set --network")
        return networks[key]
    if len(networks) != 1:
        found = ", ".join(networks) or ", ".join(map(_shown, list(parts.items())[:6])) or type(content).__name__
        todo = "name one with --network" if networks else "name a file with the weights of one"
        raise UserError(
            f"expected one AutoencoderKL or DiffusionModelUNet in {path}, got {len(networks)} ({found[:200]}); {todo}"
        )
    return next(iter(networks.values()))


def _shown(part: tuple[Any, Any]) -> str:
    """A part of a checkpoint for a message, with what its first tensors are called."""
    name, content = part
    tensors = names_of(content)
    return f"{name} with {', '.join(map(_unwrapped, tensors[:2]))} ..." if tensors else str(name)


def _modules(module: Record) -> Iterator[Record]:
    yield module
    for child in module.state["_modules"].values():
        if child is not None:
            yield from _modules(child)


def _told(path: Path, content: Any) -> _Told:
    """The attributes that decide what a network computes and leave no trace in its shapes."""
    if not isinstance(content, Record):
        return _Told()
    modules = list(_modules(content))  # module_state_dict has seen that they are well formed and end
    if any("ConvTranspose" in module.type_name for module in modules):
        raise UserError(f"{path} up-samples by transposed convolutions, which MONAI core does with others; not read")
    norms = {
        (module.state.get("num_groups"), module.state.get("eps"))
        for module in modules
        if module.type_name.endswith(".GroupNorm")
    }
    if len(norms) != 1:
        raise UserError(f"{path} must have the same groups in all normalisations, got {len(norms)} kinds; not read")
    groups, eps = norms.pop()
    while content.type_name.endswith("Parallel"):
        content = content.state["_modules"]["module"]
    heads = content.state.get("num_head_channels")
    heads = [heads] if type(heads) is int else heads
    if type(groups) is not int or type(eps) is not float or not all(type(n) is int for n in heads or ()):
        raise UserError(f"{path} has a normalisation or attention heads that are no numbers; not read")
    return _Told(None if heads is None else list(heads), groups, eps)


# ---------------------------------------------------------------------------------------------------------------------
# settings from names and shapes, under the names of MONAI core


def _renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for original, value in state.items():
        name = _unwrapped(original)
        if _UNUSED.match(name) or name == SCALE_FACTOR:
            continue
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if name in renamed:
            raise UserError(f"expected one network, got two tensors for {name}, one of them {original}; split the file")
        renamed[name] = value
    return renamed


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many modules ``prefix.N`` there are."""
    return len({match[1] for name in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})


def _attention_settings(state: Mapping[str, torch.Tensor]) -> dict[str, bool]:
    """Which of the layers that MONAI core makes optional the self-attention has; nothing without attention."""
    parts = {match[1] for name in state if (match := re.search(r"\.attn1?\.(\w+)\.weight$", name))}
    return {"include_fc": "out_proj" in parts, "use_combined_linear": "qkv" in parts} if parts else {}


def _autoencoder_settings(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    def kind(prefix: str) -> str:
        parts = {"norm1": "residual", "norm": "attention", "conv.conv": "sample", "postconv.conv": "sample"}
        return next((found for part, found in parts.items() if f"{prefix}.{part}.weight" in state), "plain")

    blocks = [kind(f"encoder.blocks.{index}") for index in range(_count(state, "encoder.blocks"))]
    stem = [kind(f"decoder.blocks.{index}") for index in range(1, 5)]
    body = blocks[1:-2]  # between the first convolution, and the last with the normalisation before it
    # attention on a level follows each of its residual blocks: a residual block after an attention ends the non-local
    encoder_nonlocal = body[-3:] == ["residual", "attention", "residual"]
    decoder_nonlocal = stem == ["residual", "attention", "residual", "residual"]
    body = body[:-3] if encoder_nonlocal else body
    levels: list[list[int]] = [[]]
    for index, block in enumerate(body, start=1):
        if block == "sample":
            levels.append([])
        else:
            levels[-1].append(index)
    first = state["encoder.blocks.0.conv.weight"]
    last = state[f"decoder.blocks.{_count(state, 'decoder.blocks') - 1}.conv.weight"]
    return {
        "spatial_dims": first.ndim - 2,
        "in_channels": first.shape[1],
        "out_channels": last.shape[0],
        "num_res_blocks": [sum(blocks[index] == "residual" for index in level) for level in levels],
        "channels": [state[f"encoder.blocks.{level[0]}.conv2.conv.weight"].shape[0] for level in levels],
        "attention_levels": [any(blocks[index] == "attention" for index in level) for level in levels],
        "latent_channels": state["quant_conv_mu.conv.weight"].shape[0],
        "with_encoder_nonlocal_attn": encoder_nonlocal,
        "with_decoder_nonlocal_attn": decoder_nonlocal,
        **_attention_settings(state),
    }


def _diffusion_settings(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    levels = [f"down_blocks.{index}" for index in range(_count(state, "down_blocks"))]
    stem, last = state["conv_in.conv.weight"], state["out.2.conv.weight"]
    context = state.get("middle_block.attention.transformer_blocks.0.attn2.to_k.weight")
    classes = state.get("class_embedding.weight")
    return {
        "spatial_dims": stem.ndim - 2,
        "in_channels": stem.shape[1],
        "out_channels": last.shape[0],
        "num_res_blocks": [_count(state, f"{level}.resnets") for level in levels],
        "channels": [state[f"{level}.resnets.0.conv1.conv.weight"].shape[0] for level in levels],
        "attention_levels": [_count(state, f"{level}.attentions") > 0 for level in levels],
        "resblock_updown": "down_blocks.0.downsampler.norm1.weight" in state,
        "with_conditioning": context is not None,
        "cross_attention_dim": None if context is None else context.shape[1],
        "transformer_num_layers": max(_count(state, "middle_block.attention.transformer_blocks"), 1),
        "num_class_embeds": None if classes is None else classes.shape[0],
        **_attention_settings(state),
    }


def _heads(source: str, settings: Mapping[str, Any], heads: Sequence[int] | None) -> list[int]:
    """Width of the attention heads of each level; 0 where there are none."""
    channels = settings["channels"]
    heads = SOURCE_HEADS if heads is None and _is_source(settings) else heads
    if heads is None:
        raise UserError(
            f"the weights of {source} do not tell how wide its attention heads are; name the num_head_channels that it "
            "was built with, such as --num_head_channels 64, or one number for each level"
        )
    heads = list(heads) * len(channels) if len(heads) == 1 else list(heads)
    # the block in the middle has attention of the last level's width, whether that level has any or not
    present = [*settings["attention_levels"][:-1], True]
    fitting = len(heads) == len(channels) and all(
        width > 0 and n % width == 0 for width, n, there in zip(heads, channels, present, strict=True) if there
    )
    if not fitting:
        raise UserError(
            f"num_head_channels must divide the channels {channels} of levels with attention, one number for each "
            f"level, got {heads}; set --num_head_channels"
        )
    return [width if there else 0 for width, there in zip(heads, present, strict=True)]


def _groups(source: str, settings: Mapping[str, Any], groups: int | None) -> int:
    groups = SOURCE_GROUPS if groups is None and _is_source(settings) else groups
    if groups is None:
        raise UserError(
            f"the weights of {source} do not tell how many groups its normalisations have; name the norm_num_groups "
            "that it was built with, such as --norm_num_groups 32, the default of monai-generative"
        )
    if groups < 1 or any(n % groups for n in settings["channels"]):
        raise UserError(
            f"norm_num_groups must divide the channels {settings['channels']}, got {groups}; set --norm_num_groups"
        )
    return groups


def _is_source(settings: Mapping[str, Any]) -> bool:
    source = SOURCE_AUTOENCODER if "latent_channels" in settings else SOURCE_DIFFUSION
    return all(settings[name] == value for name, value in source.items())


def _overlay(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as ids of the bundle; what it has no id for goes into the definition itself."""
    blocks = settings["num_res_blocks"]
    blocks = blocks[0] if len(set(blocks)) == 1 else blocks
    if "latent_channels" in settings:
        definition = "autoencoder_def"
        overlay = {
            "in_channels": settings["in_channels"],
            "autoencoder_channels": settings["channels"],
            "autoencoder_res_blocks": blocks,
            "latent_channels": settings["latent_channels"],
        }
        usual = {
            "out_channels": settings["in_channels"],
            "attention_levels": [False] * len(settings["channels"]),
            "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False,
        }
    else:
        definition = "network_def"
        text, classes = settings["with_conditioning"], settings["num_class_embeds"]
        overlay = {
            "latent_channels": settings["in_channels"],
            "channels": settings["channels"],
            "num_res_blocks": blocks,
            "attention_levels": settings["attention_levels"],
            "num_head_channels": settings["num_head_channels"],
            "conditioning": "text" if text else "label" if classes else "none",
        }
        overlay |= {"context_dim": settings["cross_attention_dim"]} if text else {}
        overlay |= {"num_classes": classes - 1} if classes else {}
        overlay |= {"null_caption": SOURCE_TRAINING["null_caption"]} if _is_source(settings) else {}
        usual = {"out_channels": settings["in_channels"], "resblock_updown": False, "transformer_num_layers": 1}
    usual |= {"spatial_dims": 2, "norm_eps": 1e-6, "norm_num_groups": SOURCE_GROUPS}
    usual |= {"include_fc": True, "use_combined_linear": False}
    unusual = {name: settings[name] for name, value in usual.items() if settings.get(name, value) != value}
    return overlay | {f"{definition}#{name}": value for name, value in unusual.items()}


# ---------------------------------------------------------------------------------------------------------------------


def convert_state_dict(
    source: str,
    state: Mapping[str, torch.Tensor],
    num_head_channels: Sequence[int] | None = None,
    norm_num_groups: int | None = None,
    norm_eps: float = 1e-6,
) -> ConvertedNetwork:
    """An AutoencoderKL or a DiffusionModelUNet of monai-generative or MONAI as MONAI core builds it.

    Args:
        source: where it comes from, for messages.
        state: its state dict.
        num_head_channels: width of the attention heads of a diffusion network, one for all levels or one for each;
            None: it is the source's.
        norm_num_groups: groups of the normalisations; None: it is the source's.
        norm_eps: of the normalisations.

    Returns:
        its class, settings, overlay and weights.

    Raises:
        UserError: another architecture, or a setting that the weights do not tell.
    """
    state = _renamed(state)
    network = _kind(iter(state))
    if network is None:
        raise UserError(f"expected an AutoencoderKL or a DiffusionModelUNet, got {source}; such a network is not read")
    if network is KLAutoencoder:
        settings = _autoencoder_settings(state)
        if num_head_channels is not None:
            raise UserError(f"{source} is an autoencoder, with one head everywhere; leave out --num_head_channels")
    else:
        settings = _diffusion_settings(state)
        if settings["with_conditioning"] and settings["num_class_embeds"]:
            raise UserError(f"{source} must have a context or classes, got a network with both; such are not read")
        settings["num_head_channels"] = _heads(source, settings, num_head_channels)
    settings["norm_num_groups"] = _groups(source, settings, norm_num_groups)
    settings["norm_eps"] = norm_eps
    with torch.device("meta"):  # shapes without numbers: what a file asks for is not allocated before it fits
        expected = network(**settings).state_dict()
    check_same_shapes(source, expected, state)
    state = {name: state[name].detach().to(torch.float32, copy=True) for name in expected}
    return ConvertedNetwork(network, settings, _overlay(settings), state)


def is_latent_diffusion(names: Iterable[str]) -> bool:
    """Whether parameters of these names are those of an AutoencoderKL or a DiffusionModelUNet."""
    return _kind(map(_unwrapped, names)) is not None


def is_converted_autoencoder(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a state dict is that of an autoencoder under the names of MONAI core."""
    return _kind(iter(state)) is KLAutoencoder and _renamed(state).keys() == state.keys()


def convert_latent_diffusion(
    source: str | os.PathLike[str],
    network: str | None = None,
    num_head_channels: Sequence[int] | None = None,
    norm_num_groups: int | None = None,
) -> ConvertedNetwork:
    """The AutoencoderKL or DiffusionModelUNet of a file as MONAI core builds it.

    Nothing in the file is executed. A class-conditional network becomes one whose last class stands for no class, as
    in the bundle; ``norm_eps`` of a state dict is taken to be 1e-6, and its up-sampling not to be transposed.

    Args:
        source: state dict, checkpoint that holds one, or module saved whole (``.pth``), of monai-generative or MONAI;
            or the folder of a model that MLflow logged.
        network: key of the network in a checkpoint that holds several.
        num_head_channels: width of the attention heads, one for all levels or one for each, as the network was built;
            None: as a module saved whole tells, or as the source has it if the network is the source's.
        norm_num_groups: groups of the normalisations; None: in the same way.

    Returns:
        its class, settings, overlay and weights.

    Raises:
        UserError: no such file, no or several networks in it, another architecture, or a setting that neither the file
            nor the caller tells.
    """
    path = _file_of(source)
    with OneLineErrors(path, "AutoencoderKL or DiffusionModelUNet of monai-generative or MONAI"):
        whole = read_records(path, PACKAGES)
        drop_rearrangements(whole)
        content = _network_of(path, whole, network)
        scale_factor = _scale_factor(path, whole, content)
        state = module_state_dict(content)
        told = _told(path, content)
        for name, given, found in (
            ("num_head_channels", num_head_channels, told.heads),
            ("norm_num_groups", norm_num_groups, told.groups),
        ):
            if given is not None and found is not None and given != found:
                raise UserError(f"{path} was built with {name} {found}, got {given}; leave out --{name}")
        heads = num_head_channels if told.heads is None else told.heads
        groups = norm_num_groups if told.groups is None else told.groups
        return convert_state_dict(str(path), state, heads, groups, told.eps)._replace(scale_factor=scale_factor)
