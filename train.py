"""Training: the language model or its codec, whichever the configuration's `task` names.

    python train.py config/tiny.py                          # one process
    torchrun --nproc_per_node=8 train.py config/melody.py   # eight
    ... --batch_size=96     any key of config.py            ... --resume    go on as if never interrupted
    ... --plan              memory of a run, not the run    ... --eval      measure the trained model

    1 segments --> 2, 3 conditions --> 4 pattern --> 5 transformer --> 6 cross-entropy
            average <-- weights <-- optimizer <-- clipped gradients <-- 7 backward

From top to bottom: learning rate, optimizer, average of the weights, what is trained, and the loop, `train`,
whose steps are numbered as in docs/tour.md ("the life of a batch"). What only some runs need is in training/.

Item i of update u is drawn from a generator seeded (seed, u, i): one process or eight, resumed or not, train
on the same data. An update is one step of the optimizer; updates are counted from 0.
"""
import math
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data.segments import Prefetcher, TokenSegments, check_codec, get_batch
from encodec import EncodecModel
from lm import LMModel
from system.devices import torch_defaults
from system.processes import sum_over_processes
from training.figures import with_perplexity
from training.finite_check import not_finite_error
from training.log import Log
from training.parallel import autocast, last_only, start_processes, wrap
from training.resume import load_state, save_state
from training.run_folder import begin, can_resume, open_run, save_ema_model

try:
    from speed import optimize_training
except ImportError:     # without speed/, layers and DAdaptAdam run as they are written, slower
    optimize_training = None

# === the learning rate and the optimizer ==================================================================

def cosine_lr(update, total, warmup, lr_min_ratio=0.0, cycle_length=1.0):
    """The factor on the learning rate: linear warm-up, then a cosine. cycle_length < 1: it climbs again."""
    if update < warmup:
        return update / warmup
    if update > total:
        return lr_min_ratio
    progress = (update - warmup) / max(1, total - warmup)
    cosine = math.cos(math.pi * progress / cycle_length)
    return lr_min_ratio + (1 - lr_min_ratio) / 2 * (1 + cosine)


