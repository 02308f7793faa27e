"""Training: the codec or the language model, whichever the configuration's `task` says.

    python train.py config/tiny_codec.py                    # one process
    torchrun --nproc_per_node=8 train.py config/melody.py   # eight; any key of config.py as --key=value
    ... --resume        continue, exactly as if never interrupted      --plan     sizes, without training
    ... --eval          measure the trained model (--split=test)

    get_batch --> conditions --> pattern --> transformer --> cross-entropy --> gradients --> optimizer --> EMA
        1           2, 3            4            5              6                           7

The loop is `train`; it reads straight down, its steps numbered as in README ("the life of a batch"). Before it stand
the optimizers and the two things that are trained; what comes after it (logging, several processes, --plan) can wait,
and so can resuming and fine-tuning (checkpoints/resume.py, tuning.py).

Everything random about item i of update u comes from a generator seeded (seed, u, i), so that one process or eight,
resumed or not, train on the same data. `update` counts steps of the optimizer, from 0.
"""
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from checkpoints.files import write_tensors
from checkpoints.precision import kernels, places, quicken_training
from checkpoints.resume import full, gather, load_state, named_weights, save_state
from checkpoints.tuning import add_lora, adopt, merge_lora
from chroma import chroma_agreement
from config import Config, UserError, blaming, load, pick_device, run, write_atomic
from data.audio import read_audio, write_audio
from data.measures import (chroma_of, codebook_use, compare_chroma, evaluate, generate_for, held_out, melody_of,
                           reconstruct, rounded, with_perplexity)
from data.segments import SPLITS, AudioCrops, Prefetcher, TokenSegments, collate, get_batch
from encodec import (Balancer, EncodecModel, MultiScaleSTFTDiscriminator, codec_losses, discriminator_loss,
                     generator_losses)
from lm import LMModel
from rvq import process_count, rank
from sample import MusicGen

# === optimizers =================================================================================================


def cosine_lr(step: int, total: int, warmup: int, lr_min_ratio: float = 0.0, cycle_length: float = 1.0) -> float:
    """The factor on the learning rate at update `step`: linear warm-up (0 at step 0), then a cosine.

    After `total` it stays at lr_min_ratio. With cycle_length < 1 the cosine passes its minimum and climbs again,
    as the original's does.
    """
    if step < warmup:
        return step / warmup
    if step > total:
        return lr_min_ratio
    u = (step - warmup) / max(1, total - warmup)
    return lr_min_ratio + (1 - lr_min_ratio) / 2 * (1 + math.cos(math.pi * u / cycle_length))


