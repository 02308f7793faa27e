"""The codec's convolutions as matrix products, for inference on the CPU.

    codec = optimize_codec(codec.fold())        # or with its decoder in bfloat16

Each convolution of torch brings frames and weights into another order in memory and back. Here the channels
of a frame lie next to each other throughout, and a convolution is a few products of frames with weights. The
packed layers are those of encodec.py with another `forward`; names and shapes in the state dict stay.
"""
import torch
import torch.nn.functional as F

from encodec import Conv, ConvTranspose, pad1d
from speed.kernels import has_bfloat16


def optimize_codec(codec, decoder_dtype=torch.float32):
    """Packs the layers of an EncodecModel in place: the same up to rounding, faster. Returns the codec.

    decoder_dtype: float32, or bfloat16, which counts where the CPU computes in it. Encoder and codebooks keep
    theirs. With gradients, or on another device, the layers compute as they did before.
    """
    codec.fold()    # weights are packed once, so weight norm must not make them anew
    if decoder_dtype != torch.bfloat16 or has_bfloat16():
        codec.decoder.to(decoder_dtype)
    for module in codec.modules():
        if isinstance(module, Conv):
            module.__class__ = PackedConv
            module.pack()
        elif isinstance(module, ConvTranspose):
            module.__class__ = PackedConvTranspose
            module.pack()
    return codec


def for_inference_on_cpu(x) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def pad_frames(x, left: int, right: int, mode: str):
    """`pad1d` for x (B, C, L) whose channels may lie next to each other in memory, and then stay so."""
    B, C, L = x.shape
    if x.stride(1) != 1 or mode == "reflect" and L <= max(left, right):
        return pad1d(x, left, right, mode)
    if mode == "constant":
        return F.pad(x.mT, (0, 0, left, right)).mT
    padded = x.new_empty(B, left + L + right, C).mT
    padded[..., left:left + L] = x
    padded[..., :left] = x[..., 1:left + 1].flip(-1)
    padded[..., left + L:] = x[..., L - 1 - right:-1].flip(-1)
    return padded


class PackedConv(Conv):
    """Conv whose weight (C', C, kernel) lies in memory as (kernel, C, C')."""

    def pack(self):
        weight = self.conv.weight
        weight.data = weight.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    def forward(self, x):                                                       # (B, C, L)
        if not for_inference_on_cpu(x):
            return super().forward(x)
        extra = -x.shape[-1] % self.stride
        x = pad_frames(x, self.left, self.right + extra, self.pad_mode)
        return self.conv_norm(self.products(x))                                 # (B, C', ceil(L / stride))

    def products(self, x):
        """self.conv(x) of a padded x (B, C, L): strides of the kernel times strides of frames, added up."""
        (kernel,), (stride,), (dilation,) = self.conv.kernel_size, self.conv.stride, self.conv.dilation
        weight, bias = self.conv.weight.permute(2, 1, 0), self.conv.bias        # (kernel, C, C'), (C',)
        B, C, L = x.shape
        seen = dilation * (kernel - 1) + 1
        T = (L - seen) // stride + 1
        if stride == 1 and len(bias) < 8:   # few outputs: one product for all of the kernel, then added up
            parts = x.mT @ weight.permute(1, 0, 2).flatten(1)
            parts = parts.float().view(B, L, kernel, -1)
            total = sum(parts[:, n * dilation:n * dilation + T, n] for n in range(kernel))
            return (total + bias.float()).to(x.dtype).mT
        if C < 8:                           # few inputs: all of a window at once
            frames = x.unfold(-1, seen, stride)[..., ::dilation].permute(0, 2, 3, 1).flatten(2)
            weight = weight.flatten(0, 1)[None]                                 # (1, kernel C, C')
        else:
            frames = x.mT.reshape(B, L // stride, stride * C)
            weight = weight.reshape(kernel // stride, stride * C, -1)
        y = x.new_empty(B, T, len(bias))
        for item, rows in zip(y, frames):
            torch.addmm(bias, rows[:T], weight[0], out=item)
            for n in range(1, len(weight)):
                item.addmm_(rows[n * dilation:n * dilation + T], weight[n])
        return y.mT


class PackedConvTranspose(ConvTranspose):
    """ConvTranspose with its weight (C, C', 2 stride) a second time as `packed` (2, C, stride C')."""

    def pack(self):
        weight = self.convtr.weight.detach().unflatten(-1, (2, -1))             # (C, C', 2, stride)
        packed = weight.permute(2, 0, 3, 1).flatten(2).contiguous()
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x):                                                       # (B, C, T)
        if not for_inference_on_cpu(x):
            return super().forward(x)
        y = self.convtr_norm(self.products(x))
        return y[..., self.left:y.shape[-1] - self.right]                       # (B, C', T * stride)

    def products(self, x):
        """self.convtr(x): a stride of output comes of a frame and of the one before."""
        B, C, T = x.shape
        bias = self.convtr.bias.repeat(self.stride)
        y = x.new_empty(B, T + 1, len(bias))
        for item, frames in zip(y, x.mT):
            torch.addmm(bias, frames, self.packed[0], out=item[:T])
            item[T] = bias
            item[1:].addmm_(frames, self.packed[1])
        return y.view(B, -1, self.convtr.out_channels).mT