class DAdaptAdam(torch.optim.Optimizer):
    """Adam that finds its own learning rate (D-Adaptation, arXiv 2301.07733): MusicGen was trained with it.

    The right learning rate is about the distance that a weight has to go. That is unknown: `d` is
    an estimate of it, the largest that the gradients g gave so far. lr is only a factor on d, so lr = 1 is
    right. With lam = d * lr:

        m <- b1 m + (1 - b1) lam g     v <- b2 v + (1 - b2) g^2     s <- b2 s + (1 - b2) lam g
        a = sqrt(v) + eps (no bias correction)                      weights <- (1 - decay lam) weights - m / a
        r <- b2 r + (1 - b2) lam^2 sum(g^2 / a)
        d <- max(d, min(d_hat, growth_rate d))     d_hat = (sum(s^2 / a) / (1 - b2) - r) / sum|s|

    The numerator of d_hat is the square of a sum of gradients without their single squares: large while they
    agree, so that there is far to go. The paper's bound has a 2 below the line; this d can exceed the
    distance a few times over (docs/training.md: proof, example). d starts at 1e-6, grows during the warm-up,
    and never falls: lower lr if the loss rises. It is audiocraft's; `dadaptation` 3.x has another.
    """

    def __init__(self, params, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, d0=1e-6,
                 growth_rate=float("inf")):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, growth_rate=growth_rate)
        super().__init__(params, defaults)
        if len(self.param_groups) > 1:
            raise ValueError("one d is shared by all weights: give them as a single group")
        group, = self.param_groups
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"]):
            raise ValueError("D-Adaptation needs float32 weights (d starts at 1e-6); use autocast instead")
        group["d"] = torch.tensor(float(d0), device=group["params"][0].device)
        group["r"] = torch.zeros_like(group["d"])

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        if group["lr"] == 0:
            return      # the first update of a warm-up: not even the moments change
        params = [p for p in group["params"] if p.grad is not None]
        weights, g, m, v, s = self.tensors_of(params)
        b2, d, r = group["betas"][1], group["d"], group["r"]
        lam = d * group["lr"]
        sums = sum(self.update_moments(*part, lam)
                   for part in parts_of(g, m, v, s))
        g_sum, s_sum, s_norm = sum_over_shards(sums, params)

        seen = s_norm > 0       # as long as every gradient was zero, nothing happens
        r_next = b2 * r + (1 - b2) * lam ** 2 * g_sum
        d_hat = (s_sum / (1 - b2) - r_next) / s_norm
        d_next = torch.maximum(d, torch.minimum(d_hat, d * group["growth_rate"]))
        r.copy_(torch.where(seen, r_next, r))
        d.copy_(torch.where(seen, d_next, d))
        shrink = group["weight_decay"] * lam * seen
        for part in parts_of(weights, m, v):
            self.update_weights(*part, shrink)

    def tensors_of(self, params):
        """Five lists: weights, gradients, and m, v, s, which begin at zero."""
        for p in params:
            if not self.state[p]:
                self.state[p].update({key: torch.zeros_like(p) for key in "mvs"})
        grads = [p.grad for p in params]
        states = [[self.state[p][key] for p in params] for key in "mvs"]
        return [local(tensors) for tensors in (params, grads, *states)]

    def update_moments(self, g, m, v, s, lam):
        """Moves m, v and s. -> the sums of g^2 / a, s^2 / a and |s|, as one tensor (3,)"""
        b1, b2 = self.param_groups[0]["betas"]
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, g, g, 1 - b2)
        moves = torch._foreach_mul(g, lam)
        torch._foreach_lerp_(m, moves, 1 - b1)
        torch._foreach_lerp_(s, moves, 1 - b2)
        a = self.denominators(v)
        return torch.stack([weighted_square_sum(g, a), weighted_square_sum(s, a), l1_norm(s)])

    def update_weights(self, weights, m, v, shrink):
        """weights <- (1 - shrink) weights - m / a"""
        if self.param_groups[0]["weight_decay"]:    # as a difference: early on 1 - shrink would round to 1
            torch._foreach_sub_(weights, torch._foreach_mul(weights, shrink))
        torch._foreach_addcdiv_(weights, m, self.denominators(v), value=-1)

    def denominators(self, v):
        a = torch._foreach_sqrt(v)
        torch._foreach_add_(a, self.param_groups[0]["eps"])
        return a


def parts_of(*lists):
    """The lists, 16 tensors of each at a time, so that what is computed from them takes little memory."""
    for n in range(0, len(lists[0]), 16):
        yield [tensors[n:n + 16] for tensors in lists]


def weighted_square_sum(tensors, a):
    """sum(x^2 / a) over all entries of all tensors."""
    ratios = torch._foreach_div(tensors, a)
    torch._foreach_mul_(ratios, tensors)
    return l1_norm(ratios)


def l1_norm(tensors):
    """sum|x| over all entries of all tensors."""
    return torch.stack(torch._foreach_norm(tensors, 1)).sum()


