"""What `explain` says an update costs, by hand, and how it prints."""

import html.parser
import re

import jax
import jax.numpy as jnp
import pytest

import orthax
from orthax import components, polar
from orthax.components import ByName, ByPath, Matricisation

TREE = {
    "a": {"kernel": jax.ShapeDtypeStruct((3, 3, 16, 64), "float32")},  # 144 x 64
    "b": {"kernel": jax.ShapeDtypeStruct((64, 100), "bfloat16")},
    "c": {"kernel": jax.ShapeDtypeStruct((512, 1024), "float32")},
    "d": {"kernel": jax.ShapeDtypeStruct((512, 1024), "float32")},
    "e": {"bias": jax.ShapeDtypeStruct((64,), "float32")},
}


def shapes(found):
    return {stack.shape: stack.paths for stack in found.stacks}


def test_on_cpu_small_matrices_are_padded_together_and_large_ones_stay_alone():
    found = orthax.explain(TREE, platform="cpu")
    assert found.platform == "cpu"
    assert found.method == polar.DWH()
    small = {(2, 64, 144): ("a/kernel", "b/kernel")}
    assert shapes(found).keys() == {*small, (1, 512, 1024)}
    assert shapes(found)[2, 64, 144] == small[2, 64, 144]
    assert [s.paths for s in found.stacks if s.shape == (1, 512, 1024)] == [
        ("c/kernel",),
        ("d/kernel",),
    ]
    more = TREE | {f"d{i}": TREE["d"] for i in range(2)}
    (stack,) = (s for s in orthax.explain(more).stacks if s.shape[1] == 512)
    assert stack.shape == (4, 512, 1024)
    assert stack.at_once == 1
    (stack,) = (s for s in found.stacks if s.shape[1] == 64)
    assert stack.bytes == 2 * 64 * 144 * 4
    assert stack.dtype == "float32"
    # Three Gram matrices and two products (10 k^2 l), three inverses and five products.
    assert stack.flops == pytest.approx(
        2 * (10 * 64**2 * 144 + (6 + 10) * 64**3), rel=1e-12
    )


@pytest.mark.parametrize("platform", ["gpu", "tpu", "something new"])
def test_on_accelerators_equal_matrices_share_a_stack(platform):
    found = orthax.explain(TREE, platform=platform)
    assert found.method == polar.NewtonSchulz(precision="high")
    assert shapes(found) == {
        (2, 64, 144): ("a/kernel", "b/kernel"),
        (2, 512, 1024): ("c/kernel", "d/kernel"),
    }


def test_a_method_that_fills_the_null_space_is_not_padded():
    found = orthax.explain(TREE, method=polar.QDWH(), platform="gpu")
    assert (1, 144, 64) in shapes(found)
    assert (1, 64, 100) in shapes(found)


def test_the_table_adds_up():
    found = orthax.explain(TREE, platform="gpu")
    *_, last = str(found).splitlines()
    flops = sum(stack.flops for stack in found.stacks)
    assert last.split()[:2] == ["one", "update"]
    assert float(last.split()[2]) == pytest.approx(flops / 1e6, rel=1e-2)
    assert float(last.split()[3]) == pytest.approx(
        sum(stack.bytes for stack in found.stacks) / 2**20, rel=1e-2
    )
    assert "by NewtonSchulz(" in str(found)


@pytest.mark.parametrize("same", [1, 4])
def test_stacks_are_what_orthogonalise_works_on(monkeypatch, same):
    """Every stack that the default method of this platform gets, and no other."""
    tree = TREE | {f"d{i}": TREE["d"] for i in range(same)}
    seen = []
    factor = polar.DWH.factor
    monkeypatch.setattr(
        polar.DWH, "factor", lambda self, x: seen.append(x.shape) or factor(self, x)
    )
    jax.clear_caches()  # A method is called once for all batches of one shape.
    tx = orthax.orthogonalise()
    jax.eval_shape(lambda g: tx.update(g, tx.init(g))[0], tree)
    stacks = orthax.explain(tree, platform="cpu").stacks
    assert {*seen} == {(s.at_once, *s.shape[1:]) for s in stacks}


def test_a_tree_without_matrices_costs_nothing():
    found = orthax.explain({"bias": jnp.ones(3)})
    assert found.stacks == ()
    assert "Worked on" not in str(found)


def test_the_rule_and_the_method_are_checked():
    with pytest.raises(TypeError, match="polar method"):
        orthax.explain(TREE, method="svd")
    ambiguous = {"mix": {"kernel": jnp.ones((3, 4, 5))}}
    found = orthax.explain(ambiguous, components.ByName())
    assert found.rows[0].error
    assert found.stacks == ()


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def block(i):
    """Return leaves with long names, large shapes, long reasons and errors."""
    attention = {"query": struct(768, 12, 64), "out": struct(12, 64, 768)}
    leaves = {f"self_attention/multi_head/{k}/kernel": x for k, x in attention.items()}
    leaves["downsample_convolution/kernel"] = struct(3, 3, 512, 2048)
    leaves["a_name_that_does_not_end_before_everybody_is_asleep_and_more/w"] = struct(
        768, 3072
    )
    leaves["temporal_mixing/kernel"] = struct(3, 256, 1024)
    leaves["position_dependent/mixing_matrix"] = struct(48, 48)
    leaves["expert_gates/fused/kernel"] = struct(512, 2048)
    return {f"encoder_stack/layers_{i}/{path}": x for path, x in leaves.items()}


