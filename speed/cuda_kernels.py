"""The language model's layers for one column on CUDA, in few kernels (Triton). Optional, as all of speed/.

    column(lm, x, buffers, end)         # in place of lm.run_layers, out_norm and lm_heads

A column has few rows, two with guidance, so that a layer could take no longer than reading its weights does.
But lm.py's is about 17 kernels, most of which start, do next to nothing, and end. Here it is five:

    layer norm and the projection to query, key, value
    attention to the cache, which also stores the new key and value in it
    the projection out, added to the residual stream
    layer norm, ff1 and GELU
    ff2, added to the residual stream

Four of them are `product`, and so are the heads. A program of it reads a few rows of the matrix, each whole,
before all else: these bytes are under way while it waits for x and normalizes it. On a GPU from Hopper on, a
kernel may start before the one in front has ended, and asks for its weights meanwhile (`EARLY`).

Reading is so fast that instructions count as well. So few threads do many numbers each, since all of them
take part in the norm and in sums across threads, and a width of 1536 is three pieces of 512, not 2048 with
a mask.

Sums are in float32; what passes from kernel to kernel is rounded to the model's dtype, as in lm.py.
"""
import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:     # an older triton
    gdc_launch_dependents = gdc_wait = None

MOST_ROWS = 4       # for more of them, products of matrices are faster
CHUNK = 128         # positions that one program attends to
PROGRAMS = 768      # of a product behind a norm, about: six for each of a GPU's processors


