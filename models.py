"""The model: a torchvision encoder, attention gates on its skips, a decoder back to full resolution."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from utils import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the photos that torchvision's weights were trained on, RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

# Where an encoder's `features` are cut: part i ends before the resolution halves for the (i + 1)-th time. The last
# 1x1 convolution of the mobile ones only widens for the classifier and is left away. The ResNets have no
# `features`; `_resnet_stages` cuts them by name. ConvNeXt starts with a stride of four, so its first part is empty.
FEATURE_CUTS = {
    "mobilenet_v2": (0, 2, 4, 7, 14, 18),
    "mobilenet_v3_large": (0, 2, 4, 7, 13, 16),
    "efficientnet_b0": (0, 2, 3, 4, 6, 8),
    "convnext_tiny": (0, 0, 2, 4, 6, 8),
}
RESNETS = ("resnet18", "resnet34", "resnet50")
ENCODERS = (*RESNETS, *FEATURE_CUTS)
DECODER_WIDTHS = (256, 128, 64, 32)  # channels of the decoder at strides 16, 8, 4, 2
CLASSIFIERS = ("classifier.", "fc.")  # the keys of torchvision's heads
SMALLEST_INPUT = 32  # pixels: the encoder halves five times
LARGEST_INPUT = 4096  # of a square, in training and at prediction
PERSON_SHARE = 0.11  # of the pixels of COCO's photos with persons: alpha's probability before anything is learnt
OPEN = 3.0  # logit of an attention gate's weights, 0.95, before it has learnt what to hold back


class WeightsError(UserError):
    """Encoder weights that cannot be had; the message is one line for the user."""


class UNetAutoencoder(nn.Module):
    """A photo in, the person out: RGB and alpha.

    The colours that are asked for are the photo's own, so they take a skip of their own from input to output
    and the decoder only learns to correct them; what it has to find is the alpha.

    Args:
        encoder: one of `ENCODERS`.
        pretrained: start from torchvision's ImageNet weights, downloaded at the first use.
        use_attention: gate each skip by what the decoder has seen so far (Oktay et al. 2018).
        encoder_weights: a file of the encoder's weights in torchvision's keys, instead of the download.

    Raises:
        ValueError: no such encoder, or weights that pretrained=False would ignore.
        WeightsError: weights were asked for and cannot be had.
    """

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
        """Logits of the RGBA picture.

        Args:
            images: float (N, 3, H, W), RGB in [0, 1], any H and W from 32 on; computed in the model's own precision.

        Returns:
            float32 (N, 4, H, W): a sigmoid away from R, G, B and the alpha's probability.

        Raises:
            ValueError: another shape or dtype.
        """
        _check_images(images)
        images = images.to(self.mean.dtype)
        height, width = images.shape[-2:]
        padding = (0, -width % SMALLEST_INPUT, 0, -height % SMALLEST_INPUT)
        padded = F.pad(images, padding, mode="replicate") if any(padding) else images
        decoded = self.decoder(self.encoder((padded - self.mean) / self.std))
        correction, alpha = decoded[..., :height, :width].float().split((3, 1), dim=1)
        # Half a step of 8 bits away from 0 and 1, where the logit is infinite.
        colours = torch.logit(images.float(), eps=1 / 510) + correction
        return torch.cat([colours, alpha], dim=1)

    def predict(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 4, H, W) in [0, 1]: R, G, B and the alpha's probability."""
        return torch.sigmoid(self(images))


def _check_images(images: Tensor) -> None:
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected float images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if min(images.shape[-2:]) < SMALLEST_INPUT:
        raise ValueError(f"expected H and W of at least {SMALLEST_INPUT}, got {tuple(images.shape[-2:])}")


