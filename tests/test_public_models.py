"""The default rule on the leaves of public models, whose right axes are facts.

They were read off the models' programs, without names: the axes that a product sums
over are rows, those that it keeps are columns. `HARD` holds the kinds of leaves that
names got wrong once; with `ORTHAX_DATA` all leaves of `models.json` are scored.
"""

import collections
import json
import os
from pathlib import Path

import jax
import pytest

from benchmarks import models
from orthax import components
from orthax.internal.components import Decision

Cut = components.Matricisation
RAISES, GUESS = "raises", "guess"
FOLDER = os.environ.get("ORTHAX_DATA", "none")


# Path, shape, the right rows and columns (None: to be left alone), and what the rule
# does besides deciding so: raise, or call it a guess, right or wrong.
HARD = [
    # Einsums, heads first: the letters say which axes are summed over.
    ("layers/attn/kv_einsum/w", (2, 4, 64, 16), ((2,), (1, 3)), RAISES),
    ("attn/kv_einsum/kernel", (2, 2, 64, 16), ((2,), (1, 3)), RAISES),
    ("layer_0/attn/qkv_einsum/w", (3, 8, 64, 16), ((2,), (1, 3)), RAISES),
    ("layers/attn/q_einsum/w", (3, 8, 64, 16), ((2,), (1, 3)), RAISES),
    ("layers/attn/attn_vec_einsum/w", (8, 8, 16, 64), ((1, 2), (3,)), RAISES),
    ("layer_0/attn/q_einsum/w", (8, 2304, 256), ((1,), (0, 2)), ""),
    ("layers/0/attn/q_einsum/kernel", (4, 1152, 256), ((1,), (0, 2)), ""),
    ("layer_0/attn/attn_vec_einsum/w", (8, 256, 2304), ((0, 1), (2,)), ""),
    ("layer_0/mlp/gating_einsum", (2, 2304, 9216), ((1,), (0, 2)), RAISES),
    ("Einsum_0/kernel", (4, 4, 16, 32), ((0, 1), (2, 3)), RAISES),
    ("einsum_dense/kernel", (16, 4, 5), ((0,), (1, 2)), RAISES),
    # Dense layers of many axes, or stacked.
    ("DenseGeneral_0/kernel", (4, 4, 16, 16), ((0, 1), (2, 3)), RAISES),
    ("DenseGeneral_0/kernel", (8, 8, 4, 5), ((0, 1), (2, 3)), RAISES),
    ("Dense_0/kernel", (5, 5, 64, 32), ((2,), (3,)), RAISES),
    ("Dense_0/kernel", (3, 64, 32), ((1,), (2,)), RAISES),
    ("decoder/layers/mlp/wi_0/kernel", (4096, 3, 11008), ((0,), (2,)), RAISES),
    ("MoeBlock_0/wi_0", (8, 3, 64, 256), ((2,), (3,)), RAISES),
    ("moe/experts/up/kernel", (8, 8, 64, 256), ((2,), (3,)), RAISES),
    ("self_attention/qkv_proj/kernel", (64, 3, 4, 16), ((0,), (2, 3)), RAISES),
    ("self_attention/qkv_proj/kernel", (3, 3, 64, 64), ((2,), (3,)), RAISES),
    ("self_attention/wkv_b/kernel", (32, 3, 4, 16), ((0,), (2, 3)), RAISES),
    ("self_attention/wkv_b/kernel", (32, 1, 4, 16), ((0,), (2, 3)), RAISES),
    # Attention by its many names.
    ("layers/0/attn/q_proj/kernel", (1024, 16, 128), ((0,), (1, 2)), ""),
    ("layers/0/attn/k_proj/w", (896, 2, 64), ((0,), (1, 2)), ""),
    ("layers/0/attn/o_proj/w", (14, 64, 896), ((0, 1), (2,)), ""),
    ("attention/to_q/kernel", (64, 4, 16), ((0,), (1, 2)), ""),
    ("attention/to_out_0/kernel", (4, 16, 64), ((0, 1), (2,)), ""),
    ("attention/to_out/0/kernel", (4, 16, 64), ((0, 1), (2,)), ""),
    ("multi_head_attention/attention_output/kernel", (4, 8, 32), ((0, 1), (2,)), ""),
    ("attention/query_w", (256, 8, 32), ((0,), (1, 2)), ""),
    ("attention/output_w", (8, 32, 256), ((0, 1), (2,)), ""),
    ("outer_product_mean/output_w", (32, 32, 128), ((0, 1), (2,)), GUESS),
    ("blocks/attn1/query/kernel", (3, 64, 64), ((1,), (2,)), RAISES),
    ("blocks/attn1/query/kernel", (64, 3, 64), ((0,), (2,)), RAISES),
    ("blocks/attn1/out/kernel", (3, 64, 64), ((1,), (2,)), RAISES),
    ("blocks/attn1/out/kernel", (64, 3, 64), ((0,), (2,)), RAISES),
    ("blocks/attn1/out/kernel", (8, 384, 512), ((1,), (2,)), GUESS),
    ("decoder/attention/out/kernel", (384, 8, 512), ((0,), (2,)), RAISES),
    ("decoder/attention/out/kernel", (48, 3, 64), ((0,), (2,)), GUESS),
    ("blocks/attn1/o_proj/kernel", (26, 2048, 2304), ((1,), (2,)), RAISES),
    ("attention/query/kernel", (8, 64, 16), ((1,), (0, 2)), RAISES),
    ("attention/query/kernel", (12, 192, 3, 64), ((1,), (2, 3)), RAISES),
    ("attention/key/kernel", (3, 3, 64, 16), ((2,), (1, 3)), RAISES),
    # Convolutions: transposed, depthwise, with one axis of taps, of other layouts.
    ("conv2d_transpose/kernel", (3, 3, 8, 16), ((0, 1, 3), (2,)), GUESS),
    ("ConvTranspose_0/kernel", (3, 3, 8, 16), ((0, 1, 3), (2,)), GUESS),
    ("ConvTranspose_0/kernel", (3, 3, 16, 16), ((0, 1, 2), (3,)), GUESS),
    ("conv2_d_transpose/w", (3, 3, 8, 16), ((0, 1, 3), (2,)), ""),
    ("conv1d_transpose/kernel", (3, 8, 16), ((0, 2), (1,)), GUESS),
    ("up1/up/kernel", (2, 2, 64, 32), ((0, 1, 2), (3,)), GUESS),
    ("Conv_2/kernel", (3, 32, 8), ((0, 1), (2,)), ""),
    ("conv1d/kernel", (3, 32, 32), ((0, 1), (2,)), ""),
    ("encoder/convs/0/kernel", (3, 32, 32), ((0, 1), (2,)), ""),
    ("Conv_0/kernel", (12, 3, 32, 32), ((1, 2), (3,)), RAISES),
    ("conv1d/kernel", (12, 3, 32, 32), ((1, 2), (3,)), RAISES),
    ("conv1d/kernel", (3, 3, 32, 32), ((1, 2), (3,)), RAISES),
    ("conv2d/kernel", (3, 3, 3, 32, 32), ((1, 2, 3), (4,)), RAISES),
    ("conformer/pointwise_conv1/kernel", (12, 1, 32, 64), ((2,), (3,)), GUESS),
    ("GraphConv_0/kernel", (4, 32, 64), ((1,), (2,)), RAISES),
    ("recurrent_block/conv_1d/w", (4, 64), None, RAISES),
    ("recurrent_block/conv_1d/w", (26, 4, 64), None, RAISES),
    ("mixer/conv1d/conv/kernel", (4, 1, 160), None, RAISES),
    ("mixer/q_conv1d/kernel", (4, 64), None, GUESS),
    ("dwconv/kernel", (7, 7, 1, 96), None, ""),
    ("block_0/depthwise/kernel", (4, 64), None, ""),
    ("block_1_depthwise/kernel", (3, 3, 96, 1), None, ""),
    ("separable_conv2d/depthwise_kernel", (3, 3, 8, 1), None, ""),
    ("separable_conv2d/pointwise_kernel", (1, 1, 8, 16), ((2,), (3,)), ""),
    ("Conv_1/kernel", (3, 3, 1, 32), None, GUESS),
    ("Conv_1/kernel", (3, 3, 32, 1), None, GUESS),
    ("conv/w", (32, 32, 3, 3), ((1, 2, 3), (0,)), RAISES),
    ("SpectralConv2d_0/kernel", (32, 32, 12, 12), ((0,), (1,)), RAISES),
    ("convnext_stage_0_pointwise_conv_1/kernel", (96, 384), ((0,), (1,)), ""),
    ("patch_embeddings/proj/kernel", (16, 16, 3, 768), ((0, 1, 2), (3,)), ""),
    ("patch_embed/proj/kernel", (2, 16, 16, 3, 96), ((0, 1, 2, 3), (4,)), GUESS),
    ("block_1_expand/kernel", (1, 1, 64, 384), ((2,), (3,)), ""),
    ("mixer/fc1/kernel", (1, 1, 64, 256), ((2,), (3,)), ""),
    ("token_mix/kernel", (8, 8, 64, 64), ((2,), (3,)), GUESS),
    # Matrices that may be something else: fused, routers, lookups, norms.
    ("blocks/attn/qkv/kernel", (64, 192), ((0,), (1,)), GUESS),
    ("mlp/gate_up_proj/kernel", (64, 512), ((0,), (1,)), GUESS),
    ("attention/to_kv/kernel", (64, 128), ((0,), (1,)), GUESS),
    ("h/0/attn/c_attn/kernel", (64, 192), ((0,), (1,)), GUESS),
    ("mixer/in_proj/kernel", (64, 296), ((0,), (1,)), GUESS),
    ("moe/router/kernel", (64, 8), ((0,), (1,)), GUESS),
    ("block_sparse_moe/gate/kernel", (64, 8), ((0,), (1,)), GUESS),
    ("mlp/gate_proj/kernel", (64, 256), ((0,), (1,)), ""),
    ("mlp/gate/kernel", (64, 256), ((0,), (1,)), ""),
    ("token_mixer", (64, 64), ((0,), (1,)), GUESS),
    ("wte/w", (100, 64), None, GUESS),
    ("embed/kernel", (100, 64), None, GUESS),
    ("pos_emb/w", (16, 64), None, GUESS),
    ("patch_embed/kernel", (48, 64), ((0,), (1,)), ""),
    ("layers/ln_1/w", (12, 64), None, RAISES),
    ("altup_unembed_projection_0", (64, 64), ((0,), (1,)), GUESS),
    ("unembed", (64, 100), ((0,), (1,)), GUESS),
    ("time_embed/linear_1/kernel", (64, 256), ((0,), (1,)), ""),
    ("q_einsum/lora/b", (4, 64), ((0,), (1,)), ""),
    ("attn/wkv_b", (32, 128), ((0,), (1,)), GUESS),
    # Recurrent cells; `BLOCKS` counts their gates.
    ("lstm/linear/w", (96, 256), ((0,), (1,)), ""),
    ("gru/w_h", (64, 192), ((0,), (1,)), ""),
    ("conv2_dlstm/input_to_hidden/w", (3, 3, 4, 20), ((0, 1, 2), (3,)), ""),
    ("lstm/lstm_cell/kernel", (32, 64), ((0,), (1,)), GUESS),
    ("lstm/lstm_cell/recurrent_kernel", (16, 64), ((0,), (1,)), ""),
    # Lookups, vectors, and what state-space models have.
    ("emb/table", (10, 64), None, ""),
    ("query_emb", (7, 32), None, ""),
    ("latents", (7, 32), None, ""),
    ("synthesis/const", (1, 4, 4, 64), None, ""),
    ("attn/rel_pos_h", (27, 64), None, ""),
    ("scale_shift_table", (1, 2, 64), None, ""),
    ("MAPHead_0/probe", (1, 8, 192), None, ""),
    ("difference_control", (1, 1, 1, 64), None, ""),
    ("embedder.embeddings/data_array", (100, 64), None, ""),
    ("embedder/weight/0", (100, 64), None, RAISES),
    ("ln/weight/0", (3, 64), None, RAISES),
    ("lin/bias/0", (2, 3), None, ""),
    ("outer_product_mean/output_b", (3, 128), None, ""),
    ("attention/gating_b", (8, 32), None, ""),
    ("attention/sinks", (64, 2), None, ""),
    ("seq/Lambda_re", (16, 32), None, ""),
    ("seq/A_im", (16, 32), None, ""),
    ("seq/log_step", (1, 32), None, ""),
    ("seq/P", (16, 32), None, GUESS),
    ("seq/B", (16, 32), None, GUESS),
    ("seq/C", (16, 32, 2), None, RAISES),
]
BLOCKS = {
    "lstm/linear/w": 4,
    "gru/w_h": 3,
    "conv2_dlstm/input_to_hidden/w": 4,
    "lstm/lstm_cell/kernel": 4,
    "lstm/lstm_cell/recurrent_kernel": 4,
}


