"""The training loop: `train(config)`."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path

import torch
from torch import Tensor

from fastssl import distributed
from fastssl.data import Batch
from fastssl.data.index import write_whole
from fastssl.distributed import World
from fastssl.evaluation import evaluate
from fastssl.nn import keyed_drops
from fastssl.optim import clip_gradients, set_hyperparameters
from fastssl.training import checkpoint, loggers, messages, setup
from fastssl.training.config import Config, check
from fastssl.training.metrics import Clock, Log, Meter, peak_memory_mb
from fastssl.training.profiler import profiling
from fastssl.training.report import (
    LiveReport,
    read_metrics,
    read_skipped,
    save_reconstructions,
    write_report,
)
from fastssl.training.rng import preserved_rng_state
from fastssl.training.run import keep_config, keep_versions, open_run, stop_on_signal
from fastssl.training.throughput import Utilization
from fastssl.training.watch import BadSteps, CollapseWatch, NonFiniteError, all_finite


def train(config: Config, *, resume: bool | Path = False, profile: bool = False) -> Path:
    """Pretrain as `config` says and return the run's folder.

    resume: go on with what is there, from its newest whole checkpoint, or from the one in this
        folder, be it another run's.
    profile: write a trace of the steps 4 to 6 that are made here, and a table of their ops.

    In one process, or under torchrun in each of several. A step is a function of the configuration
    and of its number: a run that was interrupted and resumed ends with the same parameters, and
    any number of ranks draws the same batches, crops and masks and, of this library's encoders with
    stochastic depth to a rate of 0.1, drops the same branches.

    Raises:
        ValueError: a value in the configuration cannot be used; it is named.
        FileExistsError: there is such a run.
        OSError: the last step could not be saved; before that, a disk that is full is only said.
        NonFiniteError: loss or gradient was not finite in train.max_bad_steps steps in a row, which
            were skipped; what is saved is from before them.
    """
    check(config)
    with distributed.session(config.train.device) as world, stop_on_signal() as stop:
        run = Run(config, world, resume)
        with (
            closing(run.log),
            closing(run.checkpoints),
            profiling(profile, run.folder, world, run.log.say) as step_is_made,
        ):
            if isinstance(resume, Path) and run.folder.resolve() not in resume.resolve().parents:
                # Of another run: from here on --resume alone finds where this one began.
                run.save()
            while not stop():
                run.learn_outcome()
                if run.evaluation_is_due():
                    run.evaluate()
                if run.step == config.train.steps:
                    break
                run.train_step()
                step_is_made()
                if run.step % config.log.every == 0:
                    run.record()
                if run.checkpoint_is_due():
                    run.save()
            run.learn_outcome(wait=True)
            if run.step > run.saved_step:
                run.save()  # stopped between checkpoints
                run.learn_outcome(wait=True)
        run.finish()
    if run.step > run.saved_step:
        raise OSError(messages.not_saved_at_all(run.step, run.saved_step, run.save_error))
    return run.folder


class Run:
    """The parts of a run and what the loop does with them. `step` counts optimizer steps done."""

    def __init__(self, config: Config, world: World, resume: bool | Path) -> None:
        self.config, self.world = config, world
        self.accumulation = setup.accumulation(config, world)
        self.train_set, self.eval_sets = setup.datasets(config)
        setup.check_alike(self.train_set, self.eval_sets)
        self.method, self.optimizer = setup.method_and_optimizer(config, world, self.train_set)
        self.example = setup.example_batch(config, self.train_set, self.eval_sets, world.device)
        distributed.on_main(lambda: loggers.require(config.log))
        # Not before the rest of the configuration has proved good: it may delete an older run.
        self.folder = open_run(config, resume=bool(resume))
        self.step = self.saved_step = self.recorded_step = self._restore(resume)
        self.save_error = ""
        self.checkpoints = checkpoint.Checkpoints(
            self.folder / "checkpoints",
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
        )
        # Nor before the checkpoint has been found to fit: the old one could not be resumed then.
        keep_config(config, self.folder)
        self.loader = setup.loader(config, self.train_set, world, self.step)
        self.log = Log(self.folder, config, world, start_step=self.step)
        self.evaluated = distributed.on_main(self._evaluated_steps)
        data = self.train_set.describe()
        keep_versions(self.folder, self.step, data)
        self.log.say(messages.introduction(config, world, self.method, data, self.step))
        self.batches = iter(self.loader)
        self.meter, self.clock = Meter(), Clock()
        self.utilization = Utilization(config, world, self.log.say)
        self.report = LiveReport(self.folder, config.log.report_every)
        so_far = distributed.on_main(lambda: read_metrics(self.folder / "metrics.jsonl")[0])
        skipped = [line["skipped_steps"] for line in so_far if "skipped_steps" in line]
        self.bad_steps = BadSteps(self.method, skipped[-1] if skipped else 0)
        self.collapse = CollapseWatch(so_far[0] if so_far else None)
        self.skipped_samples: set[str] = set()

    def train_step(self) -> None:
        """One optimizer step on the next global batch; none where its gradient is not finite."""
        method, accumulation = self.method, self.accumulation
        values = setup.scheduled(self.config, self.step)
        set_hyperparameters(
            self.optimizer,
            lr=values.pop("lr"),
            weight_decay=values.pop("weight_decay"),
            last_layer_lr=values.pop("last_layer_lr", 1.0),
            fixed_lr=values.pop("fixed_lr", None),
        )
        method.before_step(values)
        self.bad_steps.remember()
        totals: dict[str, Tensor] = {}
        for micro_batch in range(accumulation):
            with self.clock.waiting():
                batch = next(self.batches)
            distributed.sync_gradients(method, micro_batch == accumulation - 1)
            with self.utilization.counting(len(batch)):
                outputs = self._forward_backward(batch)
            for name, value in outputs.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / accumulation
        optim = self.config.optim
        totals["grad_norm"] = clip_gradients(
            method.parameters(), optim.clip_grad, by=optim.clip_grad_by
        )
        self.step += 1
        if self.bad_steps.refuse(totals["loss"], totals["grad_norm"]):
            method.skip_step()
            self.optimizer.zero_grad()
            self._stop_if_hopeless(totals)
            return
        self.optimizer.step()
        self.optimizer.zero_grad()
        method.after_step()
        self.meter.add(totals)

    def record(self) -> None:
        """Write the means since the last record, and say what has collapsed."""
        num_steps = self.step - self.recorded_step
        if num_steps == 0:
            return
        values = self.meter.flush() | self.collapse.measure()
        values |= {"skipped_steps": self.bad_steps.total} if self.bad_steps.total else {}
        if number := self._count_skipped_samples():
            values["skipped_samples"] = number
        for sentence in self.collapse.warnings(self.step, values):
            self.log.say(sentence)
        values |= setup.scheduled(self.config, self.step - 1)
        values |= self._speed(num_steps)
        values["peak_memory_mb"] = peak_memory_mb(self.world.device)
        self.log.write(self.step, "train", values)
        self.log.progress(self.step, values)
        self.recorded_step = self.step
        if self.world.is_main:
            self._refresh_report()

    def checkpoint_is_due(self) -> bool:
        every = self.config.checkpoint.every
        # While steps are bad the parameters may be: better ones are not to be pushed out by them.
        due = every > 0 and self.step % every == 0 and not self.bad_steps.in_a_row
        return due or self.step == self.config.train.steps

    def save(self) -> None:
        """Write a checkpoint of this step, or begin to, as checkpoint.asynchronous says."""
        self.record()
        with self.clock.paused():
            self.learn_outcome(wait=True)
            position = setup.position(self.config, self.train_set)
            self.checkpoints.save(self.step, self.method, self.optimizer, position=position)
            self.learn_outcome(wait=not self.checkpoints.asynchronous)

    def learn_outcome(self, wait: bool = False) -> None:
        """Of the last save, if it has one by now: a failure is said, and the run goes on."""
        outcome = self.checkpoints.outcome(wait=wait)
        if outcome is None:
            return
        if outcome.error is None:
            self.saved_step = outcome.step
            return
        self.save_error = outcome.error
        self.log.say(messages.not_saved(outcome.step, self.saved_step, outcome.error))

    def evaluation_is_due(self) -> bool:
        every, steps = self.config.eval.every, self.config.train.steps
        due = self.step in (0, steps) or (every > 0 and self.step % every == 0)
        return due and self.step not in self.evaluated

    def evaluate(self) -> None:
        """Judge the frozen features and draw reconstructions."""
        self.record()
        self.method.eval()
        # Training must go on as if nothing had been drawn here.
        with self.clock.paused(), preserved_rng_state():
            if self.eval_sets is not None:
                scores = evaluate(
                    self._features,
                    *self.eval_sets,
                    batch_size=self.config.eval.batch_size,
                    device=self.world.device,
                    num_workers=self.config.loader.num_workers,
                    labels_per_class=self.config.eval.labels_per_class,
                )
                self.log.write(self.step, "eval", scores)
                self.log.say(messages.scores(self.step, scores))
            with torch.no_grad(), self._autocast():
                pictures = self.method.reconstruct(self.example)
            distributed.reshard(self.method)
            if self.world.is_main:
                self._show(pictures)
        self.method.train()
        self.evaluated.add(self.step)

    def finish(self) -> None:
        """Weights, the report, and what came out, or how to go on."""
        checkpoint.save_weights(self.folder / "weights.pth", self.method.model)
        of_ranks = distributed.gather(self.loader.skipped)
        if not self.world.is_main:
            return
        # A run that goes on keeps what it had met before.
        skipped = read_skipped(self.folder)
        for of_rank in of_ranks:
            skipped |= of_rank
        text = json.dumps(skipped, indent=1).encode()
        write_whole(self.folder / "skipped.json", lambda stream: stream.write(text))
        write_report(self.folder)
        lines = read_metrics(self.folder / "metrics.jsonl")
        print(messages.summary(self.config, self.folder, self.step, *lines, skipped), flush=True)

    def _count_skipped_samples(self) -> int:
        """Broken pictures that any rank has met since the run was started or resumed."""
        new = self.loader.skipped.keys() - self.skipped_samples
        self.skipped_samples.update(*distributed.gather(new))
        return len(self.skipped_samples)

    def _stop_if_hopeless(self, totals: dict[str, Tensor]) -> None:
        if self.bad_steps.in_a_row < self.config.train.max_bad_steps:
            return
        if not distributed.any_rank(not all_finite(self.method)):
            self.save()
            self.learn_outcome(wait=True)
        self.record()
        came = distributed.mean({name: value.double() for name, value in totals.items()})
        reason = messages.non_finite(
            self.step, self.bad_steps.in_a_row, came, self.folder, self.saved_step
        )
        if self.world.is_main:
            with suppress(OSError):  # what ends the run is the sentence below
                write_report(self.folder, ended=reason)
        raise NonFiniteError(reason)

    def _forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and what else the method tells of a micro-batch; gradients are added to."""
        keys = {"seed": self.config.seed, "epoch": batch.epoch, "view": batch.view}
        with self._autocast(), keyed_drops(batch.index, **keys):
            outputs = self.method(batch)
        if "features" in outputs:
            self.collapse.see(outputs.pop("features"))
        (outputs["loss"] / self.accumulation).backward()
        return outputs

    def _speed(self, num_steps: int) -> dict[str, float]:
        """Throughput, of all devices and of one, waiting and MFU of the last `num_steps` steps."""
        values = self.clock.flush(num_steps * self.config.train.global_batch_size)
        of_one = values["images_per_second"] / self.world.size
        if self.world.size > 1:
            values["images_per_second_per_device"] = of_one
        return values | self.utilization.measure(of_one)

    def _refresh_report(self) -> None:
        with self.clock.paused():
            try:
                self.report.refresh()
            except OSError as error:
                self.log.say(messages.not_written("report.html", self.step, error))

    def _show(self, pictures: tuple[Tensor, Tensor, Tensor] | None) -> None:
        if pictures is None:
            return
        path = self.folder / "reconstructions.png"
        try:
            save_reconstructions(
                path,
                *(images.float() for images in pictures),
                mean=self.train_set.mean,
                std=self.train_set.std,
                max_rows=self.config.eval.pictures,
            )
        except OSError as error:
            self.log.say(messages.not_written(path.name, self.step, error))
            return
        self.log.picture(self.step, "reconstructions", path)

    def _restore(self, resume: bool | Path) -> int:
        """The step to go on from: of the newest whole checkpoint or the one asked for, or 0."""
        saved = self.folder / "checkpoints"
        path, said = checkpoint.choose(saved, None if isinstance(resume, bool) else resume)
        if path is None:
            if resume and self.world.is_main:
                print(f"no checkpoint in {saved}: the run begins", flush=True)
            return 0
        position = setup.position(self.config, self.train_set)
        step = checkpoint.restore(path, self.method, self.optimizer, position=position)
        if step > self.config.train.steps:
            raise ValueError(
                f"train.steps must be at least {step}, up to which {path} is trained, "
                f"got {self.config.train.steps}"
            )
        # Not before the checkpoint has been found to fit.
        said += distributed.on_main(lambda: checkpoint.set_aside(saved, step))
        if step < self.config.train.steps:
            # Else these would be taken for newer than the checkpoints to come.
            distributed.on_main(lambda: (self.folder / "weights.pth").unlink(missing_ok=True))
        if self.world.is_main:
            print("\n".join(said), end="\n" * bool(said), flush=True)
        return step

    def _evaluated_steps(self) -> set[int]:
        return {line["step"] for line in read_metrics(self.folder / "metrics.jsonl")[1]}

    def _features(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.method.features(images)

    def _autocast(self) -> AbstractContextManager:
        device = self.world.device
        enabled = setup.uses_bf16(self.config, device)
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