def local(tensors):
    """What this process holds of each tensor: all of it, unless FSDP has split it between processes."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def sum_over_shards(sums, params):
    """Sums over what this process holds of the parameters -> sums over all that there is of them."""
    if hasattr(params[0], "device_mesh"):
        dist.all_reduce(sums, group=params[0].device_mesh.get_group())
    return sums


def build_optimizers(module, extra, config):
    """The optimizers of a module's weights, and Adam for those of `extra` (the codec's discriminator)."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    weights = [p for _, p in named]
    shared = dict(betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    if config.optim == "dadam":
        optimizers = [DAdaptAdam(weights, config.lr, **shared)]
    elif config.optim == "adamw":
        optimizers = [torch.optim.AdamW(weights, config.lr, **shared)]
    else:
        from training.muon import muon_and_adam
        optimizers = muon_and_adam(named, config)
    if list(extra.parameters()):
        lr = config.lr if config.optim == "adamw" else 3e-4
        optimizers.append(torch.optim.AdamW(extra.parameters(), lr, (0.5, 0.9), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]      # what the schedule multiplies
    return optimizers


# === the average of the weights ===========================================================================

class EMA:
    """Exponential moving average, in float32, of all float weights and buffers of a module.

        count <- decay count + 1, w = 1 / count (plain: w = 1 - decay), average <- (1 - w) average + w value

    It goes into model.safetensors. unbiased: a weighted mean of the values seen, without the random start. At
    decay 0.99 values lose half their weight in 69 calls (690 updates at ema_every = 10). decay 0: no copy.
    """

    def __init__(self, module, decay=0.99, unbiased=True):
        self.module, self.decay, self.unbiased = module, decay, unbiased
        self.count = 0.0
        self.average = {}
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        for name, value in module.state_dict().items():
            if value.is_floating_point() and name not in frozen:    # frozen: its own average
                self.average[name] = value.float().clone() if decay else value

    def values(self):
        """What is averaged: the module's own tensors."""
        state = self.module.state_dict()
        return local(state[name] for name in self.average)

    @torch.no_grad()
    def update(self):
        weight = 1 - self.decay
        if self.unbiased:
            self.count = self.decay * self.count + 1
            weight = 1 / self.count
        values = [value.float() for value in self.values()]
        torch._foreach_lerp_(local(self.average.values()), values, weight)

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


# === what is trained ======================================================================================

class LMLoss(nn.Module):
    """LMModel.loss as a forward pass, which is what DDP and FSDP wrap."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, codes, conditions):
        return self.lm.loss(codes, conditions)


class LMTraining:
    """The language model on prepared tokens. (training/codec.py has the same methods for the codec.)"""

    def __init__(self, config, device, rank=0, world=1):
        self.config, self.device = config, device
        self.rank, self.world = rank, world
        self.train_data = TokenSegments(config, "train")
        self.valid_data = TokenSegments(config, "valid")
        self.codec = EncodecModel.from_pretrained(config.codec)     # is saved with the model
        splits = self.train_data, self.valid_data
        check_codec(self.codec, *splits)
        self.module = LMModel(config)
        self.extra = nn.ModuleDict()
        if config.init_from:
            start = LMModel.from_pretrained(config.init_from, torch.float32)
            self.module.load_state_dict(start.state_dict())
        if config.lora_rank:
            from training.lora import add_lora
            add_lora(self.module, config)
        self.module.to(device)
        if config.compile:
            for layer in self.module.layers:    # alike: they compile once
                layer.compile()
        self.forward = wrap(LMLoss(self.module), config, self.module.layers)
        self.autocast = autocast(device, config.dtype)

    def loss(self, batch, update):
        """A batch -> (cross-entropy to call backward on, {name: number to log})."""
        codes = batch["codes"].to(self.device, non_blocking=True)           # (B, K, T)
        with self.autocast:
            loss, ce = self.forward(codes, batch["conditions"])
        figures = {"loss": loss.detach()}
        for k, ce_k in enumerate(ce, start=1):
            figures[f"ce_{k}"] = ce_k
        return loss, figures

    @torch.no_grad()
    def validate(self):
        """Cross-entropy of held-out segments with another track's melody; own_: with their own."""
        config, sums = self.config, 0
        for n in range(config.valid_batches):
            batch = get_batch(self.valid_data, config, n, split="valid", rank=self.rank, world=self.world)
            figures = self.loss(batch, 0)[1]
            if config.melody != "none":
                conditions = batch["conditions"] | {"melody": batch["own_melody"]}
                own = self.loss(batch | {"conditions": conditions}, 0)[1]
                figures |= {f"own_{name}": value for name, value in own.items()}
            sums = sums + torch.stack(list(figures.values()))
        means = sum_over_processes(sums) / (config.valid_batches * self.world)
        return with_perplexity(dict(zip(figures, means.tolist())))

    def samples(self, out, update):
        """Writes music by the model in `out` for four held-out segments. -> figures of its melodies"""
        from sample import MusicGen
        from training.samples import write_samples
        model = MusicGen.from_pretrained(out, str(self.device))
        return write_samples(model, self.valid_data, out, update)


# === the loop =============================================================================================

@torch_defaults()
def train(config, resume=False, interrupted=()):
    """Trains until total_updates, writing to out_dir. `interrupted` turns true when the run is to end early.
    Raises UserError when the configuration does not fit, or a loss or gradient is not finite."""
    device, rank, world = start_processes(config)
    out, total = Path(config.out_dir), config.total_updates
    resume = can_resume(out, resume)
    task, ema, optimizers, scaler = build(config, device, rank, world)
    first = load_state(task, ema, optimizers, scaler) if resume else 0
    open_run(out, task, first)
    batches = Prefetcher(task.train_data, config, rank, world)
    log = Log(out, config, first, batches)
    begin(task, ema, log, first)
    sums = {}       # of the figures since the last line of the log

    for update in range(first, total):
        # 1. segments of music: codes (B, K, T); texts; melodies (M, Q)
        micro_batches = batches(update)
        torch.manual_seed(config.seed * 1_000_003 + update * world + rank)  # of dropout in the network
        task.module.train()
        figure_sum = 0.0        # is not finite where any figure is not
        for n, batch in enumerate(micro_batches, start=1):
            with last_only(task.forward, n == config.grad_accum) if config.grad_accum > 1 else nullcontext():
                # 2. - 6. conditions, pattern, transformer, cross-entropy: LMModel.loss
                loss, figures = task.loss(batch, update)
                # 7. gradients, averaged over micro-batches and processes
                scaler.scale(loss / config.grad_accum).backward()
            figure_sum = figure_sum + sum(figures.values())
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value.float()
        # 7. gradients clipped; a step of the optimizers; a step of the average
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = gradient_norm(task.module)
        whole_norm = norm.full_tensor() if config.sharding == "fsdp" else norm
        any_norm = whole_norm + gradient_norm(task.extra)
        bad_loss, bad_norm, stop = true_anywhere(
            world, ~figure_sum.isfinite(), ~any_norm.isfinite(), interrupted)
        # infinite gradients are routine with a scaler: it skips the update and scales less, down to 1
        if bad_loss or (bad_norm and scaler.get_scale() <= 1):
            raise not_finite_error(update, "loss" if bad_loss else "gradient", micro_batches, task)
        if config.max_norm:
            nn.utils.clip_grads_with_norm_(task.module.parameters(), config.max_norm, norm)
        factor = cosine_lr(update, total, config.warmup, config.lr_min_ratio, config.cycle_length)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        if (update + 1) % config.ema_every == 0:
            ema.update()
        sums["grad_norm"] = sums.get("grad_norm", 0.0) + whole_norm
        log_and_save(update + 1, sums, stop, log, task, ema, optimizers, scaler)
        if stop:
            break
    batches.pool.shutdown(cancel_futures=True)
    log.close()


def build(config, device, rank, world):
    """What `train` works on: what is trained, its average, the optimizers, float16's scaler of gradients."""
    torch.manual_seed(config.seed)
    if config.task == "codec":
        from training.codec import CodecTraining
        task = CodecTraining(config, device)
    else:
        task = LMTraining(config, device, rank, world)
    ema = EMA(task.module, config.ema_decay)
    optimizers = build_optimizers(task.module, task.extra, config)
    if optimize_training is not None:
        optimize_training(task.module, optimizers, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    return task, ema, optimizers, scaler


def gradient_norm(module):
    """The length of all gradients of a module as one vector."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def true_anywhere(world, bad_loss, bad_norm, interrupted):
    """Which of three flags are true in any process. Once an update, here, the host waits for the device."""
    interrupted = torch.tensor(bool(interrupted), device=bad_loss.device)
    flags = torch.stack([bad_loss, bad_norm, interrupted]).float()
    if world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def log_and_save(done, sums, stop, log, task, ema, optimizers, scaler):
    """After `done` updates: a line of the log, validation, checkpoint, samples, as often as configured."""
    config = task.config
    at_end = done == config.total_updates
    periods = config.log_every, config.valid_every, config.save_every, config.sample_every
    to_log, to_validate, to_save, to_sample = (p > 0 and done % p == 0 for p in periods)
    if to_log or stop or at_end:
        log.train_line(done, sums, optimizers[0].param_groups[0])
        sums.clear()
    if len(task.valid_data) > 0 and (to_validate or at_end):
        with ema.swap():
            task.module.eval()
            log.line({"update": done, "split": "valid", **task.validate()})
    to_save = to_save or stop or at_end
    if to_save:
        save_state(task, ema, optimizers, scaler, done)
    if to_save or to_sample:
        save_ema_model(task, ema, log, done)


if __name__ == "__main__":
    from system.command import run
    from training.command import main
    run(main, train, sys.argv[1:])
