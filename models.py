"""The model: a torchvision encoder, attention gates on its skips, a decoder; and the files that hold its weights."""

from __future__ import annotations

import math
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from utils import UserError, reason

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the photos that torchvision's weights were trained on, RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

# Where an encoder's `features` are cut: part i ends before the resolution halves for the (i + 1)-th time. The last
# 1x1 convolution of the mobile ones only widens for the classifier and is left away. The ResNets have no
# `features`; `cut_stages` cuts them by name. ConvNeXt starts with a stride of four, so its first part is empty.
FEATURE_CUTS = {
    "mobilenet_v2": (0, 2, 4, 7, 14, 18),
    "mobilenet_v3_large": (0, 2, 4, 7, 13, 16),
    "efficientnet_b0": (0, 2, 3, 4, 6, 8),
    "convnext_tiny": (0, 0, 2, 4, 6, 8),
}
RESNETS = ("resnet18", "resnet34", "resnet50")
ENCODERS = (*RESNETS, *FEATURE_CUTS)
DECODER_WIDTHS = (256, 128, 64, 32)  # channels of the decoder at strides 16, 8, 4, 2
HEAD_PREFIXES = ("classifier.", "fc.")  # the keys of torchvision's heads
MIN_IMAGE_SIZE = 32  # pixels: the encoder halves five times
MAX_IMAGE_SIZE = 4096  # of a square, in training and at prediction
FOREGROUND_PRIOR = 0.11  # of the pixels of COCO's photos with persons: alpha's probability before anything is learnt
GATE_BIAS_INIT = 3.0  # logit of an attention gate's weights, 0.95, before it has learnt what to hold back


class WeightsError(UserError):
    """Encoder weights that cannot be had; the message is one line for the user."""


class UNetAutoencoder(nn.Module):
    """A photo in, the person out: RGB and alpha.

    The colours are the input's, plus a correction that the decoder learns in logit space; what it has to find is
    the alpha.

    Args:
        encoder: one of `ENCODERS`.
        pretrained: start from torchvision's ImageNet weights, downloaded at the first use.
        use_attention: gate each skip by what the decoder has seen so far (Oktay et al. 2018).
        encoder_weights: a file of the encoder's weights in torchvision's keys, instead of the download.

    Raises:
        ValueError: no such encoder, or weights that pretrained=False would ignore.
        WeightsError: weights were asked for and cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: str = "resnet34",
        pretrained: bool = True,
        use_attention: bool = True,
        encoder_weights: str | Path | None = None,
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.encoder = Encoder(encoder, pretrained, encoder_weights)
        self.decoder = Decoder(self.encoder.channels, use_attention)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits, float32 (N, 4, H, W): their sigmoid is R, G, B and the probability of a person.

        `images` are RGB, float (N, 3, H, W) in [0, 1], with any H and W from 32 on, and computed in the model's own
        precision. Raises ValueError for another shape or dtype.
        """
        height, width = images.shape[-2:]
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected float images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(f"expected H and W of at least {MIN_IMAGE_SIZE}, got {(height, width)}")
        images = images.to(self.mean.dtype)
        padding = (0, -width % MIN_IMAGE_SIZE, 0, -height % MIN_IMAGE_SIZE)
        padded = F.pad(images, padding, mode="replicate") if any(padding) else images
        decoded = self.decoder(self.encoder((padded - self.mean) / self.std))
        correction, alpha = decoded[..., :height, :width].float().split((3, 1), dim=1)
        # Half a step of 8 bits away from 0 and 1, where the logit is infinite.
        colours = torch.logit(images.float(), eps=1 / 510) + correction
        return torch.cat([colours, alpha], dim=1)

    def predict(self, images: Tensor) -> Tensor:
        """Returns R, G, B and the alpha's probability (N, 4, H, W) of images (N, 3, H, W), all in [0, 1]."""
        return torch.sigmoid(self(images))