def local(tensors):
    """The part of each tensor that this process holds: the tensor itself, unless `fully_shard` has split it."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def sum_of_squares(tensors, a):
    """sum(x^2 / a) over all entries of all tensors."""
    ratio = torch._foreach_div(tensors, a)
    torch._foreach_mul_(ratio, tensors)
    return sum_of_sizes(ratio)


def sum_of_sizes(tensors):
    """sum|x| over all entries of all tensors."""
    return torch.stack(torch._foreach_norm(tensors, 1)).sum()


class DAdaptAdam(torch.optim.Optimizer):
    """Adam that finds its own learning rate (D-Adaptation, arXiv 2301.07733), as MusicGen was trained with.

    The best step size is about D = the distance from start to solution. `d` is a lower bound on D that the gradients
    seen so far prove, and never falls; `lr` is only a factor on it, so lr = 1 is right. With lam = d * lr:

        m <- b1 m + (1 - b1) lam g        v <- b2 v + (1 - b2) g^2       s <- b2 s + (1 - b2) lam g
        a = sqrt(v) + eps                 no bias correction             weights <- (1 - decay lam) weights - m / a
        r <- b2 r + (1 - b2) lam^2 sum(g^2 / a)
        d <- max(d, min(d_hat, growth_rate d)),    d_hat = (sum(s^2 / a) / (1 - b2) - r) / sum|s|

    The sums run over all weights of the model at once. This is the estimator of the original's code, which is not
    that of the `dadaptation` 3.x package. d and r stay tensors on the device: nothing here waits for it.
    """

    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, d0=1e-6,
                 growth_rate=float("inf")):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      growth_rate=growth_rate))
        assert len(self.param_groups) == 1, "one d is shared by all weights: give them as a single group"
        group = self.param_groups[0]
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"]):
            raise ValueError("D-Adaptation needs float32 weights (d starts at 1e-6); use autocast for half precision")
        group["d"] = torch.tensor(float(d0), device=group["params"][0].device)
        group["r"] = torch.zeros_like(group["d"])

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        if group["lr"] == 0:
            return  # the first update of a warm-up: not even the moments change
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update({key: torch.zeros_like(p) for key in "mvs"})
        weights, g = local(params), local([p.grad for p in params])
        m, v, s = (local([self.state[p][key] for p in params]) for key in "mvs")
        (b1, b2), d, r = group["betas"], group["d"], group["r"]
        lam = d * group["lr"]

        sums = torch.zeros(3, device=d.device)
        plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in weights + g)
        one_pass = kernels() if plain else None
        if one_pass:    # the same formulas in kernels.c, which reads memory once
            for tensors in zip(g, m, v, s):
                one_pass.dadapt_moments(*places(*tensors), tensors[0].numel(), lam, b1, b2, group["eps"], *places(sums))
        else:
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, g, g, 1 - b2)
            a = torch._foreach_sqrt(v)
            torch._foreach_add_(a, group["eps"])
            step = torch._foreach_mul(g, lam)
            torch._foreach_lerp_(m, step, 1 - b1)
            torch._foreach_lerp_(s, step, 1 - b2)
            sums = torch.stack([sum_of_squares(g, a), sum_of_squares(s, a), sum_of_sizes(s)])
        if hasattr(params[0], "device_mesh"):  # other processes hold the other shards
            dist.all_reduce(sums, group=params[0].device_mesh.get_group())
        g_sum, s_sum, s_size = sums

        seen = s_size > 0  # as long as every gradient was zero, nothing happens
        r_next = b2 * r + (1 - b2) * lam ** 2 * g_sum
        d_hat = (s_sum / (1 - b2) - r_next) / s_size
        r.copy_(torch.where(seen, r_next, r))
        d.copy_(torch.where(seen, torch.maximum(d, torch.minimum(d_hat, d * group["growth_rate"])), d))
        shrink = group["weight_decay"] * lam * seen
        if one_pass:
            for tensors in zip(weights, m, v):
                one_pass.dadapt_step(*places(*tensors), tensors[0].numel(), shrink, group["eps"])
            return
        if group["weight_decay"]:  # as a difference: early on 1 - decay lam would round to 1
            torch._foreach_sub_(weights, torch._foreach_mul(weights, shrink))
        torch._foreach_addcdiv_(weights, m, a, value=-1)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (arXiv 2502.16982, 2409.20325): for matrices inside the network, far ahead of Adam
    in short runs. Every update has all its singular values near 1, so no direction is left behind.

    A weight of more than two dimensions counts as a matrix (first, the rest). Groups with `keep_norm` hold the
    directions of weight-normalised convolutions: each row is set back to the length it had, or the growing length
    would silently shrink the step. Embeddings, heads, norms and biases belong to Adam, not here. `precision` is that of
    the products of `orthogonalize`, which bear bfloat16.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, keep_norm=False, precision=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, keep_norm=keep_norm))
        self.precision = precision

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["lr"] == 0 or not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, moments = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, moments, group["momentum"])
            by_shape = {}  # equal shapes are orthogonalised in one batch
            for p, update in zip(params, nesterov):
                by_shape.setdefault(p.flatten(1).shape, []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update.flatten(1) for _, update in pairs]).to(self.precision))
                scale = -group["lr"] * max(1, rows / columns) ** 0.5  # every row moves by about lr
                for (p, _), update in zip(pairs, updates):
                    length = p.flatten(1).norm(dim=1, keepdim=True)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=scale)
                    if group["keep_norm"]:
                        p.mul_((length / p.flatten(1).norm(dim=1, keepdim=True)).view(-1, *[1] * (p.ndim - 1)))


def orthogonalize(matrices, steps=5):
    """(..., rows, columns) -> nearly the nearest matrices with orthonormal rows or columns (Newton-Schulz).

    A quintic a x + b x^3 + c x^5 applied to the singular values drives each towards 1, and needs only products.
    The coefficients (Jordan's) rise steeply at 0 and are content to end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class EMA:
    """Exponential moving average, in float32, of all float weights and buffers of a module.

    unbiased: the normalised weighted mean of the values seen, so the first update forgets the random start.
    decay 0: the values themselves, without a copy.

        count <- decay count + 1,  w = 1 / count  (plain: w = 1 - decay),  average <- (1 - w) average + w value
    """

    def __init__(self, module, decay=0.99, unbiased=True):
        self.module, self.decay, self.unbiased, self.count = module, decay, unbiased, 0.0
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}  # they are their own average
        self.average = {name: value.float().clone() if decay else value for name, value in module.state_dict().items()
                        if value.is_floating_point() and name not in frozen}

    def values(self):
        """What is averaged: the module's own storage."""
        state = self.module.state_dict()
        return local(state[name] for name in self.average)

    @torch.no_grad()
    def update(self):
        if self.unbiased:
            self.count = self.decay * self.count + 1
        weight = 1 / self.count if self.unbiased else 1 - self.decay
        torch._foreach_lerp_(local(self.average.values()), [value.float() for value in self.values()], weight)

    @torch.no_grad()
    def copy_to_module(self):
        torch._foreach_copy_(self.values(), local(self.average.values()))

    @contextmanager
    def swap(self):
        """Inside `with ema.swap():` the module has the averaged weights."""
        kept = [value.clone() for value in self.values()]
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.values(), kept)


