"""DINO, iBOT, DINOv2 and MSN: what they compute, alone and in several processes."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from fastssl.methods.self_distillation import masked_rows
from tests.losses.test_ibot_patch_loss import sinkhorn
from tests.methods.checks import TINY_VIT, Case, build, check_all, check_processes, make_batch

VIEWS = [{"number": 2}, {"number": 2, "size": 8}]
HEAD = {"out_dim": 11, "hidden_dim": 12, "bottleneck_dim": 6}
PATCHES = {**HEAD, "patch_out_dim": 11}
VIT = {"model": "VisionTransformer", "model_args": TINY_VIT, "views": VIEWS}
DINO = Case("dino", HEAD, views=VIEWS)
IBOT = Case("ibot", PATCHES, **VIT)
DINOV2 = Case("dinov2", {**PATCHES, "patch_out_dim": 7}, **VIT)
MSN = Case(
    "msn",
    {"num_prototypes": 9, "hidden_dim": 12, "output_dim": 6, "mask_ratio": 0.5},
    accumulates=False,
    **VIT,
)
GATED = {**TINY_VIT, "num_register_tokens": 2, "ffn_layer": "swiglu", "init_values": 0.1}
STORED = {"fused_head": False}
CASES = {
    "dino": DINO,
    "dino_batch_norm": replace(
        DINO,
        args={**HEAD, **STORED, "use_bn_in_head": True, "norm_last_layer": False},
        model_args={"batch_norm": True},
        accumulates=False,
    ),
    "dino_vit": replace(DINO, **VIT, args={**HEAD, **STORED}),
    # Every sample's branches are dropped or not, whatever rank or micro-batch has it.
    "dino_drop_path": replace(
        DINO, **VIT | {"model_args": {**TINY_VIT, "drop_path_rate": 0.1}}, args={**HEAD, **STORED}
    ),
    "ibot": IBOT,
    "ibot_own_head": replace(
        IBOT, args={**PATCHES, **STORED, "patch_out_dim": 7, "shared_head": False}
    ),
    # Images are compared with their batch.
    "dinov2": replace(DINOV2, model_args=GATED, accumulates=False),
    "dinov2_softmax": replace(
        DINOV2, args={**DINOV2.args, "centering": "softmax", "koleo_weight": 0.0}
    ),
    "msn": MSN,
}


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    check_all(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_processes_equal_one(gloo_pool, name):
    check_processes(gloo_pool, CASES[name])


def ready(case, **values):
    """A method in float64 whose teacher is not its student, and whose centers are not 0."""
    method = build(case).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*method.teacher.named_parameters(), *method.named_buffers()):
            if name.endswith("center") or name.startswith(("backbone", "head", "patch_head")):
                if not name.endswith("weight_g"):
                    noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                    tensor.add_(noise, alpha=0.1)
    method.before_step({"teacher_momentum": 0.9, "teacher_temp": 0.05} | values)
    return method


def grads_of(method, loss):
    method.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}


def assert_is(method, outputs, expected):
    """The loss has this value and this gradient, in every parameter of the student."""
    # Float32 are the weights of masked rows, and sums in the encoder's operators.
    torch.testing.assert_close(outputs["loss"], expected, rtol=1e-6, atol=1e-9)
    got, wanted = grads_of(method, outputs["loss"]), grads_of(method, expected)
    assert any(grad.abs().max() > 1e-3 for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(
            got[name], grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


def crossed(targets, logits, student_temp=0.1):
    """Algorithm 1 of DINO: q of the first two views, logits of each view."""
    terms = []
    for t, q in enumerate(targets):
        for s, row in enumerate(logits):
            if s != t:
                terms.append(-(q.detach() * (row / student_temp).log_softmax(1)).sum(1).mean())
    return sum(terms) / len(terms)


def centered(logits, center, temp=0.05):
    return ((logits - center.flatten()) / temp).softmax(-1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_dino_is_its_formula(fused, centering):
    args = {**HEAD, "fused_head": fused, "centering": centering, "norm_last_layer": False}
    method, batch = ready(replace(DINO, args=args)), make_batch(DINO, dtype=torch.float64)
    student, teacher = method.student, method.teacher
    outputs = method(batch)
    logits = [student.head(student.backbone(view)) for view in batch.views]
    raw = [teacher.head(teacher.backbone(view)) for view in batch.views[:2]]
    if centering == "softmax":
        targets = [centered(row, method.loss.center) for row in raw]
    else:
        targets = sinkhorn(torch.cat(raw), 0.05).chunk(2)
    entropy = -(torch.cat(list(targets)) * torch.cat(list(targets)).log()).sum(1).mean()
    torch.testing.assert_close(outputs["teacher_entropy"], entropy)
    assert_is(method, outputs, crossed(targets, logits))
    for view, half in zip(batch.views, outputs["features"].chunk(2), strict=False):
        torch.testing.assert_close(half, teacher.backbone(view))


def test_dino_state_after_a_step():
    """The center and the teacher move once, after the step, and a skipped step moves neither."""
    method, batch = ready(DINO), make_batch(DINO, dtype=torch.float64)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    raw = torch.cat([method.teacher.head(method.teacher.backbone(v)) for v in batch.views[:2]])
    method(batch)
    method.skip_step()
    method(batch)
    after = method.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with torch.no_grad():
        method.student.head.last_layer.weight_v.add_(1.0)
    method.after_step()
    center = 0.9 * before["loss.center"] + 0.1 * raw.mean(0, keepdim=True)
    torch.testing.assert_close(method.loss.center, center)
    key = "head.last_layer.weight_v"
    expected = 0.9 * before[f"teacher.{key}"] + 0.1 * (before[f"student.{key}"] + 1.0)
    torch.testing.assert_close(method.state_dict()[f"teacher.{key}"], expected)
    assert method.model is method.teacher.backbone
    assert not any(name.startswith("model.") for name in method.state_dict())


def patches_by_image(method, batch):
    """Masks, and logits of student and teacher, of both views: [2 * B, ...] each."""
    images, masks = torch.cat(batch.views[:2]), method.masks(batch)
    student, teacher = method.student, method.teacher
    skipped = student.backbone.num_prefix_tokens
    seen = student.backbone.forward_features(images, masks=masks)
    whole = teacher.backbone.forward_features(images)
    local = [student.backbone.forward_features(view)[:, 0] for view in batch.views[2:]]
    logits = [student.head(view) for view in (*seen[:, 0].chunk(2), *local)]
    patches = student.head_of_patches(seen[:, skipped:])
    targets = teacher.head_of_patches(whole[:, skipped:])
    return masks, logits, teacher.head(whole[:, 0]).chunk(2), patches, targets, seen[:, 0]


def of_patches(masks, patches, targets):
    """The mean over images of the mean over an image's masked patches."""
    total = 0.0
    for mask, logits, target in zip(masks, patches, targets, strict=True):
        if mask.any():
            rows = -(target.detach() * (logits / 0.1).log_softmax(-1)).sum(-1)
            total = total + rows[mask].mean()
    return total / len(masks)


