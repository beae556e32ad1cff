"""The table of methods: what its verdicts mean, and that it goes on where it stopped."""

import json

import pytest

from benchmarks import methods, report


def row(method="simclr", seed=0, knn=(50.0, 60.0), linear=(60.0, 65.0), std=(0.5, 0.5)):
    measures = {"knn": knn, "linear": linear, "rankme": (10.0, 20.0), "feature_std": std}
    return {
        "method": method,
        "data": "photos",
        "seed": seed,
        "recipe": methods.digest(methods.recipe_of(method)),
        "before": {name: values[0] for name, values in measures.items()},
        "after": {name: values[1] for name, values in measures.items()},
        "images_per_s": 100.0,
        "peak_memory_mb": 500.0,
        "machine": {"cpu": "a processor", "threads": 1},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789ab",
        "date": "2026-11-27",
    }


def rows_of(**measures):
    """One row per seed; each measure is a list of (before, after) by seed."""
    return [row(seed=i, **{k: v[i] for k, v in measures.items()}) for i in range(3)]


NAN = float("nan")


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([row()], "one seed only"),
        (rows_of(knn=[(50, 60), (50, 62), (50, 58)]), "rises"),
        # One of the two suffices, but not where a seed's gain is within the spread.
        (rows_of(knn=[(50, 49)] * 3, linear=[(60, 70), (60, 71), (60, 69)]), "rises"),
        (rows_of(knn=[(50, 51), (50, 60), (50, 52)], linear=[(60, 60)] * 3), "within the spread"),
        (rows_of(knn=[(50, 40)] * 3, linear=[(60, 55)] * 3), "falls"),
        (rows_of(std=[(0.5, 0.5), (0.5, 0.01), (0.5, 0.5)]), "collapses"),
        (rows_of(knn=[(50, 60), (50, NAN), (50, 60)]), "diverges"),
    ],
)
def test_verdicts(rows, expected):
    assert methods.verdict(rows) == expected
    assert expected in methods.table(rows)


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    methods.write(file, [row("simclr", 0)])
    ran = []

    def run_method(method, seed, data):
        ran.append((method, seed))
        if method == "dino":
            raise RuntimeError("dino, seed 0: it broke")
        return row(method, seed) | {"seconds": 1.0}

    monkeypatch.setattr(methods, "run_method", run_method)
    arguments = ["simclr", "byol", "dino", "--seeds", "0", "1", "--json", str(file)]
    assert methods.main(arguments) == 1
    assert ran == [("byol", 0), ("dino", 0), ("simclr", 1), ("byol", 1), ("dino", 1)]
    assert "it broke" in capsys.readouterr().err
    there = {(r["method"], r["seed"]) for r in json.loads(file.read_text())}
    assert there == {("simclr", 0), ("byol", 0), ("simclr", 1), ("byol", 1)}
    # Another recipe is another run.
    rows = methods.read(file)
    methods.write(file, [r | {"recipe": "other"} if r["seed"] else r for r in rows])
    ran.clear()
    methods.main(["simclr", "--seeds", "0", "1", "--json", str(file)])
    assert ran == [("simclr", 1)]


def test_every_method_has_a_small_recipe():
    from fastssl.methods import METHODS

    assert methods.methods() == sorted(METHODS)


def test_the_readme_shows_what_is_committed():
    content = methods.tables(report.committed_results(methods.RESULTS))
    assert report.update_readme("methods", content, report.README, check=True)


def test_digits_are_judged_with_few_labels(tmp_path):
    few = [
        row(seed=i) | {"data": "digits", "before": {"low_shot_1": 40.0, "low_shot_5": 60.0}}
        for i in range(2)
    ]
    rows = [r | {when: {**row()[when], **r["before"]} for when in ("before", "after")} for r in few]
    for r, after in zip(rows, (50.0, 52.0), strict=True):
        r["after"]["low_shot_1"] = after
    assert methods.verdict(rows) == "rises"
    assert "1 label before → after" in methods.table(rows) and "k-NN" not in methods.table(rows)
    file = tmp_path / "rows.json"
    methods.write(file, rows)
    with pytest.raises(SystemExit):
        methods.main(["simclr", "--json", str(file)])
