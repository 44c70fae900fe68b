"""The networks of finetune.py: a backbone with a linear head, or with a ResUNet's decoder.

    from finetune import load_finetuned
    net = load_finetuned("out/finetune-siim-segmentation.pt")
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from checkpoint import read_checkpoint
from cli import InputError
from model import Residual, build_backbone

CHANNELS = {  # of the backbone's last map at 1/2, 1/4, 1/8, 1/16 of the image's size
    "small": (32, 96), "resnet18": (64, 64, 128, 256), "resnet50": (64, 256, 512, 1024)}


def block(channels_in, channels_out, kernel=1, stride=1, padding=0):
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(),
                         Residual(channels_out))


class Decoder(nn.Module):
    """The way up of a ResUNet to 1/2 of the image's size, where each place answers for 4 pixels.

    A backbone that stops before 1/16, as `small` does, is continued to there: a decoder must see
    more of the chest than a piece of its wall.
    """

    def __init__(self, channels):
        super().__init__()
        base, channels, below = channels[0] // 4, list(channels), 0
        widths = (2 * base, 4 * base, 8 * base, 8 * base)  # at 1/2, 1/4, 1/8, 1/16
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        while len(channels) < 4:
            width = widths[len(channels)]
            self.down.append(block(channels[-1], width, 4, 2, 1))
            channels.append(width)
        for level in (3, 2, 1, 0):
            self.up.append(block(channels[level] + below, widths[level]))
            below = widths[level]
        self.last = nn.Conv2d(below, 4, 1)

    def forward(self, maps):  # [B,c,H/2,W/2], [B,c,H/4,W/4], ...
        for layer in self.down:
            maps = [*maps, layer(maps[-1])]
        x = self.up[0](maps[3])                                                 # [B,c,H/16,W/16]
        for layer, level in zip(self.up[1:], (2, 1, 0)):
            x = layer(torch.cat([maps[level], F.interpolate(x, scale_factor=2)], 1))
        return F.pixel_shuffle(self.last(x), 2)[:, 0]                           # [B,H,W]


class FineTuned(nn.Module):
    """Backbone and new head: images [B,3,H,W] -> logits, [B,L] of labels or [B,H,W] of a mask."""

    def __init__(self, task, labels, backbone, image_size, frozen):
        super().__init__()
        self.config = dict(task=task, labels=labels, backbone=backbone, image_size=image_size,
                           frozen=frozen)
        self.backbone, channels, _, _ = build_backbone(backbone)
        self.backbone.requires_grad_(not frozen)
        if task == "classification":  # batch norm without weights standardises the features
            self.head = nn.Sequential(nn.BatchNorm1d(channels, affine=False),
                                      nn.Linear(channels, len(labels)))
        else:
            self.head = Decoder(CHANNELS[backbone])

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.config["frozen"])
        return self

    def features(self, images):
        """What the head is given: the mean of the last map, or the last map of each resolution."""
        x, maps = images, {}
        for layer in self.backbone:
            x = layer(x)
            maps[x.shape[-1]] = x
        return x.mean((2, 3)) if self.config["task"] == "classification" else list(maps.values())

    def forward(self, images):
        return self.head(self.features(images))


def build(args, labels, model, rate):
    """A network on the encoder that --init asks for; its head starts at the rate of positives."""
    net = FineTuned(args.task, labels, args.backbone, args.image_size, not args.unfreeze)
    last_layer = list(net.head.modules())[-1]
    nn.init.constant_(last_layer.bias, torch.logit(rate.clamp(0.001, 0.999)))
    if args.init == "pretrained":
        net.backbone.load_state_dict(model.backbone.state_dict())
    elif args.init == "imagenet":
        try:
            resnet = torchvision.models.get_model(args.backbone, weights="IMAGENET1K_V1")
        except (OSError, ValueError) as error:
            raise InputError(f"no ImageNet weights of {args.backbone} ({error}); take another "
                             "--backbone or --init") from None
        net.backbone.load_state_dict(nn.Sequential(*list(resnet.children())[:7]).state_dict())
    return net.to(args.device, memory_format=torch.channels_last).eval()


def load_finetuned(path, map_location="cpu"):
    """The network of a finetune-*.pt in eval mode, to be called on data.to_input(images, size).

    `.config` has task, labels and image_size. InputError for any other file.
    """
    saved = read_checkpoint(path, map_location)
    try:
        net = FineTuned(**saved["config"]).to(map_location)
        net.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError):
        raise InputError(f"{path} was not written by this finetune.py") from None
    return net.eval()