@pytest.mark.parametrize("name", ["ibot", "ibot_own_head", "dinov2_softmax"])
def test_ibot_is_its_formula(name):
    case = CASES[name]
    method = ready(replace(case, args={**case.args, "patch_weight": 0.7}))
    batch = make_batch(case, dtype=torch.float64)
    outputs = method(batch)
    masks, logits, raw, patches, targets, _ = patches_by_image(method, batch)
    assert masks.any(1).any() and not masks.any(1).all()
    q = centered(targets, method.patch_loss.center)
    in_classes = crossed([centered(row, method.class_loss.center) for row in raw], logits)
    in_patches = of_patches(masks, patches, q)
    torch.testing.assert_close(outputs["class_loss"], in_classes.detach())
    assert_is(method, outputs, in_classes + 0.7 * in_patches)
    torch.testing.assert_close(
        outputs["patch_teacher_entropy"], -(q * q.log()).sum(-1)[masks].mean().detach()
    )
    center = method.patch_loss.center.clone().flatten()
    method.skip_step()
    method(batch)
    method.after_step()
    expected = 0.9 * center + 0.1 * targets[masks].mean(0).detach()
    torch.testing.assert_close(method.patch_loss.center.flatten(), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_dinov2_is_its_formula(fused):
    case = CASES["dinov2"]
    args = {**case.args, "fused_head": fused, "koleo_weight": 0.3}
    method, batch = ready(replace(case, args=args)), make_batch(case, dtype=torch.float64)
    outputs = method(batch)
    masks, logits, raw, patches, targets, seen = patches_by_image(method, batch)
    q = torch.zeros_like(targets)
    q[masks] = sinkhorn(targets[masks], 0.05)
    expected = crossed(sinkhorn(torch.cat(raw), 0.05).chunk(2), logits)
    expected = expected + of_patches(masks, patches, q)
    spread = 0.0
    for view in seen.chunk(2):
        unit = normalize(view, dim=1)
        gap = (unit[:, None] - unit[None]).square().sum(-1)
        gap = gap + torch.diag(torch.full((len(gap),), math.inf, dtype=gap.dtype))
        spread = spread - (gap.min(dim=1).values.sqrt() + 1e-8).log().mean()
    torch.testing.assert_close(outputs["koleo_loss"], spread.detach())
    assert_is(method, outputs, expected + 0.3 * spread)


def test_msn_is_its_formula():
    views = [{"number": 3}, {"number": 2, "size": 8}]
    case = replace(MSN, views=views, args={**MSN.args, "me_max_weight": 0.6, "T": 0.4})
    method, batch = build(case).double(), make_batch(case, dtype=torch.float64)
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.1)
    outputs = method(batch)
    student, teacher = method.student, method.teacher
    anchors = []
    for number, view in enumerate(batch.views[1:], start=1):
        kept = method.ids_keep(batch, number) if number < 3 else None
        assert kept is None or kept.shape == (8, 8)
        anchors.append(student.backbone.forward_features(view, ids_keep=kept)[:, 0])
    prototypes = normalize(method.prototypes, dim=1)
    p = (normalize(student.head(torch.cat(anchors)), dim=1) @ prototypes.T / 0.1).softmax(1)
    target = teacher.head(teacher.backbone(batch.views[0]))
    q = (normalize(target, dim=1) @ prototypes.T / 0.1).softmax(1).detach() ** (1 / 0.4)
    q = sinkhorn((q / q.sum(1, keepdim=True)).log(), 1.0)
    mean = p.mean(0)
    expected = -(q.repeat(4, 1) * p.log()).sum(1).mean()
    expected = expected + 0.6 * (math.log(9) + (mean * mean.log()).sum())
    torch.testing.assert_close(outputs["teacher_entropy"], -(q * q.log()).sum(1).mean())
    # The statistics of the head's batch normalisation count the anchors of a batch once.
    assert_is(method, outputs, expected)
    torch.testing.assert_close(outputs["features"], teacher.backbone(batch.views[0]))