@triton.jit
def rows_of(weight, n, N, K: tl.constexpr, BLOCK: tl.constexpr):
    """Rows n of a matrix (N, K), in a tuple of K / BLOCK pieces (ROWS, BLOCK)."""
    where = weight + n[:, None] * K + tl.arange(0, BLOCK)[None, :]
    pieces = ()
    for j in tl.static_range(K // BLOCK):
        piece = tl.load(where + j * BLOCK, mask=(n < N)[:, None], other=0.0, eviction_policy="evict_first")
        pieces += (piece,)
    return pieces


@triton.jit
def vector(base, K: tl.constexpr, BLOCK: tl.constexpr):
    """K numbers in float32: a tuple of K / BLOCK pieces (BLOCK,)."""
    pieces = ()
    for j in tl.static_range(K // BLOCK):
        pieces += (tl.load(base + j * BLOCK + tl.arange(0, BLOCK)).to(tl.float32),)
    return pieces


@triton.jit
def product(x, weight, residual, out, norm_weight, norm_bias, N, eps, B: tl.constexpr, K: tl.constexpr,
            BLOCK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, NORM: tl.constexpr,
            GELU: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr):
    """out (B, N) = x (B, K) @ weight (N, K).T with what is asked for in front and behind.

    A program does ROWS rows of the matrix, TILES times. BLOCK: a power of two that divides K.
    """
    PIECES: tl.constexpr = K // BLOCK
    n = tl.program_id(0) * TILES * ROWS + tl.arange(0, ROWS)
    after = rows_of(weight, n, N, K, BLOCK)
    if NORM:
        scale, shift = vector(norm_weight, K, BLOCK), vector(norm_bias, K, BLOCK)
    if EARLY:
        gdc_wait()                  # here the kernel in front has ended, and x is there
        gdc_launch_dependents()     # the next one may start
    h = ()                          # x, or its norm: PIECES pieces for each row
    for b in tl.static_range(B):
        row = vector(x + b * K, K, BLOCK)
        if NORM:
            total = row[0]
            for j in tl.static_range(1, PIECES):
                total += row[j]
            mean = tl.sum(total, 0) / K
            squares = (row[0] - mean) * (row[0] - mean)
            for j in tl.static_range(1, PIECES):
                squares += (row[j] - mean) * (row[j] - mean)
            rate = tl.rsqrt(tl.sum(squares, 0) / K + eps)
            for j in tl.static_range(PIECES):
                y = (row[j] - mean) * rate * scale[j] + shift[j]
                h += (y.to(x.dtype.element_ty).to(tl.float32),)
        else:
            h += row
    for tile in tl.static_range(TILES):
        w = after
        if tile + 1 < TILES:        # the next rows are under way while these are multiplied
            after = rows_of(weight, n + ROWS, N, K, BLOCK)
        for b in tl.static_range(B):
            total = w[0].to(tl.float32) * h[b * PIECES][None, :]
            for j in tl.static_range(1, PIECES):
                total += w[j].to(tl.float32) * h[b * PIECES + j][None, :]
            y = tl.sum(total, 1)
            if GELU:
                y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
            if ADD:
                y += tl.load(residual + b * N + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(out + b * N + n, y.to(out.dtype.element_ty), mask=n < N)
        n += ROWS


@triton.jit
def attend(qkv, keys, values, bias, place, part, weight, count, out, H, length, end, E: tl.constexpr,
           WIDTH: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr):
    """out (B, H * E): attention of one query per row and head. Program (row and head, chunk of positions).

    Each leaves its part of the result, and the logarithm of the sum of its exponentials. The last to end, by
    `count` (B * H,), puts the parts together, and sets the count back to 0.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)                        # head: b * H + h
    here = tl.load(place)
    if chunk * CHUNK > here:
        return                      # nothing is there yet
    b = head // H
    e = tl.arange(0, WIDTH)                                                 # WIDTH >= E, a power of two
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    filled = (position < here) & (position < end)
    where = head.to(tl.int64) * length * E + position[:, None] * E + e[None, :]
    inside = filled[:, None] & (e[None, :] < E)
    k = tl.load(keys + where, mask=inside, other=0.0).to(tl.float32)        # (CHUNK, WIDTH)
    v = tl.load(values + where, mask=inside, other=0.0).to(tl.float32)
    seen = tl.load(bias + b * length + position, mask=position < end, other=float("-inf")).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    # qkv (B, 3, H, E): the new key and value stand in for those of the place, and are stored there
    source = qkv + head * E + b * 2 * H * E + e
    q = tl.load(source, mask=e < E, other=0.0).to(tl.float32)
    new_k = tl.load(source + H * E, mask=e < E, other=0.0)
    new_v = tl.load(source + 2 * H * E, mask=e < E, other=0.0)
    new = (position == here)[:, None]
    k = tl.where(new, new_k.to(tl.float32)[None, :], k)
    v = tl.where(new, new_v.to(tl.float32)[None, :], v)
    slot = head.to(tl.int64) * length * E + here * E + e
    owned = (e < E) & (chunk == here // CHUNK)
    tl.store(keys + slot, new_k, mask=owned)
    tl.store(values + slot, new_v, mask=owned)

    scores = tl.sum(k * q[None, :], 1) * E ** -0.5 + seen
    scores = tl.where(position <= here, scores, float("-inf"))
    top = tl.max(scores, 0)
    p = tl.exp(scores - top)
    total = tl.sum(p, 0)
    mine = head * PARTS + chunk
    tl.store(part + mine * WIDTH + e, tl.sum(p[:, None] * v, 0) / total)
    tl.store(weight + mine, top + tl.log(total))

    tl.debug_barrier()              # all threads have stored before this program counts as done
    if tl.atomic_add(count + head, 1) == here // CHUNK:
        c = tl.arange(0, PARTS)                                             # PARTS >= chunks, a power of two
        w = tl.load(weight + head * PARTS + c, mask=c <= here // CHUNK, other=float("-inf"),
                    cache_modifier=".cg")
        w = tl.exp(w - tl.max(w, 0))
        parts = tl.load(part + (head * PARTS + c[:, None]) * WIDTH + e[None, :],
                        mask=(c <= here // CHUNK)[:, None], other=0.0, cache_modifier=".cg")
        y = tl.sum(w[:, None] * parts, 0) / tl.sum(w, 0)
        tl.store(out + head * E + e, y.to(out.dtype.element_ty), mask=e < E)
        tl.store(count + head, 0)


def early(device: torch.device) -> dict:
    """Arguments for a kernel that may start before the one in front has ended, where the GPU can do that."""
    can = gdc_wait and device.type == "cuda" and not torch.version.hip
    can = can and torch.cuda.get_device_capability(device) >= (9, 0)
    return dict(EARLY=True, launch_pdl=True) if can else dict(EARLY=False)


def programs_of(B: int, K: int, N: int, norm: bool) -> tuple[int, int, int]:
    """ROWS, TILES and warps of `product`: what was fastest on an H100 for the shapes of 300 M and 1.5 B.

    The norm is computed again by each program, so with it there are just as many as run at the same time.
    """
    if norm:
        return 2, max(N // (2 * PROGRAMS), 1), max(triton.next_power_of_2(K) // 1024, 1)
    warps = 8 if K > 2048 else triton.cdiv(B, 2)
    rows = max((16384 if K > 2048 else 4096) // K, 1)
    return 1 << rows.bit_length() - 1, 1, warps


def call_product(x, layer, out, start: dict, norm=None, residual=None, gelu=False):
    """out = layer(norm(x)), through GELU or added to the residual; x (B, K), out (B, N)."""
    (B, K), N = x.shape, out.shape[1]
    rows, tiles, warps = programs_of(B, K, N, norm is not None)
    scale, shift, eps = (x, x, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    product[(triton.cdiv(N, rows * tiles),)](
        x, layer.weight, x if residual is None else residual, out, scale, shift, N, eps, B=B, K=K,
        BLOCK=K & -K, ROWS=rows, TILES=tiles, NORM=norm is not None, GELU=gelu, ADD=residual is not None,
        num_warps=warps, **start)


def can_run(lm) -> bool:
    """Whether a layer of this model is the five kernels above."""
    c = lm.config
    plain = not c.qk_layer_norm and "rope" not in c.positional_embedding and lm.layers[0].cross_attn is None
    return plain and lm.emb.weight.is_floating_point()


def column(lm, x, buffers, end: int) -> bool:
    """x (B, 1, D) -> logits (B, K, 1, V) in buffers.logits, and keys and values into the cache up to `end`.

    False, and nothing is done, for more than MOST_ROWS rows.
    """
    B, _, D = x.shape
    if B > MOST_ROWS:
        return False
    _, _, H, length, E = buffers.keys.shape
    start, x = early(x.device), x.view(B, D)
    qkv, y, stream = x.new_empty(B, 3 * D), x.new_empty(B, D), x.new_empty(B, D)
    hidden = x.new_empty(B, lm.config.hidden_scale * D)
    width, parts = triton.next_power_of_2(E), triton.next_power_of_2(triton.cdiv(length, CHUNK))
    part = x.new_empty(B * H, parts, width, dtype=torch.float32)
    weight = x.new_empty(B * H, parts, dtype=torch.float32)
    count = x.new_zeros(B * H, dtype=torch.int32)
    for layer, keys, values in zip(lm.layers, buffers.keys, buffers.values):
        call_product(x, layer.attn.qkv, qkv, start, norm=layer.norm1)
        attend[(B * H, triton.cdiv(end, CHUNK))](
            qkv, keys, values, buffers.bias, buffers.place, part, weight, count, y, H, length, end, E=E,
            WIDTH=width, CHUNK=CHUNK, PARTS=parts, num_warps=4, **start)
        call_product(y, layer.attn.out, stream, start, residual=x)
        x = stream
        call_product(x, layer.ff1, hidden, start, norm=layer.norm2, gelu=True)
        call_product(hidden, layer.ff2, x, start, residual=x)
    call_product(x, lm.lm_heads, buffers.logits.view(B, -1), start, norm=lm.out_norm)
    return True