ADAMS = r"(^|\.)(emb|heads|proj|t5)\."   # no hidden matrices, and T5, whose attention without a scale Muon saturates


def build_optimizers(module, extra, config: Config) -> list:
    """The optimizers of a module's trainable weights, and Adam for those of `extra` (the codec's discriminator).

    `base_lr` of every group is what the schedule multiplies.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    shared = dict(betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    if config.optim == "dadam":
        optimizers = [DAdaptAdam(params, config.lr, **shared)]
    elif config.optim == "adamw":
        optimizers = [torch.optim.AdamW(params, config.lr, **shared)]
    else:
        directions = [p for name, p in named if name.endswith("weight.original1")]  # of weight norm
        matrices = [p for name, p in named if p.ndim >= 2 and name.endswith("weight") and not re.search(ADAMS, name)]
        rest = [p for p in params if all(p is not other for other in directions + matrices)]
        groups = [dict(params=directions, keep_norm=True), dict(params=matrices)]
        precision = torch.float32 if config.dtype == "float32" else torch.bfloat16
        groups = [group for group in groups if group["params"]]
        optimizers = [Muon(groups, config.lr, weight_decay=config.weight_decay, precision=precision),
                      torch.optim.AdamW(rest, config.lr / 10, **shared)]
    if list(extra.parameters()):
        lr = config.lr if config.optim == "adamw" else 3e-4
        optimizers.append(torch.optim.AdamW(extra.parameters(), lr, (0.5, 0.9), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


# === what is trained: two classes with the same methods =========================================================

class CodecTraining:
    """The codec, its losses and, when adv or feat is wanted, its discriminator."""

    def __init__(self, config: Config, device):
        if config.dtype == "float16" or config.sharding == "fsdp":
            raise UserError("the codec trains in float32 or bfloat16 and with sharding = 'ddp'; change what differs")
        self.config, self.device = config, device
        self.train_data, self.valid_data = (AudioCrops(config, split) for split in ("train", "valid"))
        self.module = EncodecModel(config)
        if config.init_from:
            self.module.load_state_dict(EncodecModel.from_pretrained(config.init_from).state_dict())
        self.module.to(device)
        names = ("l1", "msspec", "sc", "adv", "feat")
        self.weights = {name: getattr(config, name) for name in names if getattr(config, name)}
        if not self.weights:
            raise UserError("l1, msspec, sc, adv and feat are all 0: at least one of them must be positive")
        self.extra = nn.ModuleDict({"balancer": Balancer(self.weights, config.balancer_decay)}).to(device)
        self.adversarial = bool(config.adv or config.feat)
        if self.adversarial:
            self.extra["discriminator"] = MultiScaleSTFTDiscriminator(config).to(device)
            self.discriminate = wrap(self.extra["discriminator"], config)
        self.frozen = None  # is set, and the module wrapped, by `prepare`

    def prepare(self, update: int, ema):
        """The mode for this update. In the last part only the decoder learns, on the averaged encoder's codes."""
        left = self.config.total_updates - update
        if left == self.config.decoder_only_steps:
            ema.copy_to_module()
        frozen = left <= self.config.decoder_only_steps
        self.module.train()
        self.module.encoder.train(not frozen).requires_grad_(not frozen)
        self.module.quantizer.train(not frozen)
        if frozen != self.frozen:  # DDP asks only once what has gradients
            self.frozen, self.forward = frozen, wrap(self.module, self.config)

    def loss(self, batch: dict, update: int):
        """A batch -> (what to call backward on, {name: number to log})."""
        wav = batch["wav"].to(self.device, non_blocking=True)                                   # (B, C, L)
        with autocast(self.device, self.config.dtype):
            output, _, commit = self.forward(wav, quantise=update >= self.config.unquantised_steps)
        # The losses see a leaf: their gradient with respect to it, balanced or not, is then sent into the graph.
        leaf = output.float().detach().requires_grad_()
        losses = codec_losses(self.config, wav, leaf)
        if self.adversarial:
            judge = self.extra["discriminator"]
            losses |= {name: loss for name, loss in generator_losses(judge(leaf), judge(wav)).items()
                       if name in self.weights}
        total = sum(self.weights[name] * loss for name, loss in losses.items())     # EnCodec, equation 4
        if self.config.balancer:
            self.extra["balancer"].backward(losses, leaf)
            gradient = leaf.grad
        else:
            gradient, = torch.autograd.grad(total, leaf)
        loss = (output.float() * gradient).sum() + self.config.commit * commit
        logged = {"loss": total + self.config.commit * commit, "commit": commit, **losses}
        if self.adversarial:  # both sides learn at once; the original lets the discriminator go first
            logged["disc"] = discriminator_loss(self.discriminate(output.float().detach()), self.discriminate(wav))
            loss = loss + logged["disc"]
        return loss, {name: value.detach() for name, value in logged.items()}

    @torch.no_grad()
    def validate(self) -> dict:
        """SI-SNR, mel distance and chroma agreement of held-out crops, over all processes; use of the codebooks."""
        config, sums, used = self.config, torch.zeros(4, device=self.device), 0
        for n in range(config.valid_batches):
            wav = get_batch(self.valid_data, config, n, split="valid")["wav"].to(self.device)
            output, quality, counts = reconstruct(self.module, wav)
            agree = chroma_agreement(chroma_of(config, wav), chroma_of(config, output))
            sums, used = sums + sums.new_tensor([*quality, agree, 1]), used + counts
        si, mel, agree, n = over_processes(sums).tolist()
        # live: by the codebooks' own long average; a validation of fewer frames than entries cannot meet them all
        counts = torch.stack([book.cluster_size for book in self.module.quantizer.codebooks])
        live = (counts > 0.01 * counts.mean(1, keepdim=True)).float().mean(1).tolist()
        return {"si_snr": si / n, "mel": mel / n, "chroma": agree / n, "live": live,
                **codebook_use(config, over_processes(used))}

    @torch.no_grad()
    def samples(self, out: Path, update: int) -> dict:
        """Writes the first four validation files, up to 5 s, as they are and reconstructed by the model in `out`."""
        codec, config = EncodecModel.from_pretrained(out).to(self.device), self.config
        for n, path in enumerate(self.valid_data.paths[:4]):
            wav = read_audio(path, config.sample_rate, config.channels, duration=5.0)
            output = codec.decode(codec.encode(wav[None].to(self.device)))[0, :, :wav.shape[1]]
            write_audio(out / "samples" / f"{n}_original.wav", wav, config.sample_rate)
            write_audio(out / "samples" / f"{n}_update{update:07d}.wav", output, config.sample_rate)
        return {}


