"""What holds for all inputs, tried on inputs that nobody would write down.

    python -m pytest tests/test_properties.py           # needs `pip install hypothesis`, else it is skipped
"""
import dataclasses
import json
import math
import tempfile
from pathlib import Path

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis", reason="property-based tests need `pip install hypothesis`")
from hypothesis import given, strategies as st  # noqa: E402

from chroma import ChromaExtractor, match_length  # noqa: E402
from config import FIELDS, Config, load  # noqa: E402
from data.captions import clean, read_text  # noqa: E402
from encodec import EncodecModel, stream  # noqa: E402
from patterns import (CoarseFirstPattern, DelayPattern, MusicLMPattern, ParallelPattern,  # noqa: E402
                      UnrollPattern)
from system.errors import UserError  # noqa: E402

torch.set_num_threads(1)
SPECIAL = 1000
hypothesis.settings.register_profile("ours", deadline=None, database=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("ours")


# --- patterns ---------------------------------------------------------------------------------------------

delays = st.lists(st.integers(0, 6), min_size=1, max_size=6)
patterns = st.one_of(
    st.builds(lambda d, first: DelayPattern(tuple(d), flatten_first=first), delays, st.integers(0, 3)),
    st.builds(lambda d: CoarseFirstPattern(tuple(d)), delays), st.builds(ParallelPattern, st.integers(1, 6)),
    st.builds(MusicLMPattern, st.integers(1, 6), st.integers(1, 4)),
    st.builds(lambda k: UnrollPattern(tuple(range(k))), st.integers(1, 6)))


def codebooks(pattern) -> int:
    return 1 + max(k for cells in pattern.layout(1) for _, k in cells)


@given(patterns, st.integers(1, 40))
def test_every_code_has_one_place_and_comes_back(pattern, T):
    K = codebooks(pattern)
    cells = [cell for cells in pattern.layout(T) for cell in cells]
    assert len(cells) == len(set(cells)) and {(t, k) for t in range(T) for k in range(K)} <= set(cells)
    codes = torch.arange(2 * K * T).view(2, K, T) % SPECIAL
    sequence, real = pattern.build(codes, SPECIAL)
    assert sequence.shape == (2, K, pattern.steps(T)) and real.sum() == K * T
    assert ((sequence == SPECIAL) == ~real).all()
    again, mask = pattern.revert(sequence, T, SPECIAL)
    assert torch.equal(again, codes) and mask.all()


@given(delays, st.integers(1, 40))
def test_delayed_codebooks_stand_where_their_delay_says(delays, T):
    pattern = DelayPattern(tuple(delays))
    codes = torch.arange(len(delays) * T).view(1, len(delays), T)
    sequence, _ = pattern.build(codes, -1)
    for k, delay in enumerate(delays):
        assert torch.equal(sequence[0, k, 1 + delay:][:T], codes[0, k])
    short, _ = pattern.build(codes, -1, keep_only_valid_steps=True)
    first = min(delays)
    assert torch.equal(short, sequence[..., :T + 1 + first])
    _, mask = pattern.revert(short, T, -1, keep_only_valid_steps=True)
    assert mask.sum(1).tolist() == [max(0, T - delay + first) for delay in delays]


@given(patterns, st.integers(1, 30), st.booleans())
def test_logits_stand_one_column_before_their_code(pattern, T, keep):
    K = codebooks(pattern)
    sequence, _ = pattern.build(torch.arange(K * T).view(1, K, T), -1, keep)
    logits = torch.roll(sequence, -1, 2)[..., None].float()  # in column s what column s + 1 holds
    found, mask = pattern.revert_logits(logits, T, keep)
    assert torch.equal(found[0, ..., 0][mask], torch.arange(K * T).view(K, T).float()[mask])
    assert found[0][~mask].isnan().all() and (keep or mask.all())


@given(patterns, st.integers(1, 30), st.data())
def test_a_prompt_fills_the_beginning(pattern, T, data):
    K, T0 = codebooks(pattern), data.draw(st.integers(1, T))
    codes = torch.arange(K * T).view(1, K, T)
    whole, _ = pattern.build(codes, -1)
    part, real = pattern.build(codes[..., :T0], -1, T=T)
    assert part.shape == whole.shape and real.sum() == K * T0
    assert torch.equal(part[0, real], whole[0, real])
    if T0 < T:      # no column before the first step has a code of what comes after the prompt
        before, later = whole[..., :pattern.first_step(T, T0)], codes[..., T0:]
        assert set(before.flatten().tolist()).isdisjoint(later.flatten().tolist())


# --- lengths ----------------------------------------------------------------------------------------------

@given(st.integers(1, 3000), st.integers(4, 10), st.sampled_from([1, 2]), st.booleans())
def test_chroma_has_as_many_frames_as_it_says(L, radix2_exp, C, argmax):
    extractor = ChromaExtractor(8000, radix2_exp=radix2_exp, argmax=argmax)
    chroma = extractor(torch.sin(torch.arange(L) * 0.3).expand(2, C, L))
    assert extractor.frames(L) == max(L, extractor.window) // extractor.hop + 1
    assert chroma.shape == (2, extractor.frames(L), 12)
    assert chroma.isfinite().all() and 0 <= chroma.min() and chroma.max() <= 1 + 1e-6
    assert not argmax or (chroma.sum(-1) == 1).all()


@given(st.integers(1, 50), st.integers(1, 120))
def test_a_melody_is_repeated_or_cut_to_its_length(m, M):
    chroma = torch.arange(m).view(1, m, 1).float().expand(1, m, 12)
    assert match_length(chroma, M)[0, :, 0].tolist() == [i % m for i in range(M)]


SMALL = dict(task="codec", n_filters=4, dimension=4, card=8, n_q=2, kmeans_iters=0)
codecs = st.builds(
    lambda **values: Config(**SMALL, **values),
    ratios=st.lists(st.integers(1, 5), min_size=1, max_size=3), causal=st.booleans(),
    pad_mode=st.sampled_from(["constant", "reflect"]), lstm=st.integers(0, 1), true_skip=st.booleans(),
    norm=st.sampled_from(["weight_norm", "time_group_norm", "none"]), channels=st.sampled_from([1, 2]),
    kernel_size=st.integers(1, 8), last_kernel_size=st.integers(1, 8),
    residual_kernel_size=st.integers(1, 4), n_residual_layers=st.integers(1, 2),
    dilation_base=st.integers(1, 3))


@given(codecs, st.integers(1, 300))
def test_the_codec_turns_any_length_into_frames_and_back(config, L):
    torch.manual_seed(0)
    codec, T = EncodecModel(config).eval(), math.ceil(L / config.stride)
    wav = torch.randn(1, config.channels, L)
    codes = codec.encode(wav)
    assert codes.shape == (1, 2, T) and codes.max() < 8
    assert codec.decode(codes).shape == (1, config.channels, T * config.stride)
    assert codec(wav)[0].shape == wav.shape


@given(codecs, st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_audio_in_pieces_of_any_length_is_coded_as_the_whole(config, lengths):
    config = dataclasses.replace(config, norm="none", pad_mode="constant")
    torch.manual_seed(0)
    codec, wav = EncodecModel(config).eval(), torch.randn(1, config.channels, sum(lengths))
    with torch.no_grad():
        whole = codec.encoder(wav)
        pieces = torch.cat(list(stream(codec.encoder, iter(wav.split(lengths, -1)))), -1)
    assert pieces.shape == whole.shape
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


# --- configuration ----------------------------------------------------------------------------------------

literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3), max_leaves=4)
keys = st.sampled_from([*FIELDS, "argmax", "kmeans_init"])      # the last two are of former versions
flags = st.builds("--{}={}".format, keys, st.text(max_size=20) | literals)


