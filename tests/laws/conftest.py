"""Which tests of the laws a brief member goes through: every law, once, in its hardest case. LAWS=all runs all of everything.

Compiling is what the battery costs, about 250 programs for a member that goes through all of it. Members with loops of their own do; what runs on
their loops (`runs_on` in its table line) and the attention-free mixers are held to each law by the tests named here.
"""

import pytest


def holding(*words: str):
    """Only the cases whose id holds one of the words."""
    return lambda item: any(word in item.callspec.id for word in words)


def always(_) -> bool:
    return True


BRIEFLY = {
    "test_form_equals_reference": holding("float64"),
    "test_states_and_their_gradients_agree_with_the_steps": always,
    "test_weights_get_gradients": always,
    "test_random_problems_equal_reference": always,
    "test_every_split_with_segments_and_key_masks": always,
    "test_every_position_of_a_short_row": always,
    "test_masked_keys_do_not_exist": holding("nan"),
    "test_padding_equals_removing": always,
    "test_rows_with_nothing_to_attend": always,
    "test_any_mask_of_pairs": holding("bidirectional"),
    "test_linear_time_mixers_refuse_pairs": holding("jit"),
    "test_packed_equals_alone": always,
    "test_packed_equals_alone_in_reverse": always,
    "test_normalised_recurrences": always,
    "test_every_length": always,
    "test_other_numbers_of_keys": holding("5-12"),
    "test_more_queries_than_keys_before_empty_slots": always,
    "test_batch_axes": holding("(0,)"),
    "test_output_has_the_value_dtype": holding("bfloat16"),
    "test_states_are_kept_in_float32": holding("bfloat16"),
    "test_half_precision_over_65536_steps": holding("bfloat16"),
    "test_transformation": always,
    "test_decoding_compiles_once": always,
    "test_temporaries_are_linear_in_the_length": holding("plain-gradient"),
    "test_nothing_is_unrolled_over_time": always,
    "test_mixer_mistakes": holding("jit"),
    "test_recurrence_mistakes": holding("jit"),
    "test_token_mixer_mistakes": holding("jit"),
    "test_more_tokens_than_places": always,
    "test_each_weight_is_checked": always,
    "test_option_mistakes": holding("jit"),
    "test_each_input_is_checked": holding("jit"),
    "test_a_state_of_other_sizes": holding("jit"),
    "test_a_full_cache_is_an_error": always,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a brief member is not held to here."""
    kept, left_out = [], []
    for item in items:
        subject = getattr(item, "callspec", None) and item.callspec.params.get("subject")
        if not getattr(subject, "brief", False):
            kept.append(item)
            continue
        holds = BRIEFLY.get(item.originalname)
        (kept if holds is not None and holds(item) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
