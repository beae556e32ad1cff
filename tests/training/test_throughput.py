"""FLOPs are counted as torch counts them, once, and counting changes nothing; MFU follows."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastssl.distributed import World
from fastssl.models import MaskedAutoencoderViT
from fastssl.training import throughput
from fastssl.training.config import Config, load
from fastssl.training.loop import train
from fastssl.training.throughput import FlopCounter, Utilization, peak_tflops
from tests.training.tiny import assert_same_tensors, saved_tensors, tiny_config

pytestmark = pytest.mark.usefixtures("no_report")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, bf16, tf32",
    [
        ("NVIDIA H100 80GB HBM3", 989, 494.5),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H100 NVL", 835, 417.5),
        ("NVIDIA H200", 989, 494.5),
        ("NVIDIA GH200 480GB", 989, 494.5),
        ("NVIDIA B200", 2250, 1125),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A100-PCIE-40GB", 312, 156),
        ("NVIDIA L40S", 362, 181),
        ("NVIDIA L4", 121, 60.5),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_peak_rates_by_name(name, bf16, tf32):
    assert peak_tflops(name, bf16=True) == bf16
    assert peak_tflops(name, bf16=False) == tf32


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100X",
        "NVIDIA A10G",
        "Tesla V100-SXM2-16GB",
        "",
    ],
)
def test_other_devices_are_not_taken_for_known_ones(name):
    assert peak_tflops(name, bf16=True) is None and peak_tflops(name, bf16=False) is None


def step_of(checkpointing: bool):
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16,
        decoder_depth=1, decoder_num_heads=2,
    )  # fmt: skip
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 32, 32)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(images)[0]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return step


def counted(step) -> int:
    with FlopCounter() as counter:
        step()
    return counter.flops


@pytest.fixture
def unfused_attention():
    """torch's own counter has no formula for the fused attention of the CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def test_as_many_as_torch_counts(unfused_attention):
    step = step_of(checkpointing=False)
    with FlopCounterMode(display=False) as expected:
        step()
    assert counted(step) == expected.get_total_flops() > 1e6


def test_what_is_computed_again_does_not_count(unfused_attention):
    with FlopCounterMode(display=False) as hardware:
        step_of(checkpointing=True)()
    model = counted(step_of(checkpointing=True))
    assert model == counted(step_of(checkpointing=False)) < hardware.get_total_flops()


def test_attention_of_the_cpu_counts_as_its_products():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))

    def attend():
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    products = 2 * 2 * 3 * 5 * 7 * 8
    # Two products in forward; in backward four, and the scores again.
    assert counted(attend) == products * (2 + 5)
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(attend) == products * (2 + 4)


def test_counting_changes_no_bits():
    step = step_of(checkpointing=False)
    plain = step()
    with FlopCounter():
        seen = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


def utilization(*overrides, device=CPU, rank=0):
    said = []
    config = load("photos", ["train.precision=fp32", *overrides])
    return Utilization(config, World(rank, 2, device), said.append), said


def test_the_first_micro_batch_is_counted_and_no_other():
    x = torch.randn(4, 8, requires_grad=True)
    w = torch.randn(8, 16)
    use, said = utilization("log.peak_tflops=1.0e-3")
    assert use.measure(1.0) == {}
    for width in (16, 4):
        with use.counting(num_images=4):
            (x @ w[:, :width]).sum().backward()
    of_one = 2 * 2 * 8 * 16
    assert use.measure(2.0) == {"mfu": pytest.approx(of_one * 2 / 1e9)}
    assert len(said) == 1 and f"takes {of_one} FLOPs" in said[0] and "0.001 TFLOP/s" in said[0]


def test_nothing_is_counted_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr(throughput, "FlopCounter", lambda: pytest.fail("counted"))
    for overrides, rank in (
        ([], 0),  # a CPU has no peak
        (["log.peak_tflops=1"], 1),
        (["log.flops_per_image=5"], 0),
    ):
        use, said = utilization(*overrides, rank=rank)
        with use.counting(1):
            pass
        assert use.measure(1.0) == {} and said == []
    use, said = utilization("log.peak_tflops=1", "train.compile=true")
    with use.counting(1):
        pass
    assert use.measure(1.0) == {} and "give log.flops_per_image" in said[0]
    use, said = utilization("log.peak_tflops=2", "log.flops_per_image=1.0e12", "train.compile=true")
    with use.counting(1):
        pass
    assert use.measure(0.5) == {"mfu": 0.25} and said == []


def test_a_gpu_has_its_peak_by_its_name(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    use, said = utilization("log.flops_per_image=989.0e9", "train.precision=bf16", device=cuda)
    assert use.measure(400.0) == {"mfu": pytest.approx(0.4)} and said == []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    use, said = utilization("log.flops_per_image=1", device=cuda)
    assert use.measure(400.0) == {} and "rate of Some GPU is not known; give log.peak" in said[0]


@pytest.mark.parametrize("key", ["log.peak_tflops", "log.flops_per_image", "log.report_every"])
def test_keys_out_of_range(key):
    with pytest.raises(ValueError, match=f"{key} must .*, got -1"):
        load("photos", [f"{key}=-1"])
    assert Config().log.report_every == 30.0


def mfu_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        line["mfu"] / line.get("images_per_second_per_device", line["images_per_second"])
        for line in lines
        if line["kind"] == "train"
    ]


def run_in_ranks(*configs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastssl.training.loop.write_report", lambda folder: None)
        for config in configs:
            train(config)


def test_a_run_logs_it_and_ends_with_the_same_bits(images, tmp_path, gloo_pool, capsys):
    words = ["train.steps=2", "eval.max_images=0", "train.accumulation=2"]
    plain = train(tiny_config(images, tmp_path, "name=plain", *words))
    peak = "log.peak_tflops=0.5"
    folder = train(tiny_config(images, tmp_path, "name=counted", peak, *words))
    last = "checkpoints/step_00000002"
    assert_same_tensors(saved_tensors(folder / last), saved_tensors(plain / last))
    (said,) = re.findall(r"an image takes (\S+) FLOPs", capsys.readouterr().out)
    of_one = float(said) / 0.5e12
    assert mfu_of(folder) == pytest.approx([of_one] * 2, rel=1e-3)

    # Sharded over two ranks an image takes what it took, and MFU is that of one device.
    ranked = [
        tiny_config(images, tmp_path, f"name={name}", *words, *more)
        for name, more in (("ranks", []), ("ranks_counted", [peak]))
    ]
    gloo_pool.run(run_in_ranks, 2, *ranked)
    assert mfu_of(tmp_path / "ranks_counted") == pytest.approx([of_one] * 2, rel=1e-3)
    plain, folder = tmp_path / "ranks" / last, tmp_path / "ranks_counted" / last
    assert_same_tensors(saved_tensors(folder), saved_tensors(plain))


METHODS = ["photos_dino", "photos_swav", "photos_byol", "photos_moco_v2", "photos_ibot"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", METHODS)
def test_counting_leaves_a_method_as_it_would_be(images, tmp_path, recipe):
    """Queues, teachers, centers and running statistics are those of a run that counts nothing."""
    found = []
    for name, more in (("plain", []), ("counted", ["log.peak_tflops=1"])):
        words = [f"data={images}", f"out={tmp_path}", f"name={name}", "train.device=cpu"]
        words += ["train.steps=2", "eval.max_images=0", "log.tensorboard=false"]
        words += ["train.global_batch_size=8", "schedules.lr.warmup_steps=0"]
        folder = train(load(recipe, words + more))
        found.append(saved_tensors(folder / "checkpoints" / "step_00000002"))
    assert_same_tensors(*found)