def decided(path, shape):
    """Return the default rule's decision, or None where it raises."""
    try:
        return components.ByName().decide(path, jax.ShapeDtypeStruct(shape, "float32"))
    except ValueError as error:
        assert f"'{path}'" in str(error)
        return None


def sides(shape, rows, columns):
    """Return rows and columns without axes of one: a polar factor swaps them freely."""
    return {
        frozenset(axis for axis in part if shape[axis] > 1) for part in (rows, columns)
    }


def is_right(shape, right, cut):
    """Return whether a cut makes the right matrices, or vectors if nothing is right."""
    found = cut and sides(shape, cut.rows, cut.columns)
    if right is None:
        return cut is None
    return found == sides(shape, *right)


@pytest.mark.parametrize(("path", "shape", "right", "how"), HARD, ids=str)
def test_hard_leaves(path, shape, right, how):
    found = decided(path, shape)
    if how == RAISES:
        assert found is None
        return
    assert found is not None
    assert found.guess == (how == GUESS)
    if how != GUESS:  # a guess may be wrong, and is marked
        assert is_right(shape, right, found.cut)
    if path in BLOCKS:
        assert found.cut.blocks == BLOCKS[path]


@pytest.mark.skipif(
    not (Path(FOLDER) / "models.json").exists(), reason="ORTHAX_DATA has no models.json"
)
def test_no_leaf_of_a_public_model_is_wrong_in_silence():
    every = json.loads((Path(FOLDER) / "models.json").read_text())
    public = [model for model in every if not model["equinox"]]
    assert len(public) == 76
    count, silent = collections.Counter(), []
    for model in public:
        for leaf in model["leaves"]:
            path, shape, kind = leaf["path"], tuple(leaf["shape"]), leaf["kind"]
            right = (leaf["rows"], leaf["columns"]) if kind == "matrix" else None
            found = decided(path, shape)
            if found is None:
                outcome = "raises"
            elif is_right(shape, right, found.cut) or kind == "vector":
                outcome = "right"
            elif found.guess:
                outcome = "guess"
            elif found.cut is None:
                outcome = "left alone"
            else:
                outcome = "wrong"
                silent.append(f"{model['name']}: {path} {shape}")
            count[outcome] += leaf["count"]
    assert not silent
    # T5 multiplies its tables by one-hot vectors: matrices that look like lookups.
    assert count["left alone"] <= 3
    assert count["guess"] <= 10
    assert count["right"] >= 3_800, count


def test_what_a_decision_is_worth():
    leaf = {"shape": [8, 4, 6], "kind": "matrix", "rows": [0], "columns": [1, 2]}
    decision = Decision(Cut((1, 2), (0,)), "")
    assert models.outcome(leaf, decision) == "right"
    assert models.outcome(leaf, decision._replace(cut=Cut((0,), (2,)))) == "wrong"
    guess = Decision(Cut((0,), (2,)), "", True)
    assert models.outcome(leaf, guess) == "flagged"
    assert models.outcome(leaf, Decision(None, "")) == "left"
    assert models.outcome(leaf, None) == "raised"
    table = leaf | {"shape": [100, 8], "kind": "embed"}
    assert models.outcome(table, models.by_rank("embedding", (100, 8))) == "wrong"
    assert models.outcome(table, models.by_name("embedding", (100, 8))) == "right"
    vector = table | {"shape": [1, 8], "kind": "vector"}
    assert models.outcome(vector, models.by_rank("w", (1, 8))) == "right"
