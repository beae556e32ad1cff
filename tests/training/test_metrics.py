"""Meter, clock and log."""

import json
import time

import torch

from fastssl.distributed import World
from fastssl.training.metrics import Clock, Log, Meter, peak_memory_mb

CPU = torch.device("cpu")


def test_means_over_the_steps_since_the_last_flush():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "norm": torch.tensor(5.0)})
    meter.add({"loss": torch.tensor(2.0), "norm": torch.tensor(7.0)})
    assert meter.flush() == {"loss": 1.5, "norm": 6.0}
    meter.add({"loss": torch.tensor(4.0)})
    assert meter.flush() == {"loss": 4.0}
    assert meter.flush() == {}


def one_step():
    meter = Meter()
    meter.add({"loss": torch.tensor(float(torch.distributed.get_rank()))})
    return meter.flush()


def test_ranks_share_means(gloo_pool):
    assert gloo_pool.run(one_step, 2) == [{"loss": 0.5}] * 2


def test_clock_leaves_out_pauses_and_counts_waiting():
    clock = Clock()
    with clock.paused():
        time.sleep(0.3)
    with clock.waiting():
        time.sleep(0.1)
    time.sleep(0.1)
    values = clock.flush(num_images=20)
    assert 50 < values["images_per_second"] < 110, "20 images in about 0.2 s"
    assert 0.25 < values["data_wait"] < 0.75
    time.sleep(0.05)
    assert clock.flush(num_images=1)["data_wait"] == 0.0


def test_peak_memory_is_that_of_the_process():
    before = peak_memory_mb(CPU)
    block = torch.ones(200 * 2**18)  # 200 MB
    assert 50 < before < 50_000
    assert peak_memory_mb(CPU) >= max(before, block.nbytes / 2**20)


def test_lines_continue_where_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(tmp_path, World(0, 1, CPU), start_step=0, num_steps=9, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": float(step)})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 1, "ki')  # cut short by a crash
    log = Log(tmp_path, World(0, 1, CPU), start_step=2, num_steps=9, tensorboard=False)
    log.write(3, "train", {"loss": 30.0})
    log.write(3, "eval", {"knn": 1.0})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "kind": "train", "loss": 1.0},
        {"step": 2, "kind": "train", "loss": 2.0},
        {"step": 3, "kind": "train", "loss": 30.0},
        {"step": 3, "kind": "eval", "knn": 1.0},
    ]


def test_other_ranks_write_nothing(tmp_path):
    log = Log(tmp_path, World(1, 2, CPU), start_step=0, num_steps=9, tensorboard=True)
    log.write(1, "train", {"loss": 1.0})
    log.progress(1, {"loss": 1.0})
    log.say("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_bar_shows_loss_speed_waiting_and_memory(tmp_path, capsys):
    log = Log(tmp_path, World(0, 1, CPU), start_step=0, num_steps=9, tensorboard=False)
    log.progress(
        3,
        {"loss": 0.5, "images_per_second": 123.4, "data_wait": 0.25, "peak_memory_mb": 345.6},
    )
    log.close()
    shown = capsys.readouterr().err
    assert "3/9" in shown
    assert "loss 0.5000, 123 images/s, data wait 25%, 346 MB" in shown


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, World(0, 1, CPU), start_step=0, num_steps=9, tensorboard=True)
    log.write(1, "train", {"loss": 0.5})
    log.write(2, "train", {"loss": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