GATES = ("gates", Matricisation((0,), (1,), blocks=(512, 256, 256, 1024)))
DEEP = {f"transformer/{path}": x for i in range(12) for path, x in block(i).items()}


def reason(row):
    return f"? {row.reason}" if row.guess else row.reason


def table_of(text):
    """Return the columns of the first table, each leaf's lines put together."""
    table = text.split("\n\n")[0].splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", table[0])]
    lines = []
    for line in table[1:]:
        spans = zip(starts, [*starts[1:], None], strict=True)
        cells = [line[a:b].strip() for a, b in spans]
        if cells[1]:  # Lines with a shape begin a leaf; a path may go on below.
            lines.append([""] * len(cells))
        lines[-1] = [one + other for one, other in zip(lines[-1], cells, strict=True)]
    return list(zip(*lines, strict=True))


def alone(cells):
    return ["".join(cell.split()) for cell in cells]


@pytest.mark.parametrize("rule", [ByName(), ByName(attention="per_head")])
def test_the_table_fits_a_page_and_loses_nothing(rule):
    found = orthax.explain(block("a") | block("b"), rule, platform="gpu")
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    paths, shapes_shown, *_, why = table_of(text)
    assert alone(paths) == [row.path for row in found.rows]
    assert list(shapes_shown) == [str(row.shape) for row in found.rows]
    assert alone(why) == alone(map(reason, found.rows))


def test_equal_layers_are_one_line():
    odd = {"transformer/encoder_stack/layers_3/expert_gates/fused/kernel": struct(8, 9)}
    found = orthax.explain(DEEP | odd, platform="gpu")
    assert len(found.rows) == len(DEEP)
    paths, shapes_shown, *_ = table_of(str(found))
    leaves = dict(zip(alone(paths), shapes_shown, strict=True))
    assert len(leaves) == len(paths) == len(block(0)) + 1
    pattern = "transformer/encoder_stack/layers_*/expert_gates/fused/kernel"
    assert leaves[f"11x{pattern}"] == "(512, 2048)"
    assert leaves[pattern.replace("*", "3")] == "(8, 9)"
    counts = [int(path.split("x")[0]) for path in alone(paths) if path[0].isdigit()]
    assert sum(counts) + 1 == len(DEEP)


def test_matrices_of_many_sizes_are_broken_between_them():
    rule = ByPath([GATES, ("", None)])
    text = str(orthax.explain(DEEP | {"gates/kernel": struct(512, 2048)}, rule))
    assert max(map(len, text.splitlines())) <= 100
    for n in GATES[1].blocks:
        assert f"1 x (512 x {n})" in text


def test_a_table_that_fits_is_left_as_it_is():
    short = {"encoder/layers/kernel": struct(3, 4)}
    head, line, *_ = str(orthax.explain(short)).splitlines()
    assert head.split()[:4] == ["leaf", "shape", "rows", "columns"]
    cells = ("encoder/layers/kernel", "(3, 4)", "0", "1", "-", "1 x (3 x 4)")
    assert re.split("  +", line) == [*cells, "dense kernel"]


def test_errors_are_wrapped_and_their_advice_is_given_once():
    text = str(orthax.explain(DEEP, platform="gpu"))
    assert text.count("components.from_function") == 1
    text = " ".join(text.split())
    assert text.count("temporal_mixing/kernel' and 11 like it of shape") == 1


@pytest.mark.parametrize(
    ("rule", "unused"),
    [
        (ByName(skip=("heads", "c")), ("skip 'heads'",)),
        (ByName(stacked=("layer", ("a", 0))), ("stacked 'layer'",)),
        (ByPath([("conv", None), ("kernel|bias", None)]), ("pattern 'conv'",)),
        (components.OnlyConvolutions(ByName(skip=("hat",))), ("skip 'hat'",)),
        (ByName(skip=("a/kernel",)), ()),
    ],
)
def test_what_the_rule_names_and_no_path_has_is_said(rule, unused):
    found = orthax.explain(TREE, rule)
    assert found.unused == unused
    assert ("names what matches no leaf" in str(found)) == bool(unused)
    for name in unused:
        assert name in str(found)


class Cells(html.parser.HTMLParser):
    """The text of every cell, and every tag."""

    def __init__(self):
        super().__init__()
        self.cells, self.tags, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("br",):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_notebooks_get_html_with_nothing_shortened_and_all_escaped():
    tree = DEEP | {"<script>alert('x')</script> & co/kernel": struct(4, 5)}
    found = orthax.explain(tree, platform="gpu")
    text = found._repr_html_()
    read = Cells()
    read.feed(text)
    assert not read.open
    assert {*read.tags} == {"table", "thead", "tbody", "tr", "th", "td", "p", "br"}
    for row in found.rows:
        pattern = "12 x " + re.sub(r"\d+", "*", row.path)
        assert {pattern, row.path} & {*read.cells}
        assert str(row.shape) in read.cells
    guessed = {re.sub(r"\d+", "*", row.path) for row in found.rows if row.guess}
    assert text.count("#fff0c0") == len(guessed) > 0
    assert text.count("#f8d0d0") == 1
    assert any(cell.startswith("? any leaf of rank 2") for cell in read.cells)
    assert "one update" in read.cells
    assert "..." not in "".join(read.cells)
    assert "Batches on gpu, by NewtonSchulz(precision=" in text


def test_an_explanation_without_leaves_prints():
    assert "0 of 0 leaves" in str(orthax.explain({}))
    assert "0 of 0 leaves" in orthax.explain({})._repr_html_()
