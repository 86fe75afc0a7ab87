"""examples/train_lm.py: text, network, arms, steps, runs, rates, the page."""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import math
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples import train_lm
from examples.data.text import TINY_SHAKESPEARE, Vocabulary, load_text
from examples.experiments.language import page, report, speed, training
from examples.experiments.language.arms import ATTENTION, OPTIMISERS, make_optimiser
from examples.experiments.language.comparisons import Speed, Study
from examples.experiments.language.sampling import sample
from examples.experiments.language.settings import Train
from examples.models.gpt import GPT, GPTConfig
from examples.training.runs import FIRST_TUNING_SEED
from examples.training.supervised import State

SIZES = "--depth 1 --heads 2 --width 8 --context 6 --batch-size 4"
SHORT = f"{SIZES} --steps 8 --evaluate-every 2 --warmup 2 --validation-sequences 4"
STUDY = f"study {SHORT} --optimisers muon --cuts whole --grid 0.003 0.03 --seeds 2"
STUDY += " --rest-grid 0.01 0.03"
MODEL = GPTConfig(11, 7, 2, 2, 8)
SCANNED = dataclasses.replace(MODEL, scanned=True)
SETTINGS = {"depth": 2, "heads": 2, "width": 8, "context": 7, "weight_decay": 0.0}


def words(count):
    rng = np.random.default_rng(0)
    known = ["the", "a", "matrix", "polar", "factor", "of", "is", "ein", "Maß.\n"]
    return " ".join(known[i] for i in rng.integers(len(known), size=count))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(600), encoding="utf-8")
    return path


def call(arguments, folder, text_file):
    folders = f"--results {folder} --checkpoints {folder / 'checkpoints'}"
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        train_lm.main(shlex.split(f"{arguments} {folders} --text {text_file}"))
    return told.getvalue()


def recipe_of(**settings):
    config = Study(**SETTINGS | settings)
    return config.recipe(config.arms()[1], 11, text="", level="char", steps=5)