class LMLoss(nn.Module):
    """LMModel.loss as the forward pass, which is what DDP and fully_shard watch."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, *args):
        return self.lm.loss(*args)


class LMTraining:
    """The language model on prepared tokens."""

    def __init__(self, config: Config, device):
        self.config, self.device = config, device
        self.train_data, self.valid_data = (TokenSegments(config, split) for split in ("train", "valid"))
        self.codec = EncodecModel.from_pretrained(config.codec)  # to listen to; stays on the CPU until then
        self.module = LMModel(config)
        if config.init_from:
            self.module.load_state_dict(LMModel.from_pretrained(config.init_from, torch.float32).state_dict())
        if config.lora_rank:
            add_lora(self.module, config)
        self.module.to(device)
        self.extra = nn.ModuleDict()
        if device.type == "cpu" and config.dtype in ("bfloat16", "float32"):
            quicken_training(self.module, config.dtype)
        if config.compile:
            self.module.compile_layers()
        self.forward = wrap(LMLoss(self.module), config, self.module.layers)

    def prepare(self, update: int, ema):
        self.module.train()

    def loss(self, batch: dict, update: int):
        """A batch -> (cross-entropy to call backward on, {name: number to log})."""
        codes, chroma, has_melody = (batch[key].to(self.device, non_blocking=True)
                                     for key in ("codes", "chroma", "has_melody"))
        with autocast(self.device, self.config.dtype):
            loss, ce = self.forward(codes, batch["text"], chroma, has_melody)
        return loss, {"loss": loss.detach(), **{f"ce_{k + 1}": x for k, x in enumerate(ce)}}

    @torch.no_grad()
    def validate(self) -> dict:
        """Cross-entropy over held-out segments with their text and another track's melody; own_: with their own."""
        sums = 0
        for n in range(self.config.valid_batches):
            batch = get_batch(self.valid_data, self.config, n, split="valid")
            logged = self.loss(batch, 0)[1]
            if self.config.melody != "none":
                own = {"chroma": batch["own_chroma"], "has_melody": batch["own_has_melody"]}
                logged |= {f"own_{name}": value for name, value in self.loss(batch | own, 0)[1].items()}
            sums = sums + torch.stack(list(logged.values()))
        means = (over_processes(sums) / (self.config.valid_batches * process_count())).tolist()
        return with_perplexity(dict(zip(logged, means)))

    def samples(self, out: Path, update: int) -> dict:
        """Music by the model in `out` for the texts of four held-out segments, each with the melody of another."""
        model = MusicGen.from_pretrained(out, str(self.device))
        items = held_out(self.valid_data, 4)
        batch = collate(items)
        wavs = model.decode(generate_for(model, batch))
        for n, (item, wav) in enumerate(zip(items, wavs)):
            write_audio(out / "samples" / f"{n}_update{update:07d}.wav", wav, model.sample_rate)
            told = {"text": item["text"], "melody_of": items[(n + 1) % len(items)]["where"]}
            write_atomic(out / "samples" / f"{n}_update{update:07d}.json", json.dumps(told).encode())
        if self.config.melody == "none":
            return {}
        cosine, agreement = compare_chroma(melody_of(self.config, wavs), batch["chroma"])
        return {"chroma_cosine": cosine.mean().item(), "chroma_agreement": agreement.mean().item()}