class Encoder(nn.Module):
    """A torchvision classifier without its head, cut where it halves the resolution."""

    def __init__(self, name: str, pretrained: bool, weights_file: str | Path | None = None):
        super().__init__()
        if weights_file and not pretrained:
            raise ValueError("encoder_weights were given and pretrained=False: one contradicts the other")
        if name not in ENCODERS:
            raise ValueError(f"no encoder named {name!r}; there are {', '.join(ENCODERS)}")
        network = torchvision.models.get_model(name, weights=None)
        if pretrained:
            state = read_weights(weights_file) if weights_file else download_weights(name)
            load_backbone(network, state, f"{weights_file or name}", name)
        self.stages: Any = nn.ModuleList(cut_stages(network, name))  # Sequentials
        self.eval()  # so that BatchNorm's averages do not take up the blank image
        with torch.no_grad():
            features = self(torch.zeros(1, 3, MIN_IMAGE_SIZE, MIN_IMAGE_SIZE))
        self.train()
        self.channels = tuple(0 if feature is None else feature.shape[1] for feature in features)  # at each stride

    def forward(self, images: Tensor) -> list[Tensor | None]:
        """Returns the features of normalised images (N, 3, H, W) at strides 2, 4, 8, 16, 32; None where it has none."""
        features: list[Tensor | None] = []
        for stage in self.stages:
            images = stage(images)
            features.append(images if len(stage) else None)
        return features


def cut_stages(network: Any, name: str) -> list[nn.Sequential]:
    """Returns the layers of a torchvision network in five stages, each of which halves the resolution."""
    if name in FEATURE_CUTS:
        return [network.features[start:end] for start, end in pairwise(FEATURE_CUTS[name])]
    stem = nn.Sequential(network.conv1, network.bn1, network.relu)
    first = nn.Sequential(network.maxpool, *network.layer1)
    return [stem, first, network.layer2, network.layer3, network.layer4]


def download_weights(name: str) -> dict[str, Tensor]:
    """Returns torchvision's default ImageNet weights of an encoder, from its cache folder or the network."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return torch.hub.load_state_dict_from_url(weights.url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # the network's, or whatever a damaged file makes the reader raise
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        if cached.exists():
            raise WeightsError(f"the cached weights {cached} are damaged: delete that file and start again") from None
        raise WeightsError(
            f"the ImageNet weights of {name} cannot be downloaded from {weights.url} ({reason(error)}): connect this "
            "machine to the network, or give a file with --encoder-weights FILE, or start from random weights with "
            "--no-pretrained"
        ) from None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Returns a file's weights, opened as data only: nothing in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"--encoder-weights: there is no file {path}") from None
    except Exception as error:  # whatever a file that is something else makes the reader raise
        raise WeightsError(f"--encoder-weights: {path} is damaged or no weights ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(f"--encoder-weights: {path} holds no dictionary of tensors (a state_dict)")
    return state


def load_backbone(network: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    """Loads a torchvision network's weights; its classifier's, and the counters old files lack, may be absent."""
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    backbone = {key for key in wanted if not key.startswith(HEAD_PREFIXES) and not key.endswith("num_batches_tracked")}
    fitting = {key: value for key, value in state.items() if wanted.get(key) == value.shape}
    unexpected_keys = [key for key in state if key not in fitting and not key.startswith(HEAD_PREFIXES)]
    if unexpected_keys or not backbone <= fitting.keys():
        raise WeightsError(
            f"the weights {source} are not those of {name}: {len(backbone & fitting.keys())} of its "
            f"{len(backbone)} tensors are there, {len(unexpected_keys)} others are not its own"
        )
    network.load_state_dict(fitting, strict=False)


class Decoder(nn.Module):
    """Goes from the encoder's deepest feature back to full resolution, one skip at a time."""

    def __init__(self, channels: tuple[int, ...], use_attention: bool):
        super().__init__()
        *skips, deepest = channels
        inputs = (deepest, *DECODER_WIDTHS[:-1])
        self.blocks = nn.ModuleList(
            DecoderBlock(below, skip, width, use_attention)
            for below, skip, width in zip(inputs, reversed(skips), DECODER_WIDTHS, strict=True)
        )
        self.head = PixelShuffleHead(DECODER_WIDTHS[-1], 4)

    def forward(self, features: list[Tensor | None]) -> Tensor:
        """Returns (N, 4, H, W) from the features at strides 2 to 32."""
        *skips, decoded = features
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            decoded = block(decoded, skip)
        return self.head(decoded)