def read(folder):
    with (folder / "language.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------- the text


def test_tokens_are_characters_or_bytes_and_turn_back_into_the_text():
    told = "Größe: 3 €\n\U0001d54a"
    characters = Vocabulary("".join(sorted(set(told))))
    assert characters.size == len(set(told))
    tokens = characters.encode(told)
    assert [sorted(set(told))[i] for i in tokens] == list(told)
    assert characters.decode(tokens) == told
    tokens = Vocabulary().encode(told)
    assert tokens.tolist() == list(told.encode())
    assert Vocabulary().size == 256 and Vocabulary().decode(tokens) == told
    assert Vocabulary().decode([0xC3, 65]) == "\ufffdA"
    with pytest.raises(ValueError, match="'!'; expected one of the 3 of the voc"):
        Vocabulary("abc").encode("ab!")
    with pytest.raises(ValueError, match="'A'"):
        Vocabulary("abc").encode("A")


@pytest.mark.parametrize("level", ["char", "byte"])
def test_the_three_parts_are_the_text_in_its_order(level, text_file):
    content = text_file.read_text(encoding="utf-8")
    text = load_text(text_file, level=level)
    parts = [text.vocabulary.decode(part) for part in text[:3]]
    assert "".join(parts) == content
    whole = len(content) if level == "char" else len(content.encode())
    assert [len(part) for part in text[1:3]] == [whole // 20] * 2
    assert text.name == "words.txt"
    assert text.vocabulary.size == (len(set(content)) if level == "char" else 256)


def test_what_is_missing_is_told_with_its_place(tmp_path, monkeypatch, text_file):
    monkeypatch.setenv("ORTHAX_DATA", str(tmp_path))
    where = tmp_path / "tinyshakespeare" / "input.txt"
    with pytest.raises(FileNotFoundError, match=re.escape(str(where))) as caught:
        load_text()
    assert "--text FILE" in str(caught.value) and "char-rnn" in str(caught.value)
    where.parent.mkdir()
    where.write_text(words(20))
    assert load_text().name == TINY_SHAKESPEARE.parent.name
    (tmp_path / "bytes").write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match=r"is no UTF-8.*--level byte"):
        load_text(tmp_path / "bytes")
    assert load_text(tmp_path / "bytes", level="byte").train.tolist() == [255] * 36
    (tmp_path / "short").write_text("€" * 19)
    with pytest.raises(ValueError, match="has 19 chars; expected at least 20"):
        load_text(tmp_path / "short")
    with pytest.raises(SystemExit, match=r"no text in .*/nowhere"):
        call(f"train {SIZES}", tmp_path, tmp_path / "nowhere")


def test_sequences_foretell_every_token_once():
    tokens = np.arange(23)
    rows = training.windows(tokens, 5)
    assert rows.shape == (4, 6)
    assert rows[:, 1:].ravel().tolist() == [*range(1, 21)]
    assert (rows[:, :-1] + 1 == rows[:, 1:]).all()
    assert training.windows(tokens, 5, 2)[:, 0].tolist() == [0, 15]
    assert (training.windows(tokens, 5, 9) == rows).all()

    recipe = Study(**SETTINGS, batch_size=64).recipe(
        None, 11, text="", level="char", steps=1
    )
    drawn = training.draw(jnp.arange(9), jax.random.key(0), recipe)
    assert set(map(tuple, np.asarray(drawn).tolist())) == {
        tuple(range(8)),
        tuple(range(1, 9)),
    }


# ------------------------------------------------------------------------ the network


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred / deviation * p["scale"] + p["bias"]


def attend(x, p):
    """Return causal attention of one sequence, `(length, width)`, head by head."""
    out = np.zeros_like(x) + p["out"]["bias"]
    for head in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            x @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        for i in range(len(x)):
            scores = np.exp(k[: i + 1] @ q[i] / math.sqrt(q.shape[1]))
            out[i] += scores / scores.sum() @ v[: i + 1] @ p["out"]["kernel"][head]
    return out


def numpy_loss(blocks, p, tokens):
    """Return the losses at every token but the first of one sequence, in nats."""
    x = p["tokens"]["embedding"][tokens[:-1]]
    x = x + p["positions"]["embedding"][: len(x)]
    for block in blocks:
        x = x + attend(layer_norm(x, block["norm1"]), block["attention"])
        y = layer_norm(x, block["norm2"]) @ block["up"]["kernel"] + block["up"]["bias"]
        inner = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
        y = y * (1 + np.tanh(inner)) / 2
        x = x + y @ block["down"]["kernel"] + block["down"]["bias"]
    logits = layer_norm(x, p["norm"]) @ p["tokens"]["embedding"].T
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -likely[np.arange(len(x)), tokens[1:]]


@functools.cache
def networks():
    """Return states of the two networks, of the same large weights."""
    graphs = [
        nnx.split(nnx.eval_shape(lambda m=model: GPT(m, rngs=nnx.Rngs(0))))
        for model in (MODEL, SCANNED)
    ]
    (graph, shapes), (stacked_graph, _) = graphs
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), shapes
    )
    pure = nnx.to_pure_dict(params)
    layers = pure["blocks"]["layers"]
    blocks = [layers[i] for i in (0, 1)]
    stacked = pure | {"blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)}
    return State(graph, params, None, None), State(
        stacked_graph, as_state(graphs[1][1], stacked), None, None
    )


def as_state(like, pure):
    leaves = jax.tree.leaves(pure)
    wanted = jax.tree.leaves(nnx.to_pure_dict(like))
    assert [x.shape for x in leaves] == [x.shape for x in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


@functools.cache
def loss_of(scanned):
    state = networks()[scanned]
    return jax.jit(lambda tokens: training.losses(state, state.params, tokens)[0])


def tokens_of(count=3):
    return np.random.default_rng(1).integers(0, 11, (count, 8)).astype(np.int32)


def test_loss_is_that_of_numpy_scanned_or_not():
    tokens = tokens_of()
    pure = nnx.to_pure_dict(networks()[0].params)
    pure = jax.tree.map(np.float64, pure)
    blocks = [pure["blocks"]["layers"][i] for i in (0, 1)]
    expected = np.stack([numpy_loss(blocks, pure, row) for row in tokens])
    assert expected.std() > 0.5
    for scanned in (False, True):
        found = loss_of(scanned)(tokens)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_later_token_leaves_what_is_before_it_as_it_was(scanned):
    tokens = tokens_of()
    other = tokens.copy()
    other[:, 5] = (tokens[:, 5] + 1) % 11
    one, two = (np.asarray(loss_of(scanned)(x)) for x in (tokens, other))
    np.testing.assert_array_equal(one[:, :4], two[:, :4])  # bit by bit
    assert (one[:, 4:] != two[:, 4:]).all()


def test_what_is_written_is_the_likeliest_when_it_is_cold():
    state = networks()[0]
    recipe = recipe_of()
    vocabulary = Vocabulary("abcdefghijk")
    model = nnx.merge(state.graphdef, state.params)
    logits = jax.jit(lambda tokens: model(tokens))
    for prompt in ("b", "cabbagefaced"):
        tokens = list(vocabulary.encode(prompt))
        for _ in range(12):
            seen = tokens[-7:]
            padded = np.array([seen + [0] * (7 - len(seen))])
            tokens.append(int(logits(padded)[0, len(seen) - 1].argmax()))
        options = {"count": 12, "temperature": 1e-4, "key": jax.random.key(0)}
        found = sample(state, recipe, vocabulary, prompt, **options)
        assert found == vocabulary.decode(tokens[len(prompt) :])
    options |= {"temperature": 3.0}
    drawn = [
        sample(state, recipe, vocabulary, "b", **options | {"key": jax.random.key(i)})
        for i in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# --------------------------------------------------------------------------- the arms


def by_path(tree):
    flat = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in flat
    }


def polar(matrix):
    u, _, v = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return u @ v


def cut_by_hand(kernel, name, attention):
    """Return the polar factor of a kernel of attention, and its longer side."""
    out = name == "out"
    flat = kernel.reshape(-1, 8) if out else kernel.reshape(8, -1)
    if attention == "whole":
        return polar(flat).reshape(kernel.shape), 8
    if attention == "per_head":  # (D, K) or (K, D) for every head
        axis = 0 if out else 1
        heads = [polar(np.take(kernel, h, axis)) for h in range(2)]
        return np.stack(heads, axis), 8
    columns = [np.take(kernel, h, 0 if out else 1).ravel() for h in range(2)]
    factor = polar(np.stack(columns, 1))
    heads = [factor[:, h].reshape((4, 8) if out else (8, 4)) for h in range(2)]
    return np.stack(heads, 0 if out else 1), 32


@functools.cache
def gradients(scanned):
    params = networks()[scanned].params
    rng = np.random.default_rng(2)
    grads = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
    return grads, params


@functools.cache
def first_update(optimiser, attention, scanned):
    grads, params = gradients(scanned)
    arm = Study(**SETTINGS, scan=scanned).arm(optimiser, attention)
    tx = make_optimiser(arm, 0.5, 0.25)

    def update(grads):
        return tx.update(grads, tx.init(params), params)[0]

    return by_path(jax.jit(update)(grads))


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("attention", ATTENTION)
def test_cuts_of_attention_are_those_of_numpy(attention, scanned):
    updates = first_update("orthogonal_sgd", attention, scanned)
    grads = by_path(gradients(scanned)[0])
    seen = 0
    for path, update in updates.items():
        name = path.split("/")[-2]
        if path.split("/")[-1] != "kernel":
            continue
        pairs = [(grads[path], update)]
        if scanned:
            pairs = zip(grads[path], update, strict=True)
        for grad, own in pairs:
            if "attention" in path:
                factor, side = cut_by_hand(grad, name, attention)
            else:
                factor, side = polar(grad), 32
            # One twentieth of it goes into a mean of SGD's momentum.
            expected = -0.5 * 0.05 * 0.2 * math.sqrt(side) * factor
            np.testing.assert_allclose(own, expected, rtol=0, atol=2e-5)
            seen += 1
    assert seen == 2 * 6


def test_arms_share_what_moves_all_but_the_kernels():
    grads, params = gradients(False)
    adamw = optax.adamw(0.25, 0.9, 0.99, weight_decay=0.0)
    expected = by_path(adamw.update(grads, adamw.init(params), params)[0])
    kernels = {}
    for optimiser in OPTIMISERS:
        updates = first_update(optimiser, "whole", False)
        for path, update in updates.items():
            if path.endswith("/kernel"):
                kernels.setdefault(path, []).append(update)
            else:
                np.testing.assert_allclose(update, expected[path], atol=1e-6)
    assert len(kernels) == 12 and len(expected) == 12 + 24
    for path, own in kernels.items():
        if "up" in path:  # components of a square factor have equal sizes already
            for one, two in itertools.combinations(own, 2):
                assert np.abs(one - two).max() > 1e-3
        # AdamW's first step is the sign of the gradient; Muon's has a fifth of that.
        sizes = [np.sqrt((x**2).mean()) for x in own]
        np.testing.assert_allclose(sizes[:2], (0.5, 0.1), rtol=1e-2)


def test_rates_rise_and_fall():
    run = training.Run(recipe_of(), 2, 3.0, "cosine", "tuned", 0, 2, 0.5, 4)
    rates = np.concatenate([run.rates(5, 0), run.rates(5, 1)])
    shares = [0.2, 0.4, 0.6, 0.8, 1.0]
    shares += [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(1, 6)]
    np.testing.assert_allclose(rates, np.outer(shares, (3.0, 0.5)), rtol=1e-6)
    flat = dataclasses.replace(run, schedule="constant", warmup=0)
    assert (flat.rates(5, 1) == (3.0, 0.5)).all()


# --------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(speed, "measure", clock)
        told = call(STUDY, folder, text_file)
    return folder, told


def clock(recipes, rounds, folder):
    """Write that Muon's step takes 1.4 of AdamW's, in place of measuring it."""
    assert rounds == 60
    rows = []
    for recipe, ratio in zip(recipes, (1.0, 1.4), strict=True):
        row = speed.sizes_of(recipe)
        row |= {x: getattr(recipe.arm, x) for x in ("optimiser", "attention", "method")}
        row |= {"seconds": ratio, "low": ratio, "high": ratio, "ratio": ratio}
        rows.append(row | {"tokens_per_s": 1.0, **speed.tables.circumstances()})
    speed.tables.write(folder / speed.NAME, rows, ())


def test_a_study_tunes_alike_and_looks_at_the_test_part_once(finished):
    rows = read(finished[0])
    # AdamW at every pair of two rates, the other one at its rate of the rest.
    arms = [("adamw", "", "", 4, []), ("muon", "whole", "auto", 2, ["equal_time"])]
    expected = [
        (*arm, chosen)
        for *arm, count, more in arms
        for chosen in [report.GRID] * count + [report.TUNED] * 2 + 2 * more
    ]
    names = ("optimiser", "attention", "method", "chosen")
    assert [tuple(row[x] for x in names) for row in rows] == expected
    best = {}
    for row in rows:
        assert row["status"] == "finished" and row["text"] == "words.txt"
        assert bool(row["test_loss"]) == (row["chosen"] == report.TUNED)
        tuning = int(row["seed"]) >= FIRST_TUNING_SEED
        assert tuning == (row["chosen"] == report.GRID)
        # int(4 / 1.4) looks fit into the time of four of AdamW's.
        epochs = 2 if row["chosen"] == report.EQUAL_TIME else 4
        losses = [*map(float, row["validation_loss_curve"].split())]
        assert len(losses) == epochs == int(row["epochs"])
        assert losses[-1] == pytest.approx(float(row["validation_loss"]), rel=1e-3)
        if row["chosen"] == report.GRID:
            known = best.get(row["optimiser"])
            if known is None or losses[-1] < known[0]:
                best[row["optimiser"]] = losses[-1], report.rates_of(row)
        else:
            assert report.rates_of(row) == best[row["optimiser"]][1]
            assert losses[-1] < losses[0] < math.log(int(row["vocabulary"])) + 0.1
        if row["optimiser"] == "muon":
            assert report.rates_of(row)[1] == best["adamw"][1][1]
    assert not list((finished[0] / "checkpoints").iterdir())


def test_what_is_finished_is_not_run_again(finished, text_file, monkeypatch):
    folder, _ = finished
    before = (folder / "language.csv").read_bytes()
    told = call(STUDY, folder, text_file)
    assert told.count("skipped: finished in") == 5
    assert (folder / "language.csv").read_bytes() == before
    text = (folder / "language.md").read_text()
    assert "| `muon` | whole |" in text and "not yet run: `python -m" in text
    assert (folder / "language.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_stopped_ends_as_what_is_not(finished, text_file, tmp_path):
    single = f"train {SHORT} --learning-rate 0.03 --rest-rate 0.03"
    told = call(f"{single} --sample 9", tmp_path / "whole", text_file)
    (whole,) = read(tmp_path / "whole")
    folder, stops = tmp_path / "stopped", 0
    while not (folder / "language.csv").exists():
        told_then = call(f"{single} --minutes 1e-9 --sample 9", folder, text_file)
        stops += "out of time" in told_then
    assert stops == 3
    (found,) = read(folder)
    apart = ("seconds", "tokens_per_s")
    assert {x: found[x] for x in found if x not in apart} == {
        x: whole[x] for x in whole if x not in apart
    }
    # Sampled characters and the line they go on from.
    assert told.splitlines()[2:] == told_then.splitlines()[2:] != []
    assert len("\n".join(told.splitlines()[2:])) >= 9
    assert [x.suffix for x in folder.glob("*.png")] == [".png"]


@pytest.mark.slow
@pytest.mark.parametrize("scan", ["", "--scan"])
def test_every_arm_learns(scan, text_file, tmp_path):
    arguments = STUDY.replace("--optimisers muon --cuts whole", scan)
    more = " --steps 24 --seeds 1 --rounds 2 --grid 0.03 --rest-grid 0.03"
    call(arguments + more, tmp_path, text_file)
    rows = read(tmp_path)
    assert len({(row["optimiser"], row["attention"]) for row in rows}) == 9
    for row in rows:
        if row["chosen"] == report.TUNED:
            chance = math.log(int(row["vocabulary"]))
            assert float(row["test_loss"]) < chance - 0.2, row["optimiser"]
    assert (tmp_path / speed.NAME).exists()


def test_a_step_is_timed(tmp_path):
    config = Speed(**SETTINGS | {"depth": 1}, optimisers=(), rounds=2)
    (recipe,) = config.recipes()
    speed.measure([recipe], config.rounds, tmp_path)
    (row,) = speed.read(tmp_path)
    assert row["ratio"] == "1" and row["vocabulary"] == "256"
    expected = config.batch_size * 7 / float(row["seconds"])
    assert float(row["tokens_per_s"]) == pytest.approx(expected, rel=1e-2)
    assert f"| {float(row['tokens_per_s']):.3g} |" in speed.text([row])


# --------------------------------------------------------------------------- the page


def made_up(finished, optimiser, attention, losses, chosen=report.TUNED):
    """Return rows of an arm for seeds 0, 1, ... from curves of validation losses."""
    like = next(row for row in read(finished[0]) if row["chosen"] == report.TUNED)
    rows = []
    for seed, own in enumerate(losses):
        row = like | {"optimiser": optimiser, "attention": attention}
        row |= {"method": "auto" if attention else "", "seed": str(seed)}
        row |= {"chosen": chosen, "validation_loss": str(own[-1])}
        row |= {"test_loss": str(own[-1] + 1), "epochs": str(len(own))}
        row["validation_loss_curve"] = " ".join(map(str, own))
        row["validation_accuracy_curve"] = " ".join("0.5" for _ in own)
        rows.append(row)
    return rows


def test_the_page_says_what_the_rows_say(finished, tmp_path):
    rows = made_up(finished, "adamw", "", [[4, 3, 2.5, 2], [4, 3, 2.5, 2.2]])
    rows += made_up(finished, "muon", "whole", [[3, 1.0, 1, 1], [4, 3, 1.2, 1.1]])
    rows += made_up(finished, "muon", "heads", [[4, 3, 3, 2.4], [4, 3, 3, 2.3]])
    equal = [[3, 1.5], [4, 1.7]]
    rows += made_up(finished, "muon", "whole", equal, report.EQUAL_TIME)
    whole = rows[2:4]
    # From 3 to 1 it is at 2 half-way: 1.5 of 4; from 3 to 1.2 at 2.2: 2 + 4/9.
    np.testing.assert_allclose(
        report.reached(whole, rows[:2]), [1.5 / 4, (2 + 4 / 9) / 4]
    )
    results = report.Rows(tmp_path / "language.csv")
    for row in rows:
        results.append(row)
    (tmp_path / speed.NAME).write_bytes((finished[0] / speed.NAME).read_bytes())
    text = page.write(tmp_path).read_text()
    (line,) = re.findall(r"\| `muon` \| whole \| .*", text)[:1]
    cells = [cell.strip() for cell in line.split("|")][1:-1]
    # Means of 1 and 1.1, of -1 and -1.1, of 1.5 and 1.7, of -0.5 twice.
    assert cells[3:8] == [
        "1.050 ± 0.050",
        "-1.050 ± 0.050",
        "1.600 ± 0.100",
        "-0.500 ± 0.000",
        "2.050 ± 0.050",
    ]
    assert cells[8:] == ["49 ± 12", "69 ± 17", "1.40", "2"]
    assert "| `muon` | heads | 1.3000 ± 0.1000 | 1.3000 ± 0.1000 | the same | 2 |" in (
        text
    )
    assert "| never 2/2 |" in text
    assert "better: none; worse: muon heads; no further: none" in text
    # Of Student's t with one degree of freedom: 1 - 2 atan(2) / pi.
    assert "with 2 seeds, 30 in a hundred" in text


def test_the_page_names_what_is_not_yet_run(tmp_path):
    text = page.write(tmp_path).read_text()
    commands = re.findall(r"`python -m examples.train_lm (.*?)`", text)
    kinds = {"study": Study, "speed": Speed, "train": Train}
    larger = [shlex.split(x) for x in commands if len(x.split()) > 1]
    assert len(larger) == 2 and text.count("not yet run") == 4
    for kind, *arguments in larger:
        config = train_lm.tyro.cli(kinds[kind], args=arguments)
        assert config.width in (384, 768)


# ---------------------------------------------------------------------- bad settings

WRONG = {
    "--heads 3": "`heads` is 3; expected a divisor of the width, 8",
    "--depth 0": "`depth` is 0; expected at least 1",
    "--steps 7": "`evaluate_every` is 2; expected a divisor of the 7 steps",
    "--b2 1": "`b2` is 1.0; expected at least 0 and below 1",
    "--minutes 0": "`minutes` is 0.0; expected a positive number",
}
WRONG_STUDY = {
    "--grid 0.1 0.01": "`grid` is (0.1, 0.01); expected positive numbers in increasing",
    "--optimisers muon muon": "expected names among muon, normuon, orthogonal_sgd, ",
    "--seeds 0": "`seeds` is 0; expected at least 1",
}
WRONG_TRAIN = {
    "--temperature 0": "`temperature` is 0.0; expected a positive number",
    "--prompt ''": "`prompt` is ''; expected one character or more",
    "--prompt '#'": "has the character '#'; expected one of the",
    "--context 99999": "`context` is 99999; expected less than the",
}
CASES = [("train", x) for x in WRONG | WRONG_TRAIN]
CASES += [("study", x) for x in WRONG_STUDY]


@pytest.mark.parametrize(("kind", "wrong"), CASES)
def test_bad_settings_are_named(kind, wrong, tmp_path, text_file, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        call(f"{kind} {SHORT} {wrong}", tmp_path, text_file)
    told = str(caught.value) + capsys.readouterr().err
    expected = (WRONG | WRONG_TRAIN | WRONG_STUDY)[wrong]
    assert expected in " ".join(told.replace("│", "").split())