# === the loop ====================================================================================================

def train(config: Config, resume: bool = False, interrupted=()):
    """Trains until total_updates, writing to out_dir. `interrupted` turns true when the run is to stop early.

    Raises UserError when the configuration does not fit, and at the first loss or gradient that is not finite.
    """
    device, out, total = start_processes(config), Path(config.out_dir), config.total_updates
    state = out / "state.safetensors"
    resume = resume and state.exists()
    if (out / "model.safetensors").exists() and not resume:
        raise UserError(f"out_dir = {config.out_dir!r} already holds a model; choose another out_dir"
                        f"{', or add --resume to continue it' if state.exists() else ''}")
    if (out / "config.json").exists() and not (out / "metrics.jsonl").exists() and not resume:
        raise UserError(f"out_dir = {config.out_dir!r} has a config.json that is not of a run; choose another out_dir")
    torch.manual_seed(config.seed)
    task = (CodecTraining if config.task == "codec" else LMTraining)(config, device)
    ema, optimizers = EMA(task.module, config.ema_decay), build_optimizers(task.module, task.extra, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    first = load_state(state, task, optimizers, ema, scaler) if resume else 0
    open_run(out, task, first)
    log = Log(out, config, first)
    batches = Prefetcher(task.train_data, config)
    if first:  # it may have been killed between state and model, or between model and samples
        publish(task, ema, log, first)

    for update in range(first, total):
        # 1. segments of music from the files: codes (B, K, T), texts, chroma (B, M, Q)  [codec: wav (B, C, L)]
        micro_batches = batches(update)
        torch.manual_seed(config.seed * 1_000_003 + update * process_count() + rank())  # dropouts in the network
        task.prepare(update, ema)
        watched = 0.0
        for micro, batch in enumerate(micro_batches):
            with last_only(task.forward, micro + 1 == len(micro_batches)):
                # 2. - 6. conditions, pattern, transformer, cross-entropy: LMModel.loss  [CodecTraining.loss]
                loss, logged = task.loss(batch, update)
                # 7. gradients, averaged over micro-batches and processes; clipped; the update; the average
                scaler.scale(loss / len(micro_batches)).backward()
            log.add(logged)
            watched = watched + sum(logged.values())
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm, norm_of_extra = (nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
                               for module in (task.module, task.extra))
        stop = check(update, watched, full(norm) + norm_of_extra, scaler, micro_batches, task, out, interrupted)
        if config.max_norm:
            nn.utils.clip_grads_with_norm_(task.module.parameters(), config.max_norm, norm)
        factor = cosine_lr(update, total, config.warmup, config.lr_min_ratio, config.cycle_length)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        done = update + 1
        if done % config.ema_every == 0:
            ema.update()

        log.add({"grad_norm": full(norm)})
        last, can_validate = stop or done == total, len(task.valid_data) > 0
        if done % config.log_every == 0 or last:
            log.train_line(done, optimizers[0].param_groups[0], batches)
        if can_validate and (every(done, config.valid_every) or done == total):
            with ema.swap():
                task.module.eval()
                log.line({"update": done, "split": "valid", **task.validate()})
        if every(done, config.save_every) or last:
            save_state(state, task, optimizers, ema, scaler, done)
        if every(done, config.save_every) or every(done, config.sample_every) or last:
            publish(task, ema, log, done)
        if stop:
            break
    batches.pool.shutdown(cancel_futures=True)
    log.close()


def start_processes(config: Config) -> torch.device:
    """Joins the other processes when torchrun started this one. -> this process' device"""
    device = pick_device(config.device)
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    if config.sharding == "fsdp" and not dist.is_initialized():
        raise UserError("sharding = 'fsdp' splits weights between processes: start it with torchrun")
    if config.sharding == "fsdp" and config.optim == "muon":
        raise UserError("optim = 'muon' needs whole matrices, sharding = 'fsdp' splits them; change one of the two")
    if config.batch_size % (config.grad_accum * process_count()):
        raise UserError(f"batch_size = {config.batch_size} must be a multiple of grad_accum = {config.grad_accum} "
                        f"times the number of processes, {process_count()}")
    return device


def open_run(out: Path, task, first: int):
    """Makes out_dir ready: configuration, codec, and the metrics up to the first update."""
    config = task.config
    if rank() == 0:
        if first:
            old, new = dataclasses.asdict(Config.from_json(out / "config.json")), dataclasses.asdict(config)
            for key in (key for key in new if old[key] != new[key]):
                print(f"continuing with {key} = {new[key]!r}, was {old[key]!r}", file=sys.stderr)
        for leftover in out.rglob(".writing-*"):  # of a process that was killed while it wrote
            leftover.unlink()
        metrics = out / "metrics.jsonl"
        lines = metrics.read_text(errors="replace").splitlines() if metrics.exists() else []
        kept = [line for line in lines if update_of(line) <= first]
        write_atomic(metrics, "".join(line + "\n" for line in kept).encode())
        config.save(out / "config.json")
        if config.task == "lm":
            task.codec.save(out / "codec")
    if process_count() > 1:
        dist.barrier()


def update_of(line: str) -> float:
    """The update that a line of metrics.jsonl tells of; of a torn line, none that has been."""
    try:
        return float(json.loads(line)["update"])
    except (ValueError, LookupError, TypeError):
        return math.inf


def every(update: int, period: int) -> bool:
    return period > 0 and update % period == 0


def check(update, watched, norm, scaler, micro_batches, task, out, interrupted) -> bool:
    """Whether the run was asked to stop, by any process. Raises UserError when a loss or gradient is not finite.

    With a gradient scaler infinite gradients are routine (it skips the update and scales less), until its scale
    is down to 1. This is the one place of an update where the host waits for the device.
    """
    flags = torch.stack([~torch.isfinite(watched), ~torch.isfinite(norm)]).float()
    flags = over_processes(torch.cat([flags, flags.new_tensor([bool(interrupted)])]), dist.ReduceOp.MAX)
    bad_loss, bad_norm, stop = (bool(flag) for flag in flags.tolist())
    if not bad_loss and not (bad_norm and scaler.get_scale() <= 1):
        return stop
    where = [place for batch in micro_batches for place in batch["where"]]
    bad = [name for name, p in named_weights(task).items() if p.grad is not None and not full(p.grad).isfinite().all()]
    path = out / "diagnosis" / f"update{update:07d}_process{rank()}.safetensors"
    told = {"update": update, "where": where, "text": [b.get("text") for b in micro_batches], "not_finite": bad}
    write_tensors(path, {f"{n}.{key}": value for n, batch in enumerate(micro_batches) for key, value in batch.items()
                         if torch.is_tensor(value)}, {"info": json.dumps(told)})
    raise UserError(f"update {update}: the {'loss' if bad_loss else 'gradient'} is not finite, training stops. Its "
                    f"batch ({where[0]}, ...) is in {path}; the last checkpoint is untouched, and --resume leads "
                    f"here again: lower lr or max_norm, or train in bfloat16 or float32")


# === what is logged =============================================================================================

class Log:
    """Running averages -> metrics.jsonl, TensorBoard where it is installed, and the progress bar."""

    def __init__(self, out: Path, config: Config, first: int):
        self.path, self.sums, self.board, self.start = out / "metrics.jsonl", {}, None, time.perf_counter()
        self.tokens, self.since, self.last = config.batch_size * config.n_q * config.segment_frames, self.start, first
        self.bar = tqdm(total=config.total_updates, initial=first, disable=True if rank() else None)
        if rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(out / "tensorboard", purge_step=first)
            except ImportError:
                pass

    def add(self, logged: dict):
        """Numbers of one micro-batch, still on the device."""
        for name, value in logged.items():
            total, n = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value.detach().float(), n + 1)

    def train_line(self, update: int, group: dict, batches: Prefetcher):
        """The averages since the last such line, over all processes."""
        means = over_processes(torch.stack([total / n for total, n in self.sums.values()]))
        line = with_perplexity(dict(zip(self.sums, (means / process_count()).tolist())))
        now = time.perf_counter()
        line["lr"] = group["lr"]
        if "d" in group:
            line["d_lr"] = float(group["d"]) * group["lr"]  # the step size in effect
        line |= {"tokens_per_s": self.tokens * (update - self.last) / (now - self.since), "memory_gb": memory_gb(),
                 "data_wait": batches.waited / (now - self.since), "seconds": now - self.start}
        self.sums, self.since, self.last, batches.waited = {}, now, update, 0.0
        self.bar.update(update - self.bar.n)
        self.line({"update": update, "split": "train", **line})

    def line(self, line: dict):
        if rank() > 0:
            return
        line = {key: rounded(value) for key, value in line.items()}
        with blaming(f"{self.path}: cannot be written"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {key: x for key, x in line.items() if isinstance(x, (int, float)) and key != "update"}
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(f"{line['split']}/{key}", value, line["update"])
        text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items() if key[:3] != "ppl")
        if line["split"] == "train" and not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            tqdm.write(f"{line['update']:7d} {line['split']:5}  {text}", file=sys.stderr)

    def close(self):
        self.bar.close()
        if self.board is not None:
            self.board.close()