def test_masks_are_keyed_by_sample_epoch_and_view():
    case = replace(IBOT, args={**PATCHES, "mask_probability": 1.0, "mask_ratio": [0.2, 0.45]})
    method, batch = build(case), make_batch(case)
    first, second = method.masks(batch).chunk(2)
    assert torch.equal(method.masks(batch).chunk(2)[0], first)
    assert not torch.equal(first, second)
    assert not torch.equal(method.masks(replace(batch, epoch=1)).chunk(2)[0], first)
    alone = method.masks(replace(batch, index=batch.index[3:4])).chunk(2)
    assert torch.equal(torch.cat(alone), torch.stack([first[3], second[3]]))
    # 16 patches: from floor(3.2) to floor(7.2).
    counts = method.masks(replace(batch, index=torch.arange(200))).sum(1)
    assert (counts.min(), counts.max()) == (3, 7)

    msn = build(MSN)
    kept = [msn.ids_keep(batch, view) for view in (1, 2)]
    assert not torch.equal(*kept) and torch.equal(msn.ids_keep(batch, 1), kept[0])


@pytest.mark.parametrize("compiles", [False, True])
def test_masked_rows_have_a_fixed_number_where_it_matters(compiles):
    """On a CPU they are as many as masked patches, unless compiled."""
    masks = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    tokens = torch.arange(3 * 6).view(3, 6, 1)
    function = torch.compile(masked_rows, fullgraph=True) if compiles else masked_rows
    rows = function(masks, 7, num_prefix_tokens=2)
    assert rows.count == 5
    assert rows.of(tokens).shape == (7 if compiles else 5, 1)
    assert rows.of(tokens).flatten()[:5].tolist() == [3, 5, 14, 15, 16]
    assert rows.with_class_tokens(tokens).flatten()[:5].tolist() == [0, 6, 12, 3, 5]
    torch.testing.assert_close(rows.weights[:5], torch.tensor([1 / 2] * 2 + [1 / 3] * 3))
    # Too many are left out, and of none there is a row.
    assert function(masks, 4, num_prefix_tokens=2).count == 4
    assert masked_rows(masks & False, 7, 2).index.shape == (1,)


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_nothing_masked_is_the_loss_of_class_tokens(name):
    case = CASES[name]
    method = build(replace(case, args={**case.args, "mask_probability": 0.0}))
    outputs = method(make_batch(case))
    outputs["loss"].backward()
    assert outputs["patch_loss"] == 0
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    method.after_step()
    assert all(buffer.isfinite().all() for buffer in method.buffers())


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_two_views_will_do(name):
    case = replace(CASES[name], views=[{"number": 2}])
    assert build(case)(make_batch(case))["loss"].isfinite()


