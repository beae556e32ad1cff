"""The benchmark runner: what it lists, what a row holds, and the tables made from rows."""

import json
import math

import pytest
import torch

from benchmarks import measure, profile, published_hiera, report, runner
from benchmarks.__main__ import main
from benchmarks.published_distillation import Published
from benchmarks.registry import FORWARD, FORWARD_BACKWARD, Case, all_cases, op_case, select
from fastssl.kernels.common import env
from fastssl.kernels.common.dispatch import OPS
from fastssl.models import Hiera, MaskedAutoencoderHiera

CPU = torch.device("cpu")
FIELDS = {
    *("case", "shape", "dtype", "direction", "backend", "rounds", "ms", "ratios"),
    *("bytes_moved", "flops", "roofline", "copy_gb_per_s", "gemm_tflop_per_s"),
    *("peak_extra_bytes", "load_average_before", "device", "machine", "versions", "commit", "date"),
}


def test_listing_names_every_case_once(capsys):
    assert main([]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [case.name for case in all_cases()]
    assert len(names) == len(set(names))
    bases = {name.split("/")[0] for name in names}
    assert {"mae_vit_base_step", "mae_hiera_tiny_step", "masked_patch_embed"} <= bases
    assert {"dino_vit_small", "ibot_vit_small", "ibot_vit_small_step"} <= bases
    assert {case.op for case in all_cases()} - {None} <= OPS.keys()


def test_selecting_by_name_or_base():
    assert [c.name for c in select(["masked_scatter"])] == [
        "masked_scatter/float32",
        "masked_scatter/bfloat16",
    ]
    assert [c.name for c in select(["random_masking/float32"])] == ["random_masking/float32"]
    with pytest.raises(ValueError, match=r"CASE must be one of .*masked_scatter.*got 'masked'"):
        select(["masked"])


def test_a_quick_op_case_gives_a_complete_row(tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["run", "masked_scatter/float32", "--quick", "--device", "cpu"]
    assert main([*arguments, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())
    assert row.keys() == FIELDS
    assert row["case"] == "masked_scatter/float32"
    assert row["ms"].keys() == {"eager", "compiled", "fastssl"}
    for p20, p50, p80 in row["ms"].values():
        assert 0 < p20 <= p50 <= p80
    for name in ("eager", "compiled"):
        quotient = row["ms"][name][1] / row["ms"]["fastssl"][1]
        assert math.isclose(row["ratios"][name], quotient, rel_tol=1e-2)
    # Two images, there and back, 4 bytes per value of 50 tokens in and 197 out.
    assert row["bytes_moved"] == 2 * 2 * 4 * 512 * (50 + 197)
    # The eager formula holds all shuffled tokens beside its output.
    assert row["peak_extra_bytes"]["eager"] > 2 * 196 * 512 * 4
    assert "masked_scatter/float32: p50 ms" in capsys.readouterr().out
    # A second run replaces the row.
    report.write_rows(path, [row | {"rounds": 0}])
    assert [r["rounds"] for r in json.loads(path.read_text())] == [0]


def test_a_quick_training_step_runs_beside_transformers():
    pytest.importorskip("transformers")
    (case,) = select(["mae_vit_base_step/step"], quick=True)
    row = runner.run_case(case, CPU, quick=True)
    assert row.keys() == FIELDS | {"images_per_s"}
    assert row["images_per_s"].keys() == {"transformers", "fastssl"}
    assert row["ratios"].keys() == {"eager"}
    assert 0 < row["flops"]["fastssl"] < row["flops"]["transformers"]


def test_a_quick_step_of_self_distillation_runs_beside_the_published_one():
    (case,) = select(["ibot_vit_small_step"], quick=True)
    row = runner.run_case(case, CPU, quick=True)
    assert row.keys() == FIELDS | {"images_per_s"}
    assert row["images_per_s"].keys() == {"as published", "fastssl"}
    assert row["ratios"].keys() == {"eager"}
    assert all(flops > 0 for flops in row["flops"].values())


@pytest.mark.parametrize("name", ["dino_vit_small", "dino_vit_small_step", "ibot_vit_small"])
def test_self_distillation_agrees_with_the_published(name):
    torch.manual_seed(runner.SEED)
    (case,) = select([name], quick=True)
    runner.check_agreement(case, case.contenders(CPU), case.make_inputs(CPU))


def test_the_published_hiera_is_ours():
    """In float32, by the weights of ours: features, loss and every gradient."""
    width = {"embed_dim": 16, "num_heads": 2, "stages": (1, 2, 1, 2)}
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 4)
    ours = Hiera(input_size=(64, 64), num_classes=0, **width)
    theirs = published_hiera.Hiera(64, **width)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.features(images), ours.features(images))
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    ours = MaskedAutoencoderHiera(input_size=(64, 64), q_pool=2, **width, **decoder)
    theirs = published_hiera.MaskedAutoencoder(64, **width, decoder=tuple(decoder.values()))
    theirs.load_state_dict(ours.state_dict())
    losses = ours(images, noise=noise)[0], theirs(images, noise)[0]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["_move_centers", "after_step", "_patch_loss"])