# --- encoder ----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A torchvision classifier without its head, cut where it halves the resolution.

    Attributes:
        channels: of the five features at strides 2, 4, 8, 16 and 32; 0 where the encoder has none.
    """

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
        self.stages = nn.ModuleList(_resnet_stages(network) if name in RESNETS else _cut(network.features, name))
        self.channels = self._measure_channels()

    def forward(self, images: Tensor) -> list[Tensor | None]:
        """Normalised (N, 3, H, W) to the features at strides 2, 4, 8, 16, 32; None where there is none."""
        features: list[Tensor | None] = []
        for stage in self.stages:
            images = stage(images)
            features.append(images if len(stage) else None)
        return features

    @torch.no_grad()
    def _measure_channels(self) -> tuple[int, ...]:
        self.eval()  # so that BatchNorm's averages do not take up the blank image
        features = self(torch.zeros(1, 3, SMALLEST_INPUT, SMALLEST_INPUT))
        self.train()
        return tuple(0 if feature is None else feature.shape[1] for feature in features)


def _resnet_stages(network: nn.Module) -> list[nn.Sequential]:
    stem = nn.Sequential(network.conv1, network.bn1, network.relu)
    first = nn.Sequential(network.maxpool, *network.layer1)
    return [stem, first, network.layer2, network.layer3, network.layer4]


def _cut(features: nn.Sequential, name: str) -> list[nn.Sequential]:
    cuts = FEATURE_CUTS[name]
    return [features[start:end] for start, end in pairwise(cuts)]


def download_weights(name: str) -> dict[str, Tensor]:
    """torchvision's default ImageNet weights of an encoder, from its cache folder or the network.

    Raises:
        WeightsError: not cached and not to be had; names the three ways out.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return torch.hub.load_state_dict_from_url(weights.url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # the network's, or whatever a damaged file makes the reader raise
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        if cached.exists():
            raise WeightsError(f"the cached weights {cached} are damaged: delete that file and start again") from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"the ImageNet weights of {name} cannot be downloaded from {weights.url} ({reason}): connect this machine "
            "to the network, or give a downloaded file with --encoder-weights FILE, "
            "or start from random weights with --no-pretrained"
        ) from None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A file of weights, opened as data only: nothing in it is executed.

    Raises:
        WeightsError: no such file, or not a dictionary of tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"--encoder-weights: there is no file {path}") from None
    except Exception as error:  # whatever a file that is something else makes the reader raise
        raise WeightsError(
            f"--encoder-weights: {path} is damaged or no file of weights ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(f"--encoder-weights: {path} holds no dictionary of tensors (a state_dict)")
    return state


def load_backbone(network: nn.Module, state: dict[str, Tensor], source: str, name: str) -> None:
    """Loads a torchvision network's weights; its classifier's, and the counters old files lack, may be absent.

    Raises:
        WeightsError: keys or shapes of another network; names how many fit.
    """
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    backbone = {key for key in wanted if not key.startswith(CLASSIFIERS) and not key.endswith("num_batches_tracked")}
    fitting = {key: value for key, value in state.items() if wanted.get(key) == value.shape}
    strangers = [key for key in state if key not in fitting and not key.startswith(CLASSIFIERS)]
    if strangers or not backbone <= fitting.keys():
        raise WeightsError(
            f"the weights {source} are not those of {name}: {len(backbone & fitting.keys())} of its "
            f"{len(backbone)} tensors are there, {len(strangers)} others are not its own"
        )
    network.load_state_dict(fitting, strict=False)


# --- decoder ----------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """From the encoder's deepest feature back to full resolution, one skip at a time.

    Args:
        channels: of the encoder's features at strides 2, 4, 8, 16, 32; 0 where there is none.
        use_attention: whether each skip passes an attention gate.
    """

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
        """Features at strides 2 to 32 to (N, 4, H, W)."""
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
        """(N, below, H, W) and a skip (N, skip, 2H, 2W) or None to (N, width, 2H, 2W)."""
        enlarged = enlarge(self.narrow(below))
        if skip is not None:
            gated = skip if self.gate is None else self.gate(skip, below)
            enlarged = torch.cat([enlarged, gated], dim=1)
        return self.refine(self.fuse(enlarged))


class AttentionGate(nn.Module):
    """Additive attention (Oktay et al. 2018, "Attention U-Net", eq. 1 and 2).

    The coarser decoder feature says where the skip matters: weights in (0, 1) a pixel, found on the coarser
    grid and enlarged bilinearly, as in the paper.
    """

    def __init__(self, skip: int, gating: int):
        super().__init__()
        inner = max(skip // 2, 8)
        self.theta = nn.Conv2d(skip, inner, 2, stride=2, bias=False)
        self.phi = nn.Conv2d(gating, inner, 1)
        self.psi = nn.Conv2d(inner, 1, 1)
        nn.init.constant_(self.psi.bias, OPEN)  # by PyTorch's own values each skip would begin at half its strength

    def forward(self, skip: Tensor, gating: Tensor) -> Tensor:
        """(N, skip, 2H, 2W) and (N, gating, H, W) to the skip, weighted."""
        attention = torch.sigmoid(self.psi(F.relu(self.theta(skip) + self.phi(gating))))
        return skip * enlarge(attention)


class PixelShuffleHead(nn.Module):
    """The last doubling as a sub-pixel convolution (Shi et al. 2016): full resolution at half its cost."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 4 * out_channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        nn.init.zeros_(self.conv.bias)
        with torch.no_grad():  # the four pixels of a cell start alike (Aitken et al. 2017): no checkerboard
            self.conv.weight.copy_(self.conv.weight[::4].repeat_interleave(4, dim=0))
            self.conv.weight[: 4 * (out_channels - 1)] = 0  # colours start as the photo's own
            self.conv.bias[-4:] = math.log(PERSON_SHARE / (1 - PERSON_SHARE))

    def forward(self, features: Tensor) -> Tensor:
        """(N, width, H, W) to (N, out_channels, 2H, 2W)."""
        return self.shuffle(self.conv(features))


def enlarge(features: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, 2H, 2W), bilinearly, in their own precision."""
    # On CUDA autocast computes it in float32, which all that is put together with it would take over.
    return F.interpolate(features, scale_factor=2, mode="bilinear").to(features.dtype)


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
