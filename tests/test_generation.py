"""Generation, column by column: audiocraft's tokens, guidance, sampling; nothing leaks between items.

    python -m pytest tests/test_generation.py
"""
import pytest
import torch

from conditioners import Conditions
from deviations import golden, same
from models import OPTIONS, conditions_of, make, model_of_audiocraft, prefix_of
from sample import Settings, condition_passes, draw, generate, guide, stream_window


# --- audiocraft's numbers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("two_step", [False, True])
def test_greedy_tokens_are_those_of_audiocraft(two_step):
    g = golden("greedy")
    lm = model_of_audiocraft(g, "", "prepend")
    settings = dict(guidance=float(g["cfg_coef"]), temperature=0.0)

    def passes(conditional, null):
        null = null.expand(2, -1, -1)
        if two_step:
            return [prefix_of(conditional), prefix_of(null)]
        return [prefix_of(torch.cat([conditional, null]))]
    tokens = "language model, greedy tokens"
    one = passes(g["cond"], g["null"])
    same(tokens, "audiocraft", generate(lm, one, 20, [0, 1], **settings), g["codes"])
    continued = generate(lm, one, 20, [0, 1], prompt=g["prompt"], **settings)
    same(tokens, "audiocraft", continued, g["codes_prompt"])
    two = passes(torch.cat([g["cond"], g["two.cond2"]], 1), torch.cat([g["null"], g["two.null2"]]))
    same(tokens, "audiocraft", generate(lm, two, 20, [0, 1], **settings), g["two.codes"])


# --- batches and conditions -------------------------------------------------------------------------------

@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_never_changes_an_item(options):
    """Alone, or beside a longer text, with and without melodies: the same tokens for the same seed."""
    lm, T = make(**options), 10
    items = [("slow", 7, 40), (None, None, 41), ("a much longer description of the music", 2, 42)]

    def run(items):
        texts, classes, seeds = zip(*items)
        passes = condition_passes(lm, conditions_of(lm, texts, classes), T, 3.0)
        return generate(lm, passes, T, list(seeds), top_k=5, guidance=3.0)
    together = run(items)
    for i, item in enumerate(items):
        assert torch.equal(run([item])[0], together[i]), item


def test_conditions_steer_the_tokens():
    """Two melodies a tritone apart, none, another text: four different results from one seed."""
    lm, results = make(), set()
    for text, pitch_class in (("flute", 9), ("flute", 3), ("flute", None), ("organ", 9)):
        passes = condition_passes(lm, conditions_of(lm, [text], [pitch_class]), 20, 3.0)
        results.add(tuple(generate(lm, passes, 20, [0], temperature=0).flatten().tolist()))
    assert len(results) == 4


def test_a_prompt_is_kept_and_no_condition_is_fine():
    lm = make(text="none", melody="none")
    prompt = torch.randint(lm.config.card, (2, 4, 6))
    codes = generate(lm, [Conditions()], 15, [0, 1], prompt=prompt)
    assert codes.shape == (2, 4, 15) and torch.equal(codes[..., :6], prompt) and (codes >= 0).all()


def test_frames_come_once_they_are_whole():
    lm, T, prompt = make(), 12, torch.randint(5, (2, 4, 3))
    conditions = conditions_of(lm, ["flute", None], [None, None])
    passes = condition_passes(lm, conditions, T)
    pieces = list(stream_window(lm, passes, T, [0, 1], prompt, Settings()))
    assert [piece.shape[-1] for piece in pieces] == [0, 0, 0] + 9 * [1]    # delays of 0 to 3 columns
    assert torch.equal(torch.cat([prompt, *pieces], -1), generate(lm, passes, T, [0, 1], prompt))


@pytest.mark.parametrize("guidance", [0.0, 3.0, 8.0])
def test_one_pass_does_without_any_condition(guidance):
    """Both halves of guidance are the same then."""
    lm, T = make(), 12
    nothing, something = (conditions_of(lm, [None, text], [None, None]) for text in (None, "flute"))
    one = condition_passes(lm, nothing, T, guidance)
    two = condition_passes(lm, something, T, guidance)
    assert [passes.batch for passes in one + two] == [2, 4]
    alone = generate(lm, one, T, [0, 1], guidance=guidance)
    assert torch.equal(alone[0], generate(lm, two, T, [0, 1], guidance=guidance)[0])
    steps = [lm.conditioner(nothing, lm.pattern.steps(T))] * 2
    assert torch.equal(alone, generate(lm, steps, T, [0, 1], guidance=guidance))


