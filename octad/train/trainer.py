"""The training loop: batches in, steps, a record now and then, states that a killed run resumes from bit for bit.

    trainer = Trainer(learner, run, echo=print)
    trainer.fit()                                 # Outcome.FINISHED, or STOPPED after SIGTERM or Ctrl-C

A step is the textbook's: forward and backward over the micro-batches, one clipped optimiser step at the schedule's rate.
Nothing that a step depends on lives outside of the state: masters, moments, router biases, random generators, the
position in the data. A loss that is not finite, or far above the running mean, stops the run before the weights change.

Shapes: B windows, S positions, N = B * S tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from octad.dist import World, emulation, product_rate
from octad.errors import CheckpointError, OctadError, OutputError, RecipeError
from octad.evaluate.nats import bits_per_byte, window_nats
from octad.fast.document_attention import DocumentAttention
from octad.fast.training_blocks import quicken
from octad.figures import duration, human
from octad.kernels.passes import not_native
from octad.model.balance import LoadStatistics
from octad.model.cost import parameters
from octad.staging import explained
from octad.telling import Share, Tell, silent
from octad.text.windows import Window, read_windows
from octad.train.compiled import compile_model
from octad.train.data import Batch, Source, Stream
from octad.train.distill import teach
from octad.train.export import tidy
from octad.train.layout import Layout
from octad.train.learner import Learner, compute_settings
from octad.train.loss import Head, next_token_loss
from octad.train.lowrank import LowRankEmbedding, LowRankLinear
from octad.train.optim import Optimizer, learning_rate
from octad.train.recompute import checkpoint_activations
from octad.train.reducer import Reducer
from octad.train.shards import token_cache
from octad.train.shares import open_shard
from octad.train.signals import StopRequest
from octad.train.state import Saver, check_resumable, latest_state, load_facts, load_tensors, saved_names
from octad.train.telemetry import Telemetry, training_flops

FADE = 0.1  # the last part of the steps, over which router biases go to zero
USUAL = 0.5  # of the measured peak, what a step reaches about
MEMORY = 0.95  # of the running mean of losses that a spike is measured by


class TrainingStopped(OctadError):
    """A step that would spoil the weights: the loss or the gradient is not finite, or the loss jumped."""


class Outcome(Enum):
    """How fit() ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