def test_the_teacher_has_no_stochastic_depth():
    method = build(replace(DINOV2, model_args={**TINY_VIT, "drop_path_rate": 0.3}))
    assert method.student.backbone.blocks[1].drop_path.drop_prob == pytest.approx(0.3)
    assert method.teacher.backbone.blocks[1].drop_path.drop_prob == 0


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ibot", "dinov2", "msn")]


@pytest.mark.parametrize("name", ["dino", *SLOW])
def test_a_new_temperature_and_epoch_are_no_new_graphs(name):
    case, graphs, counts = CASES[name], [], []
    method = build(case)

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(method, backend=count, fullgraph=True)
    for epoch in range(3):
        for temperature in (0.04, 0.05):
            batch = replace(make_batch(case), epoch=epoch)
            method.before_step({"teacher_momentum": 0.9, "teacher_temp": temperature})
            loss = compiled(batch)["loss"]
            method.skip_step()
            torch.testing.assert_close(loss, method(batch)["loss"], rtol=1e-4, atol=1e-5)
            method.skip_step()
            counts.append(len(graphs))
    # An epoch that has changed once is a number that may change.
    assert counts[1] == 1 and counts[-1] == counts[2] <= 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (replace(DINO, views=[{}]), "must make at least 2 views of a sample for dino, got 1"),
        (replace(IBOT, views=[{}]), "must make at least 2 views of a sample for ibot, got 1"),
        (
            replace(DINOV2, views=[{}, {"size": 8}]),
            r"the first two views of one size for dinov2, got \(16, 16\) and \(8, 8\)",
        ),
        (replace(MSN, views=[{}, {"size": 8}]), "first two views of one size for msn"),
        (replace(MSN, args={"mask_ratio": 1}), "mask_ratio must be between 0 and 1, got 1"),
        (
            replace(IBOT, args={**HEAD, "patch_out_dim": 5}),
            "patch_out_dim must be out_dim for a shared_head, got 5 and 11",
        ),
        (
            replace(IBOT, args={"mask_ratio": [0.5, 0.1]}),
            r"mask_ratio must be 0 <= smallest <= largest <= 1, got \[0.5, 0.1\]",
        ),
        (replace(DINO, name=MSN.name, args={}), "must build a VisionTransformer for method msn"),
        (replace(DINO, args={**HEAD, "centering": "mean"}), "centering must be one of softmax, s"),
    ],
)
def test_bad_arguments_are_named(case, message):
    with pytest.raises(ValueError, match=message):
        build(case)


def test_a_bad_temperature_is_named():
    with pytest.raises(ValueError, match=r"teacher_temp must be positive, got 0.0"):
        build(DINO).before_step({"teacher_momentum": 0.9, "teacher_temp": 0.0})
