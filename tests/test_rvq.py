"""Residual vector quantizer against audiocraft's numbers, and what must hold beyond them.

    python -m pytest tests/test_rvq.py
"""
import os

import pytest
import torch
import torch.distributed as dist

import rvq
from commands import exit_code, start
from deviations import golden, near, same
from rvq import ResidualVectorQuantizer
from system.errors import UserError

BUFFERS = ("embed", "embed_avg", "cluster_size")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- audiocraft's numbers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("start", ["warm", "fresh"])
def test_training_passes_equal_those_of_audiocraft(start):
    g = {key.removeprefix(f"{start}."): value for key, value in golden("rvq_train").items()}
    quantizer = ResidualVectorQuantizer(8, 3, 16, decay=0.99, kmeans_init=False, threshold_dead=0).train()
    for k, codebook in enumerate(quantizer.codebooks):
        for name in BUFFERS:
            getattr(codebook, name).copy_(g[f"init.{name}"][k])
    for i in range(5):
        x = g["x"][i].requires_grad_()
        quantized, codes, penalty = quantizer(x)
        (penalty + (quantized * g["w"]).mean()).backward()
        same("quantizer, codes", "audiocraft", codes, g["codes"][i])
        near("quantizer, output", "audiocraft", quantized, g["quantized"][i], 1e-5)
        near("quantizer, commitment loss", "audiocraft", penalty, g["penalty"][i], 1e-5)
        near("quantizer, gradient", "audiocraft", x.grad, g["grad_x"][i], 1e-5)
        for k, codebook in enumerate(quantizer.codebooks):
            for name in BUFFERS:
                found, expected = getattr(codebook, name), g[name][i][k]
                near("quantizer, entries and statistics", "audiocraft", found, expected, 1e-4)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)      # each relative to itself
    x = g["eval.x"]
    codes = quantizer.eval().encode(x)
    same("quantizer, codes", "audiocraft", codes, g["eval.codes"])
    near("quantizer, output", "audiocraft", quantizer.decode(codes), g["eval.decoded"], 1e-5)
    two = quantizer.encode(x, n_q=2)
    same("quantizer, codes", "audiocraft", two, g["eval.codes_2q"])
    near("quantizer, output", "audiocraft", quantizer.decode(two), g["eval.decoded_2q"], 1e-5)


def test_evaluation_changes_nothing_and_agrees_with_encode():
    quantizer = ResidualVectorQuantizer(6, 3, 16, kmeans_init=False).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    x = noise(2, 6, 11)
    quantized, codes, _ = quantizer(x)
    assert torch.equal(codes, quantizer.encode(x))
    torch.testing.assert_close(quantized, quantizer.decode(codes))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


# --- k-means -----------------------------------------------------------------------------------------------