def only_user_errors(function, *args):
    """What it returns, None where it says in one short sentence why it does not."""
    try:
        return function(*args)
    except UserError as error:
        assert str(error) and len(str(error)) < 600
        return None


@given(st.lists(st.text(max_size=20) | flags, max_size=4))
def test_any_flags_are_a_configuration_or_a_mistake_of_the_user(argv):
    config = only_user_errors(load, argv)
    assert config is None or isinstance(config, Config)


@given(st.text(max_size=200) | st.builds("{} = {!r}\n".format, keys, literals) | st.binary(max_size=100))
def test_any_file_is_a_configuration_or_a_mistake_of_the_user(content):
    with tempfile.NamedTemporaryFile(suffix=".py") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        file.flush()
        only_user_errors(load, [file.name])


@given(st.dictionaries(keys | st.text(max_size=9), literals, max_size=4) | literals)
def test_any_json_is_a_configuration_or_a_mistake_of_the_user(values):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(values))
        config = only_user_errors(Config.from_json, path)
        if config is not None:
            config.save(path)
            assert Config.from_json(path) == config


@given(st.fixed_dictionaries({}, optional=dict(
    dim=st.integers(1, 60).map(lambda n: 48 * n), lr=st.floats(1e-9, 1e6),
    out_dir=st.text(min_size=1, max_size=20), ratios=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    causal=st.booleans(), seed=st.integers(0, 2 ** 32), top_p=st.floats(0, 1),
    betas=st.tuples(*[st.floats(0, 0.999)] * 2), stem=st.sampled_from(FIELDS["stem"].metadata["choices"]))))
def test_flags_file_and_json_give_the_same_configuration(values):
    by_flags = load([f"--{key}={value}" for key, value in values.items()])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.py")
        path.write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()), encoding="utf-8")
        by_flags.save(Path(folder, "config.json"))
        assert load([str(path)]) == by_flags == Config.from_json(Path(folder, "config.json"))
    for key, value in values.items():
        assert getattr(by_flags, key) == (tuple(value) if isinstance(value, list) else value)


# --- captions ---------------------------------------------------------------------------------------------

FIELDS_OF_CAPTIONS = """title artist description genre instrument key bpm moods keywords weight melody
    x""".split()


@given(st.dictionaries(st.sampled_from(FIELDS_OF_CAPTIONS), literals, max_size=6))
def test_any_caption_is_cleaned_to_what_training_takes(fields):
    meta = clean(fields)
    json.dumps(meta).encode()
    assert clean(meta) == meta, "clean stays clean"
    for name, value in meta.items():
        assert isinstance(value, dict(bpm=float, moods=list, keywords=list).get(name, str)) and value


@given(st.binary(max_size=300))
def test_any_bytes_are_a_text_or_refused(data):
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            read_text(Path(file.name)).encode()
        except ValueError as error:
            assert str(error) == "is not text"
