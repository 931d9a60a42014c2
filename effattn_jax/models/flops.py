"""Floating-point operations of a model, counted on paper, since compilers count a loop's body once."""

from effattn_jax.models.config import ModelConfig
from effattn_jax.nn import ShortConvolution


def flops_per_token(config: ModelConfig, vocab_size: int | None, context: int, *, causal: bool = True) -> int:
    """Forward operations a token of a sequence of `context` tokens; a multiply-add is two. Training costs three times
    as much.

    sum_l [ mixer_l + conv 2 w D + feed-forward 4 D F (6 D F gated) ] + logits 2 D A, with

      softmax     2 D (2 N H + 2 K H) + 4 N H S,   S = context, or window + 1 if less (a causal half is not taken off,
      as usual) linear      2 D (2 N H + 2 K H) + 4 N M H    (a state of M features, H for most: its update and its reading)
      min_gru     6 D^2 + 5 D

    Norms, activations, rotary turns and the softmax's exponentials are left out: they are of order D + S, not D^2 + D
    S.

    Args:
      config: the model's.
      vocab_size: A, or None for a model without a layer of logits over tokens (a classifier).
      context: T.
      causal: False counts the bidirectional mixers of a classifier.

    >>> flops_per_token(ModelConfig(layers=1, width=4, heads=1), 10, 8)
    592
    """
    config.validate()
    mlp = (6 if config.mlp == "gated" else 4) * config.width * config.mlp_width
    convolution = (
        ShortConvolution(config.width, config.conv_width, parent=None).flops_per_token(context)
        if config.conv_width
        else 0
    )
    mixers = sum(
        config.make_mixer(layer, causal=causal, parent=None).flops_per_token(context) for layer in range(config.layers)
    )
    return mixers + config.layers * (mlp + convolution) + (2 * config.width * vocab_size if vocab_size else 0)
