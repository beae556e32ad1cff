"""Meter, clock, and the line that shows them."""

import time

import torch

from fastssl.distributed import World
from fastssl.training.config import Config, LogConfig, TrainConfig
from fastssl.training.metrics import Clock, Log, Meter, peak_memory_mb, progress_line

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


def log_of(folder, rank=0, size=1, **keys):
    config = Config(log=LogConfig(tensorboard=False, **keys), train=TrainConfig(steps=9))
    return Log(folder, config, World(rank, size, CPU), start_step=0)


def test_other_ranks_write_nothing(tmp_path):
    log = log_of(tmp_path, rank=1, size=2, csv=True, wandb=True)
    log.write(1, "train", {"loss": 1.0})
    log.picture(1, "reconstructions", tmp_path / "none.png")
    log.progress(1, {"loss": 1.0})
    log.say("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []


VALUES = {
    "loss": 0.5,
    "lr": 1.5e-4,
    "images_per_second": 123.4,
    "data_wait": 0.25,
    "peak_memory_mb": 345.6,
    "grad_norm": 0.5234,
}


def test_the_line_shows_what_is_known(tmp_path, capsys):
    log = log_of(tmp_path)
    log.progress(3, VALUES)
    log.write(3, "eval", {"knn": 45.12, "linear": 50.0, "rankme": 23.46})
    log.progress(4, {"skipped_steps": 1})
    shown = capsys.readouterr().err
    assert "step 0/9" in shown and "k-NN" not in shown
    log.progress(6, VALUES)
    log.close()
    shown = capsys.readouterr().err
    assert "step 6/9 [" in shown
    assert (
        "loss 0.5000, lr 1.5e-04, 123 images/s, data wait 25%, 346 MB, grad 0.52, k-NN 45.1%, "
        "RankMe 23.5" in shown
    )


def test_speed_of_a_device_and_mfu_where_there_are_any():
    values = VALUES | {"images_per_second_per_device": 61.7, "mfu": 0.4123, "rankme": 9.0}
    line = progress_line(values)
    assert "123 images/s, 62 a device, data wait 25%, MFU 41.2%, 346 MB" in line
    # With step and times, a line of 120 characters.
    assert line.endswith("RankMe 9.0") and len(line) < 120


def test_a_line_that_cannot_be_written_is_said_once(tmp_path, capsys):
    log = log_of(tmp_path)

    def fail(step, kind, values):
        raise OSError("disk full")

    log._loggers[0].write = fail
    for step in (1, 2):
        log.write(step, "train", {"loss": 1.0})
    log.close()
    assert capsys.readouterr().out.count("the metrics of step 1 could not be written: disk") == 1
