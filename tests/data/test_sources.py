"""Files, shards, shards behind URLs and datasets give the same batches, whoever reads them."""

import functools

import pytest
import torch

from fastssl.data import build_datasets, build_loader
from fastssl.data.loader import epoch_permutation, steps_per_epoch
from fastssl.data.pictures import ShardWindow
from tests.data.shards import png, write_shards

NUM, PER_SHARD = 22, 5
BROKEN = 8
SOURCES = ["folder", "shards", "braces", "url", "hub"]
# Windows are of shards.
WINDOWS = [*((source, 0) for source in SOURCES), ("shards", 2), ("url", 2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What to write for `data`, of the same pictures in the same order."""
    root = tmp_path_factory.mktemp("sources")
    pictures = [png(i) for i in range(NUM)]
    pictures[BROKEN] = pictures[BROKEN][:60]
    (root / "folder").mkdir()
    for i, content in enumerate(pictures):
        (root / "folder" / f"{i:05d}.png").write_bytes(content)
    write_shards(root / "shards", pictures, PER_SHARD)
    last = (NUM - 1) // PER_SHARD
    braces = f"{root}/shards/{{000..{last:03d}}}.tar"
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(label=datasets.Value("int64"), photo=datasets.Image())
    columns = {"label": [0] * NUM, "photo": [{"bytes": c, "path": None} for c in pictures]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(root / "hub"))
    return {
        "folder": str(root / "folder"),
        "shards": str(root / "shards"),
        "braces": braces,
        "url": f"pipe:cat {braces}",
        "hub": f"hf:{root}/hub",
    }


def dataset_of(data, **options):
    options = {"image_size": 8, "max_eval_images": 0, "seed": 1, **options}
    return build_datasets(data, **options)[0]


def batches_of(dataset, **options):
    return list(build_loader(dataset, **{"global_batch_size": 8, "num_steps": 5, **options}))


def joined(batches, step, accumulation=1):
    parts = [b for of_rank in batches for b in of_rank[step * accumulation :][:accumulation]]
    return torch.cat([p.index for p in parts]), torch.cat([p.images for p in parts])


@functools.cache
def expected(folder):
    return batches_of(dataset_of(folder))


@pytest.mark.parametrize("source", SOURCES)
def test_all_sources_give_the_same_batches(data, source):
    loader = build_loader(dataset_of(data[source]), global_batch_size=8, num_steps=5)
    for got, wanted in zip(loader, expected(data["folder"]), strict=True):
        assert torch.equal(got.index, wanted.index) and torch.equal(got.images, wanted.images)
    (name,) = loader.skipped
    assert name.endswith(f"{BROKEN:05d}.png" if source != "hub" else f"hub[{BROKEN}]")
    assert loader.skipped[name]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("source", "window"), WINDOWS)
def test_any_number_of_ranks_workers_and_restarts(data, source, window, repeats):
    dataset = dataset_of(data[source], shard_window=window, repeats=repeats)
    one = [batches_of(dataset)]
    for world_size, accumulation in ((2, 1), (4, 1), (2, 2)):
        several = [
            batches_of(dataset, rank=rank, world_size=world_size, accumulation=accumulation)
            for rank in range(world_size)
        ]
        for step in range(5):
            for a, b in zip(joined(several, step, accumulation), joined(one, step), strict=True):
                assert torch.equal(a, b)
    for resumed in (
        batches_of(dataset, start_step=3),
        batches_of(dataset, start_step=3, num_workers=2, prefetch=1),
    ):
        assert len(resumed) == 2
        for got, wanted in zip(resumed, one[0][3:], strict=True):
            assert got.step == wanted.step and got.epoch == wanted.epoch
            assert torch.equal(got.index, wanted.index) and torch.equal(got.images, wanted.images)


@pytest.mark.parametrize(("source", "window"), WINDOWS)
def test_an_epoch_sees_every_sample_once(data, source, window):
    dataset = dataset_of(data[source], shard_window=window)
    orders = []
    for epoch in range(2):
        steps = range(epoch * 2, epoch * 2 + 2)
        batches = batches_of(dataset, global_batch_size=11, num_steps=4)
        orders.append(torch.cat([batches[step].index for step in steps]))
        assert {batches[step].epoch for step in steps} == {epoch}
        assert torch.equal(orders[-1].sort().values, torch.arange(NUM))
    assert not torch.equal(*orders)


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_a_window_of_no_shards_is_refused(data, source):
    with pytest.raises(ValueError, match=r"loader\.shard_window must be 0 .* got 2"):
        dataset_of(data[source], shard_window=2)


def test_repeats_are_in_the_same_batch_with_crops_of_their_own(data):
    plain, dataset = dataset_of(data["folder"]), dataset_of(data["folder"], repeats=3)
    assert len(dataset) == 3 * len(plain) == 3 * NUM
    assert steps_per_epoch(dataset, 6) == NUM // 2
    batches = batches_of(dataset, global_batch_size=6, num_steps=NUM // 2)
    index = torch.cat([batch.index for batch in batches]).reshape(NUM, 3)
    assert torch.equal(index.flatten().sort().values, torch.arange(3 * NUM))
    assert torch.equal(index % NUM, (index[:, :1] % NUM).expand(-1, 3))
    # The first of the repeats are the samples, and the crops, of a run without.
    alone = batches_of(plain, global_batch_size=2, num_steps=NUM // 2)
    for batch, one in zip(batches, alone, strict=True):
        assert torch.equal(batch.index[::3], one.index)
        assert torch.equal(batch.images[::3], one.images)
        for copies in batch.images.reshape(2, 3, -1):
            assert len(copies.unique(dim=0)) == 3


def test_fewer_samples_than_a_batch_are_repeated_with_repeats_too(data):
    dataset = dataset_of(data["folder"], repeats=2)
    batch = batches_of(dataset, global_batch_size=88, num_steps=1)[0]
    assert torch.equal(batch.index.sort().values, torch.arange(88))
    assert torch.equal(batch.index[::2] % NUM, batch.index[1::2] % NUM)
    with pytest.raises(ValueError, match="must be a multiple of repeats = 2, got 7"):
        build_loader(dataset, global_batch_size=7, num_steps=1)


def test_a_window_of_shards():
    """At any time an epoch reads from about as many shards as it may, each of them for a while."""
    counts = torch.randint(30, 60, (40,), generator=torch.Generator().manual_seed(0))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    number = int(starts[-1])
    orders = [
        epoch_permutation(number, seed=3, epoch=epoch, window=ShardWindow(starts.numpy(), 4))
        for epoch in (0, 1)
    ]
    firsts = []
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(number))
        shard = torch.searchsorted(starts, order, right=True) - 1
        places = torch.arange(number)
        first = torch.full((40,), number).scatter_reduce(0, shard, places, "amin")
        last = torch.zeros(40, dtype=torch.long).scatter_reduce(0, shard, places, "amax")
        alive = (first[:, None] <= places) & (places <= last[:, None])
        assert alive.sum(dim=0).max() <= 5
        assert alive.sum(dim=0)[200:-200].float().mean() > 3.5
        # Neighbours in the order come from different shards.
        assert (shard[1:] == shard[:-1]).float().mean() < 0.5
        firsts.append(first.argsort())
    assert not torch.equal(*orders) and not torch.equal(*firsts)