class Trainer:
    """One run in one directory; goes on from the newest state there. `echo` gets lines for the user.

    Raises OutputError where the run is finished already, CheckpointError where its state belongs to another config."""

    def __init__(self, learner: Learner, run: Path, echo: Tell = silent) -> None:
        self.learner, self.config, self.run, self.world = learner, learner.config, run, World.join()
        self.echo = echo if self.world.leads else silent
        self.progress: Share = lambda done: None  # gets the share of the steps done
        self.stops: Callable[[], bool] = lambda: False  # asked before each step, beside the signals
        self.model = learner.model.train()
        self.dtype, self.device = compute_settings(self.config)
        if slow := emulation(self.dtype, self.device):
            self.echo(slow)
        for note in learner.notes:
            self.echo(note)
        check_fit(learner)
        self.stream = open_stream(learner, self.world)
        self.held_out = self.world.leader_first(lambda: open_held_out(learner))
        self.flops = training_flops(self.model.config, learner.trainable, learner.data.window)
        longest = max(learner.data.window, judged_window(learner))
        self.model.model.rope.tables(longest, self.device)  # made here, no layer has to
        self.layout = Layout.decide(self.config.parallel, self.world, self.model, self.device)
        self.layout.spread(self.model)
        if self.device.type == "cpu":
            quicken(self.model)
            if reason := not_native():
                self.echo(f"steps take a fourth longer without native passes: {reason}")
        if self.config.batch.checkpointing:
            checkpoint_activations(self.model)
        self._compile()
        self.whole = self.layout.shard(self.model)
        pieces = self.layout.pieces(dict(self.model.named_parameters()))
        self.world.together(lambda: learner.bring_weights(self.device, pieces))
        learner.trainable = {name: self.model.get_parameter(name) for name in learner.trainable}
        self.optimizer = Optimizer(
            learner.trainable, self.config.optimizer, self.layout.pieces(learner.trainable)
        )
        self.reducer = Reducer(self.optimizer, self.layout.groups(self.optimizer.pieces, learner.trainable))
        if self.world.size > 1:
            self.echo(str(self.layout))
        self.step, self.mean_loss = 0, math.nan
        behind = self.config.save.asynchronous
        behind = self.device.type == "cuda" if behind == "auto" else behind
        self.saver = Saver(run, self.world, self.config.save.keep, behind)
        torch.manual_seed(self.config.seed + self.world.rank)
        self._resume()

    @property
    def finished(self) -> bool:
        """True where the run's last step is taken and its result written."""
        return self.step >= self.config.steps and (self.run / self.learner.result).is_file()

    # ---- the loop ------------------------------------------------------------------------------------------

    def fit(self) -> Outcome:
        """Train to the last step, then write the model. Raises TrainingStopped, OutputError."""
        if self.finished:
            raise OutputError(
                f"{self.run}: is finished ({self.step} steps); raise steps, or choose another -o"
            )
        with explained(self.run), self.world.watched():
            self.run.mkdir(parents=True, exist_ok=True)
            with closing(self._telemetry()) as telemetry, closing(self.saver), StopRequest() as stop:
                self.echo(self._opening(telemetry.peak))
                if self.step == 0:
                    self._judge(telemetry)
                while self.step < self.config.steps and not self.world.total(stop.requested or self.stops()):
                    self._one_step(telemetry)
                self.save()
        if self.step < self.config.steps:
            return Outcome.STOPPED
        self.learner.write(self.run, self.optimizer.values(), self.world)
        return Outcome.FINISHED

    def _one_step(self, telemetry: Telemetry) -> None:
        facts, routing = self.train_step(telemetry)
        telemetry.routed(routing)
        self.step += 1
        self.progress(self.step / self.config.steps)
        spec, last = self.config, self.step == self.config.steps
        if last or self.step % spec.log_every == 0:
            telemetry.write(self.step, spec.steps, facts)
        if last or self.step % self.learner.evaluate.every == 0:
            self._judge(telemetry)
        if self.step % spec.save.every == 0:
            self.save()

    def train_step(self, telemetry: Telemetry | None = None) -> tuple[dict[str, Any], list[LoadStatistics]]:
        """One step; the loss in nats a token (with the routers' losses), the gradient's length, the rate."""
        spec = self.config
        batch = self.stream.next(spec.batch.windows)
        learnt, loss = max(1, batch.learnt), 0.0
        mine = self.world.share(batch.split(spec.batch.micro))
        for number, micro in enumerate(mine, 1):
            share = len(micro.tokens) / len(batch.tokens)
            part, losses = self.whole(functools.partial(self.loss, micro, learnt, share))
            with self.reducer.listening(number == len(mine)):
                part.backward()
            self.optimizer.collect()
            loss += float(part.detach())
            if telemetry is not None:
                telemetry.count(micro, losses)
        self.reducer.finish()
        loss, norm = self.world.total(loss), self.layout.norm(self.optimizer)
        self._check(loss, norm, batch)
        factor = learning_rate(self.step, spec.steps, spec.schedule)
        self.optimizer.step(factor, norm)
        fade = min(1.0, (spec.steps - 1 - self.step) / max(1.0, FADE * spec.steps))
        routing = [
            router.finish_step(self.learner.routing.bias, fade, tally)
            for router, tally in zip(self.learner.routers, self._tallies(), strict=True)
        ]
        return {"loss": loss, "gradient_norm": norm, "lr": factor * spec.optimizer.lr}, routing

    def loss(self, batch: Batch, learnt: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """A micro-batch's part of the step's loss: its sum over the step's `learnt` targets, and its `share` of the
        routers' losses; and every position's nats."""
        masked = self.learner.data.document_mask
        documents_BS = batch.documents if masked else torch.zeros_like(batch.documents)
        cache = DocumentAttention(self.model.config, documents_BS, self.device)
        batch = batch.to(self.device)
        x_ND = self.model.model(batch.tokens, cache).flatten(0, 1)
        targets = batch.targets.flatten()
        total, losses = next_token_loss(head_of(self.model), x_ND, targets, teach(self.learner, batch, cache))
        loss = total / learnt
        for router in self.learner.routers:
            loss = loss + router.take().loss(self.learner.routing) * share / len(self.learner.routers)
        return loss, losses

    def _tallies(self) -> list[torch.Tensor]:
        """What the routers counted, over all ranks, on the CPU."""
        if not self.learner.routers:
            return []
        together = torch.stack([router.tally() for router in self.learner.routers])
        self.world.add_up([together])
        return list(together.cpu())

    # ---- judging -------------------------------------------------------------------------------------------

    def _judge(self, telemetry: Telemetry) -> None:
        if self.held_out and (self.world.leads or self.layout.spreads):  # spread weights need every rank
            telemetry.evaluated(self.step, self.evaluate())

    def evaluate(self) -> dict[str, float]:
        """Held-out bits per byte by domain."""
        self.model.eval()
        found = {}
        with torch.compiler.set_stance("force_eager"):  # other shapes than a step's: not worth compiling for
            for name, windows in self.held_out.items():
                nats = self.whole.judge(functools.partial(window_nats, self.model, windows))
                found[name] = bits_per_byte(nats, windows)
        self.model.train()
        return found

    def _check(self, loss: float, norm: float, batch: Batch) -> None:
        """Raises TrainingStopped before a bad step; follows the running mean of good ones."""
        spike = self.config.spike and loss > self.config.spike * self.mean_loss
        if not (math.isfinite(loss) and math.isfinite(norm)) or spike:
            windows = ", ".join(f"{name} {number}" for name, number in batch.windows)
            kept = latest_state(self.run)
            raise TrainingStopped(
                f"step {self.step + 1}: loss {loss:.4g} (running mean {self.mean_loss:.4g}), gradient {norm:.4g}; "
                f"windows: {windows}; last good state: {kept.name if kept else 'none'}; lower optimizer.lr or raise spike"
            )
        known = not math.isnan(self.mean_loss)
        self.mean_loss = MEMORY * self.mean_loss + (1 - MEMORY) * loss if known else loss

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A state that the next step can be taken from. Raises OutputError, of an asynchronous save at the next one."""
        facts = {
            "config": self.config.to_dict(),
            "identity": dict(self.learner.identity),
            "data": self.stream.state_dict(),
            "mean_loss": self.mean_loss,
            "ranks": self.world.size,
        }
        tensors = self.optimizer.state_tensors() | self._random() | self._biases()
        self.saver.save(self.step, tensors, facts)

    def _biases(self) -> dict[str, torch.Tensor]:
        return {f"bias.{n}": router.bias for n, router in enumerate(self.learner.routers)}

    def _random(self) -> dict[str, torch.Tensor]:
        """The states of this rank's generators; every rank has its own."""
        states = {f"random.cpu.{self.world.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            states[f"random.cuda.{self.world.rank}"] = torch.cuda.get_rng_state(self.device)
        return states

    def _resume(self) -> None:
        if (state := self.world.by_leader(lambda: latest_state(self.run))) is None:
            if self.run.exists() and any(self.run.iterdir()) and not (self.run / "log.jsonl").exists():
                raise OutputError(f"{self.run}: exists and is no run; choose another -o or remove it")
            return
        self.world.by_leader(lambda: tidy(self.run))
        facts, names = load_facts(state), saved_names(state)
        saved = self.config.as_now(facts["config"]) | {"identity": facts["identity"]}
        now = self.config.to_dict() | {"identity": dict(self.learner.identity)}
        changed = check_resumable(saved, now, str(self.run))
        random = {name: value for name, value in self._random().items() if name in names}
        targets = self.optimizer.state_targets(names) | self._biases() | random
        load_tensors(state, targets, self.world)
        self.optimizer.load_state_tensors(targets)
        self.stream.load_state_dict(facts["data"])
        self.step, self.mean_loss = facts["step"], facts["mean_loss"]
        self._restore_random(random)
        self.echo(f"resuming {self.run} after step {self.step}")
        if changed:
            self.echo(f"changed since it was saved: {', '.join(changed)}")

    def _restore_random(self, states: Mapping[str, torch.Tensor]) -> None:
        """A rank that the saved run had goes on with its generators; those of a new one begin at (seed, rank, step)."""
        torch.manual_seed(hash((self.config.seed, self.world.rank, self.step)))
        for name, value in states.items():
            if "cpu" in name:
                torch.set_rng_state(value)
            else:
                torch.cuda.set_rng_state(value, self.device)

    def _compile(self) -> None:
        """Small parts within the blocks: what several processes do to the weights surrounds these."""
        spec = self.config
        work = self.flops * spec.steps * spec.batch.windows * self.learner.data.window
        compile_model(self.model, spec.compile, self.device, work=work, echo=self.echo)

    def _telemetry(self) -> Telemetry:
        lengths = self.learner.tokenizer.byte_lengths
        peak = self.world.size * product_rate(self.dtype, self.device)
        return Telemetry(self.run, lengths, self.echo, self.flops, peak, self.world, self.step)

    def _opening(self, peak: float) -> str:
        """What is going to be done, and about how long it takes."""
        spec, config, data = self.config, self.model.config, self.learner.data
        learning = sum(p.numel() for p in self.learner.trainable.values())
        tokens = spec.batch.windows * data.window
        text = sum(len(source.shard.tokens) for source in self.stream.sources)
        left = (spec.steps - self.step) * tokens * self.flops / (USUAL * peak)
        return (
            f"{config.model_type}, {human(parameters(config))} parameters, {human(learning)} learn; "
            f"{human(text)} tokens of {len(data.sources)} source{'s' * (len(data.sources) > 1)}; "
            f"steps {self.step + 1} to {spec.steps} of {tokens:,} tokens in {str(self.dtype).removeprefix('torch.')} "
            f"on {self.device.type}: about {duration(left)}"
        )


def head_of(model: torch.nn.Module) -> Head:
    """The head's weight and low-rank change, tied to the embedding or not."""
    layer = model.lm_head or model.model.embed_tokens  # type: ignore[union-attr]
    if isinstance(layer, (LowRankLinear, LowRankEmbedding)):
        return Head(layer.base.weight, layer.lora_A, layer.lora_B, layer.scale)
    return Head(layer.weight)  # type: ignore[union-attr,arg-type]


def open_stream(learner: Learner, world: World) -> Stream:
    """The learner's data, tokenised where it was not yet, by all ranks together."""
    spec, config = learner.data, learner.config
    sources = [
        Source(
            source.name,
            open_shard(
                world,
                [config.resolve(file) for file in source.data],
                learner.tokenizer,
                cache=token_cache(spec.cache),
                field=source.field,
                append_eos=spec.append_eos,
            ),
            source.weight,
        )
        for source in spec.sources
    ]
    return Stream(sources, window=spec.window, seed=config.seed, document_mask=spec.document_mask)


def open_held_out(learner: Learner) -> dict[str, list[Window]]:
    """The windows that the run is judged on, by domain. Raises DataError before the first step rather than later."""
    spec, windows = learner.evaluate, {}
    for name, text in spec.domains.items():
        paths = [learner.config.resolve(file) for file in text.data]
        field = text.field if "field" in text.model_fields_set else spec.field
        windows[name] = read_windows(
            paths, learner.tokenizer, tokens=spec.tokens, window=judged_window(learner), field=field
        )
    return windows


def judged_window(learner: Learner) -> int:
    """Tokens of a window that the run is judged on: no more than the model sees at once."""
    return min(learner.evaluate.window, learner.model.config.max_position_embeddings)


def check_fit(learner: Learner) -> None:
    """Raises CheckpointError for a tokenizer of another model, RecipeError for a window that the model cannot see."""
    config, known = learner.model.config, learner.tokenizer.vocab_size
    if known > config.vocab_size:
        raise CheckpointError(
            f"{learner.tokenizer.label}: has ids up to {known - 1}, the model's embedding {config.vocab_size} rows; "
            "it belongs to another model"
        )
    if learner.data.window > config.max_position_embeddings:
        raise RecipeError(
            f"data.window {learner.data.window} is more than the model's {config.max_position_embeddings} positions"
        )
