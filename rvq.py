"""Residual vector quantizer: a latent vector as K small integers (EnCodec, arXiv 2210.13438, section 3.2).

    python rvq.py          # how K codebooks close in on random vectors, one after the other

Codebook 1 names the entry nearest to the vector, codebook 2 the one nearest to what is left over, and so on:

    r_1 = x        c_k = argmin_v |r_k - E_k[v]|        r_(k+1) = r_k - E_k[c_k]        x ~ E_1[c_1] + ... + E_K[c_K]

Entries are not learnt by gradient. Each is the moving average of the vectors it was nearest to (van den Oord et
al., arXiv 1711.00937, appendix A.1): N is the average count of an entry, A the average sum, and E = A / N.
The gradient passes the quantizer unchanged ("straight through"), and a commitment loss pulls x to its entries.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from config import UserError

KMEANS_SAMPLES = 64   # vectors per entry that k-means looks at, at most
CHUNK = 2 ** 22       # distances held at a time (16 MB)


class ResidualVectorQuantizer(nn.Module):
    """K Euclidean codebooks of `card` entries of width Z, each quantising the rest that the one before left."""

    def __init__(self, dimension: int, n_q: int, card: int, decay: float = 0.99, kmeans_init: bool = True,
                 kmeans_iters: int = 50, threshold_dead: float = 2.0, q_dropout: bool = False,
                 epsilon: float = 1e-5):
        super().__init__()
        self.q_dropout = q_dropout
        self.codebooks = nn.ModuleList(
            Codebook(dimension, card, decay, kmeans_iters if kmeans_init else 0, threshold_dead, epsilon)
            for _ in range(n_q))

    def forward(self, x, n_q: int | None = None):
        """x (B, Z, T) -> quantized (B, Z, T), codes (B, K, T), commitment loss (mean over levels).

        In training mode the codebooks learn from the x of all processes (of equal size): two with half a batch each
        end up with the codebooks of one with the whole batch. q_dropout then uses a random number of codebooks.
        """
        B, Z, T = x.shape
        x = x.float()  # whatever the precision around it: half would pick wrong neighbours
        residual = x.transpose(1, 2).reshape(B * T, Z)                                  # r_1: a row a frame
        joint, mine = residual.detach(), slice(None)
        if self.training:
            joint, mine = _of_all_processes(joint)                                      # (B T processes, Z)
            joint = joint.nan_to_num(0.0, 0.0, 0.0)  # a NaN would stay in the averages for good
            # Passes so far seed all draws: every process draws alike, and a resumed run as if never stopped.
            passes = [int(n) for n in torch.cat([c.inited for c in self.codebooks]).tolist()]
            if n_q is None and self.q_dropout:
                n_q = 1 + int(torch.randint(len(self.codebooks), (), generator=_generator(-1, passes[0])))
        all_codes, losses = [], []
        for k, codebook in enumerate(self._active(n_q)):
            if self.training and passes[k] == 0:
                codebook.start(joint, _generator(k, 0))
            codes = nearest(joint, codebook.embed)                                      # c_k (n,)
            entries = codebook.embed.float()[codes]                                     # E_k[c_k] (n, Z)
            if self.training:
                codebook.learn(joint, codes, _generator(k, passes[k] + 1))
            losses.append(F.mse_loss(residual, entries[mine]))                          # equation 3
            joint, residual = joint - entries, residual - entries[mine]                 # r_(k+1)
            all_codes.append(codes[mine].view(B, T))
        quantized = x - residual.view(B, T, Z).transpose(1, 2)                          # sum of the entries (B, Z, T)
        # Straight through once, around the whole stack: the gradient with respect to x is the identity.
        return x + (quantized - x).detach(), torch.stack(all_codes, 1), torch.stack(losses).mean()

    @torch.no_grad()
    def encode(self, x, n_q: int | None = None):
        """x (B, Z, T) -> codes (B, K, T), K = n_q or all. Raises UserError for an n_q that it does not have."""
        B, Z, T = x.shape
        residual, codes = x.float().transpose(1, 2).reshape(B * T, Z), []
        for codebook in self._active(n_q):
            codes.append(nearest(residual, codebook.embed))                             # (B T,)
            residual = residual - codebook.embed[codes[-1]]
        return torch.stack(codes).view(-1, B, T).transpose(0, 1)                        # (K, B T) -> (B, K, T)

    def decode(self, codes):
        """codes (B, K, T), K at most n_q -> sum of their entries (B, Z, T)."""
        entries = sum(F.embedding(codes[:, k], book.embed) for k, book in enumerate(self._active(codes.shape[1])))
        return entries.transpose(1, 2)

    def _active(self, n_q):
        if n_q is not None and not 1 <= n_q <= len(self.codebooks):
            raise UserError(f"n_q = {n_q}: this quantizer has {len(self.codebooks)} codebooks, ask for 1 or more")
        return self.codebooks[:n_q]


class Codebook(nn.Module):
    """`card` entries E (`embed`) with the moving averages of their sums A (`embed_avg`) and counts N.

    `inited` counts training passes (0: the k-means start is to come); other libraries just keep 1 there."""

    def __init__(self, dimension, card, decay, kmeans_iters, threshold_dead, epsilon):
        super().__init__()
        self.decay, self.kmeans_iters = decay, kmeans_iters
        self.threshold_dead, self.epsilon = threshold_dead, epsilon
        embed = torch.zeros(card, dimension)
        if not kmeans_iters:
            nn.init.kaiming_uniform_(embed)
        self.register_buffer("inited", torch.full((1,), 0.0 if kmeans_iters else 1.0))
        self.register_buffer("cluster_size", torch.zeros(card))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    @torch.no_grad()
    def start(self, x, generator):
        """First batch x (n, Z): entries become k-means centres of it (Lloyd's algorithm)."""
        card = len(self.embed)
        sample, centres = _pick(x, min(len(x), KMEANS_SAMPLES * card), generator), _pick(x, card, generator)
        for _ in range(self.kmeans_iters):
            counts, sums = _statistics(sample, nearest(sample, centres), card)
            centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
        counts, _ = _statistics(x, nearest(x, centres), card)
        counts.clamp_(min=1)  # a centre without vectors keeps its place until it counts as dead
        self.embed.copy_(centres)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(centres * counts[:, None])  # A = E N; the original's A = E shrinks E at the next pass

    @torch.no_grad()
    def learn(self, x, codes, generator):
        """Moves the averages by one batch x (n, Z) with codes (n,), then restarts dead entries.

        An entry is dead when its average count is below threshold_dead, or below a quarter of the mean count where
        that is less: in batches of fewer than 2 vectors per entry all would be dead for good.
        """
        counts, sums = _statistics(x, codes, len(self.embed))
        N = self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        A = self.embed_avg.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        smoothed = (N + self.epsilon) / (N.sum() + len(N) * self.epsilon) * N.sum()  # Laplace: no division by 0
        self.embed.copy_(A / smoothed[:, None])
        self.inited += 1
        if self.threshold_dead > 0:
            mean = N.mean()
            dead = N < (mean / 4).clamp(max=self.threshold_dead)
            fresh = _pick(x, len(N), generator)  # (card, Z): vectors of this batch
            # Entry, sum and count restart together, as an entry of average use. The original replaces only the
            # entry, and the next E = A / N of the same pass puts it back where nothing is.
            self.embed.copy_(torch.where(dead[:, None], fresh, self.embed))
            A.copy_(torch.where(dead[:, None], fresh * mean, A))
            N.copy_(torch.where(dead, mean, N))


# --- pieces ------------------------------------------------------------------------------------------------

@torch.no_grad()
def nearest(x, entries):
    """x (n, Z), entries (card, Z) -> argmin_v |x - e_v|^2 = argmax_v (x . e_v - |e_v|^2 / 2) (n,), in chunks."""
    with torch.autocast(x.device.type, enabled=False):
        entries = entries.float()
        bias = entries.square().sum(1) * -0.5
        return torch.cat([F.linear(part, entries, bias).argmax(1) for part in x.split(max(1, CHUNK // len(entries)))])


def _statistics(x, codes, card: int):
    """Count (card,) and sum (card, Z) of the vectors x (n, Z) of each entry."""
    return torch.bincount(codes, minlength=card).to(x), x.new_zeros(card, x.shape[1]).index_add_(0, codes, x)


def _pick(x, n: int, generator):
    """n random rows of x, each at most once if there are enough."""
    draws = torch.randperm(len(x), generator=generator)[:n]
    return x[(draws if len(x) >= n else torch.randint(len(x), (n,), generator=generator)).to(x.device)]


def _generator(codebook: int, step: int):
    return torch.Generator().manual_seed(1_000_003 * (codebook + 2) + step)


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' number among them; 0 is the one that writes files."""
    return dist.get_rank() if process_count() > 1 else 0


def _of_all_processes(x):
    """x (n, Z) of each process -> all of them (n * processes, Z), and the slice of it that is this process' own."""
    if process_count() == 1:
        return x, slice(None)
    parts = [torch.empty_like(x) for _ in range(process_count())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts), slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))


if __name__ == "__main__":
    torch.manual_seed(0)
    rvq, vectors = ResidualVectorQuantizer(dimension=16, n_q=6, card=256, kmeans_iters=10), torch.randn(1, 16, 4096)
    for _ in range(10):
        rvq(vectors)
    codes = rvq.eval().encode(vectors)
    print(f"vectors {tuple(vectors.shape)} -> codes {tuple(codes.shape)}; the first one: {codes[0, :, 0].tolist()}")
    for k in range(1, 7):
        error = float((vectors - rvq.decode(codes[:, :k])).square().mean() / vectors.square().mean())
        print(f"{k} codebook{'s' * (k > 1):1}  error {100 * error:5.1f} %  {'#' * round(60 * error)}")
    print("Each halves it: 8 bits for 16 numbers are R = 1/2 bit each, and 2 ** (-2 R) = 1/2 is the bound for such\n"
          "numbers. (The entries were fitted to these very vectors, which is worth a percent.)")