# --- guidance ---------------------------------------------------------------------------------------------

def test_guide_is_linear():
    conditional, null = torch.randn(2, 1, 4, 16)
    torch.testing.assert_close(guide(conditional, null, 1.0), conditional)
    assert torch.equal(guide(conditional, null, 0.0), null)
    torch.testing.assert_close(guide(conditional, null, 3.0), 3 * conditional - 2 * null)


def test_guidance_one_is_conditional_zero_is_unconditional_and_two_steps_equal_one():
    lm, T = make(), 15

    def run(guidance, pitch_class=4, two_step=False):
        # the null text is one frame; with a text of one token (its end) both passes have as many frames
        passes = condition_passes(lm, conditions_of(lm, [""], [pitch_class]), T, guidance, two_step)
        assert len(passes) == 1 + (two_step and guidance != 1)
        return generate(lm, passes, T, [0], guidance=guidance, temperature=0)
    conditional, unconditional = run(1), run(1, pitch_class=None)
    assert not torch.equal(conditional, unconditional)
    # the doubled batch with guidance 1
    doubled = condition_passes(lm, conditions_of(lm, [""], [4]), T, 3.0)
    assert torch.equal(generate(lm, doubled, T, [0], guidance=1.0, temperature=0), conditional)
    assert torch.equal(run(0), unconditional)
    for guidance in (1.5, 3.0, 8.0):
        assert torch.equal(run(guidance), run(guidance, two_step=True))
    assert not torch.equal(run(3.0), run(30.0))
    assert not torch.equal(run(3.0, two_step=True), run(30.0, two_step=True))


# --- sampling ---------------------------------------------------------------------------------------------

def allowed(probabilities, top_k, top_p):
    """The probabilities (V,) that sampling draws from, by audiocraft's rule: top_p alone, else top_k."""
    kept, before = torch.zeros_like(probabilities), 0.0
    for rank, entry in enumerate(probabilities.argsort(descending=True).tolist()):
        if before <= top_p if top_p > 0 else rank < (top_k or len(kept)):
            kept[entry] = probabilities[entry]
        before += float(probabilities[entry])
    return kept / kept.sum()


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 250])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.75, 0.9, 0.999, 1.0])
def test_top_p_replaces_top_k(top_k, top_p):
    torch.manual_seed(1)
    logits, n, temperature = torch.randn(1, 1, 12) * 2, 4000, 1.3
    uniform = (torch.arange(n) + 0.5).view(n, 1) / n
    draws = draw(logits.expand(n, 1, 12), uniform, temperature, top_k, top_p).flatten()
    found = torch.bincount(draws, minlength=12) / n
    expected = allowed((logits.flatten() / temperature).softmax(0), top_k, top_p)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits, n = torch.randn(1, 1, 8) * 2, 4000
    uniform = (torch.arange(n) + 0.5).view(n, 1) / n

    def frequencies(**settings):
        draws = draw(logits.expand(n, 1, 8), uniform, **settings)
        return torch.bincount(draws.flatten(), minlength=8) / n

    def agrees(found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    expected = logits.flatten().softmax(0)
    agrees(frequencies(), expected)
    agrees(frequencies(top_k=100), expected)                # more than there are: all
    agrees(frequencies(temperature=2.0), (logits.flatten() / 2).softmax(0))
    top = expected.topk(3).indices
    kept = torch.zeros(8).index_put((top,), expected[top])
    agrees(frequencies(top_k=3), kept / kept.sum())
    p = float(expected.sort(descending=True).values[:2].sum()) + 1e-4   # needs the third entry to be reached
    agrees(frequencies(top_p=p), kept / kept.sum())
    for greedy in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-6)):
        assert (draw(logits.expand(n, 1, 8), uniform, **greedy) == logits.argmax()).all()
