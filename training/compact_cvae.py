"""The CVAE of the MNIST networks in a compact form for training: at 28x28, `fcE` has 16,128 columns instead of 100,352.

Most of what the encoder puts out sees nothing of the image: at 28x28, only 10x10 of the 28x28 outputs of each channel
do. Every other output is a constant k[c, r] of its channel c and its kind r, which of its taps fall on padding. All
weights of a hidden unit h that read the same constant have the same gradient in every step. Adam without weight decay
starts their moments equal, so that they and the updates stay equal: these weights keep their initial differences for
ever. With M[h, c, r] the mean of the n[r] weights of a kind, exactly, up to rounding,

    W_t[h, c, i, j] = W_0[h, c, i, j] + M_t[h, c, r] - M_0[h, c, r]     at every output i, j of kind r, and
    sum over these i, j of W_t[h, c, i, j] k[c, r] = n[r] M_t[h, c, r] k[c, r].

The compact form trains M in their place, with the gradient of one weight; k sees the gradient of the whole sum. That
sum is the same for all images, a part of the bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.vae import ConditionalVAE, PlainEncoder


def compact(vae: nn.Module) -> None:
    """Bring a CVAE of the MNIST networks into its compact form, in place; leave any other network as it is.

    `convE` gives what `fcE` did then, and `fcE` passes it on. `expand` takes it back.
    """
    if isinstance(vae, ConditionalVAE) and isinstance(vae.convE, PlainEncoder):
        vae.convE, vae.fcE = CompactEncoder(vae.convE, vae.fcE), nn.Identity()


def expand(vae: nn.Module) -> None:
    """Give a CVAE that is in compact form the layers of the method again, in place; leave any other as it is."""
    if isinstance(vae, ConditionalVAE) and isinstance(vae.convE, CompactEncoder):
        vae.convE, vae.fcE = vae.convE.layers, vae.convE.linear()


class CompactEncoder(nn.Module):
    """A `PlainEncoder` and the linear layer behind it: [B, C, S, S] -> [B, hidden units].

    Attributes:
        live: weights that read what depends on the image, [hidden, outputs * channels]: in the order in which a
            channels-last convolution puts them out.
        mean: of the weights that read one constant, [hidden, channels, kinds].
        initial: the linear layer's weights before training, on the CPU. No buffer, since several processes would send
            each other their buffers in every step; a state dict holds it all the same.
    """

    def __init__(self, layers: PlainEncoder, linear: nn.Linear):
        super().__init__()
        self.layers, self.bias = layers, linear.bias
        self.channels, device = layers.conv2.out_channels, linear.weight.device
        self.outputs = see(layers)
        self.initial = linear.weight.detach().cpu()
        live = self.initial.unflatten(1, (self.channels, -1))[:, :, self.outputs.live]
        self.live = nn.Parameter(live.transpose(1, 2).flatten(1).to(device))
        self.mean = nn.Parameter(self.initial_mean().to(device))
        taps, counts = self.outputs.taps.to(self.mean), self.outputs.kinds.sum(1).to(self.mean)
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        conv1, conv2, outputs = self.layers.conv1, self.layers.conv2, self.outputs
        blank = F.relu(conv1.bias)  # what conv1 puts out where it sees padding only
        with torch.autocast(images.device.type, enabled=False):  # little work, where one rounding counts n times
            of_taps = (conv2.weight.flatten(2) * blank[:, None]).sum(1) @ self.taps
            level, constants = (conv2.bias[:, None] + of_taps).tensor_split([self.live.shape[1] // self.channels], 1)
            sums = self.mean + (self.counts - 1) * self.mean.detach()  # n * mean, with the gradient of one weight
            bias = self.bias + sums.flatten(1) @ F.relu(constants).flatten()
        x = F.relu(F.conv2d(images, conv1.weight, conv1.bias, conv1.stride, outputs.paddings[0]))
        # Blank outputs lie all around, which are part of the level: beside them, padding by 0 is right.
        x = F.conv2d(x - blank.to(x.dtype)[:, None, None], conv2.weight, None, conv2.stride, outputs.paddings[1])
        x = F.relu(x + level.to(x.dtype).view(x.shape[1:]))
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), self.live, bias)

    def initial_mean(self) -> Tensor:
        """M_0, [hidden, channels, kinds]."""
        kinds = self.outputs.kinds.to(self.initial)
        return self.initial.unflatten(1, (self.channels, -1)) @ kinds.T / kinds.sum(1)

    def linear(self) -> nn.Linear:
        """The linear layer as the method has it, with the weights that training has come to: in the memory of the
        initial ones, so that this is the end of the compact form."""
        change = self.mean.detach().cpu() - self.initial_mean()
        weight = self.initial.unflatten(1, (self.channels, -1))
        weight.flatten(0, 1).addmm_(change.flatten(0, 1), self.outputs.kinds.to(change))
        weight[:, :, self.outputs.live] = self.live.detach().cpu().unflatten(1, (-1, self.channels)).transpose(1, 2)
        linear = nn.Linear(*reversed(self.initial.shape), device="meta")
        linear.weight, linear.bias = nn.Parameter(self.initial.to(self.live.device)), self.bias
        return linear

    def get_extra_state(self) -> Tensor:
        return self.initial

    def set_extra_state(self, state: Tensor) -> None:
        self.initial = state


class Outputs(NamedTuple):
    """What the S * S outputs of each channel of a `PlainEncoder` see.

    Attributes:
        live: [S * S], which depend on the image.
        kinds: [kinds, S * S], which of the others are of which kind.
        taps: [16, live outputs + kinds], 1 where a tap of conv2 reads an output of conv1, 0 where it reads padding.
        paddings: with which conv1, and conv2 behind it, put out what depends on the image and nothing else.
    """

    live: Tensor
    kinds: Tensor
    taps: Tensor
    paddings: tuple[int, int]


def see(layers: PlainEncoder) -> Outputs:
    """Find it by sliding the windows of the convolutions, both alike, over ones and over what depends on the image."""
    padding = layers.conv1.padding[0]
    size = 2 * (padding - 1)

    def windows(plane: Tensor) -> Tensor:
        return F.unfold(plane.view(1, 1, size, size).float(), 4, padding=padding, stride=2)[0]

    taps = windows(torch.ones(size, size))
    live1 = taps.any(0)
    live2 = windows(live1).any(0)
    patterns = taps[:, ~live2].unique(dim=1)
    kinds = (taps[:, None] == patterns[:, :, None]).all(0) & ~live2
    start1, start2 = (int(live.nonzero()[0]) // size for live in (live1, live2))
    paddings = padding - 2 * start1, padding + start1 - 2 * start2
    return Outputs(live2, kinds, torch.cat([taps[:, live2], patterns], 1), paddings)