def blobs(n, centers, seed=0):
    """Vectors (1, Z, n) around given centers (number, Z)."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(centers), (n,), generator=generator)
    return (centers[pick] + 0.01 * torch.randn(n, centers.shape[1], generator=generator)).T[None]


def test_kmeans_start_finds_the_clusters_and_is_reproducible():
    centers = noise(4, 5, seed=1) * 10
    quantizers = [ResidualVectorQuantizer(5, 1, 32, kmeans_iters=10, threshold_dead=0) for _ in range(2)]
    for quantizer in quantizers:
        assert not quantizer.codebooks[0].inited
        quantizer.train()(blobs(500, centers))
        assert quantizer.codebooks[0].inited
    for name in BUFFERS:
        assert torch.equal(*(getattr(q.codebooks[0], name) for q in quantizers))
    x = blobs(200, centers, seed=2)
    error = (x - quantizers[0].eval()(x)[0]).square().mean()
    assert error < 1e-3
    # sums and counts belong to the entries: the next pass keeps them in place
    codebook = quantizers[0].codebooks[0]
    before = codebook.embed.clone()
    quantizers[0].train()(x)
    assert (codebook.embed - before).abs().max() < 0.05


def test_start_and_search_never_hold_samples_times_entries(monkeypatch):
    largest, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(rvq.F, "linear", lambda *a: largest.append(linear(*a).numel()) or linear(*a))
    monkeypatch.setattr(rvq, "CHUNK", 1000)
    monkeypatch.setattr(rvq, "KMEANS_SAMPLES", 4)
    x = torch.randn(1, 3, 3000)
    ResidualVectorQuantizer(3, 1, 50, kmeans_iters=2).train()(x)
    assert max(largest) <= 1000  # 3000 x 50 distances in all


def test_without_a_kmeans_start_entries_are_random_and_trained_on_at_once():
    torch.manual_seed(0)
    quantizers = [ResidualVectorQuantizer(4, 1, 32, **options).train()
                  for options in (dict(kmeans_iters=0), dict(kmeans_init=False))]
    for quantizer in quantizers:
        codebook, = quantizer.codebooks
        assert codebook.inited and len(codebook.embed.unique(dim=0)) == 32
        before = codebook.embed.clone()
        quantizer(noise(1, 4, 100))
        assert not torch.equal(codebook.embed, before)


def test_fewer_vectors_than_entries():
    quantizer = ResidualVectorQuantizer(4, 2, 64).train()
    for seed in range(3):
        quantized, codes, loss = quantizer(noise(1, 4, 5, seed=seed))
        assert quantized.isfinite().all() and loss.isfinite() and codes.max() < 64
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


# --- dead entries ------------------------------------------------------------------------------------------

def test_a_restarted_entry_survives_the_pass_and_is_used():
    generator = torch.Generator().manual_seed(3)
    quantizer = ResidualVectorQuantizer(4, 1, 16, kmeans_init=False, threshold_dead=2.0).train()
    codebook = quantizer.codebooks[0]
    x = torch.randn(1, 4, 800, generator=generator)
    codebook.embed.copy_(x[0].T[:16])
    codebook.cluster_size.fill_(50.0)
    codebook.embed[5] = 1000.0  # where no vector ever is
    codebook.cluster_size[5] = 0.0
    codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
    quantizer(x)
    assert (x[0].T - codebook.embed[5]).norm(dim=1).min() < 1e-6  # now one of the vectors
    assert codebook.cluster_size[5] > 2.0
    torch.testing.assert_close(codebook.embed_avg[5] / codebook.cluster_size[5], codebook.embed[5])
    _, codes, _ = quantizer(torch.randn(1, 4, 800, generator=generator))
    assert (codes == 5).any()
    assert codebook.embed[5].abs().max() < 10


def test_small_batches_do_not_restart_everything():
    quantizer = ResidualVectorQuantizer(4, 1, 64, kmeans_init=False, threshold_dead=2.0).train()
    codebook = quantizer.codebooks[0]
    x = noise(1, 4, 64)
    codebook.embed.copy_(x[0].T)
    codebook.embed_avg.copy_(x[0].T)
    codebook.cluster_size.fill_(1.0)  # one vector an entry: all below 2
    quantizer(x)
    torch.testing.assert_close(codebook.embed, x[0].T)


def test_restarts_bring_all_entries_into_use():
    centers = noise(32, 4, seed=5) * 3
    used = {}
    for threshold in (0.0, 2.0):
        quantizer = ResidualVectorQuantizer(4, 1, 32, decay=0.8, kmeans_init=False, threshold_dead=threshold)
        quantizer.train().codebooks[0].embed.copy_(centers[:1] + 0.01 * torch.randn(32, 4))
        for i in range(60):
            _, codes, _ = quantizer(blobs(640, centers, seed=i))
        used[threshold] = len(codes.unique())
    assert used[2.0] >= 29 and used[2.0] > used[0.0]


def test_live_share_counts_the_entries_that_are_used():
    quantizer = ResidualVectorQuantizer(4, 2, 8, kmeans_init=False)
    first, second = quantizer.codebooks
    first.cluster_size.copy_(torch.tensor([0, 0.001, 1, 1, 1, 1, 1, 1]))    # live above 1 % of 0.75
    second.cluster_size.fill_(3.0)
    assert quantizer.live_share() == [0.75, 1.0]


# --- training options --------------------------------------------------------------------------------------

def test_quantizer_dropout_draws_every_number_of_codebooks_in_training_only():
    quantizer = ResidualVectorQuantizer(4, 3, 8, kmeans_iters=2, q_dropout=True).train()
    x = noise(1, 4, 40)
    assert {quantizer(x)[1].shape[1] for _ in range(30)} == {1, 2, 3}
    assert quantizer(x, n_q=2)[1].shape[1] == 2
    assert quantizer.eval()(x)[1].shape[1] == 3


def test_resuming_from_the_buffers_continues_exactly():
    x = [noise(1, 4, 50, seed=i) for i in range(6)]
    whole, first, second = (ResidualVectorQuantizer(4, 2, 32, kmeans_iters=3, q_dropout=True).train()
                            for _ in range(3))
    for batch in x:
        whole(batch)
    for batch in x[:3]:
        first(batch)
    second.load_state_dict(first.state_dict())
    for batch in x[3:]:
        second(batch)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_half_precision_autocast_does_not_change_codes():
    quantizer = ResidualVectorQuantizer(16, 2, 64, kmeans_init=False).eval()
    x = noise(1, 16, 200)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x)[1], quantizer.encode(x))


@pytest.mark.parametrize("n_q", [0, -1, 5])
def test_asking_for_codebooks_that_are_not_there(n_q):
    with pytest.raises(UserError, match="3 codebooks"):
        ResidualVectorQuantizer(4, 3, 8).encode(torch.randn(1, 4, 5), n_q=n_q)


# --- two processes -----------------------------------------------------------------------------------------

def learn(argv):
    """One of `world` processes trains codebooks on its part of each batch; the first saves them."""
    rank, world, out = int(argv[0]), int(argv[1]), argv[2]
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    quantizer = ResidualVectorQuantizer(4, 3, 16, kmeans_iters=5, q_dropout=True).train()
    torch.manual_seed(0)
    batches = torch.randn(5, 4, 4, 40)
    batches[3:] *= 5  # far from what the entries know: some die
    quantizer.codebooks[0].decay = 0.3
    for batch in batches:
        quantizer(batch.chunk(world)[rank])
    if rank == 0:
        torch.save(quantizer.state_dict(), out)
    # without destroy_process_group: in torch 2.6 a process may wait for a file that the other has deleted
    os._exit(0)


def train_with(world, path):
    pids = [start(learn, rank, world, path) for rank in range(world)]
    assert [exit_code(pid) for pid in pids] == [0] * world
    return torch.load(path, weights_only=True)


def test_two_processes_learn_the_codebooks_of_one_with_the_joint_batch(tmp_path):
    two, one = train_with(2, tmp_path / "two.pt"), train_with(1, tmp_path / "one.pt")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