def memory_gb() -> float:
    """The most memory held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    except ImportError:  # Windows
        return 0.0


# === processes, precision ========================================================================================

def over_processes(tensor, how=dist.ReduceOp.SUM):
    """The sum (or other combination) of a tensor over all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(tensor, how)
    return tensor


def autocast(device, dtype: str):
    """Half precision for the operations that bear it; the weights stay float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, getattr(torch, dtype))


def wrap(module, config: Config, layers=()):
    """A module for several processes: DDP averages gradients, fully_shard (FSDP2) also splits weights and states."""
    if config.sharding == "fsdp":
        from torch.distributed.fsdp import fully_shard
        for layer in layers:  # each is gathered when it is its turn
            fully_shard(layer)
        return fully_shard(module)
    if process_count() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"   # before torch 2.13
    # no broadcast: the codebooks keep their buffers equal by themselves
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **{sync: False})


@contextmanager
def last_only(forward, last: bool):
    """While accumulating, gradients are exchanged between processes on the last micro-batch only."""
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(last)
    with forward.no_sync() if not last and hasattr(forward, "no_sync") else nullcontext():
        yield


# === checkpoints: what is resumed from is in checkpoints/resume.py ================================================

def publish(task, ema, log, done: int):
    """model.safetensors: the averaged weights under the names that from_pretrained reads, adapters merged. And samples
    of it every so often, unless the log has them already."""
    out = Path(task.config.out_dir)
    tensors = gather({name: ema.average.get(name, t) for name, t in task.module.state_dict().items()})
    tensors.pop("conditioner.text.t5.encoder.embed_tokens.weight", None)  # is shared.weight
    if rank() == 0:
        write_tensors(out / "model.safetensors", merge_lora(tensors, task.config))
        wanted = len(task.valid_data) > 0 and every(done, task.config.sample_every)
        if wanted and f'"update": {done}, "split": "samples"' not in log.path.read_text():
            log.line({"update": done, "split": "samples", **task.samples(out, done)})


# === --plan: sizes before the run ==================================================================================

def plan(config: Config, processes: int = 1, device_bytes: float | None = None) -> dict:
    """Prints and returns what a run will need, without allocating the model. Bytes are per process."""
    with torch.device("meta"):
        module = EncodecModel(config) if config.task == "codec" else LMModel(config)
        if config.lora_rank and config.task == "lm":
            add_lora(module, config)
    params = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    states = {"dadam": 3, "adamw": 2, "muon": 2}[config.optim]      # m, v, s; m, v; at most that
    shards = processes if config.sharding == "fsdp" else 1
    items = config.batch_size // (processes * config.grad_accum)
    figures = {"weights": 4 * params / shards, "gradients": 4 * trained / shards,
               "optimizer": 4 * states * trained / shards, "ema": 4 * trained / shards * (config.ema_decay > 0),
               "activations": items * activation_bytes(config)}
    memory, tokens = sum(figures.values()), config.batch_size * config.n_q * config.segment_frames
    text = config.task == "lm" and module.conditioner.text
    print(f"{config.task}: {params / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained"
          f"{f'; {config.t5}, frozen, not counted' if text and not text.trained else ''}")
    print(f"per process ({processes} of them, {config.sharding}, {config.dtype}, {items} items a micro-batch):")
    for key, value in {**figures, "together": memory}.items():
        print(f"  {key:12} {value / 1e9:9.2f} GB{' (estimate)' * (key == 'activations')}")
    print(f"{tokens:,} tokens an update ({config.batch_size} x {config.n_q} codebooks x {config.segment_frames} "
          f"frames), {config.updates_per_epoch:,} updates an epoch, {config.total_updates:,} in all")
    if device_bytes:
        verdict = "it fits" if memory < 0.9 * device_bytes else (
            "it does NOT fit; more grad_accum, checkpointing, sharding = 'fsdp' or lora_rank help")
        print(f"the device has {device_bytes / 1e9:.1f} GB: {verdict}")
    return {"parameters": params, "trained": trained, **figures, "together": memory, "tokens_per_update": tokens}


def activation_bytes(config: Config) -> float:
    """What one item keeps for the backward pass, roughly.

    A layer keeps per position, in widths D: the input and both norms' inputs and outputs (4 in float32), and in the
    precision of the matrix products q, k, v, attention's output twice, and the feed-forward's hidden layer before
    and after GELU (5 + 2 hidden_scale). With checkpointing only each layer's input, and one layer in full. The heads:
    logits, their copy in frames, softmax and gradient, 4 x K x V in float32.
    """
    T = config.segment_frames
    if config.task == "codec":  # each stage keeps about ten arrays of its output's size; all stages are of like size
        L = T * config.stride
        layers = 4 * 10 * (len(config.ratios) + 1) * 2 * config.n_filters * L
        # Judges see wave and reconstruction twice: 2 L cells of a spectrogram, 2 L filters in the maps that get
        # narrower, each before and after its activation.
        judges = 4 * (2 * 2) * 2 * (2 * 2 * L * config.disc_filters) * len(config.disc_windows)
        return layers + judges * bool(config.adv or config.feat)
    S = T + config.n_q + (config.chroma_frames if config.melody == "prepend" else 0) + 64 * (config.text == "prepend")
    half = 4 if config.dtype == "float32" else 2
    layer = S * config.dim * (4 * 4 + half * (5 + 2 * config.hidden_scale))
    layers = config.num_layers * S * config.dim * 4 + layer if config.checkpointing else config.num_layers * layer
    return layers + 4 * 4 * T * config.n_q * config.card


# === the command line ============================================================================================

def main(argv):
    if "--split" in argv[:-1]:  # with a blank, too
        n = argv.index("--split")
        argv = [*argv[:n], f"--split={argv[n + 1]}", *argv[n + 2:]]
    flags = [arg for arg in argv if arg in ("--resume", "--plan", "--eval") or arg.startswith("--split=")]
    config = load([arg for arg in argv if arg not in flags])
    split = next((flag[8:] for flag in flags if flag.startswith("--split=")), "valid")
    if split not in SPLITS:
        raise UserError(f"--split={split}: must be one of {', '.join(SPLITS)}")
    if config.init_from:
        config = adopt(config)
    if "--plan" in flags:
        device = pick_device(config.device)
        size = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else \
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return plan(config, int(os.environ.get("WORLD_SIZE", 1)), size)
    if "--eval" in flags:
        return evaluate(config, split)
    interrupted = []

    def ask_to_stop(number, frame):  # the first Ctrl-C ends the run after this update; the second one at once
        interrupted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # not SIGTERM: torchrun sends it to all at the first Ctrl-C
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    try:
        train(config, "--resume" in flags, interrupted)
    except RuntimeError as error:
        if process_count() > 1 and re.search("onnection|peer|timed out|NCCL", str(error)):
            raise UserError(f"another process of this run has ended ({str(error).splitlines()[0][:100]}); see its "
                            f"message. --resume goes on from the last checkpoint") from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    if interrupted:
        print(f"stopped as asked; --resume goes on from {config.out_dir}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main, sys.argv[1:])
