"""What a model is made of: one frozen record, read by the models, the command line and the run folder."""

import dataclasses
import math
from typing import Literal, get_args, get_type_hints

import jax

from effattn_jax import nn
from effattn_jax.nn.named import check_name


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and parts of a stack of blocks.

    >>> ModelConfig(layers=2, mixers="softmax,linear").layer_mixers()
    ('softmax', 'linear')
    >>> ModelConfig(mixer="sofmax").validate()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: mixer is 'sofmax'. Perhaps you meant 'softmax'? It must be among softmax, ...
    """

    layers: int = 4
    """Number of blocks."""
    width: int = 128
    """Features of the residual stream."""
    heads: int = 4
    """Query heads of each attention layer; they divide the width."""
    kv_heads: int | None = None
    """Key and value heads (grouped-query attention); they divide the heads. None: as many as heads."""
    mixer: str = "softmax"
    """What exchanges information between tokens, in every layer: a name of nn.MIXERS (train.py --help lists them), with options of its own where wanted, such as "sparse(window=64, dilation=8)"."""
    mixers: str = ""
    """One mixer a layer instead, separated by commas, such as "softmax,linear,linear,softmax" or "local(window=64),softmax"."""
    window: int | None = None
    """How many tokens to the left layers see, besides the token itself, where their mixer takes a window. None: the mixer's own (softmax: all, local: 128, sparse: 32)."""
    chunk_size: int | None = None
    """Chunk length of the chunked forms. None: the kernel's own choice."""
    state_size: int | None = None
    """Numbers of state of state-space mixers, a channel (s4, s4d, mamba), a head (mamba2) or a layer (s5, lru). None: the mixer's own choice."""
    rate: float = 1.0
    """Sampling step of the input over that of training: state-space mixers multiply their steps by it."""
    conv_width: int = 0
    """Tokens seen by the short convolution before each mixer, the token itself included. 0: no convolution."""
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """Normalisation of the residual stream; none keeps the size of what is read, which a regression may depend on."""
    residual: Literal["pre", "post", "rezero"] = "pre"
    """Block form: x + f(norm(x)), norm(x + f(x)), or x + alpha f(x) with alpha starting at 0."""
    residual_scores: bool = False
    """Whether attention scores add up from layer to layer (RealFormer, there with residual=post); every layer's mixer must be residual."""
    mlp: Literal["mlp", "gated"] = "mlp"
    """Feed-forward layer: gelu, or gated by silu (SwiGLU)."""
    mlp_ratio: float = 4.0
    """Inner width of the feed-forward layer over the width; a gated one takes two thirds, for equal parameters."""
    positions: Literal[
        "none", "learned", "sinusoidal", "rotary", "xpos", "alibi", "kerple_log", "kerple_power", "sandwich", "t5"
    ] = "rotary"
    """How a token's place is told; rotary and xpos turn the queries and keys of attention layers, the last five are biases on scores. Mixers with positions of their own have those alone."""
    rotary_base: float = 10000.0
    """Longest wavelength of rotary positions over 2 pi."""
    rotary_scaling: Literal["none", "linear", "ntk", "ntk_fixed", "ntk_mixed", "yarn"] = "none"
    """How rotary frequencies are stretched for sequences rotary_factor times as long as those of training."""
    rotary_factor: float = 1.0
    """Evaluated length over trained length."""
    train_length: int | None = None
    """The length of training, which log_scale and yarn are relative to."""
    log_scale: Literal["none", "train", "inference"] = "none"
    """Factor on attention scores by the keys n a token sees: log n / log train_length in training and after, or at least 1 at inference alone."""
    rerope_window: int | None = None
    """Distance at which rotary positions stop growing (ReRoPE), in layers without a window. None: nowhere, and 64 with the mixer rerope."""
    rerope_leak: float = 0.0
    """How fast they grow beyond it: 1/k of Leaky ReRoPE, above 1 in the training of InvLeaky."""
    sinks: int = 0
    """First tokens that stay visible beside the window."""
    full_layers: int | None = None
    """How many last layers see all tokens although there is a window (hybrid window-full attention). None: none do."""
    full_rotary: bool = True
    """Whether those layers have rotary positions."""
    random_positions: int = 0
    """Below which number training draws sorted positions, in place of counting. 0: it counts."""
    hierarchical_alpha: float = 0.0
    """Weight of the coarse digit where learned positions are stretched to max_length squared, such as 0.4. 0: they are not."""
    max_length: int = 1024
    """The longest sequence that learned positions, and mixers with weights for each place, allow."""
    tie_embeddings: bool = True
    """Whether the output layer is the token embedding."""
    use_bias: bool = False
    """Whether projections and layer norms have biases."""
    dropout: float = 0.0
    """Dropout rate on the embedding and on what each mixer and feed-forward layer adds."""
    remat: bool = False
    """Whether blocks are computed again in the backward pass, to store only their inputs."""
    scan_layers: bool = False
    """Whether blocks are one loop over stacked parameters, which compiles faster; all layers then share one mixer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of activations; norms, softmax, recurrent states and logits are float32 in any case."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of parameters."""

    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of each layer, first to last: its name, and its options where it has any."""
        return nn.split_mixers(self.mixers) if self.mixers else (self.mixer.strip(),) * self.layers

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, kv_heads resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def mlp_width(self) -> int:
        """F: the feed-forward layer's inner width, a multiple of 8 when gated."""
        if self.mlp == "gated":
            return max(8, round(self.mlp_ratio * self.width * 2 / 3 / 8) * 8)
        return max(1, round(self.mlp_ratio * self.width))

    def make_mixer(self, layer: int, *, causal: bool = True, **module_options) -> nn.SequenceMixer:
        """The mixer module of one layer; `module_options` such as name= or parent= go to Linen."""
        name = self.layer_mixers()[layer]
        options = self._mixer_options(causal)
        mixer = nn.make_mixer(name, **options, parent=None)
        if causal and not mixer.accepts_causal():
            raise ValueError(f"mixer must have a causal form in a causal model; {name!r} reads all tokens at once")
        if self.window is not None and mixer.accepts_window() and not self._is_full(layer):
            options["window"] = self.window
        own = "window" in nn.parse_mixer(name)[1]
        options["placing"] = self._placing(layer, mixer.window if own else options.get("window"))
        if self._is_full(layer) and not self.full_rotary:
            options["rotary_base"] = None
        return nn.make_mixer(name, **options, **module_options)

    def _is_full(self, layer: int) -> bool:
        return self.full_layers is not None and layer >= self.layers - self.full_layers

    def _placing(self, layer: int, window: int | None) -> nn.Placing:
        kind = "rotary" if self.positions in ("none", "learned", "sinusoidal") else self.positions
        free = window is None and not (self._is_full(layer) and not self.full_rotary)
        return nn.Placing(
            kind=kind,
            scaling=self.rotary_scaling,
            factor=self.rotary_factor,
            train_length=self.train_length,
            log_scale=self.log_scale if self.full_layers is None or self._is_full(layer) else "none",
            rerope_window=self.rerope_window if free else None,
            rerope_leak=self.rerope_leak,
            sinks=self.sinks if window is not None else 0,
        )

    def at_inference(self, **changes) -> "ModelConfig":
        """The same model, its parameters unchanged, with other settings of length; what they are is `INFERENCE_FIELDS`.

        >>> ModelConfig(window=64).at_inference(window=None, rotary_scaling="ntk_mixed", rotary_factor=8.0).rotary_factor
        8.0
        """
        for name in changes:
            check_name("the setting to change at inference", name, INFERENCE_FIELDS)
        return dataclasses.replace(self, **{"random_positions": 0, **changes}).validate()

    def _mixer_options(self, causal: bool) -> dict:
        return {
            "width": self.width,
            "heads": self.heads,
            "kv_heads": self.num_kv_heads,
            "causal": causal,
            "rotary_base": self.rotary_base if self.positions in ("rotary", "xpos") else None,
            "chunk_size": self.chunk_size,
            "max_length": self.max_length,
            "state_size": self.state_size,
            "rate": self.rate,
            "output_scale": self.output_scale,
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

    @property
    def counts_positions(self) -> bool:
        """Whether kernels count positions themselves, or keys by them, so that no others would be honoured."""
        by_kernel = self.positions not in ("none", "learned", "sinusoidal", "rotary") or self.rerope_window is not None
        return bool(by_kernel or self.sinks or self._with_positions() or self.log_scale != "none")

    def _bare_mixers(self) -> list[tuple[str, nn.SequenceMixer]]:
        """Each layer's mixer by its name, without what differs from layer to layer, to be asked what it is."""
        options = self._mixer_options(False)
        return [(nn.parse_mixer(text)[0], nn.make_mixer(text, **options, parent=None)) for text in self.layer_mixers()]

    def _with_positions(self) -> list[str]:
        """The mixers that have positions of their own."""
        return [name for name, mixer in self._bare_mixers() if mixer.has_positions()]

    @property
    def fixes_length(self) -> bool:
        """Whether no sequence may be longer than max_length: with learned positions, or weights for each place."""
        return self.positions == "learned" or any(mixer.fixes_length() for _, mixer in self._bare_mixers())

    @property
    def longest(self) -> int:
        """How long a sequence may be where something fixes it."""
        tables = any(mixer.fixes_length() for _, mixer in self._bare_mixers())
        return self.max_length**2 if self.hierarchical_alpha and not tables else self.max_length

    @property
    def output_scale(self) -> float:
        """Factor on the initial weights that write into the stream: 1 / sqrt(2 L) keeps its variance, as in GPT-2."""
        return (2 * self.layers) ** -0.5 if self.residual == "pre" else 1.0

    def validate(self) -> "ModelConfig":
        """Returns itself, or raises a ValueError that names the field, what it holds and the rule."""
        self._validate_kinds()
        for field in ("layers", "width", "heads", "num_kv_heads", "max_length"):
            _require(getattr(self, field) >= 1, field.removeprefix("num_"), getattr(self, field), "at least 1")
        _require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of the width {self.width}")
        _require(self.heads % self.num_kv_heads == 0, "kv_heads", self.kv_heads, f"a divisor of the heads {self.heads}")
        _require(self.chunk_size is None or self.chunk_size >= 1, "chunk_size", self.chunk_size, "at least 1")
        _require(self.state_size is None or self.state_size >= 2, "state_size", self.state_size, "at least 2")
        _require(self.rate > 0, "rate", self.rate, "positive")
        _require(self.conv_width >= 0, "conv_width", self.conv_width, "at least 0")
        _require(self.mlp_ratio > 0, "mlp_ratio", self.mlp_ratio, "positive")
        _require(self.rotary_base > 0, "rotary_base", self.rotary_base, "positive")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        self._validate_mixers()
        self._validate_lengths()
        size = self.width // self.heads
        odd = f"another option, since the head dimension width / heads = {size} is odd"
        _require(size % 2 == 0 or self.positions not in ("rotary", "xpos"), "positions", self.positions, odd)
        turns = [name for name, _ in self._bare_mixers() if name in ("xpos", "rerope")]
        field = "mixers" if self.mixers else "mixer"
        _require(size % 2 == 0 or not turns, field, getattr(self, field), odd)
        if self.positions == "sinusoidal":
            _require(self.width % 2 == 0, "width", self.width, "even for sinusoidal positions")
        return self

    def _validate_kinds(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            choices = get_args(hints[field.name])
            if choices and all(isinstance(choice, str) for choice in choices):
                check_name(field.name, getattr(self, field.name), choices)
            if hints[field.name] is float:
                value = getattr(self, field.name)
                _require(abs(value) < math.inf, field.name, value, "finite")

    def _validate_lengths(self) -> None:
        _require(self.rotary_factor >= 1, "rotary_factor", self.rotary_factor, "at least 1")
        relative = self.log_scale != "none" or self.rotary_scaling == "yarn"
        known = self.train_length is not None and self.train_length > 1
        _require(known or not relative, "train_length", self.train_length, "above 1 with log_scale or yarn")
        scaled = self.rotary_scaling != "none"
        _require(scaled or self.rotary_factor == 1, "rotary_factor", self.rotary_factor, "1 without rotary_scaling")
        rising = self.rotary_base > 1 or self.rotary_scaling != "yarn"
        _require(rising, "rotary_base", self.rotary_base, "above 1 with yarn")
        turned = self.positions == "rotary"
        _require(turned or self.rotary_scaling == "none", "rotary_scaling", self.rotary_scaling, "none without rotary")
        window = self.rerope_window
        _require(
            window is None or (turned and window >= 1), "rerope_window", window, "None without rotary, else at least 1"
        )
        _require(self.rerope_leak >= 0, "rerope_leak", self.rerope_leak, "at least 0")
        read = window is not None or "rerope" in [name for name, _ in self._bare_mixers()]
        _require(read or self.rerope_leak == 0, "rerope_leak", self.rerope_leak, "0 without rerope_window")
        _require(
            self.sinks >= 0 and (not self.sinks or self.window is not None), "sinks", self.sinks, "0 without a window"
        )
        full = self.full_layers
        _require(full is None or self.window is not None, "full_layers", full, "None without a window")
        _require(full is None or 0 <= full <= self.layers, "full_layers", full, f"in 0 ... layers={self.layers}")
        _require(full in (None, 0, self.layers) or not self.scan_layers, "scan_layers", True, "False with full_layers")
        alpha = self.hierarchical_alpha
        stretched = self.positions == "learned" and 0 < alpha < 1 and alpha != 0.5
        _require(
            alpha == 0 or stretched,
            "hierarchical_alpha",
            alpha,
            "0 without learned positions, else in (0, 1) but not 0.5",
        )
        own = self._with_positions()
        added = self.positions in ("learned", "sinusoidal")
        _require(
            not (own and added), "positions", self.positions, f"rotary or none, since {', '.join(own[:1])} has its own"
        )
        drawn = self.random_positions
        _require(drawn == 0 or (drawn > 0 and not self.counts_positions), "random_positions", drawn, f"0 {COUNTED}")
        _require(
            self.positions != "learned" or drawn <= self.max_length, "random_positions", drawn, "at most max_length"
        )
        for layer in range(self.layers):
            reason = self.make_mixer(layer, causal=False, parent=None).refuses_placing()
            _require(not reason, "positions", self.positions, f"of another kind, or its options others: {reason}")

    def _validate_mixers(self) -> None:
        names = self.layer_mixers()
        try:
            bare = self._bare_mixers()
        except ValueError as error:
            raise ValueError(str(error).replace("mixer", "mixers", 1) if self.mixers else str(error)) from None
        for layer in {text: layer for layer, text in enumerate(names) if "(" in text}.values():
            self._try_mixer(layer)
        _require(
            len(names) == self.layers,
            "mixers",
            self.mixers,
            f"one name a layer: layers is {self.layers}, names are {len(names)}",
        )
        rule = "the same mixer in every layer when scan_layers is set"
        _require(not self.scan_layers or len(set(names)) == 1, "mixers", self.mixers, rule)
        if self.residual_scores:
            without = [name for name, mixer in bare if not mixer.accepts_scores()]
            rule = f"False, since {', '.join(dict.fromkeys(without))} has no scores to hand on; the mixer residual has"
            _require(not without, "residual_scores", True, rule)
        if self.window is not None:
            _require(self.window >= 0, "window", self.window, "at least 0")
            windowed = any(mixer.accepts_window() for _, mixer in bare)
            _require(
                windowed,
                "window",
                self.window,
                f"None, since no layer can limit itself to a window: {', '.join(names)}",
            )

    def _try_mixer(self, layer: int) -> None:
        """Traces one layer's mixer: options of its own are as many kinds as there are kernels, which know what they take."""
        _, bare = self._bare_mixers()[layer]
        mixer = bare.clone(causal=bare.accepts_causal())
        try:
            shape = jax.ShapeDtypeStruct((1, min(8, self.max_length), self.width), self.dtype)
            jax.eval_shape(mixer.init, jax.random.key(0), shape)
            mixer.flops_per_token(self.max_length)
        except Exception as error:
            text = self.layer_mixers()[layer]
            reason = (
                str(error).partition("\n")[0] if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            )
            raise ValueError(f"{'mixers' if self.mixers else 'mixer'} {text!r} cannot be built: {reason}") from None


COUNTED = (
    "where kernels count positions themselves (biases, xpos, rerope, sinks, mixers with positions) or with log_scale"
)
INFERENCE_FIELDS = (
    "window", "sinks", "full_layers", "full_rotary", "rotary_base", "rotary_scaling", "rotary_factor", "train_length", "log_scale", "rerope_window",
    "rerope_leak", "hierarchical_alpha", "chunk_size", "rate",
)  # fmt: skip


def _require(condition: bool, field: str, given: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{field} must be {rule}; got {given!r}")
