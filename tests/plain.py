"""The released architectures written out plainly, with the released names: what ours are compared with.

Nothing of timm or segbench is used. Attention is a softmax, the norms of feature maps are means and variances, residual
blocks are spelled out. Released state dicts load with ``strict=True``. The defaults are the released sizes.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F


class ChannelNorm(nn.Module):
    """Layer normalisation of each pixel over its channels, (N,C,H,W)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            ChannelNorm(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            ChannelNorm(width),
            nn.GELU(),
        )

    def forward(self, x):
        return self.stem(x)


class ConvNeXt(nn.Module):
    def __init__(self, depths, widths):
        super().__init__()
        self.downsample_layers = nn.ModuleList([ConvStem(widths[0])])
        for before, after in itertools.pairwise(widths):
            self.downsample_layers.append(nn.Sequential(ChannelNorm(before), nn.Conv2d(before, after, 2, stride=2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        for index, width in enumerate(widths):
            self.add_module(f"norm{index}", ChannelNorm(width))

    def forward(self, x):
        features = []
        for index in range(4):
            x = self.stages[index](self.downsample_layers[index](x))
            features.append(getattr(self, f"norm{index}")(x))
        return features


class ConvModule(nn.Module):
    def __init__(self, channels_in, channels, size):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, size, padding=size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.batch_norm(self.conv(x)))


def upsample(x, size, *, align_corners=False):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


class UPerHead(nn.Module):
    def __init__(self, widths, channels, num_classes):
        super().__init__()
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvModule(widths[-1], channels, 1)) for size in (1, 2, 3, 6)
        )
        self.bottleneck = ConvModule(widths[-1] + 4 * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1) for width in widths[:3])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)

    def forward(self, features):
        sizes = [feature.shape[-2:] for feature in features]
        pooled = [upsample(module(features[3]), sizes[3]) for module in self.psp_modules]
        top = self.bottleneck(torch.cat([features[3], *pooled], dim=1))
        levels = [None, None, None, top]
        for index in (2, 1, 0):
            levels[index] = self.lateral_convs[index](features[index]) + upsample(levels[index + 1], sizes[index])
        outputs = [self.fpn_convs[index](levels[index]) for index in range(3)] + [top]
        outputs = [outputs[0]] + [upsample(output, sizes[0]) for output in outputs[1:]]
        return self.classifier(self.fpn_bottleneck(torch.cat(outputs, dim=1)))


class FCNHead(nn.Module):
    def __init__(self, channels_in, channels, num_classes):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(channels_in, channels, 3))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x):
        return self.classifier(self.convs(x))


class UPerNet(nn.Module):
    def __init__(
        self,
        num_classes,
        depths=(3, 3, 9, 3),
        widths=(96, 192, 384, 768),
        channels=512,
        auxiliary_channels=256,
    ):
        super().__init__()
        self.backbone = ConvNeXt(depths, widths)
        self.decode_head = UPerHead(widths, channels, num_classes)
        self.auxiliary_head = FCNHead(widths[2], auxiliary_channels, num_classes)

    def forward(self, x):
        return upsample(self.decode_head(self.backbone(x)), x.shape[-2:])

    def both(self, x):
        features = self.backbone(x)
        size = x.shape[-2:]
        return upsample(self.decode_head(features), size), upsample(self.auxiliary_head(features[2]), size)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        count, tokens, width = x.shape
        size = width // self.heads
        queries, keys, values = (
            part.reshape(count, tokens, self.heads, size).transpose(1, 2) for part in self.qkv(x).split(width, dim=-1)
        )
        weights = torch.softmax(queries @ keys.transpose(2, 3) / size**0.5, dim=-1)
        return self.proj((weights @ values).transpose(1, 2).reshape(count, tokens, width))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)


