"""Every transformation of the room against every column of the certificate of composition."""

import pytest

from effattn_jax import optim
from tests import optim_certificate as certificate

# Public functions of the room that are no transformations, or make none by themselves.
OTHERS = {
    "accumulate_gradients", "amos_table", "exclude", "fgm", "flooding", "global_norm", "gradient_penalty", "group_table", "hidden_noise",
    "implicit_gradient_regularization", "input_noise", "label_noise", "logged_norms", "mean_to_sum", "pgd", "sharpness_aware",
    "virtual_adversarial", "weight_noise",
}  # fmt: skip


def test_every_transformation_is_in_the_table():
    assert {name for name in optim.__all__ if name.islower()} == set(certificate.OURS) | OTHERS


@pytest.mark.parametrize("name", certificate.OURS)
def test_composes_with_everything(name):
    found = {column: certificate.outcome(certificate.OURS[name], column) for column in certificate.CHECKS}
    assert not {column: reason for column, (mark, reason) in found.items() if mark == "✗"}


def test_the_columns_find_what_is_wrong():
    """Known defects of optax: local norms (D11), NaN in a micro-batch (D4), a Lookahead that is not drop-in (D8)."""
    for name, column in [("clip_by_global_norm", "shard_map"), ("adam", "NaN micro-batch"), ("lookahead", "masked")]:
        assert certificate.outcome(certificate.THEIRS[name], column)[0] == "✗"