def test_a_part_of_a_published_step_that_is_left_out_is_noticed(monkeypatch, part):
    monkeypatch.setattr(Published, part, lambda *_: 0.0)
    torch.manual_seed(runner.SEED)
    (case,) = select(["ibot_vit_small_step"], quick=True)
    with pytest.raises(runner.Disagreement, match=r"result . of fastssl differs"):
        runner.check_agreement(case, case.contenders(CPU), case.make_inputs(CPU))


def wrong_case(offset: float) -> Case:
    def function(x: torch.Tensor, backend: str | None) -> torch.Tensor:
        return x * 2 + (0.0 if backend == "reference" else offset)

    return op_case(
        "wrong",
        function,
        lambda device: (torch.ones(4, device=device, requires_grad=True), torch.ones(4)),
        op="masked_scatter",
        shape="",
        dtype=torch.float32,
        direction=FORWARD_BACKWARD,
        bytes_moved=64,
    )


def test_no_number_without_agreement():
    with pytest.raises(runner.Disagreement, match=r"result 0 of fastssl differs .* by 5\.0e-01"):
        runner.run_case(wrong_case(1.0), CPU, quick=True)
    right = wrong_case(0.0)
    runner.check_agreement(right, right.contenders(CPU), right.make_inputs(CPU))


def test_a_rival_that_fails_is_left_out_and_we_are_not(capsys):
    def fails(*inputs):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    case = wrong_case(0.0)
    contenders = case.contenders(CPU) | {"rival": fails}
    kept = runner.check_agreement(case, contenders, case.make_inputs(CPU))
    assert kept.keys() == contenders.keys() - {"rival"}
    assert capsys.readouterr().err == f"left out: {case.name}: rival: CUDA out of memory.\n"
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.check_agreement(case, contenders | {"fastssl": fails}, case.make_inputs(CPU))


def test_integers_agree_exactly_or_not_at_all():
    ones = torch.ones(3, dtype=torch.int32)
    assert runner.relative_error(ones, ones.long()) == 0
    assert runner.relative_error(ones, ones + 1) == math.inf
    assert runner.relative_error(ones.float(), torch.ones(4)) == math.inf
    assert math.isnan(runner.relative_error(ones * torch.nan, ones.float()))


def test_timing_is_interleaved_over_rotating_inputs():
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    times = runner.time_interleaved(contenders, [(0,), (1,)], CPU, quick=True)
    calls = calls[6:]  # two rounds to warm up
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert [len(values) for values in times.values()] == [len(rounds)] * 3
    for r, part in enumerate(rounds):
        assert {name for name, _ in part} == set("abc")
        assert {i for _, i in part} == {r % 2}
        assert part[0][0] == "abc"[r % 3]


def test_extra_memory_is_the_peak_less_what_remains():
    megabyte = 1 << 20

    def function(x: torch.Tensor) -> torch.Tensor:
        # Two temporaries of 4 MB at once, a result of 4 MB.
        return (x + 1).exp_() * torch.ones(megabyte)

    extra = measure.peak_extra_bytes(function, [torch.zeros(megabyte)], CPU)
    assert extra == 8 * megabyte


def test_quantiles_are_p20_p50_p80():
    assert measure.quantiles(range(101)) == [20, 50, 80]


def make_row(case: str, **changes) -> dict[str, object]:
    row = {
        "case": case,
        "shape": "B=64",
        "dtype": "float32",
        "direction": FORWARD,
        "backend": "cpp",
        "rounds": 9,
        "ms": {"eager": [3.0, 4.0, 5.0], "compiled": [2.0, 3.0, 4.0], "fastssl": [0.9, 1.0, 1.25]},
        "ratios": {"eager": 4.0, "compiled": 3.0},
        "roofline": {"eager": 0.2, "compiled": 0.3, "fastssl": 0.8},
        "peak_extra_bytes": {"eager": 2_500_000, "compiled": 0, "fastssl": 100_000},
        "device": "cpu",
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 2, "gpu": None},
        "versions": {"torch": "2.13.0", "triton": None},
        "commit": "abc",
        "date": "2026-01-02",
    }
    return row | changes