class DecoderBlock(nn.Module):
    """Doubles the resolution and takes in the skip of that resolution, if the encoder has one."""

    def __init__(self, below: int, skip: int, width: int, use_attention: bool):
        super().__init__()
        self.gate = AttentionGate(skip, below) if skip and use_attention else None
        # Narrowed before it is enlarged: the same linear map for a quarter of the work.
        self.narrow = nn.Conv2d(below, width, 1, bias=False)
        self.fuse = conv_bn_relu(width + skip, width)
        self.refine = conv_bn_relu(width, width)

    def forward(self, below: Tensor, skip: Tensor | None) -> Tensor:
        """Returns (N, width, 2H, 2W) from (N, below, H, W) and a skip (N, skip, 2H, 2W) or None."""
        enlarged = enlarge(self.narrow(below))
        if skip is not None:
            gated = skip if self.gate is None else self.gate(skip, below)
            enlarged = torch.cat([enlarged, gated], dim=1)
        return self.refine(self.fuse(enlarged))


class AttentionGate(nn.Module):
    """Additive attention (Oktay et al. 2018, "Attention U-Net", eq. 1 and 2).

    The coarser decoder feature says where the skip matters: weights in (0, 1) per pixel, found on the coarser
    grid and enlarged bilinearly, as in the paper.
    """

    def __init__(self, skip: int, gating: int):
        super().__init__()
        inner = max(skip // 2, 8)
        self.theta = nn.Conv2d(skip, inner, 2, stride=2, bias=False)
        self.phi = nn.Conv2d(gating, inner, 1)
        self.psi = nn.Conv2d(inner, 1, 1)
        nn.init.constant_(self.psi.get_parameter("bias"), GATE_BIAS_INIT)  # else each skip would begin at half strength

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        """Returns a skip (N, skip, 2H, 2W) weighted by a decoder feature (N, gating, H, W)."""
        attention = torch.sigmoid(self.psi(F.relu(self.theta(skip) + self.phi(gating))))
        return skip * enlarge(attention)


class PixelShuffleHead(nn.Module):
    """Doubles the resolution by a sub-pixel convolution (Shi et al. 2016): full resolution at half its cost."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * out_channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        bias = nn.init.zeros_(self.conv.get_parameter("bias"))
        with torch.no_grad():  # the four pixels of a cell start alike (Aitken et al. 2017): no checkerboard
            self.conv.weight.copy_(self.conv.weight[::4].repeat_interleave(4, dim=0))
            self.conv.weight[: 4 * (out_channels - 1)] = 0  # colours start as the photo's own
            bias[-4:] = math.log(FOREGROUND_PRIOR / (1 - FOREGROUND_PRIOR))

    def forward(self, features: Tensor) -> Tensor:
        """Returns (N, out_channels, 2H, 2W) from (N, width, H, W)."""
        return self.shuffle(self.conv(features))


def enlarge(features: Tensor) -> Tensor:
    """Enlarges features (N, C, H, W) to (N, C, 2H, 2W), bilinearly, in their own precision."""
    # On CUDA autocast computes it in float32, which all that is put together with it would take over.
    return F.interpolate(features, scale_factor=2, mode="bilinear").to(features.dtype)


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written."""


def read_checkpoint(path: str | Path) -> dict:
    """Reads a checkpoint to the CPU, as data only: nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load itself takes flipped bits for weights
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}: trainer.py makes one, or name another") from None
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        raise CheckpointError(f"the checkpoint {path} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"model", "config", "epoch"} <= content.keys() \
            or not isinstance(content["config"], dict):  # fmt: skip
        raise CheckpointError(f"{path} is not a checkpoint of this program: it holds no model, config and epoch")
    content["config"].setdefault("bars", "black")  # what older versions knew alone
    return content


def model_weights(content: dict) -> dict[str, Tensor]:
    """Returns the weights that a checkpoint's model was validated with: their EMA, where it holds both."""
    ema = content.get("ema") or content.get("average")  # its name before version 0.9
    return ema["model"] if ema else content["model"]
