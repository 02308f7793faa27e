"""Residual vector quantizer: a latent vector as K small integers (EnCodec, arXiv 2210.13438, section 3.2).

    python rvq.py          # how K codebooks close in on random vectors, one after the other

Codebook 1 picks its entry nearest to the vector, codebook 2 the one nearest to what is left over, and so on:

    r_1 = x     c_k = argmin_v |r_k - e_k[v]|     r_(k+1) = r_k - e_k[c_k]     x ~ e_1[c_1] + ... + e_K[c_K]

Four codebooks of 2,048 entries tell 2^44 vectors apart; a single one would need 2^44 entries. Entries are not
learned by gradient: e = m / N, moving averages of the sum and the number of the vectors nearest to e (arXiv
1711.00937, appendix A.1). The gradient passes the quantizer unchanged; a commitment loss pulls x to e.
"""
import torch
import torch.nn.functional as F
from torch import nn

from system.errors import UserError
from system.processes import gather_rows

KMEANS_SAMPLES = 64   # vectors per entry that k-means looks at, at most
CHUNK = 2 ** 22       # distances held at a time (16 MB)


class ResidualVectorQuantizer(nn.Module):
    """K Euclidean codebooks of `card` entries of width Z; each quantizes what the one before left over."""

    def __init__(self, dimension, n_q, card, decay=0.99, kmeans_init=True,
                 kmeans_iters=50, threshold_dead=2.0, q_dropout=False,
                 epsilon=1e-5):
        super().__init__()
        self.q_dropout = q_dropout  # train with a random number of codebooks
        iters = kmeans_iters if kmeans_init else 0
        codebooks = [Codebook(dimension, card, decay, iters, threshold_dead, epsilon) for _ in range(n_q)]
        self.codebooks = nn.ModuleList(codebooks)

    def forward(self, x, n_q=None):
        """x (B, Z, T) -> quantized (B, Z, T), codes (B, K, T), commitment loss (mean over codebooks).

        In training the codebooks learn from the x of all processes, which must be of equal size.
        """
        B, Z, T = x.shape
        x = x.float()  # half precision would pick wrong neighbors
        residual = x.transpose(1, 2).reshape(B * T, Z)                  # r_1: one row per frame
        gathered, own = residual.detach(), slice(None)
        if self.training:
            gathered, own = gather_rows(gathered)                       # (processes · B T, Z)
            gathered = gathered.nan_to_num(0.0, 0.0, 0.0)  # a NaN would stay in the averages for good
            # Passes so far seed all draws: all processes draw alike, and so does a resumed run.
            passes = [int(codebook.inited) for codebook in self.codebooks]
            if n_q is None and self.q_dropout:
                generator = _generator(-1, passes[0])
                dropped = torch.randint(len(self.codebooks), (), generator=generator)
                n_q = 1 + int(dropped)
        all_codes, losses = [], []
        for k, codebook in enumerate(self._active(n_q)):
            if self.training and passes[k] == 0:
                codebook.kmeans_init(gathered, _generator(k, 0))
            codes = nearest(gathered, codebook.embed)                   # c_k (n,)
            entries = codebook.embed.float()[codes]                     # e_k[c_k] (n, Z)
            if self.training:
                codebook.ema_update(gathered, codes, _generator(k, passes[k] + 1))
            losses.append(F.mse_loss(residual, entries[own]))           # equation 3
            residual = residual - entries[own]                          # r_(k+1)
            gathered = gathered - entries
            all_codes.append(codes[own].view(B, T))
        quantized = x - residual.view(B, T, Z).transpose(1, 2)          # sum of the entries (B, Z, T)
        quantized = x + (quantized - x).detach()  # straight through: the gradient for x is the identity
        codes = torch.stack(all_codes, 1)                               # (B, K, T)
        return quantized, codes, torch.stack(losses).mean()

    @torch.no_grad()
    def encode(self, x, n_q=None):
        """x (B, Z, T) -> codes (B, K, T), K = n_q or all. Raises UserError if there are fewer codebooks."""
        B, Z, T = x.shape
        x = x.float()
        residual = x.transpose(1, 2).reshape(B * T, Z)
        all_codes = []
        for codebook in self._active(n_q):
            codes = nearest(residual, codebook.embed)                   # (B T,)
            residual = residual - codebook.embed[codes]
            all_codes.append(codes.view(B, T))
        return torch.stack(all_codes, 1)

    def decode(self, codes):
        """codes (B, K, T), K at most n_q -> sum of their entries (B, Z, T)."""
        total = 0
        for k, codebook in enumerate(self._active(codes.shape[1])):
            total = total + F.embedding(codes[:, k], codebook.embed)    # (B, T, Z)
        return total.transpose(1, 2)

    def live_share(self):
        """Share of live entries per codebook: those with an average count over 1 % of the codebook's mean."""
        counts = torch.stack([codebook.cluster_size for codebook in self.codebooks])    # (K, V)
        live = counts > 0.01 * counts.mean(1, keepdim=True)
        return live.float().mean(1).tolist()

    def _active(self, n_q):
        K = len(self.codebooks)
        if n_q is not None and not 1 <= n_q <= K:
            raise UserError(f"n_q = {n_q}: this quantizer has {K} codebooks, ask for 1 or more")
        return self.codebooks[:n_q]