class Encoder(nn.Module):
    def __init__(self, width, depth, heads, patch, image_size):
        super().__init__()
        self.side = image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        self.patch_embed = Patches(width, patch)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, x):
        x = self.patch_embed.proj(x)
        count, width, rows, columns = x.shape
        x = x.reshape(count, width, rows * columns).transpose(1, 2)
        grid = self.pos_embed[0, 1:].T.reshape(1, width, self.side, self.side)
        grid = upsample(grid, (rows, columns)).reshape(1, width, rows * columns).transpose(1, 2)
        token = (self.cls_token + self.pos_embed[:, :1]).repeat(count, 1, 1)
        x = torch.cat([token, x + grid], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, num_classes, width, depth, heads):
        super().__init__()
        self.cls_emb = nn.Parameter(torch.zeros(1, num_classes, width))
        self.proj_patch = nn.Parameter(torch.zeros(width, width))
        self.proj_classes = nn.Parameter(torch.zeros(width, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.proj_dec = nn.Linear(width, width)
        self.decoder_norm = nn.LayerNorm(width)
        self.mask_norm = nn.LayerNorm(num_classes)

    def forward(self, x):
        patches = x.shape[1]
        x = torch.cat([self.proj_dec(x), self.cls_emb.repeat(len(x), 1, 1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        features, classes = x[:, :patches] @ self.proj_patch, x[:, patches:] @ self.proj_classes
        features = features / features.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        return self.mask_norm(features @ classes.transpose(1, 2))


class Segmenter(nn.Module):
    def __init__(self, num_classes, width=384, depth=12, heads=6, patch=16, image_size=512, decoder_depth=2):
        super().__init__()
        self.patch = patch
        self.encoder = Encoder(width, depth, heads, patch, image_size)
        self.decoder = Decoder(num_classes, width, decoder_depth, heads)

    def forward(self, x):
        height, width = x.shape[-2:]
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        whole = x.new_zeros(len(x), 3, rows * self.patch, columns * self.patch)
        whole[:, :, :height, :width] = x
        scores = self.decoder(self.encoder(whole)[:, 1:])
        masks = scores.transpose(1, 2).reshape(len(x), -1, rows, columns)
        return upsample(masks, whole.shape[-2:])[:, :, :height, :width]


class Bottleneck(nn.Module):
    def __init__(self, channels_in, width, stride, dilation, *, first):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Identity()
        if first:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class PyramidPooling(nn.Module):
    def __init__(self, channels_in):
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(size),
                nn.Conv2d(channels_in, channels_in // 4, 1, bias=False),
                nn.BatchNorm2d(channels_in // 4),
                nn.ReLU(),
            )
            for size in (1, 2, 3, 6)
        )

    def forward(self, x):
        size = x.shape[-2:]
        return torch.cat([x] + [upsample(branch(x), size, align_corners=True) for branch in self.features], dim=1)


def classifier(channels_in, channels, num_classes):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout2d(0.1),
        nn.Conv2d(channels, num_classes, 1),
    )


class PSPNet(nn.Module):
    def __init__(
        self, num_classes, depths=(3, 4, 6, 3), width=64, deep_stem=False, channels=512, auxiliary_channels=256
    ):
        super().__init__()
        stem = [nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels_in = width
        if deep_stem:
            channels_in = 2 * width
            stem = [
                *(nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
                *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
                *(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
            ]
        self.layer0 = nn.Sequential(*stem, nn.MaxPool2d(3, stride=2, padding=1))
        for index, (depth, stride, dilation) in enumerate(zip(depths, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            blocks = []
            for number in range(depth):
                first = number == 0
                step = stride if first else 1
                blocks.append(Bottleneck(channels_in, width * 2**index, step, dilation, first=first))
                channels_in = 4 * width * 2**index
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.ppm = PyramidPooling(channels_in)
        self.cls = classifier(2 * channels_in, channels, num_classes)
        self.aux = classifier(channels_in // 2, auxiliary_channels, num_classes)

    def both(self, x):
        third = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        logits = self.cls(self.ppm(self.layer4(third)))
        size = x.shape[-2:]
        return upsample(logits, size, align_corners=True), upsample(self.aux(third), size, align_corners=True)

    def forward(self, x):
        third = self.layer3(self.layer2(self.layer1(self.layer0(x))))
        return upsample(self.cls(self.ppm(self.layer4(third))), x.shape[-2:], align_corners=True)


# Architecture of ours: the same thing in plain, built from the same arguments.
PLAIN = {"upernet_convnext": UPerNet, "segmenter_vit": Segmenter, "pspnet_resnet": PSPNet}
