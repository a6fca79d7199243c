"""The configuration of a U-Net: every convention in which published models differ is a field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .arguments import count, from_fields, one_of, real, shown

EMBEDDING_ORDERS = ("sin_cos", "cos_sin", "interleaved")
QKV_ORDERS = ("qkv", "heads")
DOWNSAMPLE_PADDINGS = ("symmetric", "asymmetric")
NULL_CLASSES = ("none", "row", "zero")
UP_ATTENTIONS = ("every", "last")

MAX_LEVELS = 10
# Far above any published model; without them a hostile file could ask for endless work.
MAX_COUNTS = {
    "in_channels": 2**12,
    "base_channels": 2**14,
    "num_res_blocks": 16,
    "num_heads": 2**12,
    "norm_groups": 2**14,
    "head_channels": 2**14,
    "num_classes": 2**20,
    "embedding_channels": 2**14,
}
OPTIONAL = ("head_channels", "num_classes", "embedding_channels")


def _multiplier(value: Any) -> float:
    """An entry of channel_mult: whole numbers stay whole."""
    number = real("channel_mult", value, 2.0**-8, 2.0**8)
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is made of. The defaults are Ho et al.'s CIFAR-10 model (35,746,307 parameters).

    Attributes:
        in_channels: channels of x_t, and of the prediction.
        sample_size: the spatial size the model was trained on, one number per dimension: (32, 32)
            for images, (64,) for series. Its length is the number of spatial dimensions, 1 or 2.
        base_channels, channel_mult: the first convolution has base_channels, level i has
            base_channels * channel_mult[i], which must be whole.
        num_res_blocks: residual blocks per level on the way down; one more on the way up.
        attention_levels: per level, whether self-attention follows each residual block.
        up_attention: on the way up it follows every residual block, or (score_sde) the last only.
        mid_attention: self-attention between the two middle blocks.
        mid_attention_norm: whether that one normalises its input (diffusers' does not, beside a
            scale_shift_norm, unless told to).
        num_heads, head_channels: the attention's head count, or, if given, the width of each head.
        qkv_order: how the 3C rows of the projection are laid out: "qkv" is all queries, then keys,
            then values; "heads" keeps each head's q, k, v together (guided-diffusion's default).
        dropout: probability, before each block's second convolution, in training only.
        norm_groups, norm_eps: of every GroupNorm.
        embedding_order, embedding_shift: the timestep embedding is sines and cosines of
            t * 10000 ** (-i / (half - embedding_shift)), in this order.
        embedding_channels: of that embedding, if not base_channels (guided-diffusion at 512x512).
        timestep_scale: t is multiplied by it first (OpenAI's rescale_timesteps: 1000 / T).
        downsample_padding: of the strided convolution: one on each side, or one at the end only.
        scale_shift_norm: the time embedding scales and shifts the second norm, instead of being
            added before it.
        resblock_updown: residual blocks resample (ADM), instead of separate convolutions.
        num_classes, null_class: class conditioning; the label `num_classes` means "no class" and
            is a learned row, or adds zero; with "none" a label is always needed.
        learn_sigma: predict 2 * in_channels; the second half parametrises the variance.
    Raises ValueError, in one sentence, for values that make no network.
    """

    in_channels: int = 3
    sample_size: tuple[int, ...] = (32, 32)
    base_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[bool, ...] = (False, True, False, False)
    up_attention: str = "every"
    mid_attention: bool = True
    mid_attention_norm: bool = True
    num_heads: int = 1
    head_channels: int | None = None
    qkv_order: str = "qkv"
    dropout: float = 0.1
    norm_groups: int = 32
    norm_eps: float = 1e-6
    embedding_order: str = "sin_cos"
    embedding_shift: float = 1.0
    embedding_channels: int | None = None
    timestep_scale: float = 1.0
    downsample_padding: str = "asymmetric"
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    num_classes: int | None = None
    null_class: str = "none"
    learn_sigma: bool = False

    def __post_init__(self) -> None:
        size = (count("sample_size", v, 1, 2**20) for v in self._sequence("sample_size"))
        object.__setattr__(self, "sample_size", tuple(size))
        mult = (_multiplier(v) for v in self._sequence("channel_mult"))
        object.__setattr__(self, "channel_mult", tuple(mult))
        object.__setattr__(self, "attention_levels", self._sequence("attention_levels"))
        if self.dims not in (1, 2):
            raise ValueError(f"sample_size must have 1 or 2 numbers, got {self.sample_size}")
        if not 1 <= len(self.channel_mult) <= MAX_LEVELS:
            raise ValueError(
                f"channel_mult must have 1 to {MAX_LEVELS} levels, got {len(self.channel_mult)}"
            )
        if len(self.attention_levels) != len(self.channel_mult):
            raise ValueError(
                f"attention_levels needs one entry per level of channel_mult "
                f"({len(self.channel_mult)}), got {len(self.attention_levels)}"
            )
        self._check_numbers()
        self._check_divisions()
        if self.null_class != "none" and self.num_classes is None:
            raise ValueError(f"null_class={self.null_class!r} needs num_classes")
        self.check_size(self.sample_size)

    def _sequence(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list, but {shown(value)} was given.")
        return tuple(value)

    def _check_numbers(self) -> None:
        """Each field by itself: its type and its range."""
        for name, high in MAX_COUNTS.items():
            if getattr(self, name) is not None or name not in OPTIONAL:
                count(name, getattr(self, name), 1, high)
        real("dropout", self.dropout, 0.0, 1.0)
        real("norm_eps", self.norm_eps, 0.0, 1.0)
        real("embedding_shift", self.embedding_shift, 0.0)
        real("timestep_scale", self.timestep_scale, 0.0, 1e6)
        one_of("embedding_order", self.embedding_order, EMBEDDING_ORDERS)
        one_of("qkv_order", self.qkv_order, QKV_ORDERS)
        one_of("downsample_padding", self.downsample_padding, DOWNSAMPLE_PADDINGS)
        one_of("null_class", self.null_class, NULL_CLASSES)
        one_of("up_attention", self.up_attention, UP_ATTENTIONS)
        flags = {f"attention_levels[{i}]": v for i, v in enumerate(self.attention_levels)}
        switches = ("mid_attention", "mid_attention_norm", "scale_shift_norm")
        for name in (*switches, "resblock_updown", "learn_sigma"):
            flags[name] = getattr(self, name)
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, but {shown(value)} was given.")

    def _check_divisions(self) -> None:
        embedding = self.embedding_channels or self.base_channels
        if embedding % 2 or embedding / 2 <= self.embedding_shift:
            raise ValueError(
                f"base_channels (or embedding_channels) must be even, and half of it above "
                f"embedding_shift ({self.embedding_shift}), got {embedding}"
            )
        for mult, channels in zip(self.channel_mult, self.level_channels, strict=True):
            if channels < 1 or abs(self.base_channels * mult - channels) > 1e-6 * channels:
                raise ValueError(
                    f"channel_mult must give whole numbers of channels, got {mult} times "
                    f"{self.base_channels}"
                )
        heads = self.head_channels or self.num_heads
        last = len(self.channel_mult) - 1
        # The first convolution's output is normalised too, before any multiplier.
        for channels in (self.base_channels, *self.level_channels):
            if channels % self.norm_groups:
                raise ValueError(
                    f"norm_groups must divide base_channels ({self.base_channels}) and every "
                    f"level's channels {self.level_channels}, got {self.norm_groups}"
                )
        for level, channels in enumerate(self.level_channels):
            attends = self.attention_levels[level] or (self.mid_attention and level == last)
            if attends and channels % heads:
                name = "head_channels" if self.head_channels else "num_heads"
                raise ValueError(
                    f"{name} must divide the channels of every level with attention, got {heads} "
                    f"for {channels} channels"
                )

    @property
    def dims(self) -> int:
        return len(self.sample_size)

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(round(self.base_channels * m) for m in self.channel_mult)

    @property
    def time_channels(self) -> tuple[int, int]:
        """Of the sinusoidal embedding, and of the time MLP that every block projects."""
        channels = self.embedding_channels or self.base_channels
        return channels, 4 * channels

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, *sample_size)."""
        return (self.in_channels, *self.sample_size)

    def check_size(self, size: tuple[int, ...]) -> None:
        """Raise unless every level can be halved and doubled back to the same size."""
        factor = 2 ** (len(self.channel_mult) - 1)
        if len(size) != self.dims or any(s < 1 or s % factor for s in size):
            raise ValueError(
                f"a U-Net of {len(self.channel_mult)} levels needs {self.dims} spatial sizes that "
                f"are multiples of {factor}, got {tuple(size)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able; `from_dict` is the way back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """The configuration of `to_dict`; ValueError in one sentence if it is none."""
        return from_fields(cls, values)