def make_step_row() -> dict[str, object]:
    return make_row(
        "mae_step/step",
        images_per_s={"transformers": 8.0, "fastssl": 12.0, "fastssl compiled": 16.0},
        ratios={"eager": 1.5},
        roofline={"transformers": 0.1, "fastssl": 0.2, "fastssl compiled": 0.25},
    )


def test_table_from_rows():
    step = make_step_row() | {"backend": None}
    text = report.table([make_row("op/float32"), step])
    assert "A CPU, 2 threads; torch 2.13.0; commit abc, 2026-01-02:" in text
    assert (
        "| `op/float32` forward | B=64 | cpp | 1 (0.9, 1.25) | 4.00x | 3.00x |  | 80% | 0.1, 2.5 |"
    ) in text
    assert "| `mae_step/step` | B=64, float32 | 12 | 8 | 1.50x | 16 |  |  | 25% |" in text
    assert "| images/s eager | transformers | ratio |" in text
    speed = {"as published": 6.0, "fastssl": 12.0}
    text = report.table([step, step | {"images_per_s": speed}])
    assert "| images/s eager | transformers or as published | ratio |" in text
    assert "| B=64, float32 | 12 | 6 | 1.50x |  |  |  | 25% |" in text
    ratios = {"pillow": 3.0, "kornia": 2.0, "eager": 9.0}
    views = make_step_row() | {"case": "views", "backend": "cpp", "ratios": ratios}
    assert "| `views` | B=64 | cpp | 12 | 3.00x | 2.00x | 9.00x |" in report.table([views])
    assert report.table([]) == ""
    other = make_row("op/float32", machine={"cpu": "B", "cores": 4, "threads": 4, "gpu": "A GPU"})
    assert report.table([make_row("op/float32"), other]).count("commit abc") == 2


def test_a_profile_tells_kinds_of_ops_before_and_after(tmp_path, monkeypatch, capsys):
    backends = []

    def small():
        decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 1}
        encoder = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1), "q_pool": 2}
        model = MaskedAutoencoderHiera(**encoder, **decoder)
        model.register_forward_pre_hook(lambda *_: backends.append(env.backend()))
        return model

    monkeypatch.setattr(profile.models, "mae_hiera_tiny_224", small)
    assert profile.main(["mae_hiera_tiny_224", "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = report.read_rows([tmp_path / "rows.json"])
    for side in ("before", "after"):
        assert row[side]["ms"] > 0
        assert sum(row[side]["shares"].values()) == pytest.approx(100)
        assert row[side]["shares"]["matrix products"] > 1
    assert list(dict.fromkeys(backends)) == ["reference", None]
    text = profile.tables([tmp_path / "rows.json"])
    assert report.conditions_of(row) in text
    assert "| share of the operators' time | mae_hiera_tiny_224 before | mae_" in text
    share = row["after"]["shares"]["matrix products"]
    assert f" | {share:.1f} % |" in text and f" | {share:.1f} % |" in capsys.readouterr().out


def test_a_profile_is_of_a_masked_autoencoder(capsys):
    with pytest.raises(SystemExit):
        profile.main(["vit_small"])
    assert "must be a masked autoencoder of fastssl.models, got 'vit_small'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_softmax_backward_data", "attention"),
        ("fastssl_csrc::mask_unit_attention_bwd", "attention"),
        ("fastssl_csrc::linear_product", "matrix products"),
        ("fastssl_csrc::mask_unit_pool_bwd", "pooling"),
        ("autograd::engine::evaluate_function: AddmmBackward0", profile.DISPATCH),
        ("aten::pow", profile.OTHER),
    ],
)
def test_kinds_of_ops(name, kind):
    assert profile.kind_of(name) == kind


def test_readme_shows_the_table_of_the_results(tmp_path, monkeypatch, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    report.write_rows(results / "machine.json", [make_row("op/float32")])
    report.write_rows(results / "local.json", [make_row("not_committed/float32")])
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "README", readme)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold the lines"):
        main(["table", "--check"])
    sections = "".join(
        f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in report.SECTIONS
    )
    readme.write_text(f"before\n{sections}after\n")
    assert main(["table", "--check"]) == 1
    assert "table --update" in capsys.readouterr().err
    assert main(["table", "--update"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "`op/float32`" in text and "not_committed" not in text and "old" not in text
    assert main(["table", "--check"]) == 0
    assert main(["table", str(results / "local.json")]) == 0
    assert "not_committed" in capsys.readouterr().out
