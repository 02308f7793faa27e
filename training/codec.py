"""Training of the codec (EnCodec, arXiv 2210.13438, section 3.4): what `train.py` trains when task = "codec".

    wav --codec--> reconstruction --> l1, msspec, sc --------.
          |               '--> discriminator --> adv, feat --+--> weighted, or balanced --> gradient
          '--> commitment loss ------------------------------'

Only losses of the reconstruction pass through the balancer. The discriminator learns in the same update.
Validation takes its measures from evaluation/: the codec, unlike the language model, trains only with it.
"""
from pathlib import Path

import torch
from torch import nn

from config import Config
from data.audio import read_audio, write_audio
from data.segments import AudioCrops, get_batch
from encodec import EncodecModel
from evaluation.metrics import chroma_agreement, chroma_of, codebook_use, reconstruct
from system.errors import UserError
from system.processes import process_count, rank, sum_over_processes
from training.discriminator import MultiScaleSTFTDiscriminator
from training.losses import Balancer, codec_losses, discriminator_loss, generator_losses, mel_floor
from training.parallel import autocast, wrap


class CodecTraining:
    """The codec, its losses and, when adv or feat has a weight, its discriminator.

    The same methods as LMTraining in train.py, whose loop calls them. Raises UserError for a dtype or
    sharding that the codec does not train with, and when no loss has a weight.
    """

    def __init__(self, config: Config, device):
        if config.dtype == "float16" or config.sharding == "fsdp":
            raise UserError("the codec trains in float32 or bfloat16 and with sharding = 'ddp'; "
                            "change what differs")
        if config.dtype == "bfloat16" and torch.device(device).type == "cpu":
            raise UserError("dtype 'bfloat16': on a CPU the codec trains in float32 alone, as oneDNN's "
                            "strided convolutions in bfloat16 are wrong on some processors; leave it out")
        self.config, self.device = config, device
        self.train_data = AudioCrops(config, "train")
        self.valid_data = AudioCrops(config, "valid")
        self.module = EncodecModel(config)
        if config.init_from:
            start = EncodecModel.from_pretrained(config.init_from)
            self.module.load_state_dict(start.state_dict())
        self.module.to(device)

        names = ("l1", "msspec", "log_mel", "sc", "adv", "feat")
        self.weights = {name: getattr(config, name) for name in names if getattr(config, name)}
        if not self.weights:
            raise UserError("l1, msspec, log_mel, sc, adv and feat are all 0: at least one of them must "
                            "be positive")
        self.extra = nn.ModuleDict({"balancer": Balancer(self.weights, config.balancer_decay)}).to(device)
        self.adversarial = bool(config.adv or config.feat)
        if self.adversarial:
            self.extra["discriminator"] = MultiScaleSTFTDiscriminator(config).to(device)
            self.discriminate = wrap(self.extra["discriminator"], config)
        self.forward = wrap(self.module, config)

    def loss(self, batch: dict, update: int):
        """A batch -> (what to call backward on, {name: number to log})."""
        config, progress = self.config, update / self.config.total_updates
        wav = batch["wav"].to(self.device, non_blocking=True)  # (B, C, L)
        with autocast(self.device, config.dtype):
            output, _, commit = self.forward(wav, quantize=progress >= config.unquantised)
        output = output.float()

        # The losses see a leaf: their gradient with respect to it, balanced or not, is then sent on.
        leaf = output.detach().requires_grad_()
        floor = mel_floor(config, progress)
        losses = self.reconstruction_losses(wav, leaf, floor)
        total = sum(self.weights[name] * loss for name, loss in losses.items())  # equation 4
        if config.balancer:
            self.extra["balancer"].backward(losses, leaf)  # equation 5
            gradient = leaf.grad
        else:
            gradient, = torch.autograd.grad(total, leaf)
        loss = (output * gradient).sum() + config.commit * commit
        logged = {"loss": total + config.commit * commit, "commit": commit, **losses}

        if self.adversarial:  # both sides learn at once; audiocraft lets the discriminator go first
            fake = self.discriminate(output.detach())
            real = self.discriminate(wav)
            logged["disc"] = discriminator_loss(fake, real)
            loss = loss + logged["disc"]
        return loss, {name: value.detach() for name, value in logged.items()}

    def reconstruction_losses(self, wav, output, floor: float) -> dict:
        """Wave and reconstruction (B, C, L) -> {name: loss} of all that have a weight."""
        losses = codec_losses(self.config, wav, output, floor)
        if self.adversarial:
            discriminator = self.extra["discriminator"]
            adversarial = generator_losses(discriminator(output), discriminator(wav))
            losses |= {name: loss for name, loss in adversarial.items() if name in self.weights}
        return losses

    @torch.no_grad()
    def validate(self) -> dict:
        """SI-SNR, mel distance, chroma agreement and use of the codebooks, on the crops of all processes."""
        config = self.config
        sums = torch.zeros(4, device=self.device)
        counts = 0  # of each entry (K, V)
        for n in range(config.valid_batches):
            batch = get_batch(self.valid_data, config, n, split="valid", rank=rank(), world=process_count())
            wav = batch["wav"].to(self.device)
            output, quality, counts_of_batch = reconstruct(self.module, wav)
            agreement = chroma_agreement(chroma_of(config, wav), chroma_of(config, output))
            sums = sums + sums.new_tensor([*quality, agreement, 1])
            counts = counts + counts_of_batch
        si_snr, mel, chroma, batches = sum_over_processes(sums).tolist()
        figures = {"si_snr": si_snr / batches, "mel": mel / batches, "chroma": chroma / batches}
        # by the averages of training: these few crops may have fewer frames than a codebook has entries
        figures["live"] = self.module.quantizer.live_share()
        return figures | codebook_use(config, sum_over_processes(counts))

    @torch.no_grad()
    def samples(self, out: Path, update: int) -> dict:
        """Writes the first four validation files, up to 5 s, before and after the codec in `out`."""
        config = self.config
        codec = EncodecModel.from_pretrained(out).to(self.device)
        for n, path in enumerate(self.valid_data.paths[:4]):
            wav = read_audio(path, config.sample_rate, config.channels, duration=5.0)
            codes = codec.encode(wav[None].to(self.device))
            output = codec.decode(codes)[0, :, :wav.shape[1]]
            write_audio(out / "samples" / f"{n}_original.wav", wav, config.sample_rate)
            write_audio(out / "samples" / f"{n}_update{update:07d}.wav", output, config.sample_rate)
        return {}