class Codebook(nn.Module):
    """V entries e (`embed`) with the moving averages m (`embed_avg`) and N (`cluster_size`)."""

    def __init__(self, dimension, card, decay, kmeans_iters, threshold_dead, epsilon):
        super().__init__()
        self.decay = decay  # 0.99: half of an average comes from the last 69 passes
        self.kmeans_iters = kmeans_iters
        self.threshold_dead = threshold_dead
        self.epsilon = epsilon
        embed = torch.zeros(card, dimension)
        if not kmeans_iters:
            nn.init.kaiming_uniform_(embed)
        passes = 0.0 if kmeans_iters else 1.0   # in training so far; "inited" is EnCodec's name
        self.register_buffer("inited", torch.full((1,), passes))
        self.register_buffer("cluster_size", torch.zeros(card))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    @torch.no_grad()
    def kmeans_init(self, x, generator):
        """First batch x (n, Z): entries become its k-means centers (Lloyd's algorithm)."""
        V = len(self.embed)
        sample = _pick(x, min(len(x), KMEANS_SAMPLES * V), generator)
        centers = _pick(x, V, generator)
        for _ in range(self.kmeans_iters):
            counts, sums = _statistics(sample, nearest(sample, centers), V)
            means = sums / counts[:, None].clamp(min=1)
            centers = torch.where(counts[:, None] > 0, means, centers)
        counts, _ = _statistics(x, nearest(x, centers), V)
        counts.clamp_(min=1)  # a center without vectors keeps its place until it counts as dead
        self.embed.copy_(centers)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(centers * counts[:, None])  # audiocraft's m = e shrinks e at the next pass

    @torch.no_grad()
    def ema_update(self, x, codes, generator):
        """Moves the averages by one batch x (n, Z) with codes (n,), then restarts dead entries."""
        e, m, N = self.embed, self.embed_avg, self.cluster_size
        counts, sums = _statistics(x, codes, len(e))
        N.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        m.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        total = N.sum()
        share = (N + self.epsilon) / (total + len(N) * self.epsilon)    # Laplace: no division by 0
        smoothed = share * total
        e.copy_(m / smoothed[:, None])
        self.inited += 1
        if self.threshold_dead > 0:
            mean = N.mean()
            # The quarter is for batches of few vectors per entry: by threshold_dead alone, all would be dead.
            dead = N < (mean / 4).clamp(max=self.threshold_dead)
            dead_rows = dead[:, None]
            fresh = _pick(x, len(N), generator)                         # (V, Z): vectors of this batch
            # as entries of average use; audiocraft replaces e alone, which e = m / N then undoes
            e.copy_(torch.where(dead_rows, fresh, e))
            m.copy_(torch.where(dead_rows, fresh * mean, m))
            N.copy_(torch.where(dead, mean, N))


@torch.no_grad()
def nearest(x, entries):
    """x (n, Z), entries (V, Z) -> argmin_v |x - e_v|^2 = argmax_v (x . e_v - |e_v|^2 / 2) (n,), in chunks."""
    rows = max(1, CHUNK // len(entries))
    with torch.autocast(x.device.type, enabled=False):
        entries = entries.float()
        bias = entries.square().sum(1) * -0.5
        codes = []
        for chunk in x.split(rows):
            scores = F.linear(chunk, entries, bias)                     # (rows, V)
            codes.append(scores.argmax(1))
        return torch.cat(codes)


def _statistics(x, codes, V):
    """Count (V,) and sum (V, Z) of the vectors x (n, Z) of each entry."""
    counts = torch.bincount(codes, minlength=V).to(x)
    sums = x.new_zeros(V, x.shape[1])
    sums.index_add_(0, codes, x)
    return counts, sums


def _pick(x, n, generator):
    """n random rows of x, each at most once if there are enough."""
    rows = torch.randperm(len(x), generator=generator)[:n]
    if len(x) < n:
        rows = torch.randint(len(x), (n,), generator=generator)
    return x[rows.to(x.device)]


def _generator(codebook, draw):
    return torch.Generator().manual_seed(1_000_003 * (codebook + 2) + draw)


if __name__ == "__main__":
    torch.manual_seed(0)
    rvq = ResidualVectorQuantizer(dimension=16, n_q=6, card=256, kmeans_iters=10)
    for _ in range(10):
        rvq(torch.randn(1, 16, 4096))
    vectors = torch.randn(1, 16, 4096)      # not those that entries were fitted to: of these less is left
    codes = rvq.eval().encode(vectors)
    print(f"vectors {tuple(vectors.shape)} -> codes {tuple(codes.shape)}; first: {codes[0, :, 0].tolist()}")
    for k in range(1, 7):
        left = vectors - rvq.decode(codes[:, :k])
        power = vectors.square().mean()
        error = float(left.square().mean() / power)
        print(f"{k} codebook{'s' * (k > 1):1}  error {100 * error:5.1f} %  {'#' * round(60 * error)}")
    print("8 bits for 16 numbers are R = 1/2 bit each. No code of such numbers leaves less than\n"
          "2 ** (-2 R): 50 % with one codebook, 25 % with two.")
